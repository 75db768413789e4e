// select: the tokens that stay, row by row. pyvtk/reference/select.py is the definition.
//
// A score becomes an int32 key that orders as scores rank. All criteria keep a prefix of (key descending, token
// ascending), so each is a Cut and the most restrictive one decides. A cut is found by histograms over the range of the
// keys that are left, 10 bits at a time: a few rounds, usually one over the row and one or two over few keys. What
// stays is a set of bits, from which indices are written in order. Reads the row about four times, from cache.
#include "common/select_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

inline constexpr int32_t kNanKey = std::numeric_limits<int32_t>::min();
inline constexpr int32_t kInfinityKey = 0x7f800000;
inline constexpr int kMostBits = 10;  // four tables of 2^10 bins stay in the first-level cache
inline constexpr auto kOne = [](int32_t) { return 1; };

// Ordered as scores rank: NaN lowest, -0.0 as +0.0.
PYVTK_INLINE vint key_of(vfloat score) {
  const vint bits = as_int(score);
  const vint key = bits ^ ((bits >> 31) & 0x7fffffff);
  const vint one_zero = key - (key == -1);  // -1 is the key of -0.0
  return blend((bits & 0x7fffffff) > 0x7f800000, splat(kNanKey), one_zero);
}
PYVTK_INLINE int32_t key_of(float score) {
  const int32_t bits = std::bit_cast<int32_t>(score);
  if ((bits & 0x7fffffff) > 0x7f800000) return kNanKey;
  const int32_t key = bits ^ ((bits >> 31) & 0x7fffffff);
  return key + (key == -1);
}
PYVTK_INLINE float score_of(int32_t key) { return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff)); }

// One bit per lane of a mask whose lanes are 0 or -1.
PYVTK_INLINE uint64_t bits_of(vint mask) {
#if PYVTK_VECTOR_BYTES == 64
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif PYVTK_VECTOR_BYTES == 32
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  uint64_t bits = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint64_t>(mask[lane] & 1) << lane;
  return bits;
#endif
}

// The lowest `count` bits; all of them from 64 on, none below 1.
PYVTK_INLINE uint64_t low_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
}

// One bit for each of 64 bools that is not 0; of the first `count` only.
PYVTK_INLINE uint64_t bits_of_bools(const uint8_t* bools, int64_t count) {
  uint64_t bits = 0;
  for (int64_t first = 0; first < count && first < 64; first += 8) {
    uint64_t bytes = 0;
    std::memcpy(&bytes, bools + first, static_cast<size_t>(std::min<int64_t>(8, count - first)));
    const uint64_t low = 0x7f7f7f7f7f7f7f7f;
    const uint64_t ones = ((((bytes & low) + low) | bytes) >> 7) & 0x0101010101010101;
    bits |= ((ones * 0x0102040810204080) >> 56) << first;  // gathers the lowest bit of each byte
  }
  return bits;
}

template <class F>
PYVTK_INLINE void for_each_bit(uint64_t bits, F&& f) {
  for (; bits; bits &= bits - 1) f(std::countr_zero(bits));
}

// Uninitialised memory that grows when more is asked for.
template <class T>
class Buffer {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      memory_.reset(new T[static_cast<size_t>(size)]);
      size_ = size;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

struct SelectScratch {
  Buffer<int32_t> keys, list_keys, list_tokens, spare;
  Buffer<uint64_t> stay, fixed, forced, candidate, entries, spare_entries;
  Buffer<int64_t> group_ends, group_forced;
};

struct KeyRange {
  int32_t low;
  int32_t high;
};

// Keys of a row, padded to a multiple of 64 so that later loops need no tail.
template <class T>
KeyRange make_keys(const T* scores, int64_t n, int32_t* keys) {
  vint low = splat(std::numeric_limits<int32_t>::max());
  vint high = splat(std::numeric_limits<int32_t>::min());
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vint key = key_of(load(scores + i));
    store(keys + i, key);
    low = blend(key < low, key, low);
    high = blend(key > high, key, high);
  }
  KeyRange range{low[0], high[0]};
  for (int64_t lane = 1; lane < kLanes; ++lane) {
    range = {std::min(range.low, static_cast<int32_t>(low[lane])),
             std::max(range.high, static_cast<int32_t>(high[lane]))};
  }
  for (; i < n; ++i) {
    keys[i] = key_of(to_float(scores[i]));
    range = {std::min(range.low, keys[i]), std::max(range.high, keys[i])};
  }
  for (; i % 64; ++i) keys[i] = 0;
  return range;
}

inline KeyRange range_of(const int32_t* keys, int64_t n) {
  int32_t low = std::numeric_limits<int32_t>::max();
  int32_t high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    low = std::min(low, keys[i]);
    high = std::max(high, keys[i]);
  }
  return {low, high};
}

// Keys of some tokens of a row, in token order. tokens == nullptr: of all.
struct KeyList {
  const int32_t* keys;
  const int32_t* tokens;
  int64_t size;
  KeyRange range;

  int64_t token(int64_t i) const { return tokens ? tokens[i] : i; }
};

// A prefix of the ranking: keys above the pivot, and those equal to it of tokens before `end`.
struct Cut {
  int32_t pivot;
  int64_t end;

  bool holds(int32_t key, int64_t token) const { return key > pivot || (key == pivot && token < end); }
};
inline constexpr Cut kKeepAll{kNanKey, std::numeric_limits<int64_t>::max()};
inline constexpr Cut kKeepNone{std::numeric_limits<int32_t>::max(), 0};

inline Cut stricter(Cut a, Cut b) {
  if (a.pivot != b.pivot) return a.pivot > b.pivot ? a : b;
  return a.end < b.end ? a : b;
}

// One round of narrowing: sums weights per bin, finds from the top the bin in which their sum reaches `need`, leaves in
// `need` what is missing before that bin, and copies the bin's keys to `spare` (which may be `keys`: writes never pass
// reads). Returns their number.
//   bin_of: vint -> vint, 0 .. 2^bits - 1, never descending as the key ascends
template <class Mass, class Weight, class BinOf>
int64_t narrow(const int32_t* keys, int64_t n, int bits, BinOf bin_of, Mass& need, Weight weight, int32_t* spare) {
  // Sorted or tied rows hit one bin again and again; with several tables an increment need not wait for the last one.
  constexpr int kTables = 4;
  Mass tables[kTables][1 << kMostBits];
  const int64_t num_bins = int64_t{1} << bits;
  for (auto& table : tables) std::fill_n(table, num_bins, Mass{0});
  int32_t bins[kLanes];
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    store(bins, bin_of(load(keys + i)));
    for (int64_t lane = 0; lane < kLanes; ++lane) tables[lane % kTables][bins[lane]] += weight(keys[i + lane]);
  }
  int32_t rest[kLanes] = {};
  std::copy_n(keys + i, n - i, rest);
  store(bins, bin_of(load(rest)));
  for (int64_t lane = 0; lane < n - i; ++lane) tables[0][bins[lane]] += weight(rest[lane]);

  int64_t bin = num_bins - 1;
  for (;; --bin) {
    const Mass mass = tables[0][bin] + tables[1][bin] + tables[2][bin] + tables[3][bin];
    if (mass >= need) break;
    need -= mass;
  }
  int64_t count = 0;
  for (i = 0; i + kLanes <= n; i += kLanes) {
    const vint key = load(keys + i);
    for_each_bit(bits_of(bin_of(key) == static_cast<int32_t>(bin)),
                 [&](int64_t lane) { spare[count++] = keys[i + lane]; });
  }
  for (int64_t lane = 0; lane < n - i; ++lane) {
    spare[count] = rest[lane];
    count += bins[lane] == static_cast<int32_t>(bin);
  }
  return count;
}

// The prefix that ends with the `ties`-th key equal to the pivot.
inline Cut cut_after_ties(const KeyList& list, int32_t pivot, int64_t ties) {
  int64_t i = 0;
  for (; i + 64 <= list.size; i += 64) {
    uint64_t equal = 0;
    for (int64_t j = 0; j < 64; j += kLanes) equal |= bits_of(load(list.keys + i + j) == pivot) << j;
    const int64_t found = std::popcount(equal);
    if (found >= ties) break;
    ties -= found;
  }
  for (;; ++i) {
    if (list.keys[i] == pivot && --ties == 0) return {pivot, list.token(i) + 1};
  }
}

// The smallest prefix of the list's ranking whose weights sum to `need` or more; 1 <= need <= their total. Equal keys
// weigh the same, and `weight` is never negative. `keys`, `n` and `range` are what is left of the list once keys that
// cannot be the pivot are gone.
template <class Mass, class Weight>
Cut find_cut(const KeyList& list, const int32_t* keys, int64_t n, KeyRange range, Mass need, Weight weight,
             int32_t* spare) {
  bool first = true;
  while (range.low != range.high) {
    // Clearing and summing more bins than there are keys would cost more than it narrows.
    const int bits = std::clamp(static_cast<int>(std::bit_width(static_cast<uint64_t>(n))) - 2, 4, kMostBits);
    const float low = score_of(range.low);
    const float scale = static_cast<float>((1 << bits) - 1) / (score_of(range.high) - low);
    if (first && range.low < 0 && range.high > 0 && scale > 0.0f) {
      // Half of all keys between the signs belong to numbers nearer to 0 than any score is: bins of equal width in the
      // score itself serve better. (Infinite and NaN scores give a scale of 0 or NaN.)
      n = narrow(
          keys, n, bits,
          [=](vint key) {
            const vfloat score = as_float(key ^ ((key >> 31) & 0x7fffffff));
            // rest lanes hold key 0, which lies inside the range
            return __builtin_convertvector((score - low) * scale, vint);
          },
          need, weight, spare);
    } else {
      const uint32_t base = static_cast<uint32_t>(range.low);
      const uint32_t width = static_cast<uint32_t>(range.high) - base;
      const int shift = std::max(0, static_cast<int>(std::bit_width(width)) - bits);
      n = narrow(
          keys, n, bits,
          [=](vint key) { return reinterpret_cast<vint>((reinterpret_cast<vuint>(key) - base) >> shift); }, need,
          weight, spare);
    }
    keys = spare;
    range = range_of(keys, n);
    first = false;
  }
  const int32_t pivot = range.high;
  return cut_after_ties(list, pivot, static_cast<int64_t>(ceil_div(need, static_cast<Mass>(weight(pivot)))));
}

// A key that at least `count` of the list reach, near to the best such key: the count-th largest of the maxima of
// disjoint sets of 16 keys.
inline int32_t reached_by(const KeyList& list, int64_t count, int32_t* spare) {
  int64_t size = 0;
  for (int64_t i = 0; i + 16 * kLanes <= list.size; i += 16 * kLanes, size += kLanes) {
    vint high = load(list.keys + i);
    for (int64_t j = 1; j < 16; ++j) {
      const vint key = load(list.keys + i + j * kLanes);
      high = blend(key > high, key, high);
    }
    store(spare + size, high);
  }
  const KeyList maxima{spare, nullptr, size, range_of(spare, size)};
  return find_cut<int32_t>(maxima, spare, size, maxima.range, static_cast<int32_t>(count), kOne, spare + size).pivot;
}

// The best `count` of the list. spare: as many as the list holds, and 64 more
inline Cut cut_at_count(const KeyList& list, int64_t count, int32_t* spare) {
  if (count <= 0) return kKeepNone;
  if (count >= list.size) return kKeepAll;
  const int32_t need = static_cast<int32_t>(count);
  // Few of many: most keys lie below a bound that is cheap to find.
  if (list.size >= 2048 && count <= list.size / 64 && list.range.low != list.range.high) {
    const int32_t bound = reached_by(list, count, spare);
    int64_t n = 0, i = 0;
    for (; i + kLanes <= list.size; i += kLanes) {
      for_each_bit(bits_of(load(list.keys + i) > bound), [&](int64_t lane) { spare[n++] = list.keys[i + lane]; });
    }
    for (; i < list.size; ++i) {
      if (list.keys[i] > bound) spare[n++] = list.keys[i];
    }
    if (n < count) return cut_after_ties(list, bound, count - n);
    return find_cut<int32_t>(list, spare, n, range_of(spare, n), need, kOne, spare);
  }
  return find_cut<int32_t>(list, list.keys, list.size, list.range, need, kOne, spare);
}

// The smallest prefix that holds the share p of the list's mass, at least one token.
inline Cut cut_at_mass(const KeyList& list, double p, int32_t* spare) {
  const int32_t largest = list.range.high;
  // Nothing has mass: only "at least one" is left.
  if (list.size == 0 || largest <= 0) return cut_at_count(list, 1, spare);
  int exponent = 0;
  if (largest != kInfinityKey) std::frexp(score_of(largest), &exponent);
  const double scale = std::ldexp(1.0, 31 - exponent);
  const auto cut = [&](auto weight) {
    int64_t total = 0;
    for (int64_t i = 0; i < list.size; ++i) total += weight(list.keys[i]);
    const int64_t need = p < 1.0 ? static_cast<int64_t>(std::ceil(p * static_cast<double>(total))) : total;
    if (need <= 0) return cut_at_count(list, 1, spare);
    return find_cut<int64_t>(list, list.keys, list.size, list.range, need, weight, spare);
  };
  if (largest == kInfinityKey) return cut([](int32_t key) { return int64_t{key == kInfinityKey}; });
  // Exact: a float times a power of two is a double; the conversion is the floor.
  return cut([scale](int32_t key) {
    return int64_t{static_cast<int32_t>(static_cast<double>(score_of(std::max(key, 0))) * scale)};
  });
}

// Sorts key-and-token entries of one tier, given in token order, by preference.
inline void sort_entries(uint64_t* entries, int64_t n, SelectScratch& scratch) {
  if (n <= 512) {  // below that, clearing the radix counters dominates
    std::sort(entries, entries + n);
    return;
  }
  // Least digit first, stable; tokens ascend already, so only the upper 32 bits are sorted by.
  constexpr int kDigits = 3, kBits = 11;
  std::array<std::array<uint32_t, 1 << kBits>, kDigits> ends{};
  const auto digit = [](uint64_t entry, int which) { return (entry >> (32 + kBits * which)) & ((1 << kBits) - 1); };
  for (int64_t i = 0; i < n; ++i) {
    for (int which = 0; which < kDigits; ++which) ++ends[which][digit(entries[i], which)];
  }
  uint64_t* from = entries;
  uint64_t* to = scratch.spare_entries.get(n);
  for (int which = 0; which < kDigits; ++which) {
    uint32_t sum = 0;
    for (uint32_t& slot : ends[which]) slot = std::exchange(sum, sum + slot);
    for (int64_t i = 0; i < n; ++i) to[ends[which][digit(from[i], which)]++] = from[i];
    std::swap(from, to);
  }
  std::copy_n(from, n, entries);  // an odd number of passes ends in the other buffer
}

// One row while it is worked on.
template <class T>
class SelectRow {
 public:
  SelectRow(const SelectProblem& problem, int64_t row, SelectScratch& scratch)
      : problem_(problem), row_(row), scratch_(scratch) {
    const T* scores = static_cast<const T*>(problem.scores);
    if (problem.cu_seqlens) {
      first_token_ = problem.cu_seqlens[row];
      size_ = problem.cu_seqlens[row + 1] - first_token_;
      scores += first_token_;
    } else {
      size_ = problem.tokens;
      scores += row / problem.heads * problem.batch_stride + row % problem.heads * problem.head_stride;
    }
    words_ = ceil_div<int64_t>(size_, 64);
    keys_ = scratch.keys.get(words_ * 64);
    range_ = make_keys(scores, size_, keys_);
    spare_ = scratch.spare.get(words_ * 64);
    stay_ = scratch.stay.get(words_);
  }

  void run() {
    if (problem_.keep || problem_.drop || problem_.candidates || problem_.segments) {
      choose_with_masks();
    } else {
      choose_from_all();
    }
    int64_t count = count_of(stay_);
    problem_.overflow[row_] = count > problem_.capacity;
    if (count > problem_.capacity) {
      clip();
      count = problem_.capacity;
    }
    problem_.counts[row_] = static_cast<int32_t>(count);
    int64_t* out = problem_.indices + row_ * problem_.capacity;
    const int64_t padding = problem_.capacity - count;
    std::fill_n(out + (problem_.align_right ? 0 : count), padding, int64_t{-1});
    out += problem_.align_right ? padding : 0;
    if (problem_.by_score) {
      write_by_score(out, count);
    } else {
      write_ascending(out);
    }
  }

 private:
  const uint8_t* bools_of(const PerToken<uint8_t>& mask) const {
    return problem_.cu_seqlens ? (mask ? mask.data + first_token_ : nullptr) : mask.row(row_, problem_.tokens);
  }

  int64_t count_of(const uint64_t* words) const {
    int64_t count = 0;
    for (int64_t word = 0; word < words_; ++word) count += std::popcount(words[word]);
    return count;
  }

  Cut cut_of_limits(int64_t segment) const {
    if (!problem_.threshold) return kKeepAll;
    const float threshold = problem_.threshold.at(row_, segment);
    // Nothing reaches NaN. Otherwise: above the key just below the threshold's.
    return threshold != threshold ? kKeepNone : Cut{key_of(threshold) - 1, 0};
  }

  Cut cut_of_mass(const KeyList& candidates, int64_t segment) const {
    return problem_.top_p ? cut_at_mass(candidates, problem_.top_p.at(row_, segment), spare_) : kKeepAll;
  }

  Cut cut_of_number(const KeyList& competitors, int64_t segment, int64_t forced) const {
    if (problem_.num_keep_per_row) {
      const int64_t num_keep = std::max(problem_.num_keep_per_row.at(row_, segment), int64_t{0});
      return cut_at_count(competitors, num_keep - forced, spare_);
    }
    return problem_.num_keep >= 0 ? cut_at_count(competitors, problem_.num_keep - forced, spare_) : kKeepAll;
  }

  void choose_from_all() {
    const KeyList all{keys_, nullptr, size_, range_};
    fixed_ = nullptr;
    mark(stricter(stricter(cut_of_limits(0), cut_of_mass(all, 0)), cut_of_number(all, 0, 0)));
  }

  // stay := the tokens of the row that the cut holds
  void mark(Cut cut) {
    for (int64_t word = 0; word < words_; ++word) {
      uint64_t above = 0, equal = 0;
      for (int64_t j = 0; j < 64; j += kLanes) {
        const vint key = load(keys_ + word * 64 + j);
        above |= bits_of(key > cut.pivot) << j;
        equal |= bits_of(key == cut.pivot) << j;
      }
      // end may be the largest int64: compare before subtracting
      const uint64_t before_end = cut.end >= size_ ? ~uint64_t{0} : low_bits(cut.end - word * 64);
      stay_[word] = (above | (equal & before_end)) & low_bits(size_ - word * 64);
    }
  }

  // stay |= the tokens of the list that the cut holds
  void mark(const KeyList& list, Cut cut) {
    for (int64_t i = 0; i < list.size; ++i) {
      const int64_t token = list.token(i);
      stay_[token / 64] |= uint64_t{cut.holds(list.keys[i], token)} << (token % 64);
    }
  }

  void choose_with_masks() {
    const uint8_t* keep = bools_of(problem_.keep);
    const uint8_t* drop = bools_of(problem_.drop);
    const uint8_t* candidates = bools_of(problem_.candidates);
    const int32_t* segments = problem_.segments.row(problem_.cu_seqlens ? 0 : row_, problem_.tokens);
    if (segments) segments += first_token_;
    const int64_t num_segments = segments ? problem_.num_segments : 1;
    const auto in_segment = [&](int64_t token) {
      return static_cast<uint32_t>(segments[token]) < static_cast<uint64_t>(num_segments);
    };

    fixed_ = scratch_.fixed.get(words_);
    uint64_t* forced = scratch_.forced.get(words_);
    uint64_t* candidate = scratch_.candidate.get(words_);
    for (int64_t word = 0; word < words_; ++word) {
      const int64_t first = word * 64, count = std::min<int64_t>(64, size_ - first);
      const uint64_t stays = low_bits(count) & (drop ? ~bits_of_bools(drop + first, count) : ~uint64_t{0});
      uint64_t competes = candidates ? bits_of_bools(candidates + first, count) : ~uint64_t{0};
      if (segments) {
        uint64_t inside = 0;
        for (int64_t j = 0; j < count; ++j) inside |= uint64_t{in_segment(first + j)} << j;
        competes &= inside;
      }
      forced[word] = keep ? stays & bits_of_bools(keep + first, count) : 0;
      candidate[word] = stays & competes;
      fixed_[word] = forced[word] | (problem_.keep_others ? stays & ~competes : 0);
      stay_[word] = fixed_[word];
    }

    // Candidates of each group next to each other, in token order: a counting sort by segment.
    int64_t* ends = scratch_.group_ends.get(num_segments);
    int64_t* group_forced = scratch_.group_forced.get(num_segments);
    std::fill_n(ends, num_segments, int64_t{0});
    std::fill_n(group_forced, num_segments, int64_t{0});
    if (segments) {
      for (int64_t word = 0; word < words_; ++word) {
        for_each_bit(candidate[word], [&](int64_t j) { ++ends[segments[word * 64 + j]]; });
        for_each_bit(forced[word], [&](int64_t j) {
          if (in_segment(word * 64 + j)) ++group_forced[segments[word * 64 + j]];
        });
      }
      int64_t sum = 0;
      for (int64_t g = 0; g < num_segments; ++g) ends[g] = std::exchange(sum, sum + ends[g]);
    } else {
      group_forced[0] = count_of(forced);
    }
    int32_t* list_keys = scratch_.list_keys.get(size_);
    int32_t* list_tokens = scratch_.list_tokens.get(size_);
    for (int64_t word = 0; word < words_; ++word) {
      for_each_bit(candidate[word], [&](int64_t j) {
        const int64_t token = word * 64 + j;
        const int64_t place = ends[segments ? segments[token] : 0]++;
        list_keys[place] = keys_[token];
        list_tokens[place] = static_cast<int32_t>(token);
      });
    }

    int64_t begin = 0;
    for (int64_t g = 0; g < num_segments; begin = ends[g++]) {
      int32_t* group_keys = list_keys + begin;
      int32_t* group_tokens = list_tokens + begin;
      KeyList list{group_keys, group_tokens, ends[g] - begin, {}};
      if (list.size == 0) continue;
      list.range = range_of(list.keys, list.size);
      Cut cut = stricter(cut_of_limits(g), cut_of_mass(list, g));
      if (keep) {  // forced candidates have mass but do not compete
        int64_t count = 0;
        for (int64_t i = 0; i < list.size; ++i) {
          const int32_t token = group_tokens[i];
          group_keys[count] = group_keys[i];
          group_tokens[count] = token;
          count += ~(forced[token / 64] >> (token % 64)) & 1;
        }
        if (count == 0) continue;
        list.size = count;
        list.range = range_of(list.keys, list.size);
      }
      mark(list, stricter(cut, cut_of_number(list, g, group_forced[g])));
    }
  }

  // Leaves the best `count` tokens of a set.
  void keep_best(uint64_t* words, int64_t count) {
    int32_t* list_keys = scratch_.list_keys.get(size_);
    int32_t* list_tokens = scratch_.list_tokens.get(size_);
    KeyList list{list_keys, list_tokens, 0, {}};
    for (int64_t word = 0; word < words_; ++word) {
      for_each_bit(words[word], [&](int64_t j) {
        list_keys[list.size] = keys_[word * 64 + j];
        list_tokens[list.size++] = static_cast<int32_t>(word * 64 + j);
      });
    }
    list.range = range_of(list.keys, list.size);
    const Cut cut = cut_at_count(list, count, spare_);
    for (int64_t i = 0; i < list.size; ++i) {
      const int64_t token = list.tokens[i];
      words[token / 64] &= ~(uint64_t{!cut.holds(list.keys[i], token)} << (token % 64));
    }
  }

  // More stay than fit: fixed tokens go first, then the best of the others.
  void clip() {
    if (!fixed_) return keep_best(stay_, problem_.capacity);
    const int64_t fixed = count_of(fixed_);
    if (fixed >= problem_.capacity) {
      keep_best(fixed_, problem_.capacity);
      std::copy_n(fixed_, words_, stay_);
      return;
    }
    for (int64_t word = 0; word < words_; ++word) stay_[word] &= ~fixed_[word];
    keep_best(stay_, problem_.capacity - fixed);
    for (int64_t word = 0; word < words_; ++word) stay_[word] |= fixed_[word];
  }

  void write_ascending(int64_t* out) const {
    for (int64_t word = 0; word < words_; ++word) {
      const int64_t first = first_token_ + word * 64;
      for_each_bit(stay_[word], [&](int64_t j) { *out++ = first + j; });
    }
  }

  void write_by_score(int64_t* out, int64_t count) {
    uint64_t* entries = scratch_.entries.get(count);
    int64_t size = 0;
    const auto add = [&](int64_t word, uint64_t bits) {
      for_each_bit(bits, [&](int64_t j) {
        const int64_t token = word * 64 + j;
        // ascending entries: keys descend, then tokens ascend
        entries[size++] =
            uint64_t{~static_cast<uint32_t>(keys_[token]) ^ 0x80000000u} << 32 | static_cast<uint64_t>(token);
      });
    };
    int64_t fixed = 0;
    if (fixed_) {
      for (int64_t word = 0; word < words_; ++word) add(word, fixed_[word]);
      fixed = size;
      sort_entries(entries, fixed, scratch_);
    }
    for (int64_t word = 0; word < words_; ++word) add(word, fixed_ ? stay_[word] & ~fixed_[word] : stay_[word]);
    sort_entries(entries + fixed, size - fixed, scratch_);
    for (int64_t i = 0; i < count; ++i) out[i] = first_token_ + static_cast<int64_t>(entries[i] & 0xffffffffu);
  }

  const SelectProblem& problem_;
  const int64_t row_;
  SelectScratch& scratch_;
  int64_t first_token_ = 0;
  int64_t size_ = 0;
  int64_t words_ = 0;
  int32_t* keys_ = nullptr;
  int32_t* spare_ = nullptr;
  KeyRange range_{};
  uint64_t* stay_ = nullptr;   // the tokens that stay
  uint64_t* fixed_ = nullptr;  // those of them that do not compete; nullptr: none
};

// Rows [begin, end) of a problem whose scores are of type T; writes their indices, counts and overflow.
template <class T>
void select_rows(const SelectProblem& problem, int64_t begin, int64_t end) {
  SelectScratch scratch;
  for (int64_t row = begin; row < end; ++row) SelectRow<T>(problem, row, scratch).run();
}

}  // namespace pyvtk::cpu::PYVTK_ISA
