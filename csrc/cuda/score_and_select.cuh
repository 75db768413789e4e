// score_and_select for few queries (64 at most). pyvtk/reference/score.py and select.py are the definitions.
//
//   score_plain_kernel, score_plain_finish_kernel   the usual call, one query that sees all keys: score_plain.cuh
//
//   score_rows_kernel    reads q and k: logits, or what a softmax needs to know of them      (score_few.cuh)
//   score_lse_kernel     denominators, where there are too many rows for what follows to make them on the side
//   score_columns_kernel reads k again for samples that keep no logits
//   score_finish_kernel  a block per (run of keys, unit): softmax, reductions, scores
//   select               chooses the tokens that stay                     (select_short.cuh, select.cuh,
//   select_long.cuh)
//
// Launches follow each other early (launch_early): a call of some microseconds is mostly their beginnings.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/score_problem.h"
#include "common/select_problem.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/score_few.cuh"
#include "cuda/score_plain.cuh"
#include "cuda/select.cuh"
#include "cuda/select_long.cuh"
#include "cuda/workspace.cuh"

namespace pyvtk::cuda {

inline constexpr int kKeysOfThread = 4;
inline constexpr int kKeysOfGroup = 32 * kKeysOfThread;  // that a warp has, and others with it
inline constexpr int kRowsAhead = 4;                     // logits of so many rows are read before they are used
inline constexpr int64_t kStatisticsAtOnce = 2048;       // of a unit, that each of its blocks puts together by itself
inline constexpr int64_t kWantedBlocks = 1024;           // some for each multiprocessor of the largest devices
inline constexpr int64_t kMostRuns = 64;                 // of a sample: its statistics are read more than once

// What score_finish_kernel has to do.
struct FinishProblem {
  KeyRuns runs;        // of all keys, also those that are not scored
  int splits;          // warps that share keys, each with other heads (or queries): 1, 2, 4 or 8
  float* whole;        // [rows, keys] as select's scores: -inf outside of the scored range; nullptr: not needed
  uint8_t* competing;  // [rows, keys] as select's candidates: those that k_mask shows, inside of the range; or nullptr
  uint8_t* dropped;    // [rows, keys] as select's drop: given ones, and those that k_mask hides and keep does not name;
                       // or nullptr: what is no candidate goes anyway
  PerToken<uint8_t> candidates, keep, drop;  // given
};

// One of some registers, by a number that the compiler does not know: a loop over them need not be unrolled.
template <class T>
__device__ __forceinline__ T pick(const T (&of)[4], int i) {
  return i < 2 ? (i == 0 ? of[0] : of[1]) : (i == 2 ? of[2] : of[3]);
}

// A thread's keys: number, a bit for each that is scored, and for each of those that k_mask shows; who sees them.
struct FinishKeys {
  int first;  // the next is 32 further
  unsigned scored;
  unsigned there;
  int position[kKeysOfThread];
  int seen_by[kKeysOfThread];

  __device__ __forceinline__ int key(int i) const { return first + 32 * i; }
  __device__ __forceinline__ bool is_scored(int i) const { return scored >> i & 1; }
  __device__ __forceinline__ bool is_there(int i) const { return there >> i & 1; }
  __device__ __forceinline__ bool sees(int64_t reach, int i) const { return is_there(i) && position[i] <= reach; }
};

// Block: (run of keys, unit).
static __global__ void __launch_bounds__(kFewThreads, 2)
    score_finish_kernel(const FewProblem few, const FinishProblem finish) {
  PYVTK_SHARED(reaches, int64_t[kFewQueries]);
  PYVTK_SHARED(parts, float[kFewWarps][kKeysOfGroup]);
  await_previous_launch();
  let_next_launch_start();
  const ScoreProblem& p = few.score;
  const int thread = static_cast<int>(threadIdx.x);
  const int unit = static_cast<int>(blockIdx.x % static_cast<unsigned>(few.units));
  const int64_t run = blockIdx.x / static_cast<unsigned>(few.units);
  const int64_t number = sample_of_run(few, finish.runs, run);
  if (number < 0) return;
  const FewSample s = few_sample(few, number);
  const int64_t place = run - first_run_of(few, finish.runs, s);
  const int heads = static_cast<int>(p.q_heads) / few.units, first_head = unit * heads;
  const bool keeps = s.queries <= few.kept;

  float* const lses = dynamic_shared<float>();  // [heads, queries], if logits are kept and no lse is in memory
  const float* lse_in_memory = p.lse_given ? p.lse_given : few.lse;
  const bool makes_lses = keeps && !p.logit && !lse_in_memory;
  if (makes_lses) {
    lse_of_rows(few, s, first_head, 0, heads * s.queries, [&](int row, float lse) { lses[row] = lse; });
  }
  for (int query = thread; query < s.queries; query += kFewThreads) reaches[query] = reach_of(p, s, query);
  __syncthreads();

  const int group = warp_of_block() / finish.splits, split = warp_of_block() % finish.splits;
  FinishKeys mine{};
  mine.first = static_cast<int>(place) * finish.runs.keys + group * kKeysOfGroup + lane_of_warp();
  PYVTK_UNROLL
  for (int i = 0; i < kKeysOfThread; ++i) {
    const int key = mine.key(i);
    const bool is_scored = key >= s.key_start && key < s.key_stop, is_there = is_scored && exists(p, s, key);
    mine.scored |= static_cast<unsigned>(is_scored) << i;
    mine.there |= static_cast<unsigned>(is_there) << i;
    mine.position[i] = is_there ? position_of(p, s, key) : 0;
  }
  int valid = 0;
  PYVTK_NOT_UNROLLED
  for (int query = 0; query < s.queries; ++query) {
    const int64_t reach = reaches[query];
    valid += reach != kSeesNothing;
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfThread; ++i) mine.seen_by[i] += mine.sees(reach, i);
  }

  // What is known of a key once queries are reduced.
  const auto divided = [&](float x, int i) {
    const int seen_by = pick(mine.seen_by, i);
    if (few.query_max) return seen_by > 0 ? x : 0.0f;
    if (few.mean) return x / static_cast<float>(max(valid, 1));
    return few.visible_mean ? x / static_cast<float>(max(seen_by, 1)) : x;
  };
  const int64_t scored = p.key_stop - p.key_start;
  // Of the unit's first score: where it stands, and its row as select counts them.
  const int64_t first_row = p.cu_seqlens_k ? number : (number * few.units + unit) * few.outs_of_unit;
  const int64_t first_score = plane_of(p, s, int64_t{few.units} * few.outs_of_unit, unit * few.outs_of_unit);
  const int64_t first_of_row = p.cu_seqlens_k ? s.column : first_row * p.keys;
  // What a mask says of a key, in the row of one of the unit's results.
  const auto says = [&](const PerToken<uint8_t>& mask, int out, int key) {
    const int64_t row = (static_cast<unsigned>(first_row) + out) / static_cast<unsigned>(mask.rows_each);
    return mask.data[(p.cu_seqlens_k ? s.column : row * p.keys) + key] != 0;
  };
  const auto write = [&](int out, float x, int i) {
    if (mine.key(i) >= s.keys) return;
    if (p.logit && pick(mine.seen_by, i) == 0) x = -kInfinity;
    if (mine.is_scored(i)) p.scores[first_score + out * scored + mine.key(i) - s.key_start] = x;
    const int64_t at = first_of_row + out * p.keys + mine.key(i);
    if (finish.whole) finish.whole[at] = mine.is_scored(i) ? x : -kInfinity;
    if (finish.competing) {
      finish.competing[at] = mine.is_there(i) && (!finish.candidates.data || says(finish.candidates, out, mine.key(i)));
    }
    if (finish.dropped) {
      const bool hidden = !exists(p, s, mine.key(i)) && !(finish.keep.data && says(finish.keep, out, mine.key(i)));
      finish.dropped[at] = hidden || (finish.drop.data && says(finish.drop, out, mine.key(i)));
    }
  };

  // Two nested reductions: queries of each head, then heads; or, if the order of the two matters and is the other one,
  // heads of each query, then queries. The outer one is shared among warps. Columns have the inner one behind them.
  const bool inner_max = few.pairwise ? few.head_max : few.query_max;
  const bool outer_max = few.pairwise ? few.query_max : few.head_max;
  const int inner = !keeps ? 1 : few.pairwise ? heads : s.queries;
  const int outer = keeps ? (few.pairwise ? s.queries : heads) : few.columns_of_unit;
  const int rows = inner * max((outer - split + finish.splits - 1) / finish.splits, 0);
  float of_inner[kKeysOfThread], of_outer[kKeysOfThread];
  PYVTK_UNROLL
  for (int i = 0; i < kKeysOfThread; ++i) {
    of_inner[i] = nothing(inner_max);
    of_outer[i] = nothing(outer_max);
  }
  // An empty inner reduction is one all the same.
  if (inner == 0 && few.outs_of_unit > 1) {
    for (int out = split; out < outer; out += finish.splits) {
      PYVTK_NOT_UNROLLED
      for (int i = 0; i < kKeysOfThread; ++i) write(out, 0.0f, i);
    }
  }
  for (int first = 0; first < rows; first += kRowsAhead) {
    float z[kRowsAhead][kKeysOfThread];
    PYVTK_UNROLL
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      const int row = min(first + ahead, rows - 1), o = split + row / inner * finish.splits, j = row % inner;
      const int64_t plane = !keeps ? plane_of(p, s, few.units * few.columns_of_unit, unit * few.columns_of_unit + o)
                                   : kept_plane(few, s, first_head + (few.pairwise ? j : o), few.pairwise ? o : j);
      const float* from = (keeps ? few.logits : few.columns) + plane - s.key_start;
      PYVTK_UNROLL
      for (int i = 0; i < kKeysOfThread; ++i) z[ahead][i] = mine.is_scored(i) ? from[mine.key(i)] : 0.0f;
    }
    static_assert(kRowsAhead == 4 && kKeysOfThread == 4);
    PYVTK_NOT_UNROLLED
    for (int ahead = 0; ahead < kRowsAhead; ++ahead) {
      if (first + ahead >= rows) break;
      const int row = first + ahead, o = split + row / inner * finish.splits, j = row % inner;
      const int head = few.pairwise ? j : o, query = few.pairwise ? o : j;
      const int64_t reach = keeps ? reaches[query] : kSeesNothing;
      float now[kKeysOfThread];
      PYVTK_UNROLL
      for (int i = 0; i < kKeysOfThread; ++i) {
        const float of_rows[4] = {z[0][i], z[1][i], z[2][i], z[3][i]};
        now[i] = pick(of_rows, ahead);
      }
      if (keeps) {
        const float weight = weight_of(p, s, first_head + head);
        const float lse = p.logit      ? 0.0f
                          : makes_lses ? lses[head * s.queries + query]
                                       : lse_in_memory[s.lse + (first_head + head) * s.lse_head_stride + query];
        PYVTK_UNROLL
        for (int i = 0; i < kKeysOfThread; ++i) {
          if (mine.sees(reach, i))
            of_inner[i] = reduced(inner_max, of_inner[i], value_of(p.logit, now[i], lse, weight));
        }
      } else {
        PYVTK_UNROLL
        for (int i = 0; i < kKeysOfThread; ++i) of_inner[i] = now[i];
      }
      if (j + 1 < inner) continue;
      if (few.outs_of_unit > 1) {
        PYVTK_NOT_UNROLLED
        for (int i = 0; i < kKeysOfThread; ++i) write(o, divided(pick(of_inner, i), i), i);
      }
      PYVTK_UNROLL
      for (int i = 0; i < kKeysOfThread; ++i) {
        const float x = of_inner[i];
        of_inner[i] = nothing(inner_max);
        if (!few.pairwise) {
          of_outer[i] = reduced(outer_max, of_outer[i], divided(x, i));
        } else if (!keeps) {
          of_outer[i] = x;
        } else if (mine.sees(reach, i)) {
          of_outer[i] = reduced(outer_max, of_outer[i], few.head_mean ? x / static_cast<float>(heads) : x);
        }
      }
    }
  }

  if (few.outs_of_unit == 1) {
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfThread; ++i) parts[warp_of_block()][lane_of_warp() + 32 * i] = of_outer[i];
    __syncthreads();
    if (split == 0) {
      PYVTK_NOT_UNROLLED
      for (int i = 0; i < kKeysOfThread; ++i) {
        float x = pick(of_outer, i);
        for (int other = 1; other < finish.splits; ++other) {
          x = reduced(outer_max, x, parts[warp_of_block() + other][lane_of_warp() + 32 * i]);
        }
        if (few.pairwise) {
          x = divided(x, i);
        } else if (inner == 0) {
          x = 0.0f;  // no queries
        } else if (few.head_mean) {
          x /= static_cast<float>(heads);
        }
        write(0, x, i);
      }
    }
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

// One call, and how it is done. plan_score_and_select() fills it in; then workspace and results are to be set.
struct ScoreAndSelectPlan {
  FewProblem few;
  FinishProblem finish;
  SelectProblem select;  // of the result; scores, candidates and drop as score_finish_kernel leaves them
  int rows_of_block;     // of score_rows_kernel: 1, 4 or 8
  bool needs_lse;        // otherwise it is given, or logits are scored
  bool separate_lse;
  bool columns;  // some samples may keep no logits
  KeyRuns column_runs;
  bool is_plain;  // instead of all that
  PlainProblem plain;
  PlainFinish plain_finish;
  bool select_later;  // in launches of its own
  SelectPlan later;
  int64_t workspace_bytes;
};

// Points the plan into a workspace of plan.workspace_bytes bytes, aligned to 16; nullptr: counts them.
inline void set_workspace(ScoreAndSelectPlan& plan, void* memory) {
  FewProblem& few = plan.few;
  const ScoreProblem& p = few.score;
  const int64_t samples = p.packed() ? 1 : p.batch, scored = p.scored(), all = samples * p.keys * p.out_heads();
  Workspace space(memory);
  if (plan.is_plain) {
    PlainProblem& plain = plan.plain;
    plain.statistics = space.take<float2>(true, p.batch * p.q_heads * plain.pieces);
    plain.weights = space.take<float>(true, p.batch * p.q_heads * plain.pitch);
  } else {
    few.statistics = space.take<float2>(plan.needs_lse, few.runs.total * p.q_heads * few.queries);
    few.lse = space.take<float>(plan.separate_lse, samples * p.q_heads * p.queries);
    few.logits = space.take<float>(few.kept > 0, samples * p.q_heads * few.kept * scored);
    few.columns = space.take<float>(plan.columns, samples * few.units * few.columns_of_unit * scored);
    plan.finish.whole = space.take<float>(scored != p.keys, all);
    plan.finish.competing = space.take<uint8_t>(p.k_mask || scored != p.keys, all);
    plan.finish.dropped = space.take<uint8_t>(p.k_mask && plan.select.keep_others, all);
  }
  if (plan.finish.whole) plan.select.scores = plan.finish.whole;
  if (plan.finish.competing) plan.select.candidates = {plan.finish.competing, 1};
  if (plan.finish.dropped) plan.select.drop = {plan.finish.dropped, 1};
  if (plan.select_later) {
    plan.later = plan_select(plan.select);
    set_workspace(plan.later, space.take<unsigned char>(true, plan.later.workspace_bytes));
  }
  plan.workspace_bytes = std::max<int64_t>(space.bytes(), 16);
}

// How a problem is done; cudaErrorInvalidValue if these kernels cannot do it. Nothing depends on the device, so that
// results do not either.
//   p: scores may still be missing
//   select: its rows are those of p; scores are not looked at
//   element: bytes of an element of k
inline cudaError_t plan_score_and_select(const ScoreProblem& p, const SelectProblem& select, int64_t element,
                                         ScoreAndSelectPlan& plan) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 4096;
  if (p.max_queries > kFewQueries || p.num_reducers != 1 || p.dim < 8 || p.dim > 256 || p.dim % 8 != 0 ||
      p.q_heads < 1 || p.keys > kMost || p.q_heads * kFewQueries > kMost) {
    return cudaErrorInvalidValue;
  }
  plan = {};
  plan.select = select;
  FewProblem& few = plan.few;
  few.score = p;
  const int64_t vector = 16 / element;
  few.aligned = reinterpret_cast<uintptr_t>(p.k) % 16 == 0 && p.k_row_stride % vector == 0 &&
                p.k_head_stride % vector == 0 && p.k_batch_stride % vector == 0;
  few.query_max = p.needs_max();
  few.mean = p.has(QueryReduce::mean);
  few.visible_mean = p.has(QueryReduce::visible_mean);
  few.head_max = p.head_max();
  few.head_mean = p.head_mean();
  few.pairwise = p.pairwise();
  few.merges_heads = p.merges_heads();
  few.group = static_cast<int>(p.group());
  few.queries = static_cast<int>(p.max_queries);
  few.units = static_cast<int>(p.out_heads() == 1 ? 1 : p.kv_heads);
  few.outs_of_unit = static_cast<int>(p.out_heads() / few.units);
  few.columns_of_unit = static_cast<int>(p.slots() / few.units);
  few.segments = static_cast<int>(p.dim / vector);
  for (few.lanes_log2 = 1; kSegments << few.lanes_log2 < few.segments;) ++few.lanes_log2;
  few.lanes_of_key = 1 << few.lanes_log2;

  // Logits are kept where they take no more memory than k, or for four queries.
  const int64_t kept = std::clamp<int64_t>(p.dim * element / (4 * p.group()), 4, kFewQueries);
  few.kept = static_cast<int>(p.packed() ? std::min(kept, p.max_queries) : p.max_queries <= kept ? p.max_queries : 0);
  plan.columns = p.max_queries > few.kept;
  plan.needs_lse = !p.logit && !p.lse_given;

  // Packed samples are taken for about equally long; longer ones take their blocks longer.
  const int64_t rows = few.group * (p.packed() ? ceil_div(p.queries, std::max<int64_t>(p.batch, 1)) : p.queries);
  plan.rows_of_block = rows <= 1 ? 1 : rows <= 4 ? 4 : 8;
  few.row_tiles = static_cast<int>(std::max<int64_t>(ceil_div<int64_t>(rows, plan.rows_of_block), 1));
  const bool only_scored = p.range_denominator || p.lse_given || p.logit;
  const int64_t window = only_scored && !p.packed() ? p.scored() : p.keys;
  const int64_t round = kFewWarps * 32 / few.lanes_of_key * kKeysOfLane;
  const int64_t samples = p.packed() ? 1 : p.batch;
  const int64_t wanted =
      std::max(ceil_div(window * samples * p.kv_heads * few.row_tiles, kWantedBlocks), ceil_div(window, kMostRuns));
  few.runs = key_runs(p, window, std::max<int64_t>(ceil_div(wanted, round), 1) * round);
  plan.column_runs = key_runs(p, p.scored(), round);
  // A block has to put the statistics of all its rows together, of each run.
  const int64_t runs = p.packed() ? p.keys / few.runs.keys + 1 : few.runs.of_sample;
  const int64_t kept_rows = p.q_heads / few.units * few.kept;
  plan.separate_lse = plan.needs_lse && (plan.columns || kept_rows * runs > kStatisticsAtOnce);

  const int64_t outer = few.pairwise ? (few.kept > 0 ? few.kept : 1) : p.q_heads / few.units;
  for (plan.finish.splits = 1; plan.finish.splits < std::min<int64_t>(outer, kFewWarps);) plan.finish.splits *= 2;
  plan.finish.runs = key_runs(p, p.keys, kFewWarps / plan.finish.splits * kKeysOfGroup);
  plan.finish.candidates = select.candidates;
  plan.finish.keep = select.keep;
  plan.finish.drop = select.drop;

  plan.is_plain = is_plain(p);
  if (plan.is_plain) plan_plain(p, few.aligned, few.segments, few.lanes_log2, select, plan.plain, plan.plain_finish);
  plan.select_later = !(plan.is_plain && plan.plain_finish.selects);
  set_workspace(plan, nullptr);
  return cudaSuccess;
}

namespace detail {

template <class T, int kRows>
cudaError_t launch_rows(const ScoreAndSelectPlan& plan, unsigned blocks, cudaStream_t stream) {
  const size_t bytes = sizeof(float) * kRows * kPitch;
  return launch(&score_rows_kernel<T, kRows>, dim3(blocks), dim3(kFewThreads), bytes, stream, plan.few);
}

template <class T>
cudaError_t launch_columns(const ScoreAndSelectPlan& plan, unsigned blocks, cudaStream_t stream) {
  const FewProblem& few = plan.few;
  int64_t floats = kRowsOfColumns * kPitch;
  if (few.pairwise) floats += int64_t{few.queries} * plan.column_runs.keys;
  const size_t bytes = static_cast<size_t>(floats) * sizeof(float);
  return launch_early(&score_columns_kernel<T>, dim3(blocks), dim3(kFewThreads), bytes, stream, few, plan.column_runs);
}

}  // namespace detail

// Scores and selects as planned, for q and k of type T: writes scores, indices, counts and overflow.
template <class T>
cudaError_t score_and_select(ScoreAndSelectPlan plan, cudaStream_t stream) {
  const FewProblem& few = plan.few;
  const ScoreProblem& p = few.score;
  if (p.batch == 0) return cudaSuccess;
  if (!plan.finish.whole) plan.select.scores = plan.later.problem.scores = p.scores;
  if (plan.is_plain) {
    const cudaError_t status = score_plain<T>(plan.plain, plan.plain_finish, p, plan.select, stream);
    return status != cudaSuccess || !plan.select_later ? status : select<float>(plan.later, stream);
  }
  const int64_t row_blocks = few.runs.total * p.kv_heads * few.row_tiles;
  const int64_t column_blocks = plan.column_runs.total * (few.pairwise ? few.units : p.kv_heads);
  const int64_t finish_blocks = plan.finish.runs.total * few.units;
  const int64_t lse_blocks = ceil_div<int64_t>(p.q_heads * p.max_queries, 32);
  if (std::max({row_blocks, column_blocks, finish_blocks, lse_blocks * p.batch}) >
      std::numeric_limits<int32_t>::max()) {
    return cudaErrorInvalidValue;
  }
  const auto blocks = [](int64_t number) { return static_cast<unsigned>(number); };

  cudaError_t status = plan.rows_of_block == 1   ? detail::launch_rows<T, 1>(plan, blocks(row_blocks), stream)
                       : plan.rows_of_block == 4 ? detail::launch_rows<T, 4>(plan, blocks(row_blocks), stream)
                                                 : detail::launch_rows<T, 8>(plan, blocks(row_blocks), stream);
  if (status == cudaSuccess && plan.separate_lse && lse_blocks > 0) {
    status = launch_early(&score_lse_kernel, dim3(blocks(lse_blocks * p.batch)), dim3(kFewThreads), 0, stream, few,
                          lse_blocks);
  }
  if (status == cudaSuccess && plan.columns) {
    status = detail::launch_columns<T>(plan, blocks(column_blocks), stream);
  }
  if (status != cudaSuccess) return status;
  const bool makes_lses = plan.needs_lse && !plan.separate_lse;
  const int64_t bytes = makes_lses ? 4 * (p.q_heads / few.units) * few.kept : 0;
  status = launch_early(&score_finish_kernel, dim3(blocks(finish_blocks)), dim3(kFewThreads),
                        static_cast<size_t>(bytes), stream, few, plan.finish);
  if (status != cudaSuccess) return status;
  return select<float>(plan.later, stream);
}

}  // namespace pyvtk::cuda
