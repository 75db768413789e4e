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

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) { m.impl("probe_", TORCH_BOX(&pyvtk::cuda::probe_)); }
