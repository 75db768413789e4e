"""Scores of heads that lie on several ranks (tensor parallelism), put together as one process would."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of queries of one head of keys from which the CPU kernels sum in runs, whose number depends on all heads.
MOST_ROWS = 192


def member(op: str, group) -> None:
    """``group`` is one that this process belongs to."""
    if not torch.distributed.is_available() or not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{op}: group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
    if torch.distributed.get_rank(group) < 0:
        raise ValueError(f"{op}: group must hold this process, got one of ranks {_ranks(group)}")


def check(op: str, q: Tensor, k: Tensor, query_reduce: str, head_reduce: str, heads_first: bool) -> None:
    """The arguments are such that ranks can agree."""
    if heads_first and "max" in (query_reduce, head_reduce):
        raise ValueError(
            f"{op}: reduce_order must be 'queries_first' with group and a maximum, whose pairs stay on their ranks, "
            "got 'heads_first'"
        )
    queries = q.shape[0 if q.dim() == 3 else 2]
    rows = queries * (q.shape[1] // k.shape[1])
    if rows >= MOST_ROWS:
        raise ValueError(
            f"{op}: q must have fewer than {MOST_ROWS} rows for each head of k with group, got {queries} queries of "
            f"{q.shape[1] // k.shape[1]} heads"
        )


def _ranks(group) -> list[int]:
    return torch.distributed.get_process_group_ranks(group)


def own_heads(op: str, head_weights: Tensor | None, heads: int, group) -> Tensor | None:
    """Weights [..., heads] of this rank's heads, from those or from all."""
    if not isinstance(head_weights, Tensor) or head_weights.dim() not in (1, 2):
        return head_weights  # checked with the other arguments
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    given = head_weights.shape[-1]
    if given not in (heads, heads * size):
        raise ValueError(
            f"{op}: head_weights must be of this rank's {heads} heads or of all {heads * size}, got {given}"
        )
    return head_weights if given == heads else head_weights[..., rank * heads : (rank + 1) * heads]


def local_reduce(query_reduce: str, head_reduce: str) -> str:
    """The head_reduce whose results the ranks exchange. Kernels add the heads of a group up before anything else, where
    nothing but sums is taken."""
    return "none" if "max" in (query_reduce, head_reduce) else "group_sum"


def reduced(scores: Tensor, heads: int, head_reduce: str, group) -> Tensor:
    """Scores [1, batch, slots, keys] of this rank, reduced over the slots of all ranks in the order of heads, one after
    the other as kernels do: [1, batch, 1, keys]. ``heads``: query heads of this rank."""
    size = torch.distributed.get_world_size(group)
    scores = scores.contiguous()
    parts = [torch.empty_like(scores) for _ in range(size)]
    torch.distributed.all_gather(parts, scores, group=group)
    first, *others = torch.cat(parts, 2).unbind(2)
    for other in others:
        if head_reduce == "max":  # the first one of equals, or the first NaN
            first = torch.where((other > first) | (other.isnan() & ~first.isnan()), other, first)
        else:
            first = first + other
    if head_reduce == "mean":
        first = first / torch.full_like(first, heads * size)  # a division, which by a number may be a product
    return first[:, :, None]
