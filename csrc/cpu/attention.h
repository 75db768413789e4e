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

// Some of a tile's keys, those that the same queries need: the whole tile or one half.
struct KeyRun {
  const int32_t* row;
  const uint32_t* seen;
  int64_t count;
  int64_t plain;  // of them at the front: seen by all queries
};

// Float32 rows of one head.
struct FloatRows {
  const float* data;
  int64_t stride;

  PYVTK_INLINE const float* operator[](int64_t row) const { return data + row * stride; }
};

// sum[key][vector] = products of the first rows of a run with columns [dim][16] of queries.
template <int64_t keys, int64_t vectors>
PYVTK_INLINE void key_products(FloatRows rows, const int32_t* number, const float* columns, int64_t dim,
                               vfloat (&sum)[keys][vectors]) {
  const float* row[keys];
#pragma GCC unroll 12
  for (int64_t n = 0; n < keys; ++n) {
    row[n] = rows[number[n]];
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) sum[n][c] = vfloat{};
  }
#pragma GCC unroll 4
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

// The same over a whole row. Short sums keep errors down, the more so where products are rounded before they are added.
template <int64_t keys, int64_t vectors>
PYVTK_INLINE void key_sums(FloatRows rows, const int32_t* number, const float* columns, int64_t dim,
                           vfloat (&sum)[keys][vectors]) {
  constexpr int64_t kPart = PYVTK_VECTOR_BYTES == 16 ? 32 : 128;
  key_products<keys, vectors>(rows, number, columns, std::min(dim, kPart), sum);
  for (int64_t d = kPart; d < dim; d += kPart) {
    vfloat more[keys][vectors];
    key_products<keys, vectors>({rows.data + d, rows.stride}, number, columns + d * kAttentionTile,
                                std::min(dim - d, kPart), more);
#pragma GCC unroll 12
    for (int64_t n = 0; n < keys; ++n) {
#pragma GCC unroll 4
      for (int64_t c = 0; c < vectors; ++c) sum[n][c] += more[n][c];
    }
  }
}

// f(first key, sums [keys][vectors]) over groups of a run's keys.
template <int64_t keys, int64_t vectors, class F>
PYVTK_INLINE void for_key_products(FloatRows rows, const KeyRun& run, const float* columns, int64_t dim, F&& f) {
  const auto group = [&](auto count, int64_t i) __attribute__((always_inline)) {
    vfloat sum[count][vectors];
    key_sums<count, vectors>(rows, run.row + i, columns, dim, sum);
    f(i, sum);
  };
  int64_t i = 0;
  for (; i + keys <= run.count; i += keys) group(std::integral_constant<int64_t, keys>{}, i);
  if constexpr (keys > 6) {
    for (; i + 4 <= run.count; i += 4) group(std::integral_constant<int64_t, 4>{}, i);
    remaining_rows<3>(i, run.count - i, group);
  } else {
    remaining_rows<keys - 1>(i, run.count - i, group);
  }
}

// out[query] = out[query] * factor[query] + sum over keys of p[key * kHalf + query] * row of the key [d...], over keys
// of two runs; `fresh` leaves out the old value.
template <int64_t queries, int64_t vectors, bool whole>
PYVTK_INLINE void weighted_rows(const float* p, FloatRows rows, const KeyRun& first, const KeyRun& second, int64_t d,
                                int64_t dim, float* out, int64_t ldo, const float* factor, bool fresh) {
  vfloat sum[queries][vectors] = {};
  const float* data = rows.data + d;
  const auto add = [&](const KeyRun& run) __attribute__((always_inline)) {
    for (int64_t i = 0; i < run.count; ++i, p += kHalf) {
      const float* row = data + run.row[i] * rows.stride;
      vfloat x[vectors];
#pragma GCC unroll 4
      for (int64_t c = 0; c < vectors; ++c) x[c] = load_lanes<whole>(row + c * kLanes, dim - d);
#pragma GCC unroll 8
      for (int64_t r = 0; r < queries; ++r) {
        const vfloat w = splat(p[r]);
#pragma GCC unroll 4
        for (int64_t c = 0; c < vectors; ++c) sum[r][c] += w * x[c];
      }
    }
  };
  add(first);
  add(second);
#pragma GCC unroll 8
  for (int64_t r = 0; r < queries; ++r) {
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) {
      float* to = out + r * ldo + d + c * kLanes;
      store(to, fresh ? sum[r][c] : load(to) * factor[r] + sum[r][c]);
    }
  }
}

// Keys of a tile in chunks; of some of them only, if asked to.
class KeyChunk {
 public:
  KeyRun runs[3];  // that both halves need, the low one, the high one

  // The next keys of a tile from its entry `from` on; returns the entry after them. Only queries in `active` count;
  // without_visual leaves out visual keys.
  int64_t next(const AttentionTable& table, const AttentionTile& tile, int64_t from, uint32_t active,
               bool without_visual) {
    const int64_t ends[3] = {tile.both, tile.both + tile.low, tile.both + tile.low + tile.high};
    const int32_t* rows = table.rows.data() + tile.first;
    const uint32_t* seen = table.seen.data() + tile.first;
    const bool some = without_visual || active != tile.valid;
    int64_t used = 0;
    for (int64_t kind = 0; kind < 3; ++kind) {
      KeyRun& run = runs[kind];
      if (some) {
        run = {rows_ + used, seen_ + used, 0, 0};
        for (; from < ends[kind] && used < kChunk; ++from) {
          if (without_visual && (seen[from] & kVisualKey)) continue;
          rows_[used] = rows[from];
          seen_[used++] = seen[from] & (active | kVisualKey);
          ++run.count;
        }
      } else {
        run = {rows + from, seen + from, std::max<int64_t>(std::min(ends[kind] - from, kChunk - used), 0), 0};
        used += run.count;
        from += run.count;
      }
      while (kind == 0 && run.plain < run.count && (run.seen[run.plain] & active) == active) ++run.plain;
    }
    return from;
  }

 private:
  int32_t rows_[kChunk];
  uint32_t seen_[kChunk];
};

// Keys and values of one head as float32.
template <class T>
class KeyRows {
 public:
  FloatRows k, v;

  explicit KeyRows(const AttentionProblem& p) : p_(p), pitch_(ceil_div(p.dim, kLanes) * kLanes) {
    if constexpr (!std::is_same_v<T, float>) {
      wide_ = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(2 * p.keys * pitch_));
      owner_.assign(static_cast<size_t>(p.keys), -1);
    }
  }

  // For tiles that need `entries` rows, counted as often as they need them. Many: all are widened, in the order of
  // memory. Few: when they are needed first.
  void choose(int64_t b, int64_t kv_head, int64_t entries) {
    head_ = b * p_.kv_heads + kv_head;
    k_ = p_.k.head<T>(b, kv_head);
    v_ = p_.v.head<T>(b, kv_head);
    if constexpr (std::is_same_v<T, float>) {
      k = {k_, p_.k.row_stride};
      v = {v_, p_.v.row_stride};
    } else {
      k = {wide_.get(), 2 * pitch_};
      v = {wide_.get() + pitch_, 2 * pitch_};
      for (int64_t key = 0; key < p_.keys && entries >= p_.keys; ++key) widen(key);
    }
  }

  void need(const KeyChunk& chunk) {
    if constexpr (!std::is_same_v<T, float>) {
      for (const KeyRun& run : chunk.runs) {
        for (int64_t i = 0; i < run.count; ++i) widen(run.row[i]);
      }
    }
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
  int64_t head_ = 0;
  const T* k_ = nullptr;
  const T* v_ = nullptr;
  std::unique_ptr<float[]> wide_;  // [keys][key and value][pitch]
  std::vector<int64_t> owner_;     // [keys]: the head that wide_ has the row of
};

#if PYVTK_VECTOR_BYTES == 32
// Eight numbers of eight rows, transposed; halves of rows are joined while they are loaded.
PYVTK_INLINE void load_transposed(const float* const* row, int64_t d, vfloat* x) {
  const auto pair = [&](int64_t i, int64_t at) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row[i] + d + at)),
                                _mm_loadu_ps(row[i + 4] + d + at), 1);
  };
#pragma GCC unroll 2
  for (int64_t at = 0; at < 8; at += 4) {
    const __m256 a = pair(0, at), b = pair(1, at), c = pair(2, at), e = pair(3, at);
    const __m256 ab = _mm256_unpacklo_ps(a, b), ba = _mm256_unpackhi_ps(a, b);
    const __m256 ce = _mm256_unpacklo_ps(c, e), ec = _mm256_unpackhi_ps(c, e);
    x[at] = reinterpret_cast<vfloat>(_mm256_shuffle_ps(ab, ce, 0x44));
    x[at + 1] = reinterpret_cast<vfloat>(_mm256_shuffle_ps(ab, ce, 0xee));
    x[at + 2] = reinterpret_cast<vfloat>(_mm256_shuffle_ps(ba, ec, 0x44));
    x[at + 3] = reinterpret_cast<vfloat>(_mm256_shuffle_ps(ba, ec, 0xee));
  }
}
#else
PYVTK_INLINE void load_transposed(const float* const* row, int64_t d, vfloat* x) {
#pragma GCC unroll 16
  for (int64_t lane = 0; lane < kLanes; ++lane) x[lane] = load(row[lane] + d);
  transpose_level<1>(x);
}
#endif

// Rows [16] of `padded_dim` numbers, times `scale`, as columns [padded_dim][16].
inline void tile_columns(const float* const* rows, int64_t padded_dim, float scale, float* columns) {
  for (int64_t d = 0; d < padded_dim; d += kLanes) {
    for (int64_t c = 0; c < kTileVectors; ++c) {
      vfloat x[kLanes];
      load_transposed(rows + c * kLanes, d, x);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        store(columns + (d + lane) * kAttentionTile + c * kLanes, x[lane] * scale);
      }
    }
  }
}

// The rows of a tile's queries as float32, where they are or in `wide` [16][padded_dim]; those not in `active` are
// `zeros`. `wide` is used if rows are 16-bit or no whole vectors.
template <class T>
void tile_floats(const T* head, int64_t row_stride, const int32_t* number, uint32_t active, int64_t dim,
                 int64_t padded_dim, float* wide, const float* zeros, const float** rows) {
  for (int64_t i = 0; i < kAttentionTile; ++i) {
    rows[i] = zeros;
    if (!(active >> i & 1)) continue;
    const T* row = head + number[i] * row_stride;
    if constexpr (std::is_same_v<T, float>) {
      if (dim == padded_dim) {
        rows[i] = row;
        continue;
      }
    }
    widen_row(row, dim, padded_dim, wide + i * padded_dim);
    rows[i] = wide + i * padded_dim;
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

// to = factor * from
template <class T>
PYVTK_INLINE void store_row(const float* from, float factor, int64_t dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * factor);
  for (; d < dim; ++d) to[d] = from_float<T>(from[d] * factor);
}

// One tile's attention, of one head at a time: what does not depend on the type of elements.
class TileForward {
 protected:
  explicit TileForward(const AttentionProblem& p)
      : dim_(p.dim), ldo_(ceil_div(p.dim, kLanes) * kLanes), memory_(floats(p)) {
    for (float*& logits : logits_) logits = memory_.take(kChunk * kHalf);
    wide_ = memory_.take(kAttentionTile * ldo_);
    zeros_ = memory_.take(ldo_);
    columns_ = memory_.take(p.group() * ldo_ * kAttentionTile);
    sums_ = memory_.take(p.group() * ldo_ * kAttentionTile);
    largest_ = memory_.take(p.group() * kAttentionTile);
    total_ = memory_.take(p.group() * kAttentionTile);
    std::fill_n(zeros_, ldo_, 0.0f);
  }

  // One head's share of a chunk of keys.
  __attribute__((noinline)) void attend(int64_t slot, bool text_only, bool fresh) {
    const float* columns = columns_ + slot * ldo_ * kAttentionTile;
    float* largest = largest_ + slot * kAttentionTile;
    float* total = total_ + slot * kAttentionTile;
    vfloat best[kTileVectors];
    for (int64_t c = 0; c < kTileVectors; ++c) best[c] = fresh ? splat(-kInfinity) : load(largest + c * kLanes);
    logits_of<kTileVectors>(0, columns, best);
    if constexpr (kHalves == 2) {
      logits_of<kHalfVectors>(1, columns, best);
      logits_of<kHalfVectors>(2, columns + kHalf, best + kHalfVectors);
    }

    float factor[kAttentionTile];
    for (int64_t c = 0; c < kTileVectors; ++c) {
      const vfloat old = fresh ? splat(-kInfinity) : load(largest + c * kLanes);
      store(largest + c * kLanes, best[c]);
      best[c] = blend(best[c] == splat(-kInfinity), vfloat{}, best[c]);
      const vfloat shrink = exp2_of_negative(old - best[c]);
      store(factor + c * kLanes, shrink);
      store(total + c * kLanes, fresh ? vfloat{} : load(total + c * kLanes) * shrink);
    }
    for (int64_t half = 0; half < kHalves; ++half) {
      KeyRun common = chunk_.runs[0], own = chunk_.runs[1 + half];
      probabilities(half, common.count + own.count, best + half * kHalfVectors, total + half * kHalf);
      if (text_only) keep_text(half, common, own);
      float* sums = sums_ + (slot * kAttentionTile + half * kHalf) * ldo_;
      for_pieces(dim_, [&](auto vectors, auto whole, int64_t d) {
        for (int64_t i = 0; i < kHalf; i += kSumQueries) {
          weighted_rows<kSumQueries, vectors, whole>(logits_[half] + i, v_, common, own, d, dim_, sums + i * ldo_, ldo_,
                                                     factor + half * kHalf + i, fresh);
        }
      });
    }
  }

  // Logits of a run, in log2, and their maxima; `vectors` of queries start at `columns`.
  template <int64_t vectors>
  void logits_of(int64_t kind, const float* columns, vfloat* best) {
    constexpr int64_t kKeys = vectors == kTileVectors ? kBothKeys : kHalfKeys;
    const KeyRun& run = chunk_.runs[kind];
    const int64_t before = kind == 0 ? 0 : chunk_.runs[0].count;
    const int64_t first_vector = kind == 2 ? kHalfVectors : 0;
    vint bit[vectors];
    vfloat top[vectors];
    for (int64_t c = 0; c < vectors; ++c) {
      bit[c] = single_bits(first_vector + c);
      top[c] = best[c];
    }
    for_key_products<kKeys, vectors>(k_, run, columns, dim_, [&](int64_t i, auto& sum) __attribute__((always_inline)) {
      constexpr int64_t keys = sizeof(sum) / sizeof(sum[0]);
      const bool masked = i + keys > run.plain;
#pragma GCC unroll 12
      for (int64_t n = 0; n < keys; ++n) {
        const vfloat bias = splat(bias_ ? bias_[run.row[i + n]] * kLog2E : 0.0f);
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

  // Moves a half's probabilities and rows of text keys to the front.
  void keep_text(int64_t half, KeyRun& common, KeyRun& own) {
    int64_t used = 0, i = 0;
    for (KeyRun* run : {&common, &own}) {
      const int64_t first = used;
      for (int64_t n = 0; n < run->count; ++n, ++i) {
        if (run->seen[n] & kVisualKey) continue;
        text_[used] = run->row[n];
        std::copy_n(logits_[half] + i * kHalf, kHalf, logits_[half] + used * kHalf);
        ++used;
      }
      *run = {text_ + first, nullptr, used - first, 0};
    }
  }

  int64_t dim_, ldo_;
  AttentionMemory memory_;
  float* logits_[kHalves];  // [kChunk][kHalf], then probabilities
  float* wide_;             // [16][ldo]
  float* zeros_;            // [ldo]
  float* columns_;          // [group][ldo][16]: queries, scaled
  float* sums_;             // [group][16][ldo]
  float* largest_;          // [group][16]: logits so far, in log2
  float* total_;            // [group][16]: of 2^(logit - largest)
  FloatRows k_, v_;
  const float* bias_ = nullptr;
  KeyChunk chunk_;
  int32_t text_[kChunk];

 private:
  static int64_t floats(const AttentionProblem& p) {
    const int64_t ldo = ceil_div(p.dim, kLanes) * kLanes;
    return 2 * kChunk * kHalf + (kAttentionTile + 1) * ldo + p.group() * kAttentionTile * (2 * ldo + 2);
  }
};

template <class T>
class AttentionForward : TileForward {
 public:
  explicit AttentionForward(const AttentionProblem& p) : TileForward(p), p_(p), keys_(p) {}

  void run(const AttentionTable& table, int64_t b, int64_t kv_head, int64_t tile_begin, int64_t tile_end) {
    keys_.choose(b, kv_head, table.entries(b, tile_begin, tile_end));
    k_ = keys_.k;
    v_ = keys_.v;
    bias_ = p_.k_bias ? p_.k_bias + b * p_.keys : nullptr;
    for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
      tile_rows(p_, b, tile, rows_);
      const AttentionTile& keys = table.tile(b, tile);
      visit(table, keys, b, kv_head, true, keys.valid);
      visit(table, keys, b, kv_head, false, keys.valid & ~(p_.zero_rows ? keys.visual : 0));
    }
  }

 private:
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
      at = chunk_.next(table, tile, at, active, !on && !p_.keep_mass);
      keys_.need(chunk_);
      for (int64_t head = first; head < last; ++head) {
        if (p_.is_on(head) != on) continue;
        if (fresh) load_queries(b, head, head - first, active);
        attend(head - first, !on && p_.keep_mass, fresh);
      }
    }
    for (int64_t head = first; head < last; ++head) {
      if (p_.is_on(head) == on) finish(b, head, head - first, entries ? active : 0);
    }
  }

  void load_queries(int64_t b, int64_t head, int64_t slot, uint32_t active) {
    const float* rows[kAttentionTile];
    tile_floats(p_.q.head<const T>(b, head), p_.q.row_stride, rows_, active, p_.dim, ldo_, wide_, zeros_, rows);
    tile_columns(rows, ldo_, p_.scale * kLog2E, columns_ + slot * ldo_ * kAttentionTile);
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
      } else {
        store_row(from, factor[i], p_.dim, to);
      }
    }
  }

  const AttentionProblem& p_;
  KeyRows<T> keys_;
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
