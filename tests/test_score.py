"""attention_scores: every option against the float64 reference, and that against loops written from the formula."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Exponents, assert_within_budget
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import pyvtk
from pyvtk import _C
from pyvtk.ops import score as page

QUERY_REDUCES = ("mean", "sum", "max", "visible_mean", ("sum", "max"))
HEAD_REDUCES = ("mean", "sum", "max", "group_mean", "group_sum", "group_max", None)
ORDERS = ("queries_first", "heads_first")
QUANTITIES = ("probability", "logit")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loops(q, k, *, causal=False, q_positions=None, k_positions=None, q_mask=None, k_mask=None, k_bias=None,
          key_range=None, denominator="visible", lse=None, scale=None, query_reduce="mean", head_reduce="mean",
          head_weights=None, reduce_order="queries_first", quantity="probability"):  # fmt: skip
    """The definition, one number at a time, in Python floats. Only for single reductions and unpacked input."""
    (batch, q_heads, queries, dim), (_, kv_heads, keys, _) = q.shape, k.shape
    scale = dim**-0.5 if scale is None else scale
    start, stop = key_range or (0, keys)
    group = q_heads // kv_heads

    def seen(b, i, j):
        at_query = int(q_positions[b, i]) if q_positions is not None else i + keys - queries
        at_key = int(k_positions[b, j]) if k_positions is not None else j
        return (
            (q_mask is None or bool(q_mask[b, i]))
            and (k_mask is None or bool(k_mask[b, j]))
            and (not causal or at_key <= at_query)
        )

    def logit(b, h, i, j):
        bias = 0.0 if k_bias is None else float(k_bias[b, j])
        return scale * float(q[b, h, i].double() @ k[b, h // group, j].double()) + bias

    def reduce_queries(b, j, values):
        """values: query -> number, of the queries that see key j."""
        if not values:
            return 0.0 if quantity == "probability" else -math.inf
        valid = queries if q_mask is None else int(q_mask[b].sum())
        total = math.fsum(values.values())
        return {
            "sum": total,
            "mean": total / max(1, valid),
            "visible_mean": total / max(1, len(values)),
            "max": max(values.values()),
        }[query_reduce]

    def reduce_heads(kind, values):
        if -math.inf in values:
            return -math.inf
        return {"sum": math.fsum(values), "mean": math.fsum(values) / len(values), "max": max(values)}[kind]

    heads = range(q_heads)
    if head_reduce is None:
        sets = [[h] for h in heads]
    elif head_reduce.startswith("group"):
        sets = [list(heads[g * group : (g + 1) * group]) for g in range(kv_heads)]
    else:
        sets = [list(heads)]
    kind = "sum" if head_reduce is None else head_reduce.removeprefix("group_")
    out = torch.zeros(batch, len(sets), stop - start, dtype=torch.float64)
    for b in range(batch):
        weight = [
            1.0 if head_weights is None else float((head_weights if head_weights.dim() == 1 else head_weights[b])[h])
            for h in heads
        ]
        value = {}
        for h, i in itertools.product(heads, range(queries)):
            z = {j: logit(b, h, i, j) for j in range(keys) if seen(b, i, j)}
            inside = [x for j, x in z.items() if denominator == "visible" or start <= j < stop]
            if lse is not None:
                total = float(lse[b, h, i])
            else:
                top = max(inside, default=0.0)
                total = top + math.log(sum(math.exp(x - top) for x in inside)) if inside else -math.inf
            for j, x in z.items():
                dead = total == -math.inf
                value[h, i, j] = weight[h] * (x if quantity == "logit" else (0.0 if dead else math.exp(x - total)))
        for n, members in enumerate(sets):
            for j in range(start, stop):
                by_query = [i for i in range(queries) if seen(b, i, j)]
                if reduce_order == "heads_first":
                    pairs = {i: reduce_heads(kind, [value[h, i, j] for h in members]) for i in by_query}
                    out[b, n, j - start] = reduce_queries(b, j, pairs)
                else:
                    columns = [reduce_queries(b, j, {i: value[h, i, j] for i in by_query}) for h in members]
                    out[b, n, j - start] = reduce_heads(kind, columns)
    return out if head_reduce is None or head_reduce.startswith("group") else out[:, 0]


def inputs(batch=2, q_heads=4, kv_heads=2, queries=5, keys=37, dim=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return q.to(dtype), k.to(dtype)


def extras(number, batch, q_heads, queries, keys, quantity):
    """Six different mixtures of the other options."""
    g = torch.Generator().manual_seed(number)
    masks = {
        "q_mask": torch.rand(batch, queries, generator=g) > 0.3,
        "k_mask": torch.rand(batch, keys, generator=g) > 0.3,
    }
    positions = {
        "q_positions": torch.randint(0, keys, (batch, queries), generator=g),
        "k_positions": torch.stack([torch.randperm(keys, generator=g) for _ in range(batch)]),
    }
    weights = torch.randn(q_heads, generator=g)
    table = [
        {},
        {"causal": True, "k_bias": torch.randn(batch, keys, generator=g)},
        {**masks, "head_weights": torch.randn(batch, q_heads, generator=g)},
        {**masks, **positions, "causal": True, "scale": 0.3},
        {"key_range": (2, keys - 1), "denominator": "range", "causal": True, "head_weights": weights},
        {"key_range": (1, keys), "lse": torch.randn(batch, q_heads, queries, generator=g) + 4},
    ]
    chosen = table[number % len(table)]
    if quantity == "logit":
        chosen = {name: value for name, value in chosen.items() if name != "lse"}
    return chosen


def in_double(options):
    return {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in options.items()}


ALL = list(itertools.product(QUERY_REDUCES, HEAD_REDUCES, ORDERS, QUANTITIES))


@pytest.mark.parametrize("number", range(len(ALL)))
def test_reference_equals_loops(number):
    query_reduce, head_reduce, order, quantity = ALL[number]
    if isinstance(query_reduce, tuple):
        query_reduce = query_reduce[number % 2]
    q, k = inputs(batch=2, queries=3, keys=6, dim=8, dtype=torch.float64, seed=number)
    options = {
        "query_reduce": query_reduce, "head_reduce": head_reduce, "reduce_order": order, "quantity": quantity,
        **in_double(extras(number, 2, 4, 3, 6, quantity)),
    }  # fmt: skip
    actual = pyvtk.attention_scores(q, k, backend="reference", **options)
    torch.testing.assert_close(actual, loops(q, k, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("number", range(len(ALL)))
@pytest.mark.parametrize("shape", [(1, 350, 72), (40, 145, 24)], ids=str)
def test_compiled_within_budget(number, shape, instruction_set):
    query_reduce, head_reduce, order, quantity = ALL[number]
    queries, keys, dim = shape
    dtype = DTYPES[number % 3]
    q, k = inputs(queries=queries, keys=keys, dim=dim, dtype=dtype, seed=number)
    options = {
        "query_reduce": query_reduce, "head_reduce": head_reduce, "reduce_order": order, "quantity": quantity,
        **extras(number // 2, 2, 4, queries, keys, quantity),
    }  # fmt: skip
    compiled = pyvtk.attention_scores(q, k, backend="compiled", return_lse=True, **options)
    plain = pyvtk.attention_scores(q, k, backend="reference", return_lse=True, **options)
    oracle = pyvtk.attention_scores(q.double(), k.double(), backend="reference", return_lse=True, **in_double(options))
    for actual, exact, usual in zip(compiled, oracle, plain):
        assert_within_budget(actual, exact, usual)


def gradients(q, k, options, backend):
    """Gradients of a random linear function of scores and lse, to every differentiable input."""
    options = dict(options)
    leaves = {"q": q.detach().clone().requires_grad_(), "k": k.detach().clone().requires_grad_()}
    for name in ("k_bias", "lse", "head_weights"):
        if options.get(name) is not None:
            leaves[name] = options[name] = options[name].detach().clone().requires_grad_()
    out = pyvtk.attention_scores(leaves["q"], leaves["k"], backend=backend, return_lse="lse" not in options, **options)
    generator = torch.Generator().manual_seed(7)
    loss = 0
    for x in out if isinstance(out, tuple) else (out,):
        weight = torch.randn(x.shape, generator=generator).to(x.dtype)
        loss = loss + (x.masked_fill(x.isinf(), 0) * weight).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), grads)}


@pytest.mark.parametrize("number", range(len(ALL)))
def test_gradient_within_budget(number):
    """The budget holds for the worst of six draws: the largest error of a few numbers in one draw is mere luck, which
    plain torch has too, so there is room for what rounds the exponents of weights. What each instruction set computes
    is compared with the same plain results and oracles, which take most of the time."""
    query_reduce, head_reduce, order, quantity = ALL[number]
    queries, keys, dim = [(1, 210, 16), (33, 140, 24)][number % 2]
    drawn = []
    for seed in range(number, number + 6000, 1000):
        q, k = inputs(queries=queries, keys=keys, dim=dim, seed=seed)
        options = {
            "query_reduce": query_reduce, "head_reduce": head_reduce, "reduce_order": order, "quantity": quantity,
            **extras(number // 2, 2, 4, queries, keys, quantity),
        }  # fmt: skip
        plain = gradients(q, k, options, "reference")
        exact = (q.double(), k.double(), in_double(options), "reference")
        oracle = gradients(*exact)
        with Exponents():
            inexact = gradients(*exact)
        drawn.append((q, k, options, oracle, plain, inexact))
    before = _C.instruction_set()
    try:
        for instruction_set in _C.instruction_sets():
            _C.use_instruction_set(instruction_set)
            compiled = [gradients(*draw[:3], "compiled") for draw in drawn]
            for name in compiled[0]:
                actual = torch.stack([result[name] for result in compiled])
                oracle, plain, inexact = (torch.stack([draw[i][name] for draw in drawn]) for i in (3, 4, 5))
                assert_within_budget(actual, oracle, plain, instruction_set, Exponents.added(inexact, oracle))
    finally:
        _C.use_instruction_set(before)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gradient_of_half_inputs(dtype, instruction_set):
    q, k = inputs(queries=19, keys=30, dtype=dtype)
    compiled, plain = (gradients(q, k, {"causal": True}, backend) for backend in ("compiled", "reference"))
    oracle = gradients(q.double(), k.double(), {"causal": True}, "reference")
    for name, grad in compiled.items():
        assert grad.dtype == dtype
        assert_within_budget(grad, oracle[name], plain[name])


@pytest.mark.parametrize("number", range(6))
def test_gradcheck(number):
    """The reference's own gradient in float64, against finite differences (maxima apart: they have kinks)."""
    q, k = inputs(batch=1, queries=2, keys=4, dim=8, dtype=torch.float64)
    options = in_double(extras(number, 1, 4, 2, 4, "probability"))
    leaves = [q, k, *(v for v in options.values() if isinstance(v, torch.Tensor) and v.is_floating_point())]
    names = [n for n, v in options.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]

    def function(q, k, *values):
        return pyvtk.attention_scores(q, k, **{**options, **dict(zip(names, values))})

    assert torch.autograd.gradcheck(function, [x.requires_grad_() for x in leaves])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    group=st.sampled_from((1, 3, 7)),
    kv_heads=st.integers(1, 3),
    queries=st.integers(0, 60),
    keys=st.integers(0, 70),
    dim=st.sampled_from((8, 40, 72, 80, 128)),
    dtype=st.sampled_from(DTYPES),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(batch, group, kv_heads, queries, keys, dim, dtype, causal, seed):
    q, k = inputs(batch, group * kv_heads, kv_heads, queries, keys, dim, dtype, seed)
    options = {"causal": causal, "query_reduce": ("sum", "max"), "head_reduce": "group"}
    actual = pyvtk.attention_scores(q, k, backend="compiled", **options)
    plain = pyvtk.attention_scores(q, k, backend="reference", **options)
    oracle = pyvtk.attention_scores(q.double(), k.double(), backend="reference", **options)
    assert_within_budget(actual, oracle, plain)


@settings(max_examples=30, deadline=None)
@given(queries=st.integers(1, 20), keys=st.integers(1, 50), seed=st.integers(0, 1000))
def test_probabilities_of_a_query_sum_to_one(queries, keys, seed):
    q, k = inputs(queries=queries, keys=keys, seed=seed)
    scores = pyvtk.attention_scores(q, k, query_reduce="sum", head_reduce=None)
    torch.testing.assert_close(scores.sum(-1), torch.full(scores.shape[:-1], float(queries)), rtol=1e-5, atol=1e-5)


def test_long_rows_are_packed_in_chunks():
    """Beyond the size that is packed at once, keys go through in chunks and blocks of rows are larger."""
    q, k = inputs(1, 2, 1, 60, 70_000, 32)
    options = {"query_reduce": ("sum", "max"), "causal": True}
    actual = pyvtk.attention_scores(q, k, backend="compiled", **options)
    plain = pyvtk.attention_scores(q, k, backend="reference", **options)
    oracle = pyvtk.attention_scores(q.double(), k.double(), backend="reference", **options)
    assert_within_budget(actual, oracle, plain)


@pytest.mark.parametrize("head_reduce", ("mean", "group", None))
@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_packed_equals_samples(head_reduce, backend):
    lengths_q, lengths_k = (3, 0, 17, 1), (9, 4, 30, 0)
    cu_q = torch.tensor((0, *itertools.accumulate(lengths_q)))
    cu_k = torch.tensor((0, *itertools.accumulate(lengths_k)))
    q, k = torch.randn(sum(lengths_q), 4, 24), torch.randn(sum(lengths_k), 2, 24)
    mask = torch.rand(sum(lengths_k)) > 0.2
    options = {"causal": True, "query_reduce": ("mean", "max", "visible_mean"), "head_reduce": head_reduce}

    def run(q, k):
        return pyvtk.attention_scores(
            q, k, k_mask=mask, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True, backend=backend, **options
        )

    q.requires_grad_()
    k.requires_grad_()
    scores, lse = run(q, k)
    weight = torch.randn_like(scores)
    grad_q, grad_k = torch.autograd.grad((scores * weight).sum() + lse[lse.isfinite()].sum(), (q, k))
    for b in range(4):
        rows, columns = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        one_q = q[rows].detach().transpose(0, 1)[None].requires_grad_()
        one_k = k[columns].detach().transpose(0, 1)[None].requires_grad_()
        expected, expected_lse = pyvtk.attention_scores(
            one_q, one_k, k_mask=mask[None, columns], return_lse=True, backend="reference", **options
        )
        torch.testing.assert_close(scores[..., columns], expected[:, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[:, rows], expected_lse[0], rtol=1e-5, atol=1e-6)
        loss = (expected[:, 0] * weight[..., columns]).sum() + expected_lse[expected_lse.isfinite()].sum()
        expected_q, expected_k = torch.autograd.grad(loss, (one_q, one_k))
        torch.testing.assert_close(grad_q[rows], expected_q[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad_k[columns], expected_k[0].transpose(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ("compiled", "reference"))
@pytest.mark.parametrize("queries", (1, 40))
def test_masked_tokens_may_hold_anything(backend, queries):
    q, k = inputs(queries=queries)
    q_mask, k_mask = torch.rand(2, queries) > 0.3, torch.rand(2, 37) > 0.3
    q_mask[0] = True
    options = {"q_mask": q_mask, "k_mask": k_mask, "backend": backend, "return_lse": True}
    clean = pyvtk.attention_scores(q, k, **options)
    q[~q_mask[:, None].expand(2, 4, queries)] = math.nan
    k[~k_mask[:, None].expand(2, 2, 37)] = math.nan
    q.requires_grad_()
    k.requires_grad_()
    poisoned = pyvtk.attention_scores(q, k, **options)
    for a, b in zip(clean, poisoned):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    poisoned[0].square().sum().backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    assert not q.grad[~q_mask[:, None].expand(2, 4, queries)].any()
    assert not k.grad[~k_mask[:, None].expand(2, 2, 37)].any()


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_nan_reaches_what_sees_it(backend):
    q, k = inputs(queries=3, keys=9)
    k[0, 0, 4, 0] = math.nan
    scores = pyvtk.attention_scores(q, k, causal=True, head_reduce="group", backend=backend)
    # Queries stand at 6, 7 and 8, so all of them see key 4 and all their probabilities are NaN.
    assert scores[0, 0].isnan().all()
    assert scores[0, 1].isfinite().all() and scores[1].isfinite().all()


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_blind_queries(backend):
    """More causal queries than keys: the first see nothing; they count in "mean" and have lse -inf."""
    q, k = inputs(queries=6, keys=4)
    scores, lse = pyvtk.attention_scores(q, k, causal=True, return_lse=True, backend=backend)
    assert (lse[:, :, :2] == -math.inf).all() and lse[:, :, 2:].isfinite().all()
    torch.testing.assert_close(scores.sum(-1), torch.full((2,), 4 / 6))
    seen_by = pyvtk.attention_scores(q, k, causal=True, query_reduce="visible_mean", backend=backend)
    torch.testing.assert_close(seen_by[:, -1], scores[:, -1] * 6)


@pytest.mark.parametrize("backend", ("compiled", "reference"))
@pytest.mark.parametrize(
    "shape",
    [(0, 4, 2, 3, 5), (2, 4, 2, 0, 5), (2, 4, 2, 3, 0), (1, 1, 1, 1, 1)],
    ids=("batch", "queries", "keys", "one"),
)
def test_empty(shape, backend):
    q, k = inputs(*shape)
    q.requires_grad_()
    scores = pyvtk.attention_scores(q, k, query_reduce=("mean", "max"), backend=backend)
    assert scores.shape == (2, shape[0], shape[4])
    assert (scores == (1.0 if shape == (1, 1, 1, 1, 1) else 0.0)).all()
    (grad,) = torch.autograd.grad(scores.sum(), q)
    assert grad.shape == q.shape and (grad.abs() < 1e-6).all()


def test_views_and_large_strides():
    """A view of the last row, heads behind tokens in memory, and strides whose products exceed 32 bits."""
    whole = torch.randn(2, 64, 4, 16).transpose(1, 2)
    k = torch.randn(2, 37, 2, 16).transpose(1, 2)
    view = whole[:, :, -1:]
    torch.testing.assert_close(
        pyvtk.attention_scores(view, k), pyvtk.attention_scores(view.contiguous(), k.contiguous()), rtol=0, atol=0
    )
    storage = torch.empty(2**31 // 2 + 4096, dtype=torch.bfloat16)
    far = storage.as_strided((1, 1, 3, 16), (0, 0, 2**29, 1))
    far.copy_(torch.randn(1, 1, 3, 16))
    q = torch.randn(1, 1, 2, 16).bfloat16()
    torch.testing.assert_close(
        pyvtk.attention_scores(q, far), pyvtk.attention_scores(q, far.contiguous()), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "query_reduce": ("sum", "max"), "head_reduce": None},
        {"causal": True, "head_reduce": "max", "reduce_order": "heads_first"},
        {"key_range": (5, 30), "denominator": "range", "head_reduce": "group_mean"},
    ],
)
def test_same_bits_where_the_heads_of_a_token_lie_side_by_side(options, dtype, instruction_set):
    """Few queries take the heads of such keys together, and the masked logits of one head are no other's."""
    for queries, (q_heads, kv_heads), keys in itertools.product((1, 2, 8), ((4, 4), (6, 2), (5, 1)), (1, 37)):
        if "key_range" in options and keys < 37:
            continue
        q, k = inputs(2, q_heads, kv_heads, queries, keys, 24, dtype)
        beside = torch.empty(2, keys, kv_heads + 1, 24, dtype=dtype)[:, :, :kv_heads].transpose(1, 2).copy_(k)
        k_mask = torch.rand(2, keys) > 0.2
        for mask in (None, k_mask):
            expected = pyvtk.attention_scores(q, k, k_mask=mask, return_lse=True, backend="compiled", **options)
            actual = pyvtk.attention_scores(q, beside, k_mask=mask, return_lse=True, backend="compiled", **options)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected))


def test_same_bits_where_all_heads_do_not_fit_at_once():
    """So many logits that heads of keys are taken in two runs."""
    q = torch.randn(1, 4, 8, 8)
    k = torch.randn(1, 70000, 4, 8).transpose(1, 2)
    for options in ({}, {"head_reduce": "max", "reduce_order": "heads_first"}):
        assert torch.equal(
            pyvtk.attention_scores(q, k, backend="compiled", **options),
            pyvtk.attention_scores(q, k.contiguous(), backend="compiled", **options),
        )


def test_same_bits_on_any_number_of_threads():
    q, k = inputs(1, 8, 2, 300, 500, 64)
    q.requires_grad_()
    k.requires_grad_()
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        scores = pyvtk.attention_scores(q, k, causal=True, query_reduce=("mean", "max"))
        results.append((scores, *torch.autograd.grad(scores.square().sum(), (q, k))))
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_max_sends_its_gradient_to_the_lowest_index():
    q, k = torch.zeros(1, 2, 3, 8, requires_grad=True), torch.randn(1, 1, 4, 8)
    for backend in ("compiled", "reference"):
        scores = pyvtk.attention_scores(q, k, query_reduce="max", head_reduce="max", backend=backend)
        (grad,) = torch.autograd.grad(scores[0, 1], q)
        assert grad[0, 0, 0].any() and not grad[0, 1].any() and not grad[0, 0, 1:].any()


def test_given_lse_is_what_was_returned():
    q, k = inputs(queries=30)
    scores, lse = pyvtk.attention_scores(q, k, causal=True, return_lse=True)
    again, same = pyvtk.attention_scores(q, k, causal=True, lse=lse, return_lse=True)
    torch.testing.assert_close(again, scores)
    assert same is lse


def operator_arguments(requires_grad):
    q, k = inputs(queries=3, keys=9)
    bias, weights = torch.randn(2, 9), torch.randn(4)
    for x in (q, k, bias, weights):
        x.requires_grad_(requires_grad)
    options = page.resolve(
        "test", q, k, causal=True, q_positions=None, k_positions=None, q_mask=None, k_mask=torch.ones(2, 9).bool(),
        k_bias=bias, key_range=(1, 8), denominator="visible", lse=None, scale=None, query_reduce=("mean", "max"),
        head_reduce="group_max", head_weights=weights, reduce_order="queries_first", quantity="probability",
        cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
    )  # fmt: skip
    return (q, k, *page.kernel_arguments(options), True)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_opcheck(requires_grad):
    opcheck(torch.ops.pyvtk.attention_scores.default, operator_arguments(requires_grad))


@pytest.mark.compile
@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_compiles_as_one_graph(backend):
    q, k = inputs(queries=3)
    q.requires_grad_()

    def step(q, k):
        return pyvtk.attention_scores(q, k, causal=True, query_reduce=("mean", "max"), backend=backend)

    compiled = torch.compile(step, fullgraph=True)
    torch.testing.assert_close(compiled(q, k), step(q, k))
    (grad,) = torch.autograd.grad(compiled(q, k).square().sum(), q)
    (expected,) = torch.autograd.grad(step(q, k).square().sum(), q)
    torch.testing.assert_close(grad, expected)


@pytest.mark.compile
def test_compiles_at_most_twice_over_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(lambda q, k: pyvtk.attention_scores(q, k), fullgraph=True, backend=counter)
    for keys in range(20, 30):
        q, k = inputs(queries=1, keys=keys)
        compiled(q, k)
    assert counter.frame_count <= 2


Q, K = torch.zeros(2, 4, 3, 16), torch.zeros(2, 2, 5, 16)
CU = torch.tensor([0, 3])
WRONG = [
    ({"q": [1.0]}, TypeError, "q"),
    ({"k": None}, TypeError, "k"),
    ({"q": Q.to_sparse()}, TypeError, "q"),
    ({"q": Q.int(), "k": K.int()}, TypeError, "q"),
    ({"k": K.half()}, TypeError, "k"),
    ({"q": Q[0]}, ValueError, "q"),
    ({"k": K[0]}, ValueError, "k"),
    ({"q": Q[:, :3]}, ValueError, "q"),
    ({"k": K[:, :0]}, ValueError, "q"),
    ({"q": Q[:1]}, ValueError, "k"),
    ({"k": K[..., :8]}, ValueError, "k"),
    ({"q": Q[..., :12], "k": K[..., :12]}, ValueError, "q"),
    ({"q": Q.repeat(1, 1, 1, 17), "k": K.repeat(1, 1, 1, 17)}, ValueError, "q"),
    ({"q": Q.transpose(-1, -2).contiguous().transpose(-1, -2)}, ValueError, "q"),
    ({"causal": 1}, TypeError, "causal"),
    ({"q_positions": torch.arange(3)}, ValueError, "q_positions"),
    ({"causal": True, "q_positions": torch.zeros(2, 4).int()}, ValueError, "q_positions"),
    ({"causal": True, "k_positions": torch.zeros(2, 5)}, TypeError, "k_positions"),
    ({"q_mask": torch.ones(2, 3)}, TypeError, "q_mask"),
    ({"q_mask": torch.ones(3).bool()}, ValueError, "q_mask"),
    ({"k_mask": torch.ones(2, 4).bool()}, ValueError, "k_mask"),
    ({"k_bias": torch.ones(2, 5).int()}, TypeError, "k_bias"),
    ({"k_bias": torch.ones(2, 1, 5)}, ValueError, "k_bias"),
    ({"key_range": 3}, TypeError, "key_range"),
    ({"key_range": (0, 6)}, ValueError, "key_range"),
    ({"key_range": (3, 2)}, ValueError, "key_range"),
    ({"key_range": (-1, 2)}, ValueError, "key_range"),
    ({"key_range": (0.0, 2)}, TypeError, "key_range"),
    ({"denominator": "all"}, ValueError, "denominator"),
    ({"lse": torch.zeros(2, 4)}, ValueError, "lse"),
    ({"lse": torch.zeros(2, 4, 3), "denominator": "range"}, ValueError, "lse"),
    ({"lse": torch.zeros(2, 4, 3), "quantity": "logit"}, ValueError, "lse"),
    ({"scale": "auto"}, TypeError, "scale"),
    ({"query_reduce": "median"}, ValueError, "query_reduce"),
    ({"query_reduce": ()}, ValueError, "query_reduce"),
    ({"query_reduce": ("sum", "sum")}, ValueError, "query_reduce"),
    ({"query_reduce": 3}, TypeError, "query_reduce"),
    ({"head_reduce": "first"}, ValueError, "head_reduce"),
    ({"head_weights": torch.ones(2)}, ValueError, "head_weights"),
    ({"head_weights": [1, 2, 3, 4]}, TypeError, "head_weights"),
    ({"reduce_order": "keys_first"}, ValueError, "reduce_order"),
    ({"quantity": "score"}, ValueError, "quantity"),
    ({"cu_seqlens_q": CU}, ValueError, "cu_seqlens_q"),
    ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q"),
    ({"q": Q[0].transpose(0, 1), "k": K[0].transpose(0, 1), "cu_seqlens_q": CU, "cu_seqlens_k": CU.float()}, TypeError,
     "cu_seqlens_k"),
    ({"q": Q[0].transpose(0, 1), "k": K[0].transpose(0, 1), "cu_seqlens_q": CU, "cu_seqlens_k": CU[:1]}, ValueError,
     "cu_seqlens_k"),
    ({"q": Q[0].transpose(0, 1), "k": K[0].transpose(0, 1), "cu_seqlens_q": CU, "cu_seqlens_k": CU,
      "key_range": (0, 1)}, ValueError, "key_range"),
    ({"return_lse": "yes"}, TypeError, "return_lse"),
    ({"backend": "cuda"}, ValueError, "backend"),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_arguments(number):
    arguments, error, name = WRONG[number]
    with pytest.raises(error, match=rf"attention_scores: .*\b{name}\b"):
        pyvtk.attention_scores(**{"q": Q, "k": K, **arguments})


def test_backend_that_cannot_run_says_why():
    with pytest.raises(RuntimeError, match=r"float64"):
        pyvtk.attention_scores(Q.double(), K.double(), backend="compiled")


@pytest.mark.parametrize("ends", ((0, 4), (1, 3), (0, 3, 2, 3)))
def test_bad_cu_seqlens_never_read_foreign_memory(ends):
    q, k = torch.zeros(3, 2, 8), torch.zeros(3, 2, 8)
    cu = torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        pyvtk.attention_scores(q, k, cu_seqlens_q=cu, cu_seqlens_k=cu, backend="compiled")
