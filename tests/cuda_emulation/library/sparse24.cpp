#include "cuda/sparse24.cuh"

#include <cstdlib>
#include <cstring>
#include <memory>

#include "cuda/sparse24_wgmma.cuh"
#include "library.h"

using namespace pyvtk;

namespace {

// malloc'ed memory of exactly its size, full of NaN
template <class T>
auto scratch(int64_t bytes) {
  std::unique_ptr<T, decltype(&std::free)> memory(static_cast<T*>(std::malloc(static_cast<size_t>(bytes))), &std::free);
  std::memset(memory.get(), 0xff, static_cast<size_t>(bytes));
  return memory;
}

template <class X, class V>
cudaError_t linear(const cuda::Sparse24Problem& problem, bool few, bool wgmma, int multiprocessors, int* taken,
                   bool x_follows = false) {
  taken[3] = -1;
  if constexpr (std::is_same_v<X, V>) {
    if (wgmma) {
      const cuda::Sparse24WgmmaPlan plan = cuda::plan_sparse24_wgmma<X>(problem, multiprocessors);
      if (plan.fits) {
        taken[0] = false;
        taken[1] = 0;
        taken[2] = plan.splits;
        taken[3] = plan.tile;
        const auto workspace = scratch<void>(plan.workspace_bytes(problem));
        return cuda::sparse24_linear_wgmma<X>(problem, plan, workspace.get(), nullptr);
      }
    }
  }
  const cuda::Sparse24Plan plan = cuda::plan_sparse24<X, V>(problem, few, multiprocessors);
  taken[0] = plan.few;
  taken[1] = plan.row_tile;
  taken[2] = plan.splits;
  const auto workspace = scratch<void>(plan.workspace_bytes(problem));
  return cuda::sparse24_linear<X, V>(problem, plan, workspace.get(), nullptr, x_follows);
}

}  // namespace

// Types: 0 float32, 1 bfloat16, 2 float16. int8_values: instead of x's type. int8_x: x is rounded to int8 first (then
// it may be float32). x_scale: [1]. few: whether the kernel for few rows is asked for; -1: as the number of rows says.
// wgmma: where it fits. taken: [few, row_tile, splits] of the plan, and the tile of wgmma or -1.
EXPORT int emulated_sparse24_linear(int type, int int8_values, int int8_x, int64_t rows, int64_t features,
                                    int64_t depth, const void* x, int64_t x_stride, const void* values,
                                    const uint8_t* metadata, const float* scales, const float* x_scale,
                                    const void* bias, int bias_type, const void* mul, int64_t mul_stride,
                                    int activation, void* out, int few, int wgmma, int multiprocessors, int* taken) {
  const bool wants_few = few < 0 ? rows < cuda::kFewRowsBelow : few != 0;
  cuda::Sparse24Problem problem;
  problem.rows = rows;
  problem.features = features;
  problem.depth = depth;
  problem.x = x;
  problem.x_stride = x_stride;
  problem.values = values;
  problem.metadata = metadata;
  problem.epilogue.scales = scales;
  problem.epilogue.bias = bias;
  problem.epilogue.bias_type = static_cast<cuda::Sparse24Number>(bias_type);
  problem.epilogue.activation = static_cast<cuda::Sparse24Activation>(activation);
  problem.epilogue.mul = mul;
  problem.epilogue.mul_stride = mul_stride;
  problem.epilogue.out = out;
  problem.epilogue.out_type = static_cast<cuda::Sparse24Number>(type);
  if (int8_x) {
    const int64_t stride = (depth + 15) / 16 * 16;
    const auto q = scratch<int8_t>(rows * stride);
    const auto x_scales = scratch<float>(4 * rows);
    const auto quantize = [&](auto zero) {
      return cuda::quantize(static_cast<const decltype(zero)*>(x), rows, x_stride, depth, x_scale, q.get(), stride,
                            x_scales.get(), nullptr);
    };
    cudaError_t status = type == 0 ? quantize(float{}) : type == 1 ? quantize(bfloat16{}) : quantize(float16{});
    problem.x = q.get();
    problem.x_stride = stride;
    problem.epilogue.x_scales = x_scales.get();
    if (status == cudaSuccess)
      status = linear<int8_t, int8_t>(problem, wants_few, wgmma != 0, multiprocessors, taken, true);
    return report(status);
  }
  if (int8_values) {
    return report(type == 1 ? linear<bfloat16, int8_t>(problem, wants_few, wgmma != 0, multiprocessors, taken)
                            : linear<float16, int8_t>(problem, wants_few, wgmma != 0, multiprocessors, taken));
  }
  return report(type == 1 ? linear<bfloat16, bfloat16>(problem, wants_few, wgmma != 0, multiprocessors, taken)
                          : linear<float16, float16>(problem, wants_few, wgmma != 0, multiprocessors, taken));
}

// size: bytes of an element, 1, 2 or 4
EXPORT int emulated_sparse24_compress(int size, const void* weight, int64_t weight_stride, const bool* mask,
                                      int64_t mask_stride, int64_t features, int64_t depth, void* values,
                                      uint8_t* metadata, int* wrong) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return cuda::compress(static_cast<const T*>(weight), weight_stride, mask, mask_stride, features, depth,
                          static_cast<T*>(values), metadata, wrong, nullptr);
  };
  return report(size == 1 ? run(uint8_t{}) : size == 2 ? run(uint16_t{}) : run(uint32_t{}));
}

EXPORT int emulated_sparse24_decompress(int size, const void* values, const uint8_t* metadata, const float* scales,
                                        int64_t features, int64_t depth, void* dense) {
  if (scales != nullptr) {
    return report(cuda::decompress(static_cast<const int8_t*>(values), metadata, scales, features, depth,
                                   static_cast<float*>(dense), nullptr));
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    return cuda::decompress(static_cast<const T*>(values), metadata, nullptr, features, depth, static_cast<T*>(dense),
                            nullptr);
  };
  return report(size == 1 ? run(uint8_t{}) : size == 2 ? run(uint16_t{}) : run(uint32_t{}));
}
