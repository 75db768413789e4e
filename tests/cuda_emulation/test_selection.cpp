// The selection kernels against plain loops: small random selections, for ThreadSanitizer above all; their tokens may
// come again, and may be none. test_emulated_selection.py compares more of them with the reference.
#include <vector>

#include "check.h"
#include "cuda/selection.cuh"
#include "problems.h"

using namespace pyvtk;

namespace {

#ifdef __SANITIZE_THREAD__
constexpr int kProblems = 40;
#else
constexpr int kProblems = 400;
#endif

struct Rows {
  int64_t rows, capacity;
  bool align_right;
  Array<int64_t> indices;
  Array<int32_t> counts;

  Rows(int64_t rows, int64_t capacity, int64_t tokens)
      : rows(rows), capacity(capacity), align_right(chance(50)), indices(rows * capacity), counts(rows) {
    for (int64_t& index : indices) index = chance(3) ? any(-(int64_t{1} << 40), int64_t{1} << 40) : any(-1, tokens);
    for (int32_t& count : counts) count = static_cast<int32_t>(any(-2, capacity + 2));
  }
  SelectionInput input() const { return {indices.begin(), counts.begin(), rows, capacity, align_right}; }

  // The entries of the real slots of a row.
  std::vector<int64_t> real(int64_t row) const {
    const int64_t count = std::clamp<int64_t>(counts[row], 0, capacity), first = align_right ? capacity - count : 0;
    return {indices.begin() + row * capacity + first, indices.begin() + row * capacity + first + count};
  }
  int64_t first(int64_t row) const { return align_right ? capacity - static_cast<int64_t>(real(row).size()) : 0; }
};

struct Made {
  int64_t rows, capacity;
  bool align_right;
  Array<int64_t> indices;
  Array<int32_t> counts;
  Array<bool> overflow;

  Made(int64_t rows, int64_t capacity, bool align_right)
      : rows(rows),
        capacity(capacity),
        align_right(align_right),
        indices(rows * capacity),
        counts(rows),
        overflow(rows) {}
  SelectionOutput output() const { return {indices.begin(), counts.begin(), overflow.begin(), capacity, align_right}; }

  void check_row(int64_t row, const std::vector<int64_t>& tokens) const {
    const int64_t count = std::min<int64_t>(static_cast<int64_t>(tokens.size()), capacity);
    const int64_t first = align_right ? capacity - count : 0;
    CHECK(counts[row] == count, row, counts[row], count);
    for (int64_t slot = 0; slot < capacity; ++slot) {
      const bool real = first <= slot && slot < first + count;
      CHECK(indices[row * capacity + slot] == (real ? tokens[static_cast<size_t>(slot - first)] : -1), row, slot,
            indices[row * capacity + slot]);
    }
  }
};

void test_masks() {
  const int64_t rows = any(0, 3), tokens = any(0, 150), capacity = any(0, 150);
  Array<uint8_t> mask(rows * tokens);
  const int percent = static_cast<int>(any(0, 100));
  for (uint8_t& flag : mask) flag = chance(percent);
  const Made made(rows, capacity, chance(50));
  CHECK(cuda::selection_of_mask(mask.begin(), rows, tokens, made.output(), nullptr) == cudaSuccess, rows);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<int64_t> kept;
    for (int64_t token = 0; token < tokens; ++token) {
      if (mask[row * tokens + token]) kept.push_back(token);
    }
    made.check_row(row, kept);
    CHECK(made.overflow[row] == (static_cast<int64_t>(kept.size()) > capacity), row, kept.size());
  }
}

void test_lookups() {
  const int64_t rows = any(1, 3), tokens = any(0, 150);
  const Rows given(rows, any(0, 90), tokens);
  const bool packed = chance(50);
  const int64_t axes = packed ? 1 : rows;
  std::vector<int64_t> slot_of(static_cast<size_t>(axes * tokens), -1);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t slot = given.first(row);
    for (int64_t token : given.real(row)) {
      if (token >= 0 && token < tokens) slot_of[static_cast<size_t>((packed ? 0 : row) * tokens + token)] = slot;
      ++slot;
    }
  }
  const Array<bool> mask(axes * tokens);
  const Array<int64_t> inverse(axes * tokens);
  CHECK(cuda::selection_mask(given.input(), tokens, packed, mask.begin(), nullptr) == cudaSuccess, rows);
  CHECK(cuda::selection_inverse(given.input(), tokens, packed, inverse.begin(), nullptr) == cudaSuccess, rows);
  for (int64_t i = 0; i < axes * tokens; ++i) {
    CHECK(mask[i] == (slot_of[static_cast<size_t>(i)] >= 0), i);
    CHECK(inverse[i] == slot_of[static_cast<size_t>(i)], i, inverse[i]);
  }

  Array<int32_t> starts(rows + 1);
  for (int32_t& start : starts) start = static_cast<int32_t>(any(-3, tokens + 3));
  const Made made(rows, any(0, 150), given.align_right);
  CHECK(cuda::selection_complement(given.input(), packed ? starts.begin() : nullptr, tokens, made.output(), nullptr) ==
            cudaSuccess,
        rows);
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<int64_t> gone;
    for (int64_t token = 0; token < tokens; ++token) {
      const bool inside = !packed || (starts[row] <= token && token < starts[row + 1]);
      if (inside && slot_of[static_cast<size_t>((packed ? 0 : row) * tokens + token)] < 0) gone.push_back(token);
    }
    made.check_row(row, gone);
    CHECK(made.overflow[row] == (static_cast<int64_t>(gone.size()) > made.capacity), row, gone.size());
  }
}

void test_then() {
  const int64_t rows = any(1, 3);
  const Rows given(rows, any(0, 90), 1000);
  const Rows other(rows, any(0, 90), given.capacity);
  Array<bool> overflow(rows);
  for (bool& flag : overflow) flag = chance(50);
  const bool mine = chance(50), theirs = chance(50);
  const Made made(rows, other.capacity, other.align_right);
  CHECK(cuda::selection_then(given.input(), other.input(), mine ? overflow.begin() : nullptr,
                             theirs ? overflow.begin() : nullptr, made.output(), nullptr) == cudaSuccess,
        rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t first = given.first(row), last = first + static_cast<int64_t>(given.real(row).size());
    std::vector<int64_t> kept;
    for (int64_t slot : other.real(row)) {
      if (first <= slot && slot < last) kept.push_back(given.indices[row * given.capacity + slot]);
    }
    made.check_row(row, kept);
    CHECK(made.overflow[row] == ((mine || theirs) && overflow[row]), row, mine, theirs);
  }

  const Array<bool> valid(rows * given.capacity);
  CHECK(cuda::selection_valid(given.input(), valid.begin(), nullptr) == cudaSuccess, rows);
  for (int64_t i = 0; i < rows * given.capacity; ++i) {
    const int64_t row = i / given.capacity, slot = i % given.capacity - given.first(row);
    CHECK(valid[i] == (slot >= 0 && slot < static_cast<int64_t>(given.real(row).size())), row, slot);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < kProblems && failures == 0; ++i) {
    cuda_emulation::options().seed = static_cast<uint64_t>(any(0, 2));
    cuda_emulation::options().blocks_alive = static_cast<int>(any(1, 2));
    test_masks();
    test_lookups();
    test_then();
  }
  return report();
}
