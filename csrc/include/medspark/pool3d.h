// Max and average pooling over the active voxels of a level.
#pragma once

#include "medspark/types.h"

namespace medspark {

struct Pool3d {
  DType dtype;
  Level in;
  Level out;
  Window window;
  int64_t channels;
  // max: hidden voxels inside the volume count as 0 (SparK: dense pooling of the masked volume);
  // otherwise they are ignored. average: unused.
  bool hidden_is_zero;
  // average: divide by the number of active voxels in the window instead of by the kernel volume.
  bool divide_by_active;
  // average with the kernel divisor: count the padding (torch's count_include_pad), or a fixed
  // divisor > 0.
  bool count_padding;
  int64_t divisor_override;
  int threads;
};

// Value of `argmax` where the maximum is a hidden zero or the window holds no voxel at all.
constexpr int16_t no_tap = -1;

// x [in.rows, C] -> y [out.rows, C], argmax int16 [out.rows, C]: tap of the maximum (the first
// one). A window without any active voxel gives 0. NaN wins, as in torch.
void max_pool3d(const Pool3d& op, const void* x, void* y, int16_t* argmax);
void max_pool3d_input(const Pool3d& op, const void* dy, const int16_t* argmax, void* dx);

void avg_pool3d(const Pool3d& op, const void* x, void* y);
void avg_pool3d_input(const Pool3d& op, const void* dy, void* dx);

// The same on a CUDA device: every pointer, the levels' tables included, is device memory. Nothing
// is allocated and nothing waits; `workspace` holds at least as many bytes as the size function
// says.
namespace cuda {
int64_t max_pool3d_workspace(const Pool3d& op);
int64_t max_pool3d_input_workspace(const Pool3d& op);
int64_t avg_pool3d_workspace(const Pool3d& op);
int64_t avg_pool3d_input_workspace(const Pool3d& op);
void max_pool3d(const Stream& stream, const Pool3d& op, const void* x, void* y, int16_t* argmax,
                void* workspace);
void max_pool3d_input(const Stream& stream, const Pool3d& op, const void* dy, const int16_t* argmax,
                      void* dx, void* workspace);
void avg_pool3d(const Stream& stream, const Pool3d& op, const void* x, void* y, void* workspace);
void avg_pool3d_input(const Stream& stream, const Pool3d& op, const void* dy, void* dx,
                      void* workspace);
}  // namespace cuda

}  // namespace medspark
