// From a run-time element type to a compile-time one.
#pragma once

#include "medspark/types.h"

namespace medspark {

template <class F>
void dispatch(DType dtype, F&& run) {
  if (dtype == DType::f32) run(float{});
  if (dtype == DType::f64) run(double{});
  if (dtype == DType::bf16) run(bf16{});
  if (dtype == DType::f16) run(f16{});
}

}  // namespace medspark
