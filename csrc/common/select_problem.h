// What the select kernels work on: raw pointers and sizes. Torch-free; one definition for all devices and instruction
// sets. Device code may call what is constexpr.
#pragma once
#include <cstdint>

namespace pyvtk {

// One value per token: [rows / rows_each, tokens], contiguous; a row of it serves `rows_each` rows of scores (a mask
// [batch, tokens] serves all heads).
template <class T>
struct PerToken {
  const T* data = nullptr;
  int64_t rows_each = 1;

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr const T* row(int64_t row, int64_t tokens) const { return data ? data + row / rows_each * tokens : nullptr; }
};

// One value per row, or per row and segment: [rows, 1 or num_segments], contiguous.
template <class T>
struct PerGroup {
  const T* data = nullptr;
  int64_t per_row = 1;

  constexpr explicit operator bool() const { return data != nullptr; }
  constexpr T at(int64_t row, int64_t segment) const { return data[row * per_row + (per_row == 1 ? 0 : segment)]; }
};

// pyvtk/reference/select.py defines what the fields mean.
struct SelectProblem {
  // Elements lie next to each other along tokens. Row r begins at (r / heads) * batch_stride + (r % heads) *
  // head_stride.
  const void* scores = nullptr;
  int64_t rows = 0;  // batch * heads, or samples
  int64_t heads = 1;
  int64_t tokens = 0;  // of a row, or of the whole packed axis
  int64_t batch_stride = 0;
  int64_t head_stride = 0;
  const int32_t* cu_seqlens = nullptr;  // [rows + 1]; nullptr: rows are not packed

  int64_t num_keep = -1;  // of each group, unless num_keep_per_row is given; -1: no such criterion
  PerGroup<int64_t> num_keep_per_row;
  PerGroup<float> threshold;
  PerGroup<double> top_p;

  PerToken<uint8_t> keep;  // bool
  PerToken<uint8_t> drop;
  PerToken<uint8_t> candidates;
  bool keep_others = false;
  PerToken<int32_t> segments;
  int64_t num_segments = 1;

  int64_t capacity = 0;
  bool align_right = false;
  bool by_score = false;

  int64_t* indices = nullptr;  // [rows, capacity]
  int32_t* counts = nullptr;   // [rows]
  bool* overflow = nullptr;    // [rows]
};

}  // namespace pyvtk
