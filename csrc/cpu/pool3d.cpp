// Pooling on packed blocks. Forward and backward both walk the rows they write, so no two threads
// share one.
#include "medspark/pool3d.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "row_map.h"

namespace medspark {
namespace {

// What one thread needs for a row: the source rows of its taps, and a value per channel.
template <class Acc>
struct Scratch {
  std::vector<int64_t> rows;
  std::vector<Acc> values;
};

// Calls visit(i, scratch) for each row of the map, with its taps looked up, spread over threads.
template <class Acc, class F>
void for_each_row(const Pool3d& op, const RowMap& map, F&& visit) {
#pragma omp parallel num_threads(op.threads)
  {
    Scratch<Acc> scratch{std::vector<int64_t>(op.window.taps()), std::vector<Acc>(op.channels)};
#pragma omp for schedule(static)
    for (int64_t i = 0; i < map.rows(); ++i) {
      map.lookup(i, 1, scratch.rows.data());
      visit(i, scratch);
    }
  }
}

Voxel tap_at(const Window& w, int64_t t) {
  return {0, t / (w.kernel[1] * w.kernel[2]), t / w.kernel[2] % w.kernel[1], t % w.kernel[2]};
}

// Whether tap t of output voxel v falls inside the volume (hidden or not).
bool inside(const Pool3d& op, const Voxel& v, int64_t t) {
  const Voxel k = tap_at(op.window, t);
  const int64_t o[3] = {v.z, v.y, v.x}, tap[3] = {k.z, k.y, k.x};
  for (int a = 0; a < 3; ++a)
    if (input_of(o[a], tap[a], op.window.stride[a], op.window.padding[a], op.window.dilation[a],
                 op.in.size(a)) < 0)
      return false;
  return true;
}

// Voxels that torch counts for an average with the kernel divisor: the window clipped to the padded
// volume (count_padding) or to the volume itself.
int64_t kernel_divisor(const Pool3d& op, const Voxel& v) {
  if (op.divisor_override > 0) return op.divisor_override;
  const int64_t o[3] = {v.z, v.y, v.x};
  int64_t count = 1;
  for (int a = 0; a < 3; ++a) {
    const Window& w = op.window;
    const int64_t low = o[a] * w.stride[a] - w.padding[a];
    const int64_t high = std::min(low + w.kernel[a], op.in.size(a) + w.padding[a]);
    count *=
        op.count_padding ? high - low : std::min(high, op.in.size(a)) - std::max<int64_t>(low, 0);
  }
  return count;
}

// Divisor of output row `row`, whose taps read `rows`.
int64_t average_divisor(const Pool3d& op, int64_t row, const std::vector<int64_t>& rows) {
  if (!op.divide_by_active) return kernel_divisor(op, voxel_of(op.out, row));
  return rows.size() - std::count(rows.begin(), rows.end(), -1);
}

template <class T>
void max_forward(const Pool3d& op, const T* x, T* y, int16_t* argmax) {
  using Acc = typename Element<T>::Acc;
  const RowMap map(op.in, op.out, op.window, false);
  const int64_t taps = op.window.taps(), C = op.channels;
  for_each_row<Acc>(op, map, [&](int64_t row, Scratch<Acc>& scratch) {
    const auto& rows = scratch.rows;
    auto& best = scratch.values;
    int16_t* arg = argmax + row * C;
    std::fill(arg, arg + C, no_tap);
    const Voxel v = voxel_of(op.out, row);
    bool any = false;
    for (int64_t t = 0; t < taps; ++t) {
      const bool hidden = rows[t] < 0;
      if (hidden && !(op.hidden_is_zero && inside(op, v, t))) continue;
      for (int64_t c = 0; c < C; ++c) {
        const Acc value = hidden ? Acc(0) : Element<T>::load(x[rows[t] * C + c]);
        // The first candidate always wins over "nothing yet", even if it is -inf; NaN wins over any
        // number.
        if (any && !(value > best[c]) && !std::isnan(value)) continue;
        best[c] = value;
        arg[c] = hidden ? no_tap : static_cast<int16_t>(t);
      }
      any = true;
    }
    for (int64_t c = 0; c < C; ++c) y[row * C + c] = Element<T>::store(any ? best[c] : Acc(0));
  });
}

template <class T>
void max_backward(const Pool3d& op, const T* dy, const int16_t* argmax, T* dx) {
  using Acc = typename Element<T>::Acc;
  const RowMap map(op.in, op.out, op.window, true);
  const int64_t taps = op.window.taps(), C = op.channels;
  for_each_row<Acc>(op, map, [&](int64_t i, Scratch<Acc>& scratch) {
    const auto& rows = scratch.rows;
    auto& sum = scratch.values;
    std::fill(sum.begin(), sum.end(), Acc(0));
    for (int64_t t = 0; t < taps; ++t) {
      if (rows[t] < 0) continue;
      const int16_t* arg = argmax + rows[t] * C;
      const T* from = dy + rows[t] * C;
      for (int64_t c = 0; c < C; ++c)
        if (arg[c] == t) sum[c] += Element<T>::load(from[c]);
    }
    T* to = dx + map.target_row(i) * C;
    for (int64_t c = 0; c < C; ++c) to[c] = Element<T>::store(sum[c]);
  });
}

template <class T>
void average_forward(const Pool3d& op, const T* x, T* y) {
  using Acc = typename Element<T>::Acc;
  const RowMap map(op.in, op.out, op.window, false);
  const int64_t taps = op.window.taps(), C = op.channels;
  for_each_row<Acc>(op, map, [&](int64_t row, Scratch<Acc>& scratch) {
    const auto& rows = scratch.rows;
    auto& sum = scratch.values;
    std::fill(sum.begin(), sum.end(), Acc(0));
    for (int64_t t = 0; t < taps; ++t)
      if (rows[t] >= 0)
        for (int64_t c = 0; c < C; ++c) sum[c] += Element<T>::load(x[rows[t] * C + c]);
    const int64_t divisor = average_divisor(op, row, rows);
    for (int64_t c = 0; c < C; ++c)
      y[row * C + c] = Element<T>::store(divisor > 0 ? sum[c] / divisor : Acc(0));
  });
}

template <class T>
void average_backward(const Pool3d& op, const T* dy, T* dx) {
  using Acc = typename Element<T>::Acc;
  const RowMap forward(op.in, op.out, op.window, false), map(op.in, op.out, op.window, true);
  const int64_t taps = op.window.taps(), C = op.channels;
  std::vector<int64_t> divisor(op.out.rows());
  for_each_row<Acc>(op, forward, [&](int64_t row, Scratch<Acc>& scratch) {
    divisor[row] = average_divisor(op, row, scratch.rows);
  });
  for_each_row<Acc>(op, map, [&](int64_t i, Scratch<Acc>& scratch) {
    const auto& rows = scratch.rows;
    auto& sum = scratch.values;
    std::fill(sum.begin(), sum.end(), Acc(0));
    for (int64_t t = 0; t < taps; ++t)
      if (rows[t] >= 0)
        for (int64_t c = 0; c < C; ++c)
          sum[c] += Element<T>::load(dy[rows[t] * C + c]) / divisor[rows[t]];
    T* to = dx + map.target_row(i) * C;
    for (int64_t c = 0; c < C; ++c) to[c] = Element<T>::store(sum[c]);
  });
}

}  // namespace

void max_pool3d(const Pool3d& op, const void* x, void* y, int16_t* argmax) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    max_forward(op, static_cast<const T*>(x), static_cast<T*>(y), argmax);
  });
}

void max_pool3d_input(const Pool3d& op, const void* dy, const int16_t* argmax, void* dx) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    max_backward(op, static_cast<const T*>(dy), argmax, static_cast<T*>(dx));
  });
}

void avg_pool3d(const Pool3d& op, const void* x, void* y) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    average_forward(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

void avg_pool3d_input(const Pool3d& op, const void* dy, void* dx) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    average_backward(op, static_cast<const T*>(dy), static_cast<T*>(dx));
  });
}

}  // namespace medspark
