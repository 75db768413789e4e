// Conversions of common/types.h: every 16-bit pattern, and every kind of rounding.
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "common/types.h"

using pyvtk::bfloat16;
using pyvtk::float16;
using pyvtk::from_float;
using pyvtk::to_float;

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Sign, exponent and mantissa taken apart and put together in double: slow, and plain enough to be believed.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = static_cast<double>(bits & ((1u << mantissa_bits) - 1));
  const double sign = bits >> (exponent_bits + mantissa_bits) ? -1.0 : 1.0;
  const double fraction = std::ldexp(mantissa, -mantissa_bits);
  if (exponent == (1 << exponent_bits) - 1) {
    return mantissa == 0.0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
  }
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

template <class T>
void every_pattern(int exponent_bits, int mantissa_bits) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T narrow{static_cast<uint16_t>(bits)};
    const float wide = to_float(narrow);
    const double expected = value_of(bits, exponent_bits, mantissa_bits);
    if (std::isnan(expected)) {
      CHECK(std::isnan(wide), bits, wide);
      CHECK(std::isnan(to_float(from_float<T>(wide))), bits);
      CHECK(std::signbit(wide) == (bits >= 0x8000u), bits);
      continue;
    }
    CHECK(static_cast<double>(wide) == expected && std::signbit(wide) == (bits >= 0x8000u), bits, wide, expected);
    CHECK(from_float<T>(wide).bits == bits, bits, from_float<T>(wide).bits);
  }
}

// Between neighbours: below the middle goes down, above it goes up, and the middle goes to the even one.
template <class T>
void rounding_between_all_neighbours(uint16_t largest) {
  for (uint16_t bits = 0; bits < largest; ++bits) {
    const float low = to_float(T{bits}), high = to_float(T{static_cast<uint16_t>(bits + 1)});
    const float middle = static_cast<float>((static_cast<double>(low) + static_cast<double>(high)) / 2);
    const uint16_t even = static_cast<uint16_t>(bits % 2 ? bits + 1 : bits);
    for (const float sign : {1.0f, -1.0f}) {
      const uint32_t sign_bit = sign < 0 ? 0x8000u : 0u;
      CHECK(from_float<T>(sign * middle).bits == (even | sign_bit), bits, middle);
      CHECK(from_float<T>(sign * std::nextafter(middle, 0.0f)).bits == (bits | sign_bit), bits, middle);
      CHECK(from_float<T>(sign * std::nextafter(middle, kInfinity)).bits == ((bits + 1u) | sign_bit), bits, middle);
    }
  }
}

void ends_of_the_range() {
  CHECK(from_float<float16>(65519.0f).bits == 0x7bff, "the largest finite");
  CHECK(from_float<float16>(65520.0f).bits == 0x7c00, "halfway to the next, which is infinity");
  CHECK(from_float<float16>(std::numeric_limits<float>::max()).bits == 0x7c00, "far too large");
  CHECK(from_float<float16>(0x1p-25f).bits == 0x0000, "half the smallest goes to even");
  CHECK(from_float<float16>(std::nextafter(0x1p-25f, 1.0f)).bits == 0x0001, "just above half the smallest");
  CHECK(from_float<bfloat16>(std::numeric_limits<float>::max()).bits == 0x7f80, "rounds up to infinity");
  CHECK(from_float<bfloat16>(std::numeric_limits<float>::denorm_min()).bits == 0x0000, "far too small");
  // A NaN whose payload lies only in the bits that are cut off must not turn into an infinity.
  const float low_payload = std::bit_cast<float>(0x7f800001u);
  CHECK(std::isnan(to_float(from_float<bfloat16>(low_payload))), from_float<bfloat16>(low_payload).bits);
  CHECK(std::isnan(to_float(from_float<float16>(low_payload))), from_float<float16>(low_payload).bits);
  CHECK(from_float<float>(1.25f) == 1.25f && to_float(1.25f) == 1.25f, "float stays what it is");
}

void division_rounds_up() {
  CHECK(pyvtk::ceil_div<int64_t>(0, 4) == 0 && pyvtk::ceil_div<int64_t>(1, 4) == 1, "small");
  CHECK(pyvtk::ceil_div<int64_t>(4, 4) == 1 && pyvtk::ceil_div<int64_t>(5, 4) == 2, "around a multiple");
}

}  // namespace

int main() {
  every_pattern<bfloat16>(8, 7);
  every_pattern<float16>(5, 10);
  rounding_between_all_neighbours<bfloat16>(0x7f7f);
  rounding_between_all_neighbours<float16>(0x7bff);
  ends_of_the_range();
  division_rounds_up();
  return report();
}
