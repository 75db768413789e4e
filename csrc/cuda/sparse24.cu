// Binding of sparse24 for CUDA tensors. Meaning: pyvtk/reference/sparse24.py.
#include <array>
#include <tuple>

#include "common/sparse24_binding.h"
#include "cuda/sparse24.cuh"
#include "cuda/sparse24_wgmma.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

Sparse24Number number_of(ScalarType dtype, const char* name) {
  if (dtype == ScalarType::Float) return Sparse24Number::float32;
  if (dtype == ScalarType::BFloat16) return Sparse24Number::bfloat16;
  PYVTK_GUARD(dtype == ScalarType::Half, name, " has dtype number ", static_cast<int>(dtype),
              ", expected float32, bfloat16 or float16");
  return Sparse24Number::float16;
}

// Everything but x itself and the scales; out is made here.
struct Call {
  Sparse24Problem problem;
  Tensor out;
};
Call make_call(const Tensor& x, const Tensor& values, const Tensor& metadata, const OptionalTensor& scales,
               const OptionalTensor& bias, const OptionalTensor& mul, const std::string& activation) {
  guard_sparse24(values, metadata);
  const OptionalTensor values_too = values, metadata_too = metadata;
  guard_same_device(x, {&values_too, &metadata_too, &scales, &bias, &mul});
  Sparse24Problem problem;
  problem.features = values.size(0);
  problem.depth = values.size(1) * 2;
  const RowsOf rows = rows_of(x, problem.depth, "x");
  problem.rows = rows.rows;
  problem.x = x.const_data_ptr();
  problem.x_stride = rows.stride;
  problem.values = values.const_data_ptr();
  problem.metadata = data<uint8_t>(metadata);
  const bool scaled = values.scalar_type() == ScalarType::Char;
  PYVTK_GUARD(scaled == scales.has_value(), "scales belong to int8 values, and only to these");
  Sparse24Epilogue& end = problem.epilogue;
  if (scaled) {
    guard_dtype(*scales, ScalarType::Float, "scales");
    guard_shape(*scales, {problem.features}, "scales");
    guard_contiguous(*scales, "scales");
    end.scales = data<float>(scales);
  }
  end.out_type = number_of(x.scalar_type(), "x");
  if (bias.has_value()) {
    guard_shape(*bias, {problem.features}, "bias");
    guard_contiguous(*bias, "bias");
    end.bias = bias->const_data_ptr();
    end.bias_type = number_of(bias->scalar_type(), "bias");
  }
  if (mul.has_value()) {
    guard_dtype(*mul, x.scalar_type(), "mul");
    const RowsOf of_mul = rows_of(*mul, problem.features, "mul");
    PYVTK_GUARD(of_mul.rows == problem.rows, "mul must have x's rows");
    end.mul = mul->const_data_ptr();
    end.mul_stride = of_mul.stride;
  }
  end.activation = static_cast<Sparse24Activation>(sparse24_activation_named(activation));
  std::vector<int64_t> shape;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) shape.push_back(x.size(dim));
  shape.push_back(problem.features);
  Tensor out = new_empty(x, shape, x.scalar_type());
  end.out = out.mutable_data_ptr();
  return {problem, std::move(out)};
}

template <class X, class V>
void multiply(const Sparse24Problem& problem, const Tensor& like, bool few, bool x_follows = false) {
  int at_a_time = 0;
  check(multiprocessors(at_a_time), "sparse24_linear");
  OptionalTensor workspace;
  const auto workspace_of = [&](const auto& plan) {
    const int64_t bytes = plan.workspace_bytes(problem);
    if (bytes > 0) workspace = new_empty(like, {bytes}, ScalarType::Byte);
    return bytes > 0 ? workspace->mutable_data_ptr() : nullptr;
  };
  const Sparse24Plan plan = plan_sparse24<X, V>(problem, few, at_a_time);
  if constexpr (std::is_same_v<X, V>) {
    bool by_wgmma = false;
    if (!plan.few) check(wgmma_runs<X>(by_wgmma), "sparse24_linear");
    if (by_wgmma) {
      const Sparse24WgmmaPlan wide = plan_sparse24_wgmma<X>(problem, at_a_time);
      if (wide.fits) {
        check(sparse24_linear_wgmma<X>(problem, wide, workspace_of(wide), current_stream(like)), "sparse24_linear");
        return;
      }
    }
  }
  check(sparse24_linear<X, V>(problem, plan, workspace_of(plan), current_stream(like), x_follows), "sparse24_linear");
}

// values as a dense matrix [N, K]: in their own dtype, or float32 times scales.
Tensor decompressed(const Tensor& values, const Tensor& metadata, const OptionalTensor& scales) {
  const int64_t features = values.size(0), depth = values.size(1) * 2;
  Tensor dense = new_empty(values, {features, depth}, scales.has_value() ? ScalarType::Float : values.scalar_type());
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    check(decompress(data<T>(values), data<uint8_t>(metadata), nullptr, features, depth, mutable_data<T>(dense),
                     current_stream(values)),
          "sparse24_decompress");
  };
  if (scales.has_value()) {
    check(decompress(data<int8_t>(values), data<uint8_t>(metadata), data<float>(scales), features, depth,
                     mutable_data<float>(dense), current_stream(values)),
          "sparse24_decompress");
  } else if (values.element_size() == 4) {
    run(uint32_t{});
  } else if (values.element_size() == 2) {
    run(uint16_t{});
  } else {
    run(uint8_t{});
  }
  return dense;
}

// torch's own product with a dense weight, or with one that is packed for cuSPARSELt. What it has no place for
// (activation, mul, a bias of another dtype) comes in a second launch, on sums that were rounded to x's dtype.
Tensor linear_by_torch(const Tensor& x, const Tensor& weight, bool packed, const OptionalTensor& bias, Call call) {
  Sparse24Epilogue& end = call.problem.epilogue;
  end.scales = nullptr;  // the weight is scaled
  const bool plain = end.mul == nullptr && end.activation == Sparse24Activation::none;
  const bool torch_adds = plain && bias.has_value() && bias->scalar_type() == x.scalar_type();
  const void* sums = call.out.const_data_ptr();
  OptionalTensor product;
  if (!packed && x.dim() == 2 && !torch_adds) {
    // into our own tensor: autocast, which may be on around this operator, leaves that alone
    std::array<StableIValue, 3> stack{torch::stable::detail::from(x),
                                      torch::stable::detail::from(torch::stable::transpose(weight, 0, 1)),
                                      torch::stable::detail::from(call.out)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
    torch::stable::detail::to<Tensor>(stack[0]);  // what is returned is owned
    if (plain && !bias.has_value()) return std::move(call.out);
  } else {
    const OptionalTensor added = torch_adds ? bias : std::nullopt;
    product = packed ? sparse24_vendor_linear(x, weight, added, call.problem.features)
                     : sparse24_dense_linear(x, weight, added);
    guard_dtype(*product, x.scalar_type(), "torch's product (is autocast on?)");
    if (torch_adds || (plain && !bias.has_value())) return std::move(*product);
    guard_contiguous(*product, "torch's product");
    sums = product->const_data_ptr();
  }
  for_float_dtype(x.scalar_type(), [&](auto zero) {
    check(combine(static_cast<const decltype(zero)*>(sums), 1, call.problem.rows, call.problem.features, end,
                  current_stream(x)),
          "sparse24_linear");
  });
  return std::move(call.out);
}

// Where many rows go is decided here, by `choice` alone. A caller whose device is faster with a dense weight gives one,
// with kernel 2 from some number of rows on; the weight in cuSPARSELt's form is `vendor`, kernel 3.
Tensor linear_operator(const Tensor& x, const Tensor& values, const Tensor& metadata, const OptionalTensor& scales,
                       const OptionalTensor& dense, const OptionalTensor& bias, const OptionalTensor& mul,
                       const std::string& activation, const std::vector<int64_t>& choice,
                       const OptionalTensor& vendor) {
  DeviceGuard device(x.get_device_index());
  Call call = make_call(x, values, metadata, scales, bias, mul, activation);
  const Sparse24Kernel kernel =
      sparse24_kernel_chosen(call.problem.rows, choice, dense.has_value(), vendor.has_value(), kFewRowsBelow);
  if (call.problem.rows == 0 || call.problem.features == 0) return std::move(call.out);
  if (kernel == Sparse24Kernel::dense) {
    guard_same_device(x, {&dense});
    guard_dtype(*dense, x.scalar_type(), "dense");
    guard_shape(*dense, {call.problem.features, call.problem.depth}, "dense");
    return linear_by_torch(x, *dense, false, bias, std::move(call));
  }
  if (kernel == Sparse24Kernel::vendor) {
    guard_same_device(x, {&vendor});
    return linear_by_torch(x, *vendor, true, bias, std::move(call));
  }
  const ScalarType of_x = x.scalar_type(), of_values = values.scalar_type();
  const bool int8 = of_values == ScalarType::Char;
  PYVTK_GUARD(int8 || of_values == of_x, "x and values must have one dtype, unless values are int8");
  const bool few = kernel == Sparse24Kernel::few;
  if (of_x == ScalarType::Float) {
    // no tensor core multiplies float32: the weight is unpacked for torch's product, call by call
    return linear_by_torch(x, decompressed(values, metadata, scales), false, bias, std::move(call));
  }
  if (of_x == ScalarType::BFloat16) {
    int8 ? multiply<bfloat16, int8_t>(call.problem, x, few) : multiply<bfloat16, bfloat16>(call.problem, x, few);
  } else {
    int8 ? multiply<float16, int8_t>(call.problem, x, few) : multiply<float16, float16>(call.problem, x, few);
  }
  return std::move(call.out);
}

Tensor linear_int8_operator(const Tensor& x, const Tensor& values, const Tensor& metadata, const Tensor& scales,
                            const OptionalTensor& x_scale, const OptionalTensor& bias, const OptionalTensor& mul,
                            const std::string& activation) {
  DeviceGuard device(x.get_device_index());
  guard_dtype(values, ScalarType::Char, "values");
  Call call = make_call(x, values, metadata, scales, bias, mul, activation);
  Sparse24Problem& problem = call.problem;
  if (x_scale.has_value()) {
    guard_same_device(x, {&x_scale});
    guard_dtype(*x_scale, ScalarType::Float, "x_scale");
    guard_shape(*x_scale, {1}, "x_scale");
  }
  if (problem.rows == 0 || problem.features == 0) return std::move(call.out);
  const int64_t stride = ceil_div<int64_t>(problem.depth, 16) * 16;
  const Tensor quantized = new_empty(x, {problem.rows, stride}, ScalarType::Char);
  const Tensor x_scales = new_empty(x, {problem.rows}, ScalarType::Float);
  for_float_dtype(x.scalar_type(), [&](auto zero) {
    check(quantize(data<decltype(zero)>(x), problem.rows, problem.x_stride, problem.depth, data<float>(x_scale),
                   mutable_data<int8_t>(quantized), stride, mutable_data<float>(x_scales), current_stream(x)),
          "sparse24_linear_int8");
  });
  problem.x = quantized.const_data_ptr();
  problem.x_stride = stride;
  problem.epilogue.x_scales = data<float>(x_scales);
  multiply<int8_t, int8_t>(problem, x, problem.rows < kFewRowsBelow, true);
  return std::move(call.out);
}

std::tuple<Tensor, Tensor> compress_operator(const Tensor& weight, const Tensor& mask, bool trusted) {
  DeviceGuard device(weight.get_device_index());
  guard_dim(weight, 2, "weight");
  guard_last_contiguous(weight, "weight");
  const int64_t features = weight.size(0), depth = weight.size(1);
  PYVTK_GUARD(depth % 4 == 0, "weight must have columns in multiples of 4");
  const OptionalTensor mask_too = mask;
  guard_same_device(weight, {&mask_too});
  guard_dtype(mask, ScalarType::Bool, "mask");
  guard_shape(mask, {features, depth}, "mask");
  guard_last_contiguous(mask, "mask");
  const int64_t size = static_cast<int64_t>(weight.element_size());
  PYVTK_GUARD(size == 1 || size == 2 || size == 4, "weight has elements of ", size, " bytes");
  Tensor values = new_empty(weight, {features, depth / 2}, weight.scalar_type());
  Tensor metadata = new_empty(weight, {features, ceil_div<int64_t>(depth, 8)}, ScalarType::Byte);
  OptionalTensor wrong;
  const cudaStream_t stream = current_stream(weight);
  if (!trusted) {
    wrong = new_empty(weight, {1}, ScalarType::Int);
    check(cudaMemsetAsync(wrong->mutable_data_ptr(), 0, sizeof(int), stream), "sparse24_compress");
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    check(compress(data<T>(weight), weight.stride(0), data<bool>(mask), mask.stride(0), features, depth,
                   mutable_data<T>(values), mutable_data<uint8_t>(metadata),
                   trusted ? nullptr : mutable_data<int>(*wrong), stream),
          "sparse24_compress");
  };
  if (size == 1) run(uint8_t{});
  if (size == 2) run(uint16_t{});
  if (size == 4) run(uint32_t{});
  if (trusted) return {std::move(values), std::move(metadata)};
  int found = 0;  // the one place of this family where the host waits
  check(cudaMemcpyAsync(&found, wrong->const_data_ptr(), sizeof(int), cudaMemcpyDeviceToHost, stream),
        "sparse24_compress");
  check(cudaStreamSynchronize(stream), "sparse24_compress");
  PYVTK_GUARD(found == 0, "mask must keep exactly two of each group of four");
  return {std::move(values), std::move(metadata)};
}

Tensor decompress_operator(const Tensor& values, const Tensor& metadata) {
  DeviceGuard device(values.get_device_index());
  guard_sparse24(values, metadata);
  const OptionalTensor metadata_too = metadata;
  guard_same_device(values, {&metadata_too});
  return decompressed(values, metadata, std::nullopt);
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("sparse24_linear", TORCH_BOX(&pyvtk::cuda::linear_operator));
  m.impl("sparse24_linear_int8", TORCH_BOX(&pyvtk::cuda::linear_int8_operator));
  m.impl("sparse24_compress", TORCH_BOX(&pyvtk::cuda::compress_operator));
  m.impl("sparse24_decompress", TORCH_BOX(&pyvtk::cuda::decompress_operator));
}
