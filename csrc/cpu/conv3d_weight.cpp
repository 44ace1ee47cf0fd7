// Gradient of a convolution with respect to its weight: per tap, the outer products of the rows it
// reads with the rows it writes, summed.
//
// Rows are taken in chunks that stay in cache while all taps of a work item use them. The rows are
// cut into segments, as many as the shapes say and small enough together; each has sums of its own,
// which are added in order at the end. So the bits do not depend on the number of threads.
#include <algorithm>
#include <numeric>
#include <vector>

#include "conv_depthwise.h"
#include "conv_weights.h"
#include "deep_rows.h"
#include "dispatch.h"
#include "medspark/conv3d.h"
#include "microkernel.h"
#include "row_map.h"

namespace medspark {
namespace {

constexpr int64_t chunk_rows = 128;
constexpr int64_t span = outer_channels;  // of a work item

// Sums over one segment of rows, for taps [t0, t1) and channels [c0, c1) of group g.
struct Item {
  int64_t segment, g, t0, t1, c0, c1;
};

template <class T>
class WeightGradient {
 public:
  using Acc = typename Element<T>::Acc;

  WeightGradient(const Conv3d& op, const T* x, const T* dy)
      : op_(op), map_(op.in, op.out, op.window, false), x_(x), dy_(dy), kernel_(microkernel<T>()),
        in_(op.in_channels / op.groups), out_(op.out_channels / op.groups),
        deep_(reads_deep_rows(op, in_)), taps_(deep_ ? 1 : op.window.taps()),
        depth_(deep_ ? in_ * op.window.taps() : in_), slabs_(slabs_of(out_, kernel_.nr)),
        segment_size_(op.groups * slabs_ * taps_ * depth_ * kernel_.nr) {
    constexpr int64_t largest = int64_t{1} << 20, fewest_rows = 16 * chunk_rows;  // of numbers
    const int64_t fit = std::min<int64_t>(16, largest / segment_size_);
    for (int64_t i = 0; i < chunk_rows; ++i) side_by_side_.push_back(i * span);
    segments_ = std::max<int64_t>(1, std::min(fit, map_.rows() / fewest_rows));
  }

  void run(Acc* dw) {
    packed_.assign(segments_ * segment_size_, Acc(0));
    const std::vector<Item> items = list_items();
#pragma omp parallel for schedule(dynamic) num_threads(op_.threads)
    for (int64_t i = 0; i < static_cast<int64_t>(items.size()); ++i) run_item(items[i]);
    unpack_gradient(op_, segments_, kernel_.nr, packed_.data(), dw);
  }

 private:
  // Items of one segment follow each other: they read the same rows.
  std::vector<Item> list_items() const {
    const int64_t spans = (depth_ + span - 1) / span, whole = segments_ * op_.groups * spans;
    const int64_t parts = std::min(taps_, std::max<int64_t>(1, (8 * op_.threads) / whole));
    std::vector<Item> items;
    for (int64_t i = 0; i < whole * parts; ++i) {
      const int64_t part = i % parts, c = i / parts % spans * span;
      items.push_back({i / parts / spans / op_.groups, i / parts / spans % op_.groups,
                       taps_ * part / parts, taps_ * (part + 1) / parts, c,
                       std::min(c + span, depth_)});
    }
    return items;
  }

  struct Scratch {
    std::vector<int64_t> offset;  // [taps, chunk]
    std::vector<int32_t> place;   // [taps, chunk]: rows of the panel
    std::vector<int64_t> found;   // [taps]
    std::vector<Acc> panel;       // [slabs, chunk, nr]: rows of dy
    std::vector<Acc> rows;        // [chunk, span]: rows of x
    std::vector<T> deep;          // [chunk, columns of the item]
  };

  void run_item(const Item& item) {
    Scratch s;
    s.panel.resize(slabs_ * chunk_rows * kernel_.nr);
    s.rows.resize(chunk_rows * span);
    s.found.resize(item.t1 - item.t0);
    const int64_t chunks = (map_.rows() + chunk_rows - 1) / chunk_rows;
    const int64_t last = chunks * (item.segment + 1) / segments_;
    for (int64_t chunk = chunks * item.segment / segments_; chunk < last; ++chunk) {
      const int64_t start = chunk * chunk_rows, n = std::min(chunk_rows, map_.rows() - start);
      const T* source = x_ + item.g * in_ + item.c0;
      if (deep_) {
        fill_deep(item, start, n, s);
        source = s.deep.data();
      } else {
        s.offset.resize((item.t1 - item.t0) * n);
        s.place.resize((item.t1 - item.t0) * n);
        map_.list(start, n, item.t0, item.t1, s.offset.data(), s.place.data(), s.found.data(),
                  op_.groups * in_);
      }
      widen_rows(item.g, start, n, s.panel.data());
      for (int64_t t = item.t0; t < item.t1; ++t) add_tap(item, t, source, n, s);
    }
  }

  void fill_deep(const Item& item, int64_t start, int64_t n, Scratch& s) const {
    const int64_t columns = item.c1 - item.c0;
    s.deep.resize(n * columns);
    gather_deep_rows(map_, start, n, x_ + item.g * in_, op_.groups * in_, in_, item.c0, item.c1,
                     s.deep.data());
    s.offset.resize(n);
    for (int64_t i = 0; i < n; ++i) s.offset[i] = i * columns;
    s.place.resize(n);
    std::iota(s.place.begin(), s.place.end(), 0);
    s.found[0] = n;
  }

  void widen_rows(int64_t g, int64_t start, int64_t n, Acc* panel) const {
    for (int64_t i = 0; i < n; ++i) {
      const T* from = dy_ + (map_.target_row(start + i) * op_.groups + g) * out_;
      for (int64_t slab = 0; slab < slabs_; ++slab)
        kernel_.widen(from + slab * kernel_.nr, std::min(kernel_.nr, out_ - slab * kernel_.nr),
                      panel + (slab * chunk_rows + i) * kernel_.nr);
    }
  }

  void add_tap(const Item& item, int64_t t, const T* source, int64_t n, Scratch& s) {
    const int64_t channels = item.c1 - item.c0, found = s.found[t - item.t0];
    const int64_t* at = s.offset.data() + (t - item.t0) * n;
    const Acc* rows = s.rows.data();
    // One slab reads its rows where they are; more have them side by side.
    if constexpr (std::is_same_v<T, Acc>) {
      if (slabs_ == 1 || deep_) rows = source;
    }
    if (rows == s.rows.data()) {
      kernel_.gather(source, at, found, channels, s.rows.data());
      at = side_by_side_.data();
    }
    for (int64_t slab = 0; slab < slabs_; ++slab) {
      const int64_t row = ((item.g * slabs_ + slab) * taps_ + t) * depth_ + item.c0;
      kernel_.outer(rows, at, found, channels, s.panel.data() + slab * chunk_rows * kernel_.nr,
                    s.place.data() + (t - item.t0) * n,
                    packed_.data() + item.segment * segment_size_ + row * kernel_.nr);
    }
  }

  const Conv3d& op_;
  const RowMap map_;
  const T* x_;
  const T* dy_;
  const Microkernel<T>& kernel_;
  int64_t in_, out_;
  bool deep_;
  int64_t taps_, depth_;  // as multiplied: a deep row is one tap
  int64_t slabs_, segment_size_, segments_;
  std::vector<int64_t> side_by_side_;  // offsets of gathered rows
  std::vector<Acc> packed_;            // [segments][groups][slabs][taps][depth][nr]
};

}  // namespace

void conv3d_weight(const Conv3d& op, const void* x, const void* dy, void* dw) {
  if (is_depthwise(op)) return depthwise_weight(op, x, dy, dw);
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    WeightGradient<T>(op, static_cast<const T*>(x), static_cast<const T*>(dy))
        .run(static_cast<typename Element<T>::Acc*>(dw));
  });
}

}  // namespace medspark
