// Convolution on packed blocks, one item of work at a time (see medspark/conv3d.h).
//
// Each pass takes a `launch(n, item)` that calls item(0) ... item(n - 1) in any order, in parallel:
// a CUDA kernel, or a plain loop in the tests. No two items of a launch write the same element.
#pragma once

#include "medspark/conv3d.h"
#include "medspark/generic/row_map.h"
#include "medspark/generic/workspace.h"

namespace medspark::generic {

// Channel counts of one direction: x -> y forward, dy -> dx backward.
struct Direction {
  bool backward;
  int64_t groups;
  int64_t depth;    // channels read per group
  int64_t columns;  // channels written, all groups
};

inline Direction direction_of(const Conv3d& op, bool backward) {
  const int64_t depth = (backward ? op.out_channels : op.in_channels) / op.groups;
  return {backward, op.groups, depth, backward ? op.in_channels : op.out_channels};
}

// weight [K, C / groups, taps] -> packed [taps, depth, columns] in the accumulation type:
// neighbouring columns lie side by side.
template <class T>
struct PackWeight {
  Direction way;
  int64_t taps, in_group;
  const T* weight;
  typename Element<T>::Acc* packed;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t j = i % way.columns, d = i / way.columns % way.depth;
    const int64_t t = i / way.columns / way.depth, per_group = way.columns / way.groups;
    const int64_t k = way.backward ? j / per_group * way.depth + d : j;
    const int64_t c = way.backward ? j % per_group : d;
    packed[i] = Element<T>::load(weight[(k * in_group + c) * taps + t]);
  }
};

// Item i = (four target rows, column), columns fastest. Four rows share each weight that is read.
template <class T>
struct ConvRows {
  using Acc = typename Element<T>::Acc;
  static constexpr int n_rows = 4;

  Direction way;
  int64_t taps;
  int64_t start, n;  // the slice of target rows
  const int64_t* rows;
  const T* source;
  const Acc* packed;
  const T* bias;
  T* target;

  int64_t items() const { return (n + n_rows - 1) / n_rows * way.columns; }

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t column = i % way.columns, first = i / way.columns * n_rows;
    const int64_t g = column / (way.columns / way.groups);
    const Acc initial = bias ? Element<T>::load(bias[column]) : Acc(0);
    Acc sum[n_rows] = {initial, initial, initial, initial};
    for (int64_t t = 0; t < taps; ++t) {
      const T* from[n_rows];
      for (int r = 0; r < n_rows; ++r) {
        const int64_t row = first + r < n ? rows[t * n + first + r] : hidden_row;
        from[r] = row < 0 ? nullptr : source + (row * way.groups + g) * way.depth;
      }
      if (!from[0] && !from[1] && !from[2] && !from[3]) continue;
      const Acc* w = packed + t * way.depth * way.columns + column;
      for (int64_t d = 0; d < way.depth; ++d, w += way.columns)
        for (int r = 0; r < n_rows; ++r)
          if (from[r]) sum[r] += Element<T>::load(from[r][d]) * *w;
    }
    for (int r = 0; r < n_rows; ++r)
      if (first + r < n)
        target[(start + first + r) * way.columns + column] = Element<T>::store(sum[r]);
  }
};

// Sums of one chunk of a slice. Item i = (chunk, tap, four input channels, output channel), output
// channels fastest; partial [chunks, taps, C / groups, K].
template <class T>
struct WeightPartial {
  using Acc = typename Element<T>::Acc;
  static constexpr int n_channels = 4;

  Conv3d op;
  int64_t chunks;
  int64_t start, n;  // the slice of output rows
  const int64_t* rows;
  const T* x;
  const T* dy;
  Acc* partial;

  MEDSPARK_HD int64_t in_group() const { return op.in_channels / op.groups; }
  MEDSPARK_HD int64_t tiles() const { return (in_group() + n_channels - 1) / n_channels; }
  int64_t items() const { return chunks * op.window.taps() * tiles() * op.out_channels; }

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t k = i % op.out_channels, c0 = i / op.out_channels % tiles() * n_channels;
    const int64_t rest = i / op.out_channels / tiles(), t = rest % op.window.taps();
    const int64_t chunk = rest / op.window.taps(), length = (n + chunks - 1) / chunks;
    const int64_t first = chunk * length, end = first + length < n ? first + length : n;
    const int64_t g = k / (op.out_channels / op.groups);
    const T* channels = x + g * in_group() + c0;
    Acc* to = partial + (rest * in_group() + c0) * op.out_channels + k;
    Acc sum[n_channels];
    for (int c = 0; c < n_channels; ++c)
      sum[c] = start > 0 && c0 + c < in_group() ? to[c * op.out_channels] : Acc(0);
    for (int64_t r = first; r < end; ++r) {
      const int64_t row = rows[t * n + r];
      if (row < 0) continue;
      const Acc grad = Element<T>::load(dy[(start + r) * op.out_channels + k]);
      for (int c = 0; c < n_channels; ++c)
        if (c0 + c < in_group())
          sum[c] += Element<T>::load(channels[row * op.in_channels + c]) * grad;
    }
    for (int c = 0; c < n_channels; ++c)
      if (c0 + c < in_group()) to[c * op.out_channels] = sum[c];
  }
};

// Item i = (tap, input channel, output channel): the chunks in order, then torch's order of axes.
template <class Acc>
struct WeightSum {
  int64_t taps, in_group, out_channels, chunks;
  const Acc* partial;
  Acc* dw;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t k = i % out_channels, c = i / out_channels % in_group;
    Acc sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      sum += partial[chunk * taps * in_group * out_channels + i];
    dw[(k * in_group + c) * taps + i / out_channels / in_group] = sum;
  }
};

inline int64_t n_weights(const Conv3d& op) {
  return op.window.taps() * (op.in_channels / op.groups) * op.out_channels;
}

// Chunks of the row sum: enough for parallelism, at most 4 Mi partial sums, never fewer than 256
// rows each. A function of the sizes alone, so the order of summation is too.
inline int64_t weight_chunks(const Conv3d& op) {
  const int64_t by_rows = (op.out.rows() + 255) / 256;
  const int64_t by_memory = (int64_t{1} << 22) / std::max<int64_t>(1, n_weights(op));
  return std::min(by_rows, std::max<int64_t>(1, by_memory));
}

template <class T, bool backward>
struct ConvWorkspace {
  typename Element<T>::Acc* packed;
  int64_t* rows;

  ConvWorkspace(const Conv3d& op, Arena& arena)
      : packed(arena.take<typename Element<T>::Acc>(n_weights(op))),
        rows(arena.take<int64_t>(map_entries(backward ? op.in : op.out, op.window))) {}
};

template <class T>
struct WeightWorkspace {
  typename Element<T>::Acc* partial;
  int64_t* rows;

  WeightWorkspace(const Conv3d& op, Arena& arena)
      : partial(arena.take<typename Element<T>::Acc>(weight_chunks(op) * n_weights(op))),
        rows(arena.take<int64_t>(map_entries(op.out, op.window))) {}
};

// Both directions: x -> y with a bias or null, and dy -> dx.
template <bool backward, class T, class Launch>
void conv3d(const Conv3d& op, const T* source, const T* weight, const T* bias, T* target,
            void* workspace, Launch&& launch) {
  if ((backward ? op.in : op.out).rows() == 0) return;
  Arena arena(workspace);
  const ConvWorkspace<T, backward> space(op, arena);
  const Direction way = direction_of(op, backward);
  const int64_t taps = op.window.taps(), in_group = op.in_channels / op.groups;
  launch(n_weights(op), PackWeight<T>{way, taps, in_group, weight, space.packed});
  for_each_slice(op, backward, space.rows, launch, [&](int64_t start, int64_t n) {
    const ConvRows<T> item{way, taps, start, n, space.rows, source, space.packed, bias, target};
    launch(item.items(), item);
  });
}

template <class T, class Launch>
void conv3d_weight(const Conv3d& op, const T* x, const T* dy, typename Element<T>::Acc* dw,
                   void* workspace, Launch&& launch) {
  using Acc = typename Element<T>::Acc;
  Arena arena(workspace);
  const WeightWorkspace<T> space(op, arena);
  const int64_t chunks = weight_chunks(op);
  for_each_slice(op, false, space.rows, launch, [&](int64_t start, int64_t n) {
    const WeightPartial<T> item{op, chunks, start, n, space.rows, x, dy, space.partial};
    launch(item.items(), item);
  });
  const int64_t taps = op.window.taps(), in_group = op.in_channels / op.groups;
  launch(n_weights(op), WeightSum<Acc>{taps, in_group, op.out_channels, chunks, space.partial, dw});
}

}  // namespace medspark::generic
