// Separable resampling. Work is spread over the rows that are written; their sources are summed in
// the order of the tables.
#include "medspark/resample3d.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "medspark/index.h"

namespace medspark {
namespace {

// Calls visit(row of `in`, weight) for the active sources of output voxel v.
template <class Acc, class F>
void for_each_source(const Resample3d& op, const Voxel& v, F&& visit) {
  const AxisTable &az = op.axis[0], &ay = op.axis[1], &ax = op.axis[2];
  const auto* wz = static_cast<const Acc*>(az.weight);
  const auto* wy = static_cast<const Acc*>(ay.weight);
  const auto* wx = static_cast<const Acc*>(ax.weight);
  for (int32_t z = az.start[v.z]; z < az.start[v.z + 1]; ++z)
    for (int32_t y = ay.start[v.y]; y < ay.start[v.y + 1]; ++y)
      for (int32_t x = ax.start[v.x]; x < ax.start[v.x + 1]; ++x) {
        const int64_t row = row_of(op.in, v.b, az.index[z], ay.index[y], ax.index[x]);
        if (row >= 0) visit(row, wz[z] * wy[y] * wx[x]);
      }
}

template <class T>
void resample(const Resample3d& op, const T* x, T* y) {
  using Acc = typename Element<T>::Acc;
  const int64_t C = op.channels;
#pragma omp parallel num_threads(op.threads)
  {
    std::vector<Acc> sum(C);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < op.out.rows(); ++row) {
      std::fill(sum.begin(), sum.end(), Acc(0));
      for_each_source<Acc>(op, voxel_of(op.out, row), [&](int64_t source, Acc weight) {
        const T* from = x + source * C;
        for (int64_t c = 0; c < C; ++c) sum[c] += weight * Element<T>::load(from[c]);
      });
      for (int64_t c = 0; c < C; ++c) y[row * C + c] = Element<T>::store(sum[c]);
    }
  }
}

}  // namespace

void resample3d(const Resample3d& op, const void* x, void* y) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    resample(op, static_cast<const T*>(x), static_cast<T*>(y));
  });
}

}  // namespace medspark
