"""Tensors without values (meta, fake), symbolic sizes, and factories under another default device."""

import ast

import pytest
import torch
from entry_points import ENTRY_POINTS, WITHOUT, EntryPoint, chosen, names
from fresh import ROOT
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

import pyvtk

every = pytest.mark.parametrize("entry", ENTRY_POINTS, ids=names)


def to_meta(tree):
    return tree_map_only(torch.Tensor, lambda x: x.to("meta"), tree)


def same_facts(actual, expected) -> None:
    """Equal but for values."""
    (actual, structure), (expected, other) = tree_flatten(actual), tree_flatten(expected)
    assert structure == other and len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert (a is None) == (b is None)
        if isinstance(a, torch.Tensor):
            assert a.shape == b.shape and a.dtype == b.dtype


def same_values(actual, expected) -> None:
    same_facts(actual, expected)
    for a, b in zip(tree_leaves(actual), tree_leaves(expected)):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_every_public_function_is_here():
    assert {entry.function for entry in ENTRY_POINTS} == set(pyvtk.__all__) - WITHOUT


@every
def test_meta(entry: EntryPoint):
    inputs = entry.inputs()
    result = entry(*to_meta(inputs))
    assert all(x.is_meta for x in tree_leaves(result) if isinstance(x, torch.Tensor))
    same_facts(result, to_meta(entry(*inputs)))


@every
def test_fake(entry: EntryPoint):
    inputs = entry.inputs()
    with FakeTensorMode() as mode:
        result = entry(*tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    same_facts(result, entry(*inputs))


def leaves_of(entry: EntryPoint) -> tuple[list, EntryPoint]:
    """The tensors of a call, and the call as a function of them."""
    leaves, structure = tree_flatten(entry.inputs())
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors):
        filled = list(leaves)
        for place, tensor in zip(places, tensors):
            filled[place] = tensor
        return tree_leaves(entry(*structure.unflatten(filled)))

    return [leaves[place] for place in places], run


@pytest.mark.parametrize("mode", ("symbolic", "fake", "real"))
@every
def test_make_fx(entry: EntryPoint, mode):
    tensors, run = leaves_of(entry)
    graph = make_fx(run, tracing_mode=mode)(*[x.clone() for x in tensors])
    same_values(graph(*[x.clone() for x in tensors]), run(*[x.clone() for x in tensors]))


@pytest.mark.parametrize("backend", (None, "reference"))
@every
def test_default_device(entry: EntryPoint, backend):
    """Another default device changes nothing for tensors that are given."""
    if backend is not None and not entry.backends:
        pytest.skip("takes no backend")
    inputs = entry.inputs()
    expected = entry(*tree_map_only(torch.Tensor, torch.clone, inputs), backend=backend)
    with torch.device("meta"):
        result = entry(*inputs, backend=backend)
    same_values(result, expected)


def test_default_device_of_a_reference():
    inputs = chosen(), torch.randn(2, 12, 4).to(torch.float8_e4m3fn)
    expected = pyvtk.compact(*inputs, pad_value=2, backend="reference")
    with torch.device("meta"):
        result = pyvtk.compact(*inputs, pad_value=2, backend="reference")
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("packed", (False, True))
def test_layout_of_spans_follows_the_default_device(packed):
    spans = [pyvtk.ImageSpan(0, 1, (1, 2, 2), newline=True)]
    expected = pyvtk.TokenLayout.from_images([9, 4], spans, packed=packed)
    with torch.device("meta"):
        followed = pyvtk.TokenLayout.from_images([9, 4], spans, packed=packed)
        named = pyvtk.TokenLayout.from_images([9, 4], spans, packed=packed, device="cpu")
    assert followed.device.type == "meta" and expected.device.type == "cpu"
    same_facts(followed, to_meta(expected))
    same_values(named, expected)


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_caches_are_compared_where_they_have_memory(backend):
    selection, base = chosen(), torch.randn(3, 2, 12, 4)
    with pytest.raises(ValueError, match="compact_kv_: caches must not share memory"):
        pyvtk.compact_kv_(selection, base[:2], base[1:], backend=backend)
    with pytest.raises(ValueError, match="compact: out must not share memory"):
        pyvtk.compact(selection, base[:2, 0], out=base[:2, 0, :5], backend=backend)


@pytest.mark.parametrize("meta", (True, False))
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, x, a, m: pyvtk.compact(s, x, packed=True), "compact: total must be given for tensors without"),
        (lambda s, x, a, m: pyvtk.merge_tokens(x, a), "merge_tokens: num_groups must be given for tensors without"),
        (lambda s, x, a, m: pyvtk.Selection.from_mask(m, capacity="exact"), "from_mask: capacity must be given for"),
        (lambda s, x, a, m: pyvtk.select(x[..., 0], 2, capacity="exact"), "capacity must be given for tensors"),
    ],
)
def test_sizes_that_only_values_tell(call, message, meta):
    inputs = chosen(), torch.randn(2, 12, 4), torch.zeros(2, 12, dtype=torch.int64), torch.ones(2, 12) > 0
    with pytest.raises(ValueError, match=message):
        if meta:
            call(*to_meta(inputs))
        else:
            with FakeTensorMode() as mode:
                call(*tree_map_only(torch.Tensor, mode.from_tensor, inputs))


FACTORIES = {"arange", "as_tensor", "empty", "empty_strided", "eye", "full", "linspace", "ones", "rand", "randint",
             "randn", "randperm", "tensor", "tril_indices", "zeros"}  # fmt: skip
# Files of the operators; a demo makes its own tensors, and a module's follow the default device as nn.Linear's do.
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("pyvtk", "pyvtk/ops", "pyvtk/reference", "triton_kernels")
    for path in (ROOT / folder).glob("*.py")
    if path.name != "demo.py"
)


@pytest.mark.parametrize("name", FILES)
def test_every_factory_names_its_device(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            assert any(keyword.arg == "device" for keyword in node.keywords), f"{name}:{node.lineno}"
