#include "cuda/score_and_select.cuh"

#include <cstring>
#include <memory>

#include "library.h"

using namespace pyvtk;

namespace {

// For a caller that has checked everything: reads integers and pointers one after another.
struct Arguments {
  const int64_t* next;

  template <class T>
  T take() {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(*next++);
    } else {
      return static_cast<T>(*next++);
    }
  }
};

}  // namespace

// The whole operator. dtype: 0 float32, 1 bfloat16, 2 float16; absent pointers are 0; the order is that of the structs.
// done: [7], how it was done: rows of a block, kept queries, columns, lse in memory, selected at once, lanes of a key,
// as a plain problem.
EXPORT int emulated_score_and_select(int dtype, float scale, const int64_t* all, int64_t* done) {
  Arguments a{all};
  ScoreProblem p{};
  p.q = a.take<const void*>();
  p.q_batch_stride = a.take<int64_t>();
  p.q_head_stride = a.take<int64_t>();
  p.q_row_stride = a.take<int64_t>();
  p.k = a.take<const void*>();
  p.k_batch_stride = a.take<int64_t>();
  p.k_head_stride = a.take<int64_t>();
  p.k_row_stride = a.take<int64_t>();
  p.batch = a.take<int64_t>();
  p.q_heads = a.take<int64_t>();
  p.kv_heads = a.take<int64_t>();
  p.queries = p.max_queries = a.take<int64_t>();
  p.keys = p.max_keys = a.take<int64_t>();
  p.dim = a.take<int64_t>();
  p.q_positions = a.take<const int32_t*>();
  p.k_positions = a.take<const int32_t*>();
  p.q_mask = a.take<const bool*>();
  p.k_mask = a.take<const bool*>();
  p.k_bias = a.take<const float*>();
  p.head_weights = a.take<const float*>();
  p.head_weights_stride = a.take<int64_t>();
  p.lse_given = a.take<const float*>();
  p.cu_seqlens_q = a.take<const int32_t*>();
  p.cu_seqlens_k = a.take<const int32_t*>();
  p.causal = a.take<bool>();
  p.key_start = a.take<int64_t>();
  p.key_stop = a.take<int64_t>();
  p.range_denominator = a.take<bool>();
  p.scale = scale;
  p.logit = a.take<bool>();
  p.reducers[0] = a.take<QueryReduce>();
  p.num_reducers = 1;
  p.head_reduce = a.take<HeadReduce>();
  p.heads_first = a.take<bool>();
  p.scores = a.take<float*>();

  SelectProblem select;
  select.rows = p.packed() ? p.batch : p.batch * p.out_heads();
  select.heads = p.out_heads();
  select.tokens = p.keys;
  select.head_stride = p.keys;
  select.batch_stride = p.out_heads() * p.keys;
  select.cu_seqlens = p.cu_seqlens_k;
  select.num_keep = a.take<int64_t>();
  select.num_keep_per_row.data = a.take<const int64_t*>();
  select.num_keep_per_row.per_row = a.take<int64_t>();
  select.threshold.data = a.take<const float*>();
  select.threshold.per_row = a.take<int64_t>();
  select.top_p.data = a.take<const double*>();
  select.top_p.per_row = a.take<int64_t>();
  for (PerToken<uint8_t>* mask : {&select.keep, &select.drop, &select.candidates}) {
    mask->data = a.take<const uint8_t*>();
    mask->rows_each = a.take<int64_t>();
  }
  select.keep_others = a.take<bool>();
  select.segments.data = a.take<const int32_t*>();
  select.segments.rows_each = a.take<int64_t>();
  select.num_segments = a.take<int64_t>();
  select.capacity = a.take<int64_t>();
  select.align_right = a.take<bool>();
  select.by_score = a.take<bool>();
  select.indices = a.take<int64_t*>();
  select.counts = a.take<int32_t*>();
  select.overflow = a.take<bool*>();

  cuda::ScoreAndSelectPlan plan;
  const cudaError_t status = cuda::plan_score_and_select(p, select, dtype == 0 ? 4 : 2, plan);
  if (status != cudaSuccess) return report(status);
  // What nobody wrote is NaN, and as a number of arrivals never the last.
  const std::unique_ptr<void, decltype(&std::free)> workspace(
      std::aligned_alloc(16, static_cast<size_t>(plan.workspace_bytes)), &std::free);
  std::memset(workspace.get(), 0xff, static_cast<size_t>(plan.workspace_bytes));
  cuda::set_workspace(plan, workspace.get());
  const int64_t facts[] = {plan.rows_of_block, plan.few.kept,         plan.columns, plan.separate_lse,
                           !plan.select_later, plan.few.lanes_of_key, plan.is_plain};
  std::copy(std::begin(facts), std::end(facts), done);
  return report(dtype == 0   ? cuda::score_and_select<float>(plan, nullptr)
                : dtype == 1 ? cuda::score_and_select<bfloat16>(plan, nullptr)
                             : cuda::score_and_select<float16>(plan, nullptr));
}
