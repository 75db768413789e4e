// select for bindings of CPU operators: the way from tensors to the kernel. Implemented in select.cpp.
//
// A binding that has scores in a tensor calls select(). One that makes scores row by row calls prepare_select() once,
// sets problem.scores and its strides, and run_select() for the rows that are ready, from any thread.
#pragma once
#include "common/select_binding.h"

namespace pyvtk::cpu {

// make_select_problem() of common/select_binding.h, and guards the values of cu_seqlens.
SelectResult prepare_select(const Tensor& like, const std::vector<int64_t>& shape, const SelectArguments& arguments,
                            SelectProblem& problem);

// Rows [begin, end) of a prepared problem with scores of this dtype, on the calling thread.
void run_select(const SelectProblem& problem, ScalarType dtype, int64_t begin, int64_t end);

// All rows, in parallel. scores: any float dtype of kernels, contiguous in its last dimension.
SelectResult select(const Tensor& scores, const SelectArguments& arguments);

}  // namespace pyvtk::cpu
