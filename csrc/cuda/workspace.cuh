// Memory that a call brings for its kernels.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace pyvtk::cuda {

// Cuts a workspace into arrays that are aligned to 16 bytes; without memory it only counts.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}
  template <class T>
  T* take(bool needed, int64_t size) {
    if (!needed) return nullptr;
    T* const at = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += ceil_div<int64_t>(size * static_cast<int64_t>(sizeof(T)), 16) * 16;
    return at;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace pyvtk::cuda
