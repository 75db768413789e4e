// Binding of select for CUDA tensors. Meaning: pyvtk/reference/select.py.
#include <optional>
#include <tuple>

#include "common/select_binding.h"
#include "cuda/select_long.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {

template cudaError_t select<float>(const SelectPlan&, cudaStream_t);  // for score_and_select.cu as well

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result run(const Tensor& scores, const SelectArguments& arguments) {
  guard_last_contiguous(scores, "scores");
  guard_same_device(scores, {&arguments.num_keep_per_row, &arguments.threshold, &arguments.top_p, &arguments.keep,
                             &arguments.drop, &arguments.candidates, &arguments.segments, &arguments.cu_seqlens});
  torch::stable::accelerator::DeviceGuard device(scores.get_device_index());
  SelectProblem problem;
  SelectResult result = make_select_problem(scores, shape_of(scores), arguments, problem);
  set_scores(scores, problem);
  SelectPlan plan = plan_select(problem);
  std::optional<Tensor> workspace;
  if (plan.workspace_bytes > 0) {
    workspace = new_empty(scores, {plan.workspace_bytes}, ScalarType::Byte);
    set_workspace(plan, workspace->mutable_data_ptr());
  }
  const ScalarType dtype = scores.scalar_type();
  const bool known =
      for_float_dtype(dtype, [&](auto zero) { check(select<decltype(zero)>(plan, current_stream(scores)), "select"); });
  PYVTK_GUARD(known, "scores have dtype number ", static_cast<int>(dtype), ", expected float32, bfloat16 or float16");
  return {std::move(result.indices), std::move(result.counts), std::move(result.overflow)};
}

Result select_operator(const Tensor& scores, int64_t num_keep, const OptionalTensor& num_keep_per_row,
                       const OptionalTensor& threshold, const OptionalTensor& top_p, const OptionalTensor& keep,
                       const OptionalTensor& drop, const OptionalTensor& candidates, bool keep_others,
                       const OptionalTensor& segments, int64_t num_segments, const OptionalTensor& cu_seqlens,
                       int64_t capacity, bool align_right, bool by_score) {
  return run(scores, {num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments,
                      num_segments, cu_seqlens, capacity, align_right, by_score});
}

Result select_top_operator(const Tensor& scores, int64_t num_keep) {
  SelectArguments arguments;
  arguments.num_keep = arguments.capacity = num_keep;
  return run(scores, arguments);
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("select", TORCH_BOX(&pyvtk::cuda::select_operator));
  m.impl("select_top", TORCH_BOX(&pyvtk::cuda::select_top_operator));
}
