"""merge_tokens in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_tokens(
    x: Tensor, assignment: Tensor, weights: Tensor | None, num_groups: int, mean: bool
) -> tuple[Tensor, Tensor]:
    """out[b, k] = sum of weights[b, s] * x[b, s] over the s with assignment[b, s] == k, divided by the sum of weights
    for a mean (0 where that is 0); and those sums of weights, in float64.

    Members are added in ascending order; 16-bit x in float32, rounded once.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, tokens, channels = x.shape
    # One group more per sample collects what is left out.
    group = torch.where(assignment < 0, num_groups, assignment)
    values = x.to(wide)
    weights = torch.ones_like(group, dtype=wide) if weights is None else weights
    values = values * weights.to(wide).unsqueeze(-1)
    where = group.unsqueeze(-1).expand(batch, tokens, channels)
    sums = values.new_zeros((batch, num_groups + 1, channels)).scatter_add(1, where, values)[:, :num_groups]
    totals = torch.zeros((batch, num_groups + 1), dtype=torch.float64, device=x.device)
    totals = totals.scatter_add(1, group, weights.double())[:, :num_groups]
    if mean:
        empty = (totals == 0).unsqueeze(-1)
        divisor = totals.unsqueeze(-1).to(wide).masked_fill(empty, 1)
        sums = (sums / divisor).masked_fill(empty, 0)
    return sums.to(x.dtype), totals


def weighed_merge(
    grad: Tensor, x: Tensor, assignment: Tensor, weights: Tensor | None, totals: Tensor, mean: bool
) -> Tensor:
    """sum of grad * merge_tokens(x, weights): what ``merge_tokens_backward`` gives the gradients of."""
    return (merge_tokens(x, assignment, weights, grad.shape[1], mean)[0] * grad).sum()
