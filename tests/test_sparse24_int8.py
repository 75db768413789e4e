"""int8: quantisation, exact products, scales of activations, training that sees the rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget
from torch import nn

from pyvtk import backends, sparse24
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference

WITHOUT_KERNELS = backends.why_not("sparse24_linear_int8", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
BACKENDS = ("reference", pytest.param("compiled", marks=needs_kernels))


def quantized(out, inside):
    dense = torch.randn(out, inside)
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    return weight24, sparse24.quantize(weight24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize(dtype):
    dense = torch.randn(9, 24).to(dtype)
    dense[4] = 0
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    whole = sparse24.quantize(weight24)
    largest = weight24.values.float().abs().amax(-1)
    torch.testing.assert_close(whole.scales, torch.where(largest == 0, 1, largest / 127))
    assert whole.values.dtype == torch.int8 and whole.values.abs().amax(-1).tolist() == [127] * 4 + [0] + [127] * 4
    assert torch.equal(whole.mask(), weight24.mask()) and whole.nbytes < weight24.nbytes
    error = (whole.decompress() - weight24.decompress().float()).abs()
    assert (error <= whole.scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("per_tensor", (False, True))
@pytest.mark.parametrize("rows, out, inside", [(1, 1, 4), (5, 9, 36), (40, 33, 200), (0, 3, 8)])
def test_products_are_exact(rows, out, inside, per_tensor, backend):
    """With whole numbers spelled out: int64 sums, then float32."""
    _, weight24 = quantized(out, inside)
    x, bias = torch.randn(rows, inside) * 3, torch.randn(out)
    x_scale = torch.tensor([0.02]) if per_tensor else None
    scale = torch.full((rows, 1), 0.02) if per_tensor else (x.abs().amax(-1, keepdim=True) / 127)
    q = (x / scale).round().clamp(-127, 127).long()
    sums = q @ ops.decompress(weight24.values, weight24.metadata).long().T
    exact = sums.double() * scale.double() * weight24.scales.double() + bias.double()
    plain = sums.float() * scale * weight24.scales + bias
    actual = sparse24.linear_int8(x, weight24, bias, x_scale=x_scale, backend=backend)
    assert_within_budget(actual, exact, plain)
    gate = torch.randn(rows, out)
    actual = sparse24.linear_int8(x, weight24, bias, "silu", gate, x_scale=x_scale, backend=backend)
    silu = torch.nn.functional.silu
    assert_within_budget(actual, silu(exact) * gate.double(), silu(plain) * gate)


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sums_do_not_overflow(backend):
    """127 * 127 * 8192: beyond what float32 holds exactly, within int32."""
    inside = 16384
    mask = torch.tensor([True, True, False, False]).repeat(3, inside // 4)
    weight24 = sparse24.compress(torch.full((3, inside), 127, dtype=torch.int8), mask, torch.ones(3))
    x = torch.full((2, inside), 127.0)
    x[1, 0] = 126.0
    y = sparse24.linear_int8(
        x.double() if backend == "reference" else x, weight24, x_scale=torch.ones(1), backend=backend
    )
    exact = torch.tensor([127 * 127 * inside // 2, 127 * 127 * inside // 2 - 127])
    assert torch.equal(y, exact[:, None].expand(2, 3).to(y.dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_dimensions(backend):
    _, weight24 = quantized(6, 8)
    bias = torch.randn(6)
    y = sparse24.linear_int8(torch.zeros(2, 3, 8), weight24, bias, backend=backend)
    torch.testing.assert_close(y, bias.expand(2, 3, 6))
    assert sparse24.linear_int8(torch.zeros(0, 8), weight24, backend=backend).shape == (0, 6)
    x = torch.randn(8, 5).T
    run = lambda x: sparse24.linear_int8(x, weight24, backend=backend)  # noqa: E731
    torch.testing.assert_close(run(x), run(x.contiguous()))
    half = run(x.bfloat16())
    assert half.dtype == torch.bfloat16


def test_rounding_is_half_to_even():
    q, scale = reference.quantize_rows(torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0, 300.0]]), torch.ones(1))
    assert q.tolist() == [[0, 2, 2, 0, -2, 127, 127]] and scale.tolist() == [1.0]


def tiny_rows():
    """Rows whose largest entry is about the smallest that int8 can express with a normal scale, 127 * 2 ** -126, and
    far below, down to the smallest number there is; and which of them become zeros."""
    smallest, unit = 2.0**-149, 127 * 2.0**-126
    rows = torch.tensor([
        [0.0, smallest, -smallest, 0.0], [0.0, 180 * smallest, 0.0, -0.0], [1e-40, 0.0, -3e-41, 0.0],
        [0.999 * unit, 0.0, -0.5 * unit, 0.0], [unit, 0.0, -0.5 * unit, 0.0], [1e-30, 0.0, -3e-31, 0.0],
        [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.25, 0.0],
    ])  # fmt: skip
    zeros = [True] * 4 + [False] * 2 + [True, False]
    return rows, torch.tensor(zeros)


def check_tiny(actual, rows, zeros):
    assert not actual.isnan().any()
    assert (actual[zeros] == 0).all()
    largest = rows.double().abs().amax(-1, keepdim=True)
    assert ((actual.double() - rows.double()).abs() <= 1.001 * largest / 254)[~zeros].all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
def test_rows_too_small_for_a_scale_become_zeros(dtype):
    """And never NaN: a scale of 0, or of a few bits, is none."""
    rows, zeros = tiny_rows()
    leaf = rows.to(dtype).requires_grad_()
    rounded = sparse24.fake_quantize(leaf)
    if dtype != torch.bfloat16:
        check_tiny(rounded.detach(), rows, zeros)
    assert not rounded.isnan().any() and torch.autograd.grad(rounded.sum(), leaf)[0].eq(1).all()


@pytest.mark.parametrize("flush", (False, True))
def test_such_rows_in_every_backend(flush, instruction_set):
    """Bit for bit: quantize, the reference, the kernels; with denormal numbers flushed by the CPU too."""
    rows, zeros = tiny_rows()
    identity = sparse24.compress(torch.eye(4, dtype=torch.int8), scales=torch.ones(4))
    torch.set_flush_denormal(flush)
    try:
        check_tiny(sparse24.quantize(sparse24.compress(rows)).decompress(), rows, zeros)
        results = [
            sparse24.linear_int8(rows, identity, backend=backend)
            for backend in ("reference", *(() if WITHOUT_KERNELS else ("compiled",)))
        ]
        observer = sparse24.ActivationObserver()
        observer.update(rows[0])
        assert observer.scale() == 1
    finally:
        torch.set_flush_denormal(False)
    for result in results:
        check_tiny(result, rows, zeros)
        assert torch.equal(result, results[0])


# Activations


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(-100, 100, width=32), max_size=30), min_size=1, max_size=4), st.integers(1, 100))
def test_observer(batches, percentile):
    largest, ranked = 0.0, 0.0
    plain, clipping = sparse24.ActivationObserver(), sparse24.ActivationObserver(percentile)
    for batch in batches:
        for observer in (plain, clipping):
            observer.update(torch.tensor(batch))
        size = sorted(abs(x) for x in batch)
        if size:
            largest = max(largest, size[-1])
            ranked = max(ranked, size[max(1, round(percentile / 100 * len(size))) - 1])
    if all(not batch for batch in batches):
        with pytest.raises(ValueError, match="update must have seen a batch"):
            plain.scale()
        return
    assert plain.scale().item() == pytest.approx(largest / 127 if largest else 1, rel=1e-5)
    assert clipping.scale().item() == pytest.approx(ranked / 127 if ranked else 1, rel=1e-5)


def test_calibrate_activations():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    batches = [torch.randn(5, 8), 3 * torch.randn(2, 8)]
    scales = sparse24.calibrate_activations(model, batches)
    hidden = torch.cat([model[:2](b) for b in batches])
    torch.testing.assert_close(scales["0"], torch.cat(batches).abs().max().reshape(1) / 127)
    torch.testing.assert_close(scales["2"], hidden.abs().max().reshape(1).detach() / 127)


# Training


def test_fake_quantize():
    x = torch.tensor([[0.24, 0.26, -12.7, 20.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    y = sparse24.fake_quantize(x, torch.tensor([0.1]))
    torch.testing.assert_close(y, torch.tensor([[0.2, 0.3, -12.7, 12.7], [0.0, 0.0, 0.0, 0.0]]))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, 2.0))
    assert grad.tolist() == [[2, 2, 2, 0], [2, 2, 2, 2]]  # straight through, and nothing where it clips
    rows = torch.randn(5, 9, requires_grad=True)
    y = sparse24.fake_quantize(rows)
    q, scale = reference.quantize_rows(rows.detach(), None)
    torch.testing.assert_close(y, q * scale)
    assert torch.autograd.grad(y.sum(), rows)[0].eq(1).all()


@pytest.mark.parametrize("per_tensor", (False, True))
def test_training_sees_what_inference_computes(per_tensor):
    x_scale = torch.tensor([0.03]) if per_tensor else None
    module = sparse24.Linear24(64, 24, int8=True, x_scale=x_scale, method="ste")
    x = torch.randn(40, 64)
    inference = module.to_sparse()
    assert inference.values.dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(inference(x), module(x), rtol=1e-4, atol=1e-4)
    weight = sparse24.fake_quantize((module.weight * module.mask).detach())
    rounded = sparse24.fake_quantize(x, x_scale)
    torch.testing.assert_close(module(x), rounded @ weight.T + module.bias, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(module(x).sum(), module.weight)
    torch.testing.assert_close(grad, rounded.sum(0).expand(24, 64), rtol=1e-4, atol=1e-4)  # of every weight
    again = sparse24.Sparse24Linear(inference.weight24, inference.bias, x_scale=x_scale if per_tensor else "row")
    again.load_state_dict(inference.state_dict())
    assert torch.equal(again(x), inference(x))


def test_training_moves_whole():
    module = sparse24.Linear24(16, 8, int8=True, x_scale=torch.tensor([0.03]), method="ste").bfloat16()
    assert module.x_scale.dtype == torch.float32 and module.weight.dtype == torch.bfloat16
    x = torch.randn(3, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(module.to_sparse()(x), module(x), rtol=0.05, atol=0.05)


def test_training_with_int8_reaches_a_small_loss():
    """A linear map is learned through rounding and pruning."""
    target = torch.randn(8, 16) * sparse24.prune(torch.randn(8, 16))
    module = sparse24.Linear24(16, 8, int8=True)
    optimizer = torch.optim.Adam(module.parameters(), 0.02)
    x = torch.randn(256, 16)
    losses = []
    for _ in range(150):
        loss = (module(x) - x @ target.T).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module.step()
    assert losses[-1] < 0.02 * losses[0]


_, Q = quantized(4, 8)
F = sparse24.compress(torch.zeros(4, 8))
NOT_FINITE = sparse24.compress(torch.tensor([[float("inf"), 1, 0, 0]]))
WRONG = {
    "sparse24.quantize: weight must be a Sparse24Weight": lambda: sparse24.quantize(torch.zeros(4, 8)),
    "sparse24.quantize: weight must have dtype": lambda: sparse24.quantize(Q),
    "sparse24.quantize: weight must be finite": lambda: sparse24.quantize(NOT_FINITE),
    "sparse24.fake_quantize: x must be a tensor": lambda: sparse24.fake_quantize(1.0),
    "sparse24.fake_quantize: x must have dtype": lambda: sparse24.fake_quantize(torch.ones(3).long()),
    "sparse24.fake_quantize: scale must be a tensor": lambda: sparse24.fake_quantize(torch.ones(3), 0.1),
    "sparse24.linear_int8: scales must be given": lambda: sparse24.linear_int8(
        torch.zeros(2, 8), sparse24.Sparse24Weight(Q.values, Q.metadata)
    ),
    "sparse24.linear_int8: values must have dtype": lambda: sparse24.linear_int8(torch.zeros(2, 8), F),
    "sparse24.linear_int8: x_scale must have dtype": lambda: sparse24.linear_int8(
        torch.zeros(2, 8), Q, x_scale=torch.ones(1).half()
    ),
    "ActivationObserver: percentile must be": lambda: sparse24.ActivationObserver(0),
    "ActivationObserver.scale: update must": lambda: sparse24.ActivationObserver().scale(),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)
