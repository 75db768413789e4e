"""PyramidDrop: at a few layers, each time fewer visual tokens go on, by the attention of the instruction's last token.

Source: PyramidDrop (arXiv 2410.17247), github.com/Cooperx521/PyramidDrop
Acts: before decoder layers 8, 16 and 24 of 32, in prefill and training
Needs: that layer's own normed hidden states, projected and rotated: queries of the rows that score, keys of all tokens

    s_j  = mean over rows, mean over heads of softmax_j(q_hi . k_hj * dim ** -0.5), causal
    stay = all text, and the floor(share * original visual tokens) visual tokens of largest s

Rows: in inference the last token of the prompt; in training every token without a label whose successor has one (the
end of each question). The denominator holds all keys of the sample that a row sees. The count is a share of the
original number of visual tokens at every stage (1/2, 1/4, 1/8). Survivors keep their order; their positions are counted
anew from 0, so decode positions shrink by what was dropped, per stage. A sample without a valid row keeps everything.

Published code truncates to 2048 tokens and pads on the right; that is the caller's. Scores carry no gradient there and
none here: gradients flow through :func:`pyvtk.compact`. It rounds probabilities to the model's dtype before the mean,
here they stay float32. Nothing here was compared with a run of the authors' code.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk


def num_keep(num_visual: int | Tensor, share: float) -> int | Tensor:
    """floor(num_visual * share) of the original number; int, or int64 shaped like the int tensor ``num_visual``."""
    if isinstance(num_visual, Tensor):
        return (num_visual.double() * share).long()
    return int(num_visual * share)


def select(
    q: Tensor,
    k: Tensor,
    visual: Tensor,
    num_keep: int | Tensor,
    *,
    valid: Tensor | None = None,
    capacity: int | None = None,
    align: str = "left",
    q_positions: Tensor | None = None,
    q_mask: Tensor | None = None,
    group=None,
) -> pyvtk.Selection:
    """The tokens that go on.

    Args:
        q: [batch, query heads, rows, dim], rotated queries of the rows that score.
        k: [batch, key heads, tokens, dim], rotated keys of the same layer.
        visual, num_keep, valid, capacity, align, group: see :mod:`pyvtk.methods`.
        q_positions: int [batch, rows], the place of each row among the tokens of k; it sees keys up to there. None, for
            one row per sample: it sees all valid keys.
        q_mask: bool [batch, rows], False for rows that do not exist. A sample without any keeps all of its visual
            tokens (as many as capacity holds).

    Raises:
        ValueError: several rows without q_positions. What :func:`pyvtk.score_and_select` raises.
    """
    if q_positions is None and q.shape[2] != 1:
        raise ValueError(
            f"pyramiddrop.select: q_positions must be given for several rows per sample, got q {tuple(q.shape)}"
        )
    if q_mask is not None:
        num_keep = torch.where(q_mask.any(-1), num_keep, k.shape[2])
    return pyvtk.score_and_select(
        q, k, num_keep, causal=q_positions is not None, q_positions=q_positions, q_mask=q_mask, k_mask=valid,
        candidates=visual, others="keep", capacity=capacity, align=align, group=group,
    )  # fmt: skip
