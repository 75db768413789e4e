// select for bindings: its arguments, guards and outputs, the same for every device.
#pragma once
#include <limits>

#include "binding.h"
#include "common/select_problem.h"

namespace pyvtk {

// The arguments of pyvtk::select that follow scores, in the same order and with the same meaning.
struct SelectArguments {
  int64_t num_keep = -1;
  OptionalTensor num_keep_per_row;  // int64 [rows, 1 or num_segments]
  OptionalTensor threshold;         // float32 [rows, 1 or num_segments]
  OptionalTensor top_p;             // float64 [rows, 1 or num_segments]
  OptionalTensor keep;              // bool [batch, tokens], or the shape of scores
  OptionalTensor drop;
  OptionalTensor candidates;
  bool keep_others = false;
  OptionalTensor segments;  // int32, shaped like a mask
  int64_t num_segments = 1;
  OptionalTensor cu_seqlens;  // int32 [samples + 1]
  int64_t capacity = 0;
  bool align_right = false;
  bool by_score = false;
};

struct SelectResult {
  Tensor indices;   // int64 [batch, (heads,) capacity]
  Tensor counts;    // int32 [batch, (heads)]
  Tensor overflow;  // bool [batch, (heads)]
};

namespace detail {

// [batch, tokens] or the shape of scores
template <class T>
PerToken<T> per_token(const OptionalTensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape,
                      const char* name) {
  if (!tensor.has_value()) return {};
  guard_dtype(*tensor, dtype, name);
  guard_contiguous(*tensor, name);
  const bool shared = shape.size() == 3 && tensor->dim() == 2;
  if (shared) {
    guard_shape(*tensor, {shape[0], shape[2]}, name);
  } else {
    guard_dim(*tensor, static_cast<int64_t>(shape.size()), name);
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      PYVTK_GUARD(tensor->size(static_cast<int64_t>(dim)) == shape[dim], name, " must be shaped like scores");
    }
  }
  return {static_cast<const T*>(tensor->const_data_ptr()), shared ? shape[1] : 1};
}

// [rows, 1 or num_segments]
template <class T>
PerGroup<T> per_group(const OptionalTensor& tensor, ScalarType dtype, const SelectProblem& problem, const char* name) {
  if (!tensor.has_value()) return {};
  guard_dtype(*tensor, dtype, name);
  guard_contiguous(*tensor, name);
  const int64_t per_row = tensor->dim() == 2 && tensor->size(1) == 1 ? 1 : problem.num_segments;
  guard_shape(*tensor, {problem.rows, per_row}, name);
  return {data<T>(*tensor), per_row};
}

}  // namespace detail

// Guards the arguments, allocates the result and fills all of `problem` but `scores` and its strides (which it sets for
// contiguous scores). Values of cu_seqlens are not looked at: they may be on a device.
//   like: any tensor on the device
//   shape: of scores: [batch, tokens], [batch, heads, tokens] or, with cu_seqlens, [tokens]
inline SelectResult make_select_problem(const Tensor& like, const std::vector<int64_t>& shape,
                                        const SelectArguments& arguments, SelectProblem& problem) {
  const bool packed = arguments.cu_seqlens.has_value();
  if (packed) {
    PYVTK_GUARD(shape.size() == 1, "scores with cu_seqlens must have 1 dimension, got ", shape.size());
  } else {
    PYVTK_GUARD(shape.size() == 2 || shape.size() == 3, "scores must have 2 or 3 dimensions, got ", shape.size());
  }
  problem.tokens = shape.back();
  PYVTK_GUARD(problem.tokens < std::numeric_limits<int32_t>::max(), "scores have too many tokens: ", problem.tokens);
  std::vector<int64_t> rows_shape(shape.begin(), shape.end() - 1);
  if (packed) {
    const Tensor& cu_seqlens = *arguments.cu_seqlens;
    guard_dtype(cu_seqlens, ScalarType::Int, "cu_seqlens");
    guard_dim(cu_seqlens, 1, "cu_seqlens");
    guard_contiguous(cu_seqlens, "cu_seqlens");
    PYVTK_GUARD(cu_seqlens.numel() >= 1, "cu_seqlens must hold at least one entry");
    rows_shape = {cu_seqlens.numel() - 1};
    problem.cu_seqlens = data<int32_t>(cu_seqlens);
  }
  problem.rows = 1;
  for (int64_t size : rows_shape) problem.rows *= size;
  problem.heads = shape.size() == 3 ? shape[1] : 1;
  problem.head_stride = problem.tokens;
  problem.batch_stride = problem.heads * problem.tokens;

  PYVTK_GUARD(arguments.num_segments >= 1, "num_segments must be at least 1, got ", arguments.num_segments);
  problem.num_segments = arguments.num_segments;
  problem.num_keep = arguments.num_keep;
  problem.num_keep_per_row =
      detail::per_group<int64_t>(arguments.num_keep_per_row, ScalarType::Long, problem, "num_keep_per_row");
  problem.threshold = detail::per_group<float>(arguments.threshold, ScalarType::Float, problem, "threshold");
  problem.top_p = detail::per_group<double>(arguments.top_p, ScalarType::Double, problem, "top_p");
  problem.keep = detail::per_token<uint8_t>(arguments.keep, ScalarType::Bool, shape, "keep");
  problem.drop = detail::per_token<uint8_t>(arguments.drop, ScalarType::Bool, shape, "drop");
  problem.candidates = detail::per_token<uint8_t>(arguments.candidates, ScalarType::Bool, shape, "candidates");
  problem.keep_others = arguments.keep_others;
  problem.segments = detail::per_token<int32_t>(arguments.segments, ScalarType::Int, shape, "segments");

  PYVTK_GUARD(arguments.capacity >= 0, "capacity must be at least 0, got ", arguments.capacity);
  problem.capacity = arguments.capacity;
  problem.align_right = arguments.align_right;
  problem.by_score = arguments.by_score;
  std::vector<int64_t> indices_shape = rows_shape;
  indices_shape.push_back(arguments.capacity);
  SelectResult result{new_empty(like, indices_shape, ScalarType::Long), new_empty(like, rows_shape, ScalarType::Int),
                      new_empty(like, rows_shape, ScalarType::Bool)};
  problem.indices = mutable_data<int64_t>(result.indices);
  problem.counts = mutable_data<int32_t>(result.counts);
  problem.overflow = mutable_data<bool>(result.overflow);
  return result;
}

// Sets scores and their strides. scores: contiguous in the last dimension.
inline void set_scores(const Tensor& scores, SelectProblem& problem) {
  problem.scores = scores.const_data_ptr();
  problem.batch_stride = scores.dim() > 1 ? scores.stride(0) : 0;
  problem.head_stride = scores.dim() > 2 ? scores.stride(1) : 0;
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  std::vector<int64_t> shape(static_cast<size_t>(tensor.dim()));
  for (size_t dim = 0; dim < shape.size(); ++dim) shape[dim] = tensor.size(static_cast<int64_t>(dim));
  return shape;
}

}  // namespace pyvtk
