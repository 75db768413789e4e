// Binding of neighbor_attention for CPU tensors. Meaning: pyvtk/reference/attention.py.
#include "binding.h"
#include "cpu/attention_problem.h"
#define PYVTK_KERNEL_HEADER "cpu/attention_backward.h"  // and attention.h, which it includes
#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

AttentionRows rows_of(const Tensor& tensor, const char* name) {
  guard_dim(tensor, 4, name);
  guard_last_contiguous(tensor, name);
  return {const_cast<void*>(tensor.const_data_ptr()), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

// The plan's tensors and numbers, in the order of AttentionPlan.tensors() and .rule().
void set_plan(AttentionProblem& p, const std::vector<Tensor>& plan, const std::vector<int64_t>& rule) {
  PYVTK_GUARD(plan.size() == 9, "plan has ", plan.size(), " tensors, expected 9");
  PYVTK_GUARD(rule.size() == 7, "rule has ", rule.size(), " numbers, expected 7");
  for (const Tensor& tensor : plan) {
    guard_dtype(tensor, ScalarType::Int, "a tensor of the plan");
    guard_contiguous(tensor, "a tensor of the plan");
  }
  p.block_q = rule[0];
  p.block_k = rule[1];
  PYVTK_GUARD(p.block_q > 0 && p.block_k > 0, "blocks of ", p.block_q, " and ", p.block_k, " tokens");
  for (int64_t axis = 0; axis < 3; ++axis)
    p.radius[axis] = static_cast<int32_t>(std::min(rule[2 + axis], int64_t{1} << 30));
  p.causal_window = rule[5] != 0;
  p.cross_image = rule[6] != 0;

  guard_dim(plan[0], 3, "query_slots");
  guard_dim(plan[1], 3, "key_slots");
  guard_dim(plan[8], 3, "routes");
  p.query_slot_count = plan[0].size(2);
  p.key_slot_count = plan[1].size(2);
  p.query_block_count = p.query_slot_count / p.block_q;
  p.key_block_count = p.key_slot_count / p.block_k;
  p.regions = plan[8].size(1);
  guard_shape(plan[0], {p.batch, kSlotFields, p.query_block_count * p.block_q}, "query_slots");
  guard_shape(plan[1], {p.batch, kSlotFields, p.key_block_count * p.block_k}, "key_slots");
  guard_shape(plan[2], {p.batch, p.query_block_count, p.key_block_count}, "key_blocks");
  guard_shape(plan[3], {p.batch, p.query_block_count, 2}, "key_counts");
  guard_shape(plan[8], {p.regions ? p.batch : plan[8].size(0), p.regions, p.regions}, "routes");
  p.query_slots = data<int32_t>(plan[0]);
  p.key_slots = data<int32_t>(plan[1]);
  p.key_blocks = data<int32_t>(plan[2]);
  p.key_counts = data<int32_t>(plan[3]);
  p.routes = data<int32_t>(plan[8]);
}

AttentionProblem attention_problem(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& k_bias,
                                   const OptionalTensor& visual_heads, const std::vector<Tensor>& plan,
                                   const std::vector<int64_t>& rule, double scale, bool keep_mass, bool zero_rows) {
  AttentionProblem p{};
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
  PYVTK_GUARD(p.kv_heads > 0 ? p.q_heads % p.kv_heads == 0 : p.q_heads == 0, "heads of q and k");
  guard_shape(k, {p.batch, p.kv_heads, p.keys, p.dim}, "k");
  guard_shape(v, {p.batch, p.kv_heads, p.keys, p.dim}, "v");
  guard_dtype(k, q.scalar_type(), "k");
  guard_dtype(v, q.scalar_type(), "v");
  if (k_bias.has_value()) {
    guard_dtype(*k_bias, ScalarType::Float, "k_bias");
    guard_shape(*k_bias, {p.batch, p.keys}, "k_bias");
    guard_contiguous(*k_bias, "k_bias");
  }
  if (visual_heads.has_value()) {
    guard_dtype(*visual_heads, ScalarType::Bool, "visual_heads");
    guard_shape(*visual_heads, {p.q_heads}, "visual_heads");
    guard_contiguous(*visual_heads, "visual_heads");
  }
  p.k_bias = data<float>(k_bias);
  p.visual_heads = data<bool>(visual_heads);
  p.scale = static_cast<float>(scale);
  p.keep_mass = keep_mass;
  p.zero_rows = zero_rows;
  set_plan(p, plan, rule);
  return p;
}

// [batch, heads, rows, dim], uninitialised, in the memory order of `like`.
Tensor new_rows(const Tensor& like) {
  const int64_t batch = like.size(0), heads = like.size(1), rows = like.size(2), dim = like.size(3);
  if (like.stride(1) >= like.stride(2)) return new_empty(like, {batch, heads, rows, dim}, like.scalar_type());
  return torch::stable::transpose(new_empty(like, {batch, rows, heads, dim}, like.scalar_type()), 1, 2);
}

// Fills in a table's keys.
void find_keys(const AttentionProblem& p, AttentionTable& table) {
  const int64_t tiles = static_cast<int64_t>(table.tiles.size());
  const double slots = static_cast<double>(table.rows.size()) / static_cast<double>(std::max<int64_t>(tiles, 1));
  const auto find = PYVTK_FOR_ISA(attention_table);
  parallel_for(tiles, 10 * slots, [&](int64_t begin, int64_t end) { find(p, table, begin, end); });
}

// Nanoseconds per head of keys and row of the batch, for `products` matrix products.
double cost_of_head(const AttentionProblem& p, const AttentionTable& table, double products) {
  const double pairs = static_cast<double>(table.rows.size() * kAttentionTile) /
                       static_cast<double>(table.batch_end - table.batch_begin);
  return pairs * static_cast<double>(p.group() * p.dim) * products / 30;
}

std::tuple<Tensor, Tensor> neighbor_attention(Tensor q, Tensor k, Tensor v, OptionalTensor k_bias,
                                              OptionalTensor visual_heads, std::vector<Tensor> plan,
                                              std::vector<int64_t> rule, double scale, bool keep_mass, bool zero_rows) {
  AttentionProblem p = attention_problem(q, k, v, k_bias, visual_heads, plan, rule, scale, keep_mass, zero_rows);
  Tensor out = new_rows(q);
  Tensor lse = new_empty(q, {p.batch, p.q_heads, p.queries}, ScalarType::Float);
  p.out = rows_of(out, "out");
  p.lse = mutable_data<float>(lse);
  const bool known = for_float_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto forward = PYVTK_FOR_ISA(attention_forward<T>);
    if (out.numel() == 0) return;
    for_attention_tables(p, p.batch, [&](AttentionTable& table) {
      find_keys(p, table);
      // Enough parts for many threads; tiles do not depend on each other.
      const int64_t heads = (table.batch_end - table.batch_begin) * p.kv_heads;
      const int64_t parts = std::clamp<int64_t>(128 / heads, 1, ceil_div<int64_t>(table.row_tiles(), 4));
      parallel_for(heads * parts, cost_of_head(p, table, 2) / static_cast<double>(parts),
                   [&](int64_t begin, int64_t end) { forward(p, table, parts, begin, end); });
    });
  });
  PYVTK_GUARD(known, "q has dtype number ", static_cast<int>(q.scalar_type()), ", which has no kernel");
  return {out, lse};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Gradients neighbor_attention_backward(OptionalTensor grad_out, OptionalTensor grad_lse, Tensor q, Tensor k, Tensor v,
                                      OptionalTensor k_bias, OptionalTensor visual_heads, Tensor out, Tensor lse,
                                      std::vector<Tensor> plan, std::vector<int64_t> rule, double scale, bool keep_mass,
                                      bool zero_rows) {
  AttentionProblem p = attention_problem(q, k, v, k_bias, visual_heads, plan, rule, scale, keep_mass, zero_rows);
  guard_shape(out, {p.batch, p.q_heads, p.queries, p.dim}, "out");
  guard_dtype(out, q.scalar_type(), "out");
  guard_shape(lse, {p.batch, p.q_heads, p.queries}, "lse");
  guard_dtype(lse, ScalarType::Float, "lse");
  guard_contiguous(lse, "lse");
  p.out = rows_of(out, "out");
  p.lse = mutable_data<float>(lse);
  AttentionGradient g{};
  if (grad_out.has_value()) {
    guard_shape(*grad_out, {p.batch, p.q_heads, p.queries, p.dim}, "grad_out");
    guard_dtype(*grad_out, q.scalar_type(), "grad_out");
    g.out = rows_of(*grad_out, "grad_out");
  }
  if (grad_lse.has_value()) {
    guard_shape(*grad_lse, {p.batch, p.q_heads, p.queries}, "grad_lse");
    guard_dtype(*grad_lse, ScalarType::Float, "grad_lse");
    guard_contiguous(*grad_lse, "grad_lse");
    g.lse = data<float>(*grad_lse);
  }
  Tensor grad_q = new_empty(q, {p.batch, p.q_heads, p.queries, p.dim}, q.scalar_type());
  Tensor grad_k = new_empty(k, {p.batch, p.kv_heads, p.keys, p.dim}, q.scalar_type());
  Tensor grad_v = new_empty(v, {p.batch, p.kv_heads, p.keys, p.dim}, q.scalar_type());
  Tensor grad_bias =
      k_bias.has_value() ? new_empty(q, {p.batch, p.keys}, ScalarType::Float) : new_empty(q, {0}, ScalarType::Float);
  g.q = rows_of(grad_q, "grad_q");
  g.k = rows_of(grad_k, "grad_k");
  g.v = rows_of(grad_v, "grad_v");
  g.k_bias = k_bias.has_value() ? mutable_data<float>(grad_bias) : nullptr;
  if (p.batch * p.q_heads * p.queries * p.dim == 0 || p.keys == 0) {
    for (const Tensor& tensor : {grad_q, grad_k, grad_v, grad_bias}) {
      if (tensor.numel()) std::memset(tensor.mutable_data_ptr(), 0, tensor.numel() * tensor.element_size());
    }
    return {grad_q, grad_k, grad_v, grad_bias};
  }
  const bool known = for_float_dtype(q.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t lanes = PYVTK_FOR_ISA(attention_lanes)();
    g.ld = ceil_div(p.dim, lanes) * lanes;
    // Enough parts for some threads, while their sums fit 64 MiB; likewise rows of the batch that are under way. Sums
    // of parts cost less where a group shares them.
    const int64_t row_floats = 2 * p.kv_heads * p.keys * g.ld, most_floats = int64_t{1} << 24;
    const int64_t wanted = 8 * std::min<int64_t>(p.group(), 4) / (p.batch * p.kv_heads);
    g.parts =
        std::clamp<int64_t>(std::min(wanted, most_floats / row_floats), 1, std::max<int64_t>(p.row_tiles() / 8, 1));
    g.direct = g.parts == 1 && std::is_same_v<T, float> && g.ld == p.dim;
    const int64_t rows = g.direct ? p.batch : std::clamp<int64_t>(most_floats / (row_floats * g.parts), 1, p.batch);
    std::unique_ptr<float[]> k_sums, v_sums, bias_sums;
    if (!g.direct) {
      k_sums = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows * g.parts * row_floats / 2));
      v_sums = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows * g.parts * row_floats / 2));
    }
    if (g.k_bias) {
      bias_sums = std::make_unique_for_overwrite<float[]>(static_cast<size_t>(rows * g.parts * p.kv_heads * p.keys));
    }
    g.k_sums = k_sums.get();
    g.v_sums = v_sums.get();
    g.bias_sums = bias_sums.get();
    const auto backward = PYVTK_FOR_ISA(attention_backward<T>);
    const auto add_keys = PYVTK_FOR_ISA(attention_backward_keys<T>);
    const auto add_bias = PYVTK_FOR_ISA(attention_backward_bias);
    for_attention_tables(p, rows, [&](AttentionTable& table) {
      find_keys(p, table);
      const int64_t heads = (table.batch_end - table.batch_begin) * p.kv_heads;
      parallel_for(heads * g.parts, cost_of_head(p, table, 5) / static_cast<double>(g.parts),
                   [&](int64_t begin, int64_t end) { backward(p, g, table, begin, end); });
      if (table.tile_end < p.row_tiles()) return;
      if (!g.direct) {
        parallel_for(heads * p.keys, 0.2 * static_cast<double>(2 * g.parts * g.ld),
                     [&](int64_t begin, int64_t end) { add_keys(p, g, table.batch_begin, begin, end); });
      }
      if (g.k_bias) {
        parallel_for((table.batch_end - table.batch_begin) * p.keys, static_cast<double>(p.kv_heads * g.parts),
                     [&](int64_t begin, int64_t end) { add_bias(p, g, table.batch_begin, begin, end); });
      }
    });
  });
  PYVTK_GUARD(known, "q has dtype number ", static_cast<int>(q.scalar_type()), ", which has no kernel");
  return {grad_q, grad_k, grad_v, grad_bias};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("neighbor_attention", TORCH_BOX(&pyvtk::cpu::neighbor_attention));
  m.impl("neighbor_attention_backward", TORCH_BOX(&pyvtk::cpu::neighbor_attention_backward));
}
