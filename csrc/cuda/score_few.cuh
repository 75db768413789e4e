// Attention received per key from few queries (64 at most): the part of score_and_select that reads q and k.
// pyvtk/reference/score.py is the definition; what follows these kernels is in score_and_select.cuh.
//
// Work is bound by reading k, so all query heads of a group share each read of it: a row is a (query head, query) pair,
// and a block has up to 8 rows of one group and a run of keys. Some lanes share a key, so that together they read long
// pieces of it, 16 bytes each; every lane has 8 such reads under way. Products are added up over the lanes by shuffles.
//
//   lane 0   lane 1   lane 2   lane 3   lane 0   ...      segments of 16 bytes of a key, if four lanes share it
//
// score_rows_kernel writes what the softmax of each row needs to know of the run: the maximum of its logits and the sum
// of their exponentials. Logits themselves are kept where they take no more memory than k does, or for four queries.
// Samples with more queries are read a second time by score_columns_kernel, once the denominators are known, which
// reduces their values over queries at once. Every sum has a fixed order.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "common/score_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

inline constexpr int kFewThreads = 256;
inline constexpr int kFewWarps = kFewThreads / 32;
inline constexpr int kFewQueries = 64;      // of a sample at most
inline constexpr int kSegments = 4;         // of a key, read by one lane
inline constexpr int kKeysOfLane = 2;       // under way at the same time
inline constexpr int kMostLanesOfKey = 16;  // 256 channels of float32
inline constexpr int kRowsOfColumns = 16;   // rows that score_columns_kernel has in shared memory
inline constexpr int kColumnsAtOnce = 4;    // and multiplies at a time
inline constexpr int kPitch = 256;          // floats of a row of q in shared memory; known, it takes no registers
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr int64_t kSeesNothing = std::numeric_limits<int64_t>::min();

// How the keys of each sample are cut into runs, a block (or a row of blocks) for each. Packed samples are as long as
// the device says: sample b begins with run (keys before it) / keys + b, and so many numbers are always enough.
struct KeyRuns {
  int keys;           // of a run
  int64_t of_sample;  // if not packed
  int64_t total;
};

inline KeyRuns key_runs(const ScoreProblem& p, int64_t axis, int64_t keys) {
  const int64_t of_sample = max(ceil_div(axis, keys), int64_t{1});
  return {static_cast<int>(keys), of_sample, p.packed() ? p.keys / keys + p.batch : p.batch * of_sample};
}

// One call: the problem, how it is cut, and the workspace.
struct FewProblem {
  ScoreProblem score;
  bool aligned;       // segments of k are aligned to 16 bytes
  bool query_max;     // the reduction over queries is a maximum
  bool visible_mean;  // it divides by the queries that see the key
  bool mean;          // by all valid queries
  bool head_max;      // score's methods, for the device
  bool head_mean;
  bool pairwise;
  bool merges_heads;
  int group;         // query heads of a key head
  int queries;       // of a sample at most
  int lanes_of_key;  // 2, 4, 8 or 16
  int lanes_log2;
  int segments;         // of 16 bytes, of a key
  int row_tiles;        // blocks that share a run of keys and a key head
  int kept;             // samples of at most so many queries keep their logits
  int units;            // parts of a sample whose heads are reduced together: 1, or each key head for itself
  int outs_of_unit;     // heads of the result
  int columns_of_unit;  // in `columns`
  KeyRuns runs;

  float2* statistics;  // [runs.total, q_heads, queries]: maximum of the logits, sum of exp(logit - maximum)
  float* logits;       // [batch, q_heads, kept, scored], packed [q_heads, kept, total_k]; not seen: -inf
  float* lse;          // [batch, q_heads, queries], packed [q_heads, total_q]; nullptr: made of statistics when needed
  float* columns;      // [batch, units * columns_of_unit, scored], packed [..., total_k]: values reduced over queries
                       // (and over heads, where that is done for every pair or all of it is a sum)
};

// Where a sample lies. Offsets that the host has not seen do not lead outside of the tensors.
struct FewSample {
  int64_t number;
  int64_t q_offset, k_offset;  // elements of q and k before it
  int64_t row, column;         // entries of per-query and per-key arrays before it
  int queries, keys;
  int key_start, key_stop;        // scored
  int window_start, window_stop;  // those, and what the denominator needs besides
  int64_t lse, lse_head_stride;   // into lse_given and lse
};

__device__ __forceinline__ int clamped(int32_t offset, int low, int64_t high) {
  return static_cast<int>(min(max(int64_t{offset}, int64_t{low}), high));
}

__device__ __forceinline__ FewSample few_sample(const FewProblem& few, int64_t number) {
  const ScoreProblem& p = few.score;
  FewSample s;
  s.number = number;
  if (p.cu_seqlens_q) {
    const int first_row = clamped(p.cu_seqlens_q[number], 0, p.queries);
    const int first_key = clamped(p.cu_seqlens_k[number], 0, p.keys);
    s.queries = clamped(p.cu_seqlens_q[number + 1], first_row, p.queries) - first_row;
    s.keys = clamped(p.cu_seqlens_k[number + 1], first_key, p.keys) - first_key;
    s.row = s.lse = first_row;
    s.column = first_key;
    s.q_offset = s.row * p.q_row_stride;
    s.k_offset = s.column * p.k_row_stride;
    s.key_start = 0;
    s.key_stop = s.keys;
  } else {
    s.queries = static_cast<int>(p.queries);
    s.keys = static_cast<int>(p.keys);
    s.row = number * p.queries;
    s.column = number * p.keys;
    s.lse = number * p.q_heads * p.queries;
    s.q_offset = number * p.q_batch_stride;
    s.k_offset = number * p.k_batch_stride;
    s.key_start = static_cast<int>(p.key_start);
    s.key_stop = static_cast<int>(p.key_stop);
  }
  s.lse_head_stride = p.queries;
  const bool only_scored = p.range_denominator || p.lse_given || p.logit;
  s.window_start = only_scored ? s.key_start : 0;
  s.window_stop = only_scored ? s.key_stop : s.keys;
  return s;
}

// Runs of a sample; at least one.
__device__ __forceinline__ int64_t runs_of(const KeyRuns& runs, int64_t keys) {
  return max(ceil_div<int64_t>(keys, runs.keys), int64_t{1});
}
__device__ __forceinline__ int64_t first_run_of(const FewProblem& few, const KeyRuns& runs, const FewSample& s) {
  return few.score.cu_seqlens_k ? s.column / runs.keys + s.number : s.number * runs.of_sample;
}

// The sample that a run belongs to; -1: none. For all threads of the block.
__device__ inline int64_t sample_of_run(const FewProblem& few, const KeyRuns& runs, int64_t run) {
  const ScoreProblem& p = few.score;
  if (!p.cu_seqlens_k) return run / runs.of_sample;
  PYVTK_SHARED(found, unsigned);
  constexpr unsigned kNone = std::numeric_limits<unsigned>::max();
  if (threadIdx.x == 0) found = kNone;
  __syncthreads();
  for (int64_t b = threadIdx.x; b < p.batch; b += blockDim.x) {
    const int begin = clamped(p.cu_seqlens_k[b], 0, p.keys), end = clamped(p.cu_seqlens_k[b + 1], begin, p.keys);
    const int64_t first = begin / runs.keys + b;
    if (run >= first && run < first + runs_of(runs, end - begin)) atomicMin(&found, static_cast<unsigned>(b));
  }
  __syncthreads();
  return found == kNone ? -1 : int64_t{found};
}

// Keys at this position and before it are seen by the query, if they exist.
__device__ __forceinline__ int64_t reach_of(const ScoreProblem& p, const FewSample& s, int query) {
  if (p.q_mask && !p.q_mask[s.row + query]) return kSeesNothing;
  if (!p.causal) return std::numeric_limits<int64_t>::max();
  return p.q_positions ? int64_t{p.q_positions[s.row + query]} : int64_t{query} + s.keys - s.queries;
}
__device__ __forceinline__ int position_of(const ScoreProblem& p, const FewSample& s, int key) {
  return p.causal && p.k_positions ? p.k_positions[s.column + key] : key;
}
__device__ __forceinline__ bool exists(const ScoreProblem& p, const FewSample& s, int key) {
  return !p.k_mask || p.k_mask[s.column + key];
}

// Where key number key_start of a sample stands in an array of planes [planes, scored], packed [planes, total_k].
__device__ __forceinline__ int64_t plane_of(const ScoreProblem& p, const FewSample& s, int64_t planes, int64_t plane) {
  if (p.cu_seqlens_k) return plane * p.keys + s.column;
  return (s.number * planes + plane) * (p.key_stop - p.key_start);
}
__device__ __forceinline__ int64_t kept_plane(const FewProblem& few, const FewSample& s, int64_t head, int query) {
  return plane_of(few.score, s, few.score.q_heads * few.kept, head * few.kept + query);
}

// Softmax ------------------------------------------------------------------------------------------------------------

// Of some logits: their maximum (NaN aside) and the sum of exp(logit - maximum). No logits, or only -inf: -inf and 0.
struct Statistics {
  float largest = -kInfinity;
  float sum = 0.0f;

  __device__ __forceinline__ void add(float z) {
    if (z == -kInfinity) return;
    if (!(z < kInfinity)) {  // as infinity - infinity, and exp(NaN)
      sum = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const float e = expf(-fabsf(z - largest));
    sum = z > largest ? sum * e + 1.0f : sum + e;
    largest = fmaxf(largest, z);
  }
  __device__ __forceinline__ void add(Statistics other) {
    const float both = fmaxf(largest, other.largest), shift = both == -kInfinity ? 0.0f : both;
    sum = sum * expf(largest - shift) + other.sum * expf(other.largest - shift);
    largest = both;
  }
  // of so many neighbouring lanes, a power of two: the maximum first, so that each sum is rescaled once
  __device__ __forceinline__ void add_lanes(int lanes) {
    const float mine = largest;
    for (int step = lanes / 2; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    }
    sum = rescaled(mine, sum);
    for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  }
  // a sum of exp(logit - their_largest) as one of exp(logit - largest), which is no smaller
  __device__ __forceinline__ float rescaled(float their_largest, float their_sum) const {
    return their_sum * expf(their_largest - (largest == -kInfinity ? 0.0f : largest));
  }
  __device__ __forceinline__ float lse() const { return sum == 0.0f ? -kInfinity : largest + logf(sum); }
};

// The lse of rows [begin, end) of a sample's heads from first_head on, row = head * queries + query: to(row, lse), by
// one thread each. For all threads of the block.
template <class To>
__device__ __forceinline__ void lse_of_rows(const FewProblem& few, const FewSample& s, int64_t first_head, int begin,
                                            int end, To to) {
  constexpr int kLanes = 8;  // of a row: they share its runs
  const int64_t runs = runs_of(few.runs, s.window_stop - s.window_start), first = first_run_of(few, few.runs, s);
  const int lane = lane_of_warp() % kLanes;
  for (int base = begin + warp_of_block() * (32 / kLanes); base < end; base += warps_of_block() * (32 / kLanes)) {
    const int row = base + lane_of_warp() / kLanes;
    Statistics all;
    if (row < end) {
      const int64_t head = first_head + row / s.queries;
      const float2* from = few.statistics + (first * few.score.q_heads + head) * few.queries + row % s.queries;
      for (int64_t run = lane; run < runs; run += kLanes) {
        const float2 one = from[run * few.score.q_heads * few.queries];
        all.add(Statistics{one.x, one.y});
      }
    }
    all.add_lanes(kLanes);
    if (lane == 0 && row < end) to(row, all.lse());
  }
}

// Reductions ---------------------------------------------------------------------------------------------------------

// NaN counts as the largest.
__device__ __forceinline__ float larger(float a, float b) { return b > a || (b != b && a == a) ? b : a; }
__device__ __forceinline__ float reduced(bool by_max, float a, float b) { return by_max ? larger(a, b) : a + b; }
__device__ __forceinline__ float nothing(bool by_max) { return by_max ? -kInfinity : 0.0f; }

// What a pair of a query and a key that it sees gives.
__device__ __forceinline__ float value_of(bool logit, float z, float lse, float weight) {
  if (logit) return z * weight;
  return lse == -kInfinity ? 0.0f * weight : expf(z - lse) * weight;
}

__device__ __forceinline__ float weight_of(const ScoreProblem& p, const FewSample& s, int64_t head) {
  return p.head_weights ? p.head_weights[s.number * p.head_weights_stride + head] : 1.0f;
}

// Products -----------------------------------------------------------------------------------------------------------

template <class T>
inline constexpr int kPerSegment = 16 / static_cast<int>(sizeof(T));

// Four channels of a segment, the first of them number `first`.
template <class T>
__device__ __forceinline__ void widen(uint4 segment, int first, float (&wide)[4]) {
  const unsigned words[4] = {segment.x, segment.y, segment.z, segment.w};
  if constexpr (std::is_same_v<T, float>) {
    PYVTK_UNROLL
    for (int i = 0; i < 4; ++i) wide[i] = __uint_as_float(words[i]);
  } else {
    PYVTK_UNROLL
    for (int i = 0; i < 2; ++i) {
      unsigned word = words[first / 2 + i];
      stay_in_loop(word);
      if constexpr (std::is_same_v<T, bfloat16>) {
        wide[2 * i] = __uint_as_float(word << 16);
        wide[2 * i + 1] = __uint_as_float(word & 0xffff0000u);
      } else {
        const float2 both = widen_half2(word);
        wide[2 * i] = both.x;
        wide[2 * i + 1] = both.y;
      }
    }
  }
}

// A segment that is aligned to its elements only.
template <class T>
__device__ __forceinline__ uint4 read_by_element(const T* from) {
  unsigned words[4];
  PYVTK_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      words[i] = __float_as_uint(from[i]);
    } else {
      words[i] = unsigned{from[2 * i].bits} | unsigned{from[2 * i + 1].bits} << 16;
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Which keys a lane has a part in, and which segments of them. A warp's 32 / lanes * kKeysOfLane keys are consecutive.
struct KeyLanes {
  int lanes;    // of a key
  int segment;  // the lane's first; the next is `lanes` further
  int key;      // the lane's first; the next is keys_apart further
  int keys_apart;

  __device__ explicit KeyLanes(const FewProblem& few)
      : lanes(few.lanes_of_key),
        segment(lane_of_warp() & (lanes - 1)),
        key(lane_of_warp() >> few.lanes_log2),
        keys_apart(32 >> few.lanes_log2) {}
  __device__ __forceinline__ int keys_of_warp() const { return keys_apart * kKeysOfLane; }
  // After sums over lanes each has those of both keys, and takes care of one. Others have nothing to do.
  __device__ __forceinline__ bool has_own() const { return segment < kKeysOfLane; }
  __device__ __forceinline__ int own_key() const { return key + segment * keys_apart; }
};

// Starts to read a lane's parts of the keys from `begin` on; zeros from `end` on.
//   k: of key 0
template <class T>
__device__ __forceinline__ void read_keys(const FewProblem& few, const KeyLanes& mine, const T* k, int begin, int end,
                                          uint4 (&parts)[kKeysOfLane][kSegments]) {
  const auto read = [&](auto segment) {
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfLane; ++i) {
      const int key = begin + mine.key + i * mine.keys_apart;
      const T* from = k + key * few.score.k_row_stride + mine.segment * kPerSegment<T>;
      PYVTK_UNROLL
      for (int j = 0; j < kSegments; ++j) {
        const bool is_there = key < end && mine.segment + j * mine.lanes < few.segments;
        parts[i][j] = is_there ? segment(from + j * mine.lanes * kPerSegment<T>) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  if (few.aligned) {
    read([](const T* from) { return *reinterpret_cast<const uint4*>(from); });
  } else {
    read([](const T* from) { return read_by_element(from); });
  }
}

// Rows [first, first + rows) of a key head, widened, kPitch floats apart; zeros behind the last channel, so that what
// is multiplied with zeros is no NaN. A barrier has to follow.
template <class T>
__device__ __forceinline__ void stage_rows(const FewProblem& few, const FewSample& s, int64_t kv_head, int first,
                                           int rows, float* q) {
  const ScoreProblem& p = few.score;
  const int channels = kSegments * few.lanes_of_key * kPerSegment<T>;
  for (int i = static_cast<int>(threadIdx.x); i < rows * kPitch; i += kFewThreads) {
    const int row = first + i / kPitch, channel = i % kPitch;
    if (channel >= channels) continue;
    const int64_t head = kv_head * few.group + row / s.queries, query = row % s.queries;
    const T* from = static_cast<const T*>(p.q) + s.q_offset + head * p.q_head_stride + query * p.q_row_stride;
    q[i] = channel < p.dim ? to_float(from[channel]) : 0.0f;
  }
}

// Products of `rows` rows with the lane's keys, added up over the lanes that share a key.
template <class T, int kRows>
__device__ __forceinline__ void multiply(const FewProblem& few, const KeyLanes& mine,
                                         const uint4 (&parts)[kKeysOfLane][kSegments], const float* q, int rows,
                                         float (&products)[kRows][kKeysOfLane]) {
  constexpr int kPer = kPerSegment<T>;
  PYVTK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfLane; ++i) products[r][i] = 0.0f;
  }
  PYVTK_UNROLL
  for (int j = 0; j < kSegments; ++j) {
    if (j * mine.lanes >= few.segments) break;
    const float* at = q + (mine.segment + j * mine.lanes) * kPer;
    PYVTK_UNROLL
    for (int e = 0; e < kPer; e += 4) {
      float wide[kKeysOfLane][4];
      PYVTK_UNROLL
      for (int i = 0; i < kKeysOfLane; ++i) widen<T>(parts[i][j], e, wide[i]);
      PYVTK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        const float4 four = *reinterpret_cast<const float4*>(at + r * kPitch + e);
        PYVTK_UNROLL
        for (int i = 0; i < kKeysOfLane; ++i) {
          products[r][i] += four.x * wide[i][0];
          products[r][i] += four.y * wide[i][1];
          products[r][i] += four.z * wide[i][2];
          products[r][i] += four.w * wide[i][3];
        }
      }
    }
  }
}

template <int kRows>
__device__ __forceinline__ void add_lanes_of_key(const KeyLanes& mine, int rows,
                                                 float (&products)[kRows][kKeysOfLane]) {
  PYVTK_UNROLL
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    for (int step = mine.lanes / 2; step > 0; step /= 2) {
      PYVTK_UNROLL
      for (int i = 0; i < kKeysOfLane; ++i) products[r][i] += __shfl_xor_sync(kAllLanes, products[r][i], step);
    }
  }
}

// Of the lane's own key.
__device__ __forceinline__ float own(const KeyLanes& mine, const float (&products)[kKeysOfLane]) {
  static_assert(kKeysOfLane == 2);
  return mine.segment == 0 ? products[0] : products[1];
}

// Kernels ------------------------------------------------------------------------------------------------------------

// Block: (run, key head, tile of kRows rows).
template <class T, int kRows>
__global__ void __launch_bounds__(kFewThreads, 2) score_rows_kernel(const FewProblem few) {
  PYVTK_SHARED(reaches, int64_t[kRows]);
  PYVTK_SHARED(planes, int64_t[kRows]);
  PYVTK_SHARED(of_warps, float2[kFewWarps][kRows]);
  const ScoreProblem& p = few.score;
  const int thread = static_cast<int>(threadIdx.x);
  let_next_launch_start();
  const int tile = static_cast<int>(blockIdx.x % static_cast<unsigned>(few.row_tiles));
  const int64_t run_and_head = blockIdx.x / static_cast<unsigned>(few.row_tiles);
  const int64_t run = run_and_head / p.kv_heads, kv_head = run_and_head % p.kv_heads;
  const int64_t number = sample_of_run(few, few.runs, run);
  if (number < 0) return;
  const FewSample s = few_sample(few, number);
  const int all_rows = few.group * s.queries;

  const int64_t place = run - first_run_of(few, few.runs, s);
  const int window = s.window_stop - s.window_start;
  const int begin = s.window_start + static_cast<int>(min(place * few.runs.keys, int64_t{window}));
  const int end = min(begin + few.runs.keys, s.window_stop);
  const KeyLanes mine(few);
  const int step = kFewWarps * mine.keys_of_warp();
  const T* k = static_cast<const T*>(p.k) + s.k_offset + kv_head * p.k_head_stride;
  float* const q = dynamic_shared<float>();
  const bool keeps = s.queries <= few.kept, needs_lse = few.statistics != nullptr;

  for (int first = tile * kRows; first < all_rows; first += few.row_tiles * kRows) {
    const int rows = min(all_rows - first, kRows);
    int base = begin + warp_of_block() * mine.keys_of_warp();
    uint4 parts[kKeysOfLane][kSegments];
    read_keys(few, mine, k, base, end, parts);
    __syncthreads();  // of the last tile, all have read
    stage_rows<T>(few, s, kv_head, first, rows, q);
    if (thread < rows) {
      const int64_t head = kv_head * few.group + (first + thread) / s.queries;
      const int query = (first + thread) % s.queries;
      reaches[thread] = reach_of(p, s, query);
      planes[thread] = keeps ? kept_plane(few, s, head, query) : 0;
    }
    __syncthreads();

    Statistics statistics[kRows];
    for (; base < end; base += step) {
      const int key = base + mine.own_key();
      const bool has_key = mine.has_own() && key < end;
      const bool there = has_key && exists(p, s, key);
      const int position = there ? position_of(p, s, key) : 0;
      const float bias = there && p.k_bias ? p.k_bias[s.column + key] : 0.0f;
      float products[kRows][kKeysOfLane];
      multiply<T>(few, mine, parts, q, rows, products);
      // Under way while this round is finished, if there are registers for both.
      if constexpr (kRows < 8) read_keys(few, mine, k, base + step, end, parts);
      add_lanes_of_key(mine, rows, products);
      const bool keeps_key = keeps && has_key && key >= s.key_start && key < s.key_stop;
      PYVTK_UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        unsigned row = static_cast<unsigned>(r);
        stay_in_loop(row);
        const bool seen = there && position <= reaches[row];
        // Scaled afterwards: products of 16-bit numbers are exact.
        const float z = own(mine, products[r]) * p.scale + bias;
        if (keeps_key) few.logits[planes[row] + key - s.key_start] = seen ? z : -kInfinity;
        if (needs_lse && seen) statistics[r].add(z);
      }
      if constexpr (kRows >= 8) read_keys(few, mine, k, base + step, end, parts);
    }
    if (!needs_lse) continue;

    PYVTK_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      statistics[r].add_lanes(32);
      if (lane_of_warp() == 0) of_warps[warp_of_block()][r] = make_float2(statistics[r].largest, statistics[r].sum);
    }
    __syncthreads();
    if (thread < rows) {
      Statistics all;
      for (int warp = 0; warp < kFewWarps; ++warp) all.largest = fmaxf(all.largest, of_warps[warp][thread].x);
      for (int warp = 0; warp < kFewWarps; ++warp) {
        all.sum += all.rescaled(of_warps[warp][thread].x, of_warps[warp][thread].y);
      }
      const int64_t head = kv_head * few.group + (first + thread) / s.queries;
      few.statistics[(run * p.q_heads + head) * few.queries + (first + thread) % s.queries] =
          make_float2(all.largest, all.sum);
    }
  }
}

// Block: (sample, 32 rows of it).
static __global__ void __launch_bounds__(kFewThreads) score_lse_kernel(const FewProblem few, int64_t blocks_of_sample) {
  await_previous_launch();
  let_next_launch_start();
  const FewSample s = few_sample(few, blockIdx.x / blocks_of_sample);
  const int64_t begin = blockIdx.x % blocks_of_sample * 32;
  const int64_t rows = few.score.q_heads * s.queries;
  lse_of_rows(
      few, s, 0, static_cast<int>(min(begin, rows)), static_cast<int>(min(begin + 32, rows)),
      [&](int row, float lse) { few.lse[s.lse + row / s.queries * s.lse_head_stride + row % s.queries] = lse; });
}

// Values of samples that keep no logits, reduced over queries. Block: (run of scored keys, key head), or (run, unit) if
// heads are reduced for every pair.
template <class T>
__global__ void __launch_bounds__(kFewThreads, 2) score_columns_kernel(const FewProblem few, const KeyRuns runs) {
  PYVTK_SHARED(reaches, int64_t[kRowsOfColumns]);
  PYVTK_SHARED(lses, float[kRowsOfColumns]);
  PYVTK_SHARED(weights, float[kRowsOfColumns]);
  PYVTK_SHARED(numbers, int[kRowsOfColumns]);  // of queries
  const ScoreProblem& p = few.score;
  const int thread = static_cast<int>(threadIdx.x);
  await_previous_launch();
  let_next_launch_start();
  const unsigned blocks_of_run = static_cast<unsigned>(few.pairwise ? few.units : p.kv_heads);
  const int64_t run = blockIdx.x / blocks_of_run;
  const int part = static_cast<int>(blockIdx.x % blocks_of_run);
  const int64_t number = sample_of_run(few, runs, run);
  if (number < 0) return;
  const FewSample s = few_sample(few, number);
  const int begin = s.key_start + static_cast<int>(run - first_run_of(few, runs, s)) * runs.keys;
  if (s.queries <= few.kept || begin >= s.key_stop) return;

  const KeyLanes mine(few);
  const int base = begin + warp_of_block() * mine.keys_of_warp(), key = base + mine.own_key();
  const bool has_key = mine.has_own() && key < s.key_stop;
  const bool there = has_key && exists(p, s, key);
  const int position = there ? position_of(p, s, key) : 0;
  const float bias = there && p.k_bias ? p.k_bias[s.column + key] : 0.0f;
  float* const q = dynamic_shared<float>();  // [kRowsOfColumns, kPitch]
  // [queries, keys of the block]: pairs, reduced over heads; each column belongs to one thread
  float* const panel = q + kRowsOfColumns * kPitch + (base - begin) + mine.own_key();
  const int rows = few.group * s.queries;
  const int kv_heads = few.pairwise ? static_cast<int>(p.kv_heads) / few.units : 1;
  const auto column = [&](int64_t head_or_unit) {
    return few.columns + plane_of(p, s, few.units * few.columns_of_unit, head_or_unit) + key - s.key_start;
  };

  // of all rows, and of kRowsOfColumns: a chain of hundreds of additions would lose bits
  float sum = nothing(few.query_max), of_some = sum;
  for (int i = 0; i < kv_heads; ++i) {
    const int kv_head = part * kv_heads + i;
    const T* k = static_cast<const T*>(p.k) + s.k_offset + kv_head * p.k_head_stride;
    uint4 parts[kKeysOfLane][kSegments];
    read_keys(few, mine, k, base, s.key_stop, parts);
    for (int first = 0; first < rows; first += kRowsOfColumns) {
      const int some = min(rows - first, kRowsOfColumns);
      __syncthreads();  // of the last rows, all have read
      stage_rows<T>(few, s, kv_head, first, some, q);
      if (thread < some) {
        const int query = (first + thread) % s.queries;
        const int64_t head = kv_head * few.group + (first + thread) / s.queries;
        const float* from = p.lse_given ? p.lse_given : few.lse;
        reaches[thread] = reach_of(p, s, query);
        lses[thread] = p.logit ? 0.0f : from[s.lse + head * s.lse_head_stride + query];
        weights[thread] = weight_of(p, s, head);
        numbers[thread] = query;
      }
      __syncthreads();
      for (int done = 0; done < some; done += kColumnsAtOnce) {
        const int now = min(some - done, kColumnsAtOnce);
        float products[kColumnsAtOnce][kKeysOfLane];
        multiply<T>(few, mine, parts, q + done * kPitch, now, products);
        add_lanes_of_key(mine, now, products);
        if (!has_key) continue;
        PYVTK_UNROLL
        for (int r = 0; r < kColumnsAtOnce; ++r) {
          if (r >= now) break;
          const int row = done + r, query = numbers[row];
          const bool seen = there && position <= reaches[row];
          const float z = own(mine, products[r]) * p.scale + bias;
          const float value = seen ? value_of(p.logit, z, lses[row], weights[row]) : 0.0f;
          if (few.pairwise) {
            const bool is_first = i == 0 && first + row < s.queries;
            float& pair = panel[query * runs.keys];
            pair = is_first ? value : reduced(few.head_max, pair, value);
            continue;
          }
          if (seen) of_some = reduced(few.query_max, of_some, value);
          if (query == s.queries - 1 && !few.merges_heads) {
            *column(kv_head * few.group + (first + row) / s.queries) = reduced(few.query_max, sum, of_some);
            sum = of_some = nothing(few.query_max);
          }
        }
      }
      sum = reduced(few.query_max, sum, of_some);
      of_some = nothing(few.query_max);
    }
  }
  if (!has_key) return;
  if (few.pairwise) {
    const float heads = static_cast<float>(few.group * kv_heads);
    for (int query = 0; query < s.queries; ++query) {
      if (!there || position > reach_of(p, s, query)) continue;
      const float x = panel[query * runs.keys];
      sum = reduced(few.query_max, sum, few.head_mean ? x / heads : x);
    }
    *column(part) = sum;
  } else if (few.merges_heads) {
    *column(part) = sum;
  }
}

}  // namespace pyvtk::cuda
