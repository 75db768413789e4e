"""What a plan knows of a layout's tokens before they are sorted: their facts, and the curve along which images are
walked. Facts and curve are those of :mod:`pyvtk.reference.attention_plan`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk.reference.attention_plan import IMAGE, INVALID, TEXT, T, X, Y
from pyvtk.reference.layout import MAX_COORDINATE, samples_of

PADDING = -(2**31)  # the position of padding
ALL, OF_TEXT, OF_VISUAL, AS_GIVEN = range(4)  # which keys exist


def narrow(numbers: Tensor) -> Tensor:
    """Numbers of a layout, images or positions, as int32. Those that may be any int64 are numbered anew from 0 on, in
    their order, equal ones alike: kernels add to positions and mark what is absent by int32's extremes."""
    if numbers.dtype == torch.int32:
        return numbers
    in_order = numbers.flatten().sort().values
    return torch.searchsorted(in_order, numbers.contiguous(), out_int32=True)


def strip_shape(block: int, radius: list[int], flat: bool) -> tuple[int, int]:
    """How many frames and lines a strip has: a block of tokens then covers a box of it whose surroundings, which
    kernels visit, are smallest. A flat image has a single frame."""
    near = [min(r, 64) for r in radius]
    frames, lines, best = 1, 1, float("inf")
    for t in (1,) if flat else (1, 2, 4, 8):
        for y in (1, 2, 4, 8, 16):
            if t * y > block:
                continue
            x = block / (t * y)
            size = (1 if flat else t + 2 * near[0]) * (y + 2 * near[1]) * (x + 2 * near[2])
            if size < best:
                frames, lines, best = t, y, size
    return frames, lines


def strips(facts: Tensor, block: int, radius: list[int], extent: Tensor | None) -> Tensor:
    """int64 [batch, rows], by which tokens of one image sort: strips of a few lines, walked along x in alternating
    directions, so that any run of ``block`` tokens is compact whatever the size of the grid."""
    t, y, x = facts[:, T : X + 1].long().unbind(1)
    if extent is None:
        deep = (torch.where(facts[:, IMAGE] >= 0, t, 0) > 0).any(1, keepdim=True)
    else:
        deep = extent[:, :1] > 1
    flat_frames, flat_lines = strip_shape(block, radius, flat=True)
    deep_frames, deep_lines = strip_shape(block, radius, flat=False)
    frames = torch.where(deep, deep_frames, flat_frames)
    lines = torch.where(deep, deep_lines, flat_lines)
    strip_t, strip_y = t // frames, y // lines
    along = torch.where((strip_y & 1) == 0, x, MAX_COORDINATE - 1 - x)
    inside = (t % frames) * lines + y % lines  # below 128
    return ((strip_t * MAX_COORDINATE + strip_y) * MAX_COORDINATE + along) * 128 + inside


def raster(facts: Tensor) -> Tensor:
    """int64 [batch, rows]: raster order."""
    t, y, x = facts[:, T : X + 1].long().unbind(1)
    return (t * MAX_COORDINATE + y) * MAX_COORDINATE + x


def attention_facts(
    image_id: Tensor, coords: Tensor, positions: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, extent: Tensor,
    keys: Tensor | None, key_group: int, causal: bool, strip: list[int], window: list[int], strips=strips,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(facts int32 [1 or 2, batch, 8, rows], curve int64 [1 or 2, batch, rows]) of a layout's fields.

    Facts are those of queries and, unless ``key_group`` is ALL, those of keys, where what is not of the group is
    invalid: OF_TEXT, OF_VISUAL, or AS_GIVEN by ``keys`` (bool, shaped like image_id). Padding is invalid for both.
    Coordinates and curve of what is not visual are 0. Not ``causal``: all positions are 0.

    With ``strip`` (block, radius along t, y, x) the curve is that of :func:`strips`. With ``window`` (sizes, then
    offsets, along t, y, x) facts hold window numbers (c + offset) // size instead of coordinates c, and the curve is
    their raster order, then that of c. With neither it is raster order.
    """
    image = torch.where(image_id < 0, TEXT, narrow(image_id))
    row = torch.arange(image.shape[-1], dtype=torch.int32, device=image.device).expand(image.shape)
    zero = sample = torch.zeros_like(image)
    position, valid = narrow(positions) if causal else zero, mask
    if cu_seqlens is not None:
        sample = samples_of(image_id, cu_seqlens).to(torch.int32)
        inside = sample < cu_seqlens.shape[0] - 1
        valid = inside if mask is None else inside & mask
    if valid is not None:
        image, position = torch.where(valid, image, INVALID), torch.where(valid, position, PADDING)
    seen = image >= 0
    place = torch.where(seen[..., None], coords, 0)
    facts = torch.stack([row, image, *place.unbind(-1), position, zero, sample], -2)
    if cu_seqlens is not None:
        facts, seen, keys = facts[None], seen[None], None if keys is None else keys[None]
    if window:
        inside = raster(facts)
        for axis, size, offset in zip((T, Y, X), window[:3], window[3:]):
            number = (facts[:, axis].long() + offset) // size
            facts = replaced(facts, axis, torch.where(seen, number, 0).to(torch.int32))
        curve = torch.stack([raster(facts), inside])
    elif strip:
        curve = strips(facts, strip[0], strip[1:], None if cu_seqlens is not None else extent)[None]
    else:
        curve = raster(facts)[None]
    curve = torch.where(seen, curve, 0)
    if key_group == ALL:
        return facts[None].contiguous(), curve
    if key_group != AS_GIVEN:
        keys = seen == (key_group == OF_VISUAL)
    of_keys = replaced(facts, IMAGE, torch.where(keys, facts[:, IMAGE], INVALID))
    return torch.stack([facts, of_keys]), curve


def replaced(facts: Tensor, which: int, values: Tensor) -> Tensor:
    """``facts`` with one of them replaced by int32 ``values``."""
    parts = list(facts.unbind(1))
    parts[which] = values
    return torch.stack(parts, 1)
