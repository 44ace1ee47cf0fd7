// Convolution from the active voxels of one level to the active voxels of another.
//
//   y[r, k] = bias[k] + sum over taps t, channels c of w[k, c, t] * x[in(r, t), c]
//
// r runs over the packed rows of `out`; in(r, t) is the row of `in` that tap t reads there, and
// hidden or outside voxels contribute nothing (SparK, arXiv 2301.03580: dense convolution of the
// masked volume, kept at the active voxels of the output level; the active set never dilates by
// itself). Groups: output channel k of group g reads the channels c of group g. Accumulation is
// float (double for f64). Every output element is summed in an order that does not depend on the
// number of threads.
#pragma once

#include "medspark/types.h"

namespace medspark {

struct Conv3d {
  DType dtype;
  Level in;
  Level out;
  Window window;
  int64_t in_channels;
  int64_t out_channels;
  int64_t groups;
  int threads;
};

// x [in.rows, in_channels], weight [out_channels, in_channels / groups, kz, ky, kx], bias
// [out_channels] or null, y [out.rows, out_channels]; all of `dtype`, contiguous.
void conv3d(const Conv3d& op, const void* x, const void* weight, const void* bias, void* y);

// Gradient with respect to x: dy [out.rows, out_channels] -> dx [in.rows, in_channels].
void conv3d_input(const Conv3d& op, const void* dy, const void* weight, void* dx);

// Gradient with respect to the weight, in the accumulation type: dw like weight, float or double.
void conv3d_weight(const Conv3d& op, const void* x, const void* dy, void* dw);

// The same on a CUDA device: every pointer, the levels' tables included, is device memory. Nothing
// is allocated and nothing waits; `workspace` holds at least as many bytes as the size function
// says. The same bits come out of every run: no atomics, fixed order of summation.
namespace cuda {
int64_t conv3d_workspace(const Conv3d& op);
int64_t conv3d_input_workspace(const Conv3d& op);
int64_t conv3d_weight_workspace(const Conv3d& op);
void conv3d(const Stream& stream, const Conv3d& op, const void* x, const void* weight,
            const void* bias, void* y, void* workspace);
void conv3d_input(const Stream& stream, const Conv3d& op, const void* dy, const void* weight,
                  void* dx, void* workspace);
void conv3d_weight(const Stream& stream, const Conv3d& op, const void* x, const void* dy, void* dw,
                   void* workspace);
}  // namespace cuda

}  // namespace medspark
