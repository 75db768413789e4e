// Products with 2:4 sparse weights on tensor cores. Meaning: pyvtk/reference/sparse24.py.
//
// mma.sp takes the weight as its sparse operand a (rows: 16 features) and x as b (columns: 8 rows of x), straight from
// the format's own order: nothing is repacked. Types X of x and V of values: bfloat16 or float16 with the same or with
// int8_t (whose values become 16-bit numbers, exactly, on their way), or int8_t twice. Two kernels here, and for many
// rows on Hopper, of x and values of one type, another in sparse24_wgmma.cuh:
//
// many   a block owns 128 features x 64 or 128 rows; stages of x, values and metadata come by cp.async and leave by
//        ldmatrix. Takes every shape and alignment: what lies past a row's end is zeros, with valid metadata.
// few    up to 32 rows, bound by reading the weight: every multiprocessor reads an equal share, warp by warp, and a
//        fragment is what ldmatrix makes of it, because the order of k within a sum is free. See FewTile.
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
  const int64_t feature = int64_t{blockIdx.x} * blockDim.x + threadIdx.x, count = rows * features;
  await_previous_launch();
  if (feature >= features) return;
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    const T* from = parts_of + row * features + feature;
    float z;
    if constexpr (sizeof(T) == 4) {
      T sum = *from;
      for (int part = 1; part < parts; ++part) sum += from[part * count];
      z = as_float(sum);
    } else {
      z = as_float(*from);
    }
    finish(end, features, row, feature, z);
  }
}

template <class T>
cudaError_t combine(const T* parts_of, int parts, int64_t rows, int64_t features, const Sparse24Epilogue& end,
                    cudaStream_t stream) {
  if (rows * features == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(features, 256)), static_cast<unsigned>(at_most(rows, 4096)));
  return launch_early(combine_kernel<T>, grid, dim3(256), 0, stream, parts_of, parts, rows, features, end);
}

// Shared by both kernels
// --------------------------------------------------------------------------------------------------

// What the kernel for many rows is called with.
struct Sparse24Launch {
  Sparse24Problem problem;
  void* workspace = nullptr;  // [splits, rows, features] sums, if splits > 1
  int splits = 1;
  int64_t split_depth = 0;  // k of one split; a multiple of a stage's
  bool x_aligned = false;   // copies of 16 bytes fit x
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

// Two int8 values, of half kHalf of a word, as 16-bit numbers, exactly. bfloat16: 128 and the low seven bits are one
// number by the bits, 128 or (of a negative one) 256 another; their difference is the value. float16: 1024 and the
// value plus 128, less 1152.
template <class X, int kHalf = 0>
__device__ __forceinline__ uint32_t widened(uint32_t word) {
  constexpr uint32_t kSpread = kHalf == 0 ? 0x4140 : 0x4342;
  if constexpr (std::is_same_v<X, bfloat16>) {
    const uint32_t pair = __byte_perm(word, 0x43434343u, kSpread);
    return difference_of_pairs<X>(pair & 0xff7fff7fu, pair & 0xff80ff80u);
  } else {
    return difference_of_pairs<X>(__byte_perm(word ^ 0x80808080u, 0x64646464u, kSpread), 0x64806480u);
  }
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
      if constexpr (sizeof(T) == 4) {
        bits = std::bit_cast<uint32_t>(row[at + i]);
      } else if constexpr (sizeof(T) == 1) {
        bits = static_cast<uint8_t>(row[at + i]);
      } else {
        bits = row[at + i].bits;
      }
    }
    words[i / kOfWord] |= bits << (i % kOfWord * (sizeof(T) == 4 ? 0 : 8 * static_cast<int>(sizeof(T))));
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
//
// Bound by reading the weight, so what counts is how many bytes are on their way at any time, and that every
// multiprocessor reads as many. A block owns some features, evenly cut and no multiple of anything, and a split of k.
// Its warps share nothing until the end: each takes every so-manieth slice of 128 k, with all of the block's features,
// in units of 16 of these. A unit comes by cp.async to the warp's own ring of kStages, so no barrier of the block is in
// the way; x of a slice comes with the slice's first unit and stays in registers for the others. Sums lie in shared
// memory: so one piece of code is enough for any number of units to a slice, and a cold call fetches little of it.
// Warps wait for their own instructions as well: with 8 of them, an H200 took longer for int8 values (21.5 us) than for
// the bytes of bfloat16 ones, nearly twice as many (19.7 us). So there are up to 16, with shallow rings.
//
// The order of k within a sum is free, and chosen so that what ldmatrix brings of 16 bytes of metadata (lane t of four:
// word t of row g, and of row g + 8) is what mma.sp wants. A piece is 16 bytes of a row's values.
//
// 16 bits: piece p is groups 4 p..4 p + 3, their metadata half p % 2 of word p / 2. Product j takes pieces
// 4 (j / 2) + j % 2 and the next but one, and half j % 2 of the words: selector j / 2 finds the two in lanes 2 (j / 2)
// and 2 (j / 2) + 1.
//
// int8, widened: piece p is groups 8 p..8 p + 7, their metadata word p. A lane widens four values of a piece, two
// groups: of pieces 2 (j / 2) and 2 (j / 2) + 1, product j takes the groups with a number whose parity is j's.
// Metadata: these nibbles of a word, side by side.
//
// int8 twice: pieces are the same. Lanes want the word of row g + 8 (t % 2), which they read themselves: word
// 2 (t / 2) + j for product j, of pieces j and j + 2.
template <class X, class V, int kRowTiles_>
struct FewTile {
  static constexpr int kRowTiles = kRowTiles_;  // of 8 rows of x
  static constexpr int kRows = 8 * kRowTiles;
  // Twice 8 would leave fragments of x of 32 rows no registers. With int8 x, the blocks that make it and a block of
  // this kernel are on a multiprocessor together.
  static constexpr int kMostWarps = kRowTiles > 2 ? 8 : sizeof(X) == 1 ? 12 : 16;
  static constexpr bool kWiden = sizeof(V) < sizeof(X);
  static constexpr int kDepth = 128;  // k of a slice
  static constexpr int kProducts = sizeof(X) == 1 ? 2 : 4;
  static constexpr int kStages = sizeof(V) == 2 && kRowTiles > 1 ? 3 : 4;
  static constexpr int kValueBytes = kDepth / 2 * static_cast<int>(sizeof(V));  // of a feature in a unit
  static constexpr int kPieces = kValueBytes / 16;
  static constexpr int kPieceDepth = kDepth / kPieces;
  static constexpr int kMetadataAt = 16 * kValueBytes;
  static constexpr int kMetadataBytes = kDepth / 8;
  static constexpr int kUnitBytes = kMetadataAt + 16 * kMetadataBytes;
  static constexpr int kXBytes = kDepth * static_cast<int>(sizeof(X));  // of a row in a slice
  static constexpr int kSliceBytes = kRows * kXBytes;
  static constexpr int kSumBytes = 16 * kRows * 4;  // of a unit

  // Where 16 bytes of a row lie, so that ldmatrix meets no bank twice.
  __device__ static int values_at(int row, int piece) {
    const int mix = kPieces == 8 ? row & 7 : row >> 1 & 3;
    return row * kValueBytes + (piece ^ mix) * 16;
  }
  __device__ static int x_at(int row, int piece) { return row * kXBytes + (piece ^ (row & 7)) * 16; }

  // Slices of x that a warp holds: units are fetched kStages - 1 ahead.
  static constexpr int slots(int tiles) { return (kStages - 2 + tiles) / tiles + 1; }
  static constexpr int warp_bytes(int tiles) {
    return kStages * kUnitBytes + slots(tiles) * kSliceBytes + tiles * kSumBytes;
  }
};

// What the kernel is called with.
struct Sparse24FewLaunch {
  Sparse24Problem problem;
  void* workspace = nullptr;  // [splits, rows, features] sums, if splits > 1
  int splits = 1;
  int slices = 0;          // of a split
  int features = 0;        // of a block
  int tiles = 0;           // of 16 of them
  bool x_follows = false;  // the launch before makes x
};

// Two of the words of metadata of a lane, of rows g and g + 8, as registers of products with j % 2 = 0 and 1.
template <bool kWiden>
__device__ __forceinline__ void metadata_of_products(const uint32_t (&words)[2], uint32_t (&codes)[2]) {
  if constexpr (kWiden) {
    uint32_t even[2], odd[2];  // of each four nibbles with one number: two in byte 0, two in byte 2
    PYVTK_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t low = words[i] & 0x0f0f0f0fu, high = words[i] & 0xf0f0f0f0u;
      even[i] = low | low >> 4;
      odd[i] = high >> 4 | high >> 8;
    }
    codes[0] = __byte_perm(even[0], even[1], 0x6420);
    codes[1] = __byte_perm(odd[0], odd[1], 0x6420);
  } else {
    codes[0] = __byte_perm(words[0], words[1], 0x5410);
    codes[1] = __byte_perm(words[0], words[1], 0x7632);
  }
}

// What a lane needs to fetch and to multiply: places in memory, and in shared memory from its start. All of it is made
// once, and kept: ptxas would make it anew for every unit, in twice the instructions of the product itself.
template <class X, class V, class Tile>
struct FewLane {
  static constexpr int kAtOnce = 32 / Tile::kPieces;  // rows of values
  static constexpr int kXSize = Tile::kWiden ? 8 : 16;
  static constexpr int kXPieces = Tile::kXBytes / kXSize, kXAtOnce = 32 / kXPieces;  // of x

  const unsigned char* values;    // of the next unit, this lane's piece of its first row
  const unsigned char* metadata;  // 8 bytes
  const unsigned char* x;         // of the next slice
  int64_t values_step, values_turn, metadata_step, metadata_turn, rows_step, x_step, x_rows_step;
  unsigned stage;                               // where the next unit goes
  unsigned slot;                                // where the next slice goes
  unsigned to_values, to_metadata, to_x;        // in a unit, in a slice
  unsigned from_values, from_metadata, from_x;  // the same for products: other pieces by xor, see values_at and x_at
  int values_depth, metadata_depth, x_depth;    // what is left of k, at this lane's pieces of the next unit and slice
  int values_row, metadata_row, x_row;

  __device__ FewLane(const Sparse24Problem& problem, int64_t first_feature, int slice, int warps, int tiles) {
    const int lane = lane_of_warp();
    const int64_t row_bytes = problem.depth / 2 * static_cast<int>(sizeof(V)), codes_bytes = problem.depth / 8;
    const int64_t x_bytes = problem.x_stride * static_cast<int64_t>(sizeof(X));
    const int depth = static_cast<int>(problem.depth) - slice * Tile::kDepth;
    const int piece = lane % Tile::kPieces, x_piece = lane % kXPieces;
    values_row = lane / Tile::kPieces;
    metadata_row = lane / 2;
    x_row = lane / kXPieces;
    values = static_cast<const unsigned char*>(problem.values) + (first_feature + values_row) * row_bytes +
             int64_t{slice} * Tile::kValueBytes + piece * 16;
    metadata = problem.metadata + (first_feature + metadata_row) * codes_bytes + int64_t{slice} * Tile::kMetadataBytes +
               lane % 2 * 8;
    x = static_cast<const unsigned char*>(problem.x) + x_row * x_bytes + int64_t{slice} * Tile::kXBytes +
        x_piece * kXSize;
    values_step = 16 * row_bytes;
    values_turn = int64_t{warps} * Tile::kValueBytes - tiles * values_step;
    metadata_step = 16 * codes_bytes;
    metadata_turn = int64_t{warps} * Tile::kMetadataBytes - tiles * metadata_step;
    rows_step = kAtOnce * row_bytes;
    x_step = int64_t{warps} * Tile::kXBytes;
    x_rows_step = kXAtOnce * x_bytes;
    to_values = static_cast<unsigned>(Tile::values_at(values_row, piece));
    to_metadata = static_cast<unsigned>(Tile::kMetadataAt + lane * 8);
    values_depth = depth - piece * Tile::kPieceDepth;
    metadata_depth = depth - lane % 2 * 64;
    x_depth = depth - x_piece * kXSize / static_cast<int>(sizeof(X));
    if constexpr (Tile::kWiden) {  // groups of k with one parity side by side, see x_piece_of
      const int group = x_piece % 8;
      to_x = static_cast<unsigned>(Tile::x_at(x_row, x_piece / 8 * 4 + group % 2 * 2 + group / 4) + group / 2 % 2 * 8);
    } else {
      to_x = static_cast<unsigned>(Tile::x_at(x_row, x_piece));
    }
    const int half = lane / 16;
    from_metadata = static_cast<unsigned>(
        Tile::kMetadataAt + (sizeof(X) == 1 ? (lane / 4 + lane % 2 * 8) * Tile::kMetadataBytes + lane % 4 / 2 * 8
                                            : lane % 16 * Tile::kMetadataBytes));
    from_values = static_cast<unsigned>(Tile::values_at(lane % 16, Tile::kWiden ? half : 2 * half));
    from_x = static_cast<unsigned>(Tile::x_at(lane % 8, half * 4 + lane / 8 % 2));
    stay(values), stay(metadata), stay(x);
    stay(values_step), stay(values_turn), stay(metadata_step), stay(metadata_turn), stay(rows_step), stay(x_step);
    stay(x_rows_step);
    stay(to_values), stay(to_metadata), stay(to_x), stay(from_values), stay(from_metadata), stay(from_x);
    stay(values_depth), stay(metadata_depth), stay(x_depth), stay(values_row), stay(metadata_row), stay(x_row);
  }
};

// Starts to fetch x of the next slice; zeros past the end of a row, and for rows that are none.
template <class X, class V, class Tile>
__device__ __forceinline__ void fetch_slice(FewLane<X, V, Tile>& lane, unsigned char* shared, int rows, int warps) {
  using Lane = FewLane<X, V, Tile>;
  const unsigned char* from = lane.x;
  PYVTK_UNROLL
  for (int i = 0; i < Tile::kRows / Lane::kXAtOnce; ++i) {
    const int row = i * Lane::kXAtOnce;  // and x_row, which is less than kXAtOnce
    const unsigned to = (lane.slot + lane.to_x) ^ static_cast<unsigned>(row % 8 * 16);
    copy_async<Lane::kXSize>(shared + to + row * Tile::kXBytes, from, lane.x_depth > 0 && row + lane.x_row < rows);
    from += lane.x_rows_step;
  }
  lane.x += lane.x_step;
  lane.x_depth -= warps * Tile::kDepth;
}

// Starts to fetch the next unit: 16 features, those of them that the block has.
template <class X, class V, class Tile>
__device__ __forceinline__ void fetch_unit(FewLane<X, V, Tile>& lane, unsigned char* shared, unsigned char* copied,
                                           int features) {
  using Lane = FewLane<X, V, Tile>;
  const unsigned char* from = lane.values;
  PYVTK_UNROLL
  for (int i = 0; i < 16 / Lane::kAtOnce; ++i) {
    const int row = i * Lane::kAtOnce;
    const unsigned to = (lane.stage + lane.to_values) ^ static_cast<unsigned>(Tile::kPieces == 8 ? row % 8 * 16 : 0);
    copy_async<16>(copied + to + row * Tile::kValueBytes, from,
                   lane.values_depth > 0 && row + lane.values_row < features);
    from += lane.rows_step;
  }
  const unsigned codes = lane.stage + lane.to_metadata;
  if (lane.metadata_depth > 0 && lane.metadata_row < features) {
    copy_async<8>(copied + codes, lane.metadata);
  } else {  // the first two of each group, of values that are zeros
    *reinterpret_cast<uint2*>(shared + codes) = {0x44444444u, 0x44444444u};
  }
  lane.values += lane.values_step;
  lane.metadata += lane.metadata_step;
}

// The index of 16 bytes of x for the first two matrices of product j's b, less lane / 8 % 2. For the other two it is
// further by 4. Widened int8 values need groups of k with one parity side by side: there x is stored in that order.
template <class Tile>
__device__ constexpr int x_piece_of(int j) {
  if (Tile::kWiden) return 8 * (j / 2) + 2 * (j % 2);
  return Tile::kProducts == 2 ? 2 * j : 8 * (j / 2) + 2 * (j % 2);
}

// sums += a unit times x's fragments b.
//   values, codes: where this lane's are in the unit
template <class X, class Tile, class Sum>
__device__ __forceinline__ void multiply_unit(unsigned char* shared, unsigned char* copied, unsigned unit,
                                              unsigned values, unsigned codes,
                                              const uint32_t (&b)[Tile::kProducts][Tile::kRowTiles][4],
                                              Sum (&sums)[Tile::kRowTiles][4]) {
  const auto load = [&](auto& a, int piece) {
    ldmatrix(a, copied + ((unit + values) ^ static_cast<unsigned>(piece * 16)));
  };
  if constexpr (sizeof(X) == 1) {
    const uint2 words = *reinterpret_cast<const uint2*>(shared + unit + codes);
    PYVTK_UNROLL
    for (int j = 0; j < 2; ++j) {
      uint32_t a[4];
      load(a, j);
      PYVTK_UNROLL
      for (int r = 0; r < Tile::kRowTiles; ++r) mma_sparse<X, 0>(sums[r], a, b[j][r], j == 0 ? words.x : words.y);
    }
  } else {
    uint32_t words[2], metadata[2];
    ldmatrix(words, copied + unit + codes);
    metadata_of_products<Tile::kWiden>(words, metadata);
    PYVTK_UNROLL
    for (int selector = 0; selector < 2; ++selector) {
      uint32_t a[2][4];
      if constexpr (Tile::kWiden) {
        uint32_t packed[4];
        load(packed, 2 * selector);
        PYVTK_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[0][i] = widened<X, 0>(packed[i]);
          a[1][i] = widened<X, 1>(packed[i]);
        }
      } else {
        load(a[0], 4 * selector);
        load(a[1], 4 * selector + 1);
      }
      PYVTK_UNROLL
      for (int j = 0; j < 2; ++j) {
        PYVTK_UNROLL
        for (int r = 0; r < Tile::kRowTiles; ++r) {
          if (selector == 0) mma_sparse<X, 0>(sums[r], a[j], b[j][r], metadata[j]);
          if (selector == 1) mma_sparse<X, 1>(sums[r], a[j], b[2 + j][r], metadata[j]);
        }
      }
    }
  }
}

// Blocks: [features' blocks, splits]. Shared memory: of each warp its ring of units and its slices of x, then sums of
// all warps [warps][tiles][kRowTiles][lanes][4].
template <class X, class V, int kRowTiles>
__global__ void __launch_bounds__(32 * FewTile<X, V, kRowTiles>::kMostWarps)
    sparse24_few_kernel(const __grid_constant__ Sparse24FewLaunch call) {
  using Tile = FewTile<X, V, kRowTiles>;
  using Sum = typename SumOf<X>::Type;
  let_next_launch_start();
  const Sparse24Problem& problem = call.problem;
  const int warp = warp_of_block(), warps = warps_of_block(), tiles = call.tiles;
  const int rows = static_cast<int>(problem.rows);
  unsigned char* shared = dynamic_shared<unsigned char>();
  unsigned char* copied = shared;  // for cp.async and ldmatrix
  stay(copied);
  const int64_t first_feature = int64_t{blockIdx.x} * call.features;
  const int features = static_cast<int>(at_most(call.features, problem.features - first_feature));
  const int all = static_cast<int>(ceil_div<int64_t>(problem.depth, Tile::kDepth));
  const int begin = static_cast<int>(blockIdx.y) * call.slices + warp;
  const int end = static_cast<int>(at_most(all, (int64_t{blockIdx.y} + 1) * call.slices));
  const int my_slices = end > begin ? ceil_div(end - begin, warps) : 0;

  const int slots = Tile::slots(tiles), in_flight = Tile::kStages * Tile::kUnitBytes + slots * Tile::kSliceBytes;
  const auto ring = static_cast<unsigned>(warp * in_flight);
  const unsigned ring_end = ring + Tile::kStages * Tile::kUnitBytes;
  const unsigned slots_end = ring_end + static_cast<unsigned>(slots) * Tile::kSliceBytes;
  unsigned char* sums_of = shared + warps * in_flight;
  auto kept = static_cast<unsigned>(warp * tiles * Tile::kSumBytes + lane_of_warp() * 16);
  stay(kept);

  FewLane<X, V, Tile> lane(problem, first_feature, begin, warps, tiles);
  lane.stage = ring;
  lane.slot = ring_end;
  int left = my_slices * tiles, fetch_tile = 0, early = 0;  // units; slices without their x
  const auto fetch = [&](bool with_x) {
    if (left > 0) {
      --left;
      fetch_unit<X, V, Tile>(lane, shared, copied, features - fetch_tile * 16);
      lane.stage = lane.stage + Tile::kUnitBytes == ring_end ? ring : lane.stage + Tile::kUnitBytes;
      if (fetch_tile == 0) {
        if (with_x) {
          fetch_slice<X, V, Tile>(lane, copied, rows, warps);
          lane.slot = lane.slot + Tile::kSliceBytes == slots_end ? ring_end : lane.slot + Tile::kSliceBytes;
        } else {
          ++early;
        }
      }
      if (++fetch_tile == tiles) {
        fetch_tile = 0;
        lane.values += lane.values_turn;
        lane.metadata += lane.metadata_turn;
        lane.values_depth -= warps * Tile::kDepth;
        lane.metadata_depth -= warps * Tile::kDepth;
      }
    }
    copy_async_commit();
  };
  PYVTK_NOT_UNROLLED
  for (int i = 0; i < Tile::kStages - 1; ++i) fetch(!call.x_follows);
  for (int i = 0; i < tiles * kRowTiles; ++i) *reinterpret_cast<uint4*>(sums_of + kept + i * 512) = {0, 0, 0, 0};
  if (call.x_follows) {  // the weight is on its way, and was there before the launch that makes x
    await_previous_launch();
    PYVTK_NOT_UNROLLED
    for (int i = 0; i < early; ++i) {
      fetch_slice<X, V, Tile>(lane, copied, rows, warps);
      lane.slot = lane.slot + Tile::kSliceBytes == slots_end ? ring_end : lane.slot + Tile::kSliceBytes;
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  unsigned stage = ring, slot = ring_end;
  PYVTK_NOT_UNROLLED
  for (int i = 0; i < my_slices; ++i) {
    uint32_t b[Tile::kProducts][kRowTiles][4];
    PYVTK_NOT_UNROLLED
    for (int tile = 0; tile < tiles; ++tile) {
      copy_async_wait<Tile::kStages - 2>();
      __syncwarp();  // this unit is there for all lanes, and all are done with the one whose stage is the next to fill
      fetch(true);
      if (tile == 0) {
        PYVTK_UNROLL
        for (int j = 0; j < Tile::kProducts; ++j) {
          PYVTK_UNROLL
          for (int r = 0; r < kRowTiles; ++r) {
            const unsigned at = (slot + lane.from_x) ^ static_cast<unsigned>(x_piece_of<Tile>(j) % 8 * 16);
            ldmatrix(b[j][r], copied + at + (x_piece_of<Tile>(j) / 8 * 8 * 16 + r * 8 * Tile::kXBytes));
          }
        }
        slot = slot + Tile::kSliceBytes == slots_end ? ring_end : slot + Tile::kSliceBytes;
      }
      Sum sums[kRowTiles][4];
      uint4* fours = reinterpret_cast<uint4*>(sums_of + kept + tile * Tile::kSumBytes);
      PYVTK_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        const uint4 four = fours[r * 32];
        sums[r][0] = std::bit_cast<Sum>(four.x);
        sums[r][1] = std::bit_cast<Sum>(four.y);
        sums[r][2] = std::bit_cast<Sum>(four.z);
        sums[r][3] = std::bit_cast<Sum>(four.w);
      }
      multiply_unit<X, Tile>(shared, copied, stage, lane.from_values, lane.from_metadata, b, sums);
      PYVTK_UNROLL
      for (int r = 0; r < kRowTiles; ++r) {
        fours[r * 32] = {std::bit_cast<uint32_t>(sums[r][0]), std::bit_cast<uint32_t>(sums[r][1]),
                         std::bit_cast<uint32_t>(sums[r][2]), std::bit_cast<uint32_t>(sums[r][3])};
      }
      stage = stage + Tile::kUnitBytes == ring_end ? ring : stage + Tile::kUnitBytes;
    }
  }
  copy_async_wait<0>();
  __syncthreads();
  Sum* workspace = static_cast<Sum*>(call.workspace) + int64_t{blockIdx.y} * rows * problem.features;
  PYVTK_NOT_UNROLLED
  for (int i = static_cast<int>(threadIdx.x); i < rows * features; i += 32 * warps) {
    const int row = i / features, feature = i % features;
    const int of_lane = feature % 8 * 4 + row % 8 / 2, of_four = feature % 16 / 8 * 2 + row % 2;
    const unsigned char* from = sums_of + (((feature / 16 * kRowTiles + row / 8) * 32 + of_lane) * 4 + of_four) * 4;
    Sum sum = 0;
    PYVTK_UNROLL
    for (int w = 0; w < Tile::kMostWarps; ++w) {
      if (w < warps) sum += *reinterpret_cast<const Sum*>(from + w * tiles * Tile::kSumBytes);
    }
    if (call.splits > 1) {
      workspace[row * problem.features + first_feature + feature] = sum;
    } else {
      finish(problem.epilogue, problem.features, row, first_feature + feature, as_float(sum));
    }
  }
}

// Launches
// ----------------------------------------------------------------------------------------------------------------

struct Sparse24Plan {
  int row_tile = 64;  // many: rows of a block, 64 or 128; few: tiles of 8 rows, 1, 2 or 4
  bool few = false;
  int splits = 1;
  int64_t split_depth = 0;  // many
  // few: of a block; the last for each split
  int warps = 0, features = 0, slices = 0;
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

// Calls run(FewTile<X, V, n>{}, its kernel) for n tiles of 8 rows.
template <class X, class V, class Run>
void with_few_tile(int row_tiles, const Run& run) {
  if (row_tiles == 1) return run(FewTile<X, V, 1>{}, sparse24_few_kernel<X, V, 1>);
  if (row_tiles == 2) return run(FewTile<X, V, 2>{}, sparse24_few_kernel<X, V, 2>);
  run(FewTile<X, V, 4>{}, sparse24_few_kernel<X, V, 4>);
}

// How the kernel for few rows cuts the weight: equal shares for all multiprocessors, in one wave if sums have room.
// More splits bring less of x to each, by blocks of more features, and cost the launch that combines.
template <class X, class V, class Tile>
void plan_few(const Sparse24Problem& problem, int64_t most_shared, int multiprocessors, Sparse24Plan& plan) {
  const int64_t all = ceil_div<int64_t>(problem.depth, Tile::kDepth);
  double least = 0;
  for (int64_t wish = 1; wish <= at_most(all, 16); ++wish) {
    const int64_t slices = ceil_div(all, wish), splits = ceil_div(all, slices);
    if (splits != wish) continue;
    int64_t features = 0, most_warps = 0, waves = 0;
    do {  // no more than 8 tiles: sums of more would take room from what is in flight
      features = at_least(ceil_div<int64_t>(problem.features * splits, ++waves * multiprocessors), 8);
      const auto tiles = static_cast<int>(ceil_div<int64_t>(features, 16));
      most_warps = at_most(at_most(Tile::kMostWarps, slices), most_shared / Tile::warp_bytes(tiles));
    } while (features > 128 || (features > 16 && most_warps < 2));
    // A turn brings a slice to each warp, in no less time than one warp's instructions for it take: as long as memory
    // takes for about 12 of them.
    int64_t warps = 0, time = 0;
    for (int64_t some = most_warps; some > 0; --some) {
      const int64_t with_some = ceil_div(slices, some) * at_least(some, 12);
      if (warps == 0 || with_some < time) warps = some, time = with_some;
    }
    if (warps == 0) continue;
    // In bytes that memory brings to a multiprocessor in the time. Of x, which comes from the second-level cache, it is
    // more at once; a split costs 1.7 us (45 kB), and about 30 bytes for each of its sums (on an H200).
    const auto depth = static_cast<double>(waves * time * Tile::kDepth);
    const double weight = depth * static_cast<double>(features) * (0.5 * sizeof(V) + 0.125);
    const double both = weight + depth * static_cast<double>(problem.rows) * sizeof(X);
    const double sums = static_cast<double>(splits * problem.rows * problem.features) / multiprocessors;
    const double cost = (weight > 0.63 * both ? weight : 0.63 * both) + (splits == 1 ? 0.0 : 45e3 + 30.0 * sums);
    if (plan.few && cost >= least) continue;
    least = cost;
    plan.few = true;
    plan.splits = static_cast<int>(splits);
    plan.slices = static_cast<int>(slices);
    plan.features = static_cast<int>(features);
    plan.warps = static_cast<int>(warps);
  }
}

// Which kernel, tile and split along k. `wants_few` is a wish: it holds below kFewRowsBelow, for a weight and an x that
// fit the kernel's loads; else the other kernel reads the weight once as well, up to 64 rows.
template <class X, class V>
Sparse24Plan plan_sparse24(const Sparse24Problem& problem, bool wants_few, int multiprocessors) {
  constexpr bool kWiden = sizeof(V) < sizeof(X);
  Sparse24Plan plan;
  if (wants_few && problem.rows < kFewRowsBelow && problem.depth > 0 &&
      problem.depth % (128 / static_cast<int>(sizeof(V))) == 0 && aligned_to(problem.values, 0, 16) &&
      aligned_to(problem.metadata, 0, 8) &&
      aligned_to(problem.x, problem.x_stride * static_cast<int64_t>(sizeof(X)), kWiden ? 8 : 16)) {
    plan.row_tile = problem.rows <= 8 ? 1 : problem.rows <= 16 ? 2 : 4;
    with_few_tile<X, V>(plan.row_tile, [&](auto tile, auto* kernel) {
      int64_t most = 0;
      if (most_dynamic_shared(kernel, most) != cudaSuccess) return;
      plan_few<X, V, decltype(tile)>(problem, most, multiprocessors, plan);
    });
  }
  if (!plan.few) {
    const int64_t tiles = ceil_div<int64_t>(problem.features, 128);
    plan.row_tile = problem.rows > 64 && tiles * ceil_div<int64_t>(problem.rows, 128) >= multiprocessors ? 128 : 64;
    const int64_t blocks = tiles * ceil_div<int64_t>(problem.rows, plan.row_tile);
    constexpr int64_t kUnit = ManyTile<X, V, 64>::kDepth;
    const int64_t units = ceil_div<int64_t>(problem.depth, kUnit);
    int64_t splits = 1;
    if (4 * blocks < 3 * multiprocessors)
      splits = at_most(2 * int64_t{multiprocessors} / at_least(blocks, 1), units / 8);
    const int64_t of_split = at_least(ceil_div<int64_t>(units, at_most(at_least(splits, 1), 16)), 1);
    plan.split_depth = of_split * kUnit;
    plan.splits = static_cast<int>(at_least(ceil_div<int64_t>(units, of_split), 1));
  }
  return plan;
}

// workspace: plan.workspace_bytes(problem)
// x_follows: the launch before this one in the stream makes x, and all else was there before that one
template <class X, class V>
cudaError_t sparse24_linear(const Sparse24Problem& problem, const Sparse24Plan& plan, void* workspace,
                            cudaStream_t stream, bool x_follows = false) {
  if (problem.rows == 0 || problem.features == 0) return cudaSuccess;
  cudaError_t status = cudaErrorInvalidValue;
  if (plan.few) {
    Sparse24FewLaunch call;
    call.problem = problem;
    call.workspace = workspace;
    call.splits = plan.splits;
    call.slices = plan.slices;
    call.features = plan.features;
    call.tiles = ceil_div(plan.features, 16);
    call.x_follows = x_follows;
    with_few_tile<X, V>(plan.row_tile, [&](auto tile, auto* kernel) {
      using Tile = decltype(tile);
      const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.features, plan.features)),
                      static_cast<unsigned>(plan.splits));
      const dim3 block(static_cast<unsigned>(32 * plan.warps));
      const size_t bytes = static_cast<size_t>(plan.warps) * Tile::warp_bytes(call.tiles);
      status = x_follows ? launch_early(kernel, grid, block, bytes, stream, call)
                         : launch(kernel, grid, block, bytes, stream, call);
    });
  } else {
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
    const auto start = [&](auto tile, auto* kernel) {
      using Tile = decltype(tile);
      const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(problem.features, Tile::kFeatures)),
                      static_cast<unsigned>(ceil_div<int64_t>(problem.rows, Tile::kRows)),
                      static_cast<unsigned>(plan.splits));
      status = launch(kernel, grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, call);
    };
    if (plan.row_tile == 64) {
      start(ManyTile<X, V, 64>{}, sparse24_many_kernel<X, V, 64>);
    } else {
      start(ManyTile<X, V, 128>{}, sparse24_many_kernel<X, V, 128>);
    }
  }
  if (status != cudaSuccess || plan.splits == 1) return status;
  using Sum = typename SumOf<X>::Type;
  return combine(static_cast<const Sum*>(workspace), plan.splits, problem.rows, problem.features, problem.epilogue,
                 stream);
}

// x to int8
// -----------------------------------------------------------------------------------------------------------------

// A block per row: q = clamp(round(x / s), -127, 127), half to even, with zeros behind up to q_stride; scales[row] = s,
// and NaN for rows that hold a NaN, or an infinity of which no scale is known. A row is read at once and held, up to
// kHeld pieces of 16 bytes a thread: no more than 56 registers, which a block of 12 warps of the product leaves it.
template <class T>
__global__ void __launch_bounds__(512) quantize_kernel(const T* x, int64_t x_stride, int64_t depth,
                                                       bool aligned,          // 16 bytes, rows as well
                                                       const float* x_scale,  // [1], or null: max |x| / 127 of the row
                                                       int8_t* q, int64_t q_stride, float* scales) {
  PYVTK_SHARED(largest_of, uint32_t[kMostWarps]);
  constexpr int kHeld = sizeof(T) == 4 ? 6 : 4, kOfPiece = 16 / static_cast<int>(sizeof(T));
  let_next_launch_start();
  const T* row = x + int64_t{blockIdx.x} * x_stride;
  const auto piece_at = [&](int64_t k) -> uint4 {
    if (aligned && k + kOfPiece <= depth) return __ldg(reinterpret_cast<const uint4*>(row + k));
    return k < depth ? gather_piece(row, k, depth) : uint4{0, 0, 0, 0};
  };
  const auto number = [](const uint4& piece, int i) {
    const uint32_t word = i * static_cast<int>(sizeof(T)) / 4 == 0   ? piece.x
                          : i * static_cast<int>(sizeof(T)) / 4 == 1 ? piece.y
                          : i * static_cast<int>(sizeof(T)) / 4 == 2 ? piece.z
                                                                     : piece.w;
    if constexpr (sizeof(T) == 4) return std::bit_cast<float>(word);
    if constexpr (sizeof(T) == 2) return to_float(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
  };
  const int64_t step = int64_t{blockDim.x} * kOfPiece, first = int64_t{threadIdx.x} * kOfPiece;
  uint32_t largest = 0;  // bits of non-negative numbers have the order of the numbers, and NaN comes last
  const auto look_at = [&](const uint4& piece) {
    PYVTK_UNROLL
    for (int i = 0; i < kOfPiece; ++i) largest = max(largest, __float_as_uint(number(piece, i)) & 0x7fffffffu);
  };
  uint4 held[kHeld];
  PYVTK_UNROLL
  for (int i = 0; i < kHeld; ++i) held[i] = piece_at(first + i * step);
  PYVTK_UNROLL
  for (int i = 0; i < kHeld; ++i) look_at(held[i]);
  for (int64_t k = first + kHeld * step; k < depth; k += step) look_at(piece_at(k));
  largest = __reduce_max_sync(kAllLanes, largest);
  if (lane_of_warp() == 0) largest_of[warp_of_block()] = largest;
  __syncthreads();
  largest = lane_of_warp() < warps_of_block() ? largest_of[lane_of_warp()] : 0;
  largest = __reduce_max_sync(kAllLanes, largest);
  const float most = __uint_as_float(largest);
  float scale = x_scale != nullptr ? *x_scale : most / 127.0f;
  // a row of zeros; and one so small that its scale would be subnormal, too coarse to divide by, which becomes zeros
  constexpr float kSmallestNormal = 0x1p-126f;
  if (x_scale == nullptr && scale < kSmallestNormal) scale = 1.0f;
  constexpr uint32_t kInfinity = 0x7f800000u;
  if (threadIdx.x == 0) {
    const bool lost = largest > kInfinity || (x_scale == nullptr && largest == kInfinity);
    scales[blockIdx.x] = lost ? __uint_as_float(0x7fc00000u) : scale;
  }
  int8_t* to = q + int64_t{blockIdx.x} * q_stride;
  const auto write = [&](const uint4& piece, int64_t k) {
    if (k >= q_stride) return;
    PYVTK_UNROLL
    for (int word = 0; word < kOfPiece / 4; ++word) {
      uint32_t bytes = 0;
      PYVTK_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float quotient = rintf(number(piece, 4 * word + i) / scale);
        const float bounded = fminf(fmaxf(quotient, -127.0f), 127.0f);  // a NaN becomes a number here; its row is lost
        bytes |= static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int>(bounded))) << (8 * i);
      }
      reinterpret_cast<uint32_t*>(to + k)[word] = k + 4 * word < depth ? bytes : 0;
    }
  };
  PYVTK_UNROLL
  for (int i = 0; i < kHeld; ++i) write(held[i], first + i * step);
  for (int64_t k = first + kHeld * step; k < q_stride; k += step) write(piece_at(k), k);
}

// q: [rows, q_stride] with q_stride a multiple of 16
template <class T>
cudaError_t quantize(const T* x, int64_t rows, int64_t x_stride, int64_t depth, const float* x_scale, int8_t* q,
                     int64_t q_stride, float* scales, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  return launch(quantize_kernel<T>, dim3(static_cast<unsigned>(rows)), dim3(512), 0, stream, x, x_stride, depth,
                aligned_to(x, x_stride * static_cast<int64_t>(sizeof(T)), 16), x_scale, q, q_stride, scales);
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
