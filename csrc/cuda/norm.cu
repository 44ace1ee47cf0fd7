// CUDA launches of the norms; what each thread does is in medspark/generic/norm.h.
#include "medspark/generic/norm.h"

#include "launch.cuh"

namespace medspark::cuda {
namespace {

template <template <class> class Layout>
int64_t bytes(const Norm& op) {
  return op.dtype == DType::f64 ? generic::bytes_of<Layout<double>>(op)
                                : generic::bytes_of<Layout<float>>(op);
}

}  // namespace

int64_t norm_workspace(const Norm& op) { return bytes<generic::NormWorkspace>(op); }

int64_t norm_input_workspace(const Norm& op) { return bytes<generic::NormInputWorkspace>(op); }

void norm(const Stream& stream, const Norm& op, const void* x, const void* weight, const void* bias,
          void* y, void* mean, void* var, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    generic::norm(op, static_cast<const T*>(x), static_cast<const Acc*>(weight),
                  static_cast<const Acc*>(bias), static_cast<T*>(y), static_cast<Acc*>(mean),
                  static_cast<Acc*>(var), workspace, launch);
  });
}

void norm_input(const Stream& stream, const Norm& op, const void* dy, const void* x,
                const void* weight, const void* mean, const void* var, void* dx, void* dweight,
                void* dbias, void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    generic::norm_input(op, static_cast<const T*>(dy), static_cast<const T*>(x),
                        static_cast<const Acc*>(weight), static_cast<const Acc*>(mean),
                        static_cast<const Acc*>(var), static_cast<T*>(dx),
                        static_cast<Acc*>(dweight), static_cast<Acc*>(dbias), workspace, launch);
  });
}

}  // namespace medspark::cuda
