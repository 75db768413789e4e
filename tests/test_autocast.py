"""Autocast: products take its dtype, moves and sums never round, and what meets takes the wider dtype."""

import pytest
import torch
from entry_points import ENTRY_POINTS, EntryPoint, layout, names, queries_and_keys
from torch.utils._pytree import tree_leaves, tree_map_only

import pyvtk
from pyvtk import sparse24

BACKENDS = ("compiled", "reference")
HALVES = (torch.bfloat16, torch.float16)
backends = pytest.mark.parametrize("backend", BACKENDS)
halves = pytest.mark.parametrize("dtype", HALVES)

PRODUCTS = {"attention_scores", "score_and_select", "neighbor_attention", "text_attention"}


def is_factor(entry: EntryPoint, x: torch.Tensor) -> bool:
    """Queries, keys and values: what has more than one head and 16 channels."""
    return entry.function in PRODUCTS and x.is_floating_point() and x.dim() >= 3 and x.shape[-1] == 16


def run(entry: EntryPoint, inputs, backend: str) -> list:
    inputs = tree_map_only(torch.Tensor, torch.clone, inputs)
    return tree_leaves(entry(*inputs, backend=backend if entry.backends else None))


def same(actual, expected) -> None:
    for a, b in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@halves
@backends
@pytest.mark.parametrize("entry", ENTRY_POINTS, ids=names)
def test_equals_a_call_with_cast_inputs(entry, backend, dtype):
    inputs = entry.inputs()
    cast = tree_map_only(torch.Tensor, lambda x: x.to(dtype) if is_factor(entry, x) else x, inputs)
    expected = run(entry, cast, backend)
    with torch.autocast("cpu", dtype):
        actual = run(entry, inputs, backend)
        with torch.autocast("cpu", enabled=False):
            inside = run(entry, inputs, backend)
    same(actual, expected)
    same(inside, run(entry, inputs, backend))


@pytest.mark.parametrize("entry", ENTRY_POINTS, ids=names)
def test_double_stays(entry):
    inputs = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, entry.inputs())
    backend = "reference" if entry.backends else None
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(entry, inputs, backend)
    same(actual, run(entry, inputs, backend))


@backends
@halves
def test_scores_of_different_dtypes(backend, dtype):
    """float32 queries of a rotary table, 16-bit keys of a cache."""
    q, k = queries_and_keys()
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for keys in (k.to(dtype), k.to(other)):
        with pytest.raises(TypeError, match="attention_scores: k must have the dtype of q"):
            pyvtk.attention_scores(q, keys, backend=backend)
        with torch.autocast("cpu", dtype):
            scores, lse = pyvtk.attention_scores(q, keys, return_lse=True, backend=backend)
            selection, other_scores = pyvtk.score_and_select(q, keys, 5, return_scores=True, backend=backend)
        same((scores, lse), pyvtk.attention_scores(q.to(dtype), keys.to(dtype), return_lse=True, backend=backend))
        assert scores.dtype == lse.dtype == torch.float32
        same(other_scores, scores)
        same(selection, pyvtk.select(scores, 5))
    with torch.autocast("cpu", dtype), pytest.raises(TypeError, match="attention_scores: k must have the dtype of q"):
        pyvtk.attention_scores(q, k.double(), backend="reference")


@backends
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16),
                                    (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float64)])  # fmt: skip
def test_restore_takes_the_wider_dtype(dtypes, backend):
    selection = pyvtk.select(torch.randn(2, 12), 5)
    update, base = torch.randn(2, 5, 4).to(dtypes[0]), torch.randn(2, 12, 4).to(dtypes[1])
    wide = torch.promote_types(*dtypes)
    for gate in (None, 0.5, torch.rand(2, 5)):
        with pytest.raises(TypeError, match="restore: base must have dtype"):
            pyvtk.restore(selection, update, base, gate=gate, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            actual = pyvtk.restore(selection, update, base, gate=gate, backend=backend)
        same(actual, pyvtk.restore(selection, update.to(wide), base.to(wide), gate=gate, backend=backend))
    numbers = torch.zeros(2, 12, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="restore: base must have dtype"):
        pyvtk.restore(selection, update, numbers, backend=backend)


@backends
def test_merge_attention_takes_the_widest_dtype(backend):
    outs = [torch.randn(2, 4, 3, 16).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    lses = [torch.randn(2, 4, 3) for _ in outs]
    with pytest.raises(TypeError, match=r"outs\[1\] must have the dtype of outs\[0\]"):
        pyvtk.merge_attention(outs, lses, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        actual = pyvtk.merge_attention(outs, lses, backend=backend)
    same(actual, pyvtk.merge_attention([out.float() for out in outs], lses, backend=backend))


def chain(hidden, scores, layers, backend=None):
    """What README.md shows: hidden states, compacted, through layers, and back."""
    selection = pyvtk.select(scores, 5, backend=backend)
    short = pyvtk.compact(selection, hidden, backend=backend)
    return pyvtk.restore(selection, layers(short), hidden, backend=backend)


@halves
@backends
def test_chain_with_gradient(backend, dtype):
    layers = torch.nn.Linear(16, 16)
    hidden, scores = torch.randn(2, 12, 16, requires_grad=True), torch.randn(2, 12)
    with torch.autocast("cpu", dtype):
        out = chain(hidden, scores, layers, backend)
    assert out.dtype == torch.float32
    leaves = (hidden, layers.weight, layers.bias)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    index = scores.topk(5).indices.sort().values[..., None].expand(-1, -1, 16)
    with torch.autocast("cpu", dtype):
        plain = hidden.scatter(1, index, layers(hidden.gather(1, index)).float())
    same(out, plain)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain.square().sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, expected)


@halves
@pytest.mark.parametrize(("backend", "inside"), [("compiled", False), ("compiled", True), ("reference", False)])
def test_gradients_have_the_dtype_of_the_leaves(backend, dtype, inside):
    """Also where backward runs under autocast, of which torch advises against: it rounds the reference's products."""
    q, k = (x.requires_grad_() for x in queries_and_keys(12))
    v = torch.randn(2, 2, 12, 16, requires_grad=True)
    plan = pyvtk.neighbor_plan(layout(), 1)

    def scores(q, k, v):
        scores, lse = pyvtk.attention_scores(q, k, return_lse=True, backend=backend)
        return scores.square().sum() + lse.sum()

    def chosen(q, k, v):
        return pyvtk.score_and_select(q, k, 5, return_scores=True, backend=backend)[1].square().sum()

    def attention(q, k, v):
        out, lse = pyvtk.neighbor_attention(q, k, v, plan, return_lse=True, backend=backend)
        wide = torch.ones_like(out, dtype=torch.float32)
        return pyvtk.merge_attention([out, wide], [lse, lse + 1], backend=backend)[0].square().sum()

    for loss, count in ((scores, 2), (chosen, 2), (attention, 3)):
        leaves = (q, k, v)[:count]
        with torch.autocast("cpu", dtype):
            value = loss(q, k, v)
            gradients = torch.autograd.grad(value, leaves) if inside else None
        gradients = gradients or torch.autograd.grad(value, leaves)
        halves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", dtype):  # outs of merge_attention are of two dtypes
            expected = loss(*halves)
        same(value, expected)
        for gradient, half in zip(gradients, torch.autograd.grad(expected, halves[:count]), strict=True):
            same(gradient, half.float())


@pytest.mark.compile
@backends
def test_compiled_whole(backend):
    layers = torch.nn.Linear(16, 16)
    plan = pyvtk.neighbor_plan(layout(), 1)

    def step(hidden, scores, q, k):
        out = chain(hidden, scores, layers, backend)
        attention = pyvtk.neighbor_attention(q, k, k, plan, backend=backend)
        chosen = pyvtk.score_and_select(q, k, 5, return_scores=True, backend=backend)
        return out, attention, pyvtk.attention_scores(q, k, backend=backend), chosen[1]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    hidden, scores = torch.randn(2, 12, 16, requires_grad=True), torch.randn(2, 12)
    q, k = queries_and_keys(12)
    for dtype in (torch.bfloat16, None, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            actual, expected = compiled(hidden, scores, q, k), step(hidden, scores, q, k)
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b)
        (gradient,) = torch.autograd.grad(actual[0].square().sum(), hidden)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected[0].square().sum(), hidden)[0])


@halves
@backends
def test_sparse_products(backend, dtype):
    """Also where x or mul has autocast's dtype already."""
    weight = torch.randn(12, 16)
    weight24 = sparse24.compress(weight, sparse24.prune(weight))
    x, bias, mul = torch.randn(5, 16), torch.randn(12), torch.randn(5, 12)
    expected = sparse24.linear(x.to(dtype), weight24.to(dtype), bias, "relu", mul.to(dtype), backend=backend)
    for inputs in ((x, mul), (x.to(dtype), mul), (x, mul.to(dtype))):
        with torch.autocast("cpu", dtype):
            same(sparse24.linear(inputs[0], weight24, bias, "relu", inputs[1], backend=backend), expected)
    with torch.autocast("cpu", dtype):
        half_bias = sparse24.linear(x.to(dtype), weight24, bias.to(dtype), backend=backend)
    same(half_bias, sparse24.linear(x.to(dtype), weight24.to(dtype), bias.to(dtype), backend=backend))
    layer = sparse24.Linear24(16, 12)
    with torch.autocast("cpu", dtype):
        y = layer(x)
        torch.testing.assert_close(y, torch.nn.functional.linear(x, layer.masked_weight(), layer.bias))
    assert y.dtype == dtype
    y.float().square().sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", (None, "reference"))
def test_tensors_of_another_device_are_left_alone(backend):
    """Autocast of the CPU says nothing about tensors on the meta device."""
    q, k = (x.to("meta") for x in queries_and_keys())
    with torch.autocast("cpu", torch.bfloat16):
        assert pyvtk.attention_scores(q, k, backend=backend).dtype == torch.float32
