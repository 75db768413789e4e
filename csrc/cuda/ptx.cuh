// What kernels cannot say in C++: shared memory and PTX, by name; and how they are launched. Kernel files include this
// instead of the CUDA headers and use nothing else of the kind, so that g++ can compile them too: the tests supply
// these names (and CUDA's own) for the CPU, see tests/cuda_emulation/README.md. Launches are the same code in both
// worlds.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <utility>

#ifdef PYVTK_CUDA_EMULATION
#include "ptx.h"
#else
#include <cuda_runtime.h>

#include <type_traits>

#include "common/types.h"

// A variable in shared memory: PYVTK_SHARED(histogram, uint32_t[256]);
#define PYVTK_SHARED(name, ...) __shared__ std::type_identity_t<__VA_ARGS__> name

// Before a loop that is to be unrolled in full, or not at all.
#define PYVTK_UNROLL _Pragma("unroll")
#define PYVTK_NOT_UNROLLED _Pragma("unroll 1")

namespace pyvtk::cuda {

// The shared memory whose size the launch gives. Aligned for every kind of copy, bulk ones included.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char pyvtk_dynamic_shared[];
  return reinterpret_cast<T*>(pyvtk_dynamic_shared);
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

// A launch that may begin before the one before it in its stream has ended (launch_early) waits for that end, and sees
// what it wrote, here. All of its blocks have to: its own end says to a later launch that the earlier ones have ended.
__device__ __forceinline__ void await_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on the launch that follows may begin, if it is such a one, once all blocks have come here or ended.
__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
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

// Matrices of one warp
// ---------------------------------------------------------------------------------------------------
//
// All lanes come. Lane l has g = l / 4 and t = l % 4; fragments are registers of 32 bits with the element of the lowest
// index in the lowest bits. The maps are those of the PTX manual, and tested in tests/cuda_emulation/test_matrices.cpp:
//
// ldmatrix    of matrix i (8 rows of 16 bytes, row r where lane 8 i + r points) a lane gets bytes 4 t..4 t + 3 of row
// g;
//             transposed: of 16-bit elements, element [2 t][g] and [2 t + 1][g]
// d [16, 8]   register i: row g + 8 (i / 2), column 2 t + i % 2
// 16 bits (the k of a sparse a counts what is kept; b stands column by column):
//   a [16, 16]  register i: row g + 8 (i % 2), k = 2 t + 8 (i / 2) and the next
//   b [k, 8]    register i: k = 2 t + 8 i and the next, column g
// 8 bits:
//   a [16, 32]  register i: row g + 8 (i % 2), k = 4 t + 16 (i / 2) and the next three
//   b [k, 8]    register i: k = 4 t + 16 i and the next three, column g
// metadata of a sparse a, a nibble p0 | p1 << 2 (p0 < p1) for each group of four k, from the low bits:
//   16 bits     from lanes t = 2 kSelector + c: groups 4 c..4 c + 3 of row g in the low half, of row g + 8 in the high
//   8 bits      from all lanes: groups 8 (t / 2)..8 (t / 2) + 7 of row g + 8 (t % 2)

template <int kMatrices>
__device__ __forceinline__ void ldmatrix(uint32_t (&to)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(shared_address(row))
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

template <int kMatrices>
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&to)[kMatrices], const void* row) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4);
  if constexpr (kMatrices == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(to[0])
                 : "r"(shared_address(row))
                 : "memory");
  } else if constexpr (kMatrices == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(shared_address(row))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
  }
}

// d += a b; T: bfloat16 or float16
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define PYVTK_MMA(type)                                                               \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, bfloat16>) {
    PYVTK_MMA("bf16");
  } else {
    static_assert(std::is_same_v<T, float16>);
    PYVTK_MMA("f16");
  }
#undef PYVTK_MMA
}

// d += a b of a sparse a [16, 32], half of it kept; T: bfloat16 or float16. The name with ordered metadata is the one
// that is fast everywhere: the positions of a pair ascend.
template <class T, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
  static_assert(kSelector == 0 || kSelector == 1);
#define PYVTK_MMA(type)                                                                                   \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                 "r"(metadata), "n"(kSelector))
  if constexpr (std::is_same_v<T, bfloat16>) {
    PYVTK_MMA("bf16");
  } else {
    static_assert(std::is_same_v<T, float16>);
    PYVTK_MMA("f16");
  }
#undef PYVTK_MMA
}

// d += a b of a sparse a [16, 64], half of it kept, in int8
__device__ __forceinline__ void mma_sp_m16n8k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0;"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// Round to nearest even.
template <class T>
__device__ __forceinline__ T rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    T result;
    if constexpr (std::is_same_v<T, bfloat16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    } else {
      static_assert(std::is_same_v<T, float16>);
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
    }
    return result;
  }
}

}  // namespace pyvtk::cuda
#endif

// Launches -----------------------------------------------------------------------------------------------------------

namespace pyvtk::cuda {

namespace detail {

// Of both kinds of shared memory together, a block has so much without asking.
inline constexpr int kSharedWithoutAsking = 48 * 1024;

// What a device gives a kernel of dynamic shared memory, in bytes. More than `without_asking` needs permission, which
// CUDA keeps with the kernel and not with the launch: a launch that set it to its own need would take it from one of
// another thread. So it is given once, for the most that there is, and never taken back; and only where it is needed,
// since a kernel with permission may be given a smaller cache.
struct SharedLimit {
  const void* kernel;
  int device;
  int without_asking;
  int most;
  SharedLimit* next;
  std::atomic<bool> has_permission = false;
};

// All that is known yet, in lists that only grow: they are read without a lock.
struct SharedLimits {
  static constexpr size_t kLists = 64;
  std::atomic<SharedLimit*> lists[kLists] = {};
  std::mutex adding;
};
inline SharedLimits shared_limits;

// Of this kernel on the current device. CUDA is asked for the first launch; after that for nothing but the device.
inline cudaError_t shared_limit_of(const void* kernel, SharedLimit*& limit) {
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  const size_t list = reinterpret_cast<uintptr_t>(kernel) / 16 + static_cast<size_t>(device);
  std::atomic<SharedLimit*>& first = shared_limits.lists[list % SharedLimits::kLists];
  const auto known = [&] {
    limit = first.load(std::memory_order_acquire);
    while (limit && (limit->kernel != kernel || limit->device != device)) limit = limit->next;
    return limit != nullptr;
  };
  if (known()) return cudaSuccess;
  const std::lock_guard<std::mutex> lock(shared_limits.adding);
  if (known()) return cudaSuccess;
  cudaFuncAttributes attributes;
  status = cudaFuncGetAttributes(&attributes, kernel);
  if (status != cudaSuccess) return status;
  int most = 0;
  status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int declared = static_cast<int>(attributes.sharedSizeBytes);
  limit = new SharedLimit{kernel, device, kSharedWithoutAsking - declared, most - declared, first.load()};
  first.store(limit, std::memory_order_release);
  return cudaSuccess;
}

// So that a launch of `bytes` can follow; a launch of more than there is fails by itself.
inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  if (bytes == 0) return cudaSuccess;
  SharedLimit* limit = nullptr;
  cudaError_t status = shared_limit_of(kernel, limit);
  if (status != cudaSuccess || bytes <= limit->without_asking || limit->has_permission) return status;
  status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit->most);
  if (status == cudaSuccess) limit->has_permission = true;
  return status;
}

}  // namespace detail

// Multiprocessors of the current device.
inline cudaError_t multiprocessors(int& count) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  return status == cudaSuccess ? cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) : status;
}

// The most dynamic shared memory, in bytes, that the current device gives a block of this kernel: what plans may use.
template <class... Parameters>
cudaError_t most_dynamic_shared(void (*kernel)(Parameters...), int64_t& bytes) {
  detail::SharedLimit* limit = nullptr;
  const cudaError_t status = detail::shared_limit_of(reinterpret_cast<const void*>(kernel), limit);
  if (status == cudaSuccess) bytes = limit->most;
  return status;
}

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and what became of this launch: an error that an earlier
// call left behind in this thread is none of it. Any number of threads may launch at once, also while a graph is
// captured.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  const cudaError_t status =
      detail::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int64_t>(shared_bytes));
  if (status != cudaSuccess) return status;
  // The last two: attributes, of which no launch has any yet, and their number.
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

// The same for a kernel that calls await_previous_launch(): where the device can, it begins before the launch before it
// in the stream has ended.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                         Arguments&&... arguments) {
  int device = 0, major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) {
    status = detail::allow_shared(reinterpret_cast<const void*>(kernel), static_cast<int64_t>(shared_bytes));
  }
  if (status != cudaSuccess) return status;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{grid, block, shared_bytes, stream, &early, major >= 9 ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

}  // namespace pyvtk::cuda
