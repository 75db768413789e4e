"""Attention and feed-forward layers of methods that change them (YOPO), inside of transformers' own modules.

The attention function is chosen by name in the config, as transformers chooses one, and falls through to the model's
own wherever there is no plan. A feed-forward layer gets no keyword arguments, so the attention of the same layer,
which runs just before it (in a recomputation by gradient checkpointing too), hands it the rows.
"""

from __future__ import annotations

import functools
import sys

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import pyvtk
from pyvtk.integrations.transformers.decode import Step, attend
from pyvtk.integrations.transformers.masks import PREFIX
from pyvtk.integrations.transformers.prompt import KEY, Prompt


def register(base: str) -> str:
    """The name of our attention function over the model's own, which is called ``base``."""
    name = PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, functools.partial(attention, base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def attention(
    base: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None,
    dropout: float = 0.0, **kwargs,
):  # fmt: skip
    """An attention function of transformers: query, key, value are [batch, heads, tokens, D], the result is [batch,
    tokens, heads, D]."""
    known, layer = kwargs.pop(KEY, None), module.layer_idx
    out = None
    if isinstance(known, Prompt):
        plan, method = known.plan_of(layer), known.handle.method
        method.listen(known, layer, query, key)
        if plan is not None:
            if dropout:
                raise NotImplementedError("accelerate: dropout in attention must be 0")
            known.handle.feed_forward_rows[layer] = known.rows
            count = query.shape[2]  # a static cache has room behind the prompt
            out = pyvtk.neighbor_attention(
                query, key[:, :, :count], value[:, :, :count], plan, scale=scaling,
                visual_heads=own_heads(method.heads_of(layer), query, known.handle.group), visual_rows="zero",
            )  # fmt: skip
    elif isinstance(known, Step) and layer in known.visual:
        heads, held = known.visual[layer]
        out = attend(own_heads(heads, query, known.group), held, query, key, value, scaling)
    if out is not None:
        return out.transpose(1, 2), None
    if base == "eager":  # every model has its own
        function = sys.modules[type(module).__module__].eager_attention_forward
    else:
        function = ALL_ATTENTION_FUNCTIONS[base]
    return function(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


def own_heads(heads: Tensor | None, query: Tensor, group) -> Tensor | None:
    """Of what is said of all heads, that of this rank's; query [batch, heads, tokens, D]."""
    if heads is None or group is None:
        return heads
    here = query.shape[1]
    rank = torch.distributed.get_rank(group)
    return heads[rank * here : (rank + 1) * here]


def switch(model: nn.Module, config, name: str) -> None:
    """Let the decoder (and not the vision tower) use the attention function of this name."""
    model.set_attn_implementation({"text_config": name} if config is not model.config else name)


def split_feed_forward(handle, number: int, mlp: nn.Module, ffn: int):
    """Lets visual rows take the first 1 / ffn of the channels of a gated feed-forward layer.

    Returns:
        What undoes it.

    Raises:
        NotImplementedError: its weights are no plain ones, of which a part can be taken.
    """
    _plain(mlp)
    channels = mlp.gate_proj.out_features // ffn
    whole = mlp.forward
    linear = nn.functional.linear

    def forward(x: Tensor) -> Tensor:
        rows = handle.feed_forward_rows.pop(number, None)
        if rows is None:
            return whole(x)
        _plain(mlp)  # adapters may have come since
        visual, others = rows
        some = pyvtk.compact(visual, x)
        gate, up = (
            linear(some, part.weight[:channels], None if part.bias is None else part.bias[:channels])
            for part in (mlp.gate_proj, mlp.up_proj)
        )
        some = linear(mlp.act_fn(gate) * up, mlp.down_proj.weight[:, :channels], mlp.down_proj.bias)
        rest = whole(pyvtk.compact(others, x))
        return pyvtk.restore(visual, some, pyvtk.restore(others, rest))

    def undo() -> None:
        del mlp.forward

    mlp.forward = forward
    return undo


def _plain(mlp: nn.Module) -> None:
    for name in ("gate_proj", "up_proj", "down_proj"):
        kind = type(getattr(mlp, name, None))
        if kind is not nn.Linear:
            raise NotImplementedError(
                f"accelerate: ffn > 1 takes part of the weights of a torch.nn.Linear, got a {name} of type "
                f"{kind.__module__}.{kind.__qualname__} (merge adapters, or leave ffn at 1)"
            )


def rows_of(prompt: Prompt) -> tuple[pyvtk.Selection, pyvtk.Selection]:
    """Selections of the visual tokens of a prompt, and of all others, padding among them."""
    tokens = prompt.visual.shape[1]
    visual = pyvtk.Selection.from_mask(prompt.visual, capacity=max(prompt.sizes.visual))
    others = pyvtk.Selection.from_mask(~prompt.visual, capacity=tokens - min(prompt.sizes.visual))
    return visual, others
