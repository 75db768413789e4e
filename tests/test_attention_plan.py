"""attention_plan: the compiled operator gives what the reference gives, number for number."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import pyvtk
from pyvtk.reference import attention_plan as reference


def random_facts(generator: torch.Generator, batch: int, rows: int, samples: int, images: int, regions: int):
    """int32 [batch, 8, rows], with ties, several images, text and invalid tokens mixed."""

    def numbers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (batch, rows), generator=generator)

    sample = numbers(0, samples).sort(1).values if samples else torch.zeros((batch, rows))
    row = torch.rand((batch, rows), generator=generator).argsort(1)
    image = numbers(-2, max(images, 1))
    coords = numbers(0, 3), numbers(0, 9), numbers(0, 9)
    facts = [row, image, *coords, numbers(0, rows + 1), numbers(0, max(regions, 1)), sample]
    return torch.stack([f.to(torch.int32) for f in facts], 1)


@st.composite
def problems(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    samples = draw(st.sampled_from([0, 0, 1, 4]))
    batch = 1 if samples else draw(st.integers(0, 3))
    regions = draw(st.sampled_from([0, 0, 3]))
    rows = [draw(st.sampled_from([0, 1, 15, 16, 47, 100])) for _ in range(2)]
    facts = [random_facts(generator, batch, n, samples, draw(st.integers(0, 3)), regions) for n in rows]
    if samples:
        # one axis of samples for queries and keys
        facts[1], rows[1] = facts[0].clone(), rows[0]
        counts = torch.bincount(facts[0][0, 7].long(), minlength=samples)
        cu_seqlens = torch.cat([torch.zeros(1), counts.cumsum(0)])[:samples].to(torch.int32)
    else:
        cu_seqlens = None
    curves = [torch.randint(0, 50, (draw(st.integers(1, 2)), batch, n), generator=generator) for n in rows]
    if len({c.shape[0] for c in curves}) > 1:
        curves = [c[:1] for c in curves]
    routes = torch.randint(0, 2, (batch if regions else 0, regions, regions), generator=generator).to(torch.int32)
    radius = [draw(st.sampled_from([0, 1, 3, 2**30])) for _ in range(3)]
    block = [draw(st.sampled_from([16, 32, 64])) for _ in range(2)]
    rule = [*block, *radius, draw(st.integers(0, 1)), draw(st.integers(0, 1))]
    return *facts, *(c.contiguous() for c in curves), cu_seqlens, routes, rule


@settings(max_examples=200, deadline=None)
@given(problem=problems())
def test_equals_the_reference(problem):
    actual = torch.ops.pyvtk.attention_plan(*problem)
    expected = reference.attention_plan(*problem)
    names = "query_slots key_slots key_blocks key_counts query_order query_blocks query_counts key_order".split()
    for name, a, b in zip(names, actual, expected, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("packed", [False, True])
def test_registration(packed):
    images = [pyvtk.ImageSpan(0, 5, (1, 5, 7)), pyvtk.ImageSpan(1, 2, (3, 4, 5))]
    layout = pyvtk.TokenLayout.from_images([45, 70], images, packed=packed)
    facts = torch.zeros((1 if packed else 2, 8, layout.num_tokens), dtype=torch.int32)
    curve = torch.zeros((1, *facts.shape[::2]), dtype=torch.int64)
    routes = torch.zeros((0, 0, 0), dtype=torch.int32)
    rule = [16, 32, 1, 1, 1, 0, 0]
    torch.library.opcheck(torch.ops.pyvtk.attention_plan, (facts, facts, curve, curve, layout.cu_seqlens, routes, rule))


def test_a_guard_names_what_is_wrong():
    facts = torch.zeros((1, 8, 4), dtype=torch.int32)
    curve = torch.zeros((1, 1, 4), dtype=torch.int64)
    routes = torch.zeros((0, 0, 0), dtype=torch.int32)
    with pytest.raises(RuntimeError, match="rule has 2 numbers"):
        torch.ops.pyvtk.attention_plan(facts, facts, curve, curve, None, routes, [16, 16])
    with pytest.raises(RuntimeError, match="facts has size 7"):
        torch.ops.pyvtk.attention_plan(facts[:, :7], facts, curve, curve, None, routes, [16, 16, 1, 1, 1, 0, 0])
