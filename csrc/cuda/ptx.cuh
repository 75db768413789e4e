// What kernels cannot say in C++: shared memory, launches and PTX, by name. Kernel files include this instead of the
// CUDA headers and use nothing else of the kind, so that g++ can compile them too: the tests supply these names (and
// CUDA's own) for the CPU, see tests/cuda_emulation/README.md.
#pragma once
#ifdef PYVTK_CUDA_EMULATION
#include "ptx.h"
#else
#include <cuda_runtime.h>

#include <type_traits>
#include <utility>

// A variable in shared memory: PYVTK_SHARED(histogram, uint32_t[256]);
#define PYVTK_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name

// Before a loop that is to be unrolled in full.
#define PYVTK_UNROLL _Pragma("unroll")

namespace pyvtk::cuda {

// The shared memory whose size the launch gives. Aligned for every kind of copy, bulk ones included.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char pyvtk_dynamic_shared[];
  return reinterpret_cast<T*>(pyvtk_dynamic_shared);
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  // clang-format off
  kernel<<<grid, block, shared_bytes, stream>>>(std::forward<Arguments>(arguments)...);
  // clang-format on
  return cudaGetLastError();
}

__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Starts to copy 4, 8 or 16 bytes from global to shared memory, both aligned to as many; zeros if not valid, and then
// nothing is read. 16 bytes bypass the first-level cache.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int bytes_read = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes_read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(bytes_read)
                 : "memory");
  }
}

// Makes one group of the copies started since the last commit.
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's groups but the newest kGroupsLeft. Other threads see the copies after a barrier.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// __syncthreads of `threads` threads (a multiple of 32) that share an id of 1..15; 0 is that of __syncthreads.
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// What is computed of the word is not computed ahead of a loop, where it would take registers. No instruction.
__device__ __forceinline__ void stay_in_loop(unsigned& word) { asm volatile("" : "+r"(word)); }

// Two float16 numbers, side by side in memory, as float.
__device__ __forceinline__ float2 widen_half2(unsigned halves) {
  float2 wide;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(wide.x), "=f"(wide.y)
      : "r"(halves));
  return wide;
}

}  // namespace pyvtk::cuda
#endif
