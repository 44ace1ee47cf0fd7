// Between packed blocks and dense volumes.
#pragma once

#include "medspark/types.h"

namespace medspark {

struct Densify {
  DType dtype;
  Level level;
  int64_t channels;
  int64_t strides[5];  // of the dense tensor [B, C, D, H, W], in elements
  int threads;
};

// dense = features at active voxels, token [C] (null: zero) at hidden ones.
void densify(const Densify& op, const void* features, const void* token, void* dense);

// features = dense at active voxels: the inverse, and the gradient of densify with respect to
// features.
void gather(const Densify& op, const void* dense, void* features);

// Gradient with respect to the token: sum of `dense` over hidden voxels, [C] in the accumulation
// type.
void sum_hidden(const Densify& op, const void* dense, void* token);

// The same on a CUDA device: every pointer, the level's tables included, is device memory. Nothing
// is allocated and nothing waits; `workspace` holds at least `sum_hidden_workspace(op)` bytes.
namespace cuda {
int64_t sum_hidden_workspace(const Densify& op);
void densify(const Stream& stream, const Densify& op, const void* features, const void* token,
             void* dense);
void gather(const Stream& stream, const Densify& op, const void* dense, void* features);
void sum_hidden(const Stream& stream, const Densify& op, const void* dense, void* token,
                void* workspace);
}  // namespace cuda

}  // namespace medspark
