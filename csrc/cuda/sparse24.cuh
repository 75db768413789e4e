// Products with 2:4 sparse weights on tensor cores. Meaning: pyvtk/reference/sparse24.py.
//
// mma.sp takes the weight as its sparse operand a (rows: 16 features) and x as b (columns: 8 rows of x), straight from
// the format's own order: nothing is repacked. Types X of x and V of values: bfloat16 or float16 with the same or with
// int8_t (whose values become 16-bit numbers, exactly, on their way), or int8_t twice. Two kernels here, and for many
// rows on Hopper, of x and values of one type, another in sparse24_wgmma.cuh:
//
// many   a block owns 128 features x 64 or 128 rows; stages of x, values and metadata come by cp.async and leave by
//        ldmatrix. Takes every shape and alignment: what lies past a row's end is zeros, with valid metadata.
// few    up to 32 rows, bound by reading the weight: values go from memory to registers, 16 bytes at a time, and are
//        fragments as they are, because the order of k within a sum is free. The map is described at FewTile.
//
// Where there are too few tiles for the device, blocks share a tile along k: each leaves its sum in a workspace, and a
// second launch adds these in order and finishes. Sums are float, or int for int8.
#pragma once
#include "cuda/block.cuh"
#include "cuda/sparse24_problem.cuh"

namespace pyvtk::cuda {

constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t at_least(int64_t a, int64_t b) { return a < b ? b : a; }

// The end of a product
// ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float epilogue_number(const void* numbers, Sparse24Number type, int64_t at) {
  if (type == Sparse24Number::float32) return static_cast<const float*>(numbers)[at];
  if (type == Sparse24Number::bfloat16) return to_float(static_cast<const bfloat16*>(numbers)[at]);
  return to_float(static_cast<const float16*>(numbers)[at]);
}

__device__ __forceinline__ float activated(Sparse24Activation activation, float z) {
  switch (activation) {
    case Sparse24Activation::relu:
      return z < 0.0f ? 0.0f : z;  // a NaN stays
    case Sparse24Activation::gelu:
      return 0.5f * z * (1.0f + erff(z * 0.70710678118654752f));
    case Sparse24Activation::gelu_tanh:
      return 0.5f * z * (1.0f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case Sparse24Activation::quick_gelu:
      return z * (1.0f / (1.0f + expf(-1.702f * z)));
    case Sparse24Activation::silu:
      return z / (1.0f + expf(-z));
    default:
      return z;
  }
}

__device__ inline void finish(const Sparse24Epilogue& end, int64_t features, int64_t row, int64_t feature, float z) {
  if (end.x_scales != nullptr) z *= end.x_scales[row];
  if (end.scales != nullptr) z *= end.scales[feature];
  if (end.bias != nullptr) z += epilogue_number(end.bias, end.bias_type, feature);
  z = activated(end.activation, z);
  if (end.mul != nullptr) z *= epilogue_number(end.mul, end.out_type, row * end.mul_stride + feature);
  const int64_t at = row * features + feature;
  if (end.out_type == Sparse24Number::float32) {
    static_cast<float*>(end.out)[at] = z;
  } else if (end.out_type == Sparse24Number::bfloat16) {
    static_cast<bfloat16*>(end.out)[at] = rounded<bfloat16>(z);
  } else {
    static_cast<float16*>(end.out)[at] = rounded<float16>(z);
  }
}

template <class T>
__device__ __forceinline__ float as_float(T x) {
  return to_float(x);
}
__device__ __forceinline__ float as_float(int x) { return static_cast<float>(x); }

// Adds up `parts` sums of each element, in order, and finishes. part i: parts_of[i * rows * features...]; T: what a
// part is made of (float and int: workspaces; others: a product that somebody else made).
template <class T>
__global__ void __launch_bounds__(256)
    combine_kernel(const T* parts_of, int parts, int64_t rows, int64_t features, Sparse24Epilogue end) {
  const int64_t count = rows * features;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < count; at += step) {
    float z;
    if constexpr (sizeof(T) == 4) {
      T sum = parts_of[at];
      for (int part = 1; part < parts; ++part) sum += parts_of[part * count + at];
      z = as_float(sum);
    } else {
      z = as_float(parts_of[at]);
    }
    finish(end, features, at / features, at % features, z);
  }
}

template <class T>
cudaError_t combine(const T* parts_of, int parts, int64_t rows, int64_t features, const Sparse24Epilogue& end,
                    cudaStream_t stream) {
  if (rows * features == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(rows * features, 256);
  return launch(combine_kernel<T>, dim3(static_cast<unsigned>(blocks < 16384 ? blocks : 16384)), dim3(256), 0, stream,
                parts_of, parts, rows, features, end);
}

// Shared by both kernels
// --------------------------------------------------------------------------------------------------

// What a kernel is called with.
struct Sparse24Launch {
  Sparse24Problem problem;
  void* workspace = nullptr;  // [splits, rows, features] sums, if splits > 1
  int splits = 1;
  int64_t split_depth = 0;  // k of one split; a multiple of what a kernel takes at once
  bool x_aligned = false;   // copies of 16 bytes (many) or 8 (few) fit x
  bool values_aligned = false;
  int metadata_alignment = 1;  // bytes that divide the address of every row
};

template <class X>
struct SumOf {
  using Type = float;
};
template <>
struct SumOf<int8_t> {
  using Type = int;
};

template <class X, int kSelector, class Sum>
__device__ __forceinline__ void mma_sparse(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                           uint32_t metadata) {
  if constexpr (sizeof(X) == 1) {
    mma_sp_m16n8k64(d, a, b, metadata);
  } else {
    mma_sp_m16n8k32<X, kSelector>(d, a, b, metadata);
  }
}

// Two int8 values (the low 16 bits) as 16-bit numbers, exactly: by the mantissa of 2^23, without conversions.
template <class X>
__device__ __forceinline__ uint32_t widened(uint32_t pair) {
  const auto one = [](uint32_t byte) { return __uint_as_float(0x4b000000u | (byte ^ 0x80u)) - 8388736.0f; };
  return rounded<X>(one(pair & 0xffu)).bits | uint32_t{rounded<X>(one(pair >> 8 & 0xffu)).bits} << 16;
}

// Many rows
// ---------------------------------------------------------------------------------------------------------------

template <class X, class V, int kRows_>
struct ManyTile {
  static constexpr int kFeatures = 128;
  static constexpr int kRows = kRows_;
  static constexpr int kThreads = 128;  // 2 x 2 warps, each half of the features and half of the rows
  static constexpr int kSteps = 2;      // mma.sp along k in a stage
  static constexpr int kDepth = kSteps * (sizeof(X) == 1 ? 64 : 32);
  static constexpr int kStages = 3;
  // bytes of one row in a stage
  static constexpr int kXBytes = kDepth * sizeof(X);  // 128
  static constexpr int kValueBytes = kDepth / 2 * sizeof(V);
  static constexpr int kMetadataBytes = kDepth / 8;
  static constexpr int kValuesAt = kRows * kXBytes;
  static constexpr int kMetadataAt = kValuesAt + kFeatures * kValueBytes;
  static constexpr int kStageBytes = kMetadataAt + kFeatures * kMetadataBytes;
  // sums on their way out; four more to a row, so that a warp's writes meet no bank twice
  static constexpr int kSumStride = kFeatures + 4;
  static constexpr int kSumBytes = kRows * kSumStride * 4;
  static constexpr int kSharedBytes = kStages * kStageBytes > kSumBytes ? kStages * kStageBytes : kSumBytes;
  static constexpr int kRowTiles = kRows / 2 / 8;  // of a warp
  static_assert(kXBytes == 128 && kSharedBytes <= 99 * 1024);

  // Where 16 bytes of a row lie: mixed with the row, so that eight rows at one k are in eight places.
  __device__ static int x_at(int row, int piece) { return row * kXBytes + (piece ^ (row & 7)) * 16; }
  __device__ static int values_at(int row, int piece) {
    const int mix = kValueBytes == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return kValuesAt + row * kValueBytes + (piece ^ mix) * 16;
  }
};

// 16 bytes of a row of `size` elements from element `at` on, zeros past the end; for rows that are aligned to no more
// than their elements.
template <class T>
__device__ uint4 gather_piece(const T* row, int64_t at, int64_t size) {
  uint32_t words[4] = {0, 0, 0, 0};
  constexpr int kOfWord = 4 / sizeof(T);
  PYVTK_UNROLL
  for (int i = 0; i < 16 / static_cast<int>(sizeof(T)); ++i) {
    uint32_t bits = 0;
    if (at + i < size) {
      if constexpr (sizeof(T) == 1) {
        bits = static_cast<uint8_t>(row[at + i]);
      } else {
        bits = row[at + i].bits;
      }
    }
    words[i / kOfWord] |= bits << (i % kOfWord * 8 * static_cast<int>(sizeof(T)));
  }
  return {words[0], words[1], words[2], words[3]};
}

// Starts to fetch the stage of k from `depth` on.
template <class X, class V, class Tile>
__device__ void fetch_stage(const Sparse24Launch& call, unsigned char* stage, int64_t first_row, int64_t first_feature,
                            int64_t depth) {
  const Sparse24Problem& problem = call.problem;
  const int me = static_cast<int>(threadIdx.x);
  const X* x = static_cast<const X*>(problem.x);
  constexpr int kOfPiece = 16 / static_cast<int>(sizeof(X));
  const auto x_row = [&](int row) { return x + at_most(first_row + row, problem.rows - 1) * problem.x_stride; };
  if (call.x_aligned) {
    PYVTK_UNROLL
    for (int i = 0; i < Tile::kRows * 8 / Tile::kThreads; ++i) {
      const int row = me / 8 + i * (Tile::kThreads / 8), piece = me % 8;
      const int64_t k = depth + piece * kOfPiece;
      const bool valid = k < problem.depth;
      copy_async<16>(stage + Tile::x_at(row, piece), x_row(row) + (valid ? k : 0), valid);
    }
  } else {
    PYVTK_NOT_UNROLLED
    for (int i = me; i < Tile::kRows * 8; i += Tile::kThreads) {
      *reinterpret_cast<uint4*>(stage + Tile::x_at(i / 8, i % 8)) =
          gather_piece(x_row(i / 8), depth + i % 8 * kOfPiece, problem.depth);
    }
  }
  const V* values = static_cast<const V*>(problem.values);
  const int64_t kept = problem.depth / 2;
  constexpr int kPieces = Tile::kValueBytes / 16;
  constexpr int kOfValues = 16 / static_cast<int>(sizeof(V));
  const auto values_row = [&](int row) { return values + at_most(first_feature + row, problem.features - 1) * kept; };
  if (call.values_aligned) {
    PYVTK_UNROLL
    for (int i = 0; i < Tile::kFeatures * kPieces / Tile::kThreads; ++i) {
      const int row = me / kPieces + i * (Tile::kThreads / kPieces), piece = me % kPieces;
      const int64_t k = depth / 2 + piece * kOfValues;
      const bool valid = k < kept;
      copy_async<16>(stage + Tile::values_at(row, piece), values_row(row) + (valid ? k : 0), valid);
    }
  } else {
    PYVTK_NOT_UNROLLED
    for (int i = me; i < Tile::kFeatures * kPieces; i += Tile::kThreads) {
      *reinterpret_cast<uint4*>(stage + Tile::values_at(i / kPieces, i % kPieces)) =
          gather_piece(values_row(i / kPieces), depth / 2 + i % kPieces * kOfValues, kept);
    }
  }
  const int64_t stride = ceil_div<int64_t>(problem.depth, 8);
  for (int row = me; row < Tile::kFeatures; row += Tile::kThreads) {
    const int64_t last = problem.features - 1, feature = first_feature + row < last ? first_feature + row : last;
    const uint8_t* from = problem.metadata + feature * stride + depth / 8;
    const int64_t left = stride - depth / 8;  // bytes of this row
    unsigned char* to = stage + Tile::kMetadataAt + row * Tile::kMetadataBytes;
    if (left >= Tile::kMetadataBytes && call.metadata_alignment >= Tile::kMetadataBytes) {
      copy_async<Tile::kMetadataBytes>(to, from);
      continue;
    }
    PYVTK_UNROLL
    for (int word = 0; word < Tile::kMetadataBytes / 4; ++word) {
      if (left >= 4 * word + 4 && call.metadata_alignment >= 4) {
        copy_async<4>(to + 4 * word, from + 4 * word);
        continue;
      }
      uint32_t bits = 0;  // past the end: the first two of each group, of values that are zeros
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) bits |= (4 * word + i < left ? from[4 * word + i] : 0x44u) << (8 * i);
      reinterpret_cast<uint32_t*>(to)[word] = bits;
    }
  }
}

template <class X, class V, class Tile, class Sum>
__device__ void multiply_stage(const unsigned char* stage, Sum (&sums)[4][Tile::kRowTiles][4]) {
  const int lane = lane_of_warp(), group = lane / 4, thread = lane % 4;
  const int feature = warp_of_block() % 2 * 64, row = warp_of_block() / 2 * (Tile::kRows / 2);
  uint32_t metadata[4];
  PYVTK_UNROLL
  for (int step = 0; step < Tile::kSteps; ++step) {
    uint32_t a[4][4];
    PYVTK_UNROLL
    for (int tile = 0; tile < 4; ++tile) {
      const int first = feature + tile * 16;
      const unsigned char* codes = stage + Tile::kMetadataAt;
      if constexpr (sizeof(X) == 1) {
        codes += (first + group + 8 * (thread & 1)) * Tile::kMetadataBytes + 8 * step + 4 * (thread / 2);
        metadata[tile] = *reinterpret_cast<const uint32_t*>(codes);
      } else if (step == 0) {  // lanes 0 and 1 of four bring the first step's, the others the second's
        codes += (first + group) * Tile::kMetadataBytes + 2 * thread;
        metadata[tile] = *reinterpret_cast<const uint16_t*>(codes) |
                         uint32_t{*reinterpret_cast<const uint16_t*>(codes + 8 * Tile::kMetadataBytes)} << 16;
      }
      if constexpr (sizeof(V) == sizeof(X)) {
        ldmatrix(a[tile], stage + Tile::values_at(first + lane / 8 % 2 * 8 + lane % 8, 2 * step + lane / 16));
      } else {
        PYVTK_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int at = Tile::values_at(first + group + i % 2 * 8, step) + i / 2 * 8 + thread * 2;
          a[tile][i] = widened<X>(*reinterpret_cast<const uint16_t*>(stage + at));
        }
      }
    }
    PYVTK_UNROLL
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      uint32_t b[4];
      ldmatrix(b, stage + Tile::x_at(row + tile * 8 + lane % 8, 4 * step + lane / 8));
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) {
        if (step == 0) {
          mma_sparse<X, 0>(sums[i][tile], a[i], b, metadata[i]);
        } else {
          mma_sparse<X, 1>(sums[i][tile], a[i], b, metadata[i]);
        }
      }
    }
  }
}

// Writes sums that lie in shared memory, [rows][kStride], to the workspace or to where they belong.
template <int kFeatures, int kStride, class Sum>
__device__ void write_sums(const Sparse24Launch& call, const Sum* sums, int tile_rows, int64_t first_row,
                           int64_t first_feature, int parts, int part_stride) {
  const Sparse24Problem& problem = call.problem;
  Sum* workspace = static_cast<Sum*>(call.workspace) + int64_t{blockIdx.z} * problem.rows * problem.features;
  PYVTK_NOT_UNROLLED
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * kFeatures; i += static_cast<int>(blockDim.x)) {
    const int64_t row = first_row + i / kFeatures, feature = first_feature + i % kFeatures;
    if (row >= problem.rows) return;
    if (feature >= problem.features) continue;
    Sum sum = sums[i / kFeatures * kStride + i % kFeatures];
    for (int part = 1; part < parts; ++part) sum += sums[part * part_stride + i / kFeatures * kStride + i % kFeatures];
    if (call.splits > 1) {
      workspace[row * problem.features + feature] = sum;
    } else {
      finish(problem.epilogue, problem.features, row, feature, as_float(sum));
    }
  }
}

template <class X, class V, int kRows>
__global__ void __launch_bounds__(128, 2) sparse24_many_kernel(const __grid_constant__ Sparse24Launch call) {
  using Tile = ManyTile<X, V, kRows>;
  using Sum = typename SumOf<X>::Type;
  unsigned char* shared = dynamic_shared<unsigned char>();
  const int64_t first_feature = int64_t{blockIdx.x} * Tile::kFeatures, first_row = int64_t{blockIdx.y} * kRows;
  const int64_t begin = int64_t{blockIdx.z} * call.split_depth;
  const int64_t end = begin + call.split_depth < call.problem.depth ? begin + call.split_depth : call.problem.depth;
  const int stages = end > begin ? static_cast<int>(ceil_div<int64_t>(end - begin, Tile::kDepth)) : 0;
  const auto fetch = [&](int i) {
    if (i < stages) {
      fetch_stage<X, V, Tile>(call, shared + i % Tile::kStages * Tile::kStageBytes, first_row, first_feature,
                              begin + int64_t{i} * Tile::kDepth);
    }
    copy_async_commit();
  };
  Sum sums[4][Tile::kRowTiles][4] = {};
  PYVTK_NOT_UNROLLED
  for (int i = 1 - Tile::kStages; i < stages; ++i) {  // the first only fetch
    if (i >= 0) {
      copy_async_wait<Tile::kStages - 2>();
      __syncthreads();  // this stage is there for all, and all are done with the one that comes next
    }
    fetch(i + Tile::kStages - 1);
    if (i >= 0) multiply_stage<X, V, Tile>(shared + i % Tile::kStages * Tile::kStageBytes, sums);
  }
  copy_async_wait<0>();
  __syncthreads();
  Sum* staged = reinterpret_cast<Sum*>(shared);  // [kRows][kSumStride]
  const int lane = lane_of_warp(), group = lane / 4, thread = lane % 4;
  const int feature = warp_of_block() % 2 * 64 + group, row = warp_of_block() / 2 * (kRows / 2) + 2 * thread;
  PYVTK_UNROLL
  for (int i = 0; i < 4; ++i) {
    PYVTK_UNROLL
    for (int tile = 0; tile < Tile::kRowTiles; ++tile) {
      PYVTK_UNROLL
      for (int j = 0; j < 4; ++j) {
        staged[(row + tile * 8 + j % 2) * Tile::kSumStride + feature + i * 16 + j / 2 * 8] = sums[i][tile][j];
      }
    }
  }
  __syncthreads();
  write_sums<Tile::kFeatures, Tile::kSumStride>(call, staged, kRows, first_row, first_feature, 1, 0);
}

// Few rows
// ----------------------------------------------------------------------------------------------------------------

// The order of k. A chunk is 64 bytes of values of each row: lane t = 0..3 of four holds 16 of them, G = 4 groups of
// four k (16 bits) or 8 (int8), real groups G t..G t + G - 1, as they lie in memory; it holds row g and row g + 8.
//
// The chunk feeds kProducts mma.sp. Of 16 bits, product j takes from lane t its groups G t + 2 j (as the fragment's
// group t) and G t + 2 j + 1 (as group t + 4): registers a0 and a2 are the lane's words 2 j and 2 j + 1 (int8 values:
// the halves of word j, widened). Of int8 x, product j takes groups 8 t + 4 j..8 t + 4 j + 3, words 2 j and 2 j + 1
// again, as groups 2 t, 2 t + 1, 8 + 2 t and 9 + 2 t.
//
// Metadata by the same permutation. 16 bits: of product j lane t = 2 selector + c brings groups G s + 2 j + c, s =
// 0..3, for the fragment's 4 c + s; with j = 2 p + selector this is nibble 4 p + t of each fourth of the row's chunk,
// and one register serves two products. int8: lanes bring of row g + 8 (t % 2) byte 2 j + t / 2 of each fourth.
//
// x lies in shared memory so that ldmatrix finds its rows of 16 bytes in the same order: the 16 bytes of a row with
// index p of a chunk belong to product p % kProducts; with s = p / kProducts their first half goes to register s / 2 of
// the fragment b, half s % 2, and their second half to register 2 + s / 2. Both halves travel by copies of 8 bytes.
template <class X, class V, int kRowTiles_>
struct FewTile {
  static constexpr int kRowTiles = kRowTiles_;  // of 8 rows of x
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr bool kWiden = sizeof(V) < sizeof(X);
  static constexpr int kProducts = kWiden ? 4 : 2;
  static constexpr int kDepth = 2 * 64 / static_cast<int>(sizeof(V));  // k of a chunk
  static constexpr int kXBytes = kDepth * static_cast<int>(sizeof(X));
  static constexpr int kMetadataWords = kDepth / 32;
  // A warp: chunks x tiles of 16 features in flight. A block: warps along features x warps along k.
  static constexpr int kFeatureTiles = kRowTiles > 2 ? 2 : 1;
  static constexpr int kChunks = 4 / kFeatureTiles;
  static constexpr int kFeatureWarps = kRowTiles > 1 ? 4 : 2;
  static constexpr int kDepthWarps = kWarps / kFeatureWarps;
  static constexpr int kFeatures = 16 * kFeatureTiles * kFeatureWarps;
  static constexpr int kPanelChunks = kChunks * kDepthWarps;
  static constexpr int kPanelDepth = kPanelChunks * kDepth;
  static constexpr int kPanelRow = kPanelChunks * kXBytes;  // bytes
  static constexpr int kPanelBytes = kRows * kPanelRow;
  static constexpr int kSumStride = kFeatures + 4;
  static constexpr int kSumBytes = kDepthWarps * kRows * kSumStride * 4;
  static constexpr int kSharedBytes = 2 * kPanelBytes > kSumBytes ? 2 * kPanelBytes : kSumBytes;
  static_assert(kSharedBytes <= 99 * 1024);

  // Where 16 bytes of a row's panel lie.
  __device__ static int x_at(int row, int piece) { return row * kPanelRow + (piece ^ (row & 7)) * 16; }
};

// What a lane holds of its warp's part of a panel.
template <class Tile>
struct FewWeights {
  uint4 values[Tile::kFeatureTiles][Tile::kChunks][2];  // rows g and g + 8
  uint32_t metadata[2][Tile::kMetadataWords];           // of chunk t % kChunks, features' tile t / kChunks
};

template <class V, class Tile>
__device__ __forceinline__ void load_weights(const Sparse24Problem& problem, FewWeights<Tile>& weights,
                                             int64_t first_feature, int64_t chunk, int64_t chunks) {
  const int lane = lane_of_warp(), group = lane / 4, thread = lane % 4;
  const auto row_of = [&](int tile, int half) {
    const int64_t row = first_feature + tile * 16 + half * 8 + group, last = problem.features - 1;
    return row < last ? row : last;
  };
  const int64_t row_bytes = problem.depth / 2 * static_cast<int>(sizeof(V));
  PYVTK_UNROLL
  for (int tile = 0; tile < Tile::kFeatureTiles; ++tile) {
    PYVTK_UNROLL
    for (int half = 0; half < 2; ++half) {
      const unsigned char* row = static_cast<const unsigned char*>(problem.values) + row_of(tile, half) * row_bytes;
      PYVTK_UNROLL
      for (int i = 0; i < Tile::kChunks; ++i) {
        weights.values[tile][i][half] = {0, 0, 0, 0};
        if (chunk + i < chunks) {
          weights.values[tile][i][half] = __ldg(reinterpret_cast<const uint4*>(row + (chunk + i) * 64 + thread * 16));
        }
      }
    }
  }
  const int64_t stride = problem.depth / 8, mine = chunk + thread % Tile::kChunks;
  PYVTK_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint8_t* from =
        problem.metadata + row_of(thread / Tile::kChunks, half) * stride + mine * (Tile::kMetadataWords * 4);
    if constexpr (Tile::kMetadataWords == 2) {
      uint2 words = {0x44444444u, 0x44444444u};
      if (mine < chunks) words = __ldg(reinterpret_cast<const uint2*>(from));
      weights.metadata[half][0] = words.x;
      weights.metadata[half][1] = words.y;
    } else {
      uint4 words = {0x44444444u, 0x44444444u, 0x44444444u, 0x44444444u};
      if (mine < chunks) words = __ldg(reinterpret_cast<const uint4*>(from));
      weights.metadata[half][0] = words.x;
      weights.metadata[half][1] = words.y;
      weights.metadata[half][2] = words.z;
      weights.metadata[half][3] = words.w;
    }
  }
}

// The `which`-th nibble of each fourth of a row's chunk.
template <int kWords>
__device__ __forceinline__ uint32_t nibbles(const uint32_t (&words)[kWords], int which) {
  if constexpr (kWords == 2) {
    const uint32_t low = words[0] >> (4 * which) & 0x000f000fu, high = words[1] >> (4 * which) & 0x000f000fu;
    return ((low | low >> 12) & 0xffu) | ((high | high >> 12) & 0xffu) << 8;
  } else {
    uint32_t found = 0;
    PYVTK_UNROLL
    for (int i = 0; i < kWords; ++i) found |= (words[i] >> (4 * which) & 15u) << (4 * i);
    return found;
  }
}

template <class X, class V, class Tile, class Sum>
__device__ __forceinline__ void multiply_panel(const FewWeights<Tile>& weights, const unsigned char* panel,
                                               int first_chunk, Sum (&sums)[Tile::kFeatureTiles][Tile::kRowTiles][4]) {
  const int lane = lane_of_warp(), thread = lane % 4;
  PYVTK_UNROLL
  for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
    uint32_t metadata[Tile::kFeatureTiles][2];  // register i: of products 2 i and 2 i + 1 (int8: product i)
    PYVTK_UNROLL
    for (int tile = 0; tile < Tile::kFeatureTiles; ++tile) {
      uint32_t codes[2][Tile::kMetadataWords];
      PYVTK_UNROLL
      for (int half = 0; half < 2; ++half) {
        PYVTK_UNROLL
        for (int i = 0; i < Tile::kMetadataWords; ++i) {
          codes[half][i] =
              __shfl_sync(kAllLanes, weights.metadata[half][i], (lane & ~3) + tile * Tile::kChunks + chunk);
        }
      }
      PYVTK_UNROLL
      for (int i = 0; i < (sizeof(X) == 1 ? 2 : Tile::kProducts / 2); ++i) {
        if constexpr (sizeof(X) == 1) {
          uint32_t bytes = 0;
          PYVTK_UNROLL
          for (int word = 0; word < 4; ++word) {
            const uint32_t from = thread & 1 ? codes[1][word] : codes[0][word];
            bytes |= (from >> (8 * (2 * i + thread / 2)) & 0xffu) << (8 * word);
          }
          metadata[tile][i] = bytes;
        } else {
          metadata[tile][i] = nibbles(codes[0], 4 * i + thread) | nibbles(codes[1], 4 * i + thread) << 16;
        }
      }
    }
    PYVTK_UNROLL
    for (int product = 0; product < Tile::kProducts; ++product) {
      uint32_t a[Tile::kFeatureTiles][4];
      PYVTK_UNROLL
      for (int tile = 0; tile < Tile::kFeatureTiles; ++tile) {
        PYVTK_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint4& four = weights.values[tile][chunk][half];
          if constexpr (Tile::kWiden) {
            const uint32_t word = product == 0 ? four.x : product == 1 ? four.y : product == 2 ? four.z : four.w;
            a[tile][half] = widened<X>(word & 0xffffu);
            a[tile][2 + half] = widened<X>(word >> 16);
          } else {
            a[tile][half] = product == 0 ? four.x : four.z;
            a[tile][2 + half] = product == 0 ? four.y : four.w;
          }
        }
      }
      const int piece = ((first_chunk + chunk) * Tile::kProducts + product) * 4 + lane / 8;
      PYVTK_UNROLL
      for (int rows = 0; rows < Tile::kRowTiles; ++rows) {
        uint32_t b[4];
        ldmatrix(b, panel + Tile::x_at(rows * 8 + lane % 8, piece));
        PYVTK_UNROLL
        for (int tile = 0; tile < Tile::kFeatureTiles; ++tile) {
          const uint32_t codes = metadata[tile][sizeof(X) == 1 ? product : product / 2];
          if (product % 2 == 0) {
            mma_sparse<X, 0>(sums[tile][rows], a[tile], b, codes);
          } else {
            mma_sparse<X, 1>(sums[tile][rows], a[tile], b, codes);
          }
        }
      }
    }
  }
}

// Without a number of blocks in the bounds: ptxas stays below 128 registers by itself up to 16 rows (two blocks of a
// multiprocessor), but takes all if told 1, and spills if told 2 where int8 is widened on the newest architectures.
template <class X, class V, int kRowTiles>
__global__ void __launch_bounds__(256) sparse24_few_kernel(const __grid_constant__ Sparse24Launch call) {
  using Tile = FewTile<X, V, kRowTiles>;
  using Sum = typename SumOf<X>::Type;
  const Sparse24Problem& problem = call.problem;
  unsigned char* shared = dynamic_shared<unsigned char>();
  const int me = static_cast<int>(threadIdx.x), warp = warp_of_block(), lane = lane_of_warp();
  const int feature_warp = warp % Tile::kFeatureWarps, depth_warp = warp / Tile::kFeatureWarps;
  const int64_t first_feature = int64_t{blockIdx.x} * Tile::kFeatures, first_row = int64_t{blockIdx.y} * Tile::kRows;
  const int rows =
      static_cast<int>(problem.rows - first_row < Tile::kRows ? problem.rows - first_row : int64_t{Tile::kRows});
  const int64_t begin = int64_t{blockIdx.z} * call.split_depth / Tile::kDepth;  // in chunks
  const int64_t all = problem.depth / Tile::kDepth, part = call.split_depth / Tile::kDepth;
  const int64_t end = begin + part < all ? begin + part : all;
  const int panels = end > begin ? static_cast<int>(ceil_div<int64_t>(end - begin, Tile::kPanelChunks)) : 0;

  const auto fetch_x = [&](int i) {
    const int64_t chunk = begin + int64_t{i} * Tile::kPanelChunks;
    unsigned char* panel = shared + i % 2 * Tile::kPanelBytes;
    constexpr int kHalves = Tile::kPanelRow / 8;
    for (int at = me; at < rows * kHalves; at += Tile::kThreads) {
      const int row = at / kHalves, half = at % kHalves;  // the row's 8 bytes with this index in the panel
      const int of = half * 8 / Tile::kXBytes, p = half % (Tile::kXBytes / 8) / 2, s = p / Tile::kProducts;
      const int piece = (of * Tile::kProducts + p % Tile::kProducts) * 4 + s / 2 + half % 2 * 2;
      const bool valid = chunk + of < end;
      const unsigned char* from = reinterpret_cast<const unsigned char*>(static_cast<const X*>(problem.x) +
                                                                         (first_row + row) * problem.x_stride);
      copy_async<8>(panel + Tile::x_at(row, piece) + s % 2 * 8, from + (valid ? chunk * Tile::kXBytes + half * 8 : 0),
                    valid);
    }
  };
  const auto load = [&](FewWeights<Tile>& weights, int i) {
    load_weights<V>(problem, weights, first_feature + feature_warp * 16 * Tile::kFeatureTiles,
                    begin + int64_t{i} * Tile::kPanelChunks + depth_warp * Tile::kChunks, end);
  };
  Sum sums[Tile::kFeatureTiles][kRowTiles][4] = {};
  FewWeights<Tile> weights, next;
  if (panels > 0) {
    load(weights, 0);
    fetch_x(0);
    copy_async_commit();
  }
  PYVTK_NOT_UNROLLED
  for (int i = 0; i < panels; ++i) {
    copy_async_wait<0>();
    __syncthreads();  // the panel is there for all, and all are done with the other one
    if (i + 1 < panels) {
      load(next, i + 1);
      fetch_x(i + 1);
      copy_async_commit();
    }
    multiply_panel<X, V, Tile>(weights, shared + i % 2 * Tile::kPanelBytes, depth_warp * Tile::kChunks, sums);
    weights = next;
  }
  __syncthreads();
  Sum* staged = reinterpret_cast<Sum*>(shared) + depth_warp * Tile::kRows * Tile::kSumStride;
  PYVTK_UNROLL
  for (int tile = 0; tile < Tile::kFeatureTiles; ++tile) {
    PYVTK_UNROLL
    for (int rows_tile = 0; rows_tile < kRowTiles; ++rows_tile) {
      PYVTK_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int feature = (feature_warp * Tile::kFeatureTiles + tile) * 16 + j / 2 * 8 + lane / 4;
        staged[(rows_tile * 8 + lane % 4 * 2 + j % 2) * Tile::kSumStride + feature] = sums[tile][rows_tile][j];
      }
    }
  }
  __syncthreads();
  write_sums<Tile::kFeatures, Tile::kSumStride>(call, reinterpret_cast<const Sum*>(shared), Tile::kRows, first_row,
                                                first_feature, Tile::kDepthWarps, Tile::kRows * Tile::kSumStride);
}

// Launches
// ----------------------------------------------------------------------------------------------------------------

struct Sparse24Plan {
  int row_tile = 64;  // many: rows of a block, 64 or 128; few: tiles of 8 rows, 1, 2 or 4
  bool few = false;
  int splits = 1;
  int64_t split_depth = 0;
  // bytes; sums have 4
  int64_t workspace_bytes(const Sparse24Problem& problem) const {
    return splits > 1 ? 4 * splits * problem.rows * problem.features : 0;
  }
};

inline bool aligned_to(const void* address, int64_t stride_bytes, int64_t alignment) {
  return reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) == 0 && stride_bytes % alignment == 0;
}

// More than the kernel for few rows holds: from here on a product is the other kernel's.
inline constexpr int64_t kFewRowsBelow = FewTile<bfloat16, bfloat16, 4>::kRows + 1;

// Which kernel, tile and split along k. `wants_few` is a wish: it holds below kFewRowsBelow, for a weight and an x that
// fit the kernel's loads; else the other kernel reads the weight once as well, up to 64 rows.
template <class X, class V>
Sparse24Plan plan_sparse24(const Sparse24Problem& problem, bool wants_few, int multiprocessors) {
  using Few = FewTile<X, V, 1>;
  Sparse24Plan plan;
  plan.few = wants_few && problem.rows < kFewRowsBelow && problem.depth > 0 && problem.depth % Few::kDepth == 0 &&
             aligned_to(problem.values, 0, 16) && aligned_to(problem.metadata, 0, 4 * Few::kMetadataWords) &&
             aligned_to(problem.x, problem.x_stride * static_cast<int64_t>(sizeof(X)), 8);
  const auto split = [&](int64_t tiles, int64_t unit, int64_t units_at_least, int64_t blocks) {
    const int64_t units = ceil_div<int64_t>(problem.depth, unit);
    int64_t splits = 1;
    if (4 * tiles < 3 * multiprocessors) splits = at_most(blocks / at_least(tiles, 1), units / units_at_least);
    const int64_t of_split = at_least(ceil_div<int64_t>(units, at_most(at_least(splits, 1), 16)), 1);
    plan.split_depth = of_split * unit;
    plan.splits = static_cast<int>(at_least(ceil_div<int64_t>(units, of_split), 1));
  };
  if (plan.few) {
    plan.row_tile = problem.rows <= 8 ? 1 : problem.rows <= 16 ? 2 : 4;
    const auto with = [&](auto tile) {
      using Tile = decltype(tile);
      split(ceil_div<int64_t>(problem.features, Tile::kFeatures), Tile::kPanelDepth, 2, multiprocessors);
    };
    if (plan.row_tile == 1) with(FewTile<X, V, 1>{});
    if (plan.row_tile == 2) with(FewTile<X, V, 2>{});
    if (plan.row_tile == 4) with(FewTile<X, V, 4>{});
  } else {
    const int64_t tiles = ceil_div<int64_t>(problem.features, 128);
    plan.row_tile = problem.rows > 64 && tiles * ceil_div<int64_t>(problem.rows, 128) >= multiprocessors ? 128 : 64;
    split(tiles * ceil_div<int64_t>(problem.rows, plan.row_tile), ManyTile<X, V, 64>::kDepth, 8,
          2 * int64_t{multiprocessors});
  }
  return plan;
}

// workspace: plan.workspace_bytes(problem)
template <class X, class V>
cudaError_t sparse24_linear(const Sparse24Problem& problem, const Sparse24Plan& plan, void* workspace,
                            cudaStream_t stream) {
  if (problem.rows == 0 || problem.features == 0) return cudaSuccess;
  constexpr int64_t kX = sizeof(X), kV = sizeof(V);
  Sparse24Launch call;
  call.problem = problem;
  call.workspace = workspace;
  call.splits = plan.splits;
  call.split_depth = plan.split_depth;
  call.x_aligned = aligned_to(problem.x, problem.x_stride * kX, 16) && problem.depth * kX % 16 == 0;
  call.values_aligned = aligned_to(problem.values, problem.depth / 2 * kV, 16);
  for (const int alignment : {4, 8, 16}) {
    if (aligned_to(problem.metadata, ceil_div<int64_t>(problem.depth, 8), alignment))
      call.metadata_alignment = alignment;
  }
  const auto grid = [&](int64_t features, int64_t rows) {
    return dim3(static_cast<unsigned>(ceil_div<int64_t>(problem.features, features)),
                static_cast<unsigned>(ceil_div<int64_t>(problem.rows, rows)), static_cast<unsigned>(plan.splits));
  };
  cudaError_t status = cudaErrorInvalidValue;
  const auto start = [&](auto tile, auto* kernel) {
    using Tile = decltype(tile);
    status = launch(kernel, grid(Tile::kFeatures, Tile::kRows), dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
  };
  if (plan.few && plan.row_tile == 1) {
    start(FewTile<X, V, 1>{}, sparse24_few_kernel<X, V, 1>);
  } else if (plan.few && plan.row_tile == 2) {
    start(FewTile<X, V, 2>{}, sparse24_few_kernel<X, V, 2>);
  } else if (plan.few) {
    start(FewTile<X, V, 4>{}, sparse24_few_kernel<X, V, 4>);
  } else if (plan.row_tile == 64) {
    start(ManyTile<X, V, 64>{}, sparse24_many_kernel<X, V, 64>);
  } else {
    start(ManyTile<X, V, 128>{}, sparse24_many_kernel<X, V, 128>);
  }
  if (status != cudaSuccess || plan.splits == 1) return status;
  using Sum = typename SumOf<X>::Type;
  return combine(static_cast<const Sum*>(workspace), plan.splits, problem.rows, problem.features, problem.epilogue,
                 stream);
}

// x to int8
// -----------------------------------------------------------------------------------------------------------------

// A block per row: q = clamp(round(x / s), -127, 127), half to even, with zeros behind up to q_stride; scales[row] = s,
// and NaN for rows that hold a NaN, or an infinity of which no scale is known.
template <class T>
__global__ void __launch_bounds__(256) quantize_kernel(const T* x, int64_t x_stride, int64_t depth,
                                                       const float* x_scale,  // [1], or null: max |x| / 127 of the row
                                                       int8_t* q, int64_t q_stride, float* scales) {
  PYVTK_SHARED(largest_of, uint32_t[kMostWarps]);
  const T* row = x + int64_t{blockIdx.x} * x_stride;
  uint32_t largest = 0;  // bits of non-negative numbers have the order of the numbers, and NaN comes last
  for (int64_t k = threadIdx.x; k < depth; k += blockDim.x) {
    largest = max(largest, __float_as_uint(to_float(row[k])) & 0x7fffffffu);
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane_of_warp() == 0) largest_of[warp_of_block()] = largest;
  __syncthreads();
  largest = lane_of_warp() < warps_of_block() ? largest_of[lane_of_warp()] : 0;
  largest = __reduce_max_sync(kAllLanes, largest);
  const float most = __uint_as_float(largest);
  float scale = x_scale != nullptr ? *x_scale : most / 127.0f;
  if (x_scale == nullptr && scale == 0.0f) scale = 1.0f;
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (threadIdx.x == 0) {
    const bool lost = largest > kInfinity || (x_scale == nullptr && largest == kInfinity);
    scales[blockIdx.x] = lost ? __uint_as_float(0x7fc00000u) : scale;
  }
  uint32_t* to = reinterpret_cast<uint32_t*>(q + int64_t{blockIdx.x} * q_stride);
  for (int64_t word = threadIdx.x; word < q_stride / 4; word += blockDim.x) {
    uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
      if (4 * word + i >= depth) continue;
      const float quotient = rintf(to_float(row[4 * word + i]) / scale);
      const float bounded = fminf(fmaxf(quotient, -127.0f), 127.0f);  // a NaN becomes a number here; its row is lost
      bytes |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int>(bounded))) << (8 * i);
    }
    to[word] = bytes;
  }
}

// q: [rows, q_stride] with q_stride a multiple of 16
template <class T>
cudaError_t quantize(const T* x, int64_t rows, int64_t x_stride, int64_t depth, const float* x_scale, int8_t* q,
                     int64_t q_stride, float* scales, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch(quantize_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(256), 0, stream, x, x_stride, depth,
                x_scale, q, q_stride, scales);
}

// The format
// ----------------------------------------------------------------------------------------------------------------

// A thread per byte of metadata. T: an unsigned integer of the element's size. Of a group of four that does not keep
// exactly two the first two are kept, and *wrong becomes 1 (unless wrong is null: nobody asks).
template <class T>
__global__ void __launch_bounds__(256)
    compress_kernel(const T* weight, int64_t weight_stride, const bool* mask, int64_t mask_stride, int64_t features,
                    int64_t depth, T* values, uint8_t* metadata, int* wrong) {
  const int64_t bytes = ceil_div<int64_t>(depth, 8), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < features * bytes; at += step) {
    const int64_t feature = at / bytes, first = at % bytes * 8;
    uint32_t code = 0;
    for (int group = 0; group < 2; ++group) {
      const int64_t k = first + 4 * group;
      uint32_t nibble = 4;
      if (k < depth) {
        uint32_t kept = 0;
        for (int i = 0; i < 4; ++i) kept |= static_cast<uint32_t>(mask[feature * mask_stride + k + i]) << i;
        if (__popc(kept) != 2) {
          if (wrong != nullptr) atomicExch(wrong, 1);
          kept = 3;
        }
        const int low = __ffs(static_cast<int>(kept)) - 1, high = 31 - __clz(static_cast<int>(kept));
        nibble = static_cast<uint32_t>(low | high << 2);
        T* to = values + feature * (depth / 2) + k / 2;
        to[0] = weight[feature * weight_stride + k + low];
        to[1] = weight[feature * weight_stride + k + high];
      }
      code |= nibble << (4 * group);
    }
    metadata[at] = static_cast<uint8_t>(code);
  }
}

// A thread per group of four. Out: T, or float for int8_t with scales.
template <class T, class Out>
__global__ void __launch_bounds__(256) decompress_kernel(const T* values, const uint8_t* metadata,
                                                         const float* scales,  // [features], for float of int8_t
                                                         int64_t features, int64_t depth, Out* dense) {
  const int64_t groups = depth / 4, bytes = ceil_div<int64_t>(depth, 8), step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t at = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; at < features * groups; at += step) {
    const int64_t feature = at / groups, group = at % groups;
    const uint32_t nibble = metadata[feature * bytes + group / 2] >> (group % 2 * 4) & 15u;
    const T low = values[2 * at], high = values[2 * at + 1];
    for (uint32_t i = 0; i < 4; ++i) {
      // of a nibble that keeps one position twice, the second value stays
      const bool is_high = i == nibble >> 2, is_low = i == (nibble & 3u) && !is_high;
      const T kept = is_high ? high : is_low ? low : T{};
      if constexpr (std::is_same_v<T, Out>) {
        dense[4 * at + i] = kept;
      } else {
        dense[4 * at + i] = static_cast<float>(kept) * scales[feature];
      }
    }
  }
}

inline dim3 blocks_for(int64_t threads) {
  return dim3(static_cast<unsigned>(at_most(ceil_div<int64_t>(threads, 256), 65536)));
}

template <class T>
cudaError_t compress(const T* weight, int64_t weight_stride, const bool* mask, int64_t mask_stride, int64_t features,
                     int64_t depth, T* values, uint8_t* metadata, int* wrong, cudaStream_t stream) {
  const int64_t threads = features * ceil_div<int64_t>(depth, 8);
  if (threads == 0) return cudaSuccess;
  return launch(compress_kernel<T>, blocks_for(threads), dim3(256), 0, stream, weight, weight_stride, mask, mask_stride,
                features, depth, values, metadata, wrong);
}

template <class T, class Out>
cudaError_t decompress(const T* values, const uint8_t* metadata, const float* scales, int64_t features, int64_t depth,
                       Out* dense, cudaStream_t stream) {
  if (features * depth == 0) return cudaSuccess;
  return launch(decompress_kernel<T, Out>, blocks_for(features * depth / 4), dim3(256), 0, stream, values, metadata,
                scales, features, depth, dense);
}

}  // namespace pyvtk::cuda
