"""sparse24's own gradients under torch.func, vmap, forward mode and twice, against plain torch; or a clear error."""

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

from pyvtk import backends, sparse24
from pyvtk.sparse24 import functions

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
OPTIONS = {
    "ste": {"method": "ste"},
    "transposable": {"method": "ste", "transposable": True},
    "decay": {"method": "decay", "beta": sparse24.LinearDecay(0.25)},
    "sr_ste": {},
}
# float32: the compressed weight; float64: what the reference computes
DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-7, "atol": 1e-7}}


def trained(name, dtype=torch.float32):
    module = sparse24.Linear24(8, 4, dtype=dtype, **OPTIONS[name])
    module.step()
    return module, {key: value.detach() for key, value in module.named_parameters()}


def oracle(module):
    """Linear24 in plain torch: the masked weight, with a gradient straight through and, of sr_ste, its decay."""

    def run(parameters, x):
        weight = parameters["weight"]
        left = module.left.to(weight.dtype)
        shown = torch.where(module.mask, weight, left * weight).detach()
        through = weight - weight.detach()
        if module.method == "sr_ste":
            # half a square has the derivative that is added; its own value is taken off again
            decay = (module.rate / 2 * torch.where(module.mask, 0, weight).square()).sum()
            return F.linear(x, shown + through, parameters["bias"]), decay
        return F.linear(x, shown + through, parameters["bias"]), 0

    return run


def losses(module):
    """Of (parameters, x): by the layer, and by the oracle, whose gradient is the same."""
    plain = oracle(module)

    def ours(parameters, x):
        return functional_call(module, parameters, (x,)).square().sum()

    def theirs(parameters, x):
        y, decay = plain(parameters, x)
        return y.square().sum() + decay

    return ours, theirs


TRANSFORMS = {
    "grad": lambda f: grad(f, argnums=(0, 1)),
    "grad of vmap": lambda f: grad(lambda p, x: vmap(f, (None, 0))(p, x).sum(), argnums=(0, 1)),
    "vmap of grad": lambda f: vmap(grad(f, argnums=(0, 1)), (None, 0)),
    "vmap of grad, other axis": lambda f: lambda p, x: vmap(grad(f, argnums=(0, 1)), (None, 1))(p, x.mT.contiguous()),
    "vmap of vmap of grad": lambda f: vmap(vmap(grad(f), (None, 0)), (None, 0)),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "vjp": lambda f: lambda p, x: vjp(f, p, x)[1](torch.ones((), dtype=x.dtype)),
    "hessian of x": lambda f: lambda p, x: jacrev(jacrev(f, argnums=1), argnums=1)(p, x),
    "mixed second derivatives": lambda f: lambda p, x: jacrev(jacrev(f, argnums=1), argnums=0)(p, x),
    "hessian of weights": lambda f: lambda p, x: jacrev(grad(f))(p, x),
}
FORWARD = {
    "jvp": lambda f: lambda p, x: jvp(f, (p, x), ({k: v.cos() for k, v in p.items()}, x.sin()))[1],
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1)),
    "jvp of grad": lambda f: lambda p, x: jvp(lambda x: grad(f)(p, x), (x,), (x.sin(),))[1],
    "hessian": lambda f: hessian(f, argnums=1),
    "vmap of jvp": lambda f: vmap(lambda p, x: jvp(lambda x: f(p, x), (x,), (x.sin(),))[1], (None, 0)),
}


# sr_ste adds its decay once for each backward pass that reaches the weight: a derivative of the gradient has it too,
# and a batch, which is one pass, has it once, where the oracle has it in the loss of each sample
ONCE = ("grad", "vmap of grad", "vmap of grad, other axis", "vmap of vmap of grad", "jacrev", "vjp", "hessian of x")


def compare(transform, name, dtype):
    module, parameters = trained(name, dtype)
    x = torch.randn(3, 2, 8, dtype=dtype) if "vmap of vmap" in transform else torch.randn(3, 8, dtype=dtype)
    ours, theirs = ((TRANSFORMS | FORWARD)[transform](f)(parameters, x) for f in losses(module))
    torch.testing.assert_close(ours, theirs, **TOLERANCE[dtype])
    assert any(leaf.abs().max() > 0 for leaf in torch.utils._pytree.tree_leaves(ours))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "transform, name", [(t, n) for t in TRANSFORMS for n in OPTIONS if n != "sr_ste" or t in ONCE]
)  # fmt: skip
def test_training(transform, name, dtype):
    compare(transform, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "sr_ste"])
@pytest.mark.parametrize("transform", FORWARD)
def test_training_in_forward_mode(transform, name, dtype):
    compare(transform, name, dtype)


def test_sr_ste_has_no_forward_mode():
    module, parameters = trained("sr_ste")
    ours, theirs = losses(module)
    x = torch.randn(3, 8)
    with pytest.raises(RuntimeError, match="Linear24: method 'sr_ste' has no forward-mode derivative"):
        jvp(lambda p: ours(p, x), (parameters,), (parameters,))
    actual, expected = (jvp(lambda x, f=f: f(parameters, x), (x,), (x,))[1] for f in (ours, theirs))
    torch.testing.assert_close(actual, expected)  # of x there is one


@pytest.mark.parametrize("name", OPTIONS)
def test_gradient_penalty(name):
    """A second backward without torch.func. The decay of sr_ste is added in it as in any other."""
    module, _ = trained(name, torch.float64)
    results = []
    for f in losses(module):
        parameters = {key: value.detach().clone().requires_grad_() for key, value in module.named_parameters()}
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(3, 8).requires_grad_()
        (first,) = torch.autograd.grad(f(parameters, x), x, create_graph=True)
        results.append(list(torch.autograd.grad(first.square().sum(), (x, *parameters.values()))))
    if name == "sr_ste":
        results[1][1] = results[1][1] + 2e-4 * torch.where(module.mask, 0, module.weight)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ("ste", "decay", "sr_ste"))
def test_several_layers_at_once(name):
    """vmap over weights, masks and x, as of an ensemble."""
    modules = [trained(name)[0] for _ in range(3)]
    stacked = [
        {
            key: torch.stack([dict(part(m))[key].detach() for m in modules])
            for key in dict(part(modules[0]))
            if key != "steps"
        }
        for part in (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers)
    ]
    x = torch.randn(3, 5, 8)

    def run(parameters, buffers, x):
        return functional_call(modules[0], (parameters, buffers), (x,))

    actual = vmap(run)(*stacked, x)
    torch.testing.assert_close(actual, torch.stack([m(x) for m, x in zip(modules, x)]))
    together = vmap(grad(lambda *a: run(*a).square().sum()))(*stacked, x)
    for i, module in enumerate(modules):
        (expected,) = torch.autograd.grad(module(x[i]).square().sum(), module.weight)
        torch.testing.assert_close(together["weight"][i], expected, rtol=1e-4, atol=1e-4)


# Rounding


def plain_rounding(x, scale):
    wanted = (x / scale).round().clamp(-127, 127) * scale
    inside = (x.abs() <= scale * 127.5).to(x.dtype)
    return wanted.detach() + inside * (x - x.detach())


@pytest.mark.parametrize("transform", [*TRANSFORMS, *FORWARD])
def test_rounding(transform):
    scale = torch.tensor([0.01])
    losses = [
        lambda p, x, f=f: f(x, scale).square().sum() + (f(p["weight"], scale) * x.sum()).square().sum()
        for f in (sparse24.fake_quantize, plain_rounding)
    ]
    x = torch.randn(3, 2, 8) if "vmap of vmap" in transform else torch.randn(3, 8)
    parameters = {"weight": torch.randn(4, 8)}
    actual, expected = ((TRANSFORMS | FORWARD)[transform](f)(parameters, x) for f in losses)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-3)


# Products with a transpose


@pytest.fixture
def with_transpose():
    dense = torch.randn(12, 16)
    weight24 = sparse24.compress(dense, sparse24.prune(dense, transposable=True)).with_transpose()
    return weight24, weight24.decompress()


PRODUCT = {
    "grad": lambda f: lambda x: grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f: vmap(f),
    "vmap of another axis": lambda f: vmap(f, in_dims=1, out_dims=1),
    "vmap of grad": lambda f: vmap(grad(lambda x: f(x).square().sum())),
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.sin(),))[1],
    "jacfwd": lambda f: jacfwd(f),
    "jacrev": lambda f: jacrev(f),
    "hessian": lambda f: hessian(lambda x: f(x).pow(3).sum()),
}


@needs_kernels
@pytest.mark.parametrize("transform", PRODUCT)
def test_products_with_a_transpose(transform, with_transpose, monkeypatch):
    weight24, dense = with_transpose
    products = []
    product = functions.sparse_product
    monkeypatch.setattr(functions, "sparse_product", lambda *a: products.append(a[1].shape) or product(*a))
    # three dimensions, so that one is left where one is mapped over
    x = torch.randn(2, 3, 16) if transform == "vmap of another axis" else torch.randn(3, 16)
    functions_of_x = (lambda x: sparse24.linear(x, weight24), lambda x: x @ dense.T)
    if transform.startswith("vmap") and "grad" not in transform:
        x.requires_grad_()  # which vmap hides
    actual, expected = (PRODUCT[transform](f)(x) for f in functions_of_x)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    if x.requires_grad:
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (actual, expected)))
    assert products  # this is the way that it went


@needs_kernels
def test_a_transpose_in_a_gradient_penalty(with_transpose):
    weight24, dense = with_transpose
    penalties = []
    x = torch.randn(3, 16, requires_grad=True)
    for f in (lambda x: sparse24.linear(x, weight24), lambda x: x @ dense.T):
        (first,) = torch.autograd.grad(f(x).pow(3).sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*penalties, rtol=1e-4, atol=1e-3)


def test_who_wants_a_gradient():
    wants = functions.wants_gradient
    seen = []

    def look(x):
        seen.append(wants(x))
        return x.sum()

    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    for f, argument, expected in (
        (look, x, False), (look, leaf, True), (vmap(look), x[:, None], False), (vmap(look), leaf[:, None], True),
        (grad(look), x, True), (vmap(grad(look)), x[:, None], True),
        (grad(lambda x: vmap(look)(x[:, None]).sum()), x, True), (lambda x: jvp(look, (x,), (x,)), x, True),
        (lambda x: vmap(lambda x: jvp(look, (x,), (x,)))(x[:, None]), x, True),
        (lambda x: jvp(lambda _: look(x), (torch.ones(()),), (torch.ones(()),)), x, False),
    ):  # fmt: skip
        f(argument)
        assert seen.pop() == expected
    with torch.no_grad():
        assert not wants(leaf)
        with torch.autograd.forward_ad.dual_level():
            assert wants(torch.autograd.forward_ad.make_dual(x, x)) and not wants(x)
    assert not wants(None)
