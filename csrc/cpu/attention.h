// Attention of tokens to those that a plan lets them see.
//
// A tile is 16 queries, which stand along the lanes: logits [key][16 queries] are products of vectors of queries with
// single numbers of a key's row, read where it lies, so nothing of the keys is packed or gathered, and softmax adds and
// compares whole vectors. out[query][d] then sums vectors along d. Both are bounded by multiplications. Which keys a
// tile needs is found once for all heads (attention_keys.h). An item is a head of keys and a run of tiles: neighbouring
// tiles share keys, which stay in the cache.
#include "cpu/attention_keys.h"
#include "cpu/gemm.h"

namespace pyvtk::cpu::PYVTK_ISA {

// Keys worked on at a time. Logits of more would leave the first-level cache.
inline constexpr int64_t kChunk = 256;
// Arrays of a chunk are this much longer: the last keys are worked on in whole groups, with copies of the last one.
inline constexpr int64_t kSpare = 16;

// Keys that share a pass over d: one sum per key and vector of queries fills the registers.
inline constexpr int64_t kBothKeys = PYVTK_VECTOR_BYTES == 16 ? 3 : (PYVTK_VECTOR_BYTES == 32 ? 6 : 12);
inline constexpr int64_t kHalfKeys = PYVTK_VECTOR_BYTES == 16 ? 6 : 12;
// Queries and vectors along d that share a pass over keys, likewise.
inline constexpr int64_t kSumQueries = 4;
inline constexpr int64_t kSumVectors = 3;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^x for x <= 0; 0 below -126, NaN stays NaN. About 1 ulp: x = n + r with |r| <= 1/2, and a polynomial for 2^r.
PYVTK_INLINE vfloat exp2_of_negative(vfloat x) {
  const vfloat magic = splat(0x1.8p23f);
  const vfloat shifted = x + magic;  // n lies in the low mantissa bits
  const vfloat r = x - (shifted - magic);
  vfloat p = r * 0x1.41fbb8p-13f + 0x1.5f3e5cp-10f;
  p = p * r + 0x1.3b2d4ep-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e43p-1f;
  p = p * r + 1.0f;
  const vint power = (as_int(shifted) << 23) + splat(int32_t{127 << 23});
  return blend(x < splat(-126.0f), vfloat{}, p * as_float(power));
}

// log2 for normal x.
PYVTK_INLINE vfloat log2_of(vfloat x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1))
  const vint shifted = as_int(x) - splat(int32_t{0x3f3504f3});
  const vint n = shifted >> 23;
  const vfloat m = as_float((shifted & splat(int32_t{0x7fffff})) + splat(int32_t{0x3f3504f3}));
  const vfloat s = (m - 1.0f) / (m + 1.0f), square = s * s;
  vfloat p = square * (2.0f / 9) + (2.0f / 7);
  p = p * square + (2.0f / 5);
  p = p * square + (2.0f / 3);
  p = p * square + 2.0f;
  const vfloat result = p * s * kLog2E + __builtin_convertvector(n, vfloat);
  return blend(x != x, x, result);
}

// load and store of the first `count` lanes if not `whole`.
template <bool whole, class T>
PYVTK_INLINE vfloat load_lanes(const T* p, int64_t count) {
  if constexpr (whole) return load(p);
#if PYVTK_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>) {
    return reinterpret_cast<vfloat>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p));
  }
#endif
  return load_partial(p, count);
}
template <bool whole>
PYVTK_INLINE void store_lanes(float* p, vfloat x, int64_t count) {
  if constexpr (whole) {
    store(p, x);
  } else {
    store_partial(p, x, count);
  }
}

// f(vectors, whole, d) over pieces of a row of `dim` numbers; only the last may be less than a whole vector.
template <class F>
PYVTK_INLINE void for_pieces(int64_t dim, F&& f) {
  constexpr auto whole = std::true_type{};
  int64_t d = 0, left = dim / kLanes;
  for (; left >= kSumVectors && left != kSumVectors + 1; left -= kSumVectors, d += kSumVectors * kLanes) {
    f(std::integral_constant<int64_t, kSumVectors>{}, whole, d);
  }
  for (; left >= 2; left -= 2, d += 2 * kLanes) f(std::integral_constant<int64_t, 2>{}, whole, d);
  for (; left >= 1; --left, d += kLanes) f(std::integral_constant<int64_t, 1>{}, whole, d);
  if (d < dim) f(std::integral_constant<int64_t, 1>{}, std::false_type{}, d);
}

// sum[key][vector] = products of rows of keys with columns [dim][16] of queries.
template <int64_t keys, int64_t vectors>
PYVTK_INLINE void key_products(const float* const* rows, const float* columns, int64_t dim,
                               vfloat (&sum)[keys][vectors]) {
  const float* row[keys];
#pragma GCC unroll 12
  for (int64_t n = 0; n < keys; ++n) {
    row[n] = rows[n];
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) sum[n][c] = vfloat{};
  }
  for (int64_t d = 0; d < dim; ++d) {
    vfloat x[vectors];
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) x[c] = load(columns + d * kAttentionTile + c * kLanes);
#pragma GCC unroll 12
    for (int64_t n = 0; n < keys; ++n) {
      const vfloat y = splat(row[n][d]);
#pragma GCC unroll 4
      for (int64_t c = 0; c < vectors; ++c) sum[n][c] += y * x[c];
    }
  }
}

// f(first key, sums [keys][vectors]) over groups of keys. The last group may go beyond `count`, by less than kSpare.
template <int64_t keys, int64_t vectors, class F>
PYVTK_INLINE void for_key_products(const float* const* rows, int64_t count, const float* columns, int64_t dim, F&& f) {
  int64_t i = 0;
  for (; i + keys <= count; i += keys) {
    vfloat sum[keys][vectors];
    key_products<keys, vectors>(rows + i, columns, dim, sum);
    f(i, sum);
  }
  constexpr int64_t fewer = keys / 3;
  for (; i < count; i += fewer) {
    vfloat sum[fewer][vectors];
    key_products<fewer, vectors>(rows + i, columns, dim, sum);
    f(i, sum);
  }
}

// out[query] = out[query] * factor[query] + sum over i of p[i * kHalf + query] * rows[i][d...]; `fresh` leaves out the
// old value.
template <int64_t queries, int64_t vectors, bool whole>
PYVTK_INLINE void weighted_rows(const float* p, const float* const* rows, int64_t count, int64_t d, int64_t dim,
                                float* out, int64_t ldo, const float* factor, bool fresh) {
  vfloat sum[queries][vectors] = {};
  for (int64_t i = 0; i < count; ++i) {
    const float* row = rows[i] + d;
    vfloat x[vectors];
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) x[c] = load_lanes<whole>(row + c * kLanes, dim - d);
#pragma GCC unroll 8
    for (int64_t r = 0; r < queries; ++r) {
      const vfloat w = splat(p[i * kHalf + r]);
#pragma GCC unroll 4
      for (int64_t c = 0; c < vectors; ++c) sum[r][c] += w * x[c];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < queries; ++r) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) {
      float* to = out + r * ldo + d + c * kLanes;
      store(to, fresh ? sum[r][c] : load(to) * factor[r] + sum[r][c]);
    }
  }
}

// Keys of a chunk that the same queries need: the whole tile or one half.
struct KeyRun {
  const float* k[kChunk + kSpare];
  const float* v[kChunk + kSpare];
  int64_t key[kChunk + kSpare];
  uint32_t seen[kChunk + kSpare];
  float bias[kChunk + kSpare];  // times log2 e
  int64_t count;
  int64_t plain;  // of them at the front: seen by all queries

  void repeat_last() {
    if (count == 0) return;
    for (int64_t i = count; i < count + kSpare; ++i) {
      k[i] = k[count - 1];
      v[i] = v[count - 1];
      seen[i] = seen[count - 1];
      bias[i] = bias[count - 1];
    }
  }
};

// Keys and values of one head, as float32 rows, and chunks of those that a tile needs.
template <class T>
class KeyRows {
 public:
  explicit KeyRows(const AttentionProblem& p) : p_(p), pitch_(ceil_div(p.dim, kLanes) * kLanes) {
    if constexpr (!std::is_same_v<T, float>) {
      // Rows are widened when they are needed first: what nobody sees is not read.
      wide_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(2 * p.keys * pitch_));
      owner_.assign(static_cast<size_t>(p.keys), -1);
    }
  }

  void choose(int64_t b, int64_t kv_head) {
    b_ = b;
    head_ = b * p_.kv_heads + kv_head;
    k_ = p_.k.head<T>(b, kv_head);
    v_ = p_.v.head<T>(b, kv_head);
  }

  // The next keys of a tile from its entry `from` on, at most kChunk; returns the entry after them. Only queries in
  // `active` count; without_visual leaves out visual keys.
  int64_t gather(const AttentionTable& table, const AttentionTile& tile, int64_t from, uint32_t active,
                 bool without_visual, KeyRun (&runs)[3]) {
    const int64_t ends[3] = {tile.both, tile.both + tile.low, tile.both + tile.low + tile.high};
    const int32_t* rows = table.rows.data() + tile.first;
    const uint32_t* seen = table.seen.data() + tile.first;
    int64_t room = kChunk;
    for (int64_t kind = 0; kind < 3; ++kind) {
      KeyRun& run = runs[kind];
      run.count = run.plain = 0;
      for (; from < ends[kind] && room > 0; ++from) {
        if (without_visual && (seen[from] & kVisualKey)) continue;
        const int64_t key = rows[from], i = run.count++;
        run.seen[i] = seen[from] & (active | kVisualKey);
        run.plain += run.plain == i && (seen[from] & active) == active;
        run.key[i] = key;
        run.bias[i] = p_.k_bias ? p_.k_bias[b_ * p_.keys + key] * kLog2E : 0.0f;
        if constexpr (std::is_same_v<T, float>) {
          run.k[i] = k_ + key * p_.k.row_stride;
          run.v[i] = v_ + key * p_.v.row_stride;
        } else {
          widen(key);
          run.k[i] = wide_.get() + 2 * key * pitch_;
          run.v[i] = run.k[i] + pitch_;
        }
        --room;
      }
      run.repeat_last();
    }
    return from;
  }

 private:
  void widen(int64_t key) {
    if (owner_[static_cast<size_t>(key)] == head_) return;
    owner_[static_cast<size_t>(key)] = head_;
    float* to = wide_.get() + 2 * key * pitch_;
    widen_row(k_ + key * p_.k.row_stride, p_.dim, pitch_, to);
    widen_row(v_ + key * p_.v.row_stride, p_.dim, pitch_, to + pitch_);
  }

  const AttentionProblem& p_;
  int64_t pitch_;
  int64_t b_ = 0, head_ = 0;
  const T* k_ = nullptr;
  const T* v_ = nullptr;
  std::unique_ptr<float[]> wide_;  // [keys][key and value][pitch]
  std::vector<int64_t> owner_;     // [keys]: the head that wide_ has the row of
};

// Rows [16] of a tensor, nullptr for those that are not there, times `scale`, as columns [dim][16].
template <class T>
void tile_columns(const T* const* rows, int64_t dim, float scale, float* columns) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const int64_t width = std::min(kLanes, dim - d);
    for (int64_t c = 0; c < kTileVectors; ++c) {
      vfloat x[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const T* row = rows[c * kLanes + lane];
        x[lane] = !row ? vfloat{} : (width == kLanes ? load(row + d) : load_partial(row + d, width)) * scale;
      }
      transpose_level<1>(x);
      for (int64_t lane = 0; lane < width; ++lane) store(columns + (d + lane) * kAttentionTile + c * kLanes, x[lane]);
    }
  }
}

// Where float arrays start, so that their vectors do not straddle cache lines.
struct AttentionMemory {
  std::unique_ptr<float[]> memory;
  float* next;

  explicit AttentionMemory(int64_t floats)
      : memory(std::make_unique_for_overwrite<float[]>(static_cast<size_t>(floats + 16))) {
    next = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64 / sizeof(float);
  }
  float* take(int64_t floats) {
    float* result = next;
    next += floats;
    return result;
  }
};

template <class T>
class AttentionForward {
 public:
  explicit AttentionForward(const AttentionProblem& p)
      : p_(p), keys_(p), ldo_(ceil_div(p.dim, kLanes) * kLanes), memory_(floats(p)) {
    logits_[0] = memory_.take((kChunk + kSpare) * kHalf);
    logits_[1] = kHalves == 2 ? memory_.take((kChunk + kSpare) * kHalf) : nullptr;
    columns_ = memory_.take(p.group() * p.dim * kAttentionTile);
    sums_ = memory_.take(p.group() * ldo_ * kAttentionTile);
    largest_ = memory_.take(p.group() * kAttentionTile);
    total_ = memory_.take(p.group() * kAttentionTile);
  }

  void run(const AttentionTable& table, int64_t b, int64_t kv_head, int64_t tile_begin, int64_t tile_end) {
    keys_.choose(b, kv_head);
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      tile_rows(p_, b, tile, rows_);
      const AttentionTile& keys = table.tile(b, tile);
      visit(table, keys, b, kv_head, true, keys.valid);
      visit(table, keys, b, kv_head, false, keys.valid & ~(p_.zero_rows ? keys.visual : 0));
    }
  }

 private:
  static int64_t floats(const AttentionProblem& p) {
    const int64_t ldo = ceil_div(p.dim, kLanes) * kLanes;
    return (kChunk + kSpare) * kAttentionTile + p.group() * kAttentionTile * (p.dim + ldo + 2);
  }

  // The heads of the group that are on, or those that are off.
  void visit(const AttentionTable& table, const AttentionTile& tile, int64_t b, int64_t kv_head, bool on,
             uint32_t active) {
    const int64_t first = kv_head * p_.group(), last = first + p_.group();
    bool any = false;
    for (int64_t head = first; head < last; ++head) any |= p_.is_on(head) == on;
    if (!any) return;
    const int64_t entries = active ? tile.both + tile.low + tile.high : 0;
    bool fresh = true;
    for (int64_t at = 0; at < entries; fresh = false) {
      at = keys_.gather(table, tile, at, active, !on && !p_.keep_mass, runs_);
      for (int64_t head = first; head < last; ++head) {
        if (p_.is_on(head) == on) attend(b, head, head - first, active, fresh);
      }
    }
    for (int64_t head = first; head < last; ++head) {
      if (p_.is_on(head) == on) finish(b, head, head - first, entries ? active : 0);
    }
  }

  // One head's share of a chunk of keys.
  void attend(int64_t b, int64_t head, int64_t slot, uint32_t active, bool fresh) {
    float* columns = columns_ + slot * p_.dim * kAttentionTile;
    float* largest = largest_ + slot * kAttentionTile;
    float* total = total_ + slot * kAttentionTile;
    if (fresh) {
      const T* rows[kAttentionTile];
      for (int64_t i = 0; i < kAttentionTile; ++i) {
        rows[i] = active >> i & 1 ? p_.q.head<const T>(b, head) + rows_[i] * p_.q.row_stride : nullptr;
      }
      tile_columns(rows, p_.dim, p_.scale * kLog2E, columns);
    }
    vfloat best[kTileVectors];
    for (int64_t c = 0; c < kTileVectors; ++c) {
      best[c] = fresh ? splat(-kInfinity) : load(largest + c * kLanes);
    }
    logits_of<kTileVectors>(0, columns, best);
    if constexpr (kHalves == 2) {
      logits_of<kHalfVectors>(1, columns, best);
      logits_of<kHalfVectors>(2, columns + kHalf, best + kHalfVectors);
    }

    float factor[kAttentionTile];
    for (int64_t c = 0; c < kTileVectors; ++c) {
      const vfloat old = fresh ? splat(-kInfinity) : load(largest + c * kLanes);
      store(largest + c * kLanes, best[c]);
      best[c] = blend(best[c] == -kInfinity, vfloat{}, best[c]);
      const vfloat shrink = exp2_of_negative(old - best[c]);
      store(factor + c * kLanes, shrink);
      store(total + c * kLanes, fresh ? vfloat{} : load(total + c * kLanes) * shrink);
    }
    const bool text_only = p_.keep_mass && !p_.is_on(head);
    for (int64_t half = 0; half < kHalves; ++half) {
      const int64_t count = runs_[0].count + runs_[1 + half].count;
      probabilities(half, count, best + half * kHalfVectors, total + half * kHalf);
      // Values of keys in the order of the logits.
      std::copy_n(runs_[0].v, runs_[0].count, values_);
      std::copy_n(runs_[1 + half].v, runs_[1 + half].count, values_ + runs_[0].count);
      const int64_t used = text_only ? drop_visual(half) : count;
      float* sums = sums_ + (slot * kAttentionTile + half * kHalf) * ldo_;
      for_pieces(p_.dim, [&](auto vectors, auto whole, int64_t d) {
        for (int64_t i = 0; i < kHalf; i += kSumQueries) {
          weighted_rows<kSumQueries, vectors, whole>(logits_[half] + i, values_, used, d, p_.dim, sums + i * ldo_, ldo_,
                                                     factor + half * kHalf + i, fresh);
        }
      });
    }
  }

  // Logits of a run, in log2, and their maxima; `vectors` of queries start at `columns`.
  template <int64_t vectors>
  void logits_of(int64_t kind, const float* columns, vfloat* best) {
    constexpr int64_t kKeys = vectors == kTileVectors ? kBothKeys : kHalfKeys;
    const KeyRun& run = runs_[kind];
    const int64_t before = kind == 0 ? 0 : runs_[0].count;
    const int64_t first_vector = kind == 2 ? kHalfVectors : 0;
    vint bit[vectors];
    vfloat top[vectors];
    for (int64_t c = 0; c < vectors; ++c) {
      for (int64_t lane = 0; lane < kLanes; ++lane) bit[c][lane] = 1 << ((first_vector + c) * kLanes + lane);
      top[c] = best[c];
    }
    for_key_products<kKeys, vectors>(run.k, run.count, columns, p_.dim, [&](int64_t i, auto& sum) __attribute__((always_inline)) {
      constexpr int64_t keys = sizeof(sum) / sizeof(sum[0]);
      const bool masked = i + keys > run.plain;
#pragma GCC unroll 12
      for (int64_t n = 0; n < keys; ++n) {
        const vfloat bias = splat(run.bias[i + n]);
        const vint seen = splat(static_cast<int32_t>(run.seen[i + n]));
#pragma GCC unroll 4
        for (int64_t c = 0; c < vectors; ++c) {
          vfloat z = sum[n][c] + bias;
          if (masked) z = blend((seen & bit[c]) == bit[c], z, splat(-kInfinity));
          top[c] = vmax(z, top[c]);
          const int64_t vector = first_vector + c;
          store(logits_[vector / kHalfVectors] + (before + i + n) * kHalf + vector % kHalfVectors * kLanes, z);
        }
      }
    });
    for (int64_t c = 0; c < vectors; ++c) best[c] = top[c];
  }

  void probabilities(int64_t half, int64_t count, const vfloat* largest, float* total) {
    vfloat shift[kHalfVectors], sum[kHalfVectors] = {};
    for (int64_t c = 0; c < kHalfVectors; ++c) shift[c] = largest[c];
    float* z = logits_[half];
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kHalfVectors; ++c) {
        const vfloat p = exp2_of_negative(load(z + i * kHalf + c * kLanes) - shift[c]);
        sum[c] += p;
        store(z + i * kHalf + c * kLanes, p);
      }
    }
    for (int64_t c = 0; c < kHalfVectors; ++c) store(total + c * kLanes, load(total + c * kLanes) + sum[c]);
  }

  // Moves a half's probabilities and values of text keys to the front; returns their number.
  int64_t drop_visual(int64_t half) {
    int64_t used = 0, i = 0;
    for (const int64_t kind : {int64_t{0}, 1 + half}) {
      for (int64_t n = 0; n < runs_[kind].count; ++n, ++i) {
        if (runs_[kind].seen[n] & kVisualKey) continue;
        values_[used] = values_[i];
        std::copy_n(logits_[half] + i * kHalf, kHalf, logits_[half] + used * kHalf);
        ++used;
      }
    }
    return used;
  }

  void finish(int64_t b, int64_t head, int64_t slot, uint32_t active) {
    float factor[kAttentionTile] = {}, lse[kAttentionTile];
    std::fill_n(lse, kAttentionTile, -kInfinity);
    if (active) {
      for (int64_t c = 0; c < kTileVectors; ++c) {
        const vfloat total = load(total_ + slot * kAttentionTile + c * kLanes);
        const vfloat largest = load(largest_ + slot * kAttentionTile + c * kLanes);
        const vint seeing = bit_lanes(active, c) & (largest != -kInfinity);
        store(factor + c * kLanes, 1.0f / total);
        store(lse + c * kLanes, blend(seeing, (log2_of(total) + largest) * kLn2, splat(-kInfinity)));
      }
    }
    float* lse_head = p_.lse + (b * p_.q_heads + head) * p_.queries;
    for (int64_t i = 0; i < kAttentionTile; ++i) {
      if (rows_[i] < 0) continue;
      lse_head[rows_[i]] = lse[i];
      T* to = p_.out.head<T>(b, head) + rows_[i] * p_.out.row_stride;
      const float* from = sums_ + (slot * kAttentionTile + i) * ldo_;
      if (lse[i] == -kInfinity) {
        std::fill_n(to, p_.dim, from_float<T>(0.0f));
        continue;
      }
      int64_t d = 0;
      for (; d + kLanes <= p_.dim; d += kLanes) store(to + d, load(from + d) * factor[i]);
      for (; d < p_.dim; ++d) to[d] = from_float<T>(from[d] * factor[i]);
    }
  }

  const AttentionProblem& p_;
  KeyRows<T> keys_;
  int64_t ldo_;
  AttentionMemory memory_;
  float* logits_[2];  // per half: [kChunk + kSpare][kHalf], then probabilities
  float* columns_;    // [group][dim][16]: queries, scaled
  float* sums_;       // [group][16][ldo]
  float* largest_;    // [group][16]: logits so far, in log2
  float* total_;      // [group][16]: of 2^(logit - largest)
  KeyRun runs_[3];
  const float* values_[kChunk + kSpare];
  int32_t rows_[kAttentionTile];
};

// Items [begin, end) of a table: rows of the batch, heads of keys, parts of the tiles.
template <class T>
void attention_forward(const AttentionProblem& p, const AttentionTable& table, int64_t parts, int64_t begin,
                       int64_t end) {
  AttentionForward<T> work(p);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % parts, pair = item / parts, tiles = table.row_tiles();
    work.run(table, table.batch_begin + pair / p.kv_heads, pair % p.kv_heads, table.tile_begin + tiles * part / parts,
             table.tile_begin + tiles * (part + 1) / parts);
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
