// The compact family for bindings: shapes of results, and tensors taken apart; the same for every device. Nothing here
// looks at what a tensor holds.
#pragma once
#include <algorithm>
#include <array>
#include <cstring>
#include <optional>

#include "binding.h"
#include "common/compact_shape.h"

namespace pyvtk {

inline int64_t element_size(const Tensor& tensor) { return static_cast<int64_t>(tensor.element_size()); }

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

inline View view_of(const Tensor& tensor, int64_t dim, int64_t batch_dim, bool heads, int64_t element) {
  View view;
  PYVTK_GUARD(
      take_apart(tensor.sizes().data(), tensor.strides().data(), tensor.dim(), dim, batch_dim, heads, element, view),
      "dim ", dim, " and batch_dim ", batch_dim, " do not fit a tensor of ", tensor.dim(), " dimensions");
  return view;
}

inline MoveShape shape_of(const View& source, const View& target, const View& base, int64_t element) {
  MoveShape shape;
  PYVTK_GUARD(put_together(source, target, base, element, shape), "tensors differ in an axis that only moves");
  return shape;
}

// A copy only where neither the last dimension nor the tokens lie next to each other, which no loop here likes.
inline Tensor with_runs(const Tensor& tensor, int64_t dim) {
  const int64_t last = tensor.dim() - 1;
  if (dim == last || tensor.size(last) <= 1 || tensor.stride(last) == 1) return tensor;
  return torch::stable::contiguous(tensor);
}

// The rows of a selection, as far as shapes say.
struct SelectedRows {
  Tensor indices, counts;  // dense
  int64_t batch, heads;    // heads is 1 for a selection without a head axis
  bool has_heads;
  int64_t capacity;

  SelectedRows(const Tensor& indices_, const Tensor& counts_) : indices(dense(indices_)), counts(dense(counts_)) {
    guard_dtype(indices, ScalarType::Long, "indices");
    guard_dtype(counts, ScalarType::Int, "counts");
    has_heads = indices.dim() == 3;
    PYVTK_GUARD(has_heads || indices.dim() == 2, "indices has ", indices.dim(), " dimensions, expected 2 or 3");
    batch = indices.size(0);
    heads = has_heads ? indices.size(1) : 1;
    capacity = indices.size(indices.dim() - 1);
    PYVTK_GUARD(counts.numel() == batch * heads, "counts has ", counts.numel(), " elements, expected ", batch * heads);
  }
};

// Where the token axis, and the fused axis of a packed result, stand in the output.
struct Place {
  int64_t dim, batch_dim;
};
inline Place place_of(int64_t dim, int64_t batch_dim, bool packed) {
  if (!packed) return batch_dim < 0 ? Place{dim + 1, 0} : Place{dim, batch_dim};
  return {batch_dim < 0 ? 0 : batch_dim - (dim < batch_dim), -1};
}

inline std::vector<int64_t> compacted_shape(const Tensor& tensor, const SelectedRows& selected, int64_t dim,
                                            int64_t batch_dim, std::optional<int64_t> total) {
  std::vector<int64_t> shape = sizes_of(tensor);
  PYVTK_GUARD(0 <= dim && dim < tensor.dim() && batch_dim < tensor.dim(), "dim ", dim, " and batch_dim ", batch_dim,
              " do not fit a tensor of ", tensor.dim(), " dimensions");
  const Place place = place_of(dim, batch_dim, total.has_value());
  if (total.has_value()) {
    shape.erase(shape.begin() + dim);
    if (batch_dim < 0) shape.insert(shape.begin(), 0);
    shape[static_cast<size_t>(place.dim)] = *total;
  } else {
    shape[static_cast<size_t>(dim)] = selected.capacity;
    if (batch_dim < 0) shape.insert(shape.begin(), 0);
    shape[static_cast<size_t>(place.batch_dim)] = selected.batch;
  }
  return shape;
}

inline int64_t common_tokens(const std::vector<Tensor>& tensors, const std::vector<int64_t>& dims) {
  PYVTK_GUARD(dims.size() == tensors.size(), "dims has ", dims.size(), " entries, expected ", tensors.size());
  const auto tokens_of = [&](size_t i) {
    PYVTK_GUARD(0 <= dims[i] && dims[i] < tensors[i].dim(), "dim ", dims[i], " does not fit tensor ", i);
    return tensors[i].size(dims[i]);
  };
  const int64_t tokens = tensors.empty() ? 0 : tokens_of(0);
  for (size_t i = 0; i < tensors.size(); ++i) {
    PYVTK_GUARD(tokens_of(i) == tokens, "tensor ", i, " has ", tensors[i].size(dims[i]), " tokens, expected ", tokens);
  }
  return tokens;
}

// One tensor of compact, checked against its result.
inline MoveShape compact_shape(const Tensor& tensor, const Tensor& out, const SelectedRows& selected, int64_t dim,
                               int64_t batch_dim, std::optional<int64_t> total) {
  PYVTK_GUARD(out.scalar_type() == tensor.scalar_type(), "out has another dtype than its tensor");
  const auto expected = compacted_shape(tensor, selected, dim, batch_dim, total);
  PYVTK_GUARD(sizes_of(out) == expected, "out has a wrong shape");
  const int64_t element = element_size(tensor);
  const View source = view_of(tensor, dim, batch_dim, selected.has_heads, element);
  const Place place = place_of(dim, batch_dim, total.has_value());
  const View target = view_of(out, place.dim, place.batch_dim, selected.has_heads, element);
  PYVTK_GUARD(batch_dim < 0 || source.batch == 0 || tensor.size(batch_dim) == selected.batch,
              "a tensor has another batch size than the selection");
  PYVTK_GUARD(!selected.has_heads || (dim == 2 && batch_dim == 0 && tensor.dim() > 2 && !total.has_value() &&
                                      tensor.size(0) == selected.batch && tensor.size(1) == selected.heads),
              "a tensor does not begin with the batch and heads of the selection");
  return shape_of(source, target, source, element);
}

// The bytes of one padding element.
inline std::array<char, 16> pad_bytes(double value, const Tensor& like) {
  std::array<char, 16> bytes{};
  if (value == 0) return bytes;
  const auto put = [&](auto number) { std::memcpy(bytes.data(), &number, sizeof(number)); };
  switch (like.scalar_type()) {
    case ScalarType::Float:
      put(static_cast<float>(value));
      break;
    case ScalarType::BFloat16:
      put(from_float<bfloat16>(static_cast<float>(value)));
      break;
    case ScalarType::Half:
      put(from_float<float16>(static_cast<float>(value)));
      break;
    case ScalarType::Long:
      put(static_cast<int64_t>(value));
      break;
    case ScalarType::Int:
      put(static_cast<int32_t>(value));
      break;
    case ScalarType::Bool:
      put(true);
      break;
    default: {  // torch knows the others; its call costs ten microseconds
      const Tensor pad = torch::stable::full({1}, value, like.scalar_type());
      std::memcpy(bytes.data(), pad.const_data_ptr(), like.element_size());
    }
  }
  return bytes;
}

// What a tensor had been before compact made `grad`'s shape of it. `batch` is the size that its batch axis had.
inline std::vector<int64_t> shape_before(const Tensor& grad, int64_t dim, int64_t batch_dim, int64_t batch,
                                         int64_t num_tokens, std::optional<int64_t> total) {
  const Place place = place_of(dim, batch_dim, total.has_value());
  PYVTK_GUARD(0 <= dim && place.dim < grad.dim() && place.batch_dim < grad.dim() && dim != batch_dim,
              "a gradient has too few dimensions");
  std::vector<int64_t> shape = sizes_of(grad);
  const auto at = [](int64_t axis) { return static_cast<ptrdiff_t>(axis); };
  if (!total.has_value()) {
    PYVTK_GUARD(dim < grad.dim() && batch_dim < grad.dim(), "a gradient has too few dimensions");
    if (batch_dim < 0) {
      shape.erase(shape.begin());
    } else {
      shape[static_cast<size_t>(batch_dim)] = batch;
    }
    shape[static_cast<size_t>(dim)] = num_tokens;
    return shape;
  }
  shape.erase(shape.begin() + at(place.dim));
  const auto insert = [&](int64_t axis, int64_t size) {
    PYVTK_GUARD(axis <= static_cast<int64_t>(shape.size()), "a gradient has too few dimensions");
    shape.insert(shape.begin() + at(axis), size);
  };
  // the lower of the two axes first, so that the other one's number holds
  if (0 <= batch_dim && batch_dim < dim) insert(batch_dim, batch);
  insert(dim, num_tokens);
  if (batch_dim > dim) insert(batch_dim, batch);
  return shape;
}

}  // namespace pyvtk
