"""The definition of ``select`` in plain torch.

Tokens of one row (a sample, or a head of it) fall into groups: the row itself, or its segments. Per token::

    forced     = keep & ~drop                                       stays, whatever the criteria say
    candidate  = candidates & (0 <= segment < num_segments) & ~drop
    competitor = candidate & ~forced
    other      = ~(candidates & (0 <= segment < num_segments)) & ~drop      stays too if keep_others

Ranking: higher score first, NaN after -inf, -0.0 equal to +0.0, then lower index. A competitor stays if every criterion
that is given holds in its group:

    num_keep   fewer than max(num_keep, 0) - (forced tokens of the group, candidates or not) competitors rank before it
    threshold  score >= threshold; NaN fails, and nothing reaches a NaN threshold
    top_p      it belongs to the smallest prefix of the ranking of all candidates (forced ones included, as
               they have mass too) with mass >= ceil(float64(p) * float64(total mass)), of at least one token. p below 0
               counts as 0, p above 1 and NaN as 1.

Mass is counted in integers, so that the order of summation cannot matter: with m the largest candidate of the group and
m = f * 2^e, 0.5 <= f < 1, a score s weighs floor(s * 2^(31 - e)) < 2^31. Negative scores and NaN weigh 0. If m is +inf,
infinite scores weigh 1 and all others 0. Sums are int64.

Order of preference: forced and others first, then competitors; inside both by the ranking. If more tokens of a row stay
than capacity, the first in this order are kept and overflow is true. Rows are written in ascending order, or in order
of preference with by_score; unused slots hold -1.

All comparisons are exact, so every backend gives the same indices. No host synchronisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk.reference._exact import exact


def _weights(scores: Tensor, candidate: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """int64 [tokens]: the integer mass of each score."""
    scores = torch.where(candidate & (scores > 0), scores.double(), 0.0)
    largest = scores.new_zeros(num_groups).scatter_reduce(0, group, scores, "amax")[group]
    # Read from the bits: a score is significand * 2^(exponent - 1075), so floor(ldexp(score, 31 - e)) is a shift to the
    # right, without powers of two that leave the range of float64. (Below 2^-1022, e stays that of 2^-1022.)
    bits = scores.view(torch.int64)
    exponent = (bits >> 52).clamp(min=1)
    significand = (bits & (2**52 - 1)) + torch.where(bits >> 52 > 0, 2**52, 0)
    shift = 22 + (largest.view(torch.int64) >> 52).clamp(min=1) - exponent
    weights = significand >> shift.clamp(0, 63)
    return torch.where(largest.isinf(), scores.isinf().long(), weights)


@exact
def select(
    scores: Tensor,
    num_keep: int,
    num_keep_per_row: Tensor | None,
    threshold: Tensor | None,
    top_p: Tensor | None,
    keep: Tensor | None,
    drop: Tensor | None,
    candidates: Tensor | None,
    keep_others: bool,
    segments: Tensor | None,
    num_segments: int,
    cu_seqlens: Tensor | None,
    capacity: int,
    align_right: bool,
    by_score: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``pyvtk::select``.

    Args:
        scores: [batch, tokens] or [batch, heads, tokens]: batch * heads rows; or [tokens], with
            cu_seqlens: one row per sample.
        num_keep: of each group; -1: no such criterion. num_keep_per_row int64 goes first.
        num_keep_per_row, threshold, top_p: [rows, 1] or [rows, num_segments].
        keep, drop, candidates: bool, [batch, tokens] or the shape of scores.
        segments: integer, shaped like a mask; num_segments is 1 without it.
        cu_seqlens: int32 [samples + 1]; tokens outside of every sample belong to no row.

    Returns:
        indices int64 [batch, (heads,) capacity], counts int32 [batch, (heads)], overflow bool [batch, (heads)].
    """
    device = scores.device
    if cu_seqlens is None:
        lead = tuple(scores.shape[:-1])
        num_rows = lead[0] if len(lead) == 1 else lead[0] * lead[1]
        n = scores.shape[-1]
        token = torch.arange(n, device=device).expand(num_rows, n).reshape(-1)
        row = torch.arange(num_rows, device=device)[:, None].expand(num_rows, n).reshape(-1)
    else:
        num_rows = cu_seqlens.shape[0] - 1
        lead = (num_rows,)
        token = torch.arange(scores.shape[0], device=device)
        row = torch.searchsorted(cu_seqlens[1:].long(), token, right=True)
        row = torch.where(token < cu_seqlens[0], num_rows, row)

    def flat(values: Tensor) -> Tensor:
        """A value per token of every row, from one that heads may share."""
        return (values[:, None].expand(scores.shape) if values.dim() < scores.dim() else values).reshape(-1)

    # From here on everything is [rows * tokens]. Row num_rows and group num_groups hold the tokens that belong nowhere.
    everyone = torch.ones_like(token, dtype=torch.bool)
    inside = row < num_rows
    num_groups = num_rows * num_segments
    eligible, group = everyone, row * num_segments
    if segments is not None:
        segment = flat(segments).long()
        eligible = (segment >= 0) & (segment < num_segments)
        group = group + segment
    group = torch.where(inside & eligible, group, num_groups)
    if candidates is not None:
        eligible = eligible & flat(candidates)
    allowed = inside if drop is None else inside & ~flat(drop)
    forced = ~everyone if keep is None else allowed & flat(keep)
    candidate = allowed & eligible
    competitor = candidate & ~forced
    fixed = forced | (allowed & ~eligible) if keep_others else forced
    flat_scores = scores.reshape(-1)

    # Subtracting from 0 turns descending into ascending, where sorting puts NaN last, and makes one zero of the two.
    by_rank = torch.argsort(0 - flat_scores, stable=True)
    order = by_rank[torch.argsort(group[by_rank], stable=True)]
    group_in_order = group[order]

    def total(values: Tensor, of: Tensor, num: int) -> Tensor:
        """int64 [num + 1]: sums of values over the tokens of each group or row."""
        return torch.zeros(num + 1, dtype=torch.int64, device=device).index_add(0, of, values.long())

    def before(values: Tensor) -> Tensor:
        """Sum of values over the tokens of the same group that rank before, in order."""
        in_order = values[order].long()
        sums = total(values, group, num_groups)
        return in_order.cumsum(0) - in_order - (sums.cumsum(0) - sums)[group_in_order]

    def per_group(values: Tensor) -> Tensor:
        """[num_groups + 1], the last one for tokens that belong nowhere."""
        values = values.expand(num_rows, num_segments).reshape(-1)
        return torch.cat([values, values.new_zeros(1)])

    stays = competitor[order]
    if num_keep_per_row is not None or num_keep >= 0:
        if num_keep_per_row is not None:
            quota = per_group(num_keep_per_row).clamp(min=0)
        else:
            quota = torch.full((num_groups + 1,), num_keep, device=device)
        quota = quota - total(forced, group, num_groups)
        stays = stays & (before(competitor) < quota[group_in_order])
    if threshold is not None:
        stays = stays & (flat_scores[order] >= per_group(threshold)[group_in_order])
    if top_p is not None:
        weights = _weights(flat_scores, candidate, group, num_groups + 1)
        mass = total(weights, group, num_groups)
        p = per_group(top_p)
        need = torch.where(p < 1, torch.ceil(p.clamp(min=0) * mass.double()).long(), mass)
        stays = stays & ((before(weights) < need[group_in_order]) | (before(candidate) == 0))
    stay = fixed | torch.zeros_like(everyone).scatter(0, order, stays)

    # Order of preference inside every row, and each token's place in it.
    tier = torch.where(fixed, 0, torch.where(stay, 1, 2))
    preferred = by_rank[torch.argsort((row * 3 + tier)[by_rank], stable=True)]
    row_sizes = total(everyone, row, num_rows)
    place = torch.arange(token.shape[0], device=device) - (row_sizes.cumsum(0) - row_sizes)[row[preferred]]
    place = torch.zeros_like(token).scatter(0, preferred, place)

    wanted = total(stay, row, num_rows)
    counts = wanted.clamp(max=capacity)
    kept = stay & (place < capacity)
    slot = place if by_score else kept.long().cumsum(0) - 1 - (counts.cumsum(0) - counts)[row]
    if align_right:
        slot = slot + capacity - counts[row]
    # All tokens that go are written one past the end, which is cut off.
    slot = torch.where(kept, row * capacity + slot, num_rows * capacity)
    if cu_seqlens is None:
        values = token
    else:
        values = torch.arange(scores.shape[0], device=device)
    indices = torch.full((num_rows * capacity + 1,), -1, device=device).scatter(0, slot, values)[:-1]
    return (
        indices.reshape(*lead, capacity),
        counts[:-1].to(torch.int32).reshape(lead),
        (wanted > capacity)[:-1].reshape(lead),
    )
