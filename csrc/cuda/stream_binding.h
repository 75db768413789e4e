// What CUDA bindings need beyond binding.h: the current stream and CUDA's own words for an error.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "binding.h"

namespace pyvtk::cuda {

// torch's current stream on the tensor's device. The C shim is used because the stable C++ accessor needs torch 2.13.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  PYVTK_GUARD(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0, "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline void check(cudaError_t status, const char* op) {
  PYVTK_GUARD(status == cudaSuccess, op, ": ", cudaGetErrorString(status));
}

}  // namespace pyvtk::cuda
