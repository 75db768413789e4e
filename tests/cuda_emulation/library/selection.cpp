#include "cuda/selection.cuh"

#include "library.h"

using namespace pyvtk;
using namespace pyvtk::cuda;

// Arguments as in pyvtk/reference/selection.py; absent pointers are null. A selection is indices, counts, rows,
// capacity, align_right; what is made is indices, counts, overflow, capacity, align_right.

EXPORT int emulated_selection_of_mask(const uint8_t* mask, int64_t rows, int64_t tokens, int64_t* indices,
                                      int32_t* counts, bool* overflow, int64_t capacity, int align_right) {
  return report(
      selection_of_mask(mask, rows, tokens, {indices, counts, overflow, capacity, align_right != 0}, nullptr));
}

EXPORT int emulated_selection_complement(const int64_t* indices, const int32_t* counts, int64_t rows, int64_t capacity,
                                         int align_right, const int32_t* cu_seqlens, int64_t tokens,
                                         int64_t* out_indices, int32_t* out_counts, bool* out_overflow,
                                         int64_t out_capacity) {
  const bool right = align_right != 0;
  return report(selection_complement({indices, counts, rows, capacity, right}, cu_seqlens, tokens,
                                     {out_indices, out_counts, out_overflow, out_capacity, right}, nullptr));
}

EXPORT int emulated_selection_then(const int64_t* indices, const int32_t* counts, int64_t rows, int64_t capacity,
                                   int align_right, const int64_t* other_indices, const int32_t* other_counts,
                                   int64_t other_capacity, int other_align_right, const bool* overflow,
                                   const bool* other_overflow, int64_t* out_indices, int32_t* out_counts,
                                   bool* out_overflow) {
  const bool right = other_align_right != 0;
  return report(selection_then({indices, counts, rows, capacity, align_right != 0},
                               {other_indices, other_counts, rows, other_capacity, right}, overflow, other_overflow,
                               {out_indices, out_counts, out_overflow, other_capacity, right}, nullptr));
}

EXPORT int emulated_selection_mask(const int64_t* indices, const int32_t* counts, int64_t rows, int64_t capacity,
                                   int align_right, int64_t tokens, int packed, bool* out) {
  return report(selection_mask({indices, counts, rows, capacity, align_right != 0}, tokens, packed != 0, out, nullptr));
}

EXPORT int emulated_selection_inverse(const int64_t* indices, const int32_t* counts, int64_t rows, int64_t capacity,
                                      int align_right, int64_t tokens, int packed, int64_t* out) {
  return report(
      selection_inverse({indices, counts, rows, capacity, align_right != 0}, tokens, packed != 0, out, nullptr));
}

EXPORT int emulated_selection_valid(const int32_t* counts, int64_t rows, int64_t capacity, int align_right, bool* out) {
  return report(selection_valid({nullptr, counts, rows, capacity, align_right != 0}, out, nullptr));
}
