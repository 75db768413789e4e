"""What every operator promises on a GPU, over one list of calls: results, CUDA graphs, streams, threads, no host
synchronisation, the same bits on every run, memory layouts, torch.compile.

Skipped without CUDA. A call whose operator has no kernel for the device is skipped too; both backends run where both
exist. ``PYVTK_GPU_DEVICE=cpu`` runs what needs no CUDA on the CPU's kernels: a test of these tests.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.utils._pytree as pytree
from support import assert_within_budget
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout, backends
from pyvtk.ops import sparse24 as ops24
from pyvtk.reference import sparse24 as reference24
from pyvtk.sparse24 import Sparse24Weight
from pyvtk.sparse24 import calibrate as calibrate24
from pyvtk.sparse24 import estimate as estimate24
from pyvtk.sparse24 import linear as linear24

DEVICE = os.environ.get("PYVTK_GPU_DEVICE") or "cuda"
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA alone")
HALF, BRAIN, SINGLE, WHOLE = torch.float16, torch.bfloat16, torch.float32, torch.int8
NAN, INF = float("nan"), float("inf")


@dataclass
class Call:
    """One call of a public function.

    Attributes:
        operator: whose kernels run it.
        inputs: makes tensors (and Selections) on the CPU; called after the seed is set.
        run: called with backend and the inputs. What it changes it has to clone.
        exact: results agree with the reference bit for bit; else within the error budget.
        compiles: among those that are tried under torch.compile: one or two of each operator.
        waits: the host waits, as the docstring says: no CUDA graph captures it.
        reorders: other strides may take another kernel, whose sums have another order.
        added: the largest sum of magnitudes that float32 results are made of, from the inputs.
    """

    operator: str
    inputs: Callable[[], tuple]
    run: Callable
    exact: bool = True
    compiles: bool = False
    waits: bool = False
    reorders: bool = False
    added: Callable[..., float] = lambda *inputs: 0.0


# ---- the calls


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


SELECT = {
    "one row": Call("select", scores(1, 2880), select(720), compiles=True),
    "many rows": Call("select", scores(300, 33), select(7)),
    "long rows": Call("select", scores(4, 16384), select(4096)),
    "longest row": Call("select", scores(1, 131072, values=1000), select(20000)),
    # on CUDA in two launches: chunks that end within a word, a list of ranks that fits a block and one that does not
    "longest row, few": Call("select", scores(1, 131072), select(16)),
    "longest row, bf16": Call("select", scores(2, 3, 40001, dtype=BRAIN), select(9999)),
    "longest row, fp16": Call("select", scores(3, 16385, dtype=HALF), select(8000)),
    "longest row, all equal": Call("select", scores(1, 131072, values=1), select(65000)),
    "longest row, odd values": Call("select", scores(2, 50000, odd=True), select(45000)),
    "longest rows, many": Call("select", scores(100, 20000, values=100), select(5000)),
    "longest row, masks": Call("select", masked(2, 70000, "drop", "candidates"),
                               select(9000, names=("drop", "candidates"), capacity=9100, align="right")),
    "longest row, threshold": Call("select", scores(2, 33000), lambda b, x: pyvtk.select(
        x, torch.tensor([20000, 300], device=x.device), threshold=x[:, 0] * 0 - 0.5, capacity=15000, backend=b)),
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
    "threshold": Call("select", scores(4, 700), lambda b, x: pyvtk.select(x, 300, threshold=x[:, 0], backend=b)),
    "top_p": Call("select", lambda: (torch.rand(4, 700), torch.rand(4)),
                  lambda b, x, p: pyvtk.select(x, top_p=p, backend=b)),
    "masks": Call("select", masked(5, 800, "keep", "drop", "candidates"),
                  select(200, names=("keep", "drop", "candidates"), capacity=210), compiles=True),
    "others stay": Call("select", masked(5, 800, "keep", "drop", "candidates", dtype=BRAIN),
                        select(100, names=("keep", "drop", "candidates"), others="keep", align="right")),
    "by score": Call("select", scores(5, 1200, values=50), select(600, order="score")),
    "segments": Call("select", lambda: (torch.randn(3, 900), torch.randint(-1, 5, (3, 900)),
                                        torch.randint(0, 60, (3, 4))), per_segment),
    "packed": Call("select", packed_rows([5, 0, 577, 1, 1200, 64]),
                   lambda b, x, cu, k: pyvtk.select(x, k, cu_seqlens=cu, capacity=400, backend=b)),
}  # fmt: skip


def chosen(rows, tokens, keep, *, ragged=False, align="left") -> Selection:
    """A random ascending selection, with ``ragged`` of 0 to ``keep`` tokens."""
    order = torch.rand(*rows, tokens).argsort(-1)
    count = torch.randint(0, keep + 1, rows) if ragged else torch.full(rows, keep)
    mask = torch.zeros(*rows, tokens, dtype=torch.bool).scatter(-1, order, torch.arange(tokens) < count[..., None])
    return Selection.from_mask(mask, capacity=keep, align=align)


def values(*shape, dtype=SINGLE) -> Tensor:
    return torch.randint(-100, 100, shape).to(dtype)


def moved(make, **options):
    """inputs() of a selection and tensors, and the call that compacts them."""

    def run(backend, selection, *tensors):
        return pyvtk.compact(selection, *tensors, **options, backend=backend)

    return make, run


def bundle():
    keys = [values(2, 4, 130, 64, dtype=BRAIN).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(2)]
    positions = torch.arange(130).expand(3, 2, 130)
    return chosen((2,), 130, 41, ragged=True), values(2, 130, 96), positions, values(2, 130) > 0, *keys


def gradient(call, wanted=1):
    """``call`` and the gradients to the last ``wanted`` of its float inputs."""

    def run(backend, *inputs):
        *rest, weight = inputs
        leaves = [x.detach().requires_grad_() for x in rest[len(rest) - wanted :]]
        out = call(backend, *rest[: len(rest) - wanted], *leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, weight)

    return run


def in_place(backend, selection, *caches):
    caches = [x.clone() for x in caches]  # preserves strides
    pyvtk.compact_kv_(selection, *caches, backend=backend)
    return caches


def into_out(backend, selection, x):
    out = torch.full((x.shape[0], selection.capacity, x.shape[2]), 7, dtype=x.dtype, device=x.device)
    return pyvtk.compact(selection, x, out=out, backend=backend)


COMPACT = {
    "hidden": Call("compact", *moved(lambda: (chosen((2,), 640, 144), values(2, 640, 4096, dtype=BRAIN)))),
    "odd width": Call("compact", *moved(lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65))), compiles=True),
    "unaligned": Call("compact", *moved(lambda: (chosen((3,), 97, 31), values(3, 97, 129, dtype=HALF)[..., 1:]))),
    "bytes": Call("compact", *moved(lambda: (chosen((3,), 97, 31), values(3, 97, 17, dtype=torch.uint8)))),
    "double": Call("compact", *moved(lambda: (chosen((3,), 97, 31), values(3, 97, 6, dtype=torch.float64)))),
    "a layer": Call("compact", *moved(bundle, dim=(1, 2, 1, 2, 2), batch_dim=(0, 1, 0, 0, 0),
                                      pad_value=(0, -1, 1, 0, 3))),
    "right": Call("compact", *moved(lambda: (chosen((3,), 97, 31, ragged=True, align="right"), values(3, 97, 8)))),
    "packed": Call("compact", *moved(lambda: (chosen((4,), 77, 20, ragged=True), values(4, 77, 24)),
                                     packed=True, total=60)),
    "table": Call("compact", *moved(lambda: (chosen((4,), 77, 20), values(77, 24)), dim=0, batch_dim=None)),
    "by head": Call("compact", *moved(lambda: (chosen((2, 4), 200, 50), values(2, 4, 200, 64)), dim=2)),
    "nothing stays": Call("compact", *moved(lambda: (chosen((2,), 50, 0), values(2, 50, 8)))),
    "no rows": Call("compact", *moved(lambda: (chosen((0,), 50, 5), values(0, 50, 8)))),
    "into out": Call("compact_out", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 40)), into_out),
    "gradient": Call("compact_backward", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65),
                                                  values(3, 31, 65)),
                     gradient(lambda b, s, x: pyvtk.compact(s, x, backend=b))),
    "restore": Call("restore", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 31, 65), values(3, 97, 65)),
                    lambda b, s, u, base: pyvtk.restore(s, u, base, backend=b), compiles=True),
    "restore on zeros": Call("restore", lambda: (chosen((3,), 97, 31), values(3, 31, 64, dtype=BRAIN)),
                             lambda b, s, u: pyvtk.restore(s, u, backend=b)),
    "restore by head": Call("restore", lambda: (chosen((2, 4), 97, 31), values(2, 4, 31, 64), values(2, 4, 97, 64)),
                            lambda b, s, u, base: pyvtk.restore(s, u, base, dim=2, backend=b)),
    # small whole numbers, so that products and sums have no rounding
    "restore with a gate": Call("restore", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65),
                                                    values(3, 31), values(3, 31, 65)),
                                lambda b, s, base, gate, u: pyvtk.restore(s, u, base, gate=gate, backend=b)),
    "restore's gradient": Call("restore_backward", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 31, 65),
                                                            values(3, 97, 65), values(3, 97, 65)),
                               gradient(lambda b, s, u, base: pyvtk.restore(s, u, base, backend=b), 2)),
    "gate's gradient": Call("restore_backward", lambda: (chosen((3,), 97, 31, ragged=True), values(3, 97, 65),
                                                         values(3, 31), values(3, 31, 65), values(3, 97, 65)),
                            gradient(lambda b, s, base, g, u: pyvtk.restore(s, u, base, gate=g, backend=b), 2)),
    "caches": Call("compact_kv_", lambda: (chosen((2,), 300, 70, ragged=True),
                                           *(values(2, 4, 300, 64, dtype=BRAIN) for _ in range(6))), in_place,
                   compiles=True),
    "caches by head": Call("compact_kv_", lambda: (chosen((2, 4), 300, 70), values(2, 4, 300, 72)), in_place),
    "caches, tokens first": Call("compact_kv_", lambda: (chosen((2,), 300, 170),
                                                         values(2, 300, 4, 40, dtype=HALF).transpose(1, 2)), in_place),
    "caches, long": Call("compact_kv_", lambda: (chosen((1,), 9000, 8500), values(1, 2, 9000, 128, dtype=BRAIN)),
                         in_place),
}  # fmt: skip


def grouped(batch, tokens, channels, groups, dtype=SINGLE, weights=False):
    def inputs():
        assignment = torch.randint(-1, groups, (batch, tokens))
        extra = [torch.rand(batch, tokens)] if weights else []
        return torch.randn(batch, tokens, channels).to(dtype), assignment, *extra

    return inputs


def merge(groups, reduce="mean"):
    def run(backend, x, assignment, weights=None):
        return pyvtk.merge_tokens(
            x, assignment, num_groups=groups, weights=weights, sizes=weights, reduce=reduce, backend=backend
        )

    return run


def merge_gradient(backend, assignment, x, weights, grad):
    x, weights = (t.detach().requires_grad_() for t in (x, weights))
    out = pyvtk.merge_tokens(x, assignment, num_groups=grad.shape[1], weights=weights, backend=backend)
    return torch.autograd.grad(out, (x, weights), grad.to(out.dtype))


MERGE = {
    "mean": Call("merge_tokens", grouped(3, 577, 130, 144), merge(144), exact=False, compiles=True),
    "sum, bf16": Call("merge_tokens", grouped(3, 300, 1024, 20, BRAIN), merge(20, "sum"), exact=False),
    "weights": Call("merge_tokens", grouped(2, 100, 33, 9, HALF, True), merge(9), exact=False),
    "one group": Call("merge_tokens", grouped(2, 2000, 8, 1), merge(1), exact=False),
    "gradient": Call("merge_tokens_backward",
                     lambda: (torch.randint(-1, 12, (2, 90)), torch.randn(2, 90, 40), torch.rand(2, 90) + 0.5,
                              torch.randn(2, 12, 40)), merge_gradient, exact=False),
}  # fmt: skip


def heads(batch, q_heads, k_heads, queries, keys, dim, dtype=SINGLE):
    """Queries as views of [batch, tokens, heads, dim], keys as a cache holds them."""

    def inputs():
        q = torch.randn(batch, queries, q_heads, dim).to(dtype).transpose(1, 2)
        return q, torch.randn(batch, k_heads, keys, dim).to(dtype)

    return inputs


def scored(num_keep, names=(), **options):
    """Indices, counts and scores of score_and_select."""

    def run(backend, q, k, *tensors):
        options_of_call = options | dict(zip(names, tensors))
        return pyvtk.score_and_select(q, k, num_keep, **options_of_call, return_scores=True, backend=backend)

    return run


def also(make, *more):
    """``make``'s inputs and further ones."""
    return lambda: (*make(), *(extra() for extra in more))


def joined(lengths_q, lengths_k, q_heads, k_heads, dim):
    def inputs():
        q, k = torch.randn(sum(lengths_q), q_heads, dim), torch.randn(sum(lengths_k), k_heads, dim)
        return q, k, *(torch.tensor([0, *x]).cumsum(0).to(torch.int32) for x in (lengths_q, lengths_k))

    return inputs


def scored_packed(backend, q, k, cu_q, cu_k):
    return pyvtk.score_and_select(
        q, k, 30, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, capacity=30, return_scores=True, backend=backend
    )


SCORE_AND_SELECT = {
    "last token": Call("score_and_select", heads(2, 32, 32, 1, 640, 128, BRAIN), scored(144), exact=False,
                       compiles=True),
    "groups": Call("score_and_select", heads(1, 28, 4, 1, 4096, 128, HALF), scored(1000), exact=False),
    "fp32": Call("score_and_select", heads(2, 8, 2, 5, 777, 64), scored(100, causal=True), exact=False),
    "window": Call("score_and_select", heads(2, 8, 4, 64, 1000, 80, BRAIN),
                   scored(128, causal=True, query_reduce="sum", head_reduce="group_sum"), exact=False),
    "by head": Call("score_and_select", heads(1, 6, 2, 3, 333, 72), scored(50, head_reduce=None), exact=False),
    "maximum": Call("score_and_select", heads(1, 4, 4, 20, 500, 256, BRAIN),
                    scored(50, query_reduce="max", head_reduce="max"), exact=False),
    "range": Call("score_and_select", heads(3, 8, 8, 1, 900, 32), scored(64, key_range=(35, 611)), exact=False),
    "masks": Call("score_and_select", also(heads(3, 8, 2, 2, 600, 128), lambda: torch.rand(3, 600) < 0.7,
                                           lambda: torch.rand(3, 600) < 0.05),
                  scored(99, ("k_mask", "keep"), capacity=120), exact=False),
    "bias": Call("score_and_select", also(heads(3, 8, 2, 2, 600, 128), lambda: torch.randn(3, 600)),
                 scored(99, ("k_bias",), top_p=0.9), exact=False),
    "packed": Call("score_and_select", joined([1, 4, 2], [100, 577, 29], 8, 4, 64), scored_packed, exact=False),
}  # fmt: skip


def attention(names=(), **options):
    def run(backend, q, k, *tensors):
        return pyvtk.attention_scores(q, k, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def score_gradient(backend, q, k, grad):
    q, k = (x.detach().requires_grad_() for x in (q, k))
    out = pyvtk.attention_scores(q, k, causal=True, backend=backend)
    return torch.autograd.grad(out, (q, k), grad.to(out.dtype))


SCORE = {
    "last token": Call("attention_scores", heads(2, 8, 2, 1, 1000, 128, BRAIN), attention(), exact=False),
    "all rows": Call("attention_scores", heads(1, 8, 2, 500, 500, 64, BRAIN), attention(causal=True), exact=False,
                     compiles=True),
    "fp32": Call("attention_scores", heads(2, 4, 4, 65, 129, 80), attention(head_reduce=None), exact=False),
    "sum and max": Call("attention_scores", heads(1, 4, 2, 100, 300, 72, HALF),
                        attention(query_reduce=("sum", "max"), causal=True, head_reduce="group_max"), exact=False),
    "mask": Call("attention_scores", also(heads(2, 4, 2, 70, 200, 128), lambda: torch.rand(2, 200) < 0.8),
                 attention(("k_mask",)), exact=False),
    "gradient": Call("attention_scores_backward",
                     also(heads(1, 4, 2, 90, 90, 64), lambda: torch.randn(1, 90)), score_gradient, exact=False),
}  # fmt: skip


def placed(q_heads, k_heads, dim, dtype=SINGLE):
    """Queries, keys, values, and where the tokens stand: text around an image."""

    def inputs():
        layout = TokenLayout.from_images([90], [ImageSpan(0, 5, (1, 8, 10))])
        shapes = ((1, count, 90, dim) for count in (q_heads, k_heads, k_heads))
        return *(torch.randn(shape).to(dtype) for shape in shapes), layout.image_id, layout.coords

    return inputs


def neighbors(backend, q, k, v, image_id, coords):
    plan = pyvtk.neighbor_plan(TokenLayout(image_id, coords), 2)
    return pyvtk.neighbor_attention(q, k, v, plan, backend=backend)


ATTENTION = {
    "neighbours": Call("neighbor_attention", placed(4, 2, 64), neighbors, exact=False),
    "neighbours, bf16": Call("neighbor_attention", placed(4, 2, 80, BRAIN), neighbors, exact=False),
}


def weight24(features: int, columns: int, dtype) -> Sparse24Weight:
    """A random 2:4 weight; all pairs of positions come."""
    if dtype == WHOLE:
        dense, scales = torch.randint(-127, 128, (features, columns)).to(dtype), torch.rand(features) / 64 + 1e-3
    else:
        dense, scales = torch.randn(features, columns).to(dtype), None
    mask = reference24.prune_n_of_m(torch.rand(features, columns), 2, 4)
    return Sparse24Weight(*reference24.compress(dense, mask), scales)


def product(
    rows, features, columns, dtype=BRAIN, *, int8=False, bias=None, mul=False, dense=False, gap=0, x_scale=False
):
    """Inputs of a product: a weight, x (in memory with ``gap`` numbers between rows and before the first), and what
    else is named, in the order bias, mul, dense, x_scale."""

    def inputs():
        weight = weight24(features, columns, WHOLE if int8 else dtype)
        shape = rows if isinstance(rows, tuple) else (rows,)
        x = torch.randn(*shape, columns + gap).to(dtype)[..., gap:]
        more = [torch.randn(features).to(bias)] if bias else []
        more += [torch.randn(*shape, features).to(dtype)] if mul else []
        more += [weight.decompress(dtype)] if dense else []
        return weight, x, *more, *([torch.tensor([0.03])] if x_scale else [])

    return inputs


def multiplied(*names, int8=False, **options):
    """Further inputs are the tensor options ``names``. The oracle's float64 scales are what they were."""

    def run(backend, weight, x, *tensors):
        given = {n: t.float() if n == "x_scale" else t for n, t in zip(names, tensors)}
        packed = x, weight.values, weight.metadata
        scales = None if weight.scales is None else weight.scales.float()
        if int8:
            return ops24.linear_int8(*packed, scales, **options, **given, backend=backend)
        return ops24.linear(*packed, scales=scales, **options, **given, backend=backend)

    return run


def magnitudes(weight, x, *rest) -> float:
    return (x.double().abs() @ weight.decompress(torch.float64).abs().T).max().item()


def call24(inputs, run=None, operator="sparse24_linear", **options):
    return Call(operator, inputs, run or multiplied(), exact=False, reorders=True, **options)


def call24_int8(inputs, *names, compiles=False, **options):
    return call24(inputs, multiplied(*names, int8=True, **options), "sparse24_linear_int8", compiles=compiles)


def to_compress(features, columns, dtype):
    def inputs():
        return values(features, columns, dtype=dtype), reference24.prune_n_of_m(torch.rand(features, columns), 2, 4)

    return inputs


def gradients24(backend, weight, x, grad):
    leaves = [weight.values.detach().requires_grad_(), x.detach().requires_grad_()]
    out = ops24.linear(leaves[1], leaves[0], weight.metadata, activation="silu", backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def training_step24(backend, weight, mask, x, grad):
    """What Linear24 does in a step that chooses no mask; the host never waits, so a graph captures it."""
    leaves = [weight.detach().requires_grad_(), x.detach().requires_grad_()]
    packed = ops24.compress(leaves[0], mask, trusted=True, backend=backend)
    out = ops24.linear(leaves[1], *packed, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


SPARSE24 = {
    # every number of rows of a tile; the few kernel splits its sums where there is little else to do
    "1 row": call24(product(1, 200, 2048), compiles=True),
    "5 rows, fp16": call24(product(5, 128, 1024, HALF)),
    "16 rows": call24(product(16, 129, 2176)),
    "30 rows, fp16": call24(product(30, 70, 1088, HALF)),
    "33 rows": call24(product(33, 160, 512)),
    "64 rows": call24(product(64, 256, 1024)),
    "130 rows, fp16": call24(product(130, 130, 576, HALF)),
    "577 rows": call24(product(577, 384, 256)),
    "577 rows, many features": call24(product(577, 4224, 64)),
    "no rows": call24(product(0, 64, 64)),
    "no features": call24(product(5, 0, 64)),
    "images": call24(product((2, 3), 96, 128)),
    "fp32, 1 row": call24(product(1, 96, 512, SINGLE), added=magnitudes),
    "fp32": call24(product(64, 96, 260, SINGLE), added=magnitudes, compiles=True),
    "int8 weights, 1 row": call24(product(1, 160, 1024, int8=True)),
    "int8 weights, 16 rows, fp16": call24(product(16, 33, 512, HALF, int8=True)),
    "int8 weights, 130 rows": call24(product(130, 140, 320, int8=True)),
    "int8 weights, fp32": call24(product(33, 64, 128, SINGLE, int8=True), added=magnitudes),
    "ragged features": call24(product(16, 77, 256)),
    "ragged features, many": call24(product(64, 77, 256, HALF)),
    "ragged columns": call24(product(5, 64, 1100)),
    "ragged columns, many": call24(product(130, 130, 68)),
    "ragged columns, int8 weights": call24(product(33, 65, 132, HALF, int8=True)),
    "rows apart": call24(product(16, 64, 256, gap=8)),
    "rows apart, unaligned": call24(product(16, 64, 256, HALF, gap=1)),
    "rows apart, many": call24(product(130, 64, 256, HALF, gap=8)),
    "rows apart, many, unaligned": call24(product(130, 64, 256, gap=3)),
    "few chosen": call24(product(20, 128, 512), multiplied(choice=(0, 0))),
    "many chosen": call24(product(3, 128, 512), multiplied(choice=(0, 1))),
    "few chosen where it cannot be": call24(product(65, 128, 512), multiplied(choice=(0, 0))),
    "dense chosen": call24(product(7, 128, 256, dense=True), multiplied("dense", choice=(0, 0, 5, 2))),
    "dense chosen, bias": call24(product(40, 128, 256, HALF, dense=True, bias=HALF),
                                 multiplied("bias", "dense", choice=(0, 2))),
    "dense chosen, epilogue": call24(product(40, 128, 256, dense=True, bias=SINGLE, mul=True),
                                     multiplied("bias", "mul", "dense", choice=(0, 0, 8, 2), activation="silu")),
    "relu": call24(product(5, 96, 128), multiplied(activation="relu")),
    "gelu, bias": call24(product(16, 96, 128, bias=BRAIN), multiplied("bias", activation="gelu")),
    "gelu_tanh, float32 bias": call24(product(64, 96, 128, HALF, bias=SINGLE),
                                      multiplied("bias", activation="gelu_tanh")),
    "quick_gelu, bias": call24(product(33, 96, 128, bias=BRAIN), multiplied("bias", activation="quick_gelu")),
    "silu, mul": call24(product(130, 96, 128, mul=True), multiplied("mul", activation="silu")),
    "everything, sums in parts": call24(product(5, 33, 4224, bias=SINGLE, mul=True),
                                        multiplied("bias", "mul", activation="silu")),
    "everything, int8 weights": call24(product(130, 33, 1028, HALF, int8=True, bias=HALF, mul=True),
                                       multiplied("bias", "mul", activation="gelu")),
    "bias, fp32": call24(product(64, 96, 128, SINGLE, bias=SINGLE), multiplied("bias"), added=magnitudes),
    "int8 x int8, 1 row": call24_int8(product(1, 200, 1024, int8=True), compiles=True),
    "int8 x int8, 16 rows, fp16": call24_int8(product(16, 64, 512, HALF, int8=True)),
    "int8 x int8, 64 rows, fp32": call24_int8(product(64, 130, 256, SINGLE, int8=True)),
    "int8 x int8, 577 rows": call24_int8(product(577, 160, 192, int8=True)),
    "int8 x int8, ragged": call24_int8(product(33, 65, 132, int8=True, gap=1)),
    "int8 x int8, one scale": call24_int8(product(130, 96, 256, int8=True, x_scale=True), "x_scale"),
    "int8 x int8, everything": call24_int8(product(5, 96, 1088, int8=True, bias=SINGLE, mul=True), "bias", "mul",
                                           activation="gelu"),
    "gradient": call24(lambda: (*product(33, 96, 128)(), torch.randn(33, 96)), gradients24),
    **{f"compress, {str(dtype)[6:]}": Call("sparse24_compress", to_compress(*shape, dtype),
                                           lambda b, w, m: ops24.compress(w, m, backend=b), waits=True)
       for dtype, shape in ((BRAIN, (33, 260)), (HALF, (8, 64)), (SINGLE, (130, 12)), (WHOLE, (65, 516)))},
    "compress, trusted": Call("sparse24_compress", to_compress(33, 260, BRAIN),
                              lambda b, w, m: ops24.compress(w, m, trusted=True, backend=b)),
    "training step": call24(lambda: (*to_compress(96, 128, BRAIN)(), values(33, 128, dtype=BRAIN),
                                     values(33, 96, dtype=BRAIN)), training_step24),
    **{f"decompress, {str(dtype)[6:]}": Call("sparse24_decompress", lambda dtype=dtype: (weight24(67, 260, dtype),),
                                             lambda b, w: ops24.decompress(w.values, w.metadata, backend=b))
       for dtype in (BRAIN, HALF, SINGLE, WHOLE)},
}  # fmt: skip

FAMILIES = {
    "select": SELECT, "compact": COMPACT, "merge": MERGE, "score_and_select": SCORE_AND_SELECT, "score": SCORE,
    "attention": ATTENTION, "sparse24": SPARSE24,
}  # fmt: skip
CALLS = {f"{family}: {name}": call for family, calls in FAMILIES.items() for name, call in calls.items()}


# ---- running them


def ways(call: Call) -> list[str | None]:
    """None (what users get) where it is no fallback, and Triton where it is not that already."""
    able = [way for way in ("compiled", "triton") if backends.why_not(call.operator, way, DEVICE) is None]
    return [None, *able[1:]] if able else []


def pairs(calls: dict[str, Call]):
    able = [(name, way) for name, call in calls.items() for way in ways(call)]
    found = [pytest.param(name, way, id=f"{name}, {way}" if way else name) for name, way in able]
    return pytest.mark.parametrize(("name", "backend"), found)


every = pairs(CALLS)
unwaited = pairs({name: call for name, call in CALLS.items() if not call.waits})
compiling = pairs({name: call for name, call in CALLS.items() if call.compiles})


def on(device, tree):
    """On the device, with the same strides and offsets: Tensor.to() would close gaps."""

    def one(x):
        if not isinstance(x, Tensor) or x.device.type == torch.device(device).type:
            return x
        whole = x.untyped_storage().nbytes() // x.element_size()
        return x.as_strided((whole,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return pytree.tree_map(one, tree)


def make(call: Call, seed: int = 0, device=DEVICE):
    """Inputs of ``call`` for a seed."""
    torch.manual_seed(seed)
    return on(device, call.inputs())


def same(actual, expected) -> bool:
    """The same bits, NaN included."""
    found, wanted = (pytree.tree_leaves(x) for x in (actual, expected))
    return len(found) == len(wanted) and all(
        torch.equal(a.nan_to_num(0.12345), b.nan_to_num(0.12345)) if isinstance(a, Tensor) else a == b
        for a, b in zip(found, wanted)
    )


def in_float64(tree):
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def assert_right(call: Call, result, inputs) -> None:
    """Against the reference on the CPU; a selection by scores of ours against select of these very scores."""
    inputs, result = on("cpu", inputs), on("cpu", result)
    if call.exact:
        assert same(result, call.run("reference", *inputs))
        return
    oracle, plain = call.run("reference", *in_float64(inputs)), call.run("reference", *inputs)
    if call.operator == "score_and_select":
        selection, result = result
        (_, oracle), (_, plain) = oracle, plain
        chosen_again(call, selection, result, inputs)
    for leaf, exact, other in zip(*(pytree.tree_leaves(x) for x in (result, oracle, plain)), strict=True):
        assert_within_budget(leaf, exact, other, added=call.added(*inputs))


def chosen_again(call: Call, selection: Selection, found: Tensor, inputs) -> None:
    """The same call with logits that are given: its scores replaced by ours, its selection has to be ours."""
    from pyvtk.reference import score

    before = score.attention_scores

    def given(*arguments, **options):
        out, lse = before(*arguments, **options)
        return found.to(out.dtype).reshape(out.shape), lse

    score.attention_scores = given
    try:
        again, scores_again = call.run("reference", *inputs)
    finally:
        score.attention_scores = before
    assert same(scores_again, found)
    assert same(selection.indices, again.indices) and same(selection.counts, again.counts)


@every
def test_equals_the_reference(name, backend):
    call = CALLS[name]
    for seed in range(2):
        inputs = make(call, seed)
        assert_right(call, call.run(backend, *inputs), inputs)


@every
def test_same_bits_on_every_run(name, backend):
    inputs = make(CALLS[name])
    first = CALLS[name].run(backend, *inputs)
    assert all(same(CALLS[name].run(backend, *inputs), first) for _ in range(5))


def fill(into, tree) -> None:
    for target, source in zip(pytree.tree_leaves(into), pytree.tree_leaves(tree), strict=True):
        if isinstance(target, Tensor) and 0 in target.stride() and target.numel() > 0:
            assert same(target, source), "an expanded input has to stay as it is"
        elif isinstance(target, Tensor):
            target.copy_(source)


@cuda
@unwaited
def test_graph_replays_with_changed_inputs(name, backend):
    call = CALLS[name]
    inputs = make(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run(backend, *inputs)  # compiles and loads what is loaded once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call.run(backend, *inputs)
    for seed in (1, 2, 0):
        others = make(call, seed)
        fill(inputs, others)
        graph.replay()
        torch.cuda.synchronize()
        assert same(result, call.run(backend, *others)), f"inputs {seed}"


@cuda
@every
def test_two_streams_at_once(name, backend):
    call = CALLS[name]
    inputs = [make(call, seed) for seed in range(2)]
    expected = [call.run(backend, *x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(10):
        for stream, x in zip(streams, inputs):
            with torch.cuda.stream(stream):
                results.append(call.run(backend, *x))
    torch.cuda.synchronize()
    assert all(same(result, expected[i % 2]) for i, result in enumerate(results))


@every
def test_two_threads_at_once(name, backend):
    call = CALLS[name]
    inputs = [make(call, seed) for seed in range(2)]
    expected = [call.run(backend, *x) for x in inputs]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    results, start = {}, threading.Barrier(2)

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if DEVICE == "cuda" else None
        start.wait()
        with torch.cuda.stream(stream):
            results[i] = [call.run(backend, *inputs[i]) for _ in range(10)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert sorted(results) == [0, 1], "a thread raised"
    assert all(same(result, expected[i]) for i in results for result in results[i])


@cuda
@unwaited
def test_host_never_waits(name, backend):
    call = CALLS[name]
    inputs = make(call)
    call.run(backend, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every
def test_another_device_is_current(name, backend):
    call = CALLS[name]
    inputs = make(call, device="cuda:1" if DEVICE == "cuda" else DEVICE)
    result = call.run(backend, *inputs)
    assert_right(call, result, inputs)
    assert {x.device for x in pytree.tree_leaves(result) if isinstance(x, Tensor)} <= {
        x.device for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)
    }


def spread(x: Tensor) -> Tensor:
    """The same values, each row of the last dimension apart from the next, in memory full of other numbers."""
    if not isinstance(x, Tensor) or x.dim() < 2 or x.numel() == 0:
        return x
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), 77, dtype=torch.float64, device=x.device).to(x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@every
def test_rows_apart(name, backend):
    """Selections stay contiguous, as they are by definition; positions and other tables are spread as well."""
    call = CALLS[name]
    inputs = make(call)
    apart = tuple(x if isinstance(x, Selection) else spread(x) for x in inputs)
    if call.reorders:
        assert_right(call, call.run(backend, *apart), inputs)
    else:
        assert same(call.run(backend, *apart), call.run(backend, *inputs))


# ---- more than 2^31 elements between rows


def far(x: Tensor) -> Tensor:
    """The same values [2, ...], the second sample more than 2^31 elements behind the first."""
    step = (1 << 31) + 64
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the memory between is never touched
    try:
        memory = torch.empty(step + x[0].numel(), dtype=x.dtype, device=x.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
    view = memory.as_strided(x.shape, (step, *x[0].contiguous().stride()))
    view.copy_(x)
    return view


FAR = {
    "select": Call("select", scores(2, 3000, dtype=BRAIN), select(500)),
    "compact": Call("compact", *moved(lambda: (chosen((2,), 97, 31), values(2, 97, 64, dtype=BRAIN)))),
    "bytes": Call("compact", *moved(lambda: (chosen((2,), 97, 31), values(2, 97, 64, dtype=torch.uint8)))),
    "restore": Call("restore", lambda: (chosen((2,), 97, 31), values(2, 31, 64, dtype=BRAIN),
                                        values(2, 97, 64, dtype=BRAIN)),
                    lambda b, s, u, base: pyvtk.restore(s, u, base, backend=b)),
    "caches": Call("compact_kv_", lambda: (chosen((2,), 97, 31), values(2, 2, 97, 64, dtype=BRAIN)),
                   lambda b, s, x: pyvtk.compact_kv_(s, x, backend=b).clone()),
    "merge": Call("merge_tokens", grouped(2, 97, 64, 9, BRAIN), merge(9), exact=False),
    "score and select": Call("score_and_select", heads(2, 4, 2, 2, 300, 64, BRAIN), scored(50), exact=False),
    "score": Call("attention_scores", heads(2, 4, 2, 80, 300, 64, BRAIN), attention(), exact=False),
    "sparse24": call24(product(2, 70, 512)),
    "sparse24, many": call24(product(2, 70, 512, HALF), multiplied(choice=(0, 1))),
    "sparse24, int8 x int8": call24_int8(product(2, 70, 512, int8=True)),
}  # fmt: skip


@pairs(FAR)
def test_offsets_beyond_two_to_the_31(name, backend):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    call = FAR[name]
    inputs = make(call)
    # the last tensor of two samples in 16 bits or less: scores, hidden states, caches, keys
    last = max(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.element_size() <= 2)
    distant = tuple(far(x) if i == last else x for i, x in enumerate(inputs))
    result = call.run(backend, *distant)
    assert same(result, call.run(backend, *inputs))
    assert_right(call, result, make(call))


# ---- which lane holds what


def one_in_every_place(columns: int) -> tuple[Tensor, Tensor, list[tuple[int, tuple[int, int]]]]:
    """A weight [3 * columns, columns] of 0 and 1 with one 1 in each row, its mask, and of each row what is tried: the
    column of the 1 and the two positions of its group. Other groups keep all pairs of positions, in turn."""
    kept = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    tried = [(column, pair) for column in range(columns) for pair in kept if column % 4 in pair]
    mask = torch.zeros(len(tried), columns // 4, 4, dtype=torch.bool)
    for row, (column, pair) in enumerate(tried):
        for group in range(columns // 4):
            mask[row, group, list(pair if group == column // 4 else kept[(row + group) % 6])] = True
    weight = torch.zeros(len(tried), columns)
    weight[range(len(tried)), [column for column, _ in tried]] = 1
    return weight, mask.flatten(1), tried


@pytest.mark.skipif(not ways(Call("sparse24_linear", None, None)), reason="sparse24 has no kernel here")
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8 weights", "int8 x int8"])
def test_every_place_meets_its_column(kind, rows):
    """A 1 at every place of the weight, and the identity as x: what comes out says which column a place was multiplied
    with. mma.sp reads two bits for each kept weight, from registers of other lanes
    than the weight's; this checks the maps on the device, where the emulation checks them against documents."""
    columns, step = 256, 15 if rows == 1 else 1  # a sample of all columns where each is a call
    weight, mask, tried = one_in_every_place(columns)
    int8 = kind.startswith("int8")
    dtype = HALF if kind == "fp16" else BRAIN
    packed = on(DEVICE, reference24.compress(weight.to(WHOLE if int8 else dtype), mask))
    scales = torch.ones(len(tried), device=DEVICE) if int8 else None
    identity = torch.eye(columns, device=DEVICE).to(dtype)
    for kernel in [0, 1] if rows <= 32 else [1]:
        found = []
        for x in identity.split(rows)[::step]:
            if kind == "int8 x int8":
                one = torch.ones(1, device=DEVICE)
                found.append(ops24.linear_int8(x, *packed, scales, x_scale=one, backend="compiled"))
            else:
                found.append(ops24.linear(x, *packed, scales=scales, choice=(0, kernel), backend="compiled"))
        some = torch.cat(list(torch.arange(columns).split(rows)[::step]))
        found, wanted = torch.cat(found).float().cpu(), weight.T[some]
        wrong = (found != wanted).nonzero().tolist()
        told = [
            f"feature {n}: place {tried[n][0]} (group {tried[n][0] // 4}, kept {tried[n][1]}) times column "
            f"{some[r].item()} of x is {found[r, n].item()}, not {wanted[r, n].item()}"
            for r, n in wrong[:12]
        ]
        name = ("few", "many")[kernel]
        assert not wrong, f"{kind}, {name}, {rows} rows: {len(wrong)} wrong\n" + "\n".join(told)


@pytest.mark.skipif(not ways(Call("sparse24_linear", None, None)), reason="sparse24 has no kernel here")
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 130])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8 weights", "int8 x int8"])
def test_whole_numbers_are_exact(kind, rows):
    """Sums without rounding: the dense product, bit for bit, whatever the order."""
    torch.manual_seed(rows)
    dtype, int8 = HALF if kind == "fp16" else BRAIN, kind.startswith("int8")
    dense = torch.randint(-3, 4, (140, 1088))
    packed = reference24.compress(
        dense.to(WHOLE if int8 else dtype), reference24.prune_n_of_m(torch.rand(140, 1088), 2, 4)
    )
    x = torch.randint(-3, 4, (rows, 1088)).to(dtype)
    # float64 holds the sums; the result is rounded once
    wanted = (x.double() @ reference24.decompress(*packed).double().T).to(dtype)
    x, packed = on(DEVICE, (x, packed))
    scales, one = torch.ones(140, device=DEVICE), torch.ones(1, device=DEVICE)
    for kernel in (0, 1):
        if kind == "int8 x int8":
            found = ops24.linear_int8(x, *packed, scales, x_scale=one, backend="compiled")
        else:
            scaled = {"scales": scales} if int8 else {}
            found = ops24.linear(x, *packed, **scaled, choice=(0, kernel), backend="compiled")
        assert same(found.cpu(), wanted), f"{('few', 'many')[kernel]}: {(found.cpu() != wanted).nonzero()[:4].tolist()}"


@cuda
@pytest.mark.skipif(not ways(Call("sparse24_compress", None, None)), reason="sparse24 has no kernel here")
def test_a_wrong_mask_is_refused():
    mask = torch.tensor([True, False, True, False], device=DEVICE).repeat(3, 5)
    mask[1, 9] = True
    with pytest.raises(RuntimeError, match="exactly two"):
        ops24.compress(torch.randn(3, 20, device=DEVICE), mask)


# ---- the vendor's kernel for 2:4 weights. No graph captures it here: what cuSPARSELt allows is not ours to promise.


WITHOUT_VENDOR = backends.why_not_cusparselt(torch.device(DEVICE).type)
vendor24 = pytest.mark.skipif(WITHOUT_VENDOR is not None, reason=f"{WITHOUT_VENDOR}")


def by_vendor(*names, **options):
    """By the vendor's kernel alone, with the weight packed at first need. Further inputs are options ``names``."""
    as_reference = multiplied(*names, **options)

    def run(backend, weight, x, *tensors):
        if backend == "reference":
            return as_reference(backend, weight, x, *tensors)
        weight.choice = (0, 3)
        return linear24(x, weight, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def gradient_by_vendor(backend, weight, x, grad):
    leaf = x.detach().requires_grad_()
    out = by_vendor()(backend, weight, leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))


VENDOR24 = {
    **{f"{rows} rows, {str(dtype)[6:]}": call24(product(rows, 256, 1024, dtype), by_vendor())
       for rows in (1, 8, 13, 64, 577, 2950) for dtype in (BRAIN, HALF)},
    "rows apart": call24(product(40, 272, 528, gap=8), by_vendor()),
    "rows apart, unaligned": call24(product(40, 272, 528, HALF, gap=3), by_vendor()),
    "images": call24(product((2, 3), 96, 128), by_vendor()),
    "no rows": call24(product(0, 64, 64), by_vendor()),
    "bias": call24(product(40, 96, 128, bias=BRAIN), by_vendor("bias")),
    "float32 bias": call24(product(40, 96, 128, HALF, bias=SINGLE), by_vendor("bias")),
    "everything": call24(product(33, 96, 128, bias=BRAIN, mul=True), by_vendor("bias", "mul", activation="silu")),
    "gradient": call24(lambda: (*product(33, 96, 128)(), torch.randn(33, 96)), gradient_by_vendor),
    "a weight that does not fit": call24(product(33, 100, 128), by_vendor()),
}  # fmt: skip


@vendor24
@pairs(VENDOR24)
def test_vendor(name, backend):
    call = VENDOR24[name]
    for seed in range(2):
        inputs = make(call, seed)
        result = call.run(backend, *inputs)
        assert_right(call, result, inputs)
        assert same(call.run(backend, *inputs), result)
        assert (inputs[0].vendor is None) == (name == "a weight that does not fit")


@vendor24
def test_vendor_is_measured_and_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path))
    shape = (1024, 1024)
    assert estimate24(64, *shape, BRAIN, DEVICE).source == "analytic"
    calibrate24(DEVICE, dtypes=(BRAIN,), rows=(1, 8, 64, 640), shapes=(shape,), seconds=0.01)
    found = estimate24(640, *shape, BRAIN, DEVICE)
    assert found.source == "measured" and 0 < found.seconds["vendor"] < 1
    assert "vendor" not in estimate24(640, 1000, 1024, BRAIN, DEVICE).seconds


# ---- bad indices: on CUDA they are padding


def bad() -> Selection:
    """Rows that ascend; of seven slots three name tokens that do not exist."""
    rows = torch.tensor([[-9, 0, 3, 5, 40, 41, 1 << 40], [-(1 << 40), 1, 2, 6, 39, 40, 1 << 33]])
    return Selection.from_indices(rows, 40, ascending=True).to(DEVICE)


@cuda
@pytest.mark.skipif(not ways(Call("compact", None, None)), reason="compact has no kernel here")
def test_bad_indices_touch_nothing():
    selection = bad()
    legal = (selection.indices >= 0) & (selection.indices < 40)
    slots = selection.indices.clamp(0, 39)
    around = torch.randn(4, 40, 64, device=DEVICE)
    x = around[1:3]
    moved_rows = pyvtk.compact(selection, x, pad_value=5)
    wanted = x.gather(1, slots[..., None].expand(-1, -1, 64)).where(legal[..., None], torch.tensor(5.0, device=DEVICE))
    assert same(moved_rows, wanted)
    before = around.clone()
    update = torch.randn(2, 7, 64, device=DEVICE)
    put = pyvtk.restore(selection, update, x)
    for row in range(2):
        expected = x[row].clone()
        expected[selection.indices[row][legal[row]]] = update[row][legal[row]]
        assert same(put[row], expected)
    assert same(around, before)
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(pyvtk.compact(selection, leaf).sum(), leaf)
    assert grad.sum().item() == 64 * legal.sum().item()


@cuda
@pytest.mark.skipif(not ways(Call("compact_kv_", None, None)), reason="compact_kv_ has no kernel here")
def test_bad_indices_stay_inside_the_cache():
    around = torch.randn(4, 2, 40, 64, device=DEVICE)
    before = around.clone()
    pyvtk.compact_kv_(bad(), around[1:3])
    torch.cuda.synchronize()
    assert same(around[0], before[0]) and same(around[3], before[3])
    assert same(around[1:3, :, 7:], before[1:3, :, 7:])


@cuda
@pytest.mark.skipif(not ways(Call("merge_tokens", None, None)), reason="merge_tokens has no kernel here")
def test_bad_groups_are_left_out():
    x = torch.randn(2, 50, 16, device=DEVICE)
    assignment = torch.randint(0, 6, (2, 50), device=DEVICE)
    wrong = assignment.clone()
    wrong[:, ::7] = torch.tensor([6, 1 << 40], device=DEVICE)[:, None]
    assignment[:, ::7] = -1
    merged = [pyvtk.merge_tokens(x, a, num_groups=6) for a in (wrong, assignment)]
    torch.cuda.synchronize()
    assert same(*merged)


@cuda
@pytest.mark.skipif(not ways(Call("select", None, None)), reason="select has no kernel here")
def test_bad_offsets_do_not_crash():
    x = torch.randn(100, device=DEVICE)
    for ends in ([0, 1000, 100], [0, 60, 30], [-5, 50, 100], [0, 1 << 30, -(1 << 30)]):
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        selection = pyvtk.select(x, 10, cu_seqlens=cu, capacity=10)
        torch.cuda.synchronize()
        assert (selection.indices >= -1).all() and (selection.indices < 100).all()


# ---- torch's own checks


class Recorder(TorchDispatchMode):
    """Remembers which of our operators were called, and with what."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "pyvtk":
            self.seen.append(
                (function, pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments))
            )
        return function(*arguments, **(options or {}))


@every
def test_opcheck(name, backend):
    inputs = make(CALLS[name])
    with Recorder() as recorder:
        CALLS[name].run(backend, *inputs)
    assert recorder.seen, "no operator of ours was called"
    for function, arguments in recorder.seen:
        torch.library.opcheck(function, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.compile
@compiling
def test_compiles_without_a_break(name, backend):
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call.run, fullgraph=True, dynamic=False)
    for seed in range(2):
        inputs = make(call, seed)
        assert same(compiled(backend, *inputs), call.run(backend, *inputs))


def test_something_ran():
    """Else all of the above is empty, and green."""
    assert any(ways(call) for call in CALLS.values()), "no operator has a kernel for this device"
