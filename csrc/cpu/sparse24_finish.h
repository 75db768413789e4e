// What follows the sums of a product: scale, bias, activation, factor, and the one rounding (no include guard: compiled
// once per instruction set, see each_isa.h).
#include "cpu/sparse24_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

PYVTK_INLINE vfloat sigmoid(vfloat x) { return 1.0f / (1.0f + vexp(-x)); }

// The part of a normal distribution below x, to a relative error of about 2e-7: erfc(z) = t exp(p(t) - z^2) with
// t = 1 / (1 + z / 2) and a Chebyshev fit p (Numerical Recipes, 6.2).
PYVTK_INLINE vfloat normal_below(vfloat x) {
  const vfloat z = as_float(as_int(x) & 0x7fffffff) * 0.70710678f;
  const vfloat t = 1.0f / (0.5f * z + 1.0f);
  vfloat p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const vfloat tail = 0.5f * t * vexp(p - z * z);
  return blend_sign(as_int(x), tail, 1.0f - tail);
}

template <Activation activation>
PYVTK_INLINE vfloat activate(vfloat x) {
  if constexpr (activation == Activation::relu) return blend(x < 0.0f, vfloat{}, x);  // NaN stays
  if constexpr (activation == Activation::gelu) return x * normal_below(x);
  if constexpr (activation == Activation::gelu_tanh) {
    // (1 + tanh u) / 2 is the sigmoid of 2 u
    return x * sigmoid((x * x * 0.044715f + 1.0f) * x * 1.5957691f);
  }
  if constexpr (activation == Activation::quick_gelu) return x * sigmoid(x * 1.702f);
  if constexpr (activation == Activation::silu) return x * sigmoid(x);
  return x;
}

// f(std::integral_constant<Activation>)
template <class F>
PYVTK_INLINE void for_activation(Activation activation, F&& f) {
  switch (activation) {
    case Activation::none:
      return f(std::integral_constant<Activation, Activation::none>{});
    case Activation::relu:
      return f(std::integral_constant<Activation, Activation::relu>{});
    case Activation::gelu:
      return f(std::integral_constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh:
      return f(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::quick_gelu:
      return f(std::integral_constant<Activation, Activation::quick_gelu>{});
    case Activation::silu:
      return f(std::integral_constant<Activation, Activation::silu>{});
  }
}

// Sums z of outputs [first, first + count) of one row become that part of the result; `scale` is the row's own.
template <class T>
void finish_row(const Sparse24Problem& p, int64_t row, int64_t first, int64_t count, const float* z, float scale) {
  T* out = static_cast<T*>(p.out) + row * p.outputs + first;
  const T* mul = p.mul == nullptr ? nullptr : static_cast<const T*>(p.mul) + row * p.mul_stride + first;
  const float* scales = p.scales == nullptr ? nullptr : p.scales + first;
  const float* wide_bias = p.wide_bias ? static_cast<const float*>(p.bias) + first : nullptr;
  const T* bias = p.bias == nullptr || p.wide_bias ? nullptr : static_cast<const T*>(p.bias) + first;
  for_activation(p.activation, [&](auto activation) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t width = std::min(kLanes, count - i);
      const auto part = [&](const auto* from) {
        return width == kLanes ? load(from + i) : load_partial(from + i, width);
      };
      vfloat y = part(z);
      if (scales != nullptr) y = y * scale * part(scales);
      if (wide_bias != nullptr) y += part(wide_bias);
      if (bias != nullptr) y += part(bias);
      y = activate<activation>(y);
      if (mul != nullptr) y *= part(mul);
      if (width == kLanes) {
        store(out + i, y);
      } else {
        T lanes[kLanes];
        store(lanes, y);
        std::memcpy(out + i, lanes, static_cast<size_t>(width) * sizeof(T));
      }
    }
  });
}

// The same for rows [begin, end) of sums z [rows, outputs] that another library has formed, in x's dtype.
template <class T>
void finish_rows(const Sparse24Problem& p, const T* z, int64_t begin, int64_t end) {
  constexpr int64_t kPart = 512;
  float wide[kPart];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t first = 0; first < p.outputs; first += kPart) {
      const int64_t count = std::min(kPart, p.outputs - first);
      const T* from = z + row * p.outputs + first;
      for (int64_t i = 0; i < count; i += kLanes) store(wide + i, load_partial(from + i, std::min(kLanes, count - i)));
      finish_row<T>(p, row, first, count, wide, 1.0f);
    }
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
