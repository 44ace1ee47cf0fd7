// AVX-512: 8 x 2 accumulators and 2 weights in 32 registers; the activation is a broadcast
// operand.
#define MEDSPARK_ISA avx512
#define MEDSPARK_VECTOR_BYTES 64
#define MEDSPARK_ROWS 8
#include "microkernel.inl"
