// Products with 2:4 sparse weights and many rows on Hopper, by wgmma. Meaning: pyvtk/reference/sparse24.py.
//
// The weight is wgmma's sparse operand a, x is b: both from shared memory, where stages of them come by cp.async in the
// order that wgmma asks for, from the format as it is; metadata goes from there to registers. A block owns kFeatures x
// kRows. Products are asynchronous: while those of one stage run, the warps wait for the next one and begin it.
#pragma once
#include "cuda/numbers.cuh"
#include "cuda/sparse24.cuh"

namespace pyvtk::cuda {

template <class X, int kGroups_, int kBlocks_, int kRows_, int kStages_>
struct WgmmaTile {
  static constexpr int kGroups = kGroups_;  // warpgroups
  static constexpr int kBlocks = kBlocks_;  // of 64 features, of a warpgroup
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kFeatures = 64 * kBlocks * kGroups;
  static constexpr int kRows = kRows_;
  static constexpr int kStages = kStages_;
  static constexpr int kSteps = 2;  // wgmma along k in a stage
  // bytes of one row in a stage
  static constexpr int kXBytes = 128;
  static constexpr int kValueBytes = 64;
  static constexpr int kDepth = kXBytes / static_cast<int>(sizeof(X));
  static constexpr int kMetadataBytes = kDepth / 8;
  static constexpr int kValuesAt = kRows * kXBytes;
  static constexpr int kMetadataAt = kValuesAt + kFeatures * kValueBytes;
  static constexpr int kAlignment = 1024;  // of a stage: eight rows of x
  static constexpr int kStageBytes = ceil_div(kMetadataAt + kFeatures * kMetadataBytes, kAlignment) * kAlignment;
  // Sums on their way out. Four more to a row: then the 16 bytes of eight lanes that write at once, two features' and
  // four rows', are in different banks.
  static constexpr int kSumStride = kFeatures + 4;
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kSharedBytes =
      (kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes) + kAlignment - 128;
  static_assert(kRows % 8 == 0 && kStages >= 3 && kSharedBytes <= 227 * 1024);

  __device__ static int x_at(int row, int piece) { return row * kXBytes + (piece ^ (row & 7)) * 16; }
  __device__ static int values_at(int place, int piece) {
    return kValuesAt + place * kValueBytes + (piece ^ (place >> 1 & 3)) * 16;
  }
  // The feature at a place among the rows of a. A lane has rows g and g + 8 of a warp's 16 in each block of 64: these
  // are neighbours in the weight.
  __device__ static int feature_at(int place) {
    const int group = place / (64 * kBlocks), block = place / 64 % kBlocks, warp = place / 16 % 4;
    return ((group * 4 + warp) * 8 + place % 8) * (2 * kBlocks) + block * 2 + place / 8 % 2;
  }
};

// Starts to fetch the stage of k from `depth` on. What lies past the last row or feature is the last one again.
template <class X, class Tile>
__device__ __forceinline__ void fetch_wgmma_stage(const Sparse24Problem& problem, unsigned char* stage,
                                                  int64_t first_row, int64_t first_feature, int64_t depth) {
  const int me = static_cast<int>(threadIdx.x);
  {
    const char* x = static_cast<const char*>(problem.x) + depth * static_cast<int64_t>(sizeof(X)) + me % 8 * 16;
    const int64_t stride = problem.x_stride * static_cast<int64_t>(sizeof(X));
    const int last = static_cast<int>(at_most(problem.rows - first_row, Tile::kRows)) - 1;
    x += first_row * stride;
    constexpr int kAtOnce = Tile::kThreads / 8;
    PYVTK_UNROLL
    for (int i = 0; i < ceil_div(Tile::kRows, kAtOnce); ++i) {
      const int row = me / 8 + i * kAtOnce;
      if (Tile::kRows % kAtOnce == 0 || row < Tile::kRows) {
        copy_async<16>(stage + Tile::x_at(row, me % 8), x + (row < last ? row : last) * stride);
      }
    }
  }
  const int last = static_cast<int>(at_most(problem.features - first_feature, Tile::kFeatures)) - 1;
  {
    const int64_t stride = problem.depth / 2 * static_cast<int64_t>(sizeof(X));
    const char* values = static_cast<const char*>(problem.values) + first_feature * stride +
                         depth / 2 * static_cast<int64_t>(sizeof(X)) + me % 4 * 16;
    constexpr int kAtOnce = Tile::kThreads / 4;
    static_assert(Tile::kFeatures % kAtOnce == 0);
    PYVTK_UNROLL
    for (int i = 0; i < Tile::kFeatures / kAtOnce; ++i) {
      const int place = me / 4 + i * kAtOnce, feature = Tile::feature_at(place);
      copy_async<16>(stage + Tile::values_at(place, me % 4), values + (feature < last ? feature : last) * stride);
    }
  }
  const int64_t stride = problem.depth / 8;
  const uint8_t* metadata = problem.metadata + first_feature * stride + depth / 8;
  PYVTK_UNROLL
  for (int i = 0; i < ceil_div(Tile::kFeatures, Tile::kThreads); ++i) {
    const int place = me + i * Tile::kThreads, feature = Tile::feature_at(place);
    if (Tile::kFeatures % Tile::kThreads == 0 || place < Tile::kFeatures) {
      copy_async<Tile::kMetadataBytes>(stage + Tile::kMetadataAt + place * Tile::kMetadataBytes,
                                       metadata + (feature < last ? feature : last) * stride);
    }
  }
}

#ifdef PYVTK_WGMMA
// A lane's metadata of a stage. Of 16 bits, lanes 0 and 1 of four bring the first step's, the others the second's.
template <class X, class Tile>
struct WgmmaMetadata {
  uint32_t words[Tile::kBlocks][sizeof(X) == 1 ? Tile::kSteps : 1] = {};
};

// always: not 0, which only the caller knows (see replace_word)
template <class X, class Tile>
__device__ __forceinline__ void load_metadata(const unsigned char* stage, WgmmaMetadata<X, Tile>& metadata,
                                              int always) {
  const int lane = lane_of_warp();
  PYVTK_UNROLL
  for (int block = 0; block < Tile::kBlocks; ++block) {
    const int first = (warp_of_block() / 4 * Tile::kBlocks + block) * 64 + warp_of_block() % 4 * 16 + lane / 4;
    const unsigned char* codes = stage + Tile::kMetadataAt + first * Tile::kMetadataBytes;
    if constexpr (sizeof(X) == 1) {
      codes += lane % 2 * 8 * Tile::kMetadataBytes + lane % 4 / 2 * 4;
      PYVTK_UNROLL
      for (int step = 0; step < Tile::kSteps; ++step) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(codes + 8 * step);
        replace_word(metadata.words[block][step], word, always);
      }
    } else {
      codes += lane % 4 * 2;
      const uint32_t low = *reinterpret_cast<const uint16_t*>(codes);
      const uint32_t high = *reinterpret_cast<const uint16_t*>(codes + 8 * Tile::kMetadataBytes);
      replace_word(metadata.words[block][0], low | high << 16, always);
    }
  }
}

// Starts the products of a stage.
template <class X, class Tile, class Sum>
__device__ __forceinline__ void begin_products(const unsigned char* stage, const WgmmaMetadata<X, Tile>& metadata,
                                               Sum (&sums)[Tile::kBlocks][Tile::kRows / 2]) {
  const int first = warp_of_block() / 4 * Tile::kBlocks * 64;
  const uint64_t x = wgmma_matrix<Tile::kXBytes>(stage);
  const uint64_t values = wgmma_matrix<Tile::kValueBytes>(stage + Tile::kValuesAt + first * Tile::kValueBytes);
  wgmma_begin();
  PYVTK_UNROLL
  for (int block = 0; block < Tile::kBlocks; ++block) {  // of both steps, addresses in units of 16 bytes
    const uint64_t a = values + static_cast<uint64_t>(block * 64 * Tile::kValueBytes / 16);
    if constexpr (sizeof(X) == 1) {
      wgmma_sp<X, 0, Tile::kRows>(sums[block], a, x, metadata.words[block][0]);
      wgmma_sp<X, 0, Tile::kRows>(sums[block], a + 2, x + 4, metadata.words[block][1]);
    } else {
      wgmma_sp<X, 0, Tile::kRows>(sums[block], a, x, metadata.words[block][0]);
      wgmma_sp<X, 1, Tile::kRows>(sums[block], a + 2, x + 4, metadata.words[block][0]);
    }
  }
  wgmma_commit();
}
#endif

// Writes sums that lie in shared memory, [rows][kSumStride], to the workspace or to where they belong. Four features of
// a row at a time.
template <class Tile, class Sum>
__device__ __forceinline__ void write_wgmma_sums(const Sparse24Launch& call, const Sum* sums, int64_t first_row,
                                                 int64_t first_feature) {
  const Sparse24Problem& problem = call.problem;
  const Sparse24Epilogue& end = problem.epilogue;
  constexpr int kFours = Tile::kFeatures / 4;
  static_assert(Tile::kThreads % kFours == 0);
  const int me = static_cast<int>(threadIdx.x), at = me % kFours * 4;
  const int64_t feature = first_feature + at, features = problem.features;
  const int rows = static_cast<int>(at_most(problem.rows - first_row, Tile::kRows));
  const int count = static_cast<int>(at_most(features - feature, 4));
  if (count <= 0) return;
  const bool whole = count == 4 && features % 4 == 0;  // and so every row is aligned to four
  if (call.splits > 1) {
    Sum* to = static_cast<Sum*>(call.workspace) + (blockIdx.z * problem.rows + first_row) * features + feature;
    for (int row = me / kFours; row < rows; row += Tile::kThreads / kFours) {
      const Pack<Sum, 4> four = *reinterpret_cast<const Pack<Sum, 4>*>(sums + row * Tile::kSumStride + at);
      if (whole) {
        *reinterpret_cast<Pack<Sum, 4>*>(to + row * features) = four;
      } else {
        PYVTK_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i < count) to[row * features + i] = four.numbers[i];
        }
      }
    }
    return;
  }
  float scales[4], biases[4];
  PYVTK_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int64_t of = feature + (i < count ? i : 0);
    scales[i] = end.scales != nullptr ? end.scales[of] : 1.0f;
    biases[i] = end.bias != nullptr ? epilogue_number(end.bias, end.bias_type, of) : 0.0f;
  }
  PYVTK_NOT_UNROLLED
  for (int row = me / kFours; row < rows; row += Tile::kThreads / kFours) {
    const Pack<Sum, 4> four = *reinterpret_cast<const Pack<Sum, 4>*>(sums + row * Tile::kSumStride + at);
    const float x_scale = end.x_scales != nullptr ? end.x_scales[first_row + row] : 1.0f;
    float z[4];
    PYVTK_UNROLL
    for (int i = 0; i < 4; ++i) {
      z[i] = as_float(four.numbers[i]);
      if (end.x_scales != nullptr) z[i] *= x_scale;
      if (end.scales != nullptr) z[i] *= scales[i];
      if (end.bias != nullptr) z[i] += biases[i];
    }
    if (end.activation != Sparse24Activation::none) {
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) z[i] = activated(end.activation, z[i]);
    }
    if (end.mul != nullptr) {
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t of = (first_row + row) * end.mul_stride + feature + (i < count ? i : 0);
        z[i] *= epilogue_number(end.mul, end.out_type, of);
      }
    }
    const int64_t to = (first_row + row) * features + feature;
    const auto store = [&](auto zero) {
      using T = decltype(zero);
      Pack<T, 4> pack;
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) pack.numbers[i] = rounded<T>(z[i]);
      T* out = static_cast<T*>(end.out) + to;
      if (whole) {
        *reinterpret_cast<Pack<T, 4>*>(out) = pack;
      } else {
        PYVTK_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (i < count) out[i] = pack.numbers[i];
        }
      }
    };
    if (end.out_type == Sparse24Number::float32) {
      store(float{});
    } else if (end.out_type == Sparse24Number::bfloat16) {
      store(bfloat16{});
    } else {
      store(float16{});
    }
  }
}

template <class X, int kGroups, int kBlocks, int kRows, int kStages>
__global__ void __launch_bounds__(128 * kGroups, 1) sparse24_wgmma_kernel(const __grid_constant__ Sparse24Launch call) {
#ifdef PYVTK_WGMMA
  using Tile = WgmmaTile<X, kGroups, kBlocks, kRows, kStages>;
  using Sum = typename SumOf<X>::Type;
  unsigned char* shared = dynamic_shared<unsigned char>();
  shared += -shared_address(shared) % Tile::kAlignment;
  const int64_t first_feature = int64_t{blockIdx.x} * Tile::kFeatures, first_row = int64_t{blockIdx.y} * kRows;
  const int64_t begin = int64_t{blockIdx.z} * call.split_depth;
  const int64_t depth = at_most(call.split_depth, call.problem.depth - begin);
  const int stages = static_cast<int>(depth / Tile::kDepth);
  // Of kStages, two are read: the products of one run, those of the next begin.
  constexpr int kAhead = kStages - 2;
  int in = 0, out = 0;  // i % kStages of what is fetched next, and multiplied next
  const auto fetch = [&](int i) {
    if (i < stages) {
      fetch_wgmma_stage<X, Tile>(call.problem, shared + in * Tile::kStageBytes, first_row, first_feature,
                                 begin + int64_t{i} * Tile::kDepth);
    }
    in = in + 1 < kStages ? in + 1 : 0;
    copy_async_commit();
  };
  Sum sums[kBlocks][kRows / 2] = {};
  // Of the stage whose products run, and of the one whose products begin.
  WgmmaMetadata<X, Tile> even, odd;
  const auto multiply = [&](WgmmaMetadata<X, Tile>& metadata) {
    const unsigned char* stage = shared + out * Tile::kStageBytes;
    wgmma_fence_writes();
    __syncthreads();  // this stage is there for all, and the products of the last but one are done for all
    load_metadata<X, Tile>(stage, metadata, call.splits);
    begin_products<X, Tile>(stage, metadata, sums);
    out = out + 1 < kStages ? out + 1 : 0;
  };
  PYVTK_NOT_UNROLLED
  for (int i = 0; i <= kAhead; ++i) fetch(i);
  copy_async_wait<kAhead>();
  multiply(even);  // apart from the others: in the loop, nothing but products may write the sums
  const auto go_on = [&](int i, WgmmaMetadata<X, Tile>& metadata) {
    copy_async_wait<kAhead - 1>();
    multiply(metadata);
    fetch(i + kAhead);
    wgmma_wait<1>();
  };
  PYVTK_NOT_UNROLLED
  for (int i = 1; i < stages; i += 2) {
    go_on(i, odd);
    if (i + 1 < stages) go_on(i + 1, even);
  }
  wgmma_wait<0>();
  copy_async_wait<0>();
  __syncthreads();
  Sum* staged = reinterpret_cast<Sum*>(shared);  // [kRows][kSumStride]
  const int lane = lane_of_warp(), feature = (warp_of_block() * 8 + lane / 4) * (2 * kBlocks);
  PYVTK_UNROLL
  for (int i = 0; i < kRows / 4; ++i) {  // columns of d: two of eight to a lane
    const int row = i / 2 * 8 + lane % 4 * 2 + i % 2;
    Pack<Sum, 2 * kBlocks> pack;
    PYVTK_UNROLL
    for (int j = 0; j < 2 * kBlocks; ++j) pack.numbers[j] = sums[j / 2][i / 2 * 4 + j % 2 * 2 + i % 2];
    *reinterpret_cast<Pack<Sum, 2 * kBlocks>*>(staged + row * Tile::kSumStride + feature) = pack;
  }
  __syncthreads();
  write_wgmma_sums<Tile>(call, staged, first_row, first_feature);
#endif
}

// Launches
// ----------------------------------------------------------------------------------------------------------------

struct Sparse24WgmmaPlan {
  bool fits = false;  // else the product is another kernel's
  int tile = 0;       // with_wgmma_tile
  int splits = 1;
  int64_t split_depth = 0;
  int64_t workspace_bytes(const Sparse24Problem& problem) const {
    return splits > 1 ? 4 * splits * problem.rows * problem.features : 0;
  }
};

// Stages are as many as fit in shared memory, 7 at most.
inline constexpr int kWgmmaTiles = 4;
template <class X, class F>
void with_wgmma_tile(int tile, F f) {
  if (tile == 0) f(WgmmaTile<X, 2, 1, 64, 7>{});
  if (tile == 1) f(WgmmaTile<X, 2, 1, 128, 7>{});
  if (tile == 2) f(WgmmaTile<X, 2, 1, 160, 7>{});
  if (tile == 3) f(WgmmaTile<X, 2, 2, 192, 5>{});
}

template <class X, class Tile>
constexpr auto* wgmma_kernel_of(Tile) {
  return &sparse24_wgmma_kernel<X, Tile::kGroups, Tile::kBlocks, Tile::kRows, Tile::kStages>;
}

// Whether the current device runs these kernels: Hopper, in a build that has code for it.
template <class X>
cudaError_t wgmma_runs(bool& runs) {
  int registers = 0;
  const cudaError_t status = registers_of(wgmma_kernel_of<X>(WgmmaTile<X, 2, 1, 64, 7>{}), registers);
  runs = status == cudaSuccess && registers > 32;  // of sums alone, a thread has so many
  return status;
}

// Tile and split along k. Bytes decide: what the busiest multiprocessor fetches, which the second-level cache gives it
// at some rate, whatever the tile. A block is taken to cost as much as kBegin stages before and behind its own, and
// sums in parts, with a launch that adds them, kParts times a product without.
template <class X>
Sparse24WgmmaPlan plan_sparse24_wgmma(const Sparse24Problem& problem, int multiprocessors) {
  using Any = WgmmaTile<X, 2, 1, 64, 7>;
  constexpr int64_t kSize = sizeof(X), kBegin = 6, kLeastStages = 8;
  constexpr double kParts = 1.3;
  Sparse24WgmmaPlan plan;
  plan.fits = problem.depth > 0 && problem.depth % Any::kDepth == 0 &&
              aligned_to(problem.x, problem.x_stride * kSize, 16) && aligned_to(problem.values, 0, 16) &&
              aligned_to(problem.metadata, 0, Any::kMetadataBytes);
  if (!plan.fits) return plan;
  double least = 0;
  for (int tile = 0; tile < kWgmmaTiles; ++tile) {
    with_wgmma_tile<X>(tile, [&](auto of_type) {
      using Tile = decltype(of_type);
      const int64_t tiles =
          ceil_div<int64_t>(problem.features, Tile::kFeatures) * ceil_div<int64_t>(problem.rows, Tile::kRows);
      const int64_t stages = problem.depth / Tile::kDepth;
      int64_t splits = 1;
      if (4 * tiles < 3 * multiprocessors) {
        splits = at_most(at_most(multiprocessors / at_least(tiles, 1), stages / kLeastStages), 16);
      }
      const int64_t of_split = ceil_div<int64_t>(stages, at_least(splits, 1));
      splits = ceil_div<int64_t>(stages, of_split);
      const int64_t blocks_in_turn = ceil_div<int64_t>(tiles * splits, multiprocessors);
      const double bytes = static_cast<double>(blocks_in_turn * (of_split + kBegin) * Tile::kStageBytes);
      const double cost = bytes * (splits > 1 ? kParts : 1.0);
      if (tile > 0 && cost >= least) return;
      least = cost;
      plan.tile = tile;
      plan.splits = static_cast<int>(splits);
      plan.split_depth = of_split * Tile::kDepth;
    });
  }
  return plan;
}

// workspace: plan.workspace_bytes(problem)
template <class X>
cudaError_t sparse24_linear_wgmma(const Sparse24Problem& problem, const Sparse24WgmmaPlan& plan, void* workspace,
                                  cudaStream_t stream) {
  if (problem.rows == 0 || problem.features == 0) return cudaSuccess;
  Sparse24Launch call;
  call.problem = problem;
  call.workspace = workspace;
  call.splits = plan.splits;
  call.split_depth = plan.split_depth;
  cudaError_t status = cudaErrorInvalidValue;
  with_wgmma_tile<X>(plan.tile, [&](auto tile) {
    using Tile = decltype(tile);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.features, Tile::kFeatures)),
                    static_cast<unsigned>(ceil_div<int64_t>(problem.rows, Tile::kRows)),
                    static_cast<unsigned>(plan.splits));
    status = launch(wgmma_kernel_of<X>(tile), grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
  });
  if (status != cudaSuccess || plan.splits == 1) return status;
  return combine(static_cast<const typename SumOf<X>::Type*>(workspace), plan.splits, problem.rows, problem.features,
                 problem.epilogue, stream);
}

}  // namespace pyvtk::cuda
