// The selection family for bindings: guards and results, the same for every device. Nothing here looks at what a tensor
// holds.
#pragma once
#include <limits>

#include "binding.h"
#include "common/compact_binding.h"
#include "common/selection_problem.h"

namespace pyvtk {

// A selection as the kernels read it. indices [..., capacity] and counts [...] may have any number of dimensions.
struct SelectionOf : SelectionInput {
  Tensor kept_indices, kept_counts;  // dense

  SelectionOf(const Tensor& indices_, const Tensor& counts_, bool align_right_, const char* name)
      : kept_indices(dense(indices_)), kept_counts(dense(counts_)) {
    guard_dtype(indices_, ScalarType::Long, name);
    guard_dtype(counts_, ScalarType::Int, "counts");
    PYVTK_GUARD(indices_.dim() == counts_.dim() + 1, name, " has ", indices_.dim(), " dimensions, expected ",
                counts_.dim() + 1);
    for (int64_t dim = 0; dim < counts_.dim(); ++dim) {
      PYVTK_GUARD(indices_.size(dim) == counts_.size(dim), name, " has size ", indices_.size(dim), " in dimension ",
                  dim, ", expected ", counts_.size(dim));
    }
    indices = data<int64_t>(kept_indices);
    counts = data<int32_t>(kept_counts);
    rows = counts_.numel();
    capacity = indices_.size(indices_.dim() - 1);
    align_right = align_right_;
    PYVTK_GUARD(capacity <= std::numeric_limits<int32_t>::max(), name, " has ", capacity,
                " slots a row, more than counts can count");
  }
};

// A selection to be made, with rows in the shape of `rows`.
struct SelectionMade : SelectionOutput {
  Tensor made_indices, made_counts, made_overflow;

  SelectionMade(const Tensor& like, std::vector<int64_t> rows, int64_t capacity_, bool align_right_) {
    PYVTK_GUARD(capacity_ >= 0, "capacity must be at least 0, got ", capacity_);
    made_counts = new_empty(like, rows, ScalarType::Int);
    made_overflow = new_empty(like, rows, ScalarType::Bool);
    rows.push_back(capacity_);
    made_indices = new_empty(like, rows, ScalarType::Long);
    indices = mutable_data<int64_t>(made_indices);
    counts = mutable_data<int32_t>(made_counts);
    overflow = mutable_data<bool>(made_overflow);
    capacity = capacity_;
    align_right = align_right_;
  }
};

// [..., tokens] with the rows of the selection, or [tokens] where they share a packed axis.
inline Tensor new_per_token(const Tensor& like, std::vector<int64_t> rows, int64_t tokens, bool packed,
                            ScalarType dtype) {
  PYVTK_GUARD(tokens >= 0, "num_tokens must be at least 0, got ", tokens);
  if (packed) rows.clear();
  rows.push_back(tokens);
  return new_empty(like, rows, dtype);
}

// One flag for each row; dense.
inline OptionalTensor row_flags(const OptionalTensor& flags, int64_t rows, const char* name) {
  if (!flags.has_value()) return flags;
  guard_dtype(*flags, ScalarType::Bool, name);
  PYVTK_GUARD(flags->numel() == rows, name, " has ", flags->numel(), " elements, expected ", rows);
  return dense(*flags);
}

// Where the samples of a packed axis begin; dense.
inline OptionalTensor sample_starts(const OptionalTensor& cu_seqlens, int64_t rows) {
  if (!cu_seqlens.has_value()) return cu_seqlens;
  guard_dtype(*cu_seqlens, ScalarType::Int, "cu_seqlens");
  guard_shape(*cu_seqlens, {rows + 1}, "cu_seqlens");
  return dense(*cu_seqlens);
}

}  // namespace pyvtk
