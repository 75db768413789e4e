"""From the arguments of a forward pass to what its decoder layers need: sizes, layout, plan.

The host waits once for the device, and that is here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyvtk.integrations.transformers import attention, caches, masks
from pyvtk.integrations.transformers.prompt import Prompt, Sizes, StageSizes, Tokens, before_answers, on_device
from pyvtk.integrations.transformers.report import Report

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle


def begin(handle: Handle, input_ids: Tensor | None, kwargs: dict, labels: Tensor | None) -> Prompt | None:
    """A prompt, from what the model is called with; None if it holds no visual tokens, or is a step behind a prompt.

    The prompt is ready, but for what :func:`prepare` says.
    """
    if input_ids is None:
        embeds = kwargs.get("inputs_embeds")
        if embeds is not None and embeds.shape[1] == 1:
            return None
        raise NotImplementedError("accelerate: input_ids must be given, or it is not known which tokens are visual")
    length = input_ids.shape[1]
    if length == 1:
        return None
    visual = input_ids == handle.visual_ids[0]
    for other in handle.visual_ids[1:]:
        visual = visual | (input_ids == other)
    valid = None if handle.padding == "none" else masks.valid_from_mask(kwargs.get("attention_mask"), length)
    if valid is not None:
        visual = visual & valid
    prompt = Prompt(handle, input_ids, visual, valid, labels=labels, position_ids=kwargs.get("position_ids"))
    encoded = kwargs.get("mm_encoder_outputs") or {}
    prompt.videos = kwargs.get("pixel_values_videos") is not None or encoded.get("video") is not None
    if labels is not None and handle.method.answers:
        prompt.labelled = labels != -100
    done = prepare(handle, prompt, caches.cache_of(kwargs))
    return prompt if prompt.ready or not done else None


def prepare(handle: Handle, prompt: Prompt, cache, last: bool = False) -> bool:
    """Learns of a prompt what the decoder will need: sizes, layout, plan. Whether all that can be known is known.

    In front of the model everything is, but positions that the model makes itself, and what its tower says of images
    that are not encoded yet. That is asked again in front of the decoder (``last``); a decoder that is compiled
    begins behind it.
    """
    method = handle.method
    if not method.forces and prompt.sizes is None and not _measure(handle, prompt, cache):
        return True
    if method.needs_layout and prompt.layout is None:
        prompt.layout = handle.layout(prompt)
        if prompt.layout is None:
            if last and method.forces and not _measure(handle, prompt, cache):
                return True  # text alone needs none
            if last:
                raise NotImplementedError("accelerate: it is not known where visual tokens stand; give layout=")
            return False
    if method.forces and prompt.sizes is None:
        prompt.keep = method.forced(handle, prompt)
        if prompt.keep is None and not last:
            return False
        if not _measure(handle, prompt, cache):
            return True
        if prompt.keep is None:
            raise RuntimeError("accelerate: these images were encoded before the model was accelerated")
    if method.attention:
        prompt.plan = handle.report.plan = method.plan(prompt.layout)
        if method.ffn > 1:
            prompt.rows = attention.rows_of(prompt)
    handle.images.clear()
    prompt.ready = True
    return True


def first_tokens(handle: Handle, prompt: Prompt, kwargs: dict) -> dict:
    """Lays out ``prompt.tokens`` for the decoder; its keyword arguments, less what is done here instead."""
    tokens = Tokens(prompt.visual, prompt.valid, None, ends_full=prompt.sizes.ends_full, labelled=prompt.labelled)
    deep = kwargs.get("deepstack_visual_embeds")
    if deep and min(handle.method_stages, default=len(handle.layers)) <= len(deep):
        embeds, where = kwargs["inputs_embeds"], kwargs["visual_pos_masks"][..., None]
        kwargs = {**kwargs, "deepstack_visual_embeds": None}
        tokens.additions = {
            number: torch.zeros_like(embeds).masked_scatter(where, values.to(embeds.dtype))
            for number, values in enumerate(deep)
        }
    prompt.tokens = {-1: tokens}
    return kwargs


def _measure(handle: Handle, prompt: Prompt, cache) -> bool:
    """Fetches the sizes, which is the one time that the host waits. Whether there are visual tokens."""
    extra = {}
    if prompt.labelled is not None:
        extra["answers"] = before_answers(prompt.labelled, prompt.valid).sum(1)
    if prompt.keep is not None:
        extra["keep"] = prompt.keep.sum(1)
    prompt.sizes = Sizes.of(prompt.visual, prompt.valid, **extra)
    if not any(prompt.sizes.visual):
        return False
    if cache is not None and any(getattr(layer, "is_initialized", False) for layer in cache.layers):
        raise NotImplementedError("accelerate: images in a later turn, or in a later chunk of a prompt")
    if all(length == prompt.visual.shape[1] for length in prompt.sizes.lengths):
        prompt.valid = None
    _size_stages(handle, prompt)
    handle.report = Report(handle, prompt)
    return True


def _size_stages(handle: Handle, prompt: Prompt) -> None:
    sizes, exact = prompt.sizes, True
    tokens, there = sizes.lengths, sizes.visual
    for layer, stage in handle.method_stages.items():
        keep = [handle.method.num_keep(stage, n, whole) for n, whole in zip(there, sizes.visual)]
        if "answers" in sizes.extra:  # a sample without an answer keeps what it has
            keep = [k if answers else n for k, answers, n in zip(keep, sizes.extra["answers"], there)]
        bound = keep
        if "keep" in sizes.extra and not prompt.stages:  # what was chosen before the decoder stays besides
            bound = [min(k + forced, n) for k, forced, n in zip(keep, sizes.extra["keep"], there)]
        if not exact:
            num_keep = None
        elif len(keep) == 1:
            num_keep = keep[0]
        else:
            num_keep = on_device(prompt.visual.device, keep)
        exact = exact and stage.exact
        tokens = [held - n + stay for held, n, stay in zip(tokens, there, bound)]
        there = bound
        capacity = max(tokens)
        full = exact and all(n == capacity for n in tokens)
        prompt.stages[layer] = StageSizes(capacity, full, num_keep, tokens, there, exact)
