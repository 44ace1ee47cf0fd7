// Which source row each tap of a sliding window reads, for runs of destination rows.
//
// Forward, destinations are the rows of `out` and sources the rows of `in`; backward the other way
// round. Everything that depends on one axis alone is tabulated once per call. Along x that is a
// list of runs: a line of destinations reads, through one tap, stretches of rows of one or two
// source cells, so that a whole stretch costs one read of the cell table.
#pragma once

#include <algorithm>
#include <vector>

#include "medspark/index.h"
#include "microkernel.h"

namespace medspark {

class RowMap {
 public:
  RowMap(const Level& in, const Level& out, const Window& window, bool backward)
      : source_(backward ? out : in), target_(backward ? in : out), window_(window),
        backward_(backward) {
    for (int a = 0; a < 3; ++a) tabulate(a);
    // Backward through a stride, neighbours in x are read by different taps: lines and their order
    // follow the phase, so that rows side by side share their taps.
    for (int a = 0; a < 3; ++a)
      phases_[a] = backward ? std::min(window.stride[a], target_.block[a]) : 1;
    list_lines();
    tabulate_runs();
  }

  int64_t rows() const { return target_.rows(); }

  // Row of the destination level that comes i-th in the order of look-ups.
  int64_t target_row(int64_t i) const {
    if (in_order_) return i;
    const int64_t voxels = target_.block_voxels();
    return i / voxels * voxels + order_[i % voxels];
  }

  // rows[t * n + i]: source row of tap t for the destinations start + i, as an offset into features
  // of `scale` numbers per row; -1 where there is none.
  void lookup(int64_t start, int64_t n, int64_t* rows, int64_t scale = 1) const {
    const int64_t taps = window_.taps();
    if (n == 1) return lookup_one(start, rows, scale);
    std::fill(rows, rows + taps * n, -1);
    for_each_run(start, n, 0, taps, [&](int64_t t, int64_t i, int64_t count, int64_t row) {
      ramps_.offsets(rows + t * n + i, count, row * scale, step_ * scale);
    });
  }

  // Only what is there: of tap first + t, found[t] destinations start + place[t * n + j] with the
  // offset of their source at offset[t * n + j].
  void list(int64_t start, int64_t n, int64_t first, int64_t last, int64_t* offset, int32_t* place,
            int64_t* found, int64_t scale) const {
    std::fill(found, found + (last - first), 0);
    for_each_run(start, n, first, last, [&](int64_t t, int64_t i, int64_t count, int64_t row) {
      const int64_t at = t * n + found[t];
      ramps_.offsets(offset + at, count, row * scale, step_ * scale);
      ramps_.places(place + at, count, static_cast<int32_t>(i));
      found[t] += count;
    });
  }

  // visit(t - first, i, count, row): `count` destinations from start + i on read, through tap t,
  // the rows `row`, row + step(), ... of the source.
  template <class F>
  void for_each_run(int64_t start, int64_t n, int64_t first, int64_t last, F&& visit) const {
    const int64_t voxels = target_.block_voxels(), *k = window_.kernel;
    const Taps taps{first, last, first % k[2], first / k[2] % k[1], first / k[2] / k[1]};
    int64_t block = start / voxels, local = start % voxels;
    for (int64_t i = 0; i < n; ++block, local = 0) {
      const Voxel& origin = origin_[block];
      const int64_t* runs_at = first_run_.data() + runs_of_block_[block];
      for (const Line* line = lines_.data() + line_of_[local]; i < n && local < voxels; ++line) {
        const int64_t begin = local - line->first, end = std::min(line->count, begin + n - i);
        visit_line(origin, *line, runs_at + line->phase * k[2], begin, end, taps,
                   [&](int64_t t, int64_t from, int64_t count, int64_t row) {
                     visit(t, i + from - begin, count, row);
                   });
        i += end - begin;
        local += end - begin;
      }
    }
  }

  int64_t step() const { return step_; }

 private:
  // Contributions to the flat cell and to the row inside the block; cell -1: outside.
  struct Place {
    int64_t cell, local;
  };

  // Destinations [begin, end) of a line whose sources lie in one cell, `step` rows apart.
  struct Run {
    int64_t begin, end, cell, local;
  };

  // Destinations of a block side by side in the order of look-ups, with equal z, y and phase of x.
  struct Line {
    int64_t first, count, z, y, phase;
  };

  // Taps [first, last), and the place of the first in the window.
  struct Taps {
    int64_t first, last, kx, ky, kz;
  };

  int64_t source_of(int a, int64_t i, int64_t tap) const {
    const auto map = backward_ ? output_of : input_of;
    return map(i, tap, window_.stride[a], window_.padding[a], window_.dilation[a], source_.size(a));
  }

  void tabulate(int a) {
    const int64_t* grid = source_.grid;
    const int64_t* block = source_.block;
    const int64_t cell_stride[3] = {grid[1] * grid[2], grid[2], 1};
    const int64_t local_stride[3] = {block[1] * block[2], block[2], 1};
    const int64_t n = target_.size(a), k = window_.kernel[a];
    place_[a].reserve(n * k);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t t = 0; t < k; ++t) {
        const int64_t s = source_of(a, i, t);
        place_[a].push_back(
            s < 0 ? Place{-1, 0}
                  : Place{s / block[a] * cell_stride[a], s % block[a] * local_stride[a]});
      }
  }

  // A single destination: no run is worth its set-up.
  void lookup_one(int64_t start, int64_t* rows, int64_t scale) const {
    const int64_t voxels = target_.block_voxels(), block = start / voxels, local = start % voxels;
    const Voxel& origin = origin_[block];
    const Line& line = lines_[line_of_[local]];
    const int64_t* k = window_.kernel;
    const Place* at_z = place_[0].data() + (origin.z + line.z) * k[0];
    const Place* at_y = place_[1].data() + (origin.y + line.y) * k[1];
    const int64_t x = origin.x + line.phase + (local - line.first) * phases_[2];
    const Place* at_x = place_[2].data() + x * k[2];
    for (int64_t kz = 0; kz < k[0]; ++kz)
      for (int64_t ky = 0; ky < k[1]; ++ky) {
        const Place &z = at_z[kz], &y = at_y[ky];
        const bool inside = (z.cell | y.cell) >= 0;
        const int64_t corner = origin.b * source_.sample_cells() + z.cell + y.cell;
        for (int64_t kx = 0; kx < k[2]; ++kx) {
          const Place& p = at_x[kx];
          const int64_t found = inside && p.cell >= 0 ? source_.cells[corner + p.cell] : -1;
          *rows++ = found < 0
                        ? -1
                        : (found * source_.block_voxels() + z.local + y.local + p.local) * scale;
        }
      }
  }

  // Divisions are slow: the place of each line in its block and of each block in the volume is
  // kept.
  void list_lines() {
    const int64_t* n = target_.block;
    const int64_t* p = phases_;
    for (int64_t phase = 0; phase < p[0] * p[1] * p[2]; ++phase) {
      const int64_t pz = phase / p[2] / p[1], py = phase / p[2] % p[1], px = phase % p[2];
      for (int64_t z = pz; z < n[0]; z += p[0])
        for (int64_t y = py; y < n[1]; y += p[1]) {
          const int64_t first = static_cast<int64_t>(order_.size());
          for (int64_t x = px; x < n[2]; x += p[2]) order_.push_back((z * n[1] + y) * n[2] + x);
          const int64_t count = static_cast<int64_t>(order_.size()) - first;
          line_of_.insert(line_of_.end(), count, static_cast<int64_t>(lines_.size()));
          lines_.push_back({first, count, z, y, px});
        }
    }
    in_order_ = p[0] * p[1] * p[2] == 1;
    for (int64_t i = 0; i < target_.n_blocks; ++i)
      origin_.push_back(voxel_of(target_, i * target_.block_voxels()));
    for (const Voxel& origin : origin_)
      runs_of_block_.push_back(origin.x / target_.block[2] * phases_[2] * window_.kernel[2]);
  }

  void tabulate_runs() {
    const int64_t block = target_.block[2];
    step_ = backward_ ? 1 : window_.stride[2];
    if (backward_ && phases_[2] < window_.stride[2]) step_ = 0;  // lines of one voxel
    for (int64_t cell = 0; cell < target_.grid[2]; ++cell)
      for (int64_t phase = 0; phase < phases_[2]; ++phase)
        for (int64_t t = 0; t < window_.kernel[2]; ++t) {
          first_run_.push_back(static_cast<int64_t>(runs_.size()));
          for (int64_t i = 0, x = phase; x < block; ++i, x += phases_[2])
            add_to_runs(i, source_of(2, cell * block + x, t));
        }
    first_run_.push_back(static_cast<int64_t>(runs_.size()));
  }

  void add_to_runs(int64_t i, int64_t source) {
    if (source < 0) return;
    const int64_t cell = source / source_.block[2], local = source % source_.block[2];
    const bool joins = static_cast<int64_t>(runs_.size()) > first_run_.back() &&
                       runs_.back().end == i && runs_.back().cell == cell;
    if (joins)
      ++runs_.back().end;
    else
      runs_.push_back({i, i + 1, cell, local});
  }

  template <class F>
  void visit_line(const Voxel& origin, const Line& line, const int64_t* runs_at, int64_t begin,
                  int64_t end, const Taps& taps, F&& visit) const {
    const int64_t* k = window_.kernel;
    const Place* at_z = place_[0].data() + (origin.z + line.z) * k[0];
    const Place* at_y = place_[1].data() + (origin.y + line.y) * k[1];
    const int64_t voxels = source_.block_voxels();
    // Counted, not divided: this is the inner loop of every look-up.
    int64_t kx = taps.kx, ky = taps.ky, kz = taps.kz;
    for (int64_t t = 0, n = taps.last - taps.first; t < n;) {
      const int64_t in_line = std::min(k[2] - kx, n - t);
      const Place &z = at_z[kz], &y = at_y[ky];
      if ((z.cell | y.cell) >= 0) {
        const int32_t* cells = source_.cells + origin.b * source_.sample_cells() + z.cell + y.cell;
        const Run* run = runs_.data() + runs_at[kx];
        for (int64_t j = 0; j < in_line; ++j)
          for (const Run* end_of_tap = runs_.data() + runs_at[kx + j + 1]; run < end_of_tap;
               ++run) {
            const int64_t from = std::max(run->begin, begin), to = std::min(run->end, end);
            const int64_t block = cells[run->cell];
            if (block < 0 || from >= to) continue;
            visit(t + j, from, to - from,
                  block * voxels + z.local + y.local + run->local + (from - run->begin) * step_);
          }
      }
      t += in_line;
      kx = 0;
      if (++ky == k[1]) ky = 0, ++kz;
    }
  }

  Level source_, target_;
  Window window_;
  const Ramps ramps_ = ramps();
  bool backward_, in_order_;
  int64_t phases_[3], step_;
  std::vector<Place> place_[3];
  std::vector<Run> runs_;
  std::vector<int64_t> first_run_;      // of each cell in x, phase and tap
  std::vector<int64_t> runs_of_block_;  // place of a block's cell in first_run_
  std::vector<Line> lines_;
  std::vector<int64_t> order_, line_of_;
  std::vector<Voxel> origin_;
};

}  // namespace medspark
