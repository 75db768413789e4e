// Threads of a block at work together: where a thread stands, sums over warps and blocks, and which block comes last.
// Blocks are whole warps in one dimension, at most kMostWarps of them.
#pragma once
#include <cstdint>

#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;
inline constexpr int kMostWarps = 16;  // twice as many would leave 64 registers to a thread: too few

__device__ __forceinline__ int warp_of_block() { return static_cast<int>(threadIdx.x / 32); }
__device__ __forceinline__ int warps_of_block() { return static_cast<int>(blockDim.x / 32); }
__device__ __forceinline__ int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

template <class Number>
__device__ __forceinline__ Number sum_of_warp(Number value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Of the values of the lanes up to this one, and with it.
template <class Number>
__device__ __forceinline__ Number sum_up_to_lane(Number value) {
  for (int step = 1; step < 32; step *= 2) {
    const Number lower = __shfl_up_sync(kAllLanes, value, static_cast<unsigned>(step));
    if (lane_of_warp() >= step) value += lower;
  }
  return value;
}

// Sums of the warps before this one, and of all; `value` is the same in all lanes of a warp.
template <class Number>
struct Prefix {
  Number before;
  Number total;
};
template <class Number>
__device__ Prefix<Number> prefix_of_warps(Number value) {
  PYVTK_SHARED(sums, Number[kMostWarps]);
  __syncthreads();  // of the last call, all have read
  if (lane_of_warp() == 0) sums[warp_of_block()] = value;
  __syncthreads();
  const Number mine = lane_of_warp() < warps_of_block() ? sums[lane_of_warp()] : Number{0};
  return {sum_of_warp(lane_of_warp() < warp_of_block() ? mine : Number{0}), sum_of_warp(mine)};
}

// Whether this block is the last of `blocks` that come here; then it sees what all of them wrote before. For all
// threads of the block at once.
//   arrivals: 0 before the first of them comes
__device__ inline bool is_last_block(uint32_t* arrivals, uint32_t blocks) {
  PYVTK_SHARED(is_last, bool);
  __syncthreads();  // all of the block have written
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(arrivals, 1u) + 1 == blocks;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

}  // namespace pyvtk::cuda
