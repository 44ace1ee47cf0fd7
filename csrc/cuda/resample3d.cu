// CUDA launches of the resampling; what each thread does is in medspark/generic/resample3d.h.
#include "medspark/generic/resample3d.h"

#include "launch.cuh"

namespace medspark::cuda {

void resample3d(const Stream& stream, const Resample3d& op, const void* x, void* y) {
  const Launcher launch(stream);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    generic::resample3d(op, static_cast<const T*>(x), static_cast<T*>(y), launch);
  });
}

}  // namespace medspark::cuda
