// Binding of the selection family for CUDA tensors. Meaning: pyvtk/reference/selection.py. What a tensor holds is not
// looked at here: an index that is no token is left out.
#include <tuple>

#include "common/selection_binding.h"
#include "cuda/selection.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

Result selection_of_mask_operator(Tensor mask, int64_t capacity, bool align_right) {
  guard_dtype(mask, ScalarType::Bool, "mask");
  PYVTK_GUARD(mask.dim() > 0, "mask has no dimension");
  torch::stable::accelerator::DeviceGuard device(mask.get_device_index());
  const Tensor flags = dense(mask);
  std::vector<int64_t> shape = sizes_of(mask);
  const int64_t tokens = shape.back();
  shape.pop_back();
  const SelectionMade made(mask, shape, capacity, align_right);
  check(selection_of_mask(data<uint8_t>(flags), made.made_counts.numel(), tokens, made, current_stream(mask)),
        "selection_of_mask");
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Result selection_complement_operator(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens,
                                     OptionalTensor cu_seqlens, int64_t capacity) {
  const OptionalTensor number(counts);
  guard_same_device(indices, {&number, &cu_seqlens});
  torch::stable::accelerator::DeviceGuard device(indices.get_device_index());
  const SelectionOf in(indices, counts, align_right, "indices");
  PYVTK_GUARD(num_tokens >= 0, "num_tokens must be at least 0, got ", num_tokens);
  const OptionalTensor starts = sample_starts(cu_seqlens, in.rows);
  const SelectionMade made(indices, sizes_of(counts), capacity, align_right);
  check(selection_complement(in, data<int32_t>(starts), num_tokens, made, current_stream(indices)),
        "selection_complement");
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Result selection_then_operator(Tensor indices, Tensor counts, bool align_right, Tensor other_indices,
                               Tensor other_counts, bool other_align_right, OptionalTensor overflow,
                               OptionalTensor other_overflow) {
  const OptionalTensor number(counts), chosen(other_indices), number_chosen(other_counts);
  guard_same_device(indices, {&number, &chosen, &number_chosen, &overflow, &other_overflow});
  torch::stable::accelerator::DeviceGuard device(indices.get_device_index());
  const SelectionOf in(indices, counts, align_right, "indices");
  const SelectionOf other(other_indices, other_counts, other_align_right, "other_indices");
  PYVTK_GUARD(other.rows == in.rows, "other_indices has ", other.rows, " rows, expected ", in.rows);
  const OptionalTensor mine = row_flags(overflow, in.rows, "overflow");
  const OptionalTensor theirs = row_flags(other_overflow, in.rows, "other_overflow");
  const SelectionMade made(indices, sizes_of(other_counts), other.capacity, other_align_right);
  check(selection_then(in, other, data<bool>(mine), data<bool>(theirs), made, current_stream(indices)),
        "selection_then");
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Tensor selection_valid_operator(Tensor counts, int64_t capacity, bool align_right) {
  guard_dtype(counts, ScalarType::Int, "counts");
  torch::stable::accelerator::DeviceGuard device(counts.get_device_index());
  const Tensor kept = dense(counts);
  const Tensor out = new_per_token(counts, sizes_of(counts), capacity, false, ScalarType::Bool);
  const SelectionInput in{nullptr, data<int32_t>(kept), counts.numel(), capacity, align_right};
  check(selection_valid(in, mutable_data<bool>(out), current_stream(counts)), "selection_valid");
  return out;
}

Tensor selection_mask_operator(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens, bool packed) {
  const OptionalTensor number(counts);
  guard_same_device(indices, {&number});
  torch::stable::accelerator::DeviceGuard device(indices.get_device_index());
  const SelectionOf in(indices, counts, align_right, "indices");
  const Tensor out = new_per_token(indices, sizes_of(counts), num_tokens, packed, ScalarType::Bool);
  check(selection_mask(in, num_tokens, packed, mutable_data<bool>(out), current_stream(indices)), "selection_mask");
  return out;
}

Tensor selection_inverse_operator(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens, bool packed) {
  const OptionalTensor number(counts);
  guard_same_device(indices, {&number});
  torch::stable::accelerator::DeviceGuard device(indices.get_device_index());
  const SelectionOf in(indices, counts, align_right, "indices");
  const Tensor out = new_per_token(indices, sizes_of(counts), num_tokens, packed, ScalarType::Long);
  check(selection_inverse(in, num_tokens, packed, mutable_data<int64_t>(out), current_stream(indices)),
        "selection_inverse");
  return out;
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("selection_of_mask", TORCH_BOX(&pyvtk::cuda::selection_of_mask_operator));
  m.impl("selection_complement", TORCH_BOX(&pyvtk::cuda::selection_complement_operator));
  m.impl("selection_then", TORCH_BOX(&pyvtk::cuda::selection_then_operator));
  m.impl("selection_valid", TORCH_BOX(&pyvtk::cuda::selection_valid_operator));
  m.impl("selection_mask", TORCH_BOX(&pyvtk::cuda::selection_mask_operator));
  m.impl("selection_inverse", TORCH_BOX(&pyvtk::cuda::selection_inverse_operator));
}
