// Binding of text_attention for CPU tensors. Meaning: pyvtk/reference/text_attention.py.
#include "binding.h"
#include "cpu/text_attention_problem.h"
#define PYVTK_KERNEL_HEADER "cpu/text_attention.h"
#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

AttentionRows rows_of(const Tensor& tensor, const char* name) {
  guard_dim(tensor, 4, name);
  guard_last_contiguous(tensor, name);
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

std::tuple<Tensor, Tensor> text_attention(Tensor q, Tensor k, Tensor v, OptionalTensor k_bias, OptionalTensor visual,
                                          OptionalTensor k_mask, OptionalTensor key_slots, OptionalTensor visual_heads,
                                          bool added_keys, double scale, bool keep_mass) {
  TextAttentionProblem p{};
  p.q = rows_of(q, "q");
  p.k = rows_of(k, "k");
  p.v = rows_of(v, "v");
  p.batch = q.size(0);
  p.q_heads = q.size(1);
  p.queries = q.size(2);
  p.dim = q.size(3);
  p.kv_heads = k.size(1);
  p.keys = k.size(2);
  PYVTK_GUARD(p.dim % 8 == 0 && p.dim <= 256, "head dimension ", p.dim);
  PYVTK_GUARD(p.kv_heads > 0 && p.q_heads % p.kv_heads == 0, "heads of q and k");
  PYVTK_GUARD(p.queries <= p.keys, "q has ", p.queries, " rows, more than the ", p.keys, " of k");
  guard_shape(k, {p.batch, p.kv_heads, p.keys, p.dim}, "k");
  guard_shape(v, {p.batch, p.kv_heads, p.keys, p.dim}, "v");
  guard_dtype(k, q.scalar_type(), "k");
  guard_dtype(v, q.scalar_type(), "v");
  const auto optional = [](const OptionalTensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                           const char* name) {
    if (!t.has_value()) return;
    guard_dtype(*t, dtype, name);
    guard_shape(*t, shape, name);
    guard_contiguous(*t, name);
  };
  optional(k_bias, ScalarType::Float, {p.batch, p.keys}, "k_bias");
  optional(visual, ScalarType::Bool, {p.batch, p.keys}, "visual");
  optional(k_mask, ScalarType::Bool, {p.batch, p.keys}, "k_mask");
  optional(visual_heads, ScalarType::Bool, {p.q_heads}, "visual_heads");
  if (key_slots.has_value()) {
    PYVTK_GUARD(!visual.has_value() && !k_mask.has_value() && p.queries == 1, "key_slots are for one row, no masks");
    guard_dim(*key_slots, 3, "key_slots");
    p.slots = key_slots->size(2);
    optional(key_slots, ScalarType::Int, {p.batch, kSlotFields, p.slots}, "key_slots");
  }
  p.k_bias = data<float>(k_bias);
  p.visual = data<bool>(visual);
  p.k_mask = data<bool>(k_mask);
  p.key_slots = data<int32_t>(key_slots);
  p.visual_heads = data<bool>(visual_heads);
  p.added_keys = added_keys;
  p.scale = static_cast<float>(scale);
  p.keep_mass = keep_mass;

  const bool by_token = q.stride(1) < q.stride(2);  // out lies in memory as q does
  Tensor out =
      by_token ? torch::stable::transpose(new_empty(q, {p.batch, p.queries, p.q_heads, p.dim}, q.scalar_type()), 1, 2)
               : new_empty(q, {p.batch, p.q_heads, p.queries, p.dim}, q.scalar_type());
  Tensor lse = new_empty(q, {p.batch, p.q_heads, p.queries}, ScalarType::Float);
  p.out = rows_of(out, "out");
  p.lse = mutable_data<float>(lse);
  const bool known = for_float_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (out.numel() == 0) return;
    const auto kernel = PYVTK_FOR_ISA(text_attention<T>);
    // 0.1 ns for two multiplications of each pair of row and key
    const double cost = 0.1 * static_cast<double>(p.queries * p.group() * p.keys * p.dim);
    parallel_for(p.batch * p.kv_heads, cost, [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  });
  PYVTK_GUARD(known, "q has dtype number ", static_cast<int>(q.scalar_type()), ", which has no kernel");
  return {out, lse};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) { m.impl("text_attention", TORCH_BOX(&pyvtk::cpu::text_attention)); }
