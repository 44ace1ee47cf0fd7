// Mean or maximum of each sample's active voxels; 0 for a sample that has none.
#pragma once

#include "medspark/types.h"

namespace medspark {

struct GlobalPool {
  DType dtype;
  int64_t batch;
  const int64_t* starts;  // [batch + 1] first packed row of each sample, then the number of rows
  int64_t rows;           // of x: the last of `starts`
  int64_t channels;
  bool maximum;
  int threads;
};

// x [rows, C] -> y [batch, C]; argmax int64 [batch, C] (row of the maximum, -1 if none) or null for
// means.
void global_pool(const GlobalPool& op, const void* x, void* y, int64_t* argmax);
void global_pool_input(const GlobalPool& op, const void* dy, const int64_t* argmax, void* dx);

// The same on a CUDA device, where `starts` is device memory too. Nothing is allocated and nothing
// waits; `workspace` holds at least `global_pool_workspace(op)` bytes.
namespace cuda {
int64_t global_pool_workspace(const GlobalPool& op);
void global_pool(const Stream& stream, const GlobalPool& op, const void* x, void* y,
                 int64_t* argmax, void* workspace);
void global_pool_input(const Stream& stream, const GlobalPool& op, const void* dy,
                       const int64_t* argmax, void* dx);
}  // namespace cuda

}  // namespace medspark
