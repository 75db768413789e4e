// select for bindings: guards, outputs, and the way from tensors to the kernel. Implemented in select.cpp.
//
// A binding that has scores in a tensor calls select(). One that makes scores row by row calls prepare_select() once,
// sets problem.scores and its strides, and run_select() for the rows that are ready, from any thread.
#pragma once
#include "binding.h"
#include "common/select_problem.h"

namespace pyvtk::cpu {

// The arguments of pyvtk::select that follow scores, in the same order and with the same meaning.
struct SelectArguments {
  int64_t num_keep = -1;
  OptionalTensor num_keep_per_row;  // int64 [rows, 1 or num_segments]
  OptionalTensor threshold;         // float32 [rows, 1 or num_segments]
  OptionalTensor top_p;             // float64 [rows, 1 or num_segments]
  OptionalTensor keep;              // bool [batch, tokens], or the shape of scores
  OptionalTensor drop;
  OptionalTensor candidates;
  bool keep_others = false;
  OptionalTensor segments;  // int32, shaped like a mask
  int64_t num_segments = 1;
  OptionalTensor cu_seqlens;  // int32 [samples + 1]
  int64_t capacity = 0;
  bool align_right = false;
  bool by_score = false;
};

struct SelectResult {
  Tensor indices;   // int64 [batch, (heads,) capacity]
  Tensor counts;    // int32 [batch, (heads)]
  Tensor overflow;  // bool [batch, (heads)]
};

// Guards the arguments, allocates the result and fills all of `problem` but `scores` and its strides (which it sets for
// contiguous scores).
//   like: any tensor on the device
//   shape: of scores: [batch, tokens], [batch, heads, tokens] or, with cu_seqlens, [tokens]
SelectResult prepare_select(const Tensor& like, const std::vector<int64_t>& shape, const SelectArguments& arguments,
                            SelectProblem& problem);

// Rows [begin, end) of a prepared problem with scores of this dtype, on the calling thread.
void run_select(const SelectProblem& problem, ScalarType dtype, int64_t begin, int64_t end);

// All rows, in parallel. scores: any float dtype of kernels, contiguous in its last dimension.
SelectResult select(const Tensor& scores, const SelectArguments& arguments);

}  // namespace pyvtk::cpu
