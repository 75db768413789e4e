"""What each rank runs for tests/test_tensor_parallel.py: a module that new processes can import."""

import random

import pytest
import torch
import torch.distributed as dist

import pyvtk

RANKS = 4
CASES = 200  # half of them of pairs of ranks


def drawn(seed: int, ranks: int):
    """q and k of all heads, and options; those of heads as (name, axis) apart."""
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, kv_heads, group = draw.choice((1, 2)), ranks * draw.choice((1, 2)), draw.choice((1, 2, 3, 7))
    queries, keys, dim = draw.choice((1, 1, 2, 5, 20)), draw.randint(1, 90), draw.choice((8, 24))

    def values(*shape):
        if seed % 2:  # of which many scores are equal
            return torch.randint(-1, 2, shape, generator=g).float()
        return torch.randn(*shape, generator=g)

    def likely(share, *shape):
        return torch.rand(*shape, generator=g) < share

    q = values(batch, kv_heads * group, queries, dim)
    k = values(batch, keys, kv_heads, dim).transpose(1, 2)
    k = k if draw.random() < 0.5 else k.contiguous()
    dtype = draw.choice((torch.float32, torch.bfloat16))
    head_reduce, query_reduce = draw.choice(("mean", "sum", "max")), draw.choice(("mean", "sum", "max", "visible_mean"))
    options = {
        "num_keep": draw.randint(0, keys), "head_reduce": head_reduce, "query_reduce": query_reduce,
        "quantity": draw.choice(("probability", "logit")), "causal": draw.random() < 0.5,
        "others": draw.choice(("drop", "keep")), "order": draw.choice(("index", "score")),
    }  # fmt: skip
    if "max" not in (head_reduce, query_reduce):
        options["reduce_order"] = draw.choice(("queries_first", "heads_first"))
    for name, shape in (("k_mask", (batch, keys)), ("q_mask", (batch, queries)), ("candidates", (batch, keys)),
                        ("keep", (batch, keys)), ("drop", (batch, keys))):  # fmt: skip
        if draw.random() < 0.3:
            options[name] = likely(0.7 if name in ("k_mask", "q_mask", "candidates") else 0.1, *shape)
    if draw.random() < 0.2:
        options["key_range"] = (keys // 4, keys - keys // 5)
    weights = torch.randn(*draw.choice(((), (batch,))), q.shape[1], generator=g) if draw.random() < 0.3 else None
    if draw.random() < 0.05:
        k = k.clone()
        k[0, -1, keys // 2, 0] = float("nan")
    return q.to(dtype), k.to(dtype), options, weights, draw.random() < 0.5


def own(x, axis: int, rank: int, ranks: int):
    size = x.shape[axis] // ranks
    return x.narrow(axis, rank * size, size)


def check_case(seed: int, group, rank: int, ranks: int) -> None:
    q, k, options, weights, all_weights = drawn(seed, ranks)
    mine = weights if weights is None or all_weights else own(weights, -1, rank, ranks)
    found, scores = pyvtk.score_and_select(
        own(q, 1, rank, ranks), own(k, 1, rank, ranks), head_weights=mine, group=group, return_scores=True, **options
    )
    expected, of_all = pyvtk.score_and_select(q, k, head_weights=weights, return_scores=True, **options)
    assert torch.equal(scores.view(torch.int32), of_all.view(torch.int32)) or scores.isnan().any(), f"case {seed}"
    for name in ("indices", "counts", "overflow"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), f"case {seed}: {name}"
    everyone = [torch.empty_like(found.indices) for _ in range(ranks)]
    dist.all_gather(everyone, found.indices.contiguous(), group=group)
    assert all(torch.equal(indices, found.indices) for indices in everyone), f"case {seed}: ranks differ"


def check_rest(group, rank: int, ranks: int) -> None:
    """Packed samples, the reference, heads of their own, errors."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(3, 2 * ranks, 16, generator=generator), torch.randn(40, ranks, 16, generator=generator)
    starts = {"cu_seqlens_q": torch.tensor([0, 1, 3]), "cu_seqlens_k": torch.tensor([0, 15, 40]), "capacity": 6}
    found = pyvtk.score_and_select(own(q, 1, rank, ranks), own(k, 1, rank, ranks), 6, group=group, **starts)
    assert torch.equal(found.indices, pyvtk.score_and_select(q, k, 6, **starts).indices)

    q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
    mine = own(q, 1, rank, ranks), own(k, 1, rank, ranks)
    found = pyvtk.score_and_select(*mine, 6, group=group, backend="reference")
    everyone = [torch.empty_like(found.indices) for _ in range(ranks)]
    dist.all_gather(everyone, found.indices.contiguous(), group=group)
    assert all(torch.equal(indices, found.indices) for indices in everyone)
    for head_reduce in (None, "group_sum"):
        found = pyvtk.score_and_select(*mine, 6, head_reduce=head_reduce, group=group)
        every = pyvtk.score_and_select(q, k, 6, head_reduce=head_reduce)
        assert torch.equal(found.indices, own(every.indices, 1, rank, ranks))

    for change, message in (
        ({"reduce_order": "heads_first", "head_reduce": "max"}, "reduce_order must be 'queries_first'"),
        ({"head_weights": torch.ones(3)}, "head_weights must be of this rank's 2 heads or of all"),
        ({"q": mine[0].repeat(1, 1, 40, 1)}, "q must have fewer than 192 rows"),
        ({"q": mine[0].clone().requires_grad_(), "return_scores": True}, "group must be None where scores"),
    ):
        with pytest.raises(ValueError, match=f"score_and_select: {message}"):
            pyvtk.score_and_select(**({"q": mine[0], "k": mine[1], "num_keep": 6, "group": group} | change))


def run(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        for group, own_rank, ranks in ((dist.group.WORLD, rank, RANKS), (pairs[rank // 2], rank % 2, 2)):
            check_rest(group, own_rank, ranks)
            for seed in range(CASES // 2):
                check_case(1000 * ranks + seed, group, own_rank, ranks)
        with pytest.raises((TypeError, ValueError), match="score_and_select: group must"):
            pyvtk.score_and_select(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 3, 8), 1, group=pairs[1 - rank // 2])
        dist.barrier()
    finally:
        dist.destroy_process_group()
