// The bookkeeping of selections: which tokens stay, which do not, and what is left after a second choice.
// pyvtk/reference/selection.py is the definition.
//
// What is chosen among tokens is a row of bits, 64 tokens to a word, from which numbers are written in ascending order:
// a step for each token that is written and one for each word, where a loop over tokens would guess at every one. All
// of it is a few passes over rows that are in the cache. Rows are independent of each other, so any range of them can
// be one thread's work, but for those of a packed axis.
//
// What reads indices looks at each before it uses it, leaves out what is no token, and returns the entry (row *
// capacity + slot) of the first such one, or -1.
#include "common/selection_problem.h"

namespace pyvtk::cpu::PYVTK_ISA {

// Bit i: whether byte i is not 0.
PYVTK_INLINE uint64_t bits_of_bytes(const uint8_t* bytes) {  // [64]
#if PYVTK_VECTOR_BYTES == 64
  const __m512i all = _mm512_loadu_si512(bytes);
  return _mm512_test_epi8_mask(all, all);
#elif PYVTK_VECTOR_BYTES == 32
  const auto half = [](const uint8_t* from) {
    const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return static_cast<uint32_t>(~_mm256_movemask_epi8(_mm256_cmpeq_epi8(some, _mm256_setzero_si256())));
  };
  return half(bytes) | uint64_t{half(bytes + 32)} << 32;
#else
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= static_cast<uint64_t>(bytes[i] != 0) << i;
  return bits;
#endif
}

PYVTK_INLINE uint64_t word_of_range(const uint64_t* words, int64_t word, int64_t begin, int64_t end) {
  uint64_t bits = words[word];
  if (word * 64 < begin) bits &= ~uint64_t{0} << (begin - word * 64);
  if (end < word * 64 + 64) bits &= ~(~uint64_t{0} << (end - word * 64));
  return bits;
}

// Makes a row of the set bits in [begin, end).
inline void write_row(const uint64_t* words, int64_t begin, int64_t end, const SelectionOutput& out, int64_t row) {
  const int64_t first = begin / 64, last = begin < end ? (end + 63) / 64 : first;
  int64_t total = 0;
  for (int64_t word = first; word < last; ++word) total += std::popcount(word_of_range(words, word, begin, end));
  const int64_t count = std::min(total, out.capacity);
  out.counts[row] = static_cast<int32_t>(count);
  out.overflow[row] = total > count;
  int64_t* const slots = out.indices + row * out.capacity;
  int64_t* to = slots + (out.align_right ? out.capacity - count : 0);
  int64_t* const stop = to + count;
  std::fill(slots, to, int64_t{-1});
  std::fill(stop, slots + out.capacity, int64_t{-1});
  for (int64_t word = first; to != stop; ++word) {
    uint64_t bits = word_of_range(words, word, begin, end);
    for (; bits != 0 && to != stop; bits &= bits - 1) *to++ = word * 64 + std::countr_zero(bits);
  }
}

inline void selection_of_mask(const uint8_t* mask,  // [rows, tokens]
                              int64_t tokens, const SelectionOutput& out,
                              uint64_t* words,  // [ceil(tokens / 64)], for this call alone
                              int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const uint8_t* from = mask + row * tokens;
    int64_t word = 0;
    for (; word < tokens / 64; ++word) words[word] = bits_of_bytes(from + word * 64);
    if (tokens % 64 != 0) {
      uint64_t bits = 0;
      for (int64_t i = word * 64; i < tokens; ++i) bits |= static_cast<uint64_t>(from[i] != 0) << (i - word * 64);
      words[word] = bits;
    }
    write_row(words, 0, tokens, out, row);
  }
}

// value(slot) at the tokens that the rows [begin, end) hold, `absent` at all others; of tokens that come again the last
// one counts.
template <class T, class Value>
PYVTK_INLINE int64_t scatter_rows(const SelectionInput& in, int64_t tokens,
                                  T* out,  // [tokens]
                                  T absent, Value value, int64_t begin, int64_t end) {
  int64_t wrong = -1;
  std::fill(out, out + tokens, absent);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* const indices = in.indices + row * in.capacity;
    const int64_t last = in.end(row);
    for (int64_t slot = in.begin(row); slot < last; ++slot) {
      if (indices[slot] < 0 || indices[slot] >= tokens) {
        wrong = wrong < 0 ? row * in.capacity + slot : wrong;
        continue;
      }
      out[indices[slot]] = value(slot);
    }
  }
  return wrong;
}

// The same for rows of their own, or (packed) for all of them at once.
template <class T, class Value>
PYVTK_INLINE int64_t scatter_each(const SelectionInput& in, int64_t tokens, bool packed,
                                  T* out,  // [rows, tokens], packed: [tokens]
                                  T absent, Value value, int64_t begin, int64_t end) {
  if (packed) return scatter_rows(in, tokens, out, absent, value, begin, end);
  int64_t wrong = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t found = scatter_rows(in, tokens, out + row * tokens, absent, value, row, row + 1);
    wrong = wrong < 0 ? found : wrong;
  }
  return wrong;
}

// Marked as bytes, since a bit would wait for the bit before it in its word.
inline int64_t selection_complement(const SelectionInput& in,
                                    const int32_t* cu_seqlens,  // [rows + 1]: of a packed axis; else nullptr
                                    int64_t tokens, const SelectionOutput& out,
                                    uint64_t* words,  // [9 * ceil(tokens / 64)], for this call alone
                                    int64_t begin, int64_t end) {
  const int64_t count = (tokens + 63) / 64;
  auto* const kept = reinterpret_cast<uint8_t*>(words + count);
  const bool packed = cu_seqlens != nullptr;
  int64_t wrong = -1;
  const auto mark = [&](int64_t row, int64_t last) {
    const int64_t found = scatter_rows(in, tokens, kept, uint8_t{0}, [](int64_t) { return uint8_t{1}; }, row, last);
    wrong = wrong < 0 ? found : wrong;
    for (int64_t word = 0; word < count; ++word) words[word] = ~bits_of_bytes(kept + word * 64);
  };
  if (packed) mark(0, in.rows);  // any row may hold any token
  for (int64_t row = begin; row < end; ++row) {
    if (!packed) mark(row, row + 1);
    const TokenRange range = range_of_sample(cu_seqlens, row, tokens);
    write_row(words, range.begin, range.end, out, row);
  }
  return wrong;
}

// Rows of a packed axis share it: all of them are one call's.
inline int64_t selection_mask(const SelectionInput& in, int64_t tokens, bool packed, bool* out, int64_t begin,
                              int64_t end) {
  return scatter_each(in, tokens, packed, out, false, [](int64_t) { return true; }, begin, end);
}

inline int64_t selection_inverse(const SelectionInput& in, int64_t tokens, bool packed, int64_t* out, int64_t begin,
                                 int64_t end) {
  return scatter_each(in, tokens, packed, out, int64_t{-1}, [](int64_t slot) { return slot; }, begin, end);
}

inline void selection_valid(const SelectionInput& in,
                            bool* out,  // [rows, capacity]
                            int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    bool* const to = out + row * in.capacity;
    std::fill(to, to + in.begin(row), false);
    std::fill(to + in.begin(row), to + in.end(row), true);
    std::fill(to + in.end(row), to + in.capacity, false);
  }
}

// Written from the side that the row is aligned to: where it ends is known at the end only.
inline int64_t selection_then(const SelectionInput& in, const SelectionInput& other,
                              const bool* overflow,        // [rows] or nullptr
                              const bool* other_overflow,  // [rows] or nullptr
                              const SelectionOutput& out, int64_t begin, int64_t end) {
  int64_t wrong = -1;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t* const tokens = in.indices + row * in.capacity;
    const int64_t* const chosen = other.indices + row * other.capacity;
    int64_t* const slots = out.indices + row * out.capacity;
    const int64_t first = other.begin(row), last = other.end(row), real = in.begin(row), padding = in.end(row);
    const auto stays = [&](int64_t at) {
      const int64_t slot = chosen[at];
      if (slot < 0 || slot >= in.capacity) {
        const int64_t entry = row * other.capacity + at;
        wrong = wrong < 0 || entry < wrong ? entry : wrong;
        return false;
      }
      return real <= slot && slot < padding;
    };
    int64_t count = 0;
    if (out.align_right) {
      for (int64_t at = last; at-- > first;) {
        if (stays(at)) slots[out.capacity - ++count] = tokens[chosen[at]];
      }
      std::fill(slots, slots + out.capacity - count, int64_t{-1});
    } else {
      for (int64_t at = first; at < last; ++at) {
        if (stays(at)) slots[count++] = tokens[chosen[at]];
      }
      std::fill(slots + count, slots + out.capacity, int64_t{-1});
    }
    out.counts[row] = static_cast<int32_t>(count);
    out.overflow[row] = (overflow != nullptr && overflow[row]) || (other_overflow != nullptr && other_overflow[row]);
  }
  return wrong;
}

}  // namespace pyvtk::cpu::PYVTK_ISA
