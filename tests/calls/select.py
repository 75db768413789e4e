"""Calls of select."""

from __future__ import annotations

import torch

import pyvtk
from calls.call import BRAIN, HALF, SINGLE, Call

NAN, INF = float("nan"), float("inf")


def scores(*shape, dtype=SINGLE, values=None, odd=False):
    """Random scores; with ``values`` so many different ones; ``odd``: NaN, infinities and both zeros among them."""

    def inputs():
        x = torch.randn(shape) if values is None else torch.randint(values, shape).float()
        if odd:
            strange = torch.tensor([NAN, INF, -INF, 0.0, -0.0, -NAN])
            x = torch.where(torch.rand(shape) < 0.4, strange[torch.randint(6, shape)], x)
        return (x.to(dtype),)

    return inputs


def select(num_keep=None, *, names=(), **options):
    """Further inputs are the tensor options ``names``."""

    def run(backend, x, *tensors):
        return pyvtk.select(x, num_keep, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def masked(batch, tokens, *names, dtype=SINGLE, segments=None):
    def inputs():
        x = torch.randn(batch, tokens).to(dtype)
        masks = [torch.rand(batch, tokens) < share for share in (0.1, 0.2, 0.6)[: len(names)]]
        return x, *masks, *([torch.randint(-1, segments + 1, (batch, tokens))] if segments else [])

    return inputs


def packed_rows(lengths, dtype=SINGLE):
    def inputs():
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        return torch.randn(sum(lengths)).to(dtype), ends, torch.tensor(lengths) // 3

    return inputs


def per_segment(backend, x, segments, num_keep):
    return pyvtk.select(x, num_keep, segments=segments, capacity=200, backend=backend)


CALLS = {
    "one row": Call("select", scores(1, 2880), select(720), compiles=True),
    "many rows": Call("select", scores(300, 33), select(7)),
    "long rows": Call("select", scores(4, 16384), select(4096)),
    "longest row": Call("select", scores(1, 131072, values=1000), select(20000)),
    # on CUDA in three launches: chunks that end within a word, a list of ranks that fits a block and one that does not
    "longest row, few": Call("select", scores(1, 131072), select(16)),
    "longest row, bf16": Call("select", scores(2, 3, 40001, dtype=BRAIN), select(9999)),
    "longest row, fp16": Call("select", scores(3, 16385, dtype=HALF), select(8000)),
    "longest row, all equal": Call("select", scores(1, 131072, values=1), select(65000)),
    "longest row, odd values": Call("select", scores(2, 50000, odd=True), select(45000)),
    "longest rows, many": Call("select", scores(100, 20000, values=100), select(5000)),
    "longest row, masks": Call("select", masked(2, 70000, "drop", "candidates"),
                               select(9000, names=("drop", "candidates"), capacity=9100, align="right")),
    "longest row, threshold": Call("select", lambda: (torch.randn(2, 33000), torch.tensor([20000, 300])),
                                   lambda b, x, k: pyvtk.select(x, k, threshold=x[:, 0] * 0 - 0.5, capacity=15000,
                                                                backend=b)),
    "heads": Call("select", scores(2, 4, 1001), select(100)),
    "ties": Call("select", scores(5, 997, values=8), select(333)),
    "all equal": Call("select", scores(3, 640, values=1), select(320)),
    "odd values": Call("select", scores(6, 577, odd=True), select(500)),
    "odd values, bf16": Call("select", scores(6, 577, odd=True, dtype=BRAIN), select(400)),
    "fp16": Call("select", scores(3, 1025, dtype=HALF), select(257)),
    "none": Call("select", scores(3, 100), select(0)),
    "all": Call("select", scores(3, 100), select(100)),
    "no rows": Call("select", scores(0, 100), select(10)),
    "no tokens": Call("select", scores(3, 0), select(10)),
    "fewer than none": Call("select", lambda: (torch.randn(3, 700), torch.tensor([-5, 3, -1]),
                                               torch.rand(3, 700) < 0.1),
                            lambda b, x, k, keep: pyvtk.select(x, k, keep=keep, capacity=200, backend=b)),
    "fewer than none, long": Call("select", lambda: (torch.randn(2, 33000), torch.tensor([-5, 3])),
                                  lambda b, x, k: pyvtk.select(x, k, capacity=9, backend=b)),
    "threshold": Call("select", scores(4, 700), lambda b, x: pyvtk.select(x, 300, threshold=x[:, 0], backend=b)),
    "top_p": Call("select", lambda: (torch.rand(4, 700), torch.rand(4)),
                  lambda b, x, p: pyvtk.select(x, top_p=p, backend=b)),
    "masks": Call("select", masked(5, 800, "keep", "drop", "candidates"),
                  select(200, names=("keep", "drop", "candidates"), capacity=210), compiles=True),
    "masks per head": Call("select", lambda: (torch.randn(2, 3, 400), torch.rand(2, 3, 400) < 0.1,
                                              torch.rand(2, 400) < 0.7, torch.randint(0, 99, (2, 3))),
                           lambda b, x, keep, candidates, k: pyvtk.select(
                               x, k, keep=keep, candidates=candidates, capacity=120, backend=b)),
    "others stay": Call("select", masked(5, 800, "keep", "drop", "candidates", dtype=BRAIN),
                        select(100, names=("keep", "drop", "candidates"), others="keep", align="right")),
    "by score": Call("select", scores(5, 1200, values=50), select(600, order="score")),
    "segments": Call("select", lambda: (torch.randn(3, 900), torch.randint(-1, 5, (3, 900)),
                                        torch.randint(0, 60, (3, 4))), per_segment),
    "packed": Call("select", packed_rows([5, 0, 577, 1, 1200, 64]),
                   lambda b, x, cu, k: pyvtk.select(x, k, cu_seqlens=cu, capacity=400, backend=b)),
    "packed, fp16": Call("select", packed_rows([300, 7, 64], HALF), lambda b, x, cu, k: pyvtk.select(
        x, k, cu_seqlens=cu, capacity=150, align="right", backend=b)),
    "packed, bf16": Call("select", packed_rows([30, 700], BRAIN), lambda b, x, cu, k: pyvtk.select(
        x, k, cu_seqlens=cu, capacity=230, backend=b)),
}  # fmt: skip
