// The kernels of sparse24 on exact memory, against a plain loop in double; small shapes, so that ThreadSanitizer has
// time.
#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/sparse24_wgmma.cuh"

using namespace pyvtk;
using namespace pyvtk::cuda;

namespace {

template <class T>
using Memory = std::unique_ptr<T, decltype(&std::free)>;

template <class T>
Memory<T> memory(int64_t count) {  // exactly so much
  return {static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T))), &std::free};
}

template <class T>
T number(int value) {
  if constexpr (std::is_same_v<T, int8_t>) return static_cast<int8_t>(value);
  if constexpr (!std::is_same_v<T, int8_t>) return from_float<T>(static_cast<float>(value));
}

// Who multiplies: plans are asked what the product fits, and multiply.
template <class X, class V>
struct ByMma {
  bool wants_few;
  int multiprocessors;
  bool expect_few;
  bool expect_splits;
  cudaError_t operator()(const Sparse24Problem& problem) const {
    const Sparse24Plan plan = plan_sparse24<X, V>(problem, wants_few, multiprocessors);
    CHECK(plan.few == expect_few && (plan.splits > 1) == expect_splits, problem.rows, plan.few, plan.splits);
    const auto workspace = memory<char>(plan.workspace_bytes(problem));
    return sparse24_linear<X, V>(problem, plan, workspace.get(), nullptr);
  }
};
template <class X>
struct ByWgmma {
  int tile;
  int splits;
  cudaError_t operator()(const Sparse24Problem& problem) const {
    Sparse24WgmmaPlan plan = plan_sparse24_wgmma<X>(problem, 1);
    CHECK(plan.fits && plan.splits == 1, problem.rows, plan.splits);
    plan.tile = tile;
    plan.splits = splits;
    plan.split_depth = plan.split_depth / splits;
    const auto workspace = memory<char>(plan.workspace_bytes(problem));
    return sparse24_linear_wgmma<X>(problem, plan, workspace.get(), nullptr);
  }
};

// Whole numbers small enough for every sum to be exact: what comes out has to be equal.
template <class X, class V, class F>
void linear(int64_t rows, int64_t features, int64_t depth, std::mt19937& random, F multiply) {
  const auto x = memory<X>(rows * depth);
  const auto values = memory<V>(features * depth / 2);
  const auto metadata = memory<uint8_t>(features * ceil_div<int64_t>(depth, 8));
  const auto bias = memory<float>(features);
  const auto out = memory<float>(rows * features);
  std::vector<int> left(static_cast<size_t>(rows * depth)), right(static_cast<size_t>(features * depth), 0);
  const auto small = [&] { return static_cast<int>(random() % 7) - 3; };
  for (int64_t i = 0; i < rows * depth; ++i) x.get()[i] = number<X>(left[static_cast<size_t>(i)] = small());
  for (int64_t feature = 0; feature < features; ++feature) {
    bias.get()[feature] = static_cast<float>(feature);
    for (int64_t byte = 0; byte < ceil_div<int64_t>(depth, 8); ++byte) {
      unsigned code = 0x44;
      for (int64_t group = 2 * byte; group < 2 * byte + 2 && group < depth / 4; ++group) {
        const unsigned first = random() % 3, second = first + 1 + random() % (3 - first);
        code &= ~(15u << (group % 2 * 4));
        code |= (first | second << 2) << (group % 2 * 4);
        for (unsigned i = 0; i < 2; ++i) {
          const int value = small();
          values.get()[feature * depth / 2 + 2 * group + i] = number<V>(value);
          right[static_cast<size_t>(feature * depth + 4 * group + (i ? second : first))] = value;
        }
      }
      metadata.get()[feature * ceil_div<int64_t>(depth, 8) + byte] = static_cast<uint8_t>(code);
    }
  }
  Sparse24Problem problem;
  problem.rows = rows;
  problem.features = features;
  problem.depth = depth;
  problem.x = x.get();
  problem.x_stride = depth;
  problem.values = values.get();
  problem.metadata = metadata.get();
  problem.epilogue.bias = bias.get();
  problem.epilogue.activation = Sparse24Activation::relu;
  problem.epilogue.out = out.get();
  const cudaError_t status = multiply(problem);
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t feature = 0; feature < features; ++feature) {
      double expected = static_cast<double>(feature);
      for (int64_t k = 0; k < depth; ++k) {
        expected += left[static_cast<size_t>(row * depth + k)] * right[static_cast<size_t>(feature * depth + k)];
      }
      const float actual = out.get()[row * features + feature];
      CHECK(actual == std::fmax(expected, 0.0), row, feature, actual, expected);
    }
  }
}

template <class X, class V>
void by_mma(int64_t rows, int64_t features, int64_t depth, bool few, int multiprocessors, bool expect_few,
            bool expect_splits, std::mt19937& random) {
  linear<X, V>(rows, features, depth, random, ByMma<X, V>{few, multiprocessors, expect_few, expect_splits});
}
template <class X>
void by_wgmma(int64_t rows, int64_t features, int64_t depth, int tile, int splits, std::mt19937& random) {
  linear<X, X>(rows, features, depth, random, ByWgmma<X>{tile, splits});
}

void rounded_to_int8() {
  constexpr int64_t kRows = 3, kDepth = 20, kStride = 32;
  const auto x = memory<float>(kRows * kDepth);
  const auto q = memory<int8_t>(kRows * kStride);
  const auto scales = memory<float>(kRows);
  for (int64_t i = 0; i < kRows * kDepth; ++i) x.get()[i] = static_cast<float>(i / kDepth * (i % 5 - 2));
  const cudaError_t status =
      quantize<float>(x.get(), kRows, kDepth, kDepth, nullptr, q.get(), kStride, scales.get(), nullptr);
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
  for (int64_t row = 0; row < kRows; ++row) {
    const float scale = row == 0 ? 1.0f : 2.0f * static_cast<float>(row) / 127.0f;
    CHECK(scales.get()[row] == scale, row, scales.get()[row]);
    for (int64_t k = 0; k < kStride; ++k) {
      const float expected = k < kDepth ? std::nearbyint(x.get()[row * kDepth + k] / scale) : 0.0f;
      CHECK(q.get()[row * kStride + k] == static_cast<int>(expected), row, k, int{q.get()[row * kStride + k]});
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  cuda_emulation::options().declared_bytes = 0;  // kernels by wgmma take all that there is
  for (uint64_t seed = 0; seed < 2; ++seed) {
    cuda_emulation::options().seed = seed;
    cuda_emulation::options().blocks_alive = seed == 0 ? 1 : 2;
    by_mma<bfloat16, bfloat16>(3, 40, 192, true, 1, true, false, random);
    by_mma<bfloat16, bfloat16>(16, 20, 8192, true, 3, true, true, random);
    by_mma<float16, int8_t>(9, 20, 2304, true, 1, true, false, random);
    by_mma<int8_t, int8_t>(17, 70, 1024, true, 1, true, false, random);
    by_mma<bfloat16, bfloat16>(5, 130, 320, false, 1, false, false, random);
    by_mma<float16, int8_t>(5, 12, 204, false, 1, false, false, random);
    by_mma<int8_t, int8_t>(5, 12, 500, false, 1, false, false, random);
    by_mma<float16, float16>(33, 12, 1028, false, 9, false, true, random);
    by_mma<bfloat16, bfloat16>(70, 9, 260, false, 1, false, false, random);
    by_wgmma<bfloat16>(70, 9, 640, 0, 1, random);
    by_wgmma<float16>(3, 130, 256, 2, 2, random);
    by_wgmma<int8_t>(3, 260, 384, 3, 1, random);
    rounded_to_int8();
  }
  return report();
}
