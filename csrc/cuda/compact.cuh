// Moves the rows that a selection names, for any number of tensors in one launch. pyvtk/reference/compact.py is the
// definition; the CPU's way is cpu/compact.h.
//
// A tensor is rows of a selection (batch, head) x lines x positions x one run of bytes (common/compact_shape.h), and a
// run is units of the widest access that all its addresses allow. (line, position, unit) counted through is one axis,
// cut into tiles: a block moves one (or a few), some units a thread, all loads before the first store. Two long rows
// and a thousand short ones fill a device alike, small tensors ride along with large ones, and no unit is idle for the
// sake of a shape. The tensors are described in the parameters of the kernel: nothing is copied to the device first,
// and a CUDA graph holds them.
//
// What the host does not know stays on the device: counts, offsets of packed rows, whether indices repeat. An index
// outside of the token axis is padding; no address is formed from it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <limits>

#include "common/compact_shape.h"
#include "common/types.h"
#include "cuda/block.cuh"
#include "cuda/numbers.cuh"
#include "cuda/ptx.cuh"

namespace pyvtk::cuda {

// Items of a thread: what it reads before it writes. A gather waits twice, for an index and for what that names. On an
// H200, [8, 2880, 4096] bfloat16 to 720 takes 26.3 us with 2 items and as many blocks as there can be, 27.9 with 2
// items in 6 blocks, 30.1 with 4 items in 4 blocks, 28.8 with 1 item; a copy of as many bytes takes 23.9.
inline constexpr int kMoveThreads = 256;
inline constexpr int kGatherItems = 2;
inline constexpr uint32_t kGatherTile = kMoveThreads * kGatherItems;
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ == 1000)
inline constexpr int kGatherBlocks = 8;  // of a multiprocessor: 32 registers
#else
inline constexpr int kGatherBlocks = 6;  // more do not fit, or spill (sm_80)
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kScatterBlocks = 2;  // three spill (sm_80)
#else
inline constexpr int kScatterBlocks = 3;
#endif
// Of scatter and the moves in place, in 3 blocks or less: with a fourth scatter spills.
inline constexpr int kMoveItems = 4;
inline constexpr uint32_t kTile = kMoveThreads * kMoveItems;
inline constexpr int kScatterTiles = 4;  // of a block, which looks up the slots of one while it moves the one before
inline constexpr int kMostAxes = 4;
inline constexpr int kMostMoves = 64;
inline constexpr int kMostShapes = 6;
inline constexpr int kMostCaches = 64;
inline constexpr uint32_t kTailBlocks = 64;
inline constexpr int64_t kMostCounted = std::numeric_limits<int32_t>::max() - 2 * int64_t{kScatterTiles * kTile};

// Division by a number that the host knows: a multiplication. Exact for numerators below 2^31.
struct Divider {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  bool operator==(const Divider&) const = default;
};

constexpr Divider divider_of(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t d = static_cast<uint64_t>(divisor);
  const uint64_t multiplier = (((uint64_t{1} << shift) - d) << 32) / d + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

struct Split {
  uint32_t quotient, rest;
};
__device__ __forceinline__ Split split(const Divider& by, uint32_t number) {
  const uint32_t high = static_cast<uint32_t>((uint64_t{number} * by.multiplier) >> 32);
  const uint32_t quotient = (high + number) >> by.shift;
  return {quotient, number - quotient * by.divisor};
}

// Strides in bytes.
struct Strides {
  int64_t source, target, base;

  bool operator==(const Strides&) const = default;
};
struct OuterAxis {
  Divider size;
  Strides strides;

  bool operator==(const OuterAxis&) const = default;
};

enum class Number : int32_t { none, float32, float64, float16, bfloat16 };  // what rows can be added as

// What tensors of a launch can have in common, such as the keys and values of all layers.
struct Shape {
  Divider units;  // of a run
  Divider positions;
  Divider tiles;           // of a row, or groups of kScatterTiles; at least 1
  uint32_t next_position;  // from a unit to the one that lies kMoveThreads behind it
  uint32_t next_unit;
  uint32_t lines;
  int32_t width;  // bytes of a unit
  int32_t axes;
  Strides batch, head, token;
  OuterAxis outer[kMostAxes];
  const char* base;     // positions that no row lands on; nullptr: zeros
  Number number;        // of scatter
  int32_t merged;       // of scatter: all rows share one target
  uint32_t row_blocks;  // of all rows; what follows are blocks of the tail
  alignas(16) unsigned char pad[16];

  bool operator==(const Shape&) const = default;
};

// One tensor of a launch.
struct Move : Shape {
  uint64_t units_of_row;  // all of them
  const char* source;     // nullptr: rows are cleared (restore)
  char* target;
};

// Parameters of less than 4 KiB cost a launch nothing. But a multiprocessor waits for each line of them that it has not
// read before, so tensors share their shapes (56 caches on an H200, described one by one: 21.5 us, so: 21.0).
struct Moves {
  int32_t count;
  int32_t shapes;
  uint32_t first_block[kMostMoves];
  uint8_t shape_of[kMostMoves];
  const char* source[kMostMoves];
  char* target[kMostMoves];
  Shape shape[kMostShapes];
};
static_assert(sizeof(Moves) + 256 <= 4096);

// What a block works on.
struct Moved {
  const Shape& shape;
  const char* source;
  char* target;
};

// The selection. `total` >= 0: rows follow each other on an axis of that length.
struct SelectedOnDevice {
  const int64_t* indices;  // [rows, capacity]
  const int32_t* counts;   // [rows]
  int32_t rows;            // batch * heads
  int32_t capacity;
  int32_t tokens;
  int32_t total;
  Divider heads;
  bool align_right;
};

// false: too large.
inline bool describe(int64_t rows, int64_t heads, int64_t capacity, int64_t tokens, int64_t total, bool align_right,
                     const int64_t* indices, const int32_t* counts, SelectedOnDevice& selected) {
  for (int64_t size : {rows, heads, capacity, tokens, total}) {
    if (size > kMostCounted) return false;
  }
  selected = {indices,
              counts,
              static_cast<int32_t>(rows),
              static_cast<int32_t>(capacity),
              static_cast<int32_t>(tokens),
              static_cast<int32_t>(total),
              divider_of(heads > 0 ? heads : 1),
              align_right};
  return true;
}

// Slots of a row that hold a token.
struct Slots {
  int32_t begin, end;
};
__device__ __forceinline__ Slots slots_of(const SelectedOnDevice& selected, int32_t row) {
  const int32_t kept = min(max(__ldg(selected.counts + row), 0), selected.capacity);
  return selected.align_right ? Slots{selected.capacity - kept, selected.capacity} : Slots{0, kept};
}

// What stands in a slot; -1 in padding. Not yet a token: index_or_none.
__device__ __forceinline__ int64_t index_in(const SelectedOnDevice& selected, int32_t row, Slots slots, int32_t slot) {
  const bool valid = slot >= slots.begin && slot < slots.end;
  return valid ? __ldg(selected.indices + int64_t{row} * selected.capacity + slot) : -1;
}
__device__ __forceinline__ int32_t index_or_none(const SelectedOnDevice& selected, int64_t index) {
  return index >= 0 && index < selected.tokens ? static_cast<int32_t>(index) : -1;
}
__device__ __forceinline__ int32_t token_of(const SelectedOnDevice& selected, int32_t row, Slots slots, int32_t slot) {
  return index_or_none(selected, index_in(selected, row, slots, slot));
}

// Where a row begins on the packed axis: what is kept of the rows before it; at most `total`. All lanes of a warp
// together.
__device__ __forceinline__ int32_t packed_begin(const SelectedOnDevice& selected, int32_t row) {
  int64_t kept = 0;
  for (int32_t r = lane_of_warp(); r < row; r += 32) {
    const Slots slots = slots_of(selected, r);
    kept += slots.end - slots.begin;
  }
  return static_cast<int32_t>(min(sum_of_warp(kept), int64_t{selected.total}));
}

// A place in the tile of a row.
struct Spot {
  uint32_t line, position, unit;
};
// `number` of all units of a row, from its beginning: usually a small number.
__device__ __forceinline__ Spot spot_at(const Shape& shape, uint64_t number) {
  if (number <= static_cast<uint64_t>(kMostCounted)) {
    const Split run = split(shape.units, static_cast<uint32_t>(number));
    const Split line = split(shape.positions, run.quotient);
    return {line.quotient, line.rest, run.rest};
  }
  const uint64_t run = number / shape.units.divisor;
  return {static_cast<uint32_t>(run / shape.positions.divisor), static_cast<uint32_t>(run % shape.positions.divisor),
          static_cast<uint32_t>(number % shape.units.divisor)};
}
__device__ __forceinline__ Spot spot_after(const Shape& shape, Spot spot, uint32_t units) {
  const Split run = split(shape.units, spot.unit + units);
  const Split line = split(shape.positions, spot.position + run.quotient);
  return {spot.line + line.quotient, line.rest, run.rest};
}
// kMoveThreads units later.
__device__ __forceinline__ Spot next_spot(const Shape& shape, Spot spot) {
  spot.unit += shape.next_unit;
  spot.position += shape.next_position;
  if (spot.unit >= shape.units.divisor) {
    spot.unit -= shape.units.divisor;
    ++spot.position;
  }
  if (spot.position >= shape.positions.divisor) {
    const Split line = split(shape.positions, spot.position);
    spot.line += line.quotient;
    spot.position = line.rest;
  }
  return spot;
}

__device__ __forceinline__ void add(Strides& sum, const Strides& strides, int64_t at) {
  sum.source += at * strides.source;
  sum.target += at * strides.target;
  sum.base += at * strides.base;
}
// Of a row.
__device__ __forceinline__ Strides row_offset(const Shape& shape, const SelectedOnDevice& selected, int32_t row) {
  Strides offset{};
  const Split at = split(selected.heads, static_cast<uint32_t>(row));
  add(offset, shape.batch, at.quotient);
  add(offset, shape.head, at.rest);
  return offset;
}
// Of a spot, all but its position.
__device__ __forceinline__ Strides unit_offset(Spot spot, uint32_t width) {
  const int64_t unit = static_cast<int64_t>(uint64_t{spot.unit} * width);
  return {unit, unit, unit};
}
__device__ __forceinline__ Strides line_offset(const Shape& shape, Spot spot, uint32_t width) {
  Strides offset = unit_offset(spot, width);
  // most tensors have no axes: unrolled, the loop would be most of the code
  PYVTK_NOT_UNROLLED
  for (int axis = shape.axes - 1; axis >= 0; --axis) {
    const Split at = split(shape.outer[axis].size, spot.line);
    add(offset, shape.outer[axis].strides, at.rest);
    spot.line = at.quotient;
  }
  return offset;
}

// The move that a block works on, and its number among the move's blocks.
struct Work {
  int32_t move;
  uint32_t block;
};
__device__ __forceinline__ Work work_of_block(const Moves& moves) {
  int32_t low = 0, high = moves.count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (moves.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  return {low, blockIdx.x - moves.first_block[low]};
}

// f.template operator()<Unit>() with the type of a unit
template <class F>
__device__ __forceinline__ void with_unit(int32_t width, F&& f) {
  switch (width) {
    case 16:
      return f(uint4{});
    case 8:
      return f(uint2{});
    case 4:
      return f(uint32_t{});
    case 2:
      return f(uint16_t{});
    default:
      return f(uint8_t{});
  }
}

// Inverse of a selection --------------------------------------------------------------------------------------------

// Which slots land on a token. Rows of one table each, also where they share a target: then a row's table is small
// beside what it is about.
struct Inverse {
  int32_t* first;     // [rows, tokens]: the first slot of a token, -1 if there is none; without `next` the last one
  int32_t* next;      // [rows, capacity]: the next slot of the same token, -1 after the last; nullptr: not wanted
  int32_t* repeated;  // [rows]: whether `next` was written, since a token stands twice in the row
  int32_t* shift;     // [rows]: position = slot + shift, on the packed axis; nullptr: positions are slots
};

// How many int32 the tables take, and the tables in that memory.
inline int64_t inverse_size(const SelectedOnDevice& selected, bool chains) {
  return int64_t{selected.rows} * (int64_t{selected.tokens} + (chains ? selected.capacity : 0) + 2);
}
inline Inverse inverse_in(int32_t* memory, const SelectedOnDevice& selected, bool chains) {
  Inverse inverse{};
  inverse.repeated = memory;
  inverse.shift = selected.total >= 0 ? memory + selected.rows : nullptr;
  inverse.first = memory + 2 * int64_t{selected.rows};
  inverse.next = chains ? inverse.first + int64_t{selected.rows} * selected.tokens : nullptr;
  return inverse;
}

inline constexpr int kInverseThreads = 32 * kMostWarps;

// A block inverts a row. Which slot wins does not depend on the order of atomics; a row without repeated tokens, in
// whatever order, needs no more. In a row with some, one warp links the slots of each token, from the last to the
// first, 32 at a time.
static __global__ void __launch_bounds__(kInverseThreads) inverse_kernel(SelectedOnDevice selected, Inverse inverse) {
  const auto row = static_cast<int32_t>(blockIdx.x);
  const int thread = static_cast<int>(threadIdx.x);
  int32_t* const first = inverse.first + int64_t{row} * selected.tokens;
  for (int32_t token = thread; token < selected.tokens; token += kInverseThreads) first[token] = -1;
  Slots slots = slots_of(selected, row);
  if (inverse.shift) {
    const int32_t begin = packed_begin(selected, row);
    if (thread == 0) inverse.shift[row] = begin - slots.begin;
    slots.end = min(slots.end, slots.begin + (selected.total - begin));
  }
  __syncthreads();
  int repeated = 0;
  for (int32_t slot = slots.begin + thread; slot < slots.end; slot += kInverseThreads) {
    const int32_t token = token_of(selected, row, slots, slot);
    if (token >= 0 && atomicMax(first + token, slot) >= 0) repeated = 1;
  }
  repeated = __syncthreads_or(repeated);
  if (thread == 0) inverse.repeated[row] = repeated;
  if (!repeated || !inverse.next) return;

  for (int32_t token = thread; token < selected.tokens; token += kInverseThreads) first[token] = -1;
  __syncthreads();
  if (warp_of_block() > 0) return;
  const int lane = lane_of_warp();
  for (int32_t group = slots.begin + (slots.end - 1 - slots.begin) / 32 * 32; group >= slots.begin; group -= 32) {
    const int32_t slot = group + lane;
    const int32_t token = token_of(selected, row, slots, slot);
    const unsigned same = __match_any_sync(kAllLanes, token);
    const unsigned before = (1u << lane) - 1, after = same & ~before & ~(1u << lane);
    if (token >= 0) {
      inverse.next[int64_t{row} * selected.capacity + slot] =
          after ? group + __ffs(static_cast<int>(after)) - 1 : first[token];
    }
    __syncwarp();
    if (token >= 0 && !(same & before)) first[token] = slot;
    __syncwarp();
  }
}

inline cudaError_t invert(const SelectedOnDevice& selected, const Inverse& inverse, cudaStream_t stream) {
  if (selected.rows == 0) return cudaSuccess;
  return launch(inverse_kernel, dim3(static_cast<unsigned>(selected.rows)), dim3(kInverseThreads), 0, stream, selected,
                inverse);
}

// compact -----------------------------------------------------------------------------------------------------------

// Whether this slot is the one whose update replaced the token (restore): the last of them.
__device__ __forceinline__ bool wins(const SelectedOnDevice& selected, const Inverse& inverse, bool merged, int32_t row,
                                     int32_t slot, int32_t token) {
  if (__ldg(inverse.first + int64_t{row} * selected.tokens + token) != slot) return false;
  if (merged) {
    for (int32_t later = row + 1; later < selected.rows; ++later) {
      if (__ldg(inverse.first + int64_t{later} * selected.tokens + token) >= 0) return false;
    }
  }
  return true;
}

// winners: only slots that replaced a token, for the gradient of restore
enum class Gather { padded, packed, winners };

// target[row, slot] = source[row, token of the slot], or the pad. Positions are slots.
//   kPlain: the tensor has no other axes
template <class Unit, Gather kKind, bool kPlain>
__device__ __forceinline__ void gather_tile(const Moved& move, const SelectedOnDevice& selected, const Inverse& inverse,
                                            int32_t row, uint32_t tile) {
  const Shape& shape = move.shape;
  const Slots slots = slots_of(selected, row);
  constexpr bool kPacked = kKind == Gather::packed;
  Spot spots[kGatherItems];
  int64_t indices[kGatherItems];
  Spot spot = spot_after(shape, spot_at(shape, uint64_t{tile} * kGatherTile), threadIdx.x);
  for (int k = 0; k < kGatherItems; ++k) {
    // padding is read too, rather than to wait for the count
    indices[k] =
        spot.line < shape.lines ? __ldg(selected.indices + int64_t{row} * selected.capacity + spot.position) : -1;
    spots[k] = spot;
    spot = next_spot(shape, spot);
  }
  const int32_t shift = kPacked ? packed_begin(selected, row) - slots.begin : 0;
  const Strides here = row_offset(shape, selected, row);
  const Unit* const pad = reinterpret_cast<const Unit*>(shape.pad);
  constexpr uint32_t kPads = 16 / sizeof(Unit);
  char* to[kGatherItems];
  Unit values[kGatherItems];
  for (int k = 0; k < kGatherItems; ++k) {
    const auto slot = static_cast<int32_t>(spots[k].position);
    const bool valid = slot >= slots.begin && slot < slots.end;
    to[k] = nullptr;
    if (spots[k].line >= shape.lines || (kPacked && (!valid || slot + shift >= selected.total))) continue;
    int32_t token = valid ? index_or_none(selected, indices[k]) : -1;
    if (kKind == Gather::winners && token >= 0 && !wins(selected, inverse, shape.merged, row, slot, token)) token = -1;
    const Strides offset = kPlain ? unit_offset(spots[k], sizeof(Unit)) : line_offset(shape, spots[k], sizeof(Unit));
    to[k] = move.target + here.target + offset.target + int64_t{slot + shift} * shape.token.target;
    const char* const from = move.source + here.source + offset.source + int64_t{token} * shape.token.source;
    values[k] = token >= 0 ? __ldg(reinterpret_cast<const Unit*>(from)) : pad[spots[k].unit % kPads];
  }
  for (int k = 0; k < kGatherItems; ++k) {
    if (to[k]) *reinterpret_cast<Unit*>(to[k]) = values[k];
  }
}

// Pads what the rows leave of the packed axis.
template <class Unit>
__device__ __forceinline__ void pad_tail(const Moved& move, const SelectedOnDevice& selected, uint32_t block,
                                         uint32_t blocks) {
  const int32_t begin = packed_begin(selected, selected.rows);
  const uint32_t length = static_cast<uint32_t>(selected.total - begin);
  const uint64_t count = uint64_t{length} * move.shape.lines * move.shape.units.divisor;
  const Unit* const pad = reinterpret_cast<const Unit*>(move.shape.pad);
  constexpr uint32_t kPads = 16 / sizeof(Unit);
  for (uint64_t i = uint64_t{block} * kMoveThreads + threadIdx.x; i < count; i += uint64_t{blocks} * kMoveThreads) {
    const uint64_t run = i / move.shape.units.divisor;
    const Spot spot{static_cast<uint32_t>(run / length), static_cast<uint32_t>(run % length),
                    static_cast<uint32_t>(i % move.shape.units.divisor)};
    const Strides offset = line_offset(move.shape, spot, sizeof(Unit));
    char* const target = move.target + offset.target + (int64_t{begin} + spot.position) * move.shape.token.target;
    *reinterpret_cast<Unit*>(target) = pad[spot.unit % kPads];
  }
}

// The tensor that this block works on.
__device__ __forceinline__ Moved moved_by(const Moves& moves, const Work& work) {
  return {moves.shape[moves.shape_of[work.move]], moves.source[work.move], moves.target[work.move]};
}

// packed and winners have more to keep in registers
//   kPlain: there is one tensor, without other axes, in units of 16 bytes. What describes it are constants of the
//   kernel, which takes no time to look for them.
template <Gather kKind, bool kPlain>
__global__ void __launch_bounds__(kMoveThreads, kKind == Gather::padded ? kGatherBlocks : 5)
    gather_kernel(const __grid_constant__ Moves moves, const SelectedOnDevice selected, const Inverse inverse) {
  if constexpr (kPlain) {
    const Split at = split(moves.shape[0].tiles, blockIdx.x);
    gather_tile<uint4, kKind, true>({moves.shape[0], moves.source[0], moves.target[0]}, selected, inverse,
                                    static_cast<int32_t>(at.quotient), at.rest);
    return;
  }
  const Work work = work_of_block(moves);
  const Moved move = moved_by(moves, work);
  with_unit(move.shape.width, [&](auto unit) {
    using Unit = decltype(unit);
    if (kKind != Gather::packed || work.block < move.shape.row_blocks) {
      const Split at = split(move.shape.tiles, work.block);
      gather_tile<Unit, kKind, false>(move, selected, inverse, static_cast<int32_t>(at.quotient), at.rest);
    } else {
      const uint32_t next = work.move + 1 < moves.count ? moves.first_block[work.move + 1] : gridDim.x;
      pad_tail<Unit>(move, selected, work.block - move.shape.row_blocks,
                     next - moves.first_block[work.move] - move.shape.row_blocks);
    }
  });
}

// restore, and the gradient of compact --------------------------------------------------------------------------------

// How rows are put together that land on tokens.
struct Landing {
  Inverse inverse;
  const void* gates;  // [rows, capacity]: every row is multiplied by its gate and added, to base too; nullptr: with
                      // `next` rows are added where several land on a token, without it the last one replaces
  bool gates_double;  // gates are float64, else float32
};

// The slot that lands on a token: the only one, or the one that replaces; or that there are several to be added.
struct Landed {
  int32_t row;
  int32_t slot;  // -1: none
  bool several;
};
// Over all rows.
__device__ __forceinline__ Landed landed_on(const SelectedOnDevice& selected, const Landing& landing, int32_t token) {
  const Inverse& inverse = landing.inverse;
  Landed landed{0, -1, false};
  PYVTK_NOT_UNROLLED
  for (int32_t row = 0; row < selected.rows; ++row) {
    const int32_t slot = __ldg(inverse.first + int64_t{row} * selected.tokens + token);
    if (slot < 0) continue;
    const bool again = landed.slot >= 0;
    landed.row = row;
    landed.slot = slot;
    if (inverse.next && (again || landing.gates ||
                         (inverse.repeated[row] && inverse.next[int64_t{row} * selected.capacity + slot] >= 0))) {
      landed.several = true;
      break;
    }
  }
  return landed;
}

// target = base + sum of gate * source over all slots of the token: rows in order, slots in order, rounded once. The
// offsets are those of the line and the unit.
template <class T, int kCount>
__device__ __forceinline__ void sum_landed(const Moved& move, const SelectedOnDevice& selected, const Landing& landing,
                                           int32_t first_row, int32_t last_row, int32_t token, char* target,
                                           const char* base, int64_t source_offset) {
  const Inverse& inverse = landing.inverse;
  Wide<T> sum[kCount] = {};
  if (base) add_pack<T, kCount>(sum, Wide<T>{1}, load_pack<T, kCount>(base));
  for (int32_t row = first_row; row < last_row; ++row) {
    int32_t slot = __ldg(inverse.first + int64_t{row} * selected.tokens + token);
    if (slot < 0) continue;
    const char* const source = move.source + source_offset + row_offset(move.shape, selected, row).source;
    const int32_t shift = inverse.shift ? inverse.shift[row] : 0;
    do {
      const int64_t at = int64_t{row} * selected.capacity + slot;
      const double weight = landing.gates ? number_at(landing.gates, landing.gates_double, at) : 1.0;
      add_pack<T, kCount>(sum, static_cast<Wide<T>>(weight),
                          load_pack<T, kCount>(source + int64_t{slot + shift} * move.shape.token.source));
      slot = inverse.repeated[row] ? inverse.next[at] : -1;
    } while (slot >= 0);
  }
  Pack<T, kCount> pack;
  for (int i = 0; i < kCount; ++i) pack.numbers[i] = from_wide<T>(sum[i]);
  store_pack<T, kCount>(target, pack);
}

// The same for a unit of any width.
template <class T>
__device__ __forceinline__ void sum_unit(const Moved& move, const SelectedOnDevice& selected, const Landing& landing,
                                         int32_t first_row, int32_t last_row, int32_t token, char* target,
                                         const char* base, int64_t source_offset) {
  if (move.shape.width == 16) {
    constexpr int kCount = 16 / sizeof(T);
    sum_landed<T, kCount>(move, selected, landing, first_row, last_row, token, target, base, source_offset);
    return;
  }
  constexpr int kBytes = sizeof(T);
  for (int at = 0; at < move.shape.width; at += kBytes) {
    sum_landed<T, 1>(move, selected, landing, first_row, last_row, token, target + at, base ? base + at : nullptr,
                     source_offset + at);
  }
}

// target[token] = what lands there, for the tokens of kScatterTiles tiles. Positions are tokens; `row` is -1 where all
// rows share one target. A bit for each item of this thread where rows have to be added: sums come later, so that moves
// do not wait for them.
template <class Unit>
__device__ __forceinline__ unsigned scatter_tiles(const Moved& move, const SelectedOnDevice& selected,
                                                  const Landing& landing, const Strides& here, Spot start,
                                                  int32_t row) {
  const Shape& shape = move.shape;
  const Inverse& inverse = landing.inverse;
  const bool chained = row >= 0 && inverse.next && (landing.gates || inverse.repeated[row]);
  Spot spot = spot_after(shape, start, threadIdx.x), ahead = spot;
  int32_t slots[kMoveItems];
  const auto look_ahead = [&] {
    for (int k = 0; k < kMoveItems; ++k, ahead = next_spot(shape, ahead)) {
      const bool exists = row >= 0 && ahead.line < shape.lines;
      slots[k] = exists ? __ldg(inverse.first + int64_t{row} * selected.tokens + ahead.position) : -1;
    }
  };
  look_ahead();
  unsigned several = 0;
  PYVTK_NOT_UNROLLED
  for (int tile = 0; tile < kScatterTiles && spot.line < shape.lines; ++tile) {
    char* to[kMoveItems];
    Unit values[kMoveItems];
    for (int k = 0; k < kMoveItems; ++k, spot = next_spot(shape, spot)) {
      to[k] = nullptr;
      values[k] = Unit{};
      if (spot.line >= shape.lines) continue;
      const auto token = static_cast<int32_t>(spot.position);
      Landed landed{row, slots[k], false};
      if (row < 0) {
        landed = landed_on(selected, landing, token);
      } else if (chained && landed.slot >= 0) {
        landed.several = landing.gates || inverse.next[int64_t{row} * selected.capacity + landed.slot] >= 0;
      }
      if (landed.several) {
        several |= 1u << (tile * kMoveItems + k);
        continue;
      }
      const Strides offset = line_offset(shape, spot, sizeof(Unit));
      to[k] = move.target + here.target + offset.target + int64_t{token} * shape.token.target;
      const char* from = nullptr;
      if (landed.slot < 0) {
        if (shape.base) from = shape.base + here.base + offset.base + int64_t{token} * shape.token.base;
      } else if (move.source) {
        const int32_t shift = inverse.shift ? inverse.shift[landed.row] : 0;
        const int64_t of_row = row < 0 ? row_offset(shape, selected, landed.row).source : here.source;
        from = move.source + of_row + offset.source + int64_t{landed.slot + shift} * shape.token.source;
      }
      if (from) values[k] = __ldg(reinterpret_cast<const Unit*>(from));
    }
    look_ahead();
    for (int k = 0; k < kMoveItems; ++k) {
      if (to[k]) *reinterpret_cast<Unit*>(to[k]) = values[k];
    }
  }
  return several;
}
static_assert(kScatterTiles * kMoveItems <= 32);

static __global__ void __launch_bounds__(kMoveThreads, kScatterBlocks)
    scatter_kernel(const __grid_constant__ Moves moves, const SelectedOnDevice selected, const Landing landing) {
  const Work work = work_of_block(moves);
  const Moved move = moved_by(moves, work);
  const Split at = split(move.shape.tiles, work.block);
  const int32_t row = move.shape.merged ? -1 : static_cast<int32_t>(at.quotient);
  const int32_t first_row = max(row, 0), last_row = move.shape.merged ? selected.rows : row + 1;
  const Spot start = spot_at(move.shape, uint64_t{at.rest} * (kScatterTiles * kTile));
  const Strides here = move.shape.merged ? Strides{} : row_offset(move.shape, selected, row);
  unsigned several = 0;
  with_unit(move.shape.width,
            [&](auto unit) { several = scatter_tiles<decltype(unit)>(move, selected, landing, here, start, row); });
  PYVTK_NOT_UNROLLED
  for (; several; several &= several - 1) {
    const auto k = static_cast<uint32_t>(__ffs(static_cast<int>(several)) - 1);
    const Spot spot = spot_after(move.shape, start, threadIdx.x + k * kMoveThreads);
    const auto token = static_cast<int32_t>(spot.position);
    const Strides offset = line_offset(move.shape, spot, static_cast<uint32_t>(move.shape.width));
    char* const target = move.target + here.target + offset.target + int64_t{token} * move.shape.token.target;
    const char* const base =
        move.shape.base ? move.shape.base + here.base + offset.base + int64_t{token} * move.shape.token.base : nullptr;
    const auto sum = [&](auto number) {
      sum_unit<decltype(number)>(move, selected, landing, first_row, last_row, token, target, base, offset.source);
    };
    switch (move.shape.number) {
      case Number::float32:
        sum(float{});
        break;
      case Number::float64:
        sum(double{});
        break;
      case Number::float16:
        sum(float16{});
        break;
      case Number::bfloat16:
        sum(bfloat16{});
        break;
      default:
        break;
    }
  }
}

// The gradient of restore with gates: target[row, slot] = gate * source[token], and the gate's own gradient, the dot
// product of source[token] and base[row, slot] over all lines. A warp has a slot.
template <class T, int kCount>
__global__ void __launch_bounds__(kMoveThreads, 3)
    recall_kernel(const __grid_constant__ Move move, const SelectedOnDevice selected, const void* gates,
                  bool gates_double, void* grad_gates) {
  const int64_t item = int64_t{blockIdx.x} * (kMoveThreads / 32) + warp_of_block();
  if (item >= int64_t{selected.rows} * selected.capacity) return;
  const auto row = static_cast<int32_t>(item / selected.capacity),
             slot = static_cast<int32_t>(item % selected.capacity);
  const int32_t token = token_of(selected, row, slots_of(selected, row), slot);
  const Wide<T> gate = static_cast<Wide<T>>(token >= 0 ? number_at(gates, gates_double, item) : 0.0);
  const Strides here = row_offset(move, selected, row);
  Wide<T> products[kCount] = {};
  for (uint32_t line = 0; line < move.lines; ++line) {
    const Strides offset = line_offset(move, {line, 0, 0}, 0);
    const char* const source = move.source + here.source + offset.source + int64_t{max(token, 0)} * move.token.source;
    const char* const base = move.base + here.base + offset.base + int64_t{slot} * move.token.base;
    char* const target = move.target + here.target + offset.target + int64_t{slot} * move.token.target;
    for (int64_t at = int64_t{lane_of_warp()} * move.width; at < int64_t{move.units.divisor} * move.width;
         at += 32 * move.width) {
      Pack<T, kCount> out{};
      if (token >= 0) {
        const Pack<T, kCount> grad = load_pack<T, kCount>(source + at);
        const Pack<T, kCount> update = load_pack<T, kCount>(base + at);
        for (int i = 0; i < kCount; ++i) {
          out.numbers[i] = from_wide<T>(fused(gate, to_wide(grad.numbers[i]), Wide<T>{0}));
          products[i] = fused(to_wide(grad.numbers[i]), to_wide(update.numbers[i]), products[i]);
        }
      }
      store_pack<T, kCount>(target + at, out);
    }
  }
  double product = 0;
  for (int i = 0; i < kCount; ++i) product += static_cast<double>(products[i]);
  product = sum_of_warp(product);
  if (lane_of_warp() > 0) return;
  if (gates_double) {
    static_cast<double*>(grad_gates)[item] = product;
  } else {
    static_cast<float*>(grad_gates)[item] = static_cast<float>(product);
  }
}

// compact_kv_ ---------------------------------------------------------------------------------------------------------

struct KvCache {
  char* data;
  int64_t batch, head, token;  // strides in bytes
  uint32_t heads;
  Divider units;  // of a slice of the run
  uint32_t run;   // units of all slices together
  uint16_t width;
  uint16_t slices;
};
struct KvCaches {
  int32_t count;
  uint32_t first_block[kMostCaches];
  KvCache caches[kMostCaches];
};
static_assert(sizeof(KvCaches) + 128 <= 4096, "what old drivers take as parameters");

// Moves the kept rows of one slice to its front and zeroes rows [count, capacity). (slot, unit) are counted through and
// walked kTile at a time: all loads of a chunk, a barrier, then all stores. No barrier follows the stores, and yet
// nothing is overwritten that is still to be read:
//   A store to (slot s, unit u) could only harm a load of token s, unit u, made for the slot s' with token(s') = s.
//   Rows ascend, so slots never lie behind their tokens: s' <= token(s') = s. Hence (s', u) does not come after (s, u)
//   in the count; its load belongs to the same chunk, which the barrier has ended, or to an earlier one.
// A selection that does not ascend gives wrong rows, yet only reads tokens and writes slots of this slice.
template <class Unit>
__device__ __forceinline__ void compact_slice(const KvCache& cache, const SelectedOnDevice& selected, int32_t row,
                                              char* data, uint32_t first_unit) {
  const Slots slots = slots_of(selected, row);
  const auto capacity = static_cast<uint32_t>(selected.capacity);
  // What this thread has of a chunk. Padding is read too, rather than to wait for the count.
  struct Items {
    Split at[kMoveItems];  // slot and unit
    int64_t indices[kMoveItems];
  };
  const auto items_of = [&](Split chunk) {
    Items items;
    for (int k = 0; k < kMoveItems; ++k) {
      Split at = split(cache.units, chunk.rest + threadIdx.x + static_cast<uint32_t>(k) * kMoveThreads);
      at.quotient += chunk.quotient;
      at.rest += first_unit;
      const bool exists = at.quotient < capacity && at.rest < cache.run;
      items.indices[k] = exists ? __ldg(selected.indices + int64_t{row} * selected.capacity + at.quotient) : -1;
      items.at[k] = exists ? at : Split{capacity, 0};
    }
    return items;
  };
  Split chunk{0, 0};
  for (Items items = items_of(chunk); chunk.quotient < capacity;) {
    Unit values[kMoveItems];
    char* to[kMoveItems];
    for (int k = 0; k < kMoveItems; ++k) {
      const auto slot = static_cast<int32_t>(items.at[k].quotient);
      const int32_t token = slot >= slots.begin && slot < slots.end ? index_or_none(selected, items.indices[k]) : -1;
      to[k] = nullptr;
      values[k] = Unit{};
      if (slot == selected.capacity || token == slot) continue;
      char* const column = data + static_cast<int64_t>(uint64_t{items.at[k].rest} * sizeof(Unit));
      to[k] = column + int64_t{slot} * cache.token;
      if (token >= 0) values[k] = *reinterpret_cast<const Unit*>(column + int64_t{token} * cache.token);
    }
    const Split next = split(cache.units, chunk.rest + kTile);
    chunk = {chunk.quotient + next.quotient, next.rest};
    items = items_of(chunk);
    __syncthreads();
    for (int k = 0; k < kMoveItems; ++k) {
      if (to[k]) *reinterpret_cast<Unit*>(to[k]) = values[k];
    }
  }
}

static __global__ void __launch_bounds__(kMoveThreads, 3)
    compact_kv_kernel(const __grid_constant__ KvCaches caches, const SelectedOnDevice selected, bool per_head) {
  int32_t low = 0, high = caches.count;
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (caches.first_block[middle] <= blockIdx.x ? low : high) = middle;
  }
  const KvCache& cache = caches.caches[low];
  const uint32_t block = blockIdx.x - caches.first_block[low];
  const uint32_t slice = block % cache.slices, pair = block / cache.slices;
  const uint32_t batch = pair / cache.heads, head = pair % cache.heads;
  char* const data = cache.data + int64_t{batch} * cache.batch + int64_t{head} * cache.head;
  with_unit(cache.width, [&](auto unit) {
    compact_slice<decltype(unit)>(cache, selected, static_cast<int32_t>(per_head ? pair : batch), data,
                                  slice * cache.units.divisor);
  });
}

// Launchers -----------------------------------------------------------------------------------------------------------

// Describes a tensor; `positions` are slots (of a target of gather) or tokens (of scatter). false: too many axes or too
// large.
inline bool describe(const MoveShape& shape, int64_t positions, const void* source, void* target, const void* base,
                     Move& move) {
  move = {};
  move.source = static_cast<const char*>(source);
  move.target = static_cast<char*>(target);
  move.base = static_cast<const char*>(base);
  uint64_t all = static_cast<uint64_t>(shape.run) | reinterpret_cast<uintptr_t>(source) |
                 reinterpret_cast<uintptr_t>(target) | reinterpret_cast<uintptr_t>(base);
  const auto strides = [&](const Axis& axis) {
    const Strides found{source ? axis.source : 0, axis.target, base ? axis.base : 0};
    all |= static_cast<uint64_t>(found.source | found.target | found.base);
    return found;
  };
  move.batch = strides(shape.batch);
  move.head = strides(shape.head);
  move.token = strides(shape.token);
  if (shape.outer.size() > kMostAxes) return false;
  for (const Axis& axis : shape.outer) {
    if (axis.size > kMostCounted) return false;
    move.outer[move.axes++] = {divider_of(axis.size > 0 ? axis.size : 1), strides(axis)};
  }
  move.width = width_of(all);
  const int64_t units = shape.run / move.width;
  if (shape.lines > kMostCounted || positions > kMostCounted || units > kMostCounted) return false;
  move.lines = units > 0 ? static_cast<uint32_t>(shape.lines) : 0;
  move.units = divider_of(units > 0 ? units : 1);
  move.positions = divider_of(positions > 0 ? positions : 1);
  move.next_position = kMoveThreads / move.units.divisor;
  move.next_unit = kMoveThreads % move.units.divisor;
  const double in_row = static_cast<double>(shape.lines) * static_cast<double>(positions) * static_cast<double>(units);
  if (in_row / kGatherTile >= static_cast<double>(kMostCounted)) return false;
  move.units_of_row =
      static_cast<uint64_t>(shape.lines) * static_cast<uint64_t>(positions) * static_cast<uint64_t>(units);
  return true;
}

namespace detail {

// Runs send(moves, blocks), as often as it takes for all of them. blocks_of(move): how many blocks a move takes.
template <class BlocksOf, class Send>
cudaError_t in_launches(const Move* moves, int64_t count, BlocksOf&& blocks_of, Send&& send) {
  for (int64_t next = 0; next < count;) {
    Moves batch;
    batch.count = batch.shapes = 0;
    uint64_t blocks = 0;
    for (; next < count && batch.count < kMostMoves; ++next) {
      const Move& move = moves[next];
      const uint64_t more = blocks_of(move);
      if (more == 0) continue;
      if (more > static_cast<uint64_t>(kMostCounted)) return cudaErrorInvalidValue;
      if (blocks + more > static_cast<uint64_t>(kMostCounted)) break;
      int32_t shape = 0;
      while (shape < batch.shapes && batch.shape[shape] != move) ++shape;
      if (shape == kMostShapes) break;
      if (shape == batch.shapes) batch.shape[batch.shapes++] = move;
      batch.first_block[batch.count] = static_cast<uint32_t>(blocks);
      batch.shape_of[batch.count] = static_cast<uint8_t>(shape);
      batch.source[batch.count] = move.source;
      batch.target[batch.count++] = move.target;
      blocks += more;
    }
    if (batch.count == 0) continue;
    const cudaError_t status = send(batch, static_cast<unsigned>(blocks));
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

// Cuts `rows` rows into tiles, a block for each. false: too many.
inline bool cut(Move& move, int64_t rows, uint32_t units_of_tile) {
  const uint64_t tiles = ceil_div<uint64_t>(move.units_of_row, units_of_tile);
  const uint64_t blocks = tiles * static_cast<uint64_t>(rows);
  if (blocks > uint64_t{kMostCounted}) return false;
  move.tiles = divider_of(tiles > 0 ? static_cast<int64_t>(tiles) : 1);
  move.row_blocks = static_cast<uint32_t>(blocks);
  return true;
}

}  // namespace detail

// compact: moves whose positions are slots; they are cut.
inline cudaError_t gather(Move* moves, int64_t count, const SelectedOnDevice& selected, cudaStream_t stream) {
  const bool packed = selected.total >= 0;
  const auto tail_blocks = [&](const Move& move) -> uint64_t {
    if (!packed || selected.total == 0) return 0;
    const uint64_t lines = uint64_t{move.lines} * static_cast<uint64_t>(selected.total);
    return std::min<uint64_t>(ceil_div<uint64_t>(lines, kTile) * move.units.divisor, kTailBlocks);
  };
  for (int64_t i = 0; i < count; ++i) {
    if (!detail::cut(moves[i], selected.rows, kGatherTile)) return cudaErrorInvalidValue;
  }
  return detail::in_launches(
      moves, count, [&](const Move& move) { return move.row_blocks + tail_blocks(move); },
      [&](const Moves& batch, unsigned blocks) {
        const bool plain = !packed && batch.count == 1 && batch.shape[0].width == 16 && batch.shape[0].axes == 0;
        return launch(packed  ? gather_kernel<Gather::packed, false>
                      : plain ? gather_kernel<Gather::padded, true>
                              : gather_kernel<Gather::padded, false>,
                      dim3(blocks), dim3(kMoveThreads), 0, stream, batch, selected, Inverse{});
      });
}

// The gradient of restore without gates: one move, whose positions are slots; `inverse` without chains.
inline cudaError_t gather_winners(Move move, const SelectedOnDevice& selected, const Inverse& inverse,
                                  cudaStream_t stream) {
  if (!detail::cut(move, selected.rows, kGatherTile)) return cudaErrorInvalidValue;
  return detail::in_launches(
      &move, 1, [](const Move& one) { return uint64_t{one.row_blocks}; },
      [&](const Moves& batch, unsigned blocks) {
        return launch(gather_kernel<Gather::winners, false>, dim3(blocks), dim3(kMoveThreads), 0, stream, batch,
                      selected, inverse);
      });
}

// restore and the gradient of compact: moves whose positions are tokens; they are cut.
inline cudaError_t scatter(Move* moves, int64_t count, const SelectedOnDevice& selected, const Landing& landing,
                           cudaStream_t stream) {
  for (int64_t i = 0; i < count; ++i) {
    if (!detail::cut(moves[i], moves[i].merged ? 1 : selected.rows, kScatterTiles * kTile)) {
      return cudaErrorInvalidValue;
    }
  }
  return detail::in_launches(
      moves, count, [](const Move& move) { return uint64_t{move.row_blocks}; },
      [&](const Moves& batch, unsigned blocks) {
        return launch(scatter_kernel, dim3(blocks), dim3(kMoveThreads), 0, stream, batch, selected, landing);
      });
}

// The gradient of restore with gates. `move`: positions are slots, base is the update.
template <class T>
cudaError_t recall(Move move, const SelectedOnDevice& selected, const void* gates, bool gates_double, void* grad_gates,
                   cudaStream_t stream) {
  const int64_t items = int64_t{selected.rows} * selected.capacity;
  if (items == 0) return cudaSuccess;
  const int64_t blocks = ceil_div<int64_t>(items, kMoveThreads / 32);
  if (blocks > kMostCounted) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks)), threads(kMoveThreads);
  if (move.width == 16) {
    return launch(recall_kernel<T, static_cast<int>(16 / sizeof(T))>, grid, threads, 0, stream, move, selected, gates,
                  gates_double, grad_gates);
  }
  const int64_t numbers = int64_t{move.units.divisor} * move.width / static_cast<int64_t>(sizeof(T));
  if (numbers > kMostCounted || move.width < static_cast<int>(sizeof(T))) return cudaErrorInvalidValue;
  if (move.units_of_row > 0) move.units = divider_of(numbers);
  move.width = sizeof(T);
  return launch(recall_kernel<T, 1>, grid, threads, 0, stream, move, selected, gates, gates_double, grad_gates);
}

// compact_kv_, for caches described by data, strides, heads and `run`, which counts bytes here. All have
// selected.tokens tokens; per_head: rows of the selection are (batch, head), else batch.
inline cudaError_t compact_kv(const KvCache* caches, int64_t count, const SelectedOnDevice& selected, int64_t batch,
                              bool per_head, cudaStream_t stream) {
  if (batch == 0 || selected.capacity == 0) return cudaSuccess;
  if (selected.capacity > selected.tokens) return cudaErrorInvalidValue;
  int at_a_time = 0;
  cudaError_t status = multiprocessors(at_a_time);
  if (status != cudaSuccess) return status;
  int64_t pairs = 0;
  for (int64_t i = 0; i < count; ++i) pairs += caches[i].run > 0 ? batch * int64_t{caches[i].heads} : 0;
  // A walk has no more in flight than one chunk, so many of them have to run at a time; below 64 bytes a slice would
  // waste what memory fetches at once.
  const int64_t wanted = ceil_div<int64_t>(8 * int64_t{at_a_time}, std::max<int64_t>(pairs, 1));
  for (int64_t next = 0; next < count;) {
    KvCaches some;
    some.count = 0;
    uint64_t blocks = 0;
    for (; next < count && some.count < kMostCaches; ++next) {
      KvCache cache = caches[next];
      if (cache.run == 0 || cache.heads == 0) continue;
      const int32_t width =
          width_of(reinterpret_cast<uintptr_t>(cache.data) |
                   static_cast<uint64_t>(cache.batch | cache.head | cache.token | int64_t{cache.run}));
      const int64_t units = int64_t{cache.run} / width;
      const int64_t slices = std::clamp<int64_t>(wanted, 1, std::clamp<int64_t>(cache.run / 64, 1, 1024));
      const int64_t per_slice = ceil_div<int64_t>(units, slices);
      cache.units = divider_of(per_slice);
      cache.run = static_cast<uint32_t>(units);
      cache.width = static_cast<uint16_t>(width);
      cache.slices = static_cast<uint16_t>(ceil_div<int64_t>(units, per_slice));
      const uint64_t more = static_cast<uint64_t>(batch) * cache.heads * cache.slices;
      if (more > static_cast<uint64_t>(kMostCounted)) return cudaErrorInvalidValue;
      if (blocks + more > static_cast<uint64_t>(kMostCounted)) break;
      some.first_block[some.count] = static_cast<uint32_t>(blocks);
      some.caches[some.count++] = cache;
      blocks += more;
    }
    if (some.count == 0) continue;
    status = launch(compact_kv_kernel, dim3(static_cast<unsigned>(blocks)), dim3(kMoveThreads), 0, stream, some,
                    selected, per_head);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace pyvtk::cuda
