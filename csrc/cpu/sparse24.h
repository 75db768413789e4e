// 2:4 sparse weights: format here, products in the headers below. The format byte by byte: pyvtk/reference/sparse24.py.
#include "cpu/sparse24_few.h"
#include "cpu/sparse24_int8.h"

namespace pyvtk::cpu::PYVTK_ISA {

// False if some group of the rows [begin, end) has not exactly two entries in the mask: of that one the first two are
// kept.
template <class W>
bool compress(const W* weight,      // [outputs, columns], rows weight_stride elements apart
              const uint8_t* mask,  // [outputs, columns], rows mask_stride apart
              W* values,            // [outputs, columns / 2]
              uint8_t* metadata,    // [outputs, ceil(columns / 8)]
              int64_t columns, int64_t weight_stride, int64_t mask_stride, int64_t begin, int64_t end) {
  // The nibble of each set of kept positions; where there are not two it is a legal one, and the set is not in kTwo.
  constexpr uint8_t kNibble[16] = {0b0100, 0b0100, 0b0100, 0b0100, 0b0100, 0b1000, 0b1001, 0b0100,
                                   0b0100, 0b1100, 0b1101, 0b0100, 0b1110, 0b0100, 0b0100, 0b0100};
  constexpr unsigned kTwo = 1u << 3 | 1u << 5 | 1u << 6 | 1u << 9 | 1u << 10 | 1u << 12;
  const int64_t groups = columns / 4, bytes = ceil_div<int64_t>(groups, 2);
  bool good = true;
  for (int64_t row = begin; row < end; ++row) {
    const W* from = weight + row * weight_stride;
    const uint8_t* keep = mask + row * mask_stride;
    W* to = values + row * columns / 2;
    uint8_t* nibbles = metadata + row * bytes;
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* m = keep + 4 * group;
      const int kept = (m[0] != 0) | (m[1] != 0) << 1 | (m[2] != 0) << 2 | (m[3] != 0) << 3;
      const uint8_t nibble = kNibble[kept];
      good &= (kTwo >> kept & 1) != 0;
      to[2 * group] = from[4 * group + (nibble & 3)];
      to[2 * group + 1] = from[4 * group + (nibble >> 2)];
      // the unused half of the last byte is a legal group too
      if (group % 2 == 0) {
        nibbles[group / 2] = static_cast<uint8_t>(nibble | 0x40);
      } else {
        nibbles[group / 2] = static_cast<uint8_t>((nibbles[group / 2] & 15) | nibble << 4);
      }
    }
  }
  return good;
}

template <class W>
void decompress(const W* values, const uint8_t* metadata, W* weight, int64_t columns, int64_t begin, int64_t end) {
  const int64_t groups = columns / 4, bytes = ceil_div<int64_t>(groups, 2);
  for (int64_t row = begin; row < end; ++row) {
    const W* from = values + row * columns / 2;
    const uint8_t* nibbles = metadata + row * bytes;
    W* to = weight + row * columns;
    for (int64_t group = 0; group < groups; ++group) {
      const int nibble = nibbles[group / 2] >> (group % 2 * 4) & 15;
      W four[4] = {};
      four[nibble & 3] = from[2 * group];
      four[nibble >> 2] = from[2 * group + 1];
      std::memcpy(to + 4 * group, four, sizeof(four));
    }
  }
}

}  // namespace pyvtk::cpu::PYVTK_ISA
