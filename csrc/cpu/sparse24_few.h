// Few rows: bounded by reading the weights (no include guard: compiled once per instruction set, see each_isa.h).
//
// A block is kLanes groups: 4 kLanes columns of x, 2 kLanes kept values. x is laid out [block][position][lane], so that
// a lane is a group and its two factors come from blends of the four positions by the bits of the group's nibble: about
// one instruction per kept value, no table and no gather, and no metadata can make it read outside. Four outputs are
// formed at a time, from four places far apart, each of which is read forward without a jump.
#include "cpu/sparse24_finish.h"

namespace pyvtk::cpu::PYVTK_ISA {

// bfloat16 takes the two values of a group out of one lane; other types come as two vectors and are separated within
// each 128 bits, which leaves the groups in another order.
template <class W>
constexpr int64_t group_of_lane(int64_t lane) {
  if (std::is_same_v<W, bfloat16>) return lane;
  const int64_t quarter = lane / 4, i = lane % 4;
  return i < 2 ? 2 * quarter + i : kLanes / 2 + 2 * quarter + i - 2;
}

// The nibbles of a block, each in the highest bits of its lane.
template <class W, size_t... lane>
PYVTK_INLINE vint nibbles_on_top(const uint8_t* metadata, std::index_sequence<lane...>) {
  constexpr vuint up = {uint32_t(28 - 4 * (group_of_lane<W>(lane) % 8))...};
#if PYVTK_VECTOR_BYTES == 64
  int64_t bits;
  std::memcpy(&bits, metadata, 8);
  const vuint words =
      __builtin_shuffle(reinterpret_cast<vuint>(_mm512_set1_epi64(bits)), vint{int32_t(group_of_lane<W>(lane) / 8)...});
  return reinterpret_cast<vint>(words << up);
#else
  uint32_t bits = 0;
  std::memcpy(&bits, metadata, kLanes / 2);
  return reinterpret_cast<vint>((vuint{} + bits) << up);
#endif
}

template <size_t... lane>
PYVTK_INLINE vfloat every_second(vfloat a, vfloat b, int32_t first, std::index_sequence<lane...>) {
  // within 128 bits: two from a, two from b
  const vint pick = {int32_t(lane / 4 * 4 + lane % 2 * 2 + (lane % 4 < 2 ? 0 : kLanes))...};
  return first == 0 ? __builtin_shuffle(a, b, pick) : __builtin_shuffle(a, b, pick + 1);
}

// The first and the second kept value of each group.
template <class W>
PYVTK_INLINE void load_kept(const W* values, vfloat& a, vfloat& b) {
  if constexpr (std::is_same_v<W, bfloat16>) {
    vuint pairs;
    std::memcpy(&pairs, values, sizeof(pairs));
    a = as_float(pairs << 16);
    b = as_float(pairs & 0xffff0000u);
  } else {
    constexpr auto lanes = std::make_index_sequence<kLanes>{};
    const vfloat low = load(values), high = load(values + kLanes);
    a = every_second(low, high, 0, lanes);
    b = every_second(low, high, 1, lanes);
  }
}

inline int64_t few_blocks(int64_t columns) { return ceil_div(columns, 4 * kLanes); }
// of a packed row
inline int64_t few_floats(int64_t columns) { return few_blocks(columns) * 4 * kLanes; }

// x [rows, columns] -> [rows][block][position][lane]; what is missing of the last block is 0.
template <class T, class W>
void few_pack(const Sparse24Problem& p, float* packed) {
  const int64_t blocks = few_blocks(p.columns);
  for (int64_t row = 0; row < p.rows; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.x_stride;
    for (int64_t block = 0; block < blocks; ++block, packed += 4 * kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t group = block * kLanes + group_of_lane<W>(lane);
        for (int64_t i = 0; i < 4; ++i) packed[i * kLanes + lane] = group < p.groups() ? to_float(x[4 * group + i]) : 0;
      }
    }
  }
}

// Sums of products that are whole numbers of at most 127 * 128 are exact in float32 for so many blocks: 1024 products.
inline constexpr int64_t kExactBlocks = 512;

// z[row][i * z_step] of `streams` outputs whose weights lie value_step and metadata_step apart. `exact`
// is for x of whole numbers of at most 127: sums are those of int32, and rounded once.
template <class W, int64_t rows, int64_t streams, bool exact>
void few_tile(const float* x, int64_t groups, const W* values, int64_t value_step, const uint8_t* metadata,
              int64_t metadata_step, float* z, int64_t z_row, int64_t z_step) {
  // The hardware's prefetchers stop at the end of a page. Further ahead is slower: the four streams are often a
  // multiple of 4 KiB apart and share the sets of the first-level cache.
  constexpr int64_t kAhead = 384 / static_cast<int64_t>(sizeof(W));
  constexpr auto lanes = std::make_index_sequence<kLanes>{};
  const int64_t whole = groups / kLanes, x_row = ceil_div(groups, kLanes) * 4 * kLanes;
  vfloat sum[streams][rows] = {};
  const auto add = [&](int64_t i, const float* position, const W* value,
                       const uint8_t* nibble) __attribute__((always_inline)) {
    const vint second_high = nibbles_on_top<W>(nibble, lanes);
    const vint second_low = second_high << 1, first_high = second_high << 2, first_low = second_high << 3;
    vfloat a, b;
    load_kept(value, a, b);
#pragma GCC unroll 4
    for (int64_t row = 0; row < rows; ++row) {
      const float* at = position + row * x_row;
      const vfloat x1 = load(at + kLanes), x2 = load(at + 2 * kLanes);
      sum[i][row] += a * blend_sign(first_high, x2, blend_sign(first_low, x1, load(at)));
      sum[i][row] += b * blend_sign(second_high, blend_sign(second_low, load(at + 3 * kLanes), x2), x1);
    }
  };
  [[maybe_unused]] vint total[exact ? streams : 1][rows] = {};
  const auto flush = [&]() __attribute__((always_inline)) {
    for (int64_t i = 0; i < streams; ++i) {
      for (int64_t row = 0; row < rows; ++row) {
        total[exact ? i : 0][row] += __builtin_convertvector(sum[i][row], vint);
        sum[i][row] = vfloat{};
      }
    }
  };
  for (int64_t block = 0; block < whole; ++block) {
    if constexpr (exact) {
      if (block % kExactBlocks == kExactBlocks - 1) flush();
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < streams; ++i) {
      const W* value = values + i * value_step + block * 2 * kLanes;
      __builtin_prefetch(value + kAhead);
      add(i, x + block * 4 * kLanes, value, metadata + i * metadata_step + block * kLanes / 2);
    }
  }
  if (const int64_t rest = groups - whole * kLanes; rest > 0) {
    for (int64_t i = 0; i < streams; ++i) {
      W value[2 * kLanes] = {};
      uint8_t nibble[kLanes] = {};
      std::memcpy(value, values + i * value_step + whole * 2 * kLanes, static_cast<size_t>(2 * rest) * sizeof(W));
      std::memcpy(nibble, metadata + i * metadata_step + whole * kLanes / 2,
                  static_cast<size_t>(ceil_div<int64_t>(rest, 2)));
      add(i, x + whole * 4 * kLanes, value, nibble);
    }
  }
  if constexpr (exact) flush();
  for (int64_t i = 0; i < streams; ++i) {
    for (int64_t row = 0; row < rows; ++row) {
      float& to = z[row * z_row + i * z_step];
      if constexpr (exact) {
        int32_t lane[kLanes];
        store(lane, total[i][row]);
        to = static_cast<float>(std::accumulate(lane, lane + kLanes, int32_t{0}));
      } else {
        to = reduce_add(sum[i][row]);
      }
    }
  }
}

// Sums of `count` outputs from `first` on, for `rows` rows: z [rows][count].
template <class W, int64_t rows, bool exact>
void few_rows(const Sparse24Problem& p, const float* packed, int64_t first, int64_t count, float* z) {
  constexpr int64_t kStreams = 4;
  const int64_t half = p.columns / 2, bytes = p.metadata_columns();
  const W* values = static_cast<const W*>(p.values) + first * half;
  const uint8_t* metadata = p.metadata + first * bytes;
  const int64_t each = count / kStreams;
  int64_t n = 0;
  for (; n < each; ++n) {
    few_tile<W, rows, kStreams, exact>(packed, p.groups(), values + n * half, each * half, metadata + n * bytes,
                                       each * bytes, z + n, count, each);
  }
  for (n = kStreams * each; n < count; ++n) {
    few_tile<W, rows, 1, exact>(packed, p.groups(), values + n * half, 0, metadata + n * bytes, 0, z + n, count, 0);
  }
}

// Outputs [begin, end) of all rows; `packed` comes from few_pack. row_scales: [rows] if x is exact (see above).
template <class T, class W, bool exact = false>
void few(const Sparse24Problem& p, const float* packed, const float* row_scales, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 4;
  // With more rows than one tile, the second finds the weights of these outputs in the second-level cache.
  const int64_t part = p.rows <= kRows ? end - begin : 32;
  const int64_t x_row = few_floats(p.columns);
  const Scratch z = scratch(kRows * part);
  for (int64_t first = begin; first < end; first += part) {
    const int64_t count = std::min(part, end - first);
    for (int64_t row = 0; row < p.rows; row += kRows) {
      const int64_t rows = std::min(kRows, p.rows - row);
      const auto kernel = rows == 1   ? &few_rows<W, 1, exact>
                          : rows == 2 ? &few_rows<W, 2, exact>
                          : rows == 3 ? &few_rows<W, 3, exact>
                                      : &few_rows<W, 4, exact>;
      kernel(p, packed + row * x_row, first, count, z.get());
      for (int64_t r = 0; r < rows; ++r) {
        finish_row<T>(p, row + r, first, count, z.get() + r * count, exact ? row_scales[row + r] : 1.0f);
      }
    }
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
