// CUDA launches of the global pools; what each thread does is in medspark/generic/global_pool.h.
#include "medspark/generic/global_pool.h"

#include "launch.cuh"

namespace medspark::cuda {

int64_t global_pool_workspace(const GlobalPool& op) {
  return generic::bytes_of<generic::GlobalPoolWorkspace>(op);
}

void global_pool(const Stream& stream, const GlobalPool& op, const void* x, void* y,
                 int64_t* argmax, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::global_pool(op, static_cast<const T*>(x), static_cast<T*>(y), argmax, workspace,
                         launch);
  });
}

void global_pool_input(const Stream& stream, const GlobalPool& op, const void* dy,
                       const int64_t* argmax, void* dx) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::global_pool_input(op, static_cast<const T*>(dy), argmax, static_cast<T*>(dx), launch);
  });
}

}  // namespace medspark::cuda
