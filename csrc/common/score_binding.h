// From tensors to a ScoreProblem, for bindings of attention_scores and score_and_select on every device.
#pragma once
#include <string>

#include "binding.h"
#include "common/score_problem.h"

namespace pyvtk {

inline HeadReduce head_reduce_named(const std::string& name) {
  static constexpr std::pair<const char*, HeadReduce> kNames[] = {{"none", HeadReduce::none},
                                                                  {"mean", HeadReduce::mean},
                                                                  {"sum", HeadReduce::sum},
                                                                  {"max", HeadReduce::max},
                                                                  {"group_mean", HeadReduce::group_mean},
                                                                  {"group_sum", HeadReduce::group_sum},
                                                                  {"group_max", HeadReduce::group_max}};
  for (const auto& [known, reduce] : kNames) {
    if (name == known) return reduce;
  }
  PYVTK_GUARD(false, "unknown head_reduce ", name);
}

// "mean" or several joined by commas.
inline void set_reducers(ScoreProblem& p, const std::string& names) {
  static constexpr std::pair<const char*, QueryReduce> kNames[] = {{"mean", QueryReduce::mean},
                                                                   {"sum", QueryReduce::sum},
                                                                   {"max", QueryReduce::max},
                                                                   {"visible_mean", QueryReduce::visible_mean}};
  p.num_reducers = 0;
  for (size_t begin = 0; begin <= names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    const std::string name = names.substr(begin, end - begin);
    bool found = false;
    for (const auto& [known, reduce] : kNames) {
      if (name != known) continue;
      PYVTK_GUARD(p.num_reducers < kMaxReducers, "too many query reductions");
      p.reducers[p.num_reducers++] = reduce;
      found = true;
    }
    PYVTK_GUARD(found, "unknown query_reduce ", name);
    begin = end + 1;
  }
}

// Checks what raw pointers rely on and fills in the inputs; outputs stay null. Values of cu_seqlens are not looked at:
// they may be on a device. So max_queries and max_keys are those of all samples together if packed.
inline ScoreProblem make_score_problem(const Tensor& q, const Tensor& k, const OptionalTensor& q_positions,
                                       const OptionalTensor& k_positions, const OptionalTensor& q_mask,
                                       const OptionalTensor& k_mask, const OptionalTensor& k_bias,
                                       const OptionalTensor& head_weights, const OptionalTensor& lse,
                                       const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                       bool causal, int64_t key_start, int64_t key_stop, bool range_denominator,
                                       double scale, const std::string& query_reduce, const std::string& head_reduce,
                                       bool heads_first, bool logit) {
  const bool packed = cu_seqlens_q.has_value();
  PYVTK_GUARD(packed == cu_seqlens_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
  guard_dim(q, packed ? 3 : 4, "q");
  guard_dim(k, packed ? 3 : 4, "k");
  guard_last_contiguous(q, "q");
  guard_last_contiguous(k, "k");
  guard_dtype(k, q.scalar_type(), "k");
  PYVTK_GUARD(for_float_dtype(q.scalar_type(), [](auto) {}), "q must be float32, bfloat16 or float16");
  ScoreProblem p{};
  const int64_t head_dim = 1, row_dim = packed ? 0 : 2, last = q.dim() - 1;
  p.q = q.const_data_ptr();
  p.k = k.const_data_ptr();
  p.q_batch_stride = packed ? 0 : q.stride(0);
  p.k_batch_stride = packed ? 0 : k.stride(0);
  p.q_head_stride = q.stride(head_dim);
  p.k_head_stride = k.stride(head_dim);
  p.q_row_stride = q.stride(row_dim);
  p.k_row_stride = k.stride(row_dim);
  p.batch = packed ? cu_seqlens_q->numel() - 1 : q.size(0);
  p.q_heads = q.size(head_dim);
  p.kv_heads = k.size(head_dim);
  p.queries = q.size(row_dim);
  p.keys = k.size(row_dim);
  p.dim = q.size(last);
  PYVTK_GUARD(k.size(last) == p.dim, "q and k differ in their last dimension");
  PYVTK_GUARD(packed || k.size(0) == p.batch, "q and k differ in batch");
  PYVTK_GUARD(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, "heads of q must be a multiple of those of k");

  const int64_t rows = packed ? p.queries : p.batch * p.queries, columns = packed ? p.keys : p.batch * p.keys;
  const auto optional = [](const OptionalTensor& t, ScalarType dtype, int64_t size, const char* name) {
    if (!t.has_value()) return;
    guard_dtype(*t, dtype, name);
    guard_contiguous(*t, name);
    PYVTK_GUARD(t->numel() == size, name, " has ", t->numel(), " elements, expected ", size);
  };
  optional(q_positions, ScalarType::Int, rows, "q_positions");
  optional(k_positions, ScalarType::Int, columns, "k_positions");
  optional(q_mask, ScalarType::Bool, rows, "q_mask");
  optional(k_mask, ScalarType::Bool, columns, "k_mask");
  optional(k_bias, ScalarType::Float, columns, "k_bias");
  optional(lse, ScalarType::Float, rows * p.q_heads, "lse");
  p.q_positions = data<int32_t>(q_positions);
  p.k_positions = data<int32_t>(k_positions);
  p.q_mask = data<bool>(q_mask);
  p.k_mask = data<bool>(k_mask);
  p.k_bias = data<float>(k_bias);
  p.lse_given = data<float>(lse);
  if (head_weights.has_value()) {
    const int64_t samples = head_weights->dim() == 2 ? p.batch : 1;
    optional(head_weights, ScalarType::Float, samples * p.q_heads, "head_weights");
    p.head_weights = data<float>(head_weights);
    p.head_weights_stride = head_weights->dim() == 2 ? p.q_heads : 0;
  }
  if (packed) {
    optional(cu_seqlens_q, ScalarType::Int, p.batch + 1, "cu_seqlens_q");
    optional(cu_seqlens_k, ScalarType::Int, p.batch + 1, "cu_seqlens_k");
    p.cu_seqlens_q = data<int32_t>(cu_seqlens_q);
    p.cu_seqlens_k = data<int32_t>(cu_seqlens_k);
  }
  p.max_queries = p.queries;
  p.max_keys = p.keys;
  PYVTK_GUARD(packed || (0 <= key_start && key_start <= key_stop && key_stop <= p.keys), "key range ", key_start, "..",
              key_stop, " does not lie in 0..", p.keys);
  p.causal = causal;
  p.key_start = key_start;
  p.key_stop = key_stop;
  p.range_denominator = range_denominator;
  p.scale = static_cast<float>(scale);
  p.logit = logit;
  set_reducers(p, query_reduce);
  p.head_reduce = head_reduce_named(head_reduce);
  p.heads_first = heads_first;
  return p;
}

// Allocates the scores and points the problem there, for callers that want nothing else.
inline Tensor only_scores(const Tensor& like, ScoreProblem& p) {
  const Tensor scores =
      new_empty(like, {p.num_reducers, p.packed() ? 1 : p.batch, p.out_heads(), p.scored()}, ScalarType::Float);
  p.scores = mutable_data<float>(scores);
  return scores;
}

// Inputs of the usual call: every query and key exists and competes, in the order of the sequence.
inline ScoreProblem plain_score_problem(const Tensor& q, const Tensor& k, bool causal, double scale,
                                        const std::string& query_reduce, const std::string& head_reduce) {
  const OptionalTensor none;
  return make_score_problem(q, k, none, none, none, none, none, none, none, none, none, causal, 0, k.size(2), false,
                            scale, query_reduce, head_reduce, false, false);
}

}  // namespace pyvtk
