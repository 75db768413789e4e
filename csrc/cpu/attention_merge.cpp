// Binding of weigh_groups for CPU tensors: the sum over groups of weight x row, by the row kernels of merge.h. Meaning:
// pyvtk/reference/attention.py. Bounded by memory: every row is read once.
#include <tuple>

#include "cpu/merge_binding.h"

namespace pyvtk::cpu {
namespace {

// A tensor [batch, heads, queries, channels] with contiguous channels, and weights [groups, batch, heads, queries].
struct GroupRows {
  int64_t batch, heads, queries, channels, bytes;  // of a number of the tensors

  explicit GroupRows(const Tensor& x)
      : batch(x.size(0)), heads(x.size(1)), queries(x.size(2)), channels(x.size(3)), bytes(element_size(x)) {}

  int64_t count() const { return batch * heads * queries; }
  // Where a row begins; rows are numbered as those of a contiguous tensor.
  char* at(const Tensor& x, int64_t row) const {
    const int64_t b = row / (heads * queries), h = row / queries % heads, i = row % queries;
    const int64_t offset = (b * x.stride(0) + h * x.stride(1) + i * x.stride(2)) * bytes;
    return static_cast<char*>(const_cast<void*>(x.const_data_ptr())) + offset;
  }
  double cost(size_t groups) const {
    return static_cast<double>(static_cast<int64_t>(groups) * channels * bytes) * kNanosecondsPerByte;
  }
};

void guard_groups(const std::vector<Tensor>& outs, const Tensor& weights) {
  PYVTK_GUARD(!outs.empty(), "there are no groups");
  guard_dim(outs[0], 4, "outs");
  const GroupRows rows(outs[0]);
  for (const Tensor& out : outs) {
    guard_dtype(out, outs[0].scalar_type(), "outs");
    guard_shape(out, {rows.batch, rows.heads, rows.queries, rows.channels}, "outs");
    guard_last_contiguous(out, "outs");
  }
  const auto groups = static_cast<int64_t>(outs.size());
  guard_shape(weights, {groups, rows.batch, rows.heads, rows.queries}, "weights");
}

// Dense, heads or queries outermost in memory as they are in `like`.
Tensor in_order_of(const Tensor& like) {
  const GroupRows rows(like);
  if (like.stride(1) >= like.stride(2)) {
    return new_empty(like, {rows.batch, rows.heads, rows.queries, rows.channels}, like.scalar_type());
  }
  const Tensor dense = new_empty(like, {rows.batch, rows.queries, rows.heads, rows.channels}, like.scalar_type());
  return torch::stable::transpose(dense, 1, 2);
}

Tensor weigh_groups(std::vector<Tensor> outs, Tensor weights) {
  guard_groups(outs, weights);
  const Arithmetic arithmetic = arithmetic_of(outs[0].scalar_type());
  PYVTK_GUARD(arithmetic.sum != nullptr, "outs have a dtype that cannot be added");
  const GroupRows rows(outs[0]);
  Tensor result = in_order_of(outs[0]);
  const std::vector<double> weight = doubles(weights);
  parallel_for(rows.count(), rows.cost(outs.size() + 1), [&](int64_t begin, int64_t end) {
    std::vector<const void*> members;
    std::vector<double> factors;
    for (int64_t row = begin; row < end; ++row) {
      members.clear();
      factors.clear();
      for (size_t group = 0; group < outs.size(); ++group) {
        const double factor = weight[group * static_cast<size_t>(rows.count()) + static_cast<size_t>(row)];
        if (factor == 0) continue;  // a group that saw no key may hold anything
        members.push_back(rows.at(outs[group], row));
        factors.push_back(factor);
      }
      arithmetic.sum(rows.at(result, row), nullptr, members.data(), factors.data(),
                     static_cast<int64_t>(members.size()), 1.0, rows.channels);
    }
  });
  return result;
}

// d out_g = weight_g grad; d weight_g = grad . out_g.
std::tuple<std::vector<Tensor>, Tensor> weigh_groups_backward(Tensor grad, std::vector<Tensor> outs, Tensor weights) {
  guard_groups(outs, weights);
  const GroupRows rows(outs[0]);
  guard_dtype(grad, outs[0].scalar_type(), "grad");
  guard_shape(grad, {rows.batch, rows.heads, rows.queries, rows.channels}, "grad");
  guard_last_contiguous(grad, "grad");
  const Arithmetic arithmetic = arithmetic_of(grad.scalar_type());
  PYVTK_GUARD(arithmetic.sum != nullptr, "outs have a dtype that cannot be added");
  std::vector<Tensor> grads;
  for (size_t group = 0; group < outs.size(); ++group) grads.push_back(in_order_of(outs[group]));
  const std::vector<double> weight = doubles(weights);
  std::vector<double> grad_weight(weight.size());
  parallel_for(rows.count(), 2 * rows.cost(outs.size()), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const void* from = rows.at(grad, row);
      for (size_t group = 0; group < outs.size(); ++group) {
        const size_t at = group * static_cast<size_t>(rows.count()) + static_cast<size_t>(row);
        arithmetic.sum(rows.at(grads[group], row), nullptr, &from, &weight[at], weight[at] != 0, 1.0, rows.channels);
        grad_weight[at] = arithmetic.dot(from, rows.at(outs[group], row), rows.channels);
      }
    }
  });
  Tensor grad_weights = new_empty(weights, {static_cast<int64_t>(outs.size()), rows.batch, rows.heads, rows.queries},
                                  weights.scalar_type());
  store_doubles(grad_weight, grad_weights);
  return {grads, grad_weights};
}

}  // namespace
}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("weigh_groups", TORCH_BOX(&pyvtk::cpu::weigh_groups));
  m.impl("weigh_groups_backward", TORCH_BOX(&pyvtk::cpu::weigh_groups_backward));
}
