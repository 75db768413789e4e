// select for rows of up to 16384 tokens by one block, with all ranks in registers: what score_finish and select do
// where nothing but num_keep, threshold, keep, drop and candidates decides. Meaning and terms: select.cuh.
//
// A thread has kTokens consecutive tokens, so that order within a row is that of threads. The cut is found by
// histograms of 256 bins over the range of the ranks that are left, until a bin has no more tokens than a warp has
// lanes; those go to a list, and one warp ranks them. Code is kept small: in a call whose instructions come from memory
// each kilobyte of them costs more than the work that it does.
#pragma once
#include <cstdint>
#include <limits>

#include "common/select_problem.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/select.cuh"

namespace pyvtk::cuda {

inline constexpr int kShortThreads = 1024;
inline constexpr int kShortWarps = kShortThreads / 32;
inline constexpr int kShortBins = 256;
inline constexpr int64_t kShortTokens = 16 * kShortThreads;
inline constexpr uint32_t kAbsent = 0xffffffffu;

// A Cut of a short row.
struct ShortCut {
  uint32_t pivot;
  int end;

  // Without branches: they would be most of what is done for a token.
  constexpr bool holds(uint32_t rank, int token) const {
    return static_cast<bool>(static_cast<int>(rank > pivot) |
                             (static_cast<int>(rank == pivot) & static_cast<int>(token < end)));
  }
};
inline constexpr ShortCut kKeepAllShort{kNanRank, std::numeric_limits<int>::max()};
inline constexpr ShortCut kKeepNoneShort{std::numeric_limits<uint32_t>::max(), 0};

struct ShortShared {
  alignas(16) unsigned histogram[kShortBins];
  uint32_t lows[kShortWarps];
  uint32_t highs[kShortWarps];
  unsigned counts[kShortWarps];
  unsigned sums[kShortWarps];
  uint64_t list[32];
  unsigned listed;
  Bin<unsigned> bin;
  ShortCut cut;
};

// Sums of the threads before this one, and of all. A barrier has to stand between two calls.
__device__ __forceinline__ Prefix<int> prefix_of_threads(int mine, unsigned* sums) {
  const int up_to_lane = sum_up_to_lane(mine);
  if (lane_of_warp() == 31) sums[warp_of_block()] = static_cast<unsigned>(up_to_lane);
  __syncthreads();
  const unsigned sum = lane_of_warp() < warps_of_block() ? sums[lane_of_warp()] : 0;
  const unsigned before = __reduce_add_sync(kAllLanes, lane_of_warp() < warp_of_block() ? sum : 0u);
  return {static_cast<int>(before) + up_to_lane - mine, static_cast<int>(__reduce_add_sync(kAllLanes, sum))};
}

// The best `want` of some tokens; the others are kAbsent, which is no rank of a score.
template <int kTokens>
__device__ __forceinline__ ShortCut cut_of_short(const uint32_t (&ranks)[kTokens], int first_token, int want,
                                                 ShortShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  uint32_t low = kAbsent, above = 0;  // above all: one more than the highest, and 0 again for kAbsent
  unsigned mass = 0;
  PYVTK_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    low = min(low, ranks[i]);
    above = max(above, ranks[i] + 1);
    mass += ranks[i] != kAbsent;
  }
  low = __reduce_min_sync(kAllLanes, low);
  above = __reduce_max_sync(kAllLanes, above);
  mass = __reduce_add_sync(kAllLanes, mass);
  if (lane == 0) {
    shared.lows[warp_of_block()] = low;
    shared.highs[warp_of_block()] = above;
    shared.counts[warp_of_block()] = mass;
  }
  PYVTK_NOT_UNROLLED
  for (int bin = thread; bin < kShortBins; bin += static_cast<int>(blockDim.x)) shared.histogram[bin] = 0;
  if (thread == 0) shared.listed = 0;
  __syncthreads();
  const bool exists = lane < warps_of_block();
  mass = __reduce_add_sync(kAllLanes, exists ? shared.counts[lane] : 0u);
  if (want <= 0) return kKeepNoneShort;
  if (want >= static_cast<int>(mass)) return kKeepAllShort;
  low = __reduce_min_sync(kAllLanes, exists ? shared.lows[lane] : kAbsent);
  uint32_t high = __reduce_max_sync(kAllLanes, exists ? shared.highs[lane] : 0u) - 1;
  unsigned need = static_cast<unsigned>(want);
  PYVTK_NOT_UNROLLED
  while (low != high) {
    const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - 8);
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      const uint32_t height = ranks[i] - low;
      if (height <= high - low) atomicAdd(&shared.histogram[height >> shift], 1u);
    }
    __syncthreads();
    if (thread < 32) {
      // Each lane has eight bins, downwards from the top.
      int number = kShortBins - 1 - 8 * lane;
      const uint4 four = *reinterpret_cast<const uint4*>(shared.histogram + number - 7);
      const uint4 more = *reinterpret_cast<const uint4*>(shared.histogram + number - 3);
      const unsigned mine = four.x + four.y + four.z + four.w + (more.x + more.y + more.z + more.w);
      unsigned before = sum_up_to_lane(mine) - mine;
      if (before < need && need <= before + mine) {
        PYVTK_NOT_UNROLLED
        for (; shared.histogram[number] < need - before; --number) before += shared.histogram[number];
        shared.bin = {number, need - before, shared.histogram[number]};
      }
    }
    __syncthreads();
    const Bin<unsigned> bin = shared.bin;
    low += static_cast<uint32_t>(bin.number) << shift;
    high = low + min(high - low, (1u << shift) - 1);
    need = bin.need;
    if (need == bin.mass) return low > 0 ? ShortCut{low - 1, 0} : kKeepAllShort;
    if (bin.mass <= 32) {
      PYVTK_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        if (ranks[i] - low <= high - low) {
          const unsigned token = static_cast<unsigned>(first_token + i);
          shared.list[atomicAdd(&shared.listed, 1u)] = uint64_t{ranks[i]} << 32 | ~token;
        }
      }
      __syncthreads();
      // A warp for each: how many of the others, one in each lane, are better?
      const int listed = static_cast<int>(bin.mass);
      const uint64_t other = lane < listed ? shared.list[lane] : 0;
      PYVTK_NOT_UNROLLED
      for (int i = warp_of_block(); i < listed; i += warps_of_block()) {
        const uint64_t mine = shared.list[i];
        const int better = __popc(__ballot_sync(kAllLanes, other > mine));
        if (better + 1 == static_cast<int>(need) && lane == 0) {
          shared.cut = {static_cast<uint32_t>(mine >> 32), static_cast<int>(~static_cast<uint32_t>(mine)) + 1};
        }
      }
      __syncthreads();
      return shared.cut;
    }
    PYVTK_NOT_UNROLLED
    for (int bin = thread; bin < kShortBins; bin += static_cast<int>(blockDim.x)) shared.histogram[bin] = 0;
    __syncthreads();
  }
  // Many of the same rank: the first `need` of them.
  uint32_t equal = 0;
  PYVTK_UNROLL
  for (int i = 0; i < kTokens; ++i) equal |= static_cast<uint32_t>(ranks[i] == low) << i;
  const int count = __popc(equal), missing = static_cast<int>(need) - prefix_of_threads(count, shared.sums).before;
  if (missing > 0 && missing <= count) {
    PYVTK_NOT_UNROLLED
    for (int i = 1; i < missing; ++i) equal &= equal - 1;
    shared.cut = {low, first_token + __ffs(static_cast<int>(equal))};
  }
  __syncthreads();
  return shared.cut;
}

// Ranks of consecutive tokens of a row, kAbsent past its end; all of them on their way at once.
template <int kTokens>
__device__ __forceinline__ void read_short(const AnyScores& scores, int first, int size, uint32_t (&ranks)[kTokens]) {
  float values[kTokens];
  if (scores.type == ScoreType::float32) {
    const float* const from = static_cast<const float*>(scores.data) + first;
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) values[i] = first + i < size ? from[i] : 0.0f;
  } else {
    const uint16_t* const from = static_cast<const uint16_t*>(scores.data) + first;
    uint16_t bits[kTokens];
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) bits[i] = first + i < size ? from[i] : uint16_t{0};
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) values[i] = scores.of_bits(bits[i]);
  }
  PYVTK_UNROLL
  for (int i = 0; i < kTokens; ++i) ranks[i] = first + i < size ? rank_of(values[i]) : kAbsent;
}

// Chooses row `number` of the problem and writes its indices, count and overflow, with all threads of the block, which
// have the ranks of its tokens, kAbsent past its end. Between two calls there has to be a barrier.
template <int kTokens>
__device__ __forceinline__ void select_short_row(const SelectProblem& problem, int number,
                                                 const uint32_t (&ranks)[kTokens], ShortShared& shared) {
  const int thread = static_cast<int>(threadIdx.x), size = static_cast<int>(problem.tokens);
  const int first_token = thread * kTokens, capacity = static_cast<int>(problem.capacity);
  uint32_t least = kNanRank;
  if (problem.threshold) {
    // Nothing reaches NaN.
    const float threshold = problem.threshold.data[number * problem.threshold.per_row];
    least = threshold != threshold ? kAbsent : rank_of(threshold);
  }
  int want = size;
  if (has_count(problem)) {
    const int64_t given = problem.num_keep_per_row
                              ? problem.num_keep_per_row.data[number * problem.num_keep_per_row.per_row]
                              : problem.num_keep;
    want = static_cast<int>(min(max(given, int64_t{0}), int64_t{size}));
  }
  uint32_t competing[kTokens];  // their ranks
  PYVTK_UNROLL
  for (int i = 0; i < kTokens; ++i) competing[i] = ranks[i];
  uint32_t fixed = 0;  // a bit for each token
  int num_fixed = 0;
  if (problem.keep || problem.drop || problem.candidates) {
    const uint8_t* const keep = problem.keep.row(number, problem.tokens);
    const uint8_t* const drop = problem.drop.row(number, problem.tokens);
    const uint8_t* const candidates = problem.candidates.row(number, problem.tokens);
    uint32_t kept = 0, competes = 0;
    PYVTK_NOT_UNROLLED
    for (int i = 0; i < kTokens && first_token + i < size; ++i) {
      const int token = first_token + i;
      const bool allowed = !(drop && drop[token]), is_kept = keep && keep[token] && allowed;
      const bool eligible = !(candidates && !candidates[token]);
      kept |= static_cast<uint32_t>(is_kept) << i;
      fixed |= static_cast<uint32_t>(is_kept || (allowed && problem.keep_others && !eligible)) << i;
      competes |= static_cast<uint32_t>(allowed && eligible && !is_kept) << i;
    }
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      if (!(competes >> i & 1)) competing[i] = kAbsent;
    }
    const int counts = prefix_of_threads(__popc(fixed) << 16 | __popc(kept), shared.sums).total;
    num_fixed = counts >> 16;
    if (has_count(problem)) want -= counts & 0xffff;
    __syncthreads();
  }
  uint32_t base = fixed, stay;
  Prefix<int> places;
  bool overflow = false;
  PYVTK_NOT_UNROLLED
  for (;;) {
    const ShortCut cut = cut_of_short(competing, first_token, want, shared);
    stay = 0;
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) {
      const int in_cut = cut.holds(competing[i], first_token + i), reaches = competing[i] >= least;
      const int stays = in_cut & reaches & static_cast<int>(competing[i] != kAbsent);
      stay |= static_cast<uint32_t>(stays) << i;
    }
    stay |= base;
    places = prefix_of_threads(__popc(stay), shared.sums);
    if (places.total <= capacity) break;
    // Fixed tokens go first, then the best of the others.
    overflow = true;
    const bool only_fixed = num_fixed >= capacity;
    const uint32_t competes = only_fixed ? fixed : stay & ~fixed;
    PYVTK_UNROLL
    for (int i = 0; i < kTokens; ++i) competing[i] = competes >> i & 1 ? ranks[i] : kAbsent;
    base = only_fixed ? 0 : fixed;
    want = only_fixed ? capacity : capacity - num_fixed;
    least = kNanRank;
    __syncthreads();
  }
  if (thread == 0) {
    problem.counts[number] = places.total;
    problem.overflow[number] = overflow;
  }
  int64_t* out = problem.indices + number * problem.capacity;
  const int padding = capacity - places.total;
  int64_t* const padded = out + (problem.align_right ? 0 : places.total);
  PYVTK_NOT_UNROLLED
  for (int i = thread; i < padding; i += static_cast<int>(blockDim.x)) padded[i] = -1;
  out += (problem.align_right ? padding : 0) + places.before;
  PYVTK_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    if (stay >> i & 1) *out++ = first_token + i;
  }
}

// Block: row.
template <int kTokens>
__global__ void __launch_bounds__(kShortThreads, 1)
    select_short_kernel(const SelectProblem problem, const AnyScores scores) {
  PYVTK_SHARED(shared, ShortShared);
  await_previous_launch();
  let_next_launch_start();
  const unsigned number = blockIdx.x, heads = static_cast<unsigned>(problem.heads);
  uint32_t ranks[kTokens];
  read_short(scores.from(number / heads * problem.batch_stride + number % heads * problem.head_stride),
             static_cast<int>(threadIdx.x) * kTokens, static_cast<int>(problem.tokens), ranks);
  select_short_row(problem, static_cast<int>(number), ranks, shared);
}

// Whether a row is one block's with its ranks in registers. Counts of 16 bits are added up two at a time.
inline bool is_short(const SelectProblem& problem) {
  return problem.tokens > 0 && problem.tokens <= kShortTokens && !problem.segments && !problem.top_p &&
         !problem.by_score && !problem.cu_seqlens && problem.capacity <= std::numeric_limits<int32_t>::max();
}

inline cudaError_t launch_select_short(const SelectProblem& problem, AnyScores scores, cudaStream_t stream) {
  const bool few = problem.tokens <= 4 * kShortThreads;
  const int64_t threads = few ? ceil_div<int64_t>(ceil_div<int64_t>(problem.tokens, 4), 32) * 32 : kShortThreads;
  return launch_early(few ? &select_short_kernel<4> : &select_short_kernel<16>,
                      dim3(static_cast<unsigned>(problem.rows)), dim3(static_cast<unsigned>(threads)), 0, stream,
                      problem, scores);
}

}  // namespace pyvtk::cuda
