// Binding of the compact family for CUDA tensors. Meaning: pyvtk/reference/compact.py. Values of indices and counts are
// on the device and stay there: what does not fit is padding.
#include <tuple>

#include "common/compact_binding.h"
#include "cuda/compact.cuh"
#include "cuda/stream_binding.h"

namespace pyvtk::cuda {
namespace {

// The selection, on the device of the tensors that follow it.
struct Selected : SelectedRows {
  SelectedOnDevice device;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  Selected(const Tensor& indices_, const Tensor& counts_, bool align_right, int64_t tokens,
           std::optional<int64_t> total = std::nullopt)
      : SelectedRows(indices_, counts_), guard(indices.get_device_index()), stream(current_stream(indices)) {
    on_device(counts);
    PYVTK_GUARD(!total.has_value() || *total >= 0, "total must be at least 0, got ", total.value_or(0));
    PYVTK_GUARD(describe(batch * heads, heads, capacity, tokens, total.value_or(-1), align_right,
                         data<int64_t>(indices), data<int32_t>(counts), device),
                "the selection is too large");
  }

  void on_device(const Tensor& tensor) const {
    const OptionalTensor other(tensor);
    guard_same_device(indices, {&other});
  }
};

Number number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
    case ScalarType::ComplexFloat:
      return Number::float32;
    case ScalarType::Double:
    case ScalarType::ComplexDouble:
      return Number::float64;
    case ScalarType::Half:
    case ScalarType::ComplexHalf:
      return Number::float16;
    case ScalarType::BFloat16:
      return Number::bfloat16;
    default:
      return Number::none;
  }
}

int64_t bytes_of(Number number) {
  return number == Number::float64 ? 8 : number == Number::float32 ? 4 : number == Number::none ? 1 : 2;
}

// Describes what moves; false where it takes a contiguous copy, since too many axes do not go together.
bool describe_move(const MoveShape& shape, int64_t positions, const Tensor* source, const Tensor& target,
                   const Tensor* base, Move& move) {
  if (shape.outer.size() > kMostAxes) return false;
  PYVTK_GUARD(describe(shape, positions, source ? source->const_data_ptr() : nullptr, target.mutable_data_ptr(),
                       base ? base->const_data_ptr() : nullptr, move),
              "a tensor is too large");
  return true;
}

// The same for a result of ours, which is contiguous: then a contiguous copy always helps.
void guard_described(bool described) { PYVTK_GUARD(described, "a tensor has too many axes that do not go together"); }

void compact_into(const Selected& selected, const std::vector<Tensor>& tensors, const std::vector<Tensor>& outs,
                  const std::vector<int64_t>& dims, const std::vector<int64_t>& batch_dims,
                  const std::vector<double>& pads, std::optional<int64_t> total) {
  PYVTK_GUARD(outs.size() == tensors.size() && batch_dims.size() == tensors.size() && pads.size() == tensors.size(),
              "lists of different lengths");
  std::vector<Move> moves;
  moves.reserve(tensors.size());
  std::vector<Tensor> copies;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    selected.on_device(tensor);
    selected.on_device(outs[i]);
    const MoveShape shape = compact_shape(tensor, outs[i], selected, dims[i], batch_dims[i], total);
    if (outs[i].numel() == 0) continue;
    Move& move = moves.emplace_back();
    if (!describe_move(shape, selected.capacity, &tensor, outs[i], nullptr, move)) {
      copies.push_back(torch::stable::contiguous(tensor));
      guard_described(describe_move(compact_shape(copies.back(), outs[i], selected, dims[i], batch_dims[i], total),
                                    selected.capacity, &copies.back(), outs[i], nullptr, move));
    }
    const std::array<char, 16> pad = pad_bytes(pads[i], tensor);
    for (size_t at = 0; at < pad.size(); ++at) {
      move.pad[at] = static_cast<unsigned char>(pad[at % static_cast<size_t>(shape.element)]);
    }
  }
  check(gather(moves.data(), static_cast<int64_t>(moves.size()), selected.device, selected.stream), "compact");
}

std::vector<Tensor> compact(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> tensors,
                            std::vector<int64_t> dims, std::vector<int64_t> batch_dims, std::vector<double> pads,
                            std::optional<int64_t> total) {
  const Selected selected(indices, counts, align_right, common_tokens(tensors, dims), total);
  PYVTK_GUARD(batch_dims.size() == tensors.size(), "lists of different lengths");
  std::vector<Tensor> outs;
  outs.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    outs.push_back(new_empty(tensors[i], compacted_shape(tensors[i], selected, dims[i], batch_dims[i], total),
                             tensors[i].scalar_type()));
  }
  compact_into(selected, tensors, outs, dims, batch_dims, pads, total);
  return outs;
}

void compact_out(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> tensors,
                 std::vector<int64_t> dims, std::vector<int64_t> batch_dims, std::vector<double> pads,
                 std::optional<int64_t> total, std::vector<Tensor> outs) {
  const Selected selected(indices, counts, align_right, common_tokens(tensors, dims), total);
  compact_into(selected, tensors, outs, dims, batch_dims, pads, total);
}

// The tables of slots, alive as long as the launches are being made; the allocator keeps the memory for the stream.
struct Slotted {
  Tensor memory;
  Inverse inverse;

  Slotted(const Selected& selected, bool chains)
      : memory(new_empty(selected.indices, {inverse_size(selected.device, chains)}, ScalarType::Int)),
        inverse(inverse_in(mutable_data<int32_t>(memory), selected.device, chains)) {
    check(invert(selected.device, inverse, selected.stream), "the inverse of a selection");
  }
};

std::vector<Tensor> compact_backward(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> grads,
                                     std::vector<int64_t> dims, std::vector<int64_t> batch_dims,
                                     std::vector<int64_t> batch_sizes, int64_t num_tokens,
                                     std::optional<int64_t> total) {
  PYVTK_GUARD(dims.size() == grads.size() && batch_dims.size() == grads.size() && batch_sizes.size() == grads.size(),
              "lists of different lengths");
  const Selected selected(indices, counts, align_right, num_tokens, total);
  const bool packed = total.has_value();
  std::vector<Tensor> sources, results;  // the sources may be copies
  std::vector<Move> moves;
  moves.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    selected.on_device(grads[i]);
    const bool merged = batch_dims[i] < 0 || (batch_sizes[i] == 1 && selected.batch != 1);
    PYVTK_GUARD(merged || batch_sizes[i] == selected.batch, "batch size ", batch_sizes[i], " of gradient ", i);
    PYVTK_GUARD(!merged || !selected.has_heads, "a selection with a head axis cannot repeat a batch");
    const Place place = place_of(dims[i], batch_dims[i], packed);
    const auto shape = shape_before(grads[i], dims[i], batch_dims[i], batch_sizes[i], num_tokens, total);
    results.push_back(new_empty(grads[i], shape, grads[i].scalar_type()));
    sources.push_back(with_runs(grads[i], place.dim));
    const Tensor& result = results.back();
    const Number number = number_of(result.scalar_type());
    PYVTK_GUARD(number != Number::none, "gradient ", i, " has a dtype that cannot be added");
    const int64_t element = element_size(result);
    const View target = view_of(result, dims[i], batch_dims[i], selected.has_heads, element);
    Move move;
    const auto described = [&](const Tensor& grad) {
      const View source = view_of(grad, place.dim, place.batch_dim, selected.has_heads, element);
      PYVTK_GUARD(source.tokens == (packed ? *total : selected.capacity), "gradient ", i, " has ", source.tokens,
                  " positions");
      PYVTK_GUARD(packed || grad.size(place.batch_dim) == selected.batch, "gradient ", i, " has ",
                  grad.size(place.batch_dim), " samples");
      PYVTK_GUARD(!selected.has_heads || (dims[i] == 2 && batch_dims[i] == 0 && grad.size(1) == selected.heads),
                  "gradient ", i, " does not begin with the batch and heads of the selection");
      return describe_move(shape_of(source, target, source, element), num_tokens, &grad, result, nullptr, move);
    };
    if (result.numel() == 0) continue;
    if (!described(sources.back())) {
      sources.back() = torch::stable::contiguous(sources.back());
      guard_described(described(sources.back()));
    }
    PYVTK_GUARD(move.width >= bytes_of(number), "gradient ", i, " is not aligned to its elements");
    move.merged = merged;
    move.number = number;
    moves.push_back(move);
  }
  if (moves.empty()) return results;
  const Slotted slotted(selected, true);
  check(scatter(moves.data(), static_cast<int64_t>(moves.size()), selected.device, {slotted.inverse, nullptr, false},
                selected.stream),
        "the gradient of compact");
  return results;
}

// A gate, on the device of the selection, one for each of its slots.
Tensor guard_gate(const Tensor& gate, const Selected& selected) {
  selected.on_device(gate);
  PYVTK_GUARD(gate.numel() == selected.indices.numel(), "gate has a wrong shape");
  if (gate.scalar_type() != ScalarType::Double) guard_dtype(gate, ScalarType::Float, "gate");
  return dense(gate);
}

View guard_update(const Tensor& update, const Selected& selected, int64_t dim, int64_t element) {
  const View view = view_of(update, dim, 0, selected.has_heads, element);
  PYVTK_GUARD(view.tokens == selected.capacity && update.size(0) == selected.batch &&
                  (!selected.has_heads || (dim == 2 && update.size(1) == selected.heads)),
              "update has a wrong shape");
  return view;
}

// A packed source has one token axis for all samples, and the update one axis more than the restored tensor.
Tensor restore(Tensor indices, Tensor counts, bool align_right, OptionalTensor update, OptionalTensor base,
               OptionalTensor gate, int64_t dim, int64_t num_tokens, bool packed_source) {
  PYVTK_GUARD(update.has_value() || base.has_value(), "restore needs update or base");
  PYVTK_GUARD(update.has_value() || !gate.has_value(), "a gate needs the update");
  const Selected selected(indices, counts, align_right, num_tokens);
  const int64_t update_dim = dim + (packed_source ? 1 : 0);
  const Tensor& like = base.has_value() ? *base : *update;
  std::vector<int64_t> shape = sizes_of(like);
  if (!base.has_value()) {
    if (packed_source) shape.erase(shape.begin());
    PYVTK_GUARD(0 <= dim && dim < static_cast<int64_t>(shape.size()), "dim ", dim, " does not fit update");
    shape[static_cast<size_t>(dim)] = num_tokens;
  }
  const Tensor result = new_empty(like, shape, like.scalar_type());
  const int64_t element = element_size(result);
  const View target = view_of(result, dim, packed_source ? -1 : 0, selected.has_heads, element);
  PYVTK_GUARD(target.tokens == num_tokens, "base has ", target.tokens, " tokens, expected ", num_tokens);
  PYVTK_GUARD(packed_source || result.size(0) == selected.batch, "base has another batch size than the selection");
  PYVTK_GUARD(!selected.has_heads || (!packed_source && dim == 2 && result.size(1) == selected.heads),
              "base does not begin with the batch and heads of the selection");
  Move move;
  const auto described = [&] {
    View source = target, before = target;
    if (update.has_value()) {
      selected.on_device(*update);
      guard_dtype(*update, result.scalar_type(), "update");
      source = guard_update(*update, selected, update_dim, element);
    }
    if (base.has_value()) {
      selected.on_device(*base);
      before = view_of(*base, dim, packed_source ? -1 : 0, selected.has_heads, element);
    }
    return describe_move(shape_of(source, target, before, element), num_tokens, update.has_value() ? &*update : nullptr,
                         result, base.has_value() ? &*base : nullptr, move);
  };
  if (update.has_value()) update = with_runs(*update, update_dim);
  if (base.has_value()) base = with_runs(*base, dim);
  if (result.numel() == 0) return result;
  if (!described()) {
    if (update.has_value()) update = torch::stable::contiguous(*update);
    if (base.has_value()) base = torch::stable::contiguous(*base);
    guard_described(described());
  }
  move.merged = packed_source;
  move.number = number_of(result.scalar_type());
  PYVTK_GUARD(!gate.has_value() || move.number != Number::none, "update has a dtype that cannot be added");
  PYVTK_GUARD(!gate.has_value() || move.width >= bytes_of(move.number), "update is not aligned to its elements");
  const Slotted slotted(selected, gate.has_value());
  Landing landing{slotted.inverse, nullptr, false};
  if (gate.has_value()) {
    gate = guard_gate(*gate, selected);
    landing.gates = gate->const_data_ptr();
    landing.gates_double = gate->scalar_type() == ScalarType::Double;
  }
  check(scatter(&move, 1, selected.device, landing, selected.stream), "restore");
  return result;
}

// Gradients of restore with respect to update and gate; the latter is empty if there was no gate.
std::tuple<Tensor, Tensor> restore_backward(Tensor indices, Tensor counts, bool align_right, Tensor grad,
                                            OptionalTensor update, OptionalTensor gate, int64_t dim,
                                            bool packed_source) {
  PYVTK_GUARD(update.has_value() == gate.has_value(), "the gradient of a gate needs the update");
  PYVTK_GUARD(0 <= dim && dim < grad.dim(), "dim ", dim, " does not fit the gradient");
  const int64_t num_tokens = grad.size(dim);
  const Selected selected(indices, counts, align_right, num_tokens);
  selected.on_device(grad);
  grad = with_runs(grad, dim);
  std::vector<int64_t> shape = sizes_of(grad);
  shape[static_cast<size_t>(dim)] = selected.capacity;
  if (packed_source) shape.insert(shape.begin(), selected.batch);
  PYVTK_GUARD(packed_source || grad.size(0) == selected.batch, "the gradient has another batch size");
  const Tensor result = new_empty(grad, shape, grad.scalar_type());
  const int64_t element = element_size(grad);
  const int64_t position_dim = dim + (packed_source ? 1 : 0);
  const View target = guard_update(result, selected, position_dim, element);
  OptionalTensor grad_gate;
  if (gate.has_value()) {
    gate = guard_gate(*gate, selected);
    grad_gate = new_empty(*gate, sizes_of(*gate), gate->scalar_type());
    selected.on_device(*update);
    guard_dtype(*update, grad.scalar_type(), "update");
    update = with_runs(*update, position_dim);
  } else {
    grad_gate = new_empty(grad, {0}, ScalarType::Float);
  }
  Move move;
  const auto described = [&] {
    const View source = view_of(grad, dim, packed_source ? -1 : 0, selected.has_heads, element);
    const View base = update.has_value() ? guard_update(*update, selected, position_dim, element) : target;
    return describe_move(shape_of(source, target, base, element), selected.capacity, &grad, result,
                         update.has_value() ? &*update : nullptr, move);
  };
  if (result.numel() == 0 && grad_gate->numel() == 0) return {result, *grad_gate};
  if (!described()) {
    grad = torch::stable::contiguous(grad);
    if (update.has_value()) update = torch::stable::contiguous(*update);
    guard_described(described());
  }
  move.merged = packed_source;
  if (!gate.has_value()) {
    const Slotted slotted(selected, false);
    check(gather_winners(move, selected.device, slotted.inverse, selected.stream), "the gradient of restore");
    return {result, *grad_gate};
  }
  const void* gates = gate->const_data_ptr();
  const bool doubles = gate->scalar_type() == ScalarType::Double;
  const auto run = [&](auto number) {
    check(
        recall<decltype(number)>(move, selected.device, gates, doubles, grad_gate->mutable_data_ptr(), selected.stream),
        "the gradient of restore");
  };
  switch (number_of(grad.scalar_type())) {
    case Number::float32:
      run(float{});
      break;
    case Number::float64:
      run(double{});
      break;
    case Number::float16:
      run(float16{});
      break;
    case Number::bfloat16:
      run(bfloat16{});
      break;
    default:
      PYVTK_GUARD(false, "update has a dtype that cannot be added");
  }
  return {result, *grad_gate};
}

void compact_kv_(Tensor indices, Tensor counts, std::vector<Tensor> caches) {
  if (caches.empty()) return;
  const Selected selected(indices, counts, false, common_tokens(caches, std::vector<int64_t>(caches.size(), 2)));
  PYVTK_GUARD(selected.capacity <= selected.device.tokens, "a cache has fewer tokens than the selection's capacity");
  std::vector<KvCache> work;
  work.reserve(caches.size());
  for (const Tensor& cache : caches) {
    selected.on_device(cache);
    guard_dim(cache, 4, "cache");
    guard_last_contiguous(cache, "cache");
    PYVTK_GUARD(cache.size(0) == selected.batch && (!selected.has_heads || cache.size(1) == selected.heads),
                "cache has other rows than the selection");
    const int64_t element = element_size(cache), run = cache.size(3) * element;
    PYVTK_GUARD(run <= kMostCounted && cache.size(1) <= kMostCounted, "a cache is too large");
    if (cache.numel() == 0) continue;
    KvCache& one = work.emplace_back();
    one = {};
    one.data = static_cast<char*>(cache.mutable_data_ptr());
    one.batch = cache.size(0) > 1 ? cache.stride(0) * element : 0;
    one.head = cache.size(1) > 1 ? cache.stride(1) * element : 0;
    one.token = cache.size(2) > 1 ? cache.stride(2) * element : 0;
    one.heads = static_cast<uint32_t>(cache.size(1));
    one.run = static_cast<uint32_t>(run);
  }
  check(compact_kv(work.data(), static_cast<int64_t>(work.size()), selected.device, selected.batch, selected.has_heads,
                   selected.stream),
        "compact_kv_");
}

}  // namespace
}  // namespace pyvtk::cuda

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CUDA, m) {
  m.impl("compact", TORCH_BOX(&pyvtk::cuda::compact));
  m.impl("compact_forward", TORCH_BOX(&pyvtk::cuda::compact));
  m.impl("compact_out", TORCH_BOX(&pyvtk::cuda::compact_out));
  m.impl("compact_backward", TORCH_BOX(&pyvtk::cuda::compact_backward));
  m.impl("restore", TORCH_BOX(&pyvtk::cuda::restore));
  m.impl("restore_backward", TORCH_BOX(&pyvtk::cuda::restore_backward));
  m.impl("compact_kv_", TORCH_BOX(&pyvtk::cuda::compact_kv_));
}
