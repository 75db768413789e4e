"""Pruning to 2:4: ties, NaN, scores; transposable masks against brute force; N:M of the reference."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pyvtk import sparse24
from pyvtk.reference import sparse24 as reference


def n_of_m(row, n, m):
    """The n largest of each m of a list, lower index first among equals: one comparison after the other."""
    kept = []
    for start in range(0, len(row), m):
        order = sorted(range(m), key=lambda i: (-row[start + i], i))
        kept += [i in order[:n] for i in range(m)]
    return kept


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_n_of_m_with_ties(data):
    n, m = data.draw(st.sampled_from([(2, 4), (1, 4), (3, 4), (1, 2), (2, 8), (4, 8)]))
    rows, groups = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    number = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("inf")])
    numbers = data.draw(st.lists(number, min_size=rows * groups * m, max_size=rows * groups * m))
    scores = torch.tensor(numbers).reshape(rows, groups * m)
    expected = torch.tensor([n_of_m(row, n, m) for row in scores.tolist()], dtype=torch.bool).reshape(scores.shape)
    assert torch.equal(reference.prune_n_of_m(scores, n, m), expected)
    assert torch.equal(reference.prune_n_of_m(scores.T, n, m, dim=0), expected.T)
    if (n, m) == (2, 4):
        assert torch.equal(sparse24.prune(torch.zeros_like(scores), scores), expected)
        magnitude = torch.tensor([n_of_m([abs(x) for x in row], n, m) for row in scores.tolist()], dtype=torch.bool)
        assert torch.equal(sparse24.prune(scores), magnitude.reshape(scores.shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_magnitude_of_every_dtype(dtype):
    weight = (torch.randn(30, 64) * 20).to(dtype)
    weight[0, :4] = torch.tensor([-128, 127, 126, -128]).to(dtype)  # int8 has no 128
    expected = reference.prune_n_of_m(weight.double().abs(), 2, 4)
    assert torch.equal(sparse24.prune(weight), expected) and expected[0, :4].tolist() == [True, False, False, True]
    assert torch.equal(sparse24.prune(weight.T.contiguous().T), expected)


def test_patterns_are_all_of_them():
    """Two ones in every row and column of 4x4: 90."""
    rows = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
    expected = {block for block in product(map(tuple, rows), repeat=4) if all(sum(c) == 2 for c in zip(*block))}
    patterns = reference.transposable_patterns()
    assert {tuple(tuple(row) for row in block) for block in patterns.tolist()} == expected and len(patterns) == 90


def brute_force(block):
    """The largest sum of |w| over all patterns, one after the other."""
    best = 0.0
    rows = [[i in pair for i in range(4)] for pair in combinations(range(4), 2)]
    for pattern in product(rows, repeat=4):
        if all(sum(column) == 2 for column in zip(*pattern)):
            total = sum(block[r][c] for r in range(4) for c in range(4) if pattern[r][c])
            best = max(best, total)
    return best


def test_transposable_masks_are_the_optimum():
    """The bar is 97 % of the magnitude of the best; this is the best."""
    weight = torch.randn(24, 32, dtype=torch.float64)
    mask = sparse24.prune(weight, transposable=True)
    assert torch.equal(mask, sparse24.prune(weight.T, transposable=True).T)
    for r in range(0, 24, 4):
        for c in range(0, 32, 4):
            block, kept = weight[r : r + 4, c : c + 4].abs(), mask[r : r + 4, c : c + 4]
            assert (kept.sum(0) == 2).all() and (kept.sum(1) == 2).all()
            assert block[kept].sum().item() == pytest.approx(brute_force(block.tolist()), rel=1e-12)


def test_transposable_ties_and_chunks(monkeypatch):
    first = reference.transposable_patterns()[0]
    assert torch.equal(sparse24.prune(torch.ones(4, 4), transposable=True), first)
    weight = torch.randn(40, 32)
    whole = sparse24.prune(weight, transposable=True)
    monkeypatch.setattr("pyvtk.sparse24.pruning._BLOCKS", 16)
    assert torch.equal(sparse24.prune(weight, transposable=True), whole)


def test_the_compressed_transpose():
    weight = torch.randn(16, 24)
    mask = sparse24.prune(weight, transposable=True)
    both = sparse24.compress(weight, mask).with_transpose()
    assert torch.equal(both.transposed.decompress(), both.decompress().T)
    assert both.nbytes == 2 * (16 * 12 * 4) + 16 * 3 + 24 * 2


# 2:4 along both axes by what is not 0, with fewer than eight entries in the block: no pattern of 90 holds it
FEWER = torch.tensor([[2.0, 0, 0, 0], [0, 8, 0, 6], [0, 0, 4, 5], [0, 3, 7, 0]])


def test_at_most_two_can_be_more_than_exactly_two():
    """What the docstring of prune says of its optimum."""
    mask = sparse24.prune(FEWER, transposable=True)
    assert (mask.sum(0) == 2).all() and (mask.sum(1) == 2).all()
    assert FEWER[mask].sum().item() == brute_force(FEWER.tolist()) < FEWER.sum().item()


@pytest.mark.parametrize("entry", (6.0, -0.0, float("inf")))
def test_the_transpose_of_what_is_not_zero(entry):
    """Fillers are no entries."""
    dense = FEWER.repeat(2, 3).clone()
    dense[1, 3] = entry
    both = sparse24.compress(dense).with_transpose()
    assert torch.equal(both.transposed.decompress(), dense.T)
    if entry == 6:
        x = torch.randn(3, 12, requires_grad=True)
        results = (sparse24.linear(x, both), x @ dense.T)
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x) for y in results))


def test_a_kept_zero_that_becomes_an_entry():
    """Column 0 has room for the filler of row 0 in no way: then the transpose is gone, and the gradient stays right."""
    both = sparse24.compress(FEWER).with_transpose()
    both.values[both.values == 0] = 9.0  # the filler of row 0, in column 1
    dense, x = both.decompress(), torch.randn(3, 4, requires_grad=True)
    assert both.transposed is None and (dense != 0).sum(0).tolist() == [1, 3, 2, 2]
    (grad,) = torch.autograd.grad(sparse24.linear(x, both).sum(), x)
    torch.testing.assert_close(grad, dense.sum(0).expand(3, 4))
    with pytest.raises(
        ValueError, match="2:4 along out_features too, got 3 entries other than 0 in column 1, rows 0 to 3"
    ):
        both.with_transpose()


def test_random_masks_of_at_most_two():
    """Any weight with at most two in every row and column of each block."""
    for _ in range(50):
        dense = torch.randn(8, 12)
        for _ in range(4):  # thin out until it fits
            dense *= reference.prune_n_of_m(dense.abs() * torch.rand(8, 12), 2, 4)
            dense *= reference.prune_n_of_m(dense.abs() * torch.rand(8, 12), 2, 4, dim=0)
        dense *= torch.rand(8, 12) < 0.8
        both = sparse24.compress(dense).with_transpose()
        assert torch.equal(both.transposed.decompress(), dense.T) and torch.equal(both.decompress(), dense)


# Scores


def test_wanda_and_taylor():
    weight, grad = torch.randn(8, 16), torch.randn(8, 16)
    norm = torch.rand(16)
    torch.testing.assert_close(sparse24.wanda_scores(weight, norm), weight.abs() * norm[None])
    torch.testing.assert_close(
        sparse24.taylor_scores(weight.bfloat16(), grad), (weight.bfloat16().float() * grad).abs()
    )
    mask = sparse24.prune(weight, sparse24.wanda_scores(weight, norm))
    assert torch.equal(mask, reference.prune_n_of_m(weight.abs() * norm, 2, 4))


def test_input_norms():
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))
    batches = [torch.randn(3, 5, 8), torch.randn(2, 8)]
    norms = sparse24.input_norms(model, batches)
    x = torch.cat([batch.reshape(-1, 8) for batch in batches])
    torch.testing.assert_close(norms["0"], x.norm(dim=0))
    torch.testing.assert_close(norms["2"], model[:2](x).norm(dim=0).detach())
    assert not model[0]._forward_pre_hooks


def test_wanda_prunes_better_than_magnitude_where_inputs_differ():
    """Features of very different size: the output changes less."""
    x = torch.randn(200, 64) * torch.logspace(-2, 1, 64)[torch.randperm(64)]
    layer = nn.Linear(64, 32, bias=False)
    errors = []
    for scores in (None, sparse24.wanda_scores(layer.weight, sparse24.input_norms(layer, [x])[""])):
        weight24 = sparse24.compress(layer.weight.detach(), sparse24.prune(layer.weight, scores))
        errors.append((sparse24.linear(x, weight24) - layer(x)).norm().item())
    assert errors[1] < errors[0]


NAN = torch.zeros(4, 8).index_put((torch.tensor(1), torch.tensor(6)), torch.tensor(float("nan")))
INF = torch.zeros(4, 8).index_put((torch.tensor(3), torch.tensor(0)), torch.tensor(float("inf")))
W = torch.zeros(4, 8)
WRONG = {
    "sparse24.prune: weight must not hold NaN, got one at (1, 6)": lambda: sparse24.prune(NAN),
    "sparse24.prune: scores must not hold NaN, got one at (1, 6)": lambda: sparse24.prune(W, NAN),
    "sparse24.prune: scores must be finite for a transposable": lambda: sparse24.prune(INF, transposable=True),
    "sparse24.prune: weight must be a tensor": lambda: sparse24.prune(None),
    "sparse24.prune: weight must have 2": lambda: sparse24.prune(W[0]),
    "sparse24.prune: weight must have dtype": lambda: sparse24.prune(W.long()),
    "sparse24.prune: weight must have in_features": lambda: sparse24.prune(W[:, :6]),
    "sparse24.prune: weight must have out_features": lambda: sparse24.prune(W[:3], transposable=True),
    "sparse24.prune: scores must be a tensor": lambda: sparse24.prune(W, "wanda"),
    "sparse24.prune: scores must be [out": lambda: sparse24.prune(W, W[:2]),
    "sparse24.prune: transposable must be": lambda: sparse24.prune(W, transposable=1),
    "sparse24.wanda_scores: input_norm must be": lambda: sparse24.wanda_scores(W, torch.ones(4)),
    "sparse24.taylor_scores: grad must be": lambda: sparse24.taylor_scores(W, torch.ones(4)),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)
