"""How much attention does each key receive? The definition, in plain torch.

Per sample, query head h, query i and key j (head h reads key head h // (Hq / Hkv)):

    z_hij   = scale * q_hi . k_j + k_bias_j
    seen_ij = q_mask_i and k_mask_j and (not causal or k_position_j <= q_position_i)
    lse_hi  = log sum exp z_hij  over seen keys ("visible"), or over seen keys inside key_range ("range"), or given
    v_hij   = exp(z_hij - lse_hi)      (quantity "probability"; 0 where not seen, or where lse_hi is -inf)
              z_hij                    (quantity "logit"; pairs that are not seen are left out)
    v_hij  *= head_weights_h

and, over the keys j of key_range, queries and heads are reduced in the stated order:

    over queries   sum           of seen pairs
                   mean          sum / max(1, number of queries with q_mask), whether or not they see the key
                   visible_mean  sum / max(1, number of queries that see the key)
                   max           of seen pairs; the lowest query wins a tie; 0 (logit: -inf) if there are none
    over heads     mean (divides by the number of heads), sum, max (the lowest head wins a tie), all heads or each group

A key that nobody sees scores 0, as a logit -inf. 16-bit inputs are widened to float32 first; float64 stays float64.
Packed samples are one long sample in which pairs of different samples do not see each other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def _sample_numbers(cu_seqlens: Tensor, total: int) -> Tensor:
    """Which sample each entry of a packed axis belongs to."""
    return torch.bucketize(torch.arange(total, device=cu_seqlens.device), cu_seqlens[1:].long(), right=True)


def _default_positions(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None):
    """Positions of a causal sequence whose last query stands at its last key, per sample."""
    queries, keys = q.shape[2], k.shape[2]
    at_query = torch.arange(queries, device=q.device)
    at_key = torch.arange(keys, device=q.device)
    if cu_seqlens_q is None:
        return (at_query + keys - queries)[None], at_key[None]
    starts_q, starts_k = cu_seqlens_q.long(), cu_seqlens_k.long()
    extra = starts_k.diff() - starts_q.diff()
    # No sample at all leaves nothing to look up.
    sample_q = _sample_numbers(cu_seqlens_q, queries).clamp(max=max(extra.shape[0] - 1, 0))
    sample_k = _sample_numbers(cu_seqlens_k, keys).clamp(max=max(extra.shape[0] - 1, 0))
    if extra.shape[0] == 0:
        return at_query[None], at_key[None]
    return (at_query - starts_q[sample_q] + extra[sample_q])[None], (at_key - starts_k[sample_k])[None]


def _first_max(x: Tensor, dim: int) -> Tensor:
    """Maximum whose gradient goes to the lowest index; NaN counts as the largest."""
    return x.gather(dim, x.argmax(dim, keepdim=True)).squeeze(dim)


def _reduce_heads(values: Tensor, head_reduce: str, kv_heads: int) -> Tensor:
    """[batch, heads, ...] -> [batch, out_heads, ...]."""
    if head_reduce == "none":
        return values
    out_heads = kv_heads if head_reduce.startswith("group_") else 1
    grouped = values.unflatten(1, (out_heads, values.shape[1] // out_heads))
    kind = head_reduce.removeprefix("group_")
    if kind == "max":
        return _first_max(grouped, 2)
    return grouped.sum(2) if kind == "sum" else grouped.mean(2)


class _Values(NamedTuple):
    """v_hij and what there is to know about pairs, for the keys of key_range."""

    values: Tensor  # [batch, q_heads, queries, scored keys], with head_weights
    seen: Tensor  # bool [batch, 1, queries, scored keys]
    valid: Tensor  # bool, the same: whether the query exists for the key
    lse: Tensor  # [batch, q_heads, queries]


def _values(
    q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None, q_mask: Tensor | None,
    k_mask: Tensor | None, k_bias: Tensor | None, head_weights: Tensor | None, lse: Tensor | None,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: bool, key_start: int, key_stop: int,
    range_denominator: bool, scale: float, logit: bool,
) -> _Values:  # fmt: skip
    """The map that the definition above begins with."""
    packed = cu_seqlens_q is not None
    if packed:
        # [total, heads, dim] -> [1, heads, total, dim]
        q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
        key_start, key_stop = 0, k.shape[2]
        q_positions, k_positions, q_mask, k_mask, k_bias, lse = (
            None if t is None else t[None] for t in (q_positions, k_positions, q_mask, k_mask, k_bias, lse)
        )
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(dtype), k.to(dtype)
    (batch, q_heads, queries, _), (_, kv_heads, keys, _) = q.shape, k.shape

    # What masked tokens hold must not reach anything, not even as 0 times NaN.
    if q_mask is not None:
        q = q.masked_fill(~q_mask[:, None, :, None], 0)
    if k_mask is not None:
        k = k.masked_fill(~k_mask[:, None, :, None], 0)
    z = (q.unflatten(1, (kv_heads, -1)) @ k[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
    if k_bias is not None:
        z = z + (k_bias if k_mask is None else k_bias.masked_fill(~k_mask, 0)).to(dtype)[:, None, None, :]

    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=q.device)
    same_sample = seen
    if packed:
        number_q, number_k = _sample_numbers(cu_seqlens_q, queries), _sample_numbers(cu_seqlens_k, keys)
        same_sample = (number_q[:, None] == number_k)[None, None]
        seen = seen & same_sample
    valid = same_sample if q_mask is None else same_sample & q_mask[:, None, :, None]
    if q_mask is not None:
        seen = seen & q_mask[:, None, :, None]
    if k_mask is not None:
        seen = seen & k_mask[:, None, None, :]
    if causal:
        default_q, default_k = _default_positions(q, k, cu_seqlens_q, cu_seqlens_k)
        at_query = default_q if q_positions is None else q_positions
        at_key = default_k if k_positions is None else k_positions
        seen = seen & (at_key[:, None, None, :] <= at_query[:, None, :, None])

    in_range = slice(key_start, key_stop)
    of_denominator = in_range if range_denominator else slice(None)
    z_seen = z.masked_fill(~seen, -torch.inf)
    if lse is None:
        inside = z_seen[..., of_denominator]
        if inside.shape[-1]:
            largest = inside.detach().amax(-1, keepdim=True)
            shift = largest.masked_fill(largest == -torch.inf, 0)
            total = (inside - shift).exp().sum(-1)
            blind = total == 0
            lse = torch.where(blind, -torch.inf, shift.squeeze(-1) + total.masked_fill(blind, 1).log())
        else:
            lse = z.new_full((batch, q_heads, queries), -torch.inf)
    if q_mask is not None:
        lse = lse.masked_fill(~q_mask[:, None, :], -torch.inf)

    seen, z, z_seen = seen[..., in_range], z[..., in_range], z_seen[..., in_range]
    valid = valid.expand(*valid.shape[:-1], keys)[..., in_range]
    if logit:
        values = z.masked_fill(~seen, 0)
    else:
        dead = (lse == -torch.inf)[..., None]
        values = (z_seen - lse[..., None].masked_fill(dead, 0)).exp().masked_fill(dead | ~seen, 0)
    if head_weights is not None:
        values = values * head_weights.to(dtype).reshape(-1, q_heads, 1, 1)
    return _Values(values, seen, valid, lse)


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    q_positions: Tensor | None,
    k_positions: Tensor | None,
    q_mask: Tensor | None,
    k_mask: Tensor | None,
    k_bias: Tensor | None,
    head_weights: Tensor | None,
    lse: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    key_start: int,
    key_stop: int,
    range_denominator: bool,
    scale: float,
    query_reduce: tuple[str, ...],
    head_reduce: str,
    heads_first: bool,
    logit: bool,
) -> tuple[Tensor, Tensor]:
    """The definition above; arguments as the operator of pyvtk/ops/score.py takes them.

    Returns:
        scores [reductions, batch, out_heads, scored keys] and lse [batch, q_heads, queries]; batch is 1 if packed.
    """
    values, seen, valid, lse = _values(
        q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse, cu_seqlens_q, cu_seqlens_k, causal,
        key_start, key_stop, range_denominator, scale, logit,
    )  # fmt: skip
    kv_heads, queries = k.shape[1], values.shape[2]
    if heads_first:
        values = _reduce_heads(values, head_reduce, kv_heads)

    nobody = ~seen.any(2)
    results = []
    for reduce in query_reduce:
        if reduce == "max":
            if queries == 0:
                result = values.sum(2)
            else:
                result = _first_max(values.masked_fill(~seen, -torch.inf), 2).masked_fill(nobody, 0)
        else:
            result = values.sum(2)
            if reduce == "mean":
                result = result / valid.sum(2).clamp(min=1)
            elif reduce == "visible_mean":
                result = result / seen.sum(2).clamp(min=1)
        if not heads_first:
            result = _reduce_heads(result, head_reduce, kv_heads)
        results.append(result.masked_fill(nobody, -torch.inf) if logit else result)
    return torch.stack(results), lse


def weighed_sum(
    grad_linear: Tensor, grad_max: Tensor | None, max_query: Tensor | None, grad_lse: Tensor | None, lse: Tensor | None,
    q: Tensor, k: Tensor, q_positions: Tensor | None, k_positions: Tensor | None, q_mask: Tensor | None,
    k_mask: Tensor | None, k_bias: Tensor | None, head_weights: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, causal: bool, key_start: int, key_stop: int, range_denominator: bool, lse_given: bool,
    scale: float, logit: bool, pair_max_heads: int,
) -> Tensor:  # fmt: skip
    """What ``attention_scores_backward`` gives the gradients of: the sum over pairs of grad_linear_hj v_hij, and of
    grad_max_hj v_hij for i = max_query_hj, and of grad_lse_hi lse_hi.

    pair_max_heads: key heads that share a maximum for every pair, whose lowest winner alone gets grad_linear; 0: all.
    lse: if it was given. head_weights: [samples, q_heads], also of packed samples. max_query counts within the sample.
    """
    packed = cu_seqlens_q is not None
    values, seen, _, lse = _values(
        q, k, q_positions, k_positions, q_mask, k_mask, k_bias, None, lse, cu_seqlens_q, cu_seqlens_k,
        causal, key_start, key_stop, range_denominator, scale, logit,
    )  # fmt: skip
    number = torch.arange(values.shape[2], device=q.device)
    if packed:
        sample = _sample_numbers(cu_seqlens_q, values.shape[2]).clamp(max=max(cu_seqlens_q.shape[0] - 2, 0))
        number = number - cu_seqlens_q.long()[sample]
    if head_weights is not None:
        of_rows = head_weights[sample].T[None] if packed else head_weights[..., None]
        values = values * of_rows[..., None].to(values.dtype)
    takes = grad_linear[:, :, None]
    if pair_max_heads:
        groups = values.detach().masked_fill(~seen, -torch.inf).unflatten(1, (k.shape[1] // pair_max_heads, -1))
        head = torch.arange(groups.shape[2], device=q.device)[:, None, None]
        takes = takes * (groups.argmax(2, keepdim=True) == head).flatten(1, 2)
    if grad_max is not None:
        takes = takes + torch.where(max_query[:, :, None] == number[:, None], grad_max[:, :, None], 0)
    total = (takes * values).sum()
    if grad_lse is not None and not lse_given:
        blind = lse == -torch.inf
        total = total + (grad_lse * lse.masked_fill(blind, 0)).masked_fill(blind, 0).sum()
    return total
