"""The CUDA kernels of score_and_select, run by the emulation.

Scores are compared with the float64 reference; indices, counts and overflow with what the reference of select says of
the kernel's own scores, bit for bit.
"""

import emulated
import pytest
import torch
from emulated_score_and_select import HEAD_REDUCES, QUERY_REDUCES, score_and_select
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import Exponents, assert_within_budget, largest

from pyvtk.ops import score as page
from pyvtk.reference import score as scoring
from pyvtk.reference import score_and_select as composing
from pyvtk.reference import select as selecting

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_score_and_select.cpp does not", allow_module_level=True)

INFINITY, NAN = float("inf"), float("nan")
SCORING = ("q_positions", "k_positions", "q_mask", "k_mask", "k_bias", "head_weights", "lse", "cu_seqlens_q",
           "cu_seqlens_k", "causal", "key_start", "key_stop", "range_denominator", "scale", "query_reduce",
           "head_reduce", "heads_first", "logit")  # fmt: skip
SELECTING = ("num_keep", "num_keep_per_row", "threshold", "top_p", "keep", "drop", "candidates", "keep_others",
             "segments", "num_segments", "cu_seqlens", "capacity", "align_right", "by_score")  # fmt: skip


def plain_options(q, k, num_keep, **others) -> dict:
    """All arguments after q and k, as in the usual call but for ``others``."""
    packed = others.get("cu_seqlens_k") is not None
    keys = k.shape[0 if packed else 2]
    options = dict.fromkeys(SCORING + SELECTING)
    options.update(causal=False, key_start=0, key_stop=keys, range_denominator=False, scale=q.shape[-1] ** -0.5,
                   query_reduce="mean", head_reduce="mean", heads_first=False, logit=False, num_keep=num_keep,
                   keep_others=False, num_segments=1, capacity=max(num_keep, 0), align_right=False,
                   by_score=False)  # fmt: skip
    options.update(others)
    options["cu_seqlens"] = options["cu_seqlens_k"]
    return options


def reference_scores(q, k, options: dict, of: int = 0) -> torch.Tensor:
    arguments = {name: options[name] for name in SCORING}
    arguments["query_reduce"] = (arguments["query_reduce"],)
    return scoring.attention_scores(q, k, **arguments)[of]


def assert_scores(actual: torch.Tensor, q, k, options: dict) -> None:
    """Within the budget of plain torch, and of what rounds exponents."""
    exact = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in options.items()}
    oracle = reference_scores(q.double(), k.double(), exact)
    with Exponents():
        inexact = reference_scores(q.double(), k.double(), exact)
    # Probabilities are not negative, but weights may be. (Of logits this is not the sum of magnitudes, but not more.)
    weights = exact["head_weights"]
    magnitudes = reference_scores(
        q.double(), k.double(), exact | {"head_weights": None if weights is None else weights.abs()}
    )
    added = largest(magnitudes) + Exponents.added(inexact, oracle)
    assert_within_budget(actual, oracle, reference_scores(q, k, options), added=added)


def assert_right(q, k, options: dict):
    """Runs the kernels and checks all that they return; how they did it."""
    *outputs, scores, done = score_and_select(q, k, *(options[name] for name in SCORING + SELECTING))
    assert_scores(scores, q, k, options)
    packed, per_head = options["cu_seqlens_k"] is not None, options["head_reduce"] not in ("mean", "sum", "max")
    keys = k.shape[0 if packed else 2]
    start, stop = (0, keys) if packed else (options["key_start"], options["key_stop"])
    chosen = scores[0, 0, 0] if packed else scores[0] if per_head else scores[0, :, 0]
    whole = composing.whole_axis(chosen, keys, start)
    competing = composing.competing(options["candidates"], options["k_mask"], keys, start, stop, whole)
    gone = composing.dropped(options["keep"], options["drop"], options["k_mask"])
    arguments = {name: options[name] for name in SELECTING} | {"candidates": competing, "drop": gone}
    expected = selecting.select(whole, *arguments.values())
    for name, ours, right in zip(("indices", "counts", "overflow"), outputs, expected):
        assert ours.dtype == right.dtype and ours.shape == right.shape
        assert torch.equal(ours, right), f"{name}: {ours} != {right}"
    return done


def embedded(x: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """The same numbers in a larger storage of NaN: other strides, which may be aligned to elements only."""
    if kind == "contiguous" or x.dim() == 0:
        return x
    odd, offset = (8, 0) if kind == "aligned" else (3, 1)
    shape = list(x.shape)
    order = list(range(x.dim() - 1))
    if kind == "transposed":
        order[-2:] = order[-1], order[-2]
    strides, stride = [0] * x.dim(), shape[-1] + odd
    strides[-1] = 1
    for dim in reversed(order):
        strides[dim] = stride
        stride = stride * shape[dim] + (odd if dim == order[-1] else 0)
    elements = offset + 1 + sum((size - 1) * step for size, step in zip(shape, strides)) if x.numel() else offset + 1
    out = torch.full((elements,), NAN, dtype=x.dtype).as_strided(shape, strides, offset)
    out.copy_(x)
    return out


@pytest.mark.parametrize("given", ("both", "queries", "keys"))
def test_positions_at_the_ends(given):
    """Of int32 as they are, of int64 as the page hands them over: no position stands for a masked key."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 5, 16, generator=generator), torch.randn(2, 1, 70, 16, generator=generator)
    ends = torch.tensor([-(2**31), 1 - 2**31, -1, 0, 3, 66, 69, 2**31 - 2, 2**31 - 1])
    wide = torch.cat([ends, torch.tensor([2**31, 2**32 + 1, 2**63 - 2, 2**63 - 1, -(2**63)])])
    hidden = {"causal": True, "k_mask": torch.rand(2, 70, generator=generator) < 0.6, "query_reduce": "sum"}
    for numbers in (ends.int(), wide):
        at = [numbers[torch.randint(len(numbers), (2, n), generator=generator)] for n in (5, 70)]
        at[0][:, 0] = numbers.max()
        q_positions, k_positions = at[0] if given != "keys" else None, at[1] if given != "queries" else None
        options = plain_options(q, k, 9, q_positions=q_positions, k_positions=k_positions, **hidden)
        narrow = dict(zip(("q_positions", "k_positions"), page._kernel_positions(q_positions, k_positions)))
        assert torch.equal(reference_scores(q, k, options), reference_scores(q, k, options | narrow))
        assert_right(q, k, options | narrow)
        if numbers is not wide:
            assert_right(q, k, options)


@st.composite
def problems(draw):
    """q, k and all options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    def coin(share: int) -> bool:
        """True in one of `share` cases."""
        return draw(st.integers(1, share)) == share

    def mask(shape, share):
        return torch.rand(shape, generator=generator) < share

    dtype = draw(st.sampled_from(emulated.DTYPES))
    dim = draw(st.sampled_from([8, 16, 40, 64, 72, 80, 128, 136, 256]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (3, 1), (1, 2), (2, 4), (2, 7), (1, 3)]))
    q_heads = kv_heads * group
    queries = draw(st.sampled_from([0, 1, 1, 1, 1, 2, 3, 4, 5, 9, 17]))
    if coin(12):
        queries, kv_heads, group, q_heads = draw(st.sampled_from([33, 64])), 1, 2, 2
    keys = draw(st.sampled_from([0, 1, 5, 31, 33, 100, 129, 257, 300]))
    if queries < 3 and coin(6):
        keys = draw(st.sampled_from([600, 1100]))
    packed = coin(4)
    batch = draw(st.sampled_from([0, 1, 1, 2, 3]))
    options = {}
    if packed:
        batch = draw(st.integers(1, 4))
        for name, total in (("cu_seqlens_q", queries), ("cu_seqlens_k", keys)):
            cuts = torch.randint(total + 1, (batch - 1,), generator=generator).sort().values
            options[name] = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])]).int()
        q, k = random(queries, q_heads, dim), random(keys, kv_heads, dim)
        of_query, of_key = (queries,), (keys,)
    else:
        q, k = random(batch, q_heads, queries, dim), random(batch, kv_heads, keys, dim)
        of_query, of_key = (batch, queries), (batch, keys)
        if coin(3):
            options["key_start"] = keys // draw(st.sampled_from([3, 7, max(keys, 1)]))
            options["key_stop"] = keys - keys // draw(st.sampled_from([2, 5, max(keys, 1) + 1]))
            options["key_stop"] = max(options["key_stop"], options["key_start"])
    kind = draw(st.sampled_from(["normal", "normal", "normal", "equal", "duplicates", "nan", "peaked"]))
    if kind == "equal":
        q = torch.zeros_like(q)
    elif kind == "duplicates" and keys:
        k = (
            k[torch.randint(keys, (keys,), generator=generator) % 3]
            if packed
            else k[:, :, torch.arange(keys) % 3 % keys]
        )
    elif kind == "peaked":
        q = q * 6

    options["causal"] = causal = draw(st.booleans())
    if causal and coin(2):
        options["q_positions"] = torch.randint(-2, keys + 3, of_query, generator=generator).int()
    if causal and coin(2):
        options["k_positions"] = torch.randint(-2, keys + 3, of_key, generator=generator).int()
    if coin(3):
        options["q_mask"] = mask(of_query, 0.7)
        q = q.masked_fill(~(options["q_mask"][:, None, None] if packed else options["q_mask"][:, None, :, None]), NAN)
    if coin(3):
        options["k_mask"] = k_mask = mask(of_key, draw(st.sampled_from([0.0, 0.6, 0.9])))
        k = k.masked_fill(~(k_mask[:, None, None] if packed else k_mask[:, None, :, None]), NAN)
    if kind == "nan" and keys:
        some = mask(of_key, 2 / keys)
        k = k.masked_fill(some[:, None, None] if packed else some[:, None, :, None], NAN)
    if coin(3):
        options["k_bias"] = random(*of_key)
        if coin(3):
            options["k_bias"] = options["k_bias"].masked_fill(mask(of_key, 0.3), -INFINITY)
        if coin(8):
            options["k_bias"] = options["k_bias"].masked_fill(mask(of_key, 0.02), INFINITY)
        if "k_mask" in options:
            options["k_bias"] = options["k_bias"].masked_fill(~options["k_mask"], NAN)
    if coin(4):
        per_sample = not packed and draw(st.booleans())
        options["head_weights"] = random(batch, q_heads) if per_sample else random(q_heads)
    options["logit"] = coin(4)
    if coin(5) and not options["logit"]:
        options["lse"] = random(q_heads, queries) if packed else random(batch, q_heads, queries)
        options["lse"] = options["lse"].masked_fill(mask(options["lse"].shape, 0.2), -INFINITY) + 3
    elif coin(3):
        options["range_denominator"] = True
    options["query_reduce"] = draw(st.sampled_from(QUERY_REDUCES))
    names = ("mean", "sum", "max") if packed else HEAD_REDUCES
    options["head_reduce"] = head_reduce = draw(st.sampled_from(names))
    options["heads_first"] = draw(st.booleans())

    # What is selected, as in test_emulated_select.py.
    out_heads = q_heads if head_reduce == "none" else kv_heads if head_reduce.startswith("group_") else 1
    per_head = head_reduce not in ("mean", "sum", "max")
    shape = (keys,) if packed else (batch, out_heads, keys) if per_head else (batch, keys)
    rows = batch * out_heads

    def mask_shape():
        return (batch, keys) if per_head and draw(st.booleans()) else shape

    plain = draw(st.booleans())
    if not plain:
        for name, share in (("keep", 0.1), ("drop", 0.2), ("candidates", 0.7)):
            if draw(st.booleans()):
                options[name] = mask(mask_shape(), share)
        options["keep_others"] = draw(st.booleans())
        options["by_score"] = draw(st.booleans())
        if coin(3):
            options["num_segments"] = draw(st.integers(1, 4))
            options["segments"] = torch.randint(
                -1, options["num_segments"] + 1, mask_shape(), generator=generator
            ).int()
    groups = draw(st.sampled_from([1, options.get("num_segments", 1)]))
    if coin(3):
        options["num_keep_per_row"] = torch.randint(-2, keys + 3, (rows, groups), generator=generator)
    if coin(4):
        options["threshold"] = random(rows, groups).exp() / max(keys, 1)
    if not plain and coin(3):
        options["top_p"] = torch.rand(rows, groups, generator=generator, dtype=torch.float64) * 1.2 - 0.1
    num_keep = draw(st.sampled_from([-1, 0, 1, keys // 3, keys, keys + 5]))
    options["capacity"] = draw(st.sampled_from([0, 1, keys // 4, keys, keys + 7]))
    options["align_right"] = draw(st.booleans())
    q, k = (x.to(dtype) for x in (q, k))
    k = embedded(k, draw(st.sampled_from(["contiguous", "aligned", "transposed", "odd"])), generator)
    q = embedded(q, draw(st.sampled_from(["contiguous", "odd"])), generator)
    return q, k, plain_options(q, k, num_keep, **options)


@settings(max_examples=90 if emulated.SANITIZER else 350, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(), st.sampled_from([0, 0, 1, 2, 3]), st.sampled_from([1, 2, 5]))
def test_any_problem(problem, seed, blocks_alive):
    emulated.configure(seed, blocks_alive)
    assert_right(*problem)


def inputs(batch=1, q_heads=4, kv_heads=2, queries=1, keys=300, dim=64, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, q_heads, queries, dim, generator=generator)
    k = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return q.to(dtype), k.to(dtype)


# name -> shape, options, and what the launcher has to answer
WAYS = {
    "one row": ({"q_heads": 2}, {}, {"plain": True, "selected_at_once": True}),
    "a group": (
        {"q_heads": 8},
        {"logit": True},
        {"plain": False, "rows_of_block": 4, "kept": 1, "separate_lse": False},
    ),
    "a large group": ({"q_heads": 14, "queries": 2}, {}, {"plain": False, "rows_of_block": 8}),
    "one row, not all keys": (
        {"q_heads": 2},
        {"key_start": 9, "range_denominator": True},
        {"plain": False, "rows_of_block": 1, "kept": 1, "columns": False, "selected_at_once": False},
    ),
    "plain, a large group": ({"q_heads": 14, "keys": 1300}, {"head_reduce": "max"}, {"plain": True}),
    "plain, too large a group": ({"q_heads": 34, "keys": 100}, {}, {"plain": False, "rows_of_block": 8}),
    "plain, many keys": ({"batch": 3, "keys": 1025, "dtype": torch.bfloat16}, {}, {"plain": True}),
    "no room for logits": ({"queries": 40, "dim": 8}, {}, {"kept": 0, "columns": True, "separate_lse": True}),
    "no room, no lse": ({"queries": 40, "dim": 8}, {"logit": True}, {"columns": True, "separate_lse": False}),
    "no room, pairs": (
        {"queries": 40, "dim": 8, "keys": 200},
        {"heads_first": True, "head_reduce": "max", "query_reduce": "sum"},
        {"columns": True},
    ),
    "many rows and runs": (
        {"q_heads": 16, "kv_heads": 1, "queries": 4, "keys": 1056, "dim": 256},
        {},
        {"separate_lse": True, "columns": False},
    ),
    "a long row": ({"q_heads": 2, "keys": 4200, "dim": 8}, {}, {"selected_at_once": False}),
    "a long row with masks": (
        {"q_heads": 2, "keys": 4200, "dim": 8},
        {"key_start": 100, "key_stop": 4100},
        {"selected_at_once": False},
    ),
    "a row for three launches": (
        {"q_heads": 2, "keys": 16400, "dim": 8},
        {"key_start": 100, "key_stop": 16390},
        {"selected_at_once": False},
    ),
    "few channels": ({"dim": 8}, {}, {"lanes_of_key": 2}),
    "many channels": ({"dim": 256}, {}, {"lanes_of_key": 16}),
    "many channels of 16 bits": ({"dim": 256, "dtype": torch.bfloat16}, {}, {"lanes_of_key": 8}),
}


@pytest.mark.parametrize("name", WAYS)
def test_ways(name):
    shape, options, expected = WAYS[name]
    emulated.configure(1, 3)
    q, k = inputs(**shape)
    done = assert_right(q, k, plain_options(q, k, k.shape[2] // 3, **options))
    assert {fact: getattr(done, fact) for fact in expected} == expected


def test_some_packed_samples_keep_their_logits():
    q, k = inputs(queries=20, dim=16, keys=200)
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1).contiguous()
    cu_q, cu_k = torch.tensor([0, 2, 19, 20]).int(), torch.tensor([0, 70, 150, 200]).int()
    for query_reduce, heads_first in (("mean", False), ("max", False), ("max", True)):
        emulated.configure(2, 2)
        options = plain_options(
            q, k, 30, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, query_reduce=query_reduce, heads_first=heads_first
        )
        done = assert_right(q, k, options)
        assert done.columns and done.kept == 8


def test_same_bits_whatever_the_order_of_blocks():
    q, k = inputs(batch=2, q_heads=8, queries=3, keys=700, dim=40)
    for options in ({}, {"head_reduce": "group_max"}, {"head_reduce": "none"}):
        options = plain_options(q, k, 100, **options)
        arguments = [options[name] for name in SCORING + SELECTING]
        emulated.configure()
        expected = score_and_select(q, k, *arguments)[:4]
        for seed in range(1, 8):
            emulated.configure(seed, 1 + seed % 5)
            for ours, right in zip(score_and_select(q, k, *arguments)[:4], expected):
                assert torch.equal(ours, right)


@pytest.mark.parametrize("dtype", emulated.DTYPES)
@pytest.mark.parametrize("head_reduce", HEAD_REDUCES)
def test_lowest_keys_win_ties(head_reduce, dtype):
    emulated.configure()
    q, k = inputs(dtype=dtype)
    q.zero_()
    options = plain_options(q, k, 7, head_reduce=head_reduce)
    indices = score_and_select(q, k, *(options[name] for name in SCORING + SELECTING))[0]
    assert torch.equal(indices, torch.arange(7).expand_as(indices))


def test_offsets_out_of_bounds_touch_nothing():
    """Values of cu_seqlens are on the device: wrong ones give wrong results, but stay inside of the tensors."""
    q, k = inputs(q_heads=2, queries=6, keys=150, dim=16)
    q, k = q[0].transpose(0, 1).contiguous(), k[0].transpose(0, 1).contiguous()
    for cu_q, cu_k in (([0, 9, 400], [0, 900, 100]), ([-5, 3, 6], [-90, 200, 7]), ([6, 2, 0], [150, 80, 0])):
        emulated.configure(1, 2)
        cu = {"cu_seqlens_q": torch.tensor(cu_q).int(), "cu_seqlens_k": torch.tensor(cu_k).int()}
        options = plain_options(q, k, 20, k_mask=torch.ones(150, dtype=torch.bool), causal=True, **cu)
        score_and_select(q, k, *(options[name] for name in SCORING + SELECTING))


def test_too_many_queries_are_an_error():
    emulated.configure()
    q, k = inputs(queries=65, dim=8, keys=10)
    options = plain_options(q, k, 3)
    with pytest.raises(AssertionError, match="invalid argument"):
        score_and_select(q, k, *(options[name] for name in SCORING + SELECTING))
