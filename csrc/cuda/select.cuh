// select: the tokens that stay, row by row. pyvtk/reference/select.py is the definition; the CPU's way is cpu/select.h.
//
// One block per row. Few and long rows get more, by these functions too: select_long.cuh; rows of up to 16384 tokens of
// which nothing else is asked have a kernel of their own: select_short.cuh. A score becomes a uint32 that
// orders as scores rank. All criteria keep a prefix of (rank descending, token ascending), so each is a Cut and the
// most restrictive one decides. A cut is found by histograms over the range of the ranks that are left, up to 11 bits
// at a time: usually two, and none where all are equal. Scores are read once and their ranks stay in shared memory, if
// the row fits there; else every pass reads the scores again.
//
//   warp 0: tokens 0 .. 32 k - 1      warp 1: the next 32 k      ...      k words of 32 tokens for each warp
//
// Token 32 w + j always belongs to lane j of the warp that owns word w: ranks need no barrier between passes, sets of
// tokens (a bit for each) only __syncwarp, and order within a row is that of warps. Counts and masses are integers, so
// the order in which atomics happen cannot matter. Reads scores and masks once (segments and keep once per segment),
// writes the indices.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/select_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

inline constexpr int kMostBits = 11;  // 2048 counters are 8 KiB: many blocks of them fit a multiprocessor
inline constexpr uint32_t kNanRank = 0;
inline constexpr uint32_t kZeroRank = 0x80000000u;
inline constexpr uint32_t kInfinityRank = 0xff800000u;

// Ordered as scores rank: NaN lowest, -0.0 as +0.0.
__device__ __forceinline__ uint32_t rank_of(float score) {
  const uint32_t bits = std::bit_cast<uint32_t>(score);
  const uint32_t rank = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? kNanRank : bits == 0x80000000u ? kZeroRank : rank;
}
__device__ __forceinline__ uint32_t rank_of(uint32_t rank) { return rank; }

// As to_float, by one instruction; which NaN it is does not matter here.
template <class T>
__device__ __forceinline__ float widen(T x) {
  if constexpr (std::is_same_v<T, float16>) {
    return widen_half2(x.bits).x;
  } else {
    return to_float(x);
  }
}

// Scores of a row: of a type that the kernel is compiled for,
template <class T>
struct ScoresOf {
  const T* data;

  __device__ __forceinline__ float operator[](int64_t i) const { return widen(data[i]); }
  __device__ __forceinline__ ScoresOf from(int64_t i) const { return {data + i}; }
};
// or of a type that it looks up: the kernel that can do everything is large, and one of it does.
enum class ScoreType { float32, bfloat16, float16 };
struct AnyScores {
  const void* data;
  ScoreType type;

  __device__ __forceinline__ float operator[](int64_t i) const {
    if (type == ScoreType::float32) return static_cast<const float*>(data)[i];
    return of_bits(static_cast<const uint16_t*>(data)[i]);
  }
  // Several, all of them on their way at once.
  template <int kCount>
  __device__ __forceinline__ void read(const int (&places)[kCount], float (&scores)[kCount]) const {
    if (type == ScoreType::float32) {
      PYVTK_UNROLL
      for (int i = 0; i < kCount; ++i) scores[i] = static_cast<const float*>(data)[places[i]];
    } else {
      uint16_t bits[kCount];
      PYVTK_UNROLL
      for (int i = 0; i < kCount; ++i) bits[i] = static_cast<const uint16_t*>(data)[places[i]];
      PYVTK_UNROLL
      for (int i = 0; i < kCount; ++i) scores[i] = of_bits(bits[i]);
    }
  }
  __device__ __forceinline__ float of_bits(uint16_t bits) const {
    return type == ScoreType::bfloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
  }
  __device__ __forceinline__ AnyScores from(int64_t i) const {
    return {static_cast<const char*>(data) + i * (type == ScoreType::float32 ? 4 : 2), type};
  }
};
// or ranks already.
struct RanksOf {
  const uint32_t* data;

  __device__ __forceinline__ uint32_t operator[](int64_t i) const { return data[i]; }
};

// A prefix of the ranking: ranks above the pivot, and those equal to it of tokens before `end`.
struct Cut {
  uint32_t pivot;
  int64_t end;

  constexpr bool holds(uint32_t rank, int64_t token) const { return rank > pivot || (rank == pivot && token < end); }
};
inline constexpr Cut kKeepAll{kNanRank, std::numeric_limits<int64_t>::max()};
inline constexpr Cut kKeepNone{std::numeric_limits<uint32_t>::max(), 0};

__device__ __forceinline__ Cut stricter(Cut a, Cut b) {
  if (a.pivot != b.pivot) return a.pivot > b.pivot ? a : b;
  return a.end < b.end ? a : b;
}

// Some tokens of a row, in words of 32.
struct Set {
  const uint32_t* with;     // shared [words]; nullptr: all tokens of the row
  const uint32_t* without;  // shared [words]; nullptr: none
  const int32_t* segments;  // [size]; nullptr: of any segment
  int64_t segment;          // the only one
};

// One row while it is worked on. All threads of the block hold the same.
template <class Scores>
struct SelectRow {
  Scores scores;            // [size]
  const int32_t* segments;  // [size]; nullptr: all tokens are of segment 0
  int64_t first_token;      // what indices count from
  int size;
  int words;            // of 32 tokens
  int begin, end;       // words of this warp
  int bits;             // of a digit
  uint32_t* ranks;      // shared [size]; nullptr: they do not fit
  uint32_t* stay;       // shared [words]: the tokens that stay
  uint32_t* fixed;      // shared [words]: those of them that do not compete; nullptr without masks
  uint32_t* candidate;  // shared [words]: not dropped, and of a segment that exists; nullptr without masks

  // Sets the size, and what follows from it.
  __device__ __forceinline__ void resize(int tokens) {
    size = tokens;
    words = (size + 31) / 32;
    const int words_per_warp = (words + warps_of_block() - 1) / warps_of_block();
    begin = min(warp_of_block() * words_per_warp, words);
    end = min(begin + words_per_warp, words);
    // Clearing and summing more bins than there are tokens would cost more than it narrows.
    bits = min(max(32 - __clz(size) - 2, 5), kMostBits);
  }
  __device__ __forceinline__ uint32_t rank(int token) const { return ranks ? ranks[token] : rank_of(scores[token]); }
  // Whether this lane's token of the word is in the set, for the warp that owns the word.
  __device__ __forceinline__ bool holds(const Set& set, int word) const {
    const int token = word * 32 + static_cast<int>(threadIdx.x % 32);
    const uint32_t bits = (set.with ? set.with[word] : kAllLanes) & ~(set.without ? set.without[word] : 0u);
    return token < size && bits >> (token % 32) & 1 && (!set.segments || set.segments[token] == set.segment);
  }
};

// Of a set of tokens: how much it weighs, and the range of its ranks.
template <class Mass>
struct Summary {
  Mass mass;
  uint32_t low;
  uint32_t high;
};
template <class Mass>
__device__ Summary<Mass> summary_of_block(Mass mass, uint32_t low, uint32_t high) {
  PYVTK_SHARED(masses, Mass[kMostWarps]);
  PYVTK_SHARED(lows, uint32_t[kMostWarps]);
  PYVTK_SHARED(highs, uint32_t[kMostWarps]);
  mass = sum_of_warp(mass);
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  const int lane = lane_of_warp();
  __syncthreads();  // of the last call, all have read
  if (lane == 0) {
    masses[warp_of_block()] = mass;
    lows[warp_of_block()] = low;
    highs[warp_of_block()] = high;
  }
  __syncthreads();
  const bool exists = lane < warps_of_block();
  return {sum_of_warp(exists ? masses[lane] : Mass{0}),
          __reduce_min_sync(kAllLanes, exists ? lows[lane] : std::numeric_limits<uint32_t>::max()),
          __reduce_max_sync(kAllLanes, exists ? highs[lane] : 0u)};
}

// A weight is a function of a rank.
struct One {
  __device__ unsigned operator()(uint32_t) const { return 1; }
};

template <class Mass, class Scores, class Weight>
__device__ Summary<Mass> summarize(const SelectRow<Scores>& row, const Set& set, Weight weight) {
  Mass mass = 0;
  uint32_t low = std::numeric_limits<uint32_t>::max(), high = 0;
  for (int word = row.begin; word < row.end; ++word) {
    if (!row.holds(set, word)) continue;
    const uint32_t rank = row.rank(word * 32 + lane_of_warp());
    mass += weight(rank);
    low = min(low, rank);
    high = max(high, rank);
  }
  return summary_of_block(mass, low, high);
}

// The prefix that ends with the `ties`-th token of the set whose rank is the pivot.
template <class Scores>
__device__ Cut cut_after_ties(const SelectRow<Scores>& row, const Set& set, uint32_t pivot, int64_t ties) {
  PYVTK_SHARED(end, int);
  const auto equal = [&](int word) {
    return __ballot_sync(kAllLanes, row.holds(set, word) && row.rank(word * 32 + lane_of_warp()) == pivot);
  };
  int mine = 0;
  for (int word = row.begin; word < row.end; ++word) mine += __popc(equal(word));
  int64_t missing = ties - prefix_of_warps(mine).before;
  if (missing > 0 && missing <= mine) {
    for (int word = row.begin; missing > 0; ++word) {
      uint32_t found = equal(word);
      const int count = __popc(found);
      if (missing <= count) {
        for (; missing > 1; --missing) found &= found - 1;
        if (lane_of_warp() == 0) end = word * 32 + __ffs(static_cast<int>(found));
      }
      missing -= count;
    }
  }
  __syncthreads();
  return {pivot, end};
}

// The bin in which, from the top, `need` is reached; what is still needed there, and all that it holds.
template <class Mass>
struct Bin {
  int number;
  Mass need;
  Mass mass;
};
// histogram: shared [bins], written before a barrier; 1 <= need <= its sum
template <class Mass>
__device__ Bin<Mass> find_bin(const Mass* histogram, int bins, Mass need) {
  PYVTK_SHARED(chosen, Bin<Mass>);
  // Each thread takes a run of bins, each warp 32 runs.
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int run = (bins + threads - 1) / threads;
  const int first = bins - 1 - thread * run;  // downwards
  Mass mine = 0;
  for (int bin = first; bin > first - run && bin >= 0; --bin) mine += histogram[bin];
  Mass before = sum_up_to_lane(mine);
  before += prefix_of_warps(__shfl_sync(kAllLanes, before, 31)).before - mine;
  if (before < need && need <= before + mine) {
    int bin = first;
    for (; histogram[bin] < need - before; --bin) before += histogram[bin];
    chosen = {bin, need - before, histogram[bin]};
  }
  __syncthreads();
  return chosen;
}

// The smallest prefix of the set's ranking that weighs `need` or more; 1 <= need <= what all of it weighs.
template <class Mass, class Scores, class Weight>
__device__ Cut find_cut(const SelectRow<Scores>& row, const Set& set, uint32_t low, uint32_t high, Mass need,
                        Weight weight) {
  PYVTK_SHARED(histogram, Mass[1 << kMostBits]);
  while (low != high) {
    const int shift = max(0, 32 - __clz(static_cast<int>(high - low)) - row.bits);
    const int bins = static_cast<int>((high - low) >> shift) + 1;
    for (int bin = static_cast<int>(threadIdx.x); bin < bins; bin += static_cast<int>(blockDim.x)) histogram[bin] = 0;
    __syncthreads();
    for (int word = row.begin; word < row.end; ++word) {
      if (!row.holds(set, word)) continue;
      const uint32_t rank = row.rank(word * 32 + lane_of_warp());
      if (rank >= low && rank <= high) atomicAdd(&histogram[(rank - low) >> shift], static_cast<Mass>(weight(rank)));
    }
    __syncthreads();
    const Bin<Mass> bin = find_bin(histogram, bins, need);
    low += static_cast<uint32_t>(bin.number) << shift;
    high = low + min(high - low, (1u << shift) - 1);
    need = bin.need;
    // Every token counts in a count: if all of a bin stay, nothing is left to divide.
    if (std::is_same_v<Mass, unsigned> && need == bin.mass && low > 0) return {low - 1, 0};
  }
  return cut_after_ties(row, set, low, static_cast<int64_t>(ceil_div<Mass>(need, weight(low))));
}

// The best `count` of the set.
template <class Scores>
__device__ Cut cut_at_count(const SelectRow<Scores>& row, const Set& set, Summary<unsigned> summary, int64_t count) {
  if (count <= 0) return kKeepNone;
  if (count >= summary.mass) return kKeepAll;
  return find_cut(row, set, summary.low, summary.high, static_cast<unsigned>(count), One{});
}
template <class Scores>
__device__ Cut cut_at_count(const SelectRow<Scores>& row, const Set& set, int64_t count) {
  return count <= 0 ? kKeepNone : cut_at_count(row, set, summarize<unsigned>(row, set, One{}), count);
}

// Integer mass of a score, given by its rank, if `largest` is the largest of its group: floor(s * 2^(31 - e)) with
// largest = f * 2^e, 0.5 <= f < 1. Exact, also for subnormal numbers. Where no score has mass, all have the same.
struct MassOf {
  uint32_t largest;
  int left;      // shift of the significand for a score with the largest's exponent
  int exponent;  // the largest's

  __device__ explicit MassOf(uint32_t largest) : largest(largest) {
    const uint32_t bits = largest & 0x7fffffffu;
    exponent = max(1, static_cast<int>(bits >> 23));
    left = __clz(static_cast<int>(significand(bits))) - 1;
  }
  __device__ static uint32_t significand(uint32_t bits) { return (bits & 0x7fffffu) | (bits >> 23 ? 0x800000u : 0u); }
  __device__ unsigned long long operator()(uint32_t rank) const {
    if (largest == kInfinityRank) return rank == kInfinityRank;
    if (rank <= kZeroRank) return largest <= kZeroRank;
    const uint32_t bits = rank & 0x7fffffffu;
    const int right = exponent - max(1, static_cast<int>(bits >> 23));
    return (static_cast<unsigned long long>(significand(bits)) << left) >> min(right, 63);
  }
};

// The smallest prefix that holds the share p of the set's mass, at least one token.
template <class Scores>
__device__ Cut cut_at_mass(const SelectRow<Scores>& row, const Set& set, double p) {
  const Summary<unsigned> all = summarize<unsigned>(row, set, One{});
  if (all.mass == 0) return kKeepAll;
  const MassOf weight(all.high);
  const unsigned long long total = summarize<unsigned long long>(row, set, weight).mass;
  unsigned long long need = total;
  if (all.high <= kZeroRank || p <= 0.0) {
    need = 1;
  } else if (p < 1.0) {
    need = max(static_cast<unsigned long long>(ceil(p * static_cast<double>(total))), 1ull);
  }
  return find_cut(row, set, all.low, all.high, need, weight);
}

__device__ inline Cut cut_of_threshold(const SelectProblem& problem, int64_t row, int64_t segment) {
  if (!problem.threshold) return kKeepAll;
  const float threshold = problem.threshold.at(row, segment);
  // Nothing reaches NaN. Otherwise: above the rank just below the threshold's.
  return threshold != threshold ? kKeepNone : Cut{rank_of(threshold) - 1, 0};
}

__device__ __forceinline__ bool has_count(const SelectProblem& problem) {
  return problem.num_keep >= 0 || problem.num_keep_per_row;
}
__device__ __forceinline__ int64_t count_of_row(const SelectProblem& problem, int64_t row, int64_t segment) {
  return problem.num_keep_per_row ? max(problem.num_keep_per_row.at(row, segment), int64_t{0}) : problem.num_keep;
}

// stay := the tokens of the set that the cut holds, and those of `others`, which may be stay itself; nullptr: none
template <class Scores>
__device__ void mark(const SelectRow<Scores>& row, const Set& set, Cut cut, const uint32_t* others) {
  for (int word = row.begin; word < row.end; ++word) {
    const int token = word * 32 + lane_of_warp();
    const uint32_t bits = __ballot_sync(kAllLanes, row.holds(set, word) && cut.holds(row.rank(token), token));
    __syncwarp();  // the set may be stay too, and a vote does not order memory
    if (lane_of_warp() == 0) row.stay[word] = bits | (others ? others[word] : 0u);
  }
  __syncwarp();
}

// Sets row.ranks, if there is room; the summary of all tokens.
template <class Scores>
__device__ Summary<unsigned> read_ranks(const SelectRow<Scores>& row) {
  uint32_t low = std::numeric_limits<uint32_t>::max(), high = 0;
  for (int token = row.begin * 32 + lane_of_warp(); token < min(row.end * 32, row.size); token += 32) {
    const uint32_t rank = rank_of(row.scores[token]);
    if (row.ranks) row.ranks[token] = rank;
    low = min(low, rank);
    high = max(high, rank);
  }
  Summary<unsigned> summary = summary_of_block(0u, low, high);
  summary.mass = static_cast<unsigned>(row.size);
  return summary;
}

// most: how many tokens may stay at most
template <class Scores>
__device__ void choose_from_all(const SelectRow<Scores>& row, const SelectProblem& problem, int64_t number,
                                const Summary<unsigned>& summary, int64_t most) {
  const Set all{};
  const int64_t wanted = has_count(problem) ? min(count_of_row(problem, number, 0), most) : most;
  mark(row, all, stricter(cut_of_threshold(problem, number, 0), cut_at_count(row, all, summary, wanted)), nullptr);
}

template <class Scores>
__device__ void choose_with_masks(const SelectRow<Scores>& row, const SelectProblem& problem, int64_t number) {
  const auto mask_of_row = [&](const PerToken<uint8_t>& mask) {
    return problem.cu_seqlens ? (mask ? mask.data + row.first_token : nullptr) : mask.row(number, problem.tokens);
  };
  const uint8_t* keep = mask_of_row(problem.keep);
  const uint8_t* drop = mask_of_row(problem.drop);
  const uint8_t* candidates = mask_of_row(problem.candidates);
  const int64_t num_segments = row.segments ? problem.num_segments : 1;
  const auto is_forced = [&](int token) { return keep && keep[token] && !(drop && drop[token]); };
  for (int word = row.begin; word < row.end; ++word) {
    const int token = word * 32 + lane_of_warp();
    const bool exists = token < row.size;
    if (exists && row.ranks) row.ranks[token] = rank_of(row.scores[token]);
    const bool allowed = exists && !(drop && drop[token]);
    bool eligible = exists && !(candidates && !candidates[token]);
    if (row.segments && exists) {
      eligible = eligible && row.segments[token] >= 0 && row.segments[token] < num_segments;
    }
    const bool fixed = allowed && ((keep && keep[token]) || (problem.keep_others && !eligible));
    const uint32_t fixed_bits = __ballot_sync(kAllLanes, fixed);
    const uint32_t candidate_bits = __ballot_sync(kAllLanes, allowed && eligible);
    if (lane_of_warp() == 0) {
      row.fixed[word] = row.stay[word] = fixed_bits;
      row.candidate[word] = candidate_bits;
    }
  }
  __syncwarp();

  for (int64_t segment = 0; segment < num_segments; ++segment) {
    const Set candidates_here{row.candidate, nullptr, row.segments, segment};
    const Set competitors{row.candidate, row.fixed, row.segments, segment};
    Cut cut = cut_of_threshold(problem, number, segment);
    if (problem.top_p) {
      cut = stricter(cut, cut_at_mass(row, candidates_here, problem.top_p.at(number, segment)));
    }
    if (has_count(problem)) {
      int forced = 0;
      if (keep) {
        for (int token = row.begin * 32 + lane_of_warp(); token < min(row.end * 32, row.size); token += 32) {
          forced += is_forced(token) && (!row.segments || row.segments[token] == segment);
        }
        forced = prefix_of_warps(sum_of_warp(forced)).total;
      }
      cut = stricter(cut, cut_at_count(row, competitors, count_of_row(problem, number, segment) - forced));
    }
    mark(row, competitors, cut, row.stay);
  }
}

// How many tokens a set of bits holds.
template <class Scores>
__device__ Prefix<int> count(const SelectRow<Scores>& row, const uint32_t* bits) {
  int mine = 0;
  for (int word = row.begin + lane_of_warp(); word < row.end; word += 32) mine += __popc(bits[word]);
  return prefix_of_warps(sum_of_warp(mine));
}

// More stay than fit: fixed tokens go first, then the best of the others.
template <class Scores>
__device__ void clip(const SelectRow<Scores>& row, int64_t capacity) {
  const int num_fixed = count(row, row.fixed).total;
  const bool only_fixed = num_fixed >= capacity;
  const Set set{only_fixed ? row.fixed : row.stay, only_fixed ? nullptr : row.fixed, nullptr, 0};
  const Cut cut = cut_at_count(row, set, only_fixed ? capacity : capacity - num_fixed);
  mark(row, set, cut, only_fixed ? nullptr : row.fixed);
}

// Ascending, in place; a bitonic network whose missing upper part counts as infinite.
__device__ inline void sort_by_block(uint64_t* values, int64_t size) {
  const auto order = [&](int64_t a, int64_t b) {
    if (b >= size || values[a] <= values[b]) return;
    const uint64_t larger = values[a];
    values[a] = values[b];
    values[b] = larger;
  };
  for (int64_t width = 2; width / 2 < size; width *= 2) {
    const int64_t pairs = (size + width - 1) / width * (width / 2);
    __syncthreads();
    for (int64_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
      const int64_t first = pair / (width / 2) * width, place = pair % (width / 2);
      order(first + place, first + width - 1 - place);
    }
    for (int64_t step = width / 4; step > 0; step /= 2) {
      __syncthreads();
      for (int64_t pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
        const int64_t place = pair / step * (2 * step) + pair % step;
        order(place, place + step);
      }
    }
  }
  __syncthreads();
}

// Writes a row's indices, count and overflow. stayed: of row.stay, as count() says, and no more than fit
template <bool kPlain, class Scores>
__device__ void write_row(const SelectRow<Scores>& row, const SelectProblem& problem, int64_t number,
                          Prefix<int> stayed, bool overflow) {
  if (threadIdx.x == 0) {
    problem.counts[number] = stayed.total;
    problem.overflow[number] = overflow;
  }

  int64_t* out = problem.indices + number * problem.capacity;  // [capacity]
  const int64_t padding = problem.capacity - stayed.total;
  int64_t* padded = out + (problem.align_right ? 0 : stayed.total);  // [padding]
  for (int64_t i = threadIdx.x; i < padding; i += blockDim.x) padded[i] = -1;
  out += problem.align_right ? padding : 0;

  const bool by_score = !kPlain && problem.by_score;
  int place = stayed.before;
  uint32_t words = 0;  // a lane has one of 32 words
  for (int word = row.begin; word < row.end; ++word) {
    const int turn = (word - row.begin) % 32;
    if (turn == 0) words = word + lane_of_warp() < row.end ? row.stay[word + lane_of_warp()] : 0;
    const uint32_t bits = __shfl_sync(kAllLanes, words, turn);
    if (bits >> lane_of_warp() & 1) {
      const int token = word * 32 + lane_of_warp();
      int64_t value = row.first_token + token;
      if (by_score) {
        // ascending: fixed tokens first, then ranks descend, then tokens ascend
        const uint64_t tier = row.fixed[word] >> lane_of_warp() & 1 ? 0 : 1;
        value = static_cast<int64_t>(tier << 63 | uint64_t{~row.rank(token)} << 31 | static_cast<uint64_t>(token));
      }
      out[place + __popc(bits & ((1u << lane_of_warp()) - 1))] = value;
    }
    place += __popc(bits);
  }
  if (by_score) {
    sort_by_block(reinterpret_cast<uint64_t*>(out), stayed.total);
    for (int64_t i = threadIdx.x; i < stayed.total; i += blockDim.x) out[i] = row.first_token + (out[i] & 0x7fffffff);
  }
}

// What a block needs of shared memory besides the declared: room for sets of tokens, and for ranks.
struct SelectMemory {
  int words;  // of 32 tokens, of the longest row
  int ranks;  // rows of more tokens read their scores again
  int64_t bytes;
};

// Chooses row `number`, with all threads of the block, and writes its indices, count and overflow. Scores may have been
// written by this block before a barrier. Between two calls there has to be a barrier.
//   kPlain: no masks, no segments, no top_p; ascending
//   scores: problem.scores
//   shared: [memory.bytes]
template <bool kPlain, class Scores>
__device__ __forceinline__ void select_row(const SelectProblem& problem, const Scores scores, int64_t number,
                                           SelectMemory memory, uint32_t* shared) {
  SelectRow<Scores> row{};
  int size = static_cast<int>(problem.tokens);
  if (problem.cu_seqlens) {
    // Offsets that the host has not seen must not lead outside of the scores.
    const int64_t begin = min(max(int64_t{problem.cu_seqlens[number]}, int64_t{0}), problem.tokens);
    const int64_t end = min(max(int64_t{problem.cu_seqlens[number + 1]}, begin), problem.tokens);
    row.first_token = begin;
    size = static_cast<int>(end - begin);
    row.scores = scores.from(begin);
    row.segments = problem.segments ? problem.segments.data + begin : nullptr;
  } else {
    row.scores =
        scores.from(number / problem.heads * problem.batch_stride + number % problem.heads * problem.head_stride);
    row.segments = problem.segments.row(number, problem.tokens);
  }
  row.resize(size);
  row.stay = shared;
  uint32_t* after = row.stay + memory.words;
  if (!kPlain) {
    row.fixed = after;
    row.candidate = row.fixed + memory.words;
    after = row.candidate + memory.words;
  }
  row.ranks = row.size <= memory.ranks ? after : nullptr;

  Prefix<int> stayed{};
  bool overflow = false;
  if constexpr (kPlain) {
    // Of a prefix, the best that fit are a shorter prefix: the same code finds it.
    const Summary<unsigned> summary = read_ranks(row);
    PYVTK_NOT_UNROLLED
    for (int64_t most = row.size;; most = problem.capacity) {
      choose_from_all(row, problem, number, summary, most);
      stayed = count(row, row.stay);
      if (stayed.total <= problem.capacity) break;
      overflow = true;
    }
  } else {
    choose_with_masks(row, problem, number);
    stayed = count(row, row.stay);
    overflow = stayed.total > problem.capacity;
    if (overflow) {
      clip(row, problem.capacity);
      stayed = count(row, row.stay);
    }
  }
  write_row<kPlain>(row, problem, number, stayed, overflow);
}

template <class Scores, bool kPlain>
__global__ void __launch_bounds__(32 * kMostWarps, 1)
    select_kernel(const SelectProblem problem, const Scores scores, const SelectMemory memory) {
  select_row<kPlain>(problem, scores, blockIdx.x, memory, dynamic_shared<uint32_t>());
}

// Threads for rows of so many tokens. Eight to sixteen tokens a thread: with fewer threads latency of memory shows,
// with more that of barriers.
inline int select_threads(int64_t tokens) {
  if (tokens <= 1024) return 128;
  if (tokens <= 4096) return 256;
  return 32 * kMostWarps;
}

// Whether nothing but num_keep and threshold decides, over all tokens.
inline bool is_plain(const SelectProblem& problem) {
  return !problem.keep && !problem.drop && !problem.candidates && !problem.segments && !problem.top_p &&
         !problem.by_score;
}

// False if sets of tokens do not fit `available` bytes.
inline bool select_memory(const SelectProblem& problem, bool plain, int64_t available, SelectMemory& memory) {
  const int64_t longest_row = problem.tokens;
  const int64_t words = ceil_div<int64_t>(longest_row, 32);
  const int64_t bytes_of_sets = (plain ? 1 : 3) * 4 * words;
  if (bytes_of_sets > available) return false;
  int64_t ranks = longest_row;
  if (problem.cu_seqlens) {
    // The longest sample is not known here. Rows far beyond the average read their scores again.
    const int64_t average = ceil_div<int64_t>(problem.tokens, problem.rows);
    ranks = longest_row < 4096 ? longest_row : min(longest_row, max(4 * average, int64_t{4096}));
  }
  if (bytes_of_sets + 4 * ranks > available) ranks = 0;
  memory = {static_cast<int>(words), static_cast<int>(ranks), bytes_of_sets + 4 * ranks};
  return true;
}

template <bool kPlain, class Scores>
cudaError_t launch_select(const SelectProblem& problem, Scores scores, cudaStream_t stream) {
  auto* const kernel = &select_kernel<Scores, kPlain>;
  int64_t available = 0;
  const cudaError_t status = most_dynamic_shared(kernel, available);
  if (status != cudaSuccess) return status;
  SelectMemory memory;
  if (!select_memory(problem, kPlain, available, memory)) return cudaErrorInvalidValue;
  const int64_t typical_row = problem.cu_seqlens ? ceil_div<int64_t>(problem.tokens, problem.rows) : problem.tokens;
  return launch(kernel, dim3(static_cast<unsigned>(problem.rows)), dim3(select_threads(typical_row)),
                static_cast<size_t>(memory.bytes), stream, problem, scores, memory);
}

inline constexpr int64_t kMostTokens = std::numeric_limits<int32_t>::max() - 32;

template <class T>
AnyScores any_scores(const SelectProblem& problem) {
  return {problem.scores, std::is_same_v<T, float>      ? ScoreType::float32
                          : std::is_same_v<T, bfloat16> ? ScoreType::bfloat16
                                                        : ScoreType::float16};
}

// All rows of a problem whose scores are of type T; writes their indices, counts and overflow. Sets of tokens have to
// fit shared memory: cudaErrorInvalidValue above 1.6 million tokens without masks (on devices with 227 KiB), half a
// million with.
template <class T>
cudaError_t select(const SelectProblem& problem, cudaStream_t stream) {
  if (problem.rows == 0) return cudaSuccess;
  if (problem.rows > std::numeric_limits<int32_t>::max() || problem.tokens > kMostTokens) return cudaErrorInvalidValue;
  if (is_plain(problem)) {
    return launch_select<true>(problem, ScoresOf<T>{static_cast<const T*>(problem.scores)}, stream);
  }
  return launch_select<false>(problem, any_scores<T>(problem), stream);
}

}  // namespace pyvtk::cuda
