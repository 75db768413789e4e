// select for few and long rows: many blocks for each, in three launches.
//
//   select_count_kernel   a block per (row, chunk): how many tokens of the chunk have each value of the top 11 bits
//   select_split_kernel   the same grid: each block adds up the counts of its row, which tells in which bin the cut
//                         falls. Tokens above that bin stay (a bit each), those inside of it may (another), and their
//                         ranks go to a list of the row. The last block of a row to arrive finds the cut in the list,
//                         and how many tokens of each chunk stay.
//   select_write_kernel   the same grid: writes the indices
//
// The second launch reads the scores again: rows that are long enough for this fit the second-level cache. Where a rank
// stands in the list follows from the counts, so that the list is the tokens of the bin in their order, whichever block
// comes first, and the list is a row of its own for the functions of select.cuh. No counts are added in global memory,
// and arrivals are zeroed by the first launch: nothing has to be zero before a call, and calls share nothing.
//
// Tokens that are dropped, no candidates or below the threshold are left out of the counts, and a capacity is one more
// num_keep. What weighs tokens (top_p), has classes of them (keep, others that stay, segments), an order of its own
// (by_score) or rows whose lengths are on the device (cu_seqlens) stays with one block per row: is_long() decides.
//
// Work: scores and masks are read twice, 4 KiB of counts written for each chunk and read by all blocks of its row. What
// the last block of a row does alone grows with the list, not with the row: when it wrote the indices too, [1, 131072]
// to 16384 took 60 us on an H200, cold, and takes 27 now. If the list does not fit its shared memory, as where many
// scores are about equal, that block reads it from memory two or three times.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/select_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/select.cuh"
#include "cuda/select_short.cuh"
#include "cuda/workspace.cuh"

namespace pyvtk::cuda {

// Up to here a row is one block's, and its ranks fit the shared memory of every device.
inline constexpr int64_t kTokensOfBlock = 16384;
// More rows than this keep a device busy with a block for each.
inline constexpr int64_t kFewRows = 128;
inline constexpr int kLongBins = 1 << kMostBits;
inline constexpr int kLongShift = 32 - kMostBits;
inline constexpr int64_t kListInShared = 16384;  // ranks: two blocks fit a multiprocessor all the same
inline constexpr int kWordsOfWarp = 8;  // that a warp has in registers at a time: the latency of memory is paid once

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
inline constexpr int kLongBlocks = 1;  // of a multiprocessor; two spill
#else
inline constexpr int kLongBlocks = 2;
#endif

// How the rows of a problem are cut, and the workspace.
struct LongRows {
  int64_t words;  // of 32 tokens, of a row
  int64_t words_of_chunk;
  int64_t chunks;  // of a row
  int threads;
  int shared_ranks;    // longer lists stay in global memory
  uint16_t* counts;    // [rows, chunks, kLongBins]: tokens that compete
  uint32_t* arrivals;  // [rows]
  uint32_t* stay;      // [rows, words]: the tokens that are above the bin of the cut
  uint32_t* maybe;     // [rows, words]: the tokens in the bin of the cut
  uint32_t* list;      // [rows, tokens]: their ranks
  int32_t* before;     // [rows, chunks]: entries of the list that are of chunks before
  int32_t* places;     // [rows, chunks]: tokens that stay, of chunks before; until the end, those above of the chunk
  Cut* cuts;           // [rows]: inside of the list
};

// The token of a lane in a word. A warp may be given words past the end of a row, and past the end of the longest rows
// tokens are more than an int holds.
constexpr unsigned token_of(int word, int lane) {
  return static_cast<unsigned>(word) * 32 + static_cast<unsigned>(lane);
}
// The same, or the last token of the row where there is none.
constexpr int token_or_last(int word, int lane, int size) {
  const unsigned token = token_of(word, lane), last = static_cast<unsigned>(size) - 1;
  return static_cast<int>(token < last ? token : last);
}

// Of a row: the tokens that compete, and the chunk of this block.
template <class Scores>
struct LongRow {
  Scores scores;              // [size]
  const uint8_t* drop;        // [size]; nullptr: none
  const uint8_t* candidates;  // [size]; nullptr: all
  Cut threshold;
  int size;
  int64_t number;
  int64_t chunk;
  int begin, end;  // words of the chunk

  // The ranks of this lane's tokens in kWordsOfWarp words; returns a bit for each that competes. Reads before it asks.
  __device__ __forceinline__ uint32_t read(int first_word, uint32_t (&ranks)[kWordsOfWarp]) const {
    int tokens[kWordsOfWarp];
    float values[kWordsOfWarp];
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) tokens[i] = token_or_last(first_word + i, lane_of_warp(), size);
    scores.read(tokens, values);
    const uint32_t not_dropped = drop ? ~bits_of(drop, tokens) : kAllLanes;
    uint32_t competing = not_dropped & (candidates ? bits_of(candidates, tokens) : kAllLanes);
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      ranks[i] = rank_of(values[i]);
      const bool exists =
          first_word + i < end && token_of(first_word + i, lane_of_warp()) < static_cast<unsigned>(size);
      if (!exists || !threshold.holds(ranks[i], tokens[i])) competing &= ~(1u << i);
    }
    return competing;
  }
  __device__ __forceinline__ static uint32_t bits_of(const uint8_t* mask, const int (&tokens)[kWordsOfWarp]) {
    uint32_t bits = 0;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) bits |= static_cast<uint32_t>(mask[tokens[i]] != 0) << i;
    return bits;
  }
};

template <class Scores>
__device__ __forceinline__ LongRow<Scores> long_row(const SelectProblem& problem, const Scores& scores,
                                                    const LongRows& rows) {
  const int64_t number = blockIdx.x / rows.chunks, chunk = blockIdx.x % rows.chunks;
  const int64_t start = number / problem.heads * problem.batch_stride + number % problem.heads * problem.head_stride;
  return {scores.from(start),
          problem.drop.row(number, problem.tokens),
          problem.candidates.row(number, problem.tokens),
          cut_of_threshold(problem, number, 0),
          static_cast<int>(problem.tokens),
          number,
          chunk,
          static_cast<int>(chunk * rows.words_of_chunk),
          static_cast<int>(min((chunk + 1) * rows.words_of_chunk, rows.words))};
}

// Block: (row, chunk).
template <class Scores>
__global__ void __launch_bounds__(32 * kMostWarps, kLongBlocks)
    select_count_kernel(const SelectProblem problem, const Scores scores, const LongRows rows) {
  PYVTK_SHARED(histogram, unsigned[kLongBins]);
  let_next_launch_start();
  const LongRow<Scores> row = long_row(problem, scores, rows);
  for (unsigned bin = threadIdx.x; bin < kLongBins; bin += blockDim.x) histogram[bin] = 0;
  if (row.chunk == 0 && threadIdx.x == 0) rows.arrivals[row.number] = 0;
  __syncthreads();
  for (int round = row.begin; round < row.end; round += kWordsOfWarp * warps_of_block()) {
    uint32_t ranks[kWordsOfWarp];
    const uint32_t competing = row.read(round + warp_of_block() * kWordsOfWarp, ranks);
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      if (competing >> i & 1) atomicAdd(&histogram[ranks[i] >> kLongShift], 1u);
    }
  }
  __syncthreads();
  ushort4* const out = reinterpret_cast<ushort4*>(rows.counts) + (row.number * rows.chunks + row.chunk) * kLongBins / 4;
  for (unsigned i = threadIdx.x; i < kLongBins / 4; i += blockDim.x) {
    const auto bin = [&](unsigned j) { return static_cast<uint16_t>(histogram[4 * i + j]); };
    out[i] = {bin(0), bin(1), bin(2), bin(3)};
  }
}

// Where the cut of a row falls.
struct LongCut {
  int64_t wanted;   // tokens that stay if enough compete
  unsigned total;   // that compete
  int above;        // tokens of this bin and above stay
  int inside;       // the bin of the cut, just below; -1: the cut is at the edge of a bin
  unsigned needed;  // tokens of that bin that stay
  unsigned length;  // tokens in that bin
  unsigned before;  // of them, in chunks before this block's
};

template <class Scores>
__device__ __forceinline__ LongCut long_cut(const SelectProblem& problem, const LongRows& rows,
                                            const LongRow<Scores>& row) {
  PYVTK_SHARED(histogram, unsigned[kLongBins]);
  constexpr int kAhead = 8;  // chunks whose counts are under way at the same time
  const uint16_t* const counts = rows.counts + row.number * rows.chunks * kLongBins;  // [chunks, kLongBins]
  unsigned sum = 0;
  const int chunks = static_cast<int>(rows.chunks);
  for (unsigned i = threadIdx.x; i < kLongBins / 4; i += blockDim.x) {
    unsigned bins[4] = {0, 0, 0, 0};
    const ushort4* const from = reinterpret_cast<const ushort4*>(counts) + i;
    PYVTK_NOT_UNROLLED
    for (int chunk = 0; chunk < chunks; chunk += kAhead) {
      ushort4 some[kAhead];
      PYVTK_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        some[j] = chunk + j < chunks ? from[(chunk + j) * (kLongBins / 4)] : ushort4{0, 0, 0, 0};
      }
      PYVTK_UNROLL
      for (int j = 0; j < kAhead; ++j) {
        bins[0] += some[j].x;
        bins[1] += some[j].y;
        bins[2] += some[j].z;
        bins[3] += some[j].w;
      }
    }
    PYVTK_UNROLL
    for (int j = 0; j < 4; ++j) {
      histogram[4 * i + j] = bins[j];
      sum += bins[j];
    }
  }
  LongCut cut{};
  cut.wanted = has_count(problem) ? count_of_row(problem, row.number, 0) : problem.tokens;
  cut.total = prefix_of_warps(sum_of_warp(sum)).total;
  cut.inside = -1;
  const int64_t most = min(cut.wanted, problem.capacity);
  if (most >= cut.total) return cut;  // all stay
  cut.above = kLongBins;
  if (most == 0) return cut;
  const Bin<unsigned> bin = find_bin(histogram, kLongBins, static_cast<unsigned>(most));
  cut.above = bin.number;
  if (bin.need == bin.mass) return cut;
  cut.above = bin.number + 1;
  cut.inside = bin.number;
  cut.needed = bin.need;
  cut.length = bin.mass;
  unsigned before = 0;
  for (int chunk = static_cast<int>(threadIdx.x); chunk < row.chunk; chunk += static_cast<int>(blockDim.x)) {
    before += counts[chunk * kLongBins + bin.number];
  }
  cut.before = prefix_of_warps(sum_of_warp(before)).total;
  return cut;
}

// Block: (row, chunk).
template <class Scores>
__global__ void __launch_bounds__(32 * kMostWarps, kLongBlocks)
    select_split_kernel(const SelectProblem problem, const Scores scores, const LongRows rows) {
  await_previous_launch();
  let_next_launch_start();
  const LongRow<Scores> row = long_row(problem, scores, rows);
  const LongCut cut = long_cut(problem, rows, row);
  uint32_t* const list = rows.list + row.number * problem.tokens;
  int place = static_cast<int>(cut.before), above_of_warp = 0;
  PYVTK_NOT_UNROLLED
  for (int round = row.begin; round < row.end; round += kWordsOfWarp * warps_of_block()) {
    const int first_word = round + warp_of_block() * kWordsOfWarp;
    uint32_t ranks[kWordsOfWarp], inside[kWordsOfWarp];
    const uint32_t competing = row.read(first_word, ranks);
    int mine = 0;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      const int bin = static_cast<int>(ranks[i] >> kLongShift);
      const uint32_t above = __ballot_sync(kAllLanes, competing >> i & 1 && bin >= cut.above);
      inside[i] = __ballot_sync(kAllLanes, competing >> i & 1 && bin == cut.inside);
      mine += __popc(inside[i]);
      above_of_warp += __popc(above);
      if (lane_of_warp() == 0 && first_word + i < row.end) {
        rows.stay[row.number * rows.words + first_word + i] = above;
        rows.maybe[row.number * rows.words + first_word + i] = inside[i];
      }
    }
    if (cut.inside < 0) continue;
    const Prefix<int> of_round = prefix_of_warps(mine);
    int to = place + of_round.before;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      const uint32_t lower = inside[i] & ((1u << lane_of_warp()) - 1);
      if (inside[i] >> lane_of_warp() & 1) list[to + __popc(lower)] = ranks[i];
      to += __popc(inside[i]);
    }
    place += of_round.total;
  }
  const int above = prefix_of_warps(above_of_warp).total, chunks = static_cast<int>(rows.chunks);
  const int64_t at = row.number * rows.chunks;
  if (threadIdx.x == 0) {
    rows.before[at + row.chunk] = static_cast<int>(cut.before);
    rows.places[at + row.chunk] = above;
  }
  if (!is_last_block(&rows.arrivals[row.number], static_cast<uint32_t>(rows.chunks))) return;
  SelectRow<RanksOf> all{};
  const int length = static_cast<int>(cut.length);
  all.resize(length);
  all.scores = {list};
  all.ranks = length <= rows.shared_ranks ? dynamic_shared<uint32_t>() : nullptr;
  Cut inside = kKeepNone;
  if (length > 0) {
    inside = cut_at_count(all, Set{}, read_ranks(all), cut.needed);
    __syncthreads();  // ranks of other warps are read below
  }
  PYVTK_NOT_UNROLLED
  for (int chunk = warp_of_block(); chunk < chunks; chunk += warps_of_block()) {
    const int begin = rows.before[at + chunk], end = chunk + 1 < chunks ? rows.before[at + chunk + 1] : length;
    int mine = 0;
    for (int i = begin + lane_of_warp(); i < end; i += 32) mine += inside.holds(all.rank(i), i);
    mine = sum_of_warp(mine);
    if (lane_of_warp() == 0) rows.places[at + chunk] += mine;
  }
  __syncthreads();
  // The last block stands for all of the row.
  int total = 0;
  if (threadIdx.x < 32) {
    for (int first = 0; first < chunks; first += 32) {
      const int chunk = first + lane_of_warp(), mine = chunk < chunks ? rows.places[at + chunk] : 0;
      const int up_to_lane = sum_up_to_lane(mine);
      if (chunk < chunks) rows.places[at + chunk] = total + up_to_lane - mine;
      total += __shfl_sync(kAllLanes, up_to_lane, 31);
    }
    if (threadIdx.x == 0) {
      rows.cuts[row.number] = inside;
      problem.counts[row.number] = total;
      problem.overflow[row.number] = min(cut.wanted, int64_t{cut.total}) > problem.capacity;
    }
  }
}

// Block: (row, chunk).
static __global__ void __launch_bounds__(32 * kMostWarps, kLongBlocks)
    select_write_kernel(const SelectProblem problem, const LongRows rows) {
  await_previous_launch();
  const unsigned number = blockIdx.x / static_cast<unsigned>(rows.chunks);
  const unsigned chunk = blockIdx.x % static_cast<unsigned>(rows.chunks);
  const int lane = lane_of_warp(), begin = static_cast<int>(chunk * rows.words_of_chunk);
  const int end = static_cast<int>(min(begin + rows.words_of_chunk, rows.words));
  const uint32_t* const list = rows.list + number * problem.tokens;
  const uint32_t* const stay = rows.stay + number * rows.words;
  const uint32_t* const maybe = rows.maybe + number * rows.words;
  const Cut inside = rows.cuts[number];
  const int total = problem.counts[number];
  int of_list = rows.before[blockIdx.x], place = rows.places[blockIdx.x];
  int64_t* out = problem.indices + number * problem.capacity;
  const int64_t padding = problem.capacity - total;
  int64_t* const padded = out + (problem.align_right ? 0 : total);
  for (int64_t i = chunk * blockDim.x + threadIdx.x; i < padding; i += rows.chunks * blockDim.x) padded[i] = -1;
  out += problem.align_right ? padding : 0;
  const uint32_t lower = (1u << lane) - 1;
  PYVTK_NOT_UNROLLED
  for (int round = begin; round < end; round += kWordsOfWarp * warps_of_block()) {
    const int first_word = round + warp_of_block() * kWordsOfWarp, word = first_word + lane;
    const bool has_word = lane < kWordsOfWarp && word < end;
    const uint32_t stays = has_word ? stay[word] : 0, may = has_word ? maybe[word] : 0;
    const Prefix<int> lists = prefix_of_warps(sum_of_warp(__popc(may)));
    uint32_t ranks[kWordsOfWarp], words[kWordsOfWarp];
    int at[kWordsOfWarp], from = of_list + lists.before;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      words[i] = __shfl_sync(kAllLanes, may, i);
      at[i] = from + __popc(words[i] & lower);
      ranks[i] = words[i] >> lane & 1 ? list[at[i]] : 0;
      from += __popc(words[i]);
    }
    int mine = 0;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      const bool chosen = words[i] >> lane & 1 && inside.holds(ranks[i], at[i]);
      words[i] = __shfl_sync(kAllLanes, stays, i) | __ballot_sync(kAllLanes, chosen);
      mine += __popc(words[i]);
    }
    const Prefix<int> of_round = prefix_of_warps(mine);
    int to = place + of_round.before;
    PYVTK_UNROLL
    for (int i = 0; i < kWordsOfWarp; ++i) {
      if (words[i] >> lane & 1) out[to + __popc(words[i] & lower)] = (first_word + i) * 32 + lane;
      to += __popc(words[i]);
    }
    of_list += lists.total;
    place += of_round.total;
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

// Whether rows get more than one block each, in three launches. Does not depend on the device.
inline bool is_long(const SelectProblem& problem) {
  const bool able = !problem.keep && !(problem.keep_others && problem.candidates) && !problem.segments &&
                    !problem.top_p && !problem.by_score && !problem.cu_seqlens;
  return able && problem.tokens > kTokensOfBlock && problem.rows <= kFewRows;
}

// One call, and how it is done; made by plan_select(), then set_workspace().
struct SelectPlan {
  SelectProblem problem;
  bool is_long;
  LongRows rows;  // if it is
  int64_t workspace_bytes;
};

// Points the plan into a workspace of plan.workspace_bytes bytes, aligned to 16; nullptr: counts them.
inline void set_workspace(SelectPlan& plan, void* memory) {
  const int64_t rows = plan.problem.rows;
  LongRows& cut = plan.rows;
  Workspace space(memory);
  cut.counts = space.take<uint16_t>(plan.is_long, rows * cut.chunks * kLongBins);
  cut.arrivals = space.take<uint32_t>(plan.is_long, rows);
  cut.stay = space.take<uint32_t>(plan.is_long, rows * cut.words);
  cut.maybe = space.take<uint32_t>(plan.is_long, rows * cut.words);
  cut.list = space.take<uint32_t>(plan.is_long, rows * plan.problem.tokens);
  cut.before = space.take<int32_t>(plan.is_long, rows * cut.chunks);
  cut.places = space.take<int32_t>(plan.is_long, rows * cut.chunks);
  cut.cuts = space.take<Cut>(plan.is_long, rows);
  plan.workspace_bytes = space.bytes();
}

// Long rows in chunks of so many words, by blocks of so many threads. A chunk has less than 65536 tokens, which is what
// a count can hold.
inline SelectPlan plan_long_rows(const SelectProblem& problem, int64_t words_of_chunk, int threads) {
  SelectPlan plan{problem, true, {}, 0};
  plan.rows.words = ceil_div<int64_t>(problem.tokens, 32);
  plan.rows.words_of_chunk = words_of_chunk;
  plan.rows.chunks = std::max<int64_t>(ceil_div(plan.rows.words, words_of_chunk), 1);
  plan.rows.threads = threads;
  set_workspace(plan, nullptr);
  return plan;
}

inline SelectPlan plan_select(const SelectProblem& problem) {
  if (!is_long(problem)) return {problem, false, {}, 0};
  // A chunk is one round of a block or some. Blocks for all multiprocessors, but each of them reads the counts of a
  // row.
  constexpr int64_t kRound = kMostWarps * kWordsOfWarp, kMostRounds = 65535 / (32 * kRound);
  const int64_t chunks = std::clamp<int64_t>(256 / std::max<int64_t>(problem.rows, 1), 2, 64);
  const int64_t rounds = ceil_div<int64_t>(problem.tokens, 32 * kRound * chunks);
  return plan_long_rows(problem, std::min(rounds, kMostRounds) * kRound, 32 * kMostWarps);
}

template <class Scores>
cudaError_t launch_select_long(SelectPlan plan, Scores scores, cudaStream_t stream) {
  const int64_t blocks = plan.problem.rows * plan.rows.chunks;
  if (blocks > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  int64_t available = 0;
  cudaError_t status = most_dynamic_shared(&select_split_kernel<Scores>, available);
  if (status != cudaSuccess) return status;
  const int64_t ranks = std::min({available / 4, kListInShared, plan.problem.tokens});
  plan.rows.shared_ranks = static_cast<int>(ranks);
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(plan.rows.threads));
  status = launch(&select_count_kernel<Scores>, grid, block, 0, stream, plan.problem, scores, plan.rows);
  if (status != cudaSuccess) return status;
  status = launch_early(&select_split_kernel<Scores>, grid, block, static_cast<size_t>(4 * ranks), stream, plan.problem,
                        scores, plan.rows);
  if (status != cudaSuccess) return status;
  return launch_early(&select_write_kernel, grid, block, 0, stream, plan.problem, plan.rows);
}

// As planned, for scores of type T; writes indices, counts and overflow.
template <class T>
cudaError_t select(const SelectPlan& plan, cudaStream_t stream) {
  if (plan.problem.rows == 0) return cudaSuccess;
  if (!plan.is_long) {
    if (!is_short(plan.problem) || plan.problem.rows > std::numeric_limits<int32_t>::max()) {
      return select<T>(plan.problem, stream);
    }
    return launch_select_short(plan.problem, any_scores<T>(plan.problem), stream);
  }
  if (plan.problem.tokens > kMostTokens) return cudaErrorInvalidValue;
  return launch_select_long(plan, any_scores<T>(plan.problem), stream);
}

}  // namespace pyvtk::cuda
