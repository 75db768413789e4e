"""Layouts in plain torch: which image every token belongs to, and where it stands in it.

``check`` of the results is int64 [3]: 0 or the sum of what is wrong, and two numbers that say how. Where it is not 0
the other results hold what was there to be placed, and every backend gives the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Coordinates stay below this, so that plans can sort by all three at once.
MAX_COORDINATE = 2**16
# What ``check`` adds up.
WRONG_GRIDS, WRONG_NUMBER, CROSSES_SAMPLES = 1, 2, 4
WRONG_COORDINATES = 1


def samples_of(image_id: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64, shaped like image_id: the sample of each token; that of tokens behind the last one is their number."""
    if cu_seqlens is None:
        rows = torch.arange(image_id.shape[0], device=image_id.device)
        return rows[:, None].expand(image_id.shape)
    token = torch.arange(image_id.shape[0], dtype=torch.int32, device=image_id.device)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), token, right=True)


def extent_of(visual: Tensor, coords: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int32 [samples, 3]: the largest coordinate of each sample's ``visual`` tokens + 1, per axis."""
    ends = (coords + 1) * visual[..., None]
    if cu_seqlens is None:
        return ends.amax(1) if ends.shape[1] else ends.new_zeros((ends.shape[0], 3))
    samples = cu_seqlens.shape[0] - 1
    extent = ends.new_zeros((samples + 1, 3))  # one more for the tokens after the last sample
    sample = samples_of(visual, cu_seqlens)[:, None].expand(-1, 3)
    return extent.scatter_reduce(0, sample, ends, "amax")[:samples]


def _within(visual: Tensor, sample: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """``visual`` without the tokens behind the last sample."""
    return visual if cu_seqlens is None else visual & (sample < cu_seqlens.shape[0] - 1)


def layout_from_ids(
    input_ids: Tensor, image_token_ids: list[int], grids: Tensor | None, grid: list[int], merge: int,
    mask: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(image_id int32, coords int32 [..., 3], extent int32 [samples, 3], check): placeholders fill one grid after the
    other, in raster order.

    A grid is (t, h, w) or (t, h, w, newline), h and w to be divided by ``merge``. With a newline the placeholder behind
    every row of w tokens is text. ``grids`` int [images, 3 or 4] lists them; or every image has the one ``grid``.

    ``check`` tells the number of placeholders, and that of tokens in all grids or in the one. A grid that is wrong
    itself has no tokens, and placeholders behind the last grid are text.
    """
    # against int32, an id beyond it would be cut to one inside
    of_each = [input_ids.long() == token for token in image_token_ids]
    visual = functools.reduce(torch.logical_or, of_each) if of_each else torch.zeros_like(input_ids, dtype=torch.bool)
    if mask is not None:
        visual = visual & mask
    sample = samples_of(input_ids, cu_seqlens)
    flat, sample = visual.flatten(), sample.flatten()
    number = flat.cumsum(0)  # of placeholders, over the whole batch, up to each
    found = flat.sum()
    if grids is None:
        t, h, w, newline = (*grid, 0) if len(grid) == 3 else grid
        h, w = h // merge, w // merge
        line = w + newline
        size = t * h * line
        image, inside = (number - 1) // size, (number - 1) % size
        wrong, expected = (found % size != 0) * WRONG_NUMBER, torch.full_like(found, size)
        there = flat
    else:
        sides = torch.stack([grids[:, 0], grids[:, 1] // merge, grids[:, 2] // merge, *grids.unbind(1)[3:]], 1).long()
        fit = (grids[:, 1:3] % merge == 0).all(1) & ((sides >= 0) & (sides <= MAX_COORDINATE)).all(1)
        if grids.shape[1] == 4:
            fit = fit & (sides[:, 3] <= 1)
        # one grid more, an empty one, for placeholders behind the last
        sides = torch.nn.functional.pad(sides * fit[:, None], (0, 0, 0, 1))
        t, h, w = sides[:, :3].unbind(1)
        line = w + sides[:, 3] if grids.shape[1] == 4 else w
        size = (t * h * line).clamp(max=flat.shape[0] + 1)  # what is more cannot be there, and sums stay in int64
        ends = size.cumsum(0)
        image = torch.searchsorted(ends[:-1], number - 1, right=True)
        h, line, w, begin = torch.stack([h.clamp(min=1), line.clamp(min=1), w, ends - size + 1], 1)[image].unbind(1)
        inside, expected = number - begin, ends[-1]
        wrong = ~fit.all() * WRONG_GRIDS + (found != expected) * WRONG_NUMBER
        there = flat & (image < grids.shape[0])
    # two placeholders of one image that follow each other are of one sample
    before = torch.nn.functional.pad((sample * flat).cummax(0).values, (1, 0))[:-1]
    crosses = (there & (inside > 0) & (before != sample)).any()
    y, x = inside // line, inside % line
    there = there & (x < w)  # else it is a newline
    fields = (torch.stack([image + 1, y // h, y % h, x], 1) * there[:, None]).to(torch.int32)
    image_id = (fields[:, 0] - 1).reshape(input_ids.shape)
    coords = fields[:, 1:].reshape(*input_ids.shape, 3).contiguous()
    extent = extent_of(_within(there, sample, cu_seqlens).reshape(input_ids.shape), coords, cu_seqlens)
    return image_id, coords, extent, torch.stack([wrong + crosses * CROSSES_SAMPLES, found, expected])


def layout_from_mrope(
    visual: Tensor, position_ids: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(image_id int32, coords int32 [batch, tokens, 3], extent int32 [batch, 3], check): every run of visual tokens is
    an image, and begins anew where y and x both grow. Coordinates are positions less the smallest of the image.

    ``position_ids`` is int [3 or more, batch, tokens], the last three t, y, x. ``check`` tells the largest coordinate.
    Those beyond 65535 are cut.
    """
    if mask is not None:
        visual = visual & mask
    place = position_ids[-3:].long().movedim(0, -1)  # [batch, tokens, 3]
    batch, tokens = visual.shape
    # in raster order x begins again wherever y grows; behind an image both lie past all that it has
    grows = (place[:, 1:, 1:] > place[:, :-1, 1:]).all(-1)
    begins = torch.nn.functional.pad(~visual[:, :-1] | grows, (1, 0), value=True)[:, :tokens]
    image = (visual & begins).flatten().cumsum(0) - 1
    image = torch.where(visual.flatten(), image, batch * tokens)
    flat = torch.where(visual.flatten()[:, None], place.flatten(0, 1), 0)
    least = flat.new_zeros((batch * tokens + 1, 3))
    least = least.scatter_reduce(0, image[:, None].expand(-1, 3), flat, "amin", include_self=False)
    coords = flat - least[image]
    coords = torch.where(coords < 0, torch.iinfo(torch.int64).max, coords)  # it wrapped around
    coords = torch.where(visual[..., None], coords.reshape(batch, tokens, 3), 0)
    most = torch.nn.functional.pad(coords.flatten(), (0, 1)).amax()
    wrong = (most >= MAX_COORDINATE) * WRONG_COORDINATES
    coords = coords.clamp(max=MAX_COORDINATE - 1).to(torch.int32)
    image_id = torch.where(visual, image.reshape(batch, tokens), -1).to(torch.int32)
    return image_id, coords, extent_of(visual, coords, None), torch.stack([wrong, most, torch.zeros_like(most)])
