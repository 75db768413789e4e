"""Layers of a KV cache that hold fewer tokens than the sequence has, and know which of their slots are padding.

To transformers they say the length of the sequence, so that positions, later turns and assisted decoding go on as if
nothing had been dropped. What they hold follows the cache through beams (``reorder_cache``), repeats and crops.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


class PrunedLayer:
    """What both kinds have.

    Attributes:
        valid: bool [batch, slots], which of the first slots hold tokens; slots behind those are newer. None: all.
        visual: bool [batch, slots], which are visual, where the method needs it at decode; None: it does not.
        dropped: int [batch, 1], how far positions are shifted back in this layer and those behind it; None: they are
            not.
        gone: how many slots the sequence has more than this layer.
    """

    valid: Tensor | None = None
    visual: Tensor | None = None
    dropped: Tensor | None = None
    gone: int = 0

    def get_seq_length(self):
        held = super().get_seq_length()
        return held + self.gone if self.is_initialized else held

    def each(self, change) -> None:
        """Lets ``change`` make a new tensor of everything that has a batch axis."""
        for name in ("valid", "visual", "dropped"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.each(lambda x: x.index_select(0, beam_idx.to(x.device)))


class PrunedDynamicLayer(PrunedLayer, DynamicLayer):
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.each(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.each(lambda x: x[indices])

    @property
    def held(self) -> int:
        return self.keys.shape[-2]


class PrunedStaticLayer(PrunedLayer, StaticLayer):
    def reorder_cache(self, beam_idx: Tensor) -> None:
        # in place: a compiled decode step has these tensors' addresses
        super(PrunedLayer, self).reorder_cache(beam_idx)
        for name in ("valid", "visual", "dropped"):
            tensor = getattr(self, name)
            if tensor is not None:
                tensor.copy_(tensor.index_select(0, beam_idx))

    @property
    def held(self) -> Tensor:
        return self.cumulative_length


def cache_of(kwargs: dict) -> Cache | None:
    """The cache in the keyword arguments of a model or layer; they were renamed in transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def layer_of(cache: Cache | None, index: int):
    """Layer ``index`` of a cache, or None while it is not there."""
    return cache.layers[index] if cache is not None and index < len(cache.layers) else None


def prune_layer(
    cache: Cache, index: int, valid: Tensor | None, visual: Tensor | None, dropped: Tensor | None, gone: int
) -> None:
    """Makes layer ``index`` one that knows what it lacks. It may be empty still, or hold the shortened rows already."""
    while len(cache.layers) <= index:  # a DynamicCache that was made without a config grows layer by layer
        cache.layers.append(cache.layer_class_to_replicate() if cache.layer_class_to_replicate else DynamicLayer())
    layer = cache.layers[index]
    if type(layer) in (StaticLayer, PrunedStaticLayer):
        layer = _become(PrunedStaticLayer, layer)
        width = layer.max_cache_len
        valid, visual = (_fixed(x, width, fill) for x, fill in ((valid, True), (visual, False)))
        dropped = _fixed(dropped, 1, False)
    elif type(layer) in (DynamicLayer, PrunedDynamicLayer):
        layer = _become(PrunedDynamicLayer, layer)
    else:
        raise NotImplementedError(f"accelerate: the cache must be dynamic or static, got {type(layer).__name__}")
    layer.valid, layer.visual, layer.dropped, layer.gone = valid, visual, dropped, gone
    cache.layers[index] = layer


def replace_rows(layer, keys: Tensor, values: Tensor) -> None:
    """Lets a layer hold these rows [batch, heads, slots, D], and no others."""
    if isinstance(layer, StaticLayer):
        slots = keys.shape[2]
        layer.keys[:, :, :slots], layer.values[:, :, :slots] = keys, values
        layer.cumulative_length.fill_(slots)
    else:
        layer.keys, layer.values = keys, values


def _become(kind: type, layer):
    """A layer of this kind that holds what ``layer`` holds."""
    new = object.__new__(kind)
    new.__dict__.update(layer.__dict__)
    return new


def _fixed(values: Tensor | None, width: int, fill: bool) -> Tensor | None:
    """A buffer of the cache's width at an address of its own, as compiled decode steps need it."""
    if values is None:
        return None
    buffer = values.new_full((values.shape[0], width), fill)
    buffer[:, : values.shape[1]] = values
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(buffer)
    return buffer
