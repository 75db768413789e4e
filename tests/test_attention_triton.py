"""Triton's kernels of neighbor_attention against the reference in float64.

On a CUDA device they run there. Without one, Triton interprets them on the CPU, in a process of its own, since
TRITON_INTERPRET has to be set before anything imports Triton: ``test_in_the_interpreter`` starts this file once more.
Whether they compile, and what of a GPU they use, is asked without a GPU by .ci/check_triton.py.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import pytest
import torch
from fresh import ROOT, run
from interpreter import DEVICE, in_tf32x3, passed_in_the_interpreter, runs_kernels
from support import Exponents, TF32x3, assert_within_budget
from torch import Tensor

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout, backends
from pyvtk.reference import attention as reference

WHY_NOT = backends.why_not("neighbor_attention", "triton", DEVICE)
kernels = runs_kernels("neighbor_attention")
pytest.importorskip("triton", reason="triton is not installed")
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is None, reason="the tests below run in this process")
def test_in_the_interpreter(tmp_path):
    assert passed_in_the_interpreter(__file__, tmp_path) >= len(CASES)


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is None, reason="the tests below run in this process")
def test_in_the_interpreter_as_tensor_cores_multiply(tmp_path):
    some = "test_outputs_and_gradients and (group or parts or video or subset or keep)"
    assert passed_in_the_interpreter(__file__, tmp_path, some, tf32x3=True) == 7


@pytest.mark.long
def test_kernels_compile_for_every_architecture(tmp_path):
    """A part of what `make triton` compiles: shared memory, registers and spills, without a GPU."""
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    said = run(str(ROOT / ".ci" / "check_triton.py"), "--quick", cwd=tmp_path, env=env)
    assert all(f"\n{name} " in said for name in ("attention", "attention_query_grad", "attention_key_grad")), said


# Inputs --------------------------------------------------------------------------------------------------------------


def pictures(padding: str = "right") -> TokenLayout:
    """Two samples: text around two images, and text around one, padded."""
    spans = [ImageSpan(0, 4, (1, 4, 5)), ImageSpan(0, 27, (1, 2, 4)), ImageSpan(1, 3, (1, 3, 5))]
    return TokenLayout.from_images([40, 25], spans, padding=padding, device=DEVICE)


def video() -> TokenLayout:
    return TokenLayout.from_images([40], [ImageSpan(0, 3, (3, 3, 4))], device=DEVICE)


def packed() -> TokenLayout:
    spans = [ImageSpan(0, 2, (1, 3, 5)), ImageSpan(1, 1, (1, 3, 4))]
    return TokenLayout.from_images([22, 17], spans, packed=True, device=DEVICE)


def neighbors(layout: TokenLayout, radius=1, block=(16, 16), **options):
    return pyvtk.neighbor_plan(layout, radius, block=block, **options)


def routed():
    # region 2 of the second sample sees nothing in its image
    table = torch.tensor([[[0, 2], [1, 0], [2, 3], [3, 1]], [[1, 0], [0, -1], [-1, -1], [3, 3]]], device=DEVICE)
    return pyvtk.routed_plan(pictures(), (1, 2, 3), table, block=(16, 16))


def subset():
    torch.manual_seed(1)
    keep = (torch.rand(2, 40, device=DEVICE) < 0.6) & pictures().valid
    return pyvtk.subset_plan(pictures(), Selection.from_mask(keep), block=(16, 16))


# name: plan, query heads, K/V heads, channels, dtype, options of the operator
CASES = {
    "radius 0": (lambda: neighbors(pictures(), 0), 1, 1, 16, SINGLE, {}),
    "padded left": (lambda: neighbors(pictures("left")), 2, 1, 40, BRAIN, {}),
    "group of 7": (lambda: neighbors(pictures()), 7, 1, 16, SINGLE, {"bias": True}),
    "dense": (lambda: neighbors(pictures(), 9), 2, 2, 72, HALF, {"bias": True}),
    "two parts": (lambda: neighbors(pictures()), 2, 1, 80, SINGLE, {}),
    "two parts, bfloat16": (lambda: neighbors(pictures()), 2, 1, 80, BRAIN, {"order": "tokens"}),
    "video": (lambda: neighbors(video(), (1, 0, 1)), 2, 1, 24, SINGLE, {"scale": -0.3}),
    "causal window": (lambda: neighbors(video(), 1, causal_window=True), 1, 1, 16, HALF, {"scale": 0.0}),
    "cross image": (lambda: neighbors(pictures(), 1, cross_image=True), 2, 1, 16, SINGLE, {"order": "tokens"}),
    "text keys": (lambda: neighbors(pictures(), keys="text"), 2, 1, 16, BRAIN, {}),
    "visual keys": (lambda: neighbors(pictures(), keys="visual"), 2, 1, 16, SINGLE, {"bias": True}),
    "windows": (lambda: pyvtk.window_plan(pictures(), (1, 2, 3), (0, 1, 0), block=(16, 16)), 2, 2, 16, SINGLE, {}),
    "routes": (routed, 2, 1, 16, SINGLE, {}),
    "subset": (subset, 2, 1, 16, SINGLE, {}),
    "packed": (lambda: neighbors(packed()), 4, 2, 16, SINGLE, {"order": "tokens", "bias": True}),
    "tail": (lambda: neighbors(pictures()).tail(3, 45, torch.tensor([45, 30], device=DEVICE)), 2, 1, 16, SINGLE, {}),
    "uneven blocks": (lambda: neighbors(pictures(), block=(16, 32)), 3, 1, 16, SINGLE, {}),
    "tall blocks": (lambda: neighbors(video(), 2, block=(128, 16)), 2, 1, 16, SINGLE, {}),
    "wide blocks": (lambda: neighbors(video(), 2, block=(16, 128)), 2, 1, 16, SINGLE, {"bias": True}),
    "keep": (lambda: neighbors(pictures()), 4, 2, 16, SINGLE, {"heads": [1, 0, 0, 0]}),
    "keep, zero rows": (lambda: neighbors(pictures()), 4, 2, 16, BRAIN, {"heads": [1, 0, 0, 0], "zero_rows": True}),
    "drop": (lambda: neighbors(pictures()), 3, 1, 16, SINGLE, {"heads": [0, 1, 0], "drop": True, "bias": True}),
    "drop, zero rows": (
        lambda: neighbors(pictures(), 9), 2, 1, 16, HALF, {"heads": [0, 0], "drop": True, "zero_rows": True},
    ),
}  # fmt: skip


def random(plan, heads: int, tokens: int, dim: int, dtype: torch.dtype, order: str = "heads") -> Tensor:
    batch = plan.query_slots.shape[0]
    if order == "tokens":
        return torch.randn(batch, tokens, heads, dim, device=DEVICE).to(dtype).transpose(1, 2)
    # rows further apart than their channels
    return torch.randn(batch, heads, tokens, dim + 8, device=DEVICE).to(dtype)[..., :dim]


def plain(q, k, v, k_bias, heads, plan, rule, scale, keep_mass, zero_rows) -> tuple[Tensor, Tensor]:
    """Attention as it is written in eager PyTorch, every step in q's dtype."""
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    query_facts, key_facts = reference.in_rows(plan[0], q.shape[2]), reference.in_rows(plan[1], k.shape[2])
    seen = reference.visible(query_facts, key_facts, rule, plan[8])[:, None].expand(-1, q.shape[1], -1, -1)
    weighed = torch.ones_like(seen)
    if heads is not None:
        off = ~heads[None, :, None, None]
        weighed = ~(off & (key_facts[:, 1] >= 0)[:, None, None])
        if zero_rows:
            seen = seen & ~(off & (query_facts[:, 1] >= 0)[:, None, :, None])
        if not keep_mass:
            seen = seen & weighed
    logits = (q @ k.repeat_interleave(group, 1).mT) * scale
    if k_bias is not None:
        logits = logits + k_bias[:, None, None].to(dtype)
    blind = ~seen.any(-1)
    lse = logits.masked_fill(~seen, float("-inf")).masked_fill(blind[..., None], 0).logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(~(seen & weighed), 0)
    return weights @ v.repeat_interleave(group, 1), lse.masked_fill(blind, float("-inf"))


def leaves(*tensors) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors if x is not None]


@kernels
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(name):
    make_plan, heads, kv_heads, dim, dtype, options = CASES[name]
    plan = make_plan()
    order = options.get("order", "heads")
    q = random(plan, heads, plan.num_queries, dim, dtype, order)
    k, v = (random(plan, kv_heads, plan.num_keys, dim, dtype, order) for _ in range(2))
    bias = torch.randn(k.shape[0], plan.num_keys, device=DEVICE) if options.get("bias") else None
    on = torch.tensor(options["heads"], dtype=torch.bool, device=DEVICE) if "heads" in options else None
    scale, modes = options.get("scale", dim**-0.5), ("drop" not in options, "zero_rows" in options)
    settings = (plan.tensors(), plan.rule(), scale, *modes)

    # what is invalid holds NaN, also where gradients come from; the oracles get zeros instead
    grad_out, grad_lse = torch.randn_like(q.contiguous()), torch.randn(q.shape[:3], device=DEVICE)
    invalid_queries = (reference.in_rows(plan.query_slots, plan.num_queries)[:, 1] == -2)[:, None]
    invalid_keys = (reference.in_rows(plan.key_slots, plan.num_keys)[:, 1] == -2)[:, None]
    given = {"q": q, "k": k, "v": v, "grad_out": grad_out, "grad_lse": grad_lse}
    poisoned = {}
    for label, x in given.items():
        where = invalid_keys if label in ("k", "v") else invalid_queries
        where = where if label == "grad_lse" else where[..., None]
        poisoned[label] = torch.where(where, float("nan"), x)
        given[label] = torch.where(where, 0, x)
    bad_bias = None if bias is None else torch.where(invalid_keys[:, 0], float("nan"), bias)
    # torch.where leaves strides to chance
    bad = [x.as_strided(x.shape, x.stride()).copy_(poisoned[n]) for n, x in (("q", q), ("k", k), ("v", v))]

    inputs = leaves(*bad, bad_bias)
    operator = torch.ops.pyvtk.neighbor_attention_triton
    out, lse = operator(*inputs[:3], inputs[3] if bias is not None else None, on, *settings)
    assert out.dtype == dtype and lse.dtype == torch.float32
    blind = lse.detach().isneginf()
    assert (blind | ~invalid_queries).all() and (out.detach()[blind] == 0).all()
    weight = poisoned["grad_lse"].masked_fill(blind, float("nan"))
    grad_bad = poisoned["grad_out"].masked_fill(blind[..., None], float("nan"))
    grads = torch.autograd.grad([out, lse], inputs, [grad_bad, weight])

    def results(compute, precision) -> tuple[Tensor, ...]:
        exact = leaves(*(given[n].to(precision) for n in "qkv"), None if bias is None else bias.to(precision))
        o, z = compute(*exact[:3], exact[3] if bias is not None else None, on, *settings)
        loss = (o * given["grad_out"].masked_fill(blind[..., None], 0).to(o.dtype)).sum()
        loss = loss + (z.masked_fill(blind, 0) * given["grad_lse"].masked_fill(blind, 0)).sum()
        return o, z, *torch.autograd.grad(loss, exact)

    oracle, rough = results(reference.neighbor_attention, torch.float64), results(plain, dtype)
    with Exponents(), TF32x3() if in_tf32x3(dtype) else nullcontext():
        inexact = results(reference.neighbor_attention, torch.float64)
    assert torch.equal(blind, oracle[1].isneginf())
    for actual, right, about, off in zip((out, lse, *grads), oracle, rough, inexact):
        assert_within_budget(actual, right, about, added=TF32x3.added(off, right))
    for label, grad in zip(("q", "k", "v", "k_bias"), grads):
        where = {"q": invalid_queries, "k_bias": invalid_keys[:, 0]}.get(label, invalid_keys)
        assert (grad[where.expand(grad.shape[: where.dim()])] == 0).all()


@kernels
def test_public_function_and_memory_order():
    plan = neighbors(pictures())
    q, k, v = leaves(*(random(plan, h, 40, 16, SINGLE, "tokens") for h in (2, 1, 1)))
    out, lse = pyvtk.neighbor_attention(q, k, v, plan, return_lse=True, backend="triton")
    assert out.stride() == q.transpose(1, 2).contiguous().transpose(1, 2).stride()
    expected = pyvtk.neighbor_attention(q, k, v, plan, backend="reference")
    torch.testing.assert_close(out, expected)
    # without a gradient of one of the results
    (grad,) = torch.autograd.grad(lse[:, :, 2].sum(), q, retain_graph=True)
    assert grad.isfinite().all()
    again = pyvtk.neighbor_attention(q, k, v, plan, backend="triton")
    assert torch.equal(out, again)


def apart(x: Tensor, gap: int, offset: int) -> Tensor:
    """x, its rows ``gap`` numbers apart and the first one ``offset`` numbers behind an aligned address."""
    memory = x.new_empty(*x.shape[:-1], x.shape[-1] + gap)
    return memory[..., offset : offset + x.shape[-1]].copy_(x)


@kernels
@pytest.mark.parametrize(
    ("gap", "offset", "dtype"), [(1, 1, BRAIN), (2, 0, BRAIN), (4, 4, BRAIN), (56, 4, BRAIN), (2, 1, SINGLE)], ids=str
)
def test_rows_may_lie_anywhere(gap, offset, dtype):
    """Kernels are told what strides are multiples of; one claim too many, and they read other rows."""
    plan = neighbors(TokenLayout.from_images([16], [ImageSpan(0, 2, (1, 3, 4))], device=DEVICE))
    q, grad = (torch.randn(1, 2, 16, 24, device=DEVICE).to(dtype) for _ in range(2))
    k, v = (torch.randn(1, 1, 16, 24, device=DEVICE).to(dtype) for _ in range(2))

    def results(q, k, v, grad):
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = pyvtk.neighbor_attention(*inputs, plan, backend="triton")
        return out, *torch.autograd.grad(out, inputs, grad)

    expected = results(*(x.clone() for x in (q, k, v, grad)))
    for which in ((0, 1, 2, 3), (gap % 4,)):  # all, and one alone
        tensors = [apart(x, gap, offset) if i in which else x.clone() for i, x in enumerate((q, k, v, grad))]
        torch.testing.assert_close(results(*tensors), expected)


@kernels
def test_no_tokens():
    layout = TokenLayout.from_images([0, 0], device=DEVICE)
    plan = neighbors(layout)
    q = torch.randn(2, 2, 0, 16, device=DEVICE, requires_grad=True)
    out = pyvtk.neighbor_attention(q, q, q, plan, backend="triton")
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


@kernels
def test_opcheck():
    plan = neighbors(TokenLayout.from_images([16], [ImageSpan(0, 2, (1, 3, 4))], device=DEVICE))
    q, k, v = leaves(*(random(plan, 1, 16, 16, SINGLE) for _ in range(3)))
    bias = torch.randn(1, 16, device=DEVICE, requires_grad=True)
    settings = (plan.tensors(), plan.rule(), 0.25, True, False)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    operators = torch.ops.pyvtk
    forward = (q, k, v, bias, None, *settings)
    torch.library.opcheck(operators.neighbor_attention_triton.default, forward, test_utils=tests)
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    out, lse = operators.neighbor_attention_triton(q, k, v, bias, None, *settings)
    backward = (out, lse, q, k, v, bias, None, out, lse, *settings)
    torch.library.opcheck(operators.neighbor_attention_backward_triton.default, backward, test_utils=tests[:3])


def test_reasons():
    assert backends.why_not("select", "triton", "cpu") == "pyvtk::select has no Triton kernel yet"
    assert "float64" in backends.why_not("neighbor_attention", "triton", DEVICE, torch.float64) or WHY_NOT
    assert "device type 'meta'" in backends.why_not("neighbor_attention", "triton", "meta")
    if DEVICE == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        assert (WHY_NOT is None) == interpreted
        assert interpreted or "TRITON_INTERPRET=1" in WHY_NOT
        # nobody who asks for nothing gets the interpreter
        assert backends.pick("neighbor_attention", None, torch.zeros(1)) != "triton"


def test_triton_is_imported_late(tmp_path):
    said = run("-c", "import sys, pyvtk; print('pyvtk.triton_kernels.attention' in sys.modules)", cwd=tmp_path)
    assert said.split() == ["False"], sys.path
