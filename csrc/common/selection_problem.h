// What the kernels of selection read and write, the same for every device. Torch-free; device code may call what is
// constexpr.
#pragma once
#include <cstdint>

namespace pyvtk {

// The rows of a selection. A row's real slots stand side by side: at its left end, or at its right.
struct SelectionInput {
  const int64_t* indices = nullptr;  // [rows, capacity]
  const int32_t* counts = nullptr;   // [rows]
  int64_t rows = 0;
  int64_t capacity = 0;
  bool align_right = false;

  // How many slots are real, whatever counts holds.
  constexpr int64_t count(int64_t row) const {
    const int64_t given = counts[row];
    return given < 0 ? 0 : given < capacity ? given : capacity;
  }
  constexpr int64_t begin(int64_t row) const { return align_right ? capacity - count(row) : 0; }
  constexpr int64_t end(int64_t row) const { return align_right ? capacity : count(row); }
};

// The rows of the selection that is made. What does not fit is left out at the end, and marked.
struct SelectionOutput {
  int64_t* indices = nullptr;  // [rows, capacity]
  int32_t* counts = nullptr;   // [rows]
  bool* overflow = nullptr;    // [rows]
  int64_t capacity = 0;
  bool align_right = false;
};

// Where a sample of a packed axis begins and ends, whatever cu_seqlens holds; all of the axis if it is not packed.
struct TokenRange {
  int64_t begin, end;
};
constexpr TokenRange range_of_sample(const int32_t* cu_seqlens,  // [rows + 1] or nullptr
                                     int64_t row, int64_t tokens) {
  if (cu_seqlens == nullptr) return {0, tokens};
  const int64_t begin = cu_seqlens[row] < 0 ? 0 : cu_seqlens[row];
  const int64_t end = cu_seqlens[row + 1] < tokens ? cu_seqlens[row + 1] : tokens;
  return {begin, end < begin ? begin : end};
}

}  // namespace pyvtk
