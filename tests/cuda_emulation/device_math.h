// CUDA's functions that are not rounded correctly, as far off as its programming guide allows ("Mathematical
// Functions", maximum error in units of the last place), up or down as the argument's bits fall. On a GPU most results
// are closer; what an error budget has to allow for are these.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace cuda_emulation {

// `exact`, rounded, and then so many units off
inline float off_by(int units, double exact, float argument) {
  float result = static_cast<float>(exact);
  // what is exact on a GPU as well: limits, and e to the power of 0
  if (!std::isfinite(result) || result == 0.0f || argument == 0.0f) return result;
  uint32_t mixed = std::bit_cast<uint32_t>(argument) * 0x9e3779b1u;  // any function that looks random
  mixed ^= mixed >> 15;
  mixed *= 0x85ebca77u;
  const float to = mixed >> 31 ? std::numeric_limits<float>::infinity() : -std::numeric_limits<float>::infinity();
  for (int i = 0; i < units; ++i) result = std::nextafter(result, to);
  return result;
}

}  // namespace cuda_emulation

// Found before the C library's by kernels, which all live here.
namespace pyvtk::cuda {

inline float expf(float x) { return cuda_emulation::off_by(2, std::exp(double{x}), x); }
// powers of two that are whole are exact
inline float exp2f(float x) {
  return std::nearbyint(x) == x ? std::exp2(x) : cuda_emulation::off_by(2, std::exp2(double{x}), x);
}
inline float logf(float x) { return x == 1.0f ? 0.0f : cuda_emulation::off_by(1, std::log(double{x}), x); }
// nor does it leave -1 ... 1, which it reaches
inline float erff(float x) {
  const double exact = std::erf(double{x});
  return std::abs(static_cast<float>(exact)) == 1.0f ? static_cast<float>(exact) : cuda_emulation::off_by(2, exact, x);
}
inline float tanhf(float x) { return cuda_emulation::off_by(2, std::tanh(double{x}), x); }

}  // namespace pyvtk::cuda
