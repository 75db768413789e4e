// Attention received per key, without the queries x keys map.
//
// Work is cut into items of (sample, key/value head, run of queries). An item walks its queries in blocks of a few
// rows: a panel of logits [rows][keys] that fits the second-level cache, softmax along each row, and from the row
// into column statistics (sum, max and its winner over queries). The statistics of the items are put together in a
// fixed order, so results do not depend on the number of threads. Rows of all query heads of a group share the packed
// keys. Extra memory: the packed keys of one head, one panel and a few rows of statistics per item.
//
// Bound by reading k for few queries, by the multiplications for many.
#include "cpu/score_walk.h"

namespace pyvtk::cpu::PYVTK_ISA {

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

// One item; `walk` is that of its sample, and items up to `stop` follow.
template <class T>
void score_item(const ScoreProblem& p, float* workspace, int64_t item, int64_t stop, const ScoreSample& s,
                ScoreWalk<T>& walk) {
  const ScorePlan plan = score_plan(p);
  const int64_t chunk = item % plan.chunks, group = item / plan.chunks % plan.groups;
  const int64_t sample_number = item / plan.chunks / plan.groups;
  const int64_t step = ceil_div<int64_t>(std::max<int64_t>(s.queries, 1), plan.chunks);
  const int64_t first = std::min(chunk * step, s.queries), last = std::min(first + step, s.queries);
  for (int64_t slot = 0; slot < plan.slots; ++slot) {
    const ScoreColumns columns = item_columns(p, plan, workspace, item, slot);
    if (columns.sum) std::fill_n(columns.sum, plan.pitch, 0.0f);
    if (columns.max) std::fill_n(columns.max, plan.pitch, -kInfinity);
    if (columns.max) std::fill_n(columns.winner, plan.pitch, 0);
  }
  if (first == last) return;

  const int64_t start = walk.scored_start(), scored = s.scored();
  const auto values = [&](const ScoreRow& row, float* factor) {
    return score_row_values(p, s, walk, sample_number, row, p.lse, factor);
  };

  if (!p.pairwise()) {
    std::vector<float> factors;
    walk.visit(
        group, plan.chunks == 1 ? group + stop - item : group + 1, first, last,
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
          kv_head, kv_last, begin, end,
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

// Items [begin, end): those of one sample share what is made for it once, and the logits of several heads.
template <class T>
void score_items(const ScoreProblem& p, float* workspace, int64_t begin, int64_t end) {
  const ScorePlan plan = score_plan(p);
  const int64_t per_sample = plan.groups * plan.chunks;
  while (begin < end) {
    const int64_t sample_number = begin / per_sample, stop = std::min((sample_number + 1) * per_sample, end);
    const ScoreSample s = score_sample(p, sample_number);
    ScoreWalk<T> walk(p, s);
    for (; begin < stop; ++begin) score_item(p, workspace, begin, stop, s, walk);
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
    if (p.divisors) {
      std::copy_n(divisor.data(), count,
                  p.divisors + r * (p.packed() ? p.keys : p.batch * p.scored()) + s.divisor_offset + first);
    }
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

}  // namespace pyvtk::cpu::PYVTK_ISA
