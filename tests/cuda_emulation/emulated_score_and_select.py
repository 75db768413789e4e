"""The operator pyvtk::score_and_select by the emulated CUDA kernels."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from emulated import DTYPES, Call, Exact
from torch import Tensor

QUERY_REDUCES = ("mean", "sum", "max", "visible_mean")
HEAD_REDUCES = ("none", "mean", "sum", "max", "group_mean", "group_sum", "group_max")


class Done(NamedTuple):
    """How the launcher did it; see ScoreAndSelectPlan in csrc/cuda/score_and_select.cuh."""

    rows_of_block: int
    kept: int
    columns: bool
    separate_lse: bool
    selected_at_once: bool
    lanes_of_key: int
    plain: bool


class Strided:
    """A tensor's storage in malloc'ed memory of exactly its size, from its first element on; keeps strides."""

    def __init__(self, tensor: Tensor):
        assert tensor.storage_offset() * tensor.element_size() < 16  # so that misaligned stays misaligned
        elements = tensor.untyped_storage().nbytes() // tensor.element_size()
        self.storage = Exact(torch.as_strided(tensor, (elements,), (1,), 0))
        self.address = self.storage.address + tensor.storage_offset() * tensor.element_size()


def score_and_select(
    q: Tensor, k: Tensor, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse, cu_seqlens_q,
    cu_seqlens_k, causal, key_start, key_stop, range_denominator, scale, query_reduce, head_reduce, heads_first, logit,
    num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments, num_segments,
    cu_seqlens, capacity, align_right, by_score,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Done]:  # fmt: skip
    """Arguments as the operator takes them; q and k may be strided, and begin up to 15 bytes into their storage."""
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    q_heads, kv_heads = q.shape[1], k.shape[1]
    queries, keys = q.shape[0 if packed else 2], k.shape[0 if packed else 2]
    out_heads = q_heads if head_reduce == "none" else kv_heads if head_reduce.startswith("group_") else 1
    per_head = head_reduce not in ("mean", "sum", "max")
    lead = (batch, out_heads) if per_head else (batch,)
    scored = keys if packed else key_stop - key_start
    outputs = [
        Exact(torch.full((*lead, capacity), -7)),
        Exact(torch.full(lead, -7, dtype=torch.int32)),
        Exact(torch.zeros(lead, dtype=torch.bool)),
    ]
    scores = Exact(torch.full((1, 1 if packed else batch, out_heads, scored), -7.0))
    call = Call()

    def pointer(value, dtype=None) -> int:
        return call.pointer(value, dtype).value or 0

    def strides(tensor: Tensor) -> list[int]:
        return [0, tensor.stride(1), tensor.stride(0)] if packed else list(tensor.stride()[:3])

    def per_token(value, dtype) -> list[int]:
        shared = per_head and value is not None and value.dim() == 2
        return [pointer(value, dtype), out_heads if shared else 1]

    def per_group(value, dtype) -> list[int]:
        return [pointer(value, dtype), 1 if value is None else value.shape[1]]

    held = [Strided(q), Strided(k)]
    per_sample = head_weights is not None and head_weights.dim() == 2
    arguments = [
        held[0].address, *strides(q), held[1].address, *strides(k), batch, q_heads, kv_heads, queries, keys,
        q.shape[-1], pointer(q_positions, torch.int32), pointer(k_positions, torch.int32),
        pointer(q_mask, torch.bool), pointer(k_mask, torch.bool), pointer(k_bias, torch.float32),
        pointer(head_weights, torch.float32), q_heads if per_sample else 0, pointer(lse, torch.float32),
        pointer(cu_seqlens_q, torch.int32), pointer(cu_seqlens_k, torch.int32), causal, key_start, key_stop,
        range_denominator, logit, QUERY_REDUCES.index(query_reduce), HEAD_REDUCES.index(head_reduce), heads_first,
        scores.address,
        num_keep, *per_group(num_keep_per_row, torch.int64), *per_group(threshold, torch.float32),
        *per_group(top_p, torch.float64), *per_token(keep, torch.bool), *per_token(drop, torch.bool),
        *per_token(candidates, torch.bool), keep_others, *per_token(segments, torch.int32), num_segments, capacity,
        align_right, by_score, *(output.address for output in outputs),
    ]  # fmt: skip
    done = (ctypes.c_int64 * 7)()
    call(
        "emulated_score_and_select", DTYPES.index(q.dtype), ctypes.c_float(scale),
        (ctypes.c_int64 * len(arguments))(*(int(argument) for argument in arguments)), done,
    )  # fmt: skip
    indices, counts, overflow = (output.read() for output in outputs)
    return indices, counts, overflow, scores.read(), Done(*done)
