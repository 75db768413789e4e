"""Selection: which tokens stay, in their original order. Peers: torch.topk, a stable argsort, numpy.argpartition; on
CUDA also torch.compile of topk and sort, and FlashInfer's top_k."""

from __future__ import annotations

import functools
import importlib.util

import numpy as np
import torch
from torch import Tensor

import pyvtk

from . import harness
from .harness import BEST, OURS, Case, bandwidth_limit, made_on, marked, read_limit


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
        if name in (OURS, "stable argsort", "FlashInfer + sort"):
            assert torch.equal(indices, first), "ties are not broken by the lower index"

    return check


@functools.cache
def flashinfer():
    """Its top_k in the mode that promises what ours does: deterministic, of equal scores the lower index."""
    from flashinfer.topk import TopKTieBreak, top_k

    return functools.partial(top_k, deterministic=True, tie_break=TopKTieBreak.SMALL)


def limit_of(device: str):
    if device == "cpu":
        return read_limit(lambda scores, *rest: scores)
    return bandwidth_limit(lambda scores, *rest: scores.nbytes, device)


def largest(name, keep, shape, bars, values=None, device="cpu"):
    def topk(scores):
        return scores.topk(keep, sorted=False).indices.sort().values

    def stable_argsort(scores):
        return scores.argsort(dim=-1, descending=True, stable=True)[..., :keep].sort().values

    def argpartition(scores):
        kept = np.argpartition(scores.numpy(), shape[-1] - keep)[..., shape[-1] - keep :]
        kept.sort()
        return kept

    providers = {
        "pyvtk": lambda scores: pyvtk.select(scores, keep),
        "topk + sort": topk,
        "stable argsort": stable_argsort,
    }
    absent = {}
    if device == "cpu":
        providers["numpy argpartition"] = argpartition
    else:
        providers["compiled topk + sort"] = lambda scores: harness.compiled(topk)(scores)
        if importlib.util.find_spec("flashinfer") is None:
            absent["FlashInfer + sort"] = "not installed"
        else:
            rows = lambda scores: scores.flatten(0, -2)  # noqa: E731
            providers["FlashInfer + sort"] = lambda scores: (
                flashinfer()(rows(scores), keep)[1].sort().values.view(*scores.shape[:-1], keep)
            )
    return Case(
        "select",
        name,
        torch.float32,
        made_on(device, scores_of(*shape, values=values)),
        providers,
        lambda scores: kept_by(scores, keep),
        limit=limit_of(device),
        bars=bars,
        device=device,
        absent=absent,
    )


def segmented(crops, device="cpu"):
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
        made_on(device, inputs),
        {
            "pyvtk": lambda scores, budgets, numbers: pyvtk.select(scores, budgets, capacity=576),
            "loop of topk + sort": loop,
        },
        expect,
        limit=limit_of(device),
        bars={"best": 1.0},
        device=device,
    )


def ragged(images, device="cpu"):
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
        made_on(device, inputs),
        {
            "pyvtk": lambda scores, cu, budgets, *rest: pyvtk.select(scores, budgets, cu_seqlens=cu, capacity=144),
            "loop of topk + sort": loop,
        },
        expect,
        limit=limit_of(device),
        bars={"best": 1.0},
        device=device,
    )


NEVER_SLOWER = {"best": 1.0}

CASES = [
    marked(largest("LLaVA-NeXT [8, 2880] to 720", 720, (8, 2880), {"topk + sort": 3.0, "best": 1.0})),
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


def on_cuda(device: str = "cuda") -> list[Case]:
    # not slower than 1.2x of FlashInfer, which is deterministic and sorts its indices
    bars = {"topk + sort": 2.0, "FlashInfer + sort": 1 / 1.2}
    beaten = {BEST: 1.0}
    shapes = [  # and the place in the run of --key
        ("LLaVA-NeXT [1, 2880] to 720", 720, (1, 2880), bars, None, 1),
        ("Qwen2-VL batch [32, 16384] to 4096", 4096, (32, 16384), bars, None, 1),
        ("LLaVA-1.5 [1, 576] to 144", 144, (1, 576), beaten, None, 2),
        ("LLaVA-1.5 [16, 576] to 144", 144, (16, 576), beaten, None, 0),
        ("LLaVA-NeXT [8, 2880] to 720", 720, (8, 2880), beaten, None, 0),
        ("LLaVA-NeXT [8, 2880] to 720, 8 different values", 720, (8, 2880), beaten, 8, 0),
        ("LLaVA-NeXT [8, 2880] to 720, all equal", 720, (8, 2880), beaten, 1, 0),
        ("Qwen2-VL [1, 16384] to 2048", 2048, (1, 16384), beaten, None, 0),
        ("Qwen2-VL [1, 16384] to 2048, 8 different values", 2048, (1, 16384), beaten, 8, 0),
        ("SnapKV per head [1, 4, 16384] to 2048", 2048, (1, 4, 16384), beaten, None, 0),
        ("SnapKV per head [1, 8, 131072] to 4096", 4096, (1, 8, 131072), beaten, None, 2),
        ("long video [1, 131072] to 16384", 16384, (1, 131072), beaten, None, 2),
        ("long video [1, 131072] to 16384, 8 different values", 16384, (1, 131072), beaten, 8, 0),
        ("4096 rows [4096, 576] to 144", 144, (4096, 576), beaten, None, 0),
    ]
    found = [marked(largest(*shape, device=device), place) for *shape, place in shapes]
    return found + [segmented(crops, device) for crops in (5, 80)] + [ragged(images, device) for images in (5, 80)]


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else CASES
