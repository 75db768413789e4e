// What forward and backward of attention do with a tile of queries: products with keys, sums of rows, exponentials.
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
  // unsigned, since it overflows for the very small x that the last line turns into 0
  const vuint power = (reinterpret_cast<vuint>(shifted) << 23) + (vuint{} + (127u << 23));
  return blend(x < splat(-126.0f), vfloat{}, p * as_float(power));
}

// log2 for normal x.
PYVTK_INLINE vfloat log2_of(vfloat x) {
  // x = 2^n m with m in [sqrt(1/2), sqrt(2)), and log m = 2 artanh((m - 1) / (m + 1))
  const vint shifted = reinterpret_cast<vint>(reinterpret_cast<vuint>(x) - (vuint{} + 0x3f3504f3u));
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

// Brings a row into the cache.
PYVTK_INLINE void touch_row(const float* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 16) asm volatile("" : : "r"(*reinterpret_cast<const int32_t*>(row + d)));
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

// Keys and values of one head as float32: where they lie, or as copies. A copy's row is an odd number of cache lines,
// which spreads rows over all sets of the caches. Rows of [tokens, heads, dim] lie a multiple of 4 KiB apart: of a head
// the first-level cache keeps a few of them, the second not many more.
template <class T>
class KeyRows {
 public:
  FloatRows k, v;

  explicit KeyRows(const AttentionProblem& p)
      : p_(p), pitch_(ceil_div(p.dim, kLanes) * kLanes), stride_((ceil_div(2 * pitch_, kLine) | 1) * kLine) {}

  // For tiles that need `entries` rows, counted as often as they need them. Many: all are copied, in the order of
  // memory. Few: 16-bit ones are, when they are needed first.
  void choose(int64_t b, int64_t kv_head, int64_t entries) {
    head_ = b * p_.kv_heads + kv_head;
    k_ = p_.k.head<T>(b, kv_head);
    v_ = p_.v.head<T>(b, kv_head);
    if constexpr (std::is_same_v<T, float>) {
      if (entries < kWorthACopy * p_.keys) {
        k = {k_, p_.k.row_stride};
        v = {v_, p_.v.row_stride};
        // Tiles ask for rows in no order that the hardware could foresee; in the order of memory they come quickly.
        for (int64_t key = 0; key < p_.keys && entries >= p_.keys; ++key) {
          touch_row(k_ + key * p_.k.row_stride, p_.dim);
          touch_row(v_ + key * p_.v.row_stride, p_.dim);
        }
        return;
      }
    }
    if (copies_ == nullptr) {
      memory_.emplace(p_.keys * stride_);
      copies_ = memory_->take(p_.keys * stride_);
      owner_.assign(static_cast<size_t>(p_.keys), -1);
    }
    k = {copies_, stride_};
    v = {copies_ + pitch_, stride_};
    for (int64_t key = 0; key < p_.keys && entries >= p_.keys; ++key) copy(key);
  }

  void need(const KeyChunk& chunk) {
    if constexpr (!std::is_same_v<T, float>) {
      for (const KeyRun& run : chunk.runs) {
        for (int64_t i = 0; i < run.count; ++i) copy(run.row[i]);
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(float));
  static constexpr int64_t kWorthACopy = 4;  // tiles that need a key, on average

  void copy(int64_t key) {
    if (owner_[static_cast<size_t>(key)] == head_) return;
    owner_[static_cast<size_t>(key)] = head_;
    float* to = copies_ + key * stride_;
    widen_row(k_ + key * p_.k.row_stride, p_.dim, pitch_, to);
    widen_row(v_ + key * p_.v.row_stride, p_.dim, pitch_, to + pitch_);
  }

  const AttentionProblem& p_;
  int64_t pitch_, stride_;
  int64_t head_ = 0;
  const T* k_ = nullptr;
  const T* v_ = nullptr;
  std::optional<AttentionMemory> memory_;
  float* copies_ = nullptr;     // [keys][stride]: a key, and its value at `pitch`
  std::vector<int64_t> owner_;  // [keys]: the head that a copy is of
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

// Rows of a tile that are needed soon.
template <class T>
PYVTK_INLINE void prefetch_rows(const T* head, int64_t row_stride, const int32_t* number, int64_t dim) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < kAttentionTile; ++i) {
    const T* row = head + std::max(number[i], 0) * row_stride;
    for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(row + d, 1);
  }
}

// to = factor * from
template <class T>
PYVTK_INLINE void store_row(const float* from, float factor, int64_t dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(to + d, load(from + d) * factor);
  for (; d < dim; ++d) to[d] = from_float<T>(from[d] * factor);
}

}  // namespace pyvtk::cpu::PYVTK_ISA
