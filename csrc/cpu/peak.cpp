// Loops of multiply-adds on registers, one per instruction set, and a copy past the caches.
//
// The wide loops carry their instruction set as a function attribute: this file is compiled for the
// baseline, and the loops run only where the kernels in use have that instruction set.
#include "medspark/peak.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>

#if MEDSPARK_X86
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace medspark {

const char* cpu_kernels();

namespace {

constexpr int chains = 16;  // independent sums: latency times issue rate of present processors
constexpr int64_t steps = 20000;

struct Loop {
  const char* name;
  double (*run)();  // something that depends on every result, so that nothing is left out
  double flops;     // of one run
};

// Factors such that the sums stay near 1. Every chain starts from a number of its own, which no
// compiler knows: equal chains would be computed once.
volatile const float shrink = 0.999f, add = 0.001f;
volatile const float starts[chains] = {};

#if !defined(__ARM_NEON)
typedef float Four __attribute__((vector_size(16)));

double run_portable() {
  Four sum[chains], a = Four{} + shrink, b = Four{} + add;
  for (int c = 0; c < chains; ++c) sum[c] = Four{} + starts[c];
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum[c] = sum[c] * a + b;
  double total = 0;
  for (int c = 0; c < chains; ++c) total += sum[c][0];
  return total;
}
const Loop portable{"multiply and add, 128 bit", run_portable, 2.0 * 4 * chains * steps};
#else
double run_portable() {
  float32x4_t sum[chains], a = vdupq_n_f32(shrink), b = vdupq_n_f32(add);
  for (int c = 0; c < chains; ++c) sum[c] = vdupq_n_f32(starts[c]);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum[c] = vfmaq_f32(b, sum[c], a);
  double total = 0;
  for (int c = 0; c < chains; ++c) total += vgetq_lane_f32(sum[c], 0);
  return total;
}
const Loop portable{"neon fma", run_portable, 2.0 * 4 * chains * steps};
#endif

#if MEDSPARK_X86
constexpr int chains_avx2 = 12;  // of 16 registers

__attribute__((target("avx2,fma"))) double run_avx2() {
  __m256 sum[chains_avx2], a = _mm256_set1_ps(shrink), b = _mm256_set1_ps(add);
  for (int c = 0; c < chains_avx2; ++c) sum[c] = _mm256_set1_ps(starts[c]);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains_avx2; ++c) sum[c] = _mm256_fmadd_ps(sum[c], a, b);
  double total = 0;
  for (int c = 0; c < chains_avx2; ++c) total += _mm256_cvtss_f32(sum[c]);
  return total;
}
const Loop avx2{"avx2 fma", run_avx2, 2.0 * 8 * chains_avx2 * steps};

__attribute__((target("avx512f"))) double run_avx512() {
  __m512 sum[chains], a = _mm512_set1_ps(shrink), b = _mm512_set1_ps(add);
  for (int c = 0; c < chains; ++c) sum[c] = _mm512_set1_ps(starts[c]);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c) sum[c] = _mm512_fmadd_ps(sum[c], a, b);
  double total = 0;
  for (int c = 0; c < chains; ++c) total += _mm512_cvtss_f32(sum[c]);
  return total;
}
const Loop avx512{"avx512 fma", run_avx512, 2.0 * 16 * chains * steps};

__attribute__((target("avx512f,avx512bf16"))) double run_avx512_bf16() {
  const __m512i ones = _mm512_set1_epi16(0x3f80);  // 1.0
  const __m512i tiny = _mm512_set1_epi16(static_cast<short>(bits_of(add) >> 16));
  __m512 sum[chains];
  for (int c = 0; c < chains; ++c) sum[c] = _mm512_set1_ps(starts[c]);
  for (int64_t i = 0; i < steps; ++i)
#pragma GCC unroll 16
    for (int c = 0; c < chains; ++c)
      sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)ones, (__m512bh)tiny);
  double total = 0;
  for (int c = 0; c < chains; ++c) total += _mm512_cvtss_f32(sum[c]);
  return total;
}
const Loop avx512_bf16{"avx512 vdpbf16ps", run_avx512_bf16, 2.0 * 32 * chains * steps};
#endif

const Loop& loop_of(DType dtype) {
  (void)dtype;
#if MEDSPARK_X86
  const bool wide = std::strncmp(cpu_kernels(), "avx512", 6) == 0;
  if (wide && dtype == DType::bf16 && __builtin_cpu_supports("avx512bf16")) return avx512_bf16;
  if (wide) return avx512;
  if (std::strcmp(cpu_kernels(), "avx2") == 0) return avx2;
#endif
  return portable;
}

double seconds_now() {
  using clock = std::chrono::steady_clock;
  return std::chrono::duration<double>(clock::now().time_since_epoch()).count();
}

// Processor time of this thread: what others take while it waits does not lower the peak.
double thread_seconds() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t;
  if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0) return t.tv_sec + 1e-9 * t.tv_nsec;
#endif
  return seconds_now();
}

#if MEDSPARK_X86
void copy_streaming(const char* from, char* to, int64_t bytes) {
  int64_t i = 0;
  for (; i < bytes && reinterpret_cast<uintptr_t>(to + i) % 64; ++i) to[i] = from[i];
  for (; i + 64 <= bytes; i += 64)
    for (int64_t part = i; part < i + 64; part += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + part),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part)));
  _mm_sfence();
  std::memcpy(to + i, from + i, bytes - i);
}
#endif

void copy_piece(const char* from, char* to, int64_t bytes, bool streaming) {
#if MEDSPARK_X86
  if (streaming) return copy_streaming(from, to, bytes);
#endif
  (void)streaming;
  constexpr int64_t piece = 1 << 16;  // below the size from which memcpy streams by itself
  for (int64_t i = 0; i < bytes; i += piece)
    std::memcpy(to + i, from + i, bytes - i < piece ? bytes - i : piece);
}

}  // namespace

double peak_flops(DType dtype, int threads, double seconds) {
  if (dtype != DType::f32 && dtype != DType::bf16) return 0;
  const Loop& loop = loop_of(dtype);
  double rate = 0, kept = 0;
#pragma omp parallel num_threads(threads) reduction(+ : rate, kept)
  {
    kept += loop.run();  // every thread is there and warm before its clock starts
#pragma omp barrier
    int64_t runs = 0;
    const double end = seconds_now() + seconds, start = thread_seconds();
    do {
      kept += loop.run();
      ++runs;
    } while (seconds_now() < end);
    rate += runs * loop.flops / (thread_seconds() - start);
  }
  volatile double sink = kept;
  (void)sink;
  return rate;
}

const char* peak_instruction(DType dtype) { return loop_of(dtype).name; }

void stream_copy(const void* from, void* to, int64_t bytes, bool streaming, int threads) {
  const int64_t n = threads < 1 ? 1 : threads, share = (bytes / n + 4095) / 4096 * 4096;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n; ++t) {
    const int64_t start = t * share, end = start + share < bytes ? start + share : bytes;
    if (start < end)
      copy_piece(static_cast<const char*>(from) + start, static_cast<char*>(to) + start,
                 end - start, streaming);
  }
}

}  // namespace medspark
