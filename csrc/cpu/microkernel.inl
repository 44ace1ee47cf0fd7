// Source of the microkernels, compiled once per instruction set. The including file defines
//   MEDSPARK_ISA           namespace and name
//   MEDSPARK_VECTOR_BYTES  bytes of a vector register
//   MEDSPARK_ROWS          rows of a register tile: rows x 2 vectors of accumulators
// Everything here has internal linkage or sits in the ISA's own namespace, so that the linker can
// never hand code compiled for a wide instruction set to a processor without it.

#include "microkernel.h"

namespace medspark::MEDSPARK_ISA {
namespace {

template <class Acc>
struct Lanes {
  typedef Acc Vector
      __attribute__((vector_size(MEDSPARK_VECTOR_BYTES), aligned(sizeof(Acc)), may_alias));
  static constexpr int64_t count = MEDSPARK_VECTOR_BYTES / sizeof(Acc);
};

template <class T>
using AccOf = typename Element<T>::Acc;
template <class T>
using VectorOf = typename Lanes<AccOf<T>>::Vector;

// R rows x 2 vectors of accumulators, kept in registers over the whole depth. They start from zero
// and are added to `acc` once: partial sums of similar length lose less than one long chain.
template <class T, int R>
inline __attribute__((always_inline)) void gemm_tile(const T* const* rows, int64_t depth,
                                                     const AccOf<T>* slab, AccOf<T>* acc) {
  using V = VectorOf<T>;
  constexpr int64_t lanes = Lanes<AccOf<T>>::count;
  V lo[R] = {}, hi[R] = {};
  for (int64_t c = 0; c < depth; ++c) {
    const V w0 = *reinterpret_cast<const V*>(slab + c * 2 * lanes);
    const V w1 = *reinterpret_cast<const V*>(slab + c * 2 * lanes + lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const AccOf<T> a = Element<T>::load(rows[r][c]);
      lo[r] += a * w0;
      hi[r] += a * w1;
    }
  }
  for (int r = 0; r < R; ++r) {
    *reinterpret_cast<V*>(acc + r * 2 * lanes) += lo[r];
    *reinterpret_cast<V*>(acc + r * 2 * lanes + lanes) += hi[r];
  }
}

constexpr int64_t zero_depth = 256;  // longest run of zeros that stands in for an absent row
alignas(64) const double zeros[zero_depth] = {};

// One tile of up to MEDSPARK_ROWS rows: absent rows read zeros, a tile without any row is skipped.
template <class T, int R>
inline void gemm_present(const T* const* rows, int64_t depth, const AccOf<T>* slab, AccOf<T>* acc) {
  const T* present[R];
  int missing = 0;
  for (int r = 0; r < R; ++r) missing += rows[r] == nullptr;
  if (missing == R) return;
  constexpr int64_t nr = 2 * Lanes<AccOf<T>>::count;
  for (int64_t start = 0; start < depth; start += zero_depth) {
    const int64_t n = depth - start < zero_depth ? depth - start : zero_depth;
    for (int r = 0; r < R; ++r)
      present[r] = rows[r] ? rows[r] + start : reinterpret_cast<const T*>(zeros);
    gemm_tile<T, R>(present, n, slab + start * nr, acc);
  }
}

template <class T>
void gemm(const T* const* rows, int64_t n, int64_t depth, const AccOf<T>* slab, AccOf<T>* acc) {
  constexpr int64_t nr = 2 * Lanes<AccOf<T>>::count;
  int64_t i = 0;
  for (; i + MEDSPARK_ROWS <= n; i += MEDSPARK_ROWS)
    gemm_present<T, MEDSPARK_ROWS>(rows + i, depth, slab, acc + i * nr);
  for (; i < n; ++i) gemm_present<T, 1>(rows + i, depth, slab, acc + i * nr);
}

// R channels x 2 vectors of accumulators over all rows.
template <class T, int R>
inline __attribute__((always_inline)) void outer_tile(const T* const* rows, int64_t n, int64_t c,
                                                      const AccOf<T>* panel, AccOf<T>* out) {
  using V = VectorOf<T>;
  constexpr int64_t lanes = Lanes<AccOf<T>>::count;
  V lo[R] = {}, hi[R] = {};
  for (int64_t i = 0; i < n; ++i) {
    const V p0 = *reinterpret_cast<const V*>(panel + i * 2 * lanes);
    const V p1 = *reinterpret_cast<const V*>(panel + i * 2 * lanes + lanes);
    const T* row = rows[i] + c;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const AccOf<T> a = Element<T>::load(row[r]);
      lo[r] += a * p0;
      hi[r] += a * p1;
    }
  }
  for (int r = 0; r < R; ++r) {
    *reinterpret_cast<V*>(out + r * 2 * lanes) += lo[r];
    *reinterpret_cast<V*>(out + r * 2 * lanes + lanes) += hi[r];
  }
}

template <class T>
void outer(const T* const* rows, int64_t n, int64_t depth, const AccOf<T>* panel, AccOf<T>* out) {
  constexpr int64_t nr = 2 * Lanes<AccOf<T>>::count;
  int64_t c = 0;
  for (; c + MEDSPARK_ROWS <= depth; c += MEDSPARK_ROWS)
    outer_tile<T, MEDSPARK_ROWS>(rows, n, c, panel, out + c * nr);
  for (; c < depth; ++c) outer_tile<T, 1>(rows, n, c, panel, out + c * nr);
}

}  // namespace

#define MEDSPARK_TEXT_(x) #x
#define MEDSPARK_TEXT(x) MEDSPARK_TEXT_(x)
template <class T>
Microkernel<T> make() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA), 2 * Lanes<AccOf<T>>::count, gemm<T>, outer<T>};
}
template Microkernel<float> make<float>();
template Microkernel<double> make<double>();
template Microkernel<bf16> make<bf16>();

}  // namespace medspark::MEDSPARK_ISA
