// Binding of select.
#include "cpu/select_binding.h"
#define PYVTK_KERNEL_HEADER "cpu/select.h"
#include <tuple>

#include "cpu/each_isa.h"

namespace pyvtk::cpu {
SelectResult prepare_select(const Tensor& like, const std::vector<int64_t>& shape, const SelectArguments& arguments,
                            SelectProblem& problem) {
  SelectResult result = make_select_problem(like, shape, arguments, problem);
  if (problem.cu_seqlens) {
    PYVTK_GUARD(problem.cu_seqlens[0] >= 0 && problem.cu_seqlens[problem.rows] <= problem.tokens,
                "cu_seqlens must lie in 0..", problem.tokens);
    for (int64_t row = 0; row < problem.rows; ++row) {
      PYVTK_GUARD(problem.cu_seqlens[row] <= problem.cu_seqlens[row + 1], "cu_seqlens must not descend");
    }
  }
  return result;
}

void run_select(const SelectProblem& problem, ScalarType dtype, int64_t begin, int64_t end) {
  const bool known =
      for_float_dtype(dtype, [&](auto zero) { PYVTK_FOR_ISA(select_rows<decltype(zero)>)(problem, begin, end); });
  PYVTK_GUARD(known, "scores have dtype number ", static_cast<int>(dtype), ", expected float32, bfloat16 or float16");
}

SelectResult select(const Tensor& scores, const SelectArguments& arguments) {
  guard_last_contiguous(scores, "scores");
  SelectProblem problem;
  SelectResult result = prepare_select(scores, shape_of(scores), arguments, problem);
  set_scores(scores, problem);
  const ScalarType dtype = scores.scalar_type();
  const int64_t samples = problem.cu_seqlens && problem.rows > 0 ? problem.rows : 1;
  const double cost = 2.0 * static_cast<double>(problem.tokens / samples);
  parallel_for(problem.rows, cost, [&](int64_t begin, int64_t end) { run_select(problem, dtype, begin, end); });
  return result;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> select_operator(
    const Tensor& scores, int64_t num_keep, const OptionalTensor& num_keep_per_row, const OptionalTensor& threshold,
    const OptionalTensor& top_p, const OptionalTensor& keep, const OptionalTensor& drop,
    const OptionalTensor& candidates, bool keep_others, const OptionalTensor& segments, int64_t num_segments,
    const OptionalTensor& cu_seqlens, int64_t capacity, bool align_right, bool by_score) {
  SelectResult result =
      select(scores, {num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments,
                      num_segments, cu_seqlens, capacity, align_right, by_score});
  return {std::move(result.indices), std::move(result.counts), std::move(result.overflow)};
}

std::tuple<Tensor, Tensor, Tensor> select_top_operator(const Tensor& scores, int64_t num_keep) {
  SelectArguments arguments;
  arguments.num_keep = arguments.capacity = num_keep;
  SelectResult result = select(scores, arguments);
  return {std::move(result.indices), std::move(result.counts), std::move(result.overflow)};
}

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("select", TORCH_BOX(&select_operator));
  m.impl("select_top", TORCH_BOX(&select_top_operator));
}

}  // namespace
}  // namespace pyvtk::cpu
