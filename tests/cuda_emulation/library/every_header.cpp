// All kernels in one more translation unit: a kernel that belongs to none, neither a template nor static, would be
// defined twice in this library.
#include "cuda/compact.cuh"
#include "cuda/merge.cuh"
#include "cuda/probe.cuh"
#include "cuda/score_and_select.cuh"
#include "cuda/select_long.cuh"
#include "cuda/selection.cuh"
#include "cuda/sparse24.cuh"
#include "cuda/sparse24_wgmma.cuh"
