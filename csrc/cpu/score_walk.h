// The logits of a sample, block of rows by block of rows, and softmax along a row: what forward and backward share
// (no include guard: compiled once per instruction set, see each_isa.h).
#include "common/score_problem.h"
#include "cpu/gemm.h"

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

// Walks the logits of a sample, head by head of keys. Where the heads of a token lie side by side (what a projection
// leaves) and queries are few, the logits of several heads are taken beforehand, token by token: head by head, every
// row of keys would be in another page, and each page would be visited once for each head. The window is what the
// denominator needs: all keys, or the scored ones.
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
  // block(rows, q, ldq, z, ldz, count): the widened queries and the panel as row() left it. Heads of keys up to kv_stop
  // are visited next, with the same queries.
  template <class RowFunction, class BlockFunction>
  void visit(int64_t kv_head, int64_t kv_stop, int64_t first, int64_t last, RowFunction&& row, BlockFunction&& block) {
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
    const bool prepared = few && prepare(kv_head, kv_stop, first, last);
    q_.resize(block_rows * ldq);
    if (!prepared) z_.resize(block_rows * ldz);
    float* const z = prepared ? prepared_.data() + (kv_head - prepared_first_) * rows * ldz : z_.data();
    if (!few) packed_.resize(padded(std::min(chunk, reach)) * p_.dim);
    if (pack_once) pack_keys(keys, p_.k_row_stride, reach, p_.dim, packed_.data());

    for (int64_t begin = 0; begin < rows; begin += block_rows) {
      const int64_t block_count = std::min(block_rows, rows - begin);
      const int64_t block_reach = visible_end(first + (begin + block_count - 1) / group);
      widen_queries(kv_head, first, begin, block_count, ldq, q_.data());
      if (few && !prepared) {
        logits_few(q_.data(), ldq, block_count, keys, p_.k_row_stride, rows_ahead<T>(), block_reach, p_.dim, z, ldz);
      } else if (!few) {
        for (int64_t key = 0; key < block_reach; key += chunk) {
          const int64_t count = std::min(chunk, block_reach - key);
          if (!pack_once) pack_keys(keys + key * p_.k_row_stride, p_.k_row_stride, count, p_.dim, packed_.data());
          logits(q_.data(), ldq, block_count, packed_.data(), count, p_.dim, z + key, ldz);
        }
      }
      for (int64_t r = 0; r < block_count; ++r) {
        ScoreRow x = row_of(first + (begin + r) / group);
        x.head = kv_head * group + (begin + r) % group;
        x.z = z + r * ldz;
        x.reach = block_reach;
        row(x);
      }
      block(block_count, q_.data(), ldq, z, ldz, block_reach);
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

  // The logits of queries [first, last) for this head of keys and those up to kv_stop, as many as fit; false where that
  // is no gain.
  bool prepare(int64_t kv_head, int64_t kv_stop, int64_t first, int64_t last) {
    // Visits change the logits, so that they serve one each.
    if (kv_head == prepared_next_ && kv_head < prepared_last_ && first == prepared_query_) {
      ++prepared_next_;
      return true;
    }
    const int64_t reach = visible_end(last - 1), rows = (last - first) * p_.group();
    const int64_t ldq = padded(p_.dim), ldz = padded(reach) + kStrip;
    const int64_t heads = std::min(kv_stop - kv_head, std::max<int64_t>(kPackedFloats / (rows * ldz), 1));
    if (heads < 2 || p_.k_head_stride >= p_.k_row_stride) return false;
    prepared_first_ = kv_head;
    prepared_next_ = kv_head + 1;
    prepared_last_ = kv_head + heads;
    prepared_query_ = first;
    prepared_.resize(heads * rows * ldz);
    std::vector<float> queries(heads * rows * ldq);
    for (int64_t head = 0; head < heads; ++head) {
      widen_queries(kv_head + head, first, 0, rows, ldq, queries.data() + head * rows * ldq);
    }
    const T* keys =
        static_cast<const T*>(p_.k) + s_.k_offset + kv_head * p_.k_head_stride + window_start_ * p_.k_row_stride;
    for (int64_t key = 0; key < reach; key += kLanes) {
      for (int64_t head = 0; head < heads; ++head) {
        const Ahead ahead = beside_ahead<T>(p_.dim, p_.k_row_stride, p_.k_head_stride, head, heads);
        logits_few(queries.data() + head * rows * ldq, ldq, rows,
                   keys + key * p_.k_row_stride + head * p_.k_head_stride, p_.k_row_stride, ahead,
                   std::min(reach - key, kLanes), p_.dim, prepared_.data() + head * rows * ldz + key, ldz);
      }
    }
    return true;
  }

  // Rows [begin, begin + count) of the group's queries from `first` on, as float32.
  void widen_queries(int64_t kv_head, int64_t first, int64_t begin, int64_t count, int64_t ldq, float* out) const {
    const int64_t group = p_.group();
    for (int64_t r = 0; r < count; ++r) {
      const int64_t head = kv_head * group + (begin + r) % group, query = first + (begin + r) / group;
      const T* source = static_cast<const T*>(p_.q) + s_.q_offset + head * p_.q_head_stride + query * p_.q_row_stride;
      widen_row(source, p_.dim, ldq, out + r * ldq);
      // What an invalid query holds must reach nothing, not even as 0 times NaN.
      if (!valid(query)) std::fill_n(out + r * ldq, ldq, 0.0f);
    }
  }

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
  int64_t prepared_first_ = 0, prepared_next_ = 0, prepared_last_ = 0;  // heads of keys that prepare() took
  int64_t prepared_query_ = 0;                                          // the first of its queries
  std::vector<float> prepared_;                                         // [heads][rows][ldz], the logits
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

}  // namespace pyvtk::cpu::PYVTK_ISA
