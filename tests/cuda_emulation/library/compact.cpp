#include "cuda/compact.cuh"

#include <cstring>

#include "library.h"

using namespace pyvtk;
using namespace pyvtk::cuda;

// A tensor: strides and `element` as torch counts them.
struct TensorOf {
  void* data;
  int64_t rank, element;
  int64_t sizes[8], strides[8];
};

// What all operators take. total -1: not packed.
struct SelectionOf {
  const int64_t* indices;
  const int32_t* counts;
  int64_t batch, heads, has_heads, capacity, tokens, total, align_right;
};

namespace {

bool described(const SelectionOf& selection, SelectedOnDevice& selected) {
  return describe(selection.batch * selection.heads, selection.heads, selection.capacity, selection.tokens,
                  selection.total, selection.align_right != 0, selection.indices, selection.counts, selected);
}

View view_of(const TensorOf& tensor, int64_t dim, int64_t batch_dim, bool heads) {
  View view;
  take_apart(tensor.sizes, tensor.strides, tensor.rank, dim, batch_dim, heads, tensor.element, view);
  return view;
}

int64_t elements(const TensorOf& tensor) {
  int64_t count = 1;
  for (int64_t axis = 0; axis < tensor.rank; ++axis) count *= tensor.sizes[axis];
  return count;
}

// Where the token axis, and the fused axis of a packed result, stand in the output: as in common/compact_binding.h.
void place(int64_t& dim, int64_t& batch_dim, bool packed) {
  if (packed) {
    dim = batch_dim < 0 ? 0 : batch_dim - (dim < batch_dim);
    batch_dim = -1;
  } else if (batch_dim < 0) {
    ++dim;
    batch_dim = 0;
  }
}

// The tables of slots, in memory of exactly their size.
struct Slotted {
  int32_t* memory;
  Inverse inverse;
  cudaError_t status;

  Slotted(const SelectedOnDevice& selected, bool chains)
      : memory(static_cast<int32_t*>(std::malloc(static_cast<size_t>(4 * inverse_size(selected, chains))))),
        inverse(inverse_in(memory, selected, chains)),
        status(invert(selected, inverse, nullptr)) {}
  ~Slotted() { std::free(memory); }
};

}  // namespace

EXPORT int emulated_compact(const SelectionOf* selection, int64_t count, const TensorOf* tensors, const TensorOf* outs,
                            const int64_t* dims, const int64_t* batch_dims, const unsigned char* pads) {
  SelectedOnDevice selected;
  if (!described(*selection, selected)) return report(cudaErrorInvalidValue);
  std::vector<Move> moves;
  for (int64_t i = 0; i < count; ++i) {
    if (elements(outs[i]) == 0) continue;
    int64_t dim = dims[i], batch_dim = batch_dims[i];
    const View source = view_of(tensors[i], dim, batch_dim, selection->has_heads);
    place(dim, batch_dim, selection->total >= 0);
    MoveShape shape;
    Move& move = moves.emplace_back();
    if (!put_together(source, view_of(outs[i], dim, batch_dim, selection->has_heads), source, outs[i].element, shape) ||
        !describe(shape, selection->capacity, tensors[i].data, outs[i].data, nullptr, move)) {
      return report(cudaErrorInvalidValue);
    }
    std::memcpy(move.pad, pads + 16 * i, 16);
  }
  return report(gather(moves.data(), static_cast<int64_t>(moves.size()), selected, nullptr));
}

EXPORT int emulated_compact_backward(const SelectionOf* selection, int64_t count, const TensorOf* grads,
                                     const TensorOf* outs, const int64_t* dims, const int64_t* batch_dims,
                                     const int64_t* merged, const int64_t* numbers) {
  SelectedOnDevice selected;
  if (!described(*selection, selected)) return report(cudaErrorInvalidValue);
  std::vector<Move> moves;
  for (int64_t i = 0; i < count; ++i) {
    if (elements(outs[i]) == 0) continue;
    int64_t dim = dims[i], batch_dim = batch_dims[i];
    const View target = view_of(outs[i], dim, batch_dim, selection->has_heads);
    place(dim, batch_dim, selection->total >= 0);
    const View source = view_of(grads[i], dim, batch_dim, selection->has_heads);
    MoveShape shape;
    Move& move = moves.emplace_back();
    if (!put_together(source, target, source, outs[i].element, shape) ||
        !describe(shape, selection->tokens, grads[i].data, outs[i].data, nullptr, move)) {
      return report(cudaErrorInvalidValue);
    }
    move.merged = static_cast<int32_t>(merged[i]);
    move.number = static_cast<Number>(numbers[i]);
  }
  const Slotted slotted(selected, true);
  if (slotted.status != cudaSuccess) return report(slotted.status);
  return report(
      scatter(moves.data(), static_cast<int64_t>(moves.size()), selected, {slotted.inverse, nullptr, false}, nullptr));
}

// update and base may be null.
EXPORT int emulated_restore(const SelectionOf* selection, const TensorOf* update, const TensorOf* base,
                            const TensorOf* out, const void* gates, int gates_double, int64_t dim, int packed_source,
                            int64_t number) {
  SelectedOnDevice selected;
  if (!described(*selection, selected)) return report(cudaErrorInvalidValue);
  if (elements(*out) == 0) return report(cudaSuccess);
  const View target = view_of(*out, dim, packed_source ? -1 : 0, selection->has_heads);
  const View source = update ? view_of(*update, dim + packed_source, 0, selection->has_heads) : target;
  const View before = base ? view_of(*base, dim, packed_source ? -1 : 0, selection->has_heads) : target;
  MoveShape shape;
  Move move;
  if (!put_together(source, target, before, out->element, shape) ||
      !describe(shape, selection->tokens, update ? update->data : nullptr, out->data, base ? base->data : nullptr,
                move)) {
    return report(cudaErrorInvalidValue);
  }
  move.merged = packed_source;
  move.number = static_cast<Number>(number);
  const Slotted slotted(selected, gates != nullptr);
  if (slotted.status != cudaSuccess) return report(slotted.status);
  return report(scatter(&move, 1, selected, {slotted.inverse, gates, gates_double != 0}, nullptr));
}

// Without gates, update and grad_gates are null.
EXPORT int emulated_restore_backward(const SelectionOf* selection, const TensorOf* grad, const TensorOf* update,
                                     const TensorOf* out, const void* gates, int gates_double, void* grad_gates,
                                     int64_t dim, int packed_source, int64_t number) {
  SelectedOnDevice selected;
  if (!described(*selection, selected)) return report(cudaErrorInvalidValue);
  const View target = view_of(*out, dim + packed_source, 0, selection->has_heads);
  const View source = view_of(*grad, dim, packed_source ? -1 : 0, selection->has_heads);
  const View base = update ? view_of(*update, dim + packed_source, 0, selection->has_heads) : target;
  MoveShape shape;
  Move move;
  if (!put_together(source, target, base, out->element, shape) ||
      !describe(shape, selection->capacity, grad->data, out->data, update ? update->data : nullptr, move)) {
    return report(cudaErrorInvalidValue);
  }
  move.merged = packed_source;
  if (gates == nullptr) {
    const Slotted slotted(selected, false);
    if (slotted.status != cudaSuccess) return report(slotted.status);
    return report(gather_winners(move, selected, slotted.inverse, nullptr));
  }
  const bool doubles = gates_double != 0;
  switch (static_cast<Number>(number)) {
    case Number::float32:
      return report(recall<float>(move, selected, gates, doubles, grad_gates, nullptr));
    case Number::float64:
      return report(recall<double>(move, selected, gates, doubles, grad_gates, nullptr));
    case Number::float16:
      return report(recall<float16>(move, selected, gates, doubles, grad_gates, nullptr));
    default:
      return report(recall<bfloat16>(move, selected, gates, doubles, grad_gates, nullptr));
  }
}

EXPORT int emulated_compact_kv(const SelectionOf* selection, int64_t count, const TensorOf* caches) {
  SelectedOnDevice selected;
  if (!described(*selection, selected)) return report(cudaErrorInvalidValue);
  std::vector<KvCache> work;
  for (int64_t i = 0; i < count; ++i) {
    const TensorOf& cache = caches[i];
    if (elements(cache) == 0) continue;
    KvCache& one = work.emplace_back();
    one = {};
    one.data = static_cast<char*>(cache.data);
    one.batch = cache.strides[0] * cache.element;
    one.head = cache.strides[1] * cache.element;
    one.token = cache.strides[2] * cache.element;
    one.heads = static_cast<uint32_t>(cache.sizes[1]);
    one.run = static_cast<uint32_t>(cache.sizes[3] * cache.element);
  }
  return report(compact_kv(work.data(), static_cast<int64_t>(work.size()), selected, selection->batch,
                           selection->has_heads != 0, nullptr));
}
