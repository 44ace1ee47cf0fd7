// Index logic of the sliding-window ops, shared by the CPU and the CUDA code and tested on the CPU.
#pragma once

#include "medspark/types.h"

namespace medspark {

// Input coordinate that output `o` reads through tap `k` along one axis, -1 outside [0, size).
MEDSPARK_HD int64_t input_of(int64_t o, int64_t k, int64_t stride, int64_t padding,
                             int64_t dilation, int64_t size) {
  const int64_t i = o * stride - padding + k * dilation;
  return i >= 0 && i < size ? i : -1;
}

// Output coordinate that reads input `i` through tap `k` along one axis, -1 if there is none.
MEDSPARK_HD int64_t output_of(int64_t i, int64_t k, int64_t stride, int64_t padding,
                              int64_t dilation, int64_t size) {
  const int64_t scaled = i + padding - k * dilation;
  if (scaled < 0 || scaled % stride != 0) return -1;
  const int64_t o = scaled / stride;
  return o < size ? o : -1;
}

// Row of voxel (z, y, x) of sample b in the packed features, -1 if its cell is hidden.
MEDSPARK_HD int64_t row_of(const Level& level, int64_t b, int64_t z, int64_t y, int64_t x) {
  const int64_t* n = level.block;
  const int64_t cell =
      ((b * level.grid[0] + z / n[0]) * level.grid[1] + y / n[1]) * level.grid[2] + x / n[2];
  const int64_t block = level.cells[cell];
  if (block < 0) return -1;
  return ((block * n[0] + z % n[0]) * n[1] + y % n[1]) * n[2] + x % n[2];
}

struct Voxel {
  int64_t b, z, y, x;
};

// The voxel stored in packed row `row`: inverse of row_of.
MEDSPARK_HD Voxel voxel_of(const Level& level, int64_t row) {
  const int64_t* n = level.block;
  int64_t local = row % level.block_voxels();
  int64_t cell = level.blocks[row / level.block_voxels()];
  Voxel v;
  v.x = local % n[2] + cell % level.grid[2] * n[2];
  local /= n[2];
  cell /= level.grid[2];
  v.y = local % n[1] + cell % level.grid[1] * n[1];
  v.z = local / n[1] + cell / level.grid[1] % level.grid[0] * n[0];
  v.b = cell / level.grid[1] / level.grid[0];
  return v;
}

}  // namespace medspark
