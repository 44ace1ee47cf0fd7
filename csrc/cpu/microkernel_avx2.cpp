// AVX2 + FMA: 6 x 2 accumulators, 2 weights and 1 broadcast fill 15 of 16 registers.
#define MEDSPARK_ISA avx2
#define MEDSPARK_VECTOR_BYTES 32
#define MEDSPARK_ROWS 6
#include "microkernel.inl"
