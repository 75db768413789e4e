// One attention_scores call on raw pointers: what kernels compute and where they write. Torch-free; one definition for
// all devices and instruction sets.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/types.h"

namespace pyvtk {

enum class QueryReduce { mean, sum, max, visible_mean };
enum class HeadReduce { none, mean, sum, max, group_mean, group_sum, group_max };

inline constexpr int kMaxReducers = 4;

struct ScoreProblem {
  // inputs; strides in elements, the last dimension is contiguous
  const void* q;  // [batch, q_heads, queries, dim], packed [total_q, q_heads, dim]
  int64_t q_batch_stride, q_head_stride, q_row_stride;
  const void* k;  // [batch, kv_heads, keys, dim], packed [total_k, kv_heads, dim]
  int64_t k_batch_stride, k_head_stride, k_row_stride;
  int64_t batch, q_heads, kv_heads, queries, keys, dim;  // queries and keys: of all samples together if packed
  int64_t max_queries, max_keys;                         // of one sample, or a bound on it

  // All contiguous and optional (nullptr). Positions leave int32's extremes free: some kernels keep a masked key as one
  // at the largest, where no query is. pyvtk/ops/score.py brings those of a caller there.
  const int32_t* q_positions;   // [batch, queries], packed [total_q]
  const int32_t* k_positions;   // [batch, keys], packed [total_k]
  const bool* q_mask;           // as q_positions
  const bool* k_mask;           // as k_positions
  const float* k_bias;          // as k_positions
  const float* head_weights;    // [q_heads] or [batch, q_heads]
  int64_t head_weights_stride;  // 0 or q_heads
  const float* lse_given;       // [batch, q_heads, queries], packed [q_heads, total_q]
  const int32_t* cu_seqlens_q;  // [batch + 1]
  const int32_t* cu_seqlens_k;  // [batch + 1]

  bool causal;
  int64_t key_start, key_stop;  // scored keys of a sample that is not packed
  bool range_denominator;       // softmax over the scored keys only
  float scale;
  bool logit;  // score scaled logits, not probabilities
  QueryReduce reducers[kMaxReducers];
  int num_reducers;
  HeadReduce head_reduce;
  bool heads_first;

  // outputs, contiguous
  float* scores;           // [reducers, batch, out_heads, scored], packed [reducers, out_heads, total_k]
  float* divisors;         // [reducers, batch, scored], packed [reducers, total_k]: what each sum was divided by,
                           // or nullptr
  float* lse;              // as lse_given, or nullptr
  int32_t* query_winners;  // [batch, slots, scored]: the query that won a max, or nullptr
  int32_t* head_winners;   // as scores: the head that won a max over heads, or nullptr

  int64_t group() const { return q_heads / kv_heads; }
  bool packed() const { return cu_seqlens_q != nullptr; }
  int64_t scored() const { return packed() ? keys : key_stop - key_start; }

  // Scored keys of the longest sample.
  int64_t max_scored() const { return packed() ? max_keys : scored(); }

  bool has(QueryReduce reduce) const {
    return std::find(reducers, reducers + num_reducers, reduce) != reducers + num_reducers;
  }
  bool needs_max() const { return has(QueryReduce::max); }
  bool needs_sum() const { return num_reducers > (needs_max() ? 1 : 0); }
  bool by_group() const { return head_reduce >= HeadReduce::group_mean; }
  bool head_max() const { return head_reduce == HeadReduce::max || head_reduce == HeadReduce::group_max; }
  bool head_mean() const { return head_reduce == HeadReduce::mean || head_reduce == HeadReduce::group_mean; }

  // Heads of the result.
  int64_t out_heads() const { return head_reduce == HeadReduce::none ? q_heads : (by_group() ? kv_heads : 1); }
  // Heads that are reduced into one of the result.
  int64_t heads_per_out() const { return q_heads / out_heads(); }

  // The order of reductions matters: then heads are reduced for every pair of query and key.
  bool pairwise() const { return heads_first && head_reduce != HeadReduce::none && (needs_max() || head_max()); }
  // Sums over heads may be taken before those over queries are finished.
  bool merges_heads() const { return head_reduce != HeadReduce::none && !head_max() && !needs_max(); }
  // Column statistics that are kept apart while queries are walked: per head, per group, or per head of the result.
  int64_t slots() const { return pairwise() ? out_heads() : (merges_heads() ? kv_heads : q_heads); }
};

// How the work of a problem is cut, for its caller.
struct ScorePlanSizes {
  int64_t items;
  double item_cost;  // nanoseconds, roughly
  int64_t finish_columns;
};

// Where one sample lies.
struct ScoreSample {
  int64_t q_offset, k_offset;  // elements of q and k before it
  int64_t queries, keys;
  int64_t row_offset, column_offset;        // entries of per-query and per-key arrays before it
  int64_t key_start, key_stop;              // scored keys
  int64_t lse_offset, lse_head_stride;      // into lse
  int64_t score_offset, score_head_stride;  // into a reducer's plane of scores, per head of the result
  int64_t slot_offset, slot_stride;         // into query_winners
  int64_t divisor_offset;                   // into a reducer's plane of divisors

  int64_t scored() const { return key_stop - key_start; }
};

inline ScoreSample score_sample(const ScoreProblem& p, int64_t b) {
  ScoreSample s;
  if (p.packed()) {
    s.row_offset = p.cu_seqlens_q[b];
    s.column_offset = p.cu_seqlens_k[b];
    s.queries = p.cu_seqlens_q[b + 1] - s.row_offset;
    s.keys = p.cu_seqlens_k[b + 1] - s.column_offset;
    s.q_offset = s.row_offset * p.q_row_stride;
    s.k_offset = s.column_offset * p.k_row_stride;
    s.key_start = 0;
    s.key_stop = s.keys;
    s.lse_offset = s.row_offset;
    s.lse_head_stride = p.queries;
    s.score_offset = s.slot_offset = s.divisor_offset = s.column_offset;
    s.score_head_stride = s.slot_stride = p.keys;
  } else {
    s.row_offset = b * p.queries;
    s.column_offset = b * p.keys;
    s.queries = p.queries;
    s.keys = p.keys;
    s.q_offset = b * p.q_batch_stride;
    s.k_offset = b * p.k_batch_stride;
    s.key_start = p.key_start;
    s.key_stop = p.key_stop;
    s.lse_offset = b * p.q_heads * p.queries;
    s.lse_head_stride = p.queries;
    s.score_offset = b * p.out_heads() * p.scored();
    s.slot_offset = b * p.slots() * p.scored();
    s.divisor_offset = b * p.scored();
    s.score_head_stride = s.slot_stride = p.scored();
  }
  return s;
}

// Gradients of one attention_scores call; the forward problem describes inputs, lse and visibility.
struct ScoreGradient {
  const float* linear;       // [batch, q_heads, scored], packed [q_heads, total_k]: dL/d(sum over queries of a head)
  const float* max;          // the same for the max over queries, or nullptr
  const int32_t* max_query;  // the query that won it
  const float* lse;          // dL/d(lse output), as lse, or nullptr
  // Key/value heads among which a maximum was taken for every pair of query and key; `linear` is then the gradient of
  // that maximum, the same for all of them. 0: none was.
  int64_t pair_max_heads;
  float* q;             // [batch, q_heads, queries, dim], packed [total_q, q_heads, dim]
  float* k;             // like q for keys, kv_heads
  float* k_bias;        // as ScoreProblem::k_bias, or nullptr
  float* lse_given;     // as lse, or nullptr
  float* head_weights;  // [batch, q_heads], or nullptr
};

}  // namespace pyvtk
