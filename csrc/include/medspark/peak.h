// What the processor can do at best: the roof that benchmarks hold kernels against.
//
// peak_flops keeps `threads` threads busy with independent fused multiply-adds on registers, of the
// widest kind that the kernels in use may issue (cpu_kernels(): MEDSPARK_CPU lowers both), and
// counts a multiply-add as two operations. bf16 is the dot product of pairs where the processor has
// it (AVX512-BF16), else as f32, as which the kernels then compute. Matrix units (AMX) do not
// count: no kernel uses them. stream_copy moves memory past the caches, reading and writing each
// byte once.
#pragma once

#include "medspark/types.h"

namespace medspark {

// Operations per second of processor time, summed over the threads, which run for about `seconds`;
// f32 or bf16, 0 for other types. So other work on the machine does not lower it.
double peak_flops(DType dtype, int threads, double seconds);

// The instruction that peak_flops counts, for example "avx512 fma".
const char* peak_instruction(DType dtype);

// from [bytes] -> to [bytes], which do not overlap; `streaming` stores leave the caches alone where
// the processor has such stores (x86-64).
void stream_copy(const void* from, void* to, int64_t bytes, bool streaming, int threads);

}  // namespace medspark
