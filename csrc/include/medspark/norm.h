// Normalisation of packed rows by the statistics of their segment.
//
// A segment is a run of rows: the whole batch for batch norm, one sample for instance norm.
//   y = (x - mean) / sqrt(var + eps) * weight + bias, var biased, per segment and channel.
// Statistics are merged from chunks of fixed size in a fixed order (Chan, Golub and LeVeque 1979),
// in double, so the result does not depend on the number of threads.
#pragma once

#include "medspark/types.h"

namespace medspark {

struct Norm {
  DType dtype;  // of x, y and their gradients
  int64_t n_segments;
  const int64_t* starts;  // [n_segments + 1] first row of each segment, then the number of rows
  int64_t rows;           // of x: the last of `starts`
  int64_t channels;
  double eps;
  int threads;
};

// Parameters and statistics have the accumulation type (float; double for f64). weight and bias may
// be null. x [rows, C] -> y [rows, C], mean [segments, C], var [segments, C].
void norm(const Norm& op, const void* x, const void* weight, const void* bias, void* y, void* mean,
          void* var);

// dx [rows, C]; dweight, dbias [C] (either may be null).
void norm_input(const Norm& op, const void* dy, const void* x, const void* weight, const void* mean,
                const void* var, void* dx, void* dweight, void* dbias);

// The same on a CUDA device, where `starts` is device memory too. Nothing is allocated and nothing
// waits; `workspace` holds at least `norm_workspace(op)` bytes.
namespace cuda {
int64_t norm_workspace(const Norm& op);
int64_t norm_input_workspace(const Norm& op);
void norm(const Stream& stream, const Norm& op, const void* x, const void* weight, const void* bias,
          void* y, void* mean, void* var, void* workspace);
void norm_input(const Stream& stream, const Norm& op, const void* dy, const void* x,
                const void* weight, const void* mean, const void* var, void* dx, void* dweight,
                void* dbias, void* workspace);
}  // namespace cuda

}  // namespace medspark
