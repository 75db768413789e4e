"""Triton kernels of neighbor_attention. Meaning: pyvtk/reference/attention.py; tables: pyvtk/plans.py.

Forward and dQ: a program takes some tokens of one query block, for some query heads that share a K/V head, and walks
the key blocks that its plan lists. dK/dV: a program takes some tokens of one key block and one K/V head, and walks the
query blocks that visit it, for all heads of the group. Every sum has one owner and a fixed order: no atomics, same
bits each time. Both walks are cut in two: full blocks first, without the predicate, then partial ones with it.

Rows are gathered by the numbers in a plan's slots; K and V are not repeated for the heads of a group, which lie beside
the tokens in the rows of a tile instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._tiles import (
    FIRST,
    LAST,
    LN_2,
    LOG2_E,
    SMALLEST,
    accumulate,
    in_units,
    load_rows,
    parts,
    products,
    store_rows,
    strides,
    sum_of_rows,
)

# of which Triton compiles no variants (_tiles.py)
NUMBERS = (
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "v_batch", "v_head", "v_row", "out_batch", "out_head",
    "out_row", "grad_batch", "grad_head", "grad_row", "query_rows", "key_rows", "query_length", "key_length", "heads",
    "regions", "radius_t", "radius_y", "radius_x",
)  # fmt: skip
INFINITE = 2**30
_FACTS: tl.constexpr = tl.constexpr(8)  # of a slot
# visual_heads: absent, off heads keep the mass of visual keys, off heads do not see them
NO_HEADS, KEEP, DROP = 0, 1, 2
_KEEP: tl.constexpr = tl.constexpr(KEEP)
_DROP: tl.constexpr = tl.constexpr(DROP)


# Parts of kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def _slots(slots, length, slot):
    """What stands in some slots of a sample: (row, image, t, y, x, position, region)."""
    row = tl.load(slots + slot)
    image = tl.load(slots + length + slot)
    t = tl.load(slots + 2 * length + slot)
    y = tl.load(slots + 3 * length + slot)
    x = tl.load(slots + 4 * length + slot)
    position = tl.load(slots + 5 * length + slot)
    region = tl.load(slots + 6 * length + slot)
    return row, image, t, y, x, position, region


@triton.jit
def _within(q, k, radius):
    """|q - k| <= radius in one unsigned comparison; the radius is added to what stands in rows, before the walk."""
    if q.shape[0] == 1:
        return ((k + radius) - q).to(tl.uint32) <= 2 * radius
    else:
        return (k - (q - radius)).to(tl.uint32) <= 2 * radius


@triton.jit
def _visible(
    q_image, q_t, q_y, q_x, q_position, q_region,  # [M, 1] or [1, M]
    k_image, k_t, k_y, k_x, k_position, k_region,  # [1, K] or [K, 1]
    routes, regions, radius_t, radius_y, radius_x,
    BOX_T: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr,
    ROUTES: tl.constexpr, CAUSAL_WINDOW: tl.constexpr, CROSS_IMAGE: tl.constexpr,
):  # fmt: skip
    """The one predicate of all plans. What is cheap is done on rows and columns, before they meet."""
    # an invalid token is later than every query, earlier than every key, and in no image
    earlier = tl.where(k_image >= -1, k_position, LAST) <= tl.where(q_image >= -1, q_position, FIRST)
    same_image = tl.where(k_image >= 0, k_image, -1) == tl.where(q_image >= 0, q_image, -2)
    inside = same_image
    if BOX_T:
        inside = inside & _within(q_t, k_t, radius_t)
    if BOX_Y:
        inside = inside & _within(q_y, k_y, radius_y)
    if BOX_X:
        inside = inside & _within(q_x, k_x, radius_x)
    if CAUSAL_WINDOW:
        inside = inside & earlier
    if ROUTES:
        inside = inside & (tl.load(routes + q_region.to(tl.int64) * regions + k_region, mask=inside, other=0) != 0)
    if CROSS_IMAGE:
        return inside | (earlier & (same_image == 0))
    else:
        return inside | (earlier & ((q_image < 0) | (k_image < 0)))


@triton.jit
def _query_tile(query_order, blocks, heads, GROUP: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_Q: tl.constexpr,
                HEADS: tl.constexpr, AGAIN: tl.constexpr):  # fmt: skip
    """This program's sample, query block, K/V head, and for every row of its tile the slot and the head of the group.

    Asked ``again`` after a walk, it reads them again: kept through the walk, they would cost registers (up to 50).
    """
    chunks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    # programs start in the order of their numbers: those of one block lie together, the heaviest block is first
    per_block = heads * chunks * tiles
    program = tl.program_id(0)
    entry = tl.load(query_order + program // per_block, volatile=AGAIN)
    rest = program % per_block
    row = tl.arange(0, TILE_Q * HEADS)
    batch, block = entry // blocks, entry % blocks
    slot = block * BLOCK_Q + (rest % tiles) * TILE_Q + row // HEADS
    member = (rest // tiles % chunks) * HEADS + row % HEADS
    return batch.to(tl.int64), block, rest // (tiles * chunks), slot, member


@triton.jit
def _key_tile(key_order, blocks, heads, BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, AGAIN: tl.constexpr):
    """This program's sample, key block, K/V head, and the slots of its tile."""
    tiles: tl.constexpr = BLOCK_K // TILE_K
    program = tl.program_id(0)
    entry = tl.load(key_order + program // (heads * tiles), volatile=AGAIN)
    batch, block = (entry // blocks).to(tl.int64), entry % blocks
    return batch, block, program // tiles % heads, block * BLOCK_K + (program % tiles) * TILE_K + tl.arange(0, TILE_K)


# Forward -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def neighbor_attention_kernel(
    q, k, v,  # [B, heads, rows, D]
    k_bias,  # [B, N] or None
    visual_heads,  # [Hq] or None
    out, lse,  # [B, Hq, M, D], [B, Hq, M]
    query_slots, key_slots, key_blocks, key_counts, query_order, routes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    query_rows, key_rows, query_length, key_length, heads, regions, radius_t, radius_y, radius_x, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, HEADS: tl.constexpr, TILE_K: tl.constexpr,
    BOX_T: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr, ROUTES: tl.constexpr, CAUSAL_WINDOW: tl.constexpr,
    CROSS_IMAGE: tl.constexpr, HEADS_OFF: tl.constexpr, ZERO_ROWS: tl.constexpr, NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k + k_bias) v with an online softmax in base 2; ``scale`` is |scale| * log2(e) here."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    v_batch, v_head, v_row = in_units(v_batch, v_head, v_row, UNIT)
    out_batch, out_head, out_row = in_units(out_batch, out_head, out_row, UNIT)
    blocks = query_length // BLOCK_Q
    batch, block, kv_head, slot, member = _query_tile(query_order, blocks, heads, GROUP, BLOCK_Q, TILE_Q, HEADS, False)
    facts = query_slots + batch * _FACTS * query_length
    row, q_image, q_t, q_y, q_x, q_position, q_region = _slots(facts, query_length, slot)
    head = kv_head * GROUP + member
    exists = (row >= 0) & (member < GROUP)
    active = exists & (q_image >= -1)
    if HEADS_OFF:
        off = tl.load(visual_heads + head, mask=member < GROUP, other=1) == 0
        if ZERO_ROWS:
            active = active & ((off & (q_image >= 0)) == 0)
    q_offset = head.to(tl.int64) * q_head + row.to(tl.int64) * q_row
    q1, q2 = load_rows(q + batch * q_batch, q_offset, active, D, D1, D2)
    if NEGATIVE:
        q1, q2 = -q1, -q2

    top = tl.full([TILE_Q * HEADS], float("-inf"), tl.float32)
    mass = tl.zeros([TILE_Q * HEADS], tl.float32)
    sums1 = tl.zeros([TILE_Q * HEADS, D1], tl.float32)
    sums2 = tl.zeros([TILE_Q * HEADS, D2 if D2 else 16], tl.float32)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    key_slots += batch * _FACTS * key_length
    key_count = key_length // BLOCK_K
    key_blocks += (batch * blocks + block) * key_count
    key_counts += (batch * blocks + block) * 2
    full, visited = tl.load(key_counts), tl.load(key_counts + 1)
    if ZERO_ROWS:
        visited = tl.where(tl.sum(active.to(tl.int32)) > 0, visited, 0)
        full = tl.minimum(full, visited)

    tiles: tl.constexpr = BLOCK_K // TILE_K
    for PARTIAL in tl.static_range(2):
        if PARTIAL:
            begin, end = full * tiles, visited * tiles
        else:
            begin, end = 0, full * tiles
        for step in tl.range(begin, end):
            k_slot = tl.load(key_blocks + step // tiles) * BLOCK_K + (step % tiles) * TILE_K + tl.arange(0, TILE_K)
            key, k_image, k_t, k_y, k_x, k_position, k_region = _slots(key_slots, key_length, k_slot)
            here = k_image >= -1
            k1, k2 = load_rows(k, key.to(tl.int64) * k_row, here, D, D1, D2)
            logits = products(q1, q2, k1, k2, D2, PRECISION)
            if k_bias is not None:
                bias = tl.load(k_bias + batch * key_rows + key, mask=here, other=0.0)
                logits = logits * scale + (bias * LOG2_E)[None, :]
            if PARTIAL:
                seen = _visible(
                    q_image[:, None], q_t[:, None], q_y[:, None], q_x[:, None], q_position[:, None], q_region[:, None],
                    k_image[None, :], k_t[None, :], k_y[None, :], k_x[None, :], k_position[None, :], k_region[None, :],
                    routes + batch * regions * regions, regions, radius_t, radius_y, radius_x,
                    BOX_T, BOX_Y, BOX_X, ROUTES, CAUSAL_WINDOW, CROSS_IMAGE,
                )  # fmt: skip
                logits = tl.where(seen, logits, float("-inf"))
            if HEADS_OFF == _DROP:
                logits = tl.where(off[:, None] & (k_image >= 0)[None, :], float("-inf"), logits)
            # |scale| is positive: the maximum may be taken before it, which saves a multiplication
            unit = scale if k_bias is None else 1.0
            new_top = tl.maximum(top, tl.max(logits, 1) * unit)
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(logits * unit - shift[:, None])
            keep = tl.exp2(top - shift)
            mass = mass * keep + tl.sum(p, 1)
            top = new_top
            if HEADS_OFF == _KEEP:
                p = tl.where(off[:, None] & (k_image >= 0)[None, :], 0.0, p)
            v1, v2 = load_rows(v, key.to(tl.int64) * v_row, here, D, D1, D2)
            sums1 = accumulate(p.to(v1.dtype), v1, sums1 * keep[:, None], PRECISION)
            if D2:
                sums2 = accumulate(p.to(v2.dtype), v2, sums2 * keep[:, None], PRECISION)

    # NaN is not blind: it stays
    blind = (active == 0) | (mass == 0)
    share = tl.where(blind, 0.0, 1 / mass)[:, None]
    sums1 = tl.where(blind[:, None], 0.0, sums1 * share)
    sums2 = tl.where(blind[:, None], 0.0, sums2 * share)
    batch, block, kv_head, slot, member = _query_tile(query_order, blocks, heads, GROUP, BLOCK_Q, TILE_Q, HEADS, True)
    head = kv_head * GROUP + member
    row = tl.load(query_slots + batch * _FACTS * query_length + slot, volatile=True)
    exists = (row >= 0) & (member < GROUP)
    out_offset = head.to(tl.int64) * out_head + row.to(tl.int64) * out_row
    store_rows(out + batch * out_batch, out_offset, exists, sums1, sums2, D, D1, D2)
    natural = tl.where(blind, float("-inf"), (top + tl.log2(mass)) * LN_2)
    tl.store(lse + (batch * heads * GROUP + head) * query_rows + row, natural, mask=exists)


# Backward ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def neighbor_attention_delta_kernel(
    grad_out, grad_lse, out, lse, delta,  # [B, Hq, M, D], [B, Hq, M] or None, [B, Hq, M, D], [B, Hq, M] twice
    grad_batch, grad_head, grad_row, out_batch, out_head, out_row, query_rows, heads,
    UNIT: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta = sum of grad_out * out - grad_lse, and 0 for rows that see nothing, whatever their gradients hold."""
    grad_batch, grad_head, grad_row = in_units(grad_batch, grad_head, grad_row, UNIT)
    out_batch, out_head, out_row = in_units(out_batch, out_head, out_row, UNIT)
    tiles = tl.cdiv(query_rows, ROWS)
    program = tl.program_id(0)
    row = (program % tiles) * ROWS + tl.arange(0, ROWS)
    head = (program // tiles % heads).to(tl.int64)
    batch = (program // tiles // heads).to(tl.int64)
    here = row < query_rows
    place = (batch * heads + head) * query_rows + row
    sees = tl.load(lse + place, mask=here, other=float("-inf")) != float("-inf")
    grad = grad_out + batch * grad_batch + head * grad_head
    grad1, grad2 = load_rows(grad, row.to(tl.int64) * grad_row, sees, D, D1, D2)
    out += batch * out_batch + head * out_head
    out1, out2 = load_rows(out, row.to(tl.int64) * out_row, sees, D, D1, D2)
    sums = sum_of_rows(grad1.to(tl.float32) * out1.to(tl.float32), D1)
    if D2:
        sums += sum_of_rows(grad2.to(tl.float32) * out2.to(tl.float32), D2)
    if grad_lse is not None:
        sums -= tl.load(grad_lse + place, mask=sees, other=0.0)
    tl.store(delta + place, sums, mask=here)


@triton.jit(do_not_specialize=NUMBERS)
def neighbor_attention_query_grad_kernel(
    q, k, v,  # [B, heads, rows, D]
    k_bias,  # [B, N] or None
    visual_heads,  # [Hq] or None
    grad_out, lse, delta,  # [B, Hq, M, D], [B, Hq, M] twice
    grad_q,  # [B, Hq, M, D], contiguous
    query_slots, key_slots, key_blocks, key_counts, query_order, routes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    query_rows, key_rows, query_length, key_length, heads, regions, radius_t, radius_y, radius_x, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, HEADS: tl.constexpr, TILE_K: tl.constexpr,
    BOX_T: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr, ROUTES: tl.constexpr, CAUSAL_WINDOW: tl.constexpr,
    CROSS_IMAGE: tl.constexpr, HEADS_OFF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q = scale * dz k with dz = p * (grad_out v - delta); the same walk as the forward."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    v_batch, v_head, v_row = in_units(v_batch, v_head, v_row, UNIT)
    grad_batch, grad_head, grad_row = in_units(grad_batch, grad_head, grad_row, UNIT)
    blocks = query_length // BLOCK_Q
    batch, block, kv_head, slot, member = _query_tile(query_order, blocks, heads, GROUP, BLOCK_Q, TILE_Q, HEADS, False)
    facts = query_slots + batch * _FACTS * query_length
    row, q_image, q_t, q_y, q_x, q_position, q_region = _slots(facts, query_length, slot)
    head = kv_head * GROUP + member
    exists = (row >= 0) & (member < GROUP)
    place = (batch * heads * GROUP + head) * query_rows + row
    bound = tl.load(lse + place, mask=exists, other=float("-inf"))
    # blind, invalid and switched-off rows all have lse = -inf; they get p = exp2(-inf) = 0
    active = bound != float("-inf")
    bound = tl.where(active, bound * LOG2_E, float("inf"))
    delta_row = tl.load(delta + place, mask=exists, other=0.0)
    if HEADS_OFF:
        off = tl.load(visual_heads + head, mask=member < GROUP, other=1) == 0
    wide = row.to(tl.int64)
    q1, q2 = load_rows(q + batch * q_batch, head.to(tl.int64) * q_head + wide * q_row, active, D, D1, D2)
    grad1, grad2 = load_rows(
        grad_out + batch * grad_batch, head.to(tl.int64) * grad_head + wide * grad_row, active, D, D1, D2
    )

    sums1 = tl.zeros([TILE_Q * HEADS, D1], tl.float32)
    sums2 = tl.zeros([TILE_Q * HEADS, D2 if D2 else 16], tl.float32)
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    key_slots += batch * _FACTS * key_length
    key_count = key_length // BLOCK_K
    key_blocks += (batch * blocks + block) * key_count
    key_counts += (batch * blocks + block) * 2
    full, visited = tl.load(key_counts), tl.load(key_counts + 1)

    tiles: tl.constexpr = BLOCK_K // TILE_K
    for PARTIAL in tl.static_range(2):
        if PARTIAL:
            begin, end = full * tiles, visited * tiles
        else:
            begin, end = 0, full * tiles
        for step in tl.range(begin, end):
            k_slot = tl.load(key_blocks + step // tiles) * BLOCK_K + (step % tiles) * TILE_K + tl.arange(0, TILE_K)
            key, k_image, k_t, k_y, k_x, k_position, k_region = _slots(key_slots, key_length, k_slot)
            here = k_image >= -1
            k1, k2 = load_rows(k, key.to(tl.int64) * k_row, here, D, D1, D2)
            v1, v2 = load_rows(v, key.to(tl.int64) * v_row, here, D, D1, D2)
            logits = products(q1, q2, k1, k2, D2, PRECISION) * scale
            if k_bias is not None:
                bias = tl.load(k_bias + batch * key_rows + key, mask=here, other=0.0)
                logits += (bias * LOG2_E)[None, :]
            p = tl.exp2(logits - bound[:, None])
            if PARTIAL:
                seen = _visible(
                    q_image[:, None], q_t[:, None], q_y[:, None], q_x[:, None], q_position[:, None], q_region[:, None],
                    k_image[None, :], k_t[None, :], k_y[None, :], k_x[None, :], k_position[None, :], k_region[None, :],
                    routes + batch * regions * regions, regions, radius_t, radius_y, radius_x,
                    BOX_T, BOX_Y, BOX_X, ROUTES, CAUSAL_WINDOW, CROSS_IMAGE,
                )  # fmt: skip
                p = tl.where(seen, p, 0.0)
            grad_p = products(grad1, grad2, v1, v2, D2, PRECISION)
            if HEADS_OFF == _DROP:
                p = tl.where(off[:, None] & (k_image >= 0)[None, :], 0.0, p)
            if HEADS_OFF == _KEEP:
                grad_p = tl.where(off[:, None] & (k_image >= 0)[None, :], 0.0, grad_p)
            grad_z = (p * (grad_p - delta_row[:, None])).to(k1.dtype)
            sums1 = accumulate(grad_z, k1, sums1, PRECISION)
            if D2:
                sums2 = accumulate(grad_z, k2, sums2, PRECISION)

    batch, block, kv_head, slot, member = _query_tile(query_order, blocks, heads, GROUP, BLOCK_Q, TILE_Q, HEADS, True)
    head = kv_head * GROUP + member
    row = tl.load(query_slots + batch * _FACTS * query_length + slot, volatile=True)
    exists = (row >= 0) & (member < GROUP)
    place = (batch * heads * GROUP + head) * query_rows + row
    factor = scale * LN_2
    store_rows(grad_q, place * D, exists, sums1 * factor, sums2 * factor, D, D1, D2)


@triton.jit(do_not_specialize=NUMBERS)
def neighbor_attention_key_grad_kernel(
    q, k, v,  # [B, heads, rows, D]
    k_bias,  # [B, N] or None
    visual_heads,  # [Hq] or None
    grad_out, lse, delta,  # [B, Hq, M, D], [B, Hq, M] twice
    grad_k, grad_v,  # [B, Hkv, N, D], contiguous
    grad_k_bias,  # [B, Hkv, N] or None: one sum per K/V head
    query_slots, key_slots, query_blocks, query_counts, key_order, routes,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    query_rows, key_rows, query_length, key_length, heads, regions, radius_t, radius_y, radius_x, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, HEADS: tl.constexpr, TILE_K: tl.constexpr,
    BOX_T: tl.constexpr, BOX_Y: tl.constexpr, BOX_X: tl.constexpr, ROUTES: tl.constexpr, CAUSAL_WINDOW: tl.constexpr,
    CROSS_IMAGE: tl.constexpr, HEADS_OFF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k = scale * dz^T q, grad_v = p^T grad_out, grad_k_bias = the sums of dz; tiles stand as [keys, queries]."""
    q_batch, q_head, q_row = in_units(q_batch, q_head, q_row, UNIT)
    k_batch, k_head, k_row = in_units(k_batch, k_head, k_row, UNIT)
    v_batch, v_head, v_row = in_units(v_batch, v_head, v_row, UNIT)
    grad_batch, grad_head, grad_row = in_units(grad_batch, grad_head, grad_row, UNIT)
    count = key_length // BLOCK_K
    batch, block, kv_head, k_slot = _key_tile(key_order, count, heads, BLOCK_K, TILE_K, False)
    facts = key_slots + batch * _FACTS * key_length
    key, k_image, k_t, k_y, k_x, k_position, k_region = _slots(facts, key_length, k_slot)
    here = k_image >= -1
    wide = key.to(tl.int64)
    k1, k2 = load_rows(k + batch * k_batch + kv_head.to(tl.int64) * k_head, wide * k_row, here, D, D1, D2)
    v1, v2 = load_rows(v + batch * v_batch + kv_head.to(tl.int64) * v_head, wide * v_row, here, D, D1, D2)

    grad_k1 = tl.zeros([TILE_K, D1], tl.float32)
    grad_v1 = tl.zeros([TILE_K, D1], tl.float32)
    grad_k2 = tl.zeros([TILE_K, D2 if D2 else 16], tl.float32)
    grad_v2 = tl.zeros([TILE_K, D2 if D2 else 16], tl.float32)
    if k_bias is not None:
        bias = tl.load(k_bias + batch * key_rows + key, mask=here, other=0.0) * LOG2_E
        grad_bias = tl.zeros([TILE_K], tl.float32)
    q += batch * q_batch
    grad_out += batch * grad_batch
    lse += batch * heads * GROUP * query_rows
    delta += batch * heads * GROUP * query_rows
    query_slots += batch * _FACTS * query_length
    query_blocks += (batch * count + block) * (query_length // BLOCK_Q)
    query_counts += (batch * count + block) * 2
    full, visited = tl.load(query_counts), tl.load(query_counts + 1)
    m = tl.arange(0, TILE_Q * HEADS)

    chunks: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    for PARTIAL in tl.static_range(2):
        if PARTIAL:
            begin, end = full * tiles * chunks, visited * tiles * chunks
        else:
            begin, end = 0, full * tiles * chunks
        for step in tl.range(begin, end):
            slot = tl.load(query_blocks + step // (tiles * chunks)) * BLOCK_Q + (step % tiles) * TILE_Q + m // HEADS
            row, q_image, q_t, q_y, q_x, q_position, q_region = _slots(query_slots, query_length, slot)
            member = (step // tiles % chunks) * HEADS + m % HEADS
            head = kv_head * GROUP + member
            place = head.to(tl.int64) * query_rows + row
            # lse is -inf where a row sees nothing, padding too; such rows may hold NaN, and so may their gradients
            bound = tl.load(lse + place, mask=(row >= 0) & (member < GROUP), other=float("-inf")) * LOG2_E
            active = bound != float("-inf")
            wide_row, wide_head = row.to(tl.int64), head.to(tl.int64)
            q1, q2 = load_rows(q, wide_head * q_head + wide_row * q_row, active, D, D1, D2)
            grad1, grad2 = load_rows(grad_out, wide_head * grad_head + wide_row * grad_row, active, D, D1, D2)
            bound = tl.where(active, bound, float("inf"))  # p = exp2(-inf) = 0
            delta_row = tl.load(delta + place, mask=active, other=0.0)
            if PARTIAL:
                seen = _visible(
                    q_image[None, :], q_t[None, :], q_y[None, :], q_x[None, :], q_position[None, :], q_region[None, :],
                    k_image[:, None], k_t[:, None], k_y[:, None], k_x[:, None], k_position[:, None], k_region[:, None],
                    routes + batch * regions * regions, regions, radius_t, radius_y, radius_x,
                    BOX_T, BOX_Y, BOX_X, ROUTES, CAUSAL_WINDOW, CROSS_IMAGE,
                )  # fmt: skip
            logits = products(k1, k2, q1, q2, D2, PRECISION) * scale
            if k_bias is not None:
                logits += bias[:, None]
            p = tl.exp2(logits - bound[None, :])
            if PARTIAL:
                p = tl.where(seen, p, 0.0)
            grad_p = products(v1, v2, grad1, grad2, D2, PRECISION)
            used = p
            if HEADS_OFF:
                off = tl.load(visual_heads + head, mask=member < GROUP, other=1) == 0
                unused = off[None, :] & (k_image >= 0)[:, None]
                used = tl.where(unused, 0.0, p)
                if HEADS_OFF == _DROP:
                    p = used
                else:
                    grad_p = tl.where(unused, 0.0, grad_p)
            grad_v1 = accumulate(used.to(grad1.dtype), grad1, grad_v1, PRECISION)
            grad_z = p * (grad_p - delta_row[None, :])
            if k_bias is not None:
                grad_bias += tl.sum(grad_z, 1)
            grad_z = grad_z.to(q1.dtype)
            grad_k1 = accumulate(grad_z, q1, grad_k1, PRECISION)
            if D2:
                grad_v2 = accumulate(used.to(grad1.dtype), grad2, grad_v2, PRECISION)
                grad_k2 = accumulate(grad_z, q2, grad_k2, PRECISION)

    factor = scale * LN_2
    batch, block, kv_head, k_slot = _key_tile(key_order, count, heads, BLOCK_K, TILE_K, True)
    key = tl.load(key_slots + batch * _FACTS * key_length + k_slot, volatile=True)
    place = (batch * heads + kv_head) * key_rows + key
    store_rows(grad_k, place * D, key >= 0, grad_k1 * factor, grad_k2 * factor, D, D1, D2)
    store_rows(grad_v, place * D, key >= 0, grad_v1, grad_v2, D, D1, D2)
    if k_bias is not None:
        tl.store(grad_k_bias + place, grad_bias, mask=key >= 0)


# Launchers -----------------------------------------------------------------------------------------------------------


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, group: int, block_q: int, block_k: int,
          capability: tuple[int, int]) -> dict[str, int]:  # fmt: skip
    """Tile of a program, found by compiling (.ci/check_triton.py): as large as registers allow without spilling.

    The facts of columns, which the predicate compares, take 6 registers a column and thread; so do the splits that
    float32 in tensor cores needs. Both cost more than shared memory, which limits only devices with 99 KiB.

    Args:
        kernel: "forward", "query_grad" or "key_grad".
        group: query heads per K/V head.
        block_q, block_k: tokens of a plan's blocks; tiles divide them.
        capability: of the device.

    Returns:
        TILE_Q tokens times HEADS heads of a group make the query rows of a tile, TILE_K tokens its keys; D1 and D2 are
        the parts of the head dimension.
    """
    single, wide = dtype == torch.float32, head_dim > 128
    # devices whose products read shared memory by themselves, given tiles of 64 rows, and whose pipelines begin a
    # stage later for it; the others need two stages more before a row's copy overlaps with work
    large = capability[0] in (9, 10)
    stages = 3 if large or single or wide else 5
    warps = 8 if wide else 4
    if kernel == "forward":
        rows, keys = (64, 64) if not wide else (64, 32)
        if single:
            # of 256 channels, 32 rows would need more than the 99 KiB that some devices have
            rows = 16 if wide and not large else 32
            keys, warps = 32 if head_dim <= 80 else 16, 8 if head_dim > 64 else 4
        elif not wide and (group % 2 == 0 or block_q >= 128):
            rows, keys, warps = 128, 64 if large else 32, 8  # two heads share what is loaded
        elif not wide and capability[0] == 9:
            # measured on an H200, D=128: two stages take 4 to 5 % less than three or four, which copy nothing earlier
            # (the lists of keys take them); with five, one program fits a multiprocessor: 1.5 times as long
            stages = 2
    elif kernel == "query_grad":
        rows, keys = (64, 64 if large else 32) if not wide else (32, 32)
        if capability[0] == 12 and not wide:
            stages = min(stages, 4)  # a fifth one spills
        if single:
            rows, keys = 16, 16
    else:
        rows, keys = (32, 64) if not wide else (32, 32)
        if 80 < head_dim <= 128 and capability[0] != 10:
            rows, keys = (16, 64) if large else (32, 32)
        if not large and not single and not wide:
            stages = 4  # a fifth one costs registers that there are not
            if capability[0] == 12 and 64 < head_dim <= 80:
                rows, stages = 16, 1  # more of either spills
        if single:
            rows, keys = (32, 32) if head_dim <= 64 else (16, 16)
            # what fits the registers, found by compiling
            stages, warps = (1, warps) if capability[0] >= 10 else (2, 8)
    tile_q, tile_k = min(block_q, rows), min(block_k, keys)
    heads = min(triton.next_power_of_2(group), rows // tile_q)
    # products by warp: columns beyond the rows would be split over warps, and rows' maxima with them
    left = tile_k if kernel == "key_grad" else tile_q * heads
    first, second = parts(head_dim, 256 if large and left >= 64 else max(left, 64))
    if single and second:  # thin parts in three products spill by the hundred
        second = first
    return {
        "TILE_Q": tile_q, "HEADS": heads, "TILE_K": tile_k, "D1": first, "D2": second, "num_warps": warps,
        "num_stages": stages,
    }  # fmt: skip


def _common(kernel: str, q, k, v, k_bias, visual_heads, plan, rule, keep_mass, **others: Tensor) -> dict:
    """Arguments that the three walks share, and the strides of ``others``."""
    query_slots, key_slots, routes = plan[0], plan[1], plan[8]
    block_q, block_k, radius_t, radius_y, radius_x, causal_window, cross_image = rule
    head_dim, heads = q.shape[3], k.shape[1]
    capability = _tiles.capability(q)
    return {
        "q": q, "k": k, "v": v, "k_bias": k_bias,
        "visual_heads": None if visual_heads is None else visual_heads.contiguous().view(torch.uint8),
        "query_slots": query_slots, "key_slots": key_slots, "routes": routes,
        **strides(q=q, k=k, v=v, **others), "query_rows": q.shape[2], "key_rows": k.shape[2],
        "query_length": query_slots.shape[2], "key_length": key_slots.shape[2], "heads": heads,
        "regions": routes.shape[1], "radius_t": radius_t, "radius_y": radius_y, "radius_x": radius_x,
        "GROUP": q.shape[1] // heads, "D": head_dim, "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "BOX_T": radius_t < INFINITE, "BOX_Y": radius_y < INFINITE, "BOX_X": radius_x < INFINITE,
        "ROUTES": routes.shape[1] > 0, "CAUSAL_WINDOW": bool(causal_window), "CROSS_IMAGE": bool(cross_image),
        "HEADS_OFF": NO_HEADS if visual_heads is None else KEEP if keep_mass else DROP,
        "PRECISION": _tiles.precision(capability),
        **tiles(kernel, head_dim, q.dtype, q.shape[1] // heads, block_q, block_k, capability),
    }  # fmt: skip


def _shown(k: Tensor, v: Tensor, k_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """k and v without what stands in keys that a bias of -inf hides: adding that to NaN leaves NaN. The kernels have no
    register left for it, so it takes a pass over both where there is a bias."""
    if k_bias is None:
        return k, v
    hidden = (k_bias == float("-inf"))[:, None, :, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


def _query_programs(query_order: Tensor, arguments: dict) -> int:
    chunks = triton.cdiv(arguments["GROUP"], arguments["HEADS"])
    return query_order.numel() * arguments["heads"] * chunks * (arguments["BLOCK_Q"] // arguments["TILE_Q"])


def neighbor_attention(q, k, v, k_bias, visual_heads, plan, rule, scale, keep_mass, zero_rows):
    """Arguments as the operator has them; they were checked on the page."""
    batch, heads, rows, head_dim = q.shape
    k, v = _shown(k, v, k_bias)
    if q.stride(1) < q.stride(2):
        out = q.new_empty(batch, rows, heads, head_dim).transpose(1, 2)
    else:
        out = q.new_empty(batch, heads, rows, head_dim)
    lse = q.new_empty(batch, heads, rows, dtype=torch.float32)
    arguments = {
        **_common("forward", q, k, v, k_bias, visual_heads, plan, rule, keep_mass, out=out), "out": out, "lse": lse,
        "key_blocks": plan[2], "key_counts": plan[3], "query_order": plan[4],
        "scale": max(abs(scale) * LOG2_E.value, SMALLEST), "NEGATIVE": scale < 0,
        "ZERO_ROWS": zero_rows and visual_heads is not None,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        _tiles.launch(neighbor_attention_kernel, _query_programs(plan[4], arguments), arguments)
    return out, lse


def neighbor_attention_backward(
    grad_out, grad_lse, q, k, v, k_bias, visual_heads, out, lse, plan, rule, scale, keep_mass, zero_rows
):
    """Arguments as the operator has them. Rows that ``zero_rows`` switched off have lse = -inf, which says it all."""
    batch, heads, rows, head_dim = q.shape
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    k, v = _shown(k, v, k_bias)
    bias_parts = None if k_bias is None else k_bias.new_empty(batch, k.shape[1], k.shape[2])
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    tile = 64
    if grad_out is None:
        grad_out = q.new_zeros(head_dim).expand(q.shape)
    with torch.cuda.device_of(q):
        first, second = parts(head_dim)
        arguments = {
            "grad_out": grad_out, "grad_lse": None if grad_lse is None else grad_lse.contiguous(), "out": out,
            "lse": lse, "delta": delta, **strides(grad=grad_out, out=out), "query_rows": rows, "heads": heads,
            "D": head_dim, "D1": first, "D2": second, "ROWS": tile, "num_warps": 4, "enable_fp_fusion": False,
        }  # fmt: skip
        _tiles.launch(neighbor_attention_delta_kernel, batch * heads * triton.cdiv(rows, tile), arguments)
        walk = (q, k, v, k_bias, visual_heads, plan, rule, keep_mass)
        shared = {"grad_out": grad_out, "lse": lse, "delta": delta, "scale": scale * LOG2_E.value}
        arguments = {
            **_common("query_grad", *walk, grad=grad_out), **shared, "grad_q": grad_q,
            "key_blocks": plan[2], "key_counts": plan[3], "query_order": plan[4],
        }  # fmt: skip
        _tiles.launch(neighbor_attention_query_grad_kernel, _query_programs(plan[4], arguments), arguments)
        arguments = {
            **_common("key_grad", *walk, grad=grad_out), **shared,
            "grad_k": grad_k, "grad_v": grad_v, "grad_k_bias": bias_parts,
            "query_blocks": plan[5], "query_counts": plan[6], "key_order": plan[7],
        }  # fmt: skip
        programs = plan[7].numel() * k.shape[1] * (arguments["BLOCK_K"] // arguments["TILE_K"])
        _tiles.launch(neighbor_attention_key_grad_kernel, programs, arguments)
    grad_bias = lse.new_empty(0) if bias_parts is None else bias_parts.sum(1)
    return grad_q, grad_k, grad_v, grad_bias
