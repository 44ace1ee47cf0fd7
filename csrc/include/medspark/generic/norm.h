// Normalisation of packed rows, one item of work at a time (see medspark/norm.h and
// medspark/generic/conv3d.h for `launch`). Channels are the fastest axis of every item.
#pragma once

#include <cmath>

#include "medspark/generic/segments.h"
#include "medspark/generic/workspace.h"
#include "medspark/norm.h"

namespace medspark::generic {

// Item i = (chunk, channel): mean and sum of squared deviations, moments [chunks, 2, C].
template <class T>
struct ChunkMoments {
  Segments segments;
  int64_t channels;
  const T* x;
  double* moments;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, number = i / channels;
    const Chunk chunk = segments.at(number);
    if (chunk.segment < 0) return;
    double mean = 0, m2 = 0;
    for (int64_t r = chunk.first; r < chunk.end; ++r) mean += Element<T>::load(x[r * channels + c]);
    mean /= static_cast<double>(chunk.end - chunk.first);
    for (int64_t r = chunk.first; r < chunk.end; ++r) {
      const double d = Element<T>::load(x[r * channels + c]) - mean;
      m2 += d * d;
    }
    moments[number * 2 * channels + c] = mean;
    moments[(number * 2 + 1) * channels + c] = m2;
  }
};

// Item i = (segment, channel): merges the segment's chunks in order (Chan, Golub and LeVeque 1979).
template <class Acc>
struct MergeMoments {
  Segments segments;
  int64_t channels;
  double eps;
  const double* moments;
  const Acc* weight;
  Acc* mean;
  Acc* var;
  Acc* scale;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, s = i / channels, first = segments.first_chunk(s);
    double n = 0, mu = 0, m2 = 0;
    for (int64_t j = 0; j < segments.chunks(s); ++j) {
      const int64_t most = segments.chunk_rows(), left = segments.rows(s) - j * most;
      const double rows = static_cast<double>(left < most ? left : most);
      const double* from = moments + (first + j) * 2 * channels + c;
      const double delta = from[0] - mu, total = n + rows;
      mu += delta * rows / total;
      m2 += from[channels] + delta * delta * n * rows / total;
      n = total;
    }
    mean[i] = static_cast<Acc>(mu);
    var[i] = static_cast<Acc>(n > 0 ? m2 / n : 0.0);
    scale[i] = static_cast<Acc>(1.0 / sqrt(double(var[i]) + eps)) * (weight ? weight[c] : Acc(1));
  }
};

// Item i = (row, channel).
template <class T>
struct Normalise {
  using Acc = typename Element<T>::Acc;
  Segments segments;
  int64_t channels;
  const T* x;
  const Acc* mean;
  const Acc* scale;
  const Acc* bias;
  T* y;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, at = segments.of(i / channels) * channels + c;
    const Acc value = (Element<T>::load(x[i]) - mean[at]) * scale[at];
    y[i] = Element<T>::store(value + (bias ? bias[c] : Acc(0)));
  }
};

// Item i = (chunk, channel): sums of dy and of dy times (x - mean), partial [chunks, 2, C].
template <class T>
struct ChunkGradients {
  using Acc = typename Element<T>::Acc;
  Segments segments;
  int64_t channels;
  const T* dy;
  const T* x;
  const Acc* mean;
  double* partial;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, number = i / channels;
    const Chunk chunk = segments.at(number);
    if (chunk.segment < 0) return;
    const Acc mu = mean[chunk.segment * channels + c];
    double db = 0, dw = 0;
    for (int64_t r = chunk.first; r < chunk.end; ++r) {
      const double g = Element<T>::load(dy[r * channels + c]);
      db += g;
      dw += g * (Element<T>::load(x[r * channels + c]) - mu);
    }
    double* to = partial + number * 2 * channels + c;
    to[0] = db;
    to[channels] = dw;
  }
};

// Item i = (segment, channel): ordered sums [segments, 2, C], and the coefficients [segments, 3, C]
// of dx = a * dy + b * (x - mean) + k.
template <class Acc>
struct MergeGradients {
  Segments segments;
  int64_t channels;
  double eps;
  const double* partial;
  const Acc* weight;
  const Acc* var;
  double* sums;
  Acc* coefficients;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, s = i / channels, first = segments.first_chunk(s);
    const int64_t chunks = segments.chunks(s);
    const double* from = partial + first * 2 * channels + c;
    double db = 0, dw = 0;
    for (int64_t j = 0; j < chunks; ++j, from += 2 * channels) {
      db += from[0];
      dw += from[channels];
    }
    const double rows = static_cast<double>(segments.rows(s) > 0 ? segments.rows(s) : 1);
    const double rstd = 1.0 / sqrt(double(var[i]) + eps);
    dw *= rstd;  // now of dy times the normalised x
    sums[s * 2 * channels + c] = db;
    sums[(s * 2 + 1) * channels + c] = dw;
    const double scale = rstd * (weight ? weight[c] : Acc(1));
    Acc* to = coefficients + s * 3 * channels + c;
    to[0] = static_cast<Acc>(scale);
    to[channels] = static_cast<Acc>(-scale * rstd * dw / rows);
    to[2 * channels] = static_cast<Acc>(-scale * db / rows);
  }
};

// Item i = channel: the parameters' gradients over all segments, in order.
template <class Acc>
struct SumSegments {
  int64_t n_segments, channels;
  const double* sums;
  Acc* dweight;
  Acc* dbias;

  MEDSPARK_HD void operator()(int64_t c) const {
    double db = 0, dw = 0;
    for (int64_t s = 0; s < n_segments; ++s) {
      db += sums[s * 2 * channels + c];
      dw += sums[(s * 2 + 1) * channels + c];
    }
    if (dbias) dbias[c] = static_cast<Acc>(db);
    if (dweight) dweight[c] = static_cast<Acc>(dw);
  }
};

// Item i = (row, channel).
template <class T>
struct NormaliseInput {
  using Acc = typename Element<T>::Acc;
  Segments segments;
  int64_t channels;
  const T* dy;
  const T* x;
  const Acc* mean;
  const Acc* coefficients;
  T* dx;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % channels, s = segments.of(i / channels);
    const Acc* from = coefficients + s * 3 * channels + c;
    const Acc centred = Element<T>::load(x[i]) - mean[s * channels + c];
    const Acc value = from[0] * Element<T>::load(dy[i]) + from[channels] * centred;
    dx[i] = Element<T>::store(value + from[2 * channels]);
  }
};

inline Segments segments_of(const Norm& op) {
  return {op.starts, op.n_segments, chunk_shift(op.rows)};
}

inline int64_t chunks_of(const Norm& op) { return most_chunks(op.rows, op.n_segments); }

template <class Acc>
struct NormWorkspace {
  double* moments;
  Acc* scale;

  NormWorkspace(const Norm& op, Arena& arena)
      : moments(arena.take<double>(chunks_of(op) * 2 * op.channels)),
        scale(arena.take<Acc>(op.n_segments * op.channels)) {}
};

template <class Acc>
struct NormInputWorkspace {
  double* partial;
  double* sums;
  Acc* coefficients;

  NormInputWorkspace(const Norm& op, Arena& arena)
      : partial(arena.take<double>(chunks_of(op) * 2 * op.channels)),
        sums(arena.take<double>(op.n_segments * 2 * op.channels)),
        coefficients(arena.take<Acc>(op.n_segments * 3 * op.channels)) {}
};

template <class T, class Launch>
void norm(const Norm& op, const T* x, const typename Element<T>::Acc* weight,
          const typename Element<T>::Acc* bias, T* y, typename Element<T>::Acc* mean,
          typename Element<T>::Acc* var, void* workspace, Launch&& launch) {
  using Acc = typename Element<T>::Acc;
  Arena arena(workspace);
  const NormWorkspace<Acc> space(op, arena);
  const Segments segments = segments_of(op);
  const int64_t C = op.channels;
  launch(chunks_of(op) * C, ChunkMoments<T>{segments, C, x, space.moments});
  launch(op.n_segments * C,
         MergeMoments<Acc>{segments, C, op.eps, space.moments, weight, mean, var, space.scale});
  launch(op.rows * C, Normalise<T>{segments, C, x, mean, space.scale, bias, y});
}

template <class T, class Launch>
void norm_input(const Norm& op, const T* dy, const T* x, const typename Element<T>::Acc* weight,
                const typename Element<T>::Acc* mean, const typename Element<T>::Acc* var, T* dx,
                typename Element<T>::Acc* dweight, typename Element<T>::Acc* dbias, void* workspace,
                Launch&& launch) {
  using Acc = typename Element<T>::Acc;
  Arena arena(workspace);
  const NormInputWorkspace<Acc> space(op, arena);
  const Segments segments = segments_of(op);
  const int64_t C = op.channels;
  launch(chunks_of(op) * C, ChunkGradients<T>{segments, C, dy, x, mean, space.partial});
  launch(op.n_segments * C, MergeGradients<Acc>{segments, C, op.eps, space.partial, weight, var,
                                                space.sums, space.coefficients});
  launch(C, SumSegments<Acc>{op.n_segments, C, space.sums, dweight, dbias});
  launch(op.rows * C, NormaliseInput<T>{segments, C, dy, x, mean, space.coefficients, dx});
}

}  // namespace medspark::generic
