// Small matrix products on float32 scratch, for kernels that need query-key logits and their gradients
// (no include guard: compiled once per instruction set, see each_isa.h).
//
// All three keep vectors along the dimension that stays contiguous in the result, so nothing is summed across lanes:
//   logits      z[row][key]      = q[row] . k[key]            vectors along keys (packed), queries broadcast
//   weigh_keys  out[row][d]     += sum_key s[row][key] k[key][d]   vectors along d
//   weigh_rows  out[key][d]     += sum_row s[row][key] q[row][d]   vectors along d
// For a handful of rows packing the keys does not pay; logits_few reads them once, in their own type.
namespace pyvtk::cpu::PYVTK_ISA {

// Columns that one micro-kernel covers, and rows: 6 x 2 vectors of sums, 2 loaded and 1 broadcast fill 16 registers;
// AVX-512 has twice as many.
inline constexpr int64_t kStrip = 2 * kLanes;
inline constexpr int64_t kTileRows = PYVTK_VECTOR_BYTES == 64 ? 12 : 6;

// Up to this many rows logits_few beats packing.
inline constexpr int64_t kFewRows = 8;

PYVTK_INLINE int64_t padded(int64_t n) { return ceil_div(n, kStrip) * kStrip; }

// One level of a butterfly over lanes: lane i of the result is a's where bit `step` of i is clear, else b's, taken
// from lane i with that bit cleared (low) or set (high).
template <int step, size_t... lane>
PYVTK_INLINE vfloat low_lanes(vfloat a, vfloat b, std::index_sequence<lane...>) {
  return __builtin_shuffle(a, b, vint{int32_t((lane & step) ? kLanes + lane - step : lane)...});
}
template <int step, size_t... lane>
PYVTK_INLINE vfloat high_lanes(vfloat a, vfloat b, std::index_sequence<lane...>) {
  return __builtin_shuffle(a, b, vint{int32_t((lane & step) ? kLanes + lane : lane + step)...});
}

template <int step>
PYVTK_INLINE void transpose_level(vfloat* x) {
  if constexpr (step < kLanes) {
    constexpr auto lanes = std::make_index_sequence<kLanes>{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const vfloat a = x[i], b = x[i + step];
      x[i] = low_lanes<step>(a, b, lanes);
      x[i + step] = high_lanes<step>(a, b, lanes);
    }
    transpose_level<2 * step>(x);
  }
}

// Lane i of the result is the sum over the lanes of x[i]; destroys x.
template <int step = 1>
PYVTK_INLINE vfloat sum_each(vfloat* x) {
  if constexpr (step < kLanes) {
    constexpr auto lanes = std::make_index_sequence<kLanes>{};
#pragma GCC unroll 16
    for (int64_t i = 0; i < kLanes; i += 2 * step) {
      x[i] = low_lanes<step>(x[i], x[i + step], lanes) + high_lanes<step>(x[i], x[i + step], lanes);
    }
    return sum_each<2 * step>(x);
  } else {
    return x[0];
  }
}

// A row as float32, with zeros up to `padded_dim`.
template <class T>
void widen_row(const T* row, int64_t dim, int64_t padded_dim, float* out) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(out + d, load(row + d));
  if (d < dim) {
    store(out + d, load_partial(row + d, dim - d));
    d += kLanes;
  }
  for (; d < padded_dim; d += kLanes) store(out + d, vfloat{});
}

// Keys [count][dim] -> [ceil(count / kStrip)][dim][kStrip]; missing keys of the last strip are zeros.
template <class T>
void pack_keys(const T* keys, int64_t stride, int64_t count, int64_t dim, float* out) {
  for (int64_t strip = 0; strip < count; strip += kStrip) {
    for (int64_t half = 0; half < kStrip; half += kLanes) {
      for (int64_t d = 0; d < dim; d += kLanes) {
        const int64_t width = std::min(kLanes, dim - d);
        vfloat x[kLanes];
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t key = strip + half + lane;
          const T* row = keys + key * stride + d;
          x[lane] = key >= count ? vfloat{} : (width == kLanes ? load(row) : load_partial(row, width));
        }
        transpose_level<1>(x);
        for (int64_t lane = 0; lane < width; ++lane) store(out + (d + lane) * kStrip + half, x[lane]);
      }
    }
    out += dim * kStrip;
  }
}

template <int64_t rows>
PYVTK_INLINE void logits_tile(const float* q, int64_t ldq, const float* packed, int64_t dim, float* z, int64_t ldz) {
  vfloat sum[rows][2] = {};
  for (int64_t d = 0; d < dim; ++d) {
    const vfloat k0 = load(packed + d * kStrip), k1 = load(packed + d * kStrip + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < rows; ++r) {
      const vfloat x = splat(q[r * ldq + d]);
      sum[r][0] += x * k0;
      sum[r][1] += x * k1;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < rows; ++r) {
    store(z + r * ldz, sum[r][0]);
    store(z + r * ldz + kLanes, sum[r][1]);
  }
}

// out[row] += sum over i of s[row * row_step + i * sum_step] * x[i], one strip of channels. The sum starts from zero
// and joins `out` once, so that rounding errors grow with the number of calls, not with that of summands. `fresh`
// writes out instead of adding to it.
template <int64_t rows>
PYVTK_INLINE void weigh_tile(const float* s, int64_t row_step, int64_t sum_step, int64_t count, const float* x,
                             int64_t ldx, float* out, int64_t ldo, bool fresh) {
  vfloat sum[rows][2] = {};
  for (int64_t i = 0; i < count; ++i) {
    const vfloat x0 = load(x + i * ldx), x1 = load(x + i * ldx + kLanes);
#pragma GCC unroll 12
    for (int64_t r = 0; r < rows; ++r) {
      const vfloat w = splat(s[r * row_step + i * sum_step]);
      sum[r][0] += w * x0;
      sum[r][1] += w * x1;
    }
  }
#pragma GCC unroll 12
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + r * ldo;
    store(to, fresh ? sum[r][0] : load(to) + sum[r][0]);
    store(to + kLanes, fresh ? sum[r][1] : load(to + kLanes) + sum[r][1]);
  }
}

// f(std::integral_constant<rows>, first row) over tiles of at most kTileRows rows.
template <int64_t rows, class F>
PYVTK_INLINE void remaining_rows(int64_t first, int64_t left, F&& f) {
  if constexpr (rows > 0) {
    if (left == rows) {
      f(std::integral_constant<int64_t, rows>{}, first);
    } else {
      remaining_rows<rows - 1>(first, left, f);
    }
  }
}
template <class F>
PYVTK_INLINE void for_row_tiles(int64_t count, F&& f) {
  int64_t row = 0;
  for (; row + kTileRows <= count; row += kTileRows) f(std::integral_constant<int64_t, kTileRows>{}, row);
  remaining_rows<kTileRows - 1>(row, count - row, f);
}

// z [rows][ldz] for `count` packed keys; writes whole strips, so ldz >= padded(count).
inline void logits(const float* q, int64_t ldq, int64_t rows, const float* packed, int64_t count, int64_t dim, float* z,
                   int64_t ldz) {
  for (int64_t key = 0; key < count; key += kStrip) {
    for_row_tiles(rows, [&](auto tile, int64_t row) {
      logits_tile<tile>(q + row * ldq, ldq, packed + key * dim, dim, z + row * ldz + key, ldz);
    });
  }
}

// Products of `keys` keys with `rows` queries, still spread over lanes: sum[row * kLanes + key]. Eight sums at a time
// hide the latency of the additions.
template <int64_t keys, int64_t rows, class T>
PYVTK_INLINE void dot_block(const float* q, int64_t ldq, const T* const* key, int64_t dim, vfloat* sum) {
  constexpr int64_t kParts = keys * rows <= 4 ? 2 : 1;
  vfloat part[rows][keys][kParts] = {};
  const auto add = [&](int64_t i, auto&& load_key, auto&& load_query) __attribute__((always_inline)) {
    vfloat k[keys];
#pragma GCC unroll 4
    for (int64_t n = 0; n < keys; ++n) k[n] = load_key(key[n]);
#pragma GCC unroll 4
    for (int64_t r = 0; r < rows; ++r) {
      const vfloat x = load_query(q + r * ldq);
#pragma GCC unroll 4
      for (int64_t n = 0; n < keys; ++n) part[r][n][i] += x * k[n];
    }
  };
  int64_t d = 0;
  for (; d + kParts * kLanes <= dim; d += kParts * kLanes) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kParts; ++i) {
      const auto whole = [&](const auto* p) { return load(p + d + i * kLanes); };
      add(i, whole, whole);
    }
  }
  for (; d < dim; d += kLanes) {
    const auto rest = [&](const auto* p) { return dim - d < kLanes ? load_partial(p + d, dim - d) : load(p + d); };
    add(0, rest, rest);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < keys; ++n) {
      sum[r * kLanes + n] = kParts == 2 ? part[r][n][0] + part[r][n][kParts - 1] : part[r][n][0];
    }
  }
}

// Elements from a row of keys to what will be read soon, for the first and the second half of a vector of keys.
struct Ahead {
  int64_t early, late;
};

// Where rows are walked one after the other.
template <class T>
PYVTK_INLINE Ahead rows_ahead() {
  constexpr int64_t distance = 2048 / static_cast<int64_t>(sizeof(T));
  return {distance, distance};
}

// Where the heads of a token lie side by side and are walked for one vector of keys after the other: the next head's
// rows, behind the last head those of the next keys. Half a vector of keys ahead: more rows, where they lie a power of
// two apart, push each other out of the first-level cache. Short rows a whole vector, or memory would be too late.
template <class T>
PYVTK_INLINE Ahead beside_ahead(int64_t dim, int64_t row_stride, int64_t head_stride, int64_t head, int64_t heads) {
  const int64_t next = head + 1 < heads ? head_stride : kLanes * row_stride - (heads - 1) * head_stride;
  if (kLanes * dim * static_cast<int64_t>(sizeof(T)) <= 2048) return {next, next};
  const int64_t half = kLanes / 2 * row_stride;
  return {half, next - half};
}

template <int64_t rows, class T>
PYVTK_INLINE void logits_few_tile(const float* q, int64_t ldq, const T* keys, int64_t stride, Ahead ahead,
                                  int64_t count, int64_t dim, float* z, int64_t ldz) {
  // A single query shares its loads among several keys; several queries share those of one key.
  constexpr int64_t kKeys = rows == 1 ? 4 : (rows == 2 ? 2 : 1);
  // The hardware prefetcher stops at the end of a 4 KiB page and likes a single stream; the rows that follow are
  // asked for by hand.
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  vfloat sum[rows * kLanes];
  for (int64_t lane = 0; lane < kLanes; lane += kKeys) {
    const T* key[kKeys];
#pragma GCC unroll 4
    for (int64_t n = 0; n < kKeys; ++n) {
      key[n] = keys + std::min(lane + n, count - 1) * stride;
      const int64_t distance = lane < kLanes / 2 ? ahead.early : ahead.late;
      for (int64_t d = 0; d < dim; d += kLine) __builtin_prefetch(key[n] + d + distance);
    }
    dot_block<kKeys, rows>(q, ldq, key, dim, sum + lane);
  }
#pragma GCC unroll 4
  for (int64_t r = 0; r < rows; ++r) store(z + r * ldz, sum_each(sum + r * kLanes));
}

// The same without packing, for few rows: keys are read once, in their own type.
template <class T>
void logits_few(const float* q, int64_t ldq, int64_t rows, const T* keys, int64_t stride, Ahead ahead, int64_t count,
                int64_t dim, float* z, int64_t ldz) {
  for (int64_t first = 0; first < count; first += kLanes) {
    const T* some = keys + first * stride;
    const int64_t left = std::min(count - first, kLanes);
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      logits_few_tile<4>(q + row * ldq, ldq, some, stride, ahead, left, dim, z + row * ldz + first, ldz);
    }
    remaining_rows<3>(row, rows - row, [&](auto tile, int64_t r) {
      logits_few_tile<tile>(q + r * ldq, ldq, some, stride, ahead, left, dim, z + r * ldz + first, ldz);
    });
  }
}

// out [rows][ldo] += s [rows][lds] times keys [count][ldk], ldk and ldo whole strips.
inline void weigh_keys(const float* s, int64_t lds, int64_t rows, const float* keys, int64_t ldk, int64_t count,
                       float* out, int64_t ldo) {
  for (int64_t d = 0; d < ldk; d += kStrip) {
    for_row_tiles(rows, [&](auto tile, int64_t row) {
      weigh_tile<tile>(s + row * lds, lds, 1, count, keys + d, ldk, out + row * ldo + d, ldo, false);
    });
  }
}

// out [count][ldo] += (or, fresh, =) s [rows][lds] transposed times q [rows][ldq], ldq whole strips.
inline void weigh_rows(const float* s, int64_t lds, int64_t rows, const float* q, int64_t ldq, int64_t count,
                       float* out, int64_t ldo, bool fresh) {
  for (int64_t d = 0; d < ldq; d += kStrip) {
    for_row_tiles(count, [&](auto tile, int64_t key) {
      weigh_tile<tile>(s + key, 1, lds, rows, q + d, ldq, out + key * ldo + d, ldo, fresh);
    });
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
