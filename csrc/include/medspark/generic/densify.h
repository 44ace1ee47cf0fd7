// Between packed blocks and dense volumes, one item of work at a time (see medspark/densify.h and
// medspark/generic/conv3d.h for `launch`). Channels are the fastest axis of every item.
#pragma once

#include "medspark/densify.h"
#include "medspark/generic/segments.h"
#include "medspark/generic/workspace.h"
#include "medspark/index.h"

namespace medspark::generic {

// The i-th voxel of the dense volume, row by row.
MEDSPARK_HD Voxel dense_voxel(const Level& level, int64_t i) {
  const int64_t x = i % level.size(2), y = i / level.size(2) % level.size(1);
  const int64_t rest = i / level.size(2) / level.size(1);
  return {rest / level.size(0), rest % level.size(0), y, x};
}

inline int64_t dense_voxels(const Level& level) {
  return level.batch * level.sample_cells() * level.block_voxels();
}

// Its first channel in the dense tensor.
MEDSPARK_HD int64_t offset_of(const Densify& op, const Voxel& v) {
  return v.b * op.strides[0] + v.z * op.strides[2] + v.y * op.strides[3] + v.x * op.strides[4];
}

// Item i = (voxel of the dense volume, channel).
template <class T>
struct Scatter {
  Densify op;
  const T* features;
  const T* token;
  T* dense;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % op.channels;
    const Voxel v = dense_voxel(op.level, i / op.channels);
    const int64_t row = row_of(op.level, v.b, v.z, v.y, v.x);
    T value = token ? token[c] : T{};
    if (row >= 0) value = features[row * op.channels + c];
    dense[offset_of(op, v) + c * op.strides[1]] = value;
  }
};

// Item i = (packed row, channel).
template <class T>
struct Collect {
  Densify op;
  const T* dense;
  T* features;

  MEDSPARK_HD void operator()(int64_t i) const {
    const Voxel v = voxel_of(op.level, i / op.channels);
    features[i] = dense[offset_of(op, v) + i % op.channels * op.strides[1]];
  }
};

// Item i = (chunk of voxels, channel): sums over hidden voxels, partial [chunks, C].
template <class T>
struct HiddenChunk {
  Densify op;
  int64_t voxels;
  int shift;  // of the voxels per chunk
  const T* dense;
  double* partial;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % op.channels, first = i / op.channels << shift;
    const int64_t end =
        first + (int64_t{1} << shift) < voxels ? first + (int64_t{1} << shift) : voxels;
    double sum = 0;
    for (int64_t j = first; j < end; ++j) {
      const Voxel v = dense_voxel(op.level, j);
      if (row_of(op.level, v.b, v.z, v.y, v.x) < 0)
        sum += Element<T>::load(dense[offset_of(op, v) + c * op.strides[1]]);
    }
    partial[i] = sum;
  }
};

// Item i = channel: the chunks in order.
template <class Acc>
struct SumChunks {
  int64_t chunks, channels;
  const double* partial;
  Acc* token;

  MEDSPARK_HD void operator()(int64_t c) const {
    double sum = 0;
    for (int64_t j = 0; j < chunks; ++j) sum += partial[j * channels + c];
    token[c] = static_cast<Acc>(sum);
  }
};

inline int64_t hidden_chunks(const Densify& op) {
  const int64_t voxels = dense_voxels(op.level), shift = chunk_shift(voxels);
  return (voxels + (int64_t{1} << shift) - 1) >> shift;
}

struct HiddenWorkspace {
  double* partial;

  HiddenWorkspace(const Densify& op, Arena& arena)
      : partial(arena.take<double>(hidden_chunks(op) * op.channels)) {}
};

template <class T, class Launch>
void densify(const Densify& op, const T* features, const T* token, T* dense, Launch&& launch) {
  launch(dense_voxels(op.level) * op.channels, Scatter<T>{op, features, token, dense});
}

template <class T, class Launch>
void gather(const Densify& op, const T* dense, T* features, Launch&& launch) {
  launch(op.level.rows() * op.channels, Collect<T>{op, dense, features});
}

template <class T, class Launch>
void sum_hidden(const Densify& op, const T* dense, typename Element<T>::Acc* token, void* workspace,
                Launch&& launch) {
  using Acc = typename Element<T>::Acc;
  Arena arena(workspace);
  const HiddenWorkspace space(op, arena);
  const int64_t voxels = dense_voxels(op.level), chunks = hidden_chunks(op);
  launch(chunks * op.channels,
         HiddenChunk<T>{op, voxels, chunk_shift(voxels), dense, space.partial});
  launch(op.channels, SumChunks<Acc>{chunks, op.channels, space.partial, token});
}

}  // namespace medspark::generic
