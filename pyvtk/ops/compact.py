"""Move only the tokens that stay: ``compact``, ``restore``, ``compact_kv_``."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pyvtk import _numbers, backends, checks, transforms
from pyvtk.reference import compact as reference
from pyvtk.selection import Selection

# In every schema: indices [batch, (heads,) capacity] int64 and counts [batch, (heads)] int32 of a selection;
# batch_dims -1 for a tensor without a batch axis; total for a packed result; num_tokens the length before.


def _compacted_shape(shape, indices: Tensor, dim: int, batch_dim: int, total: int | None) -> list[int]:
    sizes = list(shape)
    if total is None:
        sizes[dim] = indices.shape[-1]
        if batch_dim < 0:
            return [indices.shape[0], *sizes]
        sizes[batch_dim] = indices.shape[0]
        return sizes
    del sizes[dim]
    if batch_dim < 0:
        return [total, *sizes]
    sizes[batch_dim - (dim < batch_dim)] = total
    return sizes


def _compact_fake(indices, counts, align_right, tensors, dims, batch_dims, pads, total):
    shapes = [_compacted_shape(x.shape, indices, d, b, total) for x, d, b in zip(tensors, dims, batch_dims)]
    return [x.new_empty(shape) for x, shape in zip(tensors, shapes)]


def _compact_backward_fake(
    indices, counts, align_right, grads, dims, batch_dims, batch_sizes, num_tokens, total
) -> list[Tensor]:
    outs = []
    for grad, dim, batch_dim, batch in zip(grads, dims, batch_dims, batch_sizes):
        sizes = list(grad.shape)
        if total is None:
            if batch_dim < 0:
                del sizes[0]
            else:
                sizes[batch_dim] = batch
            sizes[dim] = num_tokens
        else:
            del sizes[max(batch_dim, 0) - (0 <= dim < batch_dim)]
            for axis, size in sorted([(dim, num_tokens), *([(batch_dim, batch)] if batch_dim >= 0 else [])]):
                sizes.insert(axis, size)
        outs.append(grad.new_empty(sizes))
    return outs


def _restore_fake(indices, counts, align_right, update, base, gate, dim, num_tokens, packed_source):
    if base is not None:
        return base.new_empty(base.shape)
    sizes = list(update.shape)[1 if packed_source else 0 :]
    sizes[dim] = num_tokens
    return update.new_empty(sizes)


def _restore_backward_fake(indices, counts, align_right, grad, update, gate, dim, packed_source):
    sizes = list(grad.shape)
    sizes[dim] = indices.shape[-1]
    grad_update = grad.new_empty([indices.shape[0], *sizes] if packed_source else sizes)
    return grad_update, grad.new_empty(0, dtype=torch.float32) if gate is None else gate.new_empty(gate.shape)


def _fold(size: int, mapped: dict, arguments: dict) -> tuple[dict, tuple] | None:
    """How torch.vmap goes through compact and its gradient: into the batch, where every tensor has one of its own."""
    name = "tensors" if "tensors" in arguments else "grads"
    tensors, dims, batch_dims = arguments[name], mapped[name] or [None] * len(arguments[name]), arguments["batch_dims"]
    whole = dict(arguments)
    for given in ("indices", "counts"):
        whole[given] = transforms.folded(arguments[given], mapped[given], 0, size)
    rows = whole["counts"].shape[0] // size
    shared = [batch_size != rows for batch_size in arguments.get("batch_sizes", ())]
    if arguments["total"] is not None or any(shared) or any(batch_dim < 0 for batch_dim in batch_dims):
        return None
    if "batch_sizes" in arguments:
        whole["batch_sizes"] = [rows * size] * len(tensors)
    whole[name] = []
    for x, dim, batch_dim in zip(tensors, dims, batch_dims):
        x = x if dim is None else x.movedim(dim, 0)
        axis = batch_dim + (dim is not None)
        if x.shape[axis] != rows:  # of size 1, it repeats
            x = x.expand(*x.shape[:axis], rows, *x.shape[axis + 1 :])
        whole[name].append(transforms.folded(x, None if dim is None else 0, batch_dim, size))
    return whole, (list(batch_dims),)


_ROWS = {"indices": 0, "counts": 0, "update": 0, "gate": 0}


def _of_packed_source(arguments: dict, mapped: dict) -> bool:
    return arguments["packed_source"]


_SELECTION = "Tensor indices, Tensor counts, bool align_right"
_COMPACT = f"({_SELECTION}, Tensor[] tensors, int[] dims, int[] batch_dims, float[] pads, SymInt? total) -> Tensor[]"
_KERNELS = {"fake": _compact_fake, "triton": "compact", "vmap": _fold, "leave_open": "pads"}
backends.define("compact", _COMPACT, **_KERNELS)
# The same without a gradient: torch's autograd wrapper is Python, and costs more than moving a few tokens.
backends.define("compact_forward", _COMPACT, **_KERNELS, lean=True)
backends.define(
    "compact_out",
    f"({_SELECTION}, Tensor[] tensors, int[] dims, int[] batch_dims, float[] pads, SymInt? total, "
    "Tensor(a!)[] outs) -> ()",
    fake=lambda *args: None,
)
backends.define(
    "compact_backward",
    f"({_SELECTION}, Tensor[] grads, int[] dims, int[] batch_dims, SymInt[] batch_sizes, SymInt num_tokens, "
    "SymInt? total) -> Tensor[]",
    fake=_compact_backward_fake,
    triton="compact",
    vmap=_fold,
)
# Without update, the rows are cleared.
backends.define(
    "restore",
    f"({_SELECTION}, Tensor? update, Tensor? base, Tensor? gate, int dim, SymInt num_tokens, bool packed_source) "
    "-> Tensor",
    fake=_restore_fake,
    vmap=transforms.Fold(_ROWS | {"base": 0}, (0,), _of_packed_source),
)
backends.define(
    "restore_backward",
    f"({_SELECTION}, Tensor grad, Tensor? update, Tensor? gate, int dim, bool packed_source) -> (Tensor, Tensor)",
    fake=_restore_backward_fake,
    vmap=transforms.Fold(_ROWS | {"grad": 0}, (0, 0), _of_packed_source),
)
backends.define(
    "compact_kv_",
    "(Tensor indices, Tensor counts, Tensor(a!)[] caches) -> ()",
    fake=lambda indices, counts, caches: None,
    triton="compact",
)


def _compact_setup(ctx, inputs, output):
    indices, counts, align_right, tensors, dims, batch_dims, _, total = inputs
    ctx.save_for_backward(indices, counts)
    ctx.align_right, ctx.dims, ctx.batch_dims, ctx.total = align_right, dims, batch_dims, total
    ctx.batch_sizes = [1 if b < 0 else x.shape[b] for x, b in zip(tensors, batch_dims)]
    ctx.num_tokens = tensors[0].shape[dims[0]]


def _register_compact(suffix: str) -> None:
    """Gradients of compact and of its gradient, by operators of the same backend."""
    name, backward_name = f"compact{suffix}", f"compact_backward{suffix}"

    def grad(ctx, grads):
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3]) if needed and grads[i] is not None]
        result = [None] * len(grads)
        found = getattr(torch.ops.pyvtk, backward_name)(
            *ctx.saved_tensors,
            ctx.align_right,
            [grads[i] for i in wanted],
            [ctx.dims[i] for i in wanted],
            [ctx.batch_dims[i] for i in wanted],
            [ctx.batch_sizes[i] for i in wanted],
            ctx.num_tokens,
            ctx.total,
        )
        for i, gradient in zip(wanted, found):
            result[i] = gradient
        return None, None, None, result, None, None, None, None

    def grad_of_grad(ctx, grads):
        # The adjoint of the adjoint: gather once more.
        align_right, dims, batch_dims, total = ctx.rest
        pads = [0.0] * len(grads)
        forward = getattr(torch.ops.pyvtk, name)
        result = forward(*ctx.saved_tensors, align_right, grads, dims, batch_dims, pads, total)
        return None, None, None, list(result), None, None, None, None, None

    transforms.gradient(name, grad, setup_context=_compact_setup)
    transforms.gradient(backward_name, grad_of_grad, setup_context=_compact_backward_setup)


def _compact_backward_setup(ctx, inputs, output):
    indices, counts, *ctx.rest = inputs[0], inputs[1], inputs[2], inputs[4], inputs[5], inputs[8]
    ctx.save_for_backward(indices, counts)


def _restore_setup(ctx, inputs, output):
    indices, counts, ctx.align_right, update, _, gate, ctx.dim, ctx.num_tokens, ctx.packed_source = inputs
    ctx.save_for_backward(indices, counts, None if gate is None else update, gate)


def _restore_grad(ctx, grad):
    indices, counts, update, gate = ctx.saved_tensors
    selection = (indices, counts, ctx.align_right)
    grad_update = grad_base = grad_gate = None
    if ctx.needs_input_grad[4]:
        grad_base = grad
        if gate is None:
            rest = (ctx.dim, ctx.num_tokens, ctx.packed_source)
            grad_base = torch.ops.pyvtk.restore(*selection, None, grad, None, *rest)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[5]:
        grad_update, grad_gate = torch.ops.pyvtk.restore_backward(
            *selection, grad, update, gate, ctx.dim, ctx.packed_source
        )
    return None, None, None, grad_update, grad_base, None if gate is None else grad_gate, None, None, None


def _with_update(indices, counts, align_right, grad, update, *rest):
    """Arguments of restore_backward with an update: without a gate its values do not matter."""
    if update is None:
        update = torch.zeros_like(_restore_backward_fake(indices, counts, align_right, grad, None, *rest)[0])
    return indices, counts, align_right, grad, update, *rest


_register_compact("")
_register_compact("_triton")
transforms.gradient("restore", _restore_grad, setup_context=_restore_setup)
transforms.second_gradient("restore_backward", reference.weighed_restore, ("update", "gate"), _with_update)


def _check_selection(op: str, selection) -> None:
    if not isinstance(selection, Selection):
        raise TypeError(f"{op}: selection must be a Selection, got {type(selection).__name__}")


def _check_dim(op: str, name: str, value, rank: int) -> int:
    """``value`` as a number from 0."""
    if type(value) is not int:
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if not -rank <= value < rank:
        raise ValueError(f"{op}: {name} must be in {-rank}..{rank - 1} for a tensor of {rank} dimensions, got {value}")
    return value % rank


def _per_tensor(op: str, name: str, value, count: int) -> tuple:
    """One value for every tensor, from one value or one per tensor."""
    if not isinstance(value, tuple):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{op}: {name} must be one value or one per tensor ({count}), got {len(value)} values")
    return value


def _check_axes(op: str, name: str, rows, num_tokens: int, packed: bool, shape, dim, batch_dim) -> tuple[int, int]:
    """Whether a selection with ``rows`` (the shape of its counts) applies to a tensor of this shape along ``dim``;
    gives dim and batch_dim counted from 0, batch_dim -1 for None."""
    dim = _check_dim(op, "dim", dim, len(shape))
    batch_dim = -1 if batch_dim is None else _check_dim(op, "batch_dim", batch_dim, len(shape))
    if dim == batch_dim:
        raise ValueError(f"{op}: batch_dim must differ from dim, got {batch_dim} for both")
    if shape[dim] != num_tokens:
        raise ValueError(f"{op}: {name} must have {num_tokens} tokens in dimension {dim}, got shape {tuple(shape)}")
    if len(rows) == 2:
        if (dim, batch_dim) != (2, 0):
            raise ValueError(
                f"{op}: dim and batch_dim must be 2 and 0 for a selection with a head axis, "
                f"got {dim} and {None if batch_dim < 0 else batch_dim}"
            )
        if shape[0] != rows[0] or shape[1] != rows[1]:
            raise ValueError(f"{op}: {name} must begin with [batch, heads] = {list(rows)}, got shape {tuple(shape)}")
    elif batch_dim >= 0:
        if packed:
            raise ValueError(f"{op}: batch_dim must be None for a selection of a packed source, got {batch_dim}")
        if shape[batch_dim] != rows[0] and shape[batch_dim] != 1:
            raise ValueError(
                f"{op}: {name} must have batch size {rows[0]} or 1 in dimension {batch_dim}, got shape {tuple(shape)}"
            )
    return dim, batch_dim


def _check_pad(value, dtype: torch.dtype) -> float:
    """``value`` as a float that ``dtype`` can hold: integers are passed that way too."""
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"compact: pad_value must be a number, got {type(value).__name__}")
    if dtype == torch.float4_e2m1fn_x2 and value != 0:
        raise ValueError(f"compact: pad_value must be 0 for dtype float4_e2m1fn_x2, two numbers in one, got {value}")
    if not (dtype.is_floating_point or dtype.is_complex) and value != 0:
        low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        if not low <= value <= high or value != int(value) or int(float(value)) != value:
            raise ValueError(f"compact: pad_value must fit dtype {str(dtype).removeprefix('torch.')}, got {value}")
    return float(value) + 0.0  # -0.0 is 0.0


def _plan(rows, num_tokens: int, packed_source: bool, shapes, dtypes, dim, batch_dim, pad_value):
    """dims, batch_dims and pads of a call to compact, checked."""
    count = len(shapes)
    dims, batch_dims, pads = [], [], []
    per_tensor = zip(
        _per_tensor("compact", "dim", dim, count),
        _per_tensor("compact", "batch_dim", batch_dim, count),
        _per_tensor("compact", "pad_value", pad_value, count),
    )
    for i, (d, b, pad) in enumerate(per_tensor):
        d, b = _check_axes("compact", f"tensors[{i}]", rows, num_tokens, packed_source, shapes[i], d, b)
        dims.append(d)
        batch_dims.append(b)
        pads.append(_check_pad(pad, dtypes[i]))
    return dims, batch_dims, pads


# Shapes repeat from layer to layer and step to step, and checking them costs more than moving a few tokens.
_plan_again = lru_cache(maxsize=1024, typed=True)(_plan)


def _address(x: Tensor) -> int | None:
    """Where ``x`` begins; None if it has no memory: meta, fake, traced, or wrapped by torch.func."""
    if checks.valueless(x):
        return None
    try:
        return x.data_ptr() or None
    except RuntimeError:
        return None


def _check_apart(op: str, name: str, written, read=()) -> None:
    """No tensor of ``written`` shares memory with another one, as far as they have any."""
    if torch.compiler.is_compiling():
        return
    spans = []
    for writes, group in ((True, written), (False, read)):
        for x in group:
            start = _address(x)
            if start is None:
                continue
            if x.is_contiguous():
                spans.append((start, start + x.nbytes, writes))
            elif x.numel() > 0:
                last = sum([(size - 1) * stride for size, stride in zip(x.shape, x.stride())])
                spans.append((start, start + (last + 1) * x.element_size(), writes))
    end_of_any = end_of_written = 0
    for start, end, writes in sorted(spans):
        if start < (end_of_any if writes else end_of_written) and start < end:
            raise ValueError(f"{op}: {name} must not share memory with another argument, got one that does")
        end_of_any = max(end_of_any, end)
        if writes:
            end_of_written = max(end_of_written, end)


def _check_out(out, indices: Tensor, tensors, dims, batch_dims, total) -> tuple[Tensor, ...] | list[Tensor]:
    outs = (out,) if isinstance(out, Tensor) else out
    if not isinstance(outs, (tuple, list)) or len(outs) != len(tensors):
        raise TypeError(f"compact: out must be a tensor or a tuple with one per tensor ({len(tensors)}), got {out!r}")
    for i, (x, target) in enumerate(zip(tensors, outs)):
        expected = _compacted_shape(x.shape, indices, dims[i], batch_dims[i], total)
        if type(target) is Tensor and target.dtype == x.dtype and list(target.shape) == expected:
            if target.is_contiguous() and target.device == x.device:
                continue
        name = f"out[{i}]"
        checks.tensor("compact", name, target)
        checks.dtype("compact", name, target, (x.dtype,))
        checks.same_device("compact", name, target, x, "its tensor")
        checks.shape("compact", name, target, tuple(expected), "the result's shape")
        if any([st == 0 and size > 1 for size, st in zip(target.shape, target.stride())]):
            raise ValueError(f"compact: {name} must not be expanded, got strides {target.stride()}")
    if transforms.wants_gradient(*tensors, *outs):
        raise ValueError("compact: out must be None where a tensor requires grad, got a tensor")
    _check_apart("compact", "out", outs, tensors)
    return outs


def compact(
    selection: Selection,
    *tensors: Tensor,
    dim: int | tuple[int, ...] = 1,
    batch_dim: int | tuple[int | None, ...] | None = 0,
    packed: bool = False,
    total: int | None = None,
    pad_value: float | tuple[float, ...] = 0,
    out: Tensor | tuple[Tensor, ...] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """The selected tokens of every tensor, all moved by one operator call.

    Args:
        selection: which tokens. With a head axis it applies to [batch, heads, tokens, ...] (dim=2); of a packed source
            to [total tokens, ...] (dim=0, batch_dim=None). For a gradient it is made outside of torch.inference_mode.
        tensors: of any dtype and strides, e.g. hidden states [batch, tokens, channels], positions [3, batch, tokens]
            (batch_dim=1, dim=2), keys [batch, heads, tokens, channels] (dim=2). A batch axis of size 1 repeats.
        dim: the token axis, one value or one per tensor.
        batch_dim: the batch axis, likewise; None: the tensor has none, all samples take from the same table.
        packed: let the samples follow each other on one axis, which stands where the batch axis stood.
        total: length of that axis, padded or cut off; None: as long as needed (one host synchronisation).
        pad_value: for slots without a token, one value or one per tensor.
        out: where to write, of the results' shapes and dtypes; not where a tensor requires grad.
        backend: "compiled", "triton", "reference", or None for the best one.

    Returns:
        A tensor, or a tuple if there are several: the token axis has become selection.capacity (the batch axis as long
        as the selection's; it is added in front where there was none).

    Raises:
        TypeError, ValueError: an argument that does not fit.
        RuntimeError: an index outside the token axis, on the CPU; on CUDA such a slot is padding.
    """
    if type(selection) is not Selection:
        _check_selection("compact", selection)
    indices, counts, count = selection.indices, selection.counts, len(tensors)
    if count == 0:
        raise ValueError("compact: tensors must be at least one tensor, got none")
    if type(packed) is not bool:
        checks.boolean("compact", "packed", packed)
    device, shapes, dtypes = indices.device, [], []
    for i, x in enumerate(tensors):
        if type(x) is not Tensor or x.layout is not torch.strided:
            checks.tensor("compact", f"tensors[{i}]", x)
        if x.device != device:
            checks.same_device("compact", f"tensors[{i}]", x, indices, "selection")
        shapes.append(x.shape)
        dtypes.append(x.dtype)
    compiling = torch.compiler.is_compiling()
    facts = (
        counts.shape,
        selection.num_tokens,
        selection.source_cu_seqlens is not None,
        tuple(shapes),
        tuple(dtypes),
        tuple(dim) if isinstance(dim, list) else dim,
        tuple(batch_dim) if isinstance(batch_dim, list) else batch_dim,
        tuple(pad_value) if isinstance(pad_value, list) else pad_value,
    )
    plan = None
    if not compiling:
        try:
            plan = _plan_again(*facts)
        except TypeError:  # symbolic sizes, which have no hash; or an argument of the wrong type, of which _plan tells
            pass
    dims, batch_dims, pads = _plan(*facts) if plan is None else plan
    if compiling:
        pads = _numbers.arguments(pads)
    if not packed:
        if total is not None:
            raise ValueError(f"compact: total must be None unless packed=True, got {total}")
    elif indices.dim() == 3:
        raise ValueError("compact: packed must be False for a selection with a head axis, got True")
    elif total is None:
        total = checks.on_host("compact", "total", counts.sum())
    else:
        checks.integer("compact", "total", total)

    chosen = backends.pick("compact", backend, tensors[0], None, tensors)
    ops = torch.ops.pyvtk
    call = (indices, counts, selection.align == "right", tensors, dims, batch_dims, pads, total)
    if out is not None:
        outs = _check_out(out, indices, tensors, dims, batch_dims, total)
        if chosen == "compiled" and type(pads) is list:
            transforms.write(ops.compact_out.default, outs, *call, outs)
        else:
            forward = {"compiled": ops.compact_forward, "triton": ops.compact_forward_triton}
            results = forward.get(chosen, reference.compact)(*call)
            for target, result in zip(outs, results):
                target.copy_(result)
        return out
    if chosen == "reference":
        checks.outside_inference("compact", "selection", (indices, counts), tensors)
        results = reference.compact(*call)
    elif transforms.wants_gradient(*tensors):
        checks.outside_inference("compact", "selection", (indices, counts), tensors)
        results = ops.compact(*call) if chosen == "compiled" else ops.compact_triton(*call)
    elif chosen == "compiled":
        forward = ops.compact_forward if compiling else ops.compact_forward.default
        results = forward(*call)
    else:
        results = ops.compact_forward_triton(*call)
    return results[0] if count == 1 else tuple(results)


def restore(
    selection: Selection,
    update: Tensor,
    base: Tensor | None = None,
    *,
    dim: int = 1,
    gate: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``base`` with the selected tokens replaced by ``update``, or with gate * update added to them.

    Args:
        selection: the one that ``update`` was compacted with; for a gradient, made outside of torch.inference_mode.
        update: shaped like compact's result, e.g. [batch, capacity, channels]. Its padding is ignored.
        base: e.g. [batch, tokens, channels]; None: zeros.
        dim: the token axis of base, as in compact (batch_dim is 0; None for a selection of a packed source).
        gate: a number, or shaped like selection.indices, in any float dtype.
        backend: "compiled", "reference", or None for the best one.

    Returns:
        A tensor like ``base`` (under autocast in the wider dtype of base and update). Where a token was selected twice,
        the last slot replaces; with a gate, both add.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: an index outside the token axis, on the
            CPU; on CUDA such a slot is ignored.
    """
    _check_selection("restore", selection)
    checks.tensor("restore", "update", update)
    indices, packed = selection.indices, selection.packed
    checks.same_device("restore", "update", update, indices, "selection")
    dim = _check_dim("restore", "dim", dim, update.dim() - packed)
    if dim < indices.dim() - 1 - packed or (indices.dim() == 3 and dim != 2):
        raise ValueError(f"restore: dim must lie behind the rows of the selection (heads: 2), got {dim}")
    rows = (*indices.shape[:-1], indices.shape[-1])
    here = (*update.shape[: indices.dim() - 1], update.shape[dim + packed])
    if any(a != b for a, b in zip(here, rows)):
        raise ValueError(
            f"restore: update must have rows and slots {list(rows)} (slots in dimension {dim + packed}), "
            f"got shape {tuple(update.shape)}"
        )
    if base is not None:
        checks.tensor("restore", "base", base)
        update, base = backends.widest([update, base])
        checks.dtype("restore", "base", base, (update.dtype,))
        checks.same_device("restore", "base", base, update, "update")
        expected = list(update.shape)[packed:]
        expected[dim] = selection.num_tokens
        checks.shape("restore", "base", base, tuple(expected), "update's shape before compacting")
    if gate is not None:
        checks.dtype("restore", "update", update, checks.FLOATS)
        wide = torch.float64 if update.dtype == torch.float64 else torch.float32
        if isinstance(gate, Tensor):
            checks.shape("restore", "gate", gate, tuple(indices.shape), "shaped like selection.indices")
            checks.dtype("restore", "gate", gate, checks.FLOATS)
            checks.same_device("restore", "gate", gate, update, "update")
            gate = gate.to(wide)
        elif isinstance(gate, (int, float)) and not isinstance(gate, bool):
            gate = _numbers.full(indices.shape, float(gate), dtype=wide, device=indices.device)
        else:
            raise TypeError(f"restore: gate must be a number or a tensor, got {type(gate).__name__}")

    checks.outside_inference("restore", "selection", (indices, selection.counts), (update, base, gate))
    rest = (
        indices,
        selection.counts,
        selection.align == "right",
        update,
        base,
        gate,
        dim,
        selection.num_tokens,
        packed,
    )
    differentiable = (update, base, gate)
    if backends.pick("restore", backend, update, None, differentiable) == "compiled":
        return transforms.call(torch.ops.pyvtk.restore.default, differentiable, *rest)
    return reference.restore(*rest)


def compact_kv_(selection: Selection, *caches: Tensor, backend: str | None = None) -> Tensor | tuple[Tensor, ...]:
    """Move the kept tokens of KV caches to the front, in place, and zero the rest of the first ``capacity`` slots.

    Args:
        selection: ascending, align="left"; [batch, capacity], or per head of the caches.
        caches: [batch, heads, tokens, channels] each, any strides with a contiguous last dimension. What lies behind
            ``capacity`` stays as it is. To free memory, use ``compact(..., dim=2)`` instead.
        backend: "compiled", "triton", "reference", or None for the best one.

    Returns:
        A view [batch, heads, capacity, channels] of each cache; a tuple if there are several.

    Raises:
        TypeError, ValueError: an argument that does not fit.
        RuntimeError: an index outside the token axis, or indices that do not ascend, on the CPU. On CUDA rows of such
            an index are zeros, and those of indices that do not ascend are undefined; nothing else is touched.
    """
    op = "compact_kv_"
    _check_selection(op, selection)
    if not selection.ascending or selection.align != "left":
        raise ValueError(
            f"{op}: selection must be ascending with align='left', "
            f"got ascending={selection.ascending}, align={selection.align!r}"
        )
    if selection.packed:
        raise ValueError(f"{op}: selection must select from padded rows, got one of a packed source")
    if not caches:
        raise ValueError(f"{op}: caches must be at least one tensor, got none")
    rows = selection.counts.shape
    for i, cache in enumerate(caches):
        name = f"caches[{i}]"
        checks.tensor(op, name, cache, 4)
        checks.same_device(op, name, cache, selection.indices, "selection")
        _check_axes(op, name, rows, selection.num_tokens, False, cache.shape, 2, 0)
        if cache.shape[0] != rows[0]:
            raise ValueError(f"{op}: {name} must have batch size {rows[0]}, got shape {tuple(cache.shape)}")
        strides = [stride for size, stride in zip(cache.shape, cache.stride()) if size > 1]
        if 0 in strides or (cache.shape[3] > 1 and cache.stride(3) != 1):
            raise ValueError(
                f"{op}: {name} must be contiguous in its last dimension and not expanded, got strides {cache.stride()}"
            )
        if transforms.wants_gradient(cache) or cache.requires_grad:
            raise ValueError(f"{op}: {name} must not require grad, got one that does")
    if selection.capacity > selection.num_tokens:
        raise ValueError(
            f"{op}: selection must have a capacity of at most {selection.num_tokens} tokens, got {selection.capacity}"
        )
    if len(caches) > 1:
        _check_apart(op, "caches", caches)

    chosen = backends.pick(op, backend, caches[0])
    if chosen == "reference":
        reference.compact_kv_(selection.indices, selection.counts, list(caches))
    else:
        move = torch.ops.pyvtk.compact_kv_ if chosen == "compiled" else torch.ops.pyvtk.compact_kv__triton
        transforms.write(move.default, caches, selection.indices, selection.counts, list(caches))
    views = tuple(cache[:, :, : selection.capacity] for cache in caches)
    return views[0] if len(views) == 1 else views
