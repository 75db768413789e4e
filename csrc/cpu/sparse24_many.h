// Many rows: bounded by multiplications, of which there are half as many as in a dense product (no include guard:
// compiled once per instruction set, see each_isa.h).
//
// Vectors run along rows. A tile of rows, transposed to [column][row], is walked in slabs that stay in the first-level
// cache; each kept value is broadcast and multiplied with one line of the slab, which its metadata names, into sums in
// registers. Sums of 64 columns join the total, so that the result of a row depends neither on how many rows there are
// nor on the threads.
#include "cpu/gemm.h"

namespace pyvtk::cpu::PYVTK_ISA {

// Vectors of rows per tile: their sums, one broadcast value and a spare fill 16 registers.
inline constexpr int64_t kManyVectors = 12;
// Columns whose products are added before they join the total.
inline constexpr int64_t kManyChunk = 64;
// Outputs that one walk over the slabs serves: their totals stay in the second-level cache.
inline constexpr int64_t kManyOutputs = 128;

// Byte offsets, from the first line of two groups, of the lines of their four kept values; for each metadata byte.
using LineOffsets = std::array<std::array<uint16_t, 4>, 256>;

inline void fill_offsets(LineOffsets& offsets, int64_t line_bytes) {
  for (int64_t byte = 0; byte < 256; ++byte) {
    for (int64_t i = 0; i < 4; ++i) {
      offsets[byte][i] = static_cast<uint16_t>(((i / 2 * 4) + (byte >> (2 * i) & 3)) * line_bytes);
    }
  }
}

// x [rows, columns] from `row` on -> [columns rounded up to 8][vectors * kLanes]; what is missing is 0.
template <class T>
void many_pack(const Sparse24Problem& p, int64_t row, int64_t vectors, float* packed) {
  const int64_t line = vectors * kLanes;
  const int64_t padded_columns = ceil_div<int64_t>(p.columns, 8) * 8;
  for (int64_t column = 0; column < padded_columns; column += kLanes) {
    const int64_t width = std::min(kLanes, p.columns - column), lines = std::min(kLanes, padded_columns - column);
    for (int64_t v = 0; v < vectors; ++v) {
      vfloat x[kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t r = row + v * kLanes + lane;
        const T* from = static_cast<const T*>(p.x) + r * p.x_stride + column;
        x[lane] = r >= p.rows || width <= 0 ? vfloat{} : width == kLanes ? load(from) : load_partial(from, width);
      }
      transpose_level<1>(x);
      float* to = packed + column * line + v * kLanes;
      if (lines == kLanes) {
#pragma GCC unroll 16
        for (int64_t lane = 0; lane < kLanes; ++lane) store(to + lane * line, x[lane]);
      } else {
        for (int64_t lane = 0; lane < lines; ++lane) store(to + lane * line, x[lane]);
      }
    }
  }
}

// total[output][row] (+)= products of `bytes` * 8 columns; the weights of the outputs lie *_step apart. Functions of
// their own: inlined, their addresses are spilled for want of registers.
template <int64_t vectors, int64_t outputs>
__attribute__((noinline)) void many_chunk(const float* values, int64_t value_step, const uint8_t* metadata,
                                          int64_t metadata_step, int64_t bytes, const float* lines,
                                          const LineOffsets& offsets, float* total, bool fresh) {
  constexpr int64_t kLine = vectors * kLanes;
  vfloat sum[outputs][vectors] = {};
  for (int64_t byte = 0; byte < bytes; ++byte) {
    const char* from = reinterpret_cast<const char*>(lines + byte * 8 * kLine);
#pragma GCC unroll 8
    for (int64_t o = 0; o < outputs; ++o) {
      const uint16_t* offset = offsets[metadata[o * metadata_step + byte]].data();
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) {
        const vfloat value = splat(values[o * value_step + 4 * byte + i]);
        const float* line = reinterpret_cast<const float*>(from + offset[i]);
#pragma GCC unroll 12
        for (int64_t v = 0; v < vectors; ++v) sum[o][v] += value * load(line + v * kLanes);
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t o = 0; o < outputs; ++o) {
#pragma GCC unroll 12
    for (int64_t v = 0; v < vectors; ++v) {
      float* to = total + o * kLine + v * kLanes;
      store(to, fresh ? sum[o][v] : load(to) + sum[o][v]);
    }
  }
}

// The metadata bytes of a chunk, one after the other; 0 behind the last.
class MetadataBytes {
 public:
  PYVTK_INLINE MetadataBytes(const uint8_t* metadata, int64_t bytes) {
    static_assert(kManyChunk / 8 == sizeof(left_));
    if (bytes == sizeof(left_)) {
      std::memcpy(&left_, metadata, sizeof(left_));
    } else {
      std::memcpy(&left_, metadata, static_cast<size_t>(bytes));
    }
  }
  PYVTK_INLINE uint64_t next() {
    const uint64_t byte = left_ & 255;
    left_ >>= 8;
    return byte;
  }

 private:
  uint64_t left_ = 0;
};

// For one output, whose many vectors leave room for addresses that are formed one byte ahead: formed when they are
// needed, the loads that wait for them fill the scheduler, and the multiplications wait too (Zen 3: 1.2 of them in a
// cycle, against 1.55).
template <int64_t vectors>
__attribute__((noinline)) void many_chunk_ahead(const float* values, const uint8_t* metadata, int64_t bytes,
                                                const float* lines, const LineOffsets& offsets, float* total,
                                                bool fresh) {
  constexpr int64_t kLine = vectors * kLanes, kGroups = 8 * kLine * static_cast<int64_t>(sizeof(float));
  MetadataBytes left(metadata, bytes);
  const auto offsets_of_next = [&] { return std::bit_cast<uint64_t>(offsets[left.next()]); };
  uint64_t offset = offsets_of_next();
  uint64_t line[4];
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) line[i] = offset >> (16 * i) & 0xffff;
  offset = offsets_of_next();
  vfloat sum[vectors] = {};
  for (int64_t byte = 0; byte < bytes; ++byte) {
    const uint64_t next = static_cast<uint64_t>((byte + 1) * kGroups);
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i) {
      const vfloat value = splat(values[4 * byte + i]);
      const float* at = reinterpret_cast<const float*>(reinterpret_cast<const char*>(lines) + line[i]);
#pragma GCC unroll 12
      for (int64_t v = 0; v < vectors; ++v) sum[v] += value * load(at + v * kLanes);
      line[i] = next + (offset >> (16 * i) & 0xffff);
    }
    offset = offsets_of_next();
  }
#pragma GCC unroll 12
  for (int64_t v = 0; v < vectors; ++v) {
    float* to = total + v * kLanes;
    store(to, fresh ? sum[v] : load(to) + sum[v]);
  }
}

// Outputs at a time: enough sums to hide the latency of an addition.
constexpr int64_t many_outputs(int64_t vectors) {
  return vectors == 1 ? 8 : vectors == 2 ? 6 : vectors == 3 ? 4 : vectors == 4 ? 3 : vectors <= 6 ? 2 : 1;
}

// A chunk of values as float32, in front of zeros.
template <class W>
PYVTK_INLINE void widen_values(const W* from, int64_t kept, float* to) {
  constexpr int64_t kKept = kManyChunk / 2;
  if (kept == kKept) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < kKept; i += kLanes) store(to + i, load(from + i));
  } else {
    for (int64_t i = 0; i < kept; i += kLanes) store(to + i, load_partial(from + i, std::min(kLanes, kept - i)));
  }
}

// Totals [count][vectors * kLanes] of outputs [first, first + count).
template <class W, int64_t vectors>
void many_outputs_of(const Sparse24Problem& p, const float* packed, const LineOffsets& offsets, int64_t first,
                     int64_t count, float* total) {
  constexpr int64_t kLine = vectors * kLanes, kAtOnce = many_outputs(vectors), kKept = kManyChunk / 2;
  constexpr int64_t kSlab = std::max<int64_t>(1, kManyVectors / vectors) * kManyChunk;
  constexpr int64_t kCacheLine = 64 / static_cast<int64_t>(sizeof(W));
  constexpr int64_t kLater = std::max<int64_t>(kAtOnce, 4);
  const int64_t half = p.columns / 2, bytes = p.metadata_columns();
  const W* all_values = static_cast<const W*>(p.values) + first * half;
  const uint8_t* all_metadata = p.metadata + first * bytes;
  alignas(64) float buffer[kAtOnce][kKept] = {};
  for (int64_t slab = 0; slab < p.columns; slab += kSlab) {
    const int64_t slab_end = std::min(slab + kSlab, p.columns);
    for (int64_t n = 0; n < count;) {
      const int64_t outputs = count - n >= kAtOnce ? kAtOnce : 1;
      for (int64_t column = slab; column < slab_end; column += kManyChunk) {
        const int64_t kept = std::min(kManyChunk, p.columns - column) / 2, chunk_bytes = ceil_div<int64_t>(kept, 4);
        const W* from = all_values + n * half + column / 2;
        const uint8_t* metadata = all_metadata + n * bytes + column / 8;
        // the same columns of the outputs that come next
        for (int64_t o = kLater; o < kLater + outputs; ++o) {
          for (int64_t i = 0; i < kKept; i += kCacheLine) __builtin_prefetch(from + o * half + i);
          __builtin_prefetch(metadata + o * bytes);
        }
        const float* values = buffer[0];
        int64_t step = kKept;
        bool in_place = false;
        if constexpr (std::is_same_v<W, float>) {
          in_place = kept % 4 == 0;
          if (in_place) values = from, step = half;
        }
        for (int64_t o = 0; o < outputs && !in_place; ++o) widen_values(from + o * half, kept, buffer[o]);
        const float* chunk_lines = packed + column * kLine;
        float* chunk_total = total + n * kLine;
        if (outputs == 1) {
          many_chunk_ahead<vectors>(values, metadata, chunk_bytes, chunk_lines, offsets, chunk_total, column == 0);
        } else {
          many_chunk<vectors, kAtOnce>(values, step, metadata, bytes, chunk_bytes, chunk_lines, offsets, chunk_total,
                                       column == 0);
        }
      }
      n += outputs;
    }
  }
}

// Totals [count][vectors * kLanes] -> [vectors * kLanes][kManyOutputs].
template <class Total>
void turn_totals(const Total* total, int64_t count, int64_t vectors, float* turned) {
  const int64_t line = vectors * kLanes;
  for (int64_t n = 0; n < count; n += kLanes) {
    for (int64_t v = 0; v < vectors; ++v) {
      vfloat x[kLanes];
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        x[lane] = __builtin_convertvector(load(total + std::min(n + lane, count - 1) * line + v * kLanes), vfloat);
      }
      transpose_level<1>(x);
#pragma GCC unroll 16
      for (int64_t lane = 0; lane < kLanes; ++lane) store(turned + (v * kLanes + lane) * kManyOutputs + n, x[lane]);
    }
  }
}

// Tiles of rows, as even as their number of vectors allows.
inline int64_t many_tiles(int64_t rows) { return ceil_div(ceil_div(rows, kLanes), kManyVectors); }
// The first vector of a tile.
inline int64_t many_tile_begin(int64_t rows, int64_t tile) { return ceil_div(rows, kLanes) * tile / many_tiles(rows); }

template <class W, int64_t vectors = 1>
auto many_kernel(int64_t wanted) {
  if constexpr (vectors == kManyVectors) {
    return &many_outputs_of<W, vectors>;
  } else {
    return wanted == vectors ? &many_outputs_of<W, vectors> : many_kernel<W, vectors + 1>(wanted);
  }
}

// Parts of a tile of rows: items are [tile][part], part after part of the same tile, which is packed once for each run.
inline constexpr int64_t kManyPart = 4 * kManyOutputs;
inline int64_t many_items(int64_t rows, int64_t outputs) { return many_tiles(rows) * ceil_div(outputs, kManyPart); }

template <class T, class W>
void many(const Sparse24Problem& p, int64_t begin, int64_t end) {
  if (begin >= end) return;
  const int64_t widest = std::min(kManyVectors, ceil_div(p.rows, kLanes)) * kLanes;
  const int64_t padded_columns = ceil_div<int64_t>(p.columns, 8) * 8, parts = ceil_div(p.outputs, kManyPart);
  const auto packed = scratch(padded_columns * widest);
  const auto total = scratch(kManyOutputs * widest);
  const auto turned = scratch(kManyOutputs * widest);
  LineOffsets offsets;
  int64_t tile = -1, row = 0, vectors = 0;
  for (int64_t item = begin; item < end; ++item) {
    if (item / parts != tile) {
      tile = item / parts;
      const int64_t vector = many_tile_begin(p.rows, tile);
      vectors = many_tile_begin(p.rows, tile + 1) - vector;
      row = vector * kLanes;
      many_pack<T>(p, row, vectors, packed.get());
      fill_offsets(offsets, vectors * kLanes * static_cast<int64_t>(sizeof(float)));
    }
    const auto kernel = many_kernel<W>(vectors);
    const int64_t line = vectors * kLanes, part_end = std::min(p.outputs, (item % parts + 1) * kManyPart);
    for (int64_t first = item % parts * kManyPart; first < part_end; first += kManyOutputs) {
      const int64_t count = std::min(kManyOutputs, part_end - first);
      if (p.columns == 0) std::fill_n(total.get(), count * line, 0.0f);
      kernel(p, packed.get(), offsets, first, count, total.get());
      turn_totals(total.get(), count, vectors, turned.get());
      for (int64_t r = 0; r < std::min(line, p.rows - row); ++r) {
        finish_row<T>(p, row + r, first, count, turned.get() + r * kManyOutputs, 1.0f);
      }
    }
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
