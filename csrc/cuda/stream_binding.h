// What CUDA bindings need beyond binding.h: the current stream and CUDA's own words for an error.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "binding.h"

namespace pyvtk::cuda {

// torch's current stream on the tensor's device. The C shim is used because the stable C++ accessor needs torch 2.13.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  PYVTK_GUARD(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t status, const char* op) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // it is told here: it must not be found again, as that of a later call, in this thread
  PYVTK_GUARD(false, op, ": ", cudaGetErrorString(status));
}

// Kernels read all their tensors on one device: that of `tensor`.
inline void guard_same_device(const Tensor& tensor, std::initializer_list<const OptionalTensor*> others) {
  for (const OptionalTensor* other : others) {
    PYVTK_GUARD(
        !other->has_value() || ((*other)->is_cuda() && (*other)->get_device_index() == tensor.get_device_index()),
        "all tensors must be on one CUDA device");
  }
}

}  // namespace pyvtk::cuda
