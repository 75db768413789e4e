// What the sparse24 kernels are told about a call. Torch-free.
#pragma once
#include <cstdint>

namespace pyvtk::cpu {

enum class Activation : int { none, relu, gelu, gelu_tanh, quick_gelu, silu };

// out = activation(x W^T * scales + bias) * mul
struct Sparse24Problem {
  const void* x;            // [rows, columns], rows x_stride elements apart
  const void* values;       // [outputs, columns / 2]
  const uint8_t* metadata;  // [outputs, ceil(columns / 8)]
  const float* scales;      // [outputs] or null
  const void* bias;         // [outputs] or null, in x's dtype or float32
  const void* mul;          // [rows, outputs] or null, in x's dtype, rows mul_stride elements apart
  void* out;                // [rows, outputs], in x's dtype
  int64_t rows, columns, outputs;
  int64_t x_stride, mul_stride;
  bool wide_bias;  // the bias is float32
  Activation activation;

  int64_t groups() const { return columns / 4; }
  int64_t metadata_columns() const { return (columns + 7) / 8; }
};

}  // namespace pyvtk::cpu
