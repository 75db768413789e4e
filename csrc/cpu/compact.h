// Moves the rows that a selection names: gather (compact), scatter (restore, gradients), in-place moves (KV caches).
//
// A copy knows no dtype and waits for memory, so nothing here is compiled per instruction set. A tensor is seen as
// rows of a selection (batch, head) x outer axes x tokens x one run of bytes. Work is cut into items of about
// kItemBytes over all tensors, so that small ones ride along with large ones in one parallel loop. Every byte of the
// output is written once; memory bandwidth is the limit.
#pragma once
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "common/compact_shape.h"
#include "cpu/links.h"

namespace pyvtk::cpu {

// Bytes per work item: enough to hide the bookkeeping, little enough to share among threads.
inline constexpr int64_t kItemBytes = 64 * 1024;

// How far ahead of a copy short rows are fetched into the cache.
inline constexpr int64_t kAheadBytes = 2048;

// One row of a selection, laid over the positions of the output that it fills.
struct Row {
  const int64_t* tokens;  // the token of position `first`, `first + 1`, ...
  int64_t batch, head;
  int64_t begin, end;   // positions that this row owns
  int64_t first, last;  // those of them that hold a token; the others are padding
};

// How the tensors of a job lie in memory, and how its work is cut into items.
struct Shape : MoveShape {
  int64_t block = 0;   // positions per work item
  int64_t blocks = 0;  // blocks per line
  int64_t items = 0;

  // `extent` is the largest number of positions that a row owns.
  void divide(int64_t rows, int64_t extent) {
    block = std::max<int64_t>(1, kItemBytes / std::max<int64_t>(1, run));
    blocks = (extent + block - 1) / block;
    items = run > 0 ? rows * lines * blocks : 0;
  }
};

// Strides of one row and line of a job, summed up.
struct Offset {
  int64_t source, target, base;

  void add(const Axis& axis, int64_t at) {
    source += at * axis.source;
    target += at * axis.target;
    base += at * axis.base;
  }
};

inline Offset offset_of(const Shape& shape, int64_t batch, int64_t head, int64_t line) {
  Offset offset{};
  offset.add(shape.batch, batch);
  offset.add(shape.head, head);
  for (size_t axis = shape.outer.size(); axis-- > 0; line /= shape.outer[axis].size) {
    offset.add(shape.outer[axis], line % shape.outer[axis].size);
  }
  return offset;
}

// One tensor to compact.
struct Gather {
  Shape shape;
  const char* source;
  char* target;
  std::array<char, 16> pad;  // the bytes of one padding element
  bool streaming;            // stores bypass the cache
};

// Copies `bytes` >= 64 of them and fetches `next`, a row of the same length, into the cache meanwhile: the processor
// cannot foresee where a later selected row lies. Inlined, since a call of memcpy costs as much as a short row.
inline void copy_row(char* target, const char* source, const char* next, int64_t bytes) {
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    __builtin_prefetch(next + at);
    std::memcpy(target + at, source + at, 64);
  }
  if (at < bytes) std::memcpy(target + bytes - 64, source + bytes - 64, 64);  // some bytes twice, to the same value
}

// The same with stores that bypass the cache: the target is not read first.
inline void copy_streaming(char* target, const char* source, const char* next, int64_t bytes) {
  int64_t at = 0;
#if defined(__SSE2__)
  at = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(target) & 15);
  std::memcpy(target, source, static_cast<size_t>(at));
  for (; at + 64 <= bytes; at += 64) {
    __builtin_prefetch(next + at);
    const auto* from = reinterpret_cast<const __m128i*>(source + at);
    auto* to = reinterpret_cast<__m128i*>(target + at);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a);
    _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c);
    _mm_stream_si128(to + 3, d);
  }
#else
  __builtin_prefetch(next);
#endif
  std::memcpy(target + at, source + at, static_cast<size_t>(bytes - at));
}

// Non-temporal stores are weakly ordered; another thread may read the output next.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <int64_t kRun>
inline void gather_small(char* target, int64_t target_stride, const char* source, int64_t source_stride,
                         const int64_t* tokens, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * target_stride, source + tokens[i] * source_stride, kRun);
  }
}

// target[i] = source[tokens[i]] for rows of `run` bytes; `following` is the source of the call after this one, for the
// same tokens.
inline void gather_rows(char* target, int64_t target_stride, const char* source, int64_t source_stride,
                        const int64_t* tokens, int64_t count, int64_t run, bool streaming, const char* following) {
  switch (run) {
    case 1:
      return gather_small<1>(target, target_stride, source, source_stride, tokens, count);
    case 2:
      return gather_small<2>(target, target_stride, source, source_stride, tokens, count);
    case 4:
      return gather_small<4>(target, target_stride, source, source_stride, tokens, count);
    case 8:
      return gather_small<8>(target, target_stride, source, source_stride, tokens, count);
    case 16:
      return gather_small<16>(target, target_stride, source, source_stride, tokens, count);
    default:
      break;
  }
  const auto row = [&](int64_t i) { return source + tokens[std::min(i, count - 1)] * source_stride; };
  if (streaming) {
    for (int64_t i = 0; i < count; ++i) copy_streaming(target + i * target_stride, row(i), row(i + 1), run);
    return finish_streaming();
  }
  if (run >= 64) {
    const int64_t ahead = std::max<int64_t>(1, kAheadBytes / run);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t next = i + ahead;
      const char* fetched =
          next < count ? row(next) : following + tokens[std::min(next - count, count - 1)] * source_stride;
      copy_row(target + i * target_stride, row(i), fetched, run);
    }
    return;
  }
  const bool dense = source_stride == run && target_stride == run;
  for (int64_t i = 0; i < count;) {
    int64_t together = 1;  // neighbours that stay neighbours move as one
    if (dense) {
      while (i + together < count && tokens[i + together] == tokens[i] + together) ++together;
    }
    std::memcpy(target + i * target_stride, row(i), static_cast<size_t>(together * run));
    i += together;
  }
}

inline void pad_rows(const Gather& job, char* target, int64_t count) {
  const Shape& shape = job.shape;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t at = 0; at < shape.run; at += shape.element) {
      std::memcpy(target + i * shape.token.target + at, job.pad.data(), static_cast<size_t>(shape.element));
    }
  }
}

inline void gather(const Gather& job, const std::vector<Row>& rows, int64_t item) {
  const Shape& shape = job.shape;
  const Row& row = rows[static_cast<size_t>(item / (shape.blocks * shape.lines))];
  const int64_t begin = row.begin + item % shape.blocks * shape.block;
  const int64_t end = std::min(begin + shape.block, row.end);
  if (begin >= end) return;
  const int64_t line = item / shape.blocks % shape.lines;
  const Offset offset = offset_of(shape, row.batch, row.head, line);
  const bool more = shape.blocks == 1 && line + 1 < shape.lines;
  const int64_t following = more ? offset_of(shape, row.batch, row.head, line + 1).source : offset.source;
  const int64_t first = std::clamp(row.first, begin, end);
  const int64_t last = std::clamp(row.last, first, end);
  char* target = job.target + offset.target;
  const int64_t stride = shape.token.target;
  pad_rows(job, target + begin * stride, first - begin);
  gather_rows(target + first * stride, stride, job.source + offset.source, shape.token.source,
              row.tokens + (first - row.first), last - first, shape.run, job.streaming, job.source + following);
  pad_rows(job, target + last * stride, end - last);
}

// The rows of a selection that land on each token, duplicates included. Token t of row r gets number
// `merged ? t : r * tokens + t`: merged where all rows share one table.
inline Links links_of(const std::vector<Row>& rows, int64_t tokens, bool merged) {
  Links links;
  links.build(merged ? tokens : static_cast<int64_t>(rows.size()) * tokens, [&](auto&& visit) {
    for (size_t r = 0; r < rows.size(); ++r) {
      const int64_t base = merged ? 0 : static_cast<int64_t>(r) * tokens;
      for (int64_t position = rows[r].first; position < rows[r].last; ++position) {
        visit(base + rows[r].tokens[position - rows[r].first], Link{static_cast<int64_t>(r), position});
      }
    }
  });
  return links;
}

// One tensor whose rows go back to their tokens. Every token is written once, from what its links name.
struct Scatter {
  Shape shape;  // tokens are the target's and base's axis, positions the source's
  const char* source;
  char* target;
  const char* base;  // tokens that no row lands on; null: zeros
  const Links* links;
  bool merged;          // all rows share one target
  bool add;             // several rows on a token are added, to base too; otherwise the last one replaces it
  const double* gates;  // [rows, capacity], or null
  int64_t capacity;
  int64_t tokens;
  SumRows sum;     // null: no arithmetic for this dtype
  int64_t number;  // bytes of what `sum` adds: of one half of a complex element
};

inline void scatter(const Scatter& job, const std::vector<Row>& rows, int64_t item) {
  const Shape& shape = job.shape;
  const int64_t line = item / shape.blocks % shape.lines;
  const int64_t group = item / (shape.blocks * shape.lines);
  const int64_t begin = item % shape.blocks * shape.block;
  const int64_t end = std::min(begin + shape.block, job.tokens);
  Offset here = offset_of(shape, 0, 0, line);
  const int64_t source_line = here.source;
  if (!job.merged) {
    const Row& row = rows[static_cast<size_t>(group)];
    here = offset_of(shape, row.batch, row.head, line);
  }
  const auto bytes = static_cast<size_t>(shape.run);
  std::vector<const void*> sources;
  std::vector<double> weights;
  for (int64_t token = begin; token < end; ++token) {
    char* target = job.target + here.target + token * shape.token.target;
    const char* base = job.base ? job.base + here.base + token * shape.token.base : nullptr;
    const int64_t number = (job.merged ? 0 : group * job.tokens) + token;
    const Link* link = job.links->begin(number);
    const Link* stop = job.links->end(number);
    if (link == stop) {
      base ? std::memcpy(target, base, bytes) : std::memset(target, 0, bytes);
      continue;
    }
    const auto row_of = [&](const Link& l) {
      const Row& row = rows[static_cast<size_t>(l.row)];
      return job.source + source_line + row.batch * shape.batch.source + row.head * shape.head.source +
             l.position * shape.token.source;
    };
    if (job.source == nullptr) {  // nothing to put there: clear
      std::memset(target, 0, bytes);
      continue;
    }
    const bool alone = stop - link == 1 && job.base == nullptr && job.gates == nullptr;
    if (!job.add || alone) {
      std::memcpy(target, row_of(stop[-1]), bytes);
      continue;
    }
    sources.clear();
    weights.clear();
    for (; link != stop; ++link) {
      sources.push_back(row_of(*link));
      weights.push_back(job.gates ? job.gates[link->row * job.capacity + link->position] : 1.0);
    }
    job.sum(target, base, sources.data(), weights.data(), static_cast<int64_t>(sources.size()), 1.0,
            shape.run / job.number);
  }
}

// The gradient of a restored tensor, seen from the rows that went in: source is the gradient [tokens], target the
// gradient of the update [positions], base the update itself (for the gradient of the gate).
struct Recall {
  Shape shape;
  const char* source;
  char* target;
  const char* base;
  const Links* links;
  const double* gates;  // [rows, capacity]; null: rows were replaced, and only the last one on a token counts
  double* grad_gates;
  bool merged;
  int64_t capacity;
  int64_t tokens;
  SumRows sum;
  Dot dot;
  int64_t number;
};

// One item is a block of positions with all their lines, since a gate's gradient sums over those.
inline void recall(const Recall& job, const std::vector<Row>& rows, int64_t item) {
  const Shape& shape = job.shape;
  const int64_t r = item / shape.blocks;
  const Row& row = rows[static_cast<size_t>(r)];
  const int64_t begin = item % shape.blocks * shape.block;
  const int64_t end = std::min(begin + shape.block, row.end);
  for (int64_t line = 0; line < shape.lines; ++line) {
    const Offset offset = offset_of(shape, row.batch, row.head, line);
    for (int64_t position = begin; position < end; ++position) {
      char* target = job.target + offset.target + position * shape.token.target;
      const bool valid = row.first <= position && position < row.last;
      const int64_t token = valid ? row.tokens[position - row.first] : 0;
      const char* source = job.source + offset.source + token * shape.token.source;
      const int64_t at = r * job.capacity + position;
      if (job.gates != nullptr) {
        const char* update = job.base + offset.base + position * shape.token.base;
        const double weight = valid ? job.gates[at] : 0.0;
        const void* from = source;
        job.sum(target, nullptr, &from, &weight, valid ? 1 : 0, 1.0, shape.run / job.number);
        const double before = line == 0 ? 0.0 : job.grad_gates[at];
        job.grad_gates[at] = before + (valid ? job.dot(source, update, shape.run / job.number) : 0.0);
      } else {
        const Link* last = valid ? job.links->end((job.merged ? 0 : r * job.tokens) + token) - 1 : nullptr;
        const bool counts = valid && last->row == r && last->position == position;
        counts ? std::memcpy(target, source, static_cast<size_t>(shape.run))
               : std::memset(target, 0, static_cast<size_t>(shape.run));
      }
    }
  }
}

// Moves the kept rows of one [tokens, run] slice of a cache to its front and zeroes rows [count, capacity).
// Ascending tokens never lie before their slot, so moving in order never overwrites a row that is still needed.
inline void compact_in_place(char* slice, int64_t stride, int64_t run, const int64_t* tokens, int64_t count,
                             int64_t capacity) {
  for (int64_t slot = 0; slot < count;) {
    int64_t together = 1;
    if (stride == run) {
      while (slot + together < count && tokens[slot + together] == tokens[slot] + together) ++together;
    }
    if (tokens[slot] != slot) {
      std::memmove(slice + slot * stride, slice + tokens[slot] * stride, static_cast<size_t>(together * run));
    }
    slot += together;
  }
  for (int64_t slot = count; slot < capacity; ++slot) std::memset(slice + slot * stride, 0, static_cast<size_t>(run));
}

}  // namespace pyvtk::cpu
