// The bookkeeping of selections, each of its operators in one launch. pyvtk/reference/selection.py is the definition;
// the CPU's way is cpu/selection.h.
//
// A block has a row, in tiles: threads have consecutive positions, a scan over the block says where what stays of them
// goes. What has to look up tokens first (mask, inverse, complement) gathers a piece of the token axis in shared memory
// and writes each of its tokens once, side by side; mask and inverse have a block for every piece. All of that is a few
// thousand integers: what such a launch takes is the time to start it, and the barriers. Indices that are no token are
// left out. Of a packed axis any row may hold any token, so there each block reads all rows.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/selection_problem.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

inline constexpr int kSelectionThreads = 32 * kMostWarps;
inline constexpr int kSelectionAtOnce = 4;           // positions of a thread in a tile
inline constexpr int64_t kMarkedTokens = 64 * 1024;  // as bits in shared memory, 8 KiB
inline constexpr int64_t kMaskTokens = 8 * 1024;     // of a block of mask
inline constexpr int64_t kInverseTokens = 4 * 1024;  // of a block of inverse: 16 KiB of slots
inline constexpr int64_t kMarkedWords = kMarkedTokens / 32;

// Sums of `mine` over the threads before this one, and over all.
__device__ __forceinline__ Prefix<int> prefix_of_block(int mine) {
  const int up_to_lane = sum_up_to_lane(mine);
  const Prefix<int> warps = prefix_of_warps(__shfl_sync(kAllLanes, up_to_lane, 31));
  return {warps.before + up_to_lane - mine, warps.total};
}

// How many of the positions 0..size - 1 stay: those of which find(position, value) is true.
template <class Find>
__device__ int64_t count_kept(int64_t size, const Find& find) {
  int64_t mine = 0, value;
  for (int64_t i = threadIdx.x; i < size; i += blockDim.x) mine += find(i, value);
  return prefix_of_warps(sum_of_warp(mine)).total;
}

// A row of the result while it is written, by all threads of the block.
struct RowWriter {
  int64_t* slots;  // [capacity]
  int64_t capacity;
  int64_t start = 0;  // the first slot to be filled
  int64_t found = 0;  // values so far, those that did not fit among them

  __device__ RowWriter(const SelectionOutput& out, int64_t row)
      : slots(out.indices + row * out.capacity), capacity(out.capacity) {}

  // How many there will be, which has to be known before the first of them where the row is aligned to the right.
  __device__ void expect(int64_t total) { start = capacity - min(total, capacity); }

  template <class Find>
  __device__ void append(int64_t size, const Find& find) {
    const int64_t tile = int64_t{kSelectionAtOnce} * blockDim.x;
    for (int64_t first = 0; first < size; first += tile) {
      const int64_t mine = first + int64_t{kSelectionAtOnce} * threadIdx.x;
      int64_t values[kSelectionAtOnce];
      bool kept[kSelectionAtOnce];
      int count = 0;
      PYVTK_UNROLL
      for (int i = 0; i < kSelectionAtOnce; ++i) {
        kept[i] = mine + i < size && find(mine + i, values[i]);
        count += kept[i];
      }
      const Prefix<int> place = prefix_of_block(count);
      int64_t to = found + place.before;
      PYVTK_UNROLL
      for (int i = 0; i < kSelectionAtOnce; ++i) {
        if (!kept[i]) continue;
        if (to < capacity) slots[start + to] = values[i];
        ++to;
      }
      found += place.total;
    }
  }

  // Padding, and how many there are.
  __device__ void finish(const SelectionOutput& out, int64_t row, bool overflow) const {
    const int64_t count = min(found, capacity), first = out.align_right ? 0 : count;
    for (int64_t i = threadIdx.x; i < capacity - count; i += blockDim.x) slots[first + i] = -1;
    if (threadIdx.x != 0) return;
    out.counts[row] = static_cast<int32_t>(count);
    out.overflow[row] = overflow;
  }
};

// visit(entry, token) for the real slots of rows [begin, end): threads share the slots of one row, warps many rows.
template <class Visit>
__device__ __forceinline__ void visit_kept(const SelectionInput& in, int64_t begin, int64_t end, const Visit& visit) {
  const bool one = end - begin == 1;
  const int64_t step = one ? blockDim.x : 32;
  for (int64_t row = begin + (one ? 0 : warp_of_block()); row < end; row += one ? 1 : warps_of_block()) {
    const int64_t last = row * in.capacity + in.end(row);
    int64_t entry = row * in.capacity + in.begin(row) + (one ? static_cast<int>(threadIdx.x) : lane_of_warp());
    for (; entry < last; entry += step) visit(entry, in.indices[entry]);
  }
}

// Sets bits[token - first] for the tokens [first, first + size) that rows [begin, end) hold.
__device__ __forceinline__ void mark_tokens(const SelectionInput& in, int64_t begin, int64_t end, int64_t first,
                                            int64_t size, uint32_t* bits) {
  __syncthreads();  // all have read what stands there
  for (int64_t word = threadIdx.x; word < ceil_div<int64_t>(size, 32); word += blockDim.x) bits[word] = 0;
  __syncthreads();
  visit_kept(in, begin, end, [&](int64_t, int64_t token) {
    const int64_t at = token - first;
    if (token >= first && at < size) atomicOr(&bits[at / 32], 1u << (at % 32));
  });
  __syncthreads();
}

// Block: row.
static __global__ void __launch_bounds__(kSelectionThreads)
    selection_of_mask_kernel(const uint8_t* mask,  // [rows, tokens]
                             int64_t tokens, SelectionOutput out) {
  const int64_t row = blockIdx.x;
  const auto find = [from = mask + row * tokens](int64_t token, int64_t& value) {
    value = token;
    return from[token] != 0;
  };
  RowWriter writer(out, row);
  if (out.align_right) writer.expect(count_kept(tokens, find));
  writer.append(tokens, find);
  writer.finish(out, row, writer.found > out.capacity);
}

// Block: row.
static __global__ void __launch_bounds__(kSelectionThreads)
    selection_then_kernel(SelectionInput in, SelectionInput other,
                          const bool* overflow,        // [rows] or nullptr
                          const bool* other_overflow,  // [rows] or nullptr
                          SelectionOutput out) {
  const int64_t row = blockIdx.x;
  const int64_t first = other.begin(row), begin = in.begin(row), end = in.end(row);
  const int64_t* const chosen = other.indices + row * other.capacity + first;
  const int64_t* const tokens = in.indices + row * in.capacity;
  const auto find = [=](int64_t at, int64_t& value) {
    const int64_t slot = chosen[at];
    if (slot < begin || slot >= end) return false;
    value = tokens[slot];
    return true;
  };
  const int64_t size = other.end(row) - first;
  RowWriter writer(out, row);
  if (out.align_right) writer.expect(count_kept(size, find));
  writer.append(size, find);
  writer.finish(out, row, (overflow && overflow[row]) || (other_overflow && other_overflow[row]));
}

// Block: row.
static __global__ void __launch_bounds__(kSelectionThreads)
    selection_complement_kernel(SelectionInput in,
                                const int32_t* cu_seqlens,  // [rows + 1] or nullptr
                                int64_t tokens, SelectionOutput out) {
  PYVTK_SHARED(bits, uint32_t[kMarkedWords]);
  const int64_t row = blockIdx.x;
  const TokenRange range = range_of_sample(cu_seqlens, row, tokens);
  int64_t marked = -1;  // where the tokens begin of which the bits are there
  const auto in_pieces = [&](const auto& piece) {
    for (int64_t first = range.begin; first < range.end; first += kMarkedTokens) {
      const int64_t size = min(range.end - first, kMarkedTokens);
      if (marked != first) {
        mark_tokens(in, cu_seqlens ? 0 : row, cu_seqlens ? in.rows : row + 1, first, size, bits);
        marked = first;
      }
      piece(size, [first, from = &bits[0]](int64_t at, int64_t& value) {
        value = first + at;
        return (from[at / 32] >> (at % 32) & 1) == 0;
      });
    }
  };
  RowWriter writer(out, row);
  if (out.align_right) {
    int64_t total = 0;
    in_pieces([&](int64_t size, const auto& find) { total += count_kept(size, find); });
    writer.expect(total);
  }
  in_pieces([&](int64_t size, const auto& find) { writer.append(size, find); });
  writer.finish(out, row, writer.found > out.capacity);
}

// The part of the result that a block of mask or inverse writes: a piece of a row, or of the axis that all rows share.
struct TokenPiece {
  int64_t begin, end;  // rows whose entries are looked at
  int64_t first, size;
  int64_t out;  // the place of the first token

  __device__ TokenPiece(const SelectionInput& in, int64_t tokens, bool packed, int64_t most) {
    const int64_t pieces = ceil_div(tokens, most), row = blockIdx.x / pieces;
    begin = packed ? 0 : row;
    end = packed ? in.rows : row + 1;
    first = blockIdx.x % pieces * most;
    size = min(tokens - first, most);
    out = row * tokens + first;
  }
};

// Block: a piece of a row.
static __global__ void __launch_bounds__(kSelectionThreads)
    selection_mask_kernel(SelectionInput in, int64_t tokens, bool packed,
                          bool* out) {  // [rows, tokens], packed: [tokens]
  PYVTK_SHARED(bits, uint32_t[kMaskTokens / 32]);
  const TokenPiece piece(in, tokens, packed, kMaskTokens);
  mark_tokens(in, piece.begin, piece.end, piece.first, piece.size, &bits[0]);
  for (int64_t i = threadIdx.x; i < piece.size; i += blockDim.x) out[piece.out + i] = bits[i / 32] >> (i % 32) & 1;
}

// Block: a piece of a row. Of tokens that come again the last one counts, in the order of rows and slots.
static __global__ void __launch_bounds__(kSelectionThreads)
    selection_inverse_kernel(SelectionInput in, int64_t tokens, bool packed,
                             int64_t* out) {  // [rows, tokens], packed: [tokens]
  PYVTK_SHARED(entries, int32_t[kInverseTokens]);
  const TokenPiece piece(in, tokens, packed, kInverseTokens);
  for (int64_t i = threadIdx.x; i < piece.size; i += blockDim.x) entries[i] = -1;
  __syncthreads();
  const int64_t origin = piece.begin * in.capacity;
  visit_kept(in, piece.begin, piece.end, [&](int64_t entry, int64_t token) {
    const int64_t at = token - piece.first;
    if (token >= piece.first && at < piece.size) atomicMax(&entries[at], static_cast<int32_t>(entry - origin));
  });
  __syncthreads();
  const auto capacity = static_cast<int32_t>(in.capacity);
  for (int64_t i = threadIdx.x; i < piece.size; i += blockDim.x) {
    const int32_t entry = entries[i];
    out[piece.out + i] = packed && entry >= 0 ? entry % capacity : entry;
  }
}

// Threads: slots.
static __global__ void __launch_bounds__(kSelectionThreads) selection_valid_kernel(SelectionInput in,
                                                                                   bool* out) {  // [rows, capacity]
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= in.rows * in.capacity) return;
  const int64_t row = entry / in.capacity, slot = entry % in.capacity;
  out[entry] = in.begin(row) <= slot && slot < in.end(row);
}

// Threads for rows of so many positions, each with kSelectionAtOnce of a tile.
inline dim3 selection_threads(int64_t positions) {
  const int64_t threads = ceil_div<int64_t>(ceil_div<int64_t>(positions, kSelectionAtOnce), 32) * 32;
  return dim3(static_cast<unsigned>(std::clamp<int64_t>(threads, 32, kSelectionThreads)));
}

// Blocks are numbered in 31 bits.
inline bool fit_a_grid(int64_t blocks) { return blocks <= std::numeric_limits<int32_t>::max(); }

inline cudaError_t selection_of_mask(const uint8_t* mask,  // [rows, tokens]
                                     int64_t rows, int64_t tokens, const SelectionOutput& out, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  if (!fit_a_grid(rows)) return cudaErrorInvalidValue;
  return launch(selection_of_mask_kernel, dim3(static_cast<unsigned>(rows)),
                selection_threads(std::max(tokens, out.capacity)), 0, stream, mask, tokens, out);
}

inline cudaError_t selection_then(const SelectionInput& in, const SelectionInput& other, const bool* overflow,
                                  const bool* other_overflow, const SelectionOutput& out, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  if (!fit_a_grid(in.rows)) return cudaErrorInvalidValue;
  return launch(selection_then_kernel, dim3(static_cast<unsigned>(in.rows)), selection_threads(other.capacity), 0,
                stream, in, other, overflow, other_overflow, out);
}

inline cudaError_t selection_complement(const SelectionInput& in, const int32_t* cu_seqlens, int64_t tokens,
                                        const SelectionOutput& out, cudaStream_t stream) {
  if (in.rows == 0) return cudaSuccess;
  if (!fit_a_grid(in.rows)) return cudaErrorInvalidValue;
  return launch(selection_complement_kernel, dim3(static_cast<unsigned>(in.rows)),
                selection_threads(std::max({in.capacity, tokens, out.capacity})), 0, stream, in, cu_seqlens, tokens,
                out);
}

template <class Kernel, class T>
cudaError_t launch_pieces(Kernel kernel, int64_t most, const SelectionInput& in, int64_t tokens, bool packed, T* out,
                          cudaStream_t stream) {
  const int64_t blocks = (packed ? 1 : in.rows) * ceil_div(tokens, most);
  if (blocks == 0) return cudaSuccess;
  if (!fit_a_grid(blocks)) return cudaErrorInvalidValue;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)),
                selection_threads(std::max(in.capacity, std::min(tokens, most))), 0, stream, in, tokens, packed, out);
}

inline cudaError_t selection_mask(const SelectionInput& in, int64_t tokens, bool packed, bool* out,
                                  cudaStream_t stream) {
  return launch_pieces(selection_mask_kernel, kMaskTokens, in, tokens, packed, out, stream);
}

inline cudaError_t selection_inverse(const SelectionInput& in, int64_t tokens, bool packed, int64_t* out,
                                     cudaStream_t stream) {
  // entries of all rows that one block looks at are int32
  const int64_t entries = packed ? in.rows * in.capacity : in.capacity;
  if (entries > std::numeric_limits<int32_t>::max()) return cudaErrorInvalidValue;
  return launch_pieces(selection_inverse_kernel, kInverseTokens, in, tokens, packed, out, stream);
}

inline cudaError_t selection_valid(const SelectionInput& in, bool* out, cudaStream_t stream) {
  const int64_t blocks = ceil_div<int64_t>(in.rows * in.capacity, kSelectionThreads);
  if (blocks == 0) return cudaSuccess;
  if (!fit_a_grid(blocks)) return cudaErrorInvalidValue;
  return launch(selection_valid_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kSelectionThreads), 0, stream, in,
                out);
}

}  // namespace pyvtk::cuda
