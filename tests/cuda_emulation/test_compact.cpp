// The kernels of compact, restore, compact_kv_ and merge_tokens against plain loops: random problems, small enough for
// the sanitizers. The tests in Python compare more of them with the reference, in a process that ThreadSanitizer does
// not watch.
#include <cstring>
#include <vector>

#include "check.h"
#include "cuda/compact.cuh"
#include "cuda/merge.cuh"
#include "problems.h"

using namespace pyvtk;
using namespace pyvtk::cuda;

namespace {

#ifdef __SANITIZE_THREAD__
constexpr int kProblems = 4;
#else
constexpr int kProblems = 80;
#endif

Array<float> numbers(int64_t size) {
  Array<float> x(size);
  for (float& number : x) number = static_cast<float>(any(-9, 9));  // sums of them are exact
  return x;
}

// Rows of tokens, some of which stand twice or do not exist.
struct Problem {
  int64_t rows = any(1, 3), tokens = any(1, 40), capacity = any(1, 50), channels = any(1, 40);
  bool right = chance(50);
  Array<int64_t> indices{rows * capacity};
  Array<int32_t> counts{rows};
  SelectedOnDevice selected;

  explicit Problem(bool ascending = false, int64_t total = -1) {
    if (ascending) capacity = std::min(capacity, tokens), right = false;
    for (int64_t row = 0; row < rows; ++row) {
      counts[row] = static_cast<int32_t>(any(0, capacity));
      int64_t next = 0;
      for (int64_t slot = 0; slot < capacity; ++slot) {
        const int64_t left = capacity - slot;
        if (ascending) {
          indices[row * capacity + slot] = next + any(0, tokens - next - left);
          next = indices[row * capacity + slot] + 1;
        } else {
          indices[row * capacity + slot] = chance(5) ? tokens + any(0, 9) : chance(5) ? -1 : any(0, tokens - 1);
        }
      }
    }
    CHECK(describe(rows, 1, capacity, tokens, total, right, indices.begin(), counts.begin(), selected), __func__);
  }

  // -1: padding
  int64_t token(int64_t row, int64_t slot) const {
    const int64_t begin = right ? capacity - counts[row] : 0;
    const int64_t index = indices[row * capacity + slot];
    return slot >= begin && slot < begin + counts[row] && index >= 0 && index < tokens ? index : -1;
  }
};

// [rows, positions, channels] float, contiguous, on both sides
Move move_of(const Problem& p, int64_t positions, const float* source, int64_t source_positions, float* target,
             int64_t target_positions, const float* base = nullptr) {
  const int64_t row = 4 * p.channels;
  MoveShape shape{{0, source_positions * row, target_positions * row, target_positions * row},
                  {0, 0, 0, 0},
                  {0, row, row, row},
                  {},
                  1,
                  row,
                  4};
  Move move;
  CHECK(describe(shape, positions, source, target, base, move), __func__);
  move.number = Number::float32;
  return move;
}

void check_equal(const Array<float>& actual, const std::vector<float>& expected, const char* what) {
  CHECK(static_cast<size_t>(actual.size) == expected.size(), what);
  for (int64_t i = 0; i < actual.size; ++i) {
    CHECK(actual[i] == expected[static_cast<size_t>(i)], what, i, actual[i], expected[static_cast<size_t>(i)]);
  }
}

void dividers() {
  for (int i = 0; i < 20000; ++i) {
    const int64_t divisor = chance(50) ? any(1, 3000) : any(1, kMostCounted);
    int64_t number = chance(50) ? any(0, (int64_t{1} << 31) - 1) : divisor * any(1, ((int64_t{1} << 31) - 1) / divisor);
    number = std::min(number + any(-1, 1), (int64_t{1} << 31) - 1);
    const Split at = split(divider_of(divisor), static_cast<uint32_t>(std::max<int64_t>(number, 0)));
    CHECK(at.quotient == std::max<int64_t>(number, 0) / divisor, number, divisor, at.quotient);
    CHECK(at.rest == std::max<int64_t>(number, 0) % divisor, number, divisor, at.rest);
  }
}

void one_compact() {
  const bool packed = chance(50);
  const Problem p(false, packed ? any(0, 100) : -1);
  const int64_t total = p.selected.total;
  const Array<float> x = numbers(p.rows * p.tokens * p.channels);
  const int64_t positions = packed ? total : p.rows * p.capacity;
  const Array<float> out(positions * p.channels);
  Move move = move_of(p, p.capacity, x.begin(), p.tokens, out.begin(), packed ? 0 : p.capacity);
  const float pad = -3;
  for (int i = 0; i < 4; ++i) std::memcpy(move.pad + 4 * i, &pad, 4);
  CHECK(gather(&move, 1, p.selected, nullptr) == cudaSuccess, __func__);
  std::vector<float> expected(static_cast<size_t>(out.size), pad);
  int64_t at = 0;
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t slot = 0; slot < p.capacity; ++slot) {
      const int64_t begin = p.right ? p.capacity - p.counts[row] : 0;
      const bool valid = slot >= begin && slot < begin + p.counts[row];
      if (packed && (!valid || at >= total)) continue;
      for (int64_t c = 0; c < p.channels && p.token(row, slot) >= 0; ++c) {
        expected[static_cast<size_t>(at * p.channels + c)] = x[(row * p.tokens + p.token(row, slot)) * p.channels + c];
      }
      ++at;
    }
  }
  check_equal(out, expected, "compact");
}

// The gradient of compact, and restore with and without gates.
void one_scatter() {
  const Problem p;
  const bool merged = chance(30), gated = chance(50), replaces = !gated && chance(50);
  const int64_t tables = merged ? 1 : p.rows;
  const Array<float> source = numbers(p.rows * p.capacity * p.channels), gates = numbers(p.rows * p.capacity),
                     base = numbers(tables * p.tokens * p.channels);
  const Array<float> out(tables * p.tokens * p.channels);
  Move move = move_of(p, p.tokens, source.begin(), p.capacity, out.begin(), p.tokens, gated ? base.begin() : nullptr);
  move.merged = merged;
  const Array<int32_t> memory(inverse_size(p.selected, !replaces));
  const Inverse inverse = inverse_in(memory.begin(), p.selected, !replaces);
  CHECK(invert(p.selected, inverse, nullptr) == cudaSuccess, __func__);
  CHECK(scatter(&move, 1, p.selected, {inverse, gated ? gates.begin() : nullptr, false}, nullptr) == cudaSuccess,
        __func__);
  std::vector<float> expected(static_cast<size_t>(out.size), 0.0f);
  if (gated) std::copy(base.begin(), base.end(), expected.begin());
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t slot = 0; slot < p.capacity; ++slot) {
      const int64_t token = p.token(row, slot), at = row * p.capacity + slot;
      for (int64_t c = 0; c < p.channels && token >= 0; ++c) {
        float& to = expected[static_cast<size_t>(((merged ? 0 : row) * p.tokens + token) * p.channels + c)];
        const float from = source[at * p.channels + c];
        to = replaces ? from : to + (gated ? gates[at] : 1) * from;
      }
    }
  }
  check_equal(out, expected, replaces ? "restore" : gated ? "restore with gates" : "gradient of compact");

  // and back
  const Array<float> back(p.rows * p.capacity * p.channels), grad_gates(p.rows * p.capacity);
  if (!gated && !replaces) return;
  Move recalled =
      move_of(p, p.capacity, out.begin(), p.tokens, back.begin(), p.capacity, gated ? source.begin() : nullptr);
  recalled.merged = merged;
  if (merged) recalled.batch.source = 0;
  expected.assign(static_cast<size_t>(back.size), 0.0f);
  if (gated) {
    CHECK(recall<float>(recalled, p.selected, gates.begin(), false, grad_gates.begin(), nullptr) == cudaSuccess,
          __func__);
  } else {
    CHECK(gather_winners(recalled, p.selected, inverse, nullptr) == cudaSuccess, __func__);
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    for (int64_t slot = 0; slot < p.capacity; ++slot) {
      const int64_t token = p.token(row, slot), at = row * p.capacity + slot;
      bool last = token >= 0;
      for (int64_t r = row; r < (merged ? p.rows : row + 1) && !gated; ++r) {
        for (int64_t s = r == row ? slot + 1 : 0; s < p.capacity; ++s) last = last && p.token(r, s) != token;
      }
      float product = 0;
      for (int64_t c = 0; c < p.channels && last; ++c) {
        const float grad = out[((merged ? 0 : row) * p.tokens + token) * p.channels + c];
        expected[static_cast<size_t>(at * p.channels + c)] = gated ? gates[at] * grad : grad;
        product += grad * source[at * p.channels + c];
      }
      if (gated) CHECK(grad_gates[at] == product, at, grad_gates[at], product);
    }
  }
  check_equal(back, expected, "gradient of restore");
}

void one_kv() {
  const Problem p(true);
  const int64_t heads = any(1, 2), channels = chance(30) ? 40 * p.channels : p.channels;
  const Array<float> cache = numbers(p.rows * heads * p.tokens * channels);
  std::vector<float> expected(cache.begin(), cache.end());
  for (int64_t slice = 0; slice < p.rows * heads; ++slice) {
    for (int64_t slot = 0; slot < p.capacity; ++slot) {
      const int64_t token = p.token(slice / heads, slot);
      for (int64_t c = 0; c < channels; ++c) {
        expected[static_cast<size_t>((slice * p.tokens + slot) * channels + c)] =
            token < 0 ? 0.0f : cache[(slice * p.tokens + token) * channels + c];
      }
    }
  }
  KvCache one{};
  one.data = reinterpret_cast<char*>(cache.begin());
  one.batch = 4 * heads * p.tokens * channels;
  one.head = 4 * p.tokens * channels;
  one.token = 4 * channels;
  one.heads = static_cast<uint32_t>(heads);
  one.run = static_cast<uint32_t>(4 * channels);
  CHECK(compact_kv(&one, 1, p.selected, p.rows, false, nullptr) == cudaSuccess, __func__);
  check_equal(cache, expected, "compact_kv_");
}

void one_merge() {
  const int64_t batch = any(1, 2), tokens = any(1, 300), groups = any(1, 40), channels = any(1, 20);
  const Array<float> x = numbers(batch * tokens * channels), weights = numbers(batch * tokens);
  const Array<int64_t> assignment(batch * tokens);
  for (int64_t& group : assignment) group = any(-1, groups);  // one of them does not exist
  const Array<int32_t> starts(batch * (groups + 1)), members(batch * tokens), counters(batch * groups * kMostWarps);
  const bool global = chance(50);
  const MergeProblem problem{{reinterpret_cast<const char*>(x.begin()), 4 * tokens * channels, 4 * channels},
                             assignment.begin(),
                             weights.begin(),
                             false,
                             false,
                             batch,
                             tokens,
                             groups,
                             channels,
                             starts.begin(),
                             members.begin(),
                             global ? counters.begin() : nullptr};
  const Array<float> out(batch * groups * channels);
  const Array<double> totals(batch * groups);
  CHECK(merge<float>(problem, out.begin(), totals.begin(), nullptr) == cudaSuccess, __func__);
  std::vector<float> expected(static_cast<size_t>(out.size), 0.0f);
  std::vector<double> sums(static_cast<size_t>(totals.size), 0.0);
  for (int64_t token = 0; token < batch * tokens; ++token) {
    const int64_t group = assignment[token];
    if (group < 0 || group >= groups) continue;
    const auto at = static_cast<size_t>(token / tokens * groups + group);
    sums[at] += static_cast<double>(weights[token]);
    for (int64_t c = 0; c < channels; ++c) {
      expected[at * static_cast<size_t>(channels) + static_cast<size_t>(c)] += weights[token] * x[token * channels + c];
    }
  }
  check_equal(out, expected, "merge_tokens");
  for (int64_t i = 0; i < totals.size; ++i) CHECK(totals[i] == sums[static_cast<size_t>(i)], i);

  // of a mean whose weights are all 2: dx = g / members
  for (float& weight : weights) weight = 2;
  MergeProblem mean = problem;
  mean.mean = true;
  CHECK(merge<float>(mean, out.begin(), totals.begin(), nullptr) == cudaSuccess, __func__);
  const Array<float> grad = numbers(batch * groups * channels), grad_x(batch * tokens * channels),
                     grad_weights(batch * tokens);
  const Array<double> products(batch * tokens);
  const MergeGradient gradient{{reinterpret_cast<const char*>(grad.begin()), 4 * groups * channels, 4 * channels},
                               totals.begin(),
                               reinterpret_cast<char*>(grad_x.begin()),
                               grad_weights.begin(),
                               products.begin()};
  CHECK(merge_backward<float>(mean, gradient, nullptr) == cudaSuccess, __func__);
  for (int64_t token = 0; token < batch * tokens; ++token) {
    const int64_t group = assignment[token], at = token / tokens * groups + group;
    const bool exists = group >= 0 && group < groups;
    float product = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const float factor = exists ? static_cast<float>(2 / totals[at]) : 0.0f;
      CHECK(grad_x[token * channels + c] == (exists ? factor * grad[at * channels + c] : 0.0f), token, c);
      if (exists) product += grad[at * channels + c] * x[token * channels + c];
    }
    CHECK(exists || grad_weights[token] == 0, token);
    CHECK(!exists || products[token] == static_cast<double>(product), token);
  }
}

}  // namespace

int main() {
  dividers();
  for (int i = 0; i < kProblems && failures == 0; ++i) {
    cuda_emulation::options() = {};
    cuda_emulation::options().seed = static_cast<uint64_t>(i % 4);
    cuda_emulation::options().blocks_alive = 1 + i % 3;
    one_compact();
    one_scatter();
    one_kv();
    one_merge();
  }
  return report();
}
