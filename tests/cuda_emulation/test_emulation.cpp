// What the emulation gives kernels is what the CUDA manual says: places, barriers, warps, atomics, copies, launches.
#include <bit>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/ptx.cuh"

using namespace pyvtk::cuda;

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, Arguments... arguments) {
  const cudaError_t status = launch(kernel, grid, block, 0, nullptr, arguments...);
  CHECK(status == cudaSuccess, cudaGetErrorString(status));
}

__global__ void places_kernel(int* out) {  // [gridDim.z, gridDim.y, gridDim.x, blockDim.z, blockDim.y, blockDim.x]
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  ++out[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void places() {
  std::vector<int> out(2 * 3 * 2 * 4 * 2 * 3, 0);
  run(places_kernel, dim3(2, 3, 2), dim3(4, 2, 3), out.data());
  for (size_t i = 0; i < out.size(); ++i) CHECK(out[i] == 1, i, out[i]);
}

__global__ void warps_kernel() {
  const int lane = static_cast<int>(threadIdx.x % 32);
  CHECK(__shfl_sync(kAll, lane, 5) == 5, lane);
  CHECK(__shfl_sync(kAll, lane, lane + 1) == (lane + 1) % 32, lane);
  CHECK(__shfl_sync(kAll, lane, 3, 8) == lane / 8 * 8 + 3, lane);
  CHECK(__shfl_up_sync(kAll, lane, 1) == (lane == 0 ? 0 : lane - 1), lane);
  CHECK(__shfl_up_sync(kAll, lane, 2, 16) == (lane % 16 < 2 ? lane : lane - 2), lane);
  CHECK(__shfl_down_sync(kAll, lane, 4) == (lane > 27 ? lane : lane + 4), lane);
  CHECK(__shfl_down_sync(kAll, lane, 4, 8) == (lane % 8 > 3 ? lane : lane + 4), lane);
  CHECK(__shfl_xor_sync(kAll, 1.5 * lane, 6) == 1.5 * (lane ^ 6), lane);
  CHECK(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u, lane);
  CHECK(__any_sync(kAll, lane == 9) && !__any_sync(kAll, lane == 32), lane);
  CHECK(__all_sync(kAll, lane < 32) && !__all_sync(kAll, lane != 9), lane);
  CHECK(__match_any_sync(kAll, lane % 2) == (lane % 2 ? 0xaaaaaaaau : 0x55555555u), lane);
  CHECK(__reduce_add_sync(kAll, lane) == 31 * 16, lane);
  CHECK(__reduce_min_sync(kAll, lane - 40) == -40, lane);
  CHECK(__reduce_max_sync(kAll, static_cast<unsigned>(lane)) == 31u, lane);
  CHECK(__reduce_or_sync(kAll, 1u << lane) == kAll && __reduce_xor_sync(kAll, 1u << lane % 2) == 0, lane);
  // halves of a warp on their own ways
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  for (int i = 0; i < (lane < 16 ? 3 : 5); ++i) {
    CHECK(__reduce_add_sync(half, i) == 16 * i, lane);
    __syncwarp(half);
  }
  __syncwarp();
}

__global__ void barriers_kernel(int* out) {  // [blockDim.x]
  PYVTK_SHARED(numbers, int[96]);
  const int me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  CHECK(std::bit_cast<float>(numbers[me]) != std::bit_cast<float>(numbers[me]), "shared memory begins as NaN");
  __syncthreads();
  for (int round = 0; round < 5; ++round) {
    numbers[me] = me + round;
    __syncthreads();
    out[me] = numbers[(me + 37) % threads] - round;
    __syncthreads();
  }
  CHECK(__syncthreads_count(me % 3 == 0) == 32, me);
  CHECK(__syncthreads_or(me == 95) && !__syncthreads_or(0), me);
  CHECK(__syncthreads_and(1) && !__syncthreads_and(me != 3), me);
  // the last two warps have a barrier of their own
  if (me >= 32) {
    numbers[me] = me;
    named_barrier(1, 64);
    CHECK(numbers[me == 95 ? 32 : me + 1] == (me == 95 ? 32 : me + 1), me);
  }
}

void barriers() {
  std::vector<int> out(96);
  run(barriers_kernel, 1, 96, out.data());
  for (int i = 0; i < 96; ++i) CHECK(out[static_cast<size_t>(i)] == (i + 37) % 96, i);
}

__global__ void counters_kernel(unsigned* sums,  // [4]
                                float* real) {
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&sums[0], me);
  atomicMax(&sums[1], me);
  atomicInc(&sums[2], 9u);
  unsigned before = atomicAdd(&sums[3], 0u);
  while (true) {
    const unsigned seen = atomicCAS(&sums[3], before, before + 2);
    if (seen == before) break;
    before = seen;
  }
  atomicAdd(real, 0.5f);
}

void counters() {
  std::vector<unsigned> sums(4, 0);
  float real = 0;
  run(counters_kernel, 3, 64, sums.data(), &real);
  CHECK(sums[0] == 191 * 192 / 2 && sums[1] == 191 && sums[2] == 192 % 10 && sums[3] == 384 && real == 96.0f, sums[3]);
}

// Blocks leave sums, and the last to arrive adds them: the order in which they arrive is to vary.
__global__ void last_block_kernel(int* partial,  // [gridDim.x]
                                  int* total, unsigned* arrived, int* last) {
  PYVTK_SHARED(is_last, bool);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
    __threadfence();
    is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) {
    *last = static_cast<int>(blockIdx.x);
    *total = std::accumulate(partial, partial + gridDim.x, 0);
  }
}

void last_block() {
  std::set<int> lasts;
  for (uint64_t seed = 0; seed < 12; ++seed) {
    cuda_emulation::options().seed = seed;
    cuda_emulation::options().blocks_alive = 1 + static_cast<int>(seed % 4);
    std::vector<int> partial(6);
    int total = 0, last = -1;
    unsigned arrived = 0;
    run(last_block_kernel, 6, 32, partial.data(), &total, &arrived, &last);
    CHECK(total == 21, seed, total);
    lasts.insert(last);
  }
  CHECK(lasts.size() > 3, lasts.size());
  cuda_emulation::options() = {};
}

// A pipeline of two stages, with a tail that is not copied.
__global__ void copies_kernel(const int* input,  // [count]
                              int count, int* out) {
  PYVTK_SHARED(tiles, int4[2][32]);
  const int me = static_cast<int>(threadIdx.x), tiles_in_all = (count + 127) / 128;
  const auto fetch = [&](int tile) {
    const int at = tile * 128 + me * 4;
    copy_async<16>(&tiles[tile % 2][me], input + at, at < count);
    copy_async_commit();
  };
  fetch(0);
  int sum = 0;
  for (int tile = 0; tile < tiles_in_all; ++tile) {
    if (tile + 1 < tiles_in_all) {
      fetch(tile + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    const int4 four = tiles[tile % 2][(me + 1) % 32];
    sum += four.x + four.y + four.z + four.w;
    __syncthreads();
  }
  sum = __reduce_add_sync(kAll, sum);
  if (me == 0) *out = sum;
}

void copies() {
  std::vector<int> input(300);
  std::iota(input.begin(), input.end(), 0);
  int sum = 0;
  run(copies_kernel, 1, 32, input.data(), 300, &sum);
  CHECK(sum == 299 * 300 / 2, sum);
}

__global__ void dynamic_kernel(int count) { dynamic_shared<char>()[count - 1] = 1; }
__global__ void large_kernel() {
  PYVTK_SHARED(large, char[49153]);
  large[0] = 1;
}
__global__ void nothing_kernel() {}

__global__ void both_kernel(int count) {
  PYVTK_SHARED(declared, char[16 * 1024]);
  dynamic_shared<char>()[count - 1] = declared[0] = 1;
}

cudaError_t with_dynamic(void (*kernel)(int), int bytes) {
  const cudaLaunchConfig_t config{1, 1, static_cast<size_t>(bytes), nullptr, nullptr, 0};
  return cudaLaunchKernelEx(&config, kernel, bytes);
}

void limits() {
  CHECK(launch(nothing_kernel, 1, 1025, 0, nullptr) == cudaErrorInvalidConfiguration, "too many threads");
  CHECK(launch(nothing_kernel, 0, 32, 0, nullptr) == cudaErrorInvalidConfiguration, "no block");
  const auto allow = [](void (*kernel)(int), int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  CHECK(with_dynamic(dynamic_kernel, 48 * 1024) == cudaSuccess, "48 KiB need no permission");
  CHECK(with_dynamic(dynamic_kernel, 60000) == cudaErrorInvalidValue, "more than that does");
  CHECK(allow(dynamic_kernel, 1 << 20) == cudaErrorInvalidValue, "more than there is");
  CHECK(allow(dynamic_kernel, 60000) == cudaSuccess, "");
  CHECK(with_dynamic(dynamic_kernel, 60000) == cudaSuccess, "as allowed");
  cuda_emulation::options().shared_bytes -= 1024;
  CHECK(with_dynamic(dynamic_kernel, 60000) == cudaErrorInvalidValue, "not on this device");
  cuda_emulation::options().shared_bytes += 1024;
  CHECK(allow(dynamic_kernel, 1000) == cudaSuccess, "");
  CHECK(with_dynamic(dynamic_kernel, 1001) == cudaErrorInvalidValue, "permission can be less, too");
  std::fprintf(stderr, "An error about shared memory is to follow.\n");
  CHECK(with_dynamic(both_kernel, 40 * 1024) == cudaErrorLaunchFailure, "48 KiB are those of both kinds");
  CHECK(allow(both_kernel, 40 * 1024) == cudaSuccess, "");
  CHECK(with_dynamic(both_kernel, 40 * 1024) == cudaSuccess, "with permission");
  std::fprintf(stderr, "An error about shared memory is to follow.\n");
  CHECK(launch(large_kernel, 1, 1, 0, nullptr) == cudaErrorLaunchFailure, "declared memory ends at 48 KiB");
  run(nothing_kernel, 2, 32);  // and the next launch is none the worse
}

// An error stays this thread's last one until somebody asks for it.
void last_error() {
  cudaGetLastError();
  CHECK(with_dynamic(dynamic_kernel, 1 << 20) == cudaErrorInvalidValue, "");
  run(nothing_kernel, 1, 32);
  cudaError_t elsewhere = cudaErrorNotSupported;
  std::thread([&] { elsewhere = cudaGetLastError(); }).join();
  CHECK(elsewhere == cudaSuccess, "another thread's");
  CHECK(cudaPeekAtLastError() == cudaErrorInvalidValue, "");
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess, "");
}

// Kernels of several host threads run one after another.
// Units in the last place between two numbers of one sign.
int64_t units_between(float a, float b) {
  return std::abs(int64_t{std::bit_cast<int32_t>(a)} - int64_t{std::bit_cast<int32_t>(b)});
}

// As far off as they may be, up or down, and the same each time.
void functions() {
  int up = 0, all = 0;
  for (float x = 0.01f; x < 8.0f; x *= 1.01f, ++all) {
    const float found = pyvtk::cuda::expf(-x), exact = static_cast<float>(std::exp(-double{x}));
    CHECK(units_between(found, exact) == 2 && found == pyvtk::cuda::expf(-x), x, found, exact);
    CHECK(units_between(pyvtk::cuda::exp2f(x), static_cast<float>(std::exp2(double{x}))) == 2, x);
    CHECK(units_between(pyvtk::cuda::logf(x), static_cast<float>(std::log(double{x}))) == 1, x);
    const float erf = static_cast<float>(std::erf(double{x}));
    CHECK(units_between(pyvtk::cuda::erff(x), erf) == (erf == 1.0f ? 0 : 2), x);
    CHECK(units_between(pyvtk::cuda::tanhf(x), static_cast<float>(std::tanh(double{x}))) == 2, x);
    up += found > exact;
  }
  CHECK(up > all / 3 && up < all - all / 3, up, all);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float one = pyvtk::cuda::expf(0.0f), zero = pyvtk::cuda::expf(-kInfinity),
              infinite = pyvtk::cuda::expf(kInfinity);
  CHECK(one == 1.0f && zero == 0.0f && infinite == kInfinity && pyvtk::cuda::logf(1.0f) == 0.0f, one, zero, infinite);
  CHECK(pyvtk::cuda::exp2f(-7.0f) == 0.0078125f && pyvtk::cuda::exp2f(-kInfinity) == 0.0f, "exp2f");
  CHECK(std::isnan(pyvtk::cuda::expf(kInfinity - kInfinity)), "NaN");
}

void host_threads() {
  std::vector<std::vector<int>> out(3, std::vector<int>(96));
  std::vector<std::thread> threads;
  for (auto& mine : out) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) run(barriers_kernel, 1, 96, mine.data());
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& mine : out) CHECK(mine[5] == 42 && mine[95] == 36, mine[5], mine[95]);
}

}  // namespace

int main() {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    cuda_emulation::options().seed = seed;
    cuda_emulation::options().blocks_alive = seed < 2 ? 1 : 2;
    places();
    run(warps_kernel, 2, 64);
    barriers();
    counters();
    copies();
  }
  last_block();
  limits();
  last_error();
  functions();
  host_threads();
  return report();
}
