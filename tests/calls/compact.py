"""Calls of compact, restore and compact_kv_. Values are whole numbers that every dtype holds, and so are most sums."""

from __future__ import annotations

import torch

import pyvtk
from calls.call import BRAIN, DOUBLE, HALF, SINGLE, Call, gradient, short, values
from pyvtk import Selection

FP8, COMPLEX = torch.float8_e4m3fn, torch.complex64


def chosen(rows, tokens, keep, *, ragged=False, align="left") -> Selection:
    """A random ascending selection, with ``ragged`` of 0 to ``keep`` tokens."""
    order = torch.rand(*rows, tokens).argsort(-1)
    count = torch.randint(0, keep + 1, rows) if ragged else torch.full(rows, keep)
    mask = torch.zeros(*rows, tokens, dtype=torch.bool).scatter(-1, order, torch.arange(tokens) < count[..., None])
    return Selection.from_mask(mask, capacity=keep, align=align)


def repeated(rows, tokens, slots) -> Selection:
    """In no order, and about half of the slots hold a token that another one holds too."""
    counts = torch.randint(slots // 2, slots + 1, rows)
    return Selection.from_indices(torch.randint(0, max(slots // 2, 1), (*rows, slots)), tokens, counts=counts)


def descending(rows, tokens, keep) -> Selection:
    order = torch.rand(*rows, tokens).argsort(-1)[..., :keep]
    return Selection.from_indices(order.sort(-1, descending=True).values, tokens)


def of_packed_rows(lengths, keep) -> Selection:
    """Of samples that follow each other on one axis."""
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return pyvtk.select(torch.randn(sum(lengths)), keep, cu_seqlens=ends, capacity=keep + 3, backend="reference")


def compact(**options):
    def run(backend, selection, *tensors):
        return pyvtk.compact(selection, *tensors, **options, backend=backend)

    return run


def restore(**options):
    def run(backend, selection, update, base=None):
        return pyvtk.restore(selection, update, base, **options, backend=backend)

    return run


def restore_gated(**options):
    """The order of arguments is that of the gradients that are asked for: gate and update."""

    def run(backend, selection, base, gate, update):
        return pyvtk.restore(selection, update, base, gate=gate, **options, backend=backend)

    return run


def moved(inputs, **options):
    return Call("compact", inputs, compact(**options))


def put_back(inputs, **options):
    return Call("restore", inputs, restore(**options))


def bundle():
    keys = [values(2, 4, 130, 64, dtype=BRAIN).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2)]
    positions = torch.arange(130).expand(3, 2, 130)
    return chosen((2,), 130, 41, ragged=True), values(2, 130, 96), positions, values(2, 130) > 0, *keys


def caches(count, heads, tokens, channels, dtype=BRAIN):
    return (values(1, heads, tokens, channels, dtype=dtype) for _ in range(count))


def few(*shape, dtype=SINGLE):
    """So small that sums over repeated tokens are exact in 16 bits."""
    return values(*shape, dtype=dtype, most=20)


def compact_gradient(inputs, *, results=1, **options):
    """Inputs: selection, tensors, what arrives at the results."""
    return Call("compact_backward", inputs, gradient(compact(**options), results, results))


def compact_gradient_in(dtype, channels):
    return compact_gradient(lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, channels, dtype=dtype),
                                     values(3, 31, channels, dtype=dtype)))  # fmt: skip


def many_gradients():
    """More tensors than the parameters of a small launch hold."""
    tensors = [values(2, 40, width, dtype=(SINGLE, BRAIN)[width % 2]) for width in range(1, 12)]
    return chosen((2,), 40, 9, ragged=True), *tensors, *(values(2, 9, x.shape[2], dtype=x.dtype) for x in tensors)


def restore_gradient_in(dtype, channels):
    return Call("restore_backward", lambda: (
        chosen((3,), 97, 31, ragged=True), values(3, 31, channels, dtype=dtype), values(3, 97, channels, dtype=dtype),
        values(3, 97, channels, dtype=dtype)), gradient(restore(), 2))  # fmt: skip


def gate_gradient_in(dtype, channels):
    gates = DOUBLE if dtype == DOUBLE else SINGLE
    return Call("restore_backward", lambda: (
        chosen((3,), 97, 31, ragged=True), values(3, 97, channels, dtype=dtype), values(3, 31, dtype=gates),
        values(3, 31, channels, dtype=dtype), values(3, 97, channels, dtype=dtype)),
        gradient(restore_gated(), 2))  # fmt: skip


def in_place(backend, selection, *caches):
    caches = [x.clone() for x in caches]  # preserves strides
    pyvtk.compact_kv_(selection, *caches, backend=backend)
    return caches


def into_out(backend, selection, x):
    out = torch.full((x.shape[0], selection.capacity, x.shape[2]), 7, dtype=x.dtype, device=x.device)
    return pyvtk.compact(selection, x, out=out, backend=backend)


def packed_update(*shape):
    """A selection of packed rows and the update that goes with it."""
    selection = of_packed_rows([50, 0, 120, 31], 20)
    return selection, values(4, selection.capacity, *shape)


def both_widths(dtype):
    """Channels that move in units of 16 bytes, and those that move one by one."""
    return ((dtype, 64), (dtype, 65))


CALLS = {
    "hidden": moved(lambda: (chosen((2,), 640, 144), values(2, 640, 4096, dtype=BRAIN))),
    "odd width": Call("compact", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65)), compact(),
                      compiles=True),
    "unaligned": moved(lambda: (chosen((3,), 97, 31), values(3, 97, 129, dtype=HALF)[..., 1:])),
    "bytes": moved(lambda: (chosen((3,), 97, 31), values(3, 97, 17, dtype=torch.uint8))),
    "bool": moved(lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 24) > 0), pad_value=True),
    "fp8": moved(lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 33, dtype=FP8)), pad_value=2),
    "double": moved(lambda: (chosen((3,), 97, 31), values(3, 97, 6, dtype=DOUBLE))),
    "complex": moved(lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 5, dtype=COMPLEX) * (1 + 2j))),
    "a layer": moved(bundle, dim=(1, 2, 1, 2, 2), batch_dim=(0, 1, 0, 0, 0), pad_value=(0, -1, 1, 0, 3)),
    "caches of 10 layers": moved(lambda: (chosen((1,), 60, 20), *caches(20, 2, 60, 16)), dim=2),
    "caches of 10 layers, packed": moved(lambda: (chosen((3,), 60, 20, ragged=True), *(
        values(3, 2, 60, 16, dtype=BRAIN) for _ in range(20))), dim=2, packed=True, total=44),
    "right": moved(lambda: (chosen((3,), 97, 31, ragged=True, align="right"), values(3, 97, 8))),
    "descending": moved(lambda: (descending((3,), 97, 31), values(3, 97, 40))),
    "repeated": moved(lambda: (repeated((3,), 97, 31), values(3, 97, 40, dtype=HALF))),
    "packed": moved(lambda: (chosen((4,), 77, 20, ragged=True), values(4, 77, 24)), packed=True, total=60),
    "table": moved(lambda: (chosen((4,), 77, 20), values(77, 24)), dim=0, batch_dim=None),
    "one sample for all": moved(lambda: (chosen((4,), 77, 20), values(1, 77, 24))),
    "of packed rows": moved(lambda: (of_packed_rows([50, 0, 120, 31], 20), values(201, 24)), dim=0, batch_dim=None),
    "by head": moved(lambda: (chosen((2, 4), 200, 50), values(2, 4, 200, 64)), dim=2),
    "nothing stays": moved(lambda: (chosen((2,), 50, 0), values(2, 50, 8))),
    "no rows": moved(lambda: (chosen((0,), 50, 5), values(0, 50, 8))),
    "into out": Call("compact_out", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 40)), into_out),

    "gradient": compact_gradient_in(SINGLE, 65),
    **{f"gradient, {short(dtype)}": compact_gradient_in(dtype, channels)
       for dtype, channels in ((BRAIN, 64), (HALF, 33), (DOUBLE, 8), (COMPLEX, 12))},
    "gradient, many tensors": compact_gradient(many_gradients, results=11),
    "gradient, descending": compact_gradient(lambda: (descending((3,), 97, 31), values(3, 97, 8), values(3, 31, 8))),
    **{f"gradient, repeated, {short(dtype)}": compact_gradient(lambda dtype=dtype: (
        repeated((3,), 97, 31), few(3, 97, 40, dtype=dtype), few(3, 31, 40, dtype=dtype)))
       for dtype in (SINGLE, BRAIN, HALF, DOUBLE)},
    "gradient, right": compact_gradient(lambda: (
        chosen((3,), 97, 31, ragged=True, align="right"), values(3, 97, 8), values(3, 31, 8))),
    "gradient, packed": compact_gradient(lambda: (
        chosen((4,), 77, 20, ragged=True), values(4, 77, 24), values(60, 24)), packed=True, total=60),
    "gradient, table": compact_gradient(lambda: (
        chosen((4,), 77, 20, ragged=True), values(77, 24), values(4, 20, 24)), dim=0, batch_dim=None),
    "gradient, one sample for all": compact_gradient(lambda: (
        chosen((4,), 77, 20), few(1, 77, 24, dtype=BRAIN), few(4, 20, 24, dtype=BRAIN))),
    "gradient by head": compact_gradient(lambda: (
        chosen((2, 4), 97, 31, ragged=True), values(2, 4, 97, 64, dtype=BRAIN), values(2, 4, 31, 64, dtype=BRAIN)),
        dim=2),

    "restore": Call("restore", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 31, 65), values(3, 97, 65)),
                    restore(), compiles=True),
    "restore on zeros": put_back(lambda: (chosen((3,), 97, 31), values(3, 31, 64, dtype=BRAIN))),
    "restore by head": put_back(lambda: (chosen((2, 4), 97, 31), values(2, 4, 31, 64), values(2, 4, 97, 64)), dim=2),
    "restore, right": put_back(lambda: (
        chosen((3,), 97, 31, ragged=True, align="right"), values(3, 31, 8), values(3, 97, 8))),
    "restore, repeated": put_back(lambda: (repeated((3,), 97, 31), values(3, 31, 40), values(3, 97, 40))),
    "restore, bytes": put_back(lambda: (chosen((3,), 97, 31), values(3, 31, 17, dtype=torch.uint8),
                                        values(3, 97, 17, dtype=torch.uint8))),
    "restore, fp8": put_back(lambda: (chosen((3,), 97, 31), values(3, 31, 32, dtype=FP8),
                                      values(3, 97, 32, dtype=FP8))),
    "restore packed rows": put_back(lambda: (*packed_update(24), values(201, 24)), dim=0),
    "restore with a gate": Call("restore", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65),
                                                    values(3, 31), values(3, 31, 65)), restore_gated()),
    "restore with a gate, repeated": Call("restore", lambda: (
        repeated((3,), 97, 31), few(3, 97, 64, dtype=BRAIN), values(3, 31, most=2), few(3, 31, 64, dtype=BRAIN)),
        restore_gated()),
    "restore with a gate, double": Call("restore", lambda: (
        repeated((3,), 97, 31), values(3, 97, 6, dtype=DOUBLE), values(3, 31, dtype=DOUBLE),
        values(3, 31, 6, dtype=DOUBLE)), restore_gated()),
    "restore's gradient": restore_gradient_in(SINGLE, 65),
    **{f"restore's gradient, {short(dtype)}": restore_gradient_in(dtype, channels)
       for dtype, channels in ((BRAIN, 64), (HALF, 33), (DOUBLE, 8))},
    "restore's gradient, repeated": Call("restore_backward", lambda: (
        repeated((3,), 97, 31), values(3, 31, 40), values(3, 97, 40), values(3, 97, 40)), gradient(restore(), 2)),
    "restore's gradient, packed rows": Call("restore_backward", lambda: (
        *packed_update(24), values(201, 24), values(201, 24)), gradient(restore(dim=0), 2)),
    "gate's gradient": gate_gradient_in(SINGLE, 65),
    **{f"gate's gradient, {short(dtype)}, {channels} channels": gate_gradient_in(dtype, channels)
       for dtype, channels in ((SINGLE, 64), *both_widths(BRAIN), *both_widths(HALF), *both_widths(DOUBLE))},
    "gate's gradient, repeated": Call("restore_backward", lambda: (
        repeated((3,), 97, 31), values(3, 97, 24), values(3, 31), values(3, 31, 24), values(3, 97, 24)),
        gradient(restore_gated(), 2)),

    "caches": Call("compact_kv_", lambda: (chosen((2,), 300, 70, ragged=True),
                                           *(values(2, 4, 300, 64, dtype=BRAIN) for _ in range(6))), in_place,
                   compiles=True),
    "caches by head": Call("compact_kv_", lambda: (chosen((2, 4), 300, 70), values(2, 4, 300, 72)), in_place),
    "caches, tokens first": Call("compact_kv_", lambda: (chosen((2,), 300, 170),
                                                         values(2, 300, 4, 40, dtype=HALF).transpose(1, 2)), in_place),
    "caches, long": Call("compact_kv_", lambda: (chosen((1,), 9000, 8500), values(1, 2, 9000, 128, dtype=BRAIN)),
                         in_place),
    "caches, fp8": Call("compact_kv_", lambda: (chosen((2,), 300, 70), values(2, 4, 300, 24, dtype=FP8)), in_place),
    "caches of 40 layers": Call("compact_kv_", lambda: (chosen((1,), 60, 20), *caches(80, 2, 60, 16)), in_place),
}  # fmt: skip
