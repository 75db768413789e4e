"""SnapKV: after the prefill each key head keeps the cache rows that the end of the prompt looked at.

Source: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469),
    github.com/FasterDecoding/SnapKV
Acts: on the cache of every layer, once, when the prompt has been read
Needs: rotated queries of the last tokens (32 or 64: the window), the layer's rotated keys

    s_hj = sum over the window's rows of softmax_j(q_hi . k_hj * dim ** -0.5), causal, for j before the window
    p_hj = average (or maximum) of s_h over the kernel's keys around j; beyond both ends s counts as 0
    stay = the window, and per key head the best of the mean of p over its query heads, capacity in all

The denominator holds the window's keys, the pooling does not: scores at the edges shrink (the average always divides by
kernel). A prompt of at most capacity tokens stays whole. Keys were rotated before they were cached, so positions are
the original ones.

Different from published code: it decides per query head and stores keys after repeating them, so that its cache grows
by the group; here the query heads of a group share one choice (the mean is ours, the code has no rule) and the cache
keeps its key heads. It stores rows in the order of scores, which attention does not see; here they ascend, so that
:func:`pyvtk.compact_kv_` can move them in place. It rounds probabilities to the model's dtype before the sum. Formulas
were read in the authors' code, not compared with a run of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk


def select(
    q: Tensor,
    k: Tensor,
    capacity: int,
    *,
    num_keep: int | Tensor | None = None,
    valid: Tensor | None = None,
    kernel: int = 5,
    pool: str = "avg",
    candidates: Tensor | None = None,
) -> pyvtk.Selection:
    """The cache rows that stay, per key head, ascending.

    Args:
        q: [batch, query heads, window, dim], rotated queries of the last ``window`` valid tokens of each sample, in
            order. Of a sample that has fewer, they stand in the last rows; what the first rows hold is not looked at.
        k: [batch, key heads, tokens, dim], rotated keys.
        capacity: slots per row of the result.
        num_keep: rows that stay in all, window included; an int or an int tensor [batch]; None: capacity. The window
            stays in any case.
        valid: bool [batch, tokens], False for padding, on either side; None: there is none.
        kernel: odd number of keys that are pooled.
        pool: "avg" or "max".
        candidates: bool [batch, tokens], rows that compete (visual ones, say); all others stay too and use up num_keep.
            None: all compete.

    Returns:
        Selection [batch, key heads, capacity]; ``overflow`` where window and others are more than capacity.

    Raises:
        ValueError: kernel is not odd, pool is unknown, the window is longer than k. What
            :func:`pyvtk.attention_scores` and :func:`pyvtk.select` raise.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"snapkv.select: kernel must be odd and positive, got {kernel}")
    if pool not in ("avg", "max"):
        raise ValueError(f"snapkv.select: pool must be one of 'avg', 'max', got {pool!r}")
    (batch, _, rows, _), (_, kv_heads, tokens, _) = q.shape, k.shape
    if rows > tokens:
        raise ValueError(f"snapkv.select: q must hold at most the {tokens} tokens of k, got shape {tuple(q.shape)}")
    exists = torch.ones(batch, tokens, dtype=torch.bool, device=k.device) if valid is None else valid
    from_end = exists.flip(-1).cumsum(-1).flip(-1)
    window = exists & (from_end <= rows)
    places = pyvtk.Selection.from_mask(window, capacity=rows, align="right")
    scores = pyvtk.attention_scores(
        q, k, causal=True, q_positions=places.indices, q_mask=places.valid, k_mask=valid, query_reduce="sum",
        head_reduce=None,
    ).masked_fill(window[:, None], 0)  # fmt: skip
    pooling = torch.nn.functional.avg_pool1d if pool == "avg" else torch.nn.functional.max_pool1d
    pooled = pooling(scores, kernel, stride=1, padding=kernel // 2)
    per_kv_head = pooled.unflatten(1, (kv_heads, -1)).mean(2)
    keep = window if candidates is None else window | ~candidates
    number = capacity if num_keep is None else num_keep
    return pyvtk.select(per_kv_head, number, keep=keep, drop=~exists, capacity=capacity)
