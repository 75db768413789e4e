"""One or more calls of every public function, over small inputs: what tests of a whole kind of use walk through.

Inputs and results are pytrees of tensors (a Selection, a TokenLayout and an AttentionPlan are, too).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

import pyvtk


@dataclass(frozen=True)
class EntryPoint:
    """``run(*inputs(), **backend)``; ``function`` is the public name."""

    function: str
    case: str
    inputs: Callable[[], tuple]
    run: Callable
    backends: bool = True  # whether it takes backend=

    def __call__(self, *inputs, backend: str | None = None):
        return self.run(*inputs, **({"backend": backend} if self.backends and backend is not None else {}))


ENTRY_POINTS: list[EntryPoint] = []


def entry_point(function: str, case: str, inputs, backends: bool = True):
    def add(run):
        ENTRY_POINTS.append(EntryPoint(function, case, inputs, run, backends))
        return run

    return add


def names(entry: EntryPoint) -> str:
    return f"{entry.function}: {entry.case}"


def chosen(heads: bool = False, tokens: int = 12, keep: int = 5) -> pyvtk.Selection:
    rows = (2, 2) if heads else (2,)
    return pyvtk.select(torch.randn(*rows, tokens), keep)


def layout(packed: bool = False) -> pyvtk.TokenLayout:
    spans = [pyvtk.ImageSpan(0, 2, (1, 2, 3)), pyvtk.ImageSpan(1, 1, (1, 2, 2))]
    return pyvtk.TokenLayout.from_images([12, 12] if not packed else [12, 7], spans, packed=packed)


def queries_and_keys(queries: int = 3, keys: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 4, queries, 16), torch.randn(2, 2, keys, 16)


def starts(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def mask(*shape: int) -> torch.Tensor:
    flags = torch.rand(shape) < 0.7
    flags[..., 0] = True
    return flags


# ---- scores


@entry_point("attention_scores", "plain", queries_and_keys)
def _(q, k, **backend):
    return pyvtk.attention_scores(q, k, **backend)


@entry_point(
    "attention_scores",
    "masks, bias, weights, lse",
    lambda: (
        *queries_and_keys(), torch.arange(9, 12), torch.arange(12), mask(2, 3), mask(2, 12), torch.randn(2, 12),
        torch.rand(4), torch.randn(2, 4, 3) + 4,
    ),
)  # fmt: skip
def _(q, k, at_query, at_key, q_mask, k_mask, k_bias, head_weights, lse, **backend):
    return pyvtk.attention_scores(
        q, k, causal=True, q_positions=at_query, k_positions=at_key, q_mask=q_mask, k_mask=k_mask, k_bias=k_bias,
        head_weights=head_weights, lse=lse, query_reduce=("mean", "max"), head_reduce="group", **backend,
    )  # fmt: skip


@entry_point("attention_scores", "range, logits, lse", queries_and_keys)
def _(q, k, **backend):
    ranged = pyvtk.attention_scores(q, k, key_range=(2, 9), denominator="range", return_lse=True, **backend)
    logits = pyvtk.attention_scores(
        q, k, quantity="logit", head_reduce="max", query_reduce="max", reduce_order="heads_first", **backend
    )
    return ranged, logits


@entry_point(
    "attention_scores", "packed", lambda: (torch.randn(7, 4, 16), torch.randn(12, 2, 16), starts(3, 4), starts(5, 7))
)
def _(q, k, cu_seqlens_q, cu_seqlens_k, **backend):
    return pyvtk.attention_scores(
        q, k, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, causal=True, return_lse=True, **backend
    )


# ---- selections


@entry_point("select", "plain", lambda: (torch.randn(2, 12),))
def _(scores, **backend):
    return pyvtk.select(scores, 5, **backend)


@entry_point(
    "select",
    "masks, segments, threshold, top_p",
    lambda: (torch.rand(2, 3, 12), mask(2, 12), mask(2, 3, 12), torch.randint(0, 2, (2, 12)), torch.tensor([2, 3])),
)
def _(scores, keep, candidates, segments, number, **backend):
    by_mass = pyvtk.select(scores, top_p=0.5, threshold=0.1, keep=keep, candidates=candidates, capacity=9, **backend)
    by_segment = pyvtk.select(
        scores, number, segments=segments, num_segments=2, capacity=8, align="right", order="score", **backend
    )
    return by_mass, by_segment


@entry_point("select", "packed", lambda: (torch.randn(12), starts(5, 7)))
def _(scores, cu_seqlens, **backend):
    return pyvtk.select(scores, 3, cu_seqlens=cu_seqlens, capacity=3, **backend)


@entry_point("score_and_select", "plain", queries_and_keys)
def _(q, k, **backend):
    return pyvtk.score_and_select(q, k, 5, return_scores=True, **backend)


@entry_point("score_and_select", "masks", lambda: (*queries_and_keys(), mask(2, 12), mask(2, 12)))
def _(q, k, k_mask, candidates, **backend):
    return pyvtk.score_and_select(
        q, k, 5, causal=True, k_mask=k_mask, candidates=candidates, others="keep", key_range=(1, 9), capacity=9,
        head_reduce="group", **backend,
    )  # fmt: skip


@entry_point("Selection", "methods", lambda: (chosen(), chosen(tokens=5, keep=2), mask(2, 12)), backends=False)
def _(selection, other, flags):
    return (
        selection.valid, selection.mask(), selection.inverse(), selection.cu_seqlens(), selection.complement(7),
        selection.then(other), pyvtk.Selection.from_mask(flags, capacity=6),
        pyvtk.Selection.from_indices(selection.indices, 12, counts=selection.counts),
    )  # fmt: skip


@entry_point(
    "Selection",
    "packed",
    lambda: (pyvtk.select(torch.randn(12), 3, cu_seqlens=starts(5, 7), capacity=4), chosen(tokens=4, keep=2)),
    backends=False,
)
def _(selection, other):
    return selection.valid, selection.mask(), selection.inverse(), selection.complement(5), selection.then(other)


# ---- moves


@entry_point(
    "compact", "several", lambda: (chosen(), torch.randn(2, 12, 4), torch.arange(36).reshape(3, 1, 12), mask(2, 12))
)
def _(selection, hidden, positions, flags, **backend):
    return pyvtk.compact(
        selection, hidden, positions, flags, dim=(1, 2, 1), batch_dim=(0, 1, 0), pad_value=(1, 2, 0), **backend
    )


@entry_point("compact", "packed", lambda: (chosen(), torch.randn(2, 12, 4), torch.randn(12, 4)))
def _(selection, hidden, table, **backend):
    return pyvtk.compact(selection, hidden, table, dim=(1, 0), batch_dim=(0, None), packed=True, total=9, **backend)


@entry_point("compact", "into", lambda: (chosen(), torch.randn(2, 12, 4), torch.empty(2, 5, 4)))
def _(selection, hidden, out, **backend):
    return pyvtk.compact(selection, hidden, out=out, **backend)


@entry_point("compact", "heads", lambda: (chosen(True), torch.randn(2, 2, 12, 4)))
def _(selection, keys, **backend):
    return pyvtk.compact(selection, keys, dim=2, **backend)


@entry_point("restore", "gate", lambda: (chosen(), torch.randn(2, 5, 4), torch.randn(2, 12, 4), torch.rand(2, 5)))
def _(selection, update, base, gate, **backend):
    return (
        pyvtk.restore(selection, update, base, **backend), pyvtk.restore(selection, update, **backend),
        pyvtk.restore(selection, update, base, gate=gate, **backend),
    )  # fmt: skip


@entry_point("compact_kv_", "two caches", lambda: (chosen(), torch.randn(2, 2, 12, 4), torch.randn(2, 2, 12, 4)))
def _(selection, keys, values, **backend):
    return pyvtk.compact_kv_(selection, keys, values, **backend)


@entry_point(
    "merge_tokens",
    "mean and sum",
    lambda: (torch.randn(2, 12, 4), torch.randint(-1, 3, (2, 12)), torch.rand(2, 12), torch.rand(2, 12)),
)
def _(x, assignment, weights, sizes, **backend):
    return (
        pyvtk.merge_tokens(x, assignment, num_groups=3, weights=weights, sizes=sizes, **backend),
        pyvtk.merge_tokens(x, assignment, num_groups=3, reduce="sum", **backend),
    )


# ---- layouts, plans, attention


@entry_point(
    "TokenLayout",
    "of tensors",
    lambda: (torch.randint(-1, 2, (2, 12)), torch.randint(0, 4, (2, 12, 3)), mask(2, 12), chosen(), starts(5, 7)),
    backends=False,
)
def _(image_id, coords, flags, selection, cu_seqlens):
    padded = pyvtk.TokenLayout(image_id, coords, mask=flags)
    packed = pyvtk.TokenLayout(image_id[0], coords[0], cu_seqlens=cu_seqlens)
    return padded, packed, padded.take(selection), padded.take(selection, packed=True, total=9), packed.visual


@entry_point("TokenLayout", "from ids", lambda: (torch.tensor([[1, 7, 7, 7, 7, 2], [7, 7, 1, 2, 3, 4]]),), False)
def _(input_ids):
    return (
        pyvtk.TokenLayout.from_ids(input_ids, 7, [(1, 2, 2), (1, 1, 2)]),
        pyvtk.TokenLayout.from_ids(input_ids, 7, (1, 1, 1, True)),
    )


@entry_point("TokenLayout", "from mrope", lambda: (mask(2, 12), torch.randint(0, 9, (3, 2, 12)), mask(2, 12)), False)
def _(visual, position_ids, flags):
    return pyvtk.TokenLayout.from_mrope(visual, position_ids, mask=flags)


@entry_point("neighbor_plan", "groups of keys, a tail", lambda: (layout(), torch.tensor([12, 9])), backends=False)
def _(tokens, lengths):
    plan = pyvtk.neighbor_plan(tokens, 1)
    groups = [pyvtk.neighbor_plan(tokens, 1, keys=keys) for keys in ("text", "visual", tokens.visual)]
    return plan, groups, plan.tail(1, 14), plan.tail(2, 14, lengths), pyvtk.neighbor_plan(tokens, (0, 1, 1))


@entry_point("neighbor_plan", "packed", lambda: (layout(True),), backends=False)
def _(tokens):
    plan = pyvtk.neighbor_plan(tokens, 1, causal_window=True, cross_image=True)
    return plan, pyvtk.neighbor_plan(tokens, 1, text="all")


@entry_point("window_plan", "shifted", lambda: (layout(), layout(True)), backends=False)
def _(padded, packed):
    return [pyvtk.window_plan(tokens, (1, 2, 2), (0, 1, 1)) for tokens in (padded, packed)]


@entry_point(
    "routed_plan", "by size and by number", lambda: (layout(), torch.randint(-1, 4, (2, 4, 2))), backends=False
)
def _(tokens, table):
    return (
        pyvtk.routed_plan(tokens, (1, 1, 2), table),
        pyvtk.routed_plan(tokens, tokens.coords[..., 1], table),
    )


@entry_point("subset_plan", "plain", lambda: (layout(), chosen()), backends=False)
def _(tokens, selection):
    return pyvtk.subset_plan(tokens, selection)


@entry_point(
    "neighbor_attention",
    "bias, heads",
    lambda: (
        pyvtk.neighbor_plan(layout(), 1), *queries_and_keys(12), torch.randn(2, 2, 12, 16), torch.randn(2, 12), mask(4),
    ),
)  # fmt: skip
def _(plan, q, k, v, k_bias, visual_heads, **backend):
    return (
        pyvtk.neighbor_attention(q, k, v, plan, return_lse=True, **backend),
        pyvtk.neighbor_attention(q, k, v, plan, k_bias=k_bias, visual_heads=visual_heads, **backend),
    )


@entry_point(
    "neighbor_attention",
    "packed",
    lambda: (
        pyvtk.neighbor_plan(layout(True), 1), torch.randn(19, 4, 16), torch.randn(19, 2, 16), torch.randn(19, 2, 16),
    ),
)  # fmt: skip
def _(plan, q, k, v, **backend):
    return pyvtk.neighbor_attention(q, k, v, plan, return_lse=True, **backend)


@entry_point(
    "text_attention",
    "masks, heads",
    lambda: (*queries_and_keys(2), torch.randn(2, 2, 12, 16), mask(2, 12), mask(2, 12), torch.randn(2, 12), mask(4)),
)
def _(q, k, v, visual, k_mask, k_bias, visual_heads, **backend):
    return (
        pyvtk.text_attention(q, k, v, return_lse=True, **backend),
        pyvtk.text_attention(
            q,
            k,
            v,
            visual=visual,
            k_mask=k_mask,
            k_bias=k_bias,
            visual_heads=visual_heads,
            visual_mass="drop",
            **backend,
        ),
    )


@entry_point(
    "merge_attention",
    "coefficients",
    lambda: (*(torch.randn(2, 4, 3, 16) for _ in range(2)), *(torch.randn(2, 4, 3) for _ in range(2))),
)
def _(first, second, lse, other_lse, **backend):
    outs, lses = [first, second], [lse, other_lse]
    return (
        pyvtk.merge_attention(outs, lses, **backend),
        pyvtk.merge_attention(outs, lses, [lse.exp(), lse * 0], renormalize=True, **backend),
    )


# ImageSpan is numbers, AttentionPlan what the builders return, info() a report; sparse24 has tests of its own.
WITHOUT = {"ImageSpan", "AttentionPlan", "info", "sparse24", "__version__"}
