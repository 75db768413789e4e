// Binding of attention_plan for CPU tensors. Meaning: pyvtk/reference/attention_plan.py.
#include "cpu/attention_plan.h"

#include <tuple>

#include "binding.h"

namespace pyvtk::cpu {
namespace {

using Plan = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// What a table is filled into, for one direction.
struct Table {
  Tensor blocks, counts, order;

  Table(const Tensor& like, int64_t batch, int64_t lines, int64_t columns)
      : blocks(new_empty(like, {batch, lines, columns}, ScalarType::Int)),
        counts(new_empty(like, {batch, lines, 2}, ScalarType::Int)),
        order(new_empty(like, {batch * lines}, ScalarType::Int)) {}

  void fill(int64_t b, const std::vector<uint8_t>& meetings, int64_t columns, int64_t line_step, int64_t column_step) {
    const int64_t lines = counts.size(1);
    for (int64_t line = 0; line < lines; ++line) {
      tabulate(meetings.data() + line * line_step, columns, column_step,
               mutable_data<int32_t>(blocks) + (b * lines + line) * columns,
               mutable_data<int32_t>(counts) + (b * lines + line) * 2);
    }
  }
  void finish() { heaviest_first(data<int32_t>(counts), order.size(0), mutable_data<int32_t>(order)); }
};

PlanTokens tokens_of(const Tensor& facts, const Tensor& curve, const OptionalTensor& cu_seqlens, int64_t b) {
  const int64_t rows = facts.size(2);
  PlanTokens tokens{data<int32_t>(facts) + b * kSlotFields * rows,
                    data<int64_t>(curve) + b * rows,
                    rows,
                    curve.size(0),
                    facts.size(0) * rows,
                    nullptr,
                    0};
  if (cu_seqlens.has_value()) {
    tokens.cu_seqlens = data<int32_t>(*cu_seqlens);
    tokens.samples = cu_seqlens->size(0) - 1;
  }
  return tokens;
}

void guard_facts(const Tensor& facts, const Tensor& curve, int64_t batch, int64_t regions,
                 const OptionalTensor& cu_seqlens) {
  guard_dtype(facts, ScalarType::Int, "facts");
  guard_dim(facts, 3, "facts");
  guard_shape(facts, {batch, kSlotFields, facts.size(2)}, "facts");
  guard_contiguous(facts, "facts");
  guard_dtype(curve, ScalarType::Long, "curve");
  guard_dim(curve, 3, "curve");
  guard_shape(curve, {curve.size(0), batch, facts.size(2)}, "curve");
  guard_contiguous(curve, "curve");
  PYVTK_GUARD(curve.size(0) > 0, "curve holds no keys to sort by");
  for (int64_t b = 0; b < batch && regions > 0; ++b) {
    const int32_t* region = data<int32_t>(facts) + (b * kSlotFields + kSlotRegion) * facts.size(2);
    for (int64_t row = 0; row < facts.size(2); ++row) {
      PYVTK_GUARD(region[row] >= 0 && region[row] < regions, "region ", region[row], " is not one of ", regions);
    }
  }
  if (!cu_seqlens.has_value()) return;
  const int64_t samples = cu_seqlens->size(0) - 1;
  for (int64_t row = 0; row < facts.size(2); ++row) {
    const int32_t sample = data<int32_t>(facts)[kSlotSample * facts.size(2) + row];
    PYVTK_GUARD(sample >= 0 && sample <= samples, "sample ", sample, " of token ", row, " is not one of ", samples);
  }
}

Plan attention_plan(Tensor query_facts, Tensor key_facts, Tensor query_curve, Tensor key_curve,
                    OptionalTensor cu_seqlens, Tensor routes, std::vector<int64_t> rule_) {
  const int64_t batch = query_facts.size(0);
  PYVTK_GUARD(rule_.size() == 7, "rule has ", rule_.size(), " numbers, expected 7");
  const auto radius = [&](size_t i) { return saturated(rule_[i]); };
  const PlanRule rule{rule_[0], rule_[1], {radius(2), radius(3), radius(4)}, rule_[5] != 0, rule_[6] != 0};
  PYVTK_GUARD(rule.block_q > 0 && rule.block_k > 0, "blocks must hold tokens");
  if (cu_seqlens.has_value()) {
    guard_dtype(*cu_seqlens, ScalarType::Int, "cu_seqlens");
    guard_dim(*cu_seqlens, 1, "cu_seqlens");
    PYVTK_GUARD(batch == 1 && cu_seqlens->size(0) > 0, "packed tokens form one batch row");
  }
  guard_dtype(routes, ScalarType::Int, "routes");
  guard_dim(routes, 3, "routes");
  guard_contiguous(routes, "routes");
  const int64_t regions = routes.size(2);
  guard_facts(query_facts, query_curve, batch, regions, cu_seqlens);
  guard_facts(key_facts, key_curve, batch, regions, cu_seqlens);
  PYVTK_GUARD(regions == 0 || (routes.size(0) == batch && routes.size(1) == regions), "routes do not fit the batch");

  const auto slots_for = [&](int64_t rows, int64_t block) {
    return cu_seqlens.has_value() ? (rows / block + cu_seqlens->size(0)) * block : (rows + block - 1) / block * block;
  };
  const int64_t num_q = slots_for(query_facts.size(2), rule.block_q), nq = num_q / rule.block_q;
  const int64_t num_k = slots_for(key_facts.size(2), rule.block_k), nk = num_k / rule.block_k;
  Tensor query_slots = new_empty(query_facts, {batch, kSlotFields, num_q}, ScalarType::Int);
  Tensor key_slots = new_empty(query_facts, {batch, kSlotFields, num_k}, ScalarType::Int);
  Table keys(query_facts, batch, nq, nk), queries(query_facts, batch, nk, nq);
  // facts of keys that are those of queries stand in the same order
  const bool same = rule.block_q == rule.block_k && query_facts.const_data_ptr() == key_facts.const_data_ptr() &&
                    query_curve.const_data_ptr() == key_curve.const_data_ptr() &&
                    query_facts.size(2) == key_facts.size(2) && query_curve.size(0) == key_curve.size(0);
  const double cost = 200.0 * static_cast<double>(num_q + num_k) + 6.0 * static_cast<double>(nq * nk);
  parallel_for(batch, cost, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> meetings(static_cast<size_t>(nq * nk));
    for (int64_t b = begin; b < end; ++b) {
      int32_t* q = mutable_data<int32_t>(query_slots) + b * kSlotFields * num_q;
      int32_t* k = mutable_data<int32_t>(key_slots) + b * kSlotFields * num_k;
      place_tokens(tokens_of(query_facts, query_curve, cu_seqlens, b), rule.block_q, num_q, q);
      if (same) {
        std::copy_n(q, kSlotFields * num_q, k);
      } else {
        place_tokens(tokens_of(key_facts, key_curve, cu_seqlens, b), rule.block_k, num_k, k);
      }
      const PlanBoxes q_boxes(q, num_q, rule.block_q, regions > 0), k_boxes(k, num_k, rule.block_k, regions > 0);
      const int32_t* allowed = regions > 0 ? data<int32_t>(routes) + b * regions * regions : nullptr;
      for (int64_t i = 0; i < nq; ++i) meet(q_boxes, k_boxes, i, rule, allowed, regions, meetings.data() + i * nk);
      keys.fill(b, meetings, nk, nk, 1);
      queries.fill(b, meetings, nq, 1, nk);
    }
  });
  keys.finish();
  queries.finish();
  return {query_slots, key_slots, keys.blocks, keys.counts, keys.order, queries.blocks, queries.counts, queries.order};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) { m.impl("attention_plan", TORCH_BOX(&pyvtk::cpu::attention_plan)); }
