// Source of the microkernels, compiled once per instruction set. The including file defines
//   MEDSPARK_ISA           namespace and name
//   MEDSPARK_VECTOR_BYTES  bytes of a vector register
//   MEDSPARK_ROWS          rows of a register tile: rows x 2 vectors of accumulators
// Everything here has internal linkage or sits in the ISA's own namespace, so that the linker can
// never hand code compiled for a wide instruction set to a processor without it.

#include <utility>

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
template <class T>
constexpr int64_t columns_of = 2 * Lanes<AccOf<T>>::count;

#define MEDSPARK_INLINE inline __attribute__((always_inline))

// sums += numbers[r] * w for R numbers and the two vectors of w. The number must be broadcast once
// and stay in a register: as a memory operand of both multiplications it would be loaded twice,
// and loads would be the limit.
template <class T, int R, class At>
MEDSPARK_INLINE void multiply_add(At&& number, const AccOf<T>* w, VectorOf<T>* lo,
                                  VectorOf<T>* hi) {
  using V = VectorOf<T>;
  const V w0 = *reinterpret_cast<const V*>(w);
  const V w1 = *reinterpret_cast<const V*>(w + Lanes<AccOf<T>>::count);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    V a = number(r) - V{};
#if MEDSPARK_VECTOR_BYTES == 64
    asm("" : "+v"(a));
#endif
    lo[r] += a * w0;
    hi[r] += a * w1;
  }
}

// lo, hi += rows * slab, over `depth` channels of R rows.
#ifdef MEDSPARK_BF16_PAIRS
template <class T, int R>
MEDSPARK_INLINE void multiply_rows(const T* const* rows, int64_t depth, const AccOf<T>* slab,
                                   VectorOf<T>* lo, VectorOf<T>* hi);
template <class T>
constexpr int64_t steps(int64_t depth) {
  return (depth + 1) / 2;
}
#else
template <class T, int R>
MEDSPARK_INLINE void multiply_rows(const T* const* rows, int64_t depth, const AccOf<T>* slab,
                                   VectorOf<T>* lo, VectorOf<T>* hi) {
  for (int64_t c = 0; c < depth; ++c)
    multiply_add<T, R>([&](int r) { return Element<T>::load(rows[r][c]); },
                       slab + c * columns_of<T>, lo, hi);
}

template <class T>
constexpr int64_t steps(int64_t depth) {
  return depth;
}
#endif

constexpr int64_t zero_depth = 256;  // longest run of zeros that stands in for an absent row
alignas(64) const double zeros[zero_depth] = {};

// Every loop over the rows of a tile is unrolled: arrays indexed by constants live in registers.
template <class T, int R>
MEDSPARK_INLINE void clear(VectorOf<T>* lo, VectorOf<T>* hi) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) lo[r] = hi[r] = VectorOf<T>{};
}

template <class T, int R>
MEDSPARK_INLINE void add_to(const VectorOf<T>* lo, const VectorOf<T>* hi, const int32_t* place,
                            AccOf<T>* acc) {
  using V = VectorOf<T>;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    AccOf<T>* to = acc + place[r] * columns_of<T>;
    *reinterpret_cast<V*>(to) += lo[r];
    *reinterpret_cast<V*>(to + Lanes<AccOf<T>>::count) += hi[r];
  }
}

// R rows x 2 vectors of accumulators, kept in registers over all taps and channels. Absent rows
// read zeros, a tap without any row is skipped. The sums start from zero and are added to `acc`
// once: partial sums of similar length lose less than one long chain.
template <class T, int R>
void gemm_tile(const T* source, const int64_t* offset, int64_t tap_step, int64_t taps,
               int64_t depth, const AccOf<T>* slab, const int32_t* place, AccOf<T>* acc) {
  VectorOf<T> lo[R], hi[R];
  clear<T, R>(lo, hi);
  const int64_t tap_size = steps<T>(depth) * columns_of<T>;
  for (int64_t t = 0; t < taps; ++t, offset += tap_step, slab += tap_size) {
    int64_t all = -1;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) all &= offset[r];
    if (all < 0) continue;
    for (int64_t start = 0; start < depth; start += zero_depth) {
      const T* rows[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        rows[r] = offset[r] < 0 ? reinterpret_cast<const T*>(zeros) : source + offset[r] + start;
      multiply_rows<T, R>(rows, depth - start < zero_depth ? depth - start : zero_depth,
                          slab + steps<T>(start) * columns_of<T>, lo, hi);
    }
  }
  add_to<T, R>(lo, hi, place, acc);
}

// Calls run(i, rows) for tiles of `largest` rows; what is left at the end is split evenly, because
// a tile of one or two rows takes as long as one of four.
template <class F>
MEDSPARK_INLINE void for_each_tile(int64_t n, int64_t largest, F&& run) {
  int64_t i = 0;
  for (; n - i >= 2 * largest || n - i == largest; i += largest) run(i, largest);
  if (n - i > largest) {
    const int64_t half = (n - i + 1) / 2;
    run(i, half);
    i += half;
  }
  if (i < n) run(i, n - i);
}

template <class T, int... R>
void gemm_any(std::integer_sequence<int, R...>, const T* source, const int64_t* offset,
              int64_t tap_step, int64_t n, int64_t taps, int64_t depth, const AccOf<T>* slab,
              const int32_t* place, AccOf<T>* acc) {
  static constexpr decltype(&gemm_tile<T, 1>) tiles[] = {gemm_tile<T, R + 1>...};
  for_each_tile(n, MEDSPARK_ROWS, [&](int64_t i, int64_t rows) {
    tiles[rows - 1](source, offset + i, tap_step, taps, depth, slab, place + i, acc);
  });
}

using TileSizes = std::make_integer_sequence<int, MEDSPARK_ROWS>;

template <class T>
void gemm(const T* source, const int64_t* offset, int64_t tap_step, int64_t n, int64_t taps,
          int64_t depth, const AccOf<T>* slab, const int32_t* place, AccOf<T>* acc) {
  gemm_any<T>(TileSizes{}, source, offset, tap_step, n, taps, depth, slab, place, acc);
}

// The sums of a tile are read at its end: from far, if there are many weights.
template <int R>
MEDSPARK_INLINE void fetch_early(const void* out) {
  for (int line = 0; line < R * 2 * MEDSPARK_VECTOR_BYTES; line += 64)
    __builtin_prefetch(static_cast<const char*>(out) + line, 1);
}

constexpr int32_t in_order[] = {0, 1, 2, 3, 4, 5, 6, 7};

#ifdef MEDSPARK_BF16_PAIRS
#include "microkernel_pairs.inl"
#else

// R channels x 2 vectors of accumulators over all rows.
template <class T, int R>
void outer_tile(const T* rows, const int64_t* at, int64_t n, const T* panel, const int32_t* place,
                T* out) {
  VectorOf<T> lo[R], hi[R];
  clear<T, R>(lo, hi);
  fetch_early<R>(out);
  for (int64_t i = 0; i < n; ++i) {
    const T* row = rows + at[i];
    multiply_add<T, R>([&](int r) { return row[r]; }, panel + place[i] * columns_of<T>, lo, hi);
  }
  add_to<T, R>(lo, hi, in_order, out);
}

template <class T, int... R>
void outer_any(std::integer_sequence<int, R...>, const T* rows, const int64_t* at, int64_t n,
               int64_t channels, const T* panel, const int32_t* place, T* out) {
  static constexpr decltype(&outer_tile<T, 1>) tiles[] = {outer_tile<T, R + 1>...};
  for_each_tile(channels, MEDSPARK_ROWS, [&](int64_t c, int64_t size) {
    tiles[size - 1](rows + c, at, n, panel, place, out + c * columns_of<T>);
  });
}

template <class Acc>
void outer(const Acc* rows, const int64_t* at, int64_t n, int64_t channels, const Acc* panel,
           const int32_t* place, Acc* out) {
  outer_any<Acc>(TileSizes{}, rows, at, n, channels, panel, place, out);
}

// n numbers in the accumulation type.
template <class T>
void convert(const T* from, int64_t n, AccOf<T>* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Element<T>::load(from[i]);
}

#if defined(__AVX512F__)
template <>
void convert<f16>(const f16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 inside = static_cast<__mmask16>(n - i < 16 ? (1u << (n - i)) - 1 : 0xffffu);
    const __m256i halves = _mm256_maskz_loadu_epi16(inside, from + i);
    _mm512_mask_storeu_ps(to + i, inside, _mm512_maskz_cvtph_ps(inside, halves));
  }
}
#elif defined(__AVX2__)
template <>
__attribute__((target("f16c"))) void convert<f16>(const f16* from, int64_t n, float* to) {
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
#endif

template <class T>
void gather(const T* source, const int64_t* offset, int64_t n, int64_t channels, AccOf<T>* to) {
  for (int64_t i = 0; i < n; ++i) convert<T>(source + offset[i], channels, to + i * outer_channels);
}

template <class T>
void widen(const T* from, int64_t columns, AccOf<T>* to) {
  convert<T>(from, columns, to);
  for (int64_t j = columns; j < columns_of<T>; ++j) to[j] = 0;
}

// Half precision runs as float, on rows widened a piece at a time: converting vectors costs little
// beside the sums, converting each number inside a tile would cost more than them.
void gemm_half(const f16* source, const int64_t* offset, int64_t tap_step, int64_t n, int64_t taps,
               int64_t depth, const float* slab, const int32_t* place, float* acc) {
  float wide[MEDSPARK_ROWS * zero_depth];
  int64_t at[MEDSPARK_ROWS];
  for (int64_t i = 0; i < n; i += MEDSPARK_ROWS)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t start = 0; start < depth; start += zero_depth) {
        const int64_t m = n - i < MEDSPARK_ROWS ? n - i : MEDSPARK_ROWS;
        const int64_t length = depth - start < zero_depth ? depth - start : zero_depth;
        for (int64_t r = 0; r < m; ++r) {
          const int64_t row = offset[t * tap_step + i + r];
          at[r] = row < 0 ? -1 : r * zero_depth;
          if (row >= 0) convert(source + row + start, length, wide + at[r]);
        }
        gemm<float>(wide, at, 0, m, 1, length, slab + (t * depth + start) * columns_of<float>,
                    place + i, acc);
      }
}

#include "microkernel_channels.inl"

#endif  // MEDSPARK_BF16_PAIRS

template <class T>
void narrow(const AccOf<T>* from, int64_t columns, T* to) {
  for (int64_t j = 0; j < columns; ++j) to[j] = Element<T>::store(from[j]);
}

// As to_bf16, without its branch: a compiler makes vectors of this.
template <>
void narrow<bf16>(const float* from, int64_t columns, bf16* to) {
  for (int64_t j = 0; j < columns; ++j) {
    uint32_t bits;
    memcpy(&bits, from + j, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    const uint32_t nan = bits >> 16 | 0x0040u;
    to[j].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
  }
}

}  // namespace

#define MEDSPARK_TEXT_(x) #x
#define MEDSPARK_TEXT(x) MEDSPARK_TEXT_(x)
template <class T>
Microkernel<T> make();
#ifdef MEDSPARK_BF16_PAIRS
// What multiplies number by number has no use for pairs and stays null here.
template <>
Microkernel<bf16> make<bf16>() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA),
          columns_of<bf16>,
          2,
          gemm<bf16>,
          nullptr,
          gather_pairs,
          outer_pairs,
          widen_pairs,
          narrow<bf16>};
}
#else
template <class T>
Microkernel<T> make() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA),
          columns_of<T>,
          1,
          gemm<T>,
          channels<T>,
          gather<T>,
          outer<AccOf<T>>,
          widen<T>,
          narrow<T>};
}
template <>
Microkernel<f16> make<f16>() {
  return {MEDSPARK_TEXT(MEDSPARK_ISA),
          columns_of<f16>,
          1,
          gemm_half,
          channels<f16>,
          gather<f16>,
          outer<float>,
          widen<f16>,
          narrow<f16>};
}
template Microkernel<float> make<float>();
template Microkernel<double> make<double>();
template Microkernel<bf16> make<bf16>();

Ramps make_ramps() { return {ramp_offsets, ramp_places}; }
#endif

}  // namespace medspark::MEDSPARK_ISA
