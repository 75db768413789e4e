"""The CUDA kernels of restore and its gradient, run by the emulation: bit for bit what the reference gives where rows
replace others, within the error budget where they are added."""

import emulated
import emulated_compact as kernels
import pytest
import torch
from compact_cases import (
    CHANNELS,
    DTYPES,
    FLOATS,
    examples,
    offset_for,
    random,
    same,
    selections,
    strided,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st
from support import assert_within_budget

from pyvtk.reference import compact as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_compact.cpp does not", allow_module_level=True)

OPS = torch.ops.pyvtk


@st.composite
def restorations(draw, gated: bool, wild: bool):
    """Arguments of restore."""
    packed_source = draw(st.integers(0, 3)) == 0
    heads = not packed_source and draw(st.integers(0, 3)) == 0
    indices, counts, align_right, tokens, generator = draw(selections(heads, wild=wild))
    rows, capacity = tuple(indices.shape[:-1]), indices.shape[-1]
    dtype = draw(st.sampled_from([*FLOATS, torch.complex64] if gated else DTYPES))
    channels = draw(st.sampled_from(CHANNELS))
    lead, dim = draw(st.sampled_from([((), len(rows)), ((2,), len(rows) + 1)])) if not heads else ((), 2)
    if packed_source:
        dim -= 1
        update, base = (rows[0], *lead, capacity, channels), (*lead, tokens, channels)
    else:
        update, base = (*rows, *lead, capacity, channels), (*rows, *lead, tokens, channels)
    update = strided(draw, random(update, dtype, generator), 0)
    base = strided(draw, random(base, dtype, generator), 0) if draw(st.booleans()) else None
    gate = None
    if gated:
        gate = torch.randn(
            indices.shape, generator=generator, dtype=draw(st.sampled_from([torch.float32, torch.float64]))
        )
    if gate is not None and dtype == torch.float64:
        gate = gate.double()
    emulated.configure(draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([1, 2, 5])))
    aligned = offset_for(draw(st.sampled_from([0, 0, 8, 4, 2, 1])), [update])
    return (indices, counts, align_right, update, base, gate, dim, tokens, packed_source), aligned


def without_wild(indices, counts, align_right, tokens):
    """A selection of the same slots without those of no token: token `tokens`, of one token more."""
    bad = (indices < 0) | (indices >= tokens)
    return torch.where(bad, tokens, indices), counts, align_right


@examples(160)
@given(restorations(gated=False, wild=True))
def test_restore_replaces(case):
    (indices, counts, align_right, update, base, gate, dim, tokens, packed), offset = case
    actual = kernels.restore(indices, counts, align_right, update, base, gate, dim, tokens, packed, offset=offset)
    wide = None
    if base is not None:
        row = list(base.shape)
        row[dim] = 1
        wide = torch.cat([base, base.new_zeros(row)], dim)
    # what is no token lands on one token more, which is cut off
    selected = without_wild(indices, counts, align_right, tokens)
    expected = reference.restore(*selected, update, wide, gate, dim, tokens + 1, packed)
    same(actual, expected.narrow(dim, 0, tokens))
    if base is not None:
        cleared = kernels.restore(indices, counts, align_right, None, base, None, dim, tokens, packed, offset=offset)
        expected = reference.restore(*selected, torch.zeros_like(update), wide, gate, dim, tokens + 1, packed)
        same(cleared, expected.narrow(dim, 0, tokens))


@examples(160)
@given(restorations(gated=True, wild=False))
def test_restore_adds(case):
    arguments, offset = case
    actual = kernels.restore(*arguments, offset=offset)
    same(actual, kernels.restore(*arguments, offset=offset))
    if arguments[3].is_complex():  # added as two reals
        real = [x if x is None else torch.view_as_real(x) for x in arguments[3:5]]
        parts = kernels.restore(*arguments[:3], *real, *arguments[5:])
        same(torch.view_as_real(actual), parts)
        return
    indices, counts, align_right, update, base, gate, *rest = arguments
    plain = reference.restore(*arguments)
    if update.dtype == torch.float64:  # no oracle is more exact: the bound of sums in any order
        largest = [None if x is None else x.abs() for x in (update, base, gate)]
        bound = reference.restore(indices, counts, align_right, *largest, *rest)
        rounding = torch.finfo(torch.float64).eps * (indices.numel() + 2)
        assert ((actual - plain).abs() <= rounding * bound).all()
        return
    double = (update.double(), None if base is None else base.double(), gate.double())
    assert_within_budget(actual, reference.restore(indices, counts, align_right, *double, *rest), plain)


@examples(160)
@given(restorations(gated=False, wild=True), st.integers(0, 2**32))
def test_gradient_of_restore_that_replaces(case, seed):
    (indices, counts, align_right, update, _, _, dim, tokens, packed), offset = case
    shape = list(update.shape)[int(packed) :]
    shape[dim] = tokens + 1
    grad = random(shape, update.dtype, torch.Generator().manual_seed(seed))
    # what is no token lands on one token more, whose gradient is 0
    grad.narrow(dim, tokens, 1).zero_()
    selected = without_wild(indices, counts, align_right, tokens)
    expected, _ = OPS.restore_backward(*selected, grad, None, None, dim, packed)
    grad = grad.narrow(dim, 0, tokens)
    actual, none = kernels.restore_backward(indices, counts, align_right, grad, None, None, dim, packed, offset=offset)
    same(actual, expected)
    assert none.numel() == 0


@examples(160)
@given(restorations(gated=True, wild=False), st.integers(0, 2**32))
def test_gradient_of_restore_that_adds(case, seed):
    (indices, counts, align_right, update, _, gate, dim, tokens, packed), offset = case
    shape = list(update.shape)[int(packed) :]
    shape[dim] = tokens
    grad = random(shape, update.dtype, torch.Generator().manual_seed(seed))
    arguments = (indices, counts, align_right, grad, update, gate, dim, packed)
    actual, actual_gate = kernels.restore_backward(*arguments, offset=offset)
    expected, expected_gate = OPS.restore_backward(*arguments)
    same(actual, expected)
    assert actual_gate.dtype == gate.dtype
    # products are added in another order than the CPU's
    rounding = torch.finfo(torch.float64 if update.dtype in (torch.float64, torch.complex128) else torch.float32).eps
    largest = float(expected_gate.abs().max()) if gate.numel() else 0.0
    norms = float(grad.abs().double().max() * update.abs().double().max()) if grad.numel() and update.numel() else 0.0
    sizes = max(update.numel() // max(indices.numel(), 1), 1)
    torch.testing.assert_close(actual_gate, expected_gate, rtol=0, atol=rounding * sizes * (norms + largest))
