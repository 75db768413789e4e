// Element types shared by all kernels. Torch-free; bit-compatible with torch's bfloat16 and float16. Device code may
// call what is constexpr.
#pragma once
#include <bit>
#include <cstdint>
#include <limits>

namespace pyvtk {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

constexpr float to_float(float x) { return x; }
constexpr float to_float(bfloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

constexpr float to_float(float16 x) {
  // Scaling by 2^112 moves the exponent bias of 15 to 127 and normalises subnormals on the way.
  const uint32_t magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? (0x7f800000u | magnitude) : std::bit_cast<uint32_t>(scaled);
  return std::bit_cast<float>(special | (uint32_t{x.bits & 0x8000u} << 16));
}

template <class T>
constexpr T from_float(float x);

template <>
constexpr float from_float<float>(float x) {
  return x;
}

// Round to nearest even; NaN stays a (quiet) NaN.
template <>
constexpr bfloat16 from_float<bfloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
constexpr float16 from_float<float16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {
    // Below 2^-14 the result is subnormal: adding 0.5 lets the FPU round at the right bit (2^-24).
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return {static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
}

// ceil(a / b) for non-negative a and positive b.
template <class Int>
constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace pyvtk
