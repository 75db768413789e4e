// Binding of attention_facts for CPU tensors. Meaning: pyvtk/reference/attention_facts.py.
#include "cpu/attention_facts.h"

#include <tuple>

#include "binding.h"
#include "cpu/layout_binding.h"

namespace pyvtk::cpu {
namespace {

std::tuple<Tensor, Tensor> facts_of(Tensor image_id, Tensor coords, Tensor positions, OptionalTensor mask,
                                    OptionalTensor cu_seqlens, Tensor extent, OptionalTensor keys, int64_t key_group,
                                    bool causal, std::vector<int64_t> strip, std::vector<int64_t> window) {
  const LayoutShape shape = layout_shape(image_id, cu_seqlens, "image_id");
  const int64_t dim = image_id.dim();
  guard_dtype(coords, ScalarType::Int, "coords");
  guard_dim(coords, dim + 1, "coords");
  for (int64_t i = 0; i < dim; ++i) PYVTK_GUARD(coords.size(i) == image_id.size(i), "coords do not fit image_id");
  PYVTK_GUARD(coords.size(dim) == 3, "coords has ", coords.size(dim), " axes");
  guard_rows(positions, positions.scalar_type(), image_id, "positions");
  guard_rows(mask, ScalarType::Bool, image_id, "mask");
  guard_rows(keys, ScalarType::Bool, image_id, "keys");
  guard_dtype(extent, ScalarType::Int, "extent");
  guard_shape(extent, {shape.samples, 3}, "extent");
  guard_contiguous(extent, "extent");
  PYVTK_GUARD(key_group >= kAllKeys && key_group <= kGivenKeys, "key_group is ", key_group);
  PYVTK_GUARD(keys.has_value() == (key_group == kGivenKeys), "keys are given, or a group of them");
  PYVTK_GUARD(strip.empty() || (strip.size() == 4 && strip[0] > 0), "strip has ", strip.size(), " numbers");
  PYVTK_GUARD(window.empty() || (window.size() == 6 && strip.empty()), "window has ", window.size(), " numbers");
  for (size_t i = 0; i < window.size(); ++i) PYVTK_GUARD(window[i] >= (i < 3 ? 1 : 0), "window is ", window[i]);

  const int64_t parts = key_group == kAllKeys ? 1 : 2, curves = window.empty() ? 1 : 2;
  const int64_t row_facts = kSlotFields * shape.tokens, all_facts = shape.rows * row_facts;
  const Tensor facts = new_empty(image_id, {parts, shape.rows, kSlotFields, shape.tokens}, ScalarType::Int);
  const Tensor curve = new_empty(image_id, {curves, shape.rows, shape.tokens}, ScalarType::Long);
  const FactsRule rule{key_group, strip.empty() ? nullptr : strip.data(), window.empty() ? nullptr : window.data()};
  const int64_t row_stride = dim == 2 ? coords.stride(0) : 0, axis_stride = coords.stride(dim);
  const int32_t* first = data<int32_t>(coords);
  for_integer_dtype(image_id, "image_id", [&](auto image_zero) {
    using Image = decltype(image_zero);
    for_integer_dtype(positions, "positions", [&](auto position_zero) {
      using Position = decltype(position_zero);
      const Narrowed<Image> images(token_rows<Image>(image_id), shape);
      const Narrowed<Position> places(token_rows<Position>(positions), causal ? shape : LayoutShape{0, 0, nullptr, 0});
      const FactsProblem<Image, Position> problem{shape,
                                                  token_rows<Image>(image_id),
                                                  images,
                                                  causal ? &places : nullptr,
                                                  {{first, row_stride, coords.stride(dim - 1)},
                                                   {first + axis_stride, row_stride, coords.stride(dim - 1)},
                                                   {first + 2 * axis_stride, row_stride, coords.stride(dim - 1)}},
                                                  token_rows<uint8_t>(mask),
                                                  token_rows<uint8_t>(keys),
                                                  data<int32_t>(extent),
                                                  rule};
      parallel_for(shape.rows, 10.0 * static_cast<double>(shape.tokens), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          int32_t* of_row = mutable_data<int32_t>(facts) + row * row_facts;
          attention_facts(problem, row, of_row, parts == 1 ? nullptr : of_row + all_facts,
                          mutable_data<int64_t>(curve) + row * shape.tokens, shape.rows * shape.tokens);
        }
      });
    });
  });
  return {facts, curve};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) { m.impl("attention_facts", TORCH_BOX(&pyvtk::cpu::facts_of)); }
