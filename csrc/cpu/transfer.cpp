// Rows of one level onto another. Work is spread over the rows that are written, in chunks of fixed
// size where they are summed.
#include "medspark/transfer.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"
#include "medspark/index.h"

namespace medspark {
namespace {

constexpr int64_t chunk_rows = 512;

// Row of `op.in` at the voxel of row `row` of `op.out`, -1 if it is hidden there.
int64_t source_of(const Transfer& op, int64_t row) {
  const Voxel v = voxel_of(op.out, row);
  return row_of(op.in, v.b, v.z, v.y, v.x);
}

template <class T>
void copy_rows(const Transfer& op, const T* x, const T* token, T* y) {
  const int64_t C = op.channels;
  const std::vector<T> zero(C, T{});
  const T* missing = token ? token : zero.data();
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t row = 0; row < op.out.rows(); ++row) {
    const int64_t source = source_of(op, row);
    std::copy_n(source < 0 ? missing : x + source * C, C, y + row * C);
  }
}

template <class T>
void sum_rows(const Transfer& op, const T* dy, typename Element<T>::Acc* token) {
  const int64_t C = op.channels, rows = op.out.rows();
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  std::vector<double> partial(chunks * C, 0.0);
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t row = chunk * chunk_rows; row < std::min((chunk + 1) * chunk_rows, rows); ++row)
      if (source_of(op, row) < 0)
        for (int64_t c = 0; c < C; ++c) partial[chunk * C + c] += Element<T>::load(dy[row * C + c]);
  for (int64_t c = 0; c < C; ++c) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) total += partial[chunk * C + c];
    token[c] = static_cast<typename Element<T>::Acc>(total);
  }
}

}  // namespace

void transfer(const Transfer& op, const void* x, const void* token, void* y) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    copy_rows(op, static_cast<const T*>(x), static_cast<const T*>(token), static_cast<T*>(y));
  });
}

void sum_untransferred(const Transfer& op, const void* dy, void* token) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    sum_rows(op, static_cast<const T*>(dy), static_cast<typename Element<T>::Acc*>(token));
  });
}

}  // namespace medspark
