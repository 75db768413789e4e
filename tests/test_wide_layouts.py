"""Images, positions, coordinates and lengths beyond int32, and at its edges: the right plan, or an error."""

import pytest
import torch
from attention_oracle import neighbor_mask, window_mask
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout
from pyvtk.reference.attention import in_rows, visible

MOST, LEAST = 2**31 - 1, -(2**31)  # int32
NEVER, FIRST = 2**63 - 1, -(2**63)  # int64


# --- TokenLayout ---


def seen(plan):
    """bool [batch, queries, keys]: what the plan's rule lets see each other, in the order of rows."""
    facts = in_rows(plan.query_slots, plan.num_queries), in_rows(plan.key_slots, plan.num_keys)
    return visible(*facts, plan.rule(), plan.routes)


def shares(plan, backend):
    """The same by attention: keys that a query gives weight to."""
    queries, keys = plan.num_queries, plan.num_keys
    v = torch.eye(keys, 64)[None, None].expand(plan.query_slots.shape[0], 1, keys, 64)
    zeros = torch.zeros_like(v)
    return pyvtk.neighbor_attention(zeros[:, :, :queries], zeros, v, plan, backend=backend)[:, 0, :, :keys] > 0


def check(plan, mask):
    assert torch.equal(seen(plan), mask)
    for backend in ("reference", "compiled"):
        assert torch.equal(shares(plan, backend), mask)


def lines(image, **options):
    """A layout of images of one line, whose tokens stand at x = 0, 1, ..., from the numbers of tokens' images."""
    image = torch.as_tensor(image)
    coords = torch.zeros(*image.shape, 3, dtype=torch.int64)
    coords[..., 2] = torch.arange(image.shape[-1])
    return TokenLayout(image, coords, **options)


WIDE = [[-(2**32), 7, 7 + 2**32, 7, NEVER, 2**32 + 7, -1, FIRST], [0, 2**32, 2**33, NEVER, NEVER - 1, 0, MOST, 2**31]]
NARROW = [[-1, 0, 1, 0, 2, 1, -1, -1], [0, 1, 2, 3, 4, 0, 5, 6]]


def test_images_are_told_apart():
    wide, narrow = lines(WIDE), lines(NARROW)
    assert wide.image_id.tolist() == WIDE  # what the user gave
    assert torch.equal(wide.visual, narrow.visual) and torch.equal(wide.extent, narrow.extent)
    for rule in ({"radius": 9}, {"radius": 1, "cross_image": True}, {"radius": 9, "causal_window": True}):
        check(pyvtk.neighbor_plan(wide, **rule), neighbor_mask(narrow, **rule))
        for keys in ("text", "visual"):
            check(pyvtk.neighbor_plan(wide, keys=keys, **rule), neighbor_mask(narrow, keys=keys, **rule))
    check(pyvtk.window_plan(wide, 3), window_mask(narrow, 3))
    selection = pyvtk.select(torch.rand(2, 8), 5)
    check(pyvtk.neighbor_plan(wide.take(selection), 9), neighbor_mask(narrow.take(selection), 9))
    packed = {"cu_seqlens": torch.tensor([0, 3, 8], dtype=torch.int32)}
    plans = [pyvtk.neighbor_plan(lines(images[1], **packed), 9) for images in (WIDE, NARROW)]
    assert torch.equal(*map(seen, plans))


def test_two_images():
    """Ids that differ by 2**32: each token sees its own image alone."""
    check(pyvtk.neighbor_plan(lines([[5, 2**32 + 5]]), 9), torch.eye(2, dtype=torch.bool)[None])


@pytest.mark.parametrize("extra", (0, 3))
def test_positions_of_a_layout(extra):
    """Any int64; padding may say "never", and what is added stands behind all of them."""
    order = torch.tensor([[0, 2, 3, 1, 4, 5], [1, 0, 2, 2, 6, 6]])
    wide = torch.tensor([[FIRST, 2**31, 2**32, MOST, NEVER - 1, NEVER], [0, -(2**32), 2**32, 2**32, NEVER, NEVER]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    image = [[-1, 0, 0, -1, -1, 0], [-1, 1, 1, -1, -1, -1]]
    found = lines(image, positions=wide, mask=mask)
    assert torch.equal(found.positions, wide)
    expected = lines(image, positions=order, mask=mask)
    plans = [pyvtk.neighbor_plan(layout, 1) for layout in (found, expected)]
    masks = neighbor_mask(expected, 1)
    check(plans[0], masks)
    tails = [plan.tail(2, 6 + extra) for plan in plans]
    assert torch.equal(*map(seen, tails)) and torch.equal(*(shares(tail, "compiled") for tail in tails))
    if extra:
        assert seen(tails[0])[:, -1, 6:].all()
    lengths = torch.tensor([6 + extra, 5])
    tails = [plan.tail(1, 6 + extra, lengths) for plan in plans]
    assert torch.equal(*map(seen, tails)) and seen(tails[0])[1].tolist() == [[*[True] * 5, *[False] * (1 + extra)]]
    subset = Selection.from_indices(torch.tensor([[1, 3, 5], [0, 1, 2]]), 6, ascending=True)
    assert torch.equal(*(seen(pyvtk.subset_plan(layout, subset)) for layout in (found, expected)))


def test_positions_in_int32():
    most = 2**30
    layout = lines([[-1, -1, -1]], positions=torch.tensor([[most, -most, 0]], dtype=torch.int32))
    assert layout.positions.dtype == torch.int32
    expected = torch.tensor([[[1, 1, 1], [0, 1, 0], [0, 1, 1]]], dtype=torch.bool)
    check(pyvtk.neighbor_plan(layout, 1), expected)
    assert seen(pyvtk.neighbor_plan(layout, 1).tail(1, 4)).all()
    for wrong in (LEAST, LEAST + 1, -most - 1, most + 1, MOST):
        positions = torch.tensor([[0, wrong, 1]], dtype=torch.int32)
        with pytest.raises(ValueError, match="TokenLayout: positions must be int64 where they leave"):
            lines([[-1, -1, -1]], positions=positions)
        mask = torch.tensor([[True, False, True]])
        check(pyvtk.neighbor_plan(lines([[-1, -1, -1]], positions=positions, mask=mask), 1),
              torch.tensor([[[1, 0, 0], [0, 0, 0], [1, 0, 1]]], dtype=torch.bool))  # fmt: skip
        check(pyvtk.neighbor_plan(lines([[-1, -1, -1]], positions=positions.long()), 1),
              positions[:, None] <= positions[..., None])  # fmt: skip


@pytest.mark.parametrize("wrong", (-1, 65536, 2**32, 2**32 + 1, NEVER, FIRST, LEAST))
def test_coordinates(wrong):
    coords = torch.zeros(1, 3, 3, dtype=torch.int64)
    coords[0, 1, 1] = wrong
    narrow = [] if not LEAST <= wrong <= MOST else [coords.int()]
    for given in (coords, *narrow):
        with pytest.raises(ValueError, match="TokenLayout: coords must be 0 to 65535 for visual tokens"):
            TokenLayout(torch.zeros(1, 3, dtype=torch.int64), given)
        # of text and of padding they mean nothing
        text = TokenLayout(torch.tensor([[0, -1, 0]]), given)
        assert text.extent.tolist() == [[1, 1, 1]]
        padding = TokenLayout(torch.zeros(1, 3, dtype=torch.int64), given, mask=torch.tensor([[True, False, True]]))
        assert padding.extent.tolist() == [[1, 1, 1]]
        for layout in (text, padding):
            for plan in (pyvtk.neighbor_plan(layout, 2**40), pyvtk.window_plan(layout, 2)):
                check(plan, neighbor_mask(layout, 9))


def test_from_ids():
    ids = torch.tensor([[0, 5, 5]])
    for given, token in ((ids, 2**32), (ids.int(), 2**32), (ids.int(), 2**32 + 5)):
        assert not TokenLayout.from_ids(given, token, []).visual.any()
    with pytest.raises(ValueError, match="from_ids: input_ids must hold as many visual tokens"):
        TokenLayout.from_ids(ids.int(), 2**32 + 5, [(1, 1, 2)])
    wide = TokenLayout.from_ids(torch.tensor([[2**40, 5, 2**40]]), 2**40, [(1, 1, 2)])
    assert wide.image_id.tolist() == [[0, -1, 0]] and wide.coords[0, :, 2].tolist() == [0, 0, 1]
    # sizes whose product is 0 modulo 2**64, and 2 modulo 2**64
    for grid in ((1, 2**32, 2**32), (1, 2**63 - 1, -2), (2**32 + 1, 2, 1), (-1, -2, 1), (1, 65537, 1)):
        for token in (2**40, 5):
            with pytest.raises(ValueError, match="from_ids: grids must be"):
                TokenLayout.from_ids(ids, token, torch.tensor([grid]))


def test_spans():
    with pytest.raises(ValueError, match=r"from_images: images\[0\].grid must be at most 65536 along each axis"):
        TokenLayout.from_images([70000], [ImageSpan(0, 0, (1, 70000, 1))])
    layout = TokenLayout.from_images([65536], [ImageSpan(0, 0, (1, 1, 65536))])
    assert layout.extent.tolist() == [[1, 1, 65536]]
    for span in (ImageSpan(2**32, 0, (1, 1, 1)), ImageSpan(0, 2**32, (1, 1, 1))):
        with pytest.raises(ValueError, match="from_images: "):
            TokenLayout.from_images([9], [span])


@pytest.mark.compile
def test_layouts_in_a_graph():
    """Checks of values are part of a graph, and ask nothing of tensors without values."""

    def run(image, coords, positions):
        layout = TokenLayout(image, coords, positions=positions)
        return pyvtk.neighbor_plan(layout, 9)

    image, coords = torch.tensor([[5, 2**32 + 5]]), torch.zeros(1, 2, 3, dtype=torch.int64)
    for positions in (torch.tensor([[0, NEVER]]), torch.tensor([[0, 1]], dtype=torch.int32)):
        plan = torch.compile(run, fullgraph=True, backend="aot_eager")(image, coords, positions)
        assert torch.equal(seen(plan), torch.eye(2, dtype=torch.bool)[None])
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta")):
            with mode:
                empty = [torch.empty(x.shape, dtype=x.dtype) for x in (image, coords, positions)]
                assert run(*empty).query_slots.shape == (1, 8, 16)
    with pytest.raises(RuntimeError, match="coords must be 0 to 65535"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(image, coords - 1, positions)


# --- plans ---


def test_lengths_of_plans():
    """Radius, windows, regions and shifts past everything, with the remainder that the numbers as given leave."""
    layout = lines([[0, 0, 0, 0, 0, -1, 1, 1]])
    check(pyvtk.neighbor_plan(layout, 2**40), neighbor_mask(layout, 9))
    check(pyvtk.neighbor_plan(layout, NEVER), neighbor_mask(layout, 9))
    check(pyvtk.window_plan(layout, 2**40), window_mask(layout, 2**20))
    for size, shift, size_in_small, shift_in_small in (
        (3, 2**30 + 1, 3, (2**30 + 1) % 3),
        (3, 2**40 + 1, 3, (2**40 + 1) % 3),
        (5, NEVER, 5, NEVER % 5),
        (2**40, 2, 1000, 2),
        (2**40, 2**40 + 2, 1000, 2),
        (2**40, 2**35, 1000, 0),  # what lies before the first whole window is one too
        (2**40, 2**40 - 1, 1000, 0),
        (2**30 + 7, 2**30 + 6, 1000, 0),
    ):
        expected = pyvtk.window_plan(layout, size_in_small, shift_in_small)
        check(pyvtk.window_plan(layout, size, shift), seen(expected))
    table = torch.tensor([[[0, FIRST, -1]]])
    check(pyvtk.routed_plan(layout, 2**40, table), neighbor_mask(layout, 9))
    region = torch.tensor([[0, 0, 1, 1, 0, NEVER, 1, 1]])  # of text: ignored
    small = torch.where(region == NEVER, 0, region)
    two = torch.tensor([[[0, -1], [0, 1]]])
    assert torch.equal(*(seen(pyvtk.routed_plan(layout, regions, two)) for regions in (region, small)))
    for wrong in (2**32, 2**32 + 1, FIRST):
        with pytest.raises(ValueError, match="routed_plan: region must be 0 to 1"):
            pyvtk.routed_plan(layout, torch.where(region == 1, wrong, region), two)
    for wrong in (2**32, NEVER):
        with pytest.raises(ValueError, match="routed_plan: table must hold regions below 2"):
            pyvtk.routed_plan(layout, region, torch.where(two == 1, wrong, two))


@pytest.mark.parametrize("wrong", (2**32, 2**32 + 4, NEVER, FIRST))
def test_lengths_of_caches(wrong):
    plan = pyvtk.neighbor_plan(lines([[0, 0, -1]]), 1)
    with pytest.raises(ValueError, match="tail: k_lengths must be at most the 4 rows of k"):
        plan.tail(1, 4, torch.tensor([wrong]))
