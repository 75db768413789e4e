"""The bookkeeping of selections, an operator each: what the methods of :class:`pyvtk.Selection` call."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk import backends, transforms
from pyvtk.reference import selection as reference

# In every schema: indices [*rows, capacity] int64 and counts [*rows] int32 of a selection, whose rows are usually
# [batch] or [batch, heads]; cu_seqlens int32 [rows + 1] of a packed axis.


def _made(like: Tensor, rows, capacity) -> tuple[Tensor, Tensor, Tensor]:
    return (
        like.new_empty((*rows, capacity), dtype=torch.int64),
        like.new_empty(rows, dtype=torch.int32),
        like.new_empty(rows, dtype=torch.bool),
    )


def _fake_complement(indices, counts, align_right, num_tokens, cu_seqlens, capacity):
    return _made(indices, counts.shape, capacity)


def _fake_then(
    indices, counts, align_right, other_indices, other_counts, other_align_right, overflow, other_overflow
):  # fmt: skip
    return _made(indices, other_counts.shape, other_indices.shape[-1])


def _fake_per_token(dtype: torch.dtype):
    def fake(indices, counts, align_right, num_tokens, packed):
        rows = () if packed else counts.shape
        return indices.new_empty((*rows, num_tokens), dtype=dtype)

    return fake


def _apart(arguments: dict, mapped: dict) -> bool:
    """Whether torch.vmap has to call once for each: rows of a packed axis share it, and a single row is no batch."""
    if arguments.get("packed") or arguments.get("cu_seqlens") is not None:
        return True
    name, inner = ("mask", 1) if "mask" in arguments else ("counts", 0)
    return arguments[name].dim() - (mapped[name] is not None) == inner


_SELECTION = {"indices": 0, "counts": 0}
_MADE = "(Tensor indices, Tensor counts, Tensor overflow)"

backends.define(
    "selection_valid",
    "(Tensor counts, SymInt capacity, bool align_right) -> Tensor",
    fake=lambda counts, capacity, align_right: counts.new_empty((*counts.shape, capacity), dtype=torch.bool),
    vmap=transforms.Fold({"counts": 0}, (0,), _apart),
    constant=True,
)
for _name, _dtype in (("selection_mask", torch.bool), ("selection_inverse", torch.int64)):
    backends.define(
        _name,
        "(Tensor indices, Tensor counts, bool align_right, SymInt num_tokens, bool packed) -> Tensor",
        fake=_fake_per_token(_dtype),
        vmap=transforms.Fold(_SELECTION, (0,), _apart),
        constant=True,
    )
backends.define(
    "selection_of_mask",
    f"(Tensor mask, SymInt capacity, bool align_right) -> {_MADE}",
    fake=lambda mask, capacity, align_right: _made(mask, mask.shape[:-1], capacity),
    vmap=transforms.Fold({"mask": 0}, (0, 0, 0), _apart),
    constant=True,
)
backends.define(
    "selection_complement",
    "(Tensor indices, Tensor counts, bool align_right, SymInt num_tokens, Tensor? cu_seqlens, SymInt capacity) -> "
    + _MADE,
    fake=_fake_complement,
    vmap=transforms.Fold(_SELECTION, (0, 0, 0), _apart),
    constant=True,
)
# Gives overflow too where neither has it: all False.
backends.define(
    "selection_then",
    "(Tensor indices, Tensor counts, bool align_right, Tensor other_indices, Tensor other_counts, "
    f"bool other_align_right, Tensor? overflow, Tensor? other_overflow) -> {_MADE}",
    fake=_fake_then,
    vmap=transforms.Fold(
        _SELECTION | dict.fromkeys(("other_indices", "other_counts", "overflow", "other_overflow"), 0),
        (0, 0, 0),
        _apart,
    ),
    constant=True,
)


def _run(name: str, op, definition, backend: str | None, tensor: Tensor, *arguments):
    if backends.pick(name, backend, tensor) == "compiled":
        return transforms.call(op, (), *arguments)
    return definition(*arguments)


_valid = torch.ops.pyvtk.selection_valid.default
_mask = torch.ops.pyvtk.selection_mask.default
_inverse = torch.ops.pyvtk.selection_inverse.default
_of_mask = torch.ops.pyvtk.selection_of_mask.default
_complement = torch.ops.pyvtk.selection_complement.default
_then = torch.ops.pyvtk.selection_then.default


# Arguments and results as in pyvtk/reference/selection.py. Selection has checked them, or made them.


def selection_valid(counts: Tensor, *arguments, backend: str | None = None) -> Tensor:
    return _run("selection_valid", _valid, reference.selection_valid, backend, counts, counts, *arguments)


def selection_mask(indices: Tensor, *arguments, backend: str | None = None) -> Tensor:
    return _run("selection_mask", _mask, reference.selection_mask, backend, indices, indices, *arguments)


def selection_inverse(indices: Tensor, *arguments, backend: str | None = None) -> Tensor:
    return _run("selection_inverse", _inverse, reference.selection_inverse, backend, indices, indices, *arguments)


def selection_of_mask(mask: Tensor, *arguments, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _run("selection_of_mask", _of_mask, reference.selection_of_mask, backend, mask, mask, *arguments)


def selection_complement(indices: Tensor, *arguments, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _run(
        "selection_complement", _complement, reference.selection_complement, backend, indices, indices, *arguments
    )


def selection_then(indices: Tensor, *arguments, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    return _run("selection_then", _then, reference.selection_then, backend, indices, indices, *arguments)
