"""Triton kernels of attention_scores, forward. Meaning: pyvtk/reference/score.py; gradients: score_backward.py.

Four launches, of which a given lse saves the first:

lse       some queries of one head walk the keys: maximum and sum of an online softmax, in base 2
bounds    one number per row, what exp2 subtracts: lse in base 2, and +inf where a row gives nothing
scores    some keys of one key/value head walk the queries that may see them, for each head of the group: column sums
finish    column sums of all runs and heads become scores: divisors, reductions over heads, winners

A tile of logits stands as [keys, queries], so that the keys, which stay, are the first operand of the products, kept in
registers where tensor cores want them there, and a column is summed inside threads first. Most tiles need no mask:
hidden keys are left out at the end, rows that do not exist have +inf as their bound; only the tiles on the diagonal go
through a loop of their own, which compares. Every sum has one owner and a fixed order: no atomics, same bits each time.
A maximum over heads for every pair of query and key has a kernel of its own (``pairs``) in place of ``scores``.

Packed samples are rows of one long sample: a table says which sample and which tile of it a program takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pyvtk.triton_kernels import attention
from pyvtk.triton_kernels.attention import LOG2_E, SMALLEST, _load, _products, parts
from torch import Tensor

_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)
_LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
_FIRST: tl.constexpr = tl.constexpr(-(2**31))
_LAST: tl.constexpr = tl.constexpr(2**31 - 1)

QUERY_REDUCES = ("mean", "sum", "max", "visible_mean")
_MEAN: tl.constexpr = tl.constexpr(0)
_MAX: tl.constexpr = tl.constexpr(2)
_VISIBLE_MEAN: tl.constexpr = tl.constexpr(3)
# how heads become one
SUM_HEADS, MEAN_HEADS, MAX_HEADS = 0, 1, 2
_MEAN_HEADS: tl.constexpr = tl.constexpr(MEAN_HEADS)
_MAX_HEADS: tl.constexpr = tl.constexpr(MAX_HEADS)


# Parts of kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _place(program, table, batch):
    """The sample that a program takes, and the number of its tile there; sample -1: there is none."""
    if table is None:
        return program % batch, program // batch
    else:
        return tl.load(table + 2 * program), tl.load(table + 2 * program + 1)


@triton.jit
def _sample(sample, cu_q, cu_k, queries, keys):
    """A sample's entry in batched tensors, its first query, its queries, its first key, its keys.

    A packed sample is a part of entry 0; offsets that do not ascend never lead out of the tensors.
    """
    if cu_q is None:
        zero = tl.zeros([], tl.int32)  # sizes may be constants here
        return sample.to(tl.int64), zero, zero + queries, zero, zero + keys
    else:
        first_q = tl.minimum(tl.maximum(tl.load(cu_q + sample), 0), queries)
        first_k = tl.minimum(tl.maximum(tl.load(cu_k + sample), 0), keys)
        last_q = tl.minimum(tl.maximum(tl.load(cu_q + sample + 1), first_q), queries)
        last_k = tl.minimum(tl.maximum(tl.load(cu_k + sample + 1), first_k), keys)
        return tl.zeros([], tl.int64), first_q, last_q - first_q, first_k, last_k - first_k


@triton.jit
def _positions(positions, place, number, here, extra):
    """Where tokens stand in the sequence: as given, else ``number + extra``."""
    if positions is None:
        return number + extra
    else:
        return tl.load(positions + place + number, mask=here, other=0)


@triton.jit
def _extent_base(extent_first, sample, tiles):
    """Where the extents of a sample's tiles begin."""
    if extent_first is None:
        return sample * tiles
    else:
        return tl.load(extent_first + sample)


@triton.jit
def _queries_of(key_low, key_high, first_key, last_key, rows, extra, extents, base, total,
                CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Tiles of queries that may see some of the keys: from ``begin``; from ``full`` on, all see all; the end."""
    end = tl.cdiv(rows, ROWS)
    begin, full = end * 0, end * 0
    if CAUSAL:
        if POSITIONS:
            begin = end
            for some in range(0, end, 128):
                number = some + tl.arange(0, 128)
                inside = (number < end) & (base + number < total)
                low = tl.load(extents + base + number, mask=inside, other=_LAST)
                high = tl.load(extents + total + base + number, mask=inside, other=_FIRST)
                begin = tl.minimum(begin, tl.min(tl.where(inside & (high >= key_low), number, end)))
                full = tl.maximum(full, tl.max(tl.where(inside & (low < key_high), number + 1, 0)))
        else:
            begin = tl.minimum(tl.maximum(first_key - extra, 0) // ROWS, end)
            full = tl.minimum(tl.cdiv(tl.maximum(last_key - extra, 0), ROWS), end)
    return begin, tl.maximum(begin, full), end


@triton.jit
def _keys_of(low, high, first_row, last_row, start, window, extra, extents, base, total,
             CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """Tiles of keys, from key ``start`` on, that some queries may see: before ``full`` all see all; the end."""
    end = tl.cdiv(window, KEYS)
    full = window // KEYS
    if CAUSAL:
        if POSITIONS:
            tiles, end = end, end * 0
            for some in range(0, tiles, 128):
                number = some + tl.arange(0, 128)
                inside = (number < tiles) & (base + number < total)
                key_low = tl.load(extents + base + number, mask=inside, other=_LAST)
                key_high = tl.load(extents + total + base + number, mask=inside, other=_FIRST)
                full = tl.minimum(full, tl.min(tl.where(inside & (key_high > low), number, tiles)))
                end = tl.maximum(end, tl.max(tl.where(inside & (key_low <= high), number + 1, 0)))
        else:
            full = tl.minimum(full, tl.maximum(first_row + extra + 1 - start, 0) // KEYS)
            end = tl.minimum(end, tl.cdiv(tl.maximum(last_row + extra + 1 - start, 0), KEYS))
    return tl.minimum(full, end), end


@triton.jit
def _ordered(value):
    """int32 in the order of floats: equal zeros, NaN largest; the least int32 stays free for "none"."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _value(ordered):
    """The float that :func:`_ordered` was given."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# Denominator ---------------------------------------------------------------------------------------------------------


@triton.jit
def attention_scores_extents_kernel(
    positions, mask, table, cu_q, cu_k, extents,  # [batch, tokens] or None twice, ..., [2, tiles]
    batch, queries, keys, start, window, total, OF_QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smallest and largest position of each tile's tokens, those that do not exist left out."""
    program = tl.program_id(0)
    sample, tile = _place(program, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = _sample(sample, cu_q, cu_k, queries, keys)
    number = tile * TILE + tl.arange(0, TILE)
    if OF_QUERIES:
        here = number < rows
        place = entry * queries + first_q
        at = _positions(positions, place, number, here, count - rows)
    else:
        here = number < (window if table is None else count)
        number += start
        place = entry * keys + first_k
        at = _positions(positions, place, number, here, 0)
    if mask is not None:
        here = here & (tl.load(mask + place + number, mask=here, other=0) != 0)
    to = program if table is not None else sample * (total // batch) + tile
    tl.store(extents + to, tl.min(tl.where(here, at, _LAST)))
    tl.store(extents + total + to, tl.max(tl.where(here, at, _FIRST)))


@triton.jit
def attention_scores_lse_kernel(
    q, k, q_mask, k_mask, q_positions, k_positions, k_bias,  # [B, heads, tokens, D] twice, [B, tokens] or None
    tops, masses,  # [runs, B, Hq, M]
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, batch, queries, keys, heads, start, window, total, runs, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest logit of a row and the sum of exp2 relative to it, over a run of keys; ``scale`` > 0, in base 2."""
    program = tl.program_id(0)
    run, head = program % runs, program // runs % heads
    sample, tile = _place(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = _sample(sample, cu_q, cu_k, queries, keys)
    if table is not None:
        window = count
    else:
        tile = tl.cdiv(queries, ROWS) - 1 - tile  # the rows that see most are begun first
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    row = tile * ROWS + tl.arange(0, ROWS)
    valid = row < rows
    row_place = entry * queries + first_q
    if q_mask is not None:
        valid = valid & (tl.load(q_mask + row_place + row, mask=valid, other=0) != 0)
    row_at = _positions(q_positions, row_place, row, valid, count - rows)
    base = _extent_base(extent_first, sample, tl.cdiv(window, KEYS))
    full, end = _keys_of(
        tl.min(tl.where(valid, row_at, _LAST)), tl.max(tl.where(valid, row_at, _FIRST)), tile * ROWS,
        tl.minimum(tile * ROWS + ROWS, rows) - 1, start, window, count - rows, extents, base, total,
        CAUSAL, POSITIONS, KEYS,
    )  # fmt: skip
    length = tl.cdiv(end, runs)
    run_begin = tl.minimum(run * length, end)
    run_end = tl.minimum(run_begin + length, end)
    if k_mask is not None:
        full = 0
    q += entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
    q1, q2 = _load(q, row.to(tl.int64) * q_row, valid, D, D1, D2)
    if NEGATIVE:
        q1, q2 = -q1, -q2
    k += entry * k_batch + (head // GROUP).to(tl.int64) * k_head + (first_k + start).to(tl.int64) * k_row
    key_place = entry * keys + first_k + start
    column = tl.arange(0, KEYS)
    offset = column.to(tl.int64) * k_row
    hop = (tl.zeros([], tl.int64) + k_row) * KEYS

    top = tl.full([ROWS], float("-inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    for MASKED in tl.static_range(2):
        if MASKED:
            begin, stop = tl.maximum(run_begin, full), run_end
        else:
            begin, stop = run_begin, tl.minimum(run_end, full)
        for step in tl.range(begin, stop):
            number = step * KEYS + column
            here = number < window if MASKED else column < KEYS
            if MASKED and k_mask is not None:
                here = here & (tl.load(k_mask + key_place + number, mask=here, other=0) != 0)
            k1, k2 = _load(k + step * hop, offset, here, D, D1, D2)
            logits = _products(q1, q2, k1, k2, D2, PRECISION)
            if k_bias is not None:
                bias = tl.load(k_bias + key_place + number, mask=here, other=0.0)
                logits = logits * scale + (bias * _LOG2_E)[None, :]
            if MASKED:
                seen = here[None, :]
                if CAUSAL:
                    key_at = _positions(k_positions, key_place, number, here, start)
                    seen = seen & (key_at[None, :] <= row_at[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            # scale is positive: the maximum may be taken before it, which saves a multiplication
            unit = scale if k_bias is None else 1.0
            new_top = tl.maximum(top, tl.max(logits, 1) * unit)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            mass = mass * tl.exp2(top - shift) + tl.sum(tl.exp2(logits * unit - shift[:, None]), 1)
            top = new_top
    to = ((run * (batch if table is None else 1) + entry) * heads + head) * queries + first_q + row
    tl.store(tops + to, tl.where(valid, top, float("-inf")), mask=row < rows)
    tl.store(masses + to, tl.where(valid, mass, 0.0), mask=row < rows)


@triton.jit
def attention_scores_bounds_kernel(
    tops, masses, lse_given, q_mask,  # [runs, B, Hq, M] twice, [B, Hq, M] or None, [B, M] or None
    lse, bounds, dead,  # [B, Hq, M] twice, [B, Hq] or None
    queries, heads, rows_in_all, runs, ROWS: tl.constexpr,
):  # fmt: skip
    """lse of a row, and its bound; with a given lse also whether the head has a dead row."""
    program = tl.program_id(0).to(tl.int64)
    any_dead = tl.zeros([ROWS], tl.int32)
    for some in tl.range(0, queries, ROWS):
        row = some + tl.arange(0, ROWS)
        here = row < queries
        valid = here
        if q_mask is not None:
            valid = valid & (tl.load(q_mask + program // heads * queries + row, mask=here, other=0) != 0)
        place = program * queries + row
        if lse_given is not None:
            natural = tl.load(lse_given + place, mask=valid, other=float("-inf"))
            bound = natural * _LOG2_E
        else:
            top = tl.load(tops + place, mask=here, other=float("-inf"))
            mass = tl.load(masses + place, mask=here, other=0.0)
            for run in tl.range(1, runs):
                other_top = tl.load(tops + run * rows_in_all + place, mask=here, other=float("-inf"))
                other_mass = tl.load(masses + run * rows_in_all + place, mask=here, other=0.0)
                highest = tl.maximum(top, other_top)
                shift = tl.where(highest == float("-inf"), 0.0, highest)
                mass = mass * tl.exp2(top - shift) + other_mass * tl.exp2(other_top - shift)
                top = highest
            bound = tl.where(mass == 0, float("-inf"), top + tl.log2(mass))  # NaN is not blind: it stays
            natural = bound * _LN_2
        blind = natural == float("-inf")
        tl.store(lse + place, natural, mask=here)
        tl.store(bounds + place, tl.where(blind, float("inf"), bound), mask=here)
        any_dead = any_dead | (here & blind).to(tl.int32)
    if dead is not None:
        tl.store(dead + program, tl.max(any_dead))


# Scores --------------------------------------------------------------------------------------------------------------


@triton.jit
def attention_scores_kernel(
    q, k, bounds, dead,  # [B, heads, tokens, D] twice, [B, Hq, M] or None (logits), [B, Hq] or None
    q_mask, k_mask, q_positions, k_positions, k_bias, head_weights,  # [B, tokens] or None, [Hq] or [B, Hq] or None
    sums, tops, winners,  # [runs, B, slots, columns] or None
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, batch, queries, keys, heads, start, columns, total,
    runs, scale,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Column sums, and maxima with the queries that won them, over a run of queries.

    ``scale`` is in base 2, for logits natural. Without PER_HEAD the heads of a group are added up. A tile's columns are
    summed at once: most of a column lies in one thread, and single sums would take as many registers as the logits.
    """
    program = tl.program_id(0)
    run, kv_head = program % runs, program // runs % heads
    sample, tile = _place(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = _sample(sample, cu_q, cu_k, queries, keys)
    window = columns if table is None else count
    MAXIMA: tl.constexpr = tops is not None
    # values that must be left out one by one, not only as a zero of exp2
    ALL_MASKED: tl.constexpr = MAXIMA or LOGIT or q_mask is not None
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None

    column = tile * KEYS + tl.arange(0, KEYS)
    key = start + column
    exists = column < window
    key_place = entry * keys + first_k
    visible = exists
    if k_mask is not None:
        visible = visible & (tl.load(k_mask + key_place + key, mask=exists, other=0) != 0)
    key_at = _positions(k_positions, key_place, key, exists, 0)
    if k_bias is not None:
        bias = tl.load(k_bias + key_place + key, mask=visible, other=0.0)
        if not LOGIT:
            bias *= _LOG2_E
    k += entry * k_batch + kv_head.to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    k1, k2 = _load(k, key.to(tl.int64) * k_row, visible, D, D1, D2)

    extra = count - rows
    base = _extent_base(extent_first, sample, tl.cdiv(queries, ROWS))
    first, full, end = _queries_of(
        tl.min(tl.where(visible, key_at, _LAST)), tl.max(tl.where(visible, key_at, _FIRST)), start + tile * KEYS,
        start + tl.minimum(tile * KEYS + KEYS, window) - 1, rows, extra, extents, base, total, CAUSAL, POSITIONS, ROWS,
    )  # fmt: skip
    key_at = tl.maximum(key_at, _FIRST + 1) if CAUSAL else tl.full([KEYS], _FIRST + 1, tl.int32)
    length = tl.cdiv(end - first, runs)
    run_begin = tl.minimum(first + run * length, end)
    run_end = tl.minimum(run_begin + length, end)

    slots = heads * GROUP if PER_HEAD else heads
    to = ((run * (batch if table is None else 1) + entry) * slots + kv_head * (GROUP if PER_HEAD else 1)) * columns
    to += first_k + column
    row = tl.arange(0, ROWS)
    offset = row.to(tl.int64) * q_row
    hop = (tl.zeros([], tl.int64) + q_row) * ROWS
    row_place = entry * queries + first_q
    sum = tl.zeros([KEYS], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        head_q = q + entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
        if bounds is not None:
            head_bounds = bounds + (entry * heads * GROUP + head) * queries + first_q
        if head_weights is not None:
            weight = tl.load(head_weights + entry * weights_batch + head)
        partial = full
        if dead is not None:
            partial = tl.where(tl.load(dead + entry * heads * GROUP + head) != 0, end, full)
        if MAXIMA:
            top = tl.full([KEYS], _FIRST, tl.int32)
            winner = tl.zeros([KEYS], tl.int32)
        for FULL in tl.static_range(1 if ALL_MASKED else 2):
            if ALL_MASKED:
                begin, stop = run_begin, run_end
            elif FULL:
                begin, stop = tl.maximum(run_begin, partial), run_end
            else:
                begin, stop = run_begin, tl.minimum(run_end, partial)
            for step in tl.range(begin, stop):
                number = step * ROWS + row
                here = number < rows
                live = here
                if not FULL and q_mask is not None:
                    here = here & (tl.load(q_mask + row_place + number, mask=here, other=0) != 0)
                    live = here
                if not LOGIT:
                    bound = tl.load(head_bounds + number, mask=number < rows, other=float("inf"))
                    if not FULL:
                        live = here & (bound != float("inf"))
                q1, q2 = _load(head_q + step * hop, offset, live, D, D1, D2)
                value = _products(k1, k2, q1, q2, D2, PRECISION) * scale
                if k_bias is not None:
                    value += bias[:, None]
                if not LOGIT:
                    value = tl.exp2(value - bound[None, :])
                if head_weights is not None:
                    value *= weight
                if not FULL:
                    # one comparison says all: a query that does not exist stands before every key
                    row_at = _positions(q_positions, row_place, number, here, extra) if CAUSAL else number
                    row_at = tl.where(here, tl.maximum(row_at, _FIRST + 1), _FIRST)
                    if MAXIMA:
                        if not LOGIT:
                            value = tl.where(live[None, :], value, 0.0)  # a dead query's zeros compete
                        seen = key_at[:, None] <= row_at[None, :]
                        found, who = tl.max(tl.where(seen, _ordered(value), _FIRST), 1, return_indices=True)
                        winner = tl.where(found > top, step * ROWS + who, winner)
                        top = tl.maximum(top, found)
                    row_at = tl.where(live, row_at, _FIRST)
                    value = tl.where(key_at[:, None] <= row_at[None, :], value, 0.0)
                if sums is not None:
                    sum += tl.sum(value, 1)
        if PER_HEAD:
            if sums is not None:
                tl.store(sums + to + member * columns, tl.where(visible, sum, 0.0), mask=exists)
                sum = tl.zeros([KEYS], tl.float32)
            if MAXIMA:
                tl.store(tops + to + member * columns, top, mask=exists)
                tl.store(winners + to + member * columns, winner, mask=exists)
    if not PER_HEAD:
        tl.store(sums + to, tl.where(visible, sum, 0.0), mask=exists)


@triton.jit
def attention_scores_pairs_kernel(
    q, k, bounds, q_mask, k_mask, q_positions, k_positions, k_bias, head_weights, sums, tops, winners,
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, batch, queries, keys, heads, start, columns, total,
    runs, scale, kv_heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As attention_scores_kernel, with heads reduced for every pair of query and key first, by a maximum, say.

    ``heads`` of the result, each of ``kv_heads`` groups; a winner is query * q_heads + head where HEADS is a maximum.
    """
    program = tl.program_id(0)
    run, out_head = program % runs, program // runs % heads
    sample, tile = _place(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = _sample(sample, cu_q, cu_k, queries, keys)
    window = columns if table is None else count
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    column = tile * KEYS + tl.arange(0, KEYS)
    key = start + column
    exists = column < window
    key_place = entry * keys + first_k
    visible = exists
    if k_mask is not None:
        visible = visible & (tl.load(k_mask + key_place + key, mask=exists, other=0) != 0)
    key_at = _positions(k_positions, key_place, key, exists, 0)
    extra = count - rows
    base = _extent_base(extent_first, sample, tl.cdiv(queries, ROWS))
    first, _, end = _queries_of(
        tl.min(tl.where(visible, key_at, _LAST)), tl.max(tl.where(visible, key_at, _FIRST)), start + tile * KEYS,
        start + tl.minimum(tile * KEYS + KEYS, window) - 1, rows, extra, extents, base, total, CAUSAL, POSITIONS, ROWS,
    )  # fmt: skip
    length = tl.cdiv(end - first, runs)
    run_begin = tl.minimum(first + run * length, end)
    run_end = tl.minimum(run_begin + length, end)

    row_place = entry * queries + first_q
    q_heads = heads * kv_heads * GROUP
    sum = tl.zeros([KEYS], tl.float32)
    top = tl.full([KEYS], _FIRST, tl.int32)
    winner = tl.zeros([KEYS], tl.int32)
    for step in tl.range(run_begin, run_end):
        number = step * ROWS + tl.arange(0, ROWS)
        here = number < rows
        if q_mask is not None:
            here = here & (tl.load(q_mask + row_place + number, mask=here, other=0) != 0)
        seen = here[None, :]
        if CAUSAL:
            row_at = _positions(q_positions, row_place, number, here, extra)
            seen = seen & (key_at[:, None] <= row_at[None, :])
        added = tl.zeros([KEYS, ROWS], tl.float32)
        largest = tl.full([KEYS, ROWS], _FIRST, tl.int32)
        who = tl.zeros([KEYS, ROWS], tl.int32)
        for member in tl.range(0, kv_heads * GROUP):
            head = out_head * kv_heads * GROUP + member
            value = _pair_values(
                q, k, bounds, k_bias, head_weights, entry, head, number, key, here, visible, first_q, first_k, queries,
                keys, q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
                GROUP, LOGIT, False, D, D1, D2, PRECISION,
            )  # fmt: skip
            if HEADS == _MAX_HEADS:
                value = _ordered(value)
                who = tl.where(value > largest, head, who)
                largest = tl.maximum(largest, value)
            else:
                added += value
        if HEADS == _MAX_HEADS:
            added = _value(largest)
        if HEADS == _MEAN_HEADS:
            added /= kv_heads * GROUP
        if tops is not None:
            found, at = tl.max(tl.where(seen, _ordered(added), _FIRST), 1, return_indices=True)
            candidate = step * ROWS + at
            if HEADS == _MAX_HEADS:
                chosen = tl.where(tl.arange(0, ROWS)[None, :] == at[:, None], who, 0)
                candidate = candidate * q_heads + tl.sum(chosen, 1)
            winner = tl.where(found > top, candidate, winner)
            top = tl.maximum(top, found)
        sum += tl.sum(tl.where(seen, added, 0.0), 1)
    to = ((run * (batch if table is None else 1) + entry) * heads + out_head) * columns + first_k + column
    if sums is not None:
        tl.store(sums + to, tl.where(visible, sum, 0.0), mask=exists)
    if tops is not None:
        tl.store(tops + to, top, mask=exists)
        tl.store(winners + to, winner, mask=exists)


@triton.jit
def _pair_values(
    q, k, bounds, k_bias, head_weights, entry, head, number, key, here, visible, first_q, first_k, queries, keys,
    q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
    GROUP: tl.constexpr, LOGIT: tl.constexpr, NATURAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's values [keys, rows], its weight included. Keys and rows are given by number.

    NATURAL: ``scale`` and bounds are not in base 2.
    """
    live = here
    if not LOGIT:
        bound = tl.load(bounds + (entry * q_heads + head) * queries + first_q + number, mask=here, other=float("inf"))
        live = live & (bound != float("inf"))
    q += entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
    k += entry * k_batch + (head // GROUP).to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    q1, q2 = _load(q, number.to(tl.int64) * q_row, live, D, D1, D2)
    k1, k2 = _load(k, key.to(tl.int64) * k_row, visible, D, D1, D2)
    value = _products(k1, k2, q1, q2, D2, PRECISION) * scale
    if k_bias is not None:
        bias = tl.load(k_bias + entry * keys + first_k + key, mask=visible, other=0.0)
        if not LOGIT and not NATURAL:
            bias *= _LOG2_E
        value += bias[:, None]
    if not LOGIT:
        value -= bound[None, :]
        value = tl.where(live[None, :], tl.exp2(value * _LOG2_E if NATURAL else value), 0.0)
    if head_weights is not None:
        value *= tl.load(head_weights + entry * weights_batch + head)
    return value


@triton.jit
def attention_scores_finish_kernel(
    sums, tops, winners,  # [runs, B, slots, columns] or None
    q_mask, k_mask, q_positions, k_positions,
    scores, divisors, query_winners, head_winners,  # see pyvtk/ops/score.py
    table, cu_q, cu_k, batch, queries, keys, slots, out_heads, start, columns, runs, heads_per_out,
    REDUCERS: tl.constexpr, COUNT: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, CAUSAL: tl.constexpr,
    LOGIT: tl.constexpr, COUNT_SEEN: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Scores of some keys and one head of the result. REDUCERS: COUNT digits of base 4, the first one lowest."""
    program = tl.program_id(0)
    out_head = program % out_heads
    sample, tile = _place(program // out_heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = _sample(sample, cu_q, cu_k, queries, keys)
    entries = batch if table is None else 1
    column = tile * KEYS + tl.arange(0, KEYS)
    exists = column < (columns if table is None else count)
    key_place = entry * keys + first_k + start
    visible = exists
    if k_mask is not None:
        visible = visible & (tl.load(k_mask + key_place + column, mask=exists, other=0) != 0)
    row_place = entry * queries + first_q

    # queries that exist, and those that see each key
    valid = rows
    seen_by = tl.zeros([KEYS], tl.int32) + rows
    if q_mask is not None or (CAUSAL and COUNT_SEEN):
        key_at = _positions(k_positions, key_place, column, exists, start)
        valid = rows * 0
        seen_by = tl.zeros([KEYS], tl.int32)
        for some in tl.range(0, rows, ROWS):
            row = some + tl.arange(0, ROWS)
            here = row < rows
            if q_mask is not None:
                here = here & (tl.load(q_mask + row_place + row, mask=here, other=0) != 0)
            valid += tl.sum(here.to(tl.int32))
            if COUNT_SEEN:
                seen = here[None, :]
                if CAUSAL:
                    row_at = _positions(q_positions, row_place, row, here, count - rows)
                    seen = seen & (key_at[:, None] <= row_at[None, :])
                seen_by += tl.sum((seen & exists[:, None]).to(tl.int32), 1)
    seen_by = tl.where(visible, seen_by, 0)

    plane = tl.zeros([], tl.int64) + entries * slots * columns
    per_out = slots // out_heads
    for r in tl.static_range(COUNT):
        REDUCE: tl.constexpr = REDUCERS // 4**r % 4
        divisor = tl.full([KEYS], 1.0, tl.float32)
        if REDUCE == _MEAN:
            divisor = tl.zeros([KEYS], tl.float32) + tl.maximum(valid, 1).to(tl.float32)
        if REDUCE == _VISIBLE_MEAN:
            divisor = tl.maximum(seen_by, 1).to(tl.float32)
        if out_head == 0:
            tl.store(divisors + (r * entries + entry) * columns + first_k + column, divisor, mask=exists)
        result = tl.zeros([KEYS], tl.float32)
        largest = tl.full([KEYS], _FIRST, tl.int32)
        best = tl.zeros([KEYS], tl.int32) + out_head * heads_per_out
        for slot in tl.range(out_head * per_out, (out_head + 1) * per_out):
            at = (entry * slots + slot) * columns + first_k + column
            if REDUCE == _MAX:
                top = tl.full([KEYS], _FIRST, tl.int32)
                winner = tl.zeros([KEYS], tl.int32)
                for run in tl.range(0, runs):
                    found = tl.load(tops + run * plane + at, mask=exists, other=_FIRST)
                    who = tl.load(winners + run * plane + at, mask=exists, other=0)
                    winner = tl.where(found > top, who, winner)
                    top = tl.maximum(top, found)
                value = tl.where(seen_by > 0, _value(top), 0.0)
                if PAIRS and HEADS == _MAX_HEADS:
                    best = winner % (out_heads * heads_per_out)
                    winner = winner // (out_heads * heads_per_out)
                tl.store(query_winners + at, winner, mask=exists)
            else:
                value = tl.zeros([KEYS], tl.float32)
                for run in tl.range(0, runs):
                    value += tl.load(sums + run * plane + at, mask=exists, other=0.0)
                value /= divisor
                if PAIRS:
                    best = tl.full([KEYS], -1, tl.int32)
            if HEADS == _MAX_HEADS and not PAIRS:
                ordered = _ordered(value)
                best = tl.where(ordered > largest, slot, best)
                largest = tl.maximum(largest, ordered)
                result = _value(largest)
            else:
                result += value
        if HEADS == _MEAN_HEADS and not PAIRS:
            result /= heads_per_out
        if LOGIT:
            result = tl.where(seen_by > 0, result, float("-inf"))
        to = ((r * entries + entry) * out_heads + out_head) * columns + first_k + column
        tl.store(scores + to, result, mask=exists)
        if HEADS == _MAX_HEADS:
            tl.store(head_winners + to, best, mask=exists)


# Launchers -----------------------------------------------------------------------------------------------------------

# programs that are enough for any device; the cut into runs depends on sizes alone
_ENOUGH = 256


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, tokens: int, lean: bool, capability: tuple[int, int]) -> dict:
    """Tile of a program, found by compiling (.ci/check_triton.py): as large as registers allow without spilling.

    Args:
        kernel: "lse", "scores", "pairs", "query_grad" or "key_grad".
        tokens: queries; few of them need no tall tile.
        lean: nothing but a causal mask; maxima, masks, positions take registers.
        capability: of the device.

    Returns:
        ROWS queries and KEYS keys make a tile; D1 and D2 are the parts of the head dimension.
    """
    single, wide = dtype == torch.float32, head_dim > 128
    # devices whose products read shared memory by themselves; the others keep what stays in registers
    large = capability[0] in (9, 10)
    # devices with 99 KiB of shared memory hold two programs where a stage less is copied ahead
    stages = 2 if capability in ((8, 6), (8, 9)) or capability[0] == 12 else 3
    warps = 4
    if single:
        rows, keys, stages = (32, 32, 2) if not wide else (16, 32, 2)
        warps = 4 if head_dim <= 64 else 8
        if kernel in ("scores", "query_grad") and head_dim % 64:
            rows = 16  # the second part is padded to the first
    elif kernel in ("lse", "scores"):
        # a warp owns 32 of the tokens that stay: each of those it reads from shared memory serves two products
        tall = kernel == "scores" and head_dim in (64, 128) and (large or capability == (8, 0))
        tall = lean and (tall or capability[0] == 9 or (large and kernel == "lse"))
        stay, pass_by = (128, 64 if tall else 32) if not wide else (64, 32)
        if kernel == "scores" and stages == 2 and not wide and (not lean or head_dim % 64):
            pass_by = 16  # with more, ptxas spills a little for the sake of another block
        rows, keys = (stay, pass_by) if kernel == "lse" else (pass_by, stay)
        if kernel == "lse" and large and not wide:
            warps = 8
    elif kernel == "query_grad":
        rows, keys = (64, 32 if lean else 16) if not wide else (32, 32)
        stages = 2
    else:
        rows, keys = (32 if lean else 16, 64 if lean or capability[0] == 9 else 32) if not wide else (32, 32)
        stages = 2
    if wide and not single:
        stages = 2
        warps = 4 if kernel in ("lse", "scores") else 8
    rows = min(rows, max(16, triton.next_power_of_2(max(tokens, 1))))
    first, second = parts(head_dim, 256 if large and not single else 64)
    if single and second:
        second = first
    return {"ROWS": rows, "KEYS": keys, "D1": first, "D2": second, "num_warps": warps, "num_stages": stages}


def precision(capability: tuple[int, int]) -> str:
    """float32 in three products of TensorFloat32 keeps its accuracy; older devices have no such products."""
    return "tf32x3" if capability >= (8, 0) else "ieee"


class Walk:
    """What the launches of one call share: tensors as [batch, heads, tokens, dim], packed ones as a batch of 1."""

    def __init__(self, q, k, q_positions, k_positions, q_mask, k_mask, k_bias, cu_q, cu_k, causal, key_start, key_stop):
        self.packed = cu_q is not None
        if self.packed:
            q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
            key_start, key_stop = 0, k.shape[2]
        self.q, self.k, self.causal = q, k, bool(causal)
        self.start, self.columns = key_start, key_stop - key_start
        self.batch, self.q_heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.group = self.q_heads // self.kv_heads
        self.samples = cu_q.shape[0] - 1 if self.packed else self.batch
        self.cu_q, self.cu_k = cu_q, cu_k
        self.q_mask, self.k_mask = (None if x is None else x.view(torch.uint8) for x in (q_mask, k_mask))
        self.q_positions, self.k_positions, self.k_bias = q_positions, k_positions, k_bias
        self.capability = attention._capability(q)

    def new(self, *shape, dtype=torch.float32) -> Tensor:
        """Memory for an output; of packed samples zeros, for what bad offsets leave out."""
        make = self.q.new_zeros if self.packed else self.q.new_empty
        return make(shape, dtype=dtype)

    def tiles(self, kernel: str, maxima: bool = False) -> dict:
        options = (self.q_positions, self.k_positions, self.q_mask, self.k_mask)
        lean = not maxima and all(x is None for x in options)
        return {
            **tiles(kernel, self.head_dim, self.q.dtype, self.queries, lean, self.capability),
            "D": self.head_dim, "GROUP": self.group, "PRECISION": precision(self.capability),
        }  # fmt: skip

    def table(self, of_queries: bool, window: int, tile: int) -> tuple[Tensor | None, Tensor | None, int]:
        """Tiles of queries or keys: the table of packed samples, where each sample's tiles begin, and their number."""
        if not self.packed:
            return None, None, self.batch * triton.cdiv(window, tile)
        cu, length = (self.cu_q, self.queries) if of_queries else (self.cu_k, self.keys)
        ends = ((cu.clamp(0, length).diff().clamp(min=0) + tile - 1) // tile).cumsum(0)
        first = torch.nn.functional.pad(ends, (1, 0))
        total = length // tile + self.samples
        number = torch.arange(total, device=cu.device)
        sample = torch.searchsorted(ends, number, right=True)
        within = number - first[sample]
        table = torch.stack((torch.where(sample < self.samples, sample, -1), within), 1).to(torch.int32)
        return table, first[:-1].to(torch.int32), total

    def extents(self, of_queries: bool, start: int, window: int, tile: int) -> dict:
        """Where tiles of the other side stand, if positions are given: arguments of the kernels that walk it."""
        if not self.causal or (self.q_positions is None and self.k_positions is None):
            return {"extents": None, "extent_first": None, "total": 0}
        table, first, total = self.table(of_queries, window, tile)
        extents = self.q.new_empty((2, max(total, 1)), dtype=torch.int32)
        arguments = {
            "positions": self.q_positions if of_queries else self.k_positions,
            "mask": self.q_mask if of_queries else self.k_mask, "table": table, "cu_q": self.cu_q, "cu_k": self.cu_k,
            "extents": extents, "batch": self.batch, "queries": self.queries, "keys": self.keys, "start": start,
            "window": window, "total": total, "OF_QUERIES": of_queries, "TILE": tile, "num_warps": 4,
        }  # fmt: skip
        attention._launch(attention_scores_extents_kernel, total, arguments)
        return {"extents": extents, "extent_first": first, "total": total}

    def common(self) -> dict:
        return {
            "q": self.q, "k": self.k, "q_mask": self.q_mask, "k_mask": self.k_mask, "q_positions": self.q_positions,
            "k_positions": self.k_positions, "k_bias": self.k_bias, "cu_q": self.cu_q, "cu_k": self.cu_k,
            **attention._strides("q", self.q), **attention._strides("k", self.k), "batch": self.batch,
            "queries": self.queries, "keys": self.keys, "CAUSAL": self.causal,
        }  # fmt: skip

    def bounds(self, lse_given: Tensor | None, start: int, window: int, scale: float) -> tuple:
        """lse, bounds and dead heads of all rows; the denominator is that of ``window`` keys from ``start`` on."""
        shape = (self.batch, self.q_heads, self.queries)
        lse, bounds = (self.q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        tops = masses = dead = None
        runs, rows = 1, self.batch * self.q_heads * self.queries
        if lse_given is None:
            tile = self.tiles("lse")
            table, _, total = self.table(True, self.queries, tile["ROWS"])
            runs = _runs(total * self.q_heads, triton.cdiv(window, tile["KEYS"]))
            tops, masses = (self.new(runs, *shape) for _ in range(2))
            if self.packed:
                tops.fill_(float("-inf"))
            arguments = {
                **self.common(), "tops": tops, "masses": masses, "table": table, "heads": self.q_heads, "start": start,
                "window": window, **self.extents(False, start, window, tile["KEYS"]), "runs": runs,
                # 0 would make NaN of the -inf of unseen keys
                "scale": max(abs(scale) * LOG2_E, SMALLEST), "NEGATIVE": scale < 0, **tile,
            }  # fmt: skip
            attention._launch(attention_scores_lse_kernel, total * self.q_heads * runs, arguments)
        elif self.q_mask is None:
            dead = self.q.new_empty(shape[:2], dtype=torch.int32)
        arguments = {
            "tops": tops, "masses": masses, "lse_given": lse_given, "q_mask": self.q_mask, "lse": lse,
            "bounds": bounds, "dead": dead, "queries": self.queries, "heads": self.q_heads, "rows_in_all": rows,
            "runs": runs, "ROWS": 1024, "num_warps": 4,
        }  # fmt: skip
        attention._launch(attention_scores_bounds_kernel, self.batch * self.q_heads, arguments)
        return lse, bounds, dead


def _runs(programs: int, steps: int) -> int:
    """Into how many runs a walk of ``steps`` tiles is cut, so that there are enough programs."""
    runs = 1
    while programs * runs < _ENOUGH and runs * 4 <= steps:
        runs *= 2
    return runs


def attention_scores(
    q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse_given, cu_seqlens_q, cu_seqlens_k,
    causal, key_start, key_stop, range_denominator, scale, query_reduce, head_reduce, heads_first, logit, return_lse,
):  # fmt: skip
    """Arguments as the operator has them; they were checked on the page."""
    walk = Walk(
        q, k, q_positions, k_positions, q_mask, k_mask, k_bias, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop
    )
    reduces = query_reduce.split(",")
    kind = head_reduce.removeprefix("group_")
    heads_by = {"mean": MEAN_HEADS, "max": MAX_HEADS}.get(kind, SUM_HEADS)
    out_heads = walk.q_heads if kind == "none" else walk.kv_heads if head_reduce.startswith("group_") else 1
    maxima = "max" in reduces
    pairs = heads_first and kind != "none" and (maxima or kind == "max")
    per_head = not pairs and (kind in ("none", "max") or maxima)
    slots = out_heads if pairs else walk.q_heads if per_head else walk.kv_heads
    shape = (len(reduces), walk.batch, out_heads, walk.columns)
    scores = walk.new(*shape)
    divisors = walk.new(len(reduces), walk.batch, walk.columns)
    query_winners = walk.new(*((walk.batch, slots, walk.columns) if maxima else (0,)), dtype=torch.int32)
    head_winners = walk.new(*(shape if kind == "max" else (0,)), dtype=torch.int32)
    with torch.cuda.device_of(q):
        lse, bounds, dead = q.new_empty(0, dtype=torch.float32), None, None
        if not logit or return_lse:
            window = (walk.start, walk.columns) if range_denominator else (0, walk.keys)
            lse, bounds, dead = walk.bounds(lse_given, *window, scale)
        if logit:
            bounds = dead = None
        tile = walk.tiles("pairs" if pairs else "scores", maxima)
        table, _, total = walk.table(False, walk.columns, tile["KEYS"])
        owners = out_heads if pairs else walk.kv_heads
        runs = _runs(total * owners, triton.cdiv(walk.queries, tile["ROWS"]))
        statistics = (runs, walk.batch, slots, walk.columns)
        sums = walk.new(*statistics) if set(reduces) != {"max"} else None
        tops, winners = (walk.new(*statistics, dtype=torch.int32) if maxima else None for _ in range(2))
        arguments = {
            **walk.common(), "bounds": bounds, "head_weights": head_weights, "sums": sums, "tops": tops,
            "winners": winners, "table": table, **walk.extents(True, 0, walk.queries, tile["ROWS"]),
            "weights_batch": walk.q_heads if head_weights is not None and head_weights.dim() == 2 else 0,
            "heads": owners, "start": walk.start, "columns": walk.columns, "runs": runs,
            "scale": scale if logit else scale * LOG2_E, "LOGIT": logit, **tile,
        }  # fmt: skip
        if pairs:
            arguments.update(kv_heads=walk.kv_heads // out_heads, HEADS=heads_by)
            attention._launch(attention_scores_pairs_kernel, total * owners * runs, arguments)
        else:
            arguments.update(dead=dead, PER_HEAD=per_head)
            attention._launch(attention_scores_kernel, total * owners * runs, arguments)
        codes = sum(QUERY_REDUCES.index(name) * 4**i for i, name in enumerate(reduces))
        arguments = {
            "sums": sums, "tops": tops, "winners": winners, "q_mask": walk.q_mask, "k_mask": walk.k_mask,
            "q_positions": q_positions, "k_positions": k_positions, "scores": scores, "divisors": divisors,
            "query_winners": query_winners, "head_winners": head_winners, "table": table, "cu_q": cu_seqlens_q,
            "cu_k": cu_seqlens_k, "batch": walk.batch, "queries": walk.queries, "keys": walk.keys, "slots": slots,
            "out_heads": out_heads, "start": walk.start, "columns": walk.columns, "runs": runs,
            "heads_per_out": walk.q_heads // out_heads, "REDUCERS": codes, "COUNT": len(reduces), "HEADS": heads_by,
            "PAIRS": pairs, "CAUSAL": walk.causal, "LOGIT": logit,
            "COUNT_SEEN": logit or maxima or "visible_mean" in reduces, "KEYS": tile["KEYS"], "ROWS": 64,
            "num_warps": 4,
        }  # fmt: skip
        attention._launch(attention_scores_finish_kernel, total * out_heads, arguments)
    return scores, lse, divisors, query_winners, head_winners
