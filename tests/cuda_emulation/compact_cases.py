"""Selections and tensors for the tests of the emulated compact family."""

from __future__ import annotations

import emulated
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pyvtk.reference import compact as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DTYPES = [*FLOATS, torch.uint8, torch.bool, torch.int16, torch.int64, torch.complex64, torch.complex128]


def examples(count: int):
    return settings(
        max_examples=count // 4 if emulated.SANITIZER else count, deadline=None, suppress_health_check=list(HealthCheck)
    )


def random(shape, dtype, generator) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 3
    return (x > 0) if dtype == torch.bool else x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.numel():  # bits: NaN equals itself, and -0.0 is not 0.0
        assert torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (actual, expected)))


def strided(draw, x: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values in another layout. ``axis`` has more than its tokens in memory, sometimes many more."""
    kind = draw(st.sampled_from(["dense", "dense", "wide", "huge", "transposed", "channels strided", "offset"]))
    if kind == "dense" or x.dim() < 2:
        return x
    if kind == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "channels strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    extra = {"wide": 3, "huge": 1000, "offset": 16}[kind]
    shape = list(x.shape)
    shape[-1] += extra
    room = torch.zeros(shape, dtype=x.dtype)[..., : x.shape[-1]]
    return room.copy_(x)


@st.composite
def selections(draw, heads=False, most_tokens=40, unique=False, wild=True):
    """indices, counts, align_right, tokens. Indices in any order, some repeated and (``wild``) some that are none."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from([(1, 1), (2, 3), (3, 2)] if heads else [(0,), (1,), (2,), (3,), (5,)]))
    tokens = draw(st.sampled_from([0, 1, 2, 7, 33, most_tokens]))
    capacity = draw(st.sampled_from([0, 1, 3, tokens // 2, tokens, tokens + 3]))
    kind = "ascending" if unique else draw(st.sampled_from(["ascending", "order", "repeated", "equal", "wild"]))
    if kind in ("ascending", "order") or tokens == 0:
        indices = torch.rand(*rows, tokens, generator=generator).argsort(-1)[..., :capacity]
        padding = torch.full((*rows, capacity - indices.shape[-1]), -1)
        indices = torch.cat([indices.sort(-1).values if kind == "ascending" else indices, padding], -1)
        most = min(capacity, tokens)
    else:
        indices = torch.randint(0, 1 if kind == "equal" else tokens, (*rows, capacity), generator=generator)
        most = capacity
    if kind == "wild" and wild:
        bad = torch.tensor([-1, -(2**40), tokens, 2**31 + 1, 2**40])[
            torch.randint(5, indices.shape, generator=generator)
        ]
        indices = torch.where(torch.rand(indices.shape, generator=generator) < 0.3, bad, indices)
    counts = torch.randint(0, most + 1, rows, dtype=torch.int32, generator=generator)
    if draw(st.booleans()):
        counts = torch.full_like(counts, most)
    align_right = not unique and draw(st.booleans())
    if align_right:
        indices = torch.stack([row.roll(int(capacity - n)) for row, n in zip(indices.flatten(0, -2), counts.flatten())]
                              ).view(indices.shape) if indices.numel() else indices  # fmt: skip
    return indices, counts, align_right, tokens, generator


def tame(indices, counts, align_right, tokens):
    """The selection without what is no token: its slots become token 0. And which slots those are."""
    bad = (indices < 0) | (indices >= tokens)
    return torch.where(bad, 0, indices), bad & reference._valid(indices, counts, align_right)


CHANNELS = [1, 2, 3, 4, 5, 8, 16, 17, 40, 130]


def offset_for(aligned: int, tensors) -> int:
    """A tensor never misses an address that is a multiple of its numbers."""
    element = max(x.element_size() // (2 if x.is_complex() else 1) for x in tensors)
    return 0 if aligned == 0 else max(aligned, element) % 16
