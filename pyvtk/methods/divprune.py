"""DivPrune: the visual tokens that lie farthest from each other, greedily; neither attention nor text is asked.

Source: DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models (arXiv 2503.02175),
    github.com/vbdi/divprune
Acts: between projector and language model (layer 0), or before a later layer
Needs: the projected visual tokens

    d(i, j) = 1 - cosine of features i and j
    first   = argmax over i of the distance to its nearest other token
    next    = argmax over i not taken of min over taken t of d(t, i), until round(share * visual tokens) are taken

Ties go to the lower index. ``round`` is Python's, halves to even; the paper's share is 0.098. Survivors stand in raster
order. Positions: before layer 0 the language model counts the shorter sequence from 0.

Distances are float32, under autocast too (there in the model's dtype), so near ties may fall otherwise. A token of
zeros is at distance 1 from all; one with NaN or infinities at 0. All pairs are held: batch * tokens ** 2 floats. All
visual tokens of a sample compete together, over its images, too. Formulas were read in copies of the authors' code, not
compared with a run of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk
from pyvtk.methods._cosine import cosine


def num_keep(num_visual: int | Tensor, share: float) -> int | Tensor:
    """round(num_visual * share), halves to even; int, or int64 shaped like the int tensor ``num_visual``."""
    if isinstance(num_visual, Tensor):
        return torch.round(num_visual.double() * share).long()
    return round(num_visual * share)


def select(
    features: Tensor,
    num_keep: int | Tensor,
    *,
    visual: Tensor | None = None,
    valid: Tensor | None = None,
    capacity: int | None = None,
    align: str = "left",
    others: str = "keep",
) -> pyvtk.Selection:
    """The tokens that stay. No gradient; num_keep steps (capacity of them if num_keep is a tensor) of a few operators.

    Args:
        features: [batch, tokens, channels], floating.
        num_keep, valid, capacity, align: see :mod:`pyvtk.methods`. Where more stay than capacity holds, the first are
            kept.
        visual: bool [batch, tokens], the tokens that compete; None: all.
        others: what happens to tokens that are not visual: "keep" or "drop".

    Raises:
        ValueError: others is unknown; features or a mask of another shape.
    """
    if features.dim() != 3:
        raise ValueError(f"divprune.select: features must have 3 dimensions, got shape {tuple(features.shape)}")
    if others not in ("keep", "drop"):
        raise ValueError(f"divprune.select: others must be one of 'keep', 'drop', got {others!r}")
    shape = features.shape[:2]
    for name, mask in (("visual", visual), ("valid", valid)):
        if mask is not None and mask.shape != shape:
            raise ValueError(f"divprune.select: {name} must be {list(shape)}, got shape {tuple(mask.shape)}")
    exists = torch.ones(shape, dtype=torch.bool, device=features.device) if valid is None else valid
    competes = exists if visual is None else visual & exists
    taken = _spread(features.detach(), competes, num_keep, capacity)
    stays = taken | (exists & ~competes) if others == "keep" else taken
    if capacity is None and isinstance(num_keep, int) and (others == "drop" or visual is None):
        capacity = min(num_keep, shape[1])
    return pyvtk.Selection.from_mask(stays, capacity=capacity, align=align)


def _spread(features: Tensor, competes: Tensor, num_keep: int | Tensor, capacity: int | None) -> Tensor:
    """bool [batch, tokens]: the greedy choice among the tokens that compete."""
    batch, tokens = competes.shape
    static = isinstance(num_keep, int)
    steps = min(num_keep if static else tokens, tokens if capacity is None else capacity, tokens)
    wanted = torch.full((batch, 1), num_keep, device=features.device) if static else num_keep.view(batch, 1)
    # NaN stays in the rows and columns of whom it belongs to; those of padding and text are never read
    distance = (1 - cosine(features, features)).nan_to_num(0.0)
    place = torch.arange(tokens, device=features.device)
    alone = (place[:, None] == place) | ~competes[:, None]
    nearest = distance.masked_fill(alone, torch.inf)
    nearest = nearest.amin(-1) if tokens else nearest.sum(-1)
    taken = torch.zeros_like(competes)
    for step in range(steps):
        free = competes & ~taken
        # the first distances are to others, the later ones to what is taken
        best = nearest.masked_fill(~free, -torch.inf).argmax(-1, keepdim=True)
        taken = taken | ((place == best) & free & (wanted > step))
        row = distance.gather(1, best[..., None].expand(-1, 1, tokens)).squeeze(1)
        nearest = row if step == 0 else torch.minimum(nearest, row)
    return taken
