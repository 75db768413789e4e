"""Calls of attention_scores."""

from __future__ import annotations

import torch

import pyvtk
from calls.call import BRAIN, HALF, SINGLE, Call, also, gradient


def heads(batch, q_heads, k_heads, queries, keys, dim, dtype=SINGLE):
    """Queries as views of [batch, tokens, heads, dim], keys as a cache holds them."""

    def inputs():
        q = torch.randn(batch, queries, q_heads, dim).to(dtype).transpose(1, 2)
        return q, torch.randn(batch, k_heads, keys, dim).to(dtype)

    return inputs


def joined(lengths_q, lengths_k, q_heads, k_heads, dim, dtype=SINGLE):
    """Samples that follow each other on one axis."""

    def inputs():
        q, k = torch.randn(sum(lengths_q), q_heads, dim).to(dtype), torch.randn(sum(lengths_k), k_heads, dim).to(dtype)
        return q, k, *(torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))

    return inputs


def random(*shape):
    return lambda: torch.randn(shape)


def given_lse(*shape):
    """About what a few hundred keys sum up to."""
    return lambda: torch.randn(shape) + 6


def likely(share, *shape):
    return lambda: torch.rand(shape) < share


def positions(most, *shape):
    return lambda: torch.randint(0, most, shape)


def attention(names=(), **options):
    """Further inputs are the tensor options ``names``."""

    def run(backend, q, k, *tensors):
        return pyvtk.attention_scores(q, k, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def scores(inputs, names=(), **options):
    return Call("attention_scores", inputs, attention(names, **options), exact=False)


def scores_gradient(inputs, names=(), *, results=1, **options):
    """To q, k and the options ``names``. Further inputs: what arrives at the results."""
    run = gradient(attention(names, **options), 2 + len(names), results)
    return Call("attention_scores_backward", inputs, run, exact=False)


PACKED = ("cu_seqlens_q", "cu_seqlens_k")

CALLS = {
    "last token": scores(heads(2, 8, 2, 1, 1000, 128, BRAIN)),
    "last token, groups of 7": scores(heads(1, 28, 4, 1, 1500, 128, BRAIN)),
    "all rows": Call("attention_scores", heads(1, 8, 2, 500, 500, 64, BRAIN), attention(causal=True), exact=False,
                     compiles=True),
    "all rows, groups of 7": scores(heads(1, 28, 4, 300, 300, 128, BRAIN), causal=True),
    "all rows, LSE given": scores(also(heads(1, 28, 4, 300, 300, 128, BRAIN), given_lse(1, 28, 300)), ("lse",),
                                  causal=True, query_reduce="sum"),
    "all rows, D=72": scores(heads(1, 4, 4, 200, 200, 72, HALF), causal=True),
    "fp32": scores(heads(2, 4, 4, 65, 129, 80), head_reduce=None),
    "fp32, D=128": scores(heads(1, 4, 2, 65, 300, 128), query_reduce="visible_mean", causal=True),
    "sum and max": scores(heads(1, 4, 2, 100, 300, 72, HALF), query_reduce=("sum", "max"), causal=True,
                          head_reduce="group_max"),
    "maximum over pairs": scores(heads(2, 4, 2, 70, 200, 64, BRAIN), query_reduce=("max", "mean"),
                                 head_reduce="group_max", reduce_order="heads_first"),
    "mask": scores(also(heads(2, 4, 2, 70, 200, 128), likely(0.8, 2, 200)), ("k_mask",)),
    "masks and bias": scores(also(heads(2, 4, 2, 70, 200, 128, HALF), likely(0.8, 2, 70), likely(0.8, 2, 200),
                                  random(2, 200)), ("q_mask", "k_mask", "k_bias"), query_reduce=("mean", "sum")),
    "head weights, positions": scores(
        also(heads(2, 28, 4, 40, 300, 128, BRAIN), random(2, 28), positions(300, 2, 40), positions(300, 2, 300)),
        ("head_weights", "q_positions", "k_positions"), causal=True),
    "range": scores(heads(3, 8, 8, 20, 500, 64, BRAIN), key_range=(35, 311), denominator="range", head_reduce="sum"),
    "logits": scores(heads(2, 4, 2, 33, 200, 64, BRAIN), quantity="logit", query_reduce=("max", "visible_mean"),
                     causal=True),
    "LSE returned": scores(heads(1, 8, 2, 100, 260, 80, BRAIN), return_lse=True, causal=True, scale=0.2),
    "packed": Call("attention_scores", joined([90, 4, 33], [100, 577, 33], 8, 2, 64, BRAIN),
                   attention(PACKED, causal=True), exact=False),

    "gradient": scores_gradient(also(heads(1, 4, 2, 90, 90, 64), random(1, 90)), causal=True),
    "gradient, groups of 7": scores_gradient(also(heads(1, 28, 4, 200, 200, 128, BRAIN), random(1, 200)), causal=True),
    "gradient, fp16, D=72": scores_gradient(also(heads(2, 4, 4, 70, 150, 72, HALF), random(2, 4, 150)),
                                            head_reduce=None),
    "gradient to all": scores_gradient(
        also(heads(2, 4, 2, 60, 100, 80, BRAIN), random(2, 4), given_lse(2, 4, 60), random(2, 100), random(2, 100)),
        ("head_weights", "lse", "k_bias")),
    "gradient of maxima": scores_gradient(also(heads(1, 4, 2, 60, 100, 64, BRAIN), random(1, 100)),
                                          query_reduce="max", head_reduce="max"),
    "gradient of maxima over pairs": scores_gradient(
        also(heads(1, 4, 2, 60, 100, 64, BRAIN), random(1, 2, 100)), head_reduce="group_max",
        reduce_order="heads_first", query_reduce="sum"),
    "gradient, LSE returned": scores_gradient(also(heads(1, 4, 2, 60, 100, 128, HALF), random(1, 100),
                                                   random(1, 4, 60)), results=2, return_lse=True),
}  # fmt: skip
