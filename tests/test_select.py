"""select: a naive oracle against the reference, the reference against compiled code, and the public function."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from pyvtk import _C, Selection, select

INFINITY = float("inf")
NAN = float("nan")
SPECIAL = [NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 1e-42, 3e38]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- the oracle: the rules of pyvtk/reference/select.py, token by token, without torch ---


def naive_weights(scores: list[float]) -> list[int]:
    real = [s for s in scores if s > 0]
    if not real:
        return [0] * len(scores)
    largest = max(real)
    if largest == INFINITY:
        return [int(s == INFINITY) for s in scores]
    exponent = math.frexp(largest)[1]
    return [math.floor(math.ldexp(s, 31 - exponent)) if s > 0 else 0 for s in scores]


def naive_row(scores, num_keep, threshold, top_p, keep, drop, candidates, others, segments, groups, capacity, by_score):
    """One row; every option a list with an entry per token, the criteria a list with an entry per group or None."""

    def rank(token):
        score = scores[token]
        return (1, 0, token) if score != score else (0, -score, token)

    tokens = range(len(scores))
    forced = [t for t in tokens if keep[t] and not drop[t]]
    eligible = [candidates[t] and 0 <= segments[t] < groups for t in tokens]
    fixed = set(forced)
    if others:
        fixed |= {t for t in tokens if not eligible[t] and not drop[t]}
    stay = set()
    for g in range(groups):
        members = sorted((t for t in tokens if eligible[t] and segments[t] == g and not drop[t]), key=rank)
        competitors = [t for t in members if t not in forced]
        kept = set(competitors)
        if num_keep is not None:
            taken = sum(segments[t] == g for t in forced)
            kept &= set(competitors[: max(0, max(0, num_keep[g]) - taken)])
        if threshold is not None:
            kept &= {t for t in competitors if scores[t] >= threshold[g]}
        if top_p is not None:
            weights = naive_weights([scores[t] for t in members])
            need, mass, prefix = math.ceil(top_p[g] * float(sum(weights))), 0, set()
            for t, weight in zip(members, weights):
                if prefix and mass >= need:
                    break
                prefix.add(t)
                mass += weight
            kept &= prefix
        stay |= kept
    preferred = sorted(fixed, key=rank) + sorted(stay, key=rank)
    chosen = preferred[:capacity]
    return (chosen if by_score else sorted(chosen)), len(preferred) > capacity


def lists(value, shape):
    """Nested lists of a tensor given per token, repeated over heads that share it."""
    if len(shape) == 3 and value.dim() == 2:
        value = value[:, None].expand(shape)
    return value.reshape(-1, shape[-1]).tolist() if shape[0] and shape[-1] else [[]] * math.prod(shape[:-1])


def naive(scores, num_keep=None, *, threshold=None, top_p=None, keep=None, drop=None, candidates=None, others="drop",
          segments=None, num_segments=None, capacity=None, align="left", order="index"):  # fmt: skip
    shape = scores.shape
    rows = math.prod(shape[:-1])
    groups = num_segments or 1

    def per_group(value, row):
        if isinstance(value, torch.Tensor):
            value = value.double() if value.is_floating_point() else value
            if value.dim() == 2:
                return value[row // (rows // shape[0])].tolist()
            value = value[row // (rows // shape[0])].item()
        return None if value is None else [value] * groups

    def per_token(value, default):
        return [[default] * shape[-1]] * rows if value is None else lists(value, shape)

    if threshold is not None and not isinstance(threshold, torch.Tensor):
        threshold = torch.tensor(threshold).to(scores.dtype).item()
    options = [per_token(keep, False), per_token(drop, False), per_token(candidates, True)]
    segment_rows = per_token(segments, 0)
    score_rows = lists(scores.double(), shape)
    result = []
    for row in range(rows):
        limit = shape[-1] if capacity is None else capacity
        per_token_of_row = [option[row] for option in options]
        criteria = (per_group(value, row) for value in (num_keep, threshold, top_p))
        facts = (others == "keep", segment_rows[row], groups, limit, order == "score")
        result.append(naive_row(score_rows[row], *criteria, *per_token_of_row, *facts))
    return result


def rows_of(selection: Selection) -> list[list[int]]:
    rows = []
    flat = selection.indices.flatten(0, -2) if selection.indices.dim() > 1 else selection.indices
    for row, count in zip(flat.tolist(), selection.counts.flatten().tolist()):
        cut = count if selection.align == "left" else len(row) - count
        real, padding = (row[:cut], row[cut:]) if selection.align == "left" else (row[cut:], row[:cut])
        assert set(padding) <= {-1} and -1 not in real
        rows.append(real)
    return rows


def assert_same(a: Selection, b: Selection) -> None:
    for name in ("indices", "counts", "overflow"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype and torch.equal(left, right), f"{name}: {left} != {right}"


# --- inputs ---


def make_scores(kind: str, shape: tuple, generator) -> torch.Tensor:
    if kind == "special":
        return torch.tensor(SPECIAL)[torch.randint(0, len(SPECIAL), shape, generator=generator)]
    if kind == "equal":
        return torch.full(shape, 0.25)
    scores = torch.randn(shape, generator=generator)
    if kind == "ties":
        return (scores * 2).round()
    if kind == "softmax":
        return (scores * 4).softmax(-1)
    if kind == "sorted":
        return scores.sort(-1)[0]
    if kind == "outlier" and scores.numel():
        scores.fill_(0.5)[..., 0] = 1e30
    if kind == "infinite":
        scores[scores < 0] = -INFINITY
    return scores


KINDS = ["normal", "special", "equal", "ties", "softmax", "sorted", "outlier", "infinite"]


@st.composite
def problems(draw, sizes=range(10), masks=True):
    """scores, num_keep and options of a random call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.integers(0, 3)), draw(st.sampled_from(sizes))
    shape = (batch, draw(st.integers(1, 3)), tokens) if draw(st.booleans()) else (batch, tokens)
    scores = make_scores(draw(st.sampled_from(KINDS)), shape, generator).to(draw(st.sampled_from(DTYPES)))

    def mask(share):
        if not draw(st.booleans()):
            return None
        mask_shape = shape if draw(st.booleans()) else (batch, tokens)
        return torch.rand(mask_shape, generator=generator) < share

    options = {"align": draw(st.sampled_from(["left", "right"])), "order": draw(st.sampled_from(["index", "score"]))}
    groups = None
    if masks and draw(st.booleans()):
        options |= {"keep": mask(0.2), "drop": mask(0.2), "candidates": mask(0.7)}
        options["others"] = draw(st.sampled_from(["drop", "keep"]))
    if masks and draw(st.booleans()):
        groups = draw(st.integers(1, 4))
        options["segments"] = torch.randint(-1, groups + 1, (batch, tokens), generator=generator)
        options["num_segments"] = groups

    def criterion(*numbers):
        """None, a number, or a tensor of them per sample (and segment)."""
        kind = draw(st.sampled_from(["none", "number", "sample"] + (["segment"] if groups else [])))
        if kind == "none":
            return None
        if kind == "number":
            return draw(st.sampled_from(numbers))
        rows = (batch,) if kind == "sample" else (batch, groups)
        return torch.tensor(numbers)[torch.randint(0, len(numbers), rows, generator=generator)]

    options["threshold"] = criterion(0.0, 0.5, -INFINITY, 0.7)
    options["top_p"] = criterion(0.0, 0.1, 0.5, 0.9, 1.0)
    num_keep = criterion(0, 1, tokens // 3, tokens, tokens + 2)
    if num_keep is None and options["threshold"] is None and options["top_p"] is None:
        num_keep = tokens // 2
    if draw(st.booleans()):
        options["capacity"] = draw(st.integers(0, tokens + 2))
    return scores, num_keep, options


relaxed = settings(deadline=None, suppress_health_check=list(HealthCheck))


# --- the reference against the oracle; compiled against the reference ---


@settings(relaxed, max_examples=120)
@given(problems())
def test_reference_equals_oracle(problem):
    scores, num_keep, options = problem
    selection = select(scores, num_keep, **options, backend="reference")
    expected = naive(scores, num_keep, **options)
    assert rows_of(selection) == [row for row, _ in expected]
    assert selection.overflow.flatten().tolist() == [overflow for _, overflow in expected]
    assert selection.num_tokens == scores.shape[-1] and selection.ascending == (options["order"] == "index")


def test_reference_in_float64_is_finer_than_float32():
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 - 1e-12, 1e-300, 2e-300]], dtype=torch.float64)
    assert select(scores, 4, order="score").indices.tolist() == [[1, 0, 2, 4]]
    assert select(scores, threshold=1.0).indices.tolist() == [[0, 1, -1, -1, -1]]
    assert rows_of(select(scores[:, 3:], top_p=0.6)) == [[1]]


@pytest.mark.parametrize("kind", ["number", "masks"])
def test_compiled_equals_reference(instruction_set, kind):
    @settings(relaxed, max_examples=50)
    @given(problems([0, 1, 7, 8, 63, 64, 65, 200, 577], masks=kind == "masks"))
    def check(problem):
        scores, num_keep, options = problem
        actual = select(scores, num_keep, **options, backend="compiled")
        assert_same(actual, select(scores, num_keep, **options, backend="reference"))

    check()


@pytest.mark.parametrize(
    "kind, dtype", [(kind, DTYPES[i % 3]) for i, kind in enumerate(KINDS)] + [("normal", DTYPES[1])]
)
def test_compiled_equals_reference_on_long_rows(kind, dtype):
    """Long enough for several rounds of narrowing and for the bound that few of many are sought with."""
    scores = make_scores(kind, (1, 4103), torch.Generator().manual_seed(1)).to(dtype)
    best_first = select(scores, 4103, order="score", backend="reference").indices
    before = _C.instruction_set()
    try:
        for name in _C.instruction_sets():
            _C.use_instruction_set(name)
            for num_keep in (1, 64, 700, 2051, 4102, 4103):
                assert torch.equal(select(scores, num_keep, order="score").indices, best_first[:, :num_keep])
                assert torch.equal(select(scores, num_keep).indices, best_first[:, :num_keep].sort()[0])
            for options in ({"top_p": 0.7}, {"num_keep": 900, "candidates": scores != 0.25, "align": "right"}):
                assert_same(select(scores, **options), select(scores, **options, backend="reference"))
    finally:
        _C.use_instruction_set(before)


def test_small_differences_decide(instruction_set):
    """Neighbouring floats, of which every bit counts, around one and around zero."""
    bits = torch.randperm(4096).to(torch.int32).reshape(1, -1)
    for base in (0x3F800000, 0, -0x80000000, -0x40800000):
        scores = (bits + base).view(torch.float32)
        for num_keep in (1, 17, 2000, 4095):
            assert_same(select(scores, num_keep), select(scores, num_keep, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_any_stride(instruction_set, dtype):
    wide = torch.randn(3, 4, 90).to(dtype)
    for view in (wide[:, :, 5:70], wide[::2, 1:3, :33], wide.transpose(0, 1), wide[:, 0], wide[1].expand(2, 4, 90)):
        assert_same(select(view, 9), select(view.contiguous(), 9, backend="reference"))
    columns = wide[:, 0].t()  # tokens far apart: copied by the page
    assert_same(select(columns, 2), select(columns.contiguous(), 2, backend="reference"))


@pytest.mark.parametrize("order", ["index", "score"])
def test_packed_equals_sample_by_sample(instruction_set, order):
    """Ragged samples, empty ones first, between and last, and tokens outside of every sample."""
    lengths = [0, 5, 0, 130, 1, 64, 0]
    cu_seqlens = torch.tensor([3, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1]) + 4
    scores = make_scores("ties", (total,), torch.Generator().manual_seed(2))
    options = {
        "keep": torch.rand(total) < 0.1, "drop": torch.rand(total) < 0.1, "candidates": torch.rand(total) < 0.8,
        "segments": torch.randint(-1, 3, (total,)),
    }  # fmt: skip
    num_keep = torch.randint(0, 9, (len(lengths), 3))
    facts = {"others": "keep", "align": "right", "order": order, "capacity": 40}
    for backend in ("compiled", "reference"):
        plain = select(scores, 4, cu_seqlens=cu_seqlens, order=order, backend=backend)
        masked = select(scores, num_keep, **options, **facts, cu_seqlens=cu_seqlens.int(), backend=backend)
        assert plain.num_tokens == total and plain.capacity == 4 and masked.capacity == 40
        assert plain.source_cu_seqlens.tolist() == cu_seqlens.tolist()
        for sample in range(len(lengths)):
            start, stop = cu_seqlens[sample : sample + 2].tolist()
            alone = select(scores[None, start:stop], 4, order=order)
            assert [[i + start for i in row] for row in rows_of(alone)] == [rows_of(plain)[sample]]
            parts = {name: value[None, start:stop] for name, value in options.items()}
            alone = select(scores[None, start:stop], num_keep[sample, None], **parts, **facts)
            assert [[i + start for i in row] for row in rows_of(alone)] == [rows_of(masked)[sample]]
            assert alone.overflow.item() == masked.overflow[sample].item()
    assert select(scores, 4, cu_seqlens=torch.tensor([0])).indices.shape == (0, 4)
    assert select(scores[:0], threshold=0.0, cu_seqlens=torch.tensor([0, 0])).indices.shape == (1, 0)


def test_packed_with_impossible_offsets_is_refused():
    for offsets in ([0, 9], [0, 3, 2], [-1, 3]):
        with pytest.raises(RuntimeError, match="cu_seqlens"):
            select(torch.rand(5), 2, cu_seqlens=torch.tensor(offsets), backend="compiled")


def test_same_result_for_any_number_of_threads():
    before = torch.get_num_threads()
    scores = make_scores("ties", (64, 3000), torch.Generator().manual_seed(3))
    try:
        torch.set_num_threads(1)
        one = select(scores, 300, keep=scores > 5, top_p=0.9, order="score")
        torch.set_num_threads(4)
        assert_same(select(scores, 300, keep=scores > 5, top_p=0.9, order="score"), one)
    finally:
        torch.set_num_threads(before)


# --- examples that fix the meaning ---

backends = pytest.mark.parametrize("backend", ["compiled", "reference"])
ROW = torch.tensor([[3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]])


def kept(*args, **options) -> list[int]:
    (row,) = rows_of(select(*args, **options))
    return row


@backends
def test_ties_nan_infinities_and_zeros(backend):
    scores = torch.tensor([[NAN, -INFINITY, -0.0, 0.0, INFINITY, -INFINITY, NAN, 0.0]])
    for count, order in enumerate([4, 2, 3, 7, 1, 5, 0, 6]):
        assert kept(scores, count + 1, order="score", backend=backend)[-1] == order
    assert kept(scores, threshold=-INFINITY, backend=backend) == [1, 2, 3, 4, 5, 7]
    assert kept(scores, threshold=0.0, backend=backend) == [2, 3, 4, 7]
    assert kept(scores, threshold=torch.tensor([NAN]), backend=backend) == []
    assert kept(scores, top_p=1.0, backend=backend) == [4]  # all mass is there
    assert kept(scores[:, :2], top_p=1.0, backend=backend) == [1]  # no mass at all: one stays


@backends
def test_forced_tokens_use_up_num_keep(backend):
    keep = torch.zeros(1, 8, dtype=torch.bool)
    keep[0, [1, 3, 5]] = True
    drop = torch.zeros(1, 8, dtype=torch.bool)
    drop[0, [3, 7]] = True
    assert kept(ROW, 4, keep=keep, backend=backend) == [1, 3, 5, 7]
    assert kept(ROW, 2, keep=keep, backend=backend) == [1, 3, 5]  # max(num_keep, forced)
    assert kept(ROW, 4, keep=keep, drop=drop, backend=backend) == [1, 2, 4, 5]
    assert kept(ROW, 0, keep=keep, drop=drop, backend=backend) == [1, 5]
    assert kept(ROW, 99, drop=drop, backend=backend) == [0, 1, 2, 4, 5, 6]
    assert kept(ROW, 8, keep=keep, order="score", backend=backend) == [5, 1, 3, 7, 4, 2, 0, 6]


@backends
def test_candidates_and_others(backend):
    visual = torch.tensor([[False, True, True, True, True, False, True, False]])
    assert kept(ROW, 2, candidates=visual, backend=backend) == [2, 4]
    assert kept(ROW, 2, candidates=visual, others="keep", backend=backend) == [0, 2, 4, 5, 7]
    assert kept(ROW, 2, candidates=visual, others="keep", drop=ROW == 9, backend=backend) == [0, 2, 4, 7]
    assert kept(ROW, 2, candidates=visual, keep=ROW == 9, backend=backend) == [4, 5]


@backends
def test_criteria_hold_together(backend):
    assert kept(ROW, 3, threshold=4.5, backend=backend) == [4, 5, 7]
    assert kept(ROW, 5, threshold=4.5, backend=backend) == [4, 5, 7]
    assert kept(ROW, 2, threshold=4.5, backend=backend) == [5, 7]
    assert kept(ROW, 2, threshold=4.5, keep=ROW == 2, backend=backend) == [5, 6]
    assert kept(ROW, top_p=20 / 31, backend=backend) == [4, 5, 7]
    assert kept(ROW, top_p=21 / 31, backend=backend) == [2, 4, 5, 7]
    assert kept(ROW, 9, top_p=20 / 31, threshold=5.5, backend=backend) == [5, 7]
    # a forced candidate has mass: 9 and 6 make up 15 of 31
    assert kept(ROW, top_p=15 / 31, keep=ROW == 9, backend=backend) == [5, 7]


@backends
def test_budget_per_segment(backend):
    segments = torch.tensor([[0, 0, 0, 1, 1, 1, -1, 7]])
    assert kept(ROW, 1, segments=segments, num_segments=2, backend=backend) == [2, 5]
    assert kept(ROW, torch.tensor([[2, 0]]), segments=segments, backend=backend) == [0, 2]
    assert kept(ROW, torch.tensor([[0, 9, 4]]), segments=segments, backend=backend) == [3, 4, 5]
    assert kept(ROW, 1, segments=segments, num_segments=2, keep=ROW == 1, backend=backend) == [1, 3]
    assert kept(ROW, 1, segments=segments, num_segments=2, others="keep", backend=backend) == [2, 5, 6, 7]
    assert kept(ROW, top_p=0.5, segments=segments, num_segments=2, backend=backend) == [2, 5]
    huge = segments + 2**32 * (segments == 7)  # must not wrap around to segment 7
    assert kept(ROW, 1, segments=huge, num_segments=8, backend=backend) == [2, 5]


@backends
def test_overflow_prefers_forced_then_score(backend):
    selection = select(ROW, 5, keep=ROW == 1, capacity=3, backend=backend)
    assert selection.indices.tolist() == [[1, 3, 5]] and selection.overflow.tolist() == [True]
    assert kept(ROW, 5, keep=ROW < 4, capacity=2, order="score", backend=backend) == [0, 6]
    assert kept(ROW, 5, capacity=0, backend=backend) == []
    assert not select(ROW, 3, capacity=3, backend=backend).overflow.item()
    right = select(ROW, 2, capacity=4, align="right", backend=backend)
    assert right.indices.tolist() == [[-1, -1, 5, 7]] and right.valid.tolist() == [[False, False, True, True]]


def test_capacity():
    segments = torch.zeros(1, 8, dtype=torch.int64)
    anything = torch.zeros(1, 8, dtype=torch.bool)
    assert select(ROW, 3).capacity == 3
    assert select(ROW, 99).capacity == 8
    assert select(ROW, 3, segments=segments, num_segments=2).capacity == 6
    assert select(ROW, 3, threshold=2.0).capacity == 3
    for options in ({"keep": anything}, {"others": "keep"}):
        assert select(ROW, 3, **options).capacity == 8
    assert select(ROW, torch.tensor([3])).capacity == select(ROW, threshold=0.0).capacity == 8
    scores = torch.stack([ROW[0], -ROW[0]])
    for align in ("left", "right"):
        exact = select(scores, threshold=4.0, capacity="exact", align=align)
        assert exact.capacity == 4 and exact.counts.tolist() == [4, 0] and rows_of(exact) == [[2, 4, 5, 7], []]
    assert select(scores[:0], threshold=4.0, capacity="exact").indices.shape == (0, 0)


def test_values_per_head():
    scores = torch.stack([ROW, ROW.flip(-1)], 1)  # [1, 2, 8]
    assert rows_of(select(scores, torch.tensor([[2, 1]]))) == [[5, 7], [2]]
    assert rows_of(select(scores, torch.tensor([2]))) == [[5, 7], [0, 2]]
    assert rows_of(select(scores, threshold=torch.tensor([[6.0, 9.0]]))) == [[5, 7], [2]]
    assert rows_of(select(scores, 2, keep=ROW == 3)) == [[0, 5], [0, 2]]
    segments = (torch.arange(8) // 4)[None]
    assert rows_of(select(scores, torch.tensor([[[1, 0], [0, 2]]]), segments=segments)) == [[2], [5, 7]]
    assert rows_of(select(scores, torch.tensor([[1, 0]]), segments=segments)) == [[2], [2]]


def test_threshold_is_rounded_to_the_dtype_of_scores():
    """As torch does in ``scores >= 0.7``; exact comparison would drop the very value that was asked for."""
    for dtype in DTYPES:
        scores = torch.tensor([[0.7, 0.6]], dtype=dtype)
        for backend in ("compiled", "reference"):
            assert kept(scores, threshold=0.7, backend=backend) == [0]


@pytest.mark.parametrize("rounding, count", [(math.floor, 1), (round, 2), (math.ceil, 2)])
def test_rounding_a_share_is_the_callers(rounding, count):
    """Published methods disagree (floor, round, ceil), so select takes a count and no share."""
    assert len(kept(ROW[:, :7], rounding(0.25 * 7))) == count
    with pytest.raises(TypeError, match="num_keep must be an int, got float"):
        select(ROW, 0.25)


def test_raster_and_score_order():
    """VisionZip keeps the order of the picture, SnapKV and PruMerge that of the scores."""
    raster, score = select(ROW, 3), select(ROW, 3, order="score")
    assert raster.indices.tolist() == [[4, 5, 7]] and raster.ascending
    assert score.indices.tolist() == [[5, 7, 4]] and not score.ascending
    assert torch.equal(raster.mask(), score.mask())


# --- the operator, torch.compile, and wrong calls ---


def operator_arguments(requires_grad=False):
    scores = torch.rand(2, 3, 20, requires_grad=requires_grad)
    keep = torch.zeros(2, 20, dtype=torch.bool)
    segments = torch.zeros(2, 20, dtype=torch.int32)
    per_row = torch.full((6, 1), 4)
    limits = torch.full((6, 2), 0.1)
    yield (scores, 4, None, None, None, None, None, None, False, None, 1, None, 4, False, False)
    yield (scores, -1, per_row, limits, limits.double(), keep, keep, ~keep, True, segments, 2, None, 20, True, True)
    cu_seqlens = torch.tensor([0, 3, 20], dtype=torch.int32)
    packed = scores.detach()[0, 0].clone().requires_grad_(requires_grad)
    yield (packed, 4, None, None, None, None, None, None, False, None, 1, cu_seqlens, 4, False, False)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for arguments in operator_arguments(requires_grad):
        torch.library.opcheck(torch.ops.pyvtk.select.default, arguments)


def test_scores_are_detached():
    selection = select(torch.rand(2, 9, requires_grad=True), 3, threshold=torch.rand(2, requires_grad=True))
    assert not selection.indices.requires_grad


def test_guards_of_the_operator():
    plain = list(next(operator_arguments()))
    for place, wrong in [(0, torch.rand(20)), (2, torch.ones(6, 1)), (5, torch.zeros(2, 20)), (12, -1), (10, 0)]:
        arguments = plain.copy()
        arguments[place] = wrong
        with pytest.raises(RuntimeError, match="pyvtk: "):
            torch.ops.pyvtk.select(*arguments)
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        torch.ops.pyvtk.select(plain[0].double(), *plain[1:])


@backends
def test_compile(backend):
    torch._dynamo.reset()

    def choose(scores, keep, segments):
        first = select(scores, 5, backend=backend)
        options = {"threshold": 0.1, "top_p": 0.9, "keep": keep, "segments": segments, "num_segments": 3}
        return first, select(scores, 2, **options, order="score", align="right", backend=backend)

    scores, keep, segments = torch.rand(2, 30), torch.rand(2, 30) < 0.1, torch.randint(-1, 3, (2, 30))
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")(scores, keep, segments)
    for actual, expected in zip(compiled, choose(scores, keep, segments)):
        assert_same(actual, expected)
        assert actual.num_tokens == 30 and actual.ascending == expected.ascending and actual.align == expected.align


@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"packed": True}], ids=str)
def test_compile_recompiles_little_over_lengths(options):
    torch._dynamo.reset()
    counter = CompileCounter()
    packed = options.pop("packed", False)

    def choose(scores, cu_seqlens):
        return select(scores, 12, cu_seqlens=cu_seqlens, **options)

    compiled = torch.compile(choose, fullgraph=True, backend=counter)
    for tokens in range(8, 18):  # both sides of num_keep
        scores = torch.rand(tokens) if packed else torch.rand(2, tokens)
        cu_seqlens = torch.tensor([0, 3, tokens]) if packed else None
        assert_same(compiled(scores, cu_seqlens), choose(scores, cu_seqlens))
    assert counter.frame_count <= 2


BOOL = torch.zeros(1, 8, dtype=torch.bool)
INTS = torch.zeros(1, 8, dtype=torch.int64)
PACKED = torch.rand(8)
OFFSETS = torch.tensor([0, 8])
WRONG = [
    (TypeError, "scores must be a tensor, got list", lambda: select([1.0], 1)),
    (TypeError, "scores must have dtype", lambda: select(INTS, 1)),
    (TypeError, "scores must be a dense tensor", lambda: select(ROW.to_sparse(), 1)),
    (ValueError, "scores must have", lambda: select(PACKED, 1)),
    (ValueError, "scores must have", lambda: select(ROW, 1, cu_seqlens=OFFSETS)),
    (ValueError, "num_keep, threshold or top_p must be given", lambda: select(ROW)),
    (TypeError, "num_keep must be an int, got float", lambda: select(ROW, 1.5)),
    (TypeError, "num_keep must be an int, got bool", lambda: select(ROW, True)),
    (ValueError, "num_keep must be at least 0, got -1", lambda: select(ROW, -1)),
    (TypeError, "num_keep must have dtype", lambda: select(ROW, torch.tensor([1.0]))),
    (ValueError, "num_keep must be .*batch. = .1., got shape .2,", lambda: select(ROW, torch.tensor([1, 2]))),
    (ValueError, "num_keep must be", lambda: select(ROW, torch.tensor([[1]]))),
    (TypeError, "threshold must be a number or a tensor, got str", lambda: select(ROW, threshold="1")),
    (ValueError, "threshold must be a number, got nan", lambda: select(ROW, threshold=NAN)),
    (TypeError, "threshold must have dtype", lambda: select(ROW, threshold=torch.tensor([1]))),
    (ValueError, "threshold must be", lambda: select(ROW, threshold=torch.rand(3))),
    (ValueError, "top_p must be in 0..1, got 1.5", lambda: select(ROW, top_p=1.5)),
    (ValueError, "top_p must be in 0..1, got -0.5", lambda: select(ROW, top_p=-0.5)),
    (TypeError, "top_p must be a number or a tensor, got bool", lambda: select(ROW, top_p=True)),
    (ValueError, "top_p must be", lambda: select(ROW, top_p=torch.rand(1, 2))),
    (TypeError, "keep must be a tensor", lambda: select(ROW, 1, keep=[True])),
    (TypeError, "keep must have dtype bool", lambda: select(ROW, 1, keep=INTS)),
    (ValueError, "keep must be", lambda: select(ROW, 1, keep=BOOL[:, :7])),
    (ValueError, "drop must be", lambda: select(ROW, 1, drop=BOOL[0])),
    (TypeError, "drop must have dtype bool", lambda: select(ROW, 1, drop=ROW)),
    (ValueError, "candidates must be", lambda: select(ROW[:, None], 1, candidates=BOOL[:, None, None])),
    (ValueError, "candidates must be on the device", lambda: select(ROW, 1, candidates=BOOL.to("meta"))),
    (ValueError, "others must be one of", lambda: select(ROW, 1, others="all")),
    (TypeError, "segments must have dtype", lambda: select(ROW, 1, segments=ROW, num_segments=2)),
    (ValueError, "segments must be", lambda: select(ROW, 1, segments=INTS[0], num_segments=2)),
    (ValueError, "num_segments must be given", lambda: select(ROW, 1, segments=INTS)),
    (ValueError, "num_segments must be None", lambda: select(ROW, 1, num_segments=2)),
    (ValueError, "num_segments must be at least 1", lambda: select(ROW, 1, segments=INTS, num_segments=0)),
    (TypeError, "num_segments must be an int", lambda: select(ROW, 1, segments=INTS, num_segments=2.0)),
    (TypeError, "cu_seqlens must be a tensor", lambda: select(PACKED, 1, cu_seqlens=[0, 8])),
    (TypeError, "cu_seqlens must have dtype", lambda: select(PACKED, 1, cu_seqlens=PACKED)),
    (ValueError, "cu_seqlens must have", lambda: select(PACKED, 1, cu_seqlens=OFFSETS[None])),
    (ValueError, "cu_seqlens must hold", lambda: select(PACKED, 1, cu_seqlens=OFFSETS[:0])),
    (TypeError, "capacity must be an int, got str", lambda: select(ROW, 1, capacity="all")),
    (ValueError, "capacity must be at least 0", lambda: select(ROW, 1, capacity=-1)),
    (ValueError, "align must be one of", lambda: select(ROW, 1, align="middle")),
    (ValueError, "order must be one of", lambda: select(ROW, 1, order="random")),
    (ValueError, "backend must be one of", lambda: select(ROW, 1, backend="cpu")),
]


@pytest.mark.parametrize("error, message, call", WRONG, ids=[f"{i}-{w[1]}" for i, w in enumerate(WRONG)])
def test_wrong_arguments(error, message, call):
    with pytest.raises(error, match=f"select: {message}"):
        call()


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="backend 'compiled' cannot run: compiled kernels of select take"):
        select(ROW.double(), 1, backend="compiled")


def test_every_instruction_set_of_this_machine_is_tested():
    assert "portable" in _C.instruction_sets() and _C.instruction_set() in _C.instruction_sets()


def test_usual_call_is_the_general_one():
    """The page has an operator of its own for num_keep alone; any other argument at its default leaves that way."""
    for shape in ((3, 70), (2, 2, 9), (0, 5), (2, 0)):
        scores = torch.randint(4, shape) / 4
        for num_keep in (0, 1, 4, 100):
            assert_same(select(scores, num_keep), select(scores, num_keep, backend="compiled"))
    torch.library.opcheck(torch.ops.pyvtk.select_top.default, (torch.rand(3, 9), 4))
