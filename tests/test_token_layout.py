"""TokenLayout: from spans, from ids, from tensors; what survives a selection; and that nothing waits for the device."""

import io
import itertools
import random

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout

FIELDS = ("image_id", "coords", "positions", "mask", "cu_seqlens", "extent")
IMAGE, VIDEO = 900, 901


def assert_same(actual, expected):
    for name in FIELDS:
        a, e = getattr(actual, name), getattr(expected, name)
        if e is None:
            assert a is None, name
        else:
            assert a.dtype == e.dtype and torch.equal(a, e), name


def listed(layout):
    """What every sample holds, as Python values: (image, t, y, x) per valid token; text is (-1, 0, 0, 0)."""
    image, coords = layout.image_id, layout.coords
    if layout.cu_seqlens is not None:
        ends = layout.cu_seqlens.tolist()
        slices = [(image[a:b], coords[a:b], layout.valid[a:b]) for a, b in itertools.pairwise(ends)]
    else:
        slices = list(zip(image, coords, layout.valid))
    samples = []
    for images, places, valid in slices:
        rows = [(i, *c) if i >= 0 else (-1, 0, 0, 0) for i, c in zip(images.tolist(), places.tolist())]
        samples.append([row for row, is_valid in zip(rows, valid.tolist()) if is_valid])
    return samples


def counted(lengths, spans):
    """The same, counted by loops over the spans."""
    samples = [[(-1, 0, 0, 0)] * length for length in lengths]
    numbers = [0] * len(lengths)
    for batch, start, (t, h, w), newline in sorted(spans, key=lambda span: span[1]):
        token = start
        for i in range(t):
            for j in range(h):
                for k in range(w):
                    samples[batch][token] = (numbers[batch], i, j, k)
                    token += 1
                token += newline
        numbers[batch] += 1
    return samples


LENGTHS = [40, 23, 31, 0]
SPANS = [
    ImageSpan(0, 20, (1, 4, 3), newline=True),  # not in the order of the sequence
    ImageSpan(0, 2, (1, 2, 5)),
    ImageSpan(2, 0, (3, 2, 4)),  # a video, at the very beginning
    ImageSpan(2, 24, (1, 1, 7)),  # right behind it, to the end
]


@pytest.mark.parametrize("form", ("right", "left", "packed"))
def test_from_images(form):
    layout = TokenLayout.from_images(
        LENGTHS, SPANS, padding="left" if form == "left" else "right", packed=form == "packed"
    )
    assert listed(layout) == counted(LENGTHS, SPANS)
    assert layout.num_samples == 4 and layout.packed == (form == "packed")
    assert layout.extent.tolist() == [[1, 4, 5], [0, 0, 0], [3, 2, 7], [0, 0, 0]]
    assert layout.image_id.dtype == layout.coords.dtype == layout.positions.dtype == torch.int32
    if form == "packed":
        assert layout.num_tokens == 94 and layout.cu_seqlens.tolist() == [0, 40, 63, 94, 94] and layout.mask is None
        assert layout.sample.tolist() == [0] * 40 + [1] * 23 + [2] * 31
    else:
        assert layout.num_tokens == 40
        place = torch.arange(40)
        lengths = torch.tensor(LENGTHS)[:, None]
        assert torch.equal(layout.mask, place < lengths if form == "right" else place >= 40 - lengths)
    assert torch.equal(layout.visual, layout.valid & (layout.image_id >= 0))
    assert layout.positions.flatten()[:3].tolist() == [0, 1, 2]


def test_from_images_edges():
    whole = TokenLayout.from_images([7, 7], [ImageSpan(1, 0, (1, 1, 7))])
    assert whole.mask is None and whole.valid.all()
    none = TokenLayout.from_images([], [])
    assert none.image_id.shape == (0, 0) and none.extent.shape == (0, 3)
    assert TokenLayout.from_images([], packed=True).cu_seqlens.tolist() == [0]
    empty = TokenLayout.from_images([0, 0])
    assert empty.image_id.shape == (2, 0) and empty.extent.tolist() == [[0] * 3] * 2
    packed = TokenLayout.from_images([0, 5, 0], [(1, 1, (1, 2, 2))], packed=True)  # a plain tuple will do
    assert listed(packed) == counted([0, 5, 0], [ImageSpan(1, 1, (1, 2, 2))])
    meta = TokenLayout.from_images(LENGTHS, SPANS, device="meta")
    assert meta.device.type == "meta" and meta.extent.shape == (4, 3)
    assert ImageSpan(0, 0, (2, 3, 4), True).length == 30


@st.composite
def sequences(draw):
    """(lengths, spans): samples of text and images one after the other."""
    lengths, spans = [], []
    for batch in range(draw(st.integers(0, 3))):
        length = draw(st.integers(0, 4))
        for _ in range(draw(st.integers(0, 3))):
            grid = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
            span = ImageSpan(batch, length, grid, draw(st.booleans()))
            spans.append(span)
            length += span.length + draw(st.integers(0, 3))
        lengths.append(length)
    return lengths, draw(st.permutations(spans))


@settings(max_examples=60, deadline=None)
@given(sequences(), st.sampled_from(("right", "left", "packed")))
def test_any_spans(sequence, form):
    lengths, spans = sequence
    layout = TokenLayout.from_images(
        lengths, spans, padding="left" if form == "left" else "right", packed=form == "packed"
    )
    assert listed(layout) == counted(lengths, spans)


# --- from_ids ---


def ids_of(layout, visual_ids):
    """Token ids that a model would see for a layout: ids of placeholders by image, in turn; text 1, 2, ..."""
    text = torch.arange(1, 1 + layout.image_id.numel()).reshape(layout.image_id.shape)
    placeholder = torch.tensor(visual_ids)[layout.image_id.clamp(min=0).long() % len(visual_ids)]
    return torch.where(layout.visual, placeholder, text)


def renumbered(layout):
    """The layout with its images numbered over the whole batch, by sample and then by start, as from_ids does."""
    image, base = layout.image_id.clone(), 0
    ends = layout.cu_seqlens.tolist() if layout.packed else None
    samples = [image[a:b] for a, b in itertools.pairwise(ends)] if layout.packed else list(image)
    for sample in samples:
        images = int(sample.max()) + 1 if sample.numel() else 0
        sample[sample >= 0] += base
        base += max(images, 0)
    return TokenLayout(image, layout.coords, positions=layout.positions, mask=layout.mask, cu_seqlens=layout.cu_seqlens)


@settings(max_examples=60, deadline=None)
@given(sequences(), st.sampled_from(("right", "left", "packed")), st.integers(1, 3), st.booleans())
def test_from_ids_equals_from_images(sequence, form, merge, as_tensor):
    lengths, spans = sequence
    expected = TokenLayout.from_images(
        lengths, spans, padding="left" if form == "left" else "right", packed=form == "packed"
    )
    ids = ids_of(expected, (IMAGE, VIDEO))
    if expected.mask is not None:
        ids = ids.masked_fill(~expected.mask, IMAGE)  # padding may look like an image
    grids = [(t, h * merge, w * merge) for _, _, (t, h, w), _ in sorted(spans, key=lambda s: (s.batch, s.start))]
    if as_tensor:
        grids = torch.tensor(grids, dtype=torch.int32).reshape(-1, 3)
    actual = TokenLayout.from_ids(
        ids, (IMAGE, VIDEO), grids, merge=merge, mask=expected.mask, cu_seqlens=expected.cu_seqlens
    )
    assert_same(actual, renumbered(expected))


def test_from_ids_of_one_image_token():
    ids = torch.tensor([[5, IMAGE, IMAGE, IMAGE, IMAGE, 6]], dtype=torch.int32)
    layout = TokenLayout.from_ids(ids, IMAGE, [(1, 4, 4)], merge=2)
    assert listed(layout) == counted([6], [ImageSpan(0, 1, (1, 2, 2))])
    assert listed(TokenLayout.from_ids(ids, [7], [])) == [[(-1, 0, 0, 0)] * 6]
    assert TokenLayout.from_ids(ids[:, :0], IMAGE, []).num_tokens == 0


IDS = torch.tensor([[1, IMAGE, IMAGE, 2], [IMAGE, IMAGE, 3, 4]])
PACKED_IDS = IDS.flatten()
CU = torch.tensor([0, 4, 8], dtype=torch.int32)
LINES = [(1, 1, 2), (1, 1, 2)]
TEXT = torch.full((2, 4), -1)
PLACES = torch.zeros(2, 4, 3, dtype=torch.int64)
WRONG = [
    # constructor
    (TypeError, "TokenLayout: image_id must be a tensor, got list", lambda: TokenLayout([0], PLACES)),
    (TypeError, "TokenLayout: image_id must have dtype", lambda: TokenLayout(TEXT.float(), PLACES)),
    (ValueError, "TokenLayout: image_id must have 2 dim", lambda: TokenLayout(TEXT[0], PLACES[0])),
    (ValueError, "TokenLayout: image_id must have 1 dim", lambda: TokenLayout(TEXT, PLACES, cu_seqlens=CU)),
    (TypeError, "TokenLayout: coords must be a tensor", lambda: TokenLayout(TEXT, None)),
    (TypeError, "TokenLayout: coords must have dtype", lambda: TokenLayout(TEXT, PLACES.float())),
    (ValueError, r"TokenLayout: coords must be \[batch, tokens, 3\]", lambda: TokenLayout(TEXT, PLACES[..., :2])),
    (ValueError, "TokenLayout: coords must be on the device", lambda: TokenLayout(TEXT, PLACES.to("meta"))),
    (TypeError, "TokenLayout: positions must be a tensor", lambda: TokenLayout(TEXT, PLACES, positions=[0])),
    (TypeError, "TokenLayout: positions must have dtype", lambda: TokenLayout(TEXT, PLACES, positions=TEXT.float())),
    (ValueError, "TokenLayout: positions must be", lambda: TokenLayout(TEXT, PLACES, positions=TEXT[:1])),
    (ValueError, "TokenLayout: positions must be on", lambda: TokenLayout(TEXT, PLACES, positions=TEXT.to("meta"))),
    (TypeError, "TokenLayout: mask must have dtype bool", lambda: TokenLayout(TEXT, PLACES, mask=TEXT)),
    (ValueError, "TokenLayout: mask must be", lambda: TokenLayout(TEXT, PLACES, mask=TEXT[0] < 0)),
    (TypeError, "TokenLayout: mask must be a tensor", lambda: TokenLayout(TEXT, PLACES, mask=True)),
    (TypeError, "TokenLayout: cu_seqlens must have dtype int32",
     lambda: TokenLayout(TEXT[0], PLACES[0], cu_seqlens=CU.long())),
    (TypeError, "TokenLayout: cu_seqlens must be a tensor", lambda: TokenLayout(TEXT[0], PLACES[0], cu_seqlens=[0, 4])),
    (ValueError, "TokenLayout: cu_seqlens must have", lambda: TokenLayout(TEXT[0], PLACES[0], cu_seqlens=CU[:0])),
    (ValueError, "TokenLayout: cu_seqlens must have", lambda: TokenLayout(TEXT[0], PLACES[0], cu_seqlens=CU[None])),
    (ValueError, "TokenLayout: cu_seqlens must be on",
     lambda: TokenLayout(TEXT[0], PLACES[0], cu_seqlens=CU.to("meta"))),
    # from_images
    (ValueError, "from_images: the image at token 3 of sample 0 overlaps",
     lambda: TokenLayout.from_images([9], [(0, 0, (1, 2, 2)), (0, 3, (1, 1, 1))])),
    (ValueError, "from_images: the image at token 4 of sample 0 overlaps",  # the newline belongs to the image
     lambda: TokenLayout.from_images([9], [(0, 4, (1, 1, 1)), (0, 0, (1, 1, 4), True)])),
    (ValueError, r"from_images: images\[0\] covers tokens 6 to 10",
     lambda: TokenLayout.from_images([9], [(0, 6, (1, 2, 2))])),
    (ValueError, r"from_images: images\[0\] is of sample 1", lambda: TokenLayout.from_images([9], [(1, 0, (1, 1, 1))])),
    (ValueError, r"from_images: images\[0\].batch must be", lambda: TokenLayout.from_images([9], [(-1, 0, (1, 1, 1))])),
    (ValueError, r"from_images: images\[0\].start must be", lambda: TokenLayout.from_images([9], [(0, -1, (1, 1, 1))])),
    (ValueError, r"from_images: images\[0\].t must be", lambda: TokenLayout.from_images([9], [(0, 0, (0, 1, 1))])),
    (ValueError, r"from_images: images\[0\].h must be", lambda: TokenLayout.from_images([9], [(0, 0, (1, 0, 1))])),
    (ValueError, r"from_images: images\[0\].w must be", lambda: TokenLayout.from_images([9], [(0, 0, (1, 1, -2))])),
    (TypeError, r"from_images: images\[0\].w must be an int",
     lambda: TokenLayout.from_images([9], [(0, 0, (1, 1, 2.0))])),
    (TypeError, r"from_images: images\[0\] must be ImageSpan", lambda: TokenLayout.from_images([9], [(0, 0, (2, 2))])),
    (TypeError, r"from_images: images\[0\] must be ImageSpan", lambda: TokenLayout.from_images([9], [7])),
    (TypeError, r"from_images: images\[0\].newline must be",
     lambda: TokenLayout.from_images([9], [(0, 0, (1, 1, 1), 1)])),
    (TypeError, r"from_images: lengths\[1\] must be an int", lambda: TokenLayout.from_images([9, 2.5])),
    (ValueError, r"from_images: lengths\[0\] must be", lambda: TokenLayout.from_images([-1])),
    (TypeError, "from_images: lengths must be", lambda: TokenLayout.from_images(9)),
    (ValueError, "from_images: padding must be one of", lambda: TokenLayout.from_images([9], padding="both")),
    (TypeError, "from_images: packed must be", lambda: TokenLayout.from_images([9], packed="yes")),
    # from_ids
    (TypeError, "from_ids: input_ids must be a tensor", lambda: TokenLayout.from_ids([1], IMAGE, LINES)),
    (TypeError, "from_ids: input_ids must have dtype", lambda: TokenLayout.from_ids(IDS.float(), IMAGE, LINES)),
    (ValueError, "from_ids: input_ids must have", lambda: TokenLayout.from_ids(IDS[0], IMAGE, LINES)),
    (ValueError, "from_ids: input_ids must have", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, cu_seqlens=CU)),
    (TypeError, "from_ids: image_token_id must be an int", lambda: TokenLayout.from_ids(IDS, 1.5, LINES)),
    (TypeError, "from_ids: image_token_id must be an int", lambda: TokenLayout.from_ids(IDS, None, LINES)),
    (TypeError, "from_ids: image_token_id must be an int", lambda: TokenLayout.from_ids(IDS, [IMAGE, "x"], LINES)),
    (TypeError, "from_ids: merge must be an int", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, merge=2.0)),
    (ValueError, "from_ids: merge must be at least 1", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, merge=0)),
    (ValueError, "from_ids: grids must be", lambda: TokenLayout.from_ids(IDS, IMAGE, [(1, 2)])),
    (ValueError, "from_ids: grids must be", lambda: TokenLayout.from_ids(IDS, IMAGE, [(1, 1, 2, 1, 1, 2)])),
    (ValueError, "from_ids: grids must be", lambda: TokenLayout.from_ids(IDS, IMAGE, torch.ones(3).long())),
    (TypeError, "from_ids: grids must have dtype", lambda: TokenLayout.from_ids(IDS, IMAGE, torch.ones(1, 3))),
    (TypeError, "from_ids: grids must be", lambda: TokenLayout.from_ids(IDS, IMAGE, 4)),
    (TypeError, "from_ids: grids must be", lambda: TokenLayout.from_ids(IDS, IMAGE, [(1, 1, 2.0)])),
    (ValueError, "from_ids: input_ids must hold as many", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES[:1])),
    (ValueError, "from_ids: input_ids must hold as many", lambda: TokenLayout.from_ids(IDS, IMAGE, [])),
    (ValueError, "from_ids: input_ids must hold as many", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES * 2)),
    (ValueError, "from_ids: grids must be multiples of merge=2",
     lambda: TokenLayout.from_ids(IDS, IMAGE, [(2, 3, 2), (2, 2, 2)], merge=2)),
    (ValueError, "from_ids: input_ids must hold every image within one sample",
     lambda: TokenLayout.from_ids(IDS, IMAGE, [(1, 1, 3), (1, 1, 1)])),
    (ValueError, "from_ids: input_ids must hold every image within one sample",
     lambda: TokenLayout.from_ids(PACKED_IDS, IMAGE, [(1, 2, 2)], cu_seqlens=CU)),
    (TypeError, "from_ids: mask must have dtype bool", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, mask=IDS)),
    (ValueError, "from_ids: mask must be", lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, mask=IDS[0] > 0)),
    (ValueError, "from_ids: mask must be on",
     lambda: TokenLayout.from_ids(IDS, IMAGE, LINES, mask=(IDS > 0).to("meta"))),
    # take
    (TypeError, "take: selection must be a Selection", lambda: TokenLayout(TEXT, PLACES).take([0])),
    (ValueError, "take: selection must have no head axis",
     lambda: TokenLayout(TEXT, PLACES).take(Selection.from_mask(torch.ones(2, 3, 4).bool()))),
    (ValueError, "take: selection must be of 4 padded tokens",
     lambda: TokenLayout(TEXT, PLACES).take(Selection.from_mask(torch.ones(2, 5).bool()))),
    (ValueError, "take: selection must be of 8 packed tokens",
     lambda: TokenLayout.from_images([4, 4], packed=True).take(Selection.from_mask(torch.ones(2, 8).bool()))),
    (ValueError, "take: selection must have 2 samples",
     lambda: TokenLayout(TEXT, PLACES).take(Selection.from_mask(torch.ones(1, 4).bool()))),
    (ValueError, "total must be None", lambda: TokenLayout(TEXT, PLACES).take(
        Selection.from_mask(torch.ones(2, 4).bool()), total=3)),
    (TypeError, "packed must be", lambda: TokenLayout(TEXT, PLACES).take(
        Selection.from_mask(torch.ones(2, 4).bool()), packed=1)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)), ids=[f"{i}-{w[1][:40]}" for i, w in enumerate(WRONG)])
def test_wrong_arguments(number):
    error, message, call = WRONG[number]
    with pytest.raises(error, match=message):
        call()


# --- take ---


def some_of(layout, seed, align="left", share=0.5):
    """A selection of random tokens of a layout, padding among them."""
    chosen = torch.rand(layout.image_id.shape, generator=torch.Generator().manual_seed(seed)) < share
    if not layout.packed:
        return Selection.from_mask(chosen, align=align)
    scores = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(seed))
    return pyvtk.select(scores, 9, cu_seqlens=layout.cu_seqlens, align=align)


@pytest.mark.parametrize("source", ("right", "left", "packed"))
@pytest.mark.parametrize("align", ("left", "right"))
@pytest.mark.parametrize("target", ("padded", "packed", "total"))
def test_take(source, align, target):
    layout = TokenLayout.from_images(
        LENGTHS, SPANS, padding="left" if source == "left" else "right", packed=source == "packed"
    )
    selection = some_of(layout, 3, align)
    total = int(selection.counts.sum())
    options = {"padded": {}, "packed": {"packed": True}, "total": {"packed": True, "total": total + 5}}[target]
    taken = layout.take(selection, **options)
    axes = {"dim": 0, "batch_dim": None} if source == "packed" else {"dim": 1}
    everything = torch.arange(layout.image_id.numel()).reshape(layout.image_id.shape)
    moved = pyvtk.compact(selection, everything, pad_value=-1, **axes, **options)
    assert taken.image_id.shape == moved.shape and taken.packed == (target != "padded")
    for where in (moved >= 0).nonzero().tolist():
        old = int(moved[tuple(where)])
        for name in ("image_id", "coords", "positions", "valid"):
            before, after = getattr(layout, name), getattr(taken, name)
            before = before.reshape(-1, *before.shape[layout.image_id.dim() :])
            assert torch.equal(after[tuple(where)], before[old]), name
    assert not taken.valid[moved < 0].any() and (taken.image_id[moved < 0] == -1).all()
    assert torch.equal(taken.extent, layout.extent)
    if target != "padded":
        assert taken.cu_seqlens.tolist() == [0, *selection.counts.cumsum(0).tolist()]
        assert taken.num_samples == layout.num_samples


def test_take_of_take():
    layout = TokenLayout.from_images([40, 40], [ImageSpan(0, 3, (1, 5, 6)), ImageSpan(1, 0, (2, 4, 5))])
    first = some_of(layout, 1, share=0.7)
    once = layout.take(first)
    second = some_of(once, 2)
    twice = once.take(second)
    both = layout.take(first.then(second))
    for name in ("image_id", "coords", "positions"):
        a, b = getattr(twice, name), getattr(both, name)
        assert torch.equal(a[twice.valid], b[both.valid])


def test_take_cut_off():
    """A total that is too small cuts the last samples off, and what is left is a layout."""
    layout = TokenLayout.from_images([10, 10], [ImageSpan(0, 0, (1, 2, 3)), ImageSpan(1, 2, (1, 2, 3))])
    taken = layout.take(Selection.from_mask(torch.ones(2, 10).bool()), packed=True, total=14)
    assert taken.num_tokens == 14 and taken.cu_seqlens.tolist() == [0, 10, 14] and taken.valid.all()


# --- passes through everything ---


def test_pytree_and_saving():
    for layout in (TokenLayout.from_images(LENGTHS, SPANS), TokenLayout.from_images(LENGTHS, SPANS, packed=True)):
        leaves, spec = pytree.tree_flatten(layout)
        assert_same(pytree.tree_unflatten(leaves, spec), layout)
        file = io.BytesIO()
        torch.save(layout, file)
        file.seek(0)
        assert_same(torch.load(file), layout)
    keys = [str(path[0]) for path, _ in pytree.tree_flatten_with_path(layout)[0]]
    assert keys == [f".{name}" for name in FIELDS]


@pytest.mark.compile
def test_compiles_as_one_graph():
    torch._dynamo.reset()
    layout = TokenLayout.from_images(LENGTHS, SPANS, padding="left")
    ids = ids_of(layout, (IMAGE,))
    grids = torch.tensor([s.grid for s in sorted(SPANS)])

    def step(layout, ids, grids, scores):
        kept = pyvtk.select(scores, 11, candidates=layout.valid, backend="reference")
        again = TokenLayout.from_ids(ids, IMAGE, grids, mask=layout.mask)
        own = TokenLayout(layout.image_id, layout.coords, mask=layout.mask)
        return layout.take(kept), layout.take(kept, packed=True, total=50), again, own, layout.visual

    scores = torch.rand(4, 40)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(layout, ids, grids, scores)
    expected = step(layout, ids, grids, scores)
    for a, e in zip(actual[:-1], expected[:-1]):
        assert_same(a, e)
    assert torch.equal(actual[-1], expected[-1])


@pytest.mark.compile
def test_compiles_at_most_twice_over_lengths():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(
        lambda ids, grids: TokenLayout.from_ids(ids, IMAGE, grids).extent, fullgraph=True, backend=counter
    )
    for height in range(3, 13):
        ids = torch.tensor([[1, *[IMAGE] * (2 * height), 2]])
        assert compiled(ids, torch.tensor([[1, height, 2]])).tolist() == [[1, height, 2]]
    assert counter.frame_count <= 2


def no_tensors_of_values(*_, **__):
    raise AssertionError("a tensor made of Python values: on CUDA, a copy that the host waits for")


@pytest.mark.parametrize("form", ("padded", "packed"))
def test_never_waits_for_the_device(form, monkeypatch):
    """Tensors without values: whatever asks for one raises."""
    monkeypatch.setattr(torch, "tensor", no_tensors_of_values)
    with FakeTensorMode():
        cu_seqlens = torch.zeros(3, dtype=torch.int32) if form == "packed" else None
        shape = (30,) if form == "packed" else (2, 30)
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)
        grids = torch.ones((4, 3), dtype=torch.int64)
        layout = TokenLayout.from_ids(ids, (IMAGE, VIDEO), grids, merge=2, mask=mask, cu_seqlens=cu_seqlens)
        assert layout.image_id.shape == shape and layout.extent.shape == (2, 3)
        selection = pyvtk.select(torch.zeros(shape), 7, cu_seqlens=cu_seqlens)
        assert layout.take(selection).image_id.shape == (2, 7)
        taken = layout.take(selection, packed=True, total=12)
        assert taken.image_id.shape == (12,) and taken.cu_seqlens.shape == (3,) and taken.extent.shape == (2, 3)
        again = TokenLayout(layout.image_id, layout.coords, mask=mask, cu_seqlens=cu_seqlens)
        assert again.visual.shape == shape


def test_values_are_checked_on_the_device():
    """What from_ids cannot raise without waiting, it leaves to the device: one check is part of a traced graph."""
    graph = torch.fx.experimental.proxy_tensor.make_fx(
        lambda ids, grids: TokenLayout.from_ids(ids, IMAGE, grids).image_id, tracing_mode="fake"
    )(torch.tensor([[IMAGE, IMAGE, 1]]), torch.tensor([[1, 1, 2]]))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten._assert_async.msg) == 1


def test_random_ids_never_crash():
    """Any ids and grids: a layout, or a ValueError."""
    random.seed(0)
    for _ in range(100):
        shape = random.choice(((2, 6), (1, 9), (3, 1)))
        ids = torch.randint(2, shape) * IMAGE
        grids = torch.randint(0, 4, (random.randrange(4), 3))
        try:
            layout = TokenLayout.from_ids(ids, IMAGE, grids)
        except ValueError as error:
            assert "from_ids: " in str(error)
            continue
        for sample in listed(layout):
            seen = {}
            for image, *place in sample:
                if image >= 0:
                    _, h, w = grids[image].tolist()
                    assert place == [seen.get(image, 0) // (h * w), seen.get(image, 0) // w % h, seen.get(image, 0) % w]
                    seen[image] = seen.get(image, 0) + 1
