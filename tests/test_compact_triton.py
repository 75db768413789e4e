"""Triton's kernels of compact, its gradient and compact_kv_ against the reference.

On a CUDA device they run there; without one, Triton interprets them on the CPU, in a process of its own
(test_in_the_interpreter starts this file once more).
"""

from __future__ import annotations

import pytest
import torch
from fresh import ROOT, run
from interpreter import DEVICE, passed_in_the_interpreter, runs_kernels
from support import same

import pyvtk
from pyvtk import Selection, backends
from pyvtk.reference import compact as reference

WHY_NOT = backends.why_not("compact", "triton", DEVICE)
kernels = runs_kernels("compact")
pytest.importorskip("triton", reason="triton is not installed")
OPS = torch.ops.pyvtk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (
    *FLOATS, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn,
)  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(WHY_NOT is None, reason="the tests below run in this process")
def test_in_the_interpreter(tmp_path):
    assert passed_in_the_interpreter(__file__, tmp_path) >= 40


@pytest.mark.long
def test_kernels_compile_for_every_architecture(tmp_path):
    """Shared memory and spills of what .ci/check_triton.py compiles for one architecture, without a GPU."""
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    some = ("--family", "compact", "--arch", "90", "--dtype", "bf16")
    said = run(str(ROOT / ".ci" / "check_triton.py"), *some, cwd=tmp_path, env=env)
    assert "gather" in said and "scatter" in said and "compact_kv" in said, said


def random(shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64) * 3
    x = (x > 0) if dtype == torch.bool else x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)
    return x.to(DEVICE)


def selection(rows=(2,), tokens=9, capacity=5, align="left", repeated=False, counts=None):
    """Random tokens in random order; every row has another count."""
    indices = torch.rand(*rows, tokens).argsort(-1)[..., :capacity]
    if repeated:
        indices = torch.randint(0, tokens, (*rows, capacity))
    if counts is None:
        counts = torch.randint(0, indices.shape[-1] + 1, rows, dtype=torch.int32)
    return Selection.from_indices(indices.to(DEVICE), tokens, counts=counts.to(DEVICE), align=align)


def both(function, *args, **kwargs):
    """Triton's result, after comparing it bit for bit with the reference."""
    result = function(*args, backend="triton", **kwargs)
    same(result, function(*args, backend="reference", **kwargs))
    return result


@kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    sel = selection()
    x, pad = random((2, 9, 6), dtype), 1 if dtype in (torch.bool, torch.uint8) else -3
    both(pyvtk.compact, sel, x, pad_value=pad)
    both(pyvtk.compact, sel, x, packed=True, total=7, pad_value=pad)


def bundle(batch=2, tokens=9):
    """Tensors of different ranks with their dims, batch_dims and pads."""
    tensors = (
        random((batch, tokens, 6), torch.bfloat16), torch.arange(3 * batch * tokens).view(3, batch, tokens).to(DEVICE),
        random((batch, tokens), torch.bool), random((batch, tokens), torch.int64), random((1, tokens, 4)),
        random((tokens, 4)), random((batch, 3, tokens, 2)), random((tokens, 2, 3, batch, 5)),
    )  # fmt: skip
    return tensors, {
        "dim": (1, 2, 1, 1, 1, 0, 2, 0),
        "batch_dim": (0, 1, 0, 0, 0, None, 0, 3),
        "pad_value": (0, 1, 0, -100, 2, 3, -0.5, 1),
    }


@kernels
@pytest.mark.parametrize("align", ("left", "right"))
@pytest.mark.parametrize("total", ("padded", None, 0, 3, 20), ids=str)
def test_bundle(align, total):
    tensors, axes = bundle()
    packed = {} if total == "padded" else {"packed": True, "total": total}
    both(pyvtk.compact, selection(align=align), *tensors, **axes, **packed)


@kernels
def test_layouts():
    sel = selection()
    views = {
        "transposed": (random((9, 2)).t(), 1, 0),
        "channels strided": (random((2, 9, 12))[..., ::2], 1, 0),
        "channels first": (random((2, 6, 9)).transpose(1, 2), 1, 0),
        "heads inside": (random((2, 9, 3, 4)).transpose(1, 2), 2, 0),
        "expanded": (random((2, 1, 4)).expand(2, 9, 4), 1, 0),
        "huge strides": (random((2, 9, 4096))[..., 5:9], 1, 0),
        "offset": (random((3, 12, 7))[1:, 2:11, 1:6], 1, 0),
        "too many axes": (random((2, 9, 4, 6, 8, 3, 2))[:, :, ::2, ::2, ::2, :, :1], 1, 0),
        "long rows": (random((2, 9, 5000)), 1, 0),
        "rows of 8 and an odd number": (random((2, 3, 9, 72), torch.bfloat16), 2, 0),
        "begins 8 bytes off": (random((2, 9, 28), torch.bfloat16)[..., 4:], 1, 0),
        "odd rows": (random((2, 9, 17), torch.bfloat16)[..., 1:], 1, 0),
        "odd samples": (random((2, 73), torch.uint8)[:, :72].unflatten(1, (9, 8)), 1, 0),
    }
    for x, dim, batch_dim in views.values():
        both(pyvtk.compact, sel, x, dim=dim, batch_dim=batch_dim, pad_value=7)
        both(pyvtk.compact, sel, x, dim=dim, batch_dim=batch_dim, pad_value=7, packed=True)


@kernels
@pytest.mark.parametrize("align", ("left", "right"))
def test_head_axis(align):
    sel = selection(rows=(2, 3), align=align)
    k = random((2, 3, 9, 4))
    both(pyvtk.compact, sel, k, k.half(), k[..., 0], dim=2)
    transposed = random((2, 9, 3, 4)).transpose(1, 2)
    both(pyvtk.compact, sel, transposed, dim=2)


@kernels
@pytest.mark.parametrize("batch, tokens, capacity, channels", [(0, 9, 5, 4), (2, 9, 0, 4), (2, 9, 5, 0), (2, 0, 3, 4)])
def test_empty(batch, tokens, capacity, channels):
    counts = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    sel = Selection(torch.full((batch, capacity), -1, device=DEVICE), counts, tokens)
    x = random((batch, tokens, channels)).requires_grad_()
    out = pyvtk.compact(sel, x, pad_value=2, backend="triton")
    assert out.shape == (batch, capacity, channels) and (out == 2).all()
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert pyvtk.compact(sel, x, packed=True, total=3, backend="triton").shape == (3, channels)
    if capacity <= tokens:
        pyvtk.compact_kv_(sel, x.detach()[:, None].clone(), backend="triton")


@kernels
def test_what_is_no_token_is_padding():
    bad = torch.tensor([[0, 9, 1], [-2, 1, 1 << 40]], device=DEVICE)
    x = random((2, 9, 4)).requires_grad_()
    sel = Selection(bad, torch.tensor([3, 3], dtype=torch.int32, device=DEVICE), 9)
    out = pyvtk.compact(sel, x, pad_value=5, backend="triton")
    assert torch.equal(out[0, 0], x[0, 0]) and torch.equal(out[1, 1], x[1, 1])
    assert (out[0, 1] == 5).all() and (out[1, ::2] == 5).all()
    grad = torch.autograd.grad(out.sum(), x)[0]
    assert grad[..., 0].nonzero().tolist() == [[0, 0], [0, 1], [1, 1]] and grad.sum() == 12


@kernels
def test_out():
    tensors, axes = bundle()
    sel = selection()
    expected = pyvtk.compact(sel, *tensors, **axes, backend="reference")
    outs = tuple(torch.empty_like(x) for x in expected)
    assert pyvtk.compact(sel, *tensors, **axes, out=outs, backend="triton") is outs
    same(outs, expected)


@kernels
@pytest.mark.parametrize("dtype", (*FLOATS, torch.complex64), ids=str)
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("repeated", (False, True))
def test_gradient(dtype, packed, repeated):
    shapes = ((2, 9, 40), (9, 4), (1, 9, 4), (2, 3, 9, 4))
    # whole numbers: their sums are exact in any order
    inputs = [random(shape).round().to(dtype) for shape in shapes]
    call = {"dim": (1, 0, 1, 2), "batch_dim": (0, None, 0, 0), "packed": packed, "total": 6 if packed else None}
    sel = selection(repeated=repeated, align="right" if repeated else "left")
    found = []
    for backend in ("triton", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outs = pyvtk.compact(sel, *leaves, **call, backend=backend)
        torch.manual_seed(1)
        weights = [random(out.shape).round().to(dtype) for out in outs]
        found.append(torch.autograd.grad(outs, leaves, weights))
    same(*found)


@kernels
def test_gradient_of_a_head_axis():
    sel = selection(rows=(2, 3), repeated=True)
    x = random((2, 3, 9, 4)).requires_grad_()
    grads = []
    for backend in ("triton", "reference"):
        out = pyvtk.compact(sel, x, dim=2, backend=backend)
        grads.append(torch.autograd.grad(out, x, torch.arange(out.numel(), device=DEVICE).view(out.shape).float())[0])
    same(*grads)


@kernels
def test_gradcheck():
    sel = selection((2,), 4, 3, repeated=True, counts=torch.tensor([3, 2], dtype=torch.int32))
    x = torch.randn(2, 4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pyvtk.compact(sel, x, backend="triton"), (x,))
    assert torch.autograd.gradgradcheck(lambda x: pyvtk.compact(sel, x, backend="triton"), (x,))


@kernels
@pytest.mark.parametrize("rows", ((2,), (2, 3)), ids=("shared", "per head"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8, torch.float64, torch.complex64), ids=str)
def test_compact_kv(rows, dtype):
    sel = Selection.from_mask((torch.rand(*rows, 140) < 0.7).to(DEVICE), capacity=120)
    caches = [
        random((2, 3, 140, 8), dtype),
        random((2, 140, 3, 40), dtype).transpose(1, 2),
        random((2, 3, 150, 9), dtype)[:, :, 3:143, :8],
        random((2, 3, 140, 28), dtype)[..., 4:],
    ]
    expected = [c.clone() for c in caches]
    reference.compact_kv_(sel.indices, sel.counts, expected)
    views = pyvtk.compact_kv_(sel, *caches, backend="triton")
    assert all(view.data_ptr() == cache.data_ptr() for view, cache in zip(views, caches))
    same(caches, expected)


@kernels
def test_opcheck():
    sel = selection(counts=torch.tensor([5, 3], dtype=torch.int32))
    rows = (sel.indices, sel.counts, False)
    x, table = random((2, 9, 4)).requires_grad_(), random((9, 2)).requires_grad_()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (*rows, [x, table], [1, 0], [0, -1], [0.0, 1.0], None)
    torch.library.opcheck(OPS.compact_triton.default, arguments, test_utils=tests)
    grads = [random((2, 5, 4)), random((2, 5, 2))]
    arguments = (*rows, grads, [1, 0], [0, -1], [2, 1], 9, None)
    torch.library.opcheck(OPS.compact_backward_triton.default, arguments, test_utils=tests[:3])
    up = Selection.from_mask((torch.rand(2, 9) < 0.5).to(DEVICE), capacity=5)
    arguments = (up.indices, up.counts.clamp(max=0), [random((2, 3, 9, 4))])
    torch.library.opcheck(OPS.compact_kv__triton.default, arguments, test_utils=tests[:3])


def test_restore_has_no_triton_kernel():
    assert backends.why_not("restore", "triton", "cuda") is not None
