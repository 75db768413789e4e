// Binding of the compact family for CPU tensors. Meaning: pyvtk/reference/compact.py.
#include "cpu/compact.h"

#include <memory>
#include <tuple>

#include "binding.h"
#include "common/compact_binding.h"
#include "cpu/merge_binding.h"

namespace pyvtk {
namespace {

using cpu::Arithmetic;
using cpu::arithmetic_of;
using cpu::doubles;
using cpu::Gather;
using cpu::kNanosecondsPerByte;
using cpu::Links;
using cpu::Recall;
using cpu::Row;
using cpu::Scatter;
using cpu::Shape;
using cpu::store_doubles;

// Outputs of this size do not stay in the second-level cache: writing past it saves reading them first.
constexpr int64_t kStreamingBytes = 4 * 1024 * 1024;

// The rows of a selection as output positions, checked against the length of the token axis.
struct Selected : SelectedRows {
  std::vector<Row> rows;
  int64_t extent;  // the largest number of positions that a row owns
  int64_t sum = 0;

  // `total` given: rows follow each other on one axis of that length, and one more row owns its padded tail.
  Selected(const Tensor& indices_, const Tensor& counts_, bool align_right, int64_t tokens,
           std::optional<int64_t> total = std::nullopt)
      : SelectedRows(indices_, counts_), extent(capacity) {
    const int64_t* index = data<int64_t>(indices);
    const int32_t* count = data<int32_t>(counts);
    rows.reserve(static_cast<size_t>(batch * heads) + 1);
    for (int64_t r = 0; r < batch * heads; ++r, index += capacity) {
      int64_t kept = std::clamp<int64_t>(count[r], 0, capacity);
      const int64_t slot = align_right ? capacity - kept : 0;
      for (int64_t i = slot; i < slot + kept; ++i) {
        PYVTK_GUARD(0 <= index[i] && index[i] < tokens, "selection holds index ", index[i], " in row ", r,
                    ", but the token axis has length ", tokens);
      }
      Row row{index + slot, r / heads, r % heads, 0, capacity, slot, slot + kept};
      if (total.has_value()) {
        row.begin = row.first = std::min(sum, *total);
        row.end = row.last = std::min(sum + kept, *total);
        extent = r == 0 ? kept : std::max(extent, kept);
      }
      sum += kept;
      rows.push_back(row);
    }
    if (total.has_value()) {
      const int64_t tail = std::min(sum, *total);
      rows.push_back({nullptr, 0, 0, tail, *total, tail, tail});
      extent = std::max(rows.size() == 1 ? 0 : extent, *total - tail);
    }
  }

  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

// Runs `work(job, item)` over the items of all jobs in one parallel loop.
template <class Job, class Work>
void run(const std::vector<Job>& jobs, Work&& work) {
  int64_t items = 0;
  double bytes = 0;
  for (const Job& job : jobs) {
    items += job.shape.items;
    bytes += static_cast<double>(job.shape.items) * static_cast<double>(job.shape.block * job.shape.run);
  }
  parallel_for(items, bytes / static_cast<double>(std::max<int64_t>(items, 1)) * kNanosecondsPerByte,
               [&](int64_t begin, int64_t end) {
                 int64_t first = 0;  // item of the whole loop at which a job begins
                 for (const Job& job : jobs) {
                   const int64_t last = std::min(end, first + job.shape.items);
                   for (int64_t item = std::max(begin, first); item < last; ++item) work(job, item - first);
                   first += job.shape.items;
                 }
               });
}

void compact_into(const Selected& selected, const std::vector<Tensor>& tensors, const std::vector<Tensor>& outs,
                  const std::vector<int64_t>& dims, const std::vector<int64_t>& batch_dims,
                  const std::vector<double>& pads, std::optional<int64_t> total) {
  PYVTK_GUARD(outs.size() == tensors.size() && batch_dims.size() == tensors.size() && pads.size() == tensors.size(),
              "lists of different lengths");
  std::vector<Gather> jobs(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor& tensor = tensors[i];
    Gather& job = jobs[i];
    static_cast<MoveShape&>(job.shape) = compact_shape(tensor, outs[i], selected, dims[i], batch_dims[i], total);
    job.shape.divide(selected.count(), selected.extent);
    job.source = static_cast<const char*>(tensor.const_data_ptr());
    job.target = static_cast<char*>(outs[i].mutable_data_ptr());
    job.pad = pad_bytes(pads[i], tensor);
    job.streaming = outs[i].numel() * element_size(tensor) >= kStreamingBytes && job.shape.run >= 256;
    if (outs[i].numel() == 0) job.shape.items = 0;
  }
  run(jobs, [&](const Gather& job, int64_t item) { cpu::gather(job, selected.rows, item); });
}

std::vector<Tensor> compact(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> tensors,
                            std::vector<int64_t> dims, std::vector<int64_t> batch_dims, std::vector<double> pads,
                            std::optional<int64_t> total) {
  const Selected selected(indices, counts, align_right, common_tokens(tensors, dims), total);
  std::vector<Tensor> outs;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto shape = compacted_shape(tensors[i], selected, dims[i], batch_dims[i], total);
    outs.push_back(new_empty(tensors[i], shape, tensors[i].scalar_type()));
  }
  compact_into(selected, tensors, outs, dims, batch_dims, pads, total);
  return outs;
}

void compact_out(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> tensors,
                 std::vector<int64_t> dims, std::vector<int64_t> batch_dims, std::vector<double> pads,
                 std::optional<int64_t> total, std::vector<Tensor> outs) {
  const Selected selected(indices, counts, align_right, common_tokens(tensors, dims), total);
  PYVTK_GUARD(outs.size() == tensors.size(), "lists of different lengths");
  compact_into(selected, tensors, outs, dims, batch_dims, pads, total);
}

std::vector<Tensor> compact_backward(Tensor indices, Tensor counts, bool align_right, std::vector<Tensor> grads,
                                     std::vector<int64_t> dims, std::vector<int64_t> batch_dims,
                                     std::vector<int64_t> batch_sizes, int64_t num_tokens,
                                     std::optional<int64_t> total) {
  PYVTK_GUARD(dims.size() == grads.size() && batch_dims.size() == grads.size() && batch_sizes.size() == grads.size(),
              "lists of different lengths");
  const Selected selected(indices, counts, align_right, num_tokens, total);
  const bool packed = total.has_value();
  // Shared by the tensors of a kind: one batch row each, or one table for all rows.
  std::array<std::unique_ptr<Links>, 2> links;
  std::vector<Tensor> sources, results;
  std::vector<Scatter> jobs(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    const bool unbatched = batch_dims[i] < 0;
    const bool merged = unbatched || (batch_sizes[i] == 1 && selected.batch != 1);
    PYVTK_GUARD(merged || batch_sizes[i] == selected.batch, "batch size ", batch_sizes[i], " of gradient ", i);
    PYVTK_GUARD(!merged || !selected.has_heads, "a selection with a head axis cannot repeat a batch");
    const Place place = place_of(dims[i], batch_dims[i], packed);
    PYVTK_GUARD(place.dim < grads[i].dim(), "gradient ", i, " has too few dimensions");
    const Tensor grad = with_runs(grads[i], place.dim);
    const auto shape = shape_before(grad, dims[i], batch_dims[i], batch_sizes[i], num_tokens, total);
    Tensor result = new_empty(grad, shape, grad.scalar_type());
    const int64_t element = element_size(grad);
    const View source = view_of(grad, place.dim, place.batch_dim, selected.has_heads, element);
    const View target = view_of(result, dims[i], batch_dims[i], selected.has_heads, element);
    PYVTK_GUARD(source.tokens == (packed ? *total : selected.capacity), "gradient ", i, " has ", source.tokens,
                " positions");
    Scatter& job = jobs[i];
    job = {};
    static_cast<MoveShape&>(job.shape) = shape_of(source, target, source, element);
    job.shape.divide(merged ? 1 : selected.batch * selected.heads, num_tokens);
    if (result.numel() == 0) job.shape.items = 0;
    if (!links[merged]) links[merged] = std::make_unique<Links>(cpu::links_of(selected.rows, num_tokens, merged));
    const Arithmetic arithmetic = arithmetic_of(grad.scalar_type());
    PYVTK_GUARD(arithmetic.sum != nullptr, "gradient ", i, " has a dtype that cannot be added");
    job.source = static_cast<const char*>(grad.const_data_ptr());
    job.target = static_cast<char*>(result.mutable_data_ptr());
    job.links = links[merged].get();
    job.merged = merged;
    job.add = true;
    job.tokens = num_tokens;
    job.sum = arithmetic.sum;
    job.number = arithmetic.number;
    sources.push_back(grad);
    results.push_back(result);
  }
  run(jobs, [&](const Scatter& job, int64_t item) { cpu::scatter(job, selected.rows, item); });
  return results;
}

// A packed source has one token axis for all samples, and the update one axis more than the restored tensor.
Tensor restore(Tensor indices, Tensor counts, bool align_right, OptionalTensor update, OptionalTensor base,
               OptionalTensor gate, int64_t dim, int64_t num_tokens, bool packed_source) {
  PYVTK_GUARD(update.has_value() || base.has_value(), "restore needs update or base");
  const Selected selected(indices, counts, align_right, num_tokens);
  std::vector<int64_t> shape;
  if (base.has_value()) {
    base = with_runs(*base, dim);
    shape.assign(base->sizes().begin(), base->sizes().end());
  } else {
    shape.assign(update->sizes().begin(), update->sizes().end());
    if (packed_source) shape.erase(shape.begin());
    shape[static_cast<size_t>(dim)] = num_tokens;
  }
  Tensor result = new_empty(base.has_value() ? *base : *update, shape,
                            base.has_value() ? base->scalar_type() : update->scalar_type());
  const int64_t element = element_size(result);
  const int64_t batch_dim = packed_source ? -1 : 0;
  const View target = view_of(result, dim, batch_dim, selected.has_heads, element);
  PYVTK_GUARD(target.tokens == num_tokens, "base has ", target.tokens, " tokens, expected ", num_tokens);
  PYVTK_GUARD(packed_source || result.size(0) == selected.batch, "base has another batch size than the selection");
  View source = target;
  if (update.has_value()) {
    guard_dtype(*update, result.scalar_type(), "update");
    update = with_runs(*update, dim + (packed_source ? 1 : 0));
    source = view_of(*update, dim + (packed_source ? 1 : 0), 0, selected.has_heads, element);
    PYVTK_GUARD(source.tokens == selected.capacity && update->size(0) == selected.batch, "update has a wrong shape");
  }
  const std::vector<double> gates = gate.has_value() ? doubles(*gate) : std::vector<double>{};
  PYVTK_GUARD(!gate.has_value() || gate->numel() == indices.numel(), "gate has a wrong shape");

  const Links links = cpu::links_of(selected.rows, num_tokens, packed_source);
  const Arithmetic arithmetic = arithmetic_of(result.scalar_type());
  PYVTK_GUARD(!gate.has_value() || arithmetic.sum != nullptr, "update has a dtype that cannot be added");
  std::vector<Scatter> jobs(1);
  Scatter& job = jobs[0];
  job = {};
  const View over = base.has_value() ? view_of(*base, dim, batch_dim, selected.has_heads, element) : target;
  static_cast<MoveShape&>(job.shape) = shape_of(source, target, over, element);
  job.shape.divide(packed_source ? 1 : selected.count(), num_tokens);
  if (result.numel() == 0) job.shape.items = 0;
  job.source = update.has_value() ? static_cast<const char*>(update->const_data_ptr()) : nullptr;
  job.target = static_cast<char*>(result.mutable_data_ptr());
  job.base = base.has_value() ? static_cast<const char*>(base->const_data_ptr()) : nullptr;
  job.links = &links;
  job.merged = packed_source;
  job.add = gate.has_value();
  job.gates = gate.has_value() ? gates.data() : nullptr;
  job.capacity = selected.capacity;
  job.tokens = num_tokens;
  job.sum = arithmetic.sum;
  job.number = arithmetic.number;
  run(jobs, [&](const Scatter& work, int64_t item) { cpu::scatter(work, selected.rows, item); });
  return result;
}

// Gradients of restore with respect to update and gate; the latter is empty if there was no gate.
std::tuple<Tensor, Tensor> restore_backward(Tensor indices, Tensor counts, bool align_right, Tensor grad,
                                            OptionalTensor update, OptionalTensor gate, int64_t dim,
                                            bool packed_source) {
  const int64_t num_tokens = grad.size(dim);
  const Selected selected(indices, counts, align_right, num_tokens);
  PYVTK_GUARD(update.has_value() == gate.has_value(), "the gradient of a gate needs the update");
  grad = with_runs(grad, dim);
  std::vector<int64_t> shape(grad.sizes().begin(), grad.sizes().end());
  shape[static_cast<size_t>(dim)] = selected.capacity;
  if (packed_source) shape.insert(shape.begin(), selected.batch);
  Tensor result = new_empty(grad, shape, grad.scalar_type());
  const int64_t element = element_size(grad);
  const int64_t position_dim = dim + (packed_source ? 1 : 0);
  const View source = view_of(grad, dim, packed_source ? -1 : 0, selected.has_heads, element);
  const View target = view_of(result, position_dim, 0, selected.has_heads, element);
  View base = target;
  std::vector<double> gates, grad_gates;
  if (gate.has_value()) {
    guard_dtype(*update, grad.scalar_type(), "update");
    update = with_runs(*update, position_dim);
    base = view_of(*update, position_dim, 0, selected.has_heads, element);
    PYVTK_GUARD(base.tokens == selected.capacity && update->size(0) == selected.batch, "update has a wrong shape");
    PYVTK_GUARD(gate->numel() == indices.numel(), "gate has a wrong shape");
    gates = doubles(*gate);
    grad_gates.assign(gates.size(), 0.0);
  }
  const Links links = gate.has_value() ? Links() : cpu::links_of(selected.rows, num_tokens, packed_source);
  const Arithmetic arithmetic = arithmetic_of(grad.scalar_type());
  PYVTK_GUARD(!gate.has_value() || arithmetic.sum != nullptr, "update has a dtype that cannot be added");
  std::vector<Recall> jobs(1);
  Recall& job = jobs[0];
  job = {};
  static_cast<MoveShape&>(job.shape) = shape_of(source, target, base, element);
  job.shape.divide(selected.count(), selected.capacity);
  job.shape.items = result.numel() == 0 ? 0 : selected.count() * job.shape.blocks;
  job.source = static_cast<const char*>(grad.const_data_ptr());
  job.target = static_cast<char*>(result.mutable_data_ptr());
  job.base = gate.has_value() ? static_cast<const char*>(update->const_data_ptr()) : nullptr;
  job.links = &links;
  job.gates = gate.has_value() ? gates.data() : nullptr;
  job.grad_gates = grad_gates.data();
  job.merged = packed_source;
  job.capacity = selected.capacity;
  job.tokens = num_tokens;
  job.sum = arithmetic.sum;
  job.dot = arithmetic.dot;
  job.number = arithmetic.number;
  run(jobs, [&](const Recall& work, int64_t item) { cpu::recall(work, selected.rows, item); });

  if (!gate.has_value()) return {result, new_empty(grad, {0}, ScalarType::Float)};
  std::vector<int64_t> gate_shape(gate->sizes().begin(), gate->sizes().end());
  Tensor grad_gate = new_empty(*gate, gate_shape, gate->scalar_type());
  store_doubles(grad_gates, grad_gate);
  return {result, grad_gate};
}

void compact_kv_(Tensor indices, Tensor counts, std::vector<Tensor> caches) {
  if (caches.empty()) return;
  const Selected selected(indices, counts, false, common_tokens(caches, std::vector<int64_t>(caches.size(), 2)));
  for (const Row& row : selected.rows) {
    for (int64_t i = 1; i < row.last; ++i) {
      PYVTK_GUARD(row.tokens[i - 1] < row.tokens[i], "compact_kv_ needs ascending indices, got ", row.tokens[i - 1],
                  " before ", row.tokens[i]);
    }
  }
  struct Slices {
    char* data;
    int64_t batch, head, token, run;  // strides in bytes
    int64_t heads, count;
  };
  std::vector<Slices> work;
  int64_t slices = 0;
  double bytes = 0;
  for (const Tensor& cache : caches) {
    guard_dim(cache, 4, "cache");
    guard_last_contiguous(cache, "cache");
    PYVTK_GUARD(cache.size(0) == selected.batch && (!selected.has_heads || cache.size(1) == selected.heads),
                "cache has other rows than the selection");
    PYVTK_GUARD(selected.capacity <= cache.size(2), "cache has fewer tokens than the selection's capacity");
    const int64_t element = element_size(cache);
    const int64_t heads = cache.size(1);
    const Slices one{static_cast<char*>(cache.mutable_data_ptr()),
                     cache.stride(0) * element,
                     cache.stride(1) * element,
                     cache.stride(2) * element,
                     cache.size(3) * element,
                     heads,
                     cache.numel() == 0 ? 0 : selected.batch * heads};
    slices += one.count;
    bytes += static_cast<double>(one.count) * static_cast<double>(one.run * selected.capacity);
    work.push_back(one);
  }
  parallel_for(slices, bytes / static_cast<double>(std::max<int64_t>(slices, 1)) * kNanosecondsPerByte,
               [&](int64_t begin, int64_t end) {
                 int64_t first = 0;
                 for (const Slices& one : work) {
                   const int64_t last = std::min(end, first + one.count);
                   for (int64_t slice = std::max(begin, first); slice < last; ++slice) {
                     const int64_t b = (slice - first) / one.heads, h = (slice - first) % one.heads;
                     const Row& row = selected.rows[static_cast<size_t>(selected.has_heads ? slice - first : b)];
                     cpu::compact_in_place(one.data + b * one.batch + h * one.head, one.token, one.run, row.tokens,
                                           row.last, selected.capacity);
                   }
                   first += one.count;
                 }
               });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyvtk, CPU, m) {
  m.impl("compact", TORCH_BOX(&compact));
  m.impl("compact_forward", TORCH_BOX(&compact));
  m.impl("compact_out", TORCH_BOX(&compact_out));
  m.impl("compact_backward", TORCH_BOX(&compact_backward));
  m.impl("restore", TORCH_BOX(&restore));
  m.impl("restore_backward", TORCH_BOX(&restore_backward));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_));
}

}  // namespace pyvtk
