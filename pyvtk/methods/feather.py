"""FEATHER: scores without rotary embedding, a uniform lattice that stays as well, and a second, later stage.

Source: Feather the Throttle (arXiv 2412.13180), github.com/markendo/FEATHER
Acts: before decoder layers 8 (stage 1) and 16 (stage 2), in the prefill
Needs: layer 7 and layer 15: the last token's query and all keys before rotary embedding; a TokenLayout for the lattice

    s_j     = mean over heads of softmax_j(q_h . k_hj * dim ** -0.5) over the visual keys alone
    stage 1 = all text, the floor(share * N) visual tokens of largest s, and the lattice: every 3rd row and column
    stage 2 = all text, the floor(share ** 2 * N') best of the N' visual tokens that are left; the lattice is on its own

``share`` is 1 - R of the paper (0.3); ``floor`` truncates the float64 product as Python's int() does, in stage 2 with
share * share formed first. The lattice comes on top of the count and tokens in both count once. Survivors keep their
order and their original positions.

Published code takes one square image, batch 1; here every image has a lattice of its own, and each frame of a video
(unverified: no published rule). Scores are rounded to the model's dtype before the mean there, float32 here. The
rounding, the denominator and both stages were read in the authors' code, not compared with a run of it.
"""

from __future__ import annotations

from torch import Tensor

import pyvtk


def num_keep(num_visual: int | Tensor, share: float, stage: int = 1) -> int | Tensor:
    """floor(num_visual * share ** stage) for stage 1 or 2, of the number that enters that stage.

    Returns:
        int, or int64 shaped like the int tensor ``num_visual``.

    Raises:
        ValueError: stage is neither 1 nor 2.
    """
    if stage not in (1, 2):
        raise ValueError(f"feather.num_keep: stage must be 1 or 2, got {stage!r}")
    factor = share if stage == 1 else share * share
    if isinstance(num_visual, Tensor):
        return (num_visual.double() * factor).long()
    return int(num_visual * factor)


def lattice(layout: pyvtk.TokenLayout, stride: int = 3) -> Tensor:
    """bool, shaped like the layout's tokens: visual tokens in rows and columns 0, stride, 2 stride, ... of their image.

    Raises:
        ValueError: stride is below 1.
    """
    if stride < 1:
        raise ValueError(f"feather.lattice: stride must be at least 1, got {stride}")
    return layout.visual & (layout.coords[..., 1:] % stride == 0).all(-1)


def select(
    q: Tensor,
    k: Tensor,
    visual: Tensor,
    num_keep: int | Tensor,
    *,
    valid: Tensor | None = None,
    capacity: int | None = None,
    align: str = "left",
    group=None,
    lattice: Tensor | None = None,
) -> pyvtk.Selection:
    """The tokens that go on.

    Args:
        q: [batch, query heads, 1, dim], the last valid token's query, not rotated.
        k: [batch, key heads, tokens, dim], keys of the same layer, not rotated.
        visual, num_keep, valid, capacity, align, group: see :mod:`pyvtk.methods`. Where more stay than capacity
            holds, and with a lattice, the first tokens are kept.
        lattice: bool [batch, tokens], visual tokens that stay on top of num_keep (stage 1); None: none do.

    Raises:
        ValueError: q holds another number of rows. What :func:`pyvtk.attention_scores` and :func:`pyvtk.select` raise.
    """
    if q.shape[2] != 1:
        raise ValueError(f"feather.select: q must hold one row per sample, got shape {tuple(q.shape)}")
    drop = None if valid is None else ~valid
    visual = visual if valid is None else visual & valid
    _, scores = pyvtk.score_and_select(q, k, 0, k_mask=visual, group=group, return_scores=True)
    best = pyvtk.select(
        scores, num_keep, candidates=visual, others="keep", drop=drop,
        capacity=capacity if lattice is None else None, align=align,
    )  # fmt: skip
    if lattice is None:
        return best
    return pyvtk.Selection.from_mask(best.mask() | (lattice & visual), capacity=capacity, align=align)
