"""The CUDA kernels of select, run by the emulation: bit for bit what the reference says."""

import emulated
import pytest
import torch
from emulated_select import select
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvtk.reference import select as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_select.cpp does not", allow_module_level=True)

INFINITY, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([NAN, INFINITY, -INFINITY, 0.0, -0.0, 1.0, 1.0, -1.0, 0.5, 1e-42, -1e-42, 3e38])
# As on an H100, and room for sets of rows up to about a thousand tokens, but for no ranks.
PLENTY, LITTLE = 0, emulated.DECLARED + 1024
# Rows in three launches: room for 64 ranks of a list.
LITTLE_LIST = emulated.DECLARED + 256


def make_scores(kind: str, shape: tuple, generator: torch.Generator) -> torch.Tensor:
    if kind == "special":
        return SPECIAL[torch.randint(len(SPECIAL), shape, generator=generator)]
    if kind == "ties":
        return torch.randint(-2, 3, shape, generator=generator) / 4
    if kind == "equal":
        return torch.full(shape, 0.25)
    if kind == "softmax":
        return torch.randn(shape, generator=generator).mul(4).softmax(-1) if shape[-1] else torch.zeros(shape)
    if kind == "bits":  # any pattern, subnormal numbers and NaN with a sign among them
        return torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
    return torch.randn(shape, generator=generator)


KINDS = ["special", "ties", "equal", "softmax", "bits", "normal"]


def assert_same(arguments: tuple, **how) -> None:
    for name, actual, expected in zip(
        ("indices", "counts", "overflow"), select(*arguments, **how), reference.select(*arguments)
    ):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert torch.equal(actual, expected), f"{name}: {actual} != {expected}"


@st.composite
def problems(draw, long=False):
    """Arguments of the operator; ``long``: such as the kernels for long rows take."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = draw(st.sampled_from([0, 1, 2, 31, 32, 33, 64, 65, 127, 130, 257, 576, 1025, 1500]))
    packed = not long and draw(st.integers(0, 4)) == 0
    if packed:
        cuts = torch.randint(tokens + 1, (draw(st.integers(1, 4)),), generator=generator).sort().values
        cu_seqlens, lead = cuts.int(), (len(cuts) - 1,)
        shape = (tokens,)
    else:
        cu_seqlens, lead = None, draw(st.sampled_from([(1,), (2,), (0,), (1, 2), (2, 3)]))
        shape = (*lead, tokens)
    rows = lead[0] * (lead[1] if len(lead) == 2 else 1)
    scores = make_scores(draw(st.sampled_from(KINDS)), shape, generator).to(draw(st.sampled_from(emulated.DTYPES)))

    def mask_shape() -> tuple:
        return (shape[0], shape[2]) if len(shape) == 3 and draw(st.booleans()) else shape

    def mask(share: float) -> torch.Tensor | None:
        return torch.rand(mask_shape(), generator=generator) < share if draw(st.booleans()) else None

    plain = draw(st.booleans())
    keep, drop, candidates = (None, None, None) if plain else (mask(0.1), mask(0.2), mask(0.7))
    segments, num_segments = None, 1
    keep = None if long else keep
    plain = plain or long
    if not plain and draw(st.integers(0, 2)) == 0:
        num_segments = draw(st.integers(1, 4))
        segments = torch.randint(-1, num_segments + 1, mask_shape(), generator=generator).int()
    groups = draw(st.sampled_from([1, num_segments]))
    some = draw(st.sampled_from([0, 1, tokens // 3, tokens - 1, tokens, tokens + 5]))
    num_keep = draw(st.sampled_from([-1, max(some, 0)]))
    per_row = torch.randint(-2, tokens + 3, (rows, groups), generator=generator) if draw(st.booleans()) else None
    threshold = top_p = None
    if draw(st.integers(0, 3)) == 0:
        threshold = SPECIAL[torch.randint(len(SPECIAL), (rows, groups), generator=generator)]
        threshold = threshold.to(scores.dtype).float()
    if not plain and draw(st.integers(0, 2)) == 0:
        top_p = torch.rand(rows, groups, generator=generator, dtype=torch.float64) * 1.4 - 0.2
        top_p[torch.rand(rows, groups, generator=generator) < 0.2] = NAN
    capacity = draw(st.sampled_from([0, 1, tokens // 4, tokens, tokens + 7]))
    by_score = not plain and draw(st.booleans())
    return (
        scores, num_keep, per_row, threshold, top_p, keep, drop, candidates, not long and draw(st.booleans()), segments,
        num_segments, cu_seqlens, capacity, draw(st.booleans()), by_score,
    )  # fmt: skip


@settings(max_examples=100 if emulated.SANITIZER else 400, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from([1, 2, 5]), st.sampled_from([PLENTY, LITTLE]))
def test_equals_the_reference(arguments, seed, blocks_alive, shared_bytes):
    emulated.configure(seed, blocks_alive, shared_bytes)
    assert_same(arguments)


@settings(max_examples=100 if emulated.SANITIZER else 400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    problems(long=True), st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from([1, 2, 5]),
    st.sampled_from([PLENTY, LITTLE_LIST]), st.sampled_from([1, 2, 5, 8, 9, 17, 40]), st.sampled_from([32, 64, 160]),
)  # fmt: skip
def test_long_rows_equal_the_reference(arguments, seed, blocks_alive, shared_bytes, words_of_chunk, threads):
    emulated.configure(seed, blocks_alive, shared_bytes)
    assert_same(arguments, words_of_chunk=words_of_chunk, threads=threads)


def top(scores: torch.Tensor, num_keep: int) -> tuple:
    return (scores, num_keep, None, None, None, None, None, None, False, None, 1, None, num_keep, False, False)


def packed_top(scores: torch.Tensor, num_keep: int) -> tuple:
    """One sample, whose length the launcher does not know: its ranks stand in shared memory, if they fit."""
    ends = torch.tensor([0, scores.shape[0]], dtype=torch.int32)
    return (scores, num_keep, None, None, None, None, None, None, False, None, 1, ends, num_keep, False, False)


@pytest.mark.parametrize("dtype", emulated.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 33, 576, 1100, 5000])
def test_top(kind, tokens, dtype):
    emulated.configure()
    scores = make_scores(kind, (2, tokens), torch.Generator().manual_seed(tokens)).to(dtype)
    for num_keep in sorted({0, 1, tokens // 4, tokens - 1, tokens}):
        assert_same(top(scores, num_keep))


@pytest.mark.parametrize("dtype", emulated.DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 33, 1100, 5000])
def test_top_of_long_rows(kind, tokens, dtype):
    scores = make_scores(kind, (2, tokens), torch.Generator().manual_seed(tokens)).to(dtype)
    for shared_bytes in (PLENTY, LITTLE_LIST):
        emulated.configure(tokens, 3, shared_bytes)
        for num_keep in sorted({0, 1, tokens // 4, tokens - 1, tokens}):
            assert_same(top(scores, num_keep), words_of_chunk=max(tokens // 150, 1), threads=64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_so_long_that_it_gets_three_launches(kind):
    emulated.configure(1, 3)
    assert_same(top(make_scores(kind, (1, 16391), torch.Generator().manual_seed(0)), 5000))


def test_same_bits_whatever_the_order_of_blocks():
    """On the way too: the list of a bin is in the order of tokens, so nothing can depend on who comes first."""
    scores = make_scores("ties", (3, 1500), torch.Generator().manual_seed(0))
    for seed in range(8):
        emulated.configure(seed, 1 + seed % 5)
        assert_same(top(scores, 333), words_of_chunk=3, threads=64)


def test_a_row_whose_ranks_do_not_fit():
    emulated.configure(shared_bytes=emulated.DECLARED + 8 * 1024)
    scores = torch.randn(16001, generator=torch.Generator().manual_seed(0))
    assert_same(packed_top(scores, 5000))


def test_sets_that_do_not_fit_are_an_error():
    emulated.configure(shared_bytes=LITTLE)
    with pytest.raises(AssertionError, match="invalid argument"):
        select(*packed_top(torch.zeros(16000), 1))
