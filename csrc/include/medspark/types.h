// Plain data shared by every op: element types, one level of packed blocks, one sliding window.
//
// A level of a masked volume is stored as packed blocks [n_blocks, bz, by, bx, C], channels last,
// in the row-major order of their cells. `cells` is the only index: it turns a cell of the level's
// grid into a block, so a voxel of any level is found with a division and one look-up, whatever the
// kernel's reach.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEDSPARK_HD __host__ __device__ __forceinline__
#else
#define MEDSPARK_HD inline
#endif

namespace medspark {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2 };

// Storage only; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

struct Level {
  const int32_t* cells;   // [batch, grid[0], grid[1], grid[2]]: block of the cell, -1 if hidden
  const int32_t* blocks;  // [n_blocks]: flat index of the block's cell in `cells`
  int64_t n_blocks;
  int64_t batch;
  int64_t grid[3];   // cells per axis (z, y, x)
  int64_t block[3];  // voxels per cell and axis at this level

  MEDSPARK_HD int64_t size(int axis) const { return grid[axis] * block[axis]; }
  MEDSPARK_HD int64_t block_voxels() const { return block[0] * block[1] * block[2]; }
  MEDSPARK_HD int64_t rows() const { return n_blocks * block_voxels(); }
  MEDSPARK_HD int64_t sample_cells() const { return grid[0] * grid[1] * grid[2]; }
};

struct Window {
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];

  MEDSPARK_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Where a CUDA kernel runs: ordinal of the device, and its cudaStream_t (null: the default stream).
struct Stream {
  int device;
  void* handle;
};

MEDSPARK_HD float to_float(bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

// Round to nearest, ties to even; NaN stays NaN.
MEDSPARK_HD bf16 to_bf16(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

// The type in which T is accumulated, and conversions to and from it.
template <class T>
struct Element {
  using Acc = T;
  MEDSPARK_HD static Acc load(T v) { return v; }
  MEDSPARK_HD static T store(Acc v) { return v; }
};

template <>
struct Element<bf16> {
  using Acc = float;
  MEDSPARK_HD static float load(bf16 v) { return to_float(v); }
  MEDSPARK_HD static bf16 store(float v) { return to_bf16(v); }
};

}  // namespace medspark
