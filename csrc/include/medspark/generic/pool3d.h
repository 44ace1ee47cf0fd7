// Pooling on packed blocks, one item of work at a time (see medspark/pool3d.h and
// medspark/generic/conv3d.h for `launch`). An item is (row, channel), channels fastest.
#pragma once

#include "medspark/generic/row_map.h"
#include "medspark/generic/workspace.h"
#include "medspark/pool3d.h"

namespace medspark::generic {

// The slice that the items of one launch work on.
struct PoolSlice {
  int64_t taps, channels;
  int64_t start, n;
  const int64_t* rows;  // [taps, n]
};

template <class T>
struct MaxPool {
  PoolSlice s;
  bool hidden_is_zero;
  const T* x;
  T* y;
  int16_t* argmax;

  MEDSPARK_HD void operator()(int64_t i) const {
    using Acc = typename Element<T>::Acc;
    const int64_t c = i % s.channels, r = i / s.channels;
    bool any = false;
    Acc best = 0;
    int16_t arg = no_tap;
    for (int64_t t = 0; t < s.taps; ++t) {
      const int64_t row = s.rows[t * s.n + r];
      if (row < 0 && !(hidden_is_zero && row == hidden_row)) continue;
      const Acc value = row < 0 ? Acc(0) : Element<T>::load(x[row * s.channels + c]);
      // The first candidate wins over "nothing yet", even -inf; NaN wins over any number.
      if (any && !(value > best) && value == value) continue;
      any = true;
      best = value;
      arg = row < 0 ? no_tap : static_cast<int16_t>(t);
    }
    y[s.start * s.channels + i] = Element<T>::store(best);
    argmax[s.start * s.channels + i] = arg;
  }
};

template <class T>
struct MaxPoolInput {
  PoolSlice s;
  const T* dy;
  const int16_t* argmax;
  T* dx;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % s.channels, r = i / s.channels;
    typename Element<T>::Acc sum = 0;
    for (int64_t t = 0; t < s.taps; ++t) {
      const int64_t row = s.rows[t * s.n + r];
      if (row >= 0 && argmax[row * s.channels + c] == t)
        sum += Element<T>::load(dy[row * s.channels + c]);
    }
    dx[s.start * s.channels + i] = Element<T>::store(sum);
  }
};

// Voxels along one axis that torch counts for an average with the kernel divisor: the window
// clipped to the padded volume (count_padding) or to the volume itself.
MEDSPARK_HD int64_t counted(const Pool3d& op, int axis, int64_t o) {
  const int64_t size = op.in.size(axis), padding = op.window.padding[axis];
  const int64_t low = o * op.window.stride[axis] - padding, end = low + op.window.kernel[axis];
  const int64_t high = end < size + padding ? end : size + padding;
  if (op.count_padding) return high - low;
  return (high < size ? high : size) - (low > 0 ? low : 0);
}

// Item i = output row.
struct Divisor {
  Pool3d op;
  int64_t* divisor;

  MEDSPARK_HD void operator()(int64_t i) const {
    const Voxel v = voxel_of(op.out, i);
    int64_t count = 0;
    if (op.divide_by_active) {
      for (int64_t t = 0; t < op.window.taps(); ++t)
        count += source_row(op.in, op.window, false, v, tap_of(op.window, t)) >= 0;
    } else if (op.divisor_override > 0) {
      count = op.divisor_override;
    } else {
      count = counted(op, 0, v.z) * counted(op, 1, v.y) * counted(op, 2, v.x);
    }
    divisor[i] = count;
  }
};

template <class T>
struct AvgPool {
  PoolSlice s;
  const int64_t* divisor;
  const T* x;
  T* y;

  MEDSPARK_HD void operator()(int64_t i) const {
    using Acc = typename Element<T>::Acc;
    const int64_t c = i % s.channels, r = i / s.channels, count = divisor[s.start + r];
    Acc sum = 0;
    for (int64_t t = 0; t < s.taps; ++t) {
      const int64_t row = s.rows[t * s.n + r];
      if (row >= 0) sum += Element<T>::load(x[row * s.channels + c]);
    }
    const Acc mean = count > 0 ? sum / static_cast<Acc>(count) : Acc(0);
    y[s.start * s.channels + i] = Element<T>::store(mean);
  }
};

template <class T>
struct AvgPoolInput {
  PoolSlice s;
  const int64_t* divisor;
  const T* dy;
  T* dx;

  MEDSPARK_HD void operator()(int64_t i) const {
    using Acc = typename Element<T>::Acc;
    const int64_t c = i % s.channels, r = i / s.channels;
    Acc sum = 0;
    for (int64_t t = 0; t < s.taps; ++t) {
      const int64_t row = s.rows[t * s.n + r];
      if (row >= 0)
        sum += Element<T>::load(dy[row * s.channels + c]) / static_cast<Acc>(divisor[row]);
    }
    dx[s.start * s.channels + i] = Element<T>::store(sum);
  }
};

// Maximum pooling leaves `divisor` unused, and takes no room for it.
template <bool backward, bool average>
struct PoolWorkspace {
  int64_t* rows;
  int64_t* divisor;

  PoolWorkspace(const Pool3d& op, Arena& arena)
      : rows(arena.take<int64_t>(map_entries(backward ? op.in : op.out, op.window))),
        divisor(arena.take<int64_t>(average ? op.out.rows() : 0)) {}
};

// Launches make(slice) for every slice of the rows that are written.
template <bool backward, class Launch, class Make>
void pool_slices(const Pool3d& op, int64_t* rows, Launch&& launch, Make&& make) {
  for_each_slice(op, backward, rows, launch, [&](int64_t start, int64_t n) {
    launch(n * op.channels, make(PoolSlice{op.window.taps(), op.channels, start, n, rows}));
  });
}

template <class T, class Launch>
void max_pool3d(const Pool3d& op, const T* x, T* y, int16_t* argmax, void* workspace,
                Launch&& launch) {
  Arena arena(workspace);
  const PoolWorkspace<false, false> space(op, arena);
  pool_slices<false>(op, space.rows, launch, [&](const PoolSlice& s) {
    return MaxPool<T>{s, op.hidden_is_zero, x, y, argmax};
  });
}

template <class T, class Launch>
void max_pool3d_input(const Pool3d& op, const T* dy, const int16_t* argmax, T* dx, void* workspace,
                      Launch&& launch) {
  Arena arena(workspace);
  const PoolWorkspace<true, false> space(op, arena);
  pool_slices<true>(op, space.rows, launch,
                    [&](const PoolSlice& s) { return MaxPoolInput<T>{s, dy, argmax, dx}; });
}

template <class T, class Launch>
void avg_pool3d(const Pool3d& op, const T* x, T* y, void* workspace, Launch&& launch) {
  Arena arena(workspace);
  const PoolWorkspace<false, true> space(op, arena);
  launch(op.out.rows(), Divisor{op, space.divisor});
  pool_slices<false>(op, space.rows, launch,
                     [&](const PoolSlice& s) { return AvgPool<T>{s, space.divisor, x, y}; });
}

template <class T, class Launch>
void avg_pool3d_input(const Pool3d& op, const T* dy, T* dx, void* workspace, Launch&& launch) {
  Arena arena(workspace);
  const PoolWorkspace<true, true> space(op, arena);
  launch(op.out.rows(), Divisor{op, space.divisor});
  pool_slices<true>(op, space.rows, launch,
                    [&](const PoolSlice& s) { return AvgPoolInput<T>{s, space.divisor, dy, dx}; });
}

}  // namespace medspark::generic
