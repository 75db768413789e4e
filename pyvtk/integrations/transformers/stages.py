"""Between decoder layers: tokens leave, and what belongs to the others goes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import pyvtk
from pyvtk.integrations.transformers import caches, masks, models
from pyvtk.integrations.transformers.methods import Context, Stage
from pyvtk.integrations.transformers.prompt import Prompt, Tokens, before_answers

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle


def enter(
    handle: Handle, number: int, layer: nn.Module, hidden: Tensor, kwargs: dict, prompt: Prompt
) -> tuple[Tensor, dict]:
    """Hidden states and keyword arguments with which decoder layer ``number`` runs."""
    stage, following = handle.method_stages.get(number), handle.method_stages.get(number + 1)
    cache = caches.cache_of(kwargs)
    before = prompt.tokens[max(run for run in prompt.tokens if run < number)]
    if number - 1 in before.additions:
        hidden = hidden + before.additions[number - 1]
    if stage is not None:
        hidden = prune(handle, stage, layer, hidden, kwargs, prompt, before)
    run = handle.run_of(number)
    tokens = prompt.tokens[run]
    if stage is None and cache is not None and (run >= 0 or some_heads_off(handle, number)):
        mark(handle, cache, number, tokens, prompt)
    if run >= 0:
        kwargs = {**kwargs, **tokens.changes()}
    if following is not None and following.scores == "previous":
        with torch.no_grad():
            prompt.scores[number] = score_inputs(
                following, layer, hidden, kwargs["position_embeddings"], prompt, tokens, cache
            )
    return hidden, kwargs


def some_heads_off(handle: Handle, number: int) -> bool:
    return handle.method.attention and number < handle.plan_ends and handle.method.heads_of(number) is not None


def mark(handle: Handle, cache, number: int, tokens: Tokens, prompt: Prompt) -> None:
    """Tells a layer of the cache what it holds less than the prompt."""
    gone = prompt.input_ids.shape[1] - tokens.visual.shape[1]
    # newlines are text to attention, at decode too
    visual = prompt.layout.visual if some_heads_off(handle, number) else None
    caches.prune_layer(cache, number, tokens.valid, visual, tokens.dropped, gone)


def prune(handle: Handle, stage: Stage, layer, hidden: Tensor, kwargs, prompt: Prompt, before: Tokens) -> Tensor:
    """The hidden states of the tokens that stay; what is known of them goes to ``prompt.tokens``."""
    number, cache = stage.layer, caches.cache_of(kwargs)
    batch, length = hidden.shape[:2]
    position_embeddings = before.position_embeddings or kwargs["position_embeddings"]
    sizes = prompt.stages[number]
    with torch.no_grad():
        q = k = positions = mask = None
        if stage.scores == "own":
            q, k, positions, mask = score_inputs(stage, layer, hidden, position_embeddings, prompt, before, cache)
        elif stage.scores == "previous":
            q, k, positions, mask = prompt.scores[number - 1]
            if k is None:
                k = cache.layers[number - 1].keys[:, :, :length]  # a static cache has room behind them
        num_keep = sizes.num_keep
        if num_keep is None:
            num_keep = handle.method.num_keep(stage, before.visual.sum(1), prompt.visual.sum(1))
        selection = handle.method.select(
            stage,
            Context(
                q, k, positions, mask, hidden, before.visual, before.valid, num_keep, sizes.capacity,
                prompt.keep if before.selection is None else None, handle.group,
            ),
        )  # fmt: skip
    extra = list(before.additions.values())
    if before.labelled is not None:
        extra.append(before.labelled)
    hidden, cos, sin, visual, *more = pyvtk.compact(selection, hidden, *position_embeddings, before.visual, *extra)
    cos, sin = cos.detach(), sin.detach()  # compacted with hidden states, they would have a gradient too
    valid = None if sizes.full else selection.valid
    after = Tokens(
        visual, valid, (cos, sin), selection if before.selection is None else before.selection.then(selection)
    )
    after.additions = dict(zip(before.additions, more))
    if before.labelled is not None:
        after.labelled = more[-1]
    if stage.rebase and not handle.anatomy.mrope:
        _rebase(handle, hidden, kwargs["position_ids"], prompt, after, selection)
    held = caches.layer_of(cache, number)
    keys = held.max_cache_len if hasattr(held, "max_cache_len") else sizes.capacity
    after.attention_mask = masks.causal(handle.form, hidden.dtype, valid, batch, sizes.capacity, keys, 0, hidden.device)
    prompt.tokens[number] = after
    if cache is not None:
        mark(handle, cache, number, after, prompt)
    return hidden


def score_inputs(
    stage: Stage, layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], prompt: Prompt,
    tokens: Tokens, cache,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(q, k, q_positions, q_mask) of a layer; k None where the cache has it."""
    cos, sin = position_embeddings
    positions = mask = None
    if tokens.labelled is not None:
        # of the tokens that are there: the one before an answer may have left
        asked = before_answers(tokens.labelled, tokens.valid)
        rows = pyvtk.Selection.from_mask(asked, capacity=max(1, *prompt.sizes.extra["answers"]))
        few, few_cos, few_sin = pyvtk.compact(rows, hidden, cos, sin)
        positions, mask = rows.indices, rows.valid
    else:
        few, few_cos, few_sin = last_rows(tokens, hidden, cos, sin)
    q = models.project(layer, "q", layer.input_layernorm(few))
    if stage.rotary:
        q = models.rotate(q, few_cos, few_sin)
    if stage.scores == "previous" and stage.rotary and cache is not None:
        return q, None, positions, mask
    k = models.project(layer, "k", layer.input_layernorm(hidden))
    return q, models.rotate(k, cos, sin) if stage.rotary else k, positions, mask


def last_rows(tokens: Tokens, *values: Tensor) -> tuple[Tensor, ...]:
    """[batch, 1, ...]: of each value [batch or 1, tokens, ...] the row of every sample's last token."""
    if tokens.ends_full:
        return tuple(x[:, -1:] for x in values)
    place = torch.arange(tokens.visual.shape[1], device=tokens.visual.device)
    last = torch.where(tokens.valid, place, -1).amax(1, keepdim=True)
    rows = pyvtk.Selection.from_indices(last, tokens.visual.shape[1], ascending=True)
    found = pyvtk.compact(rows, *values)
    return found if len(values) > 1 else (found,)


def _rebase(
    handle: Handle, hidden: Tensor, position_ids: Tensor, prompt: Prompt, after: Tokens, selection: pyvtk.Selection
) -> None:  # fmt: skip
    """Positions counted anew from each sample's first token, without those that are gone."""
    if prompt.span is None:
        if prompt.valid is None:
            first, count = position_ids[:, :1], prompt.visual.shape[1]
        else:
            first = torch.where(prompt.valid, position_ids, 2**62).amin(1, keepdim=True)
            count = prompt.valid.sum(1, keepdim=True)
        prompt.span = first, first + count
    first, end = prompt.span
    new_end = first + selection.counts[:, None]
    # aligned to the right; what stands in front of a short row is padding
    positions = torch.arange(-after.visual.shape[1], 0, device=hidden.device) + new_end
    after.position_embeddings = handle.language_model.rotary_emb(hidden, positions)
    after.dropped = end - new_end
