// Tensors [batch, tokens] or [tokens] of any strides, as rows of tokens.
#pragma once
#include "binding.h"
#include "cpu/layout.h"

namespace pyvtk::cpu {

template <class T>
TokenRows<T> token_rows(const Tensor& tensor) {
  const int64_t dim = tensor.dim();
  return {data<T>(tensor), dim == 2 ? tensor.stride(0) : 0, tensor.stride(dim - 1)};
}
template <class T>
TokenRows<T> token_rows(const OptionalTensor& tensor) {
  return tensor.has_value() ? token_rows<T>(*tensor) : TokenRows<T>{nullptr, 0, 0};
}

// Of a tensor [batch, tokens], or [tokens] with cu_seqlens.
inline LayoutShape layout_shape(const Tensor& tensor, const OptionalTensor& cu_seqlens, const char* name) {
  guard_dim(tensor, cu_seqlens.has_value() ? 1 : 2, name);
  if (!cu_seqlens.has_value()) return {tensor.size(0), tensor.size(1), nullptr, tensor.size(0)};
  guard_dtype(*cu_seqlens, ScalarType::Int, "cu_seqlens");
  guard_dim(*cu_seqlens, 1, "cu_seqlens");
  guard_contiguous(*cu_seqlens, "cu_seqlens");
  PYVTK_GUARD(cu_seqlens->size(0) > 0, "cu_seqlens is empty");
  return {1, tensor.size(0), data<int32_t>(*cu_seqlens), cu_seqlens->size(0) - 1};
}

inline void guard_rows(const OptionalTensor& tensor, ScalarType dtype, const Tensor& like, const char* name) {
  if (!tensor.has_value()) return;
  guard_dtype(*tensor, dtype, name);
  guard_dim(*tensor, like.dim(), name);
  for (int64_t dim = 0; dim < like.dim(); ++dim) {
    PYVTK_GUARD(tensor->size(dim) == like.size(dim), name, " has size ", tensor->size(dim), " in dimension ", dim,
                ", expected ", like.size(dim));
  }
}

// Calls f(Integer{}) with int64_t or int32_t.
template <class F>
void for_integer_dtype(const Tensor& tensor, const char* name, F&& f) {
  if (tensor.scalar_type() == ScalarType::Long) return f(int64_t{});
  guard_dtype(tensor, ScalarType::Int, name);
  f(int32_t{});
}

}  // namespace pyvtk::cpu
