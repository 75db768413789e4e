// Programs with one mistake each, and their correct twins: `planted NAME` has to be found, `planted NAME correct` has
// to pass. test_planted.py runs them.
#include <cstdio>
#include <cstring>
#include <latch>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cuda/ptx.cuh"

using namespace pyvtk::cuda;

namespace {

constexpr int kThreads = 64;

// Every thread takes its neighbour's number out of shared memory.
template <bool kCorrect>
__global__ void race_kernel(int* out) {  // [kThreads]
  PYVTK_SHARED(numbers, int[kThreads]);
  const unsigned me = threadIdx.x;
  numbers[me] = static_cast<int>(me);
  if (kCorrect) __syncthreads();
  out[me] = numbers[(me + 1) % kThreads];
}

// The same inside of a warp, where a shuffle is no barrier.
template <bool kCorrect>
__global__ void race_in_warp_kernel(int* out) {  // [kThreads]
  PYVTK_SHARED(numbers, int[kThreads]);
  const unsigned me = threadIdx.x;
  numbers[me] = static_cast<int>(me);
  const int ignored = __shfl_xor_sync(0xffffffffu, 0, 1);
  if (kCorrect) __syncwarp();
  out[me] = ignored + numbers[me ^ 1];
}

// A second round of writing that may begin before all have read.
template <bool kCorrect>
__global__ void race_in_loop_kernel(int* out) {  // [kThreads]
  PYVTK_SHARED(numbers, int[kThreads]);
  const unsigned me = threadIdx.x;
  out[me] = 0;
  for (int round = 0; round < 3; ++round) {
    numbers[me] = round;
    __syncthreads();
    out[me] += numbers[(me + 1) % kThreads];
    if (kCorrect) __syncthreads();
  }
}

// Two blocks write one element.
template <bool kCorrect>
__global__ void race_of_blocks_kernel(int* out) {  // [blocks * kThreads]
  if (kCorrect) {
    out[blockIdx.x * kThreads + threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 1;
  }
}

// The last block to arrive adds up what all have written.
template <bool kCorrect>
__global__ void race_of_last_block_kernel(int* out,  // [blocks + 1]
                                          unsigned* arrived) {
  PYVTK_SHARED(is_last, bool);
  if (threadIdx.x == 0) {
    out[1 + blockIdx.x] = static_cast<int>(blockIdx.x);
    if (kCorrect) __threadfence();
    is_last = atomicAdd(arrived, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  __syncthreads();
  if (!is_last || threadIdx.x > 0) return;
  int sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += out[1 + block];
  out[0] = sum;
}

template <bool kCorrect>
__global__ void global_write_kernel(int* out) {  // [kThreads]
  out[threadIdx.x + (kCorrect ? 0 : 1)] = 0;
}

template <bool kCorrect>
__global__ void shared_write_kernel(int* out) {  // [kThreads]
  PYVTK_SHARED(numbers, int[kThreads]);
  PYVTK_SHARED(after, int[kThreads]);
  after[threadIdx.x] = 0;
  int* past_the_end = numbers;
  past_the_end[threadIdx.x + (kCorrect ? 0 : 1)] = 1;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x] | after[threadIdx.x];
}

template <bool kCorrect>
__global__ void dynamic_shared_write_kernel(int* out) {  // [kThreads]
  int* numbers = dynamic_shared<int>();                  // [kThreads]
  numbers[threadIdx.x + (kCorrect ? 0 : 1)] = 1;
  out[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void copy_kernel(int* out,            // [4 * kThreads]
                            const int* input) {  // [4 * kThreads]
  PYVTK_SHARED(tile, int4[kThreads]);
  const unsigned me = threadIdx.x;
  copy_async<16>(&tile[me], input + 4 * me);
  copy_async_commit();
  if (kCorrect) copy_async_wait<0>();
  const int4 mine = tile[me];
  out[4 * me] = mine.x | mine.y | mine.z | mine.w;
}

// One group too few is waited for.
template <bool kCorrect>
__global__ void copy_stages_kernel(int* out,            // [4 * kThreads]
                                   const int* input) {  // [4 * kThreads]
  PYVTK_SHARED(tile, int[2][kThreads]);
  const unsigned me = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    copy_async<4>(&tile[stage][me], input + me);
    copy_async_commit();
  }
  copy_async_wait<kCorrect ? 0 : 1>();
  out[me] = tile[0][me] | tile[1][me];
}

// The copy is waited for by the thread that reads, not by the one that asked for it.
template <bool kCorrect>
__global__ void copy_of_another_kernel(int* out,            // [4 * kThreads]
                                       const int* input) {  // [4 * kThreads]
  PYVTK_SHARED(tile, int4[kThreads]);
  const unsigned me = threadIdx.x;
  copy_async<16>(&tile[me], input + 4 * me);
  copy_async_commit();
  copy_async_wait<0>();
  if (kCorrect) __syncthreads();
  out[4 * me] = tile[(me + 1) % kThreads].x;
}

template <bool kCorrect>
__global__ void deadlock_kernel(int* out) {  // [kThreads]
  if (kCorrect || threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void two_barriers_kernel(int* out) {  // [kThreads]
  if (kCorrect) {
    __syncthreads();
  } else if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 0;
}

template <bool kCorrect>
__global__ void absent_lane_kernel(int* out) {  // [kThreads]
  if (kCorrect || threadIdx.x % 32 != 7) out[threadIdx.x] = __shfl_sync(0xffffffffu, 0, 0);
}

template <bool kCorrect>
__global__ void wrong_mask_kernel(int* out) {  // [kThreads]
  out[threadIdx.x] = __shfl_sync(kCorrect ? 0xffffffffu : 0x0000ffffu, 0, 0);
}

template <bool kCorrect>
__global__ void misaligned_kernel(int* out,            // [4 * kThreads]
                                  const int* input) {  // [4 * kThreads]
  const int4 four = *reinterpret_cast<const int4*>(input + (kCorrect ? 0 : 1));
  out[threadIdx.x] = four.x;
}

template <bool kCorrect>
__global__ void misaligned_ldg_kernel(int* out,            // [4 * kThreads]
                                      const int* input) {  // [4 * kThreads]
  out[threadIdx.x] = __ldg(reinterpret_cast<const int2*>(input + (kCorrect ? 0 : 1))).x;
}

template <bool kCorrect>
__global__ void ldmatrix_kernel(int* out,            // [4 * kThreads]
                                const int* input) {  // [4 * kThreads]
  PYVTK_SHARED(rows, int[kThreads * 4 + 4]);
  const unsigned me = threadIdx.x;
  for (int i = 0; i < 4; ++i) rows[4 * me + i] = input[4 * me + i];
  __syncwarp();
  uint32_t mine[4];
  ldmatrix(mine, rows + 4 * me + (kCorrect ? 0 : 2));
  out[me] = static_cast<int>(mine[0]);
}

// The rows of a matrix come from all lanes of the warp.
template <bool kCorrect>
__global__ void race_of_ldmatrix_kernel(int* out,            // [4 * kThreads]
                                        const int* input) {  // [4 * kThreads]
  PYVTK_SHARED(rows, int4[kThreads]);
  const unsigned me = threadIdx.x;
  rows[me] = reinterpret_cast<const int4*>(input)[me];
  if (kCorrect) __syncwarp();
  uint32_t mine[4];
  ldmatrix(mine, rows + me);
  out[me] = static_cast<int>(mine[0]);
}

template <bool kCorrect>
__global__ void absent_from_mma_kernel(int* out) {  // [kThreads]
  int sums[4] = {0, 0, 0, 0};
  if (kCorrect || threadIdx.x % 32 < 16) mma_sp_m16n8k64(sums, {0, 0, 0, 0}, {0, 0, 0, 0}, 0x44444444u);
  out[threadIdx.x] = sums[0];
}

// Zeros are no metadata: both positions of a pair would be 0.
template <bool kCorrect>
__global__ void zero_metadata_kernel(int* out) {  // [kThreads]
  float sums[4] = {0, 0, 0, 0};
  mma_sp_m16n8k32<pyvtk::bfloat16, 0>(sums, {0, 0, 0, 0}, {0, 0, 0, 0}, kCorrect ? 0x44444444u : 0);
  out[threadIdx.x] = static_cast<int>(sums[0]);
}

// A wgmma: kMistake 0 leaves out the fence behind the copies, 1 the one before the registers, 2 has a matrix that ends
// outside of shared memory, 3 writes over a matrix while it is read, 4 over the metadata.
constexpr int kWgmmaBytes = 1024 + 64 * 128 + 64 * 64;
template <int kMistake>
__global__ void wgmma_kernel(int* out,            // [4 * kThreads]
                             const int* input) {  // [4 * kThreads]
  unsigned char* shared = dynamic_shared<unsigned char>();
  shared += -shared_address(shared) % 1024;
  for (unsigned i = threadIdx.x * 16; i < 64 * 128 + 64 * 64; i += kThreads * 16) {
    copy_async<16>(shared + i, input + threadIdx.x * 4);
  }
  copy_async_commit();
  copy_async_wait<0>();
  if (kMistake != 0) wgmma_fence_writes();
  __syncthreads();
  int sums[32] = {};
  const uint64_t a = wgmma_matrix<64>(shared + 64 * 128), b = wgmma_matrix<128>(shared + (kMistake == 2 ? 8192 : 0));
  if (kMistake != 1) wgmma_begin();
  uint32_t metadata = 0x44444444u;
  wgmma_sp<int8_t, 0, 64>(sums, a, b, metadata);
  wgmma_commit();
  if (kMistake == 4) replace_word(metadata, 0xeeeeeeeeu, 1);
  if (kMistake == 3) copy_async<16>(shared + threadIdx.x * 16, input + threadIdx.x * 4);
  wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = sums[i];
}

// Waits for a block that runs after it.
template <bool kCorrect>
__global__ void endless_wait_kernel(int* out,  // [blocks]
                                    unsigned* arrived) {
  atomicAdd(arrived, 1u);
  while (!kCorrect && atomicAdd(arrived, 0u) < kThreads * gridDim.x) __nanosleep(100);
  if (threadIdx.x == 0) out[blockIdx.x] = 0;
}

// A launch that is asked about afterwards: what is answered may be of an earlier call.
template <bool kCorrect>
cudaError_t after_an_error(int* out) {
  cudaFuncSetAttribute(race_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, -1);
  if (kCorrect) return launch(race_kernel<true>, 1, kThreads, 0, nullptr, out);
  const cudaLaunchConfig_t config{1, kThreads, 0, nullptr, nullptr, 0};
  cudaLaunchKernelEx(&config, race_kernel<true>, out);
  return cudaGetLastError();
}

// Two threads launch one kernel, each after it has asked for the shared memory that its own launch needs.
template <bool kCorrect>
cudaError_t asks_for_itself(int* out) {
  constexpr int kMore = 100'000, kLess = 60'000;
  const auto ask = [](int bytes) {
    if (kCorrect) return cudaSuccess;  // launch() does
    return cudaFuncSetAttribute(dynamic_shared_write_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  const auto start = [&](int bytes) {
    if (kCorrect) return launch(dynamic_shared_write_kernel<true>, 1, kThreads, bytes, nullptr, out);
    const cudaLaunchConfig_t config{1, kThreads, static_cast<size_t>(bytes), nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, dynamic_shared_write_kernel<true>, out);
  };
  std::latch has_asked(1), has_launched(1);
  cudaError_t status = cudaSuccess;
  std::thread other([&] {
    has_asked.wait();
    ask(kLess);
    status = start(kLess);
    has_launched.count_down();
  });
  ask(kMore);
  has_asked.count_down();
  has_launched.wait();
  const cudaError_t mine = start(kMore);
  other.join();
  return status != cudaSuccess ? status : mine;
}

// Memory of the host that is exactly as large as asked for, full of ones.
int* ones(size_t count) {
  int* memory = static_cast<int*>(std::malloc(count * sizeof(int)));
  for (size_t i = 0; i < count; ++i) memory[i] = 1;
  return memory;
}

template <bool kCorrect>
int run(const std::string& name) {
  const std::unique_ptr<int, decltype(&std::free)> out(
      ones(name.starts_with("copy") || name.starts_with("wgmma") ? 4 * kThreads : kThreads), &std::free);
  const std::unique_ptr<int, decltype(&std::free)> input(ones(4 * kThreads), &std::free);
  unsigned arrived = 0;
  cudaError_t status = cudaErrorInvalidValue;
  const auto simple = [&](auto kernel, unsigned blocks = 1, size_t bytes = 0) {
    status = launch(kernel, blocks, kThreads, bytes, nullptr, out.get());
  };
  const auto reading = [&](auto kernel) { status = launch(kernel, 1, kThreads, 0, nullptr, out.get(), input.get()); };
  const auto counting = [&](auto kernel, unsigned blocks, unsigned threads) {
    status = launch(kernel, blocks, threads, 0, nullptr, out.get(), &arrived);
  };
  if (name == "stale_error") status = after_an_error<kCorrect>(out.get());
  if (name == "lowered_limit") status = asks_for_itself<kCorrect>(out.get());
  if (name == "race") simple(race_kernel<kCorrect>);
  if (name == "race_in_warp") simple(race_in_warp_kernel<kCorrect>);
  if (name == "race_in_loop") simple(race_in_loop_kernel<kCorrect>);
  if (name == "race_of_last_block") counting(race_of_last_block_kernel<kCorrect>, 8, 32);
  if (name == "global_write") simple(global_write_kernel<kCorrect>);
  if (name == "shared_write") simple(shared_write_kernel<kCorrect>);
  if (name == "dynamic_shared_write") simple(dynamic_shared_write_kernel<kCorrect>, 1, kThreads * sizeof(int));
  if (name == "deadlock") simple(deadlock_kernel<kCorrect>);
  if (name == "two_barriers") simple(two_barriers_kernel<kCorrect>);
  if (name == "absent_lane") simple(absent_lane_kernel<kCorrect>);
  if (name == "wrong_mask") simple(wrong_mask_kernel<kCorrect>);
  if (name == "misaligned") reading(misaligned_kernel<kCorrect>);
  if (name == "ldmatrix") reading(ldmatrix_kernel<kCorrect>);
  if (name == "race_of_ldmatrix") reading(race_of_ldmatrix_kernel<kCorrect>);
  if (name == "absent_from_mma") simple(absent_from_mma_kernel<kCorrect>);
  if (name == "zero_metadata") simple(zero_metadata_kernel<kCorrect>);
  if (name == "misaligned_ldg") reading(misaligned_ldg_kernel<kCorrect>);
  if (name == "endless_wait") counting(endless_wait_kernel<kCorrect>, 2, kThreads);
  if (name == "race_of_blocks") {
    const std::unique_ptr<int, decltype(&std::free)> two(ones(2 * kThreads), &std::free);
    status = launch(race_of_blocks_kernel<kCorrect>, 2, kThreads, 0, nullptr, two.get());
  }
  if (name.starts_with("wgmma")) {
    const auto product = [&](auto kernel) {
      status = launch(kernel, 1, kThreads, kWgmmaBytes, nullptr, out.get(), input.get());
    };
    if (kCorrect) product(wgmma_kernel<-1>);
    if (!kCorrect && name == "wgmma_unfenced") product(wgmma_kernel<0>);
    if (!kCorrect && name == "wgmma_not_begun") product(wgmma_kernel<1>);
    if (!kCorrect && name == "wgmma_outside") product(wgmma_kernel<2>);
    if (!kCorrect && name == "wgmma_overwritten") product(wgmma_kernel<3>);
    if (!kCorrect && name == "wgmma_metadata_early") product(wgmma_kernel<4>);
    // bytes of ones are 1, 0, 0, 0: a keeps of each four of x's the first two
    for (int i = 0; i < 4 * kThreads; ++i) {
      if (const int result = out.get()[i]; status == cudaSuccess && result != 8) {
        std::printf("wrong result: %d\n", result);
        return 1;
      }
    }
  }
  if (name.starts_with("copy")) {
    if (name == "copy") reading(copy_kernel<kCorrect>);
    if (name == "copy_stages") reading(copy_stages_kernel<kCorrect>);
    if (name == "copy_of_another") reading(copy_of_another_kernel<kCorrect>);
    for (int i = 0; i < kThreads; ++i) {
      if (const int result = out.get()[name == "copy_stages" ? i : 4 * i]; status == cudaSuccess && result != 1) {
        std::printf("wrong result: %d\n", result);
        return 1;
      }
    }
  }
  if (status != cudaSuccess) std::printf("%s\n", cudaGetErrorString(status));
  return status != cudaSuccess;
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return 2;
  return count > 2 && std::strcmp(arguments[2], "correct") == 0 ? run<true>(arguments[1]) : run<false>(arguments[1]);
}
