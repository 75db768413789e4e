"""Score keys, then select among them: ``select(attention_scores(q, k))`` with what masks and ranges imply.

Indices are positions in k, also with key_range. Keys that k_mask hides do not exist: they go, unless ``keep`` names
them. Keys outside of key_range are not candidates: they go, stay with ``others="keep"``, or are forced by ``keep``; a
key outside of the range ranks as if it scored -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def whole_axis(scores: Tensor, keys: int, key_start: int) -> Tensor:
    """Scores of a key range [..., scored] as scores of all keys, -inf outside."""
    if scores.shape[-1] == keys:
        return scores
    return torch.nn.functional.pad(scores, (key_start, keys - key_start - scores.shape[-1]), value=-torch.inf)


def competing(candidates: Tensor | None, k_mask: Tensor | None, keys: int, key_start: int, key_stop: int, like: Tensor):
    """bool, shaped like the given masks: candidates that are visible and inside of the range; None: all."""
    if k_mask is not None:
        if candidates is not None and candidates.dim() > k_mask.dim():
            k_mask = k_mask[:, None]
        candidates = k_mask if candidates is None else candidates & k_mask
    if key_stop - key_start == keys:
        return candidates
    token = torch.arange(keys, device=like.device)
    inside = (token >= key_start) & (token < key_stop)
    return (inside.expand(like.shape[0], keys) if candidates is None else candidates & inside).contiguous()


def dropped(keep: Tensor | None, drop: Tensor | None, k_mask: Tensor | None) -> Tensor | None:
    """bool, shaped like the given masks: what ``drop`` names, and what k_mask hides and ``keep`` does not name."""
    if k_mask is None:
        return drop
    dims = max(mask.dim() for mask in (k_mask, keep, drop) if mask is not None)
    k_mask, keep, drop = (
        mask if mask is None or mask.dim() == dims else mask[:, None] for mask in (k_mask, keep, drop)
    )
    hidden = ~k_mask if keep is None else ~(k_mask | keep)
    return hidden if drop is None else drop | hidden
