// Which source row each tap of a sliding window reads, for runs of destination rows.
//
// Forward, destinations are the rows of `out` and sources the rows of `in`; backward the other way
// round. The per-axis part (coordinate and tap -> cell and place in the block) is tabulated once
// per call, so a look-up is three additions and one read of the cell table.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "medspark/index.h"

namespace medspark {

class RowMap {
 public:
  RowMap(const Level& in, const Level& out, const Window& window, bool backward)
      : source_(backward ? out : in), target_(backward ? in : out), window_(window) {
    const int64_t cell_stride[3] = {source_.grid[1] * source_.grid[2], source_.grid[2], 1};
    const int64_t local_stride[3] = {source_.block[1] * source_.block[2], source_.block[2], 1};
    for (int a = 0; a < 3; ++a) tabulate(a, backward, cell_stride[a], local_stride[a]);
    order_.resize(target_.block_voxels());
    std::iota(order_.begin(), order_.end(), 0);
    if (backward) group_by_phase();
    tabulate_voxels();
  }

  int64_t rows() const { return target_.rows(); }

  // Row of the destination level that comes i-th in the order of look-ups.
  int64_t target_row(int64_t i) const {
    const int64_t voxels = target_.block_voxels();
    return i / voxels * voxels + order_[i % voxels];
  }

  // rows[t * n + i]: source row of tap t for the destinations start + i, -1 where there is none.
  void lookup(int64_t start, int64_t n, int64_t* rows) const {
    lookup(start, n, 0, window_.taps(), rows, n, 1);
  }

  // The same for taps [first, last), at rows[(t - first) * tap_step + i * row_step].
  void lookup(int64_t start, int64_t n, int64_t first, int64_t last, int64_t* rows,
              int64_t tap_step, int64_t row_step) const {
    const int64_t* k = window_.kernel;
    for (int64_t i = 0; i < n; ++i) {
      const Voxel v = voxel(start + i);
      // Taps that differ in x alone share the places in z and y.
      for (int64_t t = first; t < last;) {
        const int64_t kx = t % k[2], line = t / k[2], run = std::min(k[2] - kx, last - t);
        const Place& z = place_[0][v.z * k[0] + line / k[1]];
        const Place& y = place_[1][v.y * k[1] + line % k[1]];
        const Place* x = place_[2].data() + v.x * k[2] + kx;
        int64_t* to = rows + (t - first) * tap_step + i * row_step;
        const bool inside = (z.cell | y.cell) >= 0;
        const int64_t corner = v.b * source_.sample_cells() + z.cell + y.cell;
        for (int64_t j = 0; j < run; ++j) {
          const int64_t block = inside && x[j].cell >= 0 ? source_.cells[corner + x[j].cell] : -1;
          to[j * tap_step] =
              block < 0 ? -1 : block * source_.block_voxels() + z.local + y.local + x[j].local;
        }
        t += run;
      }
    }
  }

 private:
  struct Place {
    int64_t cell,
        local;  // contributions to the flat cell and to the place in the block; cell -1: outside
  };

  void tabulate(int a, bool backward, int64_t cell_stride, int64_t local_stride) {
    const int64_t n = target_.size(a), k = window_.kernel[a];
    place_[a].resize(n * k);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t t = 0; t < k; ++t) {
        const auto map = backward ? output_of : input_of;
        const int64_t s =
            map(i, t, window_.stride[a], window_.padding[a], window_.dilation[a], source_.size(a));
        Place& p = place_[a][i * k + t];
        p = s < 0 ? Place{-1, 0}
                  : Place{s / source_.block[a] * cell_stride, s % source_.block[a] * local_stride};
      }
    }
  }

  // Divisions are slow: the place of each voxel in its block and of each block in the volume is
  // kept.
  void tabulate_voxels() {
    const int64_t* n = target_.block;
    for (const int64_t v : order_)
      local_.push_back({0, v / (n[1] * n[2]), v / n[2] % n[1], v % n[2]});
    for (int64_t i = 0; i < target_.n_blocks; ++i)
      origin_.push_back(voxel_of(target_, i * target_.block_voxels()));
  }

  Voxel voxel(int64_t i) const {
    const int64_t voxels = target_.block_voxels(), block = i / voxels;
    const Voxel &o = origin_[block], &l = local_[i - block * voxels];
    return {o.b, o.z + l.z, o.y + l.y, o.x + l.x};
  }

  // Backward through a stride, neighbours in x are read by different taps. Rows of one phase side
  // by side share their taps, so that whole register tiles can be skipped.
  void group_by_phase() {
    const int64_t* n = target_.block;
    const auto phase = [&](int64_t v) {
      const int64_t x = v % n[2], y = v / n[2] % n[1], z = v / n[2] / n[1];
      return (z % window_.stride[0] * window_.stride[1] + y % window_.stride[1]) *
                 window_.stride[2] +
             x % window_.stride[2];
    };
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return phase(a) < phase(b); });
  }

  Level source_, target_;
  Window window_;
  std::vector<Place> place_[3];
  std::vector<int64_t> order_;
  std::vector<Voxel> local_, origin_;
};

}  // namespace medspark
