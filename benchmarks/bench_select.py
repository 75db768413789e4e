"""Selection: which tokens stay, in their original order. Peers: torch.topk, a stable argsort, numpy.argpartition."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

import pyvtk

from .harness import OURS, Case, read_limit


def scores_of(*shape, values=None):
    """Random scores; with ``values``, so many different ones, so that ties abound."""

    def inputs():
        return (torch.rand(shape) if values is None else torch.randint(values, shape) / max(values, 1),)

    return inputs


def kept_by(scores: Tensor, keep: int):
    """Checks that the kept values are the ``keep`` largest and the indices ascend; ours also breaks ties downwards."""
    wanted = scores.topk(keep).values.sort().values
    first = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort().values

    def check(name, result):
        indices = result.indices if isinstance(result, pyvtk.Selection) else torch.as_tensor(result)
        assert indices.shape == wanted.shape, f"shape {tuple(indices.shape)}, expected {tuple(wanted.shape)}"
        assert (indices.diff(dim=-1) > 0).all(), "indices do not ascend"
        assert torch.equal(scores.gather(-1, indices).sort().values, wanted), "kept values are not the largest"
        if name in (OURS, "stable argsort"):
            assert torch.equal(indices, first), "ties are not broken by the lower index"

    return check


def largest(name, keep, shape, bars, values=None):
    def topk(scores):
        return scores.topk(keep, sorted=False).indices.sort().values

    def stable_argsort(scores):
        return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort().values

    def argpartition(scores):
        kept = np.argpartition(scores.numpy(), shape[-1] - keep)[..., shape[-1] - keep :]
        kept.sort()
        return kept

    return Case(
        "select",
        name,
        torch.float32,
        scores_of(*shape, values=values),
        {
            "pyvtk": lambda scores: pyvtk.select(scores, keep),
            "topk + sort": topk,
            "stable argsort": stable_argsort,
            "numpy argpartition": argpartition,
        },
        lambda scores: kept_by(scores, keep),
        limit=read_limit(lambda scores: scores),
        bars=bars,
    )


def segmented(crops):
    """HiRED: one tensor of budgets, one per crop, counted on the device; 576 patches stay in all."""

    def inputs():
        budgets = torch.full((crops,), 576 // crops)
        budgets[: 576 % crops] += 1
        return torch.rand(crops, 576), budgets, budgets.tolist()

    def loop(scores, budgets, numbers):
        return [row.topk(k, sorted=False).indices.sort().values for row, k in zip(scores, numbers)]

    def expect(scores, budgets, numbers):
        wanted = loop(scores, budgets, numbers)

        def check(name, result):
            if isinstance(result, pyvtk.Selection):
                assert torch.equal(result.counts.long(), budgets), "counts differ from the budgets"
                result = [row[:k] for row, k in zip(result.indices, numbers)]
            assert all(torch.equal(a, b) for a, b in zip(result, wanted)), "kept tokens differ from those of topk"

        return check

    return Case(
        "select",
        f"HiRED {crops} crops x 576, a budget each",
        torch.float32,
        inputs,
        {
            "pyvtk": lambda scores, budgets, numbers: pyvtk.select(scores, budgets, capacity=576),
            "loop of topk + sort": loop,
        },
        expect,
        limit=read_limit(lambda scores, *rest: scores),
        bars={"best": 1.0},
    )


def ragged(images):
    """Packed rows of 256 to 576 tokens, a quarter stays of each."""

    def inputs():
        lengths = torch.randint(256, 577, (images,))
        cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        return torch.rand(int(cu[-1])), cu.to(torch.int32), lengths // 4, cu.tolist(), (lengths // 4).tolist()

    def loop(scores, cu, budgets, starts, numbers):
        return torch.cat(
            [
                scores[a:b].topk(k, sorted=False).indices.sort().values + a
                for a, b, k in zip(starts[:-1], starts[1:], numbers)
            ]
        )

    def expect(*all_inputs):
        wanted = loop(*all_inputs)

        def check(name, result):
            if isinstance(result, pyvtk.Selection):
                result = result.indices[result.valid]
            assert torch.equal(result, wanted), "kept tokens differ from those of topk"

        return check

    return Case(
        "select",
        f"packed crops, {images} x 256-576 tokens, a quarter of each",
        torch.float32,
        inputs,
        {
            "pyvtk": lambda scores, cu, budgets, *rest: pyvtk.select(scores, budgets, cu_seqlens=cu, capacity=144),
            "loop of topk + sort": loop,
        },
        expect,
        limit=read_limit(lambda scores, *rest: scores),
        bars={"best": 1.0},
    )


NEVER_SLOWER = {"best": 1.0}

CASES = [
    largest("LLaVA-NeXT [8, 2880] to 720", 720, (8, 2880), {"topk + sort": 3.0, "best": 1.0}),
    largest("Qwen2-VL [1, 16384] to 2048", 2048, (1, 16384), {"topk + sort": 2.0, "best": 1.0}),
    largest("LLaVA-NeXT [8, 2880] to 720, 8 different values", 720, (8, 2880), NEVER_SLOWER, values=8),
    largest("LLaVA-NeXT [8, 2880] to 720, all equal", 720, (8, 2880), NEVER_SLOWER, values=1),
    largest("Qwen2-VL [1, 16384] to 2048, 8 different values", 2048, (1, 16384), NEVER_SLOWER, values=8),
    *[largest(f"LLaVA-1.5 [1, 576] to {keep}", keep, (1, 576), NEVER_SLOWER) for keep in (288, 144, 72)],
    *[largest(f"LLaVA-1.5 [16, 576] to {keep}", keep, (16, 576), NEVER_SLOWER) for keep in (288, 144, 72)],
    *[largest(f"LLaVA-NeXT [1, 2880] to {keep}", keep, (1, 2880), NEVER_SLOWER) for keep in (1440, 720, 360)],
    *[
        largest(f"Qwen2-VL [1, {tokens}] to {keep}", keep, (1, tokens), NEVER_SLOWER)
        for tokens in (1024, 4096, 16384)
        for keep in (tokens // 2, tokens // 4, round(0.11 * tokens))
    ],
    largest("SnapKV per head [1, 4, 16384] to 2048", 2048, (1, 4, 16384), NEVER_SLOWER),
    *[segmented(crops) for crops in (5, 80)],
    *[ragged(images) for images in (5, 80)],
]
