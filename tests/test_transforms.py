"""What torch makes of a call, at every public function and operator: right, or an error; never wrong in silence."""

import inspect

import pytest
import torch
import transforms_probes as probes
from fresh import ROOT
from torch.autograd import forward_ad
from transforms_cases import CASES, SELECTION, WITHOUT_DERIVATIVE

import pyvtk
from pyvtk import backends, sparse24, transforms

OPERATORS = [*backends._compiled_dtypes, *(f"{name}_triton" for name in backends._triton_modules)]


def public_functions() -> set[str]:
    found = {name for name in pyvtk.__all__ if inspect.isfunction(getattr(pyvtk, name))}
    return found | {f"sparse24.{name}" for name in sparse24.__all__ if inspect.isfunction(getattr(sparse24, name))}


def test_every_public_function_has_a_case_or_no_derivative():
    with_case = {name.split()[0] for name in CASES}
    assert with_case.isdisjoint(WITHOUT_DERIVATIVE)
    assert public_functions() == with_case | WITHOUT_DERIVATIVE.keys()


# Of functions whose host looks at values no vmap, and no trace, is to be had.
OF_ALL = (probes.gradient, probes.second_gradient, probes.forward_mode, probes.autocast)
TRACES = (probes.compiled, probes.exported, probes.traced)
OF_TRACED = (probes.vmap, probes.vmap_and_gradient, *TRACES)


@pytest.mark.parametrize(
    ("probe", "name"),
    [
        pytest.param(probe, name, marks=pytest.mark.compile if probe in TRACES else ())
        for name, case in CASES.items()
        for probe in (OF_ALL if case.on_host else OF_ALL + OF_TRACED)
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_probe(probe, name):
    probe(CASES[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.backends[0] == "compiled"])
def test_vmap_over_nothing(name):
    case = CASES[name]
    one = case.flat(*case.tensors())
    none = torch.vmap(case.flat)(*case.tensors(lead=(0,)))
    assert [(x.shape, x.dtype) for x in none] == [((0, *x.shape), x.dtype) for x in one]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.on_host])
def test_vmap_is_refused_where_the_host_looks(name):
    case = CASES[name]
    function = name.split()[0]
    with pytest.raises(RuntimeError, match=f"{function}: .* must not be mapped by torch.vmap"):
        torch.vmap(case.flat)(*case.tensors(lead=(3,)))
    with pytest.raises(RuntimeError, match=f"{function}: .* must not be mapped by torch.vmap"):
        torch.vmap(torch.func.grad(case.total))(*case.tensors(lead=(3,)))


@pytest.mark.compile
@pytest.mark.parametrize("name", probes.CONSTANT)
def test_functions_without_derivative(name):
    for probe in {**probes.COLUMNS_OF_CONSTANT, "traced": probes.traced}.values():
        probe(probes.CONSTANT[name])


@pytest.mark.compile
@pytest.mark.long
def test_the_table_of_the_readme():
    """`python tests/transforms_probes.py` prints it."""
    assert "\n".join(probes.table()) in (ROOT / "README.md").read_text()


# The smallest inputs that were wrong, with what is right -------------------------------------------------------------


def test_a_tangent_moves_with_its_token():
    keep = pyvtk.Selection.from_indices(torch.tensor([[1]]), 2, ascending=True)
    x = torch.tensor([[[1.0], [2.0]]])
    for backend in (None, "reference"):
        move = lambda x, backend=backend: pyvtk.compact(keep, x, backend=backend)  # noqa: E731
        assert torch.func.jvp(move, (x,), (torch.ones_like(x),))[1].flatten().tolist() == [1.0]
        assert torch.func.jacfwd(move)(x).flatten().tolist() == [0.0, 1.0]


def test_the_second_gradient_of_a_gate():
    keep = pyvtk.Selection.from_indices(torch.tensor([[0]]), 1, ascending=True)
    update, gate = torch.ones(1, 1, 1, requires_grad=True), torch.full((1, 1), 3.0, requires_grad=True)
    (grad,) = torch.autograd.grad(pyvtk.restore(keep, update, gate=gate).sum(), update, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), gate)
    assert second.item() == 6.0


def test_the_gradient_of_a_penalty_is_not_zero():
    q, k = (x.requires_grad_() for x in CASES["attention_scores"].tensors())
    (grad,) = torch.autograd.grad(pyvtk.attention_scores(q, k).square().sum(), q, create_graph=True)
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(grad.square().sum(), (q, k)))


def test_vmap_keeps_the_gradient_of_what_it_maps():
    weight = sparse24.compress(torch.eye(4))
    x = torch.ones(3, 4, requires_grad=True)
    torch.vmap(lambda row: sparse24.linear(row, weight))(x).sum().backward()
    assert x.grad.tolist() == [[1.0] * 4] * 3


# Of operators, called directly ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_has_an_answer(name):
    def has(key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvtk::{name}", key)

    schema = getattr(torch.ops.pyvtk, name).default._schema
    assert has("FuncTorchBatched")
    assert has("Autograd") or name.removesuffix("_triton") in LEAN
    assert has("ADInplaceOrView") == schema.is_mutable


# Short forms, and what returns no number: torch itself warns whoever differentiates them.
LEAN = {"select", "select_top", "attention_scores_plain", "score_and_select_top", "compact_forward"}


def operator_arguments(name: str) -> tuple:
    """Arguments of an operator without gradient, and of those that write."""
    x, cache = torch.randn(2, 5, 3), torch.randn(2, 1, 5, 2)
    weight = sparse24.quantize(sparse24.compress(torch.eye(4).repeat(1, 2) * torch.tensor([1.0] * 4 + [0.0] * 4)))
    move = (SELECTION.indices, SELECTION.counts, False, [x], [1], [0], [0.0], None)
    return {
        "compact_out": (*move, [torch.zeros(2, 3, 3)]),
        "compact_kv_": (SELECTION.indices, SELECTION.counts, [cache]),
        "probe_": (torch.zeros(64, dtype=torch.int32),),
        "sparse24_linear_int8": (
            x[0, :, :1].repeat(1, 8),
            weight.values,
            weight.metadata,
            weight.scales,
            None,
            None,
            None,
            "none",
        ),
    }[name.removesuffix("_triton")]


MUTABLE = [name for name in OPERATORS if getattr(torch.ops.pyvtk, name).default._schema.is_mutable]


@pytest.mark.parametrize("name", MUTABLE)
def test_what_is_written_to_changes_its_version(name):
    """Also where there is no kernel to write."""
    op, arguments = getattr(torch.ops.pyvtk, name), operator_arguments(name)
    (place,) = (i for i, a in enumerate(op.default._schema.arguments) if a.alias_info and a.alias_info.is_write)
    written = arguments[place] if isinstance(arguments[place], list) else [arguments[place]]
    before = [x._version for x in written]
    try:
        op(*arguments)
    except (NotImplementedError, RuntimeError) as error:
        assert "kernel" in str(error) or "backend" in str(error) or "Triton" in str(error) or "driver" in str(error)
    assert all(x._version > version for x, version in zip(written, before))


@pytest.mark.parametrize("name", MUTABLE)
def test_tensors_of_inference_mode_are_not_written_to_outside_of_it(name):
    with torch.inference_mode():
        arguments = operator_arguments(name)
    with pytest.raises(RuntimeError, match="inference mode"):
        getattr(torch.ops.pyvtk, name)(*arguments)


@pytest.mark.parametrize("name", ["compact_out", "compact_kv_"])
def test_what_is_written_to_wants_no_gradient(name):
    *others, written = operator_arguments(name)
    with pytest.raises(RuntimeError, match=f"pyvtk::{name} writes to its arguments"):
        getattr(torch.ops.pyvtk, name)(*others, [x.requires_grad_() for x in written])


def cache_and_selection():
    keep = pyvtk.Selection.from_indices(torch.tensor([[1]]), 2, ascending=True)
    return torch.tensor([[1.0], [2.0]]).reshape(1, 1, 2, 1), keep


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_autograd_sees_that_a_cache_was_changed(backend):
    cache, keep = cache_and_selection()
    w = torch.ones((), requires_grad=True)
    y = (w * cache).sum()
    pyvtk.compact_kv_(keep, cache, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_autograd_sees_that_an_out_was_written_to(backend):
    cache, keep = cache_and_selection()
    out = torch.zeros(1, 1, 1, 1)
    w = torch.ones((), requires_grad=True)
    y = (w * out).sum()
    pyvtk.compact(keep, cache, dim=2, out=out, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_caches_of_inference_mode():
    cache, keep = cache_and_selection()
    with torch.inference_mode():
        inside = cache.clone()
        pyvtk.compact_kv_(keep, inside)
        pyvtk.compact_kv_(keep, cache)
    assert inside.flatten().tolist() == cache.flatten().tolist() == [2.0, 2.0]
    assert cache._version > 0
    with pytest.raises(RuntimeError, match="inference mode"):
        pyvtk.compact_kv_(keep, inside)


def test_vmap_of_caches():
    keep = cache_and_selection()[1]
    caches = torch.arange(6.0).reshape(3, 1, 1, 2, 1)
    kept = torch.vmap(lambda cache: pyvtk.compact_kv_(keep, cache))(caches)
    assert kept.flatten().tolist() == [1.0, 3.0, 5.0] and caches.flatten().tolist() == [1.0, 1.0, 3.0, 3.0, 5.0, 5.0]

    def into_one(index):
        return pyvtk.compact_kv_(pyvtk.Selection.from_indices(index, 2, ascending=True), caches[0])

    with pytest.raises(RuntimeError, match="compact_kv_: caches must be mapped by vmap"):
        torch.vmap(into_one)(torch.zeros(3, 1, 1, dtype=torch.int64))


@pytest.mark.compile
def test_a_cache_is_changed_inside_of_a_compiled_function():
    cache, keep = cache_and_selection()

    def step(cache):
        pyvtk.compact_kv_(keep, cache)
        return cache * 1

    assert torch.compile(step, fullgraph=True)(cache).flatten().tolist() == [2.0, 2.0]
    assert cache.flatten().tolist() == [2.0, 2.0]


def test_an_operator_without_gradient_says_so():
    x, *rest = operator_arguments("sparse24_linear_int8")
    out = torch.ops.pyvtk.sparse24_linear_int8(x.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match="pyvtk::sparse24_linear_int8 has no gradient"):
        out.sum().backward()


def test_an_operator_refuses_forward_mode():
    q, k = CASES["attention_scores"].tensors()
    arguments = (q, k, *[None] * 9, False, 0, 5, False, 1.0, "mean", "mean", False, False, False)
    with pytest.raises(RuntimeError, match="pyvtk::attention_scores has no forward-mode derivative"):
        torch.func.jvp(lambda q: torch.ops.pyvtk.attention_scores(q, *arguments[1:])[0], (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode derivative"):
        torch.ops.pyvtk.attention_scores(forward_ad.make_dual(q, q), *arguments[1:])


def test_forward_mode_of_other_tensors_leaves_kernels_alone():
    q, k = CASES["attention_scores"].tensors()
    with forward_ad.dual_level():
        forward_ad.make_dual(k, k)
        assert torch.equal(pyvtk.attention_scores(q, k, backend="compiled"), pyvtk.attention_scores(q, k))


@pytest.mark.parametrize("name", ["attention_scores", "restore gate", "neighbor_attention", "compact"])
def test_transforms_within_each_other(name):
    """Third derivatives, and all that are made of reverse and forward mode."""
    case = CASES[name]
    tensors = case.tensors(torch.float64)
    x, others = tensors[0], tensors[1:]

    def total(x, backend=None):
        return case.total(x, *others, backend=backend).sin()

    def function(backend):
        return lambda x: total(x, backend)

    kernels, reference = (function(backend) for backend in (None, "reference"))
    x, others = x.float(), [y.float() for y in others]
    expected = torch.func.hessian(reference)(x)
    for twice in (
        torch.func.hessian(kernels),
        torch.func.jacrev(torch.func.jacrev(kernels)),
        torch.func.jacfwd(torch.func.jacfwd(kernels)),
        torch.func.jacrev(torch.func.jacfwd(kernels)),
    ):
        torch.testing.assert_close(twice(x), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    direction = torch.ones_like(x)

    def third(function):
        def twice(x):
            once = torch.func.grad(lambda x: (torch.func.grad(function)(x) * direction).sum())
            return (once(x) * direction).sum()

        return torch.func.grad(twice)(x)

    expected = third(reference)
    torch.testing.assert_close(third(kernels), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_wants_gradient_sees_through_wrappers():
    seen = []

    def look(x):
        seen.append(transforms.wants_gradient(x))
        return x.sum()

    vmap, grad, jvp = torch.vmap, torch.func.grad, torch.func.jvp
    x, leaf = torch.randn(3), torch.randn(3, requires_grad=True)
    for f, argument, expected in (
        (look, x, False), (look, leaf, True), (vmap(look), x[:, None], False), (vmap(look), leaf[:, None], True),
        (grad(look), x, True), (vmap(grad(look)), x[:, None], True),
        (grad(lambda x: vmap(look)(x[:, None]).sum()), x, True), (lambda x: jvp(look, (x,), (x,)), x, True),
        (lambda x: vmap(lambda x: jvp(look, (x,), (x,)))(x[:, None]), x, True),
        (lambda x: jvp(lambda _: look(x), (torch.ones(()),), (torch.ones(()),)), x, False),
        (lambda x: jvp(grad(look), (x,), (x,)), x, True),
    ):  # fmt: skip
        f(argument)
        assert seen.pop() == expected
    with torch.no_grad():
        assert not transforms.wants_gradient(leaf)
        vmap(look)(leaf[:, None])
        assert not seen.pop()
        with forward_ad.dual_level():
            assert transforms.wants_gradient(forward_ad.make_dual(x, x)) and not transforms.wants_gradient(x)
    assert not transforms.wants_gradient(None)


SELECTING = {
    "rows": lambda x, mask, number: pyvtk.select(x, number.abs().long(), keep=mask > 0, drop=mask < -1, capacity=4),
    "heads": lambda x, mask, number: pyvtk.select(x[:, None].expand(-1, 2, -1), threshold=number, candidates=mask > 0),
    "segments": lambda x, mask, number: pyvtk.select(
        x, top_p=number.abs().clamp(max=1), segments=(mask > 0).int(), num_segments=2, capacity=6, align="right"
    ),
    "packed": lambda x, mask, number: pyvtk.select(
        x[0], 2, keep=mask[0] > 1, cu_seqlens=torch.tensor([0, 2, 6], dtype=torch.int32), order="score"
    ),
    "scores": lambda x, mask, number: pyvtk.score_and_select(
        x[:, None, None, :1].expand(-1, 2, 1, 8).contiguous(), x[:, None, :, None].expand(-1, 1, -1, 8).contiguous(),
        k_mask=mask < 1, num_keep=number.abs().long() + 1, capacity=3, causal=True, k_positions=mask.long(),
        q_positions=number[:, None].long(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SELECTING)
def test_vmap_of_selections(name):
    """With masks, numbers for each row, segments: mapped together, and each of them alone."""
    tensors = [torch.randn(3, 2, 6), torch.randn(3, 2, 6), 2 * torch.randn(3, 2)]

    def chosen(x, mask, number):
        selection = SELECTING[name](x, mask, number)
        return selection.indices, selection.counts, selection.overflow

    for in_dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)):
        given = [x if dim == 0 else x[0] for x, dim in zip(tensors, in_dims)]
        each = [chosen(*[x[i] if dim == 0 else x for x, dim in zip(given, in_dims)]) for i in range(3)]
        found = torch.vmap(chosen, in_dims)(*given)
        assert all(torch.equal(a, torch.stack(b)) for a, b in zip(found, zip(*each)))
