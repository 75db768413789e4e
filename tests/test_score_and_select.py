"""score_and_select: what select gives of its own scores, bit for bit, and what masks and ranges imply."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import pyvtk


def inputs(batch=2, q_heads=4, kv_heads=2, queries=1, keys=50, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return q, k


def assert_same(a, b):
    assert torch.equal(a.indices, b.indices)
    assert torch.equal(a.counts, b.counts)
    assert torch.equal(a.overflow, b.overflow)
    assert (a.num_tokens, a.ascending, a.align) == (b.num_tokens, b.ascending, b.align)


def expected_selection(scores, keys, k_mask=None, key_range=None, **options):
    """The meaning, written with select alone."""
    start, stop = key_range or (0, keys)
    whole = torch.full((*scores.shape[:-1], keys), -math.inf)
    whole[..., start:stop] = scores
    candidates = torch.zeros(whole.shape, dtype=torch.bool)
    candidates[..., start:stop] = True
    for mask in (k_mask, options.pop("candidates", None)):
        if mask is not None:
            candidates &= mask if mask.dim() == candidates.dim() else mask[:, None]
    if k_mask is not None:
        hidden = ~k_mask if options.get("keep") is None else ~k_mask & ~options["keep"]
        options["drop"] = hidden if options.get("drop") is None else hidden | options["drop"]
    return pyvtk.select(whole, candidates=candidates, backend="reference", **options)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(0, 60),
    queries=st.integers(0, 9),
    head_reduce=st.sampled_from(("mean", "sum", "max", "group", None)),
    query_reduce=st.sampled_from(("mean", "max")),
    num_keep=st.integers(0, 70),
    masked=st.booleans(),
    ranged=st.booleans(),
    others=st.sampled_from(("drop", "keep")),
    order=st.sampled_from(("index", "score")),
    align=st.sampled_from(("left", "right")),
)
def test_equals_select_of_its_own_scores(
    seed, keys, queries, head_reduce, query_reduce, num_keep, masked, ranged, others, order, align
):
    q, k = inputs(queries=queries, keys=keys, seed=seed)
    g = torch.Generator().manual_seed(seed)
    k_mask = torch.rand(2, keys, generator=g) > 0.3 if masked else None
    key_range = (keys // 4, keys - keys // 5) if ranged else None
    keep, drop, candidates = (torch.rand(2, keys, generator=g) > share for share in (0.9, 0.9, 0.2))
    options = {"keep": keep, "drop": drop, "candidates": candidates, "others": others, "order": order, "align": align}
    scoring = {"head_reduce": head_reduce, "query_reduce": query_reduce, "k_mask": k_mask, "key_range": key_range}
    for backend in ("compiled", "reference"):
        selection, scores = pyvtk.score_and_select(
            q, k, num_keep, causal=True, return_scores=True, backend=backend, **scoring, **options
        )
        alone = pyvtk.attention_scores(q, k, causal=True, backend=backend, **scoring)
        assert torch.equal(scores, alone)
        expected = expected_selection(scores, keys, k_mask, key_range, num_keep=num_keep, **options)
        if backend == "compiled":
            again = pyvtk.score_and_select(q, k, num_keep, causal=True, backend=backend, **scoring, **options)
            assert_same(again, selection)
        assert_same(selection, expected)


def test_other_criteria_and_capacity():
    q, k = inputs(queries=3)
    segments = torch.arange(50).expand(2, 50) // 10
    for options in (
        {"threshold": 0.02},
        {"top_p": 0.7, "capacity": "exact"},
        {"num_keep": 3, "segments": segments, "num_segments": 5},
        {"num_keep": torch.tensor([4, 9]), "capacity": 6},
    ):
        compiled, scores = pyvtk.score_and_select(q, k, return_scores=True, **options)
        assert_same(compiled, pyvtk.select(scores, backend="reference", **options))


def test_packed():
    q, k = torch.randn(3, 4, 16), torch.randn(40, 2, 16)
    cu_q, cu_k = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 15, 15, 40])
    selections = [
        pyvtk.score_and_select(
            q, k, 6, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, capacity=6, return_scores=True, backend=backend
        )
        for backend in ("compiled", "reference")
    ]
    assert_same(selections[0][0], selections[1][0])
    selection, scores = selections[0]
    assert selection.packed and selection.counts.tolist() == [6, 0, 6]
    assert_same(selection, pyvtk.select(scores, 6, cu_seqlens=cu_k, capacity=6))
    assert (selection.indices[2] >= 15).all()


def test_scores_carry_a_gradient():
    q, k = inputs(queries=2)
    q.requires_grad_()
    selection, scores = pyvtk.score_and_select(q, k, 7, return_scores=True)
    assert not selection.indices.requires_grad
    (grad,) = torch.autograd.grad(scores.square().sum(), q)
    (expected,) = torch.autograd.grad(pyvtk.attention_scores(q, k).square().sum(), q)
    assert torch.equal(grad, expected) and grad.any()
    assert_same(selection, pyvtk.score_and_select(q.detach(), k, 7))


def test_masked_keys_are_forced_only_by_keep():
    q, k = inputs(batch=1, keys=6)
    mask = torch.tensor([[True, False, True, True, False, True]])
    keep = torch.tensor([[False, True, False, False, False, False]])
    selection = pyvtk.score_and_select(q, k, 6, k_mask=mask, keep=keep)
    assert selection.indices[0, :5].tolist() == [0, 1, 2, 3, 5] and selection.counts.tolist() == [5]


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_padding_stays_nowhere(backend):
    """others="keep" keeps what does not compete, and hidden keys do not exist."""
    q, k = inputs(batch=2, keys=5)
    mask = torch.tensor([[True, True, True, False, False], [True, True, True, True, True]])
    visual = torch.tensor([False, True, True, True, False]).expand(2, 5)
    options = {"k_mask": mask, "candidates": visual, "others": "keep", "backend": backend}
    selection = pyvtk.score_and_select(q, k, 3, **options)
    assert selection.counts.tolist() == [3, 5]
    assert selection.mask().tolist() == mask.tolist()
    none = pyvtk.score_and_select(q, k, 0, **options)
    assert none.mask().tolist() == [[True, False, False, False, False], [True, False, False, False, True]]
    # keep names one of them, drop wins over keep, and a range changes nothing
    named = torch.tensor([[False, False, False, True, True], [False] * 5])
    dropped = torch.tensor([False, False, False, False, True]).expand(2, 5)
    kept = pyvtk.score_and_select(q, k, 0, keep=named, drop=dropped, key_range=(1, 3), **options)
    assert kept.mask().tolist() == [[True, False, False, True, False], [True, False, False, True, False]]


@pytest.mark.parametrize("head_reduce", (None, "group"))
def test_padding_stays_nowhere_with_masks_of_heads(head_reduce):
    q, k = inputs(keys=30)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, 30, generator=generator) > 0.4
    heads = 4 if head_reduce is None else 2
    for names in ((), ("keep",), ("drop",), ("candidates", "keep"), ("keep", "drop", "candidates")):
        for shape in ((2, 30), (2, heads, 30)):
            masks = {name: torch.rand(shape, generator=generator) > 0.6 for name in names}
            options = {"k_mask": mask, "others": "keep", "head_reduce": head_reduce, **masks}
            compiled, again = (
                pyvtk.score_and_select(q, k, 4, backend=backend, **options) for backend in ("compiled", "reference")
            )
            assert_same(compiled, again)
            stays = compiled.mask()
            forced = masks.get("keep", torch.zeros(shape, dtype=torch.bool))
            forced = forced if len(shape) == 3 else forced[:, None]
            assert not (stays & ~mask[:, None] & ~forced).any()
            assert (stays & mask[:, None]).any()


def test_padding_of_packed_samples_stays_nowhere():
    q, k = torch.randn(2, 4, 16), torch.randn(9, 2, 16)
    cu_q, cu_k = torch.tensor([0, 1, 2]), torch.tensor([0, 4, 9])
    mask = torch.tensor([True, True, False, False, True, True, True, False, False])
    candidates = torch.tensor([False, True, True, False, False, True, True, True, False])
    for backend in ("compiled", "reference"):
        selection = pyvtk.score_and_select(
            q, k, 1, k_mask=mask, candidates=candidates, others="keep", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
            capacity=5, backend=backend,
        )  # fmt: skip
        assert selection.counts.tolist() == [2, 2]
        assert selection.indices[:, 0].tolist() == [0, 4] and mask[selection.indices[:, 1]].all()


def operator_arguments(requires_grad):
    q, k = inputs(queries=2)
    q.requires_grad_(requires_grad)
    scoring = (None, None, None, torch.ones(2, 50).bool(), None, None, None, None, None, True, 5, 45, False, 0.25,
               "mean", "mean", False, False)  # fmt: skip
    selecting = (7, None, None, None, None, None, None, False, None, 1, None, 7, False, False)
    return (q, k, *scoring, *selecting)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    opcheck(torch.ops.pyvtk.score_and_select.default, operator_arguments(requires_grad))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_compiles_as_one_graph(backend):
    q, k = inputs(queries=2)

    def step(q, k):
        return pyvtk.score_and_select(q, k, 9, causal=True, key_range=(5, 45), return_scores=True, backend=backend)

    (selection, scores), (expected, expected_scores) = torch.compile(step, fullgraph=True)(q, k), step(q, k)
    assert_same(selection, expected)
    torch.testing.assert_close(scores, expected_scores)
    q.requires_grad_()
    torch.compile(step, fullgraph=True)(q, k)[1].square().sum().backward()
    assert q.grad.any()


@pytest.mark.compile
def test_compiles_at_most_twice_over_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda q, k: pyvtk.score_and_select(q, k, 9), fullgraph=True, backend=counter)
    for keys in range(20, 30):
        compiled(*inputs(keys=keys))
    assert counter.frame_count <= 2


Q, K = torch.zeros(2, 4, 1, 16), torch.zeros(2, 2, 5, 16)
PACKED = {"q": Q[:, :, 0], "k": K[0].transpose(0, 1), "cu_seqlens_q": torch.tensor([0, 2]),
          "cu_seqlens_k": torch.tensor([0, 5])}  # fmt: skip
WRONG = [
    ({"num_keep": None}, ValueError, "num_keep"),
    ({"num_keep": -1}, ValueError, "num_keep"),
    ({"num_keep": 1.5}, TypeError, "num_keep"),
    ({"query_reduce": ("sum", "max")}, ValueError, "query_reduce"),
    ({"return_scores": 1}, TypeError, "return_scores"),
    ({"candidates": torch.ones(2, 4).bool()}, ValueError, "candidates"),
    ({"keep": torch.ones(2, 5)}, TypeError, "keep"),
    ({"capacity": -2}, ValueError, "capacity"),
    ({"others": "hide"}, ValueError, "others"),
    ({"key_range": (0, 9)}, ValueError, "key_range"),
    ({"k": K[..., :8]}, ValueError, "k"),
    ({**PACKED, "head_reduce": None}, ValueError, "head_reduce"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_arguments(number):
    arguments, error, name = WRONG[number]
    with pytest.raises(error, match=rf"score_and_select: .*\b{name}\b"):
        pyvtk.score_and_select(**{"q": Q, "k": K, "num_keep": 2, **arguments})
