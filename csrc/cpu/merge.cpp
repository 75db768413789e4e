// Binding of merge_tokens for CPU tensors. Meaning: pyvtk/reference/merge.py.
#include <tuple>

#include "cpu/merge_binding.h"

#define PYVTK_KERNEL_HEADER "cpu/merge.h"
#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

template <class T>
Arithmetic arithmetic() {
  return {PYVTK_FOR_ISA(sum_rows<T>), PYVTK_FOR_ISA(dot<T>), sizeof(T)};
}

// The members of every group of merge_tokens, in ascending order; one group more per sample collects what is left out.
struct Groups {
  int64_t batch, tokens, groups;
  Links links;
  std::vector<double> weights;  // [batch, tokens], or empty: all 1

  Groups(const Tensor& x, const Tensor& assignment, const OptionalTensor& weights_, int64_t num_groups)
      : batch(x.size(0)), tokens(x.size(1)), groups(num_groups) {
    guard_dtype(assignment, ScalarType::Long, "assignment");
    guard_shape(assignment, {batch, tokens}, "assignment");
    if (weights_.has_value()) {
      guard_shape(*weights_, {batch, tokens}, "weights");
      weights = doubles(*weights_);
    }
    const Tensor assigned = dense(assignment);
    const int64_t* group = data<int64_t>(assigned);
    for (int64_t i = 0; i < batch * tokens; ++i) {
      PYVTK_GUARD(group[i] < groups, "assignment holds ", group[i], ", but num_groups is ", groups);
    }
    links.build(batch * (groups + 1), [&](auto&& visit) {
      for (int64_t b = 0; b < batch; ++b) {
        for (int64_t t = 0; t < tokens; ++t) {
          const int64_t k = group[b * tokens + t];
          visit(b * (groups + 1) + (k < 0 ? groups : k), {b, t});
        }
      }
    });
  }

  double weight(const Link& link) const {
    return weights.empty() ? 1.0 : weights[static_cast<size_t>(link.row * tokens + link.position)];
  }
};

// x as [batch, tokens, channels] with contiguous channels; strides in bytes.
struct Rows3 {
  Tensor keep;
  const char* data;
  int64_t batch, token;

  explicit Rows3(const Tensor& x) : keep(x) {
    if (x.size(2) > 1 && x.stride(2) != 1) keep = torch::stable::contiguous(x);
    data = static_cast<const char*>(keep.const_data_ptr());
    batch = keep.stride(0) * element_size(keep);
    token = keep.stride(1) * element_size(keep);
  }
  const char* at(const Link& link) const { return data + link.row * batch + link.position * token; }
};

std::tuple<Tensor, Tensor> merge_tokens(Tensor x, Tensor assignment, OptionalTensor weights, int64_t num_groups,
                                        bool mean) {
  guard_dim(x, 3, "x");
  const Groups groups(x, assignment, weights, num_groups);
  const Arithmetic arithmetic = arithmetic_of(x.scalar_type());
  PYVTK_GUARD(arithmetic.sum != nullptr, "x has a dtype that cannot be added");
  const int64_t channels = x.size(2);
  const Rows3 rows(x);
  Tensor result = new_empty(x, {groups.batch, num_groups, channels}, x.scalar_type());
  Tensor totals = new_empty(x, {groups.batch, num_groups}, ScalarType::Double);
  char* out = static_cast<char*>(result.mutable_data_ptr());
  double* total = mutable_data<double>(totals);
  const int64_t row_bytes = channels * element_size(x);
  const int64_t count = groups.batch * num_groups;
  const double cost = static_cast<double>(groups.tokens * groups.batch * row_bytes) /
                      static_cast<double>(std::max<int64_t>(count, 1)) * kNanosecondsPerByte;
  parallel_for(count, cost, [&](int64_t begin, int64_t end) {
    std::vector<const void*> members;
    std::vector<double> factors;
    for (int64_t group = begin; group < end; ++group) {
      const int64_t number = group / num_groups * (num_groups + 1) + group % num_groups;
      members.clear();
      factors.clear();
      double sum = 0;
      for (const Link* link = groups.links.begin(number); link != groups.links.end(number); ++link) {
        members.push_back(rows.at(*link));
        factors.push_back(groups.weight(*link));
        sum += factors.back();
      }
      total[group] = sum;
      if (mean && sum == 0) members.clear();
      arithmetic.sum(out + group * row_bytes, nullptr, members.data(), factors.data(),
                     static_cast<int64_t>(members.size()), mean && sum != 0 ? sum : 1.0, row_bytes / arithmetic.number);
    }
  });
  return {result, totals};
}

// Of the mean m = sum w x / W: dx = (w / W) g and dw = (g . x - g . m) / W, where g . m is the mean of the g . x.
std::tuple<Tensor, Tensor> merge_tokens_backward(Tensor grad, Tensor x, Tensor assignment, OptionalTensor weights,
                                                 Tensor totals, bool mean) {
  guard_dim(x, 3, "x");
  guard_dim(grad, 3, "grad");
  const int64_t num_groups = grad.size(1), channels = x.size(2);
  guard_dtype(grad, x.scalar_type(), "grad");
  guard_shape(grad, {x.size(0), num_groups, channels}, "grad");
  guard_shape(totals, {x.size(0), num_groups}, "totals");
  guard_dtype(totals, ScalarType::Double, "totals");
  const Groups groups(x, assignment, weights, num_groups);
  const Arithmetic arithmetic = arithmetic_of(x.scalar_type());
  PYVTK_GUARD(arithmetic.sum != nullptr, "x has a dtype that cannot be added");
  const Rows3 rows(x), grads(grad);
  const Tensor sums = dense(totals);
  const double* total = data<double>(sums);
  Tensor grad_x = new_empty(x, {groups.batch, groups.tokens, channels}, x.scalar_type());
  char* out = static_cast<char*>(grad_x.mutable_data_ptr());
  std::vector<double> grad_weights(weights.has_value() ? groups.weights.size() : 0, 0.0);
  const int64_t row_bytes = channels * element_size(x);
  const int64_t size = row_bytes / arithmetic.number;
  const int64_t count = groups.batch * (num_groups + 1);
  const double cost = 3.0 * static_cast<double>(groups.tokens * groups.batch * row_bytes) /
                      static_cast<double>(std::max<int64_t>(count, 1)) * kNanosecondsPerByte;
  parallel_for(count, cost, [&](int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
      const int64_t b = number / (num_groups + 1), k = number % (num_groups + 1);
      const double sum = k == num_groups ? 0.0 : mean ? total[b * num_groups + k] : 1.0;
      const bool alive = sum != 0;  // not so for what is left out, and for groups of no weight
      const void* from = alive ? grads.at({b, k}) : nullptr;
      double average = 0;
      for (const Link* link = groups.links.begin(number); link != groups.links.end(number); ++link) {
        const int64_t at = link->row * groups.tokens + link->position;
        const double weight = groups.weight(*link);
        const double factor = alive ? weight / sum : 0.0;
        arithmetic.sum(out + at * row_bytes, nullptr, &from, &factor, alive ? 1 : 0, 1.0, size);
        if (alive && !grad_weights.empty()) {
          const double product = arithmetic.dot(from, rows.at(*link), size);
          grad_weights[static_cast<size_t>(at)] = product / sum;
          average += weight / sum * product;
        }
      }
      if (!alive || !mean || grad_weights.empty()) continue;
      for (const Link* link = groups.links.begin(number); link != groups.links.end(number); ++link) {
        grad_weights[static_cast<size_t>(link->row * groups.tokens + link->position)] -= average / sum;
      }
    }
  });
  if (!weights.has_value()) return {grad_x, new_empty(x, {0}, ScalarType::Float)};
  Tensor grad_w = new_empty(*weights, {groups.batch, groups.tokens}, weights->scalar_type());
  store_doubles(grad_weights, grad_w);
  return {grad_x, grad_w};
}

}  // namespace

Arithmetic arithmetic_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return arithmetic<float>();
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return arithmetic<double>();
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return arithmetic<float16>();
    case ScalarType::BFloat16:
      return arithmetic<bfloat16>();
    default:
      return {};
  }
}

}  // namespace pyvtk::cpu

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("merge_tokens", TORCH_BOX(&pyvtk::cpu::merge_tokens));
  m.impl("merge_tokens_backward", TORCH_BOX(&pyvtk::cpu::merge_tokens_backward));
}
