"""One small call of every public function that has a derivative, for tests of what torch's transforms make of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import pyvtk
from pyvtk import sparse24


class Case(NamedTuple):
    """``function(*tensors, backend=...)``, differentiable in all of its tensors; gives a tensor or a tuple of them.

    Attributes:
        function: of the tensors, in float32 or float64.
        shapes: of the tensors.
        backends: that it can be asked for; the first is the one that has kernels.
        straight_through: its derivative is by intent not that of the function.
        on_host: the host looks at values of the tensors: nothing maps over them, and nothing traces the call.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    backends: tuple[str | None, ...] = ("compiled", "reference")
    on_host: bool = False
    straight_through: bool = False

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0, lead: tuple[int, ...] = ()) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(*lead, *shape, generator=generator).to(dtype) for shape in self.shapes]

    def flat(self, *tensors: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        out = self.function(*tensors, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def total(self, *tensors: Tensor, backend: str | None = None) -> Tensor:
        """A number that depends on all results, and not linearly."""
        outs = [out for out in self.flat(*tensors, backend=backend) if out.is_floating_point()]
        weights = [torch.linspace(-1, 1, out.numel()).reshape(out.shape) for out in outs]
        return sum((out * out * 0.5).sum() + (out * weight).sum() for out, weight in zip(outs, weights))


SELECTION = pyvtk.Selection.from_indices(
    torch.tensor([[1, 3, 4], [0, 2, -1]]), 5, counts=torch.tensor([3, 2]), ascending=True
)
PER_HEAD = pyvtk.Selection.from_indices(torch.tensor([[[0, 2], [1, 3]]]), 4, ascending=True)
LAYOUT = pyvtk.TokenLayout.from_images([9, 9], [pyvtk.ImageSpan(0, 2, (1, 2, 3)), pyvtk.ImageSpan(1, 1, (1, 2, 2))])
PLAN = pyvtk.neighbor_plan(LAYOUT, 1)
VISUAL = LAYOUT.visual
ASSIGNMENT = torch.tensor([[0, 1, 0, -1, 2], [2, 2, 0, 1, 1]])
CU = torch.tensor([0, 3, 5], dtype=torch.int32)
MASK24 = torch.tensor(
    [[1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
).bool()
METADATA = sparse24.compress(torch.ones(4, 8), MASK24).metadata


def scores(**options) -> Case:
    """attention_scores with these options."""
    shapes = ((5, 4, 8), (5, 2, 8)) if "cu_seqlens_q" in options else ((2, 4, 3, 8), (2, 2, 5, 8))

    def function(q, k, *, backend):
        return pyvtk.attention_scores(q, k, backend=backend, **options)

    return Case(function, shapes)


def weight_of(values: Tensor) -> sparse24.Sparse24Weight:
    return sparse24.Sparse24Weight(values, METADATA)


CASES = {
    "attention_scores": scores(causal=True),
    "attention_scores max": scores(query_reduce=("sum", "max"), head_reduce="max", causal=True),
    "attention_scores heads first": scores(
        query_reduce=("max", "mean"), head_reduce="group_max", reduce_order="heads_first"
    ),
    "attention_scores logits": scores(quantity="logit", query_reduce="visible_mean", head_reduce=None, return_lse=True),
    "attention_scores range": scores(
        denominator="range", key_range=(1, 4), q_mask=torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()
    ),
    "attention_scores packed": scores(cu_seqlens_q=CU, cu_seqlens_k=CU, causal=True, return_lse=True),
    "attention_scores bias": Case(
        lambda q, k, bias, weights, *, backend: pyvtk.attention_scores(
            q, k, k_bias=bias, head_weights=weights, return_lse=True, backend=backend
        ),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 5), (4,)),
    ),
    "attention_scores lse": Case(
        lambda q, k, lse, weights, *, backend: pyvtk.attention_scores(
            q, k, lse=lse, head_weights=weights, query_reduce="sum", backend=backend
        ),
        ((2, 4, 3, 8), (2, 2, 5, 8), (2, 4, 3), (2, 4)),
    ),
    "score_and_select": Case(
        lambda q, k, *, backend: pyvtk.score_and_select(q, k, 2, return_scores=True, backend=backend)[1],
        ((2, 4, 1, 8), (2, 2, 5, 8)),
    ),
    "compact": Case(lambda x, *, backend: pyvtk.compact(SELECTION, x, backend=backend), ((2, 5, 3),)),
    "compact several": Case(
        lambda x, y, z, *, backend: pyvtk.compact(
            SELECTION, x, y, z, dim=(1, 2, 1), batch_dim=(0, 0, 0), pad_value=(0.0, 1.0, 2.0), backend=backend
        ),
        ((2, 5), (2, 2, 5, 2), (1, 5, 2)),
    ),
    "compact a table": Case(
        lambda x, *, backend: pyvtk.compact(SELECTION, x, dim=0, batch_dim=None, backend=backend), ((5, 3),)
    ),
    "compact heads": Case(lambda x, *, backend: pyvtk.compact(PER_HEAD, x, dim=2, backend=backend), ((1, 2, 4, 3),)),
    "compact packed": Case(
        lambda x, *, backend: pyvtk.compact(SELECTION, x, packed=True, total=5, backend=backend), ((2, 5, 3),)
    ),
    "restore": Case(
        lambda update, base, *, backend: pyvtk.restore(SELECTION, update, base, backend=backend), ((2, 3, 2), (2, 5, 2))
    ),
    "restore into zeros": Case(
        lambda update, *, backend: pyvtk.restore(SELECTION, update, backend=backend), ((2, 3, 2),)
    ),
    "restore gate": Case(
        lambda update, base, gate, *, backend: pyvtk.restore(SELECTION, update, base, gate=gate, backend=backend),
        ((2, 3, 2), (2, 5, 2), (2, 3)),
    ),
    "merge_tokens": Case(
        lambda x, *, backend: pyvtk.merge_tokens(x, ASSIGNMENT, num_groups=3, reduce="sum", backend=backend),
        ((2, 5, 3),),
    ),
    "merge_tokens mean": Case(
        lambda x, weights, sizes, *, backend: pyvtk.merge_tokens(
            x, ASSIGNMENT, num_groups=3, weights=weights, sizes=sizes, backend=backend
        ),
        ((2, 5, 3), (2, 5), (2, 5)),
    ),
    "neighbor_attention": Case(
        lambda q, k, v, *, backend: pyvtk.neighbor_attention(q, k, v, PLAN, return_lse=True, backend=backend),
        ((2, 4, 9, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
    ),
    "neighbor_attention bias": Case(
        lambda q, k, v, bias, *, backend: pyvtk.neighbor_attention(
            q, k, v, PLAN, k_bias=bias, visual_heads=torch.tensor([True, False]), backend=backend
        ),
        ((2, 2, 9, 8), (2, 1, 9, 8), (2, 1, 9, 8), (2, 9)),
    ),
    "text_attention": Case(
        lambda q, k, v, bias, *, backend: pyvtk.text_attention(
            q,
            k,
            v,
            visual=VISUAL,
            visual_heads=torch.tensor([True, False]),
            k_bias=bias,
            return_lse=True,
            backend=backend,
        ),
        ((2, 2, 2, 8), (2, 1, 9, 8), (2, 1, 9, 8), (2, 9)),
        (None, "reference"),
    ),
    "merge_attention": Case(
        lambda a, b, lse_a, lse_b, *, backend: pyvtk.merge_attention([a, b], [lse_a, lse_b], backend=backend),
        ((2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3), (2, 2, 3)),
    ),
    "merge_attention coefficients": Case(
        lambda a, lse, c, *, backend: pyvtk.merge_attention(
            [a, a * 2], [lse, lse * 2], [c * c, c * c + 1], True, backend=backend
        ),
        ((2, 2, 3, 4), (2, 2, 3), (2, 2, 3)),
    ),
    "sparse24.linear": Case(
        lambda x, values, bias, *, backend: sparse24.linear(x, weight_of(values), bias, backend=backend),
        ((3, 8), (4, 4), (4,)),
    ),
    "sparse24.linear gate": Case(
        lambda x, values, mul, *, backend: sparse24.linear(
            x, weight_of(values), activation="silu", mul=mul, backend=backend
        ),
        ((2, 3, 8), (4, 4), (2, 3, 4)),
    ),
    "sparse24.fake_quantize": Case(
        lambda x, *, backend: sparse24.fake_quantize(x), ((3, 8),), (None,), straight_through=True
    ),
    "sparse24.compress": Case(lambda w, *, backend: sparse24.compress(w, MASK24).values, ((4, 8),), (None,), True),
}

INT8 = sparse24.quantize(sparse24.compress(torch.linspace(-1, 1, 32).reshape(4, 8), MASK24))


def in_place(cache: Tensor, *, backend: str | None) -> Tensor:
    """compact_kv_ of a copy, which is what changes."""
    cache = cache.clone()
    pyvtk.compact_kv_(PER_HEAD, cache, backend=backend)
    return cache


# Functions that give no number of their own, or refuse to be differentiated.
CONSTANT = {
    "select": Case(lambda x, *, backend: pyvtk.select(x, 2, backend=backend).indices, ((2, 5),)),
    "compact_kv_": Case(in_place, ((1, 2, 4, 3),)),
    "sparse24.linear_int8": Case(lambda x, *, backend: sparse24.linear_int8(x, INT8, backend=backend), ((3, 8),)),
}

# Public functions that have no derivative, and why.
WITHOUT_DERIVATIVE = {
    "info": "says what there is",
    "select": "chooses",
    "compact_kv_": "writes to its arguments, which refuse gradients",
    **dict.fromkeys(("neighbor_plan", "window_plan", "routed_plan", "subset_plan"), "makes a plan"),
    "sparse24.linear_int8": "refuses gradients: rounding has none",
    "sparse24.quantize": "rounds; fake_quantize is for training",
    "sparse24.prune": "chooses",
    **dict.fromkeys(("sparse24.wanda_scores", "sparse24.taylor_scores"), "scores weights outside of the graph"),
    **dict.fromkeys(("sparse24.input_norms", "sparse24.calibrate_activations"), "measure a model"),
    **dict.fromkeys(("sparse24.calibrate", "sparse24.estimate", "sparse24.table_path"), "cost model"),
    **dict.fromkeys(("sparse24.from_torch", "sparse24.to_torch"), "convert weights"),
    **dict.fromkeys(("sparse24.sparsify_", "sparse24.load_sparsified_", "sparse24.step_24"), "change models"),
    "sparse24.structure_decay": "makes a schedule",
}
