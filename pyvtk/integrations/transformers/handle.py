"""``accelerate``: hooks on a model of transformers that let a method drop tokens, and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import pyvtk
from pyvtk.integrations.transformers import attention, caches, masks, models
from pyvtk.integrations.transformers.images import Images
from pyvtk.integrations.transformers.methods import Context, Method, Stage
from pyvtk.integrations.transformers.prompt import KEY, Prompt, Sizes, StageSizes, Step, Tokens, before_answers
from pyvtk.integrations.transformers.report import Report

_handles: weakref.WeakKeyDictionary[nn.Module, Handle] = weakref.WeakKeyDictionary()


def accelerate(
    model: nn.Module,
    method: Method,
    *,
    layout: Callable[[Prompt], pyvtk.TokenLayout] | None = None,
    padding: str = "auto",
) -> Handle:
    """Let ``method`` drop visual tokens of a model of transformers, in ``forward``, ``generate`` and training.

    Args:
        model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL of transformers 5.20 or
            newer, also inside of a PeftModel; of a pipeline its ``model``.
        method: what to drop and where, e.g. ``FastV(layer=2, keep=0.5)``.
        layout: from a prompt to the TokenLayout of its tokens, where it is not what the model's kind says.
        padding: "auto": from the attention mask. "none": a promise that there is no padding, so that the mask is not
            looked at.

    Returns:
        A handle: ``print(handle)`` tells what the last prompt was spared, ``handle.remove()`` takes everything off again,
        and so does leaving ``with accelerate(...) as handle:``.

    Hidden states and logits keep the prompt's length: those of tokens that were dropped are of a hidden state of zeros.
    In training the loss counts the labels whose row was still there. Prompts without images pass through.

    Raises:
        RuntimeError: the model has a handle already.
        NotImplementedError: a model, attention or method that this does not work with; in a forward pass: images in a
            later turn or a chunk of a prompt that splits an image, output_attentions, dropout in attention.
    """
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model  # a pipeline
    if padding not in ("auto", "none"):
        raise ValueError(f"accelerate: padding must be 'auto' or 'none', got {padding!r}")
    if not isinstance(method, Method):
        raise TypeError(f"accelerate: method must be a Method, got {type(method).__name__}")
    return Handle(model, method, layout, padding)


def restore(model: nn.Module) -> None:
    """Take off what :func:`accelerate` put on a model, if anything."""
    whole, _, _ = models.parts_of(model)
    if whole in _handles:
        _handles[whole].remove()


class Handle:
    """What :func:`accelerate` returns.

    Attributes:
        model: the model with a head, without a PeftModel around it.
        method: the method.
        selection: pyvtk.Selection of the last prompt's tokens that were there in the last layer; None: all of them.
        stages: of the last prompt, a list of (layer, Selection of the prompt's tokens).
    """

    def __init__(self, model: nn.Module, method: Method, layout, padding: str) -> None:
        self.model, self.inner, self.language_model = models.parts_of(model)
        self.method, self.padding = method, padding
        self.anatomy = models.anatomy_of(self.model)
        self.layout = layout or self.anatomy.layout
        if self.model in _handles:
            raise RuntimeError("accelerate: model has a handle already; remove() it, or restore(model)")
        self.config = self.language_model.config
        self.layers = self.language_model.layers
        models.check(self.language_model)
        self.form = masks.form_of(self.config._attn_implementation)
        self.visual_ids = [
            i for i in (getattr(self.model.config, name, None) for name in self.anatomy.ids) if i is not None
        ]
        self.method_stages = {stage.layer: stage for stage in method.stages(len(self.layers))}
        for layer in self.method_stages:
            if layer >= len(self.layers):
                raise ValueError(f"accelerate: {method!r} acts before layer {layer}, the model has {len(self.layers)}")
        if method.needs_layout and self.layout is None:
            raise NotImplementedError(
                f"accelerate: {type(method).__name__} needs a layout of {self.model.config.model_type}"
            )
        # the layer behind the last one that follows a plan
        self.plan_ends = min(self.method_stages, default=len(self.layers)) if method.attention else 0
        self.feed_forward_rows: dict[int, tuple | None] = {}  # from a layer's attention to what follows it in the layer
        self.images = Images(self)
        self.report: Report | None = None
        self._labels: Tensor | None = None
        self._hooks: list[Any] = []
        self._undo: list[Callable[[], None]] = []
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise
        _handles[self.model] = self

    # On and off

    def _attach(self) -> None:
        def before(module: nn.Module, hook) -> None:
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        if self.model is not self.inner:
            before(self.model, self._before_model)
        before(self.inner, self._before_inner)
        for name in ("vision_tower", "visual"):
            if hasattr(self.inner, name):  # it gets what the decoder gets
                before(getattr(self.inner, name), lambda module, args, kwargs: (args, _without(kwargs, KEY)))
        before(self.language_model, self._before_decoder)
        self._hooks.append(self.inner.register_forward_hook(self._after_inner, with_kwargs=True))
        for number, layer in enumerate(self.layers):
            before(layer, self._layer_hook(number))
            if self.method.evicts:
                self._hooks.append(layer.register_forward_hook(self._evict_hook(number), with_kwargs=True))
        if self.method.tower_layers or self.method.needs_layout:
            self._undo.append(self.images.watch_packing())
        if self.method.tower_layers:
            self._watch_tower()
        if self.method.attention:
            self._change_attention()

    def _watch_tower(self) -> None:
        kind = self.model.config.model_type
        if self.anatomy.tower is None:
            raise NotImplementedError(
                f"accelerate: {type(self.method).__name__} needs a tower with a CLS token, {kind} has none"
            )
        config = self.model.config
        if getattr(config, "vision_feature_layer", None) != -2 or config.vision_feature_select_strategy != "default":
            raise NotImplementedError("accelerate: the decoder must take the patches of the tower's last layer but one")
        self._hooks += self.images.watch_tower(set(self.method.tower_layers))

        def merge(module, args, kwargs):
            return (self.method.merge(self.images, args[0]), *args[1:]), kwargs

        self._hooks.append(self.inner.multi_modal_projector.register_forward_pre_hook(merge, with_kwargs=True))

    def _change_attention(self) -> None:
        for number, layer in enumerate(self.layers[: self.plan_ends]):
            heads = self.method.heads_of(number)
            if heads is not None and heads.shape != (self.config.num_attention_heads,):
                raise ValueError(
                    f"accelerate: heads of layer {number} must be [{self.config.num_attention_heads}], got {tuple(heads.shape)}"
                )
            if self.method.ffn > 1:
                self._undo.append(attention.split_feed_forward(self, number, layer.mlp, self.method.ffn))
        base = self.config._attn_implementation
        attention.switch(self.model, self.config, attention.register(base))
        self._undo.append(lambda: attention.switch(self.model, self.config, base))

    def remove(self) -> None:
        """Take everything off the model again."""
        for hook in self._hooks:
            hook.remove()
        for undo in reversed(self._undo):
            undo()
        self._hooks.clear()
        self._undo.clear()
        if _handles.get(self.model) is self:
            del _handles[self.model]

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error) -> None:
        self.remove()

    @property
    def selection(self) -> pyvtk.Selection | None:
        return self.report.stages[-1][1] if self.report and self.report.stages else None

    @property
    def stages(self) -> list[tuple[int, pyvtk.Selection]]:
        return list(self.report.stages) if self.report else []

    def __repr__(self) -> str:
        head = f"{type(self.model).__name__} with {self.method!r}"
        return f"{head}; no prompt yet" if self.report is None else f"{head}\n{self.report}"

    # Before the decoder

    def _before_model(self, module, args, kwargs):
        if kwargs.get("output_attentions"):
            raise NotImplementedError("accelerate: output_attentions cannot be had, since no map is built")
        labels = kwargs.get("labels")
        if labels is None:
            return None
        kwargs = {**kwargs, "labels": labels.clone()}
        self._labels = kwargs["labels"]
        return args, kwargs

    def _before_inner(self, module, args, kwargs):
        labels, self._labels = self._labels, None
        ids = args[0] if args else kwargs.get("input_ids")
        cache = _cache_of(kwargs)
        if ids is None:
            embeds = kwargs.get("inputs_embeds")
            if embeds is not None and embeds.shape[1] == 1:
                return args, {**kwargs, KEY: Step()}
            raise NotImplementedError("accelerate: input_ids must be given, or it is not known which tokens are visual")
        if ids.shape[1] == 1:
            return args, {**kwargs, KEY: Step()}
        visual = ids == self.visual_ids[0]
        for other in self.visual_ids[1:]:
            visual = visual | (ids == other)
        valid = None if self.padding == "none" else masks.valid_from_mask(kwargs.get("attention_mask"), ids.shape[1])
        if valid is not None:
            visual = visual & valid
        prompt = Prompt(self, ids, visual, valid, labels=labels)
        if labels is not None and self.method.answers:
            prompt.labelled = labels != -100
        prompt.position_ids = kwargs.get("position_ids")
        if self._prepare(prompt, cache) and not prompt.ready:
            return args, {**kwargs, KEY: Step()}
        return args, {**kwargs, KEY: prompt}

    def _prepare(self, prompt: Prompt, cache, last: bool = False) -> bool:
        """Learns of a prompt what the decoder will need: sizes, layout, plan. Whether all that can be known is known.

        In front of the model everything is, but positions that the model makes itself, and what its tower says of images
        that are not encoded yet. That is asked again in front of the decoder (``last``); a decoder that is compiled
        begins behind it.
        """
        method = self.method
        if not method.forces and prompt.sizes is None and not self._measure(prompt, cache):
            return True
        if method.needs_layout and prompt.layout is None:
            prompt.layout = self.layout(prompt)
            if prompt.layout is None:
                if last and method.forces and not self._measure(prompt, cache):
                    return True
                if last:
                    raise NotImplementedError("accelerate: it is not known where visual tokens stand; give layout=")
                return False
        if method.forces and prompt.sizes is None:
            prompt.keep = method.forced(self, prompt)
            if prompt.keep is None and not last:
                return False
            if not self._measure(prompt, cache):
                return True
            if prompt.keep is None:
                raise RuntimeError("accelerate: these images were encoded before the model was accelerated")
        if method.attention:
            prompt.plan = self.report.plan = method.plan(prompt.layout)
            if method.ffn > 1:
                prompt.rows = attention.rows_of(prompt)
        self.images.clear()
        prompt.ready = True
        return True

    def _measure(self, prompt: Prompt, cache) -> bool:
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
        self._size_stages(prompt)
        self.report = Report(self, prompt)
        return True

    def _size_stages(self, prompt: Prompt) -> None:
        sizes, exact = prompt.sizes, True
        tokens, there = sizes.lengths, sizes.visual
        for layer, stage in self.method_stages.items():
            keep = [self.method.num_keep(stage, n, whole) for n, whole in zip(there, sizes.visual)]
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
                num_keep = _on(prompt.visual.device, keep)
            exact = exact and stage.exact
            tokens = [held - n + stay for held, n, stay in zip(tokens, there, bound)]
            there = bound
            capacity = max(tokens)
            full = exact and all(n == capacity for n in tokens)
            prompt.stages[layer] = StageSizes(capacity, full, num_keep, tokens, there, exact)

    def _before_decoder(self, module, args, kwargs):
        prompt = kwargs.get(KEY)
        if not isinstance(prompt, Prompt):
            return None
        if module.training and getattr(self.config, "attention_dropout", 0):
            raise NotImplementedError("accelerate: attention_dropout must be 0 in training")
        if not prompt.ready:
            prompt.position_ids = kwargs.get("position_ids")
            self._prepare(prompt, _cache_of(kwargs), last=True)
            if not prompt.ready:
                return args, {**kwargs, KEY: Step()}
        tokens = Tokens(prompt.visual, prompt.valid, None, ends_full=prompt.sizes.ends_full)
        tokens.labelled = prompt.labelled
        deep = kwargs.get("deepstack_visual_embeds")
        if deep and min(self.method_stages, default=len(self.layers)) <= len(deep):
            embeds, where = kwargs["inputs_embeds"], kwargs["visual_pos_masks"][..., None]
            kwargs = {**kwargs, "deepstack_visual_embeds": None}
            tokens.additions = {
                number: torch.zeros_like(embeds).masked_scatter(where, values.to(embeds.dtype))
                for number, values in enumerate(deep)
            }
        prompt.tokens = {-1: tokens}
        return args, kwargs

    def _after_inner(self, module, args, kwargs, output):
        prompt = kwargs.get(KEY)
        if not isinstance(prompt, Prompt) or not prompt.ready:
            return output
        tokens = prompt.tokens[max(prompt.tokens)]
        self.report.finish(prompt)
        if tokens.selection is None:
            return output
        if prompt.labels is not None:
            gone = ~tokens.selection.mask()
            prompt.labels[:, 1:].masked_fill_(gone[:, :-1], -100)
        output["last_hidden_state"] = pyvtk.restore(tokens.selection, output["last_hidden_state"])
        return output

    # Between decoder layers

    def _layer_hook(self, number: int):
        stage = self.method_stages.get(number)
        # where this layer's run begins; all caches that were evicted from are alike
        run = max((layer for layer in self.method_stages if layer <= number), default=0 if self.method.evicts else -1)
        following = self.method_stages.get(number + 1)
        scores = following if following is not None and following.scores == "previous" else None

        def hook(layer, args, kwargs):
            known = kwargs.get(KEY)
            if known is None:
                return None
            if not (self.method.attention or self.method.evicts):
                kwargs = _without(kwargs, KEY)
            if isinstance(known, Step):
                return args, {**kwargs, **self._step(number, run, args, kwargs, known)}
            hidden = args[0] if args else kwargs["hidden_states"]
            cache = _cache_of(kwargs)
            if self.method.evicts:
                if cache is not None:
                    known.scores[number] = self._window(layer, hidden, kwargs["position_embeddings"], known)
                return None
            before = known.tokens[_run_before(known, number)]
            if number - 1 in before.additions:
                hidden = hidden + before.additions[number - 1]
            if stage is not None:
                hidden = self._prune(stage, layer, hidden, kwargs, known, before)
            tokens = known.tokens[run]
            if stage is None and cache is not None and (run >= 0 or self._some_heads_off(number)):
                self._mark(cache, number, tokens, known)
            if run >= 0:
                kwargs = {**kwargs, **tokens.changes()}
            if scores is not None:
                with torch.no_grad():
                    known.scores[number] = self._scores(
                        layer, hidden, kwargs["position_embeddings"], known, tokens, scores, cache
                    )
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _some_heads_off(self, number: int) -> bool:
        return self.method.attention and number < self.plan_ends and self.method.heads_of(number) is not None

    def _mark(self, cache, number: int, tokens: Tokens, prompt: Prompt) -> None:
        gone = prompt.input_ids.shape[1] - tokens.visual.shape[1]
        # newlines are text to attention, also at decode
        visual = prompt.layout.visual if self._some_heads_off(number) else None
        caches.prune_layer(cache, number, tokens.valid, visual, tokens.dropped, gone)

    def _last_rows(self, tokens: Tokens, *values: Tensor) -> tuple[Tensor, ...]:
        """[batch, 1, ...]: of each value [batch or 1, tokens, ...] the row of every sample's last token."""
        if tokens.ends_full:
            return tuple(x[:, -1:] for x in values)
        place = torch.arange(tokens.visual.shape[1], device=tokens.visual.device)
        last = torch.where(tokens.valid, place, -1).amax(1, keepdim=True)
        rows = pyvtk.Selection.from_indices(last, tokens.visual.shape[1], ascending=True)
        found = pyvtk.compact(rows, *values)
        return found if len(values) > 1 else (found,)

    def _scores(self, layer, hidden, position_embeddings, prompt: Prompt, tokens: Tokens, stage: Stage, cache):
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
            few, few_cos, few_sin = self._last_rows(tokens, hidden, cos, sin)
        q = models.project(layer, "q", layer.input_layernorm(few))
        if stage.rotary:
            q = models.rotate(q, few_cos, few_sin)
        if stage.scores == "previous" and stage.rotary and cache is not None:
            return q, None, positions, mask
        k = models.project(layer, "k", layer.input_layernorm(hidden))
        return q, models.rotate(k, cos, sin) if stage.rotary else k, positions, mask

    def _prune(self, stage: Stage, layer, hidden: Tensor, kwargs, prompt: Prompt, before: Tokens) -> Tensor:
        """The hidden states of the tokens that stay; what is known of them goes to ``prompt.tokens``."""
        number, cache = stage.layer, _cache_of(kwargs)
        batch, length = hidden.shape[:2]
        position_embeddings = before.position_embeddings or kwargs["position_embeddings"]
        sizes = prompt.stages[number]
        with torch.no_grad():
            q = k = positions = mask = None
            if stage.scores == "own":
                q, k, positions, mask = self._scores(layer, hidden, position_embeddings, prompt, before, stage, cache)
            elif stage.scores == "previous":
                q, k, positions, mask = prompt.scores[number - 1]
                if k is None:
                    k = cache.layers[number - 1].keys[:, :, :length]  # a static cache has room behind them
            num_keep = sizes.num_keep
            if num_keep is None:
                num_keep = self.method.num_keep(stage, before.visual.sum(1), prompt.visual.sum(1))
            selection = self.method.select(
                stage,
                Context(
                    q, k, positions, mask, hidden, before.visual, before.valid, num_keep, sizes.capacity,
                    prompt.keep if before.selection is None else None,
                ),
            )  # fmt: skip
        extra = list(before.additions.values())
        if before.labelled is not None:
            extra.append(before.labelled)
        hidden, cos, sin, visual, *more = pyvtk.compact(selection, hidden, *position_embeddings, before.visual, *extra)
        # compacted with hidden states, they would have a gradient too
        cos, sin = cos.detach(), sin.detach()
        valid = None if sizes.full else selection.valid
        after = Tokens(
            visual, valid, (cos, sin), selection if before.selection is None else before.selection.then(selection)
        )
        after.additions = dict(zip(before.additions, more))
        if before.labelled is not None:
            after.labelled = more[-1]
        if stage.rebase and not self.anatomy.mrope:
            self._rebase(hidden, kwargs["position_ids"], prompt, before, after, selection)
        held = caches.layer_of(cache, number)
        keys = held.max_cache_len if hasattr(held, "max_cache_len") else sizes.capacity
        after.attention_mask = masks.causal(
            self.form, hidden.dtype, valid, batch, sizes.capacity, keys, 0, hidden.device
        )
        prompt.tokens[number] = after
        if cache is not None:
            self._mark(cache, number, after, prompt)
        return hidden

    def _rebase(self, hidden: Tensor, position_ids: Tensor, prompt: Prompt, before: Tokens, after: Tokens, selection):
        """Positions counted anew from each sample's first token, without those that are gone."""
        capacity = after.visual.shape[1]
        first = before.first
        if first is None:
            first = position_ids if before.valid is None else torch.where(before.valid, position_ids, 2**62)
            first = first[:, :1] if before.valid is None else first.amin(1, keepdim=True)
        place = torch.arange(capacity, device=hidden.device)
        if after.valid is not None:
            place = (place - capacity + selection.counts[:, None]).clamp(min=0)
        after.first = first
        after.position_embeddings = self.language_model.rotary_emb(hidden, first + place)
        whole = prompt.visual.shape[1] if prompt.valid is None else prompt.valid.sum(1, keepdim=True)
        after.dropped = whole - selection.counts[:, None]

    # Out of the cache

    def _window(self, layer, hidden: Tensor, position_embeddings, prompt: Prompt) -> tuple:
        """Rotated queries [batch, heads, window, D] of the last tokens of each sample."""
        window = min(self.method.window, hidden.shape[1])
        cos, sin = position_embeddings
        with torch.no_grad():
            if prompt.sizes.ends_full:
                hidden, cos, sin = (x[:, -window:] for x in (hidden, cos, sin))
            else:
                if prompt.rows is None:  # the same in every layer
                    from_end = prompt.valid.flip(1).cumsum(1).flip(1)
                    last = prompt.valid & (from_end <= window)
                    prompt.rows = (pyvtk.Selection.from_mask(last, capacity=window, align="right"),)
                hidden, cos, sin = pyvtk.compact(prompt.rows[0], hidden, cos, sin)
            return models.rotate(models.project(layer, "q", layer.input_layernorm(hidden)), cos, sin)

    def _evict_hook(self, number: int):
        def hook(layer, args, kwargs, output):
            prompt, cache = kwargs.get(KEY), _cache_of(kwargs)
            if not isinstance(prompt, Prompt) or cache is None:
                return
            held, tokens = cache.layers[number], prompt.visual.shape[1]
            counts = [self.method.cached(length) for length in prompt.sizes.lengths]
            capacity = max(counts)
            num_keep = capacity if len(set(counts)) == 1 else _on(prompt.visual.device, counts)
            with torch.no_grad():
                keys, values = held.keys[:, :, :tokens], held.values[:, :, :tokens]
                selection = self.method.evict(prompt.scores.pop(number), keys, num_keep, capacity, prompt.valid)
                keys, values = pyvtk.compact(selection, keys, values, dim=2)
                valid = None if len(set(counts)) == 1 else selection.valid[:, 0]
                caches.replace_rows(held, keys, values)
                caches.prune_layer(cache, number, valid, None, None, tokens - capacity)

        return hook

    # Behind the prompt

    def _step(self, number: int, run: int, args, kwargs, step: Step) -> dict:
        """The keyword arguments that a layer gets instead of the model's own behind a prompt."""
        held = caches.layer_of(_cache_of(kwargs), number)
        if not isinstance(held, caches.PrunedLayer) or not held.is_initialized:
            return {}
        if held.visual is not None:
            step.visual[number] = self.method.heads_of(number), held
        if run < 0:
            return {}
        if run not in step.changes:
            hidden = args[0] if args else kwargs["hidden_states"]
            batch, queries = hidden.shape[:2]
            start = held.held
            keys = held.max_cache_len if isinstance(held, caches.PrunedStaticLayer) else start + queries
            changes = {
                "attention_mask": masks.causal(
                    self.form, hidden.dtype, held.valid, batch, queries, keys, start, hidden.device
                ),
                "position_ids": None,
            }
            if held.dropped is not None:
                changes["position_embeddings"] = self.language_model.rotary_emb(
                    hidden, kwargs["position_ids"] - held.dropped
                )
            step.changes[run] = changes
        return step.changes[run]


def _cache_of(kwargs: dict):
    """The KV cache: the argument was renamed in transformers 5.24."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache


def _without(kwargs: dict, key: str) -> dict:
    return {name: value for name, value in kwargs.items() if name != key}


def _run_before(prompt: Prompt, number: int) -> int:
    """Where the run of layers begins that layer ``number - 1`` belongs to."""
    return max(layer for layer in prompt.tokens if layer < number)


def _on(device: torch.device, numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, device="cpu").to(device, non_blocking=True)
