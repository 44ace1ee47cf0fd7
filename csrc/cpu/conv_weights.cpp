#include "conv_weights.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace medspark {
namespace {

constexpr int64_t tile = 8;  // channels in work at a time; even, for slabs of pairs

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__)
#define MEDSPARK_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MEDSPARK_SHUFFLE(a, b, i, j, k, l) \
  __builtin_shuffle(a, b, (int32_t __attribute__((vector_size(16)))){i, j, k, l})
#endif

template <class T>
Four load_four(const T* from) {
  if constexpr (std::is_same_v<T, float>) return *reinterpret_cast<const Four*>(from);
  using E = Element<T>;
  return Four{E::load(from[0]), E::load(from[1]), E::load(from[2]), E::load(from[3])};
}

// to[j * to_step + i] = from[i * from_step + j] for i < 4, j < 4.
template <class T>
void transpose_four(const T* from, int64_t from_step, float* to, int64_t to_step) {
  const Four a = load_four(from), b = load_four(from + from_step),
             c = load_four(from + 2 * from_step), d = load_four(from + 3 * from_step);
  const Four ab0 = MEDSPARK_SHUFFLE(a, b, 0, 4, 1, 5), ab2 = MEDSPARK_SHUFFLE(a, b, 2, 6, 3, 7);
  const Four cd0 = MEDSPARK_SHUFFLE(c, d, 0, 4, 1, 5), cd2 = MEDSPARK_SHUFFLE(c, d, 2, 6, 3, 7);
  *reinterpret_cast<Four*>(to) = MEDSPARK_SHUFFLE(ab0, cd0, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + to_step) = MEDSPARK_SHUFFLE(ab0, cd0, 2, 3, 6, 7);
  *reinterpret_cast<Four*>(to + 2 * to_step) = MEDSPARK_SHUFFLE(ab2, cd2, 0, 1, 4, 5);
  *reinterpret_cast<Four*>(to + 3 * to_step) = MEDSPARK_SHUFFLE(ab2, cd2, 2, 3, 6, 7);
}

// to[j * to_step + i] = from[i * from_step + j] for i < m, j < n.
template <class T, class Acc>
void transpose(const T* from, int64_t from_step, int64_t m, int64_t n, Acc* to, int64_t to_step) {
  int64_t i = 0;
  if constexpr (std::is_same_v<Acc, float>)
    for (; i + 4 <= m; i += 4) {
      int64_t j = 0;
      for (; j + 4 <= n; j += 4)
        transpose_four(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
      for (; j < n; ++j)
        for (int64_t q = i; q < i + 4; ++q)
          to[j * to_step + q] = Element<T>::load(from[q * from_step + j]);
    }
  for (; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) to[j * to_step + i] = Element<T>::load(from[i * from_step + j]);
}

// Two rows of channels, exact in bf16, as pairs.
void pair_up(const float* even, const float* odd, int64_t n, float* to) {
  for (int64_t j = 0; j < n; ++j)
    to[j] = float_of(bits_of(even[j]) >> 16 | (odd ? bits_of(odd[j]) & 0xffff0000u : 0));
}

// Packs the slabs of one convolution, a few channels at a time.
template <class T>
class Packer {
 public:
  using Acc = typename Element<T>::Acc;

  Packer(const Conv3d& op, const Direction& way, const T* weight)
      : op_(op), way_(way), weight_(weight), kernel_(microkernel<T>()), taps_(op.window.taps()),
        deep_(reads_deep_rows(op, way.depth)), slabs_(slabs_of(way.columns, kernel_.nr)),
        steps_(deep_ ? kernel_.steps(taps_ * way.depth) : taps_ * kernel_.steps(way.depth)) {}

  int64_t size() const { return op_.groups * slabs_ * steps_ * kernel_.nr; }

  void run(Acc* packed) const {
    const bool pairs = kernel_.group == 2;
    // Deep rows of pairs join channels of neighbouring taps: they are packed in one piece.
    const int64_t depth = deep_ && pairs ? way_.depth : tile;
    const int64_t tiles = (way_.depth + depth - 1) / depth;
#pragma omp parallel num_threads(op_.threads)
    {
      std::vector<Acc> buffer(kernel_.nr * depth * taps_);
#pragma omp for schedule(static)
      for (int64_t item = 0; item < op_.groups * slabs_ * tiles; ++item) {
        const int64_t gs = item / tiles, d0 = item % tiles * depth;
        const int64_t d1 = std::min(d0 + depth, way_.depth);
        gather(gs, d0, d1, buffer.data());
        Acc* slab = packed + gs * steps_ * kernel_.nr;
        if constexpr (std::is_same_v<T, bf16>) {
          if (pairs) {
            store_pairs(buffer.data(), d0, d1, slab);
            continue;
          }
        }
        for (int64_t t = 0; t < taps_; ++t)
          for (int64_t d = d0; d < d1; ++d)
            std::copy_n(buffer.data() + ((d - d0) * taps_ + t) * kernel_.nr, kernel_.nr,
                        slab + (t * way_.depth + d) * kernel_.nr);
      }
    }
  }

 private:
  // One slab's channels [d0, d1) in buffer [d1 - d0][taps][nr]: both sides are touched in runs.
  void gather(int64_t gs, int64_t d0, int64_t d1, Acc* buffer) const {
    const int64_t in_group = op_.in_channels / op_.groups,
                  out_group = op_.out_channels / op_.groups;
    const int64_t g = gs / slabs_, first = gs % slabs_ * kernel_.nr;
    const int64_t n = std::min(kernel_.nr, way_.columns - first), rows = (d1 - d0) * taps_;
    if (way_.backward) {
      for (int64_t d = d0; d < d1; ++d)
        transpose(weight_ + ((g * out_group + d) * in_group + first) * taps_, taps_, n, taps_,
                  buffer + (d - d0) * taps_ * kernel_.nr, kernel_.nr);
    } else {
      transpose(weight_ + ((g * out_group + first) * in_group + d0) * taps_, in_group * taps_, n,
                rows, buffer, kernel_.nr);
    }
    for (int64_t i = 0; i < rows && n < kernel_.nr; ++i)
      std::fill(buffer + i * kernel_.nr + n, buffer + (i + 1) * kernel_.nr, Acc(0));
  }

  void store_pairs(const float* buffer, int64_t d0, int64_t d1, float* slab) const {
    const int64_t nr = kernel_.nr;
    const auto row = [&](int64_t t, int64_t d) { return buffer + ((d - d0) * taps_ + t) * nr; };
    if (deep_) {
      const int64_t depth = way_.depth, rows = taps_ * depth;
      for (int64_t i = 0; i < rows; i += 2)
        pair_up(row(i / depth, i % depth),
                i + 1 < rows ? row((i + 1) / depth, (i + 1) % depth) : nullptr, nr,
                slab + i / 2 * nr);
      return;
    }
    for (int64_t t = 0; t < taps_; ++t)
      for (int64_t d = d0; d < d1; d += 2)
        pair_up(row(t, d), d + 1 < d1 ? row(t, d + 1) : nullptr, nr,
                slab + (t * kernel_.steps(way_.depth) + d / 2) * nr);
  }

  const Conv3d& op_;
  const Direction& way_;
  const T* weight_;
  const Microkernel<T>& kernel_;
  int64_t taps_;
  bool deep_;
  int64_t slabs_, steps_;
};

}  // namespace

template <class T>
std::unique_ptr<typename Element<T>::Acc[]> pack_weight(const Conv3d& op, const Direction& way,
                                                        const T* weight) {
  const Packer<T> packer(op, way, weight);
  std::unique_ptr<typename Element<T>::Acc[]> packed(new typename Element<T>::Acc[packer.size()]);
  packer.run(packed.get());
  return packed;
}

template <class Acc>
void unpack_gradient(const Conv3d& op, int64_t segments, int64_t nr, const Acc* packed, Acc* dw) {
  const int64_t taps = op.window.taps(), in = op.in_channels / op.groups,
                out = op.out_channels / op.groups;
  const int64_t slabs = slabs_of(out, nr), tiles = (in + tile - 1) / tile;
  const int64_t segment_size = op.groups * slabs * taps * in * nr;
#pragma omp parallel num_threads(op.threads)
  {
    std::vector<Acc> buffer(tile * taps * nr);
#pragma omp for schedule(static)
    for (int64_t item = 0; item < op.groups * slabs * tiles; ++item) {
      const int64_t gs = item / tiles, g = gs / slabs, first = gs % slabs * nr;
      const int64_t c0 = item % tiles * tile, c1 = std::min(c0 + tile, in);
      for (int64_t t = 0; t < taps; ++t) {
        const Acc* from = packed + ((gs * taps + t) * in + c0) * nr;
        for (int64_t c = 0; c < c1 - c0; ++c, from += nr) {
          Acc* sum = buffer.data() + (c * taps + t) * nr;
          std::copy_n(from, nr, sum);
          for (int64_t s = 1; s < segments; ++s)
            for (int64_t j = 0; j < nr; ++j) sum[j] += from[s * segment_size + j];
        }
      }
      transpose(buffer.data(), nr, (c1 - c0) * taps, std::min(nr, out - first),
                dw + ((g * out + first) * in + c0) * taps, in * taps);
    }
  }
}

template std::unique_ptr<float[]> pack_weight<float>(const Conv3d&, const Direction&, const float*);
template std::unique_ptr<double[]> pack_weight<double>(const Conv3d&, const Direction&,
                                                       const double*);
template std::unique_ptr<float[]> pack_weight<bf16>(const Conv3d&, const Direction&, const bf16*);
template std::unique_ptr<float[]> pack_weight<f16>(const Conv3d&, const Direction&, const f16*);
template void unpack_gradient<float>(const Conv3d&, int64_t, int64_t, const float*, float*);
template void unpack_gradient<double>(const Conv3d&, int64_t, int64_t, const double*, double*);

}  // namespace medspark
