// Prints half-precision conversions for test_half.py, in hexadecimal bits: "h HALF FLOAT BACK" for
// every half (widened, and narrowed again), "f FLOAT HALF" for many floats.
#include <cmath>
#include <cstdio>
#include <random>

#include "medspark/types.h"

using namespace medspark;

namespace {

void narrow(float v) { std::printf("f %08x %04x\n", bits_of(v), to_f16(v).bits); }

// A number of the half grid, the tie towards the next one, and the floats on either side of both.
void around(float v, float next) {
  const float tie = v + (next - v) / 2;
  for (const float middle : {v, tie})
    for (const float at :
         {std::nextafter(middle, -INFINITY), middle, std::nextafter(middle, INFINITY)}) {
      narrow(at);
      narrow(-at);
    }
}

}  // namespace

int main() {
  for (uint32_t i = 0; i < 65536; ++i) {
    const f16 half{static_cast<uint16_t>(i)};
    const float wide = Element<f16>::load(half);
    std::printf("h %04x %08x %04x\n", i, bits_of(wide), Element<f16>::store(wide).bits);
  }
  for (int i = 0; i < 1024; ++i) around(std::ldexp(i, -24), std::ldexp(i + 1, -24));
  for (int e = -14; e <= 15; ++e)  // the last one reaches 65504, 65520 and 65536
    for (int i = 1024; i < 2048; ++i) around(std::ldexp(i, e - 10), std::ldexp(i + 1, e - 10));
  std::mt19937 random(3);
  for (int i = 0; i < 100000; ++i) narrow(float_of(random()));
  for (const uint32_t bits : {0x7f800000u, 0x7f800001u, 0x7f801fffu, 0x7fc00000u, 0x7fffffffu,
                              0x7f7fffffu, 0x47800000u, 0x00000001u, 0x007fffffu, 0x00800000u})
    for (const uint32_t sign : {0u, 0x80000000u}) narrow(float_of(bits | sign));
}
