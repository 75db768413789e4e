"""The operator pyvtk::select by the emulated CUDA kernel."""

from __future__ import annotations

import ctypes
import math

import torch
from emulated import DTYPES, Call, Exact, number
from torch import Tensor


def select(
    scores: Tensor, num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments,
    num_segments, cu_seqlens, capacity, align_right, by_score, *, words_of_chunk=0, threads=512,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator pyvtk::select by the CUDA kernels; arguments as in pyvtk/reference/select.py. With words_of_chunk in
    three launches, by blocks of so many threads for 32 * words_of_chunk tokens each; the caller knows that they can."""
    lead = tuple(scores.shape[:-1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    rows, tokens = math.prod(lead), scores.shape[-1]
    heads = scores.shape[1] if scores.dim() == 3 else 1
    outputs = [
        Exact(torch.full((*lead, capacity), -7)),
        Exact(torch.full(lead, -7, dtype=torch.int32)),
        Exact(torch.zeros(lead, dtype=torch.bool)),
    ]
    call = Call()
    pointer = call.pointer

    def per_token(value: Tensor | None, dtype: torch.dtype) -> list:
        shared = value is not None and value.dim() < scores.dim()
        return [pointer(value, dtype), number(heads if shared else 1)]

    def per_group(value: Tensor | None, dtype: torch.dtype) -> list:
        return [pointer(value, dtype), number(1 if value is None else value.shape[1])]

    call(
        "emulated_select", DTYPES.index(scores.dtype), pointer(scores), number(rows), number(heads), number(tokens),
        number(heads * tokens), number(tokens), pointer(cu_seqlens, torch.int32),
        number(num_keep), *per_group(num_keep_per_row, torch.int64), *per_group(threshold, torch.float32),
        *per_group(top_p, torch.float64), *per_token(keep, torch.bool), *per_token(drop, torch.bool),
        *per_token(candidates, torch.bool), int(keep_others), *per_token(segments, torch.int32), number(num_segments),
        number(capacity), int(align_right), int(by_score), *(ctypes.c_void_p(output.address) for output in outputs),
        number(words_of_chunk), threads,
    )  # fmt: skip
    return tuple(output.read() for output in outputs)
