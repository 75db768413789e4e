"""attention_facts: the compiled operator gives what the reference gives, number for number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import same

from pyvtk.reference import attention_facts as reference
from pyvtk.reference.attention_facts import ALL, AS_GIVEN, OF_TEXT, OF_VISUAL
from pyvtk.reference.layout import extent_of

EXTREMES = (-(2**63), 2**63 - 1, -(2**31), 2**31 - 1, 65535)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    packed = draw(st.booleans())
    batch, tokens = 1 if packed else draw(st.integers(0, 3)), draw(st.sampled_from([0, 1, 17, 60]))
    shape = (tokens,) if packed else (batch, tokens)

    def numbers(low, high, dtype, *more):
        values = torch.randint(low, high, (*shape, *more), generator=generator)
        if dtype == torch.int64 and draw(st.booleans()):
            rare = torch.tensor(EXTREMES)[torch.randint(5, values.shape, generator=generator)]
            values = torch.where(torch.rand(values.shape, generator=generator) < 0.2, rare, values)
        values = values.to(dtype)
        return values if draw(st.booleans()) else values.repeat_interleave(2, -1)[..., ::2]

    wide = st.sampled_from([torch.int32, torch.int64])
    image_id, positions = numbers(-2, 3, draw(wide)), numbers(-4, 90, draw(wide))
    if not packed and draw(st.booleans()):
        positions = positions[:1].expand(shape)
    deep = draw(st.integers(1, 10))
    coords = torch.stack([numbers(0, high, torch.int32) for high in (deep, 40, 65536)], -1)
    # of text they may be anything
    anything = torch.randint(-(2**31), 2**31, coords.shape, generator=generator).to(torch.int32)
    coords = torch.where((image_id >= 0)[..., None], coords, anything)
    flags = [torch.rand(shape, generator=generator) < 0.8 for _ in range(2)]
    cu_seqlens = None
    if packed:
        ends = torch.randint(0, tokens + 1, (draw(st.integers(0, 3)),), generator=generator).sort().values
        cu_seqlens = torch.cat([torch.zeros(1), ends]).to(torch.int32)
    extent = extent_of(image_id >= 0, coords, cu_seqlens)
    group = draw(st.sampled_from([ALL, OF_TEXT, OF_VISUAL, AS_GIVEN]))
    radius = [draw(st.sampled_from([0, 1, 3, 2**30])) for _ in range(3)]
    sizes = [draw(st.sampled_from([1, 2, 7, 2**30])) for _ in range(3)]
    strip, window = draw(st.sampled_from([
        ([draw(st.sampled_from([16, 64])), *radius], []),
        ([], [*sizes, *(draw(st.integers(0, size - 1)) for size in sizes)]),
        ([], []),
    ]))  # fmt: skip
    return (
        image_id, coords, positions, flags[0] if draw(st.booleans()) else None, cu_seqlens, extent,
        flags[1] if group == AS_GIVEN else None, group, draw(st.booleans()), strip, window,
    )  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(problem=problems())
def test_equals_the_reference(problem):
    same(torch.ops.pyvtk.attention_facts(*problem), reference.attention_facts(*problem))


def problem_of(shape, cu_seqlens=None, keys=None, strip=(16, 1, 1, 1), window=()):
    image_id = torch.arange(8).reshape(shape) % 3 - 1
    coords = image_id.clamp(min=0).to(torch.int32)[..., None].expand(*shape, 3)
    extent = extent_of(image_id >= 0, coords, cu_seqlens)
    group = ALL if keys is None else AS_GIVEN
    return image_id, coords, image_id, image_id < 1, cu_seqlens, extent, keys, group, True, list(strip), list(window)


@pytest.mark.parametrize(
    "problem",
    [
        problem_of((2, 4)),
        problem_of((2, 4), keys=torch.arange(8).reshape(2, 4) < 5),
        problem_of((8,), torch.tensor([0, 3, 7], dtype=torch.int32), strip=(), window=(2, 2, 2, 0, 1, 1)),
    ],
    ids=("a batch", "keys", "packed, windows"),
)
def test_registration(problem):
    torch.library.opcheck(torch.ops.pyvtk.attention_facts, problem)


def test_a_guard_names_what_is_wrong():
    problem = problem_of((2, 4))
    with pytest.raises(RuntimeError, match="keys are given, or a group of them"):
        torch.ops.pyvtk.attention_facts(*problem[:7], AS_GIVEN, *problem[8:])
    with pytest.raises(RuntimeError, match="strip has 2 numbers"):
        torch.ops.pyvtk.attention_facts(*problem[:9], [16, 1], [])
    with pytest.raises(RuntimeError, match="coords do not fit image_id"):
        torch.ops.pyvtk.attention_facts(problem[0], problem[1][:, :3], *problem[2:])
