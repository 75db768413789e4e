"""The tokens of one sample on their way through a model, and what the oracle notes down about them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from tiny_models import Place
from torch import Tensor


@dataclass
class Trace:
    """What :func:`oracle.trace` returns.

    Attributes:
        logits: float64 [rows of the last layers, vocabulary].
        rows: of each of these rows, its place in [prompt, generated]; -1 for CLS of VisionZip.
        kept: layer -> the places of all tokens that are there from this layer on, where some were dropped.
        margin: smallest gap between a score that won and one that lost, of the largest magnitude among them. A float32
            implementation may keep other tokens where it is about 1e-6.
        cached: SnapKV: layer -> for each KV head the places in the prompt that stay, ascending.
    """

    logits: Tensor | None = None
    rows: list[int] = field(default_factory=list)
    kept: dict[int, list[int]] = field(default_factory=dict)
    margin: float = math.inf
    cached: dict[int, list[list[int]]] = field(default_factory=dict)


@dataclass
class Tokens:
    """The tokens that are there, in order; every list has one entry for each."""

    hidden: Tensor  # [tokens, channels]
    positions: Tensor  # int64 [3 or 1, tokens]
    places: list[int]  # in [prompt, generated]
    visual: list[bool]
    cells: list[Place | None]  # of visual tokens that have a cell
    prompt: int  # length of the prompt, before anything was dropped
    deepstack: list[Tensor]  # added behind the first layers, [all tokens of the sequence, channels] by place
    num_visual: int  # before anything was dropped
    labels: list[int] | None = None  # by place, in training

    def take(self, rows: list[int]) -> Tokens:
        return replace(
            self, hidden=self.hidden[rows], positions=self.positions[:, rows], places=[self.places[i] for i in rows],
            visual=[self.visual[i] for i in rows], cells=[self.cells[i] for i in rows],
        )  # fmt: skip

    def counted_anew(self) -> Tokens:
        if len(self.positions) == 3:
            return self
        return replace(self, positions=torch.arange(len(self.places))[None])

    def candidates(self) -> list[int]:
        return [row for row, visual in enumerate(self.visual) if visual]


def best(scores: list[float], count: int, found: Trace) -> list[int]:
    """Indices of the ``count`` largest, ascending; of equal ones the lower index."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    if 0 < count < len(order):
        last, first = scores[order[count - 1]], scores[order[count]]
        largest = max(abs(last), abs(first))
        found.margin = min(found.margin, (last - first) / largest if largest else 0.0)
    return sorted(order[: max(count, 0)])
