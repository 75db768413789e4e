"""The operators of layouts: equal to the reference, number for number, and few."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import TokenLayout, neighbor_plan
from pyvtk.reference import layout as reference

IMAGE, VIDEO = 900, 901


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, which lie apart in memory along every axis."""
    wide = x.new_zeros([2 * size for size in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


@st.composite
def ids_and_grids(draw):
    """Arguments of layout_from_ids, wrong ones too: as many placeholders as grids have tokens, or any number."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    merge = draw(st.integers(1, 2))
    side = st.sampled_from([0, 1, 2, 3, 5])
    columns = draw(st.sampled_from([3, 4]))
    rows = [[draw(side), *(draw(side) * merge for _ in range(2)), draw(st.integers(0, 1))][:columns]
            for _ in range(draw(st.integers(0, 4)))]  # fmt: skip
    if draw(st.integers(0, 5)) == 0 and rows:
        rows[-1][draw(st.integers(0, columns - 1))] = draw(st.sampled_from([-1, 3, 2**17, 2**40]))
    grids, grid = torch.tensor(rows, dtype=torch.int64).reshape(-1, columns), []
    sizes = [r[0] * (r[1] // merge) * (r[2] // merge + (r[3] if columns == 4 else 0)) for r in rows]
    if draw(st.booleans()):
        rows = [draw(st.integers(1, 2)), draw(st.integers(1, 3)) * merge, draw(st.integers(1, 3)) * merge]
        grids, grid = None, [*rows, draw(st.integers(0, 1))][:columns]
        sizes = [rows[0] * rows[1] // merge * (rows[2] // merge + (grid[3] if columns == 4 else 0))] * 2
    elif draw(st.booleans()) and all(abs(n) < 2**20 for row in rows for n in row):
        grids = grids.to(torch.int32)
    total = min(sum(max(size, 0) for size in sizes), 200) + draw(st.sampled_from([0, 0, 0, 1]))
    batch = draw(st.integers(1, 3))
    tokens = -(-total // batch) + draw(st.integers(0, 9))
    ids = torch.randint(1, 9, (batch * tokens,), generator=generator)
    places = torch.randperm(batch * tokens, generator=generator)[:total]
    if draw(st.booleans()):  # in a row, so that images stay within samples more often
        places = torch.arange(min(total, batch * tokens))
    ids[places] = torch.tensor([IMAGE, VIDEO])[torch.randint(2, places.shape, generator=generator)]
    cu_seqlens = None
    if draw(st.booleans()):
        ends = torch.randint(0, ids.numel() + 1, (draw(st.integers(0, 3)),), generator=generator).sort().values
        cu_seqlens = torch.cat([torch.zeros(1), ends]).to(torch.int32)
    else:
        ids = ids.reshape(batch, tokens)
    mask = torch.rand(ids.shape, generator=generator) < 0.9 if draw(st.booleans()) else None
    if draw(st.booleans()):
        ids = ids.to(torch.int32)
    if draw(st.booleans()):
        ids, mask, grids = (None if x is None else apart(x) for x in (ids, mask, grids))
    return ids, [IMAGE, VIDEO], grids, grid, merge, mask, cu_seqlens


@settings(max_examples=400, deadline=None)
@given(problem=ids_and_grids())
def test_from_ids_equals_the_reference(problem):
    same(torch.ops.pyvtk.layout_from_ids(*problem), reference.layout_from_ids(*problem))


@st.composite
def mrope_positions(draw):
    """Arguments of layout_from_mrope: any visual tokens, positions that rise and fall."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 2, 17, 60]))
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    positions = torch.randint(0, 6, (draw(st.sampled_from([3, 4])), batch, tokens), generator=generator)
    for wrong in draw(st.sampled_from([(), (), (65541,), (-(2**31), 2**31 - 1), (-(2**63), 2**63 - 1)])):
        if positions.numel() and (dtype == torch.int64 or abs(wrong) <= 2**31):
            positions.view(-1)[int(torch.randint(positions.numel(), (), generator=generator))] = wrong
    visual = torch.rand((batch, tokens), generator=generator) < draw(st.sampled_from([0.3, 0.9, 1.0]))
    mask = torch.rand((batch, tokens), generator=generator) < 0.9 if draw(st.booleans()) else None
    positions = positions.to(dtype)
    if draw(st.booleans()):
        visual, positions, mask = (None if x is None else apart(x) for x in (visual, positions, mask))
    return visual, positions, mask


@settings(max_examples=300, deadline=None)
@given(problem=mrope_positions())
def test_from_mrope_equals_the_reference(problem):
    same(torch.ops.pyvtk.layout_from_mrope(*problem), reference.layout_from_mrope(*problem))


IDS = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, IMAGE, 3, 4]])
GRIDS = torch.tensor([[1, 1, 2], [1, 2, 1]])
STARTS = torch.tensor([0, 4, 8], dtype=torch.int32)


@pytest.mark.parametrize(
    "arguments",
    [
        (IDS, [IMAGE], GRIDS, [], 1, IDS > 0, None),
        (IDS.flatten(), [IMAGE], None, [1, 2, 1], 1, None, STARTS),
    ],
    ids=("a batch", "packed"),
)
def test_registration(arguments):
    torch.library.opcheck(torch.ops.pyvtk.layout_from_ids, arguments)


def test_registration_of_mrope():
    arguments = IDS == IMAGE, torch.arange(8).reshape(2, 4).expand(3, 2, 4), IDS > 0
    torch.library.opcheck(torch.ops.pyvtk.layout_from_mrope, arguments)


def test_nothing_is_looked_for():
    for grids in (GRIDS[:0], GRIDS):
        arguments = IDS, [], grids, [], 1, None, None
        same(torch.ops.pyvtk.layout_from_ids(*arguments), reference.layout_from_ids(*arguments))
    assert not TokenLayout.from_ids(IDS, [], []).visual.any()


def test_a_guard_names_what_is_wrong():
    with pytest.raises(RuntimeError, match="grid has a side of 0 tokens"):
        torch.ops.pyvtk.layout_from_ids(IDS, [IMAGE], None, [1, 0, 2], 1, None, None)
    with pytest.raises(RuntimeError, match="merge is 0"):
        torch.ops.pyvtk.layout_from_ids(IDS, [IMAGE], GRIDS, [], 0, None, None)
    with pytest.raises(RuntimeError, match="position_ids has 2 axes"):
        torch.ops.pyvtk.layout_from_mrope(IDS == IMAGE, torch.zeros(2, 2, 4, dtype=torch.int64), None)


# --- few operators: on a GPU each is a launch, and microseconds of the host ---


class Launches(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that run, views left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        views = function.is_view or name in ("aten::expand", "aten::unbind", "aten::split")
        if not views and name != "prim::device":  # a question of fake tensors
            self.names.append(name)
        return function(*args, **(kwargs or {}))


LAYOUTS = {
    "grids": lambda ids, mask: TokenLayout.from_ids(ids, IMAGE, torch.tensor([[1, 2, 3]] * 2), mask=mask),
    "a list of grids": lambda ids, mask: TokenLayout.from_ids(ids, IMAGE, [(1, 2, 3)] * 2, mask=mask),
    "one grid": lambda ids, mask: TokenLayout.from_ids(ids, (IMAGE, VIDEO), (1, 2, 3), mask=mask),
    "mrope": lambda ids, mask: TokenLayout.from_mrope(ids == IMAGE, torch.ones(3, 2, 8, dtype=torch.int64), mask=mask),
}
PLANS = {
    "radius": lambda layout: neighbor_plan(layout, 1),
    "group": lambda layout: neighbor_plan(layout, 1, keys="visual"),
    "keys": lambda layout: neighbor_plan(layout, 1, keys=layout.image_id < 1),
    "bidirectional": lambda layout: neighbor_plan(layout, 1, text="all"),
    "window": lambda layout: pyvtk.window_plan(layout, 2, 1),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_and_its_plan_are_few_operators(layout, plan):
    ids = torch.tensor([[1, *[IMAGE] * 6, 2], [3, *[IMAGE] * 6, 4]])
    for mask in (None, ids > 0):
        with Launches() as launches:
            PLANS[plan](LAYOUTS[layout](ids, mask))
        assert len(launches.names) <= 10, launches.names
        assert sum(name in ("aten::_local_scalar_dense", "aten::item") for name in launches.names) == 1
        assert {"pyvtk::attention_facts", "pyvtk::attention_plan"} < set(launches.names)


def test_on_a_device_the_check_is_an_assertion():
    """Tensors without values, as a device's are to the host: an assertion in the place of the look at them."""
    with FakeTensorMode() as mode:
        ids, grids = mode.from_tensor(IDS), mode.from_tensor(GRIDS)
        with Launches() as launches:
            neighbor_plan(TokenLayout.from_ids(ids, IMAGE, grids), 1)
    assert launches.names.count("aten::_assert_async") == 1 and len(launches.names) <= 10, launches.names
    assert "aten::_local_scalar_dense" not in launches.names
