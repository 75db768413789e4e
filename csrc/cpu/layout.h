// Layouts: which image every token belongs to, and where it stands in it. Torch-free. Meaning:
// pyvtk/reference/layout.py. One pass over the tokens, which counts along the grids instead of dividing; bounded by
// memory. A token's place follows from all before it, so one thread does it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace pyvtk::cpu {

inline constexpr int64_t kMaxCoordinate = 1 << 16;
// What is wrong, added up.
inline constexpr int64_t kWrongGrids = 1, kWrongNumber = 2, kCrossesSamples = 4, kWrongCoordinates = 1;

// A tensor [rows, tokens] of any strides; null: there is none.
template <class T>
struct TokenRows {
  const T* data;
  int64_t row_stride, token_stride;

  T at(int64_t row, int64_t token) const { return data[row * row_stride + token * token_stride]; }
};

// Of a batch [rows, tokens]: row r is sample r, or, packed, the only row holds samples one after the other.
struct LayoutShape {
  int64_t rows, tokens;
  const int32_t* cu_seqlens;  // [samples + 1], or null: not packed
  int64_t samples;
};

// Says which sample a token is of, for tokens in order; those behind the last sample are of `samples`.
class SampleWalk {
 public:
  explicit SampleWalk(const LayoutShape& shape) : shape_(shape) {}
  int64_t operator()(int64_t row, int64_t token) {
    if (shape_.cu_seqlens == nullptr) return row;
    while (sample_ < shape_.samples && token >= shape_.cu_seqlens[sample_ + 1]) ++sample_;
    return sample_;
  }

 private:
  const LayoutShape& shape_;
  int64_t sample_ = 0;
};

struct Grid {
  int64_t h = 0, w = 0, line = 0, size = 0;  // line: a row of w tokens and its newline; size: tokens in all
};

// Of sides that were divided by merge already.
inline Grid grid_of(int64_t t, int64_t h, int64_t w, int64_t newline) {
  return {h, w, w + newline, t * h * (w + newline)};
}

// Grids of images, or one that all of them have.
struct Grids {
  std::vector<Grid> list;
  bool one_for_all = false;

  const Grid* at(int64_t image) const {
    if (one_for_all) return list.data();
    return image < static_cast<int64_t>(list.size()) ? list.data() + image : nullptr;
  }
};

struct LayoutFields {
  int32_t* image_id;  // [rows, tokens]
  int32_t* coords;    // [rows, tokens, 3]
  int32_t* extent;    // [samples, 3]

  void write(int64_t at, int64_t image, int64_t t, int64_t y, int64_t x) const {
    image_id[at] = static_cast<int32_t>(image);
    coords[3 * at] = static_cast<int32_t>(t);
    coords[3 * at + 1] = static_cast<int32_t>(y);
    coords[3 * at + 2] = static_cast<int32_t>(x);
  }
  void widen(int64_t sample, int64_t at) const {
    for (int64_t axis = 0; axis < 3; ++axis) {
      int32_t& most = extent[3 * sample + axis];
      most = std::max(most, coords[3 * at + axis] + 1);
    }
  }
};

// Placeholders fill one grid after the other. Writes fields and check [3], of which the last and the bit of grids that
// are wrong themselves are the caller's.
template <class Id>
void layout_from_ids(TokenRows<Id> ids, TokenRows<uint8_t> mask, const LayoutShape& shape,
                     const std::vector<int64_t>& wanted, const Grids& grids, const LayoutFields& fields,
                     int64_t* check) {
  std::fill_n(fields.extent, 3 * shape.samples, 0);
  SampleWalk sample_of(shape);
  const Grid* grid = nullptr;
  int64_t image = -1, inside = 0, t = 0, y = 0, x = 0, found = 0, owner = 0;
  bool crosses = false;
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t token = 0; token < shape.tokens; ++token) {
      const int64_t at = row * shape.tokens + token;
      const auto id = static_cast<int64_t>(ids.at(row, token));
      bool visual = false;
      for (const int64_t one : wanted) visual |= id == one;
      if (visual && mask.data != nullptr) visual = mask.at(row, token) != 0;
      if (!visual) {
        fields.write(at, -1, 0, 0, 0);
        continue;
      }
      ++found;
      const int64_t sample = sample_of(row, token);
      if (image < 0 || (grid != nullptr && inside == grid->size)) {
        do grid = grids.at(++image);
        while (grid != nullptr && grid->size == 0);
        inside = t = y = x = 0;
        owner = sample;
      }
      if (grid == nullptr) {
        fields.write(at, -1, 0, 0, 0);
        continue;
      }
      crosses |= sample != owner;
      if (x < grid->w) {
        fields.write(at, image, t, y, x);
        if (shape.cu_seqlens == nullptr || sample < shape.samples) fields.widen(sample, at);
      } else {
        fields.write(at, -1, 0, 0, 0);
      }
      ++inside;
      if (++x == grid->line) {
        x = 0;
        if (++y == grid->h) y = 0, ++t;
      }
    }
  }
  const bool whole = grids.one_for_all ? found % grids.list[0].size == 0 : found == check[2];
  check[0] += (whole ? 0 : kWrongNumber) + (crosses ? kCrossesSamples : 0);
  check[1] = found;
}

// Runs of visual tokens are images, which begin anew where y and x both grow. Writes fields and check [3].
template <class Position>
void layout_from_mrope(TokenRows<uint8_t> visual, TokenRows<uint8_t> mask, const TokenRows<Position> (&place)[3],
                       const LayoutShape& shape, const LayoutFields& fields, int64_t* check) {
  std::fill_n(fields.extent, 3 * shape.samples, 0);
  const auto is_visual = [&](int64_t row, int64_t token) {
    return visual.at(row, token) != 0 && (mask.data == nullptr || mask.at(row, token) != 0);
  };
  int64_t image = -1;
  uint64_t most = 0;
  for (int64_t row = 0; row < shape.rows; ++row) {
    for (int64_t token = 0; token < shape.tokens;) {
      const int64_t at = row * shape.tokens + token;
      if (!is_visual(row, token)) {
        fields.write(at, -1, 0, 0, 0);
        ++token;
        continue;
      }
      ++image;
      int64_t least[3], end = token;
      for (int64_t axis = 0; axis < 3; ++axis) least[axis] = place[axis].at(row, token);
      do {
        for (int64_t axis = 0; axis < 3; ++axis) {
          least[axis] = std::min(least[axis], static_cast<int64_t>(place[axis].at(row, end)));
        }
        ++end;
      } while (
          end < shape.tokens && is_visual(row, end) &&
          !(place[1].at(row, end) > place[1].at(row, end - 1) && place[2].at(row, end) > place[2].at(row, end - 1)));
      for (; token < end; ++token) {
        int64_t c[3];
        for (int64_t axis = 0; axis < 3; ++axis) {
          const auto far = static_cast<uint64_t>(place[axis].at(row, token)) - static_cast<uint64_t>(least[axis]);
          most = std::max(most, far);
          c[axis] = static_cast<int64_t>(std::min<uint64_t>(far, kMaxCoordinate - 1));
        }
        fields.write(row * shape.tokens + token, image, c[0], c[1], c[2]);
        fields.widen(row, row * shape.tokens + token);
      }
    }
  }
  check[0] = most >= kMaxCoordinate ? kWrongCoordinates : 0;
  check[1] = static_cast<int64_t>(std::min<uint64_t>(most, std::numeric_limits<int64_t>::max()));
  check[2] = 0;
}

}  // namespace pyvtk::cpu
