"""Behind a prompt: decode steps, candidates of assisted decoding, later turns, on a cache that lacks tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

import pyvtk
from pyvtk.integrations.transformers import caches, masks

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle


@dataclass(eq=False)
class Step:
    """A forward pass behind a prompt: decode, candidates of assisted decoding, a later turn.

    Attributes:
        changes: by the layer at which a run of layers begins, the keyword arguments that its layers get.
        visual: by layer, for those of which some heads are off: (which heads are on [heads], the cache's layer).
        group: the process group over whose ranks heads lie, or None.
    """

    changes: dict[int, dict] = field(default_factory=dict)
    visual: dict[int, tuple] = field(default_factory=dict)
    group: Any = None


def attend(heads: Tensor, held, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Attention of a layer of which some heads are off: [batch, heads, queries, D].

    Args:
        heads: bool [heads], those that are on.
        held: the layer of the cache that query, key and value [batch, heads, tokens or slots, D] belong to.
    """
    slots, queries = key.shape[2], query.shape[2]
    visual = torch.nn.functional.pad(held.visual, (0, slots - held.visual.shape[1]))
    valid = held.valid
    if valid is not None:
        valid = torch.nn.functional.pad(valid, (0, slots - valid.shape[1]), value=True)
    if not isinstance(held, StaticLayer):  # nothing behind the last query
        return pyvtk.text_attention(query, key, value, visual=visual, k_mask=valid, visual_heads=heads, scale=scale)
    place, start = torch.arange(slots, device=key.device), held.cumulative_length - queries
    rows = []
    for row in range(queries):
        there = (place <= start + row).expand(visual.shape)
        rows.append(
            pyvtk.text_attention(
                query[:, :, row : row + 1], key, value, visual=visual, visual_heads=heads, scale=scale,
                k_mask=there if valid is None else there & valid,
            )
        )  # fmt: skip
    return torch.cat(rows, 2)


def changes(handle: Handle, number: int, hidden: Tensor, kwargs: dict, step: Step) -> dict:
    """The keyword arguments that a layer gets instead of the model's own behind a prompt."""
    held = caches.layer_of(caches.cache_of(kwargs), number)
    if not isinstance(held, caches.PrunedLayer) or not held.is_initialized:
        return {}
    if held.visual is not None:
        step.visual[number], step.group = (handle.method.heads_of(number), held), handle.group
    run = 0 if handle.method.evicts else handle.run_of(number)  # caches that were evicted from are alike
    if run < 0:
        return {}
    if run not in step.changes:
        batch, queries = hidden.shape[:2]
        start = held.held
        keys = held.max_cache_len if isinstance(held, caches.PrunedStaticLayer) else start + queries
        changed = {
            "attention_mask": masks.causal(
                handle.form, hidden.dtype, held.valid, batch, queries, keys, start, hidden.device
            ),
            "position_ids": None,
        }
        if held.dropped is not None:
            changed["position_embeddings"] = handle.language_model.rotary_emb(
                hidden, kwargs["position_ids"] - held.dropped
            )
        step.changes[run] = changed
    return step.changes[run]
