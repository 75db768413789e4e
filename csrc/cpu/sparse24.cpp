// Binding of the sparse24 operators for CPU tensors. Meaning: pyvtk/reference/sparse24.py.
#include <atomic>
#include <tuple>

#include "common/sparse24_binding.h"
#include "cpu/sparse24_problem.h"

#define PYVTK_KERNEL_HEADER "cpu/sparse24.h"
#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

// Calls f(W{}) with the C++ type of a weight's dtype.
template <class F>
bool for_weight_dtype(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Char) {
    f(int8_t{});
    return true;
  }
  return for_float_dtype(dtype, f);
}

std::tuple<Tensor, Tensor> sparse24_compress(Tensor weight, Tensor mask, bool trusted) {
  guard_dim(weight, 2, "weight");
  guard_last_contiguous(weight, "weight");
  const int64_t outputs = weight.size(0), columns = weight.size(1);
  PYVTK_GUARD(columns % 4 == 0, "weight has ", columns, " columns, which is no multiple of 4");
  guard_dtype(mask, ScalarType::Bool, "mask");
  guard_shape(mask, {outputs, columns}, "mask");
  guard_last_contiguous(mask, "mask");
  Tensor values = new_empty(weight, {outputs, columns / 2}, weight.scalar_type());
  Tensor metadata = new_empty(weight, {outputs, ceil_div<int64_t>(columns, 8)}, ScalarType::Byte);
  std::atomic<bool> good{true};
  const bool known = for_weight_dtype(weight.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    const auto kernel = PYVTK_FOR_ISA(compress<W>);
    parallel_for(outputs, 0.6 * static_cast<double>(columns), [&](int64_t begin, int64_t end) {
      if (!kernel(data<W>(weight), static_cast<const uint8_t*>(mask.const_data_ptr()), mutable_data<W>(values),
                  mutable_data<uint8_t>(metadata), columns, weight.stride(0), mask.stride(0), begin, end)) {
        good = false;
      }
    });
  });
  PYVTK_GUARD(known, "weight has dtype number ", static_cast<int>(weight.scalar_type()),
              ", which cannot be compressed");
  STD_TORCH_CHECK(good || trusted, "sparse24_compress: mask does not have exactly two entries in every group of four");
  return {values, metadata};
}

Tensor sparse24_decompress(Tensor values, Tensor metadata) {
  guard_sparse24(values, metadata);
  const int64_t outputs = values.size(0), columns = 2 * values.size(1);
  Tensor weight = new_empty(values, {outputs, columns}, values.scalar_type());
  const bool known = for_weight_dtype(values.scalar_type(), [&](auto zero) {
    using W = decltype(zero);
    const auto kernel = PYVTK_FOR_ISA(decompress<W>);
    parallel_for(outputs, 0.5 * static_cast<double>(columns), [&](int64_t begin, int64_t end) {
      kernel(data<W>(values), data<uint8_t>(metadata), mutable_data<W>(weight), columns, begin, end);
    });
  });
  PYVTK_GUARD(known, "values has dtype number ", static_cast<int>(values.scalar_type()), ", which is no weight's");
  return weight;
}

// A call as the kernels see it, and the tensors that its pointers need.
struct Call {
  Tensor x, values, metadata, out;
  OptionalTensor scales, bias, mul;
  Sparse24Problem problem{};

  Call(const Tensor& x_, const Tensor& values_, const Tensor& metadata_, const OptionalTensor& scales_,
       const OptionalTensor& bias_, const OptionalTensor& mul_, const std::string& activation)
      : x(rows_of(x_)), values(values_), metadata(metadata_), out(x_), scales(scales_), bias(bias_), mul(mul_) {
    guard_sparse24(values, metadata);
    Sparse24Problem& p = problem;
    const ScalarType dtype = x.scalar_type();
    p.outputs = values.size(0);
    p.columns = 2 * values.size(1);
    PYVTK_GUARD(x.size(x.dim() - 1) == p.columns, "x has ", x.size(x.dim() - 1), " columns, expected ", p.columns);
    std::vector<int64_t> shape;
    p.rows = 1;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) {
      shape.push_back(x.size(dim));
      p.rows *= x.size(dim);
    }
    shape.push_back(p.outputs);
    if (values.scalar_type() == ScalarType::Char) {
      PYVTK_GUARD(scales.has_value(), "int8 values need scales");
      guard_dtype(*scales, ScalarType::Float, "scales");
      guard_shape(*scales, {p.outputs}, "scales");
      if (!scales->is_contiguous()) scales = torch::stable::contiguous(*scales);
    } else {
      guard_dtype(values, dtype, "values");
      PYVTK_GUARD(!scales.has_value(), "scales belong to int8 values");
    }
    if (bias.has_value()) {
      guard_shape(*bias, {p.outputs}, "bias");
      p.wide_bias = bias->scalar_type() == ScalarType::Float;
      if (!p.wide_bias) guard_dtype(*bias, dtype, "bias");
      if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    }
    if (mul.has_value()) {
      guard_dtype(*mul, dtype, "mul");
      PYVTK_GUARD(mul->dim() == x.dim(), "mul has ", mul->dim(), " dimensions, expected ", x.dim());
      for (int64_t dim = 0; dim < x.dim(); ++dim) {
        PYVTK_GUARD(mul->size(dim) == shape[dim], "mul has size ", mul->size(dim), " in dimension ", dim, ", expected ",
                    shape[dim]);
      }
      mul = rows_of(*mul);
      p.mul = mul->const_data_ptr();
      p.mul_stride = row_stride(*mul);
    }
    out = new_empty(x, shape, dtype);
    p.x = x.const_data_ptr();
    p.x_stride = row_stride(x);
    p.values = values.const_data_ptr();
    p.metadata = data<uint8_t>(metadata);
    p.scales = data<float>(scales);
    p.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
    p.out = out.mutable_data_ptr();
    p.activation = static_cast<Activation>(sparse24_activation_named(activation));
  }

  // Two dimensions keep the distance of their rows; others are copied if they are not contiguous.
  static Tensor rows_of(const Tensor& x) {
    PYVTK_GUARD(x.dim() >= 1, "x and mul must have dimensions");
    if (x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1)) return x;
    return x.is_contiguous() ? x : torch::stable::contiguous(x);
  }
  static int64_t row_stride(const Tensor& x) { return x.dim() == 2 ? x.stride(0) : x.size(x.dim() - 1); }
};

// Few rows cost by the weight, many by the row; from here on the second are faster (measured for (4096, 4096) float32).
constexpr int64_t kFewRowsBelow = 8;

template <class T, class W>
void run_few(const Sparse24Problem& p) {
  const auto pack = PYVTK_FOR_ISA(few_pack<T, W>);
  const auto kernel = PYVTK_FOR_ISA(few<T, W>);
  const auto packed = portable::scratch(p.rows * PYVTK_FOR_ISA(few_floats)(p.columns));
  pack(p, packed.get());
  // reading weights: about 15 bytes in a nanosecond
  const double cost = static_cast<double>(p.columns) * static_cast<double>(p.rows + 1) * 0.05;
  parallel_for(p.outputs, cost, [&](int64_t begin, int64_t end) { kernel(p, packed.get(), nullptr, begin, end); });
}

template <class T, class W>
void run_many(const Sparse24Problem& p) {
  const auto kernel = PYVTK_FOR_ISA(many<T, W>);
  const int64_t items = PYVTK_FOR_ISA(many_items)(p.rows, p.outputs);
  const double cost = 0.02 * static_cast<double>(p.rows) * static_cast<double>(p.outputs) *
                      static_cast<double>(p.columns) / static_cast<double>(std::max<int64_t>(items, 1));
  parallel_for(items, cost, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

// By torch's product with a dense weight, or with one that is packed for the vendor's kernel. torch has no such kernel
// for CPU tensors, and says so: this is the path of CUDA with what stands in for it in tests.
template <class T>
Tensor run_by_torch(Call& call, const Tensor& weight, bool packed) {
  Sparse24Problem& p = call.problem;
  const bool inside = call.bias.has_value() && call.bias->scalar_type() == call.x.scalar_type();
  const OptionalTensor added = inside ? call.bias : OptionalTensor{};
  if (!packed) {
    guard_dtype(weight, call.x.scalar_type(), "dense");
    guard_shape(weight, {p.outputs, p.columns}, "dense");
  }
  Tensor z =
      packed ? sparse24_vendor_linear(call.x, weight, added, p.outputs) : sparse24_dense_linear(call.x, weight, added);
  if (inside) p.bias = nullptr;
  p.wide_bias = p.wide_bias && !inside;
  if (p.bias == nullptr && p.mul == nullptr && p.activation == Activation::none) return z;
  p.scales = nullptr;  // they are in the copy
  if (!z.is_contiguous()) z = torch::stable::contiguous(z);
  const auto kernel = PYVTK_FOR_ISA(finish_rows<T>);
  parallel_for(p.rows, 1.0 * static_cast<double>(p.outputs),
               [&](int64_t begin, int64_t end) { kernel(p, data<T>(z), begin, end); });
  return call.out;
}

Tensor sparse24_linear(Tensor x, Tensor values, Tensor metadata, OptionalTensor scales, OptionalTensor dense,
                       OptionalTensor bias, OptionalTensor mul, std::string activation, std::vector<int64_t> choice,
                       OptionalTensor vendor) {
  Call call(x, values, metadata, scales, bias, mul, activation);
  Tensor result = call.out;
  const Sparse24Kernel kernel =
      sparse24_kernel_chosen(call.problem.rows, choice, dense.has_value(), vendor.has_value(), kFewRowsBelow);
  const bool few = kernel == Sparse24Kernel::few;
  const bool known = for_float_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (kernel == Sparse24Kernel::dense) {
      result = run_by_torch<T>(call, *dense, false);
    } else if (kernel == Sparse24Kernel::vendor && call.problem.rows > 0) {
      result = run_by_torch<T>(call, *vendor, true);
    } else if (values.scalar_type() == ScalarType::Char) {
      few ? run_few<T, int8_t>(call.problem) : run_many<T, int8_t>(call.problem);
    } else {
      few ? run_few<T, T>(call.problem) : run_many<T, T>(call.problem);
    }
  });
  PYVTK_GUARD(known, "x has dtype number ", static_cast<int>(x.scalar_type()), ", which sparse24 has no kernel for");
  return result;
}

Tensor sparse24_linear_int8(Tensor x, Tensor values, Tensor metadata, Tensor scales, OptionalTensor x_scale,
                            OptionalTensor bias, OptionalTensor mul, std::string activation) {
  guard_dtype(values, ScalarType::Char, "values");
  Call call(x, values, metadata, scales, bias, mul, activation);
  const Sparse24Problem& p = call.problem;
  // two products of at most 128 * 127 for every four columns fit an int32
  PYVTK_GUARD(p.columns <= 1 << 18, "x has ", p.columns, " columns, whose sums may not fit an int32");
  if (x_scale.has_value()) {
    guard_dtype(*x_scale, ScalarType::Float, "x_scale");
    guard_shape(*x_scale, {1}, "x_scale");
  }
  const bool known = for_float_dtype(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto whole = portable::scratch(p.rows * p.columns), row_scales = portable::scratch(p.rows);
    const auto quantize = PYVTK_FOR_ISA(quantize_row<T>);
    const float* call_scale = data<float>(x_scale);
    parallel_for(p.rows, 0.5 * static_cast<double>(p.columns), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        row_scales[row] = quantize(static_cast<const T*>(p.x) + row * p.x_stride, p.columns, call_scale,
                                   whole.get() + row * p.columns);
      }
    });
    const double cost = 0.02 * static_cast<double>(p.columns) * static_cast<double>(p.rows + 8);
    if (p.rows < kFewRowsBelow) {
      Sparse24Problem q = p;
      q.x = whole.get();
      q.x_stride = p.columns;
      const auto packed = portable::scratch(p.rows * PYVTK_FOR_ISA(few_floats)(p.columns));
      const auto pack = PYVTK_FOR_ISA(few_pack<float, int8_t>);
      pack(q, packed.get());
      const auto kernel = PYVTK_FOR_ISA(few<T, int8_t, true>);
      parallel_for(p.outputs, cost,
                   [&](int64_t begin, int64_t end) { kernel(p, packed.get(), row_scales.get(), begin, end); });
    } else {
      const auto kernel = PYVTK_FOR_ISA(many_int8<T>);
      const int64_t items = PYVTK_FOR_ISA(int8_items)(p.rows, p.outputs);
      parallel_for(items, cost * static_cast<double>(p.outputs) / static_cast<double>(std::max<int64_t>(items, 1)),
                   [&](int64_t begin, int64_t end) { kernel(p, whole.get(), row_scales.get(), begin, end); });
    }
  });
  PYVTK_GUARD(known, "x has dtype number ", static_cast<int>(x.scalar_type()), ", which sparse24 has no kernel for");
  return call.out;
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("sparse24_compress", TORCH_BOX(&pyvtk::cpu::sparse24_compress));
  m.impl("sparse24_decompress", TORCH_BOX(&pyvtk::cpu::sparse24_decompress));
  m.impl("sparse24_linear", TORCH_BOX(&pyvtk::cpu::sparse24_linear));
  m.impl("sparse24_linear_int8", TORCH_BOX(&pyvtk::cpu::sparse24_linear_int8));
}
