// Run-time choice of the instruction set.
#include "microkernel.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#if MEDSPARK_X86
#include <cpuid.h>
#endif

namespace medspark {

#define MEDSPARK_DECLARE(isa) \
  namespace isa {             \
  template <class T>          \
  Microkernel<T> make();      \
  Ramps make_ramps();         \
  }
MEDSPARK_DECLARE(portable)
#if MEDSPARK_X86
MEDSPARK_DECLARE(avx2)
MEDSPARK_DECLARE(avx512)
MEDSPARK_DECLARE(avx512bf16)
#endif

namespace {

#if MEDSPARK_X86
// Asked directly: older compilers do not know the names in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}
#endif

enum Isa { portable_isa, avx2_isa, avx512_isa, avx512bf16_isa };

Isa best_isa() {
#if MEDSPARK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return has_avx512_bf16() ? avx512bf16_isa : avx512_isa;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
    return avx2_isa;
#endif
  return portable_isa;
}

Isa chosen_isa() {
  static const Isa isa = [] {
    const Isa best = best_isa();
    const char* wish = std::getenv("MEDSPARK_CPU");
    if (wish && std::strcmp(wish, "portable") == 0) return portable_isa;
    if (wish && std::strcmp(wish, "avx2") == 0) return std::min(best, avx2_isa);
    if (wish && std::strcmp(wish, "avx512") == 0) return std::min(best, avx512_isa);
    return best;
  }();
  return isa;
}

}  // namespace

template <class T>
const Microkernel<T>& single_microkernel() {
  static const Microkernel<T> kernel = [] {
#if MEDSPARK_X86
    if (chosen_isa() >= avx512_isa) return avx512::make<T>();
    if (chosen_isa() == avx2_isa) return avx2::make<T>();
#endif
    return portable::make<T>();
  }();
  return kernel;
}

template <class T>
const Microkernel<T>& microkernel() {
#if MEDSPARK_X86
  if constexpr (std::is_same_v<T, bf16>) {
    static const Microkernel<T> pairs = avx512bf16::make<T>();
    if (chosen_isa() == avx512bf16_isa) return pairs;
  }
#endif
  return single_microkernel<T>();
}

#define MEDSPARK_INSTANTIATE(T)                    \
  template const Microkernel<T>& microkernel<T>(); \
  template const Microkernel<T>& single_microkernel<T>();
MEDSPARK_INSTANTIATE(float)
MEDSPARK_INSTANTIATE(double)
MEDSPARK_INSTANTIATE(bf16)
MEDSPARK_INSTANTIATE(f16)

const Ramps& ramps() {
  static const Ramps chosen = [] {
#if MEDSPARK_X86
    if (chosen_isa() >= avx512_isa) return avx512::make_ramps();
    if (chosen_isa() == avx2_isa) return avx2::make_ramps();
#endif
    return portable::make_ramps();
  }();
  return chosen;
}

const char* cpu_kernels() { return microkernel<float>().name; }

}  // namespace medspark
