"""VisionZip: the patches that CLS attends to, and a few tokens into which all others are merged.

Source: VisionZip: Longer is Better but Not Necessary in Vision Language Models (arXiv 2412.04467),
    github.com/JIA-Lab-research/VisionZip
Acts: after the vision tower's last but one layer, before the projector, on each crop
Needs: that layer's CLS query and keys, and the hidden states that go to the projector

    dominant   = the patches of largest CLS attention, summed over heads (the denominator holds CLS as well)
    targets    = of the R other patches in raster order every step-th, the first c; step = max(1, R // c)
    assignment = each remaining patch to the target of largest cosine between keys (mean over heads)
    contextual = target + mean of what is assigned to it: a sum of two, not a mean; of nothing the mean is 0

Counts are the caller's. The paper's dominant=54 is CLS, which always stays, and 53 patches: num_dominant here counts
patches alone, and CLS is the caller's. All rows keep raster order here (``kept``); published code lays out CLS, then
dominant, then contextual tokens: ``torch.cat([compact(dominant, x), compact(targets, x)], 1)`` of the merged features
x. Positions: the language model counts the shorter sequence from 0.

Similarities are float32 here, in the model's dtype there; of equal ones the first target is taken. Not covered: towers
without CLS. Formulas were read in ports of the authors' code, not compared with a run of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk
from pyvtk.methods._cosine import cosine


def select(q_cls: Tensor, k: Tensor, num_dominant: int | Tensor) -> pyvtk.Selection:
    """The dominant patches, in raster order; patches are counted without CLS.

    Args:
        q_cls: [crops, heads, 1, dim], the CLS query of the tower layer.
        k: [crops, heads, 1 + patches, dim], its keys, CLS first.
        num_dominant: patches of each crop; an int, or an int tensor [crops].
    """
    scores = pyvtk.attention_scores(q_cls, k, head_reduce="sum", key_range=(1, k.shape[2]))
    return pyvtk.select(scores, num_dominant)


def contextual(metric: Tensor, dominant: pyvtk.Selection, num_contextual: int) -> tuple[pyvtk.Selection, Tensor]:
    """The targets, and which of them each remaining patch is merged into.

    Args:
        metric: [crops, patches, channels], what patches are compared by: ``k[:, :, 1:].mean(1)``, of any length. One
            that is 0 goes to the first target.
        dominant: of :func:`select`.
        num_contextual: targets per crop; crops with fewer patches left have as many as those.

    Returns:
        targets: Selection [crops, num_contextual].
        assignment: int64 [crops, patches]: the target's number for :func:`pyvtk.merge_tokens`; -1 for dominant patches
            and for targets.
    """
    left = ~dominant.mask()
    rank = left.cumsum(-1) - 1
    step = (left.sum(-1, keepdim=True) // max(num_contextual, 1)).clamp(min=1)
    is_target = left & (rank % step == 0) & (rank < step * num_contextual)
    targets = pyvtk.Selection.from_mask(is_target, capacity=min(num_contextual, metric.shape[1]))
    if targets.capacity == 0:
        return targets, torch.full_like(rank, -1)
    # a crop with fewer targets than slots has no other patch left that could take an empty slot
    nearest = cosine(metric, pyvtk.compact(targets, metric)).argmax(-1)
    return targets, torch.where(left & ~is_target, nearest, -1)


def merge(features: Tensor, targets: pyvtk.Selection, assignment: Tensor) -> Tensor:
    """Features in which the rows of targets hold target + mean of what is assigned; all other rows are untouched.

    Args:
        features: [crops, patches, channels], floating.
        targets, assignment: of :func:`contextual`.

    Returns:
        [crops, patches, channels]; differentiable in features. Dominant and target rows are VisionZip's tokens.
    """
    means = pyvtk.merge_tokens(features, assignment, num_groups=targets.capacity)
    return pyvtk.restore(targets, pyvtk.compact(targets, features) + means, features)


def kept(dominant: pyvtk.Selection, targets: pyvtk.Selection) -> pyvtk.Selection:
    """Dominant patches and targets together, in raster order: the rows of merged features that go on."""
    capacity = min(dominant.capacity + targets.capacity, dominant.num_tokens)
    return pyvtk.Selection.from_mask(dominant.mask() | targets.mask(), capacity=capacity)
