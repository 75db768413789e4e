"""Attention of the last rows of a sequence, which are text, in plain torch.

16-bit inputs are computed in float32; results come in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk.reference._exact import exact
from pyvtk.reference.attention import in_rows, over_map


def of_slots(key_slots: Tensor, keys: int, added_keys: bool) -> tuple[Tensor, Tensor]:
    """(visual, k_mask), bool [batch, keys], of an attention plan's key slots; keys behind the plan's are text, there if
    ``added_keys``."""
    image = in_rows(key_slots, keys)[:, 1]
    row = torch.where(key_slots[:, 0] < 0, keys, key_slots[:, 0]).long()
    of_plan = torch.zeros((row.shape[0], keys + 1), dtype=torch.bool, device=row.device).scatter(1, row, True)
    image = torch.where(of_plan[:, :keys], image, -1 if added_keys else -2)
    return image >= 0, image > -2


@exact
def text_attention(
    q: Tensor, k: Tensor, v: Tensor, k_bias: Tensor | None, visual: Tensor | None, k_mask: Tensor | None,
    key_slots: Tensor | None, visual_heads: Tensor | None, added_keys: bool, scale: float, keep_mass: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out_i = sum_j p_ij v_j with p_ij = exp(z_ij - lse_i), lse_i = log sum_j exp z_ij over the keys j that row i sees,
    and z_ij = scale q_i . k_j + k_bias_j.

    The rows are the last ones of the keys that k_mask shows, and each sees those up to its own. Nobody sees a key with
    bias -inf. Rows that see nothing, and rows without a key: out 0, lse -inf. Heads that are off in ``visual_heads``
    give visual keys no weight: after the softmax (keep_mass), or before it. ``key_slots`` of a plan stand for visual
    and k_mask where there is one row, which stands behind all keys.
    """
    batch, _, queries, _ = q.shape
    keys = k.shape[2]
    if key_slots is not None:
        visual, k_mask = of_slots(key_slots, keys, added_keys)
    there = torch.ones((batch, keys), dtype=torch.bool, device=q.device) if k_mask is None else k_mask
    if key_slots is None:
        # how many exist from each key on, itself not counted
        later = there.long().flip(1).cumsum(1).flip(1) - there.long()
        own = torch.arange(queries - 1, -1, -1, device=q.device)
        seen = there[:, None] & (later[:, None] >= own[:, None])
    else:
        seen = there[:, None].expand(batch, queries, keys)
    off = None if visual_heads is None or visual is None else ~visual_heads
    return over_map(q, k, v, k_bias, seen[:, None], visual, off, scale, keep_mass)
