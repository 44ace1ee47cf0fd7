// Weights between torch's order and the slabs that the microkernels read and write.
#pragma once

#include <memory>

#include "medspark/conv3d.h"
#include "microkernel.h"

namespace medspark {

// Channel counts of one direction of the convolution, per group: x -> y forward, dy -> dx backward.
struct Direction {
  bool backward;
  int64_t depth;    // channels read
  int64_t columns;  // channels written
};

// Taps that a multiplication reads as one deep row, when each alone has very few channels.
inline bool reads_deep_rows(const Conv3d& op, int64_t depth) {
  constexpr int64_t shallow_channels = 16;
  return depth < shallow_channels && op.window.taps() > 1;
}

inline int64_t slabs_of(int64_t columns, int64_t nr) { return (columns + nr - 1) / nr; }

// weight [K, C / groups, taps] -> [groups][slabs][taps][steps(depth)][nr], zeros where there is no
// channel; deep rows count as one tap of taps * depth channels.
template <class T>
std::unique_ptr<typename Element<T>::Acc[]> pack_weight(const Conv3d& op, const Direction& way,
                                                        const T* weight);

// Sum over segments of [segments][groups][slabs][taps][channels][nr] -> dw [K, C / groups, taps].
template <class Acc>
void unpack_gradient(const Conv3d& op, int64_t segments, int64_t nr, const Acc* packed, Acc* dw);

}  // namespace medspark
