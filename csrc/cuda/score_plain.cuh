// score_and_select for one query that sees all keys, as in a decoding step or for the last token of a prompt: the
// usual call, in few instructions. pyvtk/reference/score.py is the definition; other problems: score_few.cuh.
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

struct PlainProblem {
  const void* q;
  const void* k;
  float* logits;       // [batch, q_heads, pitch]
  float2* statistics;  // [batch, q_heads, pieces]: maximum of a piece's logits, sum of exp(logit - maximum)
  int64_t q_batch_stride, q_head_stride, k_batch_stride, k_head_stride, k_row_stride;
  int keys, pitch, pieces;
  int keys_of_block;  // a multiple of kPiece
  int heads, group, dim;
  int segments, lanes_log2;
  float scale;
};

// Block: (keys, key head, sample).
template <class T, bool kAhead = true>
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
        parts[i][j] = is_there ? *reinterpret_cast<const uint4*>(from + j * lanes * kPer) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  const int step_of_block = kPlainWarps * apart * kKeysOfLane, lane_key = lane >> p.lanes_log2;
  int base = warp_of_block() * apart * kKeysOfLane;
  if constexpr (kAhead) read(base + lane_key);

  float* const q = dynamic_shared<float>();  // [group, kPitch]
  float* const z = q + p.group * kPitch;     // [group, keys_of_block]
  const T* from = static_cast<const T*>(p.q) + blockIdx.z * p.q_batch_stride + head * p.q_head_stride;
  PYVTK_NOT_UNROLLED
  for (int row = 0; row < p.group; ++row) {
    q[row * kPitch + thread] = thread < p.dim ? to_float(from[row * p.q_head_stride + thread]) : 0.0f;
  }
  if constexpr (kAhead) __syncthreads();

  PYVTK_NOT_UNROLLED
  for (bool is_first = true; base < size || (!kAhead && is_first); base += step_of_block) {
    if constexpr (!kAhead) {
      read(base + lane_key);
      if (is_first) __syncthreads();
    }
    is_first = false;
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
    float largest = fmaxf(fmaxf(four.x, four.y), fmaxf(four.z, four.w));
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const float shift = largest == -kInfinity ? 0.0f : largest;
    float sum = expf(four.x - shift) + expf(four.y - shift) + (expf(four.z - shift) + expf(four.w - shift));
    PYVTK_UNROLL
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const int64_t plane = int64_t{blockIdx.z} * p.heads + head + row;
    if (at < size) *reinterpret_cast<float4*>(p.logits + plane * p.pitch + begin + at) = four;
    if (lane == 0) p.statistics[plane * p.pieces + begin / kPiece + piece] = make_float2(largest, sum);
  }
}

struct PlainFinish {
  const float* logits;
  const float2* statistics;
  const float* any;  // [4] that nobody writes meanwhile
  float* scores;     // [batch, keys]
  int keys, pitch, pieces, heads;
  int quads;   // of keys, of a block
  int splits;  // threads of a quad
  bool head_max, head_mean;
  bool selects;
};

inline constexpr int kHeadsAhead = 4;

// Block: (keys, sample).
//   kSelects: all keys of a sample are one block's, and it chooses too
template <bool kSelects>
__global__ void __launch_bounds__(kShortThreads, 1)
    score_plain_finish_kernel(const PlainFinish p, const SelectProblem select) {
  PYVTK_SHARED(shared, ShortShared);
  float* const lses = dynamic_shared<float>();        // [heads, rounded up to 4]
  float* const parts = lses + (p.heads + 3) / 4 * 4;  // [splits, 4 * quads]
  let_next_launch_start();
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const int split = thread / p.quads, quad = static_cast<int>(blockIdx.x) * p.quads + thread % p.quads;
  const bool works = split < p.splits && 4 * quad < p.keys;
  const int64_t sample = blockIdx.y;
  // The first time with numbers that do not matter, while the launch before this one still works on those that do: it
  // brings the instructions, which would be waited for.
  PYVTK_NOT_UNROLLED
  for (int time = kSelects ? 0 : 1; time < 2; ++time) {
    const bool is_real = time == 1;
    const float2* const statistics =
        is_real ? p.statistics + sample * p.heads * p.pieces : reinterpret_cast<const float2*>(p.any);
    const float* const logits = is_real ? p.logits + sample * p.heads * p.pitch + 4 * quad : p.any;
    const int heads = is_real ? p.heads : min(p.heads, p.splits), pitch = is_real ? p.pitch : 0;
    const int pieces = is_real ? p.pieces : 1;
    if (is_real) await_previous_launch();
    PYVTK_NOT_UNROLLED
    for (int head = warp_of_block(); head < heads; head += warps_of_block()) {
      const float2* const from = is_real ? statistics + head * pieces : statistics;
      Statistics all;
      PYVTK_NOT_UNROLLED
      for (int piece = lane; piece < pieces; piece += 32) {
        const float2 one = from[piece];
        all.add(Statistics{one.x, one.y});
      }
      PYVTK_NOT_UNROLLED
      for (int step = 16; step > 0; step /= 2) all.add_lane(step);
      // Where all logits are -inf, exp(logit - lse) is to be 0.
      if (lane == 0) lses[head] = all.sum == 0.0f ? kInfinity : all.lse();
    }
    __syncthreads();
    const float start = nothing(p.head_max);
    float of_heads[4] = {start, start, start, start};
    if (works) {
      PYVTK_NOT_UNROLLED
      for (int first = split; first < heads; first += p.splits * kHeadsAhead) {
        float4 z[kHeadsAhead];
        PYVTK_UNROLL
        for (int i = 0; i < kHeadsAhead; ++i) {
          const int head = min(first + i * p.splits, heads - 1);
          z[i] = *reinterpret_cast<const float4*>(logits + head * pitch);
        }
        PYVTK_UNROLL
        for (int i = 0; i < kHeadsAhead; ++i) {
          const int head = first + i * p.splits;
          if (head >= heads) break;
          const float lse = lses[head];
          const float four[4] = {z[i].x, z[i].y, z[i].z, z[i].w};
          PYVTK_UNROLL
          for (int n = 0; n < 4; ++n) {
            of_heads[n] = reduced(p.head_max, of_heads[n], expf(four[n] - lse));
          }
        }
      }
      *reinterpret_cast<float4*>(parts + 4 * thread) = make_float4(of_heads[0], of_heads[1], of_heads[2], of_heads[3]);
    }
    __syncthreads();
    uint32_t ranks[4] = {};
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
      for (int n = 0; n < 4; ++n) {
        if (p.head_mean) of_heads[n] /= static_cast<float>(p.heads);
        ranks[n] = is_real ? rank_of(of_heads[n]) : static_cast<uint32_t>(4 * thread + n) * 0x01000193u;
        if (is_real && 4 * quad + n < p.keys) p.scores[sample * p.keys + 4 * quad + n] = of_heads[n];
      }
    }
    if constexpr (kSelects) select_short_row(select, static_cast<int>(sample), ranks, is_real, shared);
    if (!is_real) __syncthreads();
  }
}

// Launchers ----------------------------------------------------------------------------------------------------------

inline constexpr int64_t kPlainSelected = 4096;  // keys of a sample that score_plain_finish_kernel chooses from
inline constexpr int64_t kPlainGroup = 16;       // query heads of a key head, whose logits have to fit shared memory

// Whether there is one query, which sees all keys, and nothing else is asked for. aligned: keys are, to 16 bytes
inline bool is_plain(const ScoreProblem& p, bool aligned) {
  const bool sees_all = !p.q_mask && !p.k_mask && (!p.causal || (!p.q_positions && !p.k_positions));
  return aligned && sees_all && !p.packed() && p.queries == 1 && p.out_heads() == 1 && !p.k_bias && !p.head_weights &&
         !p.lse_given && !p.logit && p.key_start == 0 && p.key_stop == p.keys && p.keys > 0 &&
         p.group() <= kPlainGroup && p.batch <= 65535 && p.kv_heads <= 65535;
}

// Nothing depends on the device, so that results do not either.
inline void plan_plain(const ScoreProblem& p, int segments, int lanes_log2, const SelectProblem& select,
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
  plain.scale = p.scale;
  const int64_t pieces = p.batch * p.kv_heads * plain.pieces;
  plain.keys_of_block = pieces <= 1024 ? kPiece : 2 * kPiece;

  finish.keys = plain.keys;
  finish.pitch = plain.pitch;
  finish.pieces = plain.pieces;
  finish.heads = plain.heads;
  finish.head_max = p.head_max();
  finish.head_mean = p.head_mean();
  finish.selects = p.keys <= kPlainSelected && is_short(select);
  finish.quads = finish.selects ? plain.pitch / 4 : kPiece / 4;
  finish.splits = std::min(kShortThreads / finish.quads, plain.heads);
}

template <class T>
cudaError_t score_plain(const PlainProblem& plain, PlainFinish finish, const ScoreProblem& p,
                        const SelectProblem& select, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.keys, plain.keys_of_block)),
                  static_cast<unsigned>(p.kv_heads), static_cast<unsigned>(p.batch));
  const size_t bytes = sizeof(float) * static_cast<size_t>(plain.group) * (kPitch + plain.keys_of_block);
  const cudaError_t status = launch(&score_plain_kernel<T>, grid, dim3(kPlainThreads), bytes, stream, plain);
  if (status != cudaSuccess) return status;
  finish.logits = plain.logits;
  finish.statistics = plain.statistics;
  finish.any = static_cast<const float*>(plain.k);  // [4] of them: eight channels or more, aligned
  finish.scores = p.scores;
  const size_t bytes_of_finish = sizeof(float) * static_cast<size_t>((finish.heads + 3) / 4 * 4 + 4 * kShortThreads);
  const dim3 grid_of_finish(static_cast<unsigned>(ceil_div<int64_t>(p.keys, 4 * finish.quads)),
                            static_cast<unsigned>(p.batch));
  const auto kernel = finish.selects ? &score_plain_finish_kernel<true> : &score_plain_finish_kernel<false>;
  return launch_early(kernel, grid_of_finish, dim3(kShortThreads), bytes_of_finish, stream, finish, select);
}

}  // namespace pyvtk::cuda
