// The MEDSPARK_* texts come from CMakeLists.txt; only this file is compiled again when one changes.
#include "build_info.h"

#include <sstream>
#include <string>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::list archs;
  std::stringstream joined(MEDSPARK_CUDA_ARCHS);
  for (std::string arch; std::getline(joined, arch, ',');) archs.append(arch);

  py::dict info;
  info["version"] = MEDSPARK_VERSION;
  info["commit"] = MEDSPARK_COMMIT;
  info["compiler"] = MEDSPARK_COMPILER;
  info["cxx_flags"] = MEDSPARK_CXX_FLAGS;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  info["with_cuda"] = MEDSPARK_WITH_CUDA == 1;
  const std::string cuda_version = MEDSPARK_CUDA_VERSION;
  info["cuda_version"] = cuda_version.empty() ? py::object(py::none()) : py::str(cuda_version);
  info["cuda_archs"] = archs;
  return info;
}

// Instruction sets that this processor has and the operating system lets programs use.
py::list cpu_features() {
  py::list features;
#if MEDSPARK_X86 && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("sse4.2")) features.append("sse4_2");
  if (__builtin_cpu_supports("avx")) features.append("avx");
  if (__builtin_cpu_supports("avx2")) features.append("avx2");
  if (__builtin_cpu_supports("fma")) features.append("fma");
  if (__builtin_cpu_supports("avx512f")) features.append("avx512f");
  if (__builtin_cpu_supports("avx512bw")) features.append("avx512bw");
  if (__builtin_cpu_supports("avx512dq")) features.append("avx512dq");
  if (__builtin_cpu_supports("avx512vl")) features.append("avx512vl");
  if (__builtin_cpu_supports("avx512vnni")) features.append("avx512_vnni");
  if (__builtin_cpu_supports("avx512bf16")) features.append("avx512_bf16");
#elif defined(__ARM_NEON)
  features.append("neon");
#endif
  return features;
}

}  // namespace

void bind_build_info(py::module_& m) {
  m.def("build_info", &build_info, "Version, commit, compiler and CUDA options of this build.");
  m.def("cpu_features", &cpu_features, "Instruction sets this processor offers, for example avx2.");
}
