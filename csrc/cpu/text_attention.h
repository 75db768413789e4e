// Attention of a few text rows at the end of a sequence: a decode step.
//
// Work is cut by sample and head of keys; the rows of a head's group share its keys and values. Three passes: logits of
// all keys, softmax along each row, sums of values. Logits of some heads are kept, which is little beside their keys.
// Where the heads of a token lie side by side in memory, keys and values are walked token by token, a run of tokens for
// all heads; else head by head. Neither changes the order of any sum, so where rows lie costs time, not bits.
//
// Bound by reading k and v. Vectors run along channels; runs of keys of which none exists are not read.
#include "cpu/gemm.h"
#include "cpu/text_attention_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

// Rows that walk the keys together; more take several walks.
inline constexpr int64_t kTextRows = 64;
// Floats of logits that are kept at a time: 8 MiB.
inline constexpr int64_t kTextLogits = int64_t{2} << 20;
// Values are added up for so many keys before they join the row's sum, so that rounding errors grow with the number of
// such runs. Whole vectors of keys.
inline constexpr int64_t kJoinedKeys = 256;

enum TextKey : int32_t { kHiddenKey, kTextKey, kVisualTextKey };

// What the keys of a sample are.
struct TextKeys {
  std::vector<int32_t> kinds;          // [padded(keys)], hidden behind the last one; empty: all are text
  std::vector<uint32_t> exist, texts;  // a bit for each key of a vector: those that exist, the text among them
  std::vector<int64_t> ends;           // [queries]: no key from here on is seen
};

inline TextKeys text_keys(const TextAttentionProblem& p, int64_t b) {
  TextKeys result;
  const bool* exists = p.k_mask ? p.k_mask + b * p.keys : nullptr;
  const bool* visual = p.visual && p.visual_heads ? p.visual + b * p.keys : nullptr;
  const float* bias = p.k_bias ? p.k_bias + b * p.keys : nullptr;
  std::vector<int32_t>& kinds = result.kinds;
  if (exists || visual || p.key_slots || bias) {
    kinds.assign(padded(p.keys), kHiddenKey);
    std::fill_n(kinds.begin(), p.keys, p.key_slots && !p.added_keys ? kHiddenKey : kTextKey);
    const int32_t* slots = p.key_slots ? p.key_slots + b * kSlotFields * p.slots : nullptr;
    for (int64_t slot = 0; slots && slot < p.slots; ++slot) {
      const int32_t row = slots[kSlotRow * p.slots + slot], image = slots[kSlotImage * p.slots + slot];
      if (row < 0 || row >= p.keys) continue;
      kinds[row] = image == kInvalidToken ? kHiddenKey : image == kTextToken ? kTextKey : kVisualTextKey;
    }
    for (int64_t key = 0; visual && key < p.keys; ++key) kinds[key] = visual[key] ? kVisualTextKey : kTextKey;
    for (int64_t key = 0; exists && key < p.keys; ++key) kinds[key] = exists[key] ? kinds[key] : kHiddenKey;
  }
  // The rows are the last keys that exist.
  result.ends.assign(p.queries, 0);
  int64_t key = p.keys;
  for (int64_t query = p.queries - 1; query >= 0; --query, --key) {
    if (p.key_slots) {  // one row, behind all keys
      result.ends[query] = p.keys;
      continue;
    }
    while (key > 0 && !kinds.empty() && kinds[key - 1] == kHiddenKey) --key;
    if (key <= 0) break;
    result.ends[query] = key;
  }
  if (kinds.empty()) return result;
  for (key = 0; bias && key < p.keys; ++key) {
    if (bias[key] == -std::numeric_limits<float>::infinity()) kinds[key] = kHiddenKey;
  }
  result.exist.assign(ceil_div(p.keys, kLanes), 0);
  result.texts = result.exist;
  for (key = 0; key < p.keys; ++key) {
    result.exist[key / kLanes] |= static_cast<uint32_t>(kinds[key] != kHiddenKey) << key % kLanes;
    result.texts[key / kLanes] |= static_cast<uint32_t>(kinds[key] == kTextKey) << key % kLanes;
  }
  return result;
}

// sum[row][part] += p[row][key] * v[key], over the keys of one vector that `wanted` names, for some vectors of
// channels; a single row takes even and odd keys apart, which hides the latency of its additions.
template <int64_t rows, int64_t vectors, bool whole, class T>
PYVTK_INLINE void add_values(const float* p, int64_t ldp, const T* v, int64_t stride, uint32_t wanted, int64_t left,
                             float* sum, int64_t lds) {
  constexpr int64_t kParts = rows == 1 ? 2 : 1;
  vfloat part[rows][kParts][vectors];
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kParts; ++i) {
#pragma GCC unroll 4
      for (int64_t n = 0; n < vectors; ++n) part[r][i][n] = load(sum + (r * 3 + i) * lds + n * kLanes);
    }
  }
  const auto add = [&](int64_t key, int64_t i) __attribute__((always_inline)) {
    vfloat x[vectors];
#pragma GCC unroll 4
    for (int64_t n = 0; n < vectors; ++n) {
      x[n] = whole ? load(v + key * stride + n * kLanes) : load_partial(v + key * stride, left);
    }
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const vfloat weight = splat(p[r * ldp + key]);
#pragma GCC unroll 4
      for (int64_t n = 0; n < vectors; ++n) part[r][i][n] += weight * x[n];
    }
  };
  if (wanted == (uint32_t{1} << kLanes) - 1) {
    for (int64_t key = 0; key < kLanes; key += kParts) {
#pragma GCC unroll 2
      for (int64_t i = 0; i < kParts; ++i) add(key + i, i);
    }
  } else {
    for (; wanted; wanted &= wanted - 1) {
      const int64_t key = std::countr_zero(wanted);
      if (kParts == 2 && key % 2) {
        add(key, kParts - 1);
      } else {
        add(key, 0);
      }
    }
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kParts; ++i) {
#pragma GCC unroll 4
      for (int64_t n = 0; n < vectors; ++n) store(sum + (r * 3 + i) * lds + n * kLanes, part[r][i][n]);
    }
  }
}

// The same for all channels; sum [rows][3][lds], of which the last part stays.
template <int64_t rows, class T>
PYVTK_INLINE void add_values_of_rows(const float* p, int64_t ldp, const T* v, int64_t stride, uint32_t wanted,
                                     int64_t dim, float* sum, int64_t lds) {
  constexpr int64_t kVectors = rows <= 2 ? 4 : 2;
  int64_t d = 0;
  for (; d + kVectors * kLanes <= dim; d += kVectors * kLanes) {
    add_values<rows, kVectors, true>(p, ldp, v + d, stride, wanted, 0, sum + d, lds);
  }
  for (; d + kLanes <= dim; d += kLanes) add_values<rows, 1, true>(p, ldp, v + d, stride, wanted, 0, sum + d, lds);
  if (d < dim) add_values<rows, 1, false>(p, ldp, v + d, stride, wanted, dim - d, sum + d, lds);
}

// Some rows of some heads of keys of one sample.
template <class T>
class TextAttention {
 public:
  TextAttention(const TextAttentionProblem& problem, int64_t b)
      : p_(problem), b_(b), keys_(text_keys(problem, b)), ld_(padded(p_.dim)), ldz_(padded(p_.keys) + kStrip) {}

  // Heads of keys [begin, end).
  void run(int64_t begin, int64_t end) {
    const int64_t rows = p_.queries * p_.group();
    for (int64_t row = 0; row < rows; row += kTextRows) {
      const int64_t count = std::min(kTextRows, rows - row);
      const bool apart = !side_by_side(p_.k) && !side_by_side(p_.v);
      const int64_t at_once = apart ? 1 : std::max<int64_t>(kTextLogits / (count * ldz_), 1);
      for (int64_t head = begin; head < end; head += at_once) {
        some(head, std::min(at_once, end - head), row, count);
      }
    }
  }

 private:
  static bool side_by_side(const AttentionRows& x) { return x.head_stride < x.row_stride; }

  int64_t head_of(int64_t kv_head, int64_t row) const { return kv_head * p_.group() + row % p_.group(); }
  bool is_on(int64_t head) const { return !p_.visual_heads || p_.visual_heads[head]; }

  // Calls f(head, vector of keys, the keys of it that are wanted, the first one's row, ahead) for those that have any.
  template <class F>
  void walk(const AttentionRows& x, int64_t first_head, int64_t heads, int64_t end, const uint32_t* const* wanted,
            F&& f) const {
    const int64_t vectors = ceil_div(end, kLanes);
    const auto visit = [&](int64_t head, int64_t vector, Ahead ahead) {
      const int64_t left = std::min(end - vector * kLanes, kLanes);
      uint32_t some = (uint32_t{1} << left) - 1;
      if (wanted[head]) some &= wanted[head][vector];
      if (some) f(head, vector, some, x.head<const T>(b_, first_head + head) + vector * kLanes * x.row_stride, ahead);
    };
    if (!side_by_side(x)) {
      for (int64_t head = 0; head < heads; ++head) {
        for (int64_t vector = 0; vector < vectors; ++vector) visit(head, vector, rows_ahead<T>());
      }
      return;
    }
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t head = 0; head < heads; ++head) {
        visit(head, vector, beside_ahead<T>(p_.dim, x.row_stride, x.head_stride, head, heads));
      }
    }
  }

  void some(int64_t first_head, int64_t heads, int64_t first_row, int64_t rows) {
    const int64_t group = p_.group();
    const int64_t end = keys_.ends[(first_row + rows - 1) / group];
    q_.resize(heads * rows * ld_);
    z_.resize(heads * rows * ldz_);
    sums_.assign(heads * rows * 3 * ld_, 0.0f);
    factors_.assign(heads * rows, 0.0f);
    // Heads that are off need no visual values, and with the mass dropped no visual keys.
    std::vector<const uint32_t*> wanted_keys(heads, nullptr), wanted_values(heads, nullptr);
    for (int64_t head = 0; head < heads; ++head) {
      bool on = false;
      for (int64_t r = 0; r < rows; ++r) {
        on |= is_on(head_of(first_head + head, first_row + r));
        widen_row(query(first_head + head, first_row + r), p_.dim, ld_, q_.data() + (head * rows + r) * ld_);
      }
      if (keys_.kinds.empty()) continue;
      wanted_keys[head] = (on || p_.keep_mass ? keys_.exist : keys_.texts).data();
      wanted_values[head] = (on ? keys_.exist : keys_.texts).data();
    }
    walk(p_.k, first_head, heads, end, wanted_keys.data(),
         [&](int64_t head, int64_t vector, uint32_t, const T* keys, Ahead ahead) {
           const int64_t key = vector * kLanes;
           logits_few(q_.data() + head * rows * ld_, ld_, rows, keys, p_.k.row_stride, ahead,
                      std::min(end - key, kLanes), p_.dim, z_.data() + head * rows * ldz_ + key, ldz_);
         });
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t r = 0; r < rows; ++r) softmax(first_head + head, first_row + r, head * rows + r, end);
    }
    const int64_t vectors = ceil_div(end, kLanes), joined = kJoinedKeys / kLanes;
    std::vector<int64_t> run(heads, 0);  // that the sums of values are of
    walk(p_.v, first_head, heads, end, wanted_values.data(),
         [&](int64_t head, int64_t vector, uint32_t wanted, const T* values, Ahead ahead) {
           if (vector / joined != run[head]) join(head * rows, rows);
           run[head] = vector / joined;
           constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
           for (int64_t key = 0; key < kLanes && vector + 1 < vectors; ++key) {
             const T* to = values + key * p_.v.row_stride + (key < kLanes / 2 ? ahead.early : ahead.late);
             for (int64_t d = 0; d < p_.dim; d += kLine) __builtin_prefetch(to + d);
           }
           int64_t row = 0;
           const auto add = [&](auto tile, int64_t r) {
             const int64_t at = head * rows + r;
             add_values_of_rows<tile>(z_.data() + at * ldz_ + vector * kLanes, ldz_, values, p_.v.row_stride, wanted,
                                      p_.dim, sums_.data() + at * 3 * ld_, ld_);
           };
           for (; row + 4 <= rows; row += 4) add(std::integral_constant<int64_t, 4>{}, row);
           remaining_rows<3>(row, rows - row, add);
         });
    join(0, heads * rows);
    for (int64_t head = 0; head < heads; ++head) {
      for (int64_t r = 0; r < rows; ++r) write(first_head + head, first_row + r, head * rows + r);
    }
  }

  const T* query(int64_t kv_head, int64_t row) const {
    return p_.q.head<const T>(b_, head_of(kv_head, row)) + row / p_.group() * p_.q.row_stride;
  }

  // Turns the row's logits into exponentials, with zeros up to `end`.
  void softmax(int64_t kv_head, int64_t row, int64_t at, int64_t end) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const int64_t head = head_of(kv_head, row), query = row / p_.group(), count = keys_.ends[query];
    const bool off = !is_on(head);
    const int32_t* kinds = keys_.kinds.empty() ? nullptr : keys_.kinds.data();
    const float* bias = p_.k_bias ? p_.k_bias + b_ * p_.keys : nullptr;
    float* z = z_.data() + at * ldz_;
    vfloat largest = splat(-kInfinity);
    for (int64_t j = 0; j < count; j += kLanes) {
      vfloat x = load(z + j) * p_.scale;
      if (bias) x += j + kLanes <= count ? load(bias + j) : load_partial(bias + j, count - j);
      if (kinds) {
        const vint kind = load(kinds + j);
        x = blend(off && !p_.keep_mass ? kind == splat(int32_t{kTextKey}) : kind != splat(int32_t{kHiddenKey}), x,
                  splat(-kInfinity));
      }
      if (j + kLanes > count) {
        for (int64_t lane = count - j; lane < kLanes; ++lane) x[lane] = -kInfinity;
      }
      store(z + j, x);
      largest = vmax(x, largest);
    }
    const float most = reduce_max(largest), shift = most == -kInfinity ? 0.0f : most;
    vfloat sum[4] = {};  // short sums round less
    for (int64_t j = 0; j < count; j += kLanes) {
      vfloat e = vexp(load(z + j) - shift);
      sum[(j / kLanes) & 3] += e;
      if (kinds && off) e = blend(load(kinds + j) == splat(int32_t{kTextKey}), e, vfloat{});
      store(z + j, e);
    }
    for (int64_t j = ceil_div(count, kLanes) * kLanes; j < end; j += kLanes) store(z + j, vfloat{});
    const float total = reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
    factors_[at] = total == 0.0f ? 0.0f : 1.0f / total;
    p_.lse[(b_ * p_.q_heads + head) * p_.queries + query] = total == 0.0f ? -kInfinity : shift + std::log(total);
  }

  // Sums of the last keys join those of all.
  void join(int64_t first, int64_t rows) {
    for (int64_t at = first; at < first + rows; ++at) {
      float* sum = sums_.data() + at * 3 * ld_;
      for (int64_t d = 0; d < ld_; d += kLanes) {
        store(sum + 2 * ld_ + d, load(sum + 2 * ld_ + d) + (load(sum + d) + load(sum + ld_ + d)));
        store(sum + d, vfloat{});
        store(sum + ld_ + d, vfloat{});
      }
    }
  }

  void write(int64_t kv_head, int64_t row, int64_t at) const {
    T* to = p_.out.head<T>(b_, head_of(kv_head, row)) + row / p_.group() * p_.out.row_stride;
    const float* sum = sums_.data() + (at * 3 + 2) * ld_;
    for (int64_t d = 0; d < p_.dim; ++d) to[d] = from_float<T>(factors_[at] == 0.0f ? 0.0f : sum[d] * factors_[at]);
  }

  const TextAttentionProblem& p_;
  const int64_t b_;
  const TextKeys keys_;
  const int64_t ld_, ldz_;
  std::vector<float> q_;        // [heads][rows][ld]
  std::vector<float> z_;        // [heads][rows][ldz]
  std::vector<float> sums_;     // [heads][rows][3][ld]: of even and odd keys, of all before
  std::vector<float> factors_;  // [heads][rows]
};

// Items [begin, end) of batch * kv_heads.
template <class T>
void text_attention(const TextAttentionProblem& p, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t b = begin / p.kv_heads, stop = std::min((b + 1) * p.kv_heads, end);
    TextAttention<T>(p, b).run(begin - b * p.kv_heads, stop - b * p.kv_heads);
    begin = stop;
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
