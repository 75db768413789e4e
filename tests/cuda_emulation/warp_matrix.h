// ldmatrix, mma, mma.sp and wgmma: matrices that lie in the registers of a warp. The lane maps are written down from
// the PTX manual ("Warp-level matrix instructions": the fragments' figures and formulas); test_matrices.cpp checks them
// against tables of its own. Elements are bits here: the caller says what they mean.
#pragma once
#include "cuda_emulation.h"

namespace cuda_emulation {

template <int kMatrices>
void ldmatrix(uint32_t (&to)[kMatrices], const void* row, bool transposed, Location where) {
  const unsigned me = lane();
  if (me < 8 * kMatrices) {
    check_aligned(row, 16, "ldmatrix", where);
    check_shared(row, 16, "ldmatrix", where);
  }
  // Reading is what the lane does that gets the elements: races show between it and whoever wrote the row.
  const auto* rows = exchange("ldmatrix", 0xffffffffu, &row, sizeof(row), false, where);
  for (unsigned matrix = 0; matrix < kMatrices; ++matrix) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned from = transposed ? 2 * (me % 4) + i : me / 4, element = transposed ? me / 4 : 2 * (me % 4) + i;
      pair[i] = static_cast<const uint16_t*>(brought<const void*>(rows, 8 * matrix + from))[element];
    }
    to[matrix] = pair[0] | uint32_t{pair[1]} << 16;
  }
}

// Where an element lies: in the register `index` of a lane, at bit `shift`.
struct Place {
  unsigned lane;
  unsigned index;
  unsigned shift;
};

// An operand's registers hold 4 / sizeof(Bits) neighbours along k; four lanes share 4 times as many.
template <class Bits>
constexpr unsigned kNeighbours = 4 / sizeof(Bits);

template <class Bits>  // a [16, 8 * kNeighbours]
constexpr Place place_of_a(unsigned row, unsigned k) {
  constexpr unsigned n = kNeighbours<Bits>;
  return {row % 8 * 4 + k / n % 4, row / 8 + k / (4 * n) * 2, k % n * 8 * static_cast<unsigned>(sizeof(Bits))};
}
template <class Bits>  // b [k, 8]
constexpr Place place_of_b(unsigned k, unsigned column) {
  constexpr unsigned n = kNeighbours<Bits>;
  return {column * 4 + k / n % 4, k / (4 * n), k % n * 8 * static_cast<unsigned>(sizeof(Bits))};
}
// The nibble of a group of four k in the metadata of a sparse a
template <class Bits>
constexpr Place place_of_metadata(unsigned row, unsigned group, unsigned selector) {
  if constexpr (sizeof(Bits) == 2) return {row % 8 * 4 + 2 * selector + group / 4, 0, row / 8 * 16 + group % 4 * 4};
  return {row % 8 * 4 + row / 8 + group / 8 * 2, 0, group % 8 * 4};
}

// The element at a place, of registers that stand at word `first` of what each lane brought.
template <class Bits, class Registers>
Bits element_at(const unsigned char* all, unsigned first, Place place) {
  uint32_t word;
  std::memcpy(&word, all + place.lane * sizeof(Registers) + (first + place.index) * sizeof(word), sizeof(word));
  return static_cast<Bits>(word >> place.shift);
}

// d += a b, where decode turns bits into numbers of a type whose products are exact in d's.
template <class Sum, class F>
void mma(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], F decode, Location where) {
  struct Registers {
    uint32_t a[4], b[2];
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const auto* all = exchange("mma", 0xffffffffu, &mine, sizeof(mine), false, where);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      d[i] += decode(element_at<uint16_t, Registers>(all, 0, place_of_a<uint16_t>(row, k))) *
              decode(element_at<uint16_t, Registers>(all, 4, place_of_b<uint16_t>(k, column)));
    }
  }
}

// The same with a sparse a: decode's argument says whether elements have 8 or 16 bits.
template <class Sum, class Number, class Bits>
void mma_sp(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata, unsigned selector,
            Number (*decode)(Bits), Location where) {
  struct Registers {
    uint32_t a[4], b[4], metadata;
  } mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata};
  const auto* all = exchange("mma_sp", 0xffffffffu, &mine, sizeof(mine), false, where);
  const unsigned kept = 8 * kNeighbours<Bits>;
  for (unsigned half = 0; half < 2; ++half) {
    const unsigned row = lane() / 4 + half * 8;
    for (unsigned k = 0; k < kept; k += 2) {
      const Place nibble = place_of_metadata<Bits>(row, k / 2, selector);
      const uint32_t positions = element_at<uint32_t, Registers>(all, 8, nibble) & 15u;
      if ((positions & 3u) >= positions >> 2) fail("mma_sp with metadata whose two positions do not ascend", where);
      for (unsigned i = 0; i < 2; ++i) {
        const auto left = decode(element_at<Bits, Registers>(all, 0, place_of_a<Bits>(row, k + i)));
        for (unsigned j = 0; j < 2; ++j) {
          const Place at = place_of_b<Bits>(2 * k + (positions >> 2 * i & 3u), lane() % 4 * 2 + j);
          d[2 * half + j] += left * decode(element_at<Bits, Registers>(all, 4, at));
        }
      }
    }
  }
}

// A matrix that a wgmma finds by its descriptor.
struct SharedMatrix {
  uint32_t address;
  unsigned row_bytes;
  unsigned between_eights;  // bytes from eight rows to the next

  SharedMatrix(uint64_t descriptor, unsigned rows, Location where)
      : address(static_cast<uint32_t>(descriptor & 0x3fff) * 16),
        row_bytes(descriptor >> 62 == 1 ? 128 : 64),
        between_eights(static_cast<unsigned>(descriptor >> 32 & 0x3fff) * 16) {
    if (descriptor >> 62 != 1 && descriptor >> 62 != 2) fail("wgmma of rows that have neither 128 nor 64 bytes", where);
    const uint32_t first = address / (8 * row_bytes) * 8 * row_bytes;
    check_shared(at(first), (rows / 8 - 1) * between_eights + 8 * row_bytes, "wgmma of", where);
  }
  static const char* at(uint32_t address) {
    return static_cast<const char*>(dynamic_shared()) + (int64_t{address} - kSharedBegin);
  }
  // 16 bytes of a row, from this byte on. The order of pieces is made of bits of the address.
  const void* piece(unsigned row, unsigned byte) const {
    const uint32_t plain = address + row / 8 * between_eights + row % 8 * row_bytes + byte;
    return at(plain ^ (plain >> 7 & (row_bytes == 128 ? 7u : 3u)) << 4);
  }
};

// A warp's part of d += a b^T with a sparse a [64, ..] and b [kColumns, ..], of 64 bytes of b's rows. The metadata is
// read where it lies when the product happens.
template <int kColumns, class Sum, class Number, class Bits>
void wgmma_sp(Sum (&d)[kColumns / 2], uint64_t a, uint64_t b, const uint32_t& metadata, unsigned selector,
              Number (*decode)(Bits), Location where) {
  struct Matrices {
    uint64_t a, b;
  };
  if (!products().may_begin) fail("wgmma without wgmma_begin", where);
  if (!products().writes_are_fenced) fail("wgmma of what was copied without wgmma_fence_writes behind it", where);
  const Matrices mine{a, b};
  const auto* all = exchange("wgmma_sp", 0xffffffffu, &mine, sizeof(mine), false, where);
  for (unsigned other = 0; other < 32; ++other) {
    const Matrices theirs = brought<Matrices>(all, other);
    if (theirs.a != a || theirs.b != b) fail("wgmma with matrices that differ between lanes", where);
  }
  products().begun.push_back([=, &d, &metadata] {
    const auto* codes = exchange("wgmma_wait", 0xffffffffu, &metadata, sizeof(metadata), false, where);
    const SharedMatrix left_matrix(a, 64, where), right_matrix(b, kColumns, where);
    constexpr unsigned kOfPiece = 16 / sizeof(Bits), kKept = 32 / sizeof(Bits);
    const unsigned first = current->thread_index.x / 32 % 4 * 16;
    for (unsigned half = 0; half < 2; ++half) {
      const unsigned row = lane() / 4 + half * 8;
      for (unsigned k = 0; k < kKept; ++k) {
        const void* kept = left_matrix.piece(first + row, k / kOfPiece * 16);
        const auto left = decode(static_cast<const Bits*>(kept)[k % kOfPiece]);
        const Place nibble = place_of_metadata<Bits>(row, k / 2, selector);
        const uint32_t positions = brought<uint32_t>(codes, nibble.lane) >> nibble.shift & 15u;
        if ((positions & 3u) >= positions >> 2) fail("wgmma_sp with metadata whose two positions do not ascend", where);
        const unsigned at = k / 2 * 4 + (k % 2 ? positions >> 2 : positions & 3u);
        for (unsigned i = 0; i < kColumns / 4; ++i) {
          const unsigned column = i / 2 * 8 + lane() % 4 * 2 + i % 2;
          const void* piece = right_matrix.piece(column, at / kOfPiece * 16);
          d[i / 2 * 4 + half * 2 + i % 2] += left * decode(static_cast<const Bits*>(piece)[at % kOfPiece]);
        }
      }
    }
  });
}

inline void wgmma_commit() {
  products().groups.push_back(std::move(products().begun));
  products().begun.clear();
  products().may_begin = false;
}
inline void wgmma_wait(size_t groups_left) {
  auto& groups = products().groups;
  while (groups.size() > groups_left) {
    for (const auto& product : groups.front()) product();
    groups.pop_front();
  }
}

}  // namespace cuda_emulation
