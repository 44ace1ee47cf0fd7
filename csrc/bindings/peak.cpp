// What the processor can do at best, for benchmarks.
#include "medspark/peak.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;

namespace {

medspark::DType dtype_named(const std::string& name) {
  if (name == "float32") return medspark::DType::f32;
  if (name == "bfloat16") return medspark::DType::bf16;
  throw py::value_error("the peak is known for float32 and bfloat16, not for " + name);
}

int positive(int threads) {
  if (threads < 1) throw py::value_error("threads must be at least 1");
  return threads;
}

}  // namespace

void bind_peak(py::module_& m) {
  m.def(
      "peak_flops",
      [](const std::string& dtype, int threads, double seconds) {
        const medspark::DType type = dtype_named(dtype);
        positive(threads);
        py::gil_scoped_release release;
        return medspark::peak_flops(type, threads, seconds);
      },
      py::arg("dtype"), py::arg("threads"), py::arg("seconds"),
      "Multiply-adds per second of processor time, times two, by the kernels' instruction set.");
  m.def(
      "peak_instruction",
      [](const std::string& dtype) {
        return std::string(medspark::peak_instruction(dtype_named(dtype)));
      },
      py::arg("dtype"), "The instruction that peak_flops counts.");
  m.def(
      "stream_copy",
      [](uintptr_t from, uintptr_t to, int64_t bytes, bool streaming, int threads) {
        positive(threads);
        py::gil_scoped_release release;
        medspark::stream_copy(reinterpret_cast<const void*>(from), reinterpret_cast<void*>(to),
                              bytes, streaming, threads);
      },
      py::arg("from_address"), py::arg("to_address"), py::arg("bytes"), py::arg("streaming"),
      py::arg("threads"), "Copies memory from one address to another, past the caches if asked.");
}
