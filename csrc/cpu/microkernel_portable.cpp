// Baseline instruction set (SSE2 on x86-64, NEON on arm64): 16 registers of 16 bytes at least.
#define MEDSPARK_ISA portable
#define MEDSPARK_VECTOR_BYTES 16
#define MEDSPARK_ROWS 4
#include "microkernel.inl"
