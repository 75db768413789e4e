"""Fold tokens into groups instead of dropping them: ``merge_tokens``."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk import backends, checks, transforms
from pyvtk.reference import merge as reference


def _fake(x, assignment, weights, num_groups, mean):
    batch, _, channels = x.shape
    return x.new_empty((batch, num_groups, channels)), x.new_empty((batch, num_groups), dtype=torch.float64)


def _backward_fake(grad, x, assignment, weights, totals, mean):
    grad_weights = x.new_empty(0, dtype=torch.float32) if weights is None else weights.new_empty(weights.shape)
    return x.new_empty(x.shape), grad_weights


# Gives the sums of weights too, in float64, which the gradient needs.
backends.define(
    "merge_tokens",
    "(Tensor x, Tensor assignment, Tensor? weights, SymInt num_groups, bool mean) -> (Tensor, Tensor)",
    fake=_fake,
    dtypes=checks.FLOATS,
    vmap=transforms.Fold({"x": 0, "assignment": 0, "weights": 0}, (0, 0)),
)
backends.define(
    "merge_tokens_backward",
    "(Tensor grad, Tensor x, Tensor assignment, Tensor? weights, Tensor totals, bool mean) -> (Tensor, Tensor)",
    fake=_backward_fake,
    dtypes=checks.FLOATS,
    vmap=transforms.Fold({"grad": 0, "x": 0, "assignment": 0, "weights": 0, "totals": 0}, (0, 0)),
)


def _setup_context(ctx, inputs, output):
    x, assignment, weights, _, ctx.mean = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, assignment, weights, output[1])


def _backward(ctx, grad, _):
    x, assignment, weights, totals = ctx.saved_tensors
    grad_x, grad_weights = torch.ops.pyvtk.merge_tokens_backward(grad, x, assignment, weights, totals, ctx.mean)
    return grad_x, None, None if weights is None else grad_weights, None, None


transforms.gradient("merge_tokens", _backward, setup_context=_setup_context)
transforms.second_gradient("merge_tokens_backward", reference.weighed_merge, ("x", "weights"))


def merge_tokens(
    x: Tensor,
    assignment: Tensor,
    *,
    num_groups: int | None = None,
    weights: Tensor | None = None,
    sizes: Tensor | None = None,
    reduce: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Sum or average the tokens that were assigned to each group.

    Args:
        x: [batch, tokens, channels], floating.
        assignment: int [batch, tokens], the group of each token in 0..num_groups - 1; negative: left out.
        num_groups: None takes the largest group + 1 (one host synchronisation).
        weights: float [batch, tokens]; factors of the tokens, in the divisor of the mean too.
        sizes: the same once more; how many tokens each one stands for already (ToMe).
        reduce: "mean" (a group without tokens, or whose factors sum to 0, is 0) or "sum".
        backend: "compiled", "reference", or None for the best one.

    Returns:
        [batch, num_groups, channels] in x's dtype. Differentiable in x, weights and sizes; the same bits on every run.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: a group >= num_groups, on the CPU; on CUDA
            such a token is left out.
    """
    op = "merge_tokens"
    checks.tensor(op, "x", x, 3)
    checks.dtype(op, "x", x, checks.FLOATS)
    checks.tensor(op, "assignment", assignment)
    checks.dtype(op, "assignment", assignment, checks.INTEGERS)
    checks.shape(op, "assignment", assignment, tuple(x.shape[:2]), "[batch, tokens]")
    checks.same_device(op, "assignment", assignment, x, "x")
    checks.choice(op, "reduce", reduce, ("mean", "sum"))
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    factors = None
    for name, value in (("weights", weights), ("sizes", sizes)):
        if value is None:
            continue
        checks.tensor(op, name, value)
        checks.dtype(op, name, value, checks.FLOATS)
        checks.shape(op, name, value, tuple(x.shape[:2]), "[batch, tokens]")
        checks.same_device(op, name, value, x, "x")
        factors = value.to(wide) if factors is None else factors * value.to(wide)
    if num_groups is None:
        num_groups = max(int(assignment.max()) + 1, 0) if assignment.numel() else 0
    checks.integer(op, "num_groups", num_groups)

    rest = (x, assignment.long(), factors, num_groups, reduce == "mean")
    if backends.pick(op, backend, x, x.dtype, (x, factors)) == "compiled":
        return transforms.call(torch.ops.pyvtk.merge_tokens.default, (x, factors), *rest)[0]
    return reference.merge_tokens(*rest)[0]
