// Which source row each tap of a sliding window reads, tabulated for a slice of target rows.
//
// Forward, targets are the rows of `out` and sources the rows of `in`; backward the other way
// round. A look-up costs several divisions, so it is done once per (row, tap) and not once per
// channel; slices bound the memory of the table whatever the volume.
#pragma once

#include <algorithm>

#include "medspark/index.h"

namespace medspark::generic {

constexpr int64_t hidden_row = -1;   // inside the volume, but not stored
constexpr int64_t outside_row = -2;  // outside the volume, or read by no window

struct Tap {
  int64_t z, y, x;
};

MEDSPARK_HD Tap tap_of(const Window& w, int64_t t) {
  return {t / (w.kernel[1] * w.kernel[2]), t / w.kernel[2] % w.kernel[1], t % w.kernel[2]};
}

MEDSPARK_HD int64_t source_of(const Window& w, bool backward, int axis, int64_t i, int64_t k,
                              int64_t size) {
  return backward ? output_of(i, k, w.stride[axis], w.padding[axis], w.dilation[axis], size)
                  : input_of(i, k, w.stride[axis], w.padding[axis], w.dilation[axis], size);
}

MEDSPARK_HD int64_t source_row(const Level& source, const Window& w, bool backward, const Voxel& v,
                               const Tap& k) {
  const int64_t z = source_of(w, backward, 0, v.z, k.z, source.size(0));
  const int64_t y = source_of(w, backward, 1, v.y, k.y, source.size(1));
  const int64_t x = source_of(w, backward, 2, v.x, k.x, source.size(2));
  return (z | y | x) < 0 ? outside_row : row_of(source, v.b, z, y, x);
}

// Item i = (tap, row of the slice), rows fastest: rows[i] is the source row or one of the marks.
struct SourceRows {
  Level source, target;
  Window window;
  bool backward;
  int64_t start, n;  // the slice of target rows
  int64_t* rows;

  MEDSPARK_HD void operator()(int64_t i) const {
    const Voxel v = voxel_of(target, start + i % n);
    rows[i] = source_row(source, window, backward, v, tap_of(window, i / n));
  }
};

// Rows per slice: a table of 32 MiB, and slices that are still worth a launch under huge kernels.
inline int64_t slice_rows(const Level& target, const Window& window) {
  constexpr int64_t entries = 1 << 22, least = 1024;
  return std::min(target.rows(), std::max(entries / window.taps(), least));
}

inline int64_t map_entries(const Level& target, const Window& window) {
  return slice_rows(target, window) * window.taps();
}

// Fills `rows` [taps, n] for each slice in turn, then calls body(start, n).
template <class Op, class Launch, class Body>
void for_each_slice(const Op& op, bool backward, int64_t* rows, Launch&& launch, Body&& body) {
  const Level& source = backward ? op.out : op.in;
  const Level& target = backward ? op.in : op.out;
  const int64_t step = slice_rows(target, op.window);
  for (int64_t start = 0; start < target.rows(); start += step) {
    const int64_t n = std::min(step, target.rows() - start);
    launch(n * op.window.taps(), SourceRows{source, target, op.window, backward, start, n, rows});
    body(start, n);
  }
}

}  // namespace medspark::generic
