"""What one forward pass knows of its tokens. It travels from layer to layer in the keyword arguments of the model, so
nothing of it is left on modules, and a layer that gradient checkpointing runs a second time finds what it found before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import pyvtk

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle

KEY = "pyvtk"  # the keyword argument


def before_answers(labelled: Tensor, valid: Tensor | None) -> Tensor:
    """bool [batch, tokens]: tokens without a label, behind which one with a label stands."""
    asked = torch.nn.functional.pad(~labelled[:, :-1] & labelled[:, 1:], (0, 1))
    return asked if valid is None else asked & valid


@dataclass(frozen=True)
class Sizes:
    """What the host has to know of a batch, fetched in the one synchronisation of a forward pass.

    Attributes:
        lengths: tokens of each sample, without padding.
        visual: visual tokens of each sample.
        extra: what else was asked for, by name.
        ends_full: whether every sample ends with the last column (padding on the left, or none).
    """

    lengths: list[int]
    visual: list[int]
    extra: dict[str, list[int]] = field(default_factory=dict)
    ends_full: bool = True

    @staticmethod
    def of(visual: Tensor, valid: Tensor | None, **extra: Tensor) -> Sizes:
        """From bool [batch, tokens], twice, and int tensors [batch]. Waits for the device, once.

        ``valid`` None: there is no padding.
        """
        batch, tokens = visual.shape
        facts = [visual.sum(1), *extra.values()]
        if valid is not None:
            facts += [valid.sum(1), valid[:, -1].long()]
        counts, *more = torch.stack([fact.long() for fact in facts]).tolist()
        if valid is None:
            return Sizes([tokens] * batch, counts, dict(zip(extra, more)))
        *more, lengths, ends = more
        return Sizes(lengths, counts, dict(zip(extra, more)), all(ends))


@dataclass(frozen=True, eq=False)
class StageSizes:
    """What the host decides of a stage before the decoder begins, so that nothing in it depends on counts.

    Attributes:
        capacity: slots of each row behind the stage.
        full: whether all rows fill them.
        num_keep: how many visual tokens the stage chooses: int, or int tensor [batch]; None: only the device knows.
        num_tokens, num_visual: of each sample behind the stage; where ``exact`` is False the most that there can be.
    """

    capacity: int
    full: bool
    num_keep: int | Tensor | None
    num_tokens: list[int]
    num_visual: list[int]
    exact: bool


@dataclass(eq=False)
class Tokens:
    """The tokens that a run of decoder layers works on.

    Attributes:
        visual: bool [batch, tokens].
        valid: bool [batch, tokens]; None: there is no padding.
        position_embeddings: (cos, sin), [batch or 1, tokens, D] each.
        selection: of the prompt, what is left of it; None: everything.
        attention_mask: for the layers of this run, in the form that their attention takes.
        ends_full: whether every sample ends with the last column.
        additions: what is still to be added to the outputs of layers, [batch, tokens, C] by layer (DeepStack).
        labelled: bool [batch, tokens], the tokens that have a label, where training scores from the rows before them
            (:func:`before_answers`); None: the last row of each sample scores.
        dropped: int [batch, 1], tokens of each sample that positions no longer count; None: positions are the prompt's.
    """

    visual: Tensor
    valid: Tensor | None
    position_embeddings: tuple[Tensor, Tensor] | None
    selection: pyvtk.Selection | None = None
    attention_mask: Tensor | None = None
    ends_full: bool = True
    additions: dict[int, Tensor] = field(default_factory=dict)
    labelled: Tensor | None = None
    dropped: Tensor | None = None

    def changes(self) -> dict:
        """The keyword arguments that a decoder layer gets instead of the model's own."""
        # position_ids that skip numbers would be taken for packed sequences
        return {
            "attention_mask": self.attention_mask, "position_embeddings": self.position_embeddings,
            "position_ids": None,
        }  # fmt: skip


@dataclass(eq=False)
class Prompt:
    """A prefill (or a training step) with visual tokens.

    Attributes:
        input_ids: int [batch, tokens].
        visual, valid: bool [batch, tokens]; valid None: there is no padding.
        position_ids: as the decoder got them.
        sizes: see :class:`Sizes`; None until they were fetched.
        stages: by layer, the sizes of each stage.
        labels: int [batch, tokens] in training; a copy that may be written to.
        keep: bool [batch, tokens]: visual tokens that were chosen before the decoder, and stay at the first stage.
        ready: whether sizes, layout and plan are known; a prompt without images never is.
        layout, plan, rows: of methods that need a layout, change attention, or split the feed-forward layers
            (selections of visual and of other tokens).
        window: the last tokens of each sample, which score for the cache; None: they are the last columns.
        videos: whether there are videos among the images.
        labelled: bool [batch, tokens], the tokens that have a label, where training scores from the rows before them
            (:func:`before_answers`); None: the last row of each sample scores.
        span: int [batch, 1] twice, where each sample begins and ends in positions, once asked for.
        tokens: by the layer at which a run of layers begins; -1 is the prompt itself.
        scores: by layer, what was projected there for the next stage: (q, k or None, q_positions, q_mask).
    """

    handle: Handle
    input_ids: Tensor
    visual: Tensor
    valid: Tensor | None
    position_ids: Tensor | None = None
    sizes: Sizes | None = None
    stages: dict[int, StageSizes] = field(default_factory=dict)
    labels: Tensor | None = None
    labelled: Tensor | None = None
    keep: Tensor | None = None
    ready: bool = False
    layout: pyvtk.TokenLayout | None = None
    plan: pyvtk.AttentionPlan | None = None
    rows: tuple[pyvtk.Selection, pyvtk.Selection] | None = None
    window: pyvtk.Selection | None = None
    videos: bool = False
    span: tuple[Tensor, Tensor] | None = None
    tokens: dict[int, Tokens] = field(default_factory=dict)
    scores: dict[int, tuple] = field(default_factory=dict)

    def plan_of(self, layer: int) -> pyvtk.AttentionPlan | None:
        """The plan that attention of this layer follows."""
        return self.plan if layer < self.handle.plan_ends else None


def on_device(device: torch.device, numbers: list[int]) -> Tensor:
    """int64 [numbers], sent without waiting."""
    return torch.tensor(numbers, device="cpu").to(device, non_blocking=True)
