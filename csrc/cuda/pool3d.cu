// CUDA launches of the pools; what each thread does is in medspark/generic/pool3d.h.
#include "medspark/generic/pool3d.h"

#include "launch.cuh"

namespace medspark::cuda {

int64_t max_pool3d_workspace(const Pool3d& op) {
  return generic::bytes_of<generic::PoolWorkspace<false, false>>(op);
}

int64_t max_pool3d_input_workspace(const Pool3d& op) {
  return generic::bytes_of<generic::PoolWorkspace<true, false>>(op);
}

int64_t avg_pool3d_workspace(const Pool3d& op) {
  return generic::bytes_of<generic::PoolWorkspace<false, true>>(op);
}

int64_t avg_pool3d_input_workspace(const Pool3d& op) {
  return generic::bytes_of<generic::PoolWorkspace<true, true>>(op);
}

void max_pool3d(const Stream& stream, const Pool3d& op, const void* x, void* y, int16_t* argmax,
                void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::max_pool3d(op, static_cast<const T*>(x), static_cast<T*>(y), argmax, workspace,
                        launch);
  });
}

void max_pool3d_input(const Stream& stream, const Pool3d& op, const void* dy, const int16_t* argmax,
                      void* dx, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::max_pool3d_input(op, static_cast<const T*>(dy), argmax, static_cast<T*>(dx), workspace,
                              launch);
  });
}

void avg_pool3d(const Stream& stream, const Pool3d& op, const void* x, void* y, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::avg_pool3d(op, static_cast<const T*>(x), static_cast<T*>(y), workspace, launch);
  });
}

void avg_pool3d_input(const Stream& stream, const Pool3d& op, const void* dy, void* dx,
                      void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::avg_pool3d_input(op, static_cast<const T*>(dy), static_cast<T*>(dx), workspace,
                              launch);
  });
}

}  // namespace medspark::cuda
