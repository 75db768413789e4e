// x rounded to int8 times int8 weights: exact sums of whole numbers (no include guard: compiled once per instruction
// set, see each_isa.h).
//
// As in sparse24_many.h, vectors run along rows. The two kept values of a group meet one of six pairs of its columns:
// the slab holds all six as 16-bit pairs, so that one instruction multiplies and adds a whole group.
#include "cpu/sparse24_many.h"

namespace pyvtk::cpu::PYVTK_ISA {

// Vectors of rows per tile: six pairs of 16 groups of so many fill two thirds of the first-level cache, and their
// sums the registers (with eight of them the compiler spills).
inline constexpr int64_t kPairVectors = 7;
inline constexpr int64_t kPairs = 6;
inline constexpr int64_t kFirstOf[kPairs] = {0, 0, 0, 1, 1, 2}, kSecondOf[kPairs] = {1, 2, 3, 2, 3, 3};

// One row becomes round(x / scale), half to even, in -127..127. Gives the scale: that of the call, or max |x| / 127, 1
// if that is 0; NaN if the row holds a NaN or, without a scale of the call, an infinity.
template <class T>
float quantize_row(const T* x, int64_t columns, const float* call_scale, float* out) {
  constexpr float kMagic = 0x1.8p23f;  // numbers above it have no fraction: adding it rounds
  const float nan = std::numeric_limits<float>::quiet_NaN();
  vfloat largest = {};
  vint bad = {};
  for (int64_t i = 0; i < columns; i += kLanes) {
    const vfloat y = columns - i < kLanes ? load_partial(x + i, columns - i) : load(x + i);
    bad |= y != y;
    largest = vmax(as_float(as_int(y) & 0x7fffffff), largest);
  }
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    if (bad[lane] != 0) {
      std::fill_n(out, columns, 0.0f);
      return nan;
    }
  }
  float scale = reduce_max(largest) / 127.0f;
  if (std::isinf(scale) && call_scale == nullptr) {
    std::fill_n(out, columns, 0.0f);
    return nan;
  }
  // A row of zeros; and one so small that its scale would be subnormal, too coarse to divide by, which becomes zeros.
  if (scale < std::numeric_limits<float>::min()) scale = 1;
  if (call_scale != nullptr) scale = *call_scale;
  for (int64_t i = 0; i < columns; i += kLanes) {
    vfloat y = columns - i < kLanes ? load_partial(x + i, columns - i) : load(x + i);
    y = y / scale;
    y = blend(y > splat(127.0f), splat(127.0f), blend(y < splat(-127.0f), splat(-127.0f), y));
    // 0 / 0 of a scale of 0 is NaN, which is no number to sum
    const vint none = y != y;
    y = (y + kMagic) - kMagic;
    y = blend(none, vfloat{}, y);
    if (columns - i < kLanes) {
      for (int64_t lane = 0; lane < columns - i; ++lane) out[i + lane] = y[lane];
    } else {
      store(out + i, y);
    }
  }
  return scale;
}

// Byte offsets of the pairs of two groups, for each metadata byte. What is no pair takes the first.
using PairOffsets = std::array<std::array<uint16_t, 2>, 256>;

inline void fill_offsets(PairOffsets& offsets, int64_t line_bytes) {
  for (int64_t byte = 0; byte < 256; ++byte) {
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t nibble = byte >> (4 * i) & 15;
      int64_t pair = 0;
      for (int64_t j = 0; j < kPairs; ++j) pair = (kFirstOf[j] | kSecondOf[j] << 2) == nibble ? j : pair;
      offsets[byte][i] = static_cast<uint16_t>((i * kPairs + pair) * line_bytes);
    }
  }
}

// x [rows][columns] of whole numbers -> [groups, rounded up to even][pair][vectors * kLanes], 0 where nothing is.
inline void pack_pairs(const float* x, int64_t rows, int64_t columns, int64_t vectors, int32_t* packed) {
  const int64_t line = vectors * kLanes, groups = ceil_div<int64_t>(columns, 8) * 2;
  for (int64_t column = 0; column < 4 * groups; column += kLanes) {
    const int64_t width = std::min(kLanes, columns - column), count = std::min(kLanes / 4, groups - column / 4);
    for (int64_t v = 0; v < vectors; ++v) {
      vfloat turned[kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t row = v * kLanes + lane;
        const float* from = x + row * columns + column;
        turned[lane] = row >= rows || width <= 0 ? vfloat{} : width == kLanes ? load(from) : load_partial(from, width);
      }
      transpose_level<1>(turned);
      for (int64_t group = 0; group < count; ++group) {
        vint low[4], high[4];
#pragma GCC unroll 4
        for (int64_t i = 0; i < 4; ++i) {
          const vint whole = __builtin_convertvector(turned[4 * group + i], vint);
          low[i] = whole & 0xffff;
          high[i] = whole << 16;
        }
        int32_t* to = packed + (column / 4 + group) * kPairs * line + v * kLanes;
#pragma GCC unroll 6
        for (int64_t pair = 0; pair < kPairs; ++pair)
          store(to + pair * line, low[kFirstOf[pair]] | high[kSecondOf[pair]]);
      }
    }
  }
}

// total[output][row] (+)= products of `bytes` * 2 groups; pairs of weights [outputs][kManyChunk / 4].
template <int64_t vectors, int64_t outputs>
__attribute__((noinline)) void pair_chunk(const int32_t* weights, const uint8_t* metadata, int64_t metadata_step,
                                          int64_t bytes, const int32_t* lines, const PairOffsets& offsets,
                                          int32_t* total, bool fresh) {
  constexpr int64_t kLine = vectors * kLanes;
  vint sum[outputs][vectors] = {};
  for (int64_t byte = 0; byte < bytes; ++byte) {
    const char* from = reinterpret_cast<const char*>(lines + byte * 2 * kPairs * kLine);
#pragma GCC unroll 8
    for (int64_t o = 0; o < outputs; ++o) {
      const uint16_t* offset = offsets[metadata[o * metadata_step + byte]].data();
#pragma GCC unroll 2
      for (int64_t i = 0; i < 2; ++i) {
        const vint weight = splat(weights[o * (kManyChunk / 4) + 2 * byte + i]);
        const int32_t* line = reinterpret_cast<const int32_t*>(from + offset[i]);
#pragma GCC unroll 8
        for (int64_t v = 0; v < vectors; ++v) sum[o][v] += multiply_add_pairs(weight, load(line + v * kLanes));
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t o = 0; o < outputs; ++o) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < vectors; ++v) {
      int32_t* to = total + o * kLine + v * kLanes;
      store(to, fresh ? sum[o][v] : load(to) + sum[o][v]);
    }
  }
}

// For one output: addresses are formed a byte ahead, as in many_chunk_ahead.
template <int64_t vectors>
__attribute__((noinline)) void pair_chunk_ahead(const int32_t* weights, const uint8_t* metadata, int64_t bytes,
                                                const int32_t* lines, const PairOffsets& offsets, int32_t* total,
                                                bool fresh) {
  constexpr int64_t kLine = vectors * kLanes, kGroups = 2 * kPairs * kLine * static_cast<int64_t>(sizeof(int32_t));
  MetadataBytes left(metadata, bytes);
  const std::array<uint16_t, 2>* offset = &offsets[left.next()];
  uint64_t line[2] = {(*offset)[0], (*offset)[1]};
  offset = &offsets[left.next()];
  vint sum[vectors] = {};
  for (int64_t byte = 0; byte < bytes; ++byte) {
    const uint64_t next = static_cast<uint64_t>((byte + 1) * kGroups);
#pragma GCC unroll 2
    for (int64_t i = 0; i < 2; ++i) {
      const vint weight = splat(weights[2 * byte + i]);
      const int32_t* at = reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(lines) + line[i]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < vectors; ++v) sum[v] += multiply_add_pairs(weight, load(at + v * kLanes));
      line[i] = next + (*offset)[i];
    }
    offset = &offsets[left.next()];
  }
#pragma GCC unroll 8
  for (int64_t v = 0; v < vectors; ++v) {
    int32_t* to = total + v * kLanes;
    store(to, fresh ? sum[v] : load(to) + sum[v]);
  }
}

template <int64_t vectors>
void pair_outputs(const Sparse24Problem& p, const int32_t* packed, const PairOffsets& offsets, int64_t first,
                  int64_t count, int32_t* total) {
  constexpr int64_t kLine = vectors * kLanes, kKept = kManyChunk / 2;
  constexpr int64_t kAtOnce = vectors == 1 ? 4 : vectors <= 3 ? 2 : 1;
  const int64_t half = p.columns / 2, bytes = p.metadata_columns();
  const int8_t* values = static_cast<const int8_t*>(p.values) + first * half;
  const uint8_t* metadata = p.metadata + first * bytes;
  for (int64_t column = 0; column < p.columns; column += kManyChunk) {
    const int64_t kept = std::min(kManyChunk, p.columns - column) / 2;
    for (int64_t n = 0; n < count;) {
      const int64_t outputs = count - n >= kAtOnce ? kAtOnce : 1;
      alignas(64) int16_t wide[kAtOnce][kKept] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        const int8_t* from = values + (n + o) * half + column / 2;
        __builtin_prefetch(from + 4 * half);
        __builtin_prefetch(metadata + (n + o + 4) * bytes + column / 8);
        if (kept == kKept) {
          for (int64_t i = 0; i < kKept; ++i) wide[o][i] = from[i];
        } else {
          for (int64_t i = 0; i < kept; ++i) wide[o][i] = from[i];
        }
      }
      int32_t weights[kAtOnce][kKept / 2];
      std::memcpy(weights, wide, sizeof(weights));
      const int32_t* lines = packed + column / 4 * kPairs * kLine;
      const uint8_t* nibbles = metadata + n * bytes + column / 8;
      const int64_t chunk_bytes = ceil_div<int64_t>(kept, 4);
      if (outputs == 1) {
        pair_chunk_ahead<vectors>(weights[0], nibbles, chunk_bytes, lines, offsets, total + n * kLine, column == 0);
      } else {
        pair_chunk<vectors, kAtOnce>(weights[0], nibbles, bytes, chunk_bytes, lines, offsets, total + n * kLine,
                                     column == 0);
      }
      n += outputs;
    }
  }
}

template <int64_t vectors = 1>
auto pair_kernel(int64_t wanted) {
  if constexpr (vectors == kPairVectors) {
    return &pair_outputs<vectors>;
  } else {
    return wanted == vectors ? &pair_outputs<vectors> : pair_kernel<vectors + 1>(wanted);
  }
}

inline int64_t int8_items(int64_t rows, int64_t outputs) {
  return ceil_div(ceil_div(rows, kLanes), kPairVectors) * ceil_div(outputs, kManyPart);
}

// Items [begin, end) of tiles of rows x parts of outputs. x: [rows][columns] of whole numbers; row_scales: [rows].
template <class T>
void many_int8(const Sparse24Problem& p, const float* x, const float* row_scales, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t all = ceil_div(p.rows, kLanes), tiles = ceil_div(all, kPairVectors);
  const int64_t widest = std::min(kPairVectors, all) * kLanes, parts = ceil_div(p.outputs, kManyPart);
  const int64_t padded_groups = p.groups() + p.groups() % 2;
  const Scratch packed_memory = scratch(padded_groups * kPairs * widest);
  const Scratch total_memory = scratch(kManyOutputs * widest), turned = scratch(kManyOutputs * widest);
  int32_t* packed = reinterpret_cast<int32_t*>(packed_memory.get());
  int32_t* total = reinterpret_cast<int32_t*>(total_memory.get());
  PairOffsets offsets;
  int64_t tile = -1, row = 0, vectors = 0;
  for (int64_t item = begin; item < end; ++item) {
    if (item / parts != tile) {
      tile = item / parts;
      vectors = all * (tile + 1) / tiles - all * tile / tiles;
      row = all * tile / tiles * kLanes;
      pack_pairs(x + row * p.columns, p.rows - row, p.columns, vectors, packed);
      fill_offsets(offsets, vectors * kLanes * static_cast<int64_t>(sizeof(int32_t)));
    }
    const int64_t line = vectors * kLanes, part_end = std::min(p.outputs, (item % parts + 1) * kManyPart);
    for (int64_t first = item % parts * kManyPart; first < part_end; first += kManyOutputs) {
      const int64_t count = std::min(kManyOutputs, part_end - first);
      if (p.columns == 0) std::fill_n(total, count * line, 0);
      pair_kernel(vectors)(p, packed, offsets, first, count, total);
      turn_totals(total, count, vectors, turned.get());
      for (int64_t r = 0; r < std::min(line, p.rows - row); ++r) {
        finish_row<T>(p, row + r, first, count, turned.get() + r * kManyOutputs, row_scales[row + r]);
      }
    }
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
