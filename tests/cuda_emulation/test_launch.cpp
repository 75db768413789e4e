// launch(): what it reports, and shared memory of launches at once. The kernels' own launches from two threads are in
// test_select.cpp and test_score_and_select.cpp.
#include <latch>
#include <thread>
#include <vector>

#include "check.h"
#include "cuda/ptx.cuh"

using namespace pyvtk::cuda;

namespace {

__global__ void empty_kernel() {}

// One for each number: what is kept with a kernel begins anew.
template <int kNumber>
__global__ void fill_kernel(int* out, int count) {  // [1]
  int* const shared = dynamic_shared<int>();        // [count]
  for (int i = 0; i < count; ++i) shared[i] = i;
  *out = shared[count - 1];
}

template <int kNumber>
cudaError_t fill(int count, int* out) {
  return launch(fill_kernel<kNumber>, 1, 1, sizeof(int) * static_cast<size_t>(count), nullptr, out, count);
}

void reports_its_own_status() {
  CHECK(cudaFuncSetAttribute(empty_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, -1) != cudaSuccess, "");
  CHECK(launch(empty_kernel, 1, 32, 0, nullptr) == cudaSuccess, "an earlier error is not this launch's");
  CHECK(cudaGetLastError() == cudaErrorInvalidValue, "nor is it lost");
  CHECK(launch(empty_kernel, 1, 2000, 0, nullptr) == cudaErrorInvalidConfiguration, "this one is");
  int out = 0;
  CHECK(fill<0>(1 << 20, &out) == cudaErrorInvalidValue, "more shared memory than there is");
  cudaGetLastError();
}

// A launch that may begin early waits where it says so, and not before.
__global__ void early_kernel(const int* from, int* to) {
  await_previous_launch();
  let_next_launch_start();
  *to = *from + 1;
}

void launches_early() {
  int numbers[3] = {7};
  CHECK(launch_early(early_kernel, 1, 1, 0, nullptr, numbers, numbers + 1) == cudaSuccess, "");
  CHECK(launch_early(early_kernel, 1, 1, 0, nullptr, numbers + 1, numbers + 2) == cudaSuccess, "");
  CHECK(numbers[2] == 9, numbers[2]);
  CHECK(launch_early(early_kernel, 1, 2000, 0, nullptr, numbers, numbers) == cudaErrorInvalidConfiguration, "");
  CHECK(launch_early(early_kernel, 1, 1, 1 << 20, nullptr, numbers, numbers) == cudaErrorInvalidValue, "");
  cudaGetLastError();
}

void asks_once() {
  int out = 0;
  const auto calls_of = [&](int count) {
    const int64_t before = cuda_emulation::attribute_calls();
    CHECK(fill<1>(count, &out) == cudaSuccess && out == count - 1, count, out);
    return cuda_emulation::attribute_calls() - before;
  };
  const int64_t before = cuda_emulation::attribute_calls();
  CHECK(launch(empty_kernel, 1, 32, 0, nullptr) == cudaSuccess, "");
  CHECK(cuda_emulation::attribute_calls() == before, "nothing dynamic, nothing to ask");
  CHECK(calls_of(1000) == 2, "what there is");
  CHECK(calls_of(2000) == 0, "no permission for little");
  CHECK(calls_of(20000) == 1, "permission");
  for (int count : {40000, 1000, 30000, 40000}) CHECK(calls_of(count) == 0, count);
  int64_t most = 0;
  CHECK(most_dynamic_shared(fill_kernel<1>, most) == cudaSuccess, "");
  const cuda_emulation::Options& options = cuda_emulation::options();
  CHECK(most == options.shared_bytes - options.declared_bytes, most);
  CHECK(calls_of(static_cast<int>(most / 4)) == 0, "what plans may use is what launches get");
}

// More devices than bits of a word.
void knows_every_device() {
  const int64_t all = cuda_emulation::options().shared_bytes;
  for (int round = 0; round < 2; ++round) {
    for (int device = 0; device < 100; ++device) {
      cuda_emulation::options().shared_bytes = all - 1024 * device;
      const int64_t before = cuda_emulation::attribute_calls();
      int64_t most = 0;
      int out = 0;
      CHECK(most_dynamic_shared(fill_kernel<2>, most) == cudaSuccess, device);
      CHECK(most == all - 1024 * device - cuda_emulation::options().declared_bytes, device, most);
      CHECK(fill<2>(static_cast<int>(most / 4), &out) == cudaSuccess && out == most / 4 - 1, device, out);
      CHECK(cuda_emulation::attribute_calls() - before == (round == 0 ? 3 : 0), device, round);
    }
  }
  cuda_emulation::options() = {};
}

// Threads that come to many kernels for the first time, all at once: each kernel is kept once.
void keeps_every_kernel() {
  constexpr uintptr_t kKernels = 3000, kFirst = 1 << 20;  // addresses that no kernel has
  std::latch ready(3);
  int errors[3] = {};
  const auto work = [&](int thread) {
    ready.arrive_and_wait();
    for (uintptr_t number = 0; number < kKernels; ++number) {
      const void* kernel = reinterpret_cast<const void*>(kFirst + 16 * number);
      detail::SharedLimit* limit = nullptr;
      errors[thread] += detail::shared_limit_of(kernel, limit) != cudaSuccess || limit->kernel != kernel ||
                        limit->most != limit->without_asking + 179 * 1024;
    }
  };
  std::thread threads[] = {std::thread(work, 0), std::thread(work, 1), std::thread(work, 2)};
  for (std::thread& thread : threads) thread.join();
  CHECK(errors[0] + errors[1] + errors[2] == 0, errors[0], errors[1], errors[2]);
  std::vector<int> times(kKernels, 0);
  for (auto& list : detail::shared_limits.lists) {
    for (const detail::SharedLimit* limit = list; limit; limit = limit->next) {
      const uintptr_t number = (reinterpret_cast<uintptr_t>(limit->kernel) - kFirst) / 16;
      if (number < kKernels) ++times[number];
    }
  }
  for (uintptr_t number = 0; number < kKernels; ++number) CHECK(times[number] == 1, number, times[number]);
}

// From the first launch on, which both may come to at once.
template <int kNumber>
void two_threads() {
  constexpr int kRounds = 300;
  int errors[2] = {};
  const auto work = [&](int thread) {
    for (int round = 0; round < kRounds; ++round) {
      int out = 0;
      const int count = 18000 + 6000 * ((thread + round) % 2);
      errors[thread] += fill<kNumber>(count, &out) != cudaSuccess;
    }
  };
  cuda_emulation::options().dry = true;
  std::thread first(work, 0), second(work, 1);
  first.join();
  second.join();
  cuda_emulation::options() = {};
  CHECK(errors[0] == 0 && errors[1] == 0, kNumber, errors[0], errors[1]);
}

}  // namespace

int main() {
  reports_its_own_status();
  launches_early();
  asks_once();
  knows_every_device();
  keeps_every_kernel();
  two_threads<3>();
  two_threads<4>();
  two_threads<5>();
  return report();
}
