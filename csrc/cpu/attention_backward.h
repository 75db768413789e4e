// Gradient of attention.h. Probabilities are formed again from lse; a tile then adds to the gradients of the keys that
// it sees and finishes those of its queries. An item is a head of keys and a part of the tiles, with sums of its own,
// which are added up in order afterwards.
#include "cpu/attention.h"

namespace pyvtk::cpu::PYVTK_ISA {

// rows[key][d] += sum over queries of p[key * kHalf + query] * x[query][d], for some keys and a piece of d, over one
// half of the queries or both.
template <int64_t keys, int64_t vectors>
PYVTK_INLINE void add_to_rows(const float* const* p, const float* const* x, int64_t halves, int64_t ldx,
                              const int32_t* number, float* rows, int64_t ld) {
  vfloat sum[keys][vectors] = {};
  for (int64_t half = 0; half < halves; ++half) {
    const float* from = x[half];
    const float* weight = p[half];
    for (int64_t i = 0; i < kHalf; ++i, from += ldx, ++weight) {
      vfloat y[vectors];
#pragma GCC unroll 4
      for (int64_t c = 0; c < vectors; ++c) y[c] = load(from + c * kLanes);
#pragma GCC unroll 8
      for (int64_t n = 0; n < keys; ++n) {
        const vfloat w = splat(weight[n * kHalf]);
#pragma GCC unroll 4
        for (int64_t c = 0; c < vectors; ++c) sum[n][c] += w * y[c];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t n = 0; n < keys; ++n) {
    float* to = rows + number[n] * ld;
#pragma GCC unroll 4
    for (int64_t c = 0; c < vectors; ++c) store(to + c * kLanes, load(to + c * kLanes) + sum[n][c]);
  }
}

// One tile's gradients, of one head at a time: what does not depend on the type of elements.
class TileBackward {
 protected:
  TileBackward(const AttentionProblem& p, int64_t ld)
      : dim_(p.dim), ldo_(ceil_div(p.dim, kLanes) * kLanes), ld_(ld), memory_(floats(p)) {
    for (int64_t half = 0; half < kHalves; ++half) {
      weights_[half] = memory_.take(kChunk * kHalf);
      slopes_[half] = memory_.take(kChunk * kHalf);
    }
    for (float** array : {&q_, &grad_out_, &q_columns_, &grad_columns_, &sums_}) {
      *array = memory_.take(kAttentionTile * ldo_);
    }
  }

  void subtract_means() {
    for (int64_t c = 0; c < kTileVectors; ++c) shift_[c] -= mean_[c];
  }
  // Sums of p dp and of p: exp(z - lse) carries the rounding of lse, which grows with it, and is normalised anew.
  void add_means() {
    for (int64_t half = 0; half < kHalves; ++half) {
      const int64_t count = chunk_.runs[0].count + chunk_.runs[1 + half].count;
      vfloat sum[kHalfVectors] = {}, total[kHalfVectors] = {};
      for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
        for (int64_t c = 0; c < kHalfVectors; ++c) {
          const vfloat p = load(weights_[half] + i * kHalf + c * kLanes);
          sum[c] += p * load(slopes_[half] + i * kHalf + c * kLanes);
          total[c] += p;
        }
      }
      for (int64_t c = 0; c < kHalfVectors; ++c) {
        mean_[half * kHalfVectors + c] += sum[c];
        total_[half * kHalfVectors + c] += total[c];
      }
    }
  }
  void normalise() {
    for (int64_t c = 0; c < kTileVectors; ++c) {
      factor_[c] = blend(total_[c] == vfloat{}, splat(1.0f), 1.0f / total_[c]);
      mean_[c] *= factor_[c];
    }
    subtract_means();
  }

  // Probabilities of a chunk and their gradients.
  __attribute__((noinline)) void weigh(bool text_only) {
    weigh_run<kTileVectors>(0, 0, text_only);
    if constexpr (kHalves == 2) {
      weigh_run<kHalfVectors>(1, 0, text_only);
      weigh_run<kHalfVectors>(2, kHalf, text_only);
    }
    text_only_ = text_only;
  }

  __attribute__((noinline)) void add_gradients(bool fresh) {
    const float ones[kSumQueries] = {1.0f, 1.0f, 1.0f, 1.0f};
    for (int64_t half = 0; half < kHalves; ++half) {
      const KeyRun &common = chunk_.runs[0], &own = chunk_.runs[1 + half];
      form_slopes(half, common.count + own.count);
      float* sums = sums_ + half * kHalf * ldo_;
      for_pieces(dim_, [&](auto vectors, auto whole, int64_t d) {
        for (int64_t i = 0; i < kHalf; i += kSumQueries) {
          weighted_rows<kSumQueries, vectors, whole>(slopes_[half] + i, k_, common, own, d, dim_, sums + i * ldo_, ldo_,
                                                     ones, fresh);
        }
      });
    }
    for (int64_t kind = 0; kind < kRuns; ++kind) {
      if (grad_bias_) add_bias(kind);
      add_run(kind, slopes_, q_, grad_k_);
      if (text_only_) drop_visual(kind);
      add_run(kind, weights_, grad_out_, grad_v_);
    }
  }

  // Gradients of logits from those of probabilities, which are normalised.
  void form_slopes(int64_t half, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
#pragma GCC unroll 2
      for (int64_t c = 0; c < kHalfVectors; ++c) {
        const int64_t at = i * kHalf + c * kLanes, vector = half * kHalfVectors + c;
        const vfloat p = load(weights_[half] + at) * factor_[vector];
        store(weights_[half] + at, p);
        store(slopes_[half] + at, p * (load(slopes_[half] + at) + shift_[vector]));
      }
    }
  }

  // Where a run's first key stands in the arrays of the halves that it has.
  int64_t before(int64_t kind) const { return kind == 0 ? 0 : chunk_.runs[0].count; }
  static int64_t first_half(int64_t kind) { return kind == 2 ? 1 : 0; }
  static int64_t last_half(int64_t kind) { return kind == 1 ? 0 : kHalves - 1; }

  // Probabilities of a run and their gradients; queries from `first` on.
  template <int64_t vectors>
  void weigh_run(int64_t kind, int64_t first, bool text_only) {
    constexpr int64_t kKeys = vectors == kTileVectors ? kBothKeys : kHalfKeys;
    const KeyRun& run = chunk_.runs[kind];
    const int64_t first_vector = first / kLanes;
    vint bit[vectors];
    vfloat lse[vectors];
    for (int64_t c = 0; c < vectors; ++c) {
      bit[c] = single_bits(first_vector + c);
      lse[c] = lse_[first_vector + c];
    }
    const auto place = [&](float* const* halves, int64_t i, int64_t c) __attribute__((always_inline)) {
      const int64_t vector = first_vector + c;
      return halves[vector / kHalfVectors] + (before(kind) + i) * kHalf + vector % kHalfVectors * kLanes;
    };
    for_key_products<kKeys, vectors>(k_, run, q_columns_ + first, dim_,
                                     [&](int64_t i, auto& sum) __attribute__((always_inline)) {
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
                                           store(place(weights_, i + n, c), exp2_of_negative(z - lse[c]));
                                         }
                                       }
                                     });
    for_key_products<kKeys, vectors>(v_, run, grad_columns_ + first, dim_,
                                     [&](int64_t i, auto& sum) __attribute__((always_inline)) {
                                       constexpr int64_t keys = sizeof(sum) / sizeof(sum[0]);
#pragma GCC unroll 12
                                       for (int64_t n = 0; n < keys; ++n) {
                                         const bool weightless = text_only && (run.seen[i + n] & kVisualKey);
#pragma GCC unroll 4
                                         for (int64_t c = 0; c < vectors; ++c)
                                           store(place(slopes_, i + n, c), weightless ? vfloat{} : sum[n][c]);
                                       }
                                     });
  }

  void add_bias(int64_t kind) {
    const KeyRun& run = chunk_.runs[kind];
    for (int64_t i = 0; i < run.count; ++i) {
      vfloat sum = {};
      for (int64_t half = first_half(kind); half <= last_half(kind); ++half) {
        for (int64_t c = 0; c < kHalf; c += kLanes) sum += load(slopes_[half] + (before(kind) + i) * kHalf + c);
      }
      grad_bias_[run.row[i]] += reduce_add(sum);
    }
  }

  void drop_visual(int64_t kind) {
    const KeyRun& run = chunk_.runs[kind];
    for (int64_t i = 0; i < run.count; ++i) {
      if (!(run.seen[i] & kVisualKey)) continue;
      for (int64_t half = first_half(kind); half <= last_half(kind); ++half) {
        std::fill_n(weights_[half] + (before(kind) + i) * kHalf, kHalf, 0.0f);
      }
    }
  }

  // Adds a run's products with rows x [16][ldo] to its rows of `sums`.
  void add_run(int64_t kind, float* const* p, const float* x, float* sums) {
    const KeyRun& run = chunk_.runs[kind];
    const int64_t first = first_half(kind), halves = last_half(kind) - first + 1;
    for_pieces(ldo_, [&](auto vectors, auto, int64_t d) {
      const auto group = [&](auto keys, int64_t i) __attribute__((always_inline)) {
        const float* weights[kHalves];
        const float* rows[kHalves];
        for (int64_t half = 0; half < halves; ++half) {
          weights[half] = p[first + half] + (before(kind) + i) * kHalf;
          rows[half] = x + (first + half) * kHalf * ldo_ + d;
        }
        add_to_rows<keys, vectors>(weights, rows, halves, ldo_, run.row + i, sums + d, ld_);
      };
      int64_t i = 0;
      for (; i + kSumQueries <= run.count; i += kSumQueries) group(std::integral_constant<int64_t, kSumQueries>{}, i);
      remaining_rows<kSumQueries - 1>(i, run.count - i, group);
    });
  }

  int64_t dim_, ldo_, ld_;
  AttentionMemory memory_;
  float* weights_[kHalves];  // [kChunk][kHalf]: probabilities
  float* slopes_[kHalves];   // [kChunk][kHalf]: their gradients, then those of logits
  float* q_;                 // [16][ldo], scaled
  float* grad_out_;          // [16][ldo]
  float* q_columns_;         // [ldo][16], scaled
  float* grad_columns_;      // [ldo][16]
  float* sums_;              // [16][ldo]: gradients of queries
  float* grad_k_ = nullptr;  // [keys][ld]
  float* grad_v_ = nullptr;  // [keys][ld]
  float* grad_bias_ = nullptr;
  FloatRows k_, v_;
  const float* bias_ = nullptr;
  vfloat lse_[kTileVectors], shift_[kTileVectors], mean_[kTileVectors], total_[kTileVectors], factor_[kTileVectors];
  bool text_only_ = false;
  KeyChunk chunk_;

 private:
  static constexpr int64_t kRuns = kHalves == 2 ? 3 : 1;

  static int64_t floats(const AttentionProblem& p) {
    return 4 * kChunk * kAttentionTile + 5 * kAttentionTile * ceil_div(p.dim, kLanes) * kLanes;
  }
};

template <class T>
class AttentionBackward : TileBackward {
 public:
  AttentionBackward(const AttentionProblem& p, const AttentionGradient& g)
      : TileBackward(p, g.ld), p_(p), g_(g), keys_(p) {}

  void run(const AttentionTable& table, int64_t b, int64_t kv_head, int64_t part) {
    const int64_t tiles = p_.row_tiles();
    const int64_t sums = ((b - table.batch_begin) * p_.kv_heads + kv_head) * g_.parts + part;
    grad_k_ = g_.direct ? g_.k.head<float>(b, kv_head) : g_.k_sums + sums * p_.keys * g_.ld;
    grad_v_ = g_.direct ? g_.v.head<float>(b, kv_head) : g_.v_sums + sums * p_.keys * g_.ld;
    grad_bias_ = g_.bias_sums ? g_.bias_sums + sums * p_.keys : nullptr;
    if (table.tile_begin == 0) {
      std::fill_n(grad_k_, p_.keys * g_.ld, 0.0f);
      std::fill_n(grad_v_, p_.keys * g_.ld, 0.0f);
      if (grad_bias_) std::fill_n(grad_bias_, p_.keys, 0.0f);
    }
    const int64_t first = std::max(tiles * part / g_.parts, table.tile_begin);
    const int64_t last = std::min(tiles * (part + 1) / g_.parts, table.tile_end);
    keys_.choose(b, kv_head, table.entries(b, first, last));
    k_ = keys_.k;
    v_ = keys_.v;
    bias_ = p_.k_bias ? p_.k_bias + b * p_.keys : nullptr;
    for (int64_t tile = first; tile < last; ++tile) {
      tile_rows(p_, b, tile, rows_);
      const AttentionTile& keys = table.tile(b, tile);
      if (tile + 1 < last) prefetch(b, kv_head, tile + 1);
      for (int64_t head = kv_head * p_.group(); head < (kv_head + 1) * p_.group(); ++head) {
        visit(table, keys, b, head, keys.valid & ~(p_.is_on(head) || !p_.zero_rows ? 0 : keys.visual));
      }
    }
  }

 private:
  void prefetch(int64_t b, int64_t kv_head, int64_t tile) {
    int32_t rows[kAttentionTile];
    tile_rows(p_, b, tile, rows);
    for (int64_t head = kv_head * p_.group(); head < (kv_head + 1) * p_.group(); ++head) {
      prefetch_rows(p_.q.head<const T>(b, head), p_.q.row_stride, rows, p_.dim);
      if (g_.out.data) prefetch_rows(g_.out.head<const T>(b, head), g_.out.row_stride, rows, p_.dim);
    }
  }

  void visit(const AttentionTable& table, const AttentionTile& tile, int64_t b, int64_t head, uint32_t active) {
    const int64_t entries = active ? tile.both + tile.low + tile.high : 0;
    if (entries == 0) {
      std::fill_n(sums_, kAttentionTile * ldo_, 0.0f);
    } else {
      prefetch_rows(g_.q.head<const T>(b, head), g_.q.row_stride, rows_, p_.dim);
      load_queries(b, head, active);
      // The mean slope of a query, sum of p dp, is also grad_out . out; but a rounded out would leave its errors in the
      // gradient of a bias, which sums over all queries.
      const bool single = entries <= kChunk;
      if (!single && (std::is_same_v<T, float> || !grad_bias_)) subtract_means(b, head, active);
      const auto walk = [&](auto&& f) {
        for (int64_t at = 0; at < entries;) {
          const bool fresh = at == 0;
          at = chunk_.next(table, tile, at, active, !p_.is_on(head) && !p_.keep_mass);
          keys_.need(chunk_);
          weigh(p_.keep_mass && !p_.is_on(head));
          f(fresh);
        }
      };
      if (!single && !std::is_same_v<T, float> && grad_bias_) {
        walk([&](bool) { add_means(); });
        normalise();
      }
      walk([&](bool fresh) {
        if (single) {
          add_means();
          normalise();
        }
        add_gradients(fresh);
      });
    }
    for (int64_t i = 0; i < kAttentionTile; ++i) {
      if (rows_[i] < 0) continue;
      T* to = g_.q.head<T>(b, head) + rows_[i] * g_.q.row_stride;
      store_row(sums_ + i * ldo_, p_.scale, p_.dim, to);
    }
  }

  // A tile's queries and gradients, with zeros for those that are not active.
  void load_queries(int64_t b, int64_t head, uint32_t active) {
    const float* q[kAttentionTile];
    const float* grad[kAttentionTile];
    float lse[kAttentionTile], shift[kAttentionTile];
    for (int64_t i = 0; i < kAttentionTile; ++i) {
      float* to_q = q_ + i * ldo_;
      float* to_grad = grad_out_ + i * ldo_;
      q[i] = to_q;
      grad[i] = to_grad;
      lse[i] = kInfinity;
      shift[i] = 0.0f;
      const int64_t row = rows_[i], lse_at = (b * p_.q_heads + head) * p_.queries + row;
      // Blind queries have probability 0 of everything.
      const bool sees = (active >> i & 1) && p_.lse[lse_at] != -kInfinity;
      if (sees) {
        widen_row(p_.q.head<const T>(b, head) + row * p_.q.row_stride, p_.dim, ldo_, to_q);
        lse[i] = p_.lse[lse_at] * kLog2E;
        shift[i] = g_.lse ? g_.lse[lse_at] : 0.0f;
      } else {
        std::fill_n(to_q, ldo_, 0.0f);
      }
      if (sees && g_.out.data) {
        widen_row(g_.out.head<const T>(b, head) + row * g_.out.row_stride, p_.dim, ldo_, to_grad);
      } else {
        std::fill_n(to_grad, ldo_, 0.0f);
      }
    }
    for (int64_t c = 0; c < kTileVectors; ++c) {
      lse_[c] = load(lse + c * kLanes);
      shift_[c] = load(shift + c * kLanes);
      mean_[c] = total_[c] = vfloat{};
      factor_[c] = splat(1.0f);
    }
    tile_columns(q, ldo_, p_.scale * kLog2E, q_columns_);
    tile_columns(grad, ldo_, 1.0f, grad_columns_);
    // Gradients of keys are sums over scaled queries.
    for (int64_t i = 0; i < kAttentionTile * ldo_; i += kLanes) store(q_ + i, load(q_ + i) * p_.scale);
  }

  // Takes the mean slopes of queries off their shift: from grad_out and out, or those added up.
  void subtract_means(int64_t b, int64_t head, uint32_t active) {
    float mean[kAttentionTile] = {};
    for (int64_t i = 0; i < kAttentionTile; ++i) {
      if (!(active >> i & 1)) continue;
      const float* x = grad_out_ + i * ldo_;
      const T* y = p_.out.head<const T>(b, head) + rows_[i] * p_.out.row_stride;
      vfloat sum = {};
      for (int64_t d = 0; d < p_.dim; d += kLanes) {
        const int64_t left = p_.dim - d;
        sum += load(x + d) * (left < kLanes ? load_partial(y + d, left) : load(y + d));
      }
      mean[i] = reduce_add(sum);
    }
    for (int64_t c = 0; c < kTileVectors; ++c) mean_[c] = load(mean + c * kLanes);
    subtract_means();
  }
  using TileBackward::subtract_means;

  const AttentionProblem& p_;
  const AttentionGradient& g_;
  KeyRows<T> keys_;
  int32_t rows_[kAttentionTile];
};

// Sums of gradients have rows of a multiple of these.
inline int64_t attention_lanes() { return kLanes; }

// Items [begin, end) of a table: rows of the batch, heads of keys, parts.
template <class T>
void attention_backward(const AttentionProblem& p, const AttentionGradient& g, const AttentionTable& table,
                        int64_t begin, int64_t end) {
  AttentionBackward<T> work(p, g);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t pair = item / g.parts;
    work.run(table, table.batch_begin + pair / p.kv_heads, pair % p.kv_heads, item % g.parts);
  }
}

// Adds up the parts of rows [begin, end) of [rows of the batch][kv_heads][keys], from row `batch_begin` of the batch
// on.
template <class T>
void attention_backward_keys(const AttentionProblem& p, const AttentionGradient& g, int64_t batch_begin, int64_t begin,
                             int64_t end) {
  std::vector<float> sum(static_cast<size_t>(g.ld));
  for (int64_t row = begin; row < end; ++row) {
    const int64_t pair = row / p.keys, key = row % p.keys, b = batch_begin + pair / p.kv_heads;
    for (const auto& [sums, rows] : {std::pair(g.k_sums, &g.k), std::pair(g.v_sums, &g.v)}) {
      const float* from = sums + (pair * g.parts * p.keys + key) * g.ld;
      std::copy_n(from, g.ld, sum.data());
      for (int64_t part = 1; part < g.parts; ++part) {
        from += p.keys * g.ld;
        for (int64_t d = 0; d < g.ld; ++d) sum[static_cast<size_t>(d)] += from[d];
      }
      store_row(sum.data(), 1.0f, p.dim, rows->template head<T>(b, pair % p.kv_heads) + key * rows->row_stride);
    }
  }
}

// Adds up the bias' gradients of all heads for rows [begin, end) of [rows of the batch][keys].
inline void attention_backward_bias(const AttentionProblem& p, const AttentionGradient& g, int64_t batch_begin,
                                    int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / p.keys, key = row % p.keys, sums = p.kv_heads * g.parts;
    float sum = 0.0f;
    for (int64_t i = 0; i < sums; ++i) sum += g.bias_sums[(b * sums + i) * p.keys + key];
    g.k_bias[(batch_begin + b) * p.keys + key] = sum;
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
