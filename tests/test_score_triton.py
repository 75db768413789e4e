"""Triton's kernels of attention_scores against the reference; how they run: tests/test_attention_triton.py."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from interpreter import DEVICE, in_tf32x3, passed_in_the_interpreter, runs_kernels
from support import TF32x3, assert_within_budget
from test_score import ALL, extras, in_double, inputs

import pyvtk
from pyvtk import backends
from pyvtk.ops import score as page

WHY_NOT = backends.why_not("attention_scores", "triton", DEVICE)
kernels = runs_kernels("attention_scores")
pytest.importorskip("triton", reason="triton is not installed")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is None, reason="the tests below run in this process")
def test_in_the_interpreter(tmp_path):
    assert passed_in_the_interpreter(__file__, tmp_path) >= len(COMBINATIONS)


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is None, reason="the tests below run in this process")
def test_in_the_interpreter_as_tensor_cores_multiply(tmp_path):
    assert passed_in_the_interpreter(__file__, tmp_path, "test_float32", tf32x3=True) == 2


# Against the reference -----------------------------------------------------------------------------------------------


def on_device(x):
    return x.to(DEVICE) if isinstance(x, torch.Tensor) else x


def results(q, k, options: dict, backend: str) -> dict:
    """Scores, lse, and gradients of a random linear function of both to every differentiable input."""
    options = dict(options)
    leaves = {"q": q.detach().clone().requires_grad_(), "k": k.detach().clone().requires_grad_()}
    for name in ("k_bias", "lse", "head_weights"):
        if options.get(name) is not None:
            leaves[name] = options[name] = options[name].detach().clone().requires_grad_()
    out = pyvtk.attention_scores(leaves["q"], leaves["k"], backend=backend, return_lse=True, **options)
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for x in out:
        weight = torch.randn(x.shape, generator=generator).to(x)
        loss = loss + (x.masked_fill(x.isinf(), 0) * weight).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    found = {f"gradient of {n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads)}
    return {"scores": out[0], "lse": out[1], **found}


def check(q, k, options: dict, draws: int = 1) -> None:
    """Outputs and gradients within the budget; of float32, for the worst of several draws.

    The largest error of a few numbers in one draw is mere luck; 16-bit inputs drown it in their own rounding.
    """
    options = {name: on_device(x) for name, x in options.items()}
    drawn = []
    for draw in range(draws):
        some_q, some_k = (on_device(x if draw == 0 else torch.randn_like(x)) for x in (q, k))
        actual = results(some_q, some_k, options, "triton")
        plain = results(some_q, some_k, options, "reference")
        oracle = results(some_q.double(), some_k.double(), in_double(options), "reference")
        inexact = oracle
        if in_tf32x3(q.dtype):
            with TF32x3():
                inexact = results(some_q.double(), some_k.double(), in_double(options), "reference")
        drawn.append((actual, oracle, plain, inexact))
    for name in drawn[0][0]:
        actual, oracle, plain, inexact = (torch.stack([draw[i][name] for draw in drawn]) for i in range(4))
        assert_within_budget(actual, oracle, plain, added=TF32x3.added(inexact, oracle))


# An odd step: each reduction, order and quantity comes with each mixture of the other options.
COMBINATIONS = range(0, len(ALL), 3)


@kernels
@pytest.mark.parametrize("number", COMBINATIONS)
def test_all_options(number):
    query_reduce, head_reduce, order, quantity = ALL[number]
    q, k = inputs(batch=1, queries=7, keys=13, dtype=(HALF, BRAIN)[number % 2], seed=number)
    options = {
        "query_reduce": query_reduce, "head_reduce": head_reduce, "reduce_order": order, "quantity": quantity,
        **extras(number // 2, 1, 4, 7, 13, quantity),
    }  # fmt: skip
    check(q, k, options)


@kernels
@pytest.mark.parametrize("number", (1, 72))
def test_float32(number):
    query_reduce, head_reduce, order, quantity = ALL[number]
    q, k = inputs(batch=1, queries=9, keys=37, seed=number)
    options = {
        "query_reduce": query_reduce, "head_reduce": head_reduce, "reduce_order": order, "quantity": quantity,
        **extras(number // 2, 1, 4, 9, 37, quantity),
    }  # fmt: skip
    check(q, k, options, draws=3)


# batch, query heads, key heads, queries, keys, channels, dtype: beyond one tile, and the smallest
SHAPES = [
    (1, 1, 1, 1, 1, 8, BRAIN),
    (1, 7, 1, 17, 33, 8, HALF),
    (1, 2, 2, 17, 200, 24, HALF),
    (1, 3, 1, 17, 33, 40, HALF),
    (1, 1, 1, 130, 200, 80, BRAIN),
    (1, 1, 1, 130, 1, 128, HALF),
    (1, 1, 1, 17, 33, 200, HALF),
    (1, 1, 1, 17, 33, 256, HALF),
    (0, 2, 1, 17, 33, 16, SINGLE),
    (1, 2, 1, 0, 33, 16, SINGLE),
    (1, 2, 1, 17, 0, 16, SINGLE),
]


@kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    q, k = inputs(*shape)
    check(q, k, {"causal": True, "query_reduce": ("mean", "visible_mean"), "head_reduce": "group"})


@kernels
@pytest.mark.parametrize("order", ("random", "ascending", "keys only"))
def test_positions_over_many_tiles(order):
    """Tiles that no query sees are skipped, and those that all see need no mask: whichever these are."""
    q, k = inputs(1, 1, 1, 70, 150, 16, HALF)
    at_query, at_key = torch.randint(-5, 40, (1, 70)), torch.randint(0, 60, (1, 150))
    if order == "ascending":
        at_query, at_key = at_query.sort(1).values, at_key.sort(1).values
    options = {"causal": True, "k_positions": at_key, "query_reduce": ("sum", "visible_mean")}
    if order != "keys only":
        options["q_positions"] = at_query
    check(q, k, options)


@kernels
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("given", ("both", "queries", "keys"))
def test_positions_at_the_ends(given, dtype):
    """No position stands for a masked key, and none wraps around to another."""
    q, k = inputs(1, 1, 1, 20, 40, 16, HALF)
    most, least = 2**31 - 1, -(2**31)
    ends = [least, least + 1, -1, 0, 1, 19, 20, 39, most - 1, most]
    if dtype == torch.int64:
        ends += [2**63 - 1, 2**63 - 2, -(2**63), -(2**63) + 1, 2**31, 2**32, least - 1, 2**32 + 19]
    ends = torch.tensor(ends, dtype=dtype)
    at_query, at_key = (ends[torch.randint(len(ends), (1, n))] for n in (20, 40))
    at_query[0, 0], at_key[0, 0] = ends.max(), ends.max()
    options = {"causal": True, "query_reduce": ("sum", "max", "visible_mean"), "k_mask": torch.rand(1, 40) < 0.6}
    if given != "keys":
        options["q_positions"] = at_query
    if given != "queries":
        options["k_positions"] = at_key
    check(q, k, options)


@kernels
@pytest.mark.parametrize(("head_reduce", "order"), ((None, "queries_first"), ("group_max", "heads_first")))
def test_maxima_over_many_tiles(head_reduce, order):
    q, k = inputs(1, 2, 1, 130, 70, 16, HALF)
    options = {"query_reduce": ("max", "sum"), "causal": True, "head_weights": torch.tensor([0.5, -1.0])}
    check(q, k, {**options, "head_reduce": head_reduce, "reduce_order": order})


@kernels
@pytest.mark.parametrize("head_reduce", ("mean", None))
def test_packed_equals_samples(head_reduce):
    lengths_q, lengths_k = (3, 0, 40, 1), (9, 4, 50, 0)
    cu_q = torch.tensor((0, *itertools.accumulate(lengths_q)), device=DEVICE)
    cu_k = torch.tensor((0, *itertools.accumulate(lengths_k)), device=DEVICE)
    q, k = torch.randn(sum(lengths_q), 2, 24, device=DEVICE), torch.randn(sum(lengths_k), 1, 24, device=DEVICE)
    q, k = q.half(), k.half()
    mask = torch.rand(sum(lengths_k), device=DEVICE) > 0.2
    options = {
        "causal": True, "query_reduce": ("mean", "max", "visible_mean"), "head_reduce": head_reduce, "k_mask": mask,
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "head_weights": torch.rand(2, device=DEVICE) + 0.1,
    }  # fmt: skip
    if head_reduce == "mean":
        options["q_positions"] = torch.randint(0, 60, q.shape[:1], device=DEVICE)
        options["k_bias"] = torch.randn(k.shape[0], device=DEVICE)
    check(q, k, options, draws=3 if "k_bias" in options else 1)  # its gradient is a float32 sum of few terms


@kernels
def test_bad_cu_seqlens_never_leave_the_tensors():
    q, k = torch.randn(5, 2, 8, device=DEVICE), torch.randn(5, 2, 8, device=DEVICE)
    for ends in ((0, 9), (-3, 5), (0, 4, 2, 5), (7, 7, 3)):
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        scores = pyvtk.attention_scores(q, k, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True, backend="triton")
        assert scores.shape == (5,) and scores.isfinite().all()


# Rules ---------------------------------------------------------------------------------------------------------------


@kernels
@pytest.mark.parametrize("quantity", ("probability", "logit"))
def test_masked_tokens_may_hold_anything(quantity):
    q, k = (x.to(DEVICE) for x in inputs(2, 2, 1, 40))
    q_mask, k_mask = torch.rand(2, 40, device=DEVICE) > 0.3, torch.rand(2, 37, device=DEVICE) > 0.3
    bias = torch.randn(2, 37, device=DEVICE)
    options = {"q_mask": q_mask, "k_mask": k_mask, "k_bias": bias, "backend": "triton", "return_lse": True}
    options.update(query_reduce=("mean", "max"), quantity=quantity)
    clean = pyvtk.attention_scores(q, k, **options)
    q[~q_mask[:, None].expand(2, 2, 40)] = math.nan
    k[~k_mask[:, None].expand(2, 1, 37)] = math.inf
    bias[~k_mask] = math.nan
    q.requires_grad_()
    k.requires_grad_()
    bias.requires_grad_()
    poisoned = pyvtk.attention_scores(q, k, **options)
    for a, b in zip(clean, poisoned):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    scores = poisoned[0]
    scores[scores.isfinite()].square().sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all() and bias.grad.isfinite().all()
    assert not q.grad[~q_mask[:, None].expand(2, 2, 40)].any()
    assert not k.grad[~k_mask[:, None].expand(2, 1, 37)].any()
    assert not bias.grad[~k_mask].any()


@kernels
def test_dead_rows_of_a_given_lse_may_hold_anything():
    """Padding as FlashAttention leaves it: lse -inf, and whatever was in memory."""
    q, k = (x.to(DEVICE) for x in inputs(2, 2, 1, 40))
    lse = torch.randn(2, 2, 40, device=DEVICE) + 4
    lse[0, :, 33:] = -math.inf
    clean = pyvtk.attention_scores(q, k, lse=lse, backend="triton")
    q[0, :, 33:] = math.nan
    q.requires_grad_()
    poisoned = pyvtk.attention_scores(q, k, lse=lse, backend="triton")
    assert torch.equal(clean, poisoned.detach())
    poisoned.sum().backward()
    assert q.grad.isfinite().all() and not q.grad[0, :, 33:].any()


@kernels
def test_nan_reaches_what_sees_it():
    q, k = (x.to(DEVICE) for x in inputs(queries=3, keys=9))
    k[0, 0, 4, 0] = math.nan
    for reduce in ("mean", "max"):
        scores = pyvtk.attention_scores(q, k, causal=True, query_reduce=reduce, head_reduce="group", backend="triton")
        # Queries stand at 6, 7 and 8, so all of them see key 4 and all their probabilities are NaN.
        assert scores[0, 0].isnan().all()
        assert scores[0, 1].isfinite().all() and scores[1].isfinite().all()
    # Only the last query is NaN, and it alone sees the last key.
    q, k = (x.to(DEVICE) for x in inputs(queries=9, keys=9))
    q[:, :, 3] = math.nan
    scores = pyvtk.attention_scores(q, k, causal=True, backend="triton")
    assert scores[:, :4].isnan().all() and scores[:, 4:].isfinite().all()


@kernels
def test_blind_queries_and_nobody():
    """More causal queries than keys: the first see nothing; they count in "mean" and have lse -inf."""
    q, k = (x.to(DEVICE) for x in inputs(queries=6, keys=4))
    scores, lse = pyvtk.attention_scores(q, k, causal=True, return_lse=True, backend="triton")
    assert (lse[:, :, :2] == -math.inf).all() and lse[:, :, 2:].isfinite().all()
    torch.testing.assert_close(scores.sum(-1), torch.full((2,), 4 / 6, device=DEVICE))
    nobody = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    for quantity, value in (("probability", 0.0), ("logit", -math.inf)):
        scores = pyvtk.attention_scores(
            q, k, q_mask=nobody, query_reduce=("mean", "max", "visible_mean"), quantity=quantity, backend="triton"
        )
        assert (scores == value).all()
    bias = torch.full((2, 4), -math.inf, device=DEVICE)
    scores, lse = pyvtk.attention_scores(q, k, k_bias=bias, return_lse=True, backend="triton")
    assert not scores.any() and (lse == -math.inf).all()


@kernels
def test_ties_go_to_the_lowest_index():
    q, k = torch.zeros(1, 2, 40, 8, device=DEVICE, requires_grad=True), torch.randn(1, 1, 5, 8, device=DEVICE)
    for order in ("queries_first", "heads_first"):
        scores = pyvtk.attention_scores(
            q, k, query_reduce="max", head_reduce="max", reduce_order=order, backend="triton"
        )
        (grad,) = torch.autograd.grad(scores[0, 1], q)
        assert grad[0, 0, 0].any() and not grad[0, 1:].any() and not grad[0, 0, 1:].any()


@kernels
def test_given_lse_is_what_was_returned():
    q, k = (x.to(DEVICE) for x in inputs(1, 2, 1, 30))
    scores, lse = pyvtk.attention_scores(q, k, causal=True, return_lse=True, backend="triton")
    again, same = pyvtk.attention_scores(q, k, causal=True, lse=lse, return_lse=True, backend="triton")
    assert torch.equal(again, pyvtk.attention_scores(q, k, causal=True, lse=lse, backend="triton"))
    torch.testing.assert_close(again, scores)
    assert same is lse


@kernels
def test_small_gradients_survive_float16():
    """A mean over many queries sends gradients that float16 does not reach, if they are not scaled on the way."""
    q, k = inputs(1, 1, 1, 33, 20, 16, HALF)
    q, k = (x.to(DEVICE).requires_grad_() for x in (q, k))
    grads = []
    for backend in ("triton", "reference"):
        scores = pyvtk.attention_scores(q, k, backend=backend)
        grads.append(torch.autograd.grad((scores * torch.arange(20, device=DEVICE)).sum() * 1e-4, (q, k)))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-7)


# In torch ------------------------------------------------------------------------------------------------------------


def operator_arguments(requires_grad: bool) -> tuple:
    q, k = (x.to(DEVICE) for x in inputs(1, 2, 1, 3, 9))
    bias, weights = torch.randn(1, 9, device=DEVICE), torch.randn(2, device=DEVICE)
    for x in (q, k, bias, weights):
        x.requires_grad_(requires_grad)
    options = page.resolve(
        "test", q, k, causal=True, q_positions=None, k_positions=None, q_mask=None,
        k_mask=torch.ones(1, 9, device=DEVICE).bool(), k_bias=bias, key_range=(1, 8), denominator="visible", lse=None,
        scale=None, query_reduce=("mean", "max"), head_reduce="group_max", head_weights=weights,
        reduce_order="queries_first", quantity="probability", cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
        max_seqlen_k=None,
    )  # fmt: skip
    return (q, k, *page.kernel_arguments(options), True)


@kernels
def test_opcheck():
    torch.library.opcheck(torch.ops.pyvtk.attention_scores_triton.default, operator_arguments(True))


@kernels
def test_opcheck_of_the_gradient():
    q, k, *options = operator_arguments(False)
    _, lse, *_ = torch.ops.pyvtk.attention_scores_triton(q, k, *options)
    linear = torch.randn(1, 2, 7, device=DEVICE)
    winners = torch.zeros(1, 2, 7, dtype=torch.int32, device=DEVICE)
    tensors, (lse_given, *rest) = options[:6], options[6:]
    cu_q, cu_k, causal, start, stop, range_denominator, scale, *_ = rest
    arguments = (
        linear, linear, winners, torch.randn_like(lse), lse, q, k, *tensors, cu_q, cu_k, causal, start, stop,
        range_denominator, lse_given is not None, scale, False, 0,
    )  # fmt: skip
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pyvtk.attention_scores_backward_triton.default, arguments, test_utils=tests)


@kernels
def test_one_graph():
    q, k = (x.to(DEVICE) for x in inputs(1, 2, 1, 3, 9))
    q.requires_grad_()

    def step(q, k):
        return pyvtk.attention_scores(q, k, causal=True, query_reduce=("mean", "max"), backend="triton")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), step(q, k))
    (grad,) = torch.autograd.grad(compiled(q, k).square().sum(), q)
    (expected,) = torch.autograd.grad(step(q, k).square().sum(), q)
    torch.testing.assert_close(grad, expected)


@kernels
@pytest.mark.parametrize("head_reduce", ("mean", "group"))
def test_score_and_select_scores_by_triton_and_selects_apart(head_reduce):
    q, k = (on_device(x) for x in inputs(batch=2, queries=70, keys=40))
    q.requires_grad_()
    options = {"causal": True, "head_reduce": head_reduce}
    selection, scores = pyvtk.score_and_select(q, k, 9, return_scores=True, backend="triton", **options)
    assert torch.equal(scores, pyvtk.attention_scores(q, k, backend="triton", **options))
    assert torch.equal(selection.indices, pyvtk.select(scores.detach(), 9).indices)
    assert torch.autograd.grad(scores.sum(), q)[0].isfinite().all()


@kernels
def test_views_and_memory_order():
    whole = torch.randn(2, 64, 4, 16, device=DEVICE).transpose(1, 2)
    k = torch.randn(2, 37, 2, 24, device=DEVICE).transpose(1, 2)[..., :16]
    view = whole[:, :, -3:]
    first = pyvtk.attention_scores(view, k, backend="triton")
    assert torch.equal(first, pyvtk.attention_scores(view.contiguous(), k.contiguous(), backend="triton"))


@kernels
@pytest.mark.parametrize("head_reduce", ("mean", "max"))
@pytest.mark.parametrize(
    ("gap", "offset", "dtype"), [(1, 1, BRAIN), (2, 0, BRAIN), (4, 4, BRAIN), (56, 4, BRAIN), (2, 1, SINGLE)], ids=str
)
def test_rows_may_lie_anywhere(gap, offset, dtype, head_reduce):
    """As in test_attention_triton.py; a maximum over heads reads rows in a kernel of its own."""
    q, k = torch.randn(1, 2, 9, 24, device=DEVICE).to(dtype), torch.randn(1, 1, 17, 24, device=DEVICE).to(dtype)
    options = {"causal": True, "head_reduce": head_reduce, "reduce_order": "heads_first", "backend": "triton"}

    def results(q, k):
        q, k = q.requires_grad_(), k.requires_grad_()
        scores, lse = pyvtk.attention_scores(q, k, return_lse=True, **options)
        return scores, lse, *torch.autograd.grad(scores.square().sum(), (q, k))

    expected = results(q.clone(), k.clone())
    for which in ((0, 1), (gap % 2,)):  # both, and one alone
        memory = [x.new_empty(*x.shape[:-1], 24 + gap) for x in (q, k)]
        views = [m[..., offset : offset + 24].copy_(x) for m, x in zip(memory, (q, k))]
        tensors = [views[i] if i in which else x.clone() for i, x in enumerate((q, k))]
        torch.testing.assert_close(results(*tensors), expected)


def test_nobody_gets_the_interpreter_unasked():
    q, k = inputs()
    assert backends.pick("attention_scores", None, q, q.dtype) != "triton"
    if WHY_NOT is not None:
        with pytest.raises(RuntimeError, match="Triton"):
            pyvtk.attention_scores(q.to(DEVICE), k.to(DEVICE), backend="triton")
