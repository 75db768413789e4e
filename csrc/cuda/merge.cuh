// merge_tokens: weighted sums of rows by group, and their gradients. pyvtk/reference/merge.py is the definition; the
// CPU's way is cpu/merge.h.
//
// A warp has a piece of one group's row, in units of 16 bytes where all addresses allow, and adds its members' units in
// ascending order: no atomics on floats, the same bits on every run, every input byte read once. It finds the members
// itself, among the groups of all tokens of the sample. That is as much work as groups x tokens; where there are many
// groups, a block for each sample sorts the tokens by counting first. Tokens of no group, or of one that does not
// exist, are left out.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "cuda/block.cuh"
#include "cuda/numbers.cuh"

namespace pyvtk::cuda {

inline constexpr int kSortThreads = 32 * kMostWarps;
inline constexpr int kMergeThreads = 256;
// A warp of the sums has so little to do that other warps have to hide what it waits for. [64, 576, 1024] bfloat16 to
// 144 takes 45.5 us on an H200 with these numbers, 49.6 with 4 rows ahead in 5 blocks of a multiprocessor or with 4
// units in 4 blocks, 52.6 with 1 unit; sorted first, by one thread for each unit, it took 63.7.
inline constexpr int kMergeWarps = 4;
inline constexpr int kMergeUnits = 2;  // of a lane, 32 units apart
inline constexpr int kMergeAhead = 2;  // rows that are read before the first of them is added
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class T>
inline constexpr int kMergeBlocks = 5;  // six spill (sm_80)
#else
template <class T>
inline constexpr int kMergeBlocks = std::is_same_v<T, float16> ? 5 : 6;  // float16 spills with six
#endif
inline constexpr int kScanned = 2048;       // tokens whose groups a block holds at a time
inline constexpr int kScannedAtOnce = 128;  // of them by a warp, four to a lane
inline constexpr int kFound = 64;           // members that a warp is content with, until it adds them
static_assert(kScannedAtOnce == 32 * kMergeWarps && kScanned % (4 * kScannedAtOnce) == 0);
inline constexpr int64_t kMostGroupsToScan = 1024;
inline constexpr int64_t kSharedCounters = 40 * 1024 / 4;

// Strides in bytes; channels lie next to each other.
struct MergeRows {
  const char* data;
  int64_t batch, token;
};

struct MergeProblem {
  MergeRows x;                // [batch, tokens, channels]
  const int64_t* assignment;  // [batch, tokens]
  const void* weights;        // [batch, tokens]; nullptr: all 1
  bool weights_double;        // weights are float64, else float32
  bool mean;
  int64_t batch, tokens, groups, channels;
  int32_t* starts;    // [batch, groups + 1]: where a group's members begin
  int32_t* members;   // [batch, tokens]: tokens by group, ascending
  int32_t* counters;  // [batch, warps, groups], where these do not fit shared memory; else nullptr
};

// Whether members are sorted before the sums; only then there has to be memory for them.
inline bool merge_sorts(int64_t groups) { return groups > kMostGroupsToScan; }

inline int64_t merge_counters(int64_t batch, int64_t groups) {
  return groups * kMostWarps > kSharedCounters ? batch * groups * kMostWarps : 0;
}

__device__ __forceinline__ int32_t group_of(const MergeProblem& problem, int64_t sample, int64_t token) {
  const int64_t group = __ldg(problem.assignment + sample * problem.tokens + token);
  return group >= 0 && group < problem.groups ? static_cast<int32_t>(group) : -1;
}

// A block sorts a sample. Each warp has a run of its tokens, and counters of its own: first they count, then they say
// where the warp's next member of a group goes.
static __global__ void __launch_bounds__(kSortThreads) members_kernel(const MergeProblem problem) {
  PYVTK_SHARED(carried, int32_t);
  const int64_t sample = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x), lane = lane_of_warp();
  const auto groups = static_cast<int32_t>(problem.groups), tokens = static_cast<int32_t>(problem.tokens);
  int32_t* const counters =
      problem.counters ? problem.counters + sample * kMostWarps * problem.groups : dynamic_shared<int32_t>();
  int32_t* const mine = counters + int64_t{warp_of_block()} * groups;
  for (int64_t i = thread; i < int64_t{kMostWarps} * groups; i += kSortThreads) counters[i] = 0;
  const int32_t words = (tokens + 31) / 32, words_of_warp = (words + kMostWarps - 1) / kMostWarps;
  const int32_t begin = min(warp_of_block() * words_of_warp * 32, tokens);
  const int32_t end = min(begin + words_of_warp * 32, tokens);
  __syncthreads();
  for (int32_t token = begin + lane; token < end; token += 32) {
    const int32_t group = group_of(problem, sample, token);
    if (group >= 0) atomicAdd(mine + group, 1);
  }
  if (thread == 0) carried = 0;
  __syncthreads();

  int32_t* const starts = problem.starts + sample * (problem.groups + 1);
  for (int32_t first = 0; first < groups; first += kSortThreads) {
    const int32_t group = first + thread;
    int32_t size = 0;
    for (int warp = 0; warp < kMostWarps && group < groups; ++warp) size += counters[int64_t{warp} * groups + group];
    int32_t before = size;  // of this warp's groups up to this one
    for (int step = 1; step < 32; step *= 2) {
      const int32_t lower = __shfl_up_sync(kAllLanes, before, static_cast<unsigned>(step));
      if (lane >= step) before += lower;
    }
    const Prefix<int32_t> warps = prefix_of_warps(__shfl_sync(kAllLanes, before, 31));
    int32_t at = carried + warps.before + before - size;
    if (group < groups) {
      starts[group] = at;
      for (int warp = 0; warp < kMostWarps; ++warp) {
        const int32_t count = counters[int64_t{warp} * groups + group];
        counters[int64_t{warp} * groups + group] = at;
        at += count;
      }
    }
    __syncthreads();  // all have read what was carried
    if (thread == 0) carried += warps.total;
    __syncthreads();
  }
  if (thread == 0) starts[groups] = carried;
  __syncthreads();

  int32_t* const members = problem.members + sample * problem.tokens;
  for (int32_t word = begin; word < end; word += 32) {
    const int32_t token = word + lane;
    const int32_t group = token < end ? group_of(problem, sample, token) : -1;
    const unsigned same = __match_any_sync(kAllLanes, group);
    const unsigned before = same & ((1u << lane) - 1);
    int32_t place = 0;
    if (group >= 0) {
      place = mine[group] + __popc(before);
      members[place] = token;
    }
    __syncwarp();
    if (group >= 0 && !(same & ~before & ~(1u << lane))) mine[group] = place + 1;  // the last of them
    __syncwarp();
  }
}

// Members of a group that a warp finds among the tokens of a sample. `groups` is shared by the block.
template <class Take>
__device__ __forceinline__ void each_member(const MergeProblem& problem, int64_t sample, int32_t group, Take&& take) {
  PYVTK_SHARED(groups, int32_t[kScanned]);
  PYVTK_SHARED(found_by_warps, int32_t[kMergeWarps][kFound + kScannedAtOnce]);
  int32_t* const found = found_by_warps[warp_of_block()];
  const auto tokens = static_cast<int32_t>(problem.tokens);
  const int lane = lane_of_warp();
  const unsigned before = (1u << lane) - 1;
  int32_t count = 0;
  for (int32_t chunk = 0; chunk < tokens; chunk += kScanned) {
    const int32_t length = min(tokens - chunk, kScanned);
    if (chunk > 0) __syncthreads();  // all have read the last chunk
    for (int32_t first = 0; first < length; first += 4 * kScannedAtOnce) {
      int32_t read[4];
      for (int k = 0; k < 4; ++k) {
        const int32_t i = first + k * kScannedAtOnce + static_cast<int32_t>(threadIdx.x);
        read[k] = i < length ? group_of(problem, sample, chunk + i) : -1;
      }
      for (int k = 0; k < 4; ++k) groups[first + k * kScannedAtOnce + static_cast<int32_t>(threadIdx.x)] = read[k];
    }
    __syncthreads();
    if (group < 0) continue;
    PYVTK_NOT_UNROLLED
    for (int32_t first = 0; first < length; first += kScannedAtOnce) {
      const int4 four = *reinterpret_cast<const int4*>(groups + first + 4 * lane);
      const bool joins[4] = {four.x == group, four.y == group, four.z == group, four.w == group};
      if (__any_sync(kAllLanes, joins[0] || joins[1] || joins[2] || joins[3])) {
        int32_t place = count;
        for (bool one : joins) {
          const unsigned lanes = __ballot_sync(kAllLanes, one);
          place += __popc(lanes & before);
          count += __popc(lanes);
        }
        for (int i = 0; i < 4; ++i) {
          if (joins[i]) found[place++] = chunk + first + 4 * lane + i;
        }
        __syncwarp();
      }
      if (count > kFound || (count > 0 && chunk + first + kScannedAtOnce >= tokens)) {
        take(found, count);
        count = 0;
        __syncwarp();
      }
    }
  }
}

// out = sum of weight * x over the members, divided by the sum of weights for a mean; and those sums.
template <class T, int kCount, bool kSorted>
__global__ void __launch_bounds__(32 * kMergeWarps, kMergeBlocks<T>)
    merge_kernel(const MergeProblem problem, char* out, double* totals, int32_t units, uint32_t blocks_of_sample) {
  constexpr int kBytes = sizeof(T) * kCount;
  const uint32_t pieces = max(ceil_div(units, 32 * kMergeUnits), 1);
  const uint32_t item = blockIdx.x % blocks_of_sample * kMergeWarps + static_cast<uint32_t>(warp_of_block());
  const int64_t sample = blockIdx.x / blocks_of_sample;
  const bool exists = item / pieces < problem.groups;
  const int32_t group = exists ? static_cast<int32_t>(item / pieces) : -1;
  const auto first_unit = static_cast<int32_t>(item % pieces * (32 * kMergeUnits)) + lane_of_warp();
  const char* const rows = problem.x.data + sample * problem.x.batch + int64_t{first_unit} * kBytes;
  Wide<T> sums[kMergeUnits][kCount] = {};
  double total = 0;
  const auto take = [&](const int32_t* members, int32_t count) {
    PYVTK_NOT_UNROLLED
    for (int32_t at = 0; at < count; at += kMergeAhead) {
      Pack<T, kCount> packs[kMergeAhead][kMergeUnits];
      double weights[kMergeAhead];
      for (int k = 0; k < kMergeAhead; ++k) {
        if (at + k >= count) continue;
        const int64_t token = members[at + k];
        weights[k] =
            problem.weights ? number_at(problem.weights, problem.weights_double, sample * problem.tokens + token) : 1.0;
        for (int i = 0; i < kMergeUnits; ++i) {
          if (first_unit + 32 * i < units) {
            packs[k][i] = load_pack<T, kCount>(rows + token * problem.x.token + i * 32 * kBytes);
          }
        }
      }
      for (int k = 0; k < kMergeAhead; ++k) {
        if (at + k >= count) continue;
        total += weights[k];
        for (int i = 0; i < kMergeUnits; ++i) {
          if (first_unit + 32 * i < units) {
            add_pack<T, kCount>(sums[i], static_cast<Wide<T>>(weights[k]), packs[k][i]);
          }
        }
      }
    }
  };
  if constexpr (kSorted) {
    if (!exists) return;
    const int32_t* const starts = problem.starts + sample * (problem.groups + 1) + group;
    take(problem.members + sample * problem.tokens + starts[0], starts[1] - starts[0]);
  } else {
    each_member(problem, sample, group, take);
    if (!exists) return;
  }
  const int64_t row = sample * problem.groups + group;
  if (first_unit == 0) totals[row] = total;
  const Wide<T> divisor = problem.mean ? static_cast<Wide<T>>(total) : Wide<T>{1};
  for (int k = 0; k < kMergeUnits; ++k) {
    if (first_unit + 32 * k >= units) continue;
    Pack<T, kCount> result{};
    if (!problem.mean || total != 0) {
      for (int i = 0; i < kCount; ++i) result.numbers[i] = from_wide<T>(sums[k][i] / divisor);
    }
    store_pack<T, kCount>(out + (row * units + first_unit + 32 * k) * kBytes, result);
  }
}

// What the gradient needs beside the problem. Of the mean m = sum w x / W: dx = (w / W) g and dw = (g . x - g . m) / W,
// where g . m is the mean of the g . x.
struct MergeGradient {
  MergeRows grad;        // [batch, groups, channels]
  const double* totals;  // [batch, groups]
  char* grad_x;          // [batch, tokens, channels]
  void* grad_weights;    // [batch, tokens], of the weights' type; nullptr: not wanted
  double* products;      // [batch, tokens]: g . x, of a mean whose weights want a gradient; else nullptr
};

__device__ __forceinline__ void put_number(void* numbers, bool are_double, int64_t i, double value) {
  if (are_double) {
    static_cast<double*>(numbers)[i] = value;
  } else {
    static_cast<float*>(numbers)[i] = static_cast<float>(value);
  }
}

// dx, and g . x: a warp has a token. The order of the sum of g . x follows from kCount, which therefore depends on the
// channels alone: where rows are not `aligned` to the packs, their numbers are read one by one.
template <class T, int kCount>
__global__ void __launch_bounds__(kMergeThreads, 3)
    merge_backward_kernel(const MergeProblem problem, const MergeGradient gradient, int32_t units, bool aligned,
                          bool result_aligned) {
  const int64_t item = int64_t{blockIdx.x} * (kMergeThreads / 32) + warp_of_block();
  if (item >= problem.batch * problem.tokens) return;
  const int64_t sample = item / problem.tokens, token = item % problem.tokens;
  const int32_t group = group_of(problem, sample, token);
  const double total = group < 0 ? 0.0 : problem.mean ? gradient.totals[sample * problem.groups + group] : 1.0;
  const bool alive = total != 0;  // not so for what is left out, and for groups of no weight
  const double weight = problem.weights ? number_at(problem.weights, problem.weights_double, item) : 1.0;
  const Wide<T> factor = static_cast<Wide<T>>(alive ? weight / total : 0.0);
  constexpr int kBytes = sizeof(T) * kCount;
  const char* const grad = gradient.grad.data + sample * gradient.grad.batch + max(group, 0) * gradient.grad.token;
  const char* const x = problem.x.data + sample * problem.x.batch + token * problem.x.token;
  char* const grad_x = gradient.grad_x + item * units * kBytes;
  Wide<T> products[kCount] = {};
  for (int64_t unit = lane_of_warp(); unit < units; unit += 32) {
    Pack<T, kCount> out{};
    if (alive) {
      const Pack<T, kCount> given = load_pack<T, kCount>(grad + unit * kBytes, aligned);
      for (int i = 0; i < kCount; ++i)
        out.numbers[i] = from_wide<T>(fused(factor, to_wide(given.numbers[i]), Wide<T>{0}));
      if (gradient.grad_weights) {
        const Pack<T, kCount> row = load_pack<T, kCount>(x + unit * kBytes, aligned);
        for (int i = 0; i < kCount; ++i) {
          products[i] = fused(to_wide(given.numbers[i]), to_wide(row.numbers[i]), products[i]);
        }
      }
    }
    store_pack<T, kCount>(grad_x + unit * kBytes, out, result_aligned);
  }
  if (!gradient.grad_weights) return;
  double product = 0;
  for (int i = 0; i < kCount; ++i) product += static_cast<double>(products[i]);
  product = sum_of_warp(product);
  if (lane_of_warp() > 0) return;
  if (gradient.products) gradient.products[item] = product;
  put_number(gradient.grad_weights, problem.weights_double, item, alive ? product / total : 0.0);
}

// dw of a mean: a thread has a group. What stays as the kernel before wrote it: tokens of no group or of no weight.
static __global__ void __launch_bounds__(kMergeThreads, 3)
    merge_weights_kernel(const MergeProblem problem, const MergeGradient gradient) {
  const int64_t item = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  if (item >= problem.batch * problem.groups) return;
  const double total = gradient.totals[item];
  if (total == 0) return;
  const int64_t sample = item / problem.groups, group = item % problem.groups;
  const int32_t* const starts = problem.starts + sample * (problem.groups + 1) + group;
  const int32_t* const members = problem.members + sample * problem.tokens;
  const int64_t first = sample * problem.tokens;
  double average = 0;
  for (int32_t at = starts[0]; at < starts[1]; ++at) {
    const int64_t token = first + members[at];
    average += number_at(problem.weights, problem.weights_double, token) / total * gradient.products[token];
  }
  for (int32_t at = starts[0]; at < starts[1]; ++at) {
    const int64_t token = first + members[at];
    put_number(gradient.grad_weights, problem.weights_double, token,
               gradient.products[token] / total - average / total);
  }
}

namespace detail {

inline constexpr int64_t kMostMerged = std::numeric_limits<int32_t>::max() - kSortThreads;

inline bool too_large(const MergeProblem& problem, int64_t bytes_of_number) {
  for (int64_t size : {problem.batch, problem.tokens, problem.groups, problem.channels * bytes_of_number}) {
    if (size > kMostMerged) return true;
  }
  return false;
}

inline cudaError_t sort_members(const MergeProblem& problem, cudaStream_t stream) {
  const auto bytes = problem.counters ? size_t{0} : static_cast<size_t>(4 * kMostWarps * problem.groups);
  return launch(members_kernel, dim3(static_cast<unsigned>(problem.batch)), dim3(kSortThreads), bytes, stream, problem);
}

// f(count), the numbers of a unit as a constant; all: what units have to be multiples of, in one word
template <class T, class F>
cudaError_t with_count(uint64_t all, F&& f) {
  return width_of(all) == 16 ? f(std::integral_constant<int, 16 / sizeof(T)>{}) : f(std::integral_constant<int, 1>{});
}

inline uint64_t addresses_of(const MergeRows& rows) {
  return reinterpret_cast<uintptr_t>(rows.data) | static_cast<uint64_t>(rows.batch | rows.token);
}

inline cudaError_t grid_for(int64_t items, int64_t per_block, dim3& grid) {
  const int64_t blocks = ceil_div<int64_t>(items, per_block);
  grid = dim3(static_cast<unsigned>(blocks));
  return blocks > std::numeric_limits<int32_t>::max() ? cudaErrorInvalidValue : cudaSuccess;
}

}  // namespace detail

// out [batch, groups, channels], totals [batch, groups]
template <class T>
cudaError_t merge(const MergeProblem& problem, void* out, double* totals, cudaStream_t stream) {
  if (problem.batch == 0 || problem.groups == 0) return cudaSuccess;
  if (detail::too_large(problem, sizeof(T))) return cudaErrorInvalidValue;
  const bool sorted = merge_sorts(problem.groups);
  const cudaError_t status = sorted ? detail::sort_members(problem, stream) : cudaSuccess;
  if (status != cudaSuccess) return status;
  const int64_t bytes = problem.channels * static_cast<int64_t>(sizeof(T));
  const uint64_t addresses =
      detail::addresses_of(problem.x) | reinterpret_cast<uintptr_t>(out) | static_cast<uint64_t>(bytes);
  return detail::with_count<T>(addresses, [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    const int64_t units = problem.channels / kCount;
    const int64_t pieces = std::max<int64_t>(ceil_div<int64_t>(units, 32 * kMergeUnits), 1);
    const int64_t blocks_of_sample = ceil_div<int64_t>(problem.groups * pieces, kMergeWarps);
    if (problem.groups * pieces > detail::kMostMerged) return cudaErrorInvalidValue;
    dim3 grid;
    const cudaError_t fits = detail::grid_for(problem.batch * blocks_of_sample, 1, grid);
    if (fits != cudaSuccess) return fits;
    return launch(sorted ? merge_kernel<T, kCount, true> : merge_kernel<T, kCount, false>, grid, dim3(32 * kMergeWarps),
                  0, stream, problem, static_cast<char*>(out), totals, static_cast<int32_t>(units),
                  static_cast<uint32_t>(blocks_of_sample));
  });
}

template <class T>
cudaError_t merge_backward(const MergeProblem& problem, const MergeGradient& gradient, cudaStream_t stream) {
  if (problem.batch == 0 || problem.tokens == 0) return cudaSuccess;
  if (detail::too_large(problem, sizeof(T))) return cudaErrorInvalidValue;
  const int64_t bytes = problem.channels * static_cast<int64_t>(sizeof(T));
  const uint64_t addresses = detail::addresses_of(problem.x) | detail::addresses_of(gradient.grad);
  const bool aligned = width_of(addresses) == 16;
  const bool result_aligned = width_of(reinterpret_cast<uintptr_t>(gradient.grad_x)) == 16;
  cudaError_t status = detail::with_count<T>(static_cast<uint64_t>(bytes), [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    dim3 grid;
    const cudaError_t fits = detail::grid_for(problem.batch * problem.tokens, kMergeThreads / 32, grid);
    if (fits != cudaSuccess) return fits;
    return launch(merge_backward_kernel<T, kCount>, grid, dim3(kMergeThreads), 0, stream, problem, gradient,
                  static_cast<int32_t>(problem.channels / kCount), aligned, result_aligned);
  });
  if (status != cudaSuccess || !gradient.products || problem.groups == 0) return status;
  status = detail::sort_members(problem, stream);
  dim3 grid;
  if (status == cudaSuccess) status = detail::grid_for(problem.batch * problem.groups, kMergeThreads, grid);
  if (status != cudaSuccess) return status;
  return launch(merge_weights_kernel, grid, dim3(kMergeThreads), 0, stream, problem, gradient);
}

}  // namespace pyvtk::cuda
