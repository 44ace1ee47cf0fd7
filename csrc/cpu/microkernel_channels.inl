// Part of microkernel.inl, included inside its namespaces: what runs over channels one by one, and
// lists of offsets.

typedef uint16_t Halves __attribute__((vector_size(MEDSPARK_VECTOR_BYTES / 2)));
typedef uint32_t Bits __attribute__((vector_size(MEDSPARK_VECTOR_BYTES)));

template <class T>
MEDSPARK_INLINE VectorOf<T> load_vector(const T* from) {
  using Acc = AccOf<T>;
  constexpr int64_t lanes = Lanes<Acc>::count;
  if constexpr (std::is_same_v<T, Acc>) {
    return *reinterpret_cast<const VectorOf<T>*>(from);
  } else if constexpr (std::is_same_v<T, bf16>) {
    Halves halves;
    memcpy(&halves, from, sizeof(halves));
    return (VectorOf<T>)(__builtin_convertvector(halves, Bits) << 16);
  } else {
    Acc wide[lanes];
    convert(from, lanes, wide);
    return *reinterpret_cast<const VectorOf<T>*>(wide);
  }
}

template <class T, int R>
void channels_tile(const T* source, const int64_t* offset, int64_t step, int64_t loop_step,
                   int64_t loops, const AccOf<T>* panel, AccOf<T>* acc) {
  using V = VectorOf<T>;
  constexpr int64_t lanes = Lanes<AccOf<T>>::count;
  V lo[R], hi[R];
  clear<T, R>(lo, hi);
  for (int64_t k = 0; k < loops; ++k, offset += loop_step, panel += 2 * lanes) {
    int64_t all = -1;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) all &= offset[r * step];
    if (all < 0) continue;
    const V w0 = *reinterpret_cast<const V*>(panel);
    const V w1 = *reinterpret_cast<const V*>(panel + lanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const int64_t at = offset[r * step];
      const T* x = at < 0 ? reinterpret_cast<const T*>(zeros) : source + at;
      lo[r] += load_vector(x) * w0;
      hi[r] += load_vector(x + lanes) * w1;
    }
  }
  add_to<T, R>(lo, hi, in_order, acc);
}

template <class T, int... R>
void channels_any(std::integer_sequence<int, R...>, const T* source, const int64_t* offset,
                  int64_t step, int64_t loop_step, int64_t n, int64_t loops, const AccOf<T>* panel,
                  AccOf<T>* acc) {
  static constexpr decltype(&channels_tile<T, 1>) tiles[] = {channels_tile<T, R + 1>...};
  for_each_tile(n, MEDSPARK_ROWS, [&](int64_t i, int64_t rows) {
    tiles[rows - 1](source, offset + i * step, step, loop_step, loops, panel,
                    acc + i * columns_of<T>);
  });
}

template <class T>
void channels(const T* source, const int64_t* offset, int64_t step, int64_t loop_step, int64_t n,
              int64_t loops, const AccOf<T>* panel, AccOf<T>* acc) {
  channels_any<T>(TileSizes{}, source, offset, step, loop_step, n, loops, panel, acc);
}

void ramp_offsets(int64_t* to, int64_t n, int64_t first, int64_t step) {
#if defined(__AVX512F__)
  const __m512i steps =
      _mm512_mullo_epi64(_mm512_set1_epi64(step), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  for (; n > 0; n -= 8, to += 8, first += 8 * step)
    _mm512_mask_storeu_epi64(to, static_cast<__mmask8>(n < 8 ? (1u << n) - 1 : 0xffu),
                             _mm512_add_epi64(_mm512_set1_epi64(first), steps));
#else
  for (int64_t i = 0; i < n; ++i) to[i] = first + i * step;
#endif
}

void ramp_places(int32_t* to, int64_t n, int32_t first) {
#if defined(__AVX512F__)
  const __m512i steps = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; n > 0; n -= 16, to += 16, first += 16)
    _mm512_mask_storeu_epi32(to, static_cast<__mmask16>(n < 16 ? (1u << n) - 1 : 0xffffu),
                             _mm512_add_epi32(_mm512_set1_epi32(first), steps));
#else
  for (int64_t i = 0; i < n; ++i) to[i] = first + static_cast<int32_t>(i);
#endif
}
