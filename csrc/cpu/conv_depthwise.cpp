#include "conv_depthwise.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "microkernel.h"
#include "row_map.h"

namespace medspark {
namespace {

// Rows whose sources are looked up at once: as many as keep the table small.
int64_t chunk_rows(const Conv3d& op) {
  return std::clamp<int64_t>(16384 / op.window.taps() / 8 * 8, 8, 256);
}

// First channel of slab `s`. The last slab begins early enough to be whole, and computes some
// channels a second time, to the same bits.
int64_t first_of(const Conv3d& op, int64_t s, int64_t nr) {
  return std::min(s * nr, op.in_channels - nr);
}

// weight [C, taps] -> [slabs][taps][nr].
template <class T, class Acc>
std::vector<Acc> slabs_of_weight(const Conv3d& op, const T* weight, int64_t nr) {
  const int64_t taps = op.window.taps(), slabs = (op.in_channels + nr - 1) / nr;
  std::vector<Acc> packed(slabs * taps * nr);
  for (int64_t s = 0; s < slabs; ++s)
    for (int64_t j = 0; j < nr; ++j)
      for (int64_t t = 0; t < taps; ++t)
        packed[(s * taps + t) * nr + j] =
            Element<T>::load(weight[(first_of(op, s, nr) + j) * taps + t]);
  return packed;
}

template <class T>
void run(const Conv3d& op, bool backward, const T* source, const T* weight, const T* bias,
         T* target) {
  using Acc = typename Element<T>::Acc;
  const Microkernel<T>& kernel = single_microkernel<T>();
  const RowMap map(op.in, op.out, op.window, backward);
  const std::vector<Acc> packed = slabs_of_weight<T, Acc>(op, weight, kernel.nr);
  const int64_t C = op.in_channels, nr = kernel.nr, slabs = (C + nr - 1) / nr;
  const int64_t taps = op.window.taps(), rows = chunk_rows(op);
  const int64_t chunks = (map.rows() + rows - 1) / rows;
#pragma omp parallel num_threads(op.threads)
  {
    std::vector<int64_t> offset(taps * rows);
    std::vector<Acc> acc(rows * nr);
#pragma omp for schedule(dynamic)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t start = chunk * rows, n = std::min(rows, map.rows() - start);
      map.lookup(start, n, offset.data(), C);
      for (int64_t s = 0; s < slabs; ++s) {
        const int64_t first = first_of(op, s, nr);
        for (int64_t i = 0; i < n * nr; ++i)
          acc[i] = bias ? Element<T>::load(bias[first + i % nr]) : Acc(0);
        kernel.channels(source + first, offset.data(), 1, n, n, taps, packed.data() + s * taps * nr,
                        acc.data());
        for (int64_t i = 0; i < n; ++i)
          kernel.narrow(acc.data() + i * nr, nr, target + map.target_row(start + i) * C + first);
      }
    }
  }
}

// Sums over the rows of one segment: [slabs][taps][nr].
template <class T>
void add_segment(const Conv3d& op, const RowMap& map, const T* x, const T* dy, int64_t first_chunk,
                 int64_t last_chunk, typename Element<T>::Acc* sums) {
  const Microkernel<T>& kernel = single_microkernel<T>();
  const int64_t C = op.in_channels, nr = kernel.nr, slabs = (C + nr - 1) / nr;
  const int64_t taps = op.window.taps(), rows = chunk_rows(op);
  std::vector<int64_t> offset(taps * rows);
  std::vector<typename Element<T>::Acc> panel(rows * nr);
  for (int64_t chunk = first_chunk; chunk < last_chunk; ++chunk) {
    const int64_t start = chunk * rows, n = std::min(rows, map.rows() - start);
    map.lookup(start, n, offset.data(), C);
    for (int64_t s = 0; s < slabs; ++s) {
      const int64_t first = first_of(op, s, nr);
      for (int64_t i = 0; i < n; ++i)
        kernel.widen(dy + map.target_row(start + i) * C + first, nr, panel.data() + i * nr);
      kernel.channels(x + first, offset.data(), n, 1, taps, n, panel.data(), sums + s * taps * nr);
    }
  }
}

// Segments as in conv3d_weight.cpp: their number comes from the shapes alone.
template <class T>
void run_weight(const Conv3d& op, const T* x, const T* dy, typename Element<T>::Acc* dw) {
  using Acc = typename Element<T>::Acc;
  constexpr int64_t most_segments = 32, fewest_rows = 512;
  const RowMap map(op.in, op.out, op.window, false);
  const int64_t nr = single_microkernel<T>().nr, slabs = (op.in_channels + nr - 1) / nr;
  const int64_t taps = op.window.taps(), size = slabs * taps * nr, rows = chunk_rows(op);
  const int64_t chunks = (map.rows() + rows - 1) / rows;
  const int64_t segments = std::clamp<int64_t>(map.rows() / fewest_rows, 1, most_segments);
  std::vector<Acc> sums(segments * size);
#pragma omp parallel for schedule(dynamic) num_threads(op.threads)
  for (int64_t i = 0; i < segments; ++i)
    add_segment(op, map, x, dy, chunks * i / segments, chunks * (i + 1) / segments,
                sums.data() + i * size);
  for (int64_t i = 1; i < segments; ++i)
    for (int64_t j = 0; j < size; ++j) sums[j] += sums[i * size + j];
  for (int64_t s = 0; s < slabs; ++s)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t j = 0; j < nr; ++j)
        dw[(first_of(op, s, nr) + j) * taps + t] = sums[(s * taps + t) * nr + j];
}

}  // namespace

bool is_depthwise(const Conv3d& op) {
  constexpr int64_t widest = 32;  // columns of any microkernel: one slab must fit
  return op.groups == op.in_channels && op.groups == op.out_channels && op.groups >= widest;
}

void depthwise(const Conv3d& op, bool backward, const void* source, const void* weight,
               const void* bias, void* target) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run(op, backward, static_cast<const T*>(source), static_cast<const T*>(weight),
        static_cast<const T*>(bias), static_cast<T*>(target));
  });
}

void depthwise_weight(const Conv3d& op, const void* x, const void* dy, void* dw) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    run_weight(op, static_cast<const T*>(x), static_cast<const T*>(dy),
               static_cast<typename Element<T>::Acc*>(dw));
  });
}

}  // namespace medspark
