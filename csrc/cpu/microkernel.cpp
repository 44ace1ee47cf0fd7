// Run-time choice of the instruction set.
#include "microkernel.h"

#include <cstdlib>
#include <cstring>

#if MEDSPARK_X86
#include <cpuid.h>
#endif

namespace medspark {

#define MEDSPARK_DECLARE(isa) \
  namespace isa {             \
  template <class T>          \
  Microkernel<T> make();      \
  }
MEDSPARK_DECLARE(portable)
#if MEDSPARK_X86
MEDSPARK_DECLARE(avx2)
MEDSPARK_DECLARE(avx512)
#endif

namespace {

#if MEDSPARK_X86
// Asked directly: older compilers do not know the name in __builtin_cpu_supports.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

enum Isa { portable_isa, avx2_isa, avx512_isa };

Isa best_isa() {
#if MEDSPARK_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return avx512_isa;
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
    if (wish && std::strcmp(wish, "avx2") == 0 && best > avx2_isa) return avx2_isa;
    return best;
  }();
  return isa;
}

}  // namespace

template <class T>
const Microkernel<T>& microkernel() {
  static const Microkernel<T> kernel = [] {
#if MEDSPARK_X86
    if (chosen_isa() == avx512_isa) return avx512::make<T>();
    if (chosen_isa() == avx2_isa) return avx2::make<T>();
#endif
    return portable::make<T>();
  }();
  return kernel;
}

template const Microkernel<float>& microkernel<float>();
template const Microkernel<double>& microkernel<double>();
template const Microkernel<bf16>& microkernel<bf16>();
template const Microkernel<f16>& microkernel<f16>();

const char* cpu_kernels() { return microkernel<float>().name; }

}  // namespace medspark
