// Separable linear resampling between two levels of any size: interpolation, and its gradient.
#pragma once

#include "medspark/types.h"

namespace medspark {

// Sources of output coordinate o along one axis: `index` and `weight` [start[o] .. start[o + 1]).
struct AxisTable {
  const int32_t* start;  // [out.size + 1]
  const int32_t* index;  // coordinates in [0, in.size)
  const void* weight;    // in the accumulation type
};

// `in` and `out` agree in batch.
struct Resample3d {
  DType dtype;
  Level in;
  Level out;
  AxisTable axis[3];  // z, y, x
  int64_t channels;
  int threads;
};

// y [out.rows, C] = sum over the sources (z, y, x) of their weights' product times the row of
// x [in.rows, C]; hidden sources count as 0. With the transposed tables and the levels exchanged it
// is its own gradient.
void resample3d(const Resample3d& op, const void* x, void* y);

// The same on a CUDA device: every pointer, the tables included, is device memory. Nothing is
// allocated and nothing waits.
namespace cuda {
void resample3d(const Stream& stream, const Resample3d& op, const void* x, void* y);
}  // namespace cuda

}  // namespace medspark
