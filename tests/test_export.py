"""What users hold goes through torch.export, saved programs in another process, torch.load, pickle, copies and pytrees.

Weights of sparse24 have tests of their own.
"""

import copy
import io
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.utils._pytree as pytree
from fresh import run
from torch import Tensor, nn
from torch.export import Dim

import pyvtk
from pyvtk import AttentionPlan, ImageSpan, Selection, TokenLayout
from pyvtk.plans import Density


def layout_of(batch: int, tokens: int) -> TokenLayout:
    """An image of 3 x 5 in samples that are one token shorter each time, padded on the left."""
    lengths = [tokens - sample % 3 for sample in range(batch)]
    spans = [ImageSpan(sample, 2, (1, 3, 5)) for sample in range(batch)]
    return TokenLayout.from_images(lengths, spans, padding="left")


def scores_of(batch: int, tokens: int) -> Tensor:
    return torch.linspace(0, 40, batch * tokens).sin().reshape(batch, tokens)


def selection_of(batch: int, tokens: int) -> Selection:
    return pyvtk.select(scores_of(batch, tokens), 5)


def heads_of(batch: int, tokens: int) -> Tensor:
    return torch.linspace(0, 99, batch * 2 * tokens * 8).cos().reshape(batch, 2, tokens, 8)


class TakesSelection(nn.Module):
    def forward(self, selection, x):
        short = pyvtk.compact(selection, x, dim=2)
        return pyvtk.restore(selection, short * 2, x, dim=2), selection.inverse()


class GivesSelection(nn.Module):
    def forward(self, x):
        return pyvtk.score_and_select(x[:, :, -1:], x, 4, causal=True)


class TakesAndGivesSelection(nn.Module):
    def forward(self, selection):
        return selection, selection.complement(40)


class TakesLayout(nn.Module):
    def forward(self, layout, x):
        return pyvtk.neighbor_attention(x, x, x, pyvtk.neighbor_plan(layout, 1)), layout.extent


class GivesLayout(nn.Module):
    def forward(self, layout, x):
        kept = pyvtk.select(x[:, 0, :, 0].contiguous(), 9, candidates=layout.visual, others="keep", capacity=19)
        return layout.take(kept)


class TakesPlan(nn.Module):
    def forward(self, plan, x):
        return pyvtk.neighbor_attention(x, x, x, plan, return_lse=True)


class GivesPlan(nn.Module):
    def forward(self, layout):
        return pyvtk.neighbor_plan(layout, (0, 1, 2), causal_window=True), pyvtk.window_plan(layout, 2)


class TakesAndGivesSpan(nn.Module):
    def forward(self, span, x):
        return ImageSpan(span.batch, x.shape[2], span.grid), x[:, :, span.start : span.start + span.length].sum()


class GivesDensity(nn.Module):
    def forward(self, x):
        return Density(x.shape[2], x.shape[2] * 2, x.shape[2] * 3)


class Case(NamedTuple):
    module: nn.Module
    makers: tuple  # of its arguments, each from batch and tokens
    operators: tuple[str, ...]  # that the program must hold
    fixed_tokens: bool = False  # sizes of a plan follow from tokens by a rule that dynamic shapes cannot express


SPAN = ImageSpan(0, 2, (1, 3, 5))
CASES = {
    "takes Selection": Case(
        TakesSelection(), (selection_of, heads_of), ("compact_forward", "restore", "selection_inverse")
    ),
    "gives Selection": Case(GivesSelection(), (heads_of,), ("score_and_select",)),
    "takes and gives Selection": Case(TakesAndGivesSelection(), (selection_of,), ("selection_complement",)),
    "takes TokenLayout": Case(TakesLayout(), (layout_of, heads_of), ("attention_plan", "neighbor_attention")),
    "gives TokenLayout": Case(GivesLayout(), (layout_of, heads_of), ("select", "compact_forward")),
    "takes AttentionPlan": Case(
        TakesPlan(), (lambda *sizes: pyvtk.neighbor_plan(layout_of(*sizes), 1), heads_of), ("neighbor_attention",), True
    ),
    "gives AttentionPlan": Case(GivesPlan(), (layout_of,), ("attention_plan",)),
    "takes and gives ImageSpan": Case(TakesAndGivesSpan(), (lambda *sizes: SPAN, heads_of), ()),
    "gives Density": Case(GivesDensity(), (heads_of,), ()),
}


def dynamic(value, batch: int, tokens: int, fixed_tokens: bool):
    """Dynamic sizes of an argument: where they are those of the batch and of the tokens. A plan's follow from both."""
    named = {batch: Dim("batch", min=2, max=64), tokens: Dim("tokens", min=20, max=512)}
    if isinstance(value, ImageSpan):
        return pytree.tree_map(lambda leaf: None, value)

    def of(leaf):
        if leaf is None:
            return None
        if fixed_tokens:
            return {0: Dim.AUTO} if leaf is value else dict.fromkeys(range(leaf.dim()), Dim.AUTO)
        return {i: named[size] for i, size in enumerate(leaf.shape) if size in named}

    return of(value) if isinstance(value, Tensor) else [of(leaf) for leaf in pytree.tree_leaves(value)]


def export(case: Case, strict: bool) -> torch.export.ExportedProgram:
    sizes = 6, 25  # which no other dimension has
    arguments = tuple(make(*sizes) for make in case.makers)
    shapes = tuple(dynamic(value, *sizes, case.fixed_tokens) for value in arguments)
    return torch.export.export(case.module, arguments, dynamic_shapes=shapes, strict=strict)


OLD = pytest.mark.skipif(torch.__version__.startswith("2.11"), reason="a strict export fails where it returns None")

# In a process that has imported pyvtk and nothing of this file.
RUN = """
import sys
import torch
import torch.utils._pytree as pytree
import pyvtk

for folder in sys.argv[1:]:
    program = torch.export.load(f"{folder}/program.pt2").module()
    for arguments, expected in torch.load(f"{folder}/calls.pt", weights_only=True):
        leaves, spec = pytree.tree_flatten(program(*arguments))
        wanted, wanted_spec = pytree.tree_flatten(expected)
        assert spec == wanted_spec, (folder, spec, wanted_spec)
        for actual, leaf in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(actual, leaf, rtol=0, atol=0, msg=lambda said: f"{folder}: {said}")
    print(folder, "as in eager")
"""


@pytest.mark.long
@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=OLD)))
def test_saved_programs_run_in_another_process(strict, tmp_path):
    """With other sizes of the batch and, where they may change, other numbers of tokens. One process for all cases."""
    folders = []
    for name, case in CASES.items():
        program = export(case, strict)
        graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
        targets = {str(node.target) for graph in graphs for node in graph.nodes}
        assert {f"pyvtk.{operator}.default" for operator in case.operators} <= targets, name
        folder = tmp_path / name
        folder.mkdir()
        torch.export.save(program, folder / "program.pt2")
        calls = []
        for sizes in ((6, 25), (4, 25)) if case.fixed_tokens else ((6, 25), (4, 25), (3, 32)):
            arguments = tuple(make(*sizes) for make in case.makers)
            calls.append((arguments, case.module(*arguments)))
        torch.save(calls, folder / "calls.pt")
        folders.append(str(folder))
    said = run("-c", RUN, *folders, cwd=tmp_path)
    assert said.count("as in eager") == len(CASES)


def test_a_plan_of_another_rule_is_refused():
    """The rule of a plan is part of the program."""
    case = CASES["takes AttentionPlan"]
    program = export(case, strict=False).module()
    other = pyvtk.neighbor_plan(layout_of(6, 25), 2)
    with pytest.raises((ValueError, RuntimeError), match="tree spec"):
        program(other, heads_of(6, 25))


@pytest.mark.parametrize("strict", (False, pytest.param(True, marks=OLD)))
def test_a_value_that_a_module_holds(strict):
    """Its tensors are constants of the program, and it is itself as before."""

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.selection = pyvtk.select(scores_of(2, 25), 5)

        def forward(self, x):
            return pyvtk.compact(self.selection, x), self.selection.complement(3), self.selection

    module, x = Holds(), scores_of(2, 25)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,), strict=strict), file)
    file.seek(0)
    short, gone, kept = torch.export.load(file).module()(x)
    torch.testing.assert_close(short, x.gather(1, module.selection.indices))
    assert_same(gone, module.selection.complement(3))
    assert_same(kept, module.selection)
    assert all(type(leaf) is Tensor for leaf in pytree.tree_leaves(module.selection) if leaf is not None)


# Values ---------------------------------------------------------------------------------------------------------------

PACKED = TokenLayout.from_images([25, 20], [SPAN, ImageSpan(1, 0, (1, 2, 2))], packed=True)
VALUES = {
    "Selection": selection_of(2, 25),
    "Selection by head": pyvtk.select(heads_of(2, 25)[..., 0].contiguous(), 5, align="right", order="score"),
    "Selection of a packed source": pyvtk.select(
        scores_of(1, 45)[0].contiguous(), 5, cu_seqlens=PACKED.cu_seqlens, capacity=9
    ),
    "TokenLayout": layout_of(2, 25),
    "TokenLayout, packed": PACKED,
    "AttentionPlan": pyvtk.neighbor_plan(layout_of(2, 25), (0, 1, 2), causal_window=True, keys="visual"),
    "AttentionPlan, packed": pyvtk.neighbor_plan(PACKED, 1, cross_image=True),
    "AttentionPlan of a tail": pyvtk.window_plan(layout_of(2, 25), 2).tail(3, 30),
    "AttentionPlan, routed": pyvtk.routed_plan(layout_of(2, 25), 2, torch.zeros(2, 6, 1, dtype=torch.int64)),
    "ImageSpan": SPAN,
    "Density": Density(1, 2, 3),
}


def assert_same(actual, expected) -> None:
    """Of the same class with the same fields, and the same to a pytree."""
    assert type(actual) is type(expected)
    names = expected._fields if isinstance(expected, tuple) else expected.__dataclass_fields__
    for name in names:
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert type(found) is type(wanted), name
        assert torch.equal(found, wanted) if isinstance(wanted, Tensor) else found == wanted, name
    assert pytree.tree_structure(actual) == pytree.tree_structure(expected)


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_fake_tensors(value):
    """Taken apart under a mode that refuses real tensors."""
    from torch._subclasses import FakeTensorMode

    leaves, spec = pytree.tree_flatten(value)
    with FakeTensorMode() as mode:
        fake = pytree.tree_map_only(Tensor, mode.from_tensor, value)
    shapes = [x.shape for x in pytree.tree_leaves(fake) if isinstance(x, Tensor)]
    assert shapes == [x.shape for x in leaves if isinstance(x, Tensor)]
    return pytree.tree_unflatten(leaves, spec)


WAYS = {
    "torch.save": saved_and_loaded,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "tree_map": lambda value: pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value),
    "tree_map_with_path": lambda value: pytree.tree_map_with_path(lambda path, leaf: leaf, value),
    "another kind of leaf and back": lambda value: pytree.tree_map(
        lambda leaf: leaf[0], pytree.tree_map(lambda leaf: [leaf], value), is_leaf=lambda leaf: type(leaf) is list
    ),
    "fake tensors": through_fake_tensors,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", VALUES)
def test_stays_the_same(name, way):
    value = VALUES[name]
    assert_same(WAYS[way](value), value)
    pytree.tree_flatten(value)
    assert_same(WAYS[way](value), value)  # after it was taken apart once, too


@pytest.mark.parametrize("name", VALUES)
def test_context_through_json(name):
    """The types of a context as well: lists and tuples differ."""
    spec = pytree.tree_structure(VALUES[name])
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert again == spec and repr(again) == repr(spec)


@pytest.mark.parametrize("name", VALUES)
def test_leaves_may_be_anything(name):
    """torch puts sizes, numbers and None in the place of tensors, and takes the result apart again."""
    leaves, spec = pytree.tree_flatten(VALUES[name])
    for stand_ins in ([None] * len(leaves), list(range(len(leaves))), [torch.zeros(())] * len(leaves)):
        assert pytree.tree_leaves(pytree.tree_unflatten(stand_ins, spec)) == stand_ins


@pytest.mark.parametrize("name", VALUES)
def test_leaves_have_names(name):
    value = VALUES[name]
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        found = value
        for key in path:
            found = key.get(found)
        assert found is leaf


def test_every_value_class_is_here():
    """What the package exports and torch can take apart."""
    classes = {c for c in vars(pyvtk).values() if isinstance(c, type)}
    assert classes == {AttentionPlan, Selection, TokenLayout, ImageSpan}
    assert classes | {Density} == {type(value) for value in VALUES.values()}
    assert classes <= set(pytree.SUPPORTED_NODES)


def test_batches_are_cut_and_joined():
    """The number of tokens stands behind the batch, so what cuts every leaf along the batch leaves a value."""
    selection = selection_of(4, 25)
    front, back = (pytree.tree_map_only(Tensor, lambda x, i=i: x[i : i + 2], selection) for i in (0, 2))
    assert front.num_tokens == 25 and front.indices.shape[0] == 2
    joined = pytree.tree_map(lambda a, b: None if a is None else torch.cat([a, b]), front, back)
    assert_same(joined, selection)
