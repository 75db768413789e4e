// What a plan knows of a layout's tokens before they are sorted: facts, and the curve along which images are walked.
// Torch-free. Meaning: pyvtk/reference/attention_facts.py. One pass over the tokens of a row, bounded by memory.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/attention_slots.h"
#include "cpu/layout.h"

namespace pyvtk::cpu {

enum KeyGroup : int64_t { kAllKeys, kTextKeys, kVisualKeys, kGivenKeys };

struct StripShape {
  int64_t frames, lines;
};

// How many frames and lines a strip has: that box of a block of tokens whose surroundings are smallest.
inline StripShape strip_shape(int64_t block, const int64_t* radius, bool flat) {
  int64_t near[3];
  for (int64_t axis = 0; axis < 3; ++axis) near[axis] = std::min<int64_t>(radius[axis], 64);
  StripShape found{1, 1};
  double best = std::numeric_limits<double>::infinity();
  for (int64_t t = 1; t <= (flat ? 1 : 8); t *= 2) {
    for (int64_t y = 1; y <= 16; y *= 2) {
      if (t * y > block) continue;
      const double x = static_cast<double>(block) / static_cast<double>(t * y);
      const auto lines = static_cast<double>((flat ? 1 : t + 2 * near[0]) * (y + 2 * near[1]));
      const double size = lines * (x + static_cast<double>(2 * near[2]));
      if (size < best) best = size, found = {t, y};
    }
  }
  return found;
}

inline int64_t raster(int64_t t, int64_t y, int64_t x) { return (t * kMaxCoordinate + y) * kMaxCoordinate + x; }

inline int64_t strip_place(const StripShape& strip, int64_t t, int64_t y, int64_t x) {
  const int64_t strip_y = y / strip.lines;
  const int64_t along = (strip_y & 1) == 0 ? x : kMaxCoordinate - 1 - x;
  return raster(t / strip.frames, strip_y, along) * 128 + t % strip.frames * strip.lines + y % strip.lines;
}

// Numbers of a layout as int32: as they are, or, of int64, how many of all numbers are smaller.
template <class T>
struct Narrowed {
  TokenRows<T> numbers;
  std::vector<T> in_order;  // of int64

  Narrowed(TokenRows<T> rows, const LayoutShape& shape) : numbers(rows) {
    if constexpr (sizeof(T) == 8) {
      in_order.reserve(static_cast<size_t>(shape.rows * shape.tokens));
      for (int64_t row = 0; row < shape.rows; ++row) {
        for (int64_t token = 0; token < shape.tokens; ++token) in_order.push_back(rows.at(row, token));
      }
      std::sort(in_order.begin(), in_order.end());
    }
  }
  int32_t at(int64_t row, int64_t token) const {
    const T number = numbers.at(row, token);
    if constexpr (sizeof(T) == 8) {
      return static_cast<int32_t>(std::lower_bound(in_order.begin(), in_order.end(), number) - in_order.begin());
    } else {
      return number;
    }
  }
};

struct FactsRule {
  int64_t key_group;
  const int64_t* strip;   // [4], block and radius, or null
  const int64_t* window;  // [6], sizes and offsets, or null
};

template <class Image, class Position>
struct FactsProblem {
  LayoutShape shape;
  TokenRows<Image> image_id;
  const Narrowed<Image>& images;
  const Narrowed<Position>* positions;  // null: all are 0
  TokenRows<int32_t> coords[3];
  TokenRows<uint8_t> mask, keys;
  const int32_t* extent;  // [samples, 3]
  FactsRule rule;
};

// facts and key_facts [kSlotFields, tokens] of one row, the latter null if keys are those of queries; curve [tokens],
// and with windows a second one, curve_stride apart.
template <class Image, class Position>
void attention_facts(const FactsProblem<Image, Position>& problem, int64_t row, int32_t* facts, int32_t* key_facts,
                     int64_t* curve, int64_t curve_stride) {
  constexpr int32_t kPadding = std::numeric_limits<int32_t>::min();
  const LayoutShape& shape = problem.shape;
  const int64_t tokens = shape.tokens;
  SampleWalk sample_of(shape);
  const auto fact = [&](int64_t which) { return facts + which * tokens; };
  bool deep = false;
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t sample = shape.cu_seqlens == nullptr ? 0 : sample_of(row, token);
    const bool valid = (problem.mask.data == nullptr || problem.mask.at(row, token) != 0) &&
                       (shape.cu_seqlens == nullptr || sample < shape.samples);
    const bool visual = valid && problem.image_id.at(row, token) >= 0;
    const int32_t position = problem.positions == nullptr ? 0 : problem.positions->at(row, token);
    fact(kSlotRow)[token] = static_cast<int32_t>(token);
    fact(kSlotImage)[token] = visual ? problem.images.at(row, token) : valid ? kTextToken : kInvalidToken;
    fact(kSlotPosition)[token] = valid ? position : kPadding;
    fact(kSlotRegion)[token] = 0;
    fact(kSlotSample)[token] = static_cast<int32_t>(sample);
    for (int64_t axis = 0; axis < 3; ++axis) {
      fact(kSlotT + axis)[token] = visual ? problem.coords[axis].at(row, token) : 0;
    }
    deep |= fact(kSlotT)[token] > 0;
  }
  if (shape.cu_seqlens == nullptr) deep = problem.extent[3 * row] > 1;
  StripShape strip{1, 1};
  if (problem.rule.strip != nullptr) strip = strip_shape(problem.rule.strip[0], problem.rule.strip + 1, !deep);
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t c[3];
    for (int64_t axis = 0; axis < 3; ++axis) c[axis] = fact(kSlotT + axis)[token];
    const bool visual = fact(kSlotImage)[token] >= 0;
    if (problem.rule.window != nullptr) {
      curve[curve_stride + token] = visual ? raster(c[0], c[1], c[2]) : 0;
      for (int64_t axis = 0; axis < 3 && visual; ++axis) {
        c[axis] = (c[axis] + problem.rule.window[3 + axis]) / problem.rule.window[axis];
        fact(kSlotT + axis)[token] = static_cast<int32_t>(c[axis]);
      }
    }
    curve[token] = !visual                         ? 0
                   : problem.rule.strip != nullptr ? strip_place(strip, c[0], c[1], c[2])
                                                   : raster(c[0], c[1], c[2]);
  }
  if (key_facts == nullptr) return;
  std::copy_n(facts, kSlotFields * tokens, key_facts);
  for (int64_t token = 0; token < tokens; ++token) {
    const bool visual = fact(kSlotImage)[token] >= 0;
    const bool there = problem.rule.key_group == kGivenKeys ? problem.keys.at(row, token) != 0
                                                            : visual == (problem.rule.key_group == kVisualKeys);
    if (!there) key_facts[kSlotImage * tokens + token] = kInvalidToken;
  }
}

}  // namespace pyvtk::cpu
