// Parts of microkernel.inl where the processor multiplies pairs of bf16 and adds both products to a
// float. Included inside its namespaces.
//
// A slab holds two channels of a column side by side. The products are exact; subnormal numbers
// count as zero, and the sums of a pair round as the instruction does.

using Floats = VectorOf<bf16>;

// sums += numbers[r] * w for R pairs of numbers, each pair in every 32 bits of its vector.
template <int R, class At>
MEDSPARK_INLINE void multiply_pairs(At&& pair, __m512i w0, __m512i w1, Floats* lo, Floats* hi) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    __m512i a = _mm512_set1_epi32(pair(r));
    asm("" : "+v"(a));  // in a register: as a memory operand it would be loaded twice
    lo[r] = (Floats)_mm512_dpbf16_ps((__m512)lo[r], (__m512bh)a, (__m512bh)w0);
    hi[r] = (Floats)_mm512_dpbf16_ps((__m512)hi[r], (__m512bh)a, (__m512bh)w1);
  }
}

template <class T, int R>
MEDSPARK_INLINE void multiply_rows(const T* const* rows, int64_t depth, const AccOf<T>* slab,
                                   VectorOf<T>* lo, VectorOf<T>* hi) {
  int64_t c = 0;
  for (; c + 2 <= depth; c += 2, slab += columns_of<bf16>) {
    const auto pair = [&](int r) {
      int32_t bits;
      memcpy(&bits, rows[r] + c, sizeof(bits));
      return bits;
    };
    multiply_pairs<R>(pair, _mm512_loadu_si512(slab), _mm512_loadu_si512(slab + 16), lo, hi);
  }
  if (c < depth)  // the number behind the last channel is somebody else's and may be NaN
    multiply_pairs<R>([&](int r) { return static_cast<int32_t>(rows[r][c].bits); },
                      _mm512_loadu_si512(slab), _mm512_loadu_si512(slab + 16), lo, hi);
}

// Rows of the panel stay bf16, in the first half of their space.
void widen_pairs(const bf16* from, int64_t columns, float* to) {
  const __mmask32 inside = columns < 32 ? (1u << columns) - 1 : 0xffffffffu;
  _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(inside, from));
}

struct Interleaved {
  __m512i lo, hi;
};

// (a0, b0, a1, b1, ...): the first 16 pairs and the other 16.
MEDSPARK_INLINE Interleaved interleave(__m512i a, __m512i b) {
  const __m512i first =
      _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                       0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                       0x00230003, 0x00220002, 0x00210001, 0x00200000);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  return {_mm512_permutex2var_epi16(a, first, b), _mm512_permutex2var_epi16(a, second, b)};
}

void gather_pairs(const bf16* source, const int64_t* offset, int64_t n, int64_t channels,
                  float* to) {
  for (int64_t i = 0; i < n; i += 2, to += outer_channels)
    for (int64_t c = 0; c < channels; c += 32) {
      const __mmask32 inside = channels - c < 32 ? (1u << (channels - c)) - 1 : 0xffffffffu;
      const __m512i a = _mm512_maskz_loadu_epi16(inside, source + offset[i] + c);
      const __m512i b = i + 1 < n ? _mm512_maskz_loadu_epi16(inside, source + offset[i + 1] + c)
                                  : _mm512_setzero_si512();
      const Interleaved pairs = interleave(a, b);
      _mm512_storeu_si512(to + c, pairs.lo);
      _mm512_storeu_si512(to + c + 16, pairs.hi);
    }
}

// R channels x 2 vectors of accumulators over all pairs of rows.
template <int R>
void outer_tile_pairs(const float* rows, const int64_t* at, int64_t n, const float* panel,
                      const int32_t* place, float* out) {
  Floats lo[R], hi[R];
  clear<bf16, R>(lo, hi);
  fetch_early<R>(out);
  const auto add = [&](int64_t i, __m512i first, __m512i second) __attribute__((always_inline)) {
    const float* row = rows + at[i / 2];
    const Interleaved y = interleave(first, second);
    multiply_pairs<R>([&](int r) { return static_cast<int32_t>(bits_of(row[r])); }, y.lo, y.hi, lo,
                      hi);
  };
  const auto row_of_panel = [&](int64_t i) {
    return _mm512_loadu_si512(panel + place[i] * columns_of<bf16>);
  };
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) add(i, row_of_panel(i), row_of_panel(i + 1));
  if (i < n) add(i, row_of_panel(i), _mm512_setzero_si512());
  add_to<bf16, R>(lo, hi, in_order, out);
}

template <int... R>
void outer_any_pairs(std::integer_sequence<int, R...>, const float* rows, const int64_t* at,
                     int64_t n, int64_t channels, const float* panel, const int32_t* place,
                     float* out) {
  static constexpr decltype(&outer_tile_pairs<1>) tiles[] = {outer_tile_pairs<R + 1>...};
  for_each_tile(channels, MEDSPARK_ROWS, [&](int64_t c, int64_t size) {
    tiles[size - 1](rows + c, at, n, panel, place, out + c * columns_of<bf16>);
  });
}

void outer_pairs(const float* rows, const int64_t* at, int64_t n, int64_t channels,
                 const float* panel, const int32_t* place, float* out) {
  outer_any_pairs(TileSizes{}, rows, at, n, channels, panel, place, out);
}
