// What a product with 2:4 sparse weights is asked for, on raw pointers. Torch-free. Meaning:
// pyvtk/reference/sparse24.py.
#pragma once
#include <cstdint>

namespace pyvtk::cuda {

enum class Sparse24Activation : int { none, relu, gelu, gelu_tanh, quick_gelu, silu };
enum class Sparse24Number : int { float32, bfloat16, float16 };

// What happens to a sum: act(sum * x_scales[row] * scales[feature] + bias[feature]) * mul[row, feature]. Absent: null.
struct Sparse24Epilogue {
  const float* x_scales = nullptr;  // [rows]
  const float* scales = nullptr;    // [features]
  const void* bias = nullptr;       // [features]
  Sparse24Number bias_type = Sparse24Number::float32;
  Sparse24Activation activation = Sparse24Activation::none;
  const void* mul = nullptr;  // [rows, features], in the type of out
  int64_t mul_stride = 0;     // elements between rows
  void* out = nullptr;        // [rows, features]
  Sparse24Number out_type = Sparse24Number::float32;
};

struct Sparse24Problem {
  int64_t rows = 0;      // of x
  int64_t features = 0;  // rows of the weight
  int64_t depth = 0;     // columns of both; a multiple of 4
  const void* x = nullptr;
  int64_t x_stride = 0;               // elements between rows
  const void* values = nullptr;       // [features, depth / 2]
  const uint8_t* metadata = nullptr;  // [features, ceil(depth / 8)]
  Sparse24Epilogue epilogue;
};

}  // namespace pyvtk::cuda
