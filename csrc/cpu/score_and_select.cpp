// Binding of score_and_select: the kernels of score.h and select.h behind one operator.
#include <tuple>

#include "cpu/score_binding.h"
#include "cpu/select_binding.h"

namespace pyvtk::cpu {
namespace {

// A mask of select, [batch, keys], or [batch, heads, keys] if one of the given masks is: f(key, its place in k_mask,
// says) of every key, where says(mask) is what a given mask says of it.
template <class F>
Tensor combined(const ScoreProblem& p, const Tensor& like, int64_t heads,
                std::initializer_list<std::pair<const OptionalTensor*, const char*>> masks, F&& f) {
  const int64_t rows = p.packed() ? 1 : p.batch;
  bool per_head = false;
  for (const auto& [mask, name] : masks) per_head |= mask->has_value() && (*mask)->dim() == 3;
  const std::vector<int64_t> row_shape = p.packed() ? std::vector<int64_t>{p.keys} : std::vector<int64_t>{rows, p.keys};
  const std::vector<int64_t> head_shape{rows, heads, p.keys};
  for (const auto& [mask, name] : masks) {
    if (!mask->has_value()) continue;
    guard_dtype(**mask, ScalarType::Bool, name);
    guard_contiguous(**mask, name);
    const std::vector<int64_t>& shape = !p.packed() && (*mask)->dim() == 3 ? head_shape : row_shape;
    guard_dim(**mask, static_cast<int64_t>(shape.size()), name);
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      PYVTK_GUARD((*mask)->size(static_cast<int64_t>(dim)) == shape[dim], name, " must be shaped like the keys");
    }
  }
  Tensor out = new_empty(like, per_head ? head_shape : row_shape, ScalarType::Bool);
  bool* to = mutable_data<bool>(out);
  const int64_t repeats = per_head ? heads : 1;
  for (int64_t row = 0; row < rows * repeats; ++row) {
    for (int64_t key = 0; key < p.keys; ++key) {
      const int64_t of_sample = row / repeats * p.keys + key;
      const auto says = [&](const OptionalTensor& mask) {
        return data<bool>(*mask)[mask->dim() == 3 ? row * p.keys + key : of_sample];
      };
      to[row * p.keys + key] = f(key, of_sample, says);
    }
  }
  return out;
}

// Candidates that k_mask shows and that lie inside of the scored range; nothing if that is every key.
OptionalTensor competing(const ScoreProblem& p, const Tensor& like, const OptionalTensor& candidates, int64_t heads) {
  const bool whole = p.packed() || (p.key_start == 0 && p.key_stop == p.keys);
  if (!p.k_mask && whole) return candidates;
  return combined(p, like, heads, {{&candidates, "candidates"}}, [&](int64_t key, int64_t of_sample, auto&& says) {
    const bool inside = whole || (key >= p.key_start && key < p.key_stop);
    return inside && (!p.k_mask || p.k_mask[of_sample]) && (!candidates.has_value() || says(candidates));
  });
}

// What is dropped, and what k_mask hides and keep does not name. Where others go, the latter do anyway.
OptionalTensor dropped(const ScoreProblem& p, const Tensor& like, const OptionalTensor& keep,
                       const OptionalTensor& drop, bool keep_others, int64_t heads) {
  if (!p.k_mask || !keep_others) return drop;
  return combined(p, like, heads, {{&keep, "keep"}, {&drop, "drop"}}, [&](int64_t, int64_t of_sample, auto&& says) {
    return (!p.k_mask[of_sample] && !(keep.has_value() && says(keep))) || (drop.has_value() && says(drop));
  });
}

// Scores the problem and selects among them; `arguments` has what competing() and dropped() made.
std::tuple<Tensor, Tensor, Tensor, Tensor> run(ScoreProblem& p, const Tensor& q, const SelectArguments& arguments) {
  PYVTK_GUARD(p.num_reducers == 1, "score_and_select takes one query reduction, got ", p.num_reducers);
  PYVTK_GUARD(p.packed() == arguments.cu_seqlens.has_value(), "cu_seqlens goes with cu_seqlens_k");
  const bool per_head = p.head_reduce == HeadReduce::none || p.by_group();
  PYVTK_GUARD(!(p.packed() && per_head), "packed rows have no heads");
  const Tensor scores = only_scores(q, p);
  run_score(p, q.scalar_type());

  std::vector<int64_t> shape{p.batch, p.keys};
  if (per_head) shape = {p.batch, p.out_heads(), p.keys};
  if (p.packed()) shape = {p.keys};
  SelectProblem problem;
  const SelectResult result = prepare_select(q, shape, arguments, problem);
  // Keys outside of the range have no score; as -inf they rank behind all others that are forced.
  std::vector<float> whole;
  problem.scores = p.scores;
  if (!p.packed() && p.scored() != p.keys) {
    whole.assign(static_cast<size_t>(problem.rows * p.keys), -std::numeric_limits<float>::infinity());
    for (int64_t row = 0; row < problem.rows; ++row) {
      std::copy_n(p.scores + row * p.scored(), p.scored(), whole.data() + row * p.keys + p.key_start);
    }
    problem.scores = whole.data();
  }
  const double cost = 2.0 * static_cast<double>(p.max_keys);
  parallel_for(problem.rows, cost,
               [&](int64_t begin, int64_t end) { run_select(problem, ScalarType::Float, begin, end); });
  return {result.indices, result.counts, result.overflow, scores};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_and_select(
    Tensor q, Tensor k, OptionalTensor q_positions, OptionalTensor k_positions, OptionalTensor q_mask,
    OptionalTensor k_mask, OptionalTensor k_bias, OptionalTensor head_weights, OptionalTensor lse,
    OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, bool causal, int64_t key_start, int64_t key_stop,
    bool range_denominator, double scale, std::string query_reduce, std::string head_reduce, bool heads_first,
    bool logit, int64_t num_keep, OptionalTensor num_keep_per_row, OptionalTensor threshold, OptionalTensor top_p,
    OptionalTensor keep, OptionalTensor drop, OptionalTensor candidates, bool keep_others, OptionalTensor segments,
    int64_t num_segments, OptionalTensor cu_seqlens, int64_t capacity, bool align_right, bool by_score) {
  ScoreProblem p = score_problem(q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse,
                                 cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, scale,
                                 query_reduce, head_reduce, heads_first, logit);
  // The kernel points into these tensors, so they live as long as it runs.
  const SelectArguments arguments{num_keep,
                                  num_keep_per_row,
                                  threshold,
                                  top_p,
                                  keep,
                                  dropped(p, q, keep, drop, keep_others, p.out_heads()),
                                  competing(p, q, candidates, p.out_heads()),
                                  keep_others,
                                  segments,
                                  num_segments,
                                  cu_seqlens,
                                  capacity,
                                  align_right,
                                  by_score};
  return run(p, q, arguments);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> score_and_select_top(const Tensor& q, const Tensor& k, int64_t num_keep,
                                                                bool causal, double scale,
                                                                const std::string& query_reduce,
                                                                const std::string& head_reduce) {
  ScoreProblem p = plain_score_problem(q, k, causal, scale, query_reduce, head_reduce);
  SelectArguments arguments;
  arguments.num_keep = arguments.capacity = num_keep;
  return run(p, q, arguments);
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("score_and_select", TORCH_BOX(&pyvtk::cpu::score_and_select));
  m.impl("score_and_select_top", TORCH_BOX(&pyvtk::cpu::score_and_select_top));
}
