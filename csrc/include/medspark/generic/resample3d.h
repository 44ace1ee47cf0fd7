// Separable resampling, one item of work at a time (see medspark/resample3d.h and
// medspark/generic/conv3d.h for `launch`). An item is (row of `out`, channel), channels fastest.
#pragma once

#include "medspark/index.h"
#include "medspark/resample3d.h"

namespace medspark::generic {

// Along one axis: the sources of a coordinate.
struct Sources {
  int32_t first, end;

  MEDSPARK_HD Sources(const AxisTable& table, int64_t at)
      : first(table.start[at]), end(table.start[at + 1]) {}
};

// One of them, as its cell and its place in the block.
struct Source {
  int32_t cell, local;

  MEDSPARK_HD Source(const Resample3d& op, int axis, int32_t i) {
    const int32_t at = op.axis[axis].index[i], n = static_cast<int32_t>(op.in.block[axis]);
    cell = at / n;
    local = at - cell * n;
  }
};

template <class T>
struct ResampleRow {
  using Acc = typename Element<T>::Acc;

  Resample3d op;
  const T* x;
  T* y;

  MEDSPARK_HD Acc weight(int axis, int32_t i) const {
    return static_cast<const Acc*>(op.axis[axis].weight)[i];
  }

  // Sum of the sources along x of channel c; cell and voxel of the block are those of x = 0.
  MEDSPARK_HD Acc line(const Sources& along, int64_t cell, int64_t voxel, Acc scale, int64_t c,
                       Acc sum) const {
#pragma unroll 1  // a line has few sources, and more of them in flight spill registers
    for (int32_t i = along.first; i < along.end; ++i) {
      const Source source(op, 2, i);
      const int64_t block = op.in.cells[cell + source.cell];
      if (block < 0) continue;
      const int64_t row = block * op.in.block_voxels() + voxel + source.local;
      sum += scale * weight(2, i) * Element<T>::load(x[row * op.channels + c]);
    }
    return sum;
  }

  MEDSPARK_HD void operator()(int64_t i) const {
    const Voxel v = voxel_of(op.out, i / op.channels);
    const Sources in_z(op.axis[0], v.z), in_y(op.axis[1], v.y), in_x(op.axis[2], v.x);
    Acc sum = 0;
    for (int32_t j = in_z.first; j < in_z.end; ++j) {
      const Source z(op, 0, j);
      const int64_t plane = (v.b * op.in.grid[0] + z.cell) * op.in.grid[1];
#pragma unroll 1
      for (int32_t k = in_y.first; k < in_y.end; ++k) {
        const Source row(op, 1, k);
        sum = line(in_x, (plane + row.cell) * op.in.grid[2],
                   (z.local * op.in.block[1] + row.local) * op.in.block[2],
                   weight(0, j) * weight(1, k), i % op.channels, sum);
      }
    }
    y[i] = Element<T>::store(sum);
  }
};

template <class T, class Launch>
void resample3d(const Resample3d& op, const T* x, T* y, Launch&& launch) {
  launch(op.out.rows() * op.channels, ResampleRow<T>{op, x, y});
}

}  // namespace medspark::generic
