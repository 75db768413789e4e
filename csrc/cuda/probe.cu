#include "cuda/probe.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {
namespace {

void probe_(Tensor out) {
  guard_dtype(out, ScalarType::Int, "out");
  guard_contiguous(out, "out");
  torch::stable::accelerator::DeviceGuard device(out.get_device_index());
  check(probe(mutable_data<int32_t>(out), out.numel(), current_stream(out)), "probe_");
}

}  // namespace
}  // namespace pyvtk::cuda

// What pyvtk/_cuda.py asks by name.
#define PYVTK_ASKED extern "C" __attribute__((visibility("default")))

// The version of CUDA's runtime in this library, 13000 for 13.0.
PYVTK_ASKED int pyvtk_cuda_runtime() { return CUDART_VERSION; }

// 0, or CUDA's number for why this library has no code for the current device.
PYVTK_ASKED int pyvtk_cuda_code() {
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, pyvtk::cuda::probe_kernel);
  cudaGetLastError();  // told here, as in check()
  return status;
}

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) { m.impl("probe_", TORCH_BOX(&pyvtk::cuda::probe_)); }
