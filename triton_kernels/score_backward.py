"""Triton kernels of attention_scores' gradient; the forward's page, score.py, explains the walks.

query_grad   some queries of one head walk the keys twice: first for the sum of p * c, c the gradient of a value, which
             is what the denominator takes back, and for the sum of p: it is 1 up to the rounding of lse, which every
             p would carry; then for the gradient of the queries
key_grad     some keys of one key/value head walk the queries that may see them, for all heads of the group

Gradients of logits are dz = p * (weight * c + shift), p divided by their sum, with shift = grad_lse - weight *
sum(p * c), or 0 where lse was given and takes -weight * sum(p * c) itself. Logits that are scored themselves get
dz = weight * c + p * grad_lse.

Where heads were reduced by a maximum for every pair, c goes to the head that won the pair. No map of winners is kept:
each tile of each head forms the values of all heads of the maximum again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._tiles import FIRST, LOG2_E, accumulate, in_units, load_rows, products, store_rows
from .score_walk import (
    NUMBERS,
    Walk,
    key_tile,
    keys_of,
    padded,
    pair_values,
    positions_at,
    queries_of,
    row_tile,
    sample_at,
    to_ordered,
    work_of,
)


@triton.jit
def _winning_heads(
    q, k, bounds, k_bias, head_weights, entry, first_head, pair_heads, number, key, here, visible, first_q, first_k,
    queries, keys, q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
    GROUP: tl.constexpr, LOGIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The head among ``pair_heads`` from ``first_head`` on with the largest value, for every pair [keys, queries]."""
    largest = tl.full([key.shape[0], number.shape[0]], FIRST, tl.int32)
    who = tl.zeros([key.shape[0], number.shape[0]], tl.int32)
    for member in tl.range(0, pair_heads):
        head = first_head + member
        value = pair_values(
            q, k, bounds, k_bias, head_weights, entry, head, number, key, here, visible, first_q, first_k, queries,
            keys, q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
            GROUP, LOGIT, True, D, D1, D2, PRECISION,
        )  # fmt: skip
        value = to_ordered(value)
        who = tl.where(value > largest, head, who)
        largest = tl.maximum(largest, value)
    return who


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_query_grad_kernel(
    q, k, bounds, q_mask, k_mask, q_positions, k_positions, k_bias, head_weights,
    linear, grad_max, max_query, grad_lse,  # [B, Hq, columns], the next two or None, [B, Hq, M] or None
    grad_q, dots, shifts, factors, unit,  # [B, Hq, M, D] by strides, [B, Hq, M] thrice, a number or None
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, grad_batch, grad_head, grad_row, weights_batch, batch, queries,
    keys, heads, start, window, score_start, columns, total, scale, pair_heads,
    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, LSE_GIVEN: tl.constexpr,
    PAIRS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q = scale * dz k; dots = sums of value * c before the head's weight. ``scale`` is natural."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    grad_batch, grad_head, grad_row = in_units(grad_batch, grad_head, grad_row, UNIT)
    program = tl.program_id(0)
    head = program % heads
    sample, tile = work_of(program // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    if table is not None:
        window = count
        columns_here = count
    else:
        tile = tl.cdiv(queries, ROWS) - 1 - tile
        columns_here = columns
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    row_place = entry * queries + first_q
    row, exists, valid, row_at = row_tile(tile, q_mask, q_positions, row_place, rows, count - rows, ROWS)
    _, end = keys_of(
        tile, valid, row_at, rows, start, window, count - rows, extents, extent_first, sample, total,
        CAUSAL, POSITIONS, ROWS, KEYS,
    )  # fmt: skip
    place = (entry * heads + head) * queries + first_q + row
    live = valid
    if bounds is not None:
        bound_place = (entry * heads + head) * padded(queries) + first_q + row
        bound = tl.load(bounds + bound_place, mask=valid, other=float("inf"))
        if not LOGIT:
            live = live & (bound != float("inf"))
    from_lse = tl.zeros([ROWS], tl.float32)
    if grad_lse is not None:
        from_lse = tl.load(grad_lse + place, mask=live & (bound != float("inf")), other=0.0)
    weight = 1.0
    if head_weights is not None:
        weight = tl.load(head_weights + entry * weights_batch + head)
    head_q = q + entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
    q1, q2 = load_rows(head_q, row.to(tl.int64) * q_row, live, D, D1, D2)
    head_k = k + entry * k_batch + (head // GROUP).to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    key_place = entry * keys + first_k
    score_place = (entry * heads + head) * columns + first_k - score_start
    column = tl.arange(0, KEYS)

    NORMALISED: tl.constexpr = not LSE_GIVEN and (not LOGIT or grad_lse is not None)
    dot = tl.zeros([ROWS], tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    factor = tl.full([ROWS], 1.0, tl.float32)
    shift = from_lse
    sums1 = tl.zeros([ROWS, D1], tl.float32)
    sums2 = tl.zeros([ROWS, D2 if D2 else 16], tl.float32)
    for WALK in tl.static_range(2):
        # dots of logits are for the gradient of the weights only
        if WALK or not LOGIT or head_weights is not None or NORMALISED:
            for step in tl.range(0, end):
                key = start + step * KEYS + column
                here = key < start + window
                if k_mask is not None:
                    here = here & (tl.load(k_mask + key_place + key, mask=here, other=0) != 0)
                seen = here[None, :] & live[:, None]
                if CAUSAL:
                    key_at = positions_at(k_positions, key_place, key, here, 0)
                    seen = seen & (key_at[None, :] <= row_at[:, None])
                k1, k2 = load_rows(head_k, key.to(tl.int64) * k_row, here, D, D1, D2)
                logits = products(q1, q2, k1, k2, D2, PRECISION) * scale
                if k_bias is not None:
                    logits += tl.load(k_bias + key_place + key, mask=here, other=0.0)[None, :]
                scored = here & (key >= score_start) & (key < score_start + columns_here)
                c = tl.load(linear + score_place + key, mask=scored, other=0.0)[None, :] + tl.zeros_like(logits)
                if PAIRS:
                    who = _winning_heads(
                        q, k, bounds, k_bias, head_weights, entry, head // pair_heads * pair_heads, pair_heads, row,
                        key, valid, here, first_q, first_k, queries, keys, heads, q_batch, q_head, q_row, k_batch,
                        k_head, k_row, weights_batch, scale, GROUP, LOGIT, D, D1, D2, PRECISION,
                    )  # fmt: skip
                    c = tl.where(tl.trans(who) == head, c, 0.0)
                if grad_max is not None:
                    won = tl.load(max_query + score_place + key, mask=scored, other=-1)[None, :] == row[:, None]
                    c += tl.where(won, tl.load(grad_max + score_place + key, mask=scored, other=0.0)[None, :], 0.0)
                if not LOGIT or grad_lse is not None:
                    p = tl.exp2((logits - bound[:, None]) * LOG2_E)
                if WALK == 0:
                    dot += tl.sum(tl.where(seen, (logits if LOGIT else p) * c, 0.0), 1)
                    if NORMALISED:
                        mass += tl.sum(tl.where(seen, p, 0.0), 1)
                else:
                    if LOGIT:
                        grad = c * weight
                        if grad_lse is not None:
                            grad += p * shift[:, None]
                    else:
                        grad = p * (c * (weight * factor)[:, None] + shift[:, None])
                    grad = tl.where(seen, grad, 0.0).to(k1.dtype)
                    sums1 = accumulate(grad, k1, sums1, PRECISION)
                    if D2:
                        sums2 = accumulate(grad, k2, sums2, PRECISION)
        if WALK == 0 and NORMALISED:
            factor = tl.where(mass == 0, 0.0, 1 / mass)
            if not LOGIT:
                dot *= factor
                shift -= weight * dot
            shift *= factor
    whole = scale
    if unit is not None:
        whole = scale / tl.load(unit)
    to = grad_q + entry * grad_batch + head.to(tl.int64) * grad_head + first_q.to(tl.int64) * grad_row
    store_rows(to, row.to(tl.int64) * grad_row, exists, sums1 * whole, sums2 * whole, D, D1, D2)
    tl.store(dots + place, dot, mask=exists)
    tl.store(shifts + place, shift, mask=exists)
    tl.store(factors + place, factor, mask=exists)


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_key_grad_kernel(
    q, k, bounds, q_mask, k_mask, q_positions, k_positions, k_bias, head_weights,
    linear, grad_max, max_query, shifts, factors,
    grad_k, grad_bias, unit,  # [B, Hkv, N, D] by strides, [B, Hkv, N] or None, a number or None
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, grad_batch, grad_head, grad_row, weights_batch, batch, queries,
    keys, heads, start, window, score_start, columns, total, scale, pair_heads,
    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, GRAD_LSE: tl.constexpr,
    PAIRS: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k = scale * dz^T q, grad_bias = the sums of dz, one per key/value head; tiles stand as [keys, queries]."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    grad_batch, grad_head, grad_row = in_units(grad_batch, grad_head, grad_row, UNIT)
    program = tl.program_id(0)
    kv_head = program % heads
    sample, tile = work_of(program // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    if table is not None:
        window = count
        columns_here = count
    else:
        columns_here = columns
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    key_place = entry * keys + first_k
    _, key, exists, visible, key_at = key_tile(tile, k_mask, k_positions, key_place, start, window, KEYS)
    extra = count - rows
    begin, _, end = queries_of(
        tile, visible, key_at, start, window, rows, extra, queries, extents, extent_first, sample, total,
        CAUSAL, POSITIONS, ROWS, KEYS,
    )  # fmt: skip
    head_k = k + entry * k_batch + kv_head.to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    k1, k2 = load_rows(head_k, key.to(tl.int64) * k_row, visible, D, D1, D2)
    if k_bias is not None:
        bias = tl.load(k_bias + key_place + key, mask=visible, other=0.0)
        bias_sum = tl.zeros([KEYS], tl.float32)
    scored = visible & (key >= score_start) & (key < score_start + columns_here)
    sums1 = tl.zeros([KEYS, D1], tl.float32)
    sums2 = tl.zeros([KEYS, D2 if D2 else 16], tl.float32)
    row_place = entry * queries + first_q
    line = padded(queries)
    bounded = line if table is None else rows  # behind a packed sample come the rows of the next
    q_heads = heads * GROUP
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        head_q = q + entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
        score_place = (entry * q_heads + head) * columns + first_k - score_start
        from_linear = tl.load(linear + score_place + key, mask=scored, other=0.0)
        if grad_max is not None:
            winner = tl.load(max_query + score_place + key, mask=scored, other=-1)
            from_max = tl.load(grad_max + score_place + key, mask=scored, other=0.0)
        weight = 1.0
        if head_weights is not None:
            weight = tl.load(head_weights + entry * weights_batch + head)
        for step in tl.range(begin, end):
            row = step * ROWS + tl.arange(0, ROWS)
            valid = row < rows
            if q_mask is not None:
                valid = valid & (tl.load(q_mask + row_place + row, mask=valid, other=0) != 0)
            place = (entry * q_heads + head) * queries + first_q + row
            live = valid
            if bounds is not None:
                bound_place = (entry * q_heads + head) * line + first_q + row
                bound = tl.load(bounds + bound_place, mask=row < bounded, other=float("inf"))
                if not LOGIT:
                    live = bound != float("inf")
                    if q_mask is not None:
                        live = live & valid
            seen = visible[:, None] & live[None, :]
            if CAUSAL:
                row_at = positions_at(q_positions, row_place, row, valid, extra)
                seen = seen & (key_at[:, None] <= row_at[None, :])
            q1, q2 = load_rows(head_q, row.to(tl.int64) * q_row, live, D, D1, D2)
            logits = products(k1, k2, q1, q2, D2, PRECISION) * scale
            if k_bias is not None:
                logits += bias[:, None]
            c = from_linear[:, None] + tl.zeros_like(logits)
            if PAIRS:
                who = _winning_heads(
                    q, k, bounds, k_bias, head_weights, entry, head // pair_heads * pair_heads, pair_heads, row, key,
                    valid, visible, first_q, first_k, queries, keys, q_heads, q_batch, q_head, q_row, k_batch, k_head,
                    k_row, weights_batch, scale, GROUP, LOGIT, D, D1, D2, PRECISION,
                )  # fmt: skip
                c = tl.where(who == head, c, 0.0)
            if grad_max is not None:
                c += tl.where(winner[:, None] == row[None, :], from_max[:, None], 0.0)
            grad = c * weight
            if not LOGIT or GRAD_LSE:
                shift = tl.load(shifts + place, mask=live, other=0.0)
                p = tl.exp2((logits - bound[None, :]) * LOG2_E)
                if LOGIT:
                    grad += p * shift[None, :]
                else:
                    factor = tl.load(factors + place, mask=live, other=0.0)
                    grad = p * (grad * factor[None, :] + shift[None, :])
            grad = tl.where(seen, grad, 0.0)
            if k_bias is not None:
                bias_sum += tl.sum(grad, 1)
            grad = grad.to(q1.dtype)
            sums1 = accumulate(grad, q1, sums1, PRECISION)
            if D2:
                sums2 = accumulate(grad, q2, sums2, PRECISION)
    whole = 1.0
    if unit is not None:
        whole = 1.0 / tl.load(unit)
    to = grad_k + entry * grad_batch + kv_head.to(tl.int64) * grad_head + first_k.to(tl.int64) * grad_row
    sums1, sums2 = sums1 * (scale * whole), sums2 * (scale * whole)
    store_rows(to, key.to(tl.int64) * grad_row, exists, sums1, sums2, D, D1, D2)
    if k_bias is not None:
        tl.store(grad_bias + (entry * heads + kv_head) * keys + first_k + key, bias_sum * whole, mask=exists)


def _unit(*grads: Tensor | None) -> Tensor:
    """A power of two that brings gradients near 2**10: float16 ends at 6e-8, which means over queries soon reach."""
    largest = torch.stack([x.abs().amax() for x in grads if x is not None and x.numel()] or [grads[0].new_ones(())])
    largest = largest.amax()
    usual = (largest > 0) & largest.isfinite()
    return torch.where(usual, torch.exp2(10 - torch.where(usual, largest, 1).log2().ceil()), 1.0)


def attention_scores_backward(
    grad_linear, grad_max, max_query, grad_lse, lse, q, k, q_positions, k_positions, q_mask, k_mask, k_bias,
    head_weights, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, lse_given, scale, logit,
    pair_max_heads,
):  # fmt: skip
    """Arguments as the operator has them."""
    walk = Walk(
        q, k, q_positions, k_positions, q_mask, k_mask, k_bias, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop
    )
    # keys that take part: those of the denominator, or where that is of no interest, those that are scored
    narrow = range_denominator or (lse_given and not logit) or (logit and lse.numel() == 0)
    start, window = (walk.start, walk.columns) if narrow else (0, walk.keys)
    whole = window == walk.keys and not walk.packed
    grad_q = q.new_empty(q.shape, dtype=torch.float32) if not walk.packed else q.new_zeros(q.shape, dtype=torch.float32)
    make = q.new_empty if whole else q.new_zeros
    grad_k = make(k.shape, dtype=torch.float32)
    bias_parts = None if k_bias is None else make((walk.batch, walk.kv_heads, walk.keys), dtype=torch.float32)
    to_q, to_k = grad_q, grad_k
    if walk.packed:
        to_q, to_k = grad_q.transpose(0, 1)[None], grad_k.transpose(0, 1)[None]
    rows = (walk.batch, walk.q_heads, walk.queries)
    dots, shifts, factors = (walk.new(*rows) for _ in range(3))
    if lse_given:
        grad_lse = None
    unit = None
    with torch.cuda.device_of(q):
        if q.dtype == torch.float16:
            unit = _unit(grad_linear, grad_max, grad_lse)
            grad_linear, grad_max, grad_lse = (
                None if x is None else x * unit for x in (grad_linear, grad_max, grad_lse)
            )
        bounds = None
        if lse.numel() or not logit:
            bounds = torch.where(lse == float("-inf"), float("inf"), lse)
            bounds = torch.nn.functional.pad(bounds, (0, -walk.queries % 16), value=float("inf"))
        shared = {
            "bounds": bounds, "head_weights": head_weights, "linear": grad_linear,
            "grad_max": grad_max, "max_query": max_query, "shifts": shifts, "factors": factors,
            "unit": unit,
            "weights_batch": walk.q_heads if head_weights is not None and head_weights.dim() == 2 else 0,
            "start": start, "window": window, "score_start": walk.start, "columns": walk.columns, "scale": scale,
            "pair_heads": pair_max_heads * walk.group, "LOGIT": logit, "PAIRS": pair_max_heads > 0,
        }  # fmt: skip
        tile = walk.tiles("query_grad", grad_max is not None)
        table, _, total = walk.table(True, walk.queries, tile["ROWS"])
        arguments = {
            **walk.common(grad=to_q), **shared, "grad_lse": grad_lse, "grad_q": to_q, "dots": dots, "table": table,
            "heads": walk.q_heads, **walk.extents(False, start, window, tile["KEYS"]), "LSE_GIVEN": lse_given, **tile,
        }  # fmt: skip
        _tiles.launch(attention_scores_query_grad_kernel, total * walk.q_heads, arguments)
        tile = walk.tiles("key_grad", grad_max is not None)
        table, _, total = walk.table(False, window, tile["KEYS"])
        arguments = {
            **walk.common(grad=to_k), **shared, "grad_k": to_k, "grad_bias": bias_parts, "table": table,
            "heads": walk.kv_heads, **walk.extents(True, 0, walk.queries, tile["ROWS"]),
            "GRAD_LSE": grad_lse is not None, **tile,
        }  # fmt: skip
        _tiles.launch(attention_scores_key_grad_kernel, total * walk.kv_heads, arguments)
    if unit is not None:
        dots = dots / unit
    weights = dots.sum(2)
    if walk.packed:  # one set of weights for all samples
        weights = torch.nn.functional.pad(weights, (0, 0, 0, walk.samples - 1))
    taken = -dots if head_weights is None else -dots * head_weights.view(-1, walk.q_heads, 1)
    return (
        grad_q, grad_k, dots.new_empty(0) if bias_parts is None else bias_parts.sum(1).flatten(),
        taken.flatten() if lse_given else dots.new_empty(0), weights,
    )  # fmt: skip
