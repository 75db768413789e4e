// sparse24 for bindings: guards of the format, names of activations, and which kernel a call takes; the same for every
// device.
#pragma once
#include <array>
#include <string>

#include "binding.h"

namespace pyvtk {

// The number of an activation: its place in ACTIVATIONS of pyvtk/ops/sparse24.py.
inline int sparse24_activation_named(const std::string& name) {
  int number = 0;
  for (const char* known : {"none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"}) {
    if (name == known) return number;
    ++number;
  }
  PYVTK_GUARD(false, "unknown activation ", name);
  return 0;
}

enum class Sparse24Kernel : int { few, many, dense, vendor };

// choice: pairs (rows, kernel), ascending in rows; from so many rows on, this kernel. Where it says nothing, or -1, the
// kernel for few rows takes less than few_below of them, the one for many the rest.
inline Sparse24Kernel sparse24_kernel_chosen(int64_t rows, const std::vector<int64_t>& choice, bool has_dense,
                                             bool has_vendor, int64_t few_below) {
  PYVTK_GUARD(choice.size() % 2 == 0, "choice must be pairs (rows, kernel)");
  int64_t kernel = -1;
  for (size_t i = 0; i + 1 < choice.size(); i += 2) {
    PYVTK_GUARD(choice[i + 1] >= -1 && choice[i + 1] <= 3, "choice has kernel ", choice[i + 1], ", expected -1 to 3");
    if (rows >= choice[i]) kernel = choice[i + 1];
  }
  if (kernel == -1) kernel = rows < few_below ? 0 : 1;
  PYVTK_GUARD(kernel != 2 || has_dense, "choice takes the dense kernel, but there is no dense weight");
  PYVTK_GUARD(kernel != 3 || has_vendor, "choice takes the vendor's kernel, but there is no weight in its form");
  return static_cast<Sparse24Kernel>(kernel);
}

// values [N, K / 2] and metadata [N, ceil(K / 8)] are what the format says.
inline void guard_sparse24(const Tensor& values, const Tensor& metadata) {
  guard_dim(values, 2, "values");
  guard_contiguous(values, "values");
  PYVTK_GUARD(values.size(1) % 2 == 0, "values must have an even number of columns");
  guard_dtype(metadata, ScalarType::Byte, "metadata");
  guard_shape(metadata, {values.size(0), (values.size(1) + 3) / 4}, "metadata");
  guard_contiguous(metadata, "metadata");
}

// x W^T + bias by torch's own product with a dense weight.
inline Tensor sparse24_dense_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// x [rows, K] W^T + bias by cuSPARSELt, which torch carries, with W as torch._cslt_compress packs it. It wants rows
// that are contiguous, aligned to 16 bytes and eight at a time: others are copied, and what pads them is computed,
// whatever it holds, and left out of the result.
inline Tensor sparse24_vendor_linear(const Tensor& x, const Tensor& packed, const OptionalTensor& bias,
                                     int64_t features) {
  guard_dim(x, 2, "x");
  guard_dim(packed, 2, "vendor");
  guard_dtype(packed, x.scalar_type(), "vendor");
  guard_contiguous(packed, "vendor");
  const int64_t rows = x.size(0), depth = x.size(1);
  PYVTK_GUARD(packed.size(0) == features && features % 16 == 0 && depth % 16 == 0,
              "vendor must have a row for each feature, and these and x's columns must be multiples of 16");
  Tensor whole = x;
  if (rows % 8 != 0 || !x.is_contiguous() || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 != 0) {
    whole = new_empty(x, {(rows + 7) / 8 * 8, depth}, x.scalar_type());
    Tensor part = torch::stable::narrow(whole, 0, 0, rows);
    torch::stable::copy_(part, x);
  }
  using torch::stable::detail::from;
  const int64_t algorithm = 0, split_k = 1, split_k_mode = -1;  // what torch takes where nobody searches
  std::array<StableIValue, 9> stack{from(packed),       from(torch::stable::transpose(whole, 0, 1)),
                                    from(bias),         from(std::nullopt),  // factors
                                    from(std::nullopt),                      // dtype of the result: x's
                                    from(true),                              // result [rows, features]
                                    from(algorithm),    from(split_k),
                                    from(split_k_mode)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_cslt_sparse_mm", "", stack.data(), TORCH_ABI_VERSION));
  Tensor result = torch::stable::detail::to<Tensor>(stack[0]);
  guard_shape(result, {whole.size(0), features}, "cuSPARSELt's product");
  return whole.size(0) == rows ? result : torch::stable::narrow(result, 0, 0, rows);
}

// x [..., K] as a matrix: rows, and the elements from one to the next.
struct RowsOf {
  int64_t rows;
  int64_t stride;
};
inline RowsOf rows_of(const Tensor& x, int64_t columns, const char* name) {
  PYVTK_GUARD(x.dim() >= 1 && x.size(x.dim() - 1) == columns, name, " must have ", columns, " columns");
  if (x.dim() == 2 && x.size(0) > 0) {
    guard_last_contiguous(x, name);
    return {x.size(0), x.size(0) > 1 ? x.stride(0) : columns};
  }
  guard_contiguous(x, name);
  int64_t rows = 1;
  for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) rows *= x.size(dim);
  return {rows, columns};
}

}  // namespace pyvtk
