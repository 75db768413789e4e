"""The CUDA kernels of merge_tokens, run by the emulation: bit for bit what the CPU's kernels give, which add in the
same order, and within the error budget of the reference."""

import emulated
import emulated_merge as kernels
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import assert_within_budget

from pyvtk.reference import merge as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_compact.cpp does not", allow_module_level=True)
OPS = torch.ops.pyvtk


@st.composite
def problems(draw):
    """x, assignment, weights, num_groups, mean, and a byte offset; assignments of groups that do not exist."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    batch = draw(st.sampled_from([0, 1, 2, 3]))
    tokens = draw(st.sampled_from([0, 1, 5, 31, 33, 600, 2100]))  # the last: more than a block scans at a time
    channels = draw(st.sampled_from([0, 1, 3, 8, 16, 37, 600]))
    groups = draw(st.sampled_from([0, 1, 4, 40, 700, 1100]))  # the last: members are sorted
    x = (torch.randn(batch, tokens, channels, generator=generator, dtype=torch.float64) * 3).to(
        draw(st.sampled_from(kernels.DTYPES))
    )
    kind = draw(st.sampled_from(["dense", "dense", "wide", "expanded"]))
    if kind == "wide":
        x = torch.zeros(batch, tokens, channels + 3, dtype=x.dtype)[..., :channels].copy_(x)
    if kind == "expanded" and batch > 0:
        x = x[:1].expand(batch, -1, -1)
    assignment = torch.randint(-1, max(groups, 1), (batch, tokens), generator=generator)
    if draw(st.booleans()):
        assignment = torch.where(torch.rand(assignment.shape, generator=generator) < 0.1, groups + 2**33, assignment)
    if groups == 0:
        assignment = assignment - 1
    weights = None
    if draw(st.booleans()):
        weights = torch.randn(batch, tokens, generator=generator, dtype=torch.float64)
        weights = weights if x.dtype == torch.float64 else weights.float()
        if draw(st.booleans()):
            weights = weights.round() * 0  # groups of no weight
    emulated.configure(draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([1, 2])))
    offset = draw(st.sampled_from([0, 0, 8]))
    return x, assignment, weights, groups, draw(st.booleans()), offset


def same(actual, expected) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(actual, expected), (actual, expected)


def examples(count: int):
    return settings(
        max_examples=count // 4 if emulated.SANITIZER else count, deadline=None, suppress_health_check=list(HealthCheck)
    )


@examples(160)
@given(problems())
def test_merge(problem):
    x, assignment, weights, groups, mean, offset = problem
    out, totals = kernels.merge_tokens(x, assignment, weights, groups, mean, offset=offset)
    known = torch.where(assignment >= groups, -1, assignment)
    plain, plain_totals = reference.merge_tokens(x, known, weights, groups, mean)
    same(totals, plain_totals)
    if x.dtype == torch.float64:  # no oracle is more exact: the bound of sums in any order
        bound, _ = reference.merge_tokens(x.abs(), known, None if weights is None else weights.abs(), groups, False)
        bound = bound / totals.abs().masked_fill(totals == 0, 1).unsqueeze(-1) if mean else bound
        assert ((out - plain).abs() <= torch.finfo(torch.float64).eps * (x.shape[1] + 2) * bound).all()
        return
    wide = None if weights is None else weights.double()
    assert_within_budget(out, reference.merge_tokens(x.double(), known, wide, groups, mean)[0], plain)
    if weights is None:  # with weights, the CPU multiplies and adds in one rounding or in two
        for a, b in zip((out, totals), OPS.merge_tokens(x, known, weights, groups, mean)):
            same(a, b)


@examples(160)
@given(problems(), st.integers(0, 2**32))
def test_gradient(problem, seed):
    x, assignment, weights, groups, mean, offset = problem
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(x.shape[0], groups, x.shape[2], generator=generator, dtype=torch.float64).to(x.dtype)
    known = torch.where(assignment >= groups, -1, assignment)
    _, totals = reference.merge_tokens(x, known, weights, groups, mean)
    grad_x, grad_weights = kernels.merge_tokens_backward(grad, x, assignment, weights, totals, mean, offset=offset)
    expected = OPS.merge_tokens_backward(grad, x, known, weights, totals, mean)
    same(grad_x, expected[0])
    if weights is None:
        assert grad_weights.numel() == 0
        return
    # products are added in another order than the CPU's: the bound of sums in any order
    products = torch.zeros(known.shape, dtype=torch.float64)
    bound = products
    if groups > 0 and x.numel() > 0:
        group, alive = known.clamp(min=0), known >= 0
        rows = grad.double().abs().gather(1, group.unsqueeze(-1).expand(x.shape))
        products = (rows * x.double().abs()).sum(-1) * alive
        bound = products
        if mean:
            alive &= totals.gather(1, group) != 0
            total = totals.abs().gather(1, group).masked_fill(~alive, 1)
            shares = weights.double().abs() * products * alive / total
            bound = (products + torch.zeros_like(totals).scatter_add(1, group, shares).gather(1, group)) * alive / total
    rounding = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    limit = rounding * (x.shape[1] + x.shape[2] + 4) * bound
    assert grad_weights.dtype == weights.dtype
    assert ((grad_weights.double() - expected[1].double()).abs() <= limit).all()


def test_more_groups_than_shared_memory_counts():
    emulated.configure()
    generator = torch.Generator().manual_seed(0)
    groups = 40 * 1024 // 4 // 16 + 5
    x, assignment = torch.randn(2, 1500, 3), torch.randint(-1, groups, (2, 1500), generator=generator)
    for a, b in zip(kernels.merge_tokens(x, assignment, None, groups, True),
                    OPS.merge_tokens(x, assignment, None, groups, True)):  # fmt: skip
        same(a, b)
