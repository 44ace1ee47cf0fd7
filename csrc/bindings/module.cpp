// The only pybind11 code of the ops: integers in, no tensor type, no allocation.
//
// Pointers are passed as integers; the Python side has checked dtype, shape, device and contiguity
// and owns every buffer. The GIL is released around each kernel. Every call is counted by name, so
// that a test can assert which kernels really ran: "conv3d" on the CPU, "conv3d_cuda" on a CUDA
// device.
//
// Where CUDA was compiled in, a kernel `f(op, addresses...)` has a twin `f_cuda(op, addresses...,
// device, stream)`. If it needs scratch memory, `f_workspace(op)` says how many bytes, and their
// address is the last one.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <map>
#include <string>

#include "medspark/conv3d.h"
#include "medspark/densify.h"
#include "medspark/global_pool.h"
#include "medspark/norm.h"
#include "medspark/pool3d.h"
#include "medspark/resample3d.h"
#include "medspark/transfer.h"

namespace py = pybind11;

void bind_build_info(py::module_& m);
void bind_peak(py::module_& m);

namespace medspark {
const char* cpu_kernels();

namespace {

using Three = std::array<int64_t, 3>;
using Address = uintptr_t;

std::map<std::string, int64_t>& counts() {
  static std::map<std::string, int64_t> instance;
  return instance;
}

template <class F>
void launch(const std::string& name, F&& kernel) {
  ++counts()[name];  // under the GIL
  py::gil_scoped_release release;
  kernel();
}

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

void* raw(Address address) { return reinterpret_cast<void*>(address); }

Level make_level(Address cells, Address blocks, int64_t n_blocks, int64_t batch, Three grid,
                 Three block) {
  Level l{at<const int32_t>(cells), at<const int32_t>(blocks), n_blocks, batch, {}, {}};
  for (int a = 0; a < 3; ++a) {
    l.grid[a] = grid[a];
    l.block[a] = block[a];
  }
  return l;
}

Window make_window(Three kernel, Three stride, Three padding, Three dilation) {
  Window w{};
  for (int a = 0; a < 3; ++a) {
    w.kernel[a] = kernel[a];
    w.stride[a] = stride[a];
    w.padding[a] = padding[a];
    w.dilation[a] = dilation[a];
  }
  return w;
}

#if MEDSPARK_WITH_CUDA
template <class>
using AddressOf = Address;

// Binds the CUDA kernel under the name of its CPU twin.
template <class Op, class... Pointer>
void bind_cuda(py::module_& m, const std::string& name,
               void (*kernel)(const Stream&, const Op&, Pointer...),
               int64_t (*workspace)(const Op&) = nullptr) {
  const std::string counted = name + "_cuda";
  m.def(counted.c_str(),
        [=](const Op& op, AddressOf<Pointer>... address, int device, Address stream) {
          launch(counted, [&] {
            kernel(Stream{device, raw(stream)}, op, reinterpret_cast<Pointer>(address)...);
          });
        });
  if (workspace) m.def((name + "_workspace").c_str(), workspace);
}

void bind_cuda_kernels(py::module_& m) {
  bind_cuda(m, "conv3d", cuda::conv3d, cuda::conv3d_workspace);
  bind_cuda(m, "conv3d_input", cuda::conv3d_input, cuda::conv3d_input_workspace);
  bind_cuda(m, "conv3d_weight", cuda::conv3d_weight, cuda::conv3d_weight_workspace);
  bind_cuda(m, "max_pool3d", cuda::max_pool3d, cuda::max_pool3d_workspace);
  bind_cuda(m, "max_pool3d_input", cuda::max_pool3d_input, cuda::max_pool3d_input_workspace);
  bind_cuda(m, "avg_pool3d", cuda::avg_pool3d, cuda::avg_pool3d_workspace);
  bind_cuda(m, "avg_pool3d_input", cuda::avg_pool3d_input, cuda::avg_pool3d_input_workspace);
  bind_cuda(m, "norm", cuda::norm, cuda::norm_workspace);
  bind_cuda(m, "norm_input", cuda::norm_input, cuda::norm_input_workspace);
  bind_cuda(m, "global_pool", cuda::global_pool, cuda::global_pool_workspace);
  bind_cuda(m, "global_pool_input", cuda::global_pool_input);
  bind_cuda(m, "densify", cuda::densify);
  bind_cuda(m, "gather", cuda::gather);
  bind_cuda(m, "sum_hidden", cuda::sum_hidden, cuda::sum_hidden_workspace);
  bind_cuda(m, "transfer", cuda::transfer);
  bind_cuda(m, "sum_untransferred", cuda::sum_untransferred, cuda::sum_untransferred_workspace);
  bind_cuda(m, "resample3d", cuda::resample3d);
}
#endif

DType dtype_of(int code) { return static_cast<DType>(code); }

void bind_conv3d(py::module_& m) {
  py::class_<Conv3d>(m, "Conv3d")
      .def(py::init([](int dtype, const Level& in, const Level& out, const Window& window,
                       int64_t in_channels, int64_t out_channels, int64_t groups, int threads) {
        return Conv3d{dtype_of(dtype), in, out, window, in_channels, out_channels, groups, threads};
      }));
  m.def("conv3d", [](const Conv3d& op, Address x, Address weight, Address bias, Address y) {
    launch("conv3d", [&] { conv3d(op, raw(x), raw(weight), raw(bias), raw(y)); });
  });
  m.def("conv3d_input", [](const Conv3d& op, Address dy, Address weight, Address dx) {
    launch("conv3d_input", [&] { conv3d_input(op, raw(dy), raw(weight), raw(dx)); });
  });
  m.def("conv3d_weight", [](const Conv3d& op, Address x, Address dy, Address dw) {
    launch("conv3d_weight", [&] { conv3d_weight(op, raw(x), raw(dy), raw(dw)); });
  });
}

void bind_pool3d(py::module_& m) {
  py::class_<Pool3d>(m, "Pool3d")
      .def(py::init([](int dtype, const Level& in, const Level& out, const Window& window,
                       int64_t channels, bool hidden_is_zero, bool divide_by_active,
                       bool count_padding, int64_t divisor_override, int threads) {
        return Pool3d{dtype_of(dtype),
                      in,
                      out,
                      window,
                      channels,
                      hidden_is_zero,
                      divide_by_active,
                      count_padding,
                      divisor_override,
                      threads};
      }));
  m.def("max_pool3d", [](const Pool3d& op, Address x, Address y, Address argmax) {
    launch("max_pool3d", [&] { max_pool3d(op, raw(x), raw(y), at<int16_t>(argmax)); });
  });
  m.def("max_pool3d_input", [](const Pool3d& op, Address dy, Address argmax, Address dx) {
    launch("max_pool3d_input",
           [&] { max_pool3d_input(op, raw(dy), at<const int16_t>(argmax), raw(dx)); });
  });
  m.def("avg_pool3d", [](const Pool3d& op, Address x, Address y) {
    launch("avg_pool3d", [&] { avg_pool3d(op, raw(x), raw(y)); });
  });
  m.def("avg_pool3d_input", [](const Pool3d& op, Address dy, Address dx) {
    launch("avg_pool3d_input", [&] { avg_pool3d_input(op, raw(dy), raw(dx)); });
  });
}

void bind_norm(py::module_& m) {
  py::class_<Norm>(m, "Norm").def(
      py::init([](int dtype, int64_t n_segments, Address starts, int64_t rows, int64_t channels,
                  double eps, int threads) {
        return Norm{dtype_of(dtype), n_segments, at<const int64_t>(starts), rows, channels, eps,
                    threads};
      }));
  m.def("norm", [](const Norm& op, Address x, Address weight, Address bias, Address y, Address mean,
                   Address var) {
    launch("norm", [&] { norm(op, raw(x), raw(weight), raw(bias), raw(y), raw(mean), raw(var)); });
  });
  m.def("norm_input", [](const Norm& op, Address dy, Address x, Address weight, Address mean,
                         Address var, Address dx, Address dweight, Address dbias) {
    launch("norm_input", [&] {
      norm_input(op, raw(dy), raw(x), raw(weight), raw(mean), raw(var), raw(dx), raw(dweight),
                 raw(dbias));
    });
  });
}

void bind_global_pool(py::module_& m) {
  py::class_<GlobalPool>(m, "GlobalPool")
      .def(py::init([](int dtype, int64_t batch, Address starts, int64_t rows, int64_t channels,
                       bool maximum, int threads) {
        return GlobalPool{dtype_of(dtype), batch,  at<const int64_t>(starts), rows, channels,
                          maximum,         threads};
      }));
  m.def("global_pool", [](const GlobalPool& op, Address x, Address y, Address argmax) {
    launch("global_pool", [&] { global_pool(op, raw(x), raw(y), at<int64_t>(argmax)); });
  });
  m.def("global_pool_input", [](const GlobalPool& op, Address dy, Address argmax, Address dx) {
    launch("global_pool_input",
           [&] { global_pool_input(op, raw(dy), at<const int64_t>(argmax), raw(dx)); });
  });
}

void bind_densify(py::module_& m) {
  py::class_<Densify>(m, "Densify")
      .def(py::init([](int dtype, const Level& level, int64_t channels,
                       std::array<int64_t, 5> strides, int threads) {
        Densify op{dtype_of(dtype), level, channels, {}, threads};
        for (int a = 0; a < 5; ++a) op.strides[a] = strides[a];
        return op;
      }));
  m.def("densify", [](const Densify& op, Address features, Address token, Address dense) {
    launch("densify", [&] { densify(op, raw(features), raw(token), raw(dense)); });
  });
  m.def("gather", [](const Densify& op, Address dense, Address features) {
    launch("gather", [&] { gather(op, raw(dense), raw(features)); });
  });
  m.def("sum_hidden", [](const Densify& op, Address dense, Address token) {
    launch("sum_hidden", [&] { sum_hidden(op, raw(dense), raw(token)); });
  });
}

void bind_transfer(py::module_& m) {
  py::class_<Transfer>(m, "Transfer")
      .def(
          py::init([](int dtype, const Level& in, const Level& out, int64_t channels, int threads) {
            return Transfer{dtype_of(dtype), in, out, channels, threads};
          }));
  m.def("transfer", [](const Transfer& op, Address x, Address token, Address y) {
    launch("transfer", [&] { transfer(op, raw(x), raw(token), raw(y)); });
  });
  m.def("sum_untransferred", [](const Transfer& op, Address dy, Address token) {
    launch("sum_untransferred", [&] { sum_untransferred(op, raw(dy), raw(token)); });
  });
}

// An axis is given as the addresses of its start, index and weight.
void bind_resample3d(py::module_& m) {
  py::class_<Resample3d>(m, "Resample3d")
      .def(py::init([](int dtype, const Level& in, const Level& out,
                       std::array<std::array<Address, 3>, 3> axes, int64_t channels, int threads) {
        Resample3d op{dtype_of(dtype), in, out, {}, channels, threads};
        for (int a = 0; a < 3; ++a)
          op.axis[a] = {at<const int32_t>(axes[a][0]), at<const int32_t>(axes[a][1]),
                        raw(axes[a][2])};
        return op;
      }));
  m.def("resample3d", [](const Resample3d& op, Address x, Address y) {
    launch("resample3d", [&] { resample3d(op, raw(x), raw(y)); });
  });
}

}  // namespace
}  // namespace medspark

PYBIND11_MODULE(_C, m) {
  using namespace medspark;
  m.doc() = "medspark kernels on packed blocks; use them through medspark.sparse.";
  py::class_<Level>(m, "Level").def(py::init(&make_level));
  py::class_<Window>(m, "Window").def(py::init(&make_window));
  bind_conv3d(m);
  bind_pool3d(m);
  bind_norm(m);
  bind_global_pool(m);
  bind_densify(m);
  bind_transfer(m);
  bind_resample3d(m);
#if MEDSPARK_WITH_CUDA
  bind_cuda_kernels(m);
#endif
  m.def("launches", [] { return counts(); });
  m.def("reset_launches", [] { counts().clear(); });
  m.def("cpu_kernels", [] { return std::string(cpu_kernels()); });
  bind_build_info(m);
  bind_peak(m);
}
