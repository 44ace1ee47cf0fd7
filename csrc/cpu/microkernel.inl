// Source of the microkernels, compiled once per instruction set. The including file defines
//   MEDSPARK_ISA           namespace and name
//   MEDSPARK_VECTOR_BYTES  bytes of a vector register
//   MEDSPARK_ROWS          rows of a register tile: rows x 2 vectors of accumulators
// Everything here has internal linkage or sits in the ISA's own namespace, so that the linker can
// never hand code compiled for a wide instruction set to a processor without it.

#include "microkernel.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// n half-precision numbers in float.
#if defined(__AVX512F__)
void widen(const f16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 inside = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu);
    const __m256i halves = _mm256_maskz_loadu_epi16(inside, from + i);
    _mm512_mask_storeu_ps(to + i, inside, _mm512_maskz_cvtph_ps(inside, halves));
  }
}
#elif defined(__AVX2__)
__attribute__((target("f16c"))) void widen(const f16* from, int64_t n, float* to) {
  const auto eight = [](const f16* halves) __attribute__((target("f16c"))) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, eight(from + i));
  if (i == n) return;
  f16 last[8] = {};
  float wide[8];
  memcpy(last, from + i, (n - i) * sizeof(f16));
  _mm256_storeu_ps(wide, eight(last));
  memcpy(to + i, wide, (n - i) * sizeof(float));
}
#else
void widen(const f16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Element<f16>::load(from[i]);
}
#endif

// Half precision runs as float, on rows widened a piece at a time: converting vectors costs little
// beside the sums, converting each number inside a tile would cost more than them.
void gemm_half(const f16* const* rows, int64_t n, int64_t depth, const float* slab, float* acc) {
  constexpr int64_t nr = 2 * Lanes<float>::count;
  float wide[MEDSPARK_ROWS][zero_depth];
  const float* pointer[MEDSPARK_ROWS];
  for (int64_t i = 0; i < n; i += MEDSPARK_ROWS)
    for (int64_t start = 0; start < depth; start += zero_depth) {
      const int64_t m = n - i < MEDSPARK_ROWS ? n - i : MEDSPARK_ROWS;
      const int64_t length = depth - start < zero_depth ? depth - start : zero_depth;
      for (int64_t r = 0; r < m; ++r) {
        pointer[r] = rows[i + r] ? wide[r] : nullptr;
        if (rows[i + r]) widen(rows[i + r] + start, length, wide[r]);
      }
      gemm<float>(pointer, m, length, slab + start * nr, acc + i * nr);
    }
}

void outer_half(const f16* const* rows, int64_t n, int64_t depth, const float* panel, float* out) {
  constexpr int64_t nr = 2 * Lanes<float>::count, piece = 64, channels = 48;
  float wide[piece][channels];
  const float* pointer[piece];
  for (int64_t r = 0; r < piece; ++r) pointer[r] = wide[r];
  for (int64_t i = 0; i < n; i += piece)
    for (int64_t c = 0; c < depth; c += channels) {
      const int64_t m = n - i < piece ? n - i : piece;
      const int64_t length = depth - c < channels ? depth - c : channels;
      for (int64_t r = 0; r < m; ++r) widen(rows[i + r] + c, length, wide[r]);
      outer<float>(pointer, m, length, panel + i * nr, out + c * nr);
    }
}

}  // namespace

#define MEDSPARK_TEXT_(x) #x
#define MEDSPARK_TEXT(x) MEDSPARK_TEXT_(x)
template <class T>
Microkernel<T> make() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA), 2 * Lanes<AccOf<T>>::count, gemm<T>, outer<T>};
}
template <>
Microkernel<f16> make<f16>() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA), 2 * Lanes<float>::count, gemm_half, outer_half};
}
template Microkernel<float> make<float>();
template Microkernel<double> make<double>();
template Microkernel<bf16> make<bf16>();

}  // namespace medspark::MEDSPARK_ISA
