// Runs the work of every CUDA kernel (medspark/generic) item by item on the host, and compares it
// with the CPU core. Prints "op dtype numbers worst-relative-difference values-compared" per line.
#include <array>

#include "host_tools.h"
#include "medspark/generic/conv3d.h"
#include "medspark/generic/densify.h"
#include "medspark/generic/global_pool.h"
#include "medspark/generic/norm.h"
#include "medspark/generic/pool3d.h"
#include "medspark/generic/resample3d.h"
#include "medspark/generic/transfer.h"

using namespace host;

namespace {

Report report;

struct Case {
  int64_t grid[3], size[3];
  Window window;
  int64_t in_channels, out_channels, groups;
};

Window window(std::array<int64_t, 3> kernel, std::array<int64_t, 3> stride,
              std::array<int64_t, 3> padding, std::array<int64_t, 3> dilation = {1, 1, 1}) {
  Window w{};
  for (int a = 0; a < 3; ++a) {
    w.kernel[a] = kernel[a];
    w.stride[a] = stride[a];
    w.padding[a] = padding[a];
    w.dilation[a] = dilation[a];
  }
  return w;
}

Window cube(int64_t kernel, int64_t stride, int64_t padding, int64_t dilation = 1) {
  return window({kernel, kernel, kernel}, {stride, stride, stride}, {padding, padding, padding},
                {dilation, dilation, dilation});
}

const std::vector<Case> cases = {
    {{3, 3, 3}, {6, 6, 6}, cube(1, 1, 0), 5, 7, 1},
    {{3, 3, 3}, {6, 6, 6}, cube(3, 1, 1), 5, 7, 1},
    {{3, 3, 3}, {6, 6, 6}, cube(5, 1, 2), 3, 4, 1},
    {{2, 2, 2}, {8, 8, 8}, cube(7, 2, 3), 1, 6, 1},
    {{2, 2, 2}, {8, 8, 8}, cube(2, 2, 0), 9, 5, 1},
    {{2, 3, 2}, {8, 12, 4}, cube(3, 2, 1), 6, 4, 2},
    {{3, 3, 3}, {9, 9, 9}, cube(3, 3, 1), 4, 4, 1},
    {{3, 3, 3}, {9, 9, 9}, cube(1, 3, 0), 4, 4, 1},
    {{3, 3, 3}, {6, 6, 6}, cube(3, 1, 2, 2), 4, 6, 2},
    {{2, 2, 2}, {8, 8, 8}, cube(3, 2, 2, 2), 4, 4, 1},
    {{3, 3, 3}, {6, 6, 6}, cube(3, 1, 1), 8, 8, 8},   // depthwise
    {{3, 3, 3}, {6, 6, 6}, cube(3, 2, 1), 4, 12, 4},  // depthwise, three outputs each
    {{1, 4, 4}, {1, 8, 8}, window({1, 3, 5}, {1, 2, 1}, {0, 1, 2}), 3, 4, 1},  // an image
    {{2, 2, 2}, {4, 8, 6}, window({1, 3, 3}, {1, 2, 1}, {0, 1, 1}), 3, 5, 1},
    {{2, 2, 2}, {4, 8, 6}, window({3, 2, 1}, {2, 2, 3}, {1, 0, 0}, {1, 1, 1}), 3, 5, 1},
    {{4, 4, 4}, {4, 4, 4}, cube(3, 2, 1), 5, 6, 1},  // to voxels of several cells
    {{4, 4, 4}, {2, 2, 2}, cube(3, 1, 1), 5, 6, 1},  // between such levels
    {{4, 4, 4}, {2, 2, 2}, cube(3, 2, 1), 5, 6, 1},
    {{4, 4, 4}, {4, 4, 4}, cube(7, 1, 3), 2, 3, 1},  // reach of several cells
};

void output_size(const Case& c, int64_t* out) {
  for (int a = 0; a < 3; ++a) {
    const Window& w = c.window;
    const int64_t reach = w.dilation[a] * (w.kernel[a] - 1) + 1;
    out[a] = (c.size[a] + 2 * w.padding[a] - reach) / w.stride[a] + 1;
  }
}

// Runs f(launch, target) for both orders of the items and compares with the CPU's result.
template <class T, class F>
void compare(const std::string& what, int64_t n, const std::vector<T>& want, F&& run) {
  std::vector<T> first = unwritten<T>(n), second = unwritten<T>(n);
  run(Loop{false}, first.data());
  run(Loop{true}, second.data());
  report.add(what, first, second, want);
}

template <class T>
void check_conv3d(const Case& c, const Level& in, const Level& out, Numbers kind) {
  using Acc = typename Element<T>::Acc;
  const Conv3d op{dtype_of<T>(), in, out, c.window, c.in_channels, c.out_channels, c.groups, 1};
  const int64_t weights = generic::n_weights(op), n_x = in.rows() * c.in_channels;
  const int64_t n_y = out.rows() * c.out_channels;
  const auto x = numbers<T>(n_x, kind), w = numbers<T>(weights, kind), dy = numbers<T>(n_y, kind);
  const auto bias = numbers<T>(c.out_channels, kind);
  for (const T* b : {bias.data(), static_cast<const T*>(nullptr)}) {
    std::vector<T> y = unwritten<T>(n_y);
    conv3d(op, x.data(), w.data(), b, y.data());
    compare("conv3d" + suffix<T>(kind), n_y, y, [&](Loop launch, T* to) {
      Workspace space(generic::bytes_of<generic::ConvWorkspace<T, false>>(op));
      generic::conv3d<false>(op, x.data(), w.data(), b, to, space.data(), launch);
    });
  }
  std::vector<T> dx = unwritten<T>(n_x);
  conv3d_input(op, dy.data(), w.data(), dx.data());
  compare("conv3d_input" + suffix<T>(kind), n_x, dx, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<generic::ConvWorkspace<T, true>>(op));
    const T* none = nullptr;
    generic::conv3d<true>(op, dy.data(), w.data(), none, to, space.data(), launch);
  });
  std::vector<Acc> dw = unwritten<Acc>(weights);
  conv3d_weight(op, x.data(), dy.data(), dw.data());
  compare("conv3d_weight" + suffix<T>(kind), weights, dw, [&](Loop launch, Acc* to) {
    Workspace space(generic::bytes_of<generic::WeightWorkspace<T>>(op));
    generic::conv3d_weight(op, x.data(), dy.data(), to, space.data(), launch);
  });
}

template <class T>
void check_max_pool(const Pool3d& op, std::vector<T> x, const std::vector<T>& dy, Numbers kind) {
  using generic::PoolWorkspace;
  for (size_t i = 0; i < x.size(); i += 17) x[i] = Element<T>::store(i % 2 ? NAN : -INFINITY);
  const int64_t n_y = op.out.rows() * op.channels, n_x = op.in.rows() * op.channels;
  std::vector<T> y = unwritten<T>(n_y), dx = unwritten<T>(n_x);
  std::vector<int16_t> arg(n_y, 99);
  max_pool3d(op, x.data(), y.data(), arg.data());
  max_pool3d_input(op, dy.data(), arg.data(), dx.data());
  std::vector<int16_t> first(n_y, 77), second(n_y, 77);
  compare("max_pool3d" + suffix<T>(kind), n_y, y, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<PoolWorkspace<false, false>>(op));
    std::swap(first, second);
    generic::max_pool3d(op, x.data(), to, first.data(), space.data(), launch);
  });
  const auto wide = [](const std::vector<int16_t>& a) {
    return std::vector<double>(a.begin(), a.end());
  };
  report.add("argmax" + suffix<T>(kind), wide(first), wide(second), wide(arg));
  compare("max_pool3d_input" + suffix<T>(kind), n_x, dx, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<PoolWorkspace<true, false>>(op));
    generic::max_pool3d_input(op, dy.data(), arg.data(), to, space.data(), launch);
  });
}

template <class T>
void check_avg_pool(const Pool3d& op, const std::vector<T>& x, const std::vector<T>& dy,
                    Numbers kind) {
  using generic::PoolWorkspace;
  const int64_t n_y = op.out.rows() * op.channels, n_x = op.in.rows() * op.channels;
  std::vector<T> y = unwritten<T>(n_y), dx = unwritten<T>(n_x);
  avg_pool3d(op, x.data(), y.data());
  avg_pool3d_input(op, dy.data(), dx.data());
  compare("avg_pool3d" + suffix<T>(kind), n_y, y, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<PoolWorkspace<false, true>>(op));
    generic::avg_pool3d(op, x.data(), to, space.data(), launch);
  });
  compare("avg_pool3d_input" + suffix<T>(kind), n_x, dx, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<PoolWorkspace<true, true>>(op));
    generic::avg_pool3d_input(op, dy.data(), to, space.data(), launch);
  });
}

template <class T>
void check_pools(const Case& c, const Level& in, const Level& out, Numbers kind) {
  const int64_t C = c.in_channels;
  const auto x = numbers<T>(in.rows() * C, kind), dy = numbers<T>(out.rows() * C, kind);
  for (const bool flag : {false, true}) {
    Pool3d op{dtype_of<T>(), in, out, c.window, C, flag, flag, flag, 0, 1};
    check_max_pool(op, x, dy, kind);
    op.window = window({c.window.kernel[0], c.window.kernel[1], c.window.kernel[2]},
                       {c.window.stride[0], c.window.stride[1], c.window.stride[2]},
                       {c.window.padding[0], c.window.padding[1], c.window.padding[2]});
    check_avg_pool(op, x, dy, kind);  // by active voxels, or clipped to the volume
    op.divide_by_active = false;
    check_avg_pool(op, x, dy, kind);
    op.divisor_override = 3;
    check_avg_pool(op, x, dy, kind);
  }
}

template <class T>
void check_norm(const std::vector<int64_t>& starts, int64_t C, Numbers kind) {
  using Acc = typename Element<T>::Acc;
  const int64_t S = static_cast<int64_t>(starts.size()) - 1, n = starts.back() * C;
  const Norm op{dtype_of<T>(), S, starts.data(), starts.back(), C, 1e-5, 1};
  const auto x = numbers<T>(n, kind), dy = numbers<T>(n, kind);
  const auto weight = numbers<Acc>(C, kind), bias = numbers<Acc>(C, kind);
  for (const bool affine : {true, false}) {
    const Acc *w = affine ? weight.data() : nullptr, *b = affine ? bias.data() : nullptr;
    std::vector<T> y = unwritten<T>(n), dx = unwritten<T>(n);
    std::vector<Acc> stats = unwritten<Acc>(2 * S * C), grads = unwritten<Acc>(2 * C);
    norm(op, x.data(), w, b, y.data(), stats.data(), stats.data() + S * C);
    norm_input(op, dy.data(), x.data(), w, stats.data(), stats.data() + S * C, dx.data(),
               grads.data(), grads.data() + C);
    std::vector<Acc> own = unwritten<Acc>(2 * S * C), own_grads = unwritten<Acc>(2 * C);
    compare("norm" + suffix<T>(kind), n, y, [&](Loop launch, T* to) {
      Workspace space(generic::bytes_of<generic::NormWorkspace<Acc>>(op));
      generic::norm(op, x.data(), w, b, to, own.data(), own.data() + S * C, space.data(), launch);
    });
    report.add("norm_statistics" + suffix<T>(kind), own, own, stats);
    compare("norm_input" + suffix<T>(kind), n, dx, [&](Loop launch, T* to) {
      Workspace space(generic::bytes_of<generic::NormInputWorkspace<Acc>>(op));
      generic::norm_input(op, dy.data(), x.data(), w, stats.data(), stats.data() + S * C, to,
                          own_grads.data(), own_grads.data() + C, space.data(), launch);
    });
    report.add("norm_parameters" + suffix<T>(kind), own_grads, own_grads, grads);
  }
}

template <class T>
void check_global_pool(const std::vector<int64_t>& starts, int64_t C, bool maximum, Numbers kind) {
  const int64_t B = static_cast<int64_t>(starts.size()) - 1, n = starts.back() * C;
  const GlobalPool op{dtype_of<T>(), B, starts.data(), starts.back(), C, maximum, 1};
  auto x = numbers<T>(n, kind);
  if (maximum)
    for (int64_t i = 5; i < n; i += 97) x[i] = Element<T>::store(NAN);
  const auto dy = numbers<T>(B * C, kind);
  const std::string name = maximum ? "global_max" : "global_mean";
  std::vector<T> y = unwritten<T>(B * C), dx = unwritten<T>(n);
  std::vector<int64_t> arg(B * C, -7), own(B * C, -8);
  global_pool(op, x.data(), y.data(), arg.data());
  global_pool_input(op, dy.data(), arg.data(), dx.data());
  compare(name + suffix<T>(kind), B * C, y, [&](Loop launch, T* to) {
    Workspace space(generic::bytes_of<generic::GlobalPoolWorkspace>(op));
    generic::global_pool(op, x.data(), to, own.data(), space.data(), launch);
  });
  if (maximum) {
    const std::vector<double> a(own.begin(), own.end()), b(arg.begin(), arg.end());
    report.add("argmax" + suffix<T>(kind), a, a, b);
  }
  compare(name + "_input" + suffix<T>(kind), n, dx, [&](Loop launch, T* to) {
    generic::global_pool_input(op, dy.data(), arg.data(), to, launch);
  });
}

template <class T>
void check_densify(const Level& level, int64_t C, bool channels_last, Numbers kind) {
  using Acc = typename Element<T>::Acc;
  const int64_t D = level.size(0), H = level.size(1), W = level.size(2);
  Densify op{dtype_of<T>(), level, C, {C * D * H * W, D * H * W, H * W, W, 1}, 1};
  if (channels_last) op = {op.dtype, level, C, {D * H * W * C, 1, H * W * C, W * C, C}, 1};
  const int64_t n = level.batch * C * D * H * W, packed = level.rows() * C;
  const auto features = numbers<T>(packed, kind), token = numbers<T>(C, kind);
  const auto dense = numbers<T>(n, kind);
  for (const T* t : {token.data(), static_cast<const T*>(nullptr)}) {
    std::vector<T> want = unwritten<T>(n);
    densify(op, features.data(), t, want.data());
    compare("densify" + suffix<T>(kind), n, want,
            [&](Loop launch, T* to) { generic::densify(op, features.data(), t, to, launch); });
  }
  std::vector<T> want = unwritten<T>(packed);
  gather(op, dense.data(), want.data());
  compare("gather" + suffix<T>(kind), packed, want,
          [&](Loop launch, T* to) { generic::gather(op, dense.data(), to, launch); });
  std::vector<Acc> sum = unwritten<Acc>(C);
  sum_hidden(op, dense.data(), sum.data());
  compare("sum_hidden" + suffix<T>(kind), C, sum, [&](Loop launch, Acc* to) {
    Workspace space(generic::bytes_of<generic::HiddenWorkspace>(op));
    generic::sum_hidden(op, dense.data(), to, space.data(), launch);
  });
}

template <class T>
void check_transfer(const Level& in, const Level& out, int64_t C, Numbers kind) {
  using Acc = typename Element<T>::Acc;
  const Transfer op{dtype_of<T>(), in, out, C, 1};
  const int64_t n = out.rows() * C;
  const auto x = numbers<T>(in.rows() * C, kind), token = numbers<T>(C, kind);
  const auto dy = numbers<T>(n, kind);
  for (const T* t : {token.data(), static_cast<const T*>(nullptr)}) {
    std::vector<T> want = unwritten<T>(n);
    transfer(op, x.data(), t, want.data());
    compare("transfer" + suffix<T>(kind), n, want,
            [&](Loop launch, T* to) { generic::transfer(op, x.data(), t, to, launch); });
  }
  std::vector<Acc> sum = unwritten<Acc>(C);
  sum_untransferred(op, dy.data(), sum.data());
  compare("sum_untransferred" + suffix<T>(kind), C, sum, [&](Loop launch, Acc* to) {
    Workspace space(generic::bytes_of<generic::UntransferredWorkspace>(op));
    generic::sum_untransferred(op, dy.data(), to, space.data(), launch);
  });
}

// A table with up to three random sources per output coordinate.
template <class Acc>
struct Axis {
  std::vector<int32_t> start{0}, index;
  std::vector<Acc> weight;

  Axis(int64_t in, int64_t out, Numbers kind) {
    for (int64_t o = 0; o < out; ++o) {
      for (uint64_t n = host::random()() % 4; n > 0; --n)
        index.push_back(static_cast<int32_t>(host::random()() % in));
      start.push_back(static_cast<int32_t>(index.size()));
    }
    weight = numbers<Acc>(static_cast<int64_t>(index.size()), kind);
  }

  AxisTable table() const { return {start.data(), index.data(), weight.data()}; }
};

template <class T>
void check_resample3d(const Level& in, const Level& out, int64_t C, Numbers kind) {
  using Table = Axis<typename Element<T>::Acc>;
  const Table z(in.size(0), out.size(0), kind), y(in.size(1), out.size(1), kind);
  const Table x(in.size(2), out.size(2), kind);
  const Resample3d op{dtype_of<T>(), in, out, {z.table(), y.table(), x.table()}, C, 1};
  const int64_t n = out.rows() * C;
  const auto features = numbers<T>(in.rows() * C, kind);
  std::vector<T> want = unwritten<T>(n);
  resample3d(op, features.data(), want.data());
  compare("resample3d" + suffix<T>(kind), n, want,
          [&](Loop launch, T* to) { generic::resample3d(op, features.data(), to, launch); });
}

template <class T>
void check_all(Numbers kind) {
  const int64_t one[3] = {1, 1, 1};
  host::random().seed(7);  // the same numbers whichever types are checked before
  for (const Case& c : cases)
    for (const double density : {0.0, 0.5, 1.0}) {
      int64_t size[3];
      output_size(c, size);
      const Mask mask(3, c.grid, density);
      const LevelData in = mask.level(c.size), out = mask.level(size);
      check_conv3d<T>(c, in.level, out.level, kind);
      check_pools<T>(c, in.level, out.level, kind);
      check_densify<T>(in.level, c.in_channels, density == 1.0, kind);
      const LevelData voxels = Mask(3, c.size, 0.5).level(c.size);
      const LevelData whole = Mask(3, one, 0.7).level(c.size);
      check_transfer<T>(in.level, voxels.level, c.in_channels, kind);
      check_transfer<T>(voxels.level, in.level, c.in_channels, kind);
      check_transfer<T>(in.level, whole.level, c.in_channels, kind);
      check_resample3d<T>(in.level, out.level, c.in_channels, kind);
      check_resample3d<T>(out.level, in.level, c.in_channels, kind);
    }
  for (const std::vector<int64_t>& starts : std::vector<std::vector<int64_t>>{
           {0, 0}, {0, 7}, {0, 5000}, {0, 0, 0}, {0, 1, 33}, {0, 0, 64, 64, 96, 96}, {0, 33, 2900}})
    for (const int64_t C : {1, 5, 33}) {
      check_norm<T>(starts, C, kind);
      check_global_pool<T>(starts, C, false, kind);
      check_global_pool<T>(starts, C, true, kind);
    }
}

// 24³ rows under 343 taps: more than one slice of the table of source rows.
void check_slices() {
  const Case c{{2, 2, 2}, {24, 24, 24}, cube(7, 1, 3), 1, 2, 1};
  const Mask mask(1, c.grid, 1.0);
  const LevelData level = mask.level(c.size);
  if (generic::slice_rows(level.level, c.window) >= level.level.rows()) std::abort();
  const auto x = numbers<float>(level.level.rows(), Numbers::integers);
  const Pool3d op{DType::f32, level.level, level.level, c.window, 1, true, false, true, 0, 1};
  check_conv3d<float>(c, level.level, level.level, Numbers::integers);
  check_max_pool(op, x, x, Numbers::integers);
  check_avg_pool(op, x, x, Numbers::integers);
}

}  // namespace

int main() {
  for (const Numbers kind : {Numbers::integers, Numbers::reals}) {
    check_all<float>(kind);
    check_all<double>(kind);
    check_all<bf16>(kind);
    check_all<f16>(kind);
  }
  check_slices();
  report.print();
}
