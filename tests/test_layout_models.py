"""Layouts of models' sequences: one grid for all images, newlines, M-RoPE; against slow loops and transformers."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import ImageSpan, TokenLayout, neighbor_plan

IMAGE = 900
TEXT = (-1, 0, 0, 0)


def listed(layout):
    """[samples][tokens] of (image, t, y, x)."""
    rows = torch.cat([layout.image_id[..., None], layout.coords], -1)
    return [[tuple(row) for row in sample] for sample in rows.tolist()]


def walked(ids, grids):
    """The same by loops: placeholders fill one grid (t, h, w, newline) after the other; ``grids`` may have no end."""
    cells = (
        (number, t, y, x) if x < w else TEXT
        for number, (depth, h, w, newline) in enumerate(grids)
        for t in range(depth)
        for y in range(h)
        for x in range(w + newline)
    )
    return [[next(cells) if token == IMAGE else TEXT for token in sample] for sample in ids.tolist()]


def repeated(grid):
    while True:
        yield (*grid, False) if len(grid) == 3 else grid


def ids_of(samples):
    """[batch, tokens] of samples listed as runs: text (its length), or placeholders (their number, negative)."""
    rows = [[token for run in runs for token in ([1] * run if run > 0 else [IMAGE] * -run)] for runs in samples]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


# --- one grid for all images ---


@pytest.mark.parametrize("grid", [(1, 2, 3), (2, 2, 1), (1, 2, 3, True), (1, 2, 3, 0)])
def test_one_grid(grid):
    t, h, w, newline = next(repeated(grid))
    size = t * h * (w + newline)
    ids = ids_of([[3, -size, 1, -2 * size], [-size, 2], [4]])  # two that touch, one at the beginning, none
    layout = TokenLayout.from_ids(ids, IMAGE, grid)
    assert listed(layout) == walked(ids, repeated(grid))
    assert layout.extent.tolist() == [[t, h, w], [t, h, w], [0, 0, 0]]
    numbered = TokenLayout.from_ids(ids, IMAGE, [grid] * 4)
    assert torch.equal(layout.image_id, numbered.image_id) and torch.equal(layout.coords, numbered.coords)
    lengths = [ids.shape[1]] * 3
    packed = TokenLayout.from_ids(
        ids.flatten(), IMAGE, grid, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    )
    assert torch.equal(packed.image_id, layout.image_id.flatten()) and torch.equal(packed.extent, layout.extent)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :size] = False  # an image that is padding
    masked = TokenLayout.from_ids(ids, IMAGE, grid, mask=mask)
    assert listed(masked) == walked(ids.masked_fill(~mask, 0), repeated(grid))


def test_one_grid_is_merged():
    layout = TokenLayout.from_ids(ids_of([[1, -12]]), IMAGE, (1, 4, 6), merge=2)
    assert listed(layout) == walked(ids_of([[1, -12]]), repeated((1, 2, 3)))


@pytest.mark.parametrize(
    "samples, grid, message",
    [
        ([[-12, 1]], (1, 5, 2), "from_ids: input_ids must hold a multiple of the grid's tokens, 10, got 12"),
        ([[-12, 1]], (1, 5, 1, True), "from_ids: input_ids must hold a multiple of the grid's tokens, 10, got 12"),
        ([[-5, 1], [-7, 1]], (1, 2, 3), "from_ids: input_ids must hold every image within one sample"),
        ([[-12]], (1, 2, 0), r"from_ids: grids must have 1 to 65536 tokens a side, got \(1, 2, 0\)"),
        ([[-12]], (1, 65537, 1), "from_ids: grids must have 1 to 65536 tokens a side"),
        ([[-12]], (1, 2, 3, 2), "from_ids: grids must have True or False as newline"),
        ([[-12]], (12,), "from_ids: grids must be"),
        ([[-12]], [(1, 3, 4), (1, 2, 3)], "input_ids must hold as many visual tokens as grids / merge, 18, got 12"),
        ([[-12]], torch.tensor([[1, 3, 2, 2]]), "from_ids: grids must be multiples of merge=1, .* newline 0 or 1"),
    ],
)
def test_wrong_grids(samples, grid, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_ids(ids_of(samples), IMAGE, grid)


def test_one_grid_is_not_merged_by_parts():
    with pytest.raises(ValueError, match=r"from_ids: grids must be multiples of merge=2, got \(1, 3, 4\)"):
        TokenLayout.from_ids(ids_of([[-12]]), IMAGE, (1, 3, 4), merge=2)
    with pytest.raises(TypeError, match="from_ids: grids must be"):
        TokenLayout.from_ids(ids_of([[-12]]), IMAGE, (1, 3, 4.0))


@pytest.mark.compile
def test_one_grid_in_a_graph():
    """At most two programs over numbers of images and sides."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda ids, side: TokenLayout.from_ids(ids, IMAGE, (1, side, 3)).coords, fullgraph=True, backend=counter
    )
    for side in range(2, 9):
        ids = ids_of([[1, -3 * side, 2]] * 2)
        assert torch.equal(compiled(ids, side), TokenLayout.from_ids(ids, IMAGE, (1, side, 3)).coords)
    assert counter.frame_count <= 2


# --- newlines ---


@st.composite
def grids_and_ids(draw):
    """Samples of text and images, some of which follow each other without text, with and without newlines."""
    samples, grids = [], []
    for _ in range(draw(st.integers(1, 3))):
        runs = [draw(st.integers(1, 3))]
        for _ in range(draw(st.integers(0, 4))):
            t, h, w, newline = *(draw(st.integers(1, 3)) for _ in range(3)), draw(st.booleans())
            if draw(st.integers(0, 4)) == 0:
                t, h, w, newline = 1, 1, 0, True  # a newline of its own
            grids.append((t, h, w, newline))
            runs += [-t * h * (w + newline), *([draw(st.integers(1, 2))] * draw(st.integers(0, 1)))]
        samples.append(runs)
    return samples, grids


@settings(max_examples=100, deadline=None)
@given(grids_and_ids(), st.sampled_from(["tuples", "int64", "int32"]))
def test_newlines(problem, form):
    samples, grids = problem
    ids = ids_of(samples)
    given_grids = grids
    if form != "tuples":
        rows = [[int(n) for n in grid] for grid in grids]
        given_grids = torch.tensor(rows, dtype=getattr(torch, form)).reshape(-1, 4)
    layout = TokenLayout.from_ids(ids, IMAGE, given_grids)
    assert listed(layout) == walked(ids, grids)
    for sample, extent in zip(listed(layout), layout.extent.tolist()):
        visual = [place for image, *place in sample if image >= 0]
        assert extent == [max(axis) + 1 for axis in zip(*visual)] if visual else extent == [0, 0, 0]


def test_newlines_are_those_of_spans():
    """A newline sees and is seen as text: the plan is that of from_images."""
    spans = [ImageSpan(0, 2, (1, 4, 4)), ImageSpan(0, 18, (1, 6, 5), newline=True)]
    expected = TokenLayout.from_images([60], spans)
    ids = ids_of([[2, -16 - 36, 6]])
    layout = TokenLayout.from_ids(ids, IMAGE, [(1, 4, 4), (1, 6, 5, True)])
    assert torch.equal(layout.image_id, expected.image_id) and torch.equal(layout.coords, expected.coords)
    assert layout.visual.sum() == 16 + 30 and not layout.visual[0, 23::6][:6].any()


@pytest.mark.parametrize("size", [(700, 300), (300, 700), (672, 672), (333, 500)])
@pytest.mark.parametrize("model", ["llava_next", "llava_onevision"])
def test_newlines_of_transformers(model, size):
    """What LLaVA-NeXT and LLaVA-OneVision put in the places of placeholders: every feature says where it is from."""
    pytest.importorskip("transformers", minversion="5.24")
    if model == "llava_next":
        from transformers.models.llava_next.modeling_llava_next import LlavaNextModel as Model
    else:
        from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel as Model
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    side = 6  # patches per tile
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    config = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=336 // side), image_grid_pinpoints=pinpoints
    )
    rows, columns = get_anyres_image_grid_shape(size, pinpoints, 336)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    base = torch.stack([torch.zeros_like(y), y, x], -1).reshape(1, -1, 3)
    tiles = [
        torch.stack([torch.ones_like(y), y + side * i, x + side * j], -1).reshape(1, -1, 3)
        for i in range(rows)
        for j in range(columns)
    ]
    features = [torch.cat([base, *tiles]).double(), base.double()]  # the second image has no tiles
    options = {"vision_feature_select_strategy": "full"} if model == "llava_next" else {}
    newline = torch.full((3,), -1.0, dtype=torch.float64)
    sizes = torch.tensor([size, (336, 336)])
    stand_in = SimpleNamespace(config=config)
    packed, _ = Model.pack_image_features(stand_in, features, sizes, image_newline=newline, **options)
    first, second = (x.long() for x in packed)
    of_tiles = first[first[:, 0] == 1]
    h, w = (of_tiles.amax(0) - of_tiles.amin(0) + 1)[1:].tolist()

    ids = torch.full((1, len(first) + len(second)), IMAGE)
    grids = [(1, side, side), (1, h, w, True), (1, side, side), (1, 1, 0, True)]
    layout = TokenLayout.from_ids(ids, IMAGE, grids)
    place = torch.cat([first, second])
    assert torch.equal(layout.visual[0], place[:, 0] >= 0)
    image, coords = layout.image_id[0], layout.coords[0]
    assert torch.equal(image % 2 == 1, (place[:, 0] == 1) | (image < 0))
    place[place[:, 0] == 1] -= of_tiles.amin(0)  # the padding that was left out
    assert torch.equal(coords[image >= 0, 1:], place[image >= 0, 1:].int())


# --- M-RoPE ---


def rope(samples, step=1):
    """(visual, position_ids) as Qwen2.5-VL numbers them: runs of text (length) and grids (t, h, w), frames ``step``
    apart."""
    longest = max(sum(run if isinstance(run, int) else run[0] * run[1] * run[2] for run in runs) for runs in samples)
    positions = torch.zeros(3, len(samples), longest, dtype=torch.int64)
    visual = torch.zeros(len(samples), longest, dtype=torch.bool)
    for sample, runs in enumerate(samples):
        token = start = 0
        for run in runs:
            if isinstance(run, int):
                for _ in range(run):
                    positions[:, sample, token] = start
                    token, start = token + 1, start + 1
                continue
            for t in range(run[0]):
                for y in range(run[1]):
                    for x in range(run[2]):
                        positions[:, sample, token] = torch.tensor([start + t * step, start + y, start + x])
                        visual[sample, token] = True
                        token += 1
            start += max(run[1], run[2])
    return visual, positions


def by_grids(samples, visual, mask=None):
    grids = [run for runs in samples for run in runs if not isinstance(run, int)]
    return TokenLayout.from_ids(torch.where(visual, IMAGE, 1), IMAGE, grids, mask=mask)


def assert_same(actual, expected, step=1):
    for name in ("image_id", "positions"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(actual.coords, expected.coords * torch.tensor([step, 1, 1], dtype=torch.int32))
    t, *rest = (expected.extent - 1).clamp(min=0).unbind(-1)
    sizes = torch.stack([t * step, *rest], -1) + 1
    assert torch.equal(actual.extent, torch.where(expected.extent == 0, 0, sizes))
    assert (actual.mask is None) == (expected.mask is None)


GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
RUNS = st.lists(st.one_of(st.integers(1, 4), GRIDS), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=3), st.sampled_from([1, 50]), st.booleans(), st.booleans())
def test_mrope(samples, step, four, narrow):
    """Images that touch, videos, images of one token, nothing but images: what from_ids makes of the grids."""
    visual, positions = rope(samples, step)
    if four:  # the positions of text first
        positions = torch.cat([torch.arange(visual.shape[1]).expand(1, *visual.shape), positions])
    if narrow:
        positions = positions.to(torch.int32)
    assert_same(TokenLayout.from_mrope(visual, positions), by_grids(samples, visual), step)


def test_mrope_of_a_padded_batch():
    samples = [[3, (1, 2, 3), 2, (1, 3, 2)], [(2, 2, 2), (1, 1, 1), (1, 1, 1)]]
    visual, positions = rope(samples)
    lengths = torch.tensor([17, 10])[:, None]
    mask = torch.arange(visual.shape[1]) < lengths
    visual = visual | ~mask  # padding may look like an image
    assert_same(TokenLayout.from_mrope(visual, positions, mask=mask), by_grids(samples, visual, mask))
    left = [x.flip(-1) for x in (visual, mask)]
    assert TokenLayout.from_mrope(left[0], positions.flip(-1), mask=left[1]).visual.sum() == 22


def test_mrope_edges():
    none = torch.zeros(2, 0, dtype=torch.bool)
    assert TokenLayout.from_mrope(none, torch.zeros(3, 2, 0, dtype=torch.int64)).extent.tolist() == [[0] * 3] * 2
    far = torch.tensor([0, 65535]).expand(3, 1, 2).clone()
    far[1:] = 7
    visual = torch.ones(1, 2, dtype=torch.bool)
    assert TokenLayout.from_mrope(visual, far + 2**40).coords[0, :, 0].tolist() == [0, 65535]
    far[0, 0, 1] += 1
    message = "from_mrope: position_ids must be within 65535 of each other in one image, got 65536"
    with pytest.raises(ValueError, match=message):
        TokenLayout.from_mrope(visual, far)


VISUAL = torch.ones(2, 4, dtype=torch.bool)
POSITIONS = torch.zeros(3, 2, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "from_mrope: visual must be a tensor", ([True], POSITIONS)),
        (TypeError, "from_mrope: visual must have dtype bool", (VISUAL.int(), POSITIONS)),
        (ValueError, "from_mrope: visual must have 2 dim", (VISUAL[0], POSITIONS)),
        (TypeError, "from_mrope: position_ids must have dtype", (VISUAL, POSITIONS.float())),
        (ValueError, r"from_mrope: position_ids must be \[3 or 4, batch", (VISUAL, POSITIONS[:2])),
        (ValueError, r"from_mrope: position_ids must be \[3 or 4, batch", (VISUAL, POSITIONS[:, :, :3])),
        (ValueError, "from_mrope: position_ids must have 3 dim", (VISUAL, POSITIONS[0])),
        (ValueError, "from_mrope: position_ids must be on", (VISUAL, POSITIONS.to("meta"))),
        (TypeError, "from_mrope: mask must have dtype bool", (VISUAL, POSITIONS, VISUAL.int())),
        (ValueError, "from_mrope: mask must be shaped like visual", (VISUAL, POSITIONS, VISUAL[:1])),
    ],
)
def test_wrong_positions(error, message, arguments):
    visual, positions, *mask = arguments
    with pytest.raises(error, match=message):
        TokenLayout.from_mrope(visual, positions, mask=mask[0] if mask else None)


@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_vl"])
def test_mrope_of_transformers(model):
    """Positions as the models make them. Frames of Qwen3-VL are images, with the text of their times between them."""
    pytest.importorskip("transformers", minversion="5.24")
    if model == "qwen2_5_vl":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel as Model

        video, step = [(3, 2, 2)], 2
    else:
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel as Model

        video, step = [(1, 2, 2), 2, (1, 2, 2), 2, (1, 2, 2)], 1
    samples = [[2, (1, 2, 3), 1, (1, 4, 2), 1, *video, 4], [1, (1, 3, 3), 2]]
    visual, _ = rope(samples)
    mask = torch.arange(visual.shape[1]) < torch.tensor([[visual.shape[1]], [12]])
    kinds = visual.int()
    kinds[0, 18:-4] *= 2  # what the processor says of placeholders: 1 image, 2 video
    stand_in = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)),
        get_vision_position_ids=lambda *given, **named: Model.get_vision_position_ids(None, *given, **named),
    )
    positions, _ = Model.get_rope_index(
        stand_in, torch.ones(visual.shape, dtype=torch.int64), kinds, attention_mask=mask.long(),
        image_grid_thw=torch.tensor([[1, 4, 6], [1, 8, 4], [1, 6, 6]]), video_grid_thw=torch.tensor([[3, 4, 4]]),
    )  # fmt: skip
    layout, expected = TokenLayout.from_mrope(visual, positions, mask=mask), by_grids(samples, visual, mask)
    assert torch.equal(layout.image_id, expected.image_id) and int(layout.image_id.max()) == (3 if step == 2 else 5)
    scale = torch.where((expected.image_id == 2)[..., None] & (torch.arange(3) == 0), step, 1)
    assert torch.equal(layout.coords, expected.coords * scale)


# --- on any device ---


def no_tensors_of_values(*_, **__):
    raise AssertionError("a tensor made of Python values: on CUDA, a copy that the host waits for")


@pytest.mark.parametrize("plain", (False, True), ids=("operator", "plain torch"))
def test_never_waits_for_the_device(plain, monkeypatch):
    if plain:
        monkeypatch.setattr(pyvtk.backends, "pick", lambda *_, **__: "reference")
    monkeypatch.setattr(torch, "tensor", no_tensors_of_values)
    with FakeTensorMode():
        ids, mask = torch.zeros((2, 30), dtype=torch.int64), torch.ones((2, 30), dtype=torch.bool)
        one = TokenLayout.from_ids(ids, IMAGE, (1, 2, 3, True), mask=mask)
        mrope = TokenLayout.from_mrope(ids == IMAGE, torch.zeros((3, 2, 30), dtype=torch.int32), mask=mask)
        for layout in (one, mrope):
            assert layout.coords.shape == (2, 30, 3) and layout.extent.shape == (2, 3)
            assert neighbor_plan(layout, 1, text="all").num_keys == 30


@pytest.mark.compile
def test_compiles_as_one_graph():
    visual, positions = rope([[3, (1, 2, 3), (2, 2, 2), 4]])

    def run(visual, positions):
        layout = TokenLayout.from_mrope(visual, positions)
        return layout, neighbor_plan(layout, 1)

    layout, plan = torch.compile(run, fullgraph=True, backend="aot_eager")(visual, positions)
    expected, of_expected = run(visual, positions)
    assert_same(layout, expected)
    assert all(torch.equal(a, b) for a, b in zip(plan.tensors(), of_expected.tensors()))
    with pytest.raises(RuntimeError, match="from_mrope: position_ids must be within"):
        torch.compile(run, fullgraph=True, backend="aot_eager")(visual, positions * 2**20)


# --- in words ---


def test_in_words():
    spans = [ImageSpan(0, 2, (1, 2, 3)), ImageSpan(1, 1, (1, 2, 2)), ImageSpan(0, 9, (1, 1, 2))]
    for packed in (False, True):
        layout = TokenLayout.from_images([12, 7], spans, packed=packed)
        tokens = 19 if packed else 12
        text = f"TokenLayout(samples=2, tokens={tokens}, images=3, packed={packed}, device='cpu')"
        assert repr(layout) == text
    meta = TokenLayout.from_images([12], device="meta")
    assert repr(meta) == "TokenLayout(samples=1, tokens=12, packed=False, device='meta')"
    assert repr(TokenLayout.from_images([])) == "TokenLayout(samples=0, tokens=0, images=0, packed=False, device='cpu')"
    with FakeTensorMode() as mode:
        real = repr(layout)
        fake = TokenLayout.from_ids(mode.from_tensor(torch.zeros(1, 6, dtype=torch.int64)), IMAGE, (1, 1, 1))
        assert "images" not in repr(fake) and "tensor" not in repr(fake) and real == text
        of_fake = neighbor_plan(fake, 1)
    for plan in (neighbor_plan(layout, 2), of_fake, neighbor_plan(meta, (0, 1, 2), keys=meta.visual)):
        words = repr(plan)
        assert words.startswith("AttentionPlan(batch=1, num_queries=") and "tensor" not in words
        assert len(words.splitlines()) <= 3 and all(len(line) <= 120 for line in words.splitlines())
        assert f"block={plan.block}" in words and f"radius={plan.radius}" in words
    seen = []

    def mapped(image_id):
        seen.append(repr(TokenLayout._of(image_id, torch.zeros(2, 5, 3), None, None, None, meta.extent)))
        return image_id

    torch.vmap(mapped)(torch.zeros(3, 2, 5))
    assert seen == ["TokenLayout(samples=2, tokens=5, packed=False, device='cpu')"]
