// CUDA launches of the convolution; what each thread does is in medspark/generic/conv3d.h.
#include "medspark/generic/conv3d.h"

#include "launch.cuh"

namespace medspark::cuda {
namespace {

template <bool backward>
int64_t bytes(const Conv3d& op) {
  int64_t size = 0;
  dispatch(op.dtype, [&](auto tag) {
    size = generic::bytes_of<generic::ConvWorkspace<decltype(tag), backward>>(op);
  });
  return size;
}

}  // namespace

int64_t conv3d_workspace(const Conv3d& op) { return bytes<false>(op); }

int64_t conv3d_input_workspace(const Conv3d& op) { return bytes<true>(op); }

int64_t conv3d_weight_workspace(const Conv3d& op) {
  int64_t size = 0;
  dispatch(op.dtype, [&](auto tag) {
    size = generic::bytes_of<generic::WeightWorkspace<decltype(tag)>>(op);
  });
  return size;
}

void conv3d(const Stream& stream, const Conv3d& op, const void* x, const void* weight,
            const void* bias, void* y, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::conv3d<false>(op, static_cast<const T*>(x), static_cast<const T*>(weight),
                           static_cast<const T*>(bias), static_cast<T*>(y), workspace, launch);
  });
}

void conv3d_input(const Stream& stream, const Conv3d& op, const void* dy, const void* weight,
                  void* dx, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::conv3d<true>(op, static_cast<const T*>(dy), static_cast<const T*>(weight),
                          static_cast<const T*>(nullptr), static_cast<T*>(dx), workspace, launch);
  });
}

void conv3d_weight(const Stream& stream, const Conv3d& op, const void* x, const void* dy, void* dw,
                   void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    generic::conv3d_weight(op, static_cast<const T*>(x), static_cast<const T*>(dy),
                           static_cast<Acc*>(dw), workspace, launch);
  });
}

}  // namespace medspark::cuda
