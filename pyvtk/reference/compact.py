"""compact, restore and compact_kv_ in plain torch.

A selection comes as indices [batch, (heads,) capacity], counts [batch, (heads)] and the side that rows stand on. Slots
that are not ``valid`` are padding; what their indices hold does not matter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk.reference._exact import exact


def _valid(indices: Tensor, counts: Tensor, align_right: bool) -> Tensor:
    """bool, shaped like indices."""
    slot = torch.arange(indices.shape[-1], device=indices.device)
    counts = counts.unsqueeze(-1)
    return slot >= indices.shape[-1] - counts if align_right else slot < counts


def _tokens_first(x: Tensor, dim: int, batch_dim: int, heads: bool, rows: tuple[int, ...]) -> Tensor:
    """``x`` as [*rows, tokens, rest...]; a batch axis of size 1, or none (``batch_dim`` < 0), repeats for every row."""
    if batch_dim < 0:
        x, dim, batch_dim = x.unsqueeze(0), dim + 1, 0
    named = [batch_dim, batch_dim + 1, dim] if heads else [batch_dim, dim]
    x = x.movedim(named, list(range(len(named))))
    return x.expand(*rows, *x.shape[len(rows) :])


_ORDINARY = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """A view of ``x`` to move: torch has hardly any kernels for the other dtypes (8-bit floats, unsigned integers)."""
    return x if x.dtype in _ORDINARY else x.view(_OF_SIZE[x.dtype.itemsize])


def _bits_of(value: float | Tensor, dtype: torch.dtype, like: Tensor) -> Tensor:
    """``value`` in ``dtype`` as [1] of the bits that ``like`` is moved as; a tensor [] where torch.compile leaves the
    number open."""
    if isinstance(value, Tensor):
        return _bits(value.to(like.device, dtype).reshape(1))
    if value == 0:  # no bit set, also in dtypes without a zero
        return like.new_zeros(1)
    return _bits(torch.full((1,), value, dtype=dtype, device=like.device))


def _column(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with axes of size 1 behind, so that it broadcasts with ``like``."""
    return values.reshape(*values.shape, *([1] * (like.dim() - values.dim())))


@exact
def compact(
    indices: Tensor,
    counts: Tensor,
    align_right: bool,
    tensors: list[Tensor],
    dims: list[int],
    batch_dims: list[int],
    pads: list[float] | Tensor,
    total: int | None,
) -> list[Tensor]:
    """out[b, slot] = x[b, indices[b, slot]] where valid, else pad, for every tensor, with its axes where they were.

    With ``total``, the valid rows of all samples follow each other on one axis of that length, at the place of the
    batch axis: cut off at ``total``, or padded.
    """
    rows = tuple(indices.shape[:-1])
    valid = _valid(indices, counts, align_right)
    outs = []
    for x, dim, batch_dim, value in zip(tensors, dims, batch_dims, pads):
        dtype, x = x.dtype, _bits(x)
        pad = _bits_of(value, dtype, x)
        table = _tokens_first(x, dim, batch_dim, len(rows) == 2, rows)
        where = _column(torch.where(valid, indices, 0), table)
        if table.shape[len(rows)] > 0:
            out = table.gather(len(rows), where.expand(*indices.shape, *table.shape[len(rows) + 1 :]))
        else:
            out = x.new_zeros((*indices.shape, *table.shape[len(rows) + 1 :]))
        out = torch.where(_column(valid, out), out, pad)
        first = max(batch_dim, 0)
        if total is None:
            place = dim + 1 if batch_dim < 0 else dim
            outs.append(out.movedim(list(range(len(rows) + 1)), [first, *range(1, len(rows)), place]).contiguous())
            continue
        # The order of valid slots; padding goes to one slot past the end, which is cut off.
        target = torch.where(valid.flatten(), valid.flatten().cumsum(0) - 1, total).clamp(max=total)
        packed = pad.expand(total + 1, *out.shape[2:]).index_put((target,), out.flatten(0, 1))[:total]
        outs.append(packed.movedim(0, first - (0 <= dim < first)).contiguous())
    # A view in the own dtype would cut the graph.
    return [out if out.dtype == x.dtype else out.view(x.dtype) for out, x in zip(outs, tensors)]


def _flat_targets(indices: Tensor, valid: Tensor, num_tokens: int, packed_source: bool) -> Tensor:
    """The row of [rows * (num_tokens + 1)] (packed source: [num_tokens + 1]) that each slot lands on."""
    where = torch.where(valid, indices, num_tokens)
    if packed_source:
        return where.flatten()
    where = where.flatten(0, -2)
    return (where + torch.arange(where.shape[0], device=where.device)[:, None] * (num_tokens + 1)).flatten()


@exact
def restore(
    indices: Tensor,
    counts: Tensor,
    align_right: bool,
    update: Tensor,
    base: Tensor | None,
    gate: Tensor | None,
    dim: int,
    num_tokens: int,
    packed_source: bool,
) -> Tensor:
    """base (zeros) with row indices[b, slot] replaced by update[b, slot], the last slot winning.

    With ``gate`` [batch, (heads,) capacity]: base + gate * update there, every slot adding its own, summed in float32
    for 16-bit tensors and rounded once.
    """
    if update.dtype not in _ORDINARY:
        base = None if base is None else _bits(base)
        update, dtype = _bits(update), update.dtype
        out = restore(indices, counts, align_right, update, base, gate, dim, num_tokens, packed_source)
        return out.view(dtype)
    lead = indices.dim() - 1
    valid = _valid(indices, counts, align_right)
    where = _flat_targets(indices, valid, num_tokens, packed_source)
    rows = (1,) if packed_source else tuple(indices.shape[:-1])
    heads = lead == 2
    source = _tokens_first(update, dim + packed_source, 0, heads, tuple(indices.shape[:-1]))
    rest = tuple(source.shape[lead + 1 :])
    if base is None:
        table = update.new_zeros((*rows, num_tokens, *rest))
    else:
        table = _tokens_first(base, dim, -1 if packed_source else 0, heads, rows)
    # One row more per sample catches the padding.
    table = torch.cat([table, table.new_zeros((*rows, 1, *rest))], len(rows)).flatten(0, len(rows))
    source = source.flatten(0, lead)
    if gate is None:
        slot = torch.arange(where.shape[0], device=where.device)
        last = slot.new_full((table.shape[0],), -1).scatter_reduce(0, where, slot, "amax")
        winner = last.gather(0, where) == slot
        # Losers go to a slot of padding: then every row that counts is written once.
        out = table.index_put((torch.where(winner, where, num_tokens),), source)
    else:
        wide = torch.float64 if table.dtype == torch.float64 else torch.float32
        # Padding may hold NaN, which a product with a gradient of 0 would spread.
        padding = ~valid.flatten()
        gate = gate.to(wide).flatten().masked_fill(padding, 0)
        added = source.to(wide).masked_fill(_column(padding, source), 0) * _column(gate, source)
        out = table.to(wide).index_add(0, where, added).to(table.dtype)
    out = out.unflatten(0, (*rows, num_tokens + 1)).narrow(len(rows), 0, num_tokens)
    if packed_source:
        return out.squeeze(0).movedim(0, dim).contiguous()
    return out.movedim(list(range(lead + 1)), [*range(lead), dim]).contiguous()


def weighed_restore(
    indices: Tensor, counts: Tensor, align_right: bool, grad: Tensor, update: Tensor, gate: Tensor | None, dim: int,
    packed_source: bool,
) -> Tensor:  # fmt: skip
    """sum of grad * restore(update, gate): what ``restore_backward`` gives the gradients of."""
    out = restore(indices, counts, align_right, update, None, gate, dim, grad.shape[dim], packed_source)
    return (out * grad).sum()


@exact
def compact_kv_(indices: Tensor, counts: Tensor, caches: list[Tensor]) -> None:
    """cache[b, h, :capacity] = the kept rows in order, then zeros. Later rows stay as they are."""
    capacity = indices.shape[-1]
    for cache in caches:
        cache = _bits(cache)
        kept = indices if indices.dim() == 3 else indices[:, None].expand(-1, cache.shape[1], -1)
        valid = _valid(kept, counts if indices.dim() == 3 else counts[:, None].expand(-1, cache.shape[1]), False)
        rows = cache.gather(2, torch.where(valid, kept, 0)[..., None].expand(*kept.shape, cache.shape[3]))
        cache[:, :, :capacity] = torch.where(valid[..., None], rows, 0)
