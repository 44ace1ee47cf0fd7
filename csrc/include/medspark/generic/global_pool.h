// Mean or maximum of each sample, one item of work at a time (see medspark/global_pool.h and
// medspark/generic/conv3d.h for `launch`). Channels are the fastest axis of every item.
#pragma once

#include "medspark/generic/segments.h"
#include "medspark/generic/workspace.h"
#include "medspark/global_pool.h"

namespace medspark::generic {

// Item i = (chunk, channel): partial sums [chunks, C].
template <class T>
struct ChunkSum {
  Segments segments;
  int64_t channels;
  const T* x;
  double* partial;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels;
    const Chunk chunk = segments.at(i / channels);
    double sum = 0;
    for (int64_t r = chunk.first; r < chunk.end; ++r) sum += Element<T>::load(x[r * channels + c]);
    partial[i] = sum;
  }
};

// Item i = (sample, channel).
template <class T>
struct MeanOfChunks {
  Segments segments;
  int64_t channels;
  const double* partial;
  T* y;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, s = i / channels, first = segments.first_chunk(s);
    const int64_t chunks = segments.chunks(s), rows = segments.rows(s);
    const double* from = partial + first * channels + c;
    double sum = 0;
    for (int64_t j = 0; j < chunks; ++j) sum += from[j * channels];
    y[i] = Element<T>::store(static_cast<typename Element<T>::Acc>(sum / (rows > 0 ? rows : 1)));
  }
};

// The better of two rows, `row` coming later: the first of equal ones, NaN over any number.
template <class T>
MEDSPARK_HD int64_t better(const T* x, int64_t channels, int64_t c, int64_t best, int64_t row) {
  if (best < 0 || row < 0) return best < 0 ? row : best;
  const auto value = Element<T>::load(x[row * channels + c]);
  const auto old = Element<T>::load(x[best * channels + c]);
  return value > old || (value != value && old == old) ? row : best;
}

// Item i = (chunk, channel): row of the maximum [chunks, C], -1 if there is no such chunk.
template <class T>
struct ChunkMaximum {
  Segments segments;
  int64_t channels;
  const T* x;
  int64_t* partial;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels;
    const Chunk chunk = segments.at(i / channels);
    int64_t best = -1;
    for (int64_t r = chunk.first; r < chunk.end; ++r) best = better(x, channels, c, best, r);
    partial[i] = best;
  }
};

// Item i = (sample, channel).
template <class T>
struct MaximumOfChunks {
  Segments segments;
  int64_t channels;
  const T* x;
  const int64_t* partial;
  T* y;
  int64_t* argmax;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, s = i / channels, first = segments.first_chunk(s);
    int64_t best = -1;
    for (int64_t j = first; j < first + segments.chunks(s); ++j)
      best = better(x, channels, c, best, partial[j * channels + c]);
    argmax[i] = best;
    y[i] = best < 0 ? T{} : x[best * channels + c];
  }
};

// Item i = (row, channel).
template <class T>
struct GlobalPoolInput {
  using Acc = typename Element<T>::Acc;
  Segments segments;
  int64_t channels;
  bool maximum;
  const T* dy;
  const int64_t* argmax;
  T* dx;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, row = i / channels, s = segments.of(row);
    const Acc g = Element<T>::load(dy[s * channels + c]);
    Acc value;
    if (maximum)
      value = argmax[s * channels + c] == row ? g : Acc(0);
    else
      value = g / static_cast<Acc>(segments.rows(s));
    dx[i] = Element<T>::store(value);
  }
};

inline Segments segments_of(const GlobalPool& op) {
  return {op.starts, op.batch, chunk_shift(op.rows)};
}

inline int64_t chunks_of(const GlobalPool& op) { return most_chunks(op.rows, op.batch); }

// Sums, or rows of maxima.
struct GlobalPoolWorkspace {
  double* sums;
  int64_t* rows;

  GlobalPoolWorkspace(const GlobalPool& op, Arena& arena)
      : sums(arena.take<double>(op.maximum ? 0 : chunks_of(op) * op.channels)),
        rows(arena.take<int64_t>(op.maximum ? chunks_of(op) * op.channels : 0)) {}
};

template <class T, class Launch>
void global_pool(const GlobalPool& op, const T* x, T* y, int64_t* argmax, void* workspace,
                 Launch&& launch) {
  Arena arena(workspace);
  const GlobalPoolWorkspace space(op, arena);
  const Segments segments = segments_of(op);
  const int64_t C = op.channels, chunks = chunks_of(op);
  if (op.maximum) {
    launch(chunks * C, ChunkMaximum<T>{segments, C, x, space.rows});
    launch(op.batch * C, MaximumOfChunks<T>{segments, C, x, space.rows, y, argmax});
  } else {
    launch(chunks * C, ChunkSum<T>{segments, C, x, space.sums});
    launch(op.batch * C, MeanOfChunks<T>{segments, C, space.sums, y});
  }
}

template <class T, class Launch>
void global_pool_input(const GlobalPool& op, const T* dy, const int64_t* argmax, T* dx,
                       Launch&& launch) {
  launch(op.rows * op.channels,
         GlobalPoolInput<T>{segments_of(op), op.channels, op.maximum, dy, argmax, dx});
}

}  // namespace medspark::generic
