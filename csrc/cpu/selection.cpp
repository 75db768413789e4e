// Binding of the selection family for CPU tensors. Meaning: pyvtk/reference/selection.py.
#include <atomic>
#include <memory>
#include <tuple>

#include "common/selection_binding.h"
#define PYVTK_KERNEL_HEADER "cpu/selection.h"
#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

using Result = std::tuple<Tensor, Tensor, Tensor>;

// A step of a row, and what is read or written once: rough.
constexpr double kNanosecondsPerSlot = 1.5;
constexpr double kNanosecondsPerToken = 0.15;

double cost(int64_t slots, int64_t tokens) {
  return kNanosecondsPerSlot * static_cast<double>(slots) + kNanosecondsPerToken * static_cast<double>(tokens);
}

// A bit for each token.
size_t words_of(int64_t tokens) { return static_cast<size_t>(ceil_div<int64_t>(tokens, 64)); }

// work(begin, end) over rows, in parallel or (`together`) at once; gives the lowest entry that it found wrong, or -1.
template <class Work>
int64_t over_rows(int64_t rows, double cost_of_row, bool together, Work&& work) {
  if (together) return work(int64_t{0}, rows);
  std::atomic<int64_t> wrong{-1};
  parallel_for(rows, cost_of_row, [&](int64_t begin, int64_t end) {
    const int64_t found = work(begin, end);
    if (found < 0) return;
    int64_t before = wrong.load();
    while ((before < 0 || found < before) && !wrong.compare_exchange_weak(before, found)) {
    }
  });
  return wrong;
}

void guard_tokens(const SelectionInput& in, int64_t wrong, int64_t tokens) {
  PYVTK_GUARD(wrong < 0, "selection holds index ", in.indices[wrong], " in row ", wrong / in.capacity,
              ", but the token axis has length ", tokens);
}

Result selection_of_mask(Tensor mask, int64_t capacity, bool align_right) {
  guard_dtype(mask, ScalarType::Bool, "mask");
  PYVTK_GUARD(mask.dim() > 0, "mask has no dimension");
  const Tensor flags = dense(mask);
  std::vector<int64_t> shape = sizes_of(mask);
  const int64_t tokens = shape.back();
  shape.pop_back();
  const SelectionMade made(mask, shape, capacity, align_right);
  const auto kernel = PYVTK_FOR_ISA(selection_of_mask);
  parallel_for(made.made_counts.numel(), cost(capacity, tokens), [&](int64_t begin, int64_t end) {
    const auto words = std::make_unique_for_overwrite<uint64_t[]>(words_of(tokens));
    kernel(data<uint8_t>(flags), tokens, made, words.get(), begin, end);
  });
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Result selection_complement(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens,
                            OptionalTensor cu_seqlens, int64_t capacity) {
  const SelectionOf in(indices, counts, align_right, "indices");
  PYVTK_GUARD(num_tokens >= 0, "num_tokens must be at least 0, got ", num_tokens);
  const OptionalTensor starts = sample_starts(cu_seqlens, in.rows);
  const SelectionMade made(indices, sizes_of(counts), capacity, align_right);
  const auto kernel = PYVTK_FOR_ISA(selection_complement);
  const int64_t wrong =
      over_rows(in.rows, cost(in.capacity + capacity, num_tokens), starts.has_value(), [&](int64_t begin, int64_t end) {
        const auto words = std::make_unique_for_overwrite<uint64_t[]>(9 * words_of(num_tokens));
        return kernel(in, data<int32_t>(starts), num_tokens, made, words.get(), begin, end);
      });
  guard_tokens(in, wrong, num_tokens);
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Result selection_then(Tensor indices, Tensor counts, bool align_right, Tensor other_indices, Tensor other_counts,
                      bool other_align_right, OptionalTensor overflow, OptionalTensor other_overflow) {
  const SelectionOf in(indices, counts, align_right, "indices");
  const SelectionOf other(other_indices, other_counts, other_align_right, "other_indices");
  PYVTK_GUARD(other.rows == in.rows, "other_indices has ", other.rows, " rows, expected ", in.rows);
  const OptionalTensor mine = row_flags(overflow, in.rows, "overflow");
  const OptionalTensor theirs = row_flags(other_overflow, in.rows, "other_overflow");
  const SelectionMade made(indices, sizes_of(other_counts), other.capacity, other_align_right);
  const auto kernel = PYVTK_FOR_ISA(selection_then);
  const int64_t wrong = over_rows(in.rows, cost(other.capacity, 0), false, [&](int64_t begin, int64_t end) {
    return kernel(in, other, data<bool>(mine), data<bool>(theirs), made, begin, end);
  });
  PYVTK_GUARD(wrong < 0, "the second selection holds index ", other.indices[wrong], " in row ", wrong / other.capacity,
              ", but the first has ", in.capacity, " slots");
  return {made.made_indices, made.made_counts, made.made_overflow};
}

Tensor selection_valid(Tensor counts, int64_t capacity, bool align_right) {
  guard_dtype(counts, ScalarType::Int, "counts");
  const Tensor kept = dense(counts);
  const Tensor out = new_per_token(counts, sizes_of(counts), capacity, false, ScalarType::Bool);
  const SelectionInput in{nullptr, data<int32_t>(kept), counts.numel(), capacity, align_right};
  const auto kernel = PYVTK_FOR_ISA(selection_valid);
  parallel_for(in.rows, cost(0, capacity),
               [&](int64_t begin, int64_t end) { kernel(in, mutable_data<bool>(out), begin, end); });
  return out;
}

Tensor selection_mask(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens, bool packed) {
  const SelectionOf in(indices, counts, align_right, "indices");
  const Tensor out = new_per_token(indices, sizes_of(counts), num_tokens, packed, ScalarType::Bool);
  const auto kernel = PYVTK_FOR_ISA(selection_mask);
  const int64_t wrong = over_rows(in.rows, cost(in.capacity, num_tokens), packed, [&](int64_t begin, int64_t end) {
    return kernel(in, num_tokens, packed, mutable_data<bool>(out), begin, end);
  });
  guard_tokens(in, wrong, num_tokens);
  return out;
}

Tensor selection_inverse(Tensor indices, Tensor counts, bool align_right, int64_t num_tokens, bool packed) {
  const SelectionOf in(indices, counts, align_right, "indices");
  const Tensor out = new_per_token(indices, sizes_of(counts), num_tokens, packed, ScalarType::Long);
  const auto kernel = PYVTK_FOR_ISA(selection_inverse);
  const int64_t wrong = over_rows(in.rows, cost(in.capacity, 4 * num_tokens), packed, [&](int64_t begin, int64_t end) {
    return kernel(in, num_tokens, packed, mutable_data<int64_t>(out), begin, end);
  });
  guard_tokens(in, wrong, num_tokens);
  return out;
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("selection_of_mask", TORCH_BOX(&pyvtk::cpu::selection_of_mask));
  m.impl("selection_complement", TORCH_BOX(&pyvtk::cpu::selection_complement));
  m.impl("selection_then", TORCH_BOX(&pyvtk::cpu::selection_then));
  m.impl("selection_valid", TORCH_BOX(&pyvtk::cpu::selection_valid));
  m.impl("selection_mask", TORCH_BOX(&pyvtk::cpu::selection_mask));
  m.impl("selection_inverse", TORCH_BOX(&pyvtk::cpu::selection_inverse));
}
