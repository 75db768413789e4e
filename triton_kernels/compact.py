"""Triton kernels of compact, its gradient and compact_kv_, for installations without the compiled ones. Meaning:
pyvtk/reference/compact.py.

One launch per tensor; torch prepares what all of them share: which token stands in a slot, and which slots land on a
token, sorted. A tensor is seen as [batch, at most two outer axes, tokens, channels]; a program moves a block of tokens
by channels. Numbers that only move are integers of their size. No atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._tiles import unit

# of which Triton compiles no variants (_tiles.py); s0 and t0 it has to know where they are 1
NUMBERS = (
    "pad", "pad_odd", "count", "channels", "n1", "n2", "s_batch", "s_token", "s2", "s1", "t_batch", "t_token", "t2",
    "t1", "heads", "capacity", "batch_stride", "head_stride", "token_stride",
)  # fmt: skip
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a program's block; with more of them a gradient, which adds up, spills registers.
_MOVED, _ADDED = 2048, 1024


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def _in_units(a, b, c, d, UNIT: tl.constexpr):
    """The same four strides, which are multiples of UNIT, as Triton can see now."""
    return a // UNIT * UNIT, b // UNIT * UNIT, c // UNIT * UNIT, d // UNIT * UNIT


@triton.jit
def _place(count, channels, n1, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """What this program moves: row, outer coordinates, and its positions and channels with their bounds."""
    program = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_p = tl.cdiv(count, BLOCK_P)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    program = program // blocks_c
    p = program % blocks_p * BLOCK_P + tl.arange(0, BLOCK_P)
    program = program // blocks_p
    i1 = program % n1
    return program // n1, i1, p, c


@triton.jit(do_not_specialize=NUMBERS)
def gather_kernel(
    source, target, tokens, rows, pad, pad_odd, count, channels, n1, n2,
    s_batch, s_token, s2, s1, s0, t_batch, t_token, t2, t1, t0,
    PACKED: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """target[row, p] = source[row, tokens[row, p]], the pad where that is negative; packed: of row rows[p]."""
    s_batch, s_token, s2, s1 = _in_units(s_batch, s_token, s2, s1, UNIT)
    t_batch, t_token, t2, t1 = _in_units(t_batch, t_token, t2, t1, UNIT)
    channels = channels // UNIT * UNIT
    outer, i1, p, c = _place(count, channels, n1, BLOCK_P, BLOCK_C)
    i2 = (outer % n2).to(tl.int64)
    row = (outer // n2).to(tl.int64)
    i1 = i1.to(tl.int64)
    token = tl.load(tokens + row * count + p, mask=p < count, other=-1)
    source_row = tl.load(rows + p, mask=p < count, other=0) if PACKED else row + tl.zeros_like(token)
    inside = (p < count)[:, None] & (c < channels)[None, :]
    from_ = source_row * s_batch + token * s_token
    offset = (i2 * s2 + i1 * s1 + from_)[:, None] + (c.to(tl.int64) * s0)[None, :]
    value = tl.load(source + offset, mask=inside & (token >= 0)[:, None], other=0)
    padding = tl.where(c % 2 == 0, pad, pad_odd).to(source.dtype.element_ty)
    value = tl.where((token >= 0)[:, None], value, padding[None, :])
    to = row * t_batch + i2 * t2 + i1 * t1 + p.to(tl.int64) * t_token
    tl.store(target + to[:, None] + (c.to(tl.int64) * t0)[None, :], value, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def scatter_kernel(
    source, target, starts, source_rows, source_positions, count, channels, n1, n2,
    s_batch, s_token, s2, s1, s0, t_batch, t_token, t2, t1, t0,
    WIDE: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """target[row, p] = the sum, in order, of what landed on token p: entries starts[row, p] to the next start."""
    s_batch, s_token, s2, s1 = _in_units(s_batch, s_token, s2, s1, UNIT)
    t_batch, t_token, t2, t1 = _in_units(t_batch, t_token, t2, t1, UNIT)
    channels = channels // UNIT * UNIT
    outer, i1, p, c = _place(count, channels, n1, BLOCK_P, BLOCK_C)
    i2 = (outer % n2).to(tl.int64)
    row = (outer // n2).to(tl.int64)
    i1 = i1.to(tl.int64)
    begin = tl.load(starts + row * count + p, mask=p < count, other=0)
    end = tl.load(starts + row * count + p + 1, mask=p < count, other=0)
    columns = (c.to(tl.int64) * s0)[None, :] + i2 * s2 + i1 * s1
    inside = (p < count)[:, None] & (c < channels)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=WIDE)
    for step in range(tl.max(end - begin, axis=0).to(tl.int32)):
        there = begin + step < end
        from_row = tl.load(source_rows + begin + step, mask=there, other=0)
        position = tl.load(source_positions + begin + step, mask=there, other=0)
        offset = (from_row * s_batch + position * s_token)[:, None] + columns
        total += tl.load(source + offset, mask=inside & there[:, None], other=0).to(WIDE)
    to = row * t_batch + i2 * t2 + i1 * t1 + p.to(tl.int64) * t_token
    value = total.to(target.dtype.element_ty)
    tl.store(target + to[:, None] + (c.to(tl.int64) * t0)[None, :], value, mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def compact_kv_kernel(
    cache, tokens, heads, capacity, channels, batch_stride, head_stride, token_stride,
    PER_HEAD: tl.constexpr, UNIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """In place: a program owns some channels of one slice and walks its slots: all loads of a block, a barrier, then
    its stores. Tokens ascend, so that no later load reads what was stored (csrc/cuda/compact.cuh has the proof)."""
    batch_stride, head_stride, token_stride, channels = _in_units(
        batch_stride, head_stride, token_stride, channels, UNIT
    )
    program = tl.program_id(0)
    blocks_c = tl.cdiv(channels, BLOCK_C)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    pair = (program // blocks_c).to(tl.int64)
    batch, head = pair // heads, pair % heads
    columns = cache + batch * batch_stride + head * head_stride + c.to(tl.int64)[None, :]
    listed = tokens + (pair if PER_HEAD else batch) * capacity
    for first in range(0, capacity, BLOCK_P):
        slot = first + tl.arange(0, BLOCK_P)
        token = tl.load(listed + slot, mask=slot < capacity, other=-1)
        moved = (slot < capacity) & (token != slot)
        read = (moved & (token >= 0))[:, None] & (c < channels)[None, :]
        value = tl.load(columns + (token * token_stride)[:, None], mask=read, other=0)
        tl.debug_barrier()
        to = columns + (slot.to(tl.int64) * token_stride)[:, None]
        tl.store(to, value, mask=moved[:, None] & (c < channels)[None, :])


# Launchers -----------------------------------------------------------------------------------------------------------


def blocks(positions: int, channels: int, elements: int) -> dict:
    """The block of a program: whole rows where they are short, at most so many elements."""
    block_c = min(triton.next_power_of_2(max(channels, 1)), elements)
    block_p = min(triton.next_power_of_2(max(positions, 1)), max(elements // block_c, 1), 256)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4}


def _plain(x: Tensor) -> Tensor:
    """Complex numbers as two reals."""
    return torch.view_as_real(x) if x.is_complex() else x


def _integers(x: Tensor) -> Tensor:
    return x.view(_INTEGERS[x.element_size()])


def _axes(x: Tensor, dim: int, batch_dim: int) -> tuple[int, int, list[tuple[int, int]]]:
    """Strides of batch and tokens, and (size, stride) of the other axes."""
    strides = x.stride()
    batch = 0 if batch_dim < 0 or x.shape[batch_dim] == 1 else strides[batch_dim]
    return batch, strides[dim], [(x.shape[d], strides[d]) for d in range(x.dim()) if d not in (dim, batch_dim)]


def _joined(sources: list[tuple[int, int]], targets: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """(size, source stride, target stride) of as few axes as there can be."""
    axes: list[tuple[int, int, int]] = []
    for (size, s), (_, t) in zip(sources, targets):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * s and axes[-1][2] == size * t:
            axes[-1] = (axes[-1][0] * size, s, t)
        else:
            axes.append((size, s, t))
    return axes


def _move_arguments(source, target, dims, batch_dims, count: int, elements: int) -> tuple[int, dict]:
    """Programs, but for rows, and the arguments that say how two tensors lie in memory. dims, batch_dims: of both."""
    (s_batch, s_token, s_rest), (t_batch, t_token, t_rest) = (
        _axes(x, d, b) for x, d, b in zip((source, target), dims, batch_dims)
    )
    axes = _joined(s_rest, t_rest)
    if len(axes) > 3:
        source = source.contiguous()
        return _move_arguments(source, target, dims, batch_dims, count, elements)
    (n2, s2, t2), (n1, s1, t1), (channels, s0, t0) = [(1, 0, 0)] * (3 - len(axes)) + axes
    arguments = {
        "source": source, "target": target, "count": count, "channels": channels, "n1": n1, "n2": n2,
        "s_batch": s_batch, "s_token": s_token, "s2": s2, "s1": s1, "s0": s0,
        "t_batch": t_batch, "t_token": t_token, "t2": t2, "t1": t1, "t0": t0, **blocks(count, channels, elements),
        "UNIT": unit(target.element_size(), channels, s_batch, s_token, s2, s1, t_batch, t_token, t2, t1),
    }  # fmt: skip
    block = arguments["BLOCK_P"], arguments["BLOCK_C"]
    return n2 * n1 * triton.cdiv(count, block[0]) * triton.cdiv(channels, block[1]), arguments


def _tokens(indices: Tensor, counts: Tensor, align_right: bool, num_tokens: int) -> Tensor:
    """indices with -1 wherever a slot holds no token."""
    slot = torch.arange(indices.shape[-1], device=indices.device)
    counts = counts.unsqueeze(-1)
    valid = slot >= indices.shape[-1] - counts if align_right else slot < counts
    return torch.where(valid & (indices >= 0) & (indices < num_tokens), indices, -1)


def _packed(indices: Tensor, counts: Tensor, align_right: bool, total: int) -> Tensor:
    """[rows, capacity]: the position of a slot on the packed axis; ``total`` for what is not on it."""
    slot = torch.arange(indices.shape[-1], device=indices.device)
    counts = counts.clamp(0, indices.shape[-1]).unsqueeze(-1)
    rank = slot - (indices.shape[-1] - counts if align_right else 0)
    position = rank + counts.cumsum(0) - counts
    return torch.where((rank >= 0) & (rank < counts) & (position < total), position, total)


def _rows_apart(x: Tensor, heads: bool) -> Tensor:
    """[batch, heads, ...] as [rows, 1, ...]: the kernels know one axis of rows."""
    return x.flatten(0, 1).unsqueeze(1) if heads else x


def _shape(x: Tensor, dim: int, batch_dim: int, batch: int, capacity: int, total: int | None) -> tuple[list, int, int]:
    """Shape of a result, and where its token and batch axes are (batch -1: packed)."""
    sizes = list(x.shape)
    if total is None:
        sizes[dim] = capacity
        if batch_dim < 0:
            return [batch, *sizes], dim + 1, 0
        sizes[batch_dim] = batch
        return sizes, dim, batch_dim
    del sizes[dim]
    if batch_dim < 0:
        return [total, *sizes], 0, -1
    place = batch_dim - (dim < batch_dim)
    sizes[place] = total
    return sizes, place, -1


def compact(indices, counts, align_right, tensors, dims, batch_dims, pads, total) -> list[Tensor]:
    heads, capacity = indices.dim() == 3, indices.shape[-1]
    batch = indices.shape[0]
    num_tokens = tensors[0].shape[dims[0]] if tensors else 0
    tokens = _tokens(indices, counts, align_right, num_tokens).flatten(0, -2)
    rows, count, groups = tokens, capacity, tokens.shape[0]
    if total is not None:
        position = _packed(indices, counts, align_right, total).flatten()
        row = torch.arange(batch, device=indices.device)[:, None].expand(batch, capacity).flatten()
        tokens, rows = (
            torch.full((total + 1,), fill, dtype=torch.int64, device=indices.device).scatter(0, position, values)[
                :total
            ]
            for fill, values in ((-1, tokens.flatten()), (0, row))
        )
        tokens, rows, count, groups = tokens.contiguous(), rows.contiguous(), total, 1
    outs = []
    for x, dim, batch_dim, pad in zip(tensors, dims, batch_dims, pads):
        shape, place, batch_place = _shape(x, dim, batch_dim, batch, capacity, total)
        out = x.new_empty(shape)
        outs.append(out)
        if out.numel() == 0:
            continue
        pad = pad if x.is_floating_point() or x.is_complex() else int(pad)
        value = _plain(torch.full((1,), pad, dtype=x.dtype, device="cpu"))
        value = _integers(value.flatten()).tolist()
        source, target = (_rows_apart(_integers(_plain(y)), heads) for y in (x, out))
        programs, arguments = _move_arguments(source, target, (dim, place), (batch_dim, batch_place), count, _MOVED)
        odd = {"tokens": tokens, "rows": rows, "pad": value[0], "pad_odd": value[-1], "PACKED": total is not None}
        _tiles.launch(gather_kernel, programs * groups, {**arguments, **odd})
    return outs


compact_forward = compact


def compact_backward(
    indices, counts, align_right, grads, dims, batch_dims, batch_sizes, num_tokens, total
) -> list[Tensor]:
    heads, capacity, batch = indices.dim() == 3, indices.shape[-1], indices.shape[0]
    tokens = _tokens(indices, counts, align_right, num_tokens).flatten(0, -2)
    rows = tokens.shape[0]
    entry = torch.arange(rows * capacity, device=indices.device)
    source_rows = entry // max(capacity, 1)
    source_positions = entry % max(capacity, 1)
    if total is not None:
        source_positions = _packed(indices, counts, align_right, total).flatten()
        tokens = torch.where(source_positions.view(tokens.shape) < total, tokens, -1)

    def landing(merged: bool) -> tuple[Tensor, Tensor, Tensor]:
        """starts [rows * tokens + 1] and, sorted by token, rows and positions of all that lands on one."""
        first = 0 if merged else torch.arange(rows, device=indices.device)[:, None] * num_tokens
        groups = num_tokens if merged else rows * num_tokens
        key, order = torch.where(tokens < 0, groups, tokens + first).flatten().sort(stable=True)
        starts = torch.searchsorted(key, torch.arange(groups + 1, device=indices.device))
        return starts, source_rows[order] if total is None else torch.zeros_like(order), source_positions[order]

    landings: dict[bool, tuple] = {}
    results = []
    for grad, dim, batch_dim, batch_size in zip(grads, dims, batch_dims, batch_sizes):
        merged = batch_dim < 0 or (batch_size == 1 and batch != 1)
        # the shape before: undo what _shape does
        sizes = list(grad.shape)
        if total is None:
            if batch_dim < 0:
                del sizes[0]
            else:
                sizes[batch_dim] = batch_size
            sizes[dim] = num_tokens
            place, batch_place = (dim + 1, 0) if batch_dim < 0 else (dim, batch_dim)
        else:
            place, batch_place = (0 if batch_dim < 0 else batch_dim - (dim < batch_dim)), -1
            del sizes[place]
            for axis, size in sorted([(dim, num_tokens), *([(batch_dim, batch_size)] if batch_dim >= 0 else [])]):
                sizes.insert(axis, size)
        result = grad.new_empty(sizes)
        results.append(result)
        if result.numel() == 0:
            continue
        if grad.numel() == 0:
            result.zero_()
            continue
        if merged not in landings:
            landings[merged] = landing(merged)
        starts, from_rows, positions = landings[merged]
        source, target = (_rows_apart(_plain(y), heads) for y in (grad, result))
        programs, arguments = _move_arguments(
            source, target, (place, dim), (batch_place, batch_dim), num_tokens, _ADDED
        )
        wide = tl.float64 if source.dtype == torch.float64 else tl.float32
        more = {"starts": starts, "source_rows": from_rows, "source_positions": positions, "WIDE": wide}
        _tiles.launch(scatter_kernel, programs * (1 if merged else rows), {**arguments, **more})
    return results


def compact_kv_(indices, counts, caches) -> None:
    capacity = indices.shape[-1]
    if not caches or capacity == 0:
        return
    tokens = _tokens(indices, counts, False, caches[0].shape[2])
    for cache in caches:
        if cache.numel() == 0:
            continue
        x = _integers(_plain(cache).flatten(3))
        batch, heads, _, channels = x.shape
        # few channels a program: walks are long, and only many of them fill a device
        block_c = min(triton.next_power_of_2(channels), max(64 // x.element_size(), 1))
        steps = {"batch_stride": x.stride(0), "head_stride": x.stride(1), "token_stride": x.stride(2)}
        arguments = {
            "cache": x, "tokens": tokens, "heads": heads, "capacity": capacity, "channels": channels,
            **steps, "PER_HEAD": indices.dim() == 3, "UNIT": unit(x.element_size(), channels, *steps.values()),
            "BLOCK_P": min(triton.next_power_of_2(capacity), 2048 // block_c), "BLOCK_C": block_c, "num_warps": 4,
        }  # fmt: skip
        _tiles.launch(compact_kv_kernel, batch * heads * triton.cdiv(channels, block_c), arguments)
