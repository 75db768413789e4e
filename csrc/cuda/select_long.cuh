// select for few and long rows: many blocks for each, in two launches.
//
//   select_count_kernel   a block per (row, chunk): how many tokens of the chunk have each value of the top 11 bits
//   select_long_kernel    the same grid: each block adds up the counts of its row, which tells in which bin the cut
//                         falls. Tokens above that bin stay (a bit each), those inside of it may (another), and their
//                         ranks go to a list of the row. The last block of a row to arrive finds the cut in the list
//                         and writes the indices.
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
// Work: scores and masks are read twice, 4 KiB of counts written for each chunk and read by all blocks of its row. By
// reasoning, [1, 131072] is 32 blocks; each reads 128 KiB of counts, and the last one has 16 KiB of bits, the list and
// the indices to go through. If the list does not fit shared memory (53 thousand ranks where a block may have 227 KiB),
// as where half of all scores are about equal, that block reads it from memory two or three times. Not measured on a
// GPU yet.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/select_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/select.cuh"
#include "cuda/workspace.cuh"

namespace pyvtk::cuda {

// Up to here a row is one block's, and its ranks fit the shared memory of every device.
inline constexpr int64_t kTokensOfBlock = 16384;
// More rows than this keep a device busy with a block for each.
inline constexpr int64_t kFewRows = 128;
inline constexpr int kLongBins = 1 << kMostBits;
inline constexpr int kLongShift = 32 - kMostBits;
inline constexpr int kWordsOfWarp = 8;  // that a warp has in registers at a time: the latency of memory is paid once

// How the rows of a problem are cut, and the workspace.
struct LongRows {
  int64_t words;  // of 32 tokens, of a row
  int64_t words_of_chunk;
  int64_t chunks;  // of a row
  int threads;
  int shared_ranks;    // longer lists stay in global memory
  uint16_t* counts;    // [rows, chunks, kLongBins]: tokens that compete
  uint32_t* arrivals;  // [rows]
  uint32_t* stay;      // [rows, words]: the tokens that stay; until the end, those that are above the bin of the cut
  uint32_t* maybe;     // [rows, words]: the tokens in the bin of the cut
  uint32_t* list;      // [rows, tokens]: their ranks
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
__global__ void __launch_bounds__(32 * kMostWarps, 2)
    select_count_kernel(const SelectProblem problem, const Scores scores, const LongRows rows) {
  PYVTK_SHARED(histogram, unsigned[kLongBins]);
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
  const uint16_t* const counts = rows.counts + row.number * rows.chunks * kLongBins;  // [chunks, kLongBins]
  unsigned sum = 0;
  for (unsigned i = threadIdx.x; i < kLongBins / 4; i += blockDim.x) {
    unsigned bins[4] = {0, 0, 0, 0};
    for (int64_t chunk = 0; chunk < rows.chunks; ++chunk) {
      const ushort4 some = reinterpret_cast<const ushort4*>(counts)[chunk * (kLongBins / 4) + i];
      bins[0] += some.x;
      bins[1] += some.y;
      bins[2] += some.z;
      bins[3] += some.w;
    }
    PYVTK_UNROLL
    for (int j = 0; j < 4; ++j) {
      histogram[4 * i + j] = bins[j];
      sum += bins[j];
    }
  }
  LongCut cut{};
  cut.wanted = has_count(problem) ? max(count_of_row(problem, row.number, 0), int64_t{0}) : problem.tokens;
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
  for (int64_t chunk = threadIdx.x; chunk < row.chunk; chunk += blockDim.x) {
    before += counts[chunk * kLongBins + bin.number];
  }
  cut.before = prefix_of_warps(sum_of_warp(before)).total;
  return cut;
}

// The end of a row, by its last block: the cut inside of the bin, then all that is to be written.
__device__ __forceinline__ void finish_long_row(const SelectProblem& problem, const LongRows& rows, int64_t number,
                                                const LongCut& cut) {
  SelectRow<RanksOf> row{};
  row.resize(static_cast<int>(problem.tokens));
  row.stay = rows.stay + number * rows.words;
  if (cut.length > 0) {
    SelectRow<RanksOf> list{};
    list.resize(static_cast<int>(cut.length));
    list.scores = {rows.list + number * problem.tokens};
    list.ranks = list.size <= rows.shared_ranks ? dynamic_shared<uint32_t>() : nullptr;
    const Cut inside = cut_at_count(list, Set{}, read_ranks(list), cut.needed);
    const uint32_t* const maybe = rows.maybe + number * rows.words;
    int before = count(row, maybe).before;  // of the list
    for (int first = row.begin; first < row.end; first += 32) {
      const int word = first + lane_of_warp();
      const uint32_t bits = word < row.end ? maybe[word] : 0;
      const int up_to_lane = sum_up_to_lane(__popc(bits));
      uint32_t stays = 0;
      int place = before + up_to_lane - __popc(bits);
      for (uint32_t left = bits; left; left &= left - 1, ++place) {
        if (inside.holds(list.rank(place), place)) stays |= left & -left;
      }
      if (stays) row.stay[word] |= stays;
      before += __shfl_sync(kAllLanes, up_to_lane, 31);
    }
    __syncwarp();
  }
  const bool overflow = min(cut.wanted, int64_t{cut.total}) > problem.capacity;
  write_row<true>(row, problem, number, count(row, row.stay), overflow);
}

// Block: (row, chunk).
template <class Scores>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    select_long_kernel(const SelectProblem problem, const Scores scores, const LongRows rows) {
  const LongRow<Scores> row = long_row(problem, scores, rows);
  const LongCut cut = long_cut(problem, rows, row);
  uint32_t* const list = rows.list + row.number * problem.tokens;
  int place = static_cast<int>(cut.before);
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
  if (!is_last_block(&rows.arrivals[row.number], static_cast<uint32_t>(rows.chunks))) return;
  finish_long_row(problem, rows, row.number, cut);
}

// Launchers ----------------------------------------------------------------------------------------------------------

// Whether rows get more than one block each, in two launches. Does not depend on the device.
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
  cudaError_t status = most_dynamic_shared(&select_long_kernel<Scores>, available);
  if (status != cudaSuccess) return status;
  const int64_t ranks = std::clamp<int64_t>(available / 4, 0, plan.problem.tokens);
  plan.rows.shared_ranks = static_cast<int>(ranks);
  const dim3 grid(static_cast<unsigned>(blocks)), block(static_cast<unsigned>(plan.rows.threads));
  status = launch(&select_count_kernel<Scores>, grid, block, 0, stream, plan.problem, scores, plan.rows);
  if (status != cudaSuccess) return status;
  return launch(&select_long_kernel<Scores>, grid, block, static_cast<size_t>(4 * ranks), stream, plan.problem, scores,
                plan.rows);
}

// As planned, for scores of type T; writes indices, counts and overflow.
template <class T>
cudaError_t select(const SelectPlan& plan, cudaStream_t stream) {
  if (!plan.is_long) return select<T>(plan.problem, stream);
  if (plan.problem.rows == 0) return cudaSuccess;
  if (plan.problem.tokens > kMostTokens) return cudaErrorInvalidValue;
  return launch_select_long(plan, any_scores<T>(plan.problem), stream);
}

}  // namespace pyvtk::cuda
