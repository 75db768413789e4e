"""What holds for every published method: no host synchronisation, whole graphs, all kept, short files, its page."""

import ast
import inspect

import pytest
import torch
from fresh import PACKAGE
from method_batches import batch_of
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import pyvtk
from pyvtk import __main__, methods
from pyvtk.methods import _pages, divprune, fastv, feather, hired, pyramiddrop, snapkv, visionzip, yopo


def tokens():
    """q (one row, three rows, all), k, visual, valid, how many stay, a layout of the same tokens."""
    batch = batch_of("left")
    layout = pyvtk.TokenLayout.from_images(
        [27, 40, 33], [pyvtk.ImageSpan(b, s, (1, n, n)) for b, (s, n) in enumerate(((3, 4), (5, 5), (0, 3)))],
        padding="left",
    )  # fmt: skip
    return batch.last(), batch.last(3), batch.q, batch.k, batch.visual, batch.valid, batch.num_visual, layout


def tower():
    return torch.randn(5, 3, 1, 16), torch.randn(5, 3, 37, 16), torch.randn(5, 36, 8), torch.tensor([0, 2, 5])


def run_fastv(one, three, q, k, visual, valid, count, layout):
    count = fastv.num_keep(count, 0.5)
    return fastv.select(one, k, visual, count, valid=valid, capacity=30), fastv.select(one, k, visual, 3)


def run_pyramiddrop(one, three, q, k, visual, valid, count, layout):
    at = torch.arange(37, 40, device=k.device).expand(3, 3)
    count = pyramiddrop.num_keep(count, 0.5)
    return (
        pyramiddrop.select(three, k, visual, count, valid=valid, capacity=30, q_positions=at, q_mask=at > 37),
        pyramiddrop.select(one, k, visual, 3, valid=valid, align="right"),
    )


def run_feather(one, three, q, k, visual, valid, count, layout):
    lattice, count = feather.lattice(layout), feather.num_keep(count, 0.3)
    first = feather.select(one, k, visual, count, valid=valid, capacity=30, lattice=lattice)
    return first, feather.select(one, k, visual, 3, valid=valid), feather.num_keep(first.counts, 0.7, 2)


def run_yopo(one, three, q, k, visual, valid, count, layout):
    mass = yopo.visual_mass(q, k, visual, valid=valid)
    every = mass[:, None].expand(-1, 5, -1)
    return (
        yopo.plan(layout), mass, yopo.active_heads(every, 0.4), yopo.active_heads(every, share=0.5),
        yopo.drop_visual(visual, valid=valid, capacity=20),
    )  # fmt: skip


def run_snapkv(one, three, q, k, visual, valid, count, layout):
    return (
        snapkv.select(three, k, 16, valid=valid, candidates=visual, num_keep=count),
        snapkv.select(three, k, 12, pool="max"),
    )


def run_divprune(one, three, q, k, visual, valid, count, layout):
    features = k[:, 0]
    some = divprune.select(features, divprune.num_keep(count, 0.3), visual=visual, valid=valid, capacity=25)
    return some, divprune.select(features, 4)


def run_hired(q, k, features, cu_seqlens):
    scores = hired.cls_scores(q, k)
    budgets = hired.budgets(scores, cu_seqlens, 0.2)
    return budgets, hired.select(scores, budgets, capacity=36)


def run_visionzip(q, k, features, cu_seqlens):
    dominant = visionzip.select(q, k, 8)
    targets, assignment = visionzip.contextual(k[:, :, 1:].mean(1), dominant, 4)
    return targets, visionzip.merge(features, targets, assignment), visionzip.kept(dominant, targets)


CASES = {
    "divprune": (run_divprune, tokens),
    "fastv": (run_fastv, tokens),
    "feather": (run_feather, tokens),
    "hired": (run_hired, tower),
    "pyramiddrop": (run_pyramiddrop, tokens),
    "snapkv": (run_snapkv, tokens),
    "visionzip": (run_visionzip, tower),
    "yopo": (run_yopo, tokens),
}
NAMES = pytest.mark.parametrize("name", methods.__all__)


@pytest.fixture(params=sorted(CASES))
def case(request):
    return CASES[request.param]


def test_every_method_is_here():
    assert sorted(CASES) == sorted(methods.__all__)
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py") if not path.stem.startswith("_")}
    assert files == set(methods.__all__)
    for name, (run, _) in CASES.items():
        called = inspect.getsource(run)
        for function in _pages.functions(getattr(methods, name)):
            assert f"{name}.{function}(" in called, f"{name}.{function} is in no case"


def test_nothing_waits_for_the_device(case):
    """Fake tensors have no values: whoever asks for one fails. Shapes, dtypes and facts are those of real ones."""
    run, make = case
    inputs = make()
    real = run(*inputs)
    with FakeTensorMode() as mode:
        fake = run(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, inputs))
    for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(fake), strict=True):
        if a is None:
            assert b is None
        else:
            assert isinstance(b, FakeTensor) and (a.shape, a.dtype) == (b.shape, b.dtype)
    assert pytree.tree_structure(real) == pytree.tree_structure(fake)


def test_results_are_the_same_every_time(case):
    run, make = case
    inputs = make()
    for a, b in zip(pytree.tree_leaves(run(*inputs)), pytree.tree_leaves(run(*inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_cosines_do_not_follow_autocast():
    features, dominant = torch.randn(2, 40, 64), pyvtk.select(torch.rand(2, 40), 9)

    def chosen():
        return divprune.select(features, 20).indices, visionzip.contextual(features, dominant, 6)[1]

    exact = chosen()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (features @ features.mT).dtype == torch.bfloat16
        for a, b in zip(chosen(), exact):
            assert torch.equal(a, b)


@pytest.mark.compile
def test_compiles_whole(case):
    run, make = case
    inputs = make()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(pytree.tree_leaves(run(*inputs)), pytree.tree_leaves(compiled(*inputs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("name", ("fastv", "pyramiddrop", "feather", "divprune", "snapkv"))
def test_all_kept_gives_the_input_back(name, side):
    batch = batch_of(side)
    module, options = getattr(methods, name), {"valid": batch.valid, "align": "right" if side == "left" else "left"}
    if name == "divprune":
        selection = module.select(batch.k[:, 0], 40, visual=batch.visual, **options)
    elif name == "snapkv":
        selection = module.select(batch.last(4), batch.k, 40, valid=batch.valid)
    else:
        selection = module.select(
            batch.last(), batch.k, batch.visual, module.num_keep(batch.num_visual, 1.0), **options
        )
    assert torch.equal(selection.mask(), batch.valid if name != "snapkv" else batch.valid[:, None].expand(-1, 2, -1))
    if name != "snapkv":  # whose rows begin on the left
        kept = pyvtk.compact(selection, batch.k, dim=2)
        assert torch.equal(kept, torch.where(batch.valid[:, None, :, None], batch.k, 0))


@NAMES
def test_file_is_short_and_reaches_the_public_names_alone(name):
    path = PACKAGE / "methods" / f"{name}.py"
    tree = ast.parse(path.read_text())
    documented = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef))]
    strings = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    words = sum(string.end_lineno - string.lineno + 1 for string in strings)
    assert len(path.read_text().splitlines()) - words < 90
    imported = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }  # fmt: skip
    assert imported <= {"__future__", "math", "torch", "pyvtk", "pyvtk.methods._cosine"}
    used = {
        node.attr for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pyvtk"
    }  # fmt: skip
    assert used <= set(pyvtk.__all__)


# ---- python -m pyvtk methods


def test_list_of_methods(capsys):
    assert __main__.main(["methods"]) == 0
    listed = capsys.readouterr().out
    for name in methods.__all__:
        facts = _pages.facts(getattr(methods, name))
        assert "arXiv" in facts["Source"] and "github.com/" in facts["Source"]
        for fact in ("Title", "Summary", "Source", "Acts", "Needs"):
            assert facts[fact] and facts[fact] in listed
    assert "\nfastv   FastV: " in listed


@NAMES
def test_page_of_a_method(name, capsys):
    assert __main__.main(["methods", name]) == 0
    shown = capsys.readouterr().out
    module = getattr(methods, name)
    assert shown.startswith(inspect.getdoc(module))
    for function in _pages.functions(module):
        assert f"\n{name}.{function}(" in shown
    assert "\n    Args:\n" in shown
    for what in ("osition", "Not covered" if name not in ("feather", "divprune", "snapkv", "pyramiddrop") else "code"):
        assert what in shown


def test_page_of_an_unknown_method(capsys):
    assert __main__.main(["methods", "magic"]) == 2
    assert "pyvtk methods: name must be one of divprune, fastv, " in capsys.readouterr().err
