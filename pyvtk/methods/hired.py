"""HiRED: a fixed budget of visual tokens, split over the crops of an image by the tower's first layer.

Source: HiRED: Attention-Guided Token Dropping for High-Resolution VLMs (arXiv 2408.10945), github.com/hasanar1f/HiRED
Acts: between vision tower and language model, on images cut into one whole view and sub-images
Needs: tower layers 0 (budgets) and 22 (selection) of 24: the CLS query and all keys

With P sub-images, T patches per crop and s the CLS row's attention, summed over heads:

    total   = floor((P + 1) * T * share)
    whole   = min(floor(total * alpha), T)                         of the whole view, which is the image's first crop
                                                                   (where P = 0: min(total, T))
    rest    = min(total - whole, P * T)
    hits_i  = those of the floor(T * (1 - alpha)) patches of largest s (layer 0) of the whole view that lie in part i
    crop i  = min(floor(float32(hits_i / sum of hits) * rest), T)
    stay    = in each crop its best patches by s of layer 22, in raster order

The denominator of s holds CLS as well. Floors truncate the products as published code forms them: float64, for crops
float32; what they lose is not handed out again. Part i is the i-th of P equal runs of consecutive patches, as in the
code (it reshapes the raster); the paper's figure shows spatial parts: pass ``parts`` for those. Runs of P that does not
divide T are ours, the code fails there. Positions: the language model counts the shorter sequence from 0.

Not covered: the newline tokens, which the published run leaves out, and the padding of sub-images, which it cuts off
after the selection; published code leaves an image of one crop whole. Formulas were read in the authors' code, not
compared with a run of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk


def cls_scores(q_cls: Tensor, k: Tensor) -> Tensor:
    """s: attention of CLS to the patches, summed over heads.

    Args:
        q_cls: [crops, heads, 1, dim], the CLS query of a tower layer.
        k: [crops, heads, 1 + patches, dim], its keys, CLS first.

    Returns:
        float32 [crops, patches].
    """
    return pyvtk.attention_scores(q_cls, k, head_reduce="sum", key_range=(1, k.shape[2]))


def budgets(
    cls_scores_first: Tensor, cu_seqlens: Tensor, share: float, alpha: float = 0.5, *, parts: Tensor | None = None
) -> Tensor:
    """How many patches of each crop stay.

    Args:
        cls_scores_first: [crops, patches], s of the first tower layer; crops of all images one after the other.
        cu_seqlens: int [images + 1], where the crops of each image begin; its first crop is the whole view.
        share: of all patches that stays, 0 to 1 (0.2).
        alpha: of that, the share of the whole view, 0 to 1.
        parts: int [images, patches], the sub-image (from 0) that each patch of the whole view lies in, other numbers
            for none; None: runs of consecutive patches.

    Returns:
        int64 [crops]; 0 for crops behind the last image.

    Raises:
        ValueError: share or alpha is not in 0..1.
    """
    for name, value in (("share", share), ("alpha", alpha)):
        if not 0 <= value <= 1:
            raise ValueError(f"hired.budgets: {name} must be in 0..1, got {value}")
    crops, patches = cls_scores_first.shape
    bounds = cu_seqlens.long()
    images = bounds.shape[0] - 1
    if crops == 0 or images == 0:
        return bounds.new_zeros(crops)
    starts, subs = bounds[:-1], (bounds.diff() - 1).clamp(min=0)
    total = (bounds.diff() * patches).double().mul(share).long()
    whole = torch.where(subs == 0, total, total.double().mul(alpha).long()).clamp(max=patches)
    rest = torch.minimum(total - whole, subs * patches)

    attended = pyvtk.select(cls_scores_first[starts.clamp(max=crops - 1)], int(patches * (1 - alpha))).mask()
    if parts is None:
        parts = torch.arange(patches, device=bounds.device) * subs[:, None] // patches
    counted = attended & (parts >= 0) & (parts < subs[:, None])
    crop = torch.where(counted, starts[:, None] + 1 + parts, crops).flatten()
    hits = bounds.new_zeros(crops + 1).scatter_add(0, crop, torch.ones_like(crop))[:crops]

    number = torch.arange(crops, device=bounds.device)
    image = torch.searchsorted(bounds[1:].contiguous(), number, right=True)
    known = (image < images) & (number >= bounds[0])
    image = image.clamp(max=images - 1)
    of_image = hits.float() / counted.sum(-1).clamp(min=1)[image].float()
    each = (of_image * rest[image].float()).long().clamp(max=patches)
    return torch.where(number == starts[image], whole[image], each).masked_fill(~known, 0)


def select(
    cls_scores: Tensor, budgets: int | Tensor, capacity: int | None = None, *, align: str = "left"
) -> pyvtk.Selection:
    """The patches of each crop that stay.

    Args:
        cls_scores: [crops, patches], s of a late tower layer.
        budgets: int [crops], or one number for all.
        capacity, align: see :mod:`pyvtk.methods`; rows are crops.
    """
    return pyvtk.select(cls_scores, budgets, capacity=capacity, align=align)
