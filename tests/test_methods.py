"""Where published methods differ from each other: each trap against an oracle written here from the method's formula.

The oracles build the attention map, on purpose. H, M, N, D: heads, queries, keys, head dimension.
"""

import math

import pytest
import torch

import pyvtk


def attention_map(q, k, *, causal=False, scale=None):
    """softmax(scale * q k^T) [B, H, M, N] in float64; the last query stands at the last key."""
    _, heads, queries, dim = q.shape
    keys = k.shape[2]
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    z = torch.einsum("bhmd,bhnd->bhmn", q.double(), k.double()) * (dim**-0.5 if scale is None else scale)
    if causal:
        future = torch.arange(keys)[None, :] > torch.arange(keys - queries, keys)[:, None]
        z = z.masked_fill(future, -math.inf)
    return z.softmax(-1)


def best(scores, count):
    """The `count` best of each row by (score, lower index), ascending, as lists."""
    rows = scores.tolist()
    return [sorted(sorted(range(len(r)), key=lambda j: (-r[j], j))[:count]) for r in rows]


def inputs(heads=4, kv_heads=2, queries=1, keys=60, dim=16, batch=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim, generator=g)
    return q, torch.randn(batch, kv_heads, keys, dim, generator=g)


def test_trap_2_positions_are_rebased_or_kept():
    """PyramidDrop counts the survivors anew from 0; FastV and FEATHER keep the positions they had."""
    q, k = inputs()
    system, visual = 5, 40
    tokens = torch.arange(60)
    candidates = ((tokens >= system) & (tokens < system + visual)).expand(2, 60)
    selection = pyvtk.score_and_select(q, k, 10, causal=True, candidates=candidates, others="keep")
    row = attention_map(q, k, causal=True).mean(1)[:, -1]
    for b, kept in enumerate(best(row[:, system : system + visual], 10)):
        expected = [*range(system), *(system + j for j in kept), *range(system + visual, 60)]
        count = int(selection.counts[b])
        positions = pyvtk.compact(selection, tokens[None].expand(2, 60))
        assert positions[b, :count].tolist() == expected
        rebased = torch.arange(selection.capacity)
        assert rebased[:count].tolist() == list(range(len(expected)))
        # Where a survivor stands now, asked from the other side.
        assert selection.inverse()[b, expected].tolist() == rebased[:count].tolist()


@pytest.mark.parametrize(
    "count_of", (lambda n: int(n * 0.33), lambda n: round(n * 0.33), lambda n: math.ceil(n * 0.33))
)
def test_trap_3_rounding_is_the_callers(count_of):
    """Floor (PyramidDrop), round (FastV), ceil (MustDrop): the count arrives as it was rounded."""
    counts = [count_of(n) for n in (50, 55, 59)]
    scores = torch.rand(3, 59)
    tokens = torch.arange(59)
    exists = tokens < torch.tensor([[50], [55], [59]])
    selection = pyvtk.select(scores, torch.tensor(counts), candidates=exists)
    assert selection.counts.tolist() == counts
    for b, (n, count) in enumerate(zip((50, 55, 59), counts)):
        assert selection.indices[b, :count].tolist() == best(scores[b : b + 1, :n], count)[0]


@pytest.mark.parametrize("of", ("original", "current"))
def test_trap_4_share_of_the_original_or_of_the_current_count(of):
    """PyramidDrop's second stage keeps a share of the original count, FEATHER's floor(N' (1 - R)^2) of what is left."""
    first_scores, second_scores = torch.rand(2, 60), torch.rand(2, 60)
    first = pyvtk.select(first_scores, 30)
    count = int(60 * 0.25) if of == "original" else math.floor(30 * (1 - 0.3) ** 2)
    second = pyvtk.select(pyvtk.compact(first, second_scores), count)
    both = first.then(second)
    assert both.counts.tolist() == [count, count] and both.num_tokens == 60
    for b, survivors in enumerate(best(first_scores, 30)):
        among = best(second_scores[b : b + 1, survivors], count)[0]
        assert both.indices[b].tolist() == [survivors[j] for j in among]


def test_trap_5_feather_divides_by_the_visual_keys_only():
    q, k = inputs()
    start, stop = 7, 47
    scores = pyvtk.attention_scores(q, k, causal=True, key_range=(start, stop), denominator="range")
    z = torch.einsum("bhd,bhnd->bhn", q[:, :, -1].double(), k.repeat_interleave(2, 1).double()[:, :, start:stop]) / 4
    expected = z.softmax(-1).mean(1)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2))
    whole = pyvtk.attention_scores(q, k, causal=True, key_range=(start, stop))
    torch.testing.assert_close(
        whole.double(), attention_map(q, k, causal=True)[:, :, -1, start:stop].mean(1), rtol=1e-5, atol=1e-7
    )
    # Not merely a factor: heads give different shares of their mass to the visual keys.
    ratio = scores / whole
    assert (ratio.amax(-1) / ratio.amin(-1) > 1.01).all()


def test_trap_7_what_the_reduction_over_heads_changes():
    """Mean and sum rank alike but meet another threshold; max and groups rank differently."""
    q, k = inputs(batch=1, keys=40)
    by_head = attention_map(q, k)[:, :, -1]
    oracle = {"mean": by_head.mean(1), "sum": by_head.sum(1), "max": by_head.amax(1)}
    scores = {name: pyvtk.attention_scores(q, k, head_reduce=name) for name in oracle}
    kept = {name: pyvtk.select(x, 12).indices[0].tolist() for name, x in scores.items()}
    for name, expected in oracle.items():
        torch.testing.assert_close(scores[name].double(), expected, rtol=1e-5, atol=1e-7)
        assert kept[name] == best(expected, 12)[0]
    assert kept["mean"] == kept["sum"] != kept["max"]
    threshold = 1 / 40
    counts = {name: int(pyvtk.select(scores[name], threshold=threshold).counts) for name in ("mean", "sum")}
    assert counts == {name: int((oracle[name] >= threshold).sum()) for name in counts}
    assert counts["mean"] < counts["sum"]
    groups = pyvtk.attention_scores(q, k, head_reduce="group_sum")
    torch.testing.assert_close(groups.double(), by_head.unflatten(1, (2, 2)).sum(2), rtol=1e-5, atol=1e-7)
    per_group = pyvtk.select(groups, 12)
    expected = [best(by_head[:, 2 * g : 2 * g + 2].sum(1), 12)[0] for g in range(2)]
    assert per_group.indices[0].tolist() == expected and expected[0] != expected[1]


def test_trap_10_order_of_the_survivors():
    """VisionZip leaves raster order, PruMerge and SnapKV the order of scores, MustDrop's merge neither."""
    scores = torch.rand(1, 30)
    features = torch.randn(1, 30, 8)
    kept = best(scores, 10)[0]
    raster = pyvtk.select(scores, 10)
    assert raster.indices[0].tolist() == kept and raster.ascending
    by_score = pyvtk.select(scores, 10, order="score")
    assert by_score.indices[0].tolist() == sorted(kept, key=lambda j: -scores[0, j]) and not by_score.ascending
    assert torch.equal(pyvtk.compact(by_score, features), features[:, by_score.indices[0]])
    # MustDrop: windows of three tokens that are alike become one each and come first, then the rest in raster order.
    merged = [(9, 10, 11), (0, 1, 2)]
    rest = [j for j in range(30) if not any(j in window for window in merged)]
    assignment = torch.empty(1, 30, dtype=torch.int64)
    for group, members in enumerate([*merged, *((j,) for j in rest)]):
        for j in members:
            assignment[0, j] = group
    sizes = torch.randint(1, 5, (1, 30)).float()
    out = pyvtk.merge_tokens(features, assignment, sizes=sizes, num_groups=len(merged) + len(rest))
    for group, members in enumerate([*merged, *((j,) for j in rest)]):
        total = sum(float(sizes[0, j]) for j in members)
        expected = sum(features[0, j].double() * float(sizes[0, j]) for j in members) / total
        torch.testing.assert_close(out[0, group].double(), expected, rtol=1e-5, atol=1e-6)


def test_trap_11_padding_keys_that_are_not_masked_take_part():
    """BiFormer pads with zeros after the projection: logit 0, a share of the mass. A mask is the caller's choice."""
    q, k = inputs(queries=6, keys=20)
    padded = torch.cat([k, torch.zeros(2, 2, 5, 16)], dim=2)
    as_published = pyvtk.attention_scores(q, padded)
    torch.testing.assert_close(as_published.double(), attention_map(q, padded).mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert (as_published[:, 20:] > 0).all()
    mask = (torch.arange(25) < 20).expand(2, 25)
    masked = pyvtk.attention_scores(q, padded, k_mask=mask)
    torch.testing.assert_close(masked[:, :20].double(), attention_map(q, k).mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert not masked[:, 20:].any()


def test_trap_12_divisors_of_probe_rows():
    """ZipCache divides the sum over its probes by S - j, as if all queries were in it; ZipVL by the viewers of j."""
    length = 40
    probes = torch.tensor([3, 11, 20, 33, 38, 39])
    q, k = inputs(queries=length, keys=length)
    at = probes.expand(2, 6)
    options = {"causal": True, "q_positions": at, "head_reduce": "group_sum"}
    rows = q[:, :, probes].contiguous()
    probed = attention_map(q, k, causal=True)[:, :, probes].unflatten(1, (2, 2)).sum(2)  # [B, groups, probes, N]
    total = pyvtk.attention_scores(rows, k, query_reduce="sum", **options)
    zip_cache = total / (length - torch.arange(length))
    torch.testing.assert_close(
        zip_cache.double(), probed.sum(2) / (length - torch.arange(length)), rtol=1e-5, atol=1e-7
    )
    seen_by = (probes[:, None] >= torch.arange(length)).sum(0).clamp(min=1)
    zip_vl = pyvtk.attention_scores(rows, k, query_reduce="visible_mean", **options)
    torch.testing.assert_close(zip_vl.double(), probed.sum(2) / seen_by, rtol=1e-5, atol=1e-7)
    assert best(zip_cache[:, 0], 10) != best(zip_vl[:, 0], 10)


@pytest.mark.parametrize("seed", range(5))
def test_trap_13_half_precision_maps_collide(seed):
    """Published code rounds each head's probabilities to fp16 before the mean; of 576 means near 1e-3 many collide.

    So sets may differ from ours, but only among tokens whose exact scores lie within that rounding of the boundary.
    """
    q, k = inputs(heads=16, kv_heads=16, keys=576, dim=64, batch=1, seed=seed)
    q, k = (q * 0.2).half(), k.half()
    published = attention_map(q, k)[:, :, -1].float().half().mean(1)
    selection, scores = pyvtk.score_and_select(q, k, 144, return_scores=True)
    ours, theirs = set(selection.indices[0].tolist()), set(best(published.float(), 144)[0])
    exact = attention_map(q, k)[0, :, -1].mean(0)
    assert len(published.unique()) < len(scores.unique())
    # Rounding to fp16 moves a number of [2^-10, 2^-9) by up to 2^-21 in the map and as much again in the mean.
    rounding = 2 * 2.0**-11 * float(exact.max())
    boundary = float(exact.sort(descending=True).values[143])
    for token in ours ^ theirs:
        assert abs(float(exact[token]) - boundary) <= rounding
    assert ours == set(best(scores, 144)[0])
