// Runs items of work on the caller's device and stream: item(0) ... item(n - 1), in parallel.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../cpu/dispatch.h"
#include "medspark/types.h"

namespace medspark::cuda {

constexpr int block_threads = 256;

// Neighbouring threads take neighbouring items, which the ops lay out so that they touch
// neighbouring channels.
template <class Item>
__global__ void __launch_bounds__(block_threads) run_items(int64_t n, const Item item) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * block_threads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * block_threads + threadIdx.x; i < n; i += step)
    item(i);
}

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("medspark: ") + what + " failed: " +
                           cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Makes the stream's device the current one for as long as it lives, and launches on the stream.
class Launcher {
 public:
  explicit Launcher(const Stream& stream) : stream_(static_cast<cudaStream_t>(stream.handle)) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == stream.device) return;
    check(cudaSetDevice(stream.device), "cudaSetDevice");
    switched_ = true;
  }

  ~Launcher() {
    if (switched_) cudaSetDevice(previous_);
  }

  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  template <class Item>
  void operator()(int64_t n, const Item& item) const {
    if (n <= 0) return;
    constexpr int64_t most_blocks = 1 << 20;
    const int64_t blocks = std::min((n + block_threads - 1) / block_threads, most_blocks);
    run_items<<<static_cast<unsigned>(blocks), block_threads, 0, stream_>>>(n, item);
    check(cudaGetLastError(), "a kernel launch");
  }

 private:
  cudaStream_t stream_;
  int previous_ = 0;
  bool switched_ = false;
};

}  // namespace medspark::cuda
