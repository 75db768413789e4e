"""What published token-dropping methods compute inside a vision-language model: slowly, in float64, sample by sample.

Written from the papers and their authors' code, and independent of pyvtk. The whole sequence [prompt, generated] is
computed anew: no cache, no padding; attention is an explicit map, tokens that stay are Python lists. Weights, norms,
projections, rotary tables and the vision tower are the model's own, in float64.

A method is any object whose class has one of the names below and whose fields are these:

- FastV: before ``layer``, by the map of the layer before; round(visual * keep) stay, with their positions.
- PyramidDrop: before each of ``layers``, by that layer's own queries and keys on the tokens that are there;
  floor(visual * keep) of the original number stay; positions are counted anew.
- Feather: before each of two ``layers``, by queries and keys of the layer before without rotation, among visual keys
  only; floor(visual * keep) and each image's lattice [::stride, ::stride], then floor(there * keep**2).
- YOPO: visual tokens see those of their own grid within ``radius`` (later ones too) and earlier text; before ``cut``
  they leave. Where ``heads[layer]`` is False, what a head would take from visual keys is taken as zero, and its output
  for visual rows is zero. Visual rows pass the first 1/``ffn`` of the channels of the MLP.
- HiRED, VisionZip, DivPrune: visual tokens are chosen, or merged, before the first layer.
- SnapKV: the cache of each KV head keeps the prompt's last ``window`` tokens and those that they attend to most,
  floor(prompt * keep) together; only generated tokens notice.

Where the last prompt token is asked (FastV, PyramidDrop, Feather), heads are averaged, and of equal scores the lower
index wins. With M-RoPE, positions are never counted anew: they are the places in the grid (VScan's rule).
"""

from __future__ import annotations

import copy
import math
import types
from dataclasses import dataclass, replace

import tiny_models
import torch
from oracle_before import DROPPED_BEFORE, DivPrune, HiRED, VisionZip  # noqa: F401  tests name all methods here
from oracle_tokens import Tokens, Trace, best
from torch import Tensor, nn


@dataclass(frozen=True)
class FastV:
    layer: int = 2
    keep: float = 0.5


@dataclass(frozen=True)
class PyramidDrop:
    layers: tuple[int, ...] = (1, 2, 4)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)


@dataclass(frozen=True)
class Feather:
    layers: tuple[int, int] = (2, 4)
    keep: float = 0.3
    stride: int = 3


@dataclass(frozen=True)
class YOPO:
    radius: int = 2
    cut: int | None = None
    heads: list | None = None  # per layer bool [heads], or None for all
    ffn: int = 1


@dataclass(frozen=True)
class SnapKV:
    window: int = 8
    keep: float = 0.25
    kernel: int = 5
    pool: str = "avg"  # or "max"


# --- the model in float64 ---------------------------------------------------------------------------------------------


def exact(model: nn.Module) -> nn.Module:
    """A copy of the model in float64. RMS norms, which transformers computes in float32, are float64 too.

    Rotary tables stay as the model makes them, in float32: they depend on positions alone. So do the rotations in
    towers of Qwen's models.
    """
    if any(part._forward_pre_hooks for part in model.modules()):
        raise ValueError("oracle: model must have no hooks; remove the adapter first")
    if getattr(model, "_exact", False):
        return model
    model = copy.deepcopy(model).double()
    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = types.MethodType(_rms_norm, part)
    model._exact = True
    return model


def _rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()


# --- what is asked ----------------------------------------------------------------------------------------------------


def logits(
    name: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: object | None = None,
    generated: Tensor | list[int] = (),
    *,
    newlines: str = "visual",
) -> Tensor:
    """Logits of the last prompt token and of every generated one.

    Args:
        name: one of tiny_models.NAMES.
        model: unmodified; any dtype.
        inputs: of one sample without padding (``tiny_models.one``).
        method: what is dropped; None: nothing.
        generated: tokens that follow the prompt; text.
        newlines: newline tokens of anyres images are "visual" tokens, as they are for the model: they compete, leave at
            a cut, and have the MLP of visual tokens; or "text", which always stays. They have no cell in a grid, so in
            attention they are text in either case.

    Returns:
        float64 [len(generated) + 1, vocabulary].
    """
    return trace(name, model, inputs, method, generated, newlines=newlines).logits[-len(generated) - 1 :]


@torch.no_grad()
def trace(
    name: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    method: object | None = None,
    generated: Tensor | list[int] = (),
    *,
    newlines: str = "visual",
) -> Trace:
    """As :func:`logits`, but all rows, and which tokens stayed where."""
    model = exact(model)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    tokens = embed(name, model, inputs, torch.as_tensor(generated, dtype=torch.int64), newlines)
    return _forward(name, model, inputs, tokens, method)


def gradients(
    name: str,
    model: nn.Module,
    inputs: dict[str, Tensor],
    labels: Tensor,
    method: object | None = None,
    *,
    newlines: str = "visual",
) -> tuple[Tensor, dict[str, Tensor], list[Trace]]:
    """Loss of a batch and its gradients, by autograd through the slow path; scores have none.

    PyramidDrop asks the tokens before answers: those whose label is -100 and whose successor's, in the sequence as it
    is then, is not; their attention is averaged. A sample without answers is left whole. YOPO asks nobody.

    Args:
        inputs: of :func:`tiny_models.batch`, padding on either side.
        labels: int64, shaped like input_ids; -100 where there is no answer.
        method: PyramidDrop, YOPO or None.

    Returns:
        loss, the mean over answer tokens of the batch whose preceding token is still there in the last layer (an answer
        right behind an image may lose its first one); float64 gradients by parameter name, without those of unused
        parameters; the traces of the samples.
    """
    if method is not None and type(method).__name__ not in ("PyramidDrop", "YOPO"):
        raise ValueError(f"gradients: method must be PyramidDrop or YOPO, got {type(method).__name__}")
    model = exact(model)
    if model.training:
        raise ValueError("gradients: model must be in eval mode: dropout has no oracle")
    model.requires_grad_()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    losses, traces = [], []
    for sample in range(len(labels)):
        alone = tiny_models.one(name, inputs, sample)
        label = labels[sample][inputs["attention_mask"][sample].bool()].tolist()
        tokens = embed(name, model, alone, torch.empty(0, dtype=torch.int64), newlines)
        tokens.labels = label
        traces.append(_forward(name, model, alone, tokens, method))
        for row, place in enumerate(traces[-1].rows):
            if place + 1 < len(label) and label[place + 1] != -100:
                losses.append(-traces[-1].logits[row].log_softmax(-1)[label[place + 1]])
    loss = torch.stack(losses).mean()
    named = {key: p for key, p in model.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return loss.detach(), {key: grad for key, grad in zip(named, found) if grad is not None}, traces


# --- the sequence -----------------------------------------------------------------------------------------------------


def features_of(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """Visual features [visual tokens, channels] of the model's own tower, and those of the first layers."""
    if "pixel_values_videos" in inputs:
        out = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    elif "pixel_values" in inputs:
        out = model.model.get_image_features(**tiny_models.visual_inputs(inputs), return_dict=True)
    else:
        return None, []
    features = out.pooler_output
    features = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
    layers = getattr(out, "deepstack_features", None) or []
    return features, [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in layers]


def embed(name: str, model: nn.Module, inputs: dict[str, Tensor], generated: Tensor, newlines: str) -> Tokens:
    if newlines not in ("visual", "text"):
        raise ValueError(f"oracle: newlines must be 'visual' or 'text', got {newlines!r}")
    prompt = inputs["input_ids"][0]
    ids = torch.cat([prompt, generated])
    where = ((ids == tiny_models.IMAGE) | (ids == tiny_models.VIDEO)).nonzero()[:, 0]
    hidden = model.get_input_embeddings()(ids)
    features, layers = features_of(model, inputs)
    deepstack = []
    if features is not None:
        hidden = hidden.index_copy(0, where, features)
        deepstack = [torch.zeros_like(hidden).index_copy(0, where, layer) for layer in layers]
    visual, cells = [False] * len(ids), [None] * len(ids)
    for i, place in zip(where.tolist(), tiny_models.places(name, inputs), strict=True):
        visual[i] = place.cell is not None or newlines == "visual"
        cells[i] = place if place.cell is not None else None
    positions = _positions(name, model, inputs, len(ids))
    return Tokens(hidden, positions, list(range(len(ids))), visual, cells, len(prompt), deepstack, sum(visual))


def _positions(name: str, model: nn.Module, inputs: dict[str, Tensor], total: int) -> Tensor:
    """The model's own rule for the prompt; generated text counts on from its largest position."""
    if name not in tiny_models.MROPE:
        return torch.arange(total)[None]
    grids = {key: inputs[key] for key in ("image_grid_thw", "video_grid_thw") if key in inputs}
    if not grids:
        return torch.arange(total).expand(3, -1)
    length = inputs["input_ids"].shape[1]
    asked = {key: inputs[key] for key in ("input_ids", "mm_token_type_ids", "attention_mask")}
    known, _ = model.model.get_rope_index(**asked, **grids)
    more = known.max() + 1 + torch.arange(total - length)
    return torch.cat([known[:, 0], more.expand(3, -1)], 1)


# --- layers -----------------------------------------------------------------------------------------------------------


def _project(layer: nn.Module, part: str, x: Tensor) -> Tensor:
    """Queries, keys or values [heads, tokens, channels], not rotated; of keys and values one for each KV head."""
    attention = layer.self_attn
    x = getattr(attention, f"{part}_proj")(x).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{part}_norm", None)
    return (x if norm is None else norm(x)).transpose(0, 1)


def _rotate(lm: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
    """x [heads, tokens, channels], rotated by the model's own tables."""
    positions = positions[:, None] if len(positions) == 3 else positions
    cos, sin = (table[0] for table in lm.rotary_emb(x, positions))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def _logits_of(lm: nn.Module, layer: nn.Module, tokens: Tokens, *, rotated: bool = True) -> Tensor:
    """Scaled products of all queries and keys, [heads, queries, keys]."""
    x = layer.input_layernorm(tokens.hidden)
    q, k = _project(layer, "q", x), _project(layer, "k", x)
    if rotated:
        q, k = _rotate(lm, q, tokens.positions), _rotate(lm, k, tokens.positions)
    return q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2) * layer.self_attn.scaling


def _causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def _visible(tokens: Tokens, method: object | None) -> Tensor:
    """bool [queries, keys]: which tokens see which."""
    seen = _causal(len(tokens.places))
    if type(method).__name__ == "YOPO":
        for i, query in enumerate(tokens.cells):
            for j, key in enumerate(tokens.cells):
                if query is not None and key is not None:
                    same = (query.image, query.grid) == (key.image, key.grid)
                    near = all(abs(a - b) <= method.radius for a, b in zip(query.cell, key.cell))
                    seen[i, j] = same and near
    return seen


def _softmax(z: Tensor, seen: Tensor) -> Tensor:
    return z.masked_fill(~seen, -math.inf).softmax(-1)


def _forward(name: str, model: nn.Module, inputs: dict, tokens: Tokens, method: object | None) -> Trace:
    kind = None if method is None else type(method).__name__
    if kind not in (None, *DROPPED_BETWEEN_LAYERS, *DROPPED_BEFORE, "YOPO", "SnapKV"):
        raise ValueError(f"oracle: method must be one that it knows, got {kind}")
    found, lm = Trace(), model.model.language_model
    if kind in DROPPED_BEFORE and any(tokens.visual):
        tokens = DROPPED_BEFORE[kind](name, model, inputs, tokens, method, found).counted_anew()
        found.kept[0] = tokens.places
    visible = _visible(tokens, method)
    before = None  # the last layer, and the tokens that it was given
    for index, layer in enumerate(lm.layers):
        rows = None
        if kind == "YOPO" and index == method.cut:
            rows = [row for row, visual in enumerate(tokens.visual) if not visual]
        elif kind in DROPPED_BETWEEN_LAYERS:
            with torch.no_grad():
                rows = DROPPED_BETWEEN_LAYERS[kind](lm, index, before, tokens, method, found)
        if rows is not None:
            tokens, visible = tokens.take(rows), visible[rows][:, rows]
            if kind == "PyramidDrop":
                tokens = tokens.counted_anew()
            found.kept[index] = tokens.places
        before = (layer, tokens)
        hidden = _layer(lm, index, layer, tokens, visible, method, found)
        if index < len(tokens.deepstack):
            hidden = hidden + tokens.deepstack[index][tokens.places]
        tokens = replace(tokens, hidden=hidden)
    found.logits = model.lm_head(lm.norm(tokens.hidden))
    found.rows = tokens.places
    return found


def _layer(
    lm: nn.Module, index: int, layer: nn.Module, tokens: Tokens, visible: Tensor, method: object | None, found: Trace
) -> Tensor:
    yopo = type(method).__name__ == "YOPO" and (method.cut is None or index < method.cut)
    attended = _softmax(z := _logits_of(lm, layer, tokens), visible)
    if type(method).__name__ == "SnapKV":
        cached = found.cached[index] = _snapkv(attended, tokens, layer.self_attn.num_key_value_groups, method, found)
        attended = _softmax(z, _of_cache(visible, cached, tokens, layer.self_attn.num_key_value_groups))
    if yopo and method.heads is not None and method.heads[index] is not None:
        off = ~torch.as_tensor(method.heads[index]).bool()
        cell = torch.tensor([place is not None for place in tokens.cells])
        attended = attended.masked_fill(off[:, None, None] & (cell | cell[:, None]), 0)
    v = _project(layer, "v", layer.input_layernorm(tokens.hidden))
    out = attended @ v.repeat_interleave(len(attended) // len(v), 0)
    hidden = tokens.hidden + layer.self_attn.o_proj(out.transpose(0, 1).flatten(1))
    x, mlp = layer.post_attention_layernorm(hidden), layer.mlp
    channels = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    if yopo and method.ffn > 1:
        cut_off = torch.arange(channels.shape[1]) >= channels.shape[1] // method.ffn
        channels = channels.masked_fill(torch.tensor(tokens.visual)[:, None] & cut_off, 0)
    return hidden + mlp.down_proj(channels)


# --- methods ----------------------------------------------------------------------------------------------------------


def _staying(tokens: Tokens, scores: Tensor, count: int, found: Trace, always: frozenset[int] = frozenset()) -> list:
    """Rows that stay: the best visual ones, those of ``always`` and what is not visual."""
    candidates = tokens.candidates()
    stay = {candidates[i] for i in best([float(scores[row]) for row in candidates], count, found)} | always
    return [row for row, visual in enumerate(tokens.visual) if not visual or row in stay]


def _asked(tokens: Tokens) -> list[int]:
    """Rows whose attention counts: the last prompt token, or in training those with an answer token behind them."""
    if tokens.labels is None:
        return [tokens.places.index(tokens.prompt - 1)]
    labels = [tokens.labels[place] for place in tokens.places]
    return [row for row in range(len(labels) - 1) if labels[row] == -100 and labels[row + 1] != -100]


def _fastv(lm, index: int, before, tokens: Tokens, method, found: Trace) -> list[int] | None:
    if index != method.layer or not any(tokens.visual):
        return None
    layer, earlier = before
    attended = _softmax(_logits_of(lm, layer, earlier), _causal(len(earlier.places)))
    scores = attended.mean(0)[_asked(tokens)[0]]
    return _staying(tokens, scores, round(sum(tokens.visual) * method.keep), found)


def _pyramid_drop(lm, index: int, before, tokens: Tokens, method, found: Trace) -> list[int] | None:
    asked = _asked(tokens)
    if index not in method.layers or not tokens.num_visual or not asked:
        return None
    attended = _softmax(_logits_of(lm, lm.layers[index], tokens), _causal(len(tokens.places)))
    scores = attended.mean(0)[asked].mean(0)
    keep = method.keep[list(method.layers).index(index)]
    return _staying(tokens, scores, int(tokens.num_visual * keep), found)


def _feather(lm, index: int, before, tokens: Tokens, method, found: Trace) -> list[int] | None:
    if index not in method.layers or not any(tokens.visual):
        return None
    layer, earlier = before
    z = _logits_of(lm, layer, earlier, rotated=False)[:, _asked(tokens)[0]]
    scores = _softmax(z, torch.tensor(tokens.visual)).mean(0)
    there = sum(tokens.visual)
    if index != method.layers[0]:
        return _staying(tokens, scores, int(there * method.keep**2), found)
    lattice = frozenset(
        row
        for row, place in enumerate(tokens.cells)
        if place is not None and place.cell[1] % method.stride == 0 and place.cell[2] % method.stride == 0
    )
    return _staying(tokens, scores, int(there * method.keep), found, lattice)


DROPPED_BETWEEN_LAYERS = {"FastV": _fastv, "PyramidDrop": _pyramid_drop, "Feather": _feather}


def _snapkv(attended: Tensor, tokens: Tokens, group: int, method, found: Trace) -> list[list[int]]:
    """For each KV head the prompt tokens that stay in its cache."""
    prompt = tokens.prompt
    window = min(method.window, prompt)
    count = max(int(prompt * method.keep), window) - window
    past = prompt - window
    observed = attended[:, past:prompt, :past].sum(1)  # [heads, past]
    half = method.kernel // 2
    kept = []
    for heads in observed.split(group):
        scores = [0.0] * past
        for head in heads.tolist():
            padded = [0.0] * half + head + [0.0] * half
            for i in range(past):
                near = padded[i : i + method.kernel]
                scores[i] += max(near) if getattr(method, "pool", "avg") == "max" else sum(near) / method.kernel
        kept.append([*best(scores, count, found), *range(past, prompt)])
    return kept


def _of_cache(visible: Tensor, cached: list[list[int]], tokens: Tokens, group: int) -> Tensor:
    """bool [heads, queries, keys]: generated tokens see what is cached of the prompt."""
    seen = visible.repeat(group * len(cached), 1, 1)
    for head in range(len(seen)):
        gone = sorted(set(range(tokens.prompt)) - set(cached[head // group]))
        seen[head, tokens.prompt :, gone] = False
    return seen
