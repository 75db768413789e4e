// score_and_select for one query that sees all keys, as in a decoding step or for the last token of a prompt: the
// usual call, in few instructions. pyvtk/reference/score.py is the definition; other problems: score_few.cuh.
//
//   score_plain_kernel         a block per (keys, key head): products, and their exponentials in pieces of 128 keys
//   score_plain_finish_kernel  a block per sample: denominators, the sum over heads, the tokens that stay; samples of
//                              more keys than it chooses from have a block per piece, and select follows
//
// On an H200, cold, 640 keys of 32 heads (5 MB): the first took 6.2 us alone, where an empty kernel takes 2.7 and a
// copy of k 5.8. The second was bound by instructions of one multiprocessor while it took the exponentials itself (7.8
// us alone, 10.7 with the choice), which is why the first takes them now.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/score_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"
#include "cuda/score_few.cuh"
#include "cuda/select_short.cuh"

namespace pyvtk::cuda {

inline constexpr int kPlainThreads = 256;
inline constexpr int kPlainWarps = kPlainThreads / 32;
inline constexpr int kPiece = 128;  // keys whose logits one warp puts together

// e^z = fraction * 2^exponent, exponent whole. Multiplied by powers of two that are whole a number keeps its digits, so
// that equal logits give equal probabilities whichever piece they are of.
struct Exponential {
  float fraction;
  float exponent;

  __device__ __forceinline__ explicit Exponential(float z) {
    constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147182f, kLn2Rest = -1.90465421e-9f, kMost = 3e38f;
    exponent = rintf(fminf(fmaxf(z * kLog2E, -kMost), kMost));
    const float rest = fmaf(exponent, -kLn2Rest, fmaf(exponent, -kLn2, z));
    // Beyond that, neighbouring numbers are so far apart that only the largest has a probability.
    fraction = fabsf(exponent) < 1e9f ? exp2f(rest * kLog2E) : 1.0f;
    if (z == -kInfinity) fraction = 0.0f;
    if (!(z < kInfinity)) fraction = std::numeric_limits<float>::quiet_NaN();  // as infinity - infinity, and exp(NaN)
  }
};

struct PlainProblem {
  const void* q;
  const void* k;
  float* weights;      // [batch, q_heads, pitch]: exp(logit) / 2^exponent of the piece
  float2* statistics;  // [batch, q_heads, pieces]: exponent of the largest in a piece, sum of its weights
  int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, k_row_stride;
  int keys, pitch, pieces;
  int keys_of_block;  // a multiple of kPiece
  int heads, group, dim;
  int segments, lanes_log2;
  bool aligned;  // segments of k are, to 16 bytes
  float scale;
};

// Block: (keys, key head, sample).
//   kAhead: more than one round, whose keys are read while those of the round before are multiplied
//   kAligned: segments of keys are read at once, else by element; the same sums
template <class T, bool kAhead, bool kAligned>
__global__ void __launch_bounds__(kPlainThreads, 2) score_plain_kernel(const PlainProblem p) {
  constexpr int kPer = kPerSegment<T>;
  let_next_launch_start();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp(), lanes = 1 << p.lanes_log2;
  const int segment = lane & (lanes - 1), apart = 32 >> p.lanes_log2;
  const int begin = static_cast<int>(blockIdx.x) * p.keys_of_block, size = min(p.keys_of_block, p.keys - begin);
  const int head = static_cast<int>(blockIdx.y) * p.group;
  const T* k = static_cast<const T*>(p.k) + blockIdx.z * p.k_batch_stride + blockIdx.y * p.k_head_stride +
               begin * p.k_row_stride + segment * kPer;
  uint4 parts[kKeysOfLane][kSegments];
  const auto read = [&](int first) {
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfLane; ++i) {
      const int key = first + i * apart;
      const T* from = k + key * p.k_row_stride;
      PYVTK_UNROLL
      for (int j = 0; j < kSegments; ++j) {
        const bool is_there = key < size && segment + j * lanes < p.segments;
        parts[i][j] = make_uint4(0, 0, 0, 0);
        if (!is_there) continue;
        const T* at = from + j * lanes * kPer;
        if constexpr (kAligned) {
          parts[i][j] = *reinterpret_cast<const uint4*>(at);
        } else {
          parts[i][j] = read_by_element(at);
        }
      }
    }
  };
  const int step_of_block = kPlainWarps * apart * kKeysOfLane, lane_key = lane >> p.lanes_log2;
  int base = warp_of_block() * apart * kKeysOfLane;
  read(base + lane_key);

  float* const q = dynamic_shared<float>();  // [group, kPitch]
  float* const z = q + p.group * kPitch;     // [group, keys_of_block]
  const T* from = static_cast<const T*>(p.q) + blockIdx.z * p.q_batch_stride + head * p.q_head_stride;
  PYVTK_NOT_UNROLLED
  for (int row = 0; row < p.group; ++row) {
    q[row * kPitch + thread] = thread < p.dim ? to_float(from[row * p.q_head_stride + thread]) : 0.0f;
  }
  __syncthreads();

  PYVTK_NOT_UNROLLED
  for (; base < size; base += step_of_block) {
    float wide[kKeysOfLane][kSegments][kPer];
    PYVTK_UNROLL
    for (int i = 0; i < kKeysOfLane; ++i) {
      PYVTK_UNROLL
      for (int j = 0; j < kSegments; ++j) {
        PYVTK_UNROLL
        for (int e = 0; e < kPer; e += 4) {
          float four[4];
          widen<T>(parts[i][j], e, four);
          PYVTK_UNROLL
          for (int n = 0; n < 4; ++n) wide[i][j][e + n] = four[n];
        }
      }
    }
    if constexpr (kAhead) read(base + step_of_block + lane_key);
    const float* at = q + segment * kPer;
    PYVTK_NOT_UNROLLED
    for (int row = 0; row < p.group; ++row, at += kPitch) {
      float sums[kKeysOfLane] = {};
      PYVTK_UNROLL
      for (int j = 0; j < kSegments; ++j) {
        PYVTK_UNROLL
        for (int e = 0; e < kPer; e += 4) {
          const float4 four = *reinterpret_cast<const float4*>(at + j * lanes * kPer + e);
          PYVTK_UNROLL
          for (int i = 0; i < kKeysOfLane; ++i) {
            sums[i] += four.x * wide[i][j][e];
            sums[i] += four.y * wide[i][j][e + 1];
            sums[i] += four.z * wide[i][j][e + 2];
            sums[i] += four.w * wide[i][j][e + 3];
          }
        }
      }
      PYVTK_NOT_UNROLLED
      for (int step = lanes / 2; step > 0; step /= 2) {
        PYVTK_UNROLL
        for (int i = 0; i < kKeysOfLane; ++i) sums[i] += __shfl_xor_sync(kAllLanes, sums[i], step);
      }
      const int mine = base + lane_key + segment * apart;
      if (segment < kKeysOfLane && mine < size) {
        z[row * p.keys_of_block + mine] = (segment == 0 ? sums[0] : sums[1]) * p.scale;
      }
    }
  }
  __syncthreads();

  const int pieces = (size + kPiece - 1) / kPiece;
  int row = 0, piece = warp_of_block();
  PYVTK_NOT_UNROLLED
  for (;; piece += kPlainWarps) {
    for (; piece >= pieces; piece -= pieces) ++row;
    if (row >= p.group) break;
    const int at = piece * kPiece + 4 * lane;
    float4 four = *reinterpret_cast<const float4*>(z + row * p.keys_of_block + at);
    if (at >= size) four.x = -kInfinity;
    if (at + 1 >= size) four.y = -kInfinity;
    if (at + 2 >= size) four.z = -kInfinity;
    if (at + 3 >= size) four.w = -kInfinity;
    const Exponential e[4] = {Exponential(four.x), Exponential(four.y), Exponential(four.z), Exponential(four.w)};
    float largest = fmaxf(fmaxf(e[0].exponent, e[1].exponent), fmaxf(e[2].exponent, e[3].exponent));
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    four.x = e[0].fraction * exp2f(e[0].exponent - largest);
    four.y = e[1].fraction * exp2f(e[1].exponent - largest);
    four.z = e[2].fraction * exp2f(e[2].exponent - largest);
    four.w = e[3].fraction * exp2f(e[3].exponent - largest);
    float sum = four.x + four.y + (four.z + four.w);
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const int64_t plane = int64_t{blockIdx.z} * p.heads + head + row;
    if (at < size) *reinterpret_cast<float4*>(p.weights + plane * p.pitch + begin + at) = four;
    if (lane == 0) p.statistics[plane * p.pieces + begin / kPiece + piece] = make_float2(largest, sum);
  }
}

struct PlainFinish {
  const float* weights;
  const float2* statistics;
  float* scores;  // [batch, keys]
  int keys, pitch, pieces, heads;
  int quads;            // of keys, of a block: a multiple of a piece's, or all
  int pieces_of_block;  // that these are of
  int splits;           // threads of a quad
  bool head_max, head_mean;
  bool selects;
};

inline constexpr int kHeadsAhead = 6;  // whose weights are read before they are used

// Block: (keys, sample).
//   kSelects: all keys of a sample are one block's, and it chooses too
template <bool kSelects>
__global__ void __launch_bounds__(kShortThreads, 1)
    score_plain_finish_kernel(const PlainFinish p, const SelectProblem select) {
  PYVTK_SHARED(shared, ShortShared);
  float* const factors = dynamic_shared<float>();  // [heads, pieces_of_block]: from weight to probability
  float* const parts = factors + (p.heads * p.pieces_of_block + 3) / 4 * 4;  // [splits, quads, 4]
  await_previous_launch();
  let_next_launch_start();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const int split = thread / p.quads, quad = thread % p.quads, first_quad = static_cast<int>(blockIdx.x) * p.quads;
  const bool works = split < p.splits && 4 * (first_quad + quad) < p.keys;
  const int64_t sample = blockIdx.y;

  const int first_piece = 4 * first_quad / kPiece;
  PYVTK_NOT_UNROLLED
  for (int head = warp_of_block(); head < p.heads; head += warps_of_block()) {
    const float2* const from = p.statistics + (sample * p.heads + head) * p.pieces;
    float largest = -kInfinity, sum = 0.0f;
    PYVTK_NOT_UNROLLED
    for (int piece = lane; piece < p.pieces; piece += 32) largest = fmaxf(largest, from[piece].x);
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    PYVTK_NOT_UNROLLED
    for (int piece = lane; piece < p.pieces; piece += 32) sum += from[piece].y * exp2f(from[piece].x - largest);
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    PYVTK_NOT_UNROLLED
    for (int i = lane; i < p.pieces_of_block && first_piece + i < p.pieces; i += 32) {
      // The sum is 0 where all logits are -inf: then so are the weights.
      const float scale = exp2f(from[first_piece + i].x - largest);
      factors[head * p.pieces_of_block + i] = sum == 0.0f ? 0.0f : scale / sum;
    }
  }
  __syncthreads();

  const float start = nothing(p.head_max);
  float of_heads[4] = {start, start, start, start};
  if (works) {
    const float* const weights = p.weights + sample * p.heads * p.pitch + 4 * (first_quad + quad);
    const float* const factor = factors + 4 * quad / kPiece;
    PYVTK_NOT_UNROLLED
    for (int first = split; first < p.heads; first += p.splits * kHeadsAhead) {
      float4 four[kHeadsAhead];
      PYVTK_UNROLL
      for (int i = 0; i < kHeadsAhead; ++i) {
        const int head = min(first + i * p.splits, p.heads - 1);
        four[i] = *reinterpret_cast<const float4*>(weights + int64_t{head} * p.pitch);
      }
      PYVTK_UNROLL
      for (int i = 0; i < kHeadsAhead; ++i) {
        const int head = first + i * p.splits;
        if (head >= p.heads) break;
        const float scale = factor[head * p.pieces_of_block];
        of_heads[0] = reduced(p.head_max, of_heads[0], four[i].x * scale);
        of_heads[1] = reduced(p.head_max, of_heads[1], four[i].y * scale);
        of_heads[2] = reduced(p.head_max, of_heads[2], four[i].z * scale);
        of_heads[3] = reduced(p.head_max, of_heads[3], four[i].w * scale);
      }
    }
    *reinterpret_cast<float4*>(parts + 4 * thread) = make_float4(of_heads[0], of_heads[1], of_heads[2], of_heads[3]);
  }
  __syncthreads();
  uint32_t ranks[4] = {kAbsent, kAbsent, kAbsent, kAbsent};
  if (works && split == 0) {
    PYVTK_NOT_UNROLLED
    for (int other = 1; other < p.splits; ++other) {
      const float4 more = *reinterpret_cast<const float4*>(parts + 4 * (thread + other * p.quads));
      of_heads[0] = reduced(p.head_max, of_heads[0], more.x);
      of_heads[1] = reduced(p.head_max, of_heads[1], more.y);
      of_heads[2] = reduced(p.head_max, of_heads[2], more.z);
      of_heads[3] = reduced(p.head_max, of_heads[3], more.w);
    }
    PYVTK_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = 4 * (first_quad + quad) + i;
      if (key >= p.keys) break;
      if (p.head_mean) of_heads[i] /= static_cast<float>(p.heads);
      ranks[i] = rank_of(of_heads[i]);
      p.scores[sample * p.keys + key] = of_heads[i];
    }
  }
  if constexpr (kSelects) select_short_row(select, static_cast<int>(sample), ranks, shared);
}

// Launchers ----------------------------------------------------------------------------------------------------------

inline constexpr int64_t kPlainSelected = 4096;  // keys of a sample that score_plain_finish_kernel chooses from
inline constexpr int64_t kPlainFactors = 4096;   // of a block, in shared memory
inline constexpr int64_t kPlainGroup = 16;       // query heads of a key head, whose logits have to fit shared memory

// Whether there is one query, which sees all keys, and nothing else is asked for.
inline bool is_plain(const ScoreProblem& p) {
  const bool sees_all = !p.q_mask && !p.k_mask && (!p.causal || (!p.q_positions && !p.k_positions));
  return sees_all && !p.packed() && p.queries == 1 && p.out_heads() == 1 && !p.k_bias && !p.head_weights &&
         !p.lse_given && !p.logit && p.key_start == 0 && p.key_stop == p.keys && p.keys > 0 &&
         p.group() <= kPlainGroup && p.q_heads <= kPlainFactors && p.batch <= 65535 && p.kv_heads <= 65535;
}

// Nothing depends on the device, so that results do not either.
inline void plan_plain(const ScoreProblem& p, bool aligned, int segments, int lanes_log2, const SelectProblem& select,
                       PlainProblem& plain, PlainFinish& finish) {
  plain.q = p.q;
  plain.k = p.k;
  plain.q_batch_stride = p.q_batch_stride;
  plain.q_head_stride = p.q_head_stride;
  plain.k_batch_stride = p.k_batch_stride;
  plain.k_head_stride = p.k_head_stride;
  plain.k_row_stride = p.k_row_stride;
  plain.keys = static_cast<int>(p.keys);
  plain.pitch = (plain.keys + 3) / 4 * 4;
  plain.pieces = (plain.keys + kPiece - 1) / kPiece;
  plain.heads = static_cast<int>(p.q_heads);
  plain.group = static_cast<int>(p.group());
  plain.dim = static_cast<int>(p.dim);
  plain.segments = segments;
  plain.lanes_log2 = lanes_log2;
  plain.aligned = aligned;
  plain.scale = p.scale;
  // Many blocks where there is little to read, few handovers where there is much. On an H200, cold: 128 keys of 128
  // channels a block where all are 160 blocks (6.2 us, 256 keys: 6.6), 256 where they are 256 (16.5 us, 128: 19.9), 512
  // where they are 3072 (100 us, 256: 104, 128: 127).
  const int64_t pieces = p.batch * p.kv_heads * plain.pieces;
  plain.keys_of_block = (pieces <= 264 ? 1 : pieces <= 1056 ? 2 : 4) * kPiece;

  finish.keys = plain.keys;
  finish.pitch = plain.pitch;
  finish.pieces = plain.pieces;
  finish.heads = plain.heads;
  finish.head_max = p.head_max();
  finish.head_mean = p.head_mean();
  const int64_t factors = p.q_heads * plain.pieces;
  finish.selects = p.keys <= kPlainSelected && factors <= kPlainFactors && is_short(select);
  finish.quads = finish.selects ? plain.pitch / 4 : kPiece / 4;
  finish.pieces_of_block = finish.selects ? plain.pieces : 1;
}

template <class T>
cudaError_t score_plain(const PlainProblem& plain, PlainFinish finish, const ScoreProblem& p,
                        const SelectProblem& select, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.keys, plain.keys_of_block)),
                  static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const size_t bytes = sizeof(float) * static_cast<size_t>(plain.group) * (kPitch + plain.keys_of_block);
  const bool one_round = plain.keys_of_block << plain.lanes_log2 <= kPlainWarps * 32 * kKeysOfLane;
  const auto kernel_of_keys = !plain.aligned ? &score_plain_kernel<T, true, false>
                              : one_round    ? &score_plain_kernel<T, false, true>
                                             : &score_plain_kernel<T, true, true>;
  const cudaError_t status = launch(kernel_of_keys, grid, dim3(kPlainThreads), bytes, stream, plain);
  if (status != cudaSuccess) return status;
  finish.weights = plain.weights;
  finish.statistics = plain.statistics;
  finish.scores = p.scores;
  const int64_t threads = finish.selects && finish.quads <= kPlainThreads ? kShortThreads / 2 : kShortThreads;
  finish.splits = std::min(static_cast<int>(threads) / finish.quads, finish.heads);
  const int64_t floats = ceil_div<int64_t>(int64_t{finish.heads} * finish.pieces_of_block, 4) * 4 + 4 * threads;
  const dim3 grid_of_finish(static_cast<unsigned>(ceil_div<int64_t>(p.keys, 4 * finish.quads)),
                            static_cast<unsigned>(p.batch));
  const auto kernel = finish.selects ? &score_plain_finish_kernel<true> : &score_plain_finish_kernel<false>;
  return launch_early(kernel, grid_of_finish, dim3(static_cast<unsigned>(threads)),
                      sizeof(float) * static_cast<size_t>(floats), stream, finish, select);
}

}  // namespace pyvtk::cuda
