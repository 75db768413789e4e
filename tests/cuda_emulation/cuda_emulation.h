// CUDA's device side on the CPU: what a kernel file needs to be compiled by g++ and run, one fiber per CUDA thread.
// README.md says what it finds, what it cannot, and how to use it. Knows nothing of pyvtk; ptx.h does.
//
// Everything that fibers share is in cuda_emulation.cc, which is compiled without ThreadSanitizer: the scheduler would
// look like one large race. What is here is compiled into the kernel's own translation unit, with its sanitizers.
#pragma once
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

// Language -----------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static
#define __align__(bytes) alignas(bytes)
// A declaration alone cannot become memory of one block: kernels name theirs through a wrapper (PYVTK_SHARED).
#define __shared__ \
  _Pragma("GCC error \"declare shared memory through the wrapper, see tests/cuda_emulation/README.md\"")

// CUDA aligns vectors to their size (up to 16 bytes), and so a misaligned access is seen by -fsanitize=alignment.
#define CUDA_EMULATION_VECTORS(type, name, size2, size4)                      \
  struct name##2 {                                                            \
    alignas(size2) type x;                                                    \
    type y;                                                                   \
  };                                                                          \
  struct name##3 { type x, y, z; };                                           \
  struct name##4 {                                                            \
    alignas(size4) type x;                                                    \
    type y, z, w;                                                             \
  };                                                                          \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; }            \
  inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_EMULATION_VECTORS(signed char, char, 2, 4)
CUDA_EMULATION_VECTORS(unsigned char, uchar, 2, 4)
CUDA_EMULATION_VECTORS(short, short, 4, 8)
CUDA_EMULATION_VECTORS(unsigned short, ushort, 4, 8)
CUDA_EMULATION_VECTORS(int, int, 8, 16)
CUDA_EMULATION_VECTORS(unsigned int, uint, 8, 16)
CUDA_EMULATION_VECTORS(float, float, 8, 16)
CUDA_EMULATION_VECTORS(long long, longlong, 16, 16)
CUDA_EMULATION_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_EMULATION_VECTORS(double, double, 16, 16)
#undef CUDA_EMULATION_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The part of the runtime that launchers and tests use
// -----------------------------------------------------------------

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
  cudaErrorNotSupported = 801,
};
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 grid;  // CUDA's gridDim and blockDim, which are macros here
  dim3 block;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_emulation {

using Location = std::source_location;

// What a thread may know of itself.
struct Identity {
  uint3 thread_index;
  uint3 block_index;
  dim3 block_size;
  dim3 grid_size;
};
extern const Identity* current;  // the thread that runs

struct Options {
  // 0: threads run in order, each until it waits, blocks in order. Otherwise threads and blocks are picked at random,
  // and a thread may be interrupted before any atomic or fence; equal seeds give equal runs.
  uint64_t seed = 0;
  int blocks_alive = 1;  // blocks that run at the same time
  int multiprocessors = 4;
  // Of a block, all kinds together; above 48 KiB a kernel has to ask. Each amount is a device of its own: what is kept
  // with a kernel on one is not known on another.
  int64_t shared_bytes = 227 * 1024;
  // What cudaFuncGetAttributes says that a kernel declares: what it really does shows only when it runs.
  int64_t declared_bytes = 32 * 1024;
  bool dry = false;                                // launches are checked, and nothing runs
  void (*launched)(const void* kernel) = nullptr;  // is told of every launch
};
// Of the launches that follow. CUDA_EMULATION_SEED and CUDA_EMULATION_BLOCKS set the first ones.
Options& options();

// What was wrong in the last launch of this thread that failed; it was printed on stderr as well.
const char* last_failure();

// Calls until now that a launch is to do without: of the attributes of devices and kernels.
int64_t attribute_calls();

// Ends the launch with an error, as the thread that calls. Does not return.
[[noreturn]] void fail(const char* what, Location where = Location::current());

// Between two of these calls a thread is not interrupted.
void may_be_interrupted();

struct SharedVariable {
  const char* name;
  size_t bytes;
  size_t alignment;
};
// This block's memory of the variable.
void* shared(const SharedVariable& variable);
void* dynamic_shared();

// Threads of the block wait until `threads` of them are here (0: all). Sums, over these, of value and of value != 0.
struct Votes {
  int sum;
  int arrived;
};
Votes barrier(int id, int threads, int value, const char* name, Location where);

// Lanes of the mask wait until all of them are here. Returns what each lane brought, [32][bytes]; a lane outside of the
// mask brought 0x7ffd7ffd... The memory stays as it is until this lane waits again.
// orders_memory: whether what lanes wrote before is seen by the others after; __syncwarp only.
constexpr size_t kLaneBytes = 256;  // the most that one lane brings
const unsigned char* exchange(const char* name, uint32_t mask, const void* value, size_t bytes, bool orders_memory,
                              Location where);

// The order that __threadfence gives to the atomics around it.
void fence();
void before_atomic(const volatile void* address);

void copy_async(void* to, const void* from, size_t bytes, size_t bytes_read, Location where);
void copy_async_commit();
void copy_async_wait(int groups_left);

void check_aligned(const volatile void* address, size_t alignment, const char* name, Location where);
// That the bytes lie in one variable of the block's shared memory.
void check_shared(const void* address, size_t bytes, const char* name, Location where);

// The end of every call of the runtime: a failure is kept as this thread's last error.
cudaError_t returned(cudaError_t status);
cudaError_t last_error(bool forget);

int device();
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t kernel_attributes(cudaFuncAttributes* attributes);
cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);
cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* arguments);

inline unsigned lane() {
  const Identity& me = *current;
  return (me.thread_index.x + me.block_size.x * (me.thread_index.y + me.block_size.y * me.thread_index.z)) % 32;
}

template <class T>
T brought(const unsigned char* values, unsigned from) {
  T value;
  std::memcpy(&value, values + from * sizeof(T), sizeof(T));
  return value;
}

}  // namespace cuda_emulation

inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return cuda_emulation::last_failure();
  }
}
inline cudaError_t cudaGetLastError() { return cuda_emulation::last_error(true); }
inline cudaError_t cudaPeekAtLastError() { return cuda_emulation::last_error(false); }
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_emulation::device(), cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return cuda_emulation::returned(cuda_emulation::device_attribute(value, attribute, device));
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  return cuda_emulation::returned(cuda_emulation::kernel_attributes(attributes));
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(Parameters...)) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  return cuda_emulation::returned(cuda_emulation::set_dynamic_shared_limit(kernel, bytes));
}
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute attribute, int bytes) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, bytes);
}
// The launch has ended when this returns.
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_cvref_t<Parameters>...> arguments;
  } call{kernel, {std::forward<Arguments>(arguments)...}};
  const auto body = [](void* opaque) {
    Call& call = *static_cast<Call*>(opaque);
    std::apply(call.kernel, call.arguments);
  };
  return cuda_emulation::returned(cuda_emulation::run(*config, reinterpret_cast<const void*>(kernel), body, &call));
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

// A thread's place
// -----------------------------------------------------------------------------------------------------

#define threadIdx (::cuda_emulation::current->thread_index)
#define blockIdx (::cuda_emulation::current->block_index)
#define blockDim (::cuda_emulation::current->block_size)
#define gridDim (::cuda_emulation::current->grid_size)
constexpr int warpSize = 32;

// Barriers
// -------------------------------------------------------------------------------------------------------------

#define CUDA_EMULATION_HERE ::cuda_emulation::Location where = ::cuda_emulation::Location::current()

inline void __syncthreads(CUDA_EMULATION_HERE) { cuda_emulation::barrier(0, 0, 0, "__syncthreads", where); }
inline int __syncthreads_count(int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::barrier(0, 0, predicate != 0, "__syncthreads_count", where).sum;
}
inline int __syncthreads_or(int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::barrier(0, 0, predicate != 0, "__syncthreads_or", where).sum != 0;
}
inline int __syncthreads_and(int predicate, CUDA_EMULATION_HERE) {
  const auto votes = cuda_emulation::barrier(0, 0, predicate != 0, "__syncthreads_and", where);
  return votes.sum == votes.arrived;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATION_HERE) {
  cuda_emulation::exchange("__syncwarp", mask, nullptr, 0, true, where);
}
inline void __threadfence_block() { cuda_emulation::fence(); }
inline void __threadfence() { cuda_emulation::fence(); }
inline void __threadfence_system() { cuda_emulation::fence(); }

// Warps
// ----------------------------------------------------------------------------------------------------------------

// As the manual says, none of these orders memory: shared memory that lanes pass around needs __syncwarp.
template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32, CUDA_EMULATION_HERE) {
  const unsigned me = cuda_emulation::lane(), first = me & ~(static_cast<unsigned>(width) - 1);
  const auto* all = cuda_emulation::exchange("__shfl_sync", mask, &value, sizeof(T), false, where);
  return cuda_emulation::brought<T>(all, first + (static_cast<unsigned>(from) & (static_cast<unsigned>(width) - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_HERE) {
  const unsigned me = cuda_emulation::lane(), first = me & ~(static_cast<unsigned>(width) - 1);
  const auto* all = cuda_emulation::exchange("__shfl_up_sync", mask, &value, sizeof(T), false, where);
  return cuda_emulation::brought<T>(all, me < first + delta ? me : me - delta);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_HERE) {
  const unsigned me = cuda_emulation::lane(), last = me | (static_cast<unsigned>(width) - 1);
  const auto* all = cuda_emulation::exchange("__shfl_down_sync", mask, &value, sizeof(T), false, where);
  return cuda_emulation::brought<T>(all, me + delta > last ? me : me + delta);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, CUDA_EMULATION_HERE) {
  const unsigned me = cuda_emulation::lane(), last = me | (static_cast<unsigned>(width) - 1);
  const auto* all = cuda_emulation::exchange("__shfl_xor_sync", mask, &value, sizeof(T), false, where);
  const unsigned from = me ^ static_cast<unsigned>(lanes);
  return cuda_emulation::brought<T>(all, from > last ? me : from);
}

namespace cuda_emulation {

// Folds what the lanes of the mask brought.
template <class T, class F>
T fold(const char* name, uint32_t mask, T value, F combine, Location where) {
  const unsigned char* all = exchange(name, mask, &value, sizeof(T), false, where);
  T result{};
  bool first = true;
  for (unsigned from = 0; from < 32; ++from) {
    if (!(mask >> from & 1)) continue;
    result = first ? brought<T>(all, from) : combine(result, brought<T>(all, from));
    first = false;
  }
  return result;
}

}  // namespace cuda_emulation

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  const uint32_t mine = predicate ? 1u << cuda_emulation::lane() : 0u;
  return cuda_emulation::fold("__ballot_sync", mask, mine, [](uint32_t a, uint32_t b) { return a | b; }, where);
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::fold("__any_sync", mask, predicate != 0, [](bool a, bool b) { return a || b; }, where);
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::fold("__all_sync", mask, predicate != 0, [](bool a, bool b) { return a && b; }, where);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, CUDA_EMULATION_HERE) {
  const auto* all = cuda_emulation::exchange("__match_any_sync", mask, &value, sizeof(T), false, where);
  unsigned equal = 0;
  for (unsigned from = 0; from < 32; ++from) {
    if (mask >> from & 1 && std::memcmp(all + from * sizeof(T), &value, sizeof(T)) == 0) equal |= 1u << from;
  }
  return equal;
}
#define CUDA_EMULATION_REDUCE(name, type, result)                                        \
  inline type __reduce_##name##_sync(unsigned mask, type value, CUDA_EMULATION_HERE) {   \
    const auto combine = [](type a, type b) -> type { return result; };                  \
    return cuda_emulation::fold("__reduce_" #name "_sync", mask, value, combine, where); \
  }
CUDA_EMULATION_REDUCE(add, unsigned, a + b)
CUDA_EMULATION_REDUCE(add, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CUDA_EMULATION_REDUCE(min, unsigned, std::min(a, b))
CUDA_EMULATION_REDUCE(min, int, std::min(a, b))
CUDA_EMULATION_REDUCE(max, unsigned, std::max(a, b))
CUDA_EMULATION_REDUCE(max, int, std::max(a, b))
CUDA_EMULATION_REDUCE(and, unsigned, a& b)
CUDA_EMULATION_REDUCE(or, unsigned, a | b)
CUDA_EMULATION_REDUCE(xor, unsigned, a ^ b)
#undef CUDA_EMULATION_REDUCE

// Atomics
// --------------------------------------------------------------------------------------------------------------

// Relaxed, as CUDA's are: they do not race with each other, and order nothing else unless a fence stands beside them.
namespace cuda_emulation {

template <class T, class F>
T update(T* address, F change) {
  before_atomic(address);
  T before = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, change(before), __ATOMIC_RELAXED);  // fibers do not interrupt each other here
  return before;
}
template <class F>
float update(float* address, F change) {
  return std::bit_cast<float>(update(reinterpret_cast<uint32_t*>(address), [&](uint32_t bits) {
    return std::bit_cast<uint32_t>(static_cast<float>(change(std::bit_cast<float>(bits))));
  }));
}
template <class F>
double update(double* address, F change) {
  return std::bit_cast<double>(update(reinterpret_cast<uint64_t*>(address), [&](uint64_t bits) {
    return std::bit_cast<uint64_t>(static_cast<double>(change(std::bit_cast<double>(bits))));
  }));
}

}  // namespace cuda_emulation

#define CUDA_EMULATION_ATOMIC(name, result)                                                \
  template <class T>                                                                       \
  T atomic##name(T* address, std::type_identity_t<T> value) {                              \
    return cuda_emulation::update(address, [&](T old) { return static_cast<T>(result); }); \
  }                                                                                        \
  template <class T>                                                                       \
  T atomic##name##_block(T* address, std::type_identity_t<T> value) {                      \
    return atomic##name(address, value);                                                   \
  }
CUDA_EMULATION_ATOMIC(Add, old + value)
CUDA_EMULATION_ATOMIC(Sub, old - value)
CUDA_EMULATION_ATOMIC(Min, std::min(old, value))
CUDA_EMULATION_ATOMIC(Max, std::max(old, value))
CUDA_EMULATION_ATOMIC(And, old& value)
CUDA_EMULATION_ATOMIC(Or, old | value)
CUDA_EMULATION_ATOMIC(Xor, old ^ value)
CUDA_EMULATION_ATOMIC(Exch, ((void)old, value))
CUDA_EMULATION_ATOMIC(Inc, old >= value ? 0 : old + 1)
CUDA_EMULATION_ATOMIC(Dec, old == 0 || old > value ? value : old - 1)
#undef CUDA_EMULATION_ATOMIC
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return cuda_emulation::update(address, [&](T old) { return old == expected ? value : old; });
}

// Memory and arithmetic
// ------------------------------------------------------------------------------------------------

template <class T>
T __ldg(const T* address, CUDA_EMULATION_HERE) {
  cuda_emulation::check_aligned(address, alignof(T), "__ldg", where);
  return *address;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(b) < static_cast<std::common_type_t<A, B>>(a) ? b : a;
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return static_cast<std::common_type_t<A, B>>(a) < static_cast<std::common_type_t<A, B>>(b) ? b : a;
}
inline void __nanosleep(unsigned) { cuda_emulation::may_be_interrupted(); }
[[noreturn]] inline void __trap(CUDA_EMULATION_HERE) { cuda_emulation::fail("__trap", where); }
