// Attention received per key, and its gradient, without the queries x keys map.
//
// Work is cut into items of (sample, key/value head, run of queries). An item walks its queries in blocks of a few
// rows: a panel of logits [rows][keys] that fits the second-level cache, softmax along each row, and from the row
// into column statistics (sum, max and its winner over queries). The statistics of the items are put together in a
// fixed order, so results do not depend on the number of threads. Rows of all query heads of a group share the packed
// keys. Extra memory: the packed keys of one head, one panel and a few rows of statistics per item.
//
// Bound by reading k for few queries, by the multiplications for many.
#include "cpu/gemm.h"
#include "cpu/score_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A key that is masked: no query's position reaches it.
inline constexpr int32_t kHidden = std::numeric_limits<int32_t>::max();

PYVTK_INLINE vint first_lanes(int64_t count) {
  vint lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = static_cast<int32_t>(i);
  return lane < splat(static_cast<int32_t>(std::min(count, kLanes)));
}

// One query of one head: its logits, later its probabilities.
struct ScoreRow {
  int64_t head, query;
  float* z;          // [count], then at least one vector of scratch; z[0] belongs to the window's first key
  int64_t count;     // keys from the window's first to the last that may be visible
  int64_t reach;     // the same of its block: z has room for padded(reach)
  int32_t position;  // keys at or before it are visible, if positions are kept
  bool valid;        // q_mask
};

// Walks the logits of a sample, head by head of keys. The window is what the denominator needs: all keys, or the
// scored ones.
template <class T>
class ScoreWalk {
 public:
  ScoreWalk(const ScoreProblem& problem, const ScoreSample& sample) : p_(problem), s_(sample) {
    const bool only_scored = p_.range_denominator || (p_.lse_given && !p_.logit) || (p_.logit && !p_.lse);
    window_start_ = only_scored ? s_.key_start : 0;
    window_stop_ = only_scored ? s_.key_stop : s_.keys;
    const int64_t room = padded(std::max<int64_t>(window_stop_ - window_start_, 0)) + kStrip;
    if (p_.k_bias) {
      bias_.assign(room, 0.0f);
      std::copy(p_.k_bias + s_.column_offset + window_start_, p_.k_bias + s_.column_offset + window_stop_,
                bias_.begin());
    }
    if (p_.k_mask || p_.k_positions || p_.q_positions) {
      key_positions_.assign(room, kHidden);
      for (int64_t key = window_start_; key < window_stop_; ++key) {
        const int64_t i = s_.column_offset + key;
        if (p_.k_mask && !p_.k_mask[i]) continue;
        key_positions_[key - window_start_] =
            !p_.causal ? 0 : (p_.k_positions ? p_.k_positions[i] : static_cast<int32_t>(key));
      }
    }
  }

  int64_t window_start() const { return window_start_; }
  int64_t window() const { return std::max<int64_t>(window_stop_ - window_start_, 0); }
  // Where the scored keys begin inside the window.
  int64_t scored_start() const { return s_.key_start - window_start_; }
  const int32_t* key_positions() const { return key_positions_.empty() ? nullptr : key_positions_.data(); }

  // Calls row(ScoreRow&) for every query in [first, last) of every head of the group, and after each block
  // block(rows, q, ldq, z, ldz, count): the widened queries and the panel as row() left it.
  template <class RowFunction, class BlockFunction>
  void visit(int64_t kv_head, int64_t first, int64_t last, RowFunction&& row, BlockFunction&& block) {
    const int64_t group = p_.group();
    const int64_t rows = (last - first) * group;
    const T* keys =
        static_cast<const T*>(p_.k) + s_.k_offset + kv_head * p_.k_head_stride + window_start_ * p_.k_row_stride;
    const bool few = rows <= kFewRows;
    const int64_t reach = visible_end(last - 1);
    // Keys are packed once where they fit the third-level cache; else in chunks, for larger blocks of rows.
    const bool pack_once = !few && reach * p_.dim <= kPackedFloats;
    // Whole queries: every head of the group has the same place in each block.
    const int64_t wanted = few ? kFewRows : (pack_once ? kBlockRows : kLargeBlockRows);
    const int64_t block_rows = std::min(std::max<int64_t>(wanted / group, 1) * group, rows);
    const int64_t chunk = pack_once ? reach : padded(std::max<int64_t>(kPackedFloats / 8 / p_.dim, 1));
    const int64_t ldq = padded(p_.dim);
    const int64_t ldz = padded(reach) + kStrip;
    q_.resize(block_rows * ldq);
    z_.resize(block_rows * ldz);
    if (!few) packed_.resize(padded(std::min(chunk, reach)) * p_.dim);
    if (pack_once) pack_keys(keys, p_.k_row_stride, reach, p_.dim, packed_.data());

    for (int64_t begin = 0; begin < rows; begin += block_rows) {
      const int64_t block_count = std::min(block_rows, rows - begin);
      const int64_t block_reach = visible_end(first + (begin + block_count - 1) / group);
      for (int64_t r = 0; r < block_count; ++r) {
        const int64_t head = kv_head * group + (begin + r) % group, query = first + (begin + r) / group;
        const T* source = static_cast<const T*>(p_.q) + s_.q_offset + head * p_.q_head_stride + query * p_.q_row_stride;
        widen_row(source, p_.dim, ldq, q_.data() + r * ldq);
        // What an invalid query holds must reach nothing, not even as 0 times NaN.
        if (!valid(query)) std::fill_n(q_.data() + r * ldq, ldq, 0.0f);
      }
      if (few) {
        logits_few(q_.data(), ldq, block_count, keys, p_.k_row_stride, block_reach, p_.dim, z_.data(), ldz);
      } else {
        for (int64_t key = 0; key < block_reach; key += chunk) {
          const int64_t count = std::min(chunk, block_reach - key);
          if (!pack_once) pack_keys(keys + key * p_.k_row_stride, p_.k_row_stride, count, p_.dim, packed_.data());
          logits(q_.data(), ldq, block_count, packed_.data(), count, p_.dim, z_.data() + key, ldz);
        }
      }
      for (int64_t r = 0; r < block_count; ++r) {
        ScoreRow x = row_of(first + (begin + r) / group);
        x.head = kv_head * group + (begin + r) % group;
        x.z = z_.data() + r * ldz;
        x.reach = block_reach;
        row(x);
      }
      block(block_count, q_.data(), ldq, z_.data(), ldz, block_reach);
    }
  }

  // What does not depend on the head; without logits.
  ScoreRow row_of(int64_t query) const {
    return {.head = 0,
            .query = query,
            .z = nullptr,
            .count = visible_end(query),
            .reach = 0,
            .position = position(query),
            .valid = valid(query)};
  }

  // Keys of the window from its first to the last that this query (or, with default positions, any before it) may see.
  int64_t visible_end(int64_t query) const {
    if (!p_.causal || !key_positions_.empty()) return window();
    return std::clamp<int64_t>(query + s_.keys - s_.queries + 1 - window_start_, 0, window());
  }

  // Scales (afterwards: products of 16-bit inputs are exact), adds the bias, sets what the query does not see to -inf
  // (up to the end of the last vector); returns the maximum.
  float mask(const ScoreRow& row) const {
    vfloat largest = splat(-kInfinity);
    const int32_t* positions = key_positions();
    for (int64_t j = 0; j < row.count; j += kLanes) {
      vfloat x = load(row.z + j) * p_.scale;
      if (!bias_.empty()) x += load(bias_.data() + j);
      if (positions) x = blend(load(positions + j) <= splat(row.position), x, splat(-kInfinity));
      if (j + kLanes > row.count) x = blend(first_lanes(row.count - j), x, splat(-kInfinity));
      store(row.z + j, x);
      largest = vmax(x, largest);
    }
    return reduce_max(largest);
  }

  // Which of the vector's keys the query sees; j counts from the window's first key.
  vint visible(const ScoreRow& row, int64_t j) const {
    vint seen = first_lanes(row.count - j);
    if (!key_positions_.empty()) seen &= load(key_positions_.data() + j) <= splat(row.position);
    return seen;
  }

 private:
  static constexpr int64_t kPackedFloats = int64_t{2} << 20;  // 8 MiB
  static constexpr int64_t kBlockRows = 24, kLargeBlockRows = 96;

  int32_t position(int64_t query) const {
    if (!p_.causal) return kHidden - 1;
    return p_.q_positions ? p_.q_positions[s_.row_offset + query] : static_cast<int32_t>(query + s_.keys - s_.queries);
  }

  bool valid(int64_t query) const { return !p_.q_mask || p_.q_mask[s_.row_offset + query]; }

  const ScoreProblem& p_;
  const ScoreSample& s_;
  int64_t window_start_, window_stop_;
  std::vector<float> bias_;
  std::vector<int32_t> key_positions_;
  std::vector<float> q_, packed_, z_;
};

// exp(z - shift) in place; returns the sum.
inline float exp_row(const ScoreRow& row, float shift) {
  vfloat sum[4] = {};  // short sums round less
  for (int64_t j = 0; j < row.count; j += kLanes) {
    const vfloat e = vexp(load(row.z + j) - shift);
    store(row.z + j, e);
    sum[(j / kLanes) & 3] += e;
  }
  return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

struct Softmax {
  float lse;
  float factor;  // times this, z is the probability
};

// Turns masked logits into exponentials. A row that sees nothing has lse -inf and factor 0.
inline Softmax softmax_row(const ScoreRow& row, float largest, const float* lse_given) {
  if (lse_given) {
    if (*lse_given == -kInfinity) return {-kInfinity, 0.0f};
    exp_row(row, *lse_given);
    return {*lse_given, 1.0f};
  }
  const float shift = largest == -kInfinity ? 0.0f : largest;
  const float sum = exp_row(row, shift);
  if (sum == 0.0f) return {-kInfinity, 0.0f};
  return {shift + std::log(sum), 1.0f / sum};
}

// ---- forward ----

// Column statistics of one item: [slots][padded(scored)], what the queries walked so far have given.
struct ScoreColumns {
  float* sum;       // or nullptr
  float* max;       // or nullptr
  int32_t* winner;  // with max
};

// Replaces the maximum where x is larger, or the first NaN; ties keep the earlier one.
PYVTK_INLINE void take_max(float* max, int32_t* winner, vfloat x, vint seen, vint candidate) {
  const vfloat old = load(max);
  const vint better = seen & ((x > old) | ((x != x) & (old == old)));
  store(max, blend(better, x, old));
  store(winner, blend(better, candidate, load(winner)));
}

// Columns that one call of score_finish handles.
inline constexpr int64_t kFinishColumns = 256;

// Problem-wide numbers that items and the final pass share.
struct ScorePlan {
  int64_t groups;  // items per run of queries: key/value heads, or heads of the result if pairwise
  int64_t chunks;  // runs of queries per sample
  int64_t slots;   // statistics per item
  int64_t pitch;   // floats per statistic
  int64_t items;
};

inline ScorePlan score_plan(const ScoreProblem& p) {
  ScorePlan plan;
  plan.groups = p.pairwise() ? p.out_heads() : p.kv_heads;
  plan.slots = p.pairwise() || p.merges_heads() ? 1 : p.group();
  // The cut depends on the shape alone, so that results do not depend on the machine. 64 items keep many cores busy;
  // fewer than 96 rows would not repay packing the keys.
  const int64_t rows = p.max_queries * p.group();
  plan.chunks =
      std::clamp<int64_t>(64 / std::max<int64_t>(p.batch * plan.groups, 1), 1, std::max<int64_t>(rows / 96, 1));
  plan.pitch = padded(p.max_scored()) + kStrip;
  plan.items = p.batch * plan.groups * plan.chunks;
  return plan;
}

inline ScoreColumns item_columns(const ScoreProblem& p, const ScorePlan& plan, float* workspace, int64_t item,
                                 int64_t slot) {
  const int64_t size = plan.items * plan.slots * plan.pitch;
  const int64_t at = (item * plan.slots + slot) * plan.pitch;
  ScoreColumns columns{nullptr, nullptr, nullptr};
  if (p.needs_sum()) {
    columns.sum = workspace + at;
    workspace += size;
  }
  if (p.needs_max()) {
    columns.max = workspace + at;
    columns.winner = reinterpret_cast<int32_t*>(workspace + size) + at;
  }
  return columns;
}

// Floats of workspace that score() needs.
inline int64_t score_workspace(const ScoreProblem& p) {
  const ScorePlan plan = score_plan(p);
  return plan.items * plan.slots * plan.pitch * ((p.needs_sum() ? 1 : 0) + (p.needs_max() ? 2 : 0));
}

// What the caller of score_item and score_finish needs to know.
inline ScorePlanSizes score_plan_sizes(const ScoreProblem& p) {
  const ScorePlan plan = score_plan(p);
  const double pairs = static_cast<double>(p.max_queries) * static_cast<double>(p.max_keys);
  // 0.02 ns per multiplication is what one core reaches with AVX2.
  const double cost =
      0.02 * pairs * static_cast<double>(p.q_heads * p.dim) / static_cast<double>(plan.groups * plan.chunks);
  return {plan.items, cost, kFinishColumns};
}

inline float head_weight(const ScoreProblem& p, int64_t sample, int64_t head) {
  return p.head_weights ? p.head_weights[sample * p.head_weights_stride + head] : 1.0f;
}

// From logits to values (probabilities or logits) up to a factor, which holds the head's weight too; false if the row
// gives nothing. Writes the row's lse if wanted.
template <class T>
bool score_row_values(const ScoreProblem& p, const ScoreSample& s, const ScoreWalk<T>& walk, int64_t sample_number,
                      const ScoreRow& row, float* lse, float* factor) {
  const int64_t lse_at = s.lse_offset + row.head * s.lse_head_stride + row.query;
  if (!row.valid) {
    if (lse) lse[lse_at] = -kInfinity;
    return false;
  }
  const float largest = walk.mask(row);
  *factor = head_weight(p, sample_number, row.head);
  if (p.logit) {
    if (lse) {
      // The logits themselves are still needed, so the sum is taken on the side.
      const float shift = largest == -kInfinity ? 0.0f : largest;
      vfloat sum = {};
      for (int64_t j = 0; j < row.count; j += kLanes) sum += vexp(load(row.z + j) - shift);
      const float total = reduce_add(sum);
      lse[lse_at] = total == 0.0f ? -kInfinity : shift + std::log(total);
    }
    return true;
  }
  const Softmax softmax = softmax_row(row, largest, p.lse_given ? p.lse_given + lse_at : nullptr);
  if (lse) lse[lse_at] = softmax.lse;
  *factor *= softmax.factor;
  return softmax.lse != -kInfinity;
}

// Zeros wherever the query does not see the key, up to the end of the block's reach; NaN moves from the factor, where
// it would spread over unseen keys, into the row.
template <class T>
void clear_unseen(const ScoreWalk<T>& walk, const ScoreRow& row, float* factor) {
  const bool poisoned = std::isnan(*factor);
  const vfloat scale = splat(poisoned ? *factor : 1.0f);
  for (int64_t j = 0; j < row.count; j += kLanes) {
    store(row.z + j, blend(walk.visible(row, j), load(row.z + j) * scale, vfloat{}));
  }
  const int64_t end = ceil_div(row.count, kLanes) * kLanes;
  std::fill(row.z + end, row.z + std::max(padded(row.reach), end), 0.0f);
  if (poisoned) *factor = 1.0f;
}

template <class T>
void score_item(const ScoreProblem& p, float* workspace, int64_t item) {
  const ScorePlan plan = score_plan(p);
  const int64_t chunk = item % plan.chunks, group = item / plan.chunks % plan.groups;
  const int64_t sample_number = item / plan.chunks / plan.groups;
  const ScoreSample s = score_sample(p, sample_number);
  const int64_t step = ceil_div<int64_t>(std::max<int64_t>(s.queries, 1), plan.chunks);
  const int64_t first = std::min(chunk * step, s.queries), last = std::min(first + step, s.queries);
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    const ScoreColumns columns = item_columns(p, plan, workspace, item, slot);
    if (columns.sum) std::fill_n(columns.sum, plan.pitch, 0.0f);
    if (columns.max) std::fill_n(columns.max, plan.pitch, -kInfinity);
    if (columns.max) std::fill_n(columns.winner, plan.pitch, 0);
  }
  if (first == last) return;

  ScoreWalk<T> walk(p, s);
  const int64_t start = walk.scored_start(), scored = s.scored();
  const auto values = [&](const ScoreRow& row, float* factor) {
    return score_row_values(p, s, walk, sample_number, row, p.lse, factor);
  };

  if (!p.pairwise()) {
    std::vector<float> factors;
    walk.visit(
        group, first, last,
        [&](const ScoreRow& row) {
          float factor;
          if (!values(row, &factor)) {
            factor = 0.0f;
            std::fill_n(row.z, padded(row.reach), 0.0f);
          } else {
            if (p.needs_max()) {
              const ScoreColumns columns = item_columns(p, plan, workspace, item, row.head % plan.slots);
              const int64_t count = std::min(row.count - start, scored);
              for (int64_t j = 0; j < count; j += kLanes) {
                take_max(columns.max + j, columns.winner + j, load(row.z + start + j) * factor,
                         walk.visible(row, start + j), splat(static_cast<int32_t>(row.query)));
              }
            }
            clear_unseen(walk, row, &factor);
          }
          factors.push_back(factor);
        },
        [&](int64_t rows, const float*, int64_t, const float* z, int64_t ldz, int64_t reach) {
          // Rows of a block are added up in registers before they join the column: faster, and rounding errors grow
          // with the number of blocks instead of rows.
          const int64_t count = p.needs_sum() ? std::min(reach - start, scored) : 0;
          for (int64_t slot = 0; slot < plan.slots; ++slot) {
            float* column = item_columns(p, plan, workspace, item, slot).sum;
            for (int64_t j = 0; j < count; j += kLanes) {
              vfloat sum = {};
              for (int64_t r = slot; r < rows; r += plan.slots) sum += load(z + r * ldz + start + j) * factors[r];
              store(column + j, load(column + j) + sum);
            }
          }
          factors.clear();
        });
    return;
  }

  // Pairwise: a panel [queries][scored] of values reduced over heads, then over queries. As many queries at a time as
  // keep it near the second-level cache: packing a head's keys has to pay for each run.
  const int64_t queries = std::clamp<int64_t>((int64_t{1} << 17) / plan.pitch, 32, std::max<int64_t>(last - first, 32));
  const int64_t kv_first = p.by_group() ? group : 0, kv_last = p.by_group() ? group + 1 : p.kv_heads;
  const ScoreColumns columns = item_columns(p, plan, workspace, item, 0);
  std::vector<float> panel(queries * plan.pitch);
  std::vector<int32_t> winner(p.head_max() ? panel.size() : 0);
  const float mean = p.head_mean() ? 1.0f / static_cast<float>(p.heads_per_out()) : 1.0f;
  for (int64_t begin = first; begin < last; begin += queries) {
    const int64_t end = std::min(begin + queries, last);
    std::fill(panel.begin(), panel.end(), p.head_max() ? -kInfinity : 0.0f);
    for (int64_t kv_head = kv_first; kv_head < kv_last; ++kv_head) {
      walk.visit(
          kv_head, begin, end,
          [&](const ScoreRow& row) {
            float factor;
            const bool alive = values(row, &factor);
            if (!row.valid) return;
            // With a given lse a query may be dead for one head only; its values are zeros.
            if (!alive) std::fill_n(row.z, padded(row.reach), 0.0f);
            const int64_t at = (row.query - begin) * plan.pitch, count = std::min(row.count - start, scored);
            if (p.head_max()) {
              for (int64_t j = 0; j < count; j += kLanes) {
                take_max(panel.data() + at + j, winner.data() + at + j, load(row.z + start + j) * factor,
                         walk.visible(row, start + j), splat(static_cast<int32_t>(row.head)));
              }
            } else {
              // What the query does not see is left out when queries are reduced.
              for (int64_t j = 0; j < count; j += kLanes) {
                float* to = panel.data() + at + j;
                store(to, load(to) + load(row.z + start + j) * factor);
              }
            }
          },
          [](auto&&...) {});
    }
    constexpr int64_t kSummed = 24;  // queries that are added up before they join the column, as in blocks of rows
    for (int64_t some = begin; some < end; some += kSummed) {
      const int64_t some_end = std::min(some + kSummed, end);
      std::vector<ScoreRow> rows;
      for (int64_t query = some; query < some_end; ++query) rows.push_back(walk.row_of(query));
      for (int64_t j = 0; j < scored; j += kLanes) {
        vfloat sum = {};
        for (const ScoreRow& row : rows) {
          if (!row.valid || row.count <= start + j) continue;
          const int64_t at = (row.query - begin) * plan.pitch + j;
          const vint seen = walk.visible(row, start + j);
          const vfloat x = load(panel.data() + at) * mean;
          sum += blend(seen, x, vfloat{});
          if (columns.max) {
            // The winner keeps the query, and with a maximum over heads that head: query * heads + head.
            vint candidate = splat(static_cast<int32_t>(row.query));
            if (p.head_max()) candidate = candidate * splat(static_cast<int32_t>(p.q_heads)) + load(winner.data() + at);
            take_max(columns.max + j, columns.winner + j, x, seen, candidate);
          }
        }
        if (columns.sum) store(columns.sum + j, load(columns.sum + j) + sum);
      }
    }
  }
}

// How many of the `valid` queries see each of `count` keys from `first` on (numbers of the sample).
inline void count_visible(const ScoreProblem& p, const ScoreSample& s, int64_t valid, int64_t first, int64_t count,
                          float* seen_by) {
  std::fill_n(seen_by, count, p.causal ? 0.0f : static_cast<float>(valid));
  const bool positions = p.q_positions || p.k_positions;
  for (int64_t query = 0; p.causal && query < s.queries; ++query) {
    if (p.q_mask && !p.q_mask[s.row_offset + query]) continue;
    if (!positions) {
      const int64_t end = std::min(query + s.keys - s.queries + 1 - first, count);
      for (int64_t j = 0; j < end; ++j) seen_by[j] += 1.0f;
    } else {
      const int64_t at = p.q_positions ? p.q_positions[s.row_offset + query] : query + s.keys - s.queries;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t key_at = p.k_positions ? p.k_positions[s.column_offset + first + j] : first + j;
        seen_by[j] += key_at <= at ? 1.0f : 0.0f;
      }
    }
  }
  if (p.k_mask) {
    for (int64_t j = 0; j < count; ++j) seen_by[j] = p.k_mask[s.column_offset + first + j] ? seen_by[j] : 0.0f;
  }
}

// Puts the items' statistics of one run of columns together: over chunks, divisors, heads. Writes scores and winners.
inline void score_finish(const ScoreProblem& p, const float* workspace, int64_t sample_number, int64_t first) {
  const ScorePlan plan = score_plan(p);
  const ScoreSample s = score_sample(p, sample_number);
  const int64_t count = std::min(kFinishColumns, s.scored() - first);
  if (count <= 0) return;
  const int64_t slots = p.slots(), out_heads = p.out_heads();
  std::vector<float> sum(p.needs_sum() ? slots * count : 0), max(p.needs_max() ? slots * count : 0);
  std::vector<int32_t> winner(max.size());
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t group = slot / plan.slots, inner = slot % plan.slots;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
      const int64_t item = (sample_number * plan.groups + group) * plan.chunks + chunk;
      const ScoreColumns part = item_columns(p, plan, const_cast<float*>(workspace), item, inner);
      if (part.sum) {
        float* to = sum.data() + slot * count;
        for (int64_t j = 0; j < count; ++j) to[j] = (chunk ? to[j] : 0.0f) + part.sum[first + j];
      }
      if (part.max) {
        float* to = max.data() + slot * count;
        int32_t* who = winner.data() + slot * count;
        for (int64_t j = 0; j < count; ++j) {
          const float x = part.max[first + j];
          if (chunk == 0 || x > to[j] || (std::isnan(x) && !std::isnan(to[j]))) {
            to[j] = x;
            who[j] = part.winner[first + j];
          }
        }
      }
    }
  }

  int64_t valid = s.queries;
  if (p.q_mask) valid = std::count(p.q_mask + s.row_offset, p.q_mask + s.row_offset + s.queries, true);
  std::vector<float> seen_by;
  if (p.logit || p.has(QueryReduce::visible_mean) || p.needs_max()) {
    seen_by.resize(count);
    count_visible(p, s, valid, s.key_start + first, count, seen_by.data());
  }
  const bool decodes = p.pairwise() && p.head_max();
  if (p.query_winners) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      int32_t* to = p.query_winners + s.slot_offset + slot * s.slot_stride + first;
      for (int64_t j = 0; j < count; ++j) {
        const int32_t who = winner[slot * count + j];
        to[j] = decodes ? who / static_cast<int32_t>(p.q_heads) : who;
      }
    }
  }

  std::vector<float> value(slots * count), result(count), divisor(count);
  std::vector<int32_t> head(count);
  const int64_t per_out = slots / out_heads;
  const int64_t plane = p.packed() ? out_heads * p.keys : p.batch * out_heads * p.scored();
  for (int r = 0; r < p.num_reducers; ++r) {
    const QueryReduce reduce = p.reducers[r];
    for (int64_t j = 0; j < count; ++j) {
      divisor[j] = reduce == QueryReduce::mean           ? static_cast<float>(std::max<int64_t>(valid, 1))
                   : reduce == QueryReduce::visible_mean ? std::max(seen_by[j], 1.0f)
                                                         : 1.0f;
    }
    std::copy_n(divisor.data(), count,
                p.divisors + r * (p.packed() ? p.keys : p.batch * p.scored()) + s.divisor_offset + first);
    for (int64_t slot = 0; slot < slots; ++slot) {
      float* to = value.data() + slot * count;
      for (int64_t j = 0; j < count; ++j) {
        to[j] = reduce != QueryReduce::max ? sum[slot * count + j] / divisor[j]
                                           : (seen_by[j] > 0.0f ? max[slot * count + j] : 0.0f);
      }
    }
    for (int64_t out = 0; out < out_heads; ++out) {
      const float* from = value.data() + out * per_out * count;
      std::copy_n(from, count, result.data());
      std::fill(head.begin(), head.end(), static_cast<int32_t>(out * p.heads_per_out()));
      for (int64_t slot = 1; slot < per_out; ++slot) {
        from += count;
        if (p.head_max()) {
          for (int64_t j = 0; j < count; ++j) {
            if (from[j] > result[j] || (std::isnan(from[j]) && !std::isnan(result[j]))) {
              result[j] = from[j];
              head[j] = static_cast<int32_t>(out * p.heads_per_out() + slot);
            }
          }
        } else {
          for (int64_t j = 0; j < count; ++j) result[j] += from[j];
        }
      }
      if (p.head_mean() && !p.pairwise()) {
        const float heads = static_cast<float>(p.heads_per_out());
        for (int64_t j = 0; j < count; ++j) result[j] /= heads;
      }
      if (p.logit) {
        for (int64_t j = 0; j < count; ++j) result[j] = seen_by[j] > 0.0f ? result[j] : -kInfinity;
      }
      const int64_t at = r * plane + s.score_offset + out * s.score_head_stride + first;
      std::copy_n(result.data(), count, p.scores + at);
      if (p.head_winners) {
        for (int64_t j = 0; j < count; ++j) {
          // Heads reduced for every pair have one winner per key only if a maximum over queries follows.
          p.head_winners[at + j] = !decodes ? head[j]
                                   : reduce == QueryReduce::max
                                       ? winner[out * count + j] % static_cast<int32_t>(p.q_heads)
                                       : -1;
        }
      }
    }
  }
}

// ---- backward ----

// Query chunks of the backward: each has gradients of the keys of its own, added up in order afterwards.
inline int64_t score_backward_chunks(const ScoreProblem& p) {
  const int64_t rows = p.max_queries * p.group();
  return std::clamp<int64_t>(16 / std::max<int64_t>(p.batch * p.kv_heads, 1), 1, std::max<int64_t>(rows / 384, 1));
}

inline int64_t score_backward_items(const ScoreProblem& p, const ScoreGradient& g) {
  return p.batch * p.kv_heads / std::max<int64_t>(g.pair_max_heads, 1) * score_backward_chunks(p);
}

// Whether gradients of the keys are added up in the output itself: one chunk, and rows of whole strips.
inline bool score_backward_direct(const ScoreProblem& p) {
  return score_backward_chunks(p) == 1 && p.dim == padded(p.dim);
}

// Floats of scratch per chunk and head of keys: [max_keys] of the bias' gradient, then, if they are not added up in the
// output, [max_keys][padded(dim)] of the keys'.
inline int64_t score_backward_pitch(const ScoreProblem& p) {
  return p.max_keys * (score_backward_direct(p) ? 1 : 1 + padded(p.dim));
}

// The gradient of one sample's run of queries.
template <class T>
class ScoreBackward {
 public:
  ScoreBackward(const ScoreProblem& problem, const ScoreGradient& gradient, float* partial, float* weight_partial,
                int64_t sample_number, int64_t chunk)
      : p_(problem),
        g_(gradient),
        s_(score_sample(problem, sample_number)),
        walk_(p_, s_),
        sample_(sample_number),
        chunk_(chunk),
        partial_(partial),
        weight_partial_(weight_partial),
        direct_(score_backward_direct(p_)),
        ldk_(padded(p_.dim)),
        wide_keys_(kKeys * ldk_),
        column_(padded(s_.scored()) + kStrip) {
    const int64_t step = ceil_div<int64_t>(std::max<int64_t>(s_.queries, 1), score_backward_chunks(p_));
    first_ = std::min(chunk * step, s_.queries);
    last_ = std::min(first_ + step, s_.queries);
  }

  // The first block of rows writes the gradients of the keys it reaches; this is for what it leaves.
  void clear(int64_t kv_head) {
    std::fill_n(partial(kv_head), p_.max_keys, 0.0f);
    std::fill_n(weight_partial(kv_head), p_.group(), 0.0f);
    if (first_ == last_) clear_keys(kv_head, 0, s_.keys);
  }

  void run(int64_t kv_head) {
    if (first_ < last_) visit(kv_head, first_, last_, nullptr);
  }

  // For a maximum over the heads [kv_first, kv_last) of every pair: only the head that won it takes the gradient.
  void run_pairwise(int64_t kv_first, int64_t kv_last) {
    constexpr int64_t kQueries = 32;
    const int64_t pitch = padded(s_.scored()) + kStrip;
    std::vector<float> best(kQueries * pitch);
    std::vector<int32_t> winner(kQueries * pitch);
    for (int64_t begin = first_; begin < last_; begin += kQueries) {
      const int64_t end = std::min(begin + kQueries, last_);
      std::fill(best.begin(), best.end(), -kInfinity);
      std::fill(winner.begin(), winner.end(), -1);
      const int64_t start = walk_.scored_start();
      for (int64_t kv_head = kv_first; kv_head < kv_last; ++kv_head) {
        walk_.visit(
            kv_head, begin, end,
            [&](const ScoreRow& row) {
              float factor;
              if (!score_row_values(p_, s_, walk_, sample_, row, nullptr, &factor)) return;
              const int64_t at = (row.query - begin) * pitch, count = std::min(row.count - start, s_.scored());
              for (int64_t j = 0; j < count; j += kLanes) {
                take_max(best.data() + at + j, winner.data() + at + j, load(row.z + start + j) * factor,
                         walk_.visible(row, start + j), splat(static_cast<int32_t>(row.head)));
              }
            },
            [](auto&&...) {});
      }
      for (int64_t kv_head = kv_first; kv_head < kv_last; ++kv_head) {
        visit(kv_head, begin, end, winner.data());
      }
    }
  }

 private:
  // Keys widened at a time: with 256 channels they fit the first-level cache, and sums over them stay short.
  static constexpr int64_t kKeys = 32;

  float* partial(int64_t kv_head) const {
    return partial_ +
           ((sample_ * p_.kv_heads + kv_head) * score_backward_chunks(p_) + chunk_) * score_backward_pitch(p_);
  }
  // Where the head's key gradients are added up.
  float* grad_k(int64_t kv_head) const {
    if (!direct_) return partial(kv_head) + p_.max_keys;
    return g_.k +
           (p_.packed() ? s_.column_offset * p_.kv_heads + kv_head : (sample_ * p_.kv_heads + kv_head) * p_.keys) *
               p_.dim;
  }
  void clear_keys(int64_t kv_head, int64_t first, int64_t last) {
    const int64_t width = direct_ ? p_.dim : ldk_;
    for (int64_t key = first; key < last; ++key) std::fill_n(grad_k(kv_head) + key * grad_k_stride(), width, 0.0f);
  }
  int64_t grad_k_stride() const { return direct_ && p_.packed() ? p_.kv_heads * p_.dim : ldk_; }
  float* weight_partial(int64_t kv_head) const {
    return weight_partial_ + ((sample_ * p_.kv_heads + kv_head) * score_backward_chunks(p_) + chunk_) * p_.group();
  }

  // pair_winner: [queries of the visit][padded(scored) + kStrip], or nullptr
  void visit(int64_t kv_head, int64_t first, int64_t last, const int32_t* pair_winner) {
    int64_t rows_done = 0;
    walk_.visit(
        kv_head, first, last,
        [&](const ScoreRow& row) {
          const int64_t pitch = padded(s_.scored()) + kStrip;
          gradient_of_logits(row, kv_head, pair_winner ? pair_winner + (row.query - first) * pitch : nullptr);
        },
        [&](int64_t rows, const float* q, int64_t ldq, float* z, int64_t ldz, int64_t reach) {
          gradient_of_inputs(kv_head, first, rows_done, rows, q, ldq, z, ldz, reach);
          rows_done += rows;
        });
  }

  // dL/d(value) of one row, before the head's weight, into column_.
  int64_t gradient_of_values(const ScoreRow& row, const int32_t* pair_winner) {
    const int64_t scored = s_.scored();
    const int64_t count = std::max<int64_t>(std::min(row.count - walk_.scored_start(), scored), 0);
    const int64_t at = p_.packed() ? row.head * p_.keys + s_.column_offset : (sample_ * p_.q_heads + row.head) * scored;
    std::fill(column_.begin(), column_.end(), 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      column_[j] = !pair_winner || pair_winner[j] == row.head ? g_.linear[at + j] : 0.0f;
    }
    if (g_.max) {
      for (int64_t j = 0; j < count; ++j) column_[j] += g_.max_query[at + j] == row.query ? g_.max[at + j] : 0.0f;
    }
    return count;
  }

  // Replaces the row's logits by dL/d(logit).
  void gradient_of_logits(const ScoreRow& row, int64_t kv_head, const int32_t* pair_winner) {
    const int64_t lse_at = s_.lse_offset + row.head * s_.lse_head_stride + row.query;
    const float lse = p_.lse ? p_.lse[lse_at] : 0.0f;
    if (g_.lse_given) g_.lse_given[lse_at] = 0.0f;
    if (!row.valid || (lse == -kInfinity && !p_.logit)) {
      std::fill_n(row.z, ceil_div(row.count, kLanes) * kLanes, 0.0f);
      return;
    }
    const float largest = walk_.mask(row);
    const float weight = head_weight(p_, sample_, row.head);
    const int64_t start = walk_.scored_start(), count = gradient_of_values(row, pair_winner);
    const float grad_lse = g_.lse ? g_.lse[lse_at] : 0.0f;
    // Normalised anew: exp(z - lse) would carry the rounding of lse, which grows with it, into every probability.
    const float factor = p_.logit ? 1.0f : softmax_row(row, largest, p_.lse_given ? &lse : nullptr).factor;

    vfloat sum[4] = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const vint seen = walk_.visible(row, start + j) & first_lanes(count - j);
      sum[(j / kLanes) & 3] += blend(seen, load(row.z + start + j) * load(column_.data() + j), vfloat{});
    }
    const float dot = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3])) * factor;
    weight_partial(kv_head)[row.head % p_.group()] += dot;
    if (g_.lse_given) g_.lse_given[lse_at] = -weight * dot;

    // d z = p * (a * weight + shift) for probabilities p; for logits a * weight, plus the softmax of a used lse.
    const float shift = p_.lse_given ? 0.0f : (p_.logit ? grad_lse : grad_lse - weight * dot);
    const bool softmax = !p_.logit || (grad_lse != 0.0f && lse != -kInfinity);
    for (int64_t j = 0; j < row.count; j += kLanes) {
      vfloat a;
      if (j >= start && j - start + kLanes <= static_cast<int64_t>(column_.size())) {
        a = load(column_.data() + (j - start)) * weight;
      } else {
        // Keys outside the scored ones take part in the denominator only.
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t i = j - start + lane;
          a[lane] = i >= 0 && i < count ? column_[i] * weight : 0.0f;
        }
      }
      const vfloat z = load(row.z + j);
      vfloat x;
      if (p_.logit) {
        x = softmax ? a + vexp(z - lse) * shift : a;
      } else {
        x = z * factor * (a + shift);
      }
      store(row.z + j, blend(walk_.visible(row, j), x, vfloat{}));
    }
  }

  void gradient_of_inputs(int64_t kv_head, int64_t first, int64_t rows_done, int64_t rows, const float* q, int64_t ldq,
                          float* z, int64_t ldz, int64_t reach) {
    const int64_t window_start = walk_.window_start();
    const T* keys =
        static_cast<const T*>(p_.k) + s_.k_offset + kv_head * p_.k_head_stride + window_start * p_.k_row_stride;
    float* grad_bias = partial(kv_head);
    for (int64_t r = 0; r < rows; ++r) {
      // Rows may reach less far than their block.
      const int64_t end = std::min(reach, walk_.visible_end(first + (rows_done + r) / p_.group()));
      std::fill(z + r * ldz + end, z + r * ldz + padded(reach), 0.0f);
      if (g_.k_bias) {
        for (int64_t j = 0; j < end; ++j) grad_bias[window_start + j] += z[r * ldz + j];
      }
      for (int64_t j = 0; j < padded(reach); j += kLanes) store(z + r * ldz + j, load(z + r * ldz + j) * p_.scale);
    }
    const bool fresh = first == first_ && rows_done == 0;
    if (fresh) {
      clear_keys(kv_head, 0, window_start);
      clear_keys(kv_head, window_start + reach, s_.keys);
    }
    grad_q_.assign(rows * ldk_, 0.0f);
    for (int64_t key = 0; key < reach; key += kKeys) {
      const int64_t count = std::min(kKeys, reach - key);
      for (int64_t j = 0; j < count; ++j) {
        float* wide = wide_keys_.data() + j * ldk_;
        widen_row(keys + (key + j) * p_.k_row_stride, p_.dim, ldk_, wide);
        // A masked key may hold anything; its weights are 0, but 0 times NaN is not.
        if (walk_.key_positions() && walk_.key_positions()[key + j] == kHidden) std::fill_n(wide, ldk_, 0.0f);
      }
      weigh_keys(z + key, ldz, rows, wide_keys_.data(), ldk_, count, grad_q_.data(), ldk_);
      weigh_rows(z + key, ldz, rows, q, ldq, count, grad_k(kv_head) + (window_start + key) * grad_k_stride(),
                 grad_k_stride(), fresh);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t head = kv_head * p_.group() + (rows_done + r) % p_.group();
      const int64_t query = first + (rows_done + r) / p_.group();
      const int64_t at = p_.packed() ? (s_.row_offset + query) * p_.q_heads + head
                                     : (sample_ * p_.q_heads + head) * p_.queries + query;
      std::copy_n(grad_q_.data() + r * ldk_, p_.dim, g_.q + at * p_.dim);
    }
  }

  const ScoreProblem& p_;
  const ScoreGradient& g_;
  const ScoreSample s_;
  ScoreWalk<T> walk_;
  const int64_t sample_, chunk_;
  int64_t first_, last_;
  float *const partial_, *const weight_partial_;
  const bool direct_;
  const int64_t ldk_;
  std::vector<float> wide_keys_, grad_q_;
  std::vector<float> column_;
};

// partial: [batch][kv_heads][chunks][pitch]; weight_partial: [batch][kv_heads][chunks][group].
template <class T>
void score_backward_item(const ScoreProblem& p, const ScoreGradient& g, float* partial, float* weight_partial,
                         int64_t item) {
  const int64_t chunks = score_backward_chunks(p),
                units = g.pair_max_heads ? p.kv_heads / g.pair_max_heads : p.kv_heads;
  const int64_t chunk = item % chunks, unit = item / chunks % units, sample_number = item / chunks / units;
  ScoreBackward<T> backward(p, g, partial, weight_partial, sample_number, chunk);
  if (g.pair_max_heads) {
    const int64_t kv_first = unit * g.pair_max_heads, kv_last = kv_first + g.pair_max_heads;
    for (int64_t kv_head = kv_first; kv_head < kv_last; ++kv_head) backward.clear(kv_head);
    backward.run_pairwise(kv_first, kv_last);
  } else {
    backward.clear(unit);
    backward.run(unit);
  }
}

// Adds the items' gradients of key `key` of one sample up, over chunks (k) and over heads and chunks (bias).
inline void score_backward_finish(const ScoreProblem& p, const ScoreGradient& g, const float* partial,
                                  int64_t sample_number, int64_t key) {
  const ScoreSample s = score_sample(p, sample_number);
  if (key >= s.keys) return;
  const int64_t chunks = score_backward_chunks(p), pitch = score_backward_pitch(p), ldk = padded(p.dim);
  const bool direct = score_backward_direct(p);
  float bias = 0.0f;
  for (int64_t kv_head = 0; kv_head < p.kv_heads; ++kv_head) {
    const float* from = partial + (sample_number * p.kv_heads + kv_head) * chunks * pitch;
    float* to = g.k + (p.packed() ? ((s.column_offset + key) * p.kv_heads + kv_head)
                                  : ((sample_number * p.kv_heads + kv_head) * p.keys + key)) *
                          p.dim;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, from += pitch) {
      bias += from[key];
      if (direct) continue;
      const float* x = from + p.max_keys + key * ldk;
      for (int64_t d = 0; d < p.dim; ++d) to[d] = (chunk ? to[d] : 0.0f) + x[d];
    }
  }
  if (g.k_bias) g.k_bias[s.column_offset + key] = bias;
}

}  // namespace pyvtk::cpu::PYVTK_ISA
