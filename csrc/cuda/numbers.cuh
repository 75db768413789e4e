// Numbers that kernels of the compact family add: 16-bit ones in float32, rounded once; several to an access.
#pragma once
#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

// The widest access, in bytes, that these numbers and addresses are multiples of.
inline int32_t width_of(uint64_t all) {
  all |= 16;
  return static_cast<int32_t>(all & -all);
}

__device__ __forceinline__ double number_at(const void* numbers, bool are_double, int64_t i) {
  return are_double ? static_cast<const double*>(numbers)[i]
                    : static_cast<double>(static_cast<const float*>(numbers)[i]);
}

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ __forceinline__ double to_wide(double x) { return x; }
template <class T>
__device__ __forceinline__ float to_wide(T x) {
  return to_float(x);
}
template <class T>
__device__ __forceinline__ T from_wide(Wide<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// kCount numbers that are read and written at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T numbers[kCount];
};
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const char* from) {
  if constexpr (sizeof(T) * kCount == 16) {
    return std::bit_cast<Pack<T, kCount>>(__ldg(reinterpret_cast<const uint4*>(from)));
  } else {
    return *reinterpret_cast<const Pack<T, kCount>*>(from);
  }
}
// The same where addresses may be multiples of a number's size only.
template <class T, int kCount>
__device__ __forceinline__ Pack<T, kCount> load_pack(const char* from, bool aligned) {
  if (aligned) return load_pack<T, kCount>(from);
  Pack<T, kCount> pack;
  for (int i = 0; i < kCount; ++i) pack.numbers[i] = reinterpret_cast<const T*>(from)[i];
  return pack;
}
template <class T, int kCount>
__device__ __forceinline__ void store_pack(char* to, const Pack<T, kCount>& pack) {
  if constexpr (sizeof(T) * kCount == 16) {
    *reinterpret_cast<uint4*>(to) = std::bit_cast<uint4>(pack);
  } else {
    *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store_pack(char* to, const Pack<T, kCount>& pack, bool aligned) {
  if (aligned) return store_pack<T, kCount>(to, pack);
  for (int i = 0; i < kCount; ++i) reinterpret_cast<T*>(to)[i] = pack.numbers[i];
}

__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// sum += weight * pack, each product and sum in one rounding.
template <class T, int kCount>
__device__ __forceinline__ void add_pack(Wide<T> (&sum)[kCount], Wide<T> weight, const Pack<T, kCount>& pack) {
  for (int i = 0; i < kCount; ++i) sum[i] = fused(weight, to_wide(pack.numbers[i]), sum[i]);
}

}  // namespace pyvtk::cuda
