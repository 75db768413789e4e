// One neighbor_attention call on raw pointers, and how its work is cut. Torch-free.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/types.h"
#include "cpu/attention_slots.h"

namespace pyvtk::cpu {

// Queries that are worked on together; vectors run along them.
inline constexpr int64_t kAttentionTile = 16;

// A tensor [batch, heads, rows, dim]; strides in elements, the last dimension is contiguous.
struct AttentionRows {
  void* data;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  T* head(int64_t b, int64_t head) const {
    return static_cast<T*>(data) + b * batch_stride + head * head_stride;
  }
};

struct AttentionProblem {
  AttentionRows q, k, v, out;
  float* lse;  // [batch, q_heads, queries]
  int64_t batch, q_heads, kv_heads, queries, keys, dim;
  const float* k_bias;       // [batch, keys] or nullptr
  const bool* visual_heads;  // [q_heads] or nullptr
  float scale;
  bool keep_mass, zero_rows;

  // the plan
  const int32_t* query_slots;  // [batch, 8, query_slot_count]
  const int32_t* key_slots;    // [batch, 8, key_slot_count]
  const int32_t* key_blocks;   // [batch, query_blocks, key_blocks]
  const int32_t* key_counts;   // [batch, query_blocks, 2]
  const int32_t* routes;       // [batch, regions, regions]
  int64_t query_slot_count, key_slot_count, query_block_count, key_block_count, block_q, block_k, regions;
  int32_t radius[3];
  bool causal_window, cross_image;

  int64_t group() const { return q_heads / kv_heads; }
  bool is_on(int64_t head) const { return !visual_heads || visual_heads[head]; }

  // Tiles of a block of queries, and of a row of the batch.
  int64_t block_tiles() const { return ceil_div(block_q, kAttentionTile); }
  int64_t row_tiles() const { return query_block_count * block_tiles(); }
  const int32_t* counts(int64_t b, int64_t tile) const {
    return key_counts + (b * query_block_count + tile / block_tiles()) * 2;
  }
};

// Gradients, and where those of keys and values are summed: [steps' rows of the batch][kv_heads][parts][keys][ld] each,
// or the result itself, if there is one part and it is float32 of whole vectors.
struct AttentionGradient {
  AttentionRows out;  // gradient of it; without data it is zero
  const float* lse;   // [batch, q_heads, queries], gradient of it, or nullptr
  AttentionRows q, k, v;
  float* k_bias;  // [batch, keys] or nullptr
  int64_t parts;  // that the tiles of a row of the batch are cut into; by sizes alone, so that sums have one order
  bool direct;
  int64_t ld;
  float* k_sums;
  float* v_sums;
  float* bias_sums;  // [steps' rows][kv_heads][parts][keys], or nullptr
};

// The keys of one tile of queries, without those that none of its queries sees. Where a half of the tile has vectors of
// its own, keys that only one half needs stand apart.
struct AttentionTile {
  int64_t first;            // of its keys in the table
  int32_t both, low, high;  // numbers of keys, which stand in this order
  uint32_t valid, visual;   // a bit per query
};

// Keys of a range of tiles, for all heads.
struct AttentionTable {
  int64_t batch_begin, batch_end;  // rows of the batch
  int64_t tile_begin, tile_end;    // tiles of each of them
  std::vector<AttentionTile> tiles;
  std::vector<int32_t> rows;   // of the keys
  std::vector<uint32_t> seen;  // bits 0-15: the queries that see it, kVisualKey: it is visual

  int64_t row_tiles() const { return tile_end - tile_begin; }
  const AttentionTile& tile(int64_t b, int64_t tile) const {
    return tiles[static_cast<size_t>((b - batch_begin) * row_tiles() + tile - tile_begin)];
  }
  // Keys of tiles [begin, end).
  int64_t entries(int64_t b, int64_t begin, int64_t end) const {
    int64_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += tile(b, i).both + tile(b, i).low + tile(b, i).high;
    return sum;
  }
};

inline constexpr uint32_t kVisualKey = 1u << 16;

// Walks a problem in steps whose tables stay small: several rows of the batch, or a part of one. f(table) finds every
// tile's place in a table that is large enough for all keys of the blocks that it visits.
template <class F>
void for_attention_tables(const AttentionProblem& p, int64_t most_rows, F&& f) {
  constexpr int64_t kMostKeys = int64_t{1} << 20;
  const int64_t tiles = p.row_tiles();
  const auto tile_keys = [&](int64_t b, int64_t tile) { return p.counts(b, tile)[1] * p.block_k; };
  const auto row_keys = [&](int64_t b) {
    int64_t sum = 0;
    for (int64_t tile = 0; tile < tiles; ++tile) sum += tile_keys(b, tile);
    return sum;
  };
  AttentionTable table;
  const auto visit = [&](int64_t batch_begin, int64_t batch_end, int64_t tile_begin, int64_t tile_end) {
    table.batch_begin = batch_begin;
    table.batch_end = batch_end;
    table.tile_begin = tile_begin;
    table.tile_end = tile_end;
    table.tiles.clear();
    int64_t used = 0;
    for (int64_t b = batch_begin; b < batch_end; ++b) {
      for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
        table.tiles.push_back({used, 0, 0, 0, 0, 0});
        used += tile_keys(b, tile);
      }
    }
    if (static_cast<int64_t>(table.rows.size()) < used) {
      table.rows.resize(static_cast<size_t>(used));
      table.seen.resize(static_cast<size_t>(used));
    }
    f(table);
  };
  for (int64_t b = 0; b < p.batch && tiles > 0;) {
    int64_t used = row_keys(b), end = b + 1;
    if (used <= kMostKeys) {
      while (end < p.batch && end - b < most_rows && (used += row_keys(end)) <= kMostKeys) ++end;
      visit(b, end, 0, tiles);
    } else {
      for (int64_t begin = 0, tile = 0; begin < tiles; begin = tile) {
        for (used = 0; tile < tiles && (tile == begin || used + tile_keys(b, tile) <= kMostKeys); ++tile) {
          used += tile_keys(b, tile);
        }
        visit(b, end, begin, tile);
      }
    }
    b = end;
  }
}

}  // namespace pyvtk::cpu
