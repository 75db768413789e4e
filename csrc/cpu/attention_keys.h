// Which keys a tile of queries needs: the predicate of the plan, evaluated for 16 queries at a time. Once for all
// heads.
#include "cpu/attention_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

// With vectors of half a tile, keys that only one half needs are not multiplied with the other. With narrower vectors
// a half has several, with wider ones there are no halves.
inline constexpr int64_t kHalves = kLanes >= kAttentionTile ? 1 : 2;
inline constexpr int64_t kHalf = kAttentionTile / kHalves;
inline constexpr int64_t kHalfVectors = kHalf / kLanes;
inline constexpr int64_t kTileVectors = kAttentionTile / kLanes;

inline constexpr uint32_t kWholeTile = 0xffff;

// Bit i of the result: lane i is -1.
PYVTK_INLINE uint32_t lane_bits(vint x) {
#if PYVTK_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(x));
#elif PYVTK_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(x)));
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) bits |= (x[lane] & 1u) << lane;
  return bits;
#endif
}

// Lane i has bit i + c * kLanes.
PYVTK_INLINE vint single_bits(int64_t c) {
  vint bits;
  for (int64_t lane = 0; lane < kLanes; ++lane) bits[lane] = 1 << lane;
  return bits << static_cast<int32_t>(c * kLanes);
}

// Lane i of vector c: -1 where bit i + c * kLanes is set.
PYVTK_INLINE vint bit_lanes(uint32_t bits, int64_t c) {
  return (splat(static_cast<int32_t>(bits)) & single_bits(c)) != vint{};
}

// The queries of a tile, as the predicate needs them.
struct TileQueries {
  vint image[kTileVectors], position[kTileVectors], ordinary[kTileVectors];
  vint low[3][kTileVectors], high[3][kTileVectors];
  int32_t region[kAttentionTile];
  uint32_t valid, visual;
};

struct KeyToken {
  int32_t row, image, place[3], position, region;
};

inline KeyToken key_token(const AttentionProblem& p, int64_t b, int64_t slot) {
  const int32_t* at = p.key_slots + b * kSlotFields * p.key_slot_count + slot;
  const int64_t n = p.key_slot_count;
  return {at[kSlotRow * n],
          at[kSlotImage * n],
          {at[kSlotT * n], at[kSlotY * n], at[kSlotX * n]},
          at[kSlotPosition * n],
          at[kSlotRegion * n]};
}

inline TileQueries tile_queries(const AttentionProblem& p, int64_t b, int64_t tile) {
  const int64_t first = tile / p.block_tiles() * p.block_q + tile % p.block_tiles() * kAttentionTile;
  const int64_t count = std::min(kAttentionTile, p.block_q - tile % p.block_tiles() * kAttentionTile);
  const int32_t* slots = p.query_slots + b * kSlotFields * p.query_slot_count + first;
  int32_t field[kSlotFields][kAttentionTile] = {};
  std::fill_n(field[kSlotImage], kAttentionTile, kInvalidToken);
  for (int64_t i = 0; i < kSlotFields; ++i) std::copy_n(slots + i * p.query_slot_count, count, field[i]);
  TileQueries q;
  q.valid = q.visual = 0;
  std::copy_n(field[kSlotRegion], kAttentionTile, q.region);
  for (int64_t c = 0; c < kTileVectors; ++c) {
    q.image[c] = load(field[kSlotImage] + c * kLanes);
    q.position[c] = load(field[kSlotPosition] + c * kLanes);
    q.ordinary[c] = p.cross_image ? splat(int32_t{-1}) : (q.image[c] == splat(kTextToken));
    for (int64_t axis = 0; axis < 3; ++axis) {
      // unsigned, since nothing is known about what empty slots hold
      const vuint at = reinterpret_cast<vuint>(load(field[kSlotT + axis] + c * kLanes));
      q.low[axis][c] = reinterpret_cast<vint>(at - static_cast<uint32_t>(p.radius[axis]));
      q.high[axis][c] = reinterpret_cast<vint>(at + static_cast<uint32_t>(p.radius[axis]));
    }
    q.valid |= lane_bits(q.image[c] != splat(kInvalidToken)) << (c * kLanes);
    q.visual |= lane_bits(q.image[c] >= vint{}) << (c * kLanes);
  }
  return q;
}

// The rows of q that a tile's queries stand in, -1 for none.
inline void tile_rows(const AttentionProblem& p, int64_t b, int64_t tile, int32_t* rows) {
  const int64_t first = tile / p.block_tiles() * p.block_q + tile % p.block_tiles() * kAttentionTile;
  const int64_t count = std::min(kAttentionTile, p.block_q - tile % p.block_tiles() * kAttentionTile);
  const int32_t* slots = p.query_slots + b * kSlotFields * p.query_slot_count + first;
  for (int64_t i = 0; i < kAttentionTile; ++i) rows[i] = i < count ? slots[i] : -1;
}

// The queries that see a valid key.
PYVTK_INLINE uint32_t seen_by(const AttentionProblem& p, int64_t b, const TileQueries& q, const KeyToken& key) {
  uint32_t seen = 0, same_image = 0;
#pragma GCC unroll 4
  for (int64_t c = 0; c < kTileVectors; ++c) {
    const vint earlier = splat(key.position) <= q.position[c];
    if (key.image < 0) {
      seen |= lane_bits(earlier) << (c * kLanes);
      continue;
    }
    const vint same = q.image[c] == splat(key.image);
    vint outside = p.causal_window ? ~earlier : vint{};
#pragma GCC unroll 3
    for (int64_t axis = 0; axis < 3; ++axis) {
      outside |= (splat(key.place[axis]) < q.low[axis][c]) | (splat(key.place[axis]) > q.high[axis][c]);
    }
    seen |= lane_bits(blend(same, ~outside, q.ordinary[c] & earlier)) << (c * kLanes);
    same_image |= lane_bits(same) << (c * kLanes);
  }
  seen &= q.valid;
  if (p.regions && (same_image & seen)) {
    for (int64_t i = 0; i < kAttentionTile; ++i) {
      if (!((same_image & seen) >> i & 1)) continue;
      if (!p.routes[(b * p.regions + q.region[i]) * p.regions + key.region]) seen &= ~(1u << i);
    }
  }
  return seen;
}

// Keys of a tile while they are sorted: those that all queries see, that both halves need, the low one, the high one.
struct KeySorter {
  std::vector<int32_t> row[5];
  std::vector<uint32_t> seen[5];
  int64_t count[5];

  void reset(int64_t capacity) {
    for (int64_t kind = 0; kind < 5; ++kind) {
      count[kind] = 0;
      if (static_cast<int64_t>(row[kind].size()) < capacity) {
        row[kind].resize(static_cast<size_t>(capacity));
        seen[kind].resize(static_cast<size_t>(capacity));
      }
    }
  }
  // Without a branch: which kind comes next cannot be foreseen.
  void add(int32_t key, uint32_t bits, uint32_t valid, bool visual) {
    constexpr uint32_t kLow = kHalves == 1 ? kWholeTile : 0xff, kHigh = kHalves == 1 ? kWholeTile : 0xff00;
    const bool low = bits & kLow, high = bits & kHigh;
    const int64_t kind = low & high ? (bits == valid ? 0 : 1) : (low ? 2 : (high ? 3 : 4));
    row[kind][static_cast<size_t>(count[kind])] = key;
    seen[kind][static_cast<size_t>(count[kind])] = bits | (visual ? kVisualKey : 0);
    ++count[kind];
  }
};

// Fills in one tile of a table.
inline void attention_keys(const AttentionProblem& p, int64_t b, int64_t tile, AttentionTile& result, int32_t* rows,
                           uint32_t* seen, KeySorter& sorter) {
  const TileQueries q = tile_queries(p, b, tile);
  result.valid = q.valid;
  result.visual = q.visual;
  result.both = result.low = result.high = 0;
  if (!q.valid) return;
  const int32_t* counts = p.counts(b, tile);
  const int32_t* blocks = p.key_blocks + (b * p.query_block_count + tile / p.block_tiles()) * p.key_block_count;
  sorter.reset(counts[1] * p.block_k);
  for (int64_t i = 0; i < counts[1]; ++i) {
    const bool full = i < counts[0];
    for (int64_t slot = blocks[i] * p.block_k; slot < (blocks[i] + 1) * p.block_k; ++slot) {
      const KeyToken key = key_token(p, b, slot);
      if (key.image == kInvalidToken || key.row < 0) continue;
      // nobody sees it, whatever it holds: NaN is not hidden by adding -inf
      if (p.k_bias && p.k_bias[b * p.keys + key.row] == -std::numeric_limits<float>::infinity()) continue;
      sorter.add(key.row, full ? q.valid : seen_by(p, b, q, key), q.valid, key.image >= 0);
    }
  }
  for (int64_t kind = 0; kind < 4; ++kind) {
    rows = std::copy_n(sorter.row[kind].begin(), sorter.count[kind], rows);
    seen = std::copy_n(sorter.seen[kind].begin(), sorter.count[kind], seen);
  }
  result.both = static_cast<int32_t>(sorter.count[0] + sorter.count[1]);
  result.low = static_cast<int32_t>(sorter.count[2]);
  result.high = static_cast<int32_t>(sorter.count[3]);
}

inline void attention_table(const AttentionProblem& p, AttentionTable& table, int64_t begin, int64_t end) {
  KeySorter sorter;
  for (int64_t i = begin; i < end; ++i) {
    AttentionTile& tile = table.tiles[static_cast<size_t>(i)];
    attention_keys(p, table.batch_begin + i / table.row_tiles(), table.tile_begin + i % table.row_tiles(), tile,
                   table.rows.data() + tile.first, table.seen.data() + tile.first, sorter);
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
