"""What was made under torch.inference_mode: fine without a gradient, a clear error where one is wanted."""

import pytest
import torch

import pyvtk
from pyvtk import ImageSpan, TokenLayout

BACKENDS = ("reference", "compiled")
SPANS = [ImageSpan(0, 2, (1, 3, 3)), ImageSpan(1, 0, (1, 2, 4))]


def made():
    layout = TokenLayout.from_images([20, 18], SPANS)
    selection = pyvtk.select(torch.arange(40.0).reshape(2, 20), 5)
    return layout, pyvtk.neighbor_plan(layout, 1), selection


with torch.inference_mode():
    LAYOUT, PLAN, SELECTION = made()


def calls(layout, plan, selection, backend):
    """Every call that keeps a plan or a selection for its gradient, as (function of x, shape of x)."""
    waves = torch.arange(320.0).reshape(2, 1, 20, 8).cos()
    return {
        "neighbor_attention: plan": (lambda x: pyvtk.neighbor_attention(x, x, x, plan, backend=backend), (2, 1, 20, 8)),
        "neighbor_attention: plan grown": (
            lambda x: pyvtk.neighbor_attention(x, x, x, plan, backend=backend), (2, 1, 23, 8)
        ),
        "neighbor_attention: plan with k_bias": (
            lambda x: pyvtk.neighbor_attention(waves, waves, waves, plan, k_bias=x, backend=backend), (2, 20)
        ),
        "compact: selection": (lambda x: pyvtk.compact(selection, x, backend=backend), (2, 20, 3)),
        "compact: selection trimmed": (lambda x: pyvtk.compact(selection.trim(), x, backend=backend), (2, 20, 3)),
        "restore: selection": (lambda x: pyvtk.restore(selection, x, backend=backend), (2, 5, 3)),
        "restore: selection with base": (
            lambda x: pyvtk.restore(selection, torch.ones(2, 5, 3), x, backend=backend), (2, 20, 3)
        ),
    }  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", calls(None, None, None, None))
def test_training_needs_what_was_made_outside(name, backend):
    call, shape = calls(LAYOUT, PLAN, SELECTION, backend)[name]
    x = torch.randn(shape)
    wanted = x.clone().requires_grad_()
    argument = " ".join(name.split()[:2])
    with pytest.raises(ValueError, match=f"{argument} must be made outside of torch.inference_mode where a gradient"):
        call(wanted)
    with torch.no_grad():
        outside, _ = calls(*made(), backend)[name]
    expected = outside(wanted)
    expected.sum().backward()
    assert torch.isfinite(wanted.grad).all() and wanted.grad.any()
    # without a gradient nothing is asked
    assert torch.equal(call(x), expected)
    with torch.no_grad():
        assert torch.equal(call(wanted), expected)
    with torch.inference_mode():
        assert torch.equal(call(wanted), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layout_may_come_from_anywhere(backend):
    """Plans of it are new tensors."""
    chosen = pyvtk.select(torch.rand(2, 20), 9)
    table = torch.zeros(2, 4, 1, dtype=torch.int64)
    for plan in (
        pyvtk.neighbor_plan(LAYOUT, 1), pyvtk.window_plan(LAYOUT, 2), pyvtk.routed_plan(LAYOUT, 2, table),
        pyvtk.subset_plan(LAYOUT, chosen), pyvtk.neighbor_plan(LAYOUT, 1).tail(20, 20),
    ):  # fmt: skip
        x = torch.randn(2, 1, 20, 8, requires_grad=True)
        pyvtk.neighbor_attention(x, x, x, plan, backend=backend).sum().backward()
        assert x.grad.any()
