#define PYVTK_KERNEL_HEADER "cpu/score_backward.h"  // and score.h, which it includes
#include "cpu/each_isa.h"
#include "cpu/score_binding.h"

namespace pyvtk::cpu {

void run_score(const ScoreProblem& p, ScalarType dtype) {
  for_float_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const auto workspace = std::make_unique_for_overwrite<float[]>(PYVTK_FOR_ISA(score_workspace)(p));
    const ScorePlanSizes plan = PYVTK_FOR_ISA(score_plan_sizes)(p);
    const auto items = PYVTK_FOR_ISA(score_items<T>);
    parallel_for(plan.items, plan.item_cost,
                 [&](int64_t begin, int64_t end) { items(p, workspace.get(), begin, end); });
    const auto finish = PYVTK_FOR_ISA(score_finish);
    const int64_t runs = ceil_div(p.max_scored(), plan.finish_columns);
    const double cost = 0.5 * static_cast<double>(plan.finish_columns * p.q_heads * p.num_reducers);
    parallel_for(p.batch * runs, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(p, workspace.get(), i / runs, i % runs * plan.finish_columns);
    });
  });
}

namespace {

using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Result attention_scores(Tensor q, Tensor k, OptionalTensor q_positions, OptionalTensor k_positions,
                        OptionalTensor q_mask, OptionalTensor k_mask, OptionalTensor k_bias,
                        OptionalTensor head_weights, OptionalTensor lse, OptionalTensor cu_seqlens_q,
                        OptionalTensor cu_seqlens_k, bool causal, int64_t key_start, int64_t key_stop,
                        bool range_denominator, double scale, std::string query_reduce, std::string head_reduce,
                        bool heads_first, bool logit, bool return_lse) {
  ScoreProblem p = score_problem(q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse,
                                 cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, scale,
                                 query_reduce, head_reduce, heads_first, logit);
  const ScoreOutputs out = score_outputs(q, p, return_lse);
  run_score(p, q.scalar_type());
  return {out.scores, out.lse, out.divisors, out.query_winners, out.head_winners};
}

Tensor attention_scores_plain(const Tensor& q, const Tensor& k, bool causal, double scale,
                              const std::string& query_reduce, const std::string& head_reduce) {
  ScoreProblem p = plain_score_problem(q, k, causal, scale, query_reduce, head_reduce);
  Tensor scores = only_scores(q, p);
  run_score(p, q.scalar_type());
  return scores;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients attention_scores_backward(Tensor grad_linear, OptionalTensor grad_max, OptionalTensor max_query,
                                    OptionalTensor grad_lse, Tensor lse, Tensor q, Tensor k, OptionalTensor q_positions,
                                    OptionalTensor k_positions, OptionalTensor q_mask, OptionalTensor k_mask,
                                    OptionalTensor k_bias, OptionalTensor head_weights, OptionalTensor cu_seqlens_q,
                                    OptionalTensor cu_seqlens_k, bool causal, int64_t key_start, int64_t key_stop,
                                    bool range_denominator, bool lse_given, double scale, bool logit,
                                    int64_t pair_max_heads) {
  // The saved lse takes the place of the given one; which of them it is only decides where its gradient goes.
  ScoreProblem p = score_problem(q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights,
                                 lse_given ? OptionalTensor(lse) : std::nullopt, cu_seqlens_q, cu_seqlens_k, causal,
                                 key_start, key_stop, range_denominator, scale, "sum", "none", false, logit);
  const int64_t rows = p.packed() ? p.queries : p.batch * p.queries;
  guard_dtype(lse, ScalarType::Float, "lse");
  guard_contiguous(lse, "lse");
  PYVTK_GUARD(lse.numel() == p.q_heads * rows || (logit && lse.numel() == 0), "lse has the wrong size");
  p.lse = lse.numel() || !logit ? mutable_data<float>(lse) : nullptr;

  const int64_t columns = p.q_heads * (p.packed() ? p.keys : p.batch * p.scored());
  const auto guard_columns = [&](const Tensor& t, ScalarType dtype, int64_t size, const char* name) {
    guard_dtype(t, dtype, name);
    guard_contiguous(t, name);
    PYVTK_GUARD(t.numel() == size, name, " has ", t.numel(), " elements, expected ", size);
  };
  ScoreGradient g{};
  PYVTK_GUARD(pair_max_heads == 0 || p.kv_heads % pair_max_heads == 0, "pair_max_heads must divide the heads of k");
  g.pair_max_heads = pair_max_heads;
  guard_columns(grad_linear, ScalarType::Float, columns, "grad_linear");
  g.linear = data<float>(grad_linear);
  if (grad_max.has_value()) {
    PYVTK_GUARD(max_query.has_value(), "grad_max needs max_query");
    guard_columns(*grad_max, ScalarType::Float, columns, "grad_max");
    guard_columns(*max_query, ScalarType::Int, columns, "max_query");
    g.max = data<float>(*grad_max);
    g.max_query = data<int32_t>(*max_query);
  }
  if (grad_lse.has_value()) {
    guard_columns(*grad_lse, ScalarType::Float, p.q_heads * rows, "grad_lse");
    g.lse = data<float>(*grad_lse);
  }
  std::vector<int64_t> q_shape(q.sizes().begin(), q.sizes().end()), k_shape(k.sizes().begin(), k.sizes().end());
  Tensor grad_q = new_empty(q, q_shape, ScalarType::Float), grad_k = new_empty(q, k_shape, ScalarType::Float);
  const int64_t key_count = p.packed() ? p.keys : p.batch * p.keys;
  Tensor grad_bias = new_empty(q, {k_bias.has_value() ? key_count : 0}, ScalarType::Float);
  Tensor grad_lse_given = new_empty(q, {lse_given ? p.q_heads * rows : 0}, ScalarType::Float);
  Tensor grad_weights = new_empty(q, {p.batch, p.q_heads}, ScalarType::Float);
  g.q = mutable_data<float>(grad_q);
  g.k = mutable_data<float>(grad_k);
  g.k_bias = k_bias.has_value() ? mutable_data<float>(grad_bias) : nullptr;
  g.lse_given = lse_given ? mutable_data<float>(grad_lse_given) : nullptr;
  float* weights = mutable_data<float>(grad_weights);
  std::fill_n(weights, p.batch * p.q_heads, 0.0f);

  for_float_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const int64_t items = PYVTK_FOR_ISA(score_backward_items)(p, g);
    const int64_t chunks = PYVTK_FOR_ISA(score_backward_chunks)(p), parts = p.batch * p.kv_heads * chunks;
    const int64_t pitch = PYVTK_FOR_ISA(score_backward_pitch)(p);
    const auto partial = std::make_unique_for_overwrite<float[]>(parts * pitch);
    std::vector<float> weight_partial(parts * p.group());
    const auto item = PYVTK_FOR_ISA(score_backward_item<T>);
    const double cost = 5 * PYVTK_FOR_ISA(score_plan_sizes)(p).item_cost;
    parallel_for(items, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) item(p, g, partial.get(), weight_partial.data(), i);
    });
    const auto finish = PYVTK_FOR_ISA(score_backward_finish);
    parallel_for(p.batch * p.max_keys, static_cast<double>(p.kv_heads * p.dim), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) finish(p, g, partial.get(), i / p.max_keys, i % p.max_keys);
    });
    for (int64_t i = 0; i < parts; ++i) {
      for (int64_t head = 0; head < p.group(); ++head) {
        weights[i / chunks * p.group() + head] += weight_partial[i * p.group() + head];
      }
    }
  });
  return {grad_q, grad_k, grad_bias, grad_lse_given, grad_weights};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("attention_scores", TORCH_BOX(&pyvtk::cpu::attention_scores));
  m.impl("attention_scores_plain", TORCH_BOX(&pyvtk::cpu::attention_scores_plain));
  m.impl("attention_scores_backward", TORCH_BOX(&pyvtk::cpu::attention_scores_backward));
}
