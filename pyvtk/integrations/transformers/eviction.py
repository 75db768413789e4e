"""Out of the cache: after a prompt went through a layer, the layer forgets what the method does not keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import pyvtk
from pyvtk.integrations.transformers import caches, models
from pyvtk.integrations.transformers.prompt import Prompt, on_device

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle


def window_queries(
    handle: Handle, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict, prompt: Prompt
) -> None:  # fmt: skip
    """Projects the queries [batch, heads, window, D] of each sample's last tokens, in front of their layer, while its
    weights are there (FSDP)."""
    if caches.cache_of(kwargs) is None:
        return
    window = min(handle.method.window, hidden.shape[1])
    cos, sin = kwargs["position_embeddings"]
    with torch.no_grad():
        if prompt.sizes.ends_full:
            hidden, cos, sin = (x[:, -window:] for x in (hidden, cos, sin))
        else:
            if prompt.window is None:  # the same in every layer
                from_end = prompt.valid.flip(1).cumsum(1).flip(1)
                last = prompt.valid & (from_end <= window)
                prompt.window = pyvtk.Selection.from_mask(last, capacity=window, align="right")
            hidden, cos, sin = pyvtk.compact(prompt.window, hidden, cos, sin)
        q = models.project(layer, "q", layer.input_layernorm(hidden))
        prompt.scores[number] = models.rotate(q, cos, sin)


def evict(handle: Handle, number: int, kwargs: dict, prompt: Prompt) -> None:
    """Shortens layer ``number`` of the cache to what the method keeps, by these queries."""
    cache = caches.cache_of(kwargs)
    held, tokens = cache.layers[number], prompt.visual.shape[1]
    counts = [handle.method.cached(length) for length in prompt.sizes.lengths]
    capacity, alike = max(counts), len(set(counts)) == 1
    num_keep = capacity if alike else on_device(prompt.visual.device, counts)
    with torch.no_grad():
        keys, values = held.keys[:, :, :tokens], held.values[:, :, :tokens]
        selection = handle.method.evict(prompt.scores.pop(number), keys, num_keep, capacity, prompt.valid)
        keys, values = pyvtk.compact(selection, keys, values, dim=2)
        caches.replace_rows(held, keys, values)
        valid = None if alike else selection.valid[:, 0]  # all heads keep as many
        caches.prune_layer(cache, number, valid, None, None, tokens - capacity)
