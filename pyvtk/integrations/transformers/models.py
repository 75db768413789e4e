"""What the adapter has to know about a model: one :class:`Anatomy` each, and nothing of it anywhere else.

A model that is built like these (a vision tower, a projector, placeholders in ``input_ids``, a decoder of Llama's
form) is added by one line::

    models.ANATOMIES["my_model"] = Anatomy(layout=mrope_layout)      # by config.model_type

:func:`check` tries at ``accelerate`` what the rest relies on, so that a decoder of another form is refused there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pyvtk
from pyvtk.integrations.transformers.images import anyres_layout


@dataclass(frozen=True)
class Anatomy:
    """Facts about one kind of model.

    Attributes:
        layout: from a :class:`~pyvtk.integrations.transformers.prompt.Prompt` to the TokenLayout of its tokens, on
            their device and without waiting for it; None while it cannot be known. If it is None itself, methods that
            need a layout take ``accelerate(..., layout=)``.
        ids: attributes of the config that hold the ids of placeholders.
        mrope: whether positions are (t, y, x): such positions are never counted anew.
        tower: from the model to the layers of its vision tower, where a CLS token comes first; None: there is none.
    """

    layout: Callable[[Any], pyvtk.TokenLayout | None] | None = None
    ids: tuple[str, ...] = ("image_token_id", "video_token_id")
    mrope: bool = False
    tower: Callable[[nn.Module], nn.ModuleList] | None = None


# Layouts ------------------------------------------------------------------------------------------------------------


def fixed_layout(prompt) -> pyvtk.TokenLayout:
    """Every image has the same grid: LLaVA-1.5, InternVL (its tiles are images)."""
    config = prompt.handle.model.config
    sizes, patches = (
        value if isinstance(value, (list, tuple)) else (value, value)
        for value in (config.vision_config.image_size, config.vision_config.patch_size)
    )
    shrink = getattr(config, "downsample_ratio", 1.0)  # InternVL's pixel shuffle
    grid = (1, *(round(size // patch * shrink) for size, patch in zip(sizes, patches)))
    try:
        return pyvtk.TokenLayout.from_ids(prompt.input_ids, prompt.handle.visual_ids, grid, mask=prompt.valid)
    except ValueError as error:
        raise NotImplementedError(f"accelerate: images must be whole, no chunk may split one ({error})") from error


def mrope_layout(prompt) -> pyvtk.TokenLayout | None:
    """Positions are the coordinates: Qwen2-VL and what followed it. (Grids are out of reach: ``generate`` encodes
    images before it calls ``forward``.)"""
    # the model makes them; or they are one number each, where there is text alone
    if prompt.position_ids is None or prompt.position_ids.shape[:-2].numel() < 3:
        return None
    return pyvtk.TokenLayout.from_mrope(prompt.visual, prompt.position_ids, mask=prompt.valid)


# Towers -------------------------------------------------------------------------------------------------------------


def clip_tower(inner: nn.Module) -> nn.ModuleList:
    """The layers of a CLIP tower, in which a CLS token comes first."""
    tower = inner.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


ANATOMIES: dict[str, Anatomy] = {
    "llava": Anatomy(layout=fixed_layout, tower=clip_tower),
    "llava_next": Anatomy(layout=anyres_layout, tower=clip_tower),
    "llava_onevision": Anatomy(layout=anyres_layout),
    "qwen2_vl": Anatomy(layout=mrope_layout, mrope=True),
    "qwen2_5_vl": Anatomy(layout=mrope_layout, mrope=True),
    "qwen3_vl": Anatomy(layout=mrope_layout, mrope=True),
    "internvl": Anatomy(layout=fixed_layout),
}


def anatomy_of(model: nn.Module) -> Anatomy:
    kind = model.config.model_type
    if kind not in ANATOMIES:
        raise NotImplementedError(
            f"accelerate: model must be one of {', '.join(sorted(ANATOMIES))}, got {kind!r}; "
            "pyvtk.integrations.transformers.models says how one is added"
        )
    return ANATOMIES[kind]


def parts_of(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(the model that takes pixels and labels, the one that lays features into the sequence, its decoder)."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner = getattr(whole, "model", whole)
    language_model = getattr(inner, "language_model", None)
    if language_model is None or not hasattr(language_model, "layers"):
        raise TypeError(f"accelerate: model must hold a decoder as model.language_model, got {type(model).__name__}")
    return whole, inner, language_model


def group_of(model: nn.Module):
    """The process group over whose ranks transformers has spread the heads (``tp_plan``); None: they are all here."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or "tp" not in (mesh.mesh_dim_names or ()) or mesh["tp"].size() == 1:
        return None
    return mesh["tp"].get_group()


# Decoders of Llama's form -------------------------------------------------------------------------------------------


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in Llama's form; x [batch, heads, tokens, channels], cos and sin [batch or 1, tokens,
    channels]."""
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]


def project(layer: nn.Module, which: str, hidden: Tensor) -> Tensor:
    """Queries ("q") or keys ("k") of normed ``hidden`` [batch, tokens, C], not rotated: [batch, heads, tokens, D]. The
    projection is called, as the layer calls it, so adapters and quantised weights have their say."""
    attention = layer.self_attn
    x = getattr(attention, f"{which}_proj")(hidden)
    x = x.view(*hidden.shape[:-1], -1, attention.head_dim)
    norm = getattr(attention, f"{which}_norm", None)
    return (x if norm is None else norm(x)).transpose(1, 2)


def check(language_model: nn.Module) -> None:
    """Raises NotImplementedError unless this is a decoder of the form that :func:`project` and :func:`rotate` know."""
    config = language_model.config
    for kind in getattr(config, "layer_types", None) or ():
        if kind != "full_attention":
            raise NotImplementedError(f"accelerate: every layer must have full attention, got {kind!r}")
    for number, layer in enumerate(language_model.layers):
        attention = getattr(layer, "self_attn", None)
        missing = [name for name in ("q_proj", "k_proj", "head_dim", "scaling") if not hasattr(attention, name)]
        if missing or not hasattr(layer, "input_layernorm"):
            raise NotImplementedError(
                f"accelerate: decoder layer {number} is not of Llama's form (it has no {missing})"
            )
    attention = language_model.layers[0].self_attn
    for norm in (getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)):
        if norm is not None and norm.weight.numel() != attention.head_dim:
            raise NotImplementedError("accelerate: q_norm and k_norm must act on single heads")
    theirs = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if theirs is None:
        raise NotImplementedError(
            f"accelerate: {type(attention).__name__} rotates queries in a way that is not known here"
        )
    x = torch.linspace(-1, 1, 2 * 3 * attention.head_dim, device="cpu").view(1, 2, 3, attention.head_dim)
    angle = torch.linspace(0, 2, 3 * attention.head_dim // 2, device="cpu").view(1, 3, -1).repeat(1, 1, 2)
    if not torch.allclose(theirs(x, x, angle.cos(), angle.sin())[0], rotate(x, angle.cos(), angle.sin()), atol=1e-6):
        raise NotImplementedError(f"accelerate: {type(attention).__name__} rotates queries in another way than Llama")
