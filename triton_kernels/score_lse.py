"""Triton kernels of attention_scores' denominator: lse of every row, and what exp2 subtracts. Walks: score.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._tiles import LN_2, LOG2_E, SMALLEST, in_units, load_rows, products
from .score_walk import NUMBERS, Walk, keys_of, padded, positions_at, row_tile, runs_of, sample_at, work_of


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_lse_kernel(
    q, k, q_mask, k_mask, q_positions, k_positions, k_bias,  # [B, heads, tokens, D] twice, [B, tokens] or None
    tops, masses,  # [runs, B, Hq, M]
    table, cu_q, cu_k, extents, extent_first,
    q_batch, q_head, q_row, k_batch, k_head, k_row, batch, queries, keys, heads, start, window, total, runs, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, NEGATIVE: tl.constexpr, D: tl.constexpr,
    D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Largest logit of a row and the sum of exp2 relative to it, over a run of keys; ``scale`` > 0, in base 2."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    program = tl.program_id(0)
    run, head = program % runs, program // runs % heads
    sample, tile = work_of(program // runs // heads, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    if table is not None:
        window = count
    else:
        tile = tl.cdiv(queries, ROWS) - 1 - tile  # the rows that see most are begun first
    POSITIONS: tl.constexpr = q_positions is not None or k_positions is not None
    row_place = entry * queries + first_q
    row, exists, valid, row_at = row_tile(tile, q_mask, q_positions, row_place, rows, count - rows, ROWS)
    full, end = keys_of(
        tile, valid, row_at, rows, start, window, count - rows, extents, extent_first, sample, total,
        CAUSAL, POSITIONS, ROWS, KEYS,
    )  # fmt: skip
    length = tl.cdiv(end, runs)
    run_begin = tl.minimum(run * length, end)
    run_end = tl.minimum(run_begin + length, end)
    if k_mask is not None:
        full = 0
    q += entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
    q1, q2 = load_rows(q, row.to(tl.int64) * q_row, valid, D, D1, D2)
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
            k1, k2 = load_rows(k + step * hop, offset, here, D, D1, D2)
            logits = products(q1, q2, k1, k2, D2, PRECISION)
            if k_bias is not None:
                bias = tl.load(k_bias + key_place + number, mask=here, other=0.0)
                logits = logits * scale + (bias * LOG2_E)[None, :]
            if MASKED:
                seen = here[None, :]
                if CAUSAL:
                    key_at = positions_at(k_positions, key_place, number, here, start)
                    seen = seen & (key_at[None, :] <= row_at[:, None])
                logits = tl.where(seen, logits, float("-inf"))
            # scale is positive: the maximum may be taken before it, which saves a multiplication
            unit = scale if k_bias is None else 1.0
            new_top = tl.maximum(top, tl.max(logits, 1) * unit)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            mass = mass * tl.exp2(top - shift) + tl.sum(tl.exp2(logits * unit - shift[:, None]), 1)
            top = new_top
    to = ((run * (batch if table is None else 1) + entry) * heads + head) * queries + first_q + row
    tl.store(tops + to, tl.where(valid, top, float("-inf")), mask=exists)
    tl.store(masses + to, tl.where(valid, mass, 0.0), mask=exists)


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_bounds_kernel(
    tops, masses, lse_given, q_mask,  # [runs, B, Hq, M] twice, [B, Hq, M] or None, [B, M] or None
    lse, bounds, dead,  # [B, Hq, M], [B, Hq, padded(M)], [B, Hq] or None
    queries, heads, rows_in_all, runs, ROWS: tl.constexpr,
):  # fmt: skip
    """lse of a row, and its bound; with a given lse also whether the head has a dead row."""
    program = tl.program_id(0).to(tl.int64)
    any_dead = tl.zeros([ROWS], tl.int32)
    line = padded(queries)
    for some in tl.range(0, line, ROWS):
        row = some + tl.arange(0, ROWS)
        here = row < queries
        valid = here
        if q_mask is not None:
            valid = valid & (tl.load(q_mask + program // heads * queries + row, mask=here, other=0) != 0)
        place = program * queries + row
        if lse_given is not None:
            natural = tl.load(lse_given + place, mask=valid, other=float("-inf"))
            bound = natural * LOG2_E
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
            natural = bound * LN_2
        blind = natural == float("-inf")
        tl.store(lse + place, natural, mask=here)
        tl.store(bounds + program * line + row, tl.where(blind, float("inf"), bound), mask=row < line)
        any_dead = any_dead | (here & blind).to(tl.int32)
    if dead is not None:
        tl.store(dead + program, tl.max(any_dead))


# Launcher ------------------------------------------------------------------------------------------------------------


def row_bounds(walk: Walk, lse_given: Tensor | None, start: int, window: int, scale: float) -> tuple:
    """lse, bounds and dead heads of all rows; the denominator is that of ``window`` keys from ``start`` on."""
    shape = (walk.batch, walk.q_heads, walk.queries)
    lse = walk.q.new_empty(shape, dtype=torch.float32)
    bounds = walk.q.new_empty((*shape[:2], triton.cdiv(walk.queries, 16) * 16), dtype=torch.float32)
    tops = masses = dead = None
    runs, rows = 1, walk.batch * walk.q_heads * walk.queries
    if lse_given is None:
        tile = walk.tiles("lse")
        table, _, total = walk.table(True, walk.queries, tile["ROWS"])
        runs = runs_of(total * walk.q_heads, triton.cdiv(window, tile["KEYS"]))
        tops, masses = (walk.new(runs, *shape) for _ in range(2))
        if walk.packed:
            tops.fill_(float("-inf"))
        arguments = {
            **walk.common(), "tops": tops, "masses": masses, "table": table, "heads": walk.q_heads, "start": start,
            "window": window, **walk.extents(False, start, window, tile["KEYS"]), "runs": runs,
            "scale": max(abs(scale) * LOG2_E.value, SMALLEST), "NEGATIVE": scale < 0, **tile,
        }  # fmt: skip
        _tiles.launch(attention_scores_lse_kernel, total * walk.q_heads * runs, arguments)
    elif walk.q_mask is None:
        dead = walk.q.new_empty(shape[:2], dtype=torch.int32)
    arguments = {
        "tops": tops, "masses": masses, "lse_given": lse_given, "q_mask": walk.q_mask, "lse": lse,
        "bounds": bounds, "dead": dead, "queries": walk.queries, "heads": walk.q_heads, "rows_in_all": rows,
        "runs": runs, "ROWS": 1024, "num_warps": 4,
    }  # fmt: skip
    _tiles.launch(attention_scores_bounds_kernel, walk.batch * walk.q_heads, arguments)
    return lse, bounds, dead
