// Binding of select.
#include "cpu/select_binding.h"
#define PYVTK_KERNEL_HEADER "cpu/select.h"
#include <tuple>

#include "cpu/each_isa.h"

namespace pyvtk::cpu {
namespace {

// [batch, tokens] or the shape of scores
template <class T>
PerToken<T> per_token(const OptionalTensor& tensor, ScalarType dtype, const std::vector<int64_t>& shape,
                      const char* name) {
  if (!tensor.has_value()) return {};
  guard_dtype(*tensor, dtype, name);
  guard_contiguous(*tensor, name);
  const bool shared = shape.size() == 3 && tensor->dim() == 2;
  if (shared) {
    guard_shape(*tensor, {shape[0], shape[2]}, name);
  } else {
    guard_dim(*tensor, static_cast<int64_t>(shape.size()), name);
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      PYVTK_GUARD(tensor->size(static_cast<int64_t>(dim)) == shape[dim], name, " must be shaped like scores");
    }
  }
  return {static_cast<const T*>(tensor->const_data_ptr()), shared ? shape[1] : 1};
}

// [rows, 1 or num_segments]
template <class T>
PerGroup<T> per_group(const OptionalTensor& tensor, ScalarType dtype, const SelectProblem& problem, const char* name) {
  if (!tensor.has_value()) return {};
  guard_dtype(*tensor, dtype, name);
  guard_contiguous(*tensor, name);
  const int64_t per_row = tensor->dim() == 2 && tensor->size(1) == 1 ? 1 : problem.num_segments;
  guard_shape(*tensor, {problem.rows, per_row}, name);
  return {data<T>(*tensor), per_row};
}

}  // namespace

SelectResult prepare_select(const Tensor& like, const std::vector<int64_t>& shape, const SelectArguments& arguments,
                            SelectProblem& problem) {
  const bool packed = arguments.cu_seqlens.has_value();
  if (packed) {
    PYVTK_GUARD(shape.size() == 1, "scores with cu_seqlens must have 1 dimension, got ", shape.size());
  } else {
    PYVTK_GUARD(shape.size() == 2 || shape.size() == 3, "scores must have 2 or 3 dimensions, got ", shape.size());
  }
  problem.tokens = shape.back();
  PYVTK_GUARD(problem.tokens < std::numeric_limits<int32_t>::max(), "scores have too many tokens: ", problem.tokens);
  std::vector<int64_t> rows_shape(shape.begin(), shape.end() - 1);
  if (packed) {
    const Tensor& cu_seqlens = *arguments.cu_seqlens;
    guard_dtype(cu_seqlens, ScalarType::Int, "cu_seqlens");
    guard_dim(cu_seqlens, 1, "cu_seqlens");
    guard_contiguous(cu_seqlens, "cu_seqlens");
    PYVTK_GUARD(cu_seqlens.numel() >= 1, "cu_seqlens must hold at least one entry");
    rows_shape = {cu_seqlens.numel() - 1};
    problem.cu_seqlens = data<int32_t>(cu_seqlens);
    PYVTK_GUARD(problem.cu_seqlens[0] >= 0 && problem.cu_seqlens[rows_shape[0]] <= problem.tokens,
                "cu_seqlens must lie in 0..", problem.tokens);
    for (int64_t row = 0; row < rows_shape[0]; ++row) {
      PYVTK_GUARD(problem.cu_seqlens[row] <= problem.cu_seqlens[row + 1], "cu_seqlens must not descend");
    }
  }
  problem.rows = 1;
  for (int64_t size : rows_shape) problem.rows *= size;
  problem.heads = shape.size() == 3 ? shape[1] : 1;
  problem.head_stride = problem.tokens;
  problem.batch_stride = problem.heads * problem.tokens;

  PYVTK_GUARD(arguments.num_segments >= 1, "num_segments must be at least 1, got ", arguments.num_segments);
  problem.num_segments = arguments.num_segments;
  problem.num_keep = arguments.num_keep;
  problem.num_keep_per_row =
      per_group<int64_t>(arguments.num_keep_per_row, ScalarType::Long, problem, "num_keep_per_row");
  problem.threshold = per_group<float>(arguments.threshold, ScalarType::Float, problem, "threshold");
  problem.top_p = per_group<double>(arguments.top_p, ScalarType::Double, problem, "top_p");
  problem.keep = per_token<uint8_t>(arguments.keep, ScalarType::Bool, shape, "keep");
  problem.drop = per_token<uint8_t>(arguments.drop, ScalarType::Bool, shape, "drop");
  problem.candidates = per_token<uint8_t>(arguments.candidates, ScalarType::Bool, shape, "candidates");
  problem.keep_others = arguments.keep_others;
  problem.segments = per_token<int32_t>(arguments.segments, ScalarType::Int, shape, "segments");

  PYVTK_GUARD(arguments.capacity >= 0, "capacity must be at least 0, got ", arguments.capacity);
  problem.capacity = arguments.capacity;
  problem.align_right = arguments.align_right;
  problem.by_score = arguments.by_score;
  std::vector<int64_t> indices_shape = rows_shape;
  indices_shape.push_back(arguments.capacity);
  SelectResult result{new_empty(like, indices_shape, ScalarType::Long), new_empty(like, rows_shape, ScalarType::Int),
                      new_empty(like, rows_shape, ScalarType::Bool)};
  problem.indices = mutable_data<int64_t>(result.indices);
  problem.counts = mutable_data<int32_t>(result.counts);
  problem.overflow = mutable_data<bool>(result.overflow);
  return result;
}

void run_select(const SelectProblem& problem, ScalarType dtype, int64_t begin, int64_t end) {
  const bool known =
      for_float_dtype(dtype, [&](auto zero) { PYVTK_FOR_ISA(select_rows<decltype(zero)>)(problem, begin, end); });
  PYVTK_GUARD(known, "scores have dtype number ", static_cast<int>(dtype), ", expected float32, bfloat16 or float16");
}

SelectResult select(const Tensor& scores, const SelectArguments& arguments) {
  guard_last_contiguous(scores, "scores");
  const int64_t dims = scores.dim();
  std::vector<int64_t> shape(static_cast<size_t>(dims));
  for (int64_t dim = 0; dim < dims; ++dim) shape[static_cast<size_t>(dim)] = scores.size(dim);
  SelectProblem problem;
  SelectResult result = prepare_select(scores, shape, arguments, problem);
  problem.scores = scores.const_data_ptr();
  problem.batch_stride = dims > 1 ? scores.stride(0) : 0;
  problem.head_stride = dims > 2 ? scores.stride(1) : 0;
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
