// The two inner loops under every convolution, and their choice by instruction set at run time.
//
// Both work on rows given by pointer (indirect GEMM: no gathered copy of the activations) and on a
// slab of `nr` output columns. The translation units microkernel_{portable,avx2,avx512}.cpp compile
// the same source (microkernel.inl) for one instruction set each.
#pragma once

#include "medspark/types.h"

namespace medspark {

template <class T>
struct Microkernel {
  using Acc = typename Element<T>::Acc;

  const char* name;
  int64_t nr;  // columns of a slab

  // acc[i, :] += rows[i][0..depth) * slab, for n rows; a null row counts as zeros.
  // slab [depth, nr], acc [n, nr].
  void (*gemm)(const T* const* rows, int64_t n, int64_t depth, const Acc* slab, Acc* acc);

  // out[c, :] += sum over i of rows[i][c] * panel[i, :], for `depth` values of c and n rows (none
  // null). panel [n, nr], out [depth, nr].
  void (*outer)(const T* const* rows, int64_t n, int64_t depth, const Acc* panel, Acc* out);
};

// The best microkernel that this processor runs. MEDSPARK_CPU=portable|avx2|avx512 lowers the
// choice.
template <class T>
const Microkernel<T>& microkernel();

// Name of the instruction set in use.
const char* cpu_kernels();

}  // namespace medspark
