// Binding of layouts for CPU tensors. Meaning: pyvtk/reference/layout.py.
#include "cpu/layout.h"

#include <tuple>

#include "binding.h"
#include "cpu/layout_binding.h"

namespace pyvtk::cpu {
namespace {

using Layout = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Results {
  Tensor image_id, coords, extent, check;

  Results(const Tensor& like, const LayoutShape& shape)
      : image_id(new_empty(like, sizes_of(like), ScalarType::Int)),
        coords(new_empty(like, sizes_of(like, 3), ScalarType::Int)),
        extent(new_empty(like, {shape.samples, 3}, ScalarType::Int)),
        check(new_empty(like, {3}, ScalarType::Long)) {}

  static std::vector<int64_t> sizes_of(const Tensor& like, int64_t last = 0) {
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; dim < like.dim(); ++dim) sizes.push_back(like.size(dim));
    if (last != 0) sizes.push_back(last);
    return sizes;
  }
  LayoutFields fields() const {
    return {mutable_data<int32_t>(image_id), mutable_data<int32_t>(coords), mutable_data<int32_t>(extent)};
  }
  int64_t* checked() const { return mutable_data<int64_t>(check); }
  Layout all() const { return {image_id, coords, extent, check}; }
};

// Reads grids [images, 3 or 4]; those that are wrong themselves get no tokens, and check says so.
template <class Integer>
Grids read_grids(const Tensor& grids, int64_t merge, int64_t tokens, int64_t* check) {
  Grids found;
  const int64_t row = grids.stride(0), column = grids.stride(1);
  const bool newlines = grids.size(1) == 4;
  found.list.resize(static_cast<size_t>(grids.size(0)));
  for (int64_t image = 0; image < grids.size(0); ++image) {
    const Integer* at = data<Integer>(grids) + image * row;
    const int64_t t = at[0], h = at[column], w = at[2 * column], newline = newlines ? at[3 * column] : 0;
    const auto side = [](int64_t n) { return n >= 0 && n <= kMaxCoordinate; };
    const bool fits = h % merge == 0 && w % merge == 0 && side(t) && side(h / merge) && side(w / merge) &&
                      (newline == 0 || newline == 1);
    if (!fits) {
      check[0] |= kWrongGrids;
      continue;
    }
    Grid& grid = found.list[static_cast<size_t>(image)];
    grid = grid_of(t, h / merge, w / merge, newline);
    grid.size = std::min(grid.size, tokens + 1);  // what is more cannot be there, and sums stay in int64
    check[2] += grid.size;
  }
  return found;
}

Grids one_grid(const std::vector<int64_t>& sides, int64_t merge, int64_t* check) {
  PYVTK_GUARD(sides.size() == 3 || sides.size() == 4, "grid has ", sides.size(), " numbers, expected 3 or 4");
  const int64_t newline = sides.size() == 4 ? sides[3] : 0;
  for (size_t axis = 0; axis < 3; ++axis) {
    const int64_t side = axis == 0 ? sides[axis] : sides[axis] / merge;
    PYVTK_GUARD(side > 0 && side <= kMaxCoordinate, "grid has a side of ", side, " tokens");
  }
  PYVTK_GUARD(newline == 0 || newline == 1, "grid has newline ", newline);
  Grids found;
  found.list = {grid_of(sides[0], sides[1] / merge, sides[2] / merge, newline)};
  found.one_for_all = true;
  check[2] = found.list[0].size;
  return found;
}

Layout from_ids(Tensor input_ids, std::vector<int64_t> image_token_ids, OptionalTensor grids, std::vector<int64_t> grid,
                int64_t merge, OptionalTensor mask, OptionalTensor cu_seqlens) {
  const LayoutShape shape = layout_shape(input_ids, cu_seqlens, "input_ids");
  guard_rows(mask, ScalarType::Bool, input_ids, "mask");
  PYVTK_GUARD(merge > 0, "merge is ", merge);
  const Results results(input_ids, shape);
  int64_t* check = results.checked();
  std::fill_n(check, 3, 0);
  Grids read;
  if (grids.has_value()) {
    guard_dim(*grids, 2, "grids");
    PYVTK_GUARD(grids->size(1) == 3 || grids->size(1) == 4, "grids has ", grids->size(1), " columns");
    for_integer_dtype(*grids, "grids",
                      [&](auto zero) { read = read_grids<decltype(zero)>(*grids, merge, input_ids.numel(), check); });
  } else {
    read = one_grid(grid, merge, check);
  }
  for_integer_dtype(input_ids, "input_ids", [&](auto zero) {
    using Id = decltype(zero);
    layout_from_ids(token_rows<Id>(input_ids), token_rows<uint8_t>(mask), shape, image_token_ids, read,
                    results.fields(), check);
  });
  return results.all();
}

Layout from_mrope(Tensor visual, Tensor position_ids, OptionalTensor mask) {
  const LayoutShape shape = layout_shape(visual, std::nullopt, "visual");
  guard_dtype(visual, ScalarType::Bool, "visual");
  guard_rows(mask, ScalarType::Bool, visual, "mask");
  guard_dim(position_ids, 3, "position_ids");
  const int64_t axes = position_ids.size(0);
  PYVTK_GUARD(axes >= 3, "position_ids has ", axes, " axes");
  guard_shape(position_ids, {axes, shape.rows, shape.tokens}, "position_ids");
  const Results results(visual, shape);
  for_integer_dtype(position_ids, "position_ids", [&](auto zero) {
    using Position = decltype(zero);
    const Position* first = data<Position>(position_ids);
    const int64_t axis = position_ids.stride(0), row = position_ids.stride(1), token = position_ids.stride(2);
    const TokenRows<Position> place[3] = {{first + (axes - 3) * axis, row, token},
                                          {first + (axes - 2) * axis, row, token},
                                          {first + (axes - 1) * axis, row, token}};
    layout_from_mrope(token_rows<uint8_t>(visual), token_rows<uint8_t>(mask), place, shape, results.fields(),
                      results.checked());
  });
  return results.all();
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("layout_from_ids", TORCH_BOX(&pyvtk::cpu::from_ids));
  m.impl("layout_from_mrope", TORCH_BOX(&pyvtk::cpu::from_mrope));
}
