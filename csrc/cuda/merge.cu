// Binding of merge_tokens for CUDA tensors. Meaning: pyvtk/reference/merge.py. Which group a token has is not looked at
// here: tokens of a group that does not exist are left out.
#include <tuple>

#include "common/compact_binding.h"
#include "cuda/merge.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {
namespace {

// Rows of a tensor [batch, rows, channels], of which a copy is made where channels do not lie next to each other.
struct Rows : MergeRows {
  Tensor keep;

  explicit Rows(const Tensor& x) : keep(x.size(2) > 1 && x.stride(2) != 1 ? torch::stable::contiguous(x) : x) {
    data = static_cast<const char*>(keep.const_data_ptr());
    batch = keep.size(0) > 1 ? keep.stride(0) * element_size(keep) : 0;
    token = keep.size(1) > 1 ? keep.stride(1) * element_size(keep) : 0;
  }
};

struct Problem : MergeProblem {
  Rows rows;
  Tensor assigned, members_of, starts_of;
  OptionalTensor factors, counters_of;

  // `sorted`: the members of groups are wanted
  Problem(const Tensor& x_, const Tensor& assignment_, const OptionalTensor& weights_, int64_t num_groups, bool mean_,
          bool sorted)
      : MergeProblem{}, rows(x_), assigned(dense(assignment_)) {
    const OptionalTensor other(assigned);
    guard_same_device(x_, {&other, &weights_});
    x = rows;
    batch = x_.size(0), tokens = x_.size(1), channels = x_.size(2), groups = num_groups, mean = mean_;
    PYVTK_GUARD(groups >= 0, "num_groups must be at least 0, got ", groups);
    guard_dtype(assigned, ScalarType::Long, "assignment");
    guard_shape(assigned, {batch, tokens}, "assignment");
    assignment = pyvtk::data<int64_t>(assigned);
    if (weights_.has_value()) {
      guard_shape(*weights_, {batch, tokens}, "weights");
      weights_double = weights_->scalar_type() == ScalarType::Double;
      if (!weights_double) guard_dtype(*weights_, ScalarType::Float, "weights");
      factors = dense(*weights_);
      weights = factors->const_data_ptr();
    }
    if (!sorted) return;
    members_of = new_empty(x_, {batch, tokens}, ScalarType::Int);
    starts_of = new_empty(x_, {batch, groups + 1}, ScalarType::Int);
    members = mutable_data<int32_t>(members_of);
    starts = mutable_data<int32_t>(starts_of);
    if (const int64_t count = merge_counters(batch, groups); count > 0) {
      counters_of = new_empty(x_, {count}, ScalarType::Int);
      counters = mutable_data<int32_t>(*counters_of);
    }
  }
};

// f(T{}) with the type of a dtype that can be added
template <class F>
void with_number(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double) return f(double{});
  PYVTK_GUARD(for_float_dtype(dtype, f), "x has a dtype that cannot be added");
}

std::tuple<Tensor, Tensor> merge_tokens(Tensor x, Tensor assignment, OptionalTensor weights, int64_t num_groups,
                                        bool mean) {
  guard_dim(x, 3, "x");
  torch::stable::accelerator::DeviceGuard device(x.get_device_index());
  const Problem problem(x, assignment, weights, num_groups, mean, merge_sorts(num_groups));
  const Tensor result = new_empty(x, {problem.batch, num_groups, problem.channels}, x.scalar_type());
  const Tensor totals = new_empty(x, {problem.batch, num_groups}, ScalarType::Double);
  with_number(x.scalar_type(), [&](auto number) {
    check(merge<decltype(number)>(problem, result.mutable_data_ptr(), mutable_data<double>(totals), current_stream(x)),
          "merge_tokens");
  });
  return {result, totals};
}

std::tuple<Tensor, Tensor> merge_tokens_backward(Tensor grad, Tensor x, Tensor assignment, OptionalTensor weights,
                                                 Tensor totals, bool mean) {
  guard_dim(x, 3, "x");
  guard_dim(grad, 3, "grad");
  const int64_t num_groups = grad.size(1);
  guard_dtype(grad, x.scalar_type(), "grad");
  guard_shape(grad, {x.size(0), num_groups, x.size(2)}, "grad");
  guard_dtype(totals, ScalarType::Double, "totals");
  guard_shape(totals, {x.size(0), num_groups}, "totals");
  const OptionalTensor sums(dense(totals)), gradients(grad);
  guard_same_device(x, {&sums, &gradients});
  torch::stable::accelerator::DeviceGuard device(x.get_device_index());
  const bool with_weights = weights.has_value();
  const Problem problem(x, assignment, weights, num_groups, mean, with_weights && mean);
  const Rows rows(grad);
  const Tensor grad_x = new_empty(x, sizes_of(x), x.scalar_type());
  const Tensor grad_weights = with_weights
                                  ? new_empty(*weights, {problem.batch, problem.tokens}, weights->scalar_type())
                                  : new_empty(x, {0}, ScalarType::Float);
  MergeGradient gradient{rows, data<double>(sums), static_cast<char*>(grad_x.mutable_data_ptr()), nullptr, nullptr};
  OptionalTensor products;
  if (with_weights) gradient.grad_weights = grad_weights.mutable_data_ptr();
  if (with_weights && mean) {
    products = new_empty(x, {problem.batch, problem.tokens}, ScalarType::Double);
    gradient.products = mutable_data<double>(*products);
  }
  with_number(x.scalar_type(), [&](auto number) {
    check(merge_backward<decltype(number)>(problem, gradient, current_stream(x)), "the gradient of merge_tokens");
  });
  return {grad_x, grad_weights};
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("merge_tokens", TORCH_BOX(&pyvtk::cuda::merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&pyvtk::cuda::merge_tokens_backward));
}
