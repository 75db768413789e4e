"""The definition of a selection's bookkeeping in plain torch.

A row of a selection is ``capacity`` slots, of which ``counts`` are real: the first ones, or with ``align_right`` the
last ones. The others hold -1. Rows have any shape (``rows``), usually [batch] or [batch, heads]::

    selection_valid       out[slot]: whether the slot is real
    selection_mask        out[token]: whether a real slot holds the token
    selection_inverse     out[token]: the slot that holds it, the last one if there are several, else -1
    selection_of_mask     the tokens with mask[token], ascending
    selection_complement  the tokens without mask[token], ascending; of a packed axis those of the row's sample
    selection_then        the tokens in the real slots that the second selection's real slots name, in its order

Rows of a packed axis share it: mask and inverse are those of all rows at once, the last row counting. Where more tokens
were to stay than ``capacity``, the first of them do, and ``overflow`` is true. Integers and flags throughout, so every
backend gives the same. A real slot has to hold a token (of selection_then a slot); what else is an error on the CPU,
and left out by the kernels of CUDA. No host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _slots_of(flags: Tensor, capacity: int, align_right: bool) -> Tensor:
    """Output slot of every True in ``flags`` [..., n], in order; ``capacity`` (one past the end) for all others."""
    rank = flags.cumsum(-1) - 1
    if align_right:
        rank = rank + (capacity - flags.sum(-1, keepdim=True).clamp(max=capacity))
    return torch.where(flags & (rank < capacity), rank, capacity)


def _pack(values: Tensor, flags: Tensor, capacity: int, align_right: bool) -> Tensor:
    """The flagged ``values`` [..., n] in order, as [..., capacity], padded with -1 on the other side."""
    packed = values.new_full((*values.shape[:-1], capacity + 1), -1)
    return packed.scatter(-1, _slots_of(flags, capacity, align_right), values)[..., :capacity].contiguous()


def selection_valid(counts: Tensor, capacity: int, align_right: bool) -> Tensor:
    """bool [*rows, capacity]"""
    slot = torch.arange(capacity, device=counts.device)
    return slot >= capacity - counts[..., None] if align_right else slot < counts[..., None]


def _scatter(
    values: Tensor, fill, indices: Tensor, counts: Tensor, align_right: bool, num_tokens: int, packed: bool
) -> Tensor:
    """``values`` (shaped like indices) at the tokens they belong to: [*rows, num_tokens], packed: [num_tokens]."""
    # Padding goes to a slot one past the end, which is cut off.
    valid = selection_valid(counts, indices.shape[-1], align_right)
    where = torch.where(valid, indices, num_tokens)
    if packed:
        where, values = where.flatten(), values.flatten()
    out = values.new_full((*where.shape[:-1], num_tokens + 1), fill)
    return out.scatter(-1, where, values)[..., :num_tokens].contiguous()


def selection_mask(indices: Tensor, counts: Tensor, align_right: bool, num_tokens: int, packed: bool) -> Tensor:
    """bool [*rows, num_tokens], packed: [num_tokens]"""
    flags = torch.ones_like(indices, dtype=torch.bool)
    return _scatter(flags, False, indices, counts, align_right, num_tokens, packed)


def selection_inverse(indices: Tensor, counts: Tensor, align_right: bool, num_tokens: int, packed: bool) -> Tensor:
    """int64 [*rows, num_tokens], packed: [num_tokens]"""
    slot = torch.arange(indices.shape[-1], device=indices.device).expand(indices.shape)
    return _scatter(slot.contiguous(), -1, indices, counts, align_right, num_tokens, packed)


def selection_of_mask(mask: Tensor, capacity: int, align_right: bool) -> tuple[Tensor, Tensor, Tensor]:
    """indices int64 [*rows, capacity], counts int32 [*rows], overflow bool [*rows]"""
    total = mask.sum(-1, dtype=torch.int32)
    token = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    return _pack(token, mask, capacity, align_right), total.clamp(max=capacity), total > capacity


def selection_complement(
    indices: Tensor, counts: Tensor, align_right: bool, num_tokens: int, cu_seqlens: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As selection_of_mask, aligned to the same side; ``cu_seqlens`` [rows + 1] of a packed axis."""
    gone = ~selection_mask(indices, counts, align_right, num_tokens, cu_seqlens is not None)
    if cu_seqlens is not None:
        token = torch.arange(num_tokens, device=gone.device)
        starts = cu_seqlens.long()
        gone = gone & (token >= starts[:-1, None]) & (token < starts[1:, None])
    return selection_of_mask(gone, capacity, align_right)


def selection_then(
    indices: Tensor, counts: Tensor, align_right: bool, other_indices: Tensor, other_counts: Tensor,
    other_align_right: bool, overflow: Tensor | None, other_overflow: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As selection_of_mask, with the capacity and the side of ``other``; overflow where one of them has it."""
    either = torch.zeros_like(counts, dtype=torch.bool)
    for flags in (overflow, other_overflow):
        either = either if flags is None else either | flags
    capacity = indices.shape[-1]
    if capacity == 0:  # other can hold padding only, and gather would refuse its indices
        return torch.full_like(other_indices, -1), torch.zeros_like(other_counts), either
    slots = other_indices.clamp(min=0)
    valid = selection_valid(counts, capacity, align_right).gather(-1, slots)
    flags = selection_valid(other_counts, other_indices.shape[-1], other_align_right) & valid
    packed = _pack(indices.gather(-1, slots), flags, other_indices.shape[-1], other_align_right)
    return packed, flags.sum(-1, dtype=torch.int32), either
