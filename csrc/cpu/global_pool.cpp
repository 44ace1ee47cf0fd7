// Mean or maximum over each sample's rows. A thread owns (sample, channel span) pairs.
#include "medspark/global_pool.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "dispatch.h"

namespace medspark {
namespace {

constexpr int64_t span = 64;  // channels of one work item

// Calls visit(sample, first channel, last channel), spread over threads.
template <class F>
void for_each_span(const GlobalPool& op, F&& visit) {
  const int64_t spans = (op.channels + span - 1) / span;
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < op.batch * spans; ++i) {
    const int64_t first = i % spans * span;
    visit(i / spans, first, std::min(first + span, op.channels));
  }
}

template <class T>
void mean_forward(const GlobalPool& op, const T* x, T* y) {
  using Acc = typename Element<T>::Acc;
  for_each_span(op, [&](int64_t b, int64_t first, int64_t last) {
    std::vector<double> sum(last - first, 0.0);
    for (int64_t r = op.starts[b]; r < op.starts[b + 1]; ++r)
      for (int64_t c = first; c < last; ++c)
        sum[c - first] += Element<T>::load(x[r * op.channels + c]);
    const double rows = std::max<double>(1, op.starts[b + 1] - op.starts[b]);
    for (int64_t c = first; c < last; ++c)
      y[b * op.channels + c] = Element<T>::store(static_cast<Acc>(sum[c - first] / rows));
  });
}

template <class T>
void max_forward(const GlobalPool& op, const T* x, T* y, int64_t* argmax) {
  for_each_span(op, [&](int64_t b, int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      int64_t best = -1;
      for (int64_t r = op.starts[b]; r < op.starts[b + 1]; ++r) {
        const auto value = Element<T>::load(x[r * op.channels + c]);
        if (best < 0 || value > Element<T>::load(x[best * op.channels + c]) ||
            (std::isnan(value) && !std::isnan(Element<T>::load(x[best * op.channels + c]))))
          best = r;
      }
      argmax[b * op.channels + c] = best;
      y[b * op.channels + c] = best < 0 ? T{} : x[best * op.channels + c];
    }
  });
}

template <class T>
void backward(const GlobalPool& op, const T* dy, const int64_t* argmax, T* dx) {
  using Acc = typename Element<T>::Acc;
  for_each_span(op, [&](int64_t b, int64_t first, int64_t last) {
    const Acc rows = static_cast<Acc>(op.starts[b + 1] - op.starts[b]);
    for (int64_t r = op.starts[b]; r < op.starts[b + 1]; ++r)
      for (int64_t c = first; c < last; ++c) {
        const int64_t i = b * op.channels + c;
        const Acc g = Element<T>::load(dy[i]);
        dx[r * op.channels + c] =
            Element<T>::store(op.maximum ? (argmax[i] == r ? g : Acc(0)) : g / rows);
      }
  });
}

}  // namespace

void global_pool(const GlobalPool& op, const void* x, void* y, int64_t* argmax) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (op.maximum)
      max_forward(op, static_cast<const T*>(x), static_cast<T*>(y), argmax);
    else
      mean_forward(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

void global_pool_input(const GlobalPool& op, const void* dy, const int64_t* argmax, void* dx) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    backward(op, static_cast<const T*>(dy), argmax, static_cast<T*>(dx));
  });
}

}  // namespace medspark
