// Stands in for csrc/cuda/stream_binding.h where the bindings of CUDA are compiled for the emulation: their operators
// are registered for CPU tensors, in place of the CPU's own.
#pragma once
#include <cstring>
#include <initializer_list>

#include "binding.h"
#include "cuda/ptx.cuh"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, k, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)

// torch's guard needs a device
#define DeviceGuard EmulatedDeviceGuard
namespace torch::stable::accelerator {

struct EmulatedDeviceGuard {
  explicit EmulatedDeviceGuard(int) {}
};

}  // namespace torch::stable::accelerator

constexpr int CUDART_VERSION = 0;  // of no CUDA

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

namespace pyvtk::cuda {

inline cudaStream_t current_stream(const Tensor&) { return nullptr; }

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  PYVTK_GUARD(false, op, ": ", cudaGetErrorString(status));
}

inline void guard_same_device(const Tensor&, std::initializer_list<const OptionalTensor*>) {}

}  // namespace pyvtk::cuda
