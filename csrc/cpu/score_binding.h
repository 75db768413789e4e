// attention_scores for CPU bindings: arguments whose values are in sight, outputs, and the kernel.
#pragma once
#include <algorithm>
#include <limits>
#include <tuple>

#include "common/score_binding.h"

namespace pyvtk::cpu {

// make_score_problem, and what only a look at values tells: that no query stands where masked keys are kept, that
// cu_seqlens ascend, and the longest sample.
template <class... Arguments>
ScoreProblem score_problem(const Arguments&... arguments) {
  ScoreProblem p = make_score_problem(arguments...);
  if (p.q_positions) {
    const int32_t* end = p.q_positions + (p.packed() ? p.queries : p.batch * p.queries);
    PYVTK_GUARD(std::find(p.q_positions, end, std::numeric_limits<int32_t>::max()) == end,
                "q_positions must be below int32's maximum, where masked keys are kept");
  }
  if (!p.packed()) return p;
  for (const auto& [cu, total, longest, name] : {std::tuple{p.cu_seqlens_q, p.queries, &p.max_queries, "cu_seqlens_q"},
                                                 std::tuple{p.cu_seqlens_k, p.keys, &p.max_keys, "cu_seqlens_k"}}) {
    bool ascending = cu[0] == 0 && cu[p.batch] == total;
    *longest = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      ascending &= cu[b] <= cu[b + 1];
      *longest = std::max<int64_t>(*longest, cu[b + 1] - cu[b]);
    }
    PYVTK_GUARD(ascending, name, " must ascend from 0 to ", total);
  }
  return p;
}

struct ScoreOutputs {
  Tensor scores, lse, divisors, query_winners, head_winners;
};

// Allocates what the problem writes and points it there.
inline ScoreOutputs score_outputs(const Tensor& like, ScoreProblem& p, bool return_lse) {
  const int64_t batch = p.packed() ? 1 : p.batch, columns = p.scored();
  const std::vector<int64_t> shape{p.num_reducers, batch, p.out_heads(), columns};
  ScoreOutputs out{new_empty(like, shape, ScalarType::Float),
                   // Logits need no denominator.
                   p.logit && !return_lse ? new_empty(like, {0}, ScalarType::Float)
                                          : new_empty(like, {batch, p.q_heads, p.queries}, ScalarType::Float),
                   new_empty(like, {p.num_reducers, batch, columns}, ScalarType::Float),
                   p.needs_max() ? new_empty(like, {batch, p.slots(), columns}, ScalarType::Int)
                                 : new_empty(like, {0}, ScalarType::Int),
                   p.head_max() ? new_empty(like, shape, ScalarType::Int) : new_empty(like, {0}, ScalarType::Int)};
  p.scores = mutable_data<float>(out.scores);
  p.lse = p.logit && !return_lse ? nullptr : mutable_data<float>(out.lse);
  p.divisors = mutable_data<float>(out.divisors);
  p.query_winners = p.needs_max() ? mutable_data<int32_t>(out.query_winners) : nullptr;
  p.head_winners = p.head_max() ? mutable_data<int32_t>(out.head_winners) : nullptr;
  return out;
}

// Runs the kernel on a problem whose outputs are set.
void run_score(const ScoreProblem& p, ScalarType dtype);

}  // namespace pyvtk::cpu
