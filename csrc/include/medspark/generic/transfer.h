// Rows of one level onto another, one item of work at a time (see medspark/transfer.h and
// medspark/generic/conv3d.h for `launch`). Channels are the fastest axis of every item.
#pragma once

#include "medspark/generic/densify.h"
#include "medspark/transfer.h"

namespace medspark::generic {

// Row of `op.in` at the voxel of row `row` of `op.out`, -1 if it is hidden there.
MEDSPARK_HD int64_t same_voxel(const Transfer& op, int64_t row) {
  const Voxel v = voxel_of(op.out, row);
  return row_of(op.in, v.b, v.z, v.y, v.x);
}

// Item i = (row of `out`, channel).
template <class T>
struct TransferRow {
  Transfer op;
  const T* x;
  const T* token;
  T* y;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % op.channels, row = same_voxel(op, i / op.channels);
    T value = token ? token[c] : T{};
    if (row >= 0) value = x[row * op.channels + c];
    y[i] = value;
  }
};

// Item i = (chunk of rows of `out`, channel): sums over rows without a source, partial [chunks, C].
template <class T>
struct UntransferredChunk {
  Transfer op;
  int shift;  // of the rows per chunk
  const T* dy;
  double* partial;

  MEDSPARK_HD void operator()(int64_t i) const {
    const int64_t c = i % op.channels, first = i / op.channels << shift, rows = op.out.rows();
    const int64_t end = first + (int64_t{1} << shift) < rows ? first + (int64_t{1} << shift) : rows;
    double sum = 0;
    for (int64_t row = first; row < end; ++row)
      if (same_voxel(op, row) < 0) sum += Element<T>::load(dy[row * op.channels + c]);
    partial[i] = sum;
  }
};

inline int64_t untransferred_chunks(const Transfer& op) {
  const int64_t rows = op.out.rows(), shift = chunk_shift(rows);
  return (rows + (int64_t{1} << shift) - 1) >> shift;
}

struct UntransferredWorkspace {
  double* partial;

  UntransferredWorkspace(const Transfer& op, Arena& arena)
      : partial(arena.take<double>(untransferred_chunks(op) * op.channels)) {}
};

template <class T, class Launch>
void transfer(const Transfer& op, const T* x, const T* token, T* y, Launch&& launch) {
  launch(op.out.rows() * op.channels, TransferRow<T>{op, x, token, y});
}

template <class T, class Launch>
void sum_untransferred(const Transfer& op, const T* dy, typename Element<T>::Acc* token,
                       void* workspace, Launch&& launch) {
  using Acc = typename Element<T>::Acc;
  Arena arena(workspace);
  const UntransferredWorkspace space(op, arena);
  const int64_t chunks = untransferred_chunks(op);
  launch(chunks * op.channels,
         UntransferredChunk<T>{op, chunk_shift(op.out.rows()), dy, space.partial});
  launch(op.channels, SumChunks<Acc>{chunks, op.channels, space.partial, token});
}

}  // namespace medspark::generic
