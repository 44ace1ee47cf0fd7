// CUDA launches between packed blocks and dense volumes; what each thread does is in
// medspark/generic/densify.h.
#include "medspark/generic/densify.h"

#include "launch.cuh"

namespace medspark::cuda {

int64_t sum_hidden_workspace(const Densify& op) {
  return generic::bytes_of<generic::HiddenWorkspace>(op);
}

void densify(const Stream& stream, const Densify& op, const void* features, const void* token,
             void* dense) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::densify(op, static_cast<const T*>(features), static_cast<const T*>(token),
                     static_cast<T*>(dense), launch);
  });
}

void gather(const Stream& stream, const Densify& op, const void* dense, void* features) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::gather(op, static_cast<const T*>(dense), static_cast<T*>(features), launch);
  });
}

void sum_hidden(const Stream& stream, const Densify& op, const void* dense, void* token,
                void* workspace) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    generic::sum_hidden(op, static_cast<const T*>(dense), static_cast<Acc*>(token), workspace,
                        launch);
  });
}

}  // namespace medspark::cuda
