"""Plans: every row has one slot, no visible pair is missed, tables are tight, and nothing waits for the device."""

import io

import attention_oracle as oracle
import pytest
import torch
import torch.utils._pytree as pytree
from attention_cases import BLOCKS, KINDS, LAYOUTS, SPANS, chosen_of, neighbor, random_layouts, routed, routing, window
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout, neighbor_plan, routed_plan, subset_plan, window_plan
from pyvtk.reference.attention import in_rows, visible


def visits(plan, transposed=False):
    """bool [batch, query blocks, key blocks], twice: what is visited, and what is visited as full; of the tables of
    queries, or of keys."""
    blocks, counts = (plan.query_blocks, plan.query_counts) if transposed else (plan.key_blocks, plan.key_counts)
    batch, rows, columns = blocks.shape
    visited = torch.zeros((batch, rows, columns), dtype=torch.bool)
    full = visited.clone()
    for b in range(batch):
        for r in range(rows):
            num_full, num = counts[b, r].tolist()
            listed = blocks[b, r].tolist()
            assert 0 <= num_full <= num <= columns
            assert listed[:num_full] == sorted(set(listed[:num_full])), "full blocks ascend"
            assert listed[num_full:num] == sorted(set(listed[num_full:num])), "partial blocks ascend"
            assert not set(listed[:num_full]) & set(listed[num_full:num]) and listed[num:] == [-1] * (columns - num)
            visited[b, r, listed[:num]] = True
            full[b, r, listed[:num_full]] = True
    return (visited.mT, full.mT) if transposed else (visited, full)


def check(plan, mask):
    """Everything that kernels rely on; ``mask`` is what has to be visible."""
    batch, queries, keys = mask.shape
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in plan.tensors())
    assert (plan.num_queries, plan.num_keys) == (queries, keys) and plan.query_slots.shape[0] == batch
    for slots, rows, block in ((plan.query_slots, queries, 0), (plan.key_slots, keys, 1)):
        size = plan.block[block]
        assert slots.shape[1] == 8 and slots.shape[2] % size == 0
        for b in range(batch):
            row, image, sample = slots[b, 0], slots[b, 1], slots[b, 7]
            assert row[row >= 0].sort().values.tolist() == list(range(rows)), "every row in one slot"
            assert (row >= -1).all() and (image[row < 0] == -2).all() and (image >= -2).all()
            for one in sample.unflatten(0, (-1, size)):
                assert len(set(one[one >= 0].tolist())) <= 1, "blocks hold one sample"
    # The rule and the facts of slots say exactly what is visible.
    by_rows = visible(
        in_rows(plan.query_slots, queries), in_rows(plan.key_slots, keys), plan.rule(), plan.routes[:batch]
    )
    assert torch.equal(by_rows, mask)
    seen = visible(plan.query_slots, plan.key_slots, plan.rule(), plan.routes)
    tiles = seen.unflatten(1, (-1, plan.block[0])).unflatten(3, (-1, plan.block[1]))  # [batch, nq, block, nk, block]
    visited, full = visits(plan)
    assert not (tiles.any(4).any(2) & ~visited).any(), "a visible pair in a block that nobody visits"
    q_valid = (plan.query_slots[:, 1] > -2).unflatten(1, (-1, plan.block[0]))
    everything = (tiles | ~q_valid[:, :, :, None, None]).all(4).all(2)
    assert not (full & ~everything).any(), "a full block with an invisible pair"
    assert not (full & ~q_valid.any(2)[:, :, None]).any()
    transposed, transposed_full = visits(plan, transposed=True)
    assert torch.equal(transposed, visited) and torch.equal(transposed_full, full)
    for order, counts in ((plan.query_order, plan.key_counts), (plan.key_order, plan.query_counts)):
        work = counts[..., 1].flatten()
        assert order.sort().values.tolist() == list(range(work.numel()))
        assert order.tolist() == sorted(range(work.numel()), key=lambda i: (-int(work[i]), i))
    density = plan.density()
    assert density.needed == int(mask.sum()) and density.visited == int(visited.sum()) * plan.block[0] * plan.block[1]
    return visited, full, tiles.any(4).any(2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_plan(name, kind):
    for block in BLOCKS:
        plan, mask = KINDS[kind](LAYOUTS[name], block)
        check(plan, mask)
        assert plan.block == block and plan.packed == LAYOUTS[name].packed


@settings(max_examples=80, deadline=None)
@given(random_layouts(), st.sampled_from(list(KINDS)), st.sampled_from(BLOCKS))
def test_any_layout(layout, kind, block):
    check(*KINDS[kind](layout, block))


@settings(max_examples=40, deadline=None)
@given(
    random_layouts(),
    st.tuples(st.integers(0, 3), st.integers(0, 7), st.integers(0, 7)),
    st.booleans(),
    st.booleans(),
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
)
def test_any_rule(layout, radius, causal_window, cross_image, size):
    check(*neighbor(radius, causal_window=causal_window, cross_image=cross_image)(layout, (16, 32)))
    check(*window(size, radius)(layout, (32, 16)))
    check(*routed(layout, (16, 16), size))


@pytest.mark.parametrize("width", (1, 3, 5))
def test_yopo(width):
    """The published mask, grid 24 x 24 at token 35, by its own formula."""
    layout = TokenLayout.from_images([35 + 576 + 8], [ImageSpan(0, 35, (1, 24, 24))])
    expected = oracle.yopo_mask(24, 35, 8, width)
    plan = neighbor_plan(layout, (width - 1) // 2)
    facts = in_rows(plan.query_slots, layout.num_tokens)
    assert torch.equal(visible(facts, facts, plan.rule(), plan.routes)[0], expected)
    n, h = 24, (width - 1) // 2
    assert int(expected[35:611, 35:611].sum()) == ((2 * h + 1) * n - h * (h + 1)) ** 2
    check(plan, expected[None])


# --- tight ---


@pytest.mark.parametrize("side, radius, needed", [(48, 4, 169744), (24, 2, 12996), (24, 1, 4900)])
def test_tight_on_a_square(side, radius, needed):
    """Blocks of 16 tokens are squares of 4 x 4; up to radius 4 each meets the 3 x 3 around it, clipped at borders."""
    density = neighbor_plan(TokenLayout.from_images([side**2], [ImageSpan(0, 0, (1, side, side))]), radius).density()
    assert density.needed == needed == ((2 * radius + 1) * side - radius * (radius + 1)) ** 2
    assert density.visited == 16 * 16 * (3 * side // 4 - 2) ** 2  # 295936 for 48 x 48
    assert density.dense == side**2 * (side**2 + 1) // 2


@pytest.mark.parametrize("radius, needed", [(1, 66874), (2, 74970), (3, 86310)])
def test_tight_on_llava(radius, needed):
    """36 blocks of the image, then 7 of text, of which the first 3 hold the 35 tokens before the image."""
    density = neighbor_plan(TokenLayout.from_images([675], [ImageSpan(0, 35, (1, 24, 24))]), radius).density()
    assert density.needed == needed and density.dense == 675 * 676 // 2
    image_to_image, image_to_text, text_to_image, text_to_text = (3 * 6 - 2) ** 2, 36 * 3, 5 * 36, 7 * 8 // 2
    assert density.visited == 16 * 16 * (image_to_image + image_to_text + text_to_image + text_to_text)


def test_visits_what_it_must_and_little_else():
    """On a regular grid a block that is visited holds a visible pair, but for few."""
    for grid in ((1, 32, 32), (1, 17, 40), (8, 8, 8)):
        count = grid[0] * grid[1] * grid[2]
        layout = TokenLayout.from_images([count], [ImageSpan(0, 0, grid)])
        for radius in (1, 3):
            visited, _, held = check(*neighbor(radius)(layout, (16, 16)))
            assert held.sum() >= 0.9 * visited.sum()


def test_full_blocks():
    """Text after an image sees all of it: full blocks, that need no comparison of pairs."""
    layout = TokenLayout.from_images([64 + 256 + 64], [ImageSpan(0, 64, (1, 16, 16))])
    _, full, _ = check(*neighbor(1)(layout, (16, 16)))
    # 16 blocks of the image first, then 4 of text before and 4 after it.
    assert full[0, 20:, :20].all() and full[0, :16, 16:20].all() and not full[0, :16, :16].any()
    dense, full, _ = check(*neighbor(100)(layout, (16, 16)))
    assert full[0, :16, :16].all() and not dense[0, 16:20, :16].any()


def test_density_in_words():
    image = TokenLayout.from_images([1024], [ImageSpan(0, 0, (1, 32, 32))])
    text = str(neighbor_plan(image, 1).density())
    assert text.startswith("needs 8836 pairs, visits ") and text.endswith("% of dense causal attention")
    more = neighbor_plan(image, 40).density()
    assert more.needed == more.visited == 1024**2
    assert str(more).endswith("% of dense causal attention; dense causal attention does not see all of these")
    few = neighbor_plan(TokenLayout.from_images([17], [ImageSpan(0, 0, (1, 1, 17))]), 0).density()
    assert few == (17, 512, 153, True) and str(few).endswith("; dense causal attention would visit fewer")
    whole = neighbor_plan(image, 40, text="all").density()
    assert whole == (1024**2, 1024**2, 1024**2, False)
    assert str(whole).endswith("visits 1048576, 100.0% of dense attention")
    assert "0 pairs" in str(neighbor_plan(LAYOUTS["no tokens"], 1).density())


# --- coordinates ---


def test_huge_coordinates():
    """Up to 65535 along every axis, images of any number, positions far apart."""
    generator = torch.Generator().manual_seed(0)
    near = torch.randint(0, 4, (2, 60, 3), generator=generator)
    coords = torch.where(torch.rand(2, 60, 1, generator=generator) < 0.5, 65535 - near, near)
    image = torch.tensor([-7, 0, 3, 2**31 - 1])[torch.randint(4, (2, 60), generator=generator)]
    positions = torch.randint(0, 2**31 - 1, (2, 60), generator=generator)
    layout = TokenLayout(image, coords, positions=positions)
    for kind in ("radius 1", "radius past the grid", "causal window", "cross image", "window", "subset"):
        for block in BLOCKS:
            if kind == "window":
                check(window_plan(layout, 2**20, block=block), oracle.window_mask(layout, 2**20))
            else:
                check(*KINDS[kind](layout, block))


def test_coords_of_text_mean_nothing():
    layout = TokenLayout.from_images([40], [ImageSpan(0, 4, (1, 5, 5))])
    noise = torch.where(layout.visual[..., None], layout.coords, torch.randint(-(2**31), 2**31, (1, 40, 3)))
    noisy = TokenLayout(layout.image_id, noise)
    assert torch.equal(noisy.extent, layout.extent)
    numbers, table = routing(layout)
    for plan, mask in (
        (neighbor_plan(noisy, 1), oracle.neighbor_mask(layout, 1)),
        (window_plan(noisy, 2), oracle.window_mask(layout, 2)),
        (routed_plan(noisy, 2, table), oracle.routed_mask(layout, numbers, table)),
    ):
        check(plan, mask)


# --- tail ---


def grown_mask(layout, extra, **rule):
    """What is visible once ``extra`` tokens of text follow, by the oracle on a longer layout."""
    end = torch.where(layout.valid, layout.positions, -1).amax(1, keepdim=True) if layout.num_tokens else 0
    samples = layout.num_samples
    more = TokenLayout(
        torch.cat([layout.image_id, layout.image_id.new_full((samples, extra), -1)], 1),
        torch.cat([layout.coords, layout.coords.new_zeros((samples, extra, 3))], 1),
        positions=torch.cat([layout.positions, (end + 1 + torch.arange(extra)).expand(samples, extra).int()], 1),
        mask=torch.cat([layout.valid, torch.ones((samples, extra), dtype=torch.bool)], 1),
    )
    return oracle.neighbor_mask(more, 1, **rule)


PADDED = [name for name, layout in LAYOUTS.items() if not layout.packed]


@pytest.mark.parametrize("rule", ({}, {"causal_window": True}, {"keys": "text"}, {"keys": "visual"}), ids=str)
@pytest.mark.parametrize("name", PADDED)
def test_tail(name, rule):
    """Decode (1 query), chunks, and whole sequences: rows of what the grown layout gives."""
    layout = LAYOUTS[name]
    tokens = layout.num_tokens
    for block in BLOCKS:
        plan = neighbor_plan(layout, 1, block=block, **rule)
        for extra in (0, 1, 20):
            mask = grown_mask(layout, extra, **rule)
            for queries in {0, min(1, tokens + extra), (tokens + extra) // 2, tokens + extra}:
                tail = plan.tail(queries, tokens + extra)
                check(tail, mask[:, tokens + extra - queries :])


def test_tail_of_survivors_stands_behind_them():
    """After `take` positions have gaps: what is added is later than the last of them, not at its row's number."""
    layout = TokenLayout.from_images([60], [ImageSpan(0, 5, (1, 5, 5))])
    taken = layout.take(Selection.from_indices(torch.tensor([[0, 7, 50, 59]]), 60, ascending=True))
    tail = neighbor_plan(taken, 1).tail(1, 5)
    check(tail, torch.ones((1, 1, 5), dtype=torch.bool))


@pytest.mark.parametrize("padding", ("right", "left"))
def test_tail_with_lengths(padding):
    """k_lengths rows are in use; behind the last token of a shorter sample there is room for new ones."""
    lengths = [52, 40, 0] if padding == "right" else [52, 40, 9]
    layout = TokenLayout.from_images(lengths, SPANS[:1], padding=padding)
    used = torch.tensor([54, 43, 1] if padding == "right" else [54, 52, 53])
    for queries in (1, 3):
        expected = torch.zeros((3, queries, 60), dtype=torch.bool)
        for b, length in enumerate(lengths):
            first = 0 if padding == "right" else 52 - length
            alone = TokenLayout.from_images([int(used[b]) - first], SPANS[:1] if b == 0 else [])
            dense = oracle.neighbor_mask(alone, 1)[0]
            for i in range(queries):
                row = int(used[b]) - queries + i - first
                if row >= 0:
                    expected[b, i, first : first + dense.shape[1]] = dense[row]
        for block in BLOCKS:
            check(neighbor_plan(layout, 1, block=block).tail(queries, 60, used), expected)


def test_tail_of_other_kinds():
    layout = LAYOUTS["left"]
    for build in (routed, KINDS["subset"], window(2)):
        plan, mask = build(layout, (16, 16))
        for queries in (1, 17, 52):
            check(plan.tail(queries, 52), mask[:, 52 - queries :])
        grown = plan.tail(2, 54)
        valid = layout.valid[:, None]
        if build is KINDS["subset"]:
            valid = (layout.valid & chosen_of(layout, 5).mask())[:, None]
        new = torch.tensor([[True, False], [True, True]]).expand(4, 2, 2)
        check(grown, torch.cat([valid.expand(4, 2, 52), new], 2))


# --- passes through everything ---


def assert_same(actual, expected):
    for a, e in zip(actual.tensors(), expected.tensors()):
        assert torch.equal(a, e)
    assert actual.rule() == expected.rule()
    assert (actual.num_queries, actual.num_keys, actual.packed, actual.added_keys) == (
        expected.num_queries, expected.num_keys, expected.packed, expected.added_keys,
    )  # fmt: skip


def test_pytree_and_saving():
    plan, _ = routed(LAYOUTS["right"], (16, 16))
    leaves, spec = pytree.tree_flatten(plan)
    assert_same(pytree.tree_unflatten(leaves, spec), plan)
    file = io.BytesIO()
    torch.save(plan, file)
    file.seek(0)
    assert_same(torch.load(file), plan)
    paths = [str(path[0]) for path, _ in pytree.tree_flatten_with_path(plan)[0]]
    assert paths[0] == ".query_slots" and paths[-2:] == [".routes", "._row_axes"]


def test_plot():
    pytest.importorskip("matplotlib")
    for plan in (routed(LAYOUTS["packed"], (16, 32))[0], neighbor_plan(LAYOUTS["left"], 1)):
        figure = plan.plot()
        assert len(figure.axes) == 2 and "pairs" in figure._suptitle.get_text()
        in_sequence = figure.axes[0].images[0].get_array()
        assert in_sequence.shape == (plan.num_queries, plan.num_keys)
    assert int(plan.plot(2).axes[0].images[0].get_array().sum()) == int(
        oracle.neighbor_mask(LAYOUTS["left"], 1)[2].sum()
    )


def all_kinds(layout, region, table, selection, keys, chosen=range(9)):
    """One plan of every kind, and tails; or some of them."""
    length = layout.extent[:, 0] * 0 + layout.num_tokens
    kinds = [
        lambda: neighbor_plan(layout, (0, 1, 2), causal_window=True, cross_image=True),
        lambda: neighbor_plan(layout, 1, keys="text", block=(64, 32)),
        lambda: neighbor_plan(layout, 1, keys=keys),
        lambda: window_plan(layout, 3, 1),
        lambda: routed_plan(layout, 2, table),
        lambda: routed_plan(layout, region, table),
        lambda: subset_plan(layout, selection),
        lambda: neighbor_plan(layout, 1).tail(2, layout.num_tokens + 1),
        lambda: window_plan(layout, 3).tail(3, layout.num_tokens + 5, length),
    ]
    return [kinds[i]() for i in chosen if i < 7 or not layout.packed]


def ingredients(name):
    layout = LAYOUTS[name]
    numbers, table = routing(layout)
    region = numbers[0] if layout.packed else numbers
    return layout, region, table, chosen_of(layout, 5), torch.rand(layout.image_id.shape) < 0.5


@pytest.mark.compile
@pytest.mark.parametrize("name, chosen", [("left", (0, 5, 8)), ("left", (2, 6)), ("packed", (1, 3, 4))])
def test_compiles_as_one_graph(name, chosen):
    torch._dynamo.reset()
    arguments = (*ingredients(name), chosen)
    compiled = torch.compile(all_kinds, fullgraph=True, backend="eager")(*arguments)
    for actual, expected in zip(compiled, all_kinds(*arguments), strict=True):
        assert_same(actual, expected)


@pytest.mark.compile
@pytest.mark.parametrize("packed", (False, True))
def test_compiles_at_most_twice_over_lengths(packed):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda layout: neighbor_plan(layout, 1), fullgraph=True, backend=counter)
    for tokens in range(40, 50):
        layout = TokenLayout.from_images([tokens, tokens - 1], [ImageSpan(0, 3, (1, 5, 6))], packed=packed)
        assert_same(compiled(layout), neighbor_plan(layout, 1))
    assert counter.frame_count <= 2


def no_tensors_of_values(*_, **__):
    raise AssertionError("a tensor made of Python values: on CUDA, a copy that the host waits for")


def in_plain_torch(name, backend, tensor, dtype=None):
    """Instead of backends.pick: the way that plans are made on a GPU."""
    return "reference"


@pytest.mark.parametrize("plain", (False, True), ids=("operator", "plain torch"))
@pytest.mark.parametrize("name", ("left", "packed"))
def test_never_waits_for_the_device(name, plain, monkeypatch):
    """Tensors without values: whatever asks for one raises."""
    arguments = ingredients(name)
    if plain:
        monkeypatch.setattr(pyvtk.backends, "pick", in_plain_torch)
    monkeypatch.setattr(torch, "tensor", no_tensors_of_values)
    with FakeTensorMode() as mode:
        fake = all_kinds(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for plan, real in zip(fake, all_kinds(*arguments)):
        assert [x.shape for x in plan.tensors()] == [x.shape for x in real.tensors()]


def test_launches_few_operations(monkeypatch):
    """Plans are made once per forward pass; on a GPU every operation costs microseconds of the host."""
    monkeypatch.setattr(pyvtk.backends, "pick", in_plain_torch)

    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            views = function.is_view or function._schema.name in ("aten::expand", "aten::unbind", "aten::split")
            self.count += not views
            return function(*args, **(kwargs or {}))

    for build, limit in ((neighbor_plan, 270), (window_plan, 290)):
        with Counter() as counter:
            build(LAYOUTS["left"], 2)
        assert counter.count <= limit


# --- wrong calls ---

IMAGE = TokenLayout.from_images([20, 20], [ImageSpan(0, 2, (1, 3, 4))])
PACKED = LAYOUTS["packed"]
TABLE = torch.zeros((2, 4, 1), dtype=torch.int64)
HEADS = Selection.from_mask(torch.ones(2, 3, 20).bool())
WRONG = [
    (TypeError, "neighbor_plan: layout must be a TokenLayout", lambda: neighbor_plan(IMAGE.image_id, 1)),
    (TypeError, "neighbor_plan: radius must be", lambda: neighbor_plan(IMAGE, 1.5)),
    (TypeError, "neighbor_plan: radius must be", lambda: neighbor_plan(IMAGE, (1, 2))),
    (TypeError, "neighbor_plan: radius must be", lambda: neighbor_plan(IMAGE, None)),
    (TypeError, "neighbor_plan: radius must be an int", lambda: neighbor_plan(IMAGE, True)),
    (TypeError, "neighbor_plan: radius must be an int", lambda: neighbor_plan(IMAGE, (1, 2, 2.0))),
    (ValueError, "neighbor_plan: radius must be at least 0", lambda: neighbor_plan(IMAGE, -1)),
    (ValueError, "neighbor_plan: radius must be at least 0", lambda: neighbor_plan(IMAGE, (0, -1, 0))),
    (TypeError, "neighbor_plan: causal_window must be", lambda: neighbor_plan(IMAGE, 1, causal_window=1)),
    (TypeError, "neighbor_plan: cross_image must be", lambda: neighbor_plan(IMAGE, 1, cross_image=None)),
    (ValueError, "neighbor_plan: keys must be one of", lambda: neighbor_plan(IMAGE, 1, keys="images")),
    (ValueError, "neighbor_plan: keys must be one of", lambda: neighbor_plan(IMAGE, 1, keys=None)),
    (TypeError, "neighbor_plan: keys must have dtype bool", lambda: neighbor_plan(IMAGE, 1, keys=IMAGE.image_id)),
    (ValueError, "neighbor_plan: keys must be", lambda: neighbor_plan(IMAGE, 1, keys=IMAGE.visual[0])),
    (ValueError, "neighbor_plan: keys must be on", lambda: neighbor_plan(IMAGE, 1, keys=IMAGE.visual.to("meta"))),
    (TypeError, "neighbor_plan: block must be a pair", lambda: neighbor_plan(IMAGE, 1, block=16)),
    (TypeError, "neighbor_plan: block must be a pair", lambda: neighbor_plan(IMAGE, 1, block=(16, 16, 16))),
    (TypeError, "neighbor_plan: block must be an int", lambda: neighbor_plan(IMAGE, 1, block=(16, 16.0))),
    (ValueError, "neighbor_plan: block must be at least 16", lambda: neighbor_plan(IMAGE, 1, block=(8, 16))),
    (ValueError, "neighbor_plan: block must hold powers", lambda: neighbor_plan(IMAGE, 1, block=(16, 48))),
    (TypeError, "window_plan: layout must be", lambda: window_plan(None, 2)),
    (TypeError, "window_plan: size must be", lambda: window_plan(IMAGE, "2")),
    (ValueError, "window_plan: size must be at least 1", lambda: window_plan(IMAGE, 0)),
    (ValueError, "window_plan: size must be at least 1", lambda: window_plan(IMAGE, (1, 1, 0))),
    (ValueError, "window_plan: shift must be at least 0", lambda: window_plan(IMAGE, 2, -1)),
    (TypeError, "window_plan: shift must be", lambda: window_plan(IMAGE, 2, [1])),
    (TypeError, "window_plan: block must be", lambda: window_plan(IMAGE, 2, block="big")),
    (TypeError, "routed_plan: layout must be", lambda: routed_plan((), 2, TABLE)),
    (TypeError, "routed_plan: table must be a tensor", lambda: routed_plan(IMAGE, 2, [[[0]]])),
    (TypeError, "routed_plan: table must have dtype", lambda: routed_plan(IMAGE, 2, TABLE.float())),
    (ValueError, "routed_plan: table must have 3 dim", lambda: routed_plan(IMAGE, 2, TABLE[0])),
    (ValueError, "routed_plan: table must have 2 samples", lambda: routed_plan(IMAGE, 2, TABLE[:1])),
    (ValueError, "routed_plan: table must be on", lambda: routed_plan(IMAGE, 2, TABLE.to("meta"))),
    (ValueError, "routed_plan: table must hold regions below 4", lambda: routed_plan(IMAGE, 2, TABLE + 4)),
    (ValueError, "routed_plan: region must be at least 1", lambda: routed_plan(IMAGE, 0, TABLE)),
    (TypeError, "routed_plan: region must be", lambda: routed_plan(IMAGE, 2.0, TABLE)),
    (ValueError, "routed_plan: region must be 0 to 3", lambda: routed_plan(IMAGE, 1, TABLE)),
    (ValueError, "routed_plan: region must be 0 to 3", lambda: routed_plan(IMAGE, IMAGE.image_id * 0 - 1, TABLE)),
    (TypeError, "routed_plan: region must have dtype", lambda: routed_plan(IMAGE, IMAGE.visual, TABLE)),
    (ValueError, "routed_plan: region must be", lambda: routed_plan(IMAGE, IMAGE.image_id[0], TABLE)),
    (TypeError, "subset_plan: layout must be", lambda: subset_plan(IMAGE.mask, chosen_of(IMAGE, 0))),
    (TypeError, "subset_plan: selection must be a Selection", lambda: subset_plan(IMAGE, IMAGE.visual)),
    (ValueError, "subset_plan: selection must have no head", lambda: subset_plan(IMAGE, HEADS)),
    (ValueError, "subset_plan: selection must be of 20 padded", lambda: subset_plan(IMAGE, chosen_of(PACKED, 0))),
    (TypeError, "tail: num_queries must be an int", lambda: neighbor_plan(IMAGE, 1).tail(1.0, 20)),
    (ValueError, "tail: num_queries must be at least 0", lambda: neighbor_plan(IMAGE, 1).tail(-1, 20)),
    (ValueError, "tail: num_queries must be at most", lambda: neighbor_plan(IMAGE, 1).tail(22, 21)),
    (ValueError, "tail: num_keys must be at least 20", lambda: neighbor_plan(IMAGE, 1).tail(1, 19)),
    (ValueError, "tail: num_keys must be 20, since keys was a mask",
     lambda: neighbor_plan(IMAGE, 1, keys=IMAGE.visual).tail(1, 21)),
    (ValueError, "tail: plan must be of a padded batch", lambda: neighbor_plan(PACKED, 1).tail(1, 200)),
    (ValueError, "tail: plan must be that of a whole layout", lambda: neighbor_plan(IMAGE, 1).tail(1, 21).tail(1, 22)),
    (TypeError, "tail: k_lengths must be a tensor", lambda: neighbor_plan(IMAGE, 1).tail(1, 20, 20)),
    (TypeError, "tail: k_lengths must have dtype", lambda: neighbor_plan(IMAGE, 1).tail(1, 20, torch.ones(2))),
    (ValueError, "tail: k_lengths must be", lambda: neighbor_plan(IMAGE, 1).tail(1, 20, torch.tensor([20]))),
    (ValueError, "tail: k_lengths must be on",
     lambda: neighbor_plan(IMAGE, 1).tail(1, 20, torch.ones(2, dtype=torch.int32, device="meta"))),
    (ValueError, "tail: k_lengths must be at most the 20 rows",
     lambda: neighbor_plan(IMAGE, 1).tail(1, 20, torch.tensor([20, 21]))),
    (ValueError, "tail: k_lengths must be at most the 20 rows",
     lambda: neighbor_plan(IMAGE, 1).tail(1, 20, torch.tensor([20, -1]))),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[f"{i}-{w[1][:40]}" for i, w in enumerate(WRONG)])
def test_wrong_arguments(number):
    error, message, call = WRONG[number]
    with pytest.raises(error, match=message):
        call()
