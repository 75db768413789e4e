"""Methods that drop between the layers of a language model, against oracles that build the map, sample by sample."""

import math

import pytest
import torch
from method_batches import batch_of, best, rows

import pyvtk
from pyvtk.methods import divprune, fastv, feather, pyramiddrop, yopo

SIDES = pytest.mark.parametrize("side", ("left", "right"))
HEADS = pytest.mark.parametrize("heads", ((4, 4), (4, 2), (7, 1)), ids=str)


def with_text(batch, b, kept):
    """Slots of the sample's text and of these visual tokens, in order."""
    visual = batch.visual_of(b)
    return [slot for i, slot in enumerate(batch.tokens[b]) if i not in visual or i in kept]


# ---- how many


def test_fastv_and_divprune_round_halves_to_even():
    for module in (fastv, divprune):
        assert [module.num_keep(n, 0.5) for n in (1, 3, 5, 7, 576)] == [0, 2, 2, 4, 288]
    assert divprune.num_keep(576, 0.098) == 56


def test_pyramiddrop_and_feather_truncate():
    assert [pyramiddrop.num_keep(576, share) for share in (0.5, 0.25, 0.125)] == [288, 144, 72]
    assert pyramiddrop.num_keep(575, 0.5) == 287
    assert feather.num_keep(576, 0.3) == 172 and feather.num_keep(100, 0.3, 2) == 9
    # as the authors' expression rounds: 0.1 * 0.1 is above 0.01, 0.7 * 0.7 below 0.49
    assert feather.num_keep(100, 0.7, stage=2) == int(100 * (0.7 * 0.7)) == 48
    with pytest.raises(ValueError, match=r"feather.num_keep: stage must be 1 or 2, got 3"):
        feather.num_keep(10, 0.3, 3)


@pytest.mark.parametrize("share", (0.0, 0.098, 0.1, 0.25, 0.29, 0.3, 1 / 3, 0.5, 0.58, 0.7, 1.0))
def test_numbers_of_tensors_are_those_of_ints(share):
    counts = list(range(2000))
    for number in (
        fastv.num_keep, divprune.num_keep, pyramiddrop.num_keep, feather.num_keep,
        lambda n, share: feather.num_keep(n, share, 2),
    ):  # fmt: skip
        of_tensor = number(torch.tensor(counts), share)
        assert of_tensor.dtype == torch.int64 and of_tensor.tolist() == [number(n, share) for n in counts]


# ---- FastV


@HEADS
@SIDES
@pytest.mark.parametrize("align", ("left", "right"))
def test_fastv_keeps_what_the_last_token_looks_at(heads, side, align):
    batch = batch_of(side, *heads)
    count = fastv.num_keep(batch.num_visual, 0.5)
    selection = fastv.select(
        batch.last(), batch.k, batch.visual, count, valid=batch.valid, capacity=28, align=align
    )  # fmt: skip
    assert selection.capacity == 28 and not selection.overflow.any() and selection.align == align
    expected = []
    for b in range(3):
        row = batch.map_of(b)[:, -1].mean(0)
        expected.append(with_text(batch, b, best({i: float(row[i]) for i in batch.visual_of(b)}, int(count[b]))))
    assert rows(selection) == expected


def test_fastv_of_one_number_for_all_and_no_padding():
    batch = batch_of("left", lengths=(30, 30), images=((2, 12), (6, 20)))
    selection = fastv.select(batch.last(), batch.k, batch.visual, 5)
    for b in range(2):
        row = batch.map_of(b)[:, -1].mean(0)
        assert rows(selection)[b] == with_text(batch, b, best({i: float(row[i]) for i in batch.visual_of(b)}, 5))


def test_one_row_per_sample():
    batch = batch_of("left")
    for module in (fastv, feather):
        with pytest.raises(
            ValueError, match=f"{module.__name__[14:]}.select: q must hold one row per sample, got shape"
        ):
            module.select(batch.last(2), batch.k, batch.visual, 5)
    with pytest.raises(ValueError, match=r"pyramiddrop.select: q_positions must be given for several rows"):
        pyramiddrop.select(batch.last(2), batch.k, batch.visual, 5)


# ---- PyramidDrop


@HEADS
@SIDES
def test_pyramiddrop_in_inference(heads, side):
    """Three stages, each a share of the original count; what is left of the first goes into the second."""
    batch = batch_of(side, *heads)
    original = batch.num_visual
    q, k, visual, valid = batch.last(), batch.k, batch.visual, batch.valid
    slots = torch.arange(40).expand(3, 40)
    stays = [list(range(len(numbers))) for numbers in batch.tokens]
    weights = [batch.map_of(b)[:, -1] for b in range(3)]
    for share in (0.5, 0.25, 0.125):
        count = pyramiddrop.num_keep(original, share)
        selection = pyramiddrop.select(q, k, visual, count, valid=valid, align=side)
        expected = []
        for b in range(3):
            # a head's weights over fewer keys are the same, divided by their sum
            score = (weights[b] / weights[b][:, stays[b]].sum(-1, keepdim=True)).mean(0)
            visual_left = {i: float(score[i]) for i in stays[b] if i in batch.visual_of(b)}
            kept = best(visual_left, math.floor(int(original[b]) * share))
            stays[b] = [i for i in stays[b] if i not in visual_left or i in kept]
            expected.append(len(stays[b]))
        assert selection.counts.tolist() == expected
        k, visual, valid, slots = pyvtk.compact(
            selection, k, visual, valid, slots, dim=(2, 1, 1, 1), pad_value=[0, 0, 0, -1]
        )
        left = [[slot for slot in row if slot >= 0] for row in slots.tolist()]
        assert left == [[batch.tokens[b][i] for i in stays[b]] for b in range(3)]


@HEADS
@SIDES
def test_pyramiddrop_in_training(heads, side):
    """The mean over the rows of several turns, each of which sees what stands before it; no row: nothing goes."""
    batch = batch_of(side, *heads)
    turns = [[21, 24], [33, 36, 39], []]  # numbers of the rows among the sample's own tokens
    q = torch.full((3, heads[0], 3, 16), math.nan)
    positions, exists = torch.full((3, 3), 99), torch.zeros(3, 3, dtype=torch.bool)
    for b, numbers in enumerate(turns):
        for m, number in enumerate(numbers):
            slot = batch.tokens[b][number]
            q[b, :, m], positions[b, m], exists[b, m] = batch.q[b, :, slot], slot, True
    count = pyramiddrop.num_keep(batch.num_visual, 0.25)
    selection = pyramiddrop.select(
        q, batch.k, batch.visual, count, valid=batch.valid, q_positions=positions, q_mask=exists
    )
    for b in range(3):
        score = batch.map_of(b)[:, turns[b]].mean((0, 1)) if turns[b] else None
        kept = batch.visual_of(b)
        if turns[b]:
            kept = best({i: float(score[i]) for i in kept}, int(count[b]))
        assert rows(selection)[b] == with_text(batch, b, kept)
    # one number for all samples: the one without rows keeps all as well
    whole = pyramiddrop.select(q, batch.k, batch.visual, 2, valid=batch.valid, q_positions=positions, q_mask=exists)
    assert whole.counts.tolist() == [27 - 16 + 2, 40 - 25 + 2, 33]


# ---- FEATHER


def visual_map(batch, b, among=None):
    """The last row's weights over (these) visual keys alone, head mean, by the token's number."""
    visual = batch.visual_of(b) if among is None else among
    slots = [batch.tokens[b][i] for i in visual]
    q, k = batch.q[b, :, batch.tokens[b][-1]].double(), batch.k[b, :, slots].double()
    z = torch.einsum("hd,hnd->hn", q, k.repeat_interleave(q.shape[0] // k.shape[0], 0)) * q.shape[-1] ** -0.5
    return dict(zip(visual, z.softmax(-1).mean(0).tolist()))


@HEADS
@SIDES
@pytest.mark.parametrize("align", ("left", "right"))
def test_feather_scores_among_visual_keys_and_adds_a_lattice(heads, side, align):
    batch = batch_of(side, *heads)
    sides = (4, 5, 3)  # of the square images
    layout = pyvtk.TokenLayout.from_images(
        [27, 40, 33],
        [pyvtk.ImageSpan(b, start, (1, n, n)) for b, (start, n) in enumerate(zip((3, 5, 0), sides))],
        padding=side,
    )
    lattice = feather.lattice(layout)
    count = feather.num_keep(batch.num_visual, 0.3)
    first = feather.select(
        batch.last(), batch.k, batch.visual, count, valid=batch.valid, lattice=lattice, capacity=30, align=align
    )
    plain = feather.select(batch.last(), batch.k, batch.visual, count, valid=batch.valid, align=align)
    expected_first, expected_plain = [], []
    for b, n in enumerate(sides):
        cells = [batch.visual_of(b)[r * n + c] for r in range(0, n, 3) for c in range(0, n, 3)]
        top = best(visual_map(batch, b), int(n * n * 0.3))
        expected_plain.append(with_text(batch, b, top))
        expected_first.append(with_text(batch, b, sorted({*top, *cells})))
    assert rows(first) == expected_first and first.capacity == 30
    assert rows(plain) == expected_plain and rows(plain) != rows(first)

    # stage 2, of what is left, without protection; the numbers are those of the survivors
    k, visual, valid = pyvtk.compact(first, batch.k, batch.visual, batch.valid, dim=(2, 1, 1))
    left = visual.sum(-1)
    second = feather.select(batch.last(), k, visual, feather.num_keep(left, 0.7, 2), valid=valid)
    both = first.then(second)
    for b in range(3):
        survivors = [i for i in batch.visual_of(b) if batch.tokens[b][i] in expected_first[b]]
        assert len(survivors) == int(left[b])
        kept = best(visual_map(batch, b, survivors), int(len(survivors) * (0.7 * 0.7)))
        assert rows(both)[b] == with_text(batch, b, kept)


def test_lattice_of_several_images_and_of_survivors():
    layout = pyvtk.TokenLayout.from_images(
        [40, 12],
        [pyvtk.ImageSpan(0, 2, (1, 4, 5)), pyvtk.ImageSpan(0, 25, (2, 2, 3)), pyvtk.ImageSpan(1, 0, (1, 3, 3))],
    )
    expected = torch.zeros(2, 40, dtype=torch.bool)
    for y in (0, 2):
        for x in (0, 2, 4):
            expected[0, 2 + 5 * y + x] = True
    for t in (0, 1):
        for x in (0, 2):
            expected[0, 25 + 6 * t + x] = True
    expected[1, [0, 2, 6, 8]] = True
    assert torch.equal(feather.lattice(layout, 2), expected)
    selection = pyvtk.Selection.from_mask(expected | ~layout.visual, capacity=30)
    assert torch.equal(feather.lattice(layout.take(selection), 2), pyvtk.compact(selection, expected))
    with pytest.raises(ValueError, match=r"feather.lattice: stride must be at least 1, got 0"):
        feather.lattice(layout, 0)


# ---- YOPO


def test_yopo_plan_is_a_clipped_window_in_both_directions():
    layout = pyvtk.TokenLayout.from_images([44], [pyvtk.ImageSpan(0, 5, (1, 6, 6))])
    q, k, v = torch.randn(3, 1, 2, 44, 16).unbind()
    seen = torch.ones(44, 44).tril().bool()
    for i in range(36):
        for j in range(36):
            seen[5 + i, 5 + j] = abs(i // 6 - j // 6) <= 2 and abs(i % 6 - j % 6) <= 2
    z = (q.double() @ k.double().mT / 4).masked_fill(~seen, -math.inf)
    out = pyvtk.neighbor_attention(q, k, v, yopo.plan(layout))
    torch.testing.assert_close(out.double(), z.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-6)
    banded = pyvtk.neighbor_attention(q, k, v, yopo.plan(layout, causal_window=True))
    z = z.masked_fill(~torch.ones(44, 44).tril().bool(), -math.inf)
    torch.testing.assert_close(banded.double(), z.softmax(-1) @ v.double(), rtol=1e-5, atol=1e-6)


@HEADS
@SIDES
@pytest.mark.parametrize("form", ("all rows", "last rows", "given rows"))
def test_yopo_visual_mass_is_that_of_the_map(heads, side, form):
    batch = batch_of(side, *heads)
    options, q = {}, batch.q
    counted = [list(range(len(slots))) for slots in batch.tokens]
    if form == "last rows":  # of the axis: under right padding a sample may have none of them
        q = batch.q[:, :, 32:]
        counted = [[i for i, slot in enumerate(slots) if slot >= 32] for slots in batch.tokens]
    elif form == "given rows":
        q = batch.last(2)
        counted = [numbers[-2:] for numbers in counted]
        options["q_positions"] = torch.tensor([slots[-2:] for slots in batch.tokens])
    mass = yopo.visual_mass(q, batch.k, batch.visual, valid=batch.valid, **options)
    expected = []
    for b in range(3):
        columns = batch.map_of(b)[:, counted[b]].sum(1)
        visual = batch.visual_of(b)
        text = [i for i in range(columns.shape[1]) if i not in visual]
        expected.append(columns[:, visual].sum(1) / columns[:, text].sum(1))
    torch.testing.assert_close(mass.double(), torch.stack(expected), rtol=1e-5, atol=1e-6, equal_nan=True)
    if form == "last rows" and side == "right":
        assert mass[0].isnan().all() and not mass[1:].isnan().any()


def test_yopo_visual_mass_without_text_is_infinite():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    assert yopo.visual_mass(q, k, torch.ones(1, 4, dtype=torch.bool)).isinf().all()


@pytest.mark.parametrize("votes", (0.0, 0.29, 0.4, 0.5, 0.99))
@pytest.mark.parametrize("samples", (1, 5, 10))
def test_yopo_heads_are_voted_for(votes, samples):
    mass = torch.rand(samples, 6, 8)
    mass[:, 3] = 0  # a layer may keep none
    mass[0, 4, 0] = math.nan
    mass[0, 5, 0] = math.inf
    active = yopo.active_heads(mass, 0.5, votes=votes)
    expected = [
        [layer < 2 or sum(float(mass[s, layer, h]) > 0.5 for s in range(samples)) > votes * samples for h in range(8)]
        for layer in range(6)
    ]
    assert active.tolist() == expected
    # the share that a threshold gives, asked for, gives the same heads
    late = int(active[2:].sum())
    assert torch.equal(yopo.active_heads(mass, share=late / 32, votes=votes), active)


def test_yopo_heads_of_one_measurement_and_errors():
    mass = torch.rand(4, 6)
    assert torch.equal(yopo.active_heads(mass, 0.3, whole_layers=0), mass > 0.3)
    assert not yopo.active_heads(torch.full((4, 6), 0.5), 0.5, whole_layers=0).any()  # above, not at
    assert yopo.active_heads(mass, share=0.0).sum(1).tolist() == [6, 6, 0, 0]
    assert yopo.active_heads(mass, share=1.0).all()
    assert yopo.active_heads(mass, share=0.5, whole_layers=9).all()
    for arguments, message in (
        ({}, "one of threshold and share must be given, got threshold=None, share=None"),
        ({"threshold": 1.0, "share": 1.0}, "one of threshold and share must be given"),
        ({"threshold": 1.0, "votes": 1.0}, r"votes must be in 0..1 \(exclusive\), got 1.0"),
    ):
        with pytest.raises(ValueError, match=f"yopo.active_heads: {message}"):
            yopo.active_heads(mass, **arguments)
    with pytest.raises(ValueError, match=r"mass must be \[samples, layers, heads\] or \[layers, heads\], got \(6,\)"):
        yopo.active_heads(mass[0], 1.0)


@SIDES
def test_yopo_cut_leaves_the_text(side):
    batch = batch_of(side)
    selection = yopo.drop_visual(batch.visual, valid=batch.valid, capacity=26, align="right")
    assert rows(selection) == [with_text(batch, b, []) for b in range(3)]
    assert yopo.drop_visual(batch.visual).counts.tolist() == [40 - 16, 40 - 25, 40 - 9]
