"""The operators of the selection family by the emulated CUDA kernels: arguments as in pyvtk/reference/selection.py."""

from __future__ import annotations

import torch
from emulated import Call, Exact, number
from torch import Tensor


class _Made:
    """Results of a kernel, each in memory of exactly its size, full of what no kernel writes."""

    def __init__(self, *shapes_and_dtypes):
        self.all = [Exact(torch.full(shape, 7, dtype=torch.uint8).to(dtype)) for shape, dtype in shapes_and_dtypes]

    @property
    def pointers(self) -> tuple:
        return tuple(number(exact.address) for exact in self.all)

    def read(self):
        found = tuple(exact.read() for exact in self.all)
        return found if len(found) > 1 else found[0]


def _selection(rows, capacity: int) -> _Made:
    return _Made(((*rows, capacity), torch.int64), (tuple(rows), torch.int32), (tuple(rows), torch.bool))


def _of(call: Call, indices: Tensor, counts: Tensor, align_right: bool) -> tuple:
    return (
        call.pointer(indices), call.pointer(counts), number(counts.numel()), number(indices.shape[-1]),
        int(align_right),
    )  # fmt: skip


def selection_of_mask(mask, capacity, align_right):
    call, made = Call(), _selection(mask.shape[:-1], capacity)
    call(
        "emulated_selection_of_mask", call.pointer(mask), number(made.all[1].tensor.numel()), number(mask.shape[-1]),
        *made.pointers, number(capacity), int(align_right),
    )  # fmt: skip
    return made.read()


def selection_complement(indices, counts, align_right, num_tokens, cu_seqlens, capacity):
    call, made = Call(), _selection(counts.shape, capacity)
    call(
        "emulated_selection_complement", *_of(call, indices, counts, align_right), call.pointer(cu_seqlens),
        number(num_tokens), *made.pointers, number(capacity),
    )  # fmt: skip
    return made.read()


def selection_then(
    indices, counts, align_right, other_indices, other_counts, other_align_right, overflow, other_overflow
):  # fmt: skip
    call, made = Call(), _selection(other_counts.shape, other_indices.shape[-1])
    call(
        "emulated_selection_then", *_of(call, indices, counts, align_right), call.pointer(other_indices),
        call.pointer(other_counts), number(other_indices.shape[-1]), int(other_align_right), call.pointer(overflow),
        call.pointer(other_overflow), *made.pointers,
    )  # fmt: skip
    return made.read()


def _per_token(function: str, dtype: torch.dtype):
    def run(indices, counts, align_right, num_tokens, packed):
        call, made = Call(), _Made(((*(() if packed else counts.shape), num_tokens), dtype))
        call(function, *_of(call, indices, counts, align_right), number(num_tokens), int(packed), *made.pointers)
        return made.read()

    return run


selection_mask = _per_token("emulated_selection_mask", torch.bool)
selection_inverse = _per_token("emulated_selection_inverse", torch.int64)


def selection_valid(counts, capacity, align_right):
    call, made = Call(), _Made(((*counts.shape, capacity), torch.bool))
    call(
        "emulated_selection_valid", call.pointer(counts), number(counts.numel()), number(capacity), int(align_right),
        *made.pointers,
    )  # fmt: skip
    return made.read()
