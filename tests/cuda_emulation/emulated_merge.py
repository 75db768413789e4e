"""The operators merge_tokens and merge_tokens_backward by the emulated CUDA kernels."""

from __future__ import annotations

import torch
from emulated import Call, number
from emulated_compact import Placed, like_new
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _rows(placed: Placed) -> tuple:
    return number(placed.address + placed.offset), number(placed.like.stride(0)), number(placed.like.stride(1))


def _rest(call: Call, x: Tensor, assignment, weights, num_groups: int, mean: bool) -> tuple:
    batch, tokens, channels = x.shape
    return (
        call.pointer(assignment), call.pointer(weights), int(weights is not None and weights.dtype == torch.float64),
        number(batch), number(tokens), number(num_groups), number(channels), int(mean),
    )  # fmt: skip


def merge_tokens(x, assignment, weights, num_groups, mean, offset: int = 0) -> tuple[Tensor, Tensor]:
    """Arguments as in pyvtk/reference/merge.py; ``offset``: bytes by which x and the result miss a multiple of 16."""
    call, placed = Call(), Placed(x, offset)
    out = like_new((x.shape[0], num_groups, x.shape[2]), x, offset)
    totals = like_new((x.shape[0], num_groups), torch.empty(0, dtype=torch.float64))
    call(
        "emulated_merge", DTYPES.index(x.dtype), *_rows(placed), *_rest(call, x, assignment, weights, num_groups, mean),
        number(out.address + offset), number(totals.address),
    )  # fmt: skip
    return out.read(), totals.read()


def merge_tokens_backward(grad, x, assignment, weights, totals, mean, offset: int = 0) -> tuple[Tensor, Tensor]:
    call, placed = Call(), [Placed(grad, offset), Placed(x, offset)]
    grad_x = like_new(x.shape, x, offset)
    grad_weights = Placed(torch.empty(0) if weights is None else torch.full_like(weights, -7))
    call(
        "emulated_merge_backward", DTYPES.index(x.dtype), *_rows(placed[0]), *_rows(placed[1]),
        *_rest(call, x, assignment, weights, grad.shape[1], mean), call.pointer(totals),
        number(grad_x.address + offset), number(0 if weights is None else grad_weights.address),
    )  # fmt: skip
    return grad_x.read(), grad_weights.read()
