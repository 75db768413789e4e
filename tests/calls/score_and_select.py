"""Calls of score_and_select."""

from __future__ import annotations

import pyvtk
from calls.call import BRAIN, HALF, SINGLE, Call, also, apart, gradient, short
from calls.score import given_lse, heads, joined, likely, positions, random


def scored(num_keep, names=(), **options):
    """Indices, counts and scores of score_and_select. Further inputs are the tensor options ``names``."""

    def run(backend, q, k, *tensors):
        options_of_call = options | dict(zip(names, tensors))
        return pyvtk.score_and_select(q, k, num_keep, **options_of_call, return_scores=True, backend=backend)

    return run


def unaligned(make):
    """``make``'s queries and keys, the keys aligned to their elements only."""

    def inputs():
        q, k = make()
        return q, *apart((k,), gap=1, before=1)

    return inputs


def chosen(inputs, num_keep, names=(), **options):
    return Call("score_and_select", inputs, scored(num_keep, names, **options), exact=False)


def scored_packed(backend, q, k, cu_q, cu_k):
    return pyvtk.score_and_select(
        q, k, 30, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, capacity=30, return_scores=True, backend=backend
    )


def only_scores(backend, q, k):
    return pyvtk.score_and_select(q, k, 40, causal=True, return_scores=True, backend=backend)[1]


CALLS = {
    "last token": Call("score_and_select", heads(2, 32, 32, 1, 640, 128, BRAIN), scored(144), exact=False,
                       compiles=True),
    "groups": chosen(heads(1, 28, 4, 1, 4096, 128, HALF), 1000),
    **{f"last token, D={dim}, {short(dtype)}": chosen(heads(2, 6, 3, 1, 1111, dim, dtype), 300)
       for dtype in (SINGLE, HALF, BRAIN) for dim in (40, 256)},
    **{f"last token, keys unaligned, {short(dtype)}": chosen(unaligned(heads(2, 4, 2, 1, 700, 72, dtype)), 100)
       for dtype in (SINGLE, HALF, BRAIN)},
    "last token, many samples": chosen(heads(9, 16, 16, 1, 1200, 16, BRAIN), 300, query_reduce="max",
                                       head_reduce="sum"),
    "fp32": chosen(heads(2, 8, 2, 5, 777, 64), 100, causal=True),
    "fp32, group of 4": chosen(heads(2, 8, 2, 1, 777, 80), 100),
    **{f"{short(dtype)}, {count} heads, D={dim}": chosen(heads(2, 8, count, 1, 300, dim, dtype), 60)
       for dtype in (HALF, BRAIN) for dim, count in ((64, 8), (72, 2), (80, 2), (128, 4))},
    "long row": chosen(heads(1, 4, 2, 1, 9001, 64, BRAIN), 2000),
    "long row, masks": chosen(also(heads(2, 4, 2, 2, 20000, 32, HALF), likely(0.7, 2, 20000)), 5000, ("k_mask",),
                              key_range=(100, 19000)),
    "window": chosen(heads(2, 8, 4, 64, 1000, 80, BRAIN), 128, causal=True, query_reduce="sum",
                     head_reduce="group_sum"),
    "window, fp16": chosen(heads(1, 8, 2, 20, 500, 64, HALF), 128, query_reduce="visible_mean", causal=True),
    "window, fp32": chosen(heads(1, 8, 2, 20, 500, 32), 128, query_reduce="max", head_reduce="sum"),
    "by head": chosen(heads(1, 6, 2, 3, 333, 72), 50, head_reduce=None),
    "maximum": chosen(heads(1, 4, 4, 20, 500, 256, BRAIN), 50, query_reduce="max", head_reduce="max"),
    "maximum over pairs": chosen(heads(2, 8, 2, 40, 600, 64, HALF), 50, query_reduce="max", head_reduce="group_max",
                                 reduce_order="heads_first"),
    "maximum over pairs, mean": chosen(heads(2, 8, 2, 3, 600, 128, BRAIN), 50, head_reduce="max",
                                       reduce_order="heads_first"),
    **{f"range, {short(dtype)}": chosen(heads(3, 8, 8, 1, 900, 32, dtype), 64, key_range=(35, 611))
       for dtype in (SINGLE, HALF, BRAIN)},
    **{f"two queries, groups of 2, {short(dtype)}": chosen(heads(2, 8, 4, 2, 500, 96, dtype), 80, causal=True)
       for dtype in (SINGLE, BRAIN)},
    "last token, masks": chosen(also(heads(2, 8, 4, 1, 650, 128, BRAIN), likely(0.8, 2, 650), likely(0.1, 2, 650)), 99,
                                ("candidates", "drop"), others="keep", causal=True, head_reduce="max"),
    "denominator of the range": chosen(heads(3, 8, 4, 4, 900, 64, BRAIN), 64, key_range=(35, 611),
                                       denominator="range"),
    "logits": chosen(heads(2, 8, 2, 3, 500, 64, BRAIN), 64, quantity="logit", query_reduce="max"),
    "LSE given": chosen(also(heads(2, 28, 4, 3, 500, 128, BRAIN), given_lse(2, 28, 3)), 64, ("lse",)),
    "positions": chosen(also(heads(2, 8, 2, 8, 500, 128, BRAIN), positions(500, 2, 8), positions(500, 2, 500)), 64,
                        ("q_positions", "k_positions"), causal=True),
    "head weights": chosen(also(heads(2, 8, 2, 3, 500, 128, HALF), random(2, 8)), 64, ("head_weights",)),
    "everything": chosen(
        also(heads(2, 28, 4, 6, 500, 128, BRAIN), random(28), given_lse(2, 28, 6), positions(500, 2, 6),
             likely(0.8, 2, 6), likely(0.7, 2, 500)),
        64, ("head_weights", "lse", "q_positions", "q_mask", "k_mask"), causal=True, head_reduce="group_max"),
    "masks": chosen(also(heads(3, 8, 2, 2, 600, 128), likely(0.7, 3, 600), likely(0.05, 3, 600)), 99,
                    ("k_mask", "keep"), capacity=120),
    "others stay": chosen(also(heads(3, 8, 2, 2, 600, 128, BRAIN), likely(0.8, 3, 600)), 99, ("candidates",),
                          others="keep", align="right"),
    "others stay, padding does not": chosen(
        also(heads(3, 8, 2, 2, 600, 128, BRAIN), likely(0.8, 3, 600), likely(0.7, 3, 600), likely(0.1, 3, 600),
             likely(0.1, 3, 600)),
        99, ("candidates", "k_mask", "keep", "drop"), others="keep", head_reduce="group_mean"),
    "bias": chosen(also(heads(3, 8, 2, 2, 600, 128), random(3, 600)), 99, ("k_bias",), top_p=0.9),
    "packed": Call("score_and_select", joined([1, 4, 2], [100, 577, 29], 8, 4, 64), scored_packed, exact=False),
    "packed, bf16": Call("score_and_select", joined([30, 1, 9], [100, 577, 29], 28, 4, 128, BRAIN), scored_packed,
                         exact=False),
    # scores that want a gradient come from attention_scores
    "gradient": Call("attention_scores_backward", also(heads(2, 8, 2, 3, 300, 64, BRAIN), random(2, 300)),
                     gradient(only_scores, 2), exact=False),
    "gradient, fp32": Call("attention_scores_backward", also(heads(4, 4, 4, 3, 500, 72, SINGLE), random(4, 500)),
                           gradient(only_scores, 2), exact=False),
}  # fmt: skip
