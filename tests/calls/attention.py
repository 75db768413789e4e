"""Calls of neighbor_attention, with the plans that they need and with merge_attention."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import pyvtk
from calls.call import BRAIN, HALF, SINGLE, Call, also, gradient
from calls.score import random
from pyvtk import ImageSpan, TokenLayout

SMALL = 90, (ImageSpan(0, 5, (1, 8, 10)),)  # text around an image
LLAVA = 675, (ImageSpan(0, 35, (1, 24, 24)),)
VIDEO = 130, (ImageSpan(0, 7, (4, 5, 6)),)
TWO = 120, (ImageSpan(0, 3, (1, 5, 9)), ImageSpan(0, 60, (1, 7, 6)))


def placed(where, q_heads, k_heads, dim, dtype=SINGLE):
    """Where the tokens stand (image_id, coords), queries, keys and values."""
    tokens, spans = where

    def inputs():
        layout = TokenLayout.from_images([tokens], list(spans))
        shapes = ((1, count, tokens, dim) for count in (q_heads, k_heads, k_heads))
        return layout.image_id, layout.coords, *(torch.randn(shape).to(dtype) for shape in shapes)

    return inputs


def packed(lengths, spans, q_heads, k_heads, dim, dtype=SINGLE):
    """The same with cu_seqlens in front, for samples that follow each other."""

    def inputs():
        layout = TokenLayout.from_images(lengths, spans, packed=True)
        shapes = ((sum(lengths), count, dim) for count in (q_heads, k_heads, k_heads))
        facts = layout.cu_seqlens, layout.image_id, layout.coords, layout.positions
        return *facts, *(torch.randn(shape).to(dtype) for shape in shapes)

    return inputs


def neighbors(radius=2, names=(), plan=None, **options):
    """Further inputs are the tensor options ``names``."""

    def run(backend, image_id, coords, q, k, v, *tensors):
        layout = TokenLayout(image_id, coords)
        made = plan(layout) if plan else pyvtk.neighbor_plan(layout, radius)
        return pyvtk.neighbor_attention(q, k, v, made, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def neighbors_packed(backend, cu_seqlens, image_id, coords, positions, q, k, v):
    layout = TokenLayout(image_id, coords, positions=positions, cu_seqlens=cu_seqlens)
    return pyvtk.neighbor_attention(q, k, v, pyvtk.neighbor_plan(layout, 2), backend=backend)


def merged(backend, image_id, coords, q, k, v):
    """By groups of keys, of which the visual ones count half."""
    layout = TokenLayout(image_id, coords)
    plans = [pyvtk.neighbor_plan(layout, 2, keys=keys) for keys in ("text", "visual")]
    outs, lses = zip(*[pyvtk.neighbor_attention(q, k, v, p, return_lse=True, backend=backend) for p in plans])
    _, lse = pyvtk.merge_attention(outs, lses, backend="reference" if backend else None)
    weights = [(lses[0] - lse).exp(), (lses[1] - lse).exp() / 2]
    return pyvtk.merge_attention(outs, lses, weights, backend="reference" if backend else None)[0]


def tail(backend, image_id, coords, q, k, v, lengths):
    """Decoding: three new queries, and a cache with free room behind the sequence."""
    plan = pyvtk.neighbor_plan(TokenLayout(image_id, coords), 2)
    k, v = (torch.cat([x, x[:, :, :20]], 2) for x in (k, v))
    return pyvtk.neighbor_attention(q[:, :, -3:], k, v, plan, k_lengths=lengths, backend=backend)


def eager(radius, image_id, coords, q, k, v, k_bias=None):
    """Attention as it is written in plain torch, each step in q's dtype, over the map of all pairs."""
    tokens = torch.arange(image_id.shape[1])
    earlier, visual = tokens[None] <= tokens[:, None], image_id[0] >= 0
    near = ((coords[0, :, None] - coords[0]).abs() <= radius).all(-1) & (image_id[0, :, None] == image_id[0])
    seen = torch.where(visual[:, None] & visual, near, earlier)
    group = q.shape[1] // k.shape[1]
    logits = (q @ k.repeat_interleave(group, 1).mT) * q.shape[-1] ** -0.5
    if k_bias is not None:
        logits = logits + k_bias[:, None, None].to(q.dtype)
    logits = logits.masked_fill(~seen, float("-inf"))
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v.repeat_interleave(group, 1), lse.to(torch.float32)


def attends(inputs, radius=2, names=(), plan=None, **options):
    return Call("neighbor_attention", inputs, neighbors(radius, names, plan, **options), exact=False)


def attends_gradient(inputs, arriving: tuple, radius=2, names=(), lse=False):
    """To q, k, v and the options ``names``; ``arriving``: the shape of q."""

    def plain(_, *tensors) -> Tensor | tuple[Tensor, Tensor]:
        out, its_lse = eager(radius, *tensors)
        return (out, its_lse) if lse else out

    weights = (random(*arriving), *([random(*arriving[:3])] if lse else ()))
    leaves, results = 3 + len(names), len(weights)
    run = gradient(neighbors(radius, names, return_lse=lse), leaves, results)
    stepwise = functools.partial(gradient(plain, leaves, results), None)
    return Call("neighbor_attention_backward", also(inputs, *weights), run, exact=False, plain=stepwise)


CALLS = {
    "neighbours": attends(placed(SMALL, 4, 2, 64)),
    "neighbours, bf16": attends(placed(SMALL, 4, 2, 80, BRAIN)),
    "neighbours, fp16, D=72": attends(placed(SMALL, 4, 4, 72, HALF)),
    "neighbours, fp32, D=128": attends(placed(SMALL, 7, 1, 128)),
    "neighbours, D=256": attends(placed(SMALL, 2, 1, 256, BRAIN)),
    "LSE, bias": attends(also(placed(SMALL, 4, 2, 64, BRAIN), random(1, 90)), 2, ("k_bias",), return_lse=True),
    "heads without visual keys": attends(
        also(placed(SMALL, 4, 2, 64, HALF), lambda: torch.tensor([True, False, True, False])), 2, ("visual_heads",)),
    "heads without visual keys and rows": attends(
        also(placed(SMALL, 4, 2, 64, BRAIN), lambda: torch.tensor([False, False, True, False])), 2, ("visual_heads",),
        visual_mass="drop", visual_rows="zero"),
    "video": attends(placed(VIDEO, 4, 1, 64, BRAIN), (1, 2, 2)),
    "two images": attends(placed(TWO, 4, 2, 64, HALF), plan=lambda layout: pyvtk.neighbor_plan(
        layout, 2, cross_image=True, causal_window=True)),
    "windows": attends(placed(SMALL, 4, 4, 32, BRAIN), plan=lambda layout: pyvtk.window_plan(
        layout, (1, 4, 4), (0, 2, 2))),
    "packed": Call("neighbor_attention", packed([90, 40, 75], [ImageSpan(0, 5, (1, 8, 10)), ImageSpan(2, 0, (1, 6, 9))],
                                                4, 2, 64, BRAIN), neighbors_packed, exact=False),
    "last tokens": Call("neighbor_attention", also(placed(SMALL, 4, 2, 64, BRAIN), lambda: torch.tensor([97])), tail,
                        exact=False),
    "groups of keys, merged": Call("neighbor_attention", placed(SMALL, 4, 2, 64), merged, exact=False),
    "gradient": attends_gradient(placed(SMALL, 4, 2, 64), (1, 4, 90, 64)),
    "gradient, bias, LSE": attends_gradient(also(placed(SMALL, 4, 2, 80, BRAIN), random(1, 90)), (1, 4, 90, 80), 2,
                                            ("k_bias",), lse=True),
    "gradient, fp16, D=72": attends_gradient(placed(SMALL, 4, 4, 72, HALF), (1, 4, 90, 72)),
    # the shape that is measured: blocks of 64 tokens, groups of 7
    "gradient, LLaVA, groups of 7": attends_gradient(placed(LLAVA, 28, 4, 128, BRAIN), (1, 28, 675, 128)),
}  # fmt: skip
