// Writes 1 into every element: proof that this build holds code for the current device. Torch-free.
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

inline constexpr int kProbeThreads = 256;

static __global__ void __launch_bounds__(kProbeThreads) probe_kernel(int32_t* out,  // [count]
                                                                     int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) out[i] = 1;
}

inline cudaError_t probe(int32_t* out,  // [count]
                         int64_t count, cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>((count + kProbeThreads - 1) / kProbeThreads);
  return launch(probe_kernel, blocks, kProbeThreads, 0, stream, out, count);
}

}  // namespace pyvtk::cuda
