// Binding of score_and_select for CUDA tensors, for few queries. Meaning: pyvtk/reference/score_and_select.py.
#include <tuple>

#include "common/score_binding.h"
#include "common/select_binding.h"
#include "cuda/score_and_select.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {

extern template cudaError_t select<float>(const SelectPlan&, cudaStream_t);  // in select.cu: its kernels are large

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Scores the problem and selects among its keys; candidates need not know of k_mask and of the range.
Result run(ScoreProblem& p, const Tensor& q, const SelectArguments& arguments) {
  PYVTK_GUARD(p.num_reducers == 1, "score_and_select takes one query reduction, got ", p.num_reducers);
  PYVTK_GUARD(p.packed() == arguments.cu_seqlens.has_value(), "cu_seqlens goes with cu_seqlens_k");
  PYVTK_GUARD(p.max_queries <= kFewQueries, "score_and_select takes at most ", kFewQueries,
              " queries on CUDA (of all samples together if packed), got ", p.max_queries);
  PYVTK_GUARD(p.dim >= 8 && p.dim <= 256 && p.dim % 8 == 0, "q has head dimension ", p.dim,
              ", expected a multiple of 8 up to 256");
  PYVTK_GUARD(p.q_heads > 0, "q must have heads");
  const bool per_head = p.head_reduce == HeadReduce::none || p.by_group();
  PYVTK_GUARD(!(p.packed() && per_head), "packed rows have no heads");
  const Tensor scores = only_scores(q, p);

  std::vector<int64_t> shape{p.batch, p.keys};
  if (per_head) shape = {p.batch, p.out_heads(), p.keys};
  if (p.packed()) shape = {p.keys};
  SelectProblem select;
  SelectResult result = make_select_problem(q, shape, arguments, select);
  // The samples of the selection are those of the scores.
  if (p.packed()) PYVTK_GUARD(select.rows == p.batch, "cu_seqlens and cu_seqlens_k differ in length");

  ScoreAndSelectPlan plan;
  check(plan_score_and_select(p, select, static_cast<int64_t>(q.element_size()), plan), "score_and_select");
  const Tensor workspace = new_empty(q, {plan.workspace_bytes}, ScalarType::Byte);
  set_workspace(plan, workspace.mutable_data_ptr());
  for_float_dtype(q.scalar_type(), [&](auto zero) {
    check(score_and_select<decltype(zero)>(plan, current_stream(q)), "score_and_select");
  });
  return {std::move(result.indices), std::move(result.counts), std::move(result.overflow), scores};
}

Result score_and_select_operator(
    const Tensor& q, const Tensor& k, const OptionalTensor& q_positions, const OptionalTensor& k_positions,
    const OptionalTensor& q_mask, const OptionalTensor& k_mask, const OptionalTensor& k_bias,
    const OptionalTensor& head_weights, const OptionalTensor& lse, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, bool causal, int64_t key_start, int64_t key_stop, bool range_denominator,
    double scale, const std::string& query_reduce, const std::string& head_reduce, bool heads_first, bool logit,
    int64_t num_keep, const OptionalTensor& num_keep_per_row, const OptionalTensor& threshold,
    const OptionalTensor& top_p, const OptionalTensor& keep, const OptionalTensor& drop,
    const OptionalTensor& candidates, bool keep_others, const OptionalTensor& segments, int64_t num_segments,
    const OptionalTensor& cu_seqlens, int64_t capacity, bool align_right, bool by_score) {
  const OptionalTensor keys(k);
  guard_same_device(
      q, {&keys, &q_positions, &k_positions, &q_mask, &k_mask, &k_bias, &head_weights, &lse, &cu_seqlens_q,
          &cu_seqlens_k, &num_keep_per_row, &threshold, &top_p, &keep, &drop, &candidates, &segments, &cu_seqlens});
  torch::stable::accelerator::DeviceGuard device(q.get_device_index());
  ScoreProblem p = make_score_problem(q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse,
                                      cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, scale,
                                      query_reduce, head_reduce, heads_first, logit);
  return run(p, q,
             {num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments, num_segments,
              cu_seqlens, capacity, align_right, by_score});
}

Result score_and_select_top_operator(const Tensor& q, const Tensor& k, int64_t num_keep, bool causal, double scale,
                                     const std::string& query_reduce, const std::string& head_reduce) {
  const OptionalTensor keys(k);
  guard_same_device(q, {&keys});
  torch::stable::accelerator::DeviceGuard device(q.get_device_index());
  ScoreProblem p = plain_score_problem(q, k, causal, scale, query_reduce, head_reduce);
  SelectArguments arguments;
  arguments.num_keep = arguments.capacity = num_keep;
  return run(p, q, arguments);
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("score_and_select", TORCH_BOX(&pyvtk::cuda::score_and_select_operator));
  m.impl("score_and_select_top", TORCH_BOX(&pyvtk::cuda::score_and_select_top_operator));
}
