// CUDA launches from level to level; what each thread does is in medspark/generic/transfer.h.
#include "medspark/generic/transfer.h"

#include "launch.cuh"

namespace medspark::cuda {

int64_t sum_untransferred_workspace(const Transfer& op) {
  return generic::bytes_of<generic::UntransferredWorkspace>(op);
}

void transfer(const Stream& stream, const Transfer& op, const void* x, const void* token, void* y) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::transfer(op, static_cast<const T*>(x), static_cast<const T*>(token),
                      static_cast<T*>(y), launch);
  });
}

void sum_untransferred(const Stream& stream, const Transfer& op, const void* dy, void* token,
                       void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    generic::sum_untransferred(op, static_cast<const T*>(dy), static_cast<Acc*>(token), workspace,
                               launch);
  });
}

}  // namespace medspark::cuda
