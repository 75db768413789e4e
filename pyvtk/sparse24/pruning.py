"""Which two of every four weights stay: by magnitude, or by scores that say more (Wanda, Taylor)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pyvtk import checks
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24.copies import has_values
from pyvtk.sparse24.format import refuse_nan

# 4x4 blocks that are looked at together: 90 float64 sums each, so 24 MB.
_BLOCKS = 1 << 15


def magnitude(weight: Tensor) -> Tensor:
    """|weight|; int8 widened, whose -128 has no positive counterpart."""
    return weight.abs() if weight.is_floating_point() else weight.to(torch.int16).abs()


def _two_of_four(scores: Tensor) -> Tensor:
    """reference.prune_n_of_m(scores, 2, 4) without sorting: an entry stays if fewer than two others come before it."""
    entry = scores.reshape(scores.shape[0], scores.shape[1] // 4, 4).unbind(-1)
    stays = []
    for i in range(4):
        before = [entry[j] >= entry[i] if j < i else entry[j] > entry[i] for j in range(4) if j != i]
        a, b, c = before
        stays.append(~((a & b) | (a & c) | (b & c)))
    return torch.stack(stays, -1).reshape(scores.shape)


def two_of_four(scores: Tensor, transposable: bool = False) -> Tensor:
    """The mask of :func:`prune` for scores that are known to be right: no checks, so torch.compile can trace it."""
    scores = scores.contiguous()
    if not transposable:
        return _two_of_four(scores)
    rows_at_once = 4 * max(1, _BLOCKS // max(1, scores.shape[1] // 4))
    if scores.shape[0] <= rows_at_once:
        return reference.prune_transposable(scores)
    return torch.cat([reference.prune_transposable(part) for part in scores.split(rows_at_once)])


def prune(weight: Tensor, scores: Tensor | None = None, transposable: bool = False) -> Tensor:
    """Choose two of every four neighbours along in_features.

    Args:
        weight: floating or int8 [out_features, in_features], in_features a multiple of 4.
        scores: what to keep the largest of, shaped like weight; None: |weight|. See :func:`wanda_scores`,
            :func:`taylor_scores`.
        transposable: choose so that the transpose is 2:4 too (out_features a multiple of 4, scores finite): of each 4x4
            block the one pattern of 90 with the largest sum, which is the optimum, not an approximation, among masks of
            exactly two in every row and column. (Of at most two, one with fewer entries can hold more, where the rest
            of a row or column is taken; :meth:`Sparse24Weight.with_transpose` takes such weights.)

    Returns:
        bool [out_features, in_features]. Equal scores: the lower index stays; transposable: the first pattern does.

    Raises:
        TypeError, ValueError: an argument that does not fit, or a NaN in weight or scores, with its place.

    The host waits for the device. A weight without numbers (meta, fake) gives a mask of its shape.
    """
    op = "sparse24.prune"
    checks.tensor(op, "weight", weight, 2)
    checks.dtype(op, "weight", weight, ops.VALUES)
    checks.boolean(op, "transposable", transposable)
    if weight.shape[1] % 4:
        raise ValueError(f"{op}: weight must have in_features in multiples of 4, got {weight.shape[1]}")
    if transposable and weight.shape[0] % 4:
        raise ValueError(f"{op}: weight must have out_features in multiples of 4 too, got {weight.shape[0]}")
    refuse_nan(op, "weight", weight)
    if scores is None:
        scores = magnitude(weight.detach())
    else:
        checks.tensor(op, "scores", scores)
        checks.shape(op, "scores", scores, tuple(weight.shape), "[out_features, in_features]")
        checks.same_device(op, "scores", scores, weight, "weight")
        refuse_nan(op, "scores", scores)
        scores = scores.detach()
    if transposable and scores.is_floating_point() and has_values(scores) and scores.isinf().any():
        where = tuple(scores.isinf().nonzero()[0].tolist())
        raise ValueError(f"{op}: scores must be finite for a transposable mask, got an infinity at {where}")
    return two_of_four(scores, transposable)


def wanda_scores(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|weight| * input_norm, float32 [out_features, in_features] (Wanda, arXiv 2306.11695).

    Args:
        weight: floating [out_features, in_features].
        input_norm: [in_features], the Euclidean norm of each input feature over calibration data; see
            :func:`input_norms`.
    """
    op = "sparse24.wanda_scores"
    checks.tensor(op, "weight", weight, 2)
    checks.tensor(op, "input_norm", input_norm)
    checks.shape(op, "input_norm", input_norm, (weight.shape[1],), "[in_features]")
    return weight.detach().abs().float() * input_norm.float()


def taylor_scores(weight: Tensor, grad: Tensor) -> Tensor:
    """|weight * grad|, float32: by how much the loss changes, to first order, when a weight is set to 0.

    Args:
        weight: floating [out_features, in_features]. grad: the gradient of a loss, shaped like weight.
    """
    op = "sparse24.taylor_scores"
    checks.tensor(op, "weight", weight, 2)
    checks.tensor(op, "grad", grad)
    checks.shape(op, "grad", grad, tuple(weight.shape), "[out_features, in_features]")
    return (weight.detach().float() * grad.detach().float()).abs()


def watch_inputs(model: nn.Module, batches: Iterable, see: Callable[[str, Tensor], None]) -> None:
    """Run ``model(batch)`` for each batch, without gradient, and show ``see(name, x)`` the input of each nn.Linear."""

    def hook(name: str):
        return lambda module, inputs: see(name, inputs[0].detach())

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for handle in handles:
            handle.remove()


def input_norms(model: nn.Module, batches: Iterable) -> dict[str, Tensor]:
    """For Wanda: module name -> float32 [in_features], the norm of each input feature of each nn.Linear over batches.

    Args:
        model: called with each batch as its one argument. batches: any iterable.
    """
    squares: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        total = x.reshape(x.shape[:-1].numel(), x.shape[-1]).double().square().sum(0)
        squares[name] = squares[name] + total if name in squares else total

    watch_inputs(model, batches, see)
    return {name: total.sqrt().float() for name, total in squares.items()}
