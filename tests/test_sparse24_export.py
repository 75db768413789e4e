"""A Sparse24Weight as input and output of exported programs, and in files: written here, read by another process."""

import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn

from pyvtk import backends, sparse24

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
ROWS = (1, 3, 40)


def weight(dtype=torch.float32, choice=(0, 0, 8, 1)):
    dense = torch.randn(12, 16)
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    weight24 = sparse24.quantize(weight24) if dtype == torch.int8 else weight24.to(dtype)
    weight24.choice = choice
    return weight24


class Product(nn.Module):
    """A weight goes in."""

    def forward(self, weight24, x):
        return sparse24.linear(x, weight24, activation="silu")


class Double(nn.Module):
    """A weight goes in, another comes out, with what stands beside it."""

    def forward(self, weight24, x):
        scales = None if weight24.scales is None else 2 * weight24.scales
        values = 2 * weight24.values if scales is None else weight24.values.clone()
        return {"weight": sparse24.Sparse24Weight(values, weight24.metadata, scales, weight24.choice), "x": x + 1}


class Layer(nn.Module):
    """A weight is held."""

    def __init__(self, weight24):
        super().__init__()
        self.layer = sparse24.Sparse24Linear(weight24, torch.randn(12), "gelu")

    def forward(self, x):
        return self.layer(x)


def in_another_process(code, *arguments):
    """Runs code, which finds the arguments in sys.argv, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


RUN = """
import sys, torch, pyvtk
folder = sys.argv[1]
program = torch.export.load(folder + "/program.pt2").module()
calls = torch.load(folder + "/calls.pt")
torch.save([program(*call) for call in calls], folder + "/results.pt")
"""


def export_and_run(module, calls, dynamic_shapes, folder, strict):
    program = torch.export.export(module, calls[-1], dynamic_shapes=dynamic_shapes, strict=strict)
    torch.export.save(program, folder / "program.pt2")
    torch.save(calls, folder / "calls.pt")
    in_another_process(RUN, folder)
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.int8), ids=str)
def test_as_input(dtype, strict, tmp_path):
    """Of another process, with other numbers of rows, and another weight than that of the export."""
    calls = [(weight(dtype), torch.randn(rows, 16)) for rows in ROWS]
    calls[0][0].cache_dense()  # which stays behind
    results = export_and_run(Product(), calls, ([None, None, None], {0: torch.export.Dim("rows")}), tmp_path, strict)
    for call, result in zip(calls, results):
        torch.testing.assert_close(result, Product()(*call))


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.int8), ids=str)
def test_as_output(dtype, strict, tmp_path):
    calls = [(weight(dtype), torch.randn(rows, 16)) for rows in ROWS]
    results = export_and_run(Double(), calls, ([None, None, None], {0: torch.export.Dim("rows")}), tmp_path, strict)
    for (weight24, x), result in zip(calls, results):
        doubled = result["weight"]
        assert isinstance(doubled, sparse24.Sparse24Weight) and doubled.choice == (0, 0, 8, 1)
        assert isinstance(doubled.choice, tuple)
        assert torch.equal(doubled.decompress(), 2 * weight24.decompress()) and torch.equal(result["x"], x + 1)


@pytest.mark.parametrize("strict", (False, True))
def test_as_state(strict, tmp_path):
    """A dense copy is none of the program's business."""
    module = Layer(weight(choice=(0, 2)))
    calls = [(torch.randn(rows, 16),) for rows in ROWS]
    with torch.no_grad():
        expected = [module(*call) for call in calls]
        assert module.layer.weight24.dense is not None
        results = export_and_run(module, calls, ({0: torch.export.Dim("rows")},), tmp_path, strict)
    torch.testing.assert_close(results, expected)


@pytest.mark.parametrize("module", [Layer(weight(choice=())), sparse24.Linear24(16, 12)], ids=["Layer", "Linear24"])
def test_every_dimension_but_the_last_may_vary(module):
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    program = torch.export.export(module, (torch.randn(2, 3, 16),), dynamic_shapes=(dims,)).module()
    for shape in ((5, 1, 16), (1, 9, 16), (4, 4, 16)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), module(x))


@pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
def test_programs_hold_the_operator():
    """Not the products that it stands for; with choice as it is where there are no copies."""
    for choice, expected in (((0, 0, 8, 1), [0, 0, 8, 1]), ((0, 0, 8, 2), [0, 0, 8, -1])):
        call = (weight(choice=choice), torch.randn(3, 16))
        program = torch.export.export(Product(), call)
        (node,) = [n for n in program.graph.nodes if n.target == torch.ops.pyvtk.sparse24_linear.default]
        assert list(node.args[8]) == expected


def test_tree_spec_survives_json():
    leaves, spec = pytree.tree_flatten((weight(), weight(torch.int8, choice=())))
    again = pytree.treespec_loads(pytree.treespec_dumps(spec))
    assert again == spec
    first, second = pytree.tree_unflatten(leaves, again)
    assert first.choice == (0, 0, 8, 1) and second.choice == () and isinstance(first.choice, tuple)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(weight(torch.int8))[0]]
    assert paths == [".values", ".metadata", ".scales"]
    assert json.loads(pytree.treespec_dumps(spec))[1]["children_spec"][0]["type"] == "pyvtk.sparse24.Sparse24Weight"


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8), ids=str)
def test_torch_load_with_its_default(dtype, tmp_path):
    """weights_only=True, in a process that has imported pyvtk and nothing else."""
    weight24 = weight(dtype)
    weight24.cache_dense()
    torch.save({"layer": weight24}, tmp_path / "weight.pt")
    code = """
    import pickle, sys, torch, pyvtk
    weight24 = torch.load(sys.argv[1])["layer"]
    assert type(weight24) is pyvtk.sparse24.Sparse24Weight and weight24.dense is None, weight24
    pickle.dump((weight24.decompress().float().tolist(), weight24.choice), open(sys.argv[2], "wb"))
    """
    in_another_process(code, tmp_path / "weight.pt", tmp_path / "seen.pkl")
    dense, choice = pickle.loads((tmp_path / "seen.pkl").read_bytes())
    assert torch.equal(torch.tensor(dense), weight24.decompress().float()) and choice == (0, 0, 8, 1)
