"""``accelerate``: hooks on a model of transformers that let a method drop tokens, and nothing else."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import pyvtk
from pyvtk.integrations.transformers import attention, caches, decode, eviction, masks, models, prefill, stages
from pyvtk.integrations.transformers.images import Images
from pyvtk.integrations.transformers.methods import Method
from pyvtk.integrations.transformers.prompt import KEY, Prompt
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
        model: LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL, Qwen2.5-VL, Qwen3-VL or InternVL of transformers 5.20
            or newer, also inside of a PeftModel; of a pipeline its ``model``.
        method: what to drop and where, e.g. ``FastV(layer=2, keep=0.5)``.
        layout: from a prompt to the TokenLayout of its tokens, where it is not what the model's kind says.
        padding: "auto": from the attention mask. "none": a promise that there is no padding, so that the mask is not
            looked at.

    Returns:
        A handle: ``print(handle)`` tells what the last prompt was spared, ``handle.remove()`` takes everything off
        again, and so does leaving ``with accelerate(...) as handle:``.

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
        self.group = models.group_of(self.model)
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
                    f"accelerate: heads of layer {number} must be [{self.config.num_attention_heads}], got "
                    f"{tuple(heads.shape)}"
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

    def run_of(self, number: int) -> int:
        """The layer at which the run of layers begins that layer ``number`` belongs to; -1: the first run."""
        # max(..., default=-1) over a generator is more than torch.compile traces
        return max([-1, *[layer for layer in self.method_stages if layer <= number]])

    # Hooks

    def _before_model(self, module, args, kwargs):
        if kwargs.get("output_attentions"):
            raise NotImplementedError("accelerate: output_attentions cannot be had, since no map is built")
        labels = kwargs.get("labels")
        if labels is None:
            return None
        self._labels = labels.clone()  # which is written to, once it is known whose rows are gone
        return args, {**kwargs, "labels": self._labels}

    def _before_inner(self, module, args, kwargs):
        labels, self._labels = self._labels, None
        prompt = prefill.begin(self, args[0] if args else kwargs.get("input_ids"), kwargs, labels)
        return args, {**kwargs, KEY: prompt or decode.Step()}

    def _before_decoder(self, module, args, kwargs):
        prompt = kwargs.get(KEY)
        if not isinstance(prompt, Prompt):
            return None
        if module.training and getattr(self.config, "attention_dropout", 0):
            raise NotImplementedError("accelerate: attention_dropout must be 0 in training")
        if not prompt.ready:
            prompt.position_ids = kwargs.get("position_ids")
            prefill.prepare(self, prompt, caches.cache_of(kwargs), last=True)
            if not prompt.ready:
                return args, {**kwargs, KEY: decode.Step()}
        return args, prefill.first_tokens(self, prompt, kwargs)

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

    def _layer_hook(self, number: int):
        def hook(layer, args, kwargs):
            known = kwargs.get(KEY)
            if known is None:
                return None
            if not (self.method.attention or self.method.evicts):
                kwargs = _without(kwargs, KEY)  # attention of transformers has no use for it
            hidden = args[0] if args else kwargs["hidden_states"]
            if isinstance(known, decode.Step):
                kwargs = {**kwargs, **decode.changes(self, number, hidden, kwargs, known)}
            elif self.method.evicts:
                eviction.window_queries(self, number, layer, hidden, kwargs, known)
            else:
                hidden, kwargs = stages.enter(self, number, layer, hidden, kwargs, known)
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        return hook

    def _evict_hook(self, number: int):
        def hook(layer, args, kwargs, output):
            prompt = kwargs.get(KEY)
            if isinstance(prompt, Prompt) and caches.cache_of(kwargs) is not None:
                eviction.evict(self, number, kwargs, prompt)

        return hook


def _without(kwargs: dict, key: str) -> dict:
    return {name: value for name, value in kwargs.items() if name != key}
