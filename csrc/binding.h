// The one header through which a binding meets torch: guards for raw pointers, dtype switch, parallel loop, stream.
//
// Guards are not argument checks. The page in pyvtk/ops has checked already; a guard that fires means that somebody
// called torch.ops.pyvtk directly, or that we have a bug.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/huge_pages.h"
#include "common/poison.h"
#include "common/types.h"

namespace pyvtk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

#define PYVTK_GUARD(condition, ...) STD_TORCH_CHECK(condition, "pyvtk: ", __VA_ARGS__)

inline void guard_dtype(const Tensor& tensor, ScalarType dtype, const char* name) {
  PYVTK_GUARD(tensor.scalar_type() == dtype, name, " has dtype number ", static_cast<int>(tensor.scalar_type()),
              ", expected ", static_cast<int>(dtype));
}

inline void guard_dim(const Tensor& tensor, int64_t dim, const char* name) {
  PYVTK_GUARD(tensor.dim() == dim, name, " has ", tensor.dim(), " dimensions, expected ", dim);
}

inline void guard_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  guard_dim(tensor, static_cast<int64_t>(shape.size()), name);
  int64_t dim = 0;
  for (int64_t size : shape) {
    PYVTK_GUARD(tensor.size(dim) == size, name, " has size ", tensor.size(dim), " in dimension ", dim, ", expected ",
                size);
    ++dim;
  }
}

inline void guard_contiguous(const Tensor& tensor, const char* name) {
  PYVTK_GUARD(tensor.is_contiguous(), name, " must be contiguous");
}

// Elements of the last dimension lie next to each other; all other strides are free.
inline void guard_last_contiguous(const Tensor& tensor, const char* name) {
  PYVTK_GUARD(tensor.numel() == 0 || tensor.size(tensor.dim() - 1) <= 1 || tensor.stride(tensor.dim() - 1) == 1, name,
              " must be contiguous in its last dimension");
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}
// nullptr for an absent tensor
template <class T>
const T* data(const OptionalTensor& tensor) {
  return tensor.has_value() ? data<T>(*tensor) : nullptr;
}

// Uninitialised, contiguous, on the device of `like`. Through the C shim: a call of aten::new_empty by name costs ten
// microseconds, more than a small kernel.
inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t elements = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = elements;
    elements *= shape[dim] > 1 ? shape[dim] : 1;
  }
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &handle));
  Tensor tensor(handle);
#ifndef __CUDACC__
  constexpr int64_t kMany = 1024 * 1024;  // fewer elements are no large result, whatever their dtype
  if (elements >= kMany && tensor.numel() > 0) {
    advise_huge_pages(tensor.mutable_data_ptr(), static_cast<size_t>(elements) * tensor.element_size());
  }
  if (poisons_new_memory() && tensor.numel() > 0) {
    std::memset(tensor.mutable_data_ptr(), 0xff, static_cast<size_t>(elements) * tensor.element_size());
  }
#endif
  return tensor;
}

// Calls f(T{}) with the C++ type of a floating dtype that kernels support; false if there is none.
template <class F>
bool for_float_dtype(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      f(float{});
      return true;
    case ScalarType::BFloat16:
      f(bfloat16{});
      return true;
    case ScalarType::Half:
      f(float16{});
      return true;
    default:
      return false;
  }
}

// f(begin, end) over [0, count), on torch's own threads. `cost` is roughly the work of one item in nanoseconds; small
// totals stay on the calling thread, since waking another costs about ten microseconds.
template <class F>
void parallel_for(int64_t count, double cost, F&& f) {
  if (count <= 0) return;
  constexpr double kWorthAThread = 20e3;
  const double items = kWorthAThread / (cost > 1.0 ? cost : 1.0);
  const int64_t grain = items < 1.0 ? 1 : (items > static_cast<double>(count) ? count : static_cast<int64_t>(items));
  if (grain >= count) {
    f(int64_t{0}, count);
    return;
  }
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { f(begin, end); });
}

}  // namespace pyvtk
