"""Calls of merge_tokens."""

from __future__ import annotations

import torch

import pyvtk
from calls.call import BRAIN, DOUBLE, HALF, SINGLE, Call, gradient, short


def grouped(batch, tokens, channels, groups, dtype=SINGLE, weights=False):
    def inputs():
        assignment = torch.randint(-1, groups, (batch, tokens))
        extra = [torch.rand(batch, tokens)] if weights else []
        return torch.randn(batch, tokens, channels).to(dtype), assignment, *extra

    return inputs


def merge(groups, reduce="mean"):
    def run(backend, x, assignment, weights=None):
        return pyvtk.merge_tokens(
            x, assignment, num_groups=groups, weights=weights, sizes=weights, reduce=reduce, backend=backend
        )

    return run


def magnitudes(assignment, x, weights, grad) -> float:
    """The largest sum, over channels, that a gradient to weights is made of."""
    arriving = grad.gather(1, assignment.clamp(min=0)[..., None].expand(x.shape))
    return (arriving * x).abs().sum(-1).max().item()


def merge_gradient(dtype, channels, reduce="mean"):
    """To x and weights; the last of 12 groups has no tokens."""

    def inputs():
        weights = (torch.rand(2, 90) + 0.5).to(DOUBLE if dtype == DOUBLE else SINGLE)
        x, grad = torch.randn(2, 90, channels).to(dtype), torch.randn(2, 12, channels).to(dtype)
        return torch.randint(-1, 11, (2, 90)), x, weights, grad

    def run(backend, assignment, x, weights):
        return pyvtk.merge_tokens(x, assignment, num_groups=12, weights=weights, reduce=reduce, backend=backend)

    # in float64 the reference is the oracle itself, so that its own error allows for nothing
    added = {"added": magnitudes} if dtype == DOUBLE else {}
    return Call("merge_tokens_backward", inputs, gradient(run, 2), exact=False, **added)


CALLS = {
    "mean": Call("merge_tokens", grouped(3, 577, 130, 144), merge(144), exact=False, compiles=True),
    "sum, bf16": Call("merge_tokens", grouped(3, 300, 1024, 20, BRAIN), merge(20, "sum"), exact=False),
    "weights": Call("merge_tokens", grouped(2, 100, 33, 9, HALF, True), merge(9), exact=False),
    "one group": Call("merge_tokens", grouped(2, 2000, 8, 1), merge(1), exact=False),
    # more counters than a block's shared memory holds
    "many groups": Call("merge_tokens", grouped(1, 3000, 8, 2000, HALF), merge(2000), exact=False),
    # members are sorted first
    **{f"sorted, {short(dtype)}, {channels} channels":
       Call("merge_tokens", grouped(2, 60, channels, 1100, dtype), merge(1100), exact=False)
       for dtype in (SINGLE, BRAIN, HALF, DOUBLE) for channels in (33, 64)},
    **{f"gradient, {short(dtype)}, {channels} channels": merge_gradient(dtype, channels)
       for dtype in (SINGLE, BRAIN, HALF, DOUBLE) for channels in (33, 64)},
    "gradient of a sum": merge_gradient(BRAIN, 40, "sum"),
}  # fmt: skip
