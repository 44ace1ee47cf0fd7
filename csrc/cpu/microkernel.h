// The inner loops under every convolution, and their choice by instruction set at run time.
//
// They work on rows given by offset (indirect GEMM: no gathered copy of the activations) and on a
// slab of `nr` output columns. The translation units microkernel_*.cpp compile the same source
// (microkernel.inl) for one instruction set each.
#pragma once

#include "medspark/types.h"

namespace medspark {

constexpr int64_t outer_channels = 64;

template <class T>
struct Microkernel {
  using Acc = typename Element<T>::Acc;

  const char* name;
  int64_t nr;  // columns of a slab
  // Channels that one multiplication takes, side by side in a slab: 2 where the processor
  // multiplies pairs of bf16, which then share one Acc of storage.
  int64_t group;

  // acc[place[i], :] += sum over t of source[offset[t * tap_step + i] ..][0..depth) * slab_t for n
  // rows; a negative offset stands for zeros. slab [taps][steps(depth)][nr], acc [rows][nr].
  void (*gemm)(const T* source, const int64_t* offset, int64_t tap_step, int64_t n, int64_t taps,
               int64_t depth, const Acc* slab, const int32_t* place, Acc* acc);

  // acc[i, :] += sum over k of x[i, k, :] * panel[k, :], number by number, for i < n and k < loops,
  // where x[i, k] are the nr numbers at source + offset[i * step + k * loop_step], or zeros where
  // that is negative. panel [loops][nr], acc [n][nr].
  void (*channels)(const T* source, const int64_t* offset, int64_t step, int64_t loop_step,
                   int64_t n, int64_t loops, const Acc* panel, Acc* acc);

  // Rows for `outer`: n rows of up to `outer_channels` numbers, given by offset (none negative),
  // at to[i * outer_channels], or each two of them as pairs at to[i / 2 * outer_channels].
  void (*gather)(const T* source, const int64_t* offset, int64_t n, int64_t channels, Acc* to);

  // out[c, :] += sum over i of rows[at[i] + c] * panel[place[i], :] for n rows as `gather` leaves
  // them (pairs: at[i / 2]). panel [rows][nr], as `widen` leaves it; out [channels, nr].
  void (*outer)(const Acc* rows, const int64_t* at, int64_t n, int64_t channels, const Acc* panel,
                const int32_t* place, Acc* out);

  // A row of `columns` numbers into the panel of `outer`, zeros up to nr behind it; and back.
  void (*widen)(const T* from, int64_t columns, Acc* to);
  void (*narrow)(const Acc* from, int64_t columns, T* to);

  int64_t steps(int64_t depth) const { return (depth + group - 1) / group; }
};

// The best microkernel that this processor runs. MEDSPARK_CPU=portable|avx2|avx512 lowers
// the choice.
template <class T>
const Microkernel<T>& microkernel();

// The best without pairs: what `channels` needs, its panel being in the accumulation type.
template <class T>
const Microkernel<T>& single_microkernel();

// Writes first, first + step, ...: n numbers, often few.
struct Ramps {
  void (*offsets)(int64_t* to, int64_t n, int64_t first, int64_t step);
  void (*places)(int32_t* to, int64_t n, int32_t first);
};

const Ramps& ramps();

// Name of the instruction set in use.
const char* cpu_kernels();

}  // namespace medspark
