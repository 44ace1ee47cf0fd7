// Convolution on packed blocks as an indirect GEMM.
//
// Rows of the destination level are taken in chunks of fixed size. Per chunk, the source row that
// each tap reads is looked up once (RowMap); then every slab of output columns runs over the taps
// with the weights of one tap in cache. The gradient with respect to the input is the same loop
// with the map inverted and the weights transposed; the gradient with respect to the weight gives
// each thread its own columns.
#include "medspark/conv3d.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "microkernel.h"
#include "row_map.h"

namespace medspark {
namespace {

constexpr int64_t chunk_rows = 96;  // a multiple of every microkernel's row count
constexpr int64_t shallow_channels =
    16;  // below this, taps x channels are packed into one deep row

// Channel counts of one direction of the convolution: x -> y forward, dy -> dx backward.
struct Direction {
  bool backward;
  int64_t depth;    // channels read per group
  int64_t columns;  // channels written per group
};

// weight [K, C/g, taps] -> [groups][slabs][taps * depth][nr], zero-padded in the last slab.
// Goes through a small buffer [nr, tile, taps], so that both sides are touched in runs.
template <class T, class Acc>
std::vector<Acc> pack_weight(const Conv3d& op, const Direction& way, const T* weight, int64_t nr) {
  constexpr int64_t tile = 8;
  const int64_t taps = op.window.taps(), slabs = (way.columns + nr - 1) / nr;
  const int64_t in_group = op.in_channels / op.groups, out_group = op.out_channels / op.groups;
  const int64_t tiles = (way.depth + tile - 1) / tile;
  std::vector<Acc> packed(op.groups * slabs * taps * way.depth * nr);
#pragma omp parallel num_threads(op.threads)
  {
    std::vector<Acc> buffer(nr * tile * taps);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < op.groups * slabs * tiles; ++item) {
      const int64_t gs = item / tiles, g = gs / slabs, first = gs % slabs * nr;
      const int64_t d0 = item % tiles * tile, d1 = std::min(d0 + tile, way.depth);
      const int64_t n = std::min(nr, way.columns - first);
      for (int64_t j = 0; j < n; ++j)
        for (int64_t d = d0; d < d1; ++d) {
          const int64_t k = way.backward ? d : first + j, c = way.backward ? first + j : d;
          const T* from = weight + ((g * out_group + k) * in_group + c) * taps;
          for (int64_t t = 0; t < taps; ++t)
            buffer[((d - d0) * taps + t) * nr + j] = Element<T>::load(from[t]);
        }
      for (int64_t d = d0; d < d1; ++d)
        for (int64_t t = 0; t < taps; ++t)
          std::copy_n(buffer.data() + ((d - d0) * taps + t) * nr, n,
                      packed.data() + ((gs * taps + t) * way.depth + d) * nr);
    }
  }
  return packed;
}

template <class T>
struct Scratch {
  using Acc = typename Element<T>::Acc;
  std::vector<int64_t> rows;      // source rows: [taps, chunk], or [chunk, taps] of deep rows
  std::vector<const T*> pointer;  // [chunk]
  std::vector<T> deep;            // [chunk, taps * depth]
  std::vector<Acc> acc;           // [chunk, nr]
};

// One chunk of destination rows times slabs [first, last) of group g.
template <class T>
class ChunkGemm {
 public:
  using Acc = typename Element<T>::Acc;

  ChunkGemm(const Conv3d& op, const Direction& way, const RowMap& map, const T* source,
            const std::vector<Acc>& packed, const T* bias, T* target)
      : op_(op), way_(way), map_(map), source_(source), packed_(packed), bias_(bias),
        target_(target), kernel_(microkernel<T>()), taps_(op.window.taps()),
        deep_(way.depth < shallow_channels && taps_ > 1),
        slabs_((way.columns + kernel_.nr - 1) / kernel_.nr) {}

  int64_t slabs() const { return slabs_; }

  void run(int64_t chunk, int64_t g, int64_t first_slab, int64_t last_slab, Scratch<T>& s) const {
    const int64_t start = chunk * chunk_rows, n = std::min(chunk_rows, map_.rows() - start);
    s.rows.resize(taps_ * n);
    s.pointer.resize(n);
    s.acc.resize(chunk_rows * kernel_.nr);
    if (deep_)
      fill_deep(start, n, g, s);
    else
      map_.lookup(start, n, s.rows.data());
    for (int64_t slab = first_slab; slab < last_slab; ++slab) {
      const Acc* weight = packed_.data() + (g * slabs_ + slab) * taps_ * way_.depth * kernel_.nr;
      start_from_bias(n, g, slab, s.acc.data());
      if (deep_) {
        for (int64_t i = 0; i < n; ++i) s.pointer[i] = s.deep.data() + i * taps_ * way_.depth;
        kernel_.gemm(s.pointer.data(), n, taps_ * way_.depth, weight, s.acc.data());
      } else {
        for (int64_t t = 0; t < taps_; ++t) {
          for (int64_t i = 0; i < n; ++i) s.pointer[i] = channels_of(s.rows[t * n + i], g);
          kernel_.gemm(s.pointer.data(), n, way_.depth, weight + t * way_.depth * kernel_.nr,
                       s.acc.data());
        }
      }
      store(start, n, g, slab, s.acc.data());
    }
  }

 private:
  const T* channels_of(int64_t row, int64_t g) const {
    return row < 0 ? nullptr : source_ + (row * op_.groups + g) * way_.depth;
  }

  void fill_deep(int64_t start, int64_t n, int64_t g, Scratch<T>& s) const {
    map_.lookup(start, n, 0, taps_, s.rows.data(), 1, taps_);
    s.deep.resize(n * taps_ * way_.depth);
    T* to = s.deep.data();
    for (int64_t i = 0; i < n * taps_; ++i) {
      const T* from = channels_of(s.rows[i], g);
      for (int64_t c = 0; c < way_.depth; ++c) *to++ = from ? from[c] : T{};
    }
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
    for (int64_t i = 0; i < n; ++i) {
      T* to = target_ + (map_.target_row(start + i) * op_.groups + g) * way_.columns + first;
      for (int64_t j = 0; j < columns; ++j) to[j] = Element<T>::store(acc[i * kernel_.nr + j]);
    }
  }

  const Conv3d& op_;
  const Direction& way_;
  const RowMap& map_;
  const T* source_;
  const std::vector<Acc>& packed_;
  const T* bias_;
  T* target_;
  const Microkernel<T>& kernel_;
  int64_t taps_;
  bool deep_;
  int64_t slabs_;
};

template <class T>
void run_gemm(const Conv3d& op, const Direction& way, const T* source, const T* weight,
              const T* bias, T* target) {
  using Acc = typename Element<T>::Acc;
  const RowMap map(op.in, op.out, op.window, way.backward);
  if (map.rows() == 0) return;
  const std::vector<Acc> packed = pack_weight<T, Acc>(op, way, weight, microkernel<T>().nr);
  const ChunkGemm<T> gemm(op, way, map, source, packed, bias, target);
  const int64_t chunks = (map.rows() + chunk_rows - 1) / chunk_rows;
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

// Columns of the flat (tap, channel) axis of dw, for one group: sums over all output rows, left in
// `packed` [groups][taps * channels][out channels]; unpack_gradient then brings them into torch's
// order.
template <class T>
class WeightGradient {
 public:
  using Acc = typename Element<T>::Acc;

  WeightGradient(const Conv3d& op, const RowMap& map, const T* x, const T* dy, Acc* packed)
      : op_(op), map_(map), x_(x), dy_(dy), packed_(packed), kernel_(microkernel<T>()),
        in_(op.in_channels / op.groups), out_(op.out_channels / op.groups) {}

  // A single tap with channels [c0, c1): source rows are read in place.
  void run_tap(int64_t g, int64_t tap, int64_t c0, int64_t c1) const {
    const int64_t slabs = (out_ + kernel_.nr - 1) / kernel_.nr, depth = c1 - c0;
    std::vector<Acc> sum(slabs * depth * kernel_.nr), panel(chunk_rows * kernel_.nr);
    std::vector<int64_t> rows(chunk_rows), present(chunk_rows);
    std::vector<const T*> pointer(chunk_rows);
    for (int64_t start = 0; start < map_.rows(); start += chunk_rows) {
      const int64_t n = std::min(chunk_rows, map_.rows() - start);
      map_.lookup(start, n, tap, tap + 1, rows.data(), n, 1);
      int64_t found = 0;
      for (int64_t i = 0; i < n; ++i) {
        if (rows[i] < 0) continue;
        pointer[found] = x_ + (rows[i] * op_.groups + g) * in_ + c0;
        present[found++] = map_.target_row(start + i);
      }
      add_chunk(g, found, depth, pointer.data(), present.data(), panel.data(), sum.data());
    }
    store(g, tap * in_ + c0, depth, sum);
  }

  // Few input channels: columns [first, last) of taps x channels, gathered into rows of their own.
  void run_deep(int64_t g, int64_t first, int64_t last) const {
    const int64_t slabs = (out_ + kernel_.nr - 1) / kernel_.nr, depth = last - first;
    std::vector<Acc> sum(slabs * depth * kernel_.nr), panel(chunk_rows * kernel_.nr);
    const int64_t first_tap = first / in_, last_tap = (last - 1) / in_ + 1;
    std::vector<int64_t> rows(chunk_rows * (last_tap - first_tap)), target(chunk_rows);
    std::vector<T> deep(chunk_rows * depth);
    std::vector<const T*> pointer(chunk_rows);
    for (int64_t start = 0; start < map_.rows(); start += chunk_rows) {
      const int64_t n = std::min(chunk_rows, map_.rows() - start);
      const int64_t taps = last_tap - first_tap;
      map_.lookup(start, n, first_tap, last_tap, rows.data(), 1, taps);
      for (int64_t i = 0; i < n; ++i)
        for (int64_t column = first; column < last; ++column) {
          const int64_t source = rows[i * taps + column / in_ - first_tap];
          deep[i * depth + column - first] =
              source < 0 ? T{} : x_[(source * op_.groups + g) * in_ + column % in_];
        }
      for (int64_t i = 0; i < n; ++i) {
        pointer[i] = deep.data() + i * depth;
        target[i] = map_.target_row(start + i);
      }
      add_chunk(g, n, depth, pointer.data(), target.data(), panel.data(), sum.data());
    }
    store(g, first, depth, sum);
  }

 private:
  void add_chunk(int64_t g, int64_t n, int64_t depth, const T* const* pointer,
                 const int64_t* target, Acc* panel, Acc* sum) const {
    if (n == 0) return;
    for (int64_t slab = 0; slab * kernel_.nr < out_; ++slab) {
      const int64_t first = slab * kernel_.nr, columns = std::min(kernel_.nr, out_ - first);
      if (columns < kernel_.nr) std::fill(panel, panel + n * kernel_.nr, Acc(0));
      for (int64_t i = 0; i < n; ++i) {
        const T* from = dy_ + (target[i] * op_.groups + g) * out_ + first;
        for (int64_t j = 0; j < columns; ++j) panel[i * kernel_.nr + j] = Element<T>::load(from[j]);
      }
      kernel_.outer(pointer, n, depth, panel, sum + slab * depth * kernel_.nr);
    }
  }

  void store(int64_t g, int64_t first, int64_t depth, const std::vector<Acc>& sum) const {
    for (int64_t c = 0; c < depth; ++c) {
      Acc* to = packed_ + (g * op_.window.taps() * in_ + first + c) * out_;
      for (int64_t k = 0; k < out_; k += kernel_.nr)
        std::copy_n(sum.data() + (k / kernel_.nr * depth + c) * kernel_.nr,
                    std::min(kernel_.nr, out_ - k), to + k);
    }
  }

  const Conv3d& op_;
  const RowMap& map_;
  const T* x_;
  const T* dy_;
  Acc* packed_;
  const Microkernel<T>& kernel_;
  int64_t in_, out_;
};

// [groups][taps][channels][out channels] -> dw [groups * out channels, channels, taps].
template <class Acc>
void unpack_gradient(const Conv3d& op, const std::vector<Acc>& packed, Acc* dw) {
  constexpr int64_t tile = 16;
  const int64_t taps = op.window.taps(), in = op.in_channels / op.groups,
                out = op.out_channels / op.groups;
  const int64_t tiles = (out + tile - 1) / tile;
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t item = 0; item < op.groups * tiles; ++item) {
    const int64_t g = item / tiles, k0 = item % tiles * tile, k1 = std::min(k0 + tile, out);
    for (int64_t c = 0; c < in; ++c)
      for (int64_t t = 0; t < taps; ++t)
        for (int64_t k = k0; k < k1; ++k)
          dw[((g * out + k) * in + c) * taps + t] = packed[((g * taps + t) * in + c) * out + k];
  }
}

template <class T>
void run_weight(const Conv3d& op, const T* x, const T* dy, typename Element<T>::Acc* dw) {
  constexpr int64_t span = 48;  // columns of dw per work item
  const RowMap map(op.in, op.out, op.window, false);
  const int64_t in = op.in_channels / op.groups, taps = op.window.taps();
  std::vector<typename Element<T>::Acc> packed(taps * op.in_channels / op.groups * op.out_channels);
  const WeightGradient<T> gradient(op, map, x, dy, packed.data());
  const bool deep = in < shallow_channels && taps > 1;
  const int64_t spans = deep ? (taps * in + span - 1) / span : (in + span - 1) / span;
  const int64_t items = deep ? op.groups * spans : op.groups * taps * spans;
#pragma omp parallel for schedule(dynamic) num_threads(op.threads)
  for (int64_t item = 0; item < items; ++item) {
    const int64_t first = item % spans * span, rest = item / spans;
    if (deep)
      gradient.run_deep(rest, first, std::min(first + span, taps * in));
    else
      gradient.run_tap(rest / taps, rest % taps, first, std::min(first + span, in));
  }
  unpack_gradient(op, packed, dw);
}

}  // namespace

void conv3d(const Conv3d& op, const void* x, const void* weight, const void* bias, void* y) {
  const Direction way{false, op.in_channels / op.groups, op.out_channels / op.groups};
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_gemm(op, way, static_cast<const T*>(x), static_cast<const T*>(weight),
             static_cast<const T*>(bias), static_cast<T*>(y));
  });
}

void conv3d_input(const Conv3d& op, const void* dy, const void* weight, void* dx) {
  const Direction way{true, op.out_channels / op.groups, op.in_channels / op.groups};
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_gemm(op, way, static_cast<const T*>(dy), static_cast<const T*>(weight),
             static_cast<const T*>(nullptr), static_cast<T*>(dx));
  });
}

void conv3d_weight(const Conv3d& op, const void* x, const void* dy, void* dw) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_weight(op, static_cast<const T*>(x), static_cast<const T*>(dy),
               static_cast<typename Element<T>::Acc*>(dw));
  });
}

}  // namespace medspark
