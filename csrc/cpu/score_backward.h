// Gradient of score.h. An item is a sample, a key/value head and a run of queries; it recomputes its blocks of logits,
// turns them into gradients of logits in place, and multiplies those with keys and queries. Key gradients of several
// runs are added up in a fixed order.
#include "cpu/score.h"

namespace pyvtk::cpu::PYVTK_ISA {

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
            kv_head, kv_head + 1, begin, end,
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
        kv_head, kv_head + 1, first, last,
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
    for (int64_t r = 0; r < rows; ++r) {
      // Rows may reach less far than their block.
      const int64_t end = std::min(reach, walk_.visible_end(first + (rows_done + r) / p_.group()));
      std::fill(z + r * ldz + end, z + r * ldz + padded(reach), 0.0f);
    }
    if (g_.k_bias) add_rows(z, ldz, rows, reach, partial(kv_head) + window_start);
    for (int64_t r = 0; r < rows; ++r) {
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

  // to[j] += the rows' sum of z[., j], in short chains: one long chain of additions would lose more than plain torch.
  static void add_rows(const float* z, int64_t ldz, int64_t rows, int64_t columns, float* to) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      vfloat sum[4] = {};
      for (int64_t r = 0; r < rows; ++r) sum[r & 3] += load(z + r * ldz + j);
      const vfloat total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
      for (int64_t lane = 0; lane < std::min(kLanes, columns - j); ++lane) to[j + lane] += total[lane];
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
  double bias = 0.0;
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
  if (g.k_bias) g.k_bias[s.column_offset + key] = static_cast<float>(bias);
}

}  // namespace pyvtk::cpu::PYVTK_ISA
