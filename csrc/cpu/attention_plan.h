// What an attention plan is made of: tokens sorted into slots, boxes around blocks of slots, and which blocks meet.
// Torch-free. Meaning: pyvtk/reference/attention_plan.py. A few passes over the tokens, then one over pairs of blocks,
// which compares a dozen numbers each and is what the compiler vectorises.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/attention_slots.h"

namespace pyvtk::cpu {

inline constexpr int32_t kLow = std::numeric_limits<int32_t>::min(), kHigh = std::numeric_limits<int32_t>::max();

struct PlanRule {
  int64_t block_q, block_k;
  int32_t radius[3];
  bool causal_window, cross_image;
};

// One batch row of queries or of keys.
struct PlanTokens {
  const int32_t* facts;  // [kSlotFields, rows]
  const int64_t* curve;  // [curves, ...], curve_stride apart; what visual tokens of one image sort by
  int64_t rows, curves, curve_stride;
  const int32_t* cu_seqlens;  // [samples + 1], or null: not packed
  int64_t samples;

  int32_t fact(AttentionSlot which, int64_t row) const { return facts[which * rows + row]; }
};

// The order of the plan: by sample, image (text after all images, then what is invalid), curve or position, row.
inline std::vector<int64_t> plan_order(const PlanTokens& tokens) {
  std::vector<std::pair<int64_t, int64_t>> kind(static_cast<size_t>(tokens.rows));  // (kind, first key) of each row
  const auto key = [&](int64_t curve, int64_t row) -> int64_t {
    return tokens.fact(kSlotImage, row) >= 0 ? tokens.curve[curve * tokens.curve_stride + row]
                                             : tokens.fact(kSlotPosition, row);
  };
  for (int64_t row = 0; row < tokens.rows; ++row) {
    const int64_t image = tokens.fact(kSlotImage, row);
    const int64_t group = image >= 0 ? image : (int64_t{1} << 31) + (image == kInvalidToken);
    const int64_t sample = tokens.fact(kSlotSample, row);
    kind[static_cast<size_t>(row)] = {group + sample * (int64_t{1} << 33), key(0, row)};
  }
  std::vector<int64_t> order(static_cast<size_t>(tokens.rows));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const auto &x = kind[static_cast<size_t>(a)], &y = kind[static_cast<size_t>(b)];
    if (x != y) return x < y;
    for (int64_t curve = 1; curve < tokens.curves; ++curve) {
      const int64_t i = key(curve, a), j = key(curve, b);
      if (i != j) return i < j;
    }
    return a < b;
  });
  return order;
}

// Writes slots [kSlotFields, num_slots]; packed samples begin at multiples of `block`.
inline void place_tokens(const PlanTokens& tokens, int64_t block, int64_t num_slots, int32_t* slots) {
  constexpr int32_t kEmpty[kSlotFields] = {-1, kInvalidToken, 0, 0, 0, 0, 0, -1};
  for (int64_t fact = 0; fact < kSlotFields; ++fact) {
    std::fill_n(slots + fact * num_slots, num_slots, kEmpty[fact]);
  }
  int64_t slot = 0, sample = 0;
  for (const int64_t row : plan_order(tokens)) {
    if (tokens.cu_seqlens != nullptr && tokens.fact(kSlotSample, row) != sample) {
      sample = tokens.fact(kSlotSample, row);
      slot = (slot + block - 1) / block * block;
    }
    for (int64_t fact = 0; fact < kSlotFields; ++fact)
      slots[fact * num_slots + slot] = tokens.facts[fact * tokens.rows + row];
    ++slot;
  }
}

// What is known of each block of slots. Absent tokens leave their bounds at the limits: low at kHigh, high at kLow.
struct PlanBoxes {
  using Numbers = std::vector<int32_t>;
  int64_t count;
  Numbers low[4], high[4];                                   // image, t, y, x of visual tokens
  Numbers visual_first, visual_last, text_first, text_last;  // positions
  Numbers sample, all_valid;
  std::vector<std::vector<int32_t>> regions;  // of visual tokens, distinct

  PlanBoxes(const int32_t* slots, int64_t num_slots, int64_t block, bool with_regions) : count(num_slots / block) {
    const auto size = static_cast<size_t>(count);
    for (int64_t axis = 0; axis < 4; ++axis) low[axis].assign(size, kHigh), high[axis].assign(size, kLow);
    for (Numbers* first : {&visual_first, &text_first}) first->assign(size, kHigh);
    for (Numbers* last : {&visual_last, &text_last}) last->assign(size, kLow);
    sample.assign(size, -1);
    all_valid.assign(size, 1);
    regions.resize(with_regions ? size : 0);
    for (int64_t slot = 0; slot < num_slots; ++slot) {
      const auto b = static_cast<size_t>(slot / block);
      const auto fact = [&](int64_t which) { return slots[which * num_slots + slot]; };
      const int32_t image = fact(kSlotImage), position = fact(kSlotPosition);
      sample[b] = std::max(sample[b], fact(kSlotSample));
      if (image == kInvalidToken) {
        all_valid[b] = 0;
      } else if (image == kTextToken) {
        text_first[b] = std::min(text_first[b], position);
        text_last[b] = std::max(text_last[b], position);
      } else {
        visual_first[b] = std::min(visual_first[b], position);
        visual_last[b] = std::max(visual_last[b], position);
        for (int64_t axis = 0; axis < 4; ++axis) {
          low[axis][b] = std::min(low[axis][b], fact(kSlotImage + axis));
          high[axis][b] = std::max(high[axis][b], fact(kSlotImage + axis));
        }
        if (with_regions) {
          auto& seen = regions[b];
          const int32_t region = fact(kSlotRegion);
          if (std::find(seen.begin(), seen.end(), region) == seen.end()) seen.push_back(region);
        }
      }
    }
  }
};

// How two blocks meet.
enum Meeting : uint8_t { kApart = 0, kSome = 1, kEvery = 2 };

inline int32_t saturated(int64_t x) { return static_cast<int32_t>(std::clamp<int64_t>(x, kLow, kHigh)); }

// meetings [k.count] of query block i; routes [num_regions, num_regions], or null.
inline void meet(const PlanBoxes& q, const PlanBoxes& k, int64_t i, const PlanRule& rule, const int32_t* routes,
                 int64_t num_regions, uint8_t* meetings) {
  const auto b = static_cast<size_t>(i);
  const int32_t limits[4] = {0, rule.radius[0], rule.radius[1], rule.radius[2]};
  int32_t reach_low[4], reach_high[4], every_low[4], every_high[4];
  for (int64_t axis = 0; axis < 4; ++axis) {
    const int64_t low = q.low[axis][b], high = q.high[axis][b];
    reach_low[axis] = saturated(low - limits[axis]), reach_high[axis] = saturated(high + limits[axis]);
    every_low[axis] = saturated(high - limits[axis]), every_high[axis] = saturated(low + limits[axis]);
  }
  const int32_t visual_first = q.visual_first[b], visual_last = q.visual_last[b];
  const int32_t text_first = q.text_first[b], text_last = q.text_last[b], sample = q.sample[b];
  const bool visual = visual_last != kLow, text = text_last != kLow;
  const int32_t one = visual && q.low[0][b] == q.high[0][b] ? q.low[0][b] : kTextToken;
  std::vector<uint8_t> reached, missed;  // regions that some, that not all tokens of the block see
  if (routes != nullptr) {
    reached.assign(static_cast<size_t>(num_regions), 0), missed = reached;
    for (const int32_t from : q.regions[b]) {
      for (int64_t to = 0; to < num_regions; ++to) {
        (routes[from * num_regions + to] != 0 ? reached : missed)[static_cast<size_t>(to)] = 1;
      }
    }
  }
  for (int64_t j = 0; j < k.count; ++j) {
    const auto n = static_cast<size_t>(j);
    bool near = true, inside = true;
    for (int64_t axis = 0; axis < 4; ++axis) {
      near &= (k.low[axis][n] <= reach_high[axis]) & (k.high[axis][n] >= reach_low[axis]);
      inside &= (k.high[axis][n] <= every_high[axis]) & (k.low[axis][n] >= every_low[axis]);
    }
    const bool k_visual = k.visual_last[n] != kLow, k_text = k.text_last[n] != kLow;
    const bool visual_before = k_visual & visual & (k.visual_first[n] <= visual_last);
    if (rule.causal_window) {
      near &= visual_before;
      inside &= k.visual_last[n] <= visual_first;
    }
    if (routes != nullptr) {
      bool any = false, all = true;
      for (const int32_t region : k.regions[n]) {
        any |= reached[static_cast<size_t>(region)] != 0;
        all &= missed[static_cast<size_t>(region)] == 0;
      }
      near &= any, inside &= all;
    }
    if (rule.cross_image) {
      const int32_t k_one = k_visual & (k.low[0][n] == k.high[0][n]) ? k.low[0][n] : kTextToken;
      near |= !((one == k_one) & (one >= 0)) & visual_before;
    }
    bool some = near & visual & k_visual;
    some |= k_text & text & (k.text_first[n] <= text_last);
    some |= k_text & visual & (k.text_first[n] <= visual_last);
    some |= k_visual & text & (k.visual_first[n] <= text_last);
    some &= sample == k.sample[n];
    bool every = inside | !visual | !k_visual;
    every &= !(text & k_text) | (k.text_last[n] <= text_first);
    every &= !(text & k_visual) | (k.visual_last[n] <= text_first);
    every &= !(visual & k_text) | (k.text_last[n] <= visual_first);
    every &= k.all_valid[n] != 0;
    meetings[j] = static_cast<uint8_t>(some ? (every ? kEvery : kSome) : kApart);
  }
}

// One line of a table: blocks [count], those met in full first, then the others met, then -1; counts [2].
inline void tabulate(const uint8_t* meetings, int64_t count, int64_t step, int32_t* blocks, int32_t* counts) {
  int64_t n = 0;
  for (const Meeting wanted : {kEvery, kSome}) {
    for (int64_t i = 0; i < count; ++i) {
      if (meetings[i * step] == wanted) blocks[n++] = static_cast<int32_t>(i);
    }
    counts[wanted == kEvery ? 0 : 1] = static_cast<int32_t>(n);
  }
  std::fill(blocks + n, blocks + count, -1);
}

// Lines by the number of blocks that they visit, most first. counts [lines, 2].
inline void heaviest_first(const int32_t* counts, int64_t lines, int32_t* order) {
  std::iota(order, order + lines, 0);
  std::stable_sort(order, order + lines, [&](int32_t a, int32_t b) { return counts[2 * a + 1] > counts[2 * b + 1]; });
}

}  // namespace pyvtk::cpu
