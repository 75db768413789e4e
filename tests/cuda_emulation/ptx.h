// The names of csrc/cuda/ptx.cuh that are not C++, as the emulation has them. Same names, same meaning.
#pragma once
#include "common/types.h"
#include "cuda_emulation.h"
#include "device_math.h"
#include "warp_matrix.h"

// A constant for every declaration (and every instance of a template): its address finds the block's memory.
#define PYVTK_SHARED(name, ...)                                                                                        \
  static constexpr ::cuda_emulation::SharedVariable name##_variable{#name, sizeof(__VA_ARGS__), alignof(__VA_ARGS__)}; \
  auto& name = *static_cast<std::type_identity_t<__VA_ARGS__>*>(::cuda_emulation::shared(name##_variable))

#define PYVTK_UNROLL
#define PYVTK_NOT_UNROLLED

namespace pyvtk::cuda {

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_emulation::dynamic_shared());
}

template <int kBytes>
void copy_async(void* to, const void* from, bool valid = true, CUDA_EMULATION_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_emulation::copy_async(to, from, kBytes, valid ? kBytes : 0, where);
}
inline void copy_async_commit() { cuda_emulation::copy_async_commit(); }
template <int kGroupsLeft>
void copy_async_wait() {
  cuda_emulation::copy_async_wait(kGroupsLeft);
}

inline void named_barrier(int id, int threads, CUDA_EMULATION_HERE) {
  cuda_emulation::barrier(id, threads, 0, "named_barrier", where);
}

// A launch has ended when it returns.
inline void await_previous_launch() {}
inline void let_next_launch_start() {}

inline void stay_in_loop(unsigned&) {}
inline float2 widen_half2(unsigned halves) {
  return {to_float(float16{static_cast<uint16_t>(halves)}), to_float(float16{static_cast<uint16_t>(halves >> 16)})};
}

template <int kMatrices>
void ldmatrix(uint32_t (&to)[kMatrices], const void* row, CUDA_EMULATION_HERE) {
  cuda_emulation::ldmatrix(to, row, false, where);
}
template <int kMatrices>
void ldmatrix_transposed(uint32_t (&to)[kMatrices], const void* row, CUDA_EMULATION_HERE) {
  cuda_emulation::ldmatrix(to, row, true, where);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_EMULATION_HERE) {
  cuda_emulation::mma(d, a, b, [](uint16_t bits) { return to_float(T{bits}); }, where);
}
template <class T, int kSelector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                     CUDA_EMULATION_HERE) {
  cuda_emulation::mma_sp(d, a, b, metadata, kSelector, +[](uint16_t bits) { return to_float(T{bits}); }, where);
}
inline void mma_sp_m16n8k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                            CUDA_EMULATION_HERE) {
  cuda_emulation::mma_sp(d, a, b, metadata, 0, +[](uint8_t bits) { return static_cast<int8_t>(bits); }, where);
}
template <class T>
T rounded(float x) {
  return from_float<T>(x);
}

}  // namespace pyvtk::cuda
