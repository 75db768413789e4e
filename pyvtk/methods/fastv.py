"""FastV: between two early layers the visual tokens that the last token attends to least go.

Source: An Image is Worth 1/2 Tokens After Layer 2 (arXiv 2403.06764), github.com/pkunlp-icler/FastV
Acts: before decoder layer K (2 or 3), once, in the prefill
Needs: layer K - 1: the last token's rotated query and all rotated keys

    s_j  = mean over heads of softmax_j(q_h . k_hj * dim ** -0.5), q the last token's query
    stay = all text, and the round(share * visual tokens) visual tokens of largest s

The denominator holds all keys of the sample. ``round`` is Python's, halves to even; ``share`` is 1 - R of the paper.
Survivors keep their order and their original positions.

The paper's text says average attention received, its code takes the last row: this is the code. Published code rounds
probabilities to the model's dtype before the mean, here they stay float32, so sets may differ among near ties. It lets
the first sample of a batch decide for all; here each decides for itself. Not covered: the variant that masks at every
decode step. Nothing here was compared with a run of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk


def num_keep(num_visual: int | Tensor, share: float) -> int | Tensor:
    """round(num_visual * share), halves to even; int, or int64 shaped like the int tensor ``num_visual``."""
    if isinstance(num_visual, Tensor):
        return torch.round(num_visual.double() * share).long()
    return round(num_visual * share)


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
) -> pyvtk.Selection:
    """The tokens that go on.

    Args:
        q: [batch, query heads, 1, dim], the last valid token's query of layer K - 1, rotated.
        k: [batch, key heads, tokens, dim], rotated keys of layer K - 1.
        visual, num_keep, valid, capacity, align, group: see :mod:`pyvtk.methods`.

    Raises:
        ValueError: q holds another number of rows. What :func:`pyvtk.score_and_select` raises.
    """
    if q.shape[2] != 1:
        raise ValueError(f"fastv.select: q must hold one row per sample, got shape {tuple(q.shape)}")
    return pyvtk.score_and_select(
        q,
        k,
        num_keep,
        k_mask=valid,
        candidates=visual,
        others="keep",
        capacity=capacity,
        align=align,
        group=group,
    )
