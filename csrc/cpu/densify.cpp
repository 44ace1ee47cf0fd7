// Between packed blocks and dense volumes. Work is spread over cells; a cell's voxels are written
// in order.
#include "medspark/densify.h"

#include <algorithm>
#include <vector>

#include "dispatch.h"

namespace medspark {
namespace {

// Calls visit(block or -1, first element of the voxel in the dense tensor, voxel in the block) for
// each voxel of one cell.
template <class F>
void for_each_voxel(const Densify& op, int64_t cell, F&& visit) {
  const Level& l = op.level;
  const int64_t* n = l.block;
  const int64_t gx = cell % l.grid[2], gy = cell / l.grid[2] % l.grid[1];
  const int64_t gz = cell / l.grid[2] / l.grid[1] % l.grid[0], b = cell / l.sample_cells();
  const int64_t origin = b * op.strides[0] + gz * n[0] * op.strides[2] + gy * n[1] * op.strides[3] +
                         gx * n[2] * op.strides[4];
  int64_t local = 0;
  for (int64_t z = 0; z < n[0]; ++z)
    for (int64_t y = 0; y < n[1]; ++y)
      for (int64_t x = 0; x < n[2]; ++x, ++local)
        visit(int64_t(l.cells[cell]),
              origin + z * op.strides[2] + y * op.strides[3] + x * op.strides[4], local);
}

template <class T>
void scatter(const Densify& op, const T* features, const T* token, T* dense) {
  const int64_t C = op.channels, step = op.strides[1], voxels = op.level.block_voxels();
  const std::vector<T> zero(C, T{});
  const T* hidden = token ? token : zero.data();
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t cell = 0; cell < op.level.batch * op.level.sample_cells(); ++cell)
    for_each_voxel(op, cell, [&](int64_t block, int64_t at, int64_t local) {
      const T* from = block < 0 ? hidden : features + (block * voxels + local) * C;
      for (int64_t c = 0; c < C; ++c) dense[at + c * step] = from[c];
    });
}

template <class T>
void collect(const Densify& op, const T* dense, T* features) {
  const int64_t C = op.channels, step = op.strides[1], voxels = op.level.block_voxels();
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t i = 0; i < op.level.n_blocks; ++i)
    for_each_voxel(op, op.level.blocks[i], [&](int64_t, int64_t at, int64_t local) {
      T* to = features + (i * voxels + local) * C;
      for (int64_t c = 0; c < C; ++c) to[c] = dense[at + c * step];
    });
}

template <class T>
void sum(const Densify& op, const T* dense, typename Element<T>::Acc* token) {
  const int64_t C = op.channels, cells = op.level.batch * op.level.sample_cells();
  std::vector<double> partial(cells * C, 0.0);
#pragma omp parallel for num_threads(op.threads) schedule(static)
  for (int64_t cell = 0; cell < cells; ++cell)
    if (op.level.cells[cell] < 0)
      for_each_voxel(op, cell, [&](int64_t, int64_t at, int64_t) {
        for (int64_t c = 0; c < C; ++c)
          partial[cell * C + c] += Element<T>::load(dense[at + c * op.strides[1]]);
      });
  for (int64_t c = 0; c < C; ++c) {
    double total = 0;
    for (int64_t cell = 0; cell < cells; ++cell) total += partial[cell * C + c];
    token[c] = static_cast<typename Element<T>::Acc>(total);
  }
}

}  // namespace

void densify(const Densify& op, const void* features, const void* token, void* dense) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    scatter(op, static_cast<const T*>(features), static_cast<const T*>(token),
            static_cast<T*>(dense));
  });
}

void gather(const Densify& op, const void* dense, void* features) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    collect(op, static_cast<const T*>(dense), static_cast<T*>(features));
  });
}

void sum_hidden(const Densify& op, const void* dense, void* token) {
  dispatch(op.dtype, [&](auto tag) {
    using T = decltype(tag);
    sum(op, static_cast<const T*>(dense), static_cast<typename Element<T>::Acc*>(token));
  });
}

}  // namespace medspark
