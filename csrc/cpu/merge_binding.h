// Sums of rows for bindings: the arithmetic of a dtype, and weights as doubles. Shared by merge and by the gradients of
// compact; implemented in merge.cpp.
#pragma once
#include <algorithm>
#include <vector>

#include "binding.h"
#include "common/compact_binding.h"
#include "cpu/links.h"

namespace pyvtk::cpu {

// What moving or adding a byte costs, for parallel_for.
inline constexpr double kNanosecondsPerByte = 0.1;

// The arithmetic of a dtype; complex numbers are added as two real ones.
struct Arithmetic {
  SumRows sum = nullptr;
  Dot dot = nullptr;
  int64_t number = 1;  // bytes
};

Arithmetic arithmetic_of(ScalarType dtype);

// A gate or a weight as doubles, whatever float type it came in.
inline std::vector<double> doubles(const Tensor& tensor) {
  const Tensor values = dense(tensor);
  const auto count = static_cast<size_t>(values.numel());
  std::vector<double> result(count);
  if (values.scalar_type() == ScalarType::Double) {
    std::copy_n(data<double>(values), count, result.begin());
  } else {
    guard_dtype(values, ScalarType::Float, "gate or weights");
    std::copy_n(data<float>(values), count, result.begin());
  }
  return result;
}

// The same way back.
inline void store_doubles(const std::vector<double>& values, const Tensor& tensor) {
  if (tensor.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), mutable_data<double>(tensor));
  } else {
    std::transform(values.begin(), values.end(), mutable_data<float>(tensor),
                   [](double x) { return static_cast<float>(x); });
  }
}

}  // namespace pyvtk::cpu
