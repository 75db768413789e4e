#include <cstring>
#include <memory>

#include "cuda/select_long.cuh"
#include "library.h"

using namespace pyvtk;

namespace {

// As the binding does it, with a workspace of exactly its size and full of ones.
template <class T>
cudaError_t select(cuda::SelectPlan plan) {
  const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
  const std::unique_ptr<void, decltype(&std::free)> workspace(std::malloc(bytes), &std::free);
  std::memset(workspace.get(), 0xff, bytes);
  cuda::set_workspace(plan, workspace.get());
  return cuda::select<T>(plan, nullptr);
}

}  // namespace

// dtype: 0 float32, 1 bfloat16, 2 float16. Absent pointers are null; rows_each: rows of scores that one row of a mask
// serves; per_row: 1 or num_segments. words_of_chunk: how rows are cut for three launches; 0: as it is usually decided
EXPORT int emulated_select(int dtype, const void* scores, int64_t rows, int64_t heads, int64_t tokens,
                           int64_t batch_stride, int64_t head_stride, const int32_t* cu_seqlens, int64_t num_keep,
                           const int64_t* num_keep_per_row, int64_t num_keep_count, const float* threshold,
                           int64_t threshold_count, const double* top_p, int64_t top_p_count, const uint8_t* keep,
                           int64_t keep_rows_each, const uint8_t* drop, int64_t drop_rows_each,
                           const uint8_t* candidates, int64_t candidates_rows_each, int keep_others,
                           const int32_t* segments, int64_t segments_rows_each, int64_t num_segments, int64_t capacity,
                           int align_right, int by_score, int64_t* indices, int32_t* counts, bool* overflow,
                           int64_t words_of_chunk, int threads) {
  SelectProblem problem;
  problem.scores = scores;
  problem.rows = rows;
  problem.heads = heads;
  problem.tokens = tokens;
  problem.batch_stride = batch_stride;
  problem.head_stride = head_stride;
  problem.cu_seqlens = cu_seqlens;
  problem.num_keep = num_keep;
  problem.num_keep_per_row = {num_keep_per_row, num_keep_count};
  problem.threshold = {threshold, threshold_count};
  problem.top_p = {top_p, top_p_count};
  problem.keep = {keep, keep_rows_each};
  problem.drop = {drop, drop_rows_each};
  problem.candidates = {candidates, candidates_rows_each};
  problem.keep_others = keep_others;
  problem.segments = {segments, segments_rows_each};
  problem.num_segments = num_segments;
  problem.capacity = capacity;
  problem.align_right = align_right;
  problem.by_score = by_score;
  problem.indices = indices;
  problem.counts = counts;
  problem.overflow = overflow;
  const cuda::SelectPlan plan =
      words_of_chunk > 0 ? cuda::plan_long_rows(problem, words_of_chunk, threads) : cuda::plan_select(problem);
  return report(dtype == 0 ? select<float>(plan) : dtype == 1 ? select<bfloat16>(plan) : select<float16>(plan));
}
