// Convolution on packed blocks as an indirect GEMM: forward, and the gradient of the input, which
// is the same loop with the map inverted and the weights transposed.
//
// Rows of the destination level are taken in chunks of fixed size. Per chunk, the source row that
// each tap reads is looked up once (RowMap); then every slab of output columns runs over the taps
// with the weights of a few taps in cache.
#include "medspark/conv3d.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "conv_depthwise.h"
#include "conv_weights.h"
#include "deep_rows.h"
#include "dispatch.h"
#include "microkernel.h"
#include "row_map.h"

namespace medspark {
namespace {

constexpr int64_t most_rows = 256;  // of a chunk
// Rows that take this many multiplications per column are worth a list, per tap, of those that have
// a source: nothing is multiplied by zero, for one more addition to the sums per tap. Shorter rows
// stay in fixed tiles, whose sums stay in registers over lines of taps until they are this long.
constexpr int64_t deep_enough = 64, long_enough = 600;

template <class T>
struct Scratch {
  using Acc = typename Element<T>::Acc;
  std::vector<int64_t> offset;  // of source rows: [taps, chunk], or [chunk, taps] of deep rows
  std::vector<int32_t> place;   // [taps, chunk]: which destination rows are listed
  std::vector<int64_t> found;   // [taps]: how many are
  std::vector<T> deep;          // [chunk, taps * depth]
  std::vector<Acc> acc;         // [chunk, nr]
};

// One chunk of destination rows times slabs [first, last) of group g.
template <class T>
class ChunkGemm {
 public:
  using Acc = typename Element<T>::Acc;

  ChunkGemm(const Conv3d& op, const Direction& way, const RowMap& map, const T* source,
            const Acc* packed, const T* bias, T* target)
      : op_(op), way_(way), map_(map), source_(source), packed_(packed), bias_(bias),
        target_(target), kernel_(microkernel<T>()), deep_(reads_deep_rows(op, way.depth)),
        taps_(deep_ ? 1 : op.window.taps()),
        depth_(deep_ ? way.depth * op.window.taps() : way.depth),
        listed_(kernel_.steps(depth_) >= deep_enough && taps_ > 1),
        slabs_(slabs_of(way.columns, kernel_.nr)),
        rows_(deep_ ? std::clamp<int64_t>(32768 / depth_ / 8 * 8, 8, most_rows) : most_rows) {}

  int64_t slabs() const { return slabs_; }
  int64_t chunks() const { return (map_.rows() + rows_ - 1) / rows_; }

  void run(int64_t chunk, int64_t g, int64_t first_slab, int64_t last_slab, Scratch<T>& s) const {
    const int64_t start = chunk * rows_, n = std::min(rows_, map_.rows() - start);
    const T* source = source_ + g * way_.depth;
    s.acc.resize(rows_ * kernel_.nr);
    if (deep_) {
      fill_deep(start, n, g, s);
      source = s.deep.data();
    } else {
      look_up(start, n, s);
    }
    const int64_t tap_size = kernel_.steps(depth_) * kernel_.nr;
    for (int64_t slab = first_slab; slab < last_slab; ++slab) {
      start_from_bias(n, g, slab, s.acc.data());
      multiply(source, n, packed_ + (g * slabs_ + slab) * taps_ * tap_size, tap_size, s);
      store(start, n, g, slab, s.acc.data());
    }
  }

 private:
  void look_up(int64_t start, int64_t n, Scratch<T>& s) const {
    const int64_t row = op_.groups * way_.depth;
    s.offset.resize(taps_ * n);
    if (listed_) {
      s.place.resize(taps_ * n);
      s.found.resize(taps_);
      map_.list(start, n, 0, taps_, s.offset.data(), s.place.data(), s.found.data(), row);
    } else {
      map_.lookup(start, n, s.offset.data(), row);
      number_rows(n, s);
    }
  }

  static void number_rows(int64_t n, Scratch<T>& s) {
    s.place.resize(n);
    std::iota(s.place.begin(), s.place.end(), 0);
  }

  void multiply(const T* source, int64_t n, const Acc* weight, int64_t tap_size,
                Scratch<T>& s) const {
    const int64_t line = op_.window.kernel[2];
    const int64_t together =
        listed_ || deep_
            ? 1
            : line * std::max<int64_t>(1, long_enough / (line * kernel_.steps(depth_)));
    for (int64_t t = 0; t < taps_; t += together) {
      const int64_t taps = std::min(together, taps_ - t);
      kernel_.gemm(source, s.offset.data() + t * n, n, listed_ ? s.found[t] : n, taps, depth_,
                   weight + t * tap_size, s.place.data() + (listed_ ? t * n : 0), s.acc.data());
    }
  }

  void fill_deep(int64_t start, int64_t n, int64_t g, Scratch<T>& s) const {
    s.deep.resize(n * depth_);
    gather_deep_rows(map_, start, n, source_ + g * way_.depth, op_.groups * way_.depth, way_.depth,
                     0, depth_, s.deep.data());
    s.offset.resize(n);
    for (int64_t i = 0; i < n; ++i) s.offset[i] = i * depth_;
    number_rows(n, s);
  }

  void start_from_bias(int64_t n, int64_t g, int64_t slab, Acc* acc) const {
    std::fill(acc, acc + n * kernel_.nr, Acc(0));
    if (!bias_) return;
    const int64_t first = slab * kernel_.nr, columns = std::min(kernel_.nr, way_.columns - first);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < columns; ++j)
        acc[i * kernel_.nr + j] = Element<T>::load(bias_[g * way_.columns + first + j]);
  }

  void store(int64_t start, int64_t n, int64_t g, int64_t slab, const Acc* acc) const {
    const int64_t first = slab * kernel_.nr, columns = std::min(kernel_.nr, way_.columns - first);
    for (int64_t i = 0; i < n; ++i)
      kernel_.narrow(
          acc + i * kernel_.nr, columns,
          target_ + (map_.target_row(start + i) * op_.groups + g) * way_.columns + first);
  }

  const Conv3d& op_;
  const Direction& way_;
  const RowMap& map_;
  const T* source_;
  const Acc* packed_;
  const T* bias_;
  T* target_;
  const Microkernel<T>& kernel_;
  bool deep_;
  int64_t taps_, depth_;  // as multiplied: a deep row is one tap
  bool listed_;
  int64_t slabs_;
  int64_t rows_;  // of a chunk: deep rows must stay in cache
};

template <class T>
void run_gemm(const Conv3d& op, const Direction& way, const T* source, const T* weight,
              const T* bias, T* target) {
  const RowMap map(op.in, op.out, op.window, way.backward);
  if (map.rows() == 0) return;
  const auto packed = pack_weight<T>(op, way, weight);
  const ChunkGemm<T> gemm(op, way, map, source, packed.get(), bias, target);
  const int64_t chunks = gemm.chunks();
  // Few chunks (coarse levels): split the slabs as well, so that every thread has work.
  const int64_t wanted = (4 * op.threads + chunks * op.groups - 1) / (chunks * op.groups);
  const int64_t parts = std::min(gemm.slabs(), std::max<int64_t>(1, wanted));
#pragma omp parallel num_threads(op.threads)
  {
    Scratch<T> scratch;
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < chunks * op.groups * parts; ++item) {
      const int64_t part = item % parts, g = item / parts % op.groups,
                    chunk = item / parts / op.groups;
      gemm.run(chunk, g, gemm.slabs() * part / parts, gemm.slabs() * (part + 1) / parts, scratch);
    }
  }
}

}  // namespace

void conv3d(const Conv3d& op, const void* x, const void* weight, const void* bias, void* y) {
  if (is_depthwise(op)) return depthwise(op, false, x, weight, bias, y);
  const Direction way{false, op.in_channels / op.groups, op.out_channels / op.groups};
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_gemm(op, way, static_cast<const T*>(x), static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

void conv3d_input(const Conv3d& op, const void* dy, const void* weight, void* dx) {
  if (is_depthwise(op)) return depthwise(op, true, dy, weight, nullptr, dx);
  const Direction way{true, op.out_channels / op.groups, op.in_channels / op.groups};
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_gemm(op, way, static_cast<const T*>(dy), static_cast<const T*>(weight),
             static_cast<const T*>(nullptr), static_cast<T*>(dx));
  });
}

}  // namespace medspark
