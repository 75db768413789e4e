"""Neighbour-aware attention in plain torch, over the dense map.

Facts of tokens (int32 [batch, 8, tokens]: row, image, t, y, x, position, region, sample) and ``rule`` are those of
:mod:`pyvtk.plans`. 16-bit inputs are computed in float32 and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk.reference._exact import exact


def visible(queries: Tensor, keys: Tensor, rule: list[int], routes: Tensor) -> Tensor:
    """bool [batch, queries, keys]: which keys each query sees.

    Two tokens of one sample see each other: if either is text, by position; in one image, inside the box of ``radius``
    (and the routes between regions, and by position in a causal window); in different images, by position if
    ``cross_image``. Invalid tokens (image -2) neither see nor are seen.
    """
    _, _, *radius, causal_window, cross_image = rule
    _, image, t, y, x, position, region, sample = (fact[:, :, None] for fact in queries.unbind(1))
    _, k_image, k_t, k_y, k_x, k_position, k_region, k_sample = (fact[:, None] for fact in keys.unbind(1))
    earlier = k_position <= position
    near = (t - k_t).abs() <= radius[0]
    near = near & ((y - k_y).abs() <= radius[1]) & ((x - k_x).abs() <= radius[2])
    if routes.numel():
        batch = torch.arange(queries.shape[0], device=queries.device)[:, None, None]
        near = near & (routes[batch, region.long(), k_region.long()] != 0)
    if causal_window:
        near = near & earlier
    other = earlier if cross_image else torch.zeros_like(earlier)
    both = (image >= 0) & (k_image >= 0)
    seen = torch.where(both, torch.where(image == k_image, near, other), earlier)
    return seen & (image > -2) & (k_image > -2) & (sample == k_sample)


def in_rows(slots: Tensor, rows: int) -> Tensor:
    """Facts of slots in the order of rows [batch, 8, rows]; empty slots (row -1) are dropped."""
    where = torch.where(slots[:, 0] < 0, rows, slots[:, 0]).long()[:, None].expand(slots.shape)
    return slots.new_zeros((*slots.shape[:2], rows + 1)).scatter(2, where, slots)[..., :rows]


def over_map(
    q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor | None, seen: Tensor, visual: Tensor | None, off: Tensor | None,
    scale: float, keep_mass: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention (out, lse) over a map of what is seen.

    Args:
        seen: bool [batch, 1 or heads, queries, keys]; less what k_bias, [batch, keys], hides by -inf.
        visual: bool [batch, keys], the keys that heads which are ``off`` (bool [heads]; None: none is) give no weight:
            after the softmax (keep_mass), or before it.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads if kv_heads else 1
    if k_bias is not None:
        seen = seen & (k_bias != float("-inf"))[:, None, None]
    weighed = None
    if off is not None:
        weighed = ~(off[None, :, None, None] & visual[:, None, None])  # [batch, heads, 1, keys]
        if not keep_mass:
            seen, weighed = seen & weighed, None
    # What nobody sees may hold NaN, which a product with 0 would spread.
    unseen = ~seen.any(2)
    rows = unseen if unseen.shape[1] == 1 else unseen.unflatten(1, (kv_heads, group)).all(2)
    k, v = (x.to(wide).masked_fill(rows[..., None], 0) for x in (k, v))
    blind = ~seen.any(3)
    q = q.to(wide).masked_fill(blind[..., None], 0).reshape(batch, kv_heads, group, queries, dim)
    logits = (torch.einsum("bgmid,bgjd->bgmij", q, k) * scale).reshape(batch, heads, queries, keys)
    if k_bias is not None:
        logits = logits + k_bias.to(wide).masked_fill(unseen.all(1), 0)[:, None, None]
    lse = logits.masked_fill(~seen, float("-inf")).logsumexp(3)
    # blind rows: exp(-inf - 0) = 0, and no NaN on the way back
    weights = logits - lse.masked_fill(blind, 0)[..., None]
    weights = weights.masked_fill(~seen, float("-inf")).exp()
    if weighed is not None:
        weights = weights.masked_fill(~weighed, 0)
    out = torch.einsum("bgmij,bgjd->bgmid", weights.reshape(batch, kv_heads, group, queries, keys), v)
    # also stops whatever gradient arrives at blind rows
    return out.reshape(batch, heads, queries, dim).masked_fill(blind[..., None], 0), lse


@exact
def neighbor_attention(
    q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor | None, visual_heads: Tensor | None, plan: list[Tensor],
    rule: list[int], scale: float, keep_mass: bool, zero_rows: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out_i = sum_j p_ij v_j with p_ij = exp(z_ij - lse_i), lse_i = log sum_j exp z_ij over the visible keys j, and
    z_ij = scale q_i . k_j + k_bias_j. Nobody sees a key with bias -inf. Queries that see nothing: out 0, lse -inf.

    Heads that are off in ``visual_heads`` give visual keys no weight: after the softmax (keep_mass), or before it. With
    zero_rows, visual queries of these heads see nothing.
    """
    query_slots, key_slots, routes = plan[0], plan[1], plan[-1]
    queries, keys = q.shape[2], k.shape[2]
    query_facts, key_facts = in_rows(query_slots, queries), in_rows(key_slots, keys)
    seen = visible(query_facts, key_facts, rule, routes)[:, None]  # [batch, 1, queries, keys]
    off = None if visual_heads is None else ~visual_heads
    if off is not None and zero_rows:
        seen = seen & ~(off[None, :, None, None] & (query_facts[:, 1] >= 0)[:, None, :, None])
    return over_map(q, k, v, k_bias, seen, key_facts[:, 1] >= 0, off, scale, keep_mass)


def weighed_attention(
    grad_out: Tensor | None, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor | None,
    visual_heads: Tensor | None, out: Tensor, lse: Tensor, plan: list[Tensor], rule: list[int], scale: float,
    keep_mass: bool, zero_rows: bool,
) -> Tensor:  # fmt: skip
    """sum of grad_out * out and grad_lse * lse, over queries that see something: what ``neighbor_attention_backward``
    gives the gradients of."""
    out, lse = neighbor_attention(q, k, v, k_bias, visual_heads, plan, rule, scale, keep_mass, zero_rows)
    total = out.new_zeros(())
    if grad_out is not None:
        total = total + (grad_out * out).sum()
    if grad_lse is not None:
        blind = lse == float("-inf")
        total = total + (grad_lse.masked_fill(blind, 0) * lse.masked_fill(blind, 0)).sum()
    return total


@exact
def group_weights(
    lses: list[Tensor], coefficients: list[Tensor] | None, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of groups [groups, ..., queries], which of them saw a key, and lse over all groups [..., queries]."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in [*lses, *(coefficients or [])]) else torch.float32
    groups = torch.stack([lse.to(wide) for lse in lses])
    seen = groups > float("-inf")
    blind = ~seen.any(0)
    # Where all are -inf, the gradient of logsumexp would be NaN.
    lse = groups.masked_fill(blind, 0).logsumexp(0).masked_fill(blind, float("-inf"))
    if coefficients is None:
        weights = (groups - lse.masked_fill(blind, 0)).exp()
    else:
        weights = torch.stack([c.to(wide) for c in coefficients])
    weights = weights.masked_fill(~seen, 0)
    if renormalize:
        total = weights.sum(0)
        # ~seen again: what nobody saw may be NaN, and its gradient must not reach the total
        weights = (weights / total.masked_fill(total == 0, 1)).masked_fill((total == 0) | ~seen, 0)
    return weights, seen, lse


@exact
def weigh_groups(outs: list[Tensor], weights: Tensor, seen: Tensor) -> Tensor:
    """sum_g weights_g out_g over groups that saw a key; outs [batch, heads, queries, channels], weights and seen
    [groups, batch, heads, queries]. A weight of 0 hides what is not finite. 16-bit outs are added in float32."""
    wide = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    hidden = [~s[..., None] | ((w == 0)[..., None] & ~out.isfinite()) for w, s, out in zip(weights, seen, outs)]
    parts = [out.to(wide).masked_fill(h, 0) for h, out in zip(hidden, outs)]
    return sum(w.to(wide)[..., None] * part for w, part in zip(weights, parts)).to(outs[0].dtype)


def weighed_groups(grad: Tensor, outs: list[Tensor], weights: Tensor) -> Tensor:
    """sum of grad * weigh_groups(outs, weights): what ``weigh_groups_backward`` gives the gradients of."""
    return (weigh_groups(outs, weights, torch.ones_like(weights, dtype=torch.bool)) * grad).sum()
