// Depthwise convolution: one channel in and one out per group, so vectors run over the channels.
#pragma once

#include "medspark/conv3d.h"

namespace medspark {

// Whether these functions know the convolution; the general ones take every other.
bool is_depthwise(const Conv3d& op);

// As conv3d, or as conv3d_input where `backward`.
void depthwise(const Conv3d& op, bool backward, const void* source, const void* weight,
               const void* bias, void* target);

// As conv3d_weight.
void depthwise_weight(const Conv3d& op, const void* x, const void* dy, void* dw);

}  // namespace medspark
