"""What a plan is made of, in plain torch: tokens in slots, blocks of slots, and which blocks meet.

Facts are int32 [batch, 8, rows] (row, image, t, y, x, position, region, sample), in the order of rows; ``curve`` is
int64 [keys, batch, rows], what visual tokens of one image sort by. See :mod:`pyvtk.plans`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROW, IMAGE, T, Y, X, POSITION, REGION, SAMPLE = range(8)
TEXT, INVALID = -1, -2
_LOW, _HIGH = -(2**31), 2**31 - 1


def filled(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 [values], written on the device: for a copy of ``torch.tensor(values)`` the host would wait."""
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in values])


def _sorted_by(keys: list[Tensor]) -> Tensor:
    """int64 [batch, rows]: rows in the order of the keys, the first one most important."""
    order = keys[-1].argsort(dim=1, stable=True)
    for key in keys[-2::-1]:
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    return order


def _slots(facts: Tensor, curve: Tensor, cu_seqlens: Tensor | None, block: int) -> Tensor:
    """Facts in the plan's order [batch, 8, slots]: images first, each along its curve, then text by position, then what
    is invalid; packed samples begin at block boundaries."""
    image = facts[:, IMAGE].long()
    kind = torch.where(image >= 0, image, 2**31 + (image == INVALID).long())  # text after every image
    kind = kind + (facts[:, SAMPLE].long() << 33)
    keys = [torch.where(image >= 0, key, facts[:, POSITION].long()) for key in curve]
    order = _sorted_by([kind, *keys])
    batch, _, rows = facts.shape
    place = torch.arange(rows, device=facts.device)
    if cu_seqlens is None:
        slots = -(-rows // block) * block
    else:
        samples = cu_seqlens.shape[0]  # what follows the last sample is one more
        slots = (rows // block + samples) * block
        ends = torch.cat([cu_seqlens[1:].long(), cu_seqlens.new_full((1,), rows, dtype=torch.int64)])
        lengths = ends.diff(prepend=ends.new_zeros(1))
        starts = ((lengths + block - 1) // block * block).cumsum(0)
        shift = (starts - (lengths + block - 1) // block * block) - (ends - lengths)
        # the sample of a row is that of its place, since samples are the first thing to sort by
        place = place + shift[facts[0, SAMPLE].long()]
    empty = filled((-1, INVALID, 0, 0, 0, 0, 0, -1), facts.device).to(torch.int32)
    result = empty[:, None].expand(batch, 8, slots).contiguous()
    where = place.expand(batch, 8, rows)
    return result.scatter(2, where, facts.gather(2, order[:, None].expand(-1, 8, -1)))


class _Boxes(NamedTuple):
    """What is known of every block: [batch, blocks], or [batch, 4, blocks] for (image, t, y, x)."""

    low: Tensor  # of visual tokens
    high: Tensor
    visual_first: Tensor  # positions of visual tokens
    visual_last: Tensor
    text_first: Tensor
    text_last: Tensor
    all_valid: Tensor
    sample: Tensor
    regions: Tensor | None  # float [batch, blocks, regions]: whether any visual token is of this region


def _boxes(slots: Tensor, block: int, regions: int) -> _Boxes:
    slots = slots.unflatten(2, (-1, block))
    image, position = slots[:, IMAGE], slots[:, POSITION]
    visual, text = image >= 0, image == TEXT

    def least(values: Tensor, among: Tensor) -> Tensor:
        return torch.where(among, values, _HIGH).amin(-1)

    def most(values: Tensor, among: Tensor) -> Tensor:
        return torch.where(among, values, _LOW).amax(-1)

    place = slots[:, IMAGE : X + 1]
    membership = None
    if regions:
        region = torch.where(visual, slots[:, REGION], regions).long()
        membership = torch.zeros((*region.shape[:2], regions + 1), dtype=torch.float32, device=slots.device)
        membership = membership.scatter(2, region, 1.0)[..., :regions]
    return _Boxes(
        least(place, visual[:, None]), most(place, visual[:, None]), least(position, visual), most(position, visual),
        least(position, text), most(position, text), (image >= TEXT).all(-1), slots[:, SAMPLE].amax(-1), membership,
    )  # fmt: skip


def _meetings(q: _Boxes, k: _Boxes, routes: Tensor, radius, causal_window: bool, cross_image: bool):
    """bool [batch, query blocks, key blocks], twice: whether a pair may be visible, and whether all pairs are."""

    def rows(values: Tensor) -> Tensor:
        return values[..., :, None]

    def columns(values: Tensor) -> Tensor:
        return values[..., None, :]

    def earlier(keys: Tensor, queries: Tensor) -> Tensor:
        return (columns(keys) <= rows(queries)) & (columns(keys) != _HIGH) & (rows(queries) != _LOW)

    # Every axis on its own, comparing with bounds widened per block: no arithmetic on [query blocks, key blocks].
    near = inside = None
    for axis, limit in enumerate((0, *radius)):
        q_low, q_high = q.low[:, axis].long(), q.high[:, axis].long()
        k_low, k_high = k.low[:, axis].long(), k.high[:, axis].long()
        touches = (columns(k_low) <= rows(q_high + limit)) & (columns(k_high) >= rows(q_low - limit))
        covered = (columns(k_high) <= rows(q_low + limit)) & (columns(k_low) >= rows(q_high - limit))
        near = touches if near is None else near & touches
        inside = covered if inside is None else inside & covered
    if causal_window:
        near = near & earlier(k.visual_first, q.visual_last)
        inside = inside & (columns(k.visual_last) <= rows(q.visual_first))
    if q.regions is not None:
        reached = q.regions @ routes.to(q.regions.dtype)
        near = near & (reached @ k.regions.mT > 0)
        missed = q.regions @ (1 - routes.to(q.regions.dtype))
        inside = inside & (missed @ k.regions.mT == 0)
    if cross_image:
        q_one, k_one = (torch.where(box.low[:, 0] == box.high[:, 0], box.low[:, 0], -1) for box in (q, k))
        same = (rows(q_one) == columns(k_one)) & (rows(q_one) >= 0)
        near = near | (~same & earlier(k.visual_first, q.visual_last))

    q_visual, k_visual = rows(q.visual_last != _LOW), columns(k.visual_last != _LOW)
    q_text, k_text = rows(q.text_last != _LOW), columns(k.text_last != _LOW)
    some = near & q_visual & k_visual
    some = some | earlier(k.text_first, q.text_last) | earlier(k.text_first, q.visual_last)
    some = some | earlier(k.visual_first, q.text_last)
    # Everything visible: visual meets visual inside the rule, and whatever involves text is later than all its keys.
    every = inside | ~q_visual | ~k_visual
    every = every & (~(q_text & k_text) | (columns(k.text_last) <= rows(q.text_first)))
    every = every & (~(q_text & k_visual) | (columns(k.visual_last) <= rows(q.text_first)))
    every = every & (~(q_visual & k_text) | (columns(k.text_last) <= rows(q.visual_first)))
    some = some & (rows(q.sample) == columns(k.sample))
    return some, some & every & columns(k.all_valid)


def _table(some: Tensor, every: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blocks that each row of ``some`` [batch, rows, columns] visits, their counts, and the order of rows."""
    batch, rows, columns = some.shape
    partial = some & ~every
    num_full, num_partial = every.sum(-1, dtype=torch.int32), partial.sum(-1, dtype=torch.int32)
    full_place = every.cumsum(-1, dtype=torch.int32) - 1
    place = torch.where(every, full_place, partial.cumsum(-1, dtype=torch.int32) + (num_full[..., None] - 1))
    place = torch.where(some, place, columns).long()
    number = torch.arange(columns, dtype=torch.int32, device=some.device).expand(some.shape)
    blocks = number.new_full((batch, rows, columns + 1), -1).scatter(2, place, number)[..., :columns].contiguous()
    counts = torch.stack([num_full, num_full + num_partial], -1)
    order = counts[..., 1].flatten().argsort(dim=0, descending=True, stable=True).to(torch.int32)
    return blocks, counts, order


def attention_plan(
    query_facts: Tensor, key_facts: Tensor, query_curve: Tensor, key_curve: Tensor, cu_seqlens: Tensor | None,
    routes: Tensor, rule: list[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """(query_slots, key_slots, key_blocks, key_counts, query_order, query_blocks, query_counts, key_order).

    Which blocks meet is decided by bounding boxes: blocks that hold a visible pair do, others may.
    """
    block_q, block_k, *radius, causal_window, cross_image = rule
    query_slots = _slots(query_facts, query_curve, cu_seqlens, block_q)
    key_slots = query_slots
    if key_facts is not query_facts or block_k != block_q:
        key_slots = _slots(key_facts, key_curve, cu_seqlens, block_k)
    regions = routes.shape[-1]
    q, k = _boxes(query_slots, block_q, regions), _boxes(key_slots, block_k, regions)
    some, every = _meetings(q, k, routes, radius, bool(causal_window), bool(cross_image))
    return query_slots, key_slots, *_table(some, every), *_table(some.mT, every.mT)
