"""The methods that :func:`accelerate` runs: what is chosen, and where. Everything else (masks, caches, positions,
sizes) is the adapter's.

A method is a small frozen dataclass over functions of :mod:`pyvtk.methods`. Layers count from 0 and a stage acts
before its layer; shares are of the sample's visual tokens. A method of your own subclasses :class:`Method` and says
where it acts (``stages``) and what stays (``num_keep``, ``select``): ``examples/write_a_method.py``.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import pyvtk
from pyvtk.methods import divprune, fastv, feather, hired, pyramiddrop, snapkv, visionzip, yopo


@dataclass(frozen=True)
class Stage:
    """A place in the decoder at which tokens leave.

    Attributes:
        layer: they leave before this layer.
        number: which of the method's stages it is, from 0.
        scores: from which attention the method wants q and k: "own" (the layer's own, of all tokens that are still
            there), "previous" (the layer before it), or None.
        rotary: whether q and k are rotated.
        rebase: whether positions are counted anew (never done where positions are those of a grid).
        exact: whether ``num_keep`` says how many visual tokens stay; else they are at most that many, and rows may be
            shorter.
    """

    layer: int
    number: int = 0
    scores: str | None = None
    rotary: bool = True
    rebase: bool = False
    exact: bool = True


@dataclass(frozen=True)
class Context:
    """What a method chooses by, at one stage.

    Attributes:
        q: [batch, Hq, M, D], the scoring rows: the last token of each sample, or what training scores from.
        k: [batch, Hkv, tokens, D].
        q_positions, q_mask: [batch, M], of several scoring rows; None for the last token.
        hidden: [batch, tokens, C], the hidden states.
        visual, valid: bool [batch, tokens]; valid None: there is no padding.
        num_keep: how many visual tokens stay: int, or int tensor [batch].
        capacity: slots of the selection, which holds all other tokens too.
        keep: bool [batch, tokens]: what ``forced`` gave, at the first stage.
        group: the torch.distributed.ProcessGroup over whose ranks the heads of q and k lie; None: all are here.
    """

    q: Tensor | None
    k: Tensor | None
    q_positions: Tensor | None
    q_mask: Tensor | None
    hidden: Tensor
    visual: Tensor
    valid: Tensor | None
    num_keep: int | Tensor
    capacity: int
    keep: Tensor | None = None
    group: Any = None

    @property
    def options(self) -> dict:
        """What functions of :mod:`pyvtk.methods` take by name."""
        return {"valid": self.valid, "capacity": self.capacity, "align": "right"}


class Method:
    """What the adapter asks of a method. Every answer is for the host and takes no tensors but those of ``select``.

    Attributes:
        needs_layout: whether it asks where tokens stand.
        answers: whether training scores from the rows before answers, instead of the last row.
        forces: whether the first stage keeps visual tokens that ``forced`` chooses before the decoder.
        tower_layers: layers of the vision tower whose CLS token and keys it asks for; negative: from the end.
        attention: whether it has a say in the attention of decoder layers: ``plan``, ``heads_of``, ``ffn``, ``listen``.
        ffn: before the first stage visual tokens take the first 1 / ffn of the feed-forward channels.
        evicts: whether it shortens the cache behind the prompt: ``window``, ``cached``, ``evict``.
    """

    needs_layout = False
    answers = False
    forces = False
    tower_layers: tuple[int, ...] = ()
    attention = False
    ffn = 1
    evicts = False

    def stages(self, num_layers: int) -> list[Stage]:
        """Where tokens leave, in order."""
        return []

    def num_keep(self, stage: Stage, there, prompt):
        """How many of a sample's visual tokens this stage chooses.

        Args:
            there: visual tokens before this stage: int, or where that is not known to the host (``Stage.exact``) an int
                tensor [batch].
            prompt: visual tokens in the prompt, likewise.

        Returns:
            Of the same kind; with ``forced`` tokens besides.
        """
        raise NotImplementedError

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        """The tokens that stay, of all that are there: ``context.capacity`` slots, aligned to the right."""
        raise NotImplementedError

    def forced(self, handle, prompt) -> Tensor | None:
        """bool [batch, tokens]: visual tokens that the first stage keeps besides those it chooses (``Context.keep``).
        None: what it depends on is not known yet."""
        return None

    def plan(self, layout: pyvtk.TokenLayout | None) -> pyvtk.AttentionPlan | None:
        """What attention follows before the first stage; None: the model's own rule."""
        return None

    def heads_of(self, layer: int) -> Tensor | None:
        """bool [heads], which heads of a layer look at visual tokens; None: all."""
        return None

    def listen(self, prompt, layer: int, query: Tensor, key: Tensor) -> None:
        """Hears the rotated queries and keys [batch, heads, tokens, D] of every layer of a prompt."""

    def merge(self, images, features: Tensor) -> Tensor:
        """What goes into the projector, of what comes out of the tower: [crops, patches, C]."""
        return features


def _share(op: str, name: str, value, least: float = 0.0) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise ValueError(f"{op}: {name} must be a share from {least:g} to 1, got {value!r}")


def _layer(op: str, name: str, value, least: int = 0) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: {name} must be an int of at least {least}, got {value!r}")


def _ladder(op: str, layers, keep) -> None:
    if not isinstance(layers, Sequence) or not isinstance(keep, Sequence) or len(layers) != len(keep) or not layers:
        raise ValueError(f"{op}: layers and keep must be sequences of one length, got {layers!r} and {keep!r}")
    for layer in layers:
        _layer(op, "layers", layer)
    for share in keep:
        _share(op, "keep", share)
    if any(b <= a for a, b in itertools.pairwise(layers)) or any(b > a for a, b in itertools.pairwise(keep)):
        raise ValueError(f"{op}: layers must ascend and keep must not, got {layers!r} and {keep!r}")


@dataclass(frozen=True)
class FastV(Method):
    """Drop visual tokens once, by the attention that the last token gives them in the layer before.

    ``layer``: from this one on they are gone. ``keep``: the share that stays, rounded; positions stay.
    Source: FastV (arXiv 2403.06764), :mod:`pyvtk.methods.fastv`.
    """

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        _layer("FastV", "layer", self.layer, 1)
        _share("FastV", "keep", self.keep)

    def stages(self, num_layers: int) -> list[Stage]:
        return [Stage(self.layer, scores="previous")]

    def num_keep(self, stage: Stage, there, prompt):
        return fastv.num_keep(prompt, self.keep)

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        return fastv.select(
            context.q, context.k, context.visual, context.num_keep, group=context.group, **context.options
        )


@dataclass(frozen=True)
class PyramidDrop(Method):
    """Drop visual tokens in stages, by the attention of the last instruction token (in training: of every token that an
    answer follows) in the stage's own layer.

    ``keep``: shares of the prompt's visual tokens, rounded down. Positions are counted anew, but where they are those
    of a grid (M-RoPE). In training a sample without an answer keeps everything.
    Source: PyramidDrop (arXiv 2410.17247), :mod:`pyvtk.methods.pyramiddrop`.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    answers = True

    def __post_init__(self) -> None:
        _ladder("PyramidDrop", self.layers, self.keep)

    def stages(self, num_layers: int) -> list[Stage]:
        return [Stage(layer, number, scores="own", rebase=True) for number, layer in enumerate(self.layers)]

    def num_keep(self, stage: Stage, there, prompt):
        return pyramiddrop.num_keep(prompt, self.keep[stage.number])

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        return pyramiddrop.select(
            context.q, context.k, context.visual, context.num_keep, q_positions=context.q_positions,
            q_mask=context.q_mask, group=context.group, **context.options,
        )  # fmt: skip


@dataclass(frozen=True)
class Feather(Method):
    """Drop visual tokens twice, by attention without rotary embedding; a lattice of them survives the first stage.

    ``keep``: the share that the first stage chooses, besides every ``stride``-th token along both axes of the grid; of
    those the second keeps ``keep ** 2``. Positions stay.
    Source: FEATHER (arXiv 2412.13180), :mod:`pyvtk.methods.feather`.
    """

    layers: tuple[int, ...] = (8, 16)
    keep: float = 0.3
    stride: int = 3
    needs_layout = True
    forces = True

    def __post_init__(self) -> None:
        if not 1 <= len(self.layers) <= 2:
            raise ValueError(f"Feather: layers must be one or two, got {self.layers!r}")
        for layer in self.layers:
            _layer("Feather", "layers", layer, 1)
        if sorted(set(self.layers)) != list(self.layers):
            raise ValueError(f"Feather: layers must ascend, got {self.layers!r}")
        _share("Feather", "keep", self.keep)
        _layer("Feather", "stride", self.stride, 1)

    def stages(self, num_layers: int) -> list[Stage]:
        return [
            Stage(layer, number, scores="previous", rotary=False, exact=False)
            for number, layer in enumerate(self.layers)
        ]

    def forced(self, handle, prompt) -> Tensor:
        return feather.lattice(prompt.layout, self.stride)

    def num_keep(self, stage: Stage, there, prompt):
        return feather.num_keep(there, self.keep, stage.number + 1)

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        return feather.select(
            context.q,
            context.k,
            context.visual,
            context.num_keep,
            lattice=context.keep,
            group=context.group,
            **context.options,
        )


@dataclass(frozen=True, eq=False)
class YOPO(Method):
    """Visual tokens attend to their neighbours only, leave at a layer, and take less of heads and feed-forward layers.

    ``radius``: neighbours along each axis of the grid (of videos with M-RoPE, t counts in steps of positions).
    ``cut``: the layer at which visual tokens leave; None: they stay. ``heads``: bool [layers, heads], or a list of
    bool [heads] or None for each layer: heads that are off give no weight to visual keys, which stay in the
    denominator (:func:`calibrate_heads` makes it). ``ffn``: visual tokens take the first 1 / ffn of the feed-forward
    channels. ``causal_window``, ``cross_image``: as of :func:`pyvtk.neighbor_plan`; with both and a radius past the
    grid, attention is the model's own.
    Source: YOPO (arXiv 2410.06169), :mod:`pyvtk.methods.yopo`.
    """

    radius: int | tuple[int, int, int] = 2
    cut: int | None = None
    heads: Sequence[Tensor | None] | Tensor | None = None
    ffn: int = 1
    causal_window: bool = False
    cross_image: bool = False
    needs_layout = True
    attention = True

    def __post_init__(self) -> None:
        if self.cut is not None:
            _layer("YOPO", "cut", self.cut)
        _layer("YOPO", "ffn", self.ffn, 1)

    def stages(self, num_layers: int) -> list[Stage]:
        return [] if self.cut is None else [Stage(self.cut)]

    def num_keep(self, stage: Stage, there, prompt):
        return 0

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        return yopo.drop_visual(context.visual, **context.options)

    def heads_of(self, layer: int) -> Tensor | None:
        """bool [heads] of a layer; None: all are on."""
        if self.heads is not None and layer >= len(self.heads):
            raise ValueError(f"YOPO: heads must have an entry for every layer, got {len(self.heads)}")
        return None if self.heads is None else self.heads[layer]

    def plan(self, layout: pyvtk.TokenLayout) -> pyvtk.AttentionPlan:
        return yopo.plan(layout, self.radius, causal_window=self.causal_window, cross_image=self.cross_image)


@dataclass(frozen=True)
class DivPrune(Method):
    """Keep the most diverse visual tokens, before the decoder.

    ``keep``: the share that stays, rounded. Positions are counted anew, but where they are those of a grid.
    Source: DivPrune (arXiv 2503.02175), :mod:`pyvtk.methods.divprune`.
    """

    keep: float = 0.098

    def __post_init__(self) -> None:
        _share("DivPrune", "keep", self.keep)

    def stages(self, num_layers: int) -> list[Stage]:
        return [Stage(0, rebase=True)]

    def num_keep(self, stage: Stage, there, prompt):
        return divprune.num_keep(prompt, self.keep)

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        return divprune.select(context.hidden, context.num_keep, visual=context.visual, **context.options)


class _Tower(Method):
    """Methods that choose among the patches of each crop, by what the vision tower's CLS token attends to."""

    forces = True

    def stages(self, num_layers: int) -> list[Stage]:
        return [Stage(0, rebase=True)]

    def num_keep(self, stage: Stage, there, prompt):
        return 0

    def choose(self, images) -> Tensor:
        """bool [crops, patches]: the patches that stay."""
        raise NotImplementedError

    def forced(self, handle, prompt) -> Tensor | None:
        images = handle.images
        if not images.keys:
            return None
        chosen = self.choose(images) if images.chosen is None else images.chosen
        values = images.to_placeholders(chosen[..., None].float())
        return images.to_tokens(prompt, values[:, 0] > 0.5, False)

    def select(self, stage: Stage, context: Context) -> pyvtk.Selection:
        stays = context.keep | ~context.visual
        if context.valid is not None:
            stays = stays & context.valid
        return pyvtk.Selection.from_mask(stays, capacity=context.capacity, align="right")


@dataclass(frozen=True)
class HiRED(_Tower):
    """Keep the patches that the tower's CLS token attends to, with a budget for each crop of an image.

    ``keep``: the share of the tower's patches that stays; ``alpha``: what of it the small picture of the whole image
    gets. The budget of a crop follows the attention of the tower's first layer, the choice that of the layer whose
    output the decoder takes. Positions are counted anew. Models with a CLIP tower.
    Source: HiRED (arXiv 2408.10945), :mod:`pyvtk.methods.hired`.
    """

    keep: float = 0.2
    alpha: float = 0.5
    tower_layers = (0, -2)

    def __post_init__(self) -> None:
        _share("HiRED", "keep", self.keep)
        _share("HiRED", "alpha", self.alpha)

    def choose(self, images) -> Tensor:
        first, late = (hired.cls_scores(images.cls_queries[layer], images.keys[layer]) for layer in self.tower_layers)
        budgets = hired.budgets(first, images.cu_seqlens(), self.keep, self.alpha)
        return hired.select(late, budgets, late.shape[1]).mask()


@dataclass(frozen=True)
class VisionZip(_Tower):
    """Keep the patches that the tower's CLS token attends to, and merge the others into a few more.

    ``dominant``, ``contextual``: of each crop, how many patches stay as they are and how many merged ones there are:
    ints, or shares of the patches, rounded down. (The paper counts the CLS token, which these models drop, as
    dominant: its 54 + 10 are 53 and 10 here.) Positions are counted anew. Models with a CLIP tower.
    Source: VisionZip (arXiv 2412.04467), :mod:`pyvtk.methods.visionzip`.
    """

    dominant: int | float = 53
    contextual: int | float = 10
    tower_layers = (-2,)

    def __post_init__(self) -> None:
        for name in ("dominant", "contextual"):
            value = getattr(self, name)
            if isinstance(value, float):
                _share("VisionZip", name, value)
            else:
                _layer("VisionZip", name, value)

    def choose(self, images) -> Tensor:
        raise RuntimeError("VisionZip: patches are chosen before the projector")

    def merge(self, images, features: Tensor) -> Tensor:
        (layer,) = self.tower_layers
        queries, keys = images.cls_queries[layer], images.keys[layer]
        patches = features.shape[1]
        dominant, contextual = (
            int(patches * x) if isinstance(x, float) else x for x in (self.dominant, self.contextual)
        )
        best = visionzip.select(queries, keys, dominant)
        targets, assignment = visionzip.contextual(keys[:, :, 1:].mean(1), best, contextual)
        images.chosen = visionzip.kept(best, targets).mask()
        return visionzip.merge(features, targets, assignment)


@dataclass(frozen=True)
class SnapKV(Method):
    """Keep in the cache of each layer what the end of the prompt attends to; the prompt itself is read as it is.

    ``keep``: the share of the prompt's tokens that stays for each key head, rounded down, the last ``window`` tokens
    among them; ``kernel``: neighbouring keys whose scores are pooled, by ``pool`` ("avg" or "max"). Positions stay.
    Source: SnapKV (arXiv 2404.14469), :mod:`pyvtk.methods.snapkv`.
    """

    window: int = 32
    keep: float = 0.25
    kernel: int = 5
    pool: str = "avg"
    evicts = True

    def __post_init__(self) -> None:
        _layer("SnapKV", "window", self.window, 1)
        _share("SnapKV", "keep", self.keep)

    def cached(self, length: int) -> int:
        """How many of a prompt's ``length`` tokens stay in the cache."""
        return min(length, max(int(length * self.keep), self.window))

    def evict(self, q: Tensor, k: Tensor, num_keep, capacity: int, valid: Tensor | None) -> pyvtk.Selection:
        """Of k [batch, Hkv, tokens, D] the rows that stay, by the queries [batch, Hq, window, D] of the last tokens."""
        return snapkv.select(q, k, capacity, num_keep=num_keep, valid=valid, kernel=self.kernel, pool=self.pool)
