"""Integers of a caller beyond int32, and at its edges: the right number or an error, never a number that wrapped.

Those of layouts and plans: tests/test_wide_layouts.py."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pyvtk
from pyvtk import Selection, checks

MOST, LEAST = 2**31 - 1, -(2**31)  # int32
NEVER, FIRST = 2**63 - 1, -(2**63)  # int64


# --- the helpers ---


def test_to_int32_keeps_the_order():
    wide = torch.tensor([FIRST, LEAST - 1, LEAST, -1, 0, MOST, MOST + 1, 2**32, NEVER])
    narrow = checks.to_int32(wide)
    assert narrow.dtype == torch.int32 and narrow.tolist() == [LEAST] * 3 + [-1, 0] + [MOST] * 4
    assert checks.to_int32(narrow) is narrow


def test_ranks_compare_as_the_numbers_do():
    numbers = torch.tensor([FIRST, LEAST - 1, LEAST, -1, 0, 0, 3, MOST - 1, MOST, 2**32, 2**32 + 3, NEVER])
    for among in (numbers[::2], numbers[1::2].flip(0), numbers[4:8].repeat(2), numbers[:0]):
        of_among, of_all = checks.ranks(among, among, numbers)
        assert of_all.dtype == torch.int32 and of_all.min() >= 0 and of_all.max() <= among.numel()
        assert torch.equal(of_all[:, None] <= of_among, numbers[:, None] <= among)


# --- attention_scores, score_and_select ---


def scores(backend, at_query, at_key, hidden=None, dtype=torch.int64, **options):
    """Shares of the two or more keys, all with the same logit."""
    q, k = torch.zeros(1, 1, len(at_query or [0]), 8), torch.zeros(1, 1, len(at_key or [0, 0]), 8)
    for name, positions in (("q_positions", at_query), ("k_positions", at_key)):
        if positions is not None:
            options[name] = torch.tensor([positions], dtype=dtype)
    if hidden is not None:
        options["k_mask"] = torch.tensor([[key != hidden for key in range(k.shape[2])]])
    return pyvtk.attention_scores(q, k, causal=True, backend=backend, **options)[0].tolist()


POSITIONS = [
    # queries, keys (None: as they come), the key that is masked, what is right
    ([0], [0, 2**31], None, [1, 0]),
    ([0], [0, NEVER], None, [1, 0]),
    ([0], [0, 2**32], None, [1, 0]),
    ([NEVER], [0, NEVER], None, [0.5, 0.5]),
    ([NEVER - 1], [0, NEVER], None, [1, 0]),
    ([2**32 + 5], [2**32 + 5, 2**32 + 6], None, [1, 0]),
    ([-1], [-(2**33), 0], None, [1, 0]),
    ([FIRST], [FIRST, FIRST + 1], None, [1, 0]),
    ([-(2**40)], [-(2**40) - 1, -(2**40) + 1], None, [1, 0]),
    ([0], [0, NEVER], 0, [0, 0]),
    ([NEVER], [0, 1], 1, [1, 0]),
    ([NEVER], None, 1, [1, 0]),
    ([2**32], None, None, [0.5, 0.5]),
    ([0], None, None, [1, 0]),
    ([-(2**32)], None, None, [0, 0]),
    ([FIRST], None, None, [0, 0]),
    (None, [NEVER, 0], None, [0, 1]),
    (None, [2**32, -(2**40)], None, [0, 1]),
    (None, [FIRST, NEVER], 0, [0, 0]),
    ([0, NEVER], [0, 2**31], None, [0.75, 0.25]),
]
EDGES = [  # of int32, in int32 and in int64
    ([MOST], [0, 1], 1, [1, 0]),
    ([MOST], [MOST, 0], 1, [1, 0]),
    ([MOST], [MOST, 0], None, [0.5, 0.5]),
    ([MOST - 1], [MOST, 0], None, [0, 1]),
    ([LEAST], [LEAST, LEAST + 1], None, [1, 0]),
    ([LEAST], [LEAST + 1, 0], None, [0, 0]),
    ([MOST], None, 1, [1, 0]),
    ([LEAST], None, None, [0, 0]),
    (None, [MOST, LEAST], None, [0, 1]),
    (None, [MOST, LEAST], 1, [0, 0]),
]
ALL = [(*case, torch.int64) for case in POSITIONS + EDGES] + [(*case, torch.int32) for case in EDGES]


@pytest.mark.parametrize("backend", ("reference", "compiled"))
@pytest.mark.parametrize(("at_query", "at_key", "hidden", "right", "dtype"), ALL)
def test_positions(backend, at_query, at_key, hidden, right, dtype):
    assert scores(backend, at_query, at_key, hidden, dtype) == right


def test_positions_of_both_dtypes():
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    at_query, at_key = torch.tensor([[MOST]], dtype=torch.int32), torch.tensor([MOST, 2**31])
    for positions in ((at_query, at_key), (at_query[0], at_key[None])):
        found = pyvtk.attention_scores(
            q, k, causal=True, q_positions=positions[0], k_positions=positions[1], backend="compiled"
        )
        assert found.tolist() == [[1, 0]]


@pytest.mark.parametrize("backend", ("reference", "compiled"))
@pytest.mark.parametrize("reduce", ("sum", "max", "visible_mean"))
def test_wide_positions_equal_narrow_ones(backend, reduce):
    """The same order far apart: scores and gradients of batches, with masks, given for both sides or for one."""
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    at_query, at_key = torch.randint(-3, 9, (2, 5)), torch.randint(-3, 9, (2, 9))
    k_mask = torch.rand(2, 9) < 0.7

    def results(spread):
        leaves = [x.clone().requires_grad_() for x in (q, k)]
        out = pyvtk.attention_scores(
            *leaves, causal=True, q_positions=spread(at_query), k_positions=spread(at_key), k_mask=k_mask,
            query_reduce=reduce, head_reduce=None, backend=backend,
        )  # fmt: skip
        return [out.detach(), *torch.autograd.grad((out * torch.arange(9)).sum(), leaves)]

    for spread in (lambda x: x * 2**58, lambda x: x * 2**27, lambda x: (x * 2**27).int()):
        for found, expected in zip(results(spread), results(lambda x: x)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ("reference", "compiled"))
def test_wide_positions_of_packed_samples(backend):
    q, k = torch.zeros(3, 1, 8), torch.zeros(4, 1, 8)
    cu_q, cu_k = torch.tensor([0, 1, 3]), torch.tensor([0, 2, 4])
    options = {"causal": True, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "query_reduce": "sum", "backend": backend}
    at_query, at_key = torch.tensor([0, NEVER, 2**40]), torch.tensor([0, 2**32, NEVER, 2**40])
    found = pyvtk.attention_scores(q, k, q_positions=at_query, k_positions=at_key, **options)
    assert found.tolist() == [1, 0, 0.5, 1.5]
    assert pyvtk.attention_scores(q, k, q_positions=at_query, **options).tolist() == [1, 0, 1, 1]
    assert pyvtk.attention_scores(q, k, k_positions=at_key, **options).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("queries", "keys"), ((0, 3), (2, 0), (0, 0)))
def test_no_positions(queries, keys):
    q, k = torch.randn(2, 1, queries, 8), torch.randn(2, 1, keys, 8)
    found = pyvtk.attention_scores(
        q, k, causal=True, q_positions=torch.zeros(2, queries, dtype=torch.int64),
        k_positions=torch.zeros(2, keys, dtype=torch.int64), backend="compiled",
    )  # fmt: skip
    assert torch.equal(found, torch.zeros(2, keys))


@pytest.mark.parametrize("backend", ("reference", "compiled"))
def test_score_and_select(backend):
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8)
    options = {"q_positions": torch.tensor([[0]]), "k_positions": torch.tensor([[NEVER, 2**32, 0]])}
    selection = pyvtk.score_and_select(q, k, 1, causal=True, backend=backend, **options)
    assert selection.indices.tolist() == [[2]]


@pytest.mark.compile
def test_positions_in_a_graph():
    """Whole, with dynamic sizes, and with fake tensors."""

    def run(q, k, at_query, at_key):
        return pyvtk.attention_scores(q, k, causal=True, q_positions=at_query, k_positions=at_key)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for keys in (2, 3):
        at_key = torch.tensor([[0, *[NEVER] * (keys - 1)]])
        found = compiled(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, keys, 8), torch.tensor([[0]]), at_key)
        assert found.tolist() == [[1, *[0] * (keys - 1)]]
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            zeros = torch.zeros(1, 2, dtype=torch.int64)
            assert run(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), zeros, zeros).shape == (1, 2)


def test_the_operator_refuses_a_query_where_masked_keys_are():
    q, k = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 2, 8)
    at_query, k_mask = torch.tensor([[MOST]], dtype=torch.int32), torch.tensor([[True, False]])
    options = (None, None, None, None, None, True, 0, 2, False, 1.0, "mean", "mean", False, False, False)
    with pytest.raises(RuntimeError, match="q_positions must be below int32's maximum"):
        torch.ops.pyvtk.attention_scores(q, k, at_query, None, None, k_mask, *options)


# --- select and selections ---


@pytest.mark.parametrize("wrong", (2**32 + 4, 2**31, NEVER, -(2**32) + 4))
def test_offsets_do_not_wrap(wrong):
    cu = torch.tensor([0, wrong])
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        pyvtk.select(torch.randn(4), 1, cu_seqlens=cu, backend="compiled")
    q = torch.zeros(4, 1, 8)
    with pytest.raises(RuntimeError, match="cu_seqlens_q must ascend from 0 to 4"):
        pyvtk.attention_scores(q, q, cu_seqlens_q=cu, cu_seqlens_k=torch.tensor([0, 4]), backend="compiled")
    with pytest.raises(RuntimeError, match="cu_seqlens_k must ascend from 0 to 4"):
        pyvtk.score_and_select(q, q, 1, cu_seqlens_q=torch.tensor([0, 4]), cu_seqlens_k=cu, backend="compiled")


@pytest.mark.parametrize("backend", ("reference", "compiled"))
def test_numbers_of_select(backend):
    values = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    keep = torch.tensor([[False, False, False, True]])
    for number, right in ((FIRST, [3]), (-(2**32) + 2, [3]), (2**32, [0, 1, 2, 3]), (NEVER, [0, 1, 2, 3])):
        selection = pyvtk.select(values, torch.tensor([number]), keep=keep, backend=backend)
        assert selection.indices[0, : selection.counts[0]].tolist() == right
    segments = torch.tensor([[2**32, 0, -(2**32), NEVER]])  # only the second is of segment 0
    selection = pyvtk.select(values, 4, segments=segments, num_segments=1, backend=backend)
    assert selection.counts.tolist() == [1] and selection.indices[0, 0] == 1
    with pytest.raises(ValueError, match=r"select: num_segments must be below 2\*\*31, got 4294967296"):
        pyvtk.select(values, 1, segments=segments, num_segments=2**32, backend=backend)


def test_selections_and_groups():
    counts = torch.tensor([2**32 + 1, FIRST, NEVER])
    selection = Selection.from_indices(torch.arange(6).reshape(3, 2), 6, counts=counts)
    assert selection.counts.tolist() == [2, 0, 2]
    far = Selection.from_indices(torch.tensor([[2**32]]), 6)
    with pytest.raises(RuntimeError, match="4294967296"):
        pyvtk.compact(far, torch.randn(1, 6, 2), backend="compiled")
    with pytest.raises(RuntimeError, match="4294967296"):
        pyvtk.merge_tokens(torch.randn(1, 1, 2), torch.tensor([[2**32]]), num_groups=1, backend="compiled")
    assert not pyvtk.merge_tokens(torch.ones(1, 1, 2), torch.tensor([[FIRST]]), num_groups=1).any()
