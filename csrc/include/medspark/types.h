// Plain data shared by every op: element types, one level of packed blocks, one sliding window.
//
// A level of a masked volume is stored as packed blocks [n_blocks, bz, by, bx, C], channels last,
// in the row-major order of their cells. `cells` is the only index: it turns a cell of the level's
// grid into a block, so a voxel of any level is found with a division and one look-up, whatever the
// kernel's reach.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEDSPARK_HD __host__ __device__ __forceinline__
#else
#define MEDSPARK_HD inline
#endif

namespace medspark {

enum class DType : int32_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// Storage only; arithmetic is done in float.
struct bf16 {
  uint16_t bits;
};

// IEEE 754 half precision; storage only as well.
struct f16 {
  uint16_t bits;
};

struct Level {
  const int32_t* cells;   // [batch, grid[0], grid[1], grid[2]]: block of the cell, -1 if hidden
  const int32_t* blocks;  // [n_blocks]: flat index of the block's cell in `cells`
  int64_t n_blocks;
  int64_t batch;
  int64_t grid[3];   // cells per axis (z, y, x)
  int64_t block[3];  // voxels per cell and axis at this level

  MEDSPARK_HD int64_t size(int axis) const { return grid[axis] * block[axis]; }
  MEDSPARK_HD int64_t block_voxels() const { return block[0] * block[1] * block[2]; }
  MEDSPARK_HD int64_t rows() const { return n_blocks * block_voxels(); }
  MEDSPARK_HD int64_t sample_cells() const { return grid[0] * grid[1] * grid[2]; }
};

struct Window {
  int64_t kernel[3];
  int64_t stride[3];
  int64_t padding[3];
  int64_t dilation[3];

  MEDSPARK_HD int64_t taps() const { return kernel[0] * kernel[1] * kernel[2]; }
};

// Where a CUDA kernel runs: ordinal of the device, and its cudaStream_t (null: the default stream).
struct Stream {
  int device;
  void* handle;
};

MEDSPARK_HD float float_of(uint32_t bits) {
  float v;
  memcpy(&v, &bits, sizeof(v));
  return v;
}

MEDSPARK_HD uint32_t bits_of(float v) {
  uint32_t bits;
  memcpy(&bits, &v, sizeof(bits));
  return bits;
}

MEDSPARK_HD float to_float(bf16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
MEDSPARK_HD bf16 to_bf16(float v) {
  uint32_t bits = bits_of(v);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return bf16{static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bf16{static_cast<uint16_t>(bits >> 16)};
}

// Half precision has 5 bits of exponent and 10 of mantissa, so that its bits, moved up by 13, are
// those of a float whose exponent is too small by 112. Neither direction branches, and both are
// right as well where a processor is set to flush subnormal floats to zero.
constexpr int32_t half_exponent = 1 << 23;            // one step of the exponent, in a float's bits
constexpr int32_t half_rebias = 112 * half_exponent;  // from a half's exponent to a float's
constexpr int32_t half_least = 113 * half_exponent;   // 2^-14: the smallest normal half
constexpr int32_t half_overflow = 143 * half_exponent;  // 2^16

MEDSPARK_HD float to_float(f16 v) {
#if defined(__CUDA_ARCH__)
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
#else
  const int32_t magnitude = (v.bits & 0x7fff) << 13;
  // Infinity and NaN move to a float's last exponent. A subnormal half borrows the exponent of the
  // smallest normal one, and gives back the 2^-14 that it gained so.
  const int32_t special = magnitude >= 31 * half_exponent ? half_rebias : 0;
  const int32_t borrowed = magnitude < half_exponent ? half_exponent : 0;
  const int32_t gained = magnitude < half_exponent ? half_least : 0;
  const float size = float_of(magnitude + half_rebias + special + borrowed) - float_of(gained);
  return float_of(bits_of(size) | static_cast<uint32_t>(v.bits & 0x8000) << 16);
#endif
}

// Round to nearest, ties to even; from 65520 on infinite; NaN stays NaN.
MEDSPARK_HD f16 to_f16(float v) {
#if defined(__CUDA_ARCH__)
  f16 out;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(v));
  return out;
#else
  const int32_t magnitude = bits_of(v) & 0x7fffffff, infinity = 255 * half_exponent;
  const int32_t size = magnitude < half_overflow ? magnitude : half_overflow;
  const int32_t power = (size > half_least ? size : half_least) & infinity;
  // 2^13 times its power of two, a float's last bit is worth what a half's is: adding rounds. The
  // bits gained are the half's mantissa with its leading one, which carries into the exponent.
  const int32_t coarse = power + 13 * half_exponent;
  const int32_t mantissa = bits_of(float_of(size) + float_of(coarse)) - coarse;
  const int32_t quiet = magnitude > infinity ? 0x0200 : 0;
  const int32_t half = ((power - half_least) >> 13) + mantissa;
  return f16{static_cast<uint16_t>(half | quiet | (bits_of(v) >> 16 & 0x8000))};
#endif
}

// The type in which T is accumulated, and conversions to and from it.
template <class T>
struct Element {
  using Acc = T;
  MEDSPARK_HD static Acc load(T v) { return v; }
  MEDSPARK_HD static T store(Acc v) { return v; }
};

template <>
struct Element<bf16> {
  using Acc = float;
  MEDSPARK_HD static float load(bf16 v) { return to_float(v); }
  MEDSPARK_HD static bf16 store(float v) { return to_bf16(v); }
};

template <>
struct Element<f16> {
  using Acc = float;
  MEDSPARK_HD static float load(f16 v) { return to_float(v); }
  MEDSPARK_HD static f16 store(float v) { return to_f16(v); }
};

}  // namespace medspark
