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

from . import _tiles
from ._tiles import FIRST, LOG2_E, in_units, load_rows, products
from .score_lse import row_bounds
from .score_walk import (
    NUMBERS,
    Walk,
    from_ordered,
    key_tile,
    padded,
    pair_values,
    positions_at,
    queries_of,
    runs_of,
    sample_at,
    to_ordered,
    work_of,
)

QUERY_REDUCES = ("mean", "sum", "max", "visible_mean")
_MEAN: tl.constexpr = tl.constexpr(0)
_MAX: tl.constexpr = tl.constexpr(2)
_VISIBLE_MEAN: tl.constexpr = tl.constexpr(3)
# how heads become one
SUM_HEADS, MEAN_HEADS, MAX_HEADS = 0, 1, 2
_MEAN_HEADS: tl.constexpr = tl.constexpr(MEAN_HEADS)
_MAX_HEADS: tl.constexpr = tl.constexpr(MAX_HEADS)


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_kernel(
    q, k, bounds, dead,  # [B, heads, tokens, D] twice, [B, Hq, padded(M)] or None (logits), [B, Hq] or None
    q_mask, k_mask, q_positions, k_positions, k_bias, head_weights,  # [B, tokens] or None, [Hq] or [B, Hq] or None
    sums, tops, winners,  # [runs, B, slots, columns] or None
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, batch, queries, keys, heads, start, columns, total,
    runs, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, PER_HEAD: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Column sums, and maxima with the queries that won them, over a run of queries.

    ``scale`` is in base 2, for logits natural. Without PER_HEAD the heads of a group are added up. A tile's columns are
    summed at once: most of a column lies in one thread, and single sums would take as many registers as the logits.
    """
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    program = tl.program_id(0)
    run, kv_head = program % runs, program // runs % heads
    sample, tile = work_of(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    window = columns if table is None else count
    MAXIMA: tl.constexpr = tops is not None
    # values that must be left out one by one, not only as a zero of exp2
    ALL_MASKED: tl.constexpr = MAXIMA or LOGIT or q_mask is not None
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None

    key_place = entry * keys + first_k
    column, key, exists, visible, key_at = key_tile(tile, k_mask, k_positions, key_place, start, window, KEYS)
    if k_bias is not None:
        bias = tl.load(k_bias + key_place + key, mask=visible, other=0.0)
        if not LOGIT:
            bias *= LOG2_E
    k += entry * k_batch + kv_head.to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    k1, k2 = load_rows(k, key.to(tl.int64) * k_row, visible, D, D1, D2)

    extra = count - rows
    first, full, end = queries_of(
        tile, visible, key_at, start, window, rows, extra, queries, extents, extent_first, sample, total,
        CAUSAL, POSITIONS, ROWS, KEYS,
    )  # fmt: skip
    key_at = tl.maximum(key_at, FIRST + 1) if CAUSAL else tl.full([KEYS], FIRST + 1, tl.int32)
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
    line = padded(queries)
    bounded = line if table is None else rows  # behind a packed sample come the rows of the next
    sum = tl.zeros([KEYS], tl.float32)
    for member in tl.range(0, GROUP):
        head = kv_head * GROUP + member
        head_q = q + entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
        if bounds is not None:
            head_bounds = bounds + (entry * heads * GROUP + head) * line + first_q
        if head_weights is not None:
            weight = tl.load(head_weights + entry * weights_batch + head)
        partial = full
        if dead is not None:
            partial = tl.where(tl.load(dead + entry * heads * GROUP + head) != 0, end, full)
        if MAXIMA:
            top = tl.full([KEYS], FIRST, tl.int32)
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
                    bound = tl.load(head_bounds + number, mask=number < bounded, other=float("inf"))
                    if not FULL:
                        live = bound != float("inf")
                        if q_mask is not None:
                            live = live & here
                q1, q2 = load_rows(head_q + step * hop, offset, live, D, D1, D2)
                value = products(k1, k2, q1, q2, D2, PRECISION) * scale
                if k_bias is not None:
                    value += bias[:, None]
                if not LOGIT:
                    value = tl.exp2(value - bound[None, :])
                if head_weights is not None:
                    value *= weight
                if not FULL:
                    # one comparison says all: a query that does not exist stands before every key
                    row_at = positions_at(q_positions, row_place, number, here, extra) if CAUSAL else number
                    row_at = tl.where(here, tl.maximum(row_at, FIRST + 1), FIRST)
                    if MAXIMA:
                        if not LOGIT:
                            value = tl.where(live[None, :], value, 0.0)  # a dead query's zeros compete
                        seen = key_at[:, None] <= row_at[None, :]
                        found, who = tl.max(tl.where(seen, to_ordered(value), FIRST), 1, return_indices=True)
                        winner = tl.where(found > top, step * ROWS + who, winner)
                        top = tl.maximum(top, found)
                    row_at = tl.where(live, row_at, FIRST)
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


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_pairs_kernel(
    q, k, bounds, q_mask, k_mask, q_positions, k_positions, k_bias, head_weights, sums, tops, winners,
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, batch, queries, keys, heads, start, columns, total,
    runs, scale, kv_heads,
    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, LOGIT: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """As attention_scores_kernel, with heads reduced for every pair of query and key first, by a maximum, say.

    ``heads`` of the result, each of ``kv_heads`` groups; a winner is query * q_heads + head where HEADS is a maximum.
    """
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    program = tl.program_id(0)
    run, out_head = program % runs, program // runs % heads
    sample, tile = work_of(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    window = columns if table is None else count
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    key_place = entry * keys + first_k
    column, key, exists, visible, key_at = key_tile(tile, k_mask, k_positions, key_place, start, window, KEYS)
    extra = count - rows
    first, _, end = queries_of(
        tile, visible, key_at, start, window, rows, extra, queries, extents, extent_first, sample, total,
        CAUSAL, POSITIONS, ROWS, KEYS,
    )  # fmt: skip
    length = tl.cdiv(end - first, runs)
    run_begin = tl.minimum(first + run * length, end)
    run_end = tl.minimum(run_begin + length, end)

    row_place = entry * queries + first_q
    q_heads = heads * kv_heads * GROUP
    sum = tl.zeros([KEYS], tl.float32)
    top = tl.full([KEYS], FIRST, tl.int32)
    winner = tl.zeros([KEYS], tl.int32)
    for step in tl.range(run_begin, run_end):
        number = step * ROWS + tl.arange(0, ROWS)
        here = number < rows
        if q_mask is not None:
            here = here & (tl.load(q_mask + row_place + number, mask=here, other=0) != 0)
        seen = here[None, :]
        if CAUSAL:
            row_at = positions_at(q_positions, row_place, number, here, extra)
            seen = seen & (key_at[:, None] <= row_at[None, :])
        added = tl.zeros([KEYS, ROWS], tl.float32)
        largest = tl.full([KEYS, ROWS], FIRST, tl.int32)
        who = tl.zeros([KEYS, ROWS], tl.int32)
        for member in tl.range(0, kv_heads * GROUP):
            head = out_head * kv_heads * GROUP + member
            value = pair_values(
                q, k, bounds, k_bias, head_weights, entry, head, number, key, here, visible, first_q, first_k, queries,
                keys, q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
                GROUP, LOGIT, False, D, D1, D2, PRECISION,
            )  # fmt: skip
            if HEADS == _MAX_HEADS:
                value = to_ordered(value)
                who = tl.where(value > largest, head, who)
                largest = tl.maximum(largest, value)
            else:
                added += value
        if HEADS == _MAX_HEADS:
            added = from_ordered(largest)
        if HEADS == _MEAN_HEADS:
            added /= kv_heads * GROUP
        if tops is not None:
            found, at = tl.max(tl.where(seen, to_ordered(added), FIRST), 1, return_indices=True)
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


@triton.jit(do_not_specialize=NUMBERS)
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
    sample, tile = work_of(program // out_heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
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
        key_at = positions_at(k_positions, key_place, column, exists, start)
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
                    row_at = positions_at(q_positions, row_place, row, here, count - rows)
                    seen = seen & (key_at[:, None] <= row_at[None, :])
                seen_by += tl.sum((seen & exists[:, None]).to(tl.int32), 1)
    seen_by = tl.where(visible, seen_by, 0)

    plane = tl.zeros([], tl.int64) + entries * slots * columns
    per_out = slots // out_heads
    for r in tl.static_range(COUNT):
        # written out each time: a constant may not be defined twice, as a loop would
        divisor = tl.full([KEYS], 1.0, tl.float32)
        if REDUCERS // 4**r % 4 == _MEAN:
            divisor = tl.zeros([KEYS], tl.float32) + tl.maximum(valid, 1).to(tl.float32)
        if REDUCERS // 4**r % 4 == _VISIBLE_MEAN:
            divisor = tl.maximum(seen_by, 1).to(tl.float32)
        if out_head == 0:
            tl.store(divisors + (r * entries + entry) * columns + first_k + column, divisor, mask=exists)
        result = tl.zeros([KEYS], tl.float32)
        largest = tl.full([KEYS], FIRST, tl.int32)
        best = tl.zeros([KEYS], tl.int32) + out_head * heads_per_out
        for slot in tl.range(out_head * per_out, (out_head + 1) * per_out):
            at = (entry * slots + slot) * columns + first_k + column
            if REDUCERS // 4**r % 4 == _MAX:
                top = tl.full([KEYS], FIRST, tl.int32)
                winner = tl.zeros([KEYS], tl.int32)
                for run in tl.range(0, runs):
                    found = tl.load(tops + run * plane + at, mask=exists, other=FIRST)
                    who = tl.load(winners + run * plane + at, mask=exists, other=0)
                    winner = tl.where(found > top, who, winner)
                    top = tl.maximum(top, found)
                value = tl.where(seen_by > 0, from_ordered(top), 0.0)
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
                ordered = to_ordered(value)
                best = tl.where(ordered > largest, slot, best)
                largest = tl.maximum(largest, ordered)
                result = from_ordered(largest)
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
            lse, bounds, dead = row_bounds(walk, lse_given, *window, scale)
        if logit:
            bounds = dead = None
        tile = walk.tiles("pairs" if pairs else "scores", maxima)
        table, _, total = walk.table(False, walk.columns, tile["KEYS"])
        owners = out_heads if pairs else walk.kv_heads
        runs = runs_of(total * owners, triton.cdiv(walk.queries, tile["ROWS"]))
        statistics = (runs, walk.batch, slots, walk.columns)
        sums = walk.new(*statistics) if set(reduces) != {"max"} else None
        tops, winners = (walk.new(*statistics, dtype=torch.int32) if maxima else None for _ in range(2))
        arguments = {
            **walk.common(), "bounds": bounds, "head_weights": head_weights, "sums": sums, "tops": tops,
            "winners": winners, "table": table, **walk.extents(True, 0, walk.queries, tile["ROWS"]),
            "weights_batch": walk.q_heads if head_weights is not None and head_weights.dim() == 2 else 0,
            "heads": owners, "start": walk.start, "columns": walk.columns, "runs": runs,
            "scale": scale if logit else scale * LOG2_E.value, "LOGIT": logit, **tile,
        }  # fmt: skip
        if pairs:
            arguments.update(kv_heads=walk.kv_heads // out_heads, HEADS=heads_by)
            _tiles.launch(attention_scores_pairs_kernel, total * owners * runs, arguments)
        else:
            arguments.update(dead=dead, PER_HEAD=per_head)
            _tiles.launch(attention_scores_kernel, total * owners * runs, arguments)
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
        _tiles.launch(attention_scores_finish_kernel, total * out_heads, arguments)
    return scores, lse, divisors, query_winners, head_winners
