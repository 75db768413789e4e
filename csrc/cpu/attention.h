// Attention of tokens to those that a plan lets them see.
//
// A tile is 16 queries, which stand along the lanes: logits [key][16 queries] are products of vectors of queries with
// single numbers of a key's row, read where it lies, so nothing of the keys is packed or gathered, and softmax adds and
// compares whole vectors. out[query][d] then sums vectors along d. Both are bounded by multiplications. Which keys a
// tile needs is found once for all heads (attention_keys.h). An item is a head of keys and a run of tiles: neighbouring
// tiles share keys, which stay in the cache.
#include "cpu/attention_tile.h"

namespace pyvtk::cpu::PYVTK_ISA {

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
      if (tile + 1 < tile_end) prefetch(b, kv_head, tile + 1);
      visit(table, keys, b, kv_head, true, keys.valid);
      visit(table, keys, b, kv_head, false, keys.valid & ~(p_.zero_rows ? keys.visual : 0));
    }
  }

 private:
  void prefetch(int64_t b, int64_t kv_head, int64_t tile) {
    int32_t rows[kAttentionTile];
    tile_rows(p_, b, tile, rows);
    for (int64_t head = kv_head * p_.group(); head < (kv_head + 1) * p_.group(); ++head) {
      prefetch_rows(p_.q.head<const T>(b, head), p_.q.row_stride, rows, p_.dim);
    }
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
      at = chunk_.next(table, tile, at, active, !on && !p_.keep_mass);
      keys_.need(chunk_);
      for (int64_t head = first; head < last; ++head) {
        if (p_.is_on(head) != on) continue;
        if (fresh) {
          prefetch_rows(p_.out.head<const T>(b, head), p_.out.row_stride, rows_, p_.dim);
          load_queries(b, head, head - first, active);
        }
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
