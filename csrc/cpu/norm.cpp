// Normalisation over packed rows: one pass for the statistics, one to apply, both in chunks of
// fixed size.
#include "medspark/norm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"

namespace medspark {
namespace {

constexpr int64_t chunk_rows = 512;

// A run of rows inside one segment.
struct Chunk {
  int64_t segment, first, last;
};

std::vector<Chunk> chunks_of(const Norm& op) {
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < op.n_segments; ++s)
    for (int64_t first = op.starts[s]; first < op.starts[s + 1]; first += chunk_rows)
      chunks.push_back({s, first, std::min(first + chunk_rows, op.starts[s + 1])});
  return chunks;
}

// Per chunk and channel: mean and sum of squared deviations.
template <class T>
void chunk_moments(const Norm& op, const Chunk& chunk, const T* x, double* mean, double* m2) {
  const int64_t C = op.channels;
  std::fill(mean, mean + C, 0.0);
  std::fill(m2, m2 + C, 0.0);
  for (int64_t r = chunk.first; r < chunk.last; ++r)
    for (int64_t c = 0; c < C; ++c) mean[c] += Element<T>::load(x[r * C + c]);
  for (int64_t c = 0; c < C; ++c) mean[c] /= static_cast<double>(chunk.last - chunk.first);
  for (int64_t r = chunk.first; r < chunk.last; ++r)
    for (int64_t c = 0; c < C; ++c) {
      const double d = Element<T>::load(x[r * C + c]) - mean[c];
      m2[c] += d * d;
    }
}

// Merges the chunks of each segment in order; leaves mean and biased variance.
template <class Acc>
void merge_moments(const Norm& op, const std::vector<Chunk>& chunks,
                   const std::vector<double>& moments, Acc* mean, Acc* var) {
  const int64_t C = op.channels;
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t c = 0; c < C; ++c) {
    size_t next = 0;
    for (int64_t s = 0; s < op.n_segments; ++s) {
      double n = 0, mu = 0, m2 = 0;
      for (; next < chunks.size() && chunks[next].segment == s; ++next) {
        const double rows = static_cast<double>(chunks[next].last - chunks[next].first);
        const double delta = moments[next * 2 * C + c] - mu, total = n + rows;
        mu += delta * rows / total;
        m2 += moments[(next * 2 + 1) * C + c] + delta * delta * n * rows / total;
        n = total;
      }
      mean[s * C + c] = static_cast<Acc>(mu);
      var[s * C + c] = static_cast<Acc>(n > 0 ? m2 / n : 0.0);
    }
  }
}

template <class T>
void forward(const Norm& op, const T* x, const typename Element<T>::Acc* weight,
             const typename Element<T>::Acc* bias, T* y, typename Element<T>::Acc* mean,
             typename Element<T>::Acc* var) {
  using Acc = typename Element<T>::Acc;
  const int64_t C = op.channels;
  const std::vector<Chunk> chunks = chunks_of(op);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<double> moments(chunks.size() * 2 * C);
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < n; ++i)
    chunk_moments(op, chunks[i], x, moments.data() + i * 2 * C, moments.data() + (i * 2 + 1) * C);
  merge_moments(op, chunks, moments, mean, var);
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const Acc* mu = mean + chunks[i].segment * C;
    std::vector<Acc> scale(C);
    for (int64_t c = 0; c < C; ++c)
      scale[c] =
          static_cast<Acc>(1.0 / std::sqrt(double(var[chunks[i].segment * C + c]) + op.eps)) *
          (weight ? weight[c] : Acc(1));
    for (int64_t r = chunks[i].first; r < chunks[i].last; ++r)
      for (int64_t c = 0; c < C; ++c)
        y[r * C + c] = Element<T>::store((Element<T>::load(x[r * C + c]) - mu[c]) * scale[c] +
                                         (bias ? bias[c] : Acc(0)));
  }
}

// Per chunk and channel: sum of dy and of dy times the normalised x; then one ordered sum per
// segment.
template <class T>
std::vector<double> gradient_sums(const Norm& op, const std::vector<Chunk>& chunks, const T* dy,
                                  const T* x, const typename Element<T>::Acc* mean,
                                  const std::vector<double>& rstd) {
  const int64_t C = op.channels, n = static_cast<int64_t>(chunks.size());
  std::vector<double> partial(chunks.size() * 2 * C, 0.0), sums(op.n_segments * 2 * C, 0.0);
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    double* db = partial.data() + i * 2 * C;
    double* dw = db + C;
    const int64_t s = chunks[i].segment;
    for (int64_t r = chunks[i].first; r < chunks[i].last; ++r)
      for (int64_t c = 0; c < C; ++c) {
        const double g = Element<T>::load(dy[r * C + c]);
        db[c] += g;
        dw[c] += g * (Element<T>::load(x[r * C + c]) - mean[s * C + c]) * rstd[s * C + c];
      }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < 2 * C; ++c)
      sums[chunks[i].segment * 2 * C + c] += partial[i * 2 * C + c];
  return sums;
}

template <class T>
void backward(const Norm& op, const T* dy, const T* x, const typename Element<T>::Acc* weight,
              const typename Element<T>::Acc* mean, const typename Element<T>::Acc* var, T* dx,
              typename Element<T>::Acc* dweight, typename Element<T>::Acc* dbias) {
  using Acc = typename Element<T>::Acc;
  const int64_t C = op.channels;
  const std::vector<Chunk> chunks = chunks_of(op);
  const int64_t n = static_cast<int64_t>(chunks.size());
  std::vector<double> rstd(op.n_segments * C);
  for (size_t i = 0; i < rstd.size(); ++i) rstd[i] = 1.0 / std::sqrt(double(var[i]) + op.eps);
  const std::vector<double> sums = gradient_sums(op, chunks, dy, x, mean, rstd);
  for (int64_t c = 0; c < C; ++c) {
    double db = 0, dw = 0;
    for (int64_t s = 0; s < op.n_segments; ++s) {
      db += sums[s * 2 * C + c];
      dw += sums[(s * 2 + 1) * C + c];
    }
    if (dbias) dbias[c] = static_cast<Acc>(db);
    if (dweight) dweight[c] = static_cast<Acc>(dw);
  }
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t s = chunks[i].segment;
    const double rows = static_cast<double>(op.starts[s + 1] - op.starts[s]);
    // dx = a * dy + b * x + k, per channel.
    std::vector<Acc> a(C), b(C), k(C);
    for (int64_t c = 0; c < C; ++c) {
      const double r = rstd[s * C + c], scale = r * (weight ? weight[c] : Acc(1));
      const double slope = -scale * r * sums[(s * 2 + 1) * C + c] / rows;
      a[c] = static_cast<Acc>(scale);
      b[c] = static_cast<Acc>(slope);
      k[c] = static_cast<Acc>(-scale * sums[s * 2 * C + c] / rows);
    }
    for (int64_t r = chunks[i].first; r < chunks[i].last; ++r)
      for (int64_t c = 0; c < C; ++c)
        dx[r * C + c] =
            Element<T>::store(a[c] * Element<T>::load(dy[r * C + c]) +
                              b[c] * (Element<T>::load(x[r * C + c]) - mean[s * C + c]) + k[c]);
  }
}

}  // namespace

void norm(const Norm& op, const void* x, const void* weight, const void* bias, void* y, void* mean,
          void* var) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    forward(op, static_cast<const T*>(x), static_cast<const Acc*>(weight),
            static_cast<const Acc*>(bias), static_cast<T*>(y), static_cast<Acc*>(mean),
            static_cast<Acc*>(var));
  });
}

void norm_input(const Norm& op, const void* dy, const void* x, const void* weight, const void* mean,
                const void* var, void* dx, void* dweight, void* dbias) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    using Acc = typename Element<T>::Acc;
    backward(op, static_cast<const T*>(dy), static_cast<const T*>(x),
             static_cast<const Acc*>(weight), static_cast<const Acc*>(mean),
             static_cast<const Acc*>(var), static_cast<T*>(dx), static_cast<Acc*>(dweight),
             static_cast<Acc*>(dbias));
  });
}

}  // namespace medspark
