// Rows of one level onto another level of the same size whose active voxels are others.
#pragma once

#include "medspark/types.h"

namespace medspark {

// `in` and `out` agree in batch and size; their grids, blocks and active cells may differ.
struct Transfer {
  DType dtype;
  Level in;
  Level out;
  int64_t channels;
  int threads;
};

// y [out.rows, C] = the row of x [in.rows, C] at the same voxel, token [C] (null: zero) where that
// voxel is hidden in `in`. Its own gradient with respect to x, with the levels exchanged.
void transfer(const Transfer& op, const void* x, const void* token, void* y);

// Gradient with respect to the token: sum of dy [out.rows, C] over the rows without a source, [C]
// in the accumulation type.
void sum_untransferred(const Transfer& op, const void* dy, void* token);

// The same on a CUDA device: every pointer, the levels' tables included, is device memory. Nothing
// is allocated and nothing waits; `workspace` holds at least `sum_untransferred_workspace(op)`
// bytes.
namespace cuda {
int64_t sum_untransferred_workspace(const Transfer& op);
void transfer(const Stream& stream, const Transfer& op, const void* x, const void* token, void* y);
void sum_untransferred(const Stream& stream, const Transfer& op, const void* dy, void* token,
                       void* workspace);
}  // namespace cuda

}  // namespace medspark
