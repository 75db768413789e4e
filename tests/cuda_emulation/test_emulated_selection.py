"""The CUDA kernels of the selection family, run by the emulation: what the reference gives; what is no token is left
out."""

import emulated
import emulated_selection as kernels
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyvtk.reference import selection as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_selection.cpp does not", allow_module_level=True)


def same(actual, expected) -> None:
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b), (a, b)


def examples(count: int):
    return settings(
        max_examples=count // 4 if emulated.SANITIZER else count, deadline=None, suppress_health_check=list(HealthCheck)
    )


TOKENS = [0, 1, 5, 31, 33, 600, 2100]  # the last: more than a block scans at a time
seeds = st.integers(0, 2**32)


@st.composite
def selections(draw, tokens=None):
    """indices, counts, align_right, num_tokens: with tokens that come again, counts beyond what there is."""
    generator = torch.Generator().manual_seed(draw(seeds))
    rows = draw(st.sampled_from([(0,), (1,), (3,), (2, 2)]))
    tokens = draw(st.sampled_from(TOKENS)) if tokens is None else tokens
    capacity = draw(st.sampled_from(TOKENS if tokens else [0]))
    indices = torch.randint(max(tokens, 1), (*rows, capacity), generator=generator)
    counts = torch.randint(-2, capacity + 3, rows, generator=generator).to(torch.int32)
    emulated.configure(draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([1, 2])))
    return indices, counts, draw(st.booleans()), tokens


@examples(60)
@given(seeds, st.sampled_from([(0,), (1,), (3,), (2, 2)]), st.sampled_from(TOKENS), st.booleans())
def test_of_mask(seed, rows, tokens, align_right):
    emulated.configure()
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*rows, tokens, generator=generator) < torch.rand(1, generator=generator)
    for capacity in (0, 1, tokens // 2, tokens + 3):
        arguments = mask, capacity, align_right
        same(kernels.selection_of_mask(*arguments), reference.selection_of_mask(*arguments))


@examples(80)
@given(selections())
def test_lookups(problem):
    indices, counts, align_right, _ = problem
    same(
        kernels.selection_valid(counts, indices.shape[-1], align_right),
        reference.selection_valid(counts, indices.shape[-1], align_right),
    )
    for packed in (False, True) if counts.dim() == 1 else (False,):
        arguments = *problem, packed
        same(kernels.selection_mask(*arguments), reference.selection_mask(*arguments))
        same(kernels.selection_inverse(*arguments), reference.selection_inverse(*arguments))


@examples(80)
@given(selections(), seeds)
def test_complement(problem, seed):
    *_, counts, _, tokens = problem
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.randint(-2, tokens + 3, (counts.numel() + 1,), generator=generator).to(torch.int32)
    for starts in (None, cu_seqlens.sort().values, cu_seqlens) if counts.dim() == 1 else (None,):
        for capacity in (0, tokens // 2, tokens + 3):
            arguments = *problem, starts, capacity
            same(kernels.selection_complement(*arguments), reference.selection_complement(*arguments))


@examples(80)
@given(selections(), st.sampled_from(TOKENS), st.booleans(), st.booleans(), seeds)
def test_then(problem, capacity, align_right, with_overflow, seed):
    indices, counts, *_ = problem
    generator = torch.Generator().manual_seed(seed)
    capacity = capacity if indices.shape[-1] else 0
    chosen = torch.randint(max(indices.shape[-1], 1), (*counts.shape, capacity), generator=generator)
    number = torch.randint(-2, capacity + 3, counts.shape, generator=generator).to(torch.int32)
    if indices.shape[-1] == 0:
        number = number.clamp(0, 0)
    overflow = torch.rand(counts.shape, generator=generator) < 0.5
    arguments = *problem[:3], chosen, number, align_right, overflow if with_overflow else None, None
    same(kernels.selection_then(*arguments), reference.selection_then(*arguments))


@pytest.mark.parametrize("align_right", [False, True])
def test_rows_of_several_pieces(align_right):
    """More tokens than a block marks, or looks up, at a time."""
    emulated.configure()
    tokens = 66000
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(tokens, generator=generator)[:900] for _ in range(2)])
    problem = indices, torch.tensor([900, 850], dtype=torch.int32), align_right, tokens
    same(kernels.selection_complement(*problem, None, 65300), reference.selection_complement(*problem, None, 65300))
    for packed in (False, True):
        same(kernels.selection_mask(*problem, packed), reference.selection_mask(*problem, packed))
        same(kernels.selection_inverse(*problem, packed), reference.selection_inverse(*problem, packed))


FOREIGN = torch.tensor([[3, -1, 7, 2**40, 1, -(2**62)]])


def test_what_is_no_token_is_left_out():
    emulated.configure()
    counts = torch.tensor([6], dtype=torch.int32)
    assert kernels.selection_mask(FOREIGN, counts, False, 5, False).tolist() == [[False, True, False, True, False]]
    assert kernels.selection_inverse(FOREIGN, counts, False, 5, False).tolist() == [[-1, 4, -1, 0, -1]]
    indices, count, _ = kernels.selection_complement(FOREIGN, counts, False, 5, None, 4)
    assert indices.tolist() == [[0, 2, 4, -1]] and count.tolist() == [3]


def test_what_is_no_slot_is_left_out():
    emulated.configure()
    first = torch.arange(10, 16)[None], torch.tensor([5], dtype=torch.int32), True  # slot 0 is padding
    second = torch.tensor([[0, 5, -1, 6, 2**40, 1]]), torch.tensor([6], dtype=torch.int32), False
    indices, counts, overflow = kernels.selection_then(*first, *second, None, None)
    assert indices.tolist() == [[15, 11, -1, -1, -1, -1]] and counts.tolist() == [2] and overflow.tolist() == [False]
