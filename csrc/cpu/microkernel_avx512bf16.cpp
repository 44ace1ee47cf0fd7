// AVX-512 with products of bf16 pairs: bf16 alone, the other types are those of AVX-512.
#define MEDSPARK_ISA avx512bf16
#define MEDSPARK_VECTOR_BYTES 64
#define MEDSPARK_ROWS 8
#define MEDSPARK_BF16_PAIRS
#include "microkernel.inl"
