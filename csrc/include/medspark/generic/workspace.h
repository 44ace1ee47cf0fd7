// Scratch memory of a kernel: one buffer that the caller allocates, handed out in aligned parts.
#pragma once

#include <cstdint>

namespace medspark::generic {

// On a null buffer it only measures, so one constructor of a layout serves both the size function
// and the run.
class Arena {
 public:
  explicit Arena(void* buffer) : base_(reinterpret_cast<uintptr_t>(buffer)) {}

  template <class T>
  T* take(int64_t n) {
    constexpr int64_t alignment = 256;
    const uintptr_t part = base_ + used_;
    used_ += (n * static_cast<int64_t>(sizeof(T)) + alignment - 1) / alignment * alignment;
    return reinterpret_cast<T*>(part);
  }

  int64_t used() const { return used_; }

 private:
  uintptr_t base_;
  int64_t used_ = 0;
};

// Bytes of the workspace whose parts `Layout(op, arena)` takes.
template <class Layout, class Op>
int64_t bytes_of(const Op& op) {
  Arena arena(nullptr);
  const Layout layout(op, arena);
  static_cast<void>(layout);
  return arena.used();
}

}  // namespace medspark::generic
