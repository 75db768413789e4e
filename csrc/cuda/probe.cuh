// Writes 1 into every element: proof that this build holds code for the current device. Torch-free.
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

__global__ void probe_kernel(int32_t* out,  // [count]
                             int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = 1;
}

inline cudaError_t probe(int32_t* out,  // [count]
                         int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  constexpr int kThreads = 256;
  return launch(probe_kernel, static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, stream, out,
                count);
}

}  // namespace pyvtk::cuda
