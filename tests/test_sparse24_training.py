"""Linear24: published gradients and schedules as plain torch, masks, state, compilation; a small real task."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pyvtk import backends, sparse24
from pyvtk.reference import sparse24 as reference

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")


def two_of_four(weight):
    return reference.prune_n_of_m(weight.detach().abs(), 2, 4)


def layer(inside=16, out=12, **options):
    return sparse24.Linear24(inside, out, **options)


def gradients(module, x, grad):
    """Of x, weight and bias."""
    x = x.clone().requires_grad_()
    out = module(x)
    return (out, *torch.autograd.grad(out, (x, module.weight, module.bias), grad))


# What the papers say, as plain torch. Each gives (y, gradient of x, of the weight, of the bias).


def masked_linear(x, weight, bias, seen, grad):
    rows = grad.reshape(-1, grad.shape[-1])
    dense_grad = rows.T @ x.reshape(-1, x.shape[-1])
    return F.linear(x, seen, bias), grad @ seen, dense_grad, rows.sum(0)


@pytest.mark.parametrize("transposable", (False, True))
@pytest.mark.parametrize("method", ("ste", "sr_ste"))
def test_straight_through_and_sr_ste(method, transposable):
    """Forward W * M; gradient g to all of W, for SR-STE g + 2e-4 (1 - M) W."""
    module = layer(method=method, transposable=transposable)
    x, grad = torch.randn(2, 5, 16), torch.randn(2, 5, 12)
    weight, mask = module.weight.detach(), module.mask
    assert torch.equal(mask, sparse24.prune(weight, transposable=transposable))
    expected = list(masked_linear(x, weight, module.bias, weight * mask, grad))
    if method == "sr_ste":
        expected[2] = expected[2] + 2e-4 * (~mask) * weight
    torch.testing.assert_close(gradients(module, x, grad), tuple(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ("linear", "exponential"))
def test_decaying_masks(schedule):
    """Forward W * (M + (1 - M) beta_t), beta_t = max(0, 1 - c t) or exp(-c t); gradient g. M of every step's |W|."""
    c = 0.3
    beta = {"linear": sparse24.LinearDecay(c), "exponential": sparse24.ExponentialDecay(c, end=6)}[schedule]
    module = layer(method="decay", beta=beta)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for t in range(8):
        left = max(0.0, 1 - c * t) if schedule == "linear" else (math.exp(-c * t) if t < 6 else 0.0)
        weight, x, grad = module.weight.detach().clone(), torch.randn(5, 16), torch.randn(5, 12)
        mask = two_of_four(weight).float()
        expected = masked_linear(x, weight, module.bias, weight * (mask + (1 - mask) * left), grad)
        actual = gradients(module, x, grad)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(module.masked_weight(), weight * (mask + (1 - mask) * left))
        assert module.sparse == (left == 0)
        module.weight.grad, module.bias.grad = actual[2], actual[3]
        optimizer.step()
        sparse24.step_24(module)
    assert sparse24.ExponentialDecay(c)(100) == math.exp(-c * 100)


def test_structure_decay_patterns():
    assert sparse24.structure_decay(10) == ((0, (3, 4)), (10, (2, 4)))
    assert sparse24.structure_decay(5, m=16) == ((0, (15, 16)), (5, (8, 16)), (10, (4, 16)), (15, (2, 16)))
    assert sparse24.structure_decay(7, halve=True) == ((0, (8, 16)), (7, (4, 8)), (14, (2, 4)))


@pytest.mark.parametrize("halve", (False, True))
def test_structure_decay(halve):
    patterns = sparse24.structure_decay(2, halve=halve)
    module = layer(method="ste", patterns=patterns)
    for t in range(7):
        n, m = next(pattern for first, pattern in reversed(patterns) if t >= first)
        weight, x, grad = module.weight.detach(), torch.randn(5, 16), torch.randn(5, 12)
        mask = reference.prune_n_of_m(weight.abs(), n, m)
        assert module.pattern == (n, m) and torch.equal(module.mask, mask) and module.sparse == ((n, m) == (2, 4))
        expected = masked_linear(x, weight, module.bias, weight * mask, grad)
        torch.testing.assert_close(gradients(module, x, grad), expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            module.weight += torch.randn(12, 16) * 0.1
        module.step()


def test_masks_are_refreshed_on_schedule():
    module = layer(refresh_every=3, refresh_until=6)
    for t in range(1, 12):
        with torch.no_grad():
            module.weight.copy_(torch.randn(12, 16))
        before = module.mask.clone()
        module.step()
        due = t in (3, 6)
        assert torch.equal(module.mask, two_of_four(module.weight) if due else before)
        assert not torch.equal(two_of_four(module.weight), before)
    assert int(module.steps) == 11


@pytest.mark.parametrize("transposable", (False, True))
def test_sparse_and_dense_phases_agree(transposable):
    """The same layer through the compressed weight and as plain masked products."""
    module = layer(64, 32, transposable=transposable)
    x = torch.randn(40, 64, requires_grad=True)
    module.sparse = False
    dense = gradients(module, x.detach(), torch.ones(40, 32))
    module.sparse = True
    torch.testing.assert_close(gradients(module, x.detach(), torch.ones(40, 32)), dense, rtol=1e-5, atol=1e-5)


def test_gradcheck():
    """Through the masked weight, in float64, the gradient is that of the masked product: where the mask holds."""
    module = layer(8, 4, method="ste", dtype=torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    kept = module.weight.detach()[module.mask].requires_grad_()

    def run(x, kept):
        weight = torch.zeros_like(module.weight).masked_scatter(module.mask, kept)
        return torch.func.functional_call(module, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, kept))


# The module


def test_state_dict_resumes():
    options = {"method": "decay", "beta": sparse24.LinearDecay(0.2), "refresh_every": 2}
    module, other = layer(**options), layer(**options)
    for _ in range(3):
        with torch.no_grad():
            module.weight.copy_(torch.randn(12, 16))
        module.step()
    other.load_state_dict(module.state_dict())
    x = torch.randn(4, 16)
    assert torch.equal(other(x), module(x)) and torch.equal(other.mask, module.mask)
    for _ in range(3):
        for one in (module, other):
            one.step()
        assert torch.equal(other(x), module(x)) and other.sparse == module.sparse
    assert module.sparse


@pytest.mark.parametrize("transposable", (False, True))
def test_a_loaded_mask_is_verified_once(transposable):
    """Products do not look at the mask again."""
    module = layer(transposable=transposable)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["mask"][3, 4:8] = torch.tensor([True, True, True, False])
    with pytest.raises(ValueError, match="mask must be 2:4 at step 0, got 3 of 4 kept in row 3, group 1"):
        module.load_state_dict(state)
    state["mask"] = torch.tensor([True, True, False, False]).repeat(12, 4)
    if transposable:
        with pytest.raises(ValueError, match="mask must be 2:4 at step 0, got 4 of 4 kept in column 0, group 0"):
            module.load_state_dict(state)
    else:
        module.load_state_dict(state)


def test_a_mask_of_an_earlier_pattern_is_not_loaded():
    module = layer(patterns=sparse24.structure_decay(2))
    with pytest.raises(ValueError, match="mask must be 2:4 at step 2, got 3 of 4 kept in row 0, group 0"):
        module.load_state_dict({"steps": torch.tensor(2)}, strict=False)


def test_products_trust_the_mask(monkeypatch):
    seen = []
    operator = torch.ops.pyvtk.sparse24_compress
    monkeypatch.setattr(torch.ops.pyvtk, "sparse24_compress", lambda *a: seen.append(a[2:]) or operator(*a))
    module = layer(transposable=True)
    module(torch.randn(3, 16, requires_grad=True)).sum().backward()
    assert set(seen) <= {(True,)} and len(seen) == (2 if not WITHOUT_KERNELS else 0)


def test_export():
    module = layer(bias=False).eval()
    x = torch.randn(40, 16)
    inference = module.to_sparse()
    assert isinstance(inference, sparse24.Sparse24Linear) and not inference.training
    torch.testing.assert_close(inference(x), module(x))
    before = inference.values.clone()
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(inference.values, before)
    early = layer(method="decay", beta=sparse24.LinearDecay(0.5))
    with pytest.raises(ValueError, match="schedule must be at 2:4 with beta 0, got 2:4 with beta 1 at step 0"):
        early.to_sparse()


def test_from_linear_takes_the_parameters():
    linear = nn.Linear(16, 12).eval()
    module = sparse24.Linear24.from_linear(linear, method="ste")
    assert module.weight is linear.weight and module.bias is linear.bias and not module.training
    assert torch.equal(module.mask, two_of_four(linear.weight))


def test_autocast():
    module = layer()
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert module.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_zero_rows_and_dimensions():
    module = layer()
    for shape in ((0, 16), (2, 0, 16), (16,), (2, 3, 16)):
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        assert y.shape == (*shape[:-1], 12)
        y.sum().backward()
        assert x.grad.shape == shape


@pytest.mark.parametrize("options", [{}, {"transposable": True}, {"int8": True}], ids=str)
def test_compiles_whole_with_few_recompilations(options):
    """Decay until beta is 0, then sparse: once for each."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    module = layer(method="decay", beta=sparse24.LinearDecay(0.5), **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 4, 7, 5, 9):
        x = torch.randn(rows, 16, requires_grad=True)
        actual, expected = compiled(x), module(x)
        torch.testing.assert_close(actual, expected)
        wanted = (x, module.weight)
        grads = [torch.autograd.grad(y.square().sum(), wanted) for y in (actual, expected)]
        torch.testing.assert_close(grads[0], grads[1])
        module.step()
    assert counter.frame_count == 2


def digits():
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1297], y[:1297]), (x[1297:], y[1297:])


def accuracy_of(first, second):
    """Test accuracy in percent after training a two-layer network on digits, and the network."""
    (x, y), (x_test, y_test) = digits()
    model = nn.Sequential(first, nn.ReLU(), second)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            sparse24.step_24(model)
    with torch.no_grad():
        return (model(x_test).argmax(-1) == y_test).float().mean().item() * 100, model


def test_digits_within_a_point_of_dense():
    """Every layer 2:4, trained with SR-STE; then exported, which changes nothing."""
    dense, _ = accuracy_of(nn.Linear(64, 128), nn.Linear(128, 10))
    sparse, model = accuracy_of(sparse24.Linear24(64, 128), sparse24.Linear24(128, 10))
    assert dense > 95 and sparse >= dense - 1, (dense, sparse)
    exported = nn.Sequential(model[0].to_sparse(), nn.ReLU(), model[2].to_sparse())
    _, (x, y) = digits()
    with torch.no_grad():
        assert (exported(x).argmax(-1) == y).float().mean().item() * 100 == pytest.approx(sparse, abs=0.3)


M = layer()
WRONG = {
    "Linear24: in_features must be at least": lambda: layer(0),
    "Linear24: features must be multiples of 4": lambda: layer(10),
    "Linear24: method must be": lambda: layer(method="magic"),
    "Linear24: beta must be": lambda: layer(beta=sparse24.LinearDecay(1)),
    "Linear24: beta must be a": lambda: layer(method="decay"),
    "Linear24: refresh_every must be": lambda: layer(refresh_every=0),
    "Linear24: refresh_until must be": lambda: layer(refresh_until=-1),
    "Linear24: transposable must be": lambda: layer(transposable=1),
    "Linear24: x_scale must be None": lambda: layer(x_scale=torch.ones(1)),
    "Linear24: patterns must ascend": lambda: layer(patterns=[(0, (3, 4))]),
    "Linear24: patterns must be 0 < n < m": lambda: layer(patterns=[(0, (16, 32)), (1, (2, 4))]),
    "Linear24: patterns must be 2:4 alone": lambda: layer(patterns=[(0, (3, 4)), (1, (2, 4))], transposable=True),
    "Linear24: x must be a tensor": lambda: M(1),
    "Linear24: x must be [...": lambda: M(torch.ones(3, 8)),
    "Linear24: x must have the dtype": lambda: M(torch.ones(3, 16).half()),
    "Linear24.from_linear: linear must be": lambda: sparse24.Linear24.from_linear(M),
    "LinearDecay: rate must be": lambda: sparse24.LinearDecay(0),
    "ExponentialDecay: rate must be": lambda: sparse24.ExponentialDecay(-1),
    "structure_decay: n must be less": lambda: sparse24.structure_decay(1, 4, 4),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)


def test_a_weight_that_is_not_a_number_is_an_error():
    module = layer()
    with torch.no_grad():
        module.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"weight must not hold NaN, got one at \(3, 5\)"):
        module.step()
