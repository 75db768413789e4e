"""merge_tokens: compiled against the reference, gradients, compile, errors, edges."""

import pytest
import torch
from support import assert_within_budget

import pyvtk

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OPS = torch.ops.pyvtk


def random(shape, dtype=torch.float32):
    return (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)


def both(x, groups, **call):
    """The compiled result, after comparing it bit for bit with the reference."""
    actual, plain = (pyvtk.merge_tokens(x, groups, backend=backend, **call) for backend in ("compiled", "reference"))
    assert actual.dtype == plain.dtype and torch.equal(actual, plain)
    return actual


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduce", ("mean", "sum"))
@pytest.mark.parametrize("channels", (1, 37, 1500))
def test_merge_tokens(instruction_set, dtype, reduce, channels):
    x = random((2, 50, channels), dtype)
    groups = torch.randint(-2, 6, (2, 50))
    groups[groups == 4] = 3  # one group stays empty
    for factors in ({}, {"sizes": torch.rand(2, 50)}, {"weights": random((2, 50)), "sizes": torch.rand(2, 50)}):
        call = {"num_groups": 7, "reduce": reduce, **factors}
        actual = pyvtk.merge_tokens(x, groups, **call)
        wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
        oracle = pyvtk.merge_tokens(x.double(), groups, backend="reference", **wide)
        assert_within_budget(actual, oracle, pyvtk.merge_tokens(x, groups, backend="reference", **call))
        assert (actual[:, 4] == 0).all() and (actual[:, 6] == 0).all()
    assert pyvtk.merge_tokens(x, groups).shape[1] == int(groups.max()) + 1


def test_merge_by_size_is_the_mean_over_all_that_were_merged():
    x = random((1, 6, 4))
    first = pyvtk.merge_tokens(x, torch.tensor([[0, 0, 0, 1, 1, 2]]))
    second = pyvtk.merge_tokens(first, torch.tensor([[0, 0, 1]]), sizes=torch.tensor([[3.0, 2.0, 1.0]]))
    torch.testing.assert_close(second[0, 0], x[0, :5].mean(0))


def test_merge_of_no_weight_is_zero():
    x = random((1, 2, 4)).requires_grad_()
    weights = torch.tensor([[1.0, -1.0]], requires_grad=True)
    out = both(x, torch.zeros(1, 2, dtype=torch.int32), weights=weights)
    grads = torch.autograd.grad(out.sum(), (x, weights))
    assert (out == 0).all() and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("batch, tokens, channels", [(0, 9, 4), (2, 9, 0), (2, 0, 4)])
def test_empty(batch, tokens, channels):
    groups = torch.zeros(batch, tokens, dtype=torch.long)
    assert both(random((batch, tokens, channels)), groups, num_groups=2).shape == (batch, 2, channels)


def test_groups_are_checked_against_their_number():
    with pytest.raises(RuntimeError, match="num_groups"):
        pyvtk.merge_tokens(random((2, 9, 4)), torch.full((2, 9), 3), num_groups=3)


def test_threads_do_not_matter():
    x, groups = random((3, 300, 500)).requires_grad_(), torch.randint(-1, 40, (3, 300))

    def everything():
        merged = pyvtk.merge_tokens(x, groups, num_groups=40)
        return merged, torch.autograd.grad(merged.square().sum(), x)[0]

    one = everything()
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(everything(), one))
    finally:
        torch.set_num_threads(1)


# Gradients: equal to torch's own through the reference.


def gradients(function, inputs, backend):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves, backend=backend)
    torch.manual_seed(1)
    return torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))


@pytest.mark.parametrize("reduce", ("mean", "sum"))
def test_gradient_of_merge(instruction_set, reduce):
    x, groups, weights = random((2, 30, 40)), torch.randint(-1, 5, (2, 30)), torch.rand(2, 30)
    run = lambda x, w, backend: pyvtk.merge_tokens(  # noqa: E731
        x, groups, weights=w, sizes=w, num_groups=6, reduce=reduce, backend=backend
    )
    torch.testing.assert_close(gradients(run, (x, weights), "compiled"), gradients(run, (x, weights), "reference"))


def test_gradcheck():
    groups = torch.tensor([[0, 0, 2, -1], [1, 1, 1, 0]])
    weights = torch.rand(2, 4, dtype=torch.float64) + 0.5
    for reduce in ("mean", "sum"):
        run = lambda x, w, s: pyvtk.merge_tokens(x, groups, num_groups=4, weights=w, sizes=s, reduce=reduce)  # noqa: B023, E731
        assert torch.autograd.gradcheck(
            run,
            (
                torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True),
                weights.requires_grad_(),
                weights.detach().clone().requires_grad_(),
            ),
        )


# The operators' contracts.


@pytest.mark.parametrize("grad", (False, True))
def test_opcheck(grad):
    x, weights = random((2, 9, 4)).requires_grad_(grad), torch.rand(2, 9).requires_grad_(grad)
    groups = torch.randint(-1, 3, (2, 9))
    torch.library.opcheck(OPS.merge_tokens, (x, groups, weights, 3, True))
    torch.library.opcheck(OPS.merge_tokens, (x, groups, None, 3, False))
    if not grad:
        totals = torch.rand(2, 3).double()
        torch.library.opcheck(OPS.merge_tokens_backward, (random((2, 3, 4)), x, groups, weights, totals, True))


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_compiles_without_graph_breaks(backend):
    def step(x, groups, sizes):
        return pyvtk.merge_tokens(x, groups, num_groups=4, sizes=sizes, backend=backend)

    args = (random((2, 9, 4)), torch.randint(-1, 4, (2, 9)), torch.rand(2, 9))
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(actual, step(*args))


# Wrong calls: (what the message must contain, call).

X, G = torch.zeros(2, 9, 4), torch.zeros(2, 9, dtype=torch.long)
WRONG = {
    "merge_tokens: x must have 3": lambda: pyvtk.merge_tokens(X[0], G),
    "merge_tokens: x must have dtype": lambda: pyvtk.merge_tokens(X.long(), G),
    "merge_tokens: assignment must be": lambda: pyvtk.merge_tokens(X, G[:, :3]),
    "merge_tokens: assignment must have dtype": lambda: pyvtk.merge_tokens(X, G.float()),
    "merge_tokens: weights must be": lambda: pyvtk.merge_tokens(X, G, weights=torch.zeros(9)),
    "merge_tokens: sizes must have dtype": lambda: pyvtk.merge_tokens(X, G, sizes=G),
    "merge_tokens: reduce must be": lambda: pyvtk.merge_tokens(X, G, reduce="max"),
    "merge_tokens: num_groups must be an int": lambda: pyvtk.merge_tokens(X, G, num_groups=1.5),
    "merge_tokens: num_groups must be at least": lambda: pyvtk.merge_tokens(X, G, num_groups=-1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)
