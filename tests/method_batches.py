"""Ragged batches and slow maps for the tests of pyvtk.methods. Padding is full of NaN: nobody may look at it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """q, k [batch, heads, tokens, dim] of all tokens; visual, valid [batch, tokens]."""

    q: Tensor
    k: Tensor
    visual: Tensor
    valid: Tensor

    @property
    def tokens(self) -> list[list[int]]:
        """The slots of each sample's tokens."""
        return [row.nonzero().flatten().tolist() for row in self.valid]

    @property
    def num_visual(self) -> Tensor:
        return (self.visual & self.valid).sum(-1)

    def last(self, rows: int = 1) -> Tensor:
        """Queries of the last tokens [batch, heads, rows, dim]; NaN where there are fewer."""
        out = self.q.new_full((*self.q.shape[:2], rows, self.q.shape[-1]), math.nan)
        for b, slots in enumerate(self.tokens):
            slots = slots[-rows:]
            out[b, :, rows - len(slots) :] = self.q[b, :, slots]
        return out

    def map_of(self, b: int) -> Tensor:
        """The causal map of one sample's tokens [heads, n, n], float64."""
        slots = self.tokens[b]
        q, k = self.q[b, :, slots].double(), self.k[b, :, slots].double()
        z = q @ k.repeat_interleave(q.shape[0] // k.shape[0], 0).mT * q.shape[-1] ** -0.5
        future = torch.ones(len(slots), len(slots)).triu(1).bool()
        return z.masked_fill(future, -math.inf).softmax(-1)

    def visual_of(self, b: int) -> list[int]:
        """Numbers of the visual tokens among the sample's own."""
        return [i for i, slot in enumerate(self.tokens[b]) if self.visual[b, slot]]


def batch_of(
    padding: str, heads=4, kv_heads=2, dim=16, lengths=(27, 40, 33), images=((3, 16), (5, 25), (0, 9)), seed=0
) -> Batch:
    """Samples of these lengths, each with one image (start, tokens), padded on this side."""
    g = torch.Generator().manual_seed(seed)
    tokens = max(lengths)
    q = torch.randn(len(lengths), heads, tokens, dim, generator=g)
    k = torch.randn(len(lengths), kv_heads, tokens, dim, generator=g)
    visual = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    valid = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for b, (length, (start, count)) in enumerate(zip(lengths, images)):
        first = 0 if padding == "right" else tokens - length
        valid[b, first : first + length] = True
        visual[b, first + start : first + start + count] = True
    for x in (q, k):
        x.mT.masked_fill_(~valid[:, None, None], math.nan)
    return Batch(q, k, visual, valid)


def best(scores: dict[int, float], count: int) -> list[int]:
    """The ``count`` keys of largest value, lower key first among equals, ascending."""
    return sorted(sorted(scores, key=lambda j: (-scores[j], j))[: max(count, 0)])


def rows(selection) -> list[list[int]]:
    """The kept tokens of every row, padding taken away from the side where it has to be."""
    found = []
    for row, count in zip(selection.indices.flatten(0, -2).tolist(), selection.counts.flatten().tolist()):
        edge = len(row) - count
        kept, rest = (row[:count], row[count:]) if selection.align == "left" else (row[edge:], row[:edge])
        assert set(rest) <= {-1}
        found.append(kept)
    return found
