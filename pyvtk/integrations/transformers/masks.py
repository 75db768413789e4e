"""Attention masks of shortened sequences, in the form that each attention implementation of transformers takes."""

from __future__ import annotations

import torch
from torch import Tensor

PREFIX = "pyvtk_"  # of our own attention functions, which wrap those of transformers


def form_of(implementation: str) -> str:
    """What an attention implementation takes: "bool" [batch, 1, queries, keys], "float" (the same, added to logits), or
    "keys" (bool [batch, keys])."""
    base = implementation.removeprefix(PREFIX)
    if base == "sdpa":
        return "bool"
    if base == "eager":
        return "float"
    if base.startswith("flash"):
        return "keys"
    raise NotImplementedError(f"accelerate: attention must be sdpa, eager or flash_attention_*, got {implementation!r}")


def valid_from_mask(mask: Tensor | dict | None, length: int) -> Tensor | None:
    """Which of the first ``length`` keys are no padding, from whatever transformers hands over as ``attention_mask``.

    Args:
        mask: None, [batch, keys], [batch, 1, queries, keys] (bool, or float with 0 where seen), or a dict of those by
            kind of layer.
        length: tokens of the prompt; a mask for a static cache covers room behind them.

    Returns:
        bool [batch, length], or None where nothing is hidden.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(f"accelerate: attention_mask must be a tensor, got {type(mask).__name__}")
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    row = mask[:, 0, -1, :length]  # the last token, padding or not, sees every valid key before it
    return row if row.dtype == torch.bool else row == 0


def causal(
    form: str, dtype: torch.dtype, valid: Tensor | None, batch: int, queries: int, keys: int, start: int | Tensor,
    device: torch.device,
) -> Tensor | None:  # fmt: skip
    """The mask of ``queries`` rows that stand at slots ``start``, ``start + 1``, ... of ``keys`` slots.

    Args:
        form: as of :func:`form_of`.
        valid: bool [batch, up to keys]; slots behind it hold newer tokens. None: all of them.
        start: int, or an integer tensor where a static cache counts on the device.

    Returns:
        None where the attention's own causal rule says the same.
    """
    plain = isinstance(start, int) and start + queries == keys  # nothing behind the last row
    if valid is None and plain and (queries == 1 or start == 0):
        return None
    if valid is not None and valid.shape[1] < keys:
        valid = torch.nn.functional.pad(valid, (0, keys - valid.shape[1]), value=True)
    if form == "keys":
        if plain:
            return valid
        there = torch.arange(keys, device=device) < start + queries
        return there.expand(batch, keys) if valid is None else there & valid
    if plain and queries == 1:
        seen = valid[:, None]
    else:
        slot = torch.arange(keys, device=device)
        if isinstance(start, int):
            rows = torch.arange(start, start + queries, device=device)[:, None]
        else:
            rows = start if queries == 1 else (torch.arange(queries, device=device) + start)[:, None]
        seen = slot <= rows
        seen = seen.expand(batch, queries, keys) if valid is None else seen & valid[:, None]
    seen = seen[:, None]
    if form == "bool":
        return seen
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
