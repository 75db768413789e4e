#include "cuda/merge.cuh"

#include <memory>

#include "library.h"

using namespace pyvtk;
using namespace pyvtk::cuda;

namespace {

// The problem with its workspace, in memory of exactly its size.
struct Workspace {
  std::unique_ptr<int32_t, decltype(&std::free)> starts, members, counters;

  static int32_t* allocate(int64_t count) {
    return static_cast<int32_t*>(count > 0 ? std::malloc(static_cast<size_t>(4 * count)) : nullptr);
  }
  explicit Workspace(MergeProblem& problem)
      : starts(allocate(problem.batch * (problem.groups + 1)), &std::free),
        members(allocate(problem.batch * problem.tokens), &std::free),
        counters(allocate(merge_counters(problem.batch, problem.groups)), &std::free) {
    problem.starts = starts.get();
    problem.members = members.get();
    problem.counters = counters.get();
  }
};

// f(T{}); dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64
template <class F>
int with_number(int dtype, F&& f) {
  return report(dtype == 0 ? f(float{}) : dtype == 1 ? f(bfloat16{}) : dtype == 2 ? f(float16{}) : f(double{}));
}

}  // namespace

// Strides of x in elements; weights may be null.
EXPORT int emulated_merge(int dtype, const void* x, int64_t x_batch, int64_t x_token, const int64_t* assignment,
                          const void* weights, int weights_double, int64_t batch, int64_t tokens, int64_t groups,
                          int64_t channels, int mean, void* out, double* totals) {
  MergeProblem problem{{},      assignment, weights, weights_double != 0, mean != 0, batch, tokens, groups, channels,
                       nullptr, nullptr,    nullptr};
  const Workspace workspace(problem);
  return with_number(dtype, [&](auto number) {
    constexpr int64_t kBytes = sizeof(number);
    problem.x = {static_cast<const char*>(x), x_batch * kBytes, x_token * kBytes};
    return merge<decltype(number)>(problem, out, totals, nullptr);
  });
}

// grad_weights: of the type of weights; null where weights are.
EXPORT int emulated_merge_backward(int dtype, const void* grad, int64_t grad_batch, int64_t grad_token, const void* x,
                                   int64_t x_batch, int64_t x_token, const int64_t* assignment, const void* weights,
                                   int weights_double, int64_t batch, int64_t tokens, int64_t groups, int64_t channels,
                                   int mean, const double* totals, void* grad_x, void* grad_weights) {
  MergeProblem problem{{},      assignment, weights, weights_double != 0, mean != 0, batch, tokens, groups, channels,
                       nullptr, nullptr,    nullptr};
  const Workspace workspace(problem);
  std::unique_ptr<double, decltype(&std::free)> products(
      static_cast<double*>(std::malloc(static_cast<size_t>(8 * batch * tokens))), &std::free);
  return with_number(dtype, [&](auto number) {
    constexpr int64_t kBytes = sizeof(number);
    problem.x = {static_cast<const char*>(x), x_batch * kBytes, x_token * kBytes};
    const MergeGradient gradient{{static_cast<const char*>(grad), grad_batch * kBytes, grad_token * kBytes},
                                 totals,
                                 static_cast<char*>(grad_x),
                                 grad_weights,
                                 weights && mean ? products.get() : nullptr};
    return merge_backward<decltype(number)>(problem, gradient, nullptr);
  });
}
