"""Where published methods differ: what the operators make of each formula, against oracles written here.

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


def test_positions_are_rebased_or_kept():
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
def test_rounding_is_the_callers(count_of):
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
def test_share_of_the_original_or_of_the_current_count(of):
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


def test_feather_divides_by_the_visual_keys_only():
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


def test_what_the_reduction_over_heads_changes():
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


def test_order_of_the_survivors():
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


def test_padding_keys_that_are_not_masked_take_part():
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


def test_divisors_of_probe_rows():
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
def test_half_precision_maps_collide(seed):
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


# --- attention by groups of keys: what published code edits in the map after the softmax ---


def layout_of(system=5, side=5, text=9, batch=2):
    """System tokens, one image, text, and the causal mask whose visual block is a window of 3 x 3 [M, N]."""
    tokens = system + side * side + text
    images = [pyvtk.ImageSpan(b, system, (1, side, side)) for b in range(batch)]
    mask = torch.ones(tokens, tokens).tril().bool()
    for i in range(side * side):
        for j in range(side * side):
            near = abs(i // side - j // side) <= 1 and abs(i % side - j % side) <= 1
            mask[system + i, system + j] = near
    visual = torch.zeros(tokens, dtype=torch.bool)
    visual[system : system + side * side] = True
    return pyvtk.TokenLayout.from_images([tokens] * batch, images), mask, visual


def masked_map(q, k, mask):
    """Post-softmax weights [B, H, M, N] in float64."""
    z = torch.einsum("bhmd,bhnd->bhmn", q.double(), k.repeat_interleave(q.shape[1] // k.shape[1], 1).double())
    return (z * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)


def whole_inputs(layout, heads=4, kv_heads=2, dim=16):
    q, k = inputs(heads, kv_heads, layout.num_tokens, layout.num_tokens, dim, layout.num_samples)
    return q, k, torch.randn(k.shape, generator=torch.Generator().manual_seed(5))


def by_groups(q, k, v, layout, groups, radius=1):
    """(out, lse) of every group of keys."""
    plans = [pyvtk.neighbor_plan(layout, radius, keys=group) for group in groups]
    return zip(*(pyvtk.neighbor_attention(q, k, v, plan, return_lse=True) for plan in plans))


def values_of(v, heads):
    return v.double().repeat_interleave(heads // v.shape[1], 1)


@pytest.mark.parametrize("rows", ("attend", "zero"))
def test_pruned_heads_are_not_renormalised(rows):
    """YOPO multiplies the weights of visual columns by 0 after the softmax; LLaVA's code zeroes visual rows as well."""
    layout, mask, visual = layout_of()
    q, k, v = whole_inputs(layout)
    on = torch.tensor([True, False, True, False])
    weights = masked_map(q, k, mask)
    weights[:, ~on] = weights[:, ~on].masked_fill(visual, 0)
    expected = weights @ values_of(v, 4)
    if rows == "zero":
        expected[:, ~on] = expected[:, ~on].masked_fill(visual[:, None], 0)
    plan = pyvtk.neighbor_plan(layout, 1)
    out = pyvtk.neighbor_attention(q, k, v, plan, visual_heads=on, visual_rows=rows)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    # The same from two groups: out = exp(lse_text - lse) out_text for heads that are off.
    outs, lses = by_groups(q, k, v, layout, ("text", "visual"))
    _, lse = pyvtk.merge_attention(outs, lses)
    seen = on[:, None].float()
    coefficients = [(lses[0] - lse).exp(), (lses[1] - lse).exp() * seen]
    merged, _ = pyvtk.merge_attention(outs, lses, coefficients)
    if rows == "zero":
        merged = torch.where(visual[:, None] & ~on[:, None, None], 0, merged)
    torch.testing.assert_close(merged.double(), expected, rtol=1e-5, atol=1e-6)
    # A mask before the softmax is something else.
    dropped = pyvtk.neighbor_attention(q, k, v, plan, visual_heads=on, visual_rows=rows, visual_mass="drop")
    assert (dropped[:, ~on, -1] - out[:, ~on, -1]).abs().max() > 0.01


def test_layer_cut():
    """From YOPO's cut layer on visual columns weigh 0 in every head (simulation); with visual tokens gone (what its
    text describes) text attends to text alone."""
    layout, mask, visual = layout_of()
    q, k, v = whole_inputs(layout)
    off = torch.zeros(4, dtype=torch.bool)
    weights = masked_map(q, k, mask).masked_fill(visual, 0)
    out = pyvtk.neighbor_attention(q, k, v, pyvtk.neighbor_plan(layout, 1), visual_heads=off)
    torch.testing.assert_close(out.double(), weights @ values_of(v, 4), rtol=1e-5, atol=1e-6)
    kept = pyvtk.Selection.from_mask((~visual).expand(2, -1), capacity="exact")
    taken = pyvtk.compact(kept, q, k, v, dim=2)
    gone = pyvtk.neighbor_attention(*taken, pyvtk.neighbor_plan(layout.take(kept), 1))
    expected = masked_map(*taken[:2], torch.ones(14, 14).tril().bool()) @ values_of(taken[2], 4)
    torch.testing.assert_close(gone.double(), expected, rtol=1e-5, atol=1e-6)
    dropped = pyvtk.neighbor_attention(
        q, k, v, pyvtk.neighbor_plan(layout, 1), visual_heads=off, visual_mass="drop", visual_rows="zero"
    )
    torch.testing.assert_close(pyvtk.compact(kept, dropped, dim=2), gone)


def test_renormalised_removal():
    """Sum over the other groups of m_g o_g / (1 - m_removed), and 0 where the removed group had all the mass."""
    layout, mask, visual = layout_of(system=0)
    q, k, v = whole_inputs(layout)
    outs, lses = by_groups(q, k, v, layout, ("text", "visual"))
    _, lse = pyvtk.merge_attention(outs, lses)
    coefficients = [(lses[0] - lse).exp(), torch.zeros_like(lse)]
    out, _ = pyvtk.merge_attention(outs, lses, coefficients, renormalize=True)
    weights = masked_map(q, k, mask).masked_fill(visual, 0)
    mass = weights.sum(-1, keepdim=True)
    weights = torch.where(mass > 0, weights / mass, 0)
    torch.testing.assert_close(out.double(), weights @ values_of(v, 4), rtol=1e-5, atol=1e-6)
    assert not out[:, :, visual].any()  # nothing precedes the image: its tokens see visual keys alone


def test_visual_attention_redistribution():
    """VAR: where an image has much mass and little of it in sinks, sinks (of text, too) pass a share 1 - p on to the
    other visual tokens, in proportion to their weights."""
    layout, mask, visual = layout_of(system=4, text=8)
    q, k, v = whole_inputs(layout)
    tokens = torch.arange(layout.num_tokens)
    sink = (tokens == 0) | (tokens == 7) | (tokens == 16)  # one of text, two of the image
    p, rho, much = 0.6, 0.5, 0.2
    weights = masked_map(q, k, mask)
    image, image_sinks = weights[..., visual].sum(-1), weights[..., visual & sink].sum(-1)
    chosen = (image >= much) & (image_sinks / image.clamp(min=1e-30) <= rho)
    expected_map = weights.clone()
    freed = (1 - p) * weights[..., sink].sum(-1)
    other = visual & ~sink
    share = weights[..., other] / weights[..., other].sum(-1, keepdim=True).clamp(min=1e-30)
    edited = weights.clone()
    edited[..., sink] *= p
    edited[..., other] += freed[..., None] * share
    expected_map = torch.where(chosen[..., None], edited, weights)

    groups = [~visual & ~sink, ~visual & sink, visual & sink, visual & ~sink]
    outs, lses = by_groups(q, k, v, layout, [g.expand(2, -1) for g in groups])
    whole, lse = pyvtk.merge_attention(outs, lses)
    text, text_sink, image_sink, image_other = ((x - lse).exp() for x in lses)
    gate = (image_sink + image_other >= much) & (image_sink / (image_sink + image_other).clamp(min=1e-30) <= rho)
    assert torch.equal(gate, chosen) and 0 < int(gate.sum()) < gate.numel()
    moved = [text, p * text_sink, p * image_sink, image_other + (1 - p) * (image_sink + text_sink)]
    plain = [text, text_sink, image_sink, image_other]
    out, _ = pyvtk.merge_attention(outs, lses, [torch.where(gate, a, b) for a, b in zip(moved, plain)])
    torch.testing.assert_close(out.double(), expected_map @ values_of(v, 4), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole.double(), weights @ values_of(v, 4), rtol=1e-5, atol=1e-6)


def test_yopo_visual_mass_needs_no_map():
    """rho = sum over queries of the visual mass over the mass of the rest, from lse of two groups."""
    layout, mask, visual = layout_of()
    q, k, v = whole_inputs(layout)
    outs, lses = by_groups(q, k, v, layout, ("text", "visual"))
    _, lse = pyvtk.merge_attention(outs, lses)
    mass = (lses[1] - lse).exp()
    weights = masked_map(q, k, mask)
    expected = weights[..., visual].sum((-1, -2)) / weights[..., ~visual].sum((-1, -2))
    torch.testing.assert_close((mass.sum(-1) / (1 - mass).sum(-1)).double(), expected, rtol=1e-5, atol=1e-6)


def test_biformer_scales_by_all_channels():
    """BiFormer: the scale is C ** -0.5 of all heads together; regions see the regions they are routed to."""
    layout = pyvtk.TokenLayout.from_images([64], [pyvtk.ImageSpan(0, 0, (1, 8, 8))])
    q, k = inputs(4, 4, 64, 64, 8, 1)
    v = torch.randn(1, 4, 64, 8)
    cells = torch.arange(64)
    region = cells // 8 // 2 * 4 + cells % 8 // 2
    mean = [torch.stack([x[0].transpose(0, 1).flatten(1)[region == r].mean(0) for r in range(16)]) for x in (q, k)]
    table = (mean[0] @ mean[1].T).topk(3).indices[None]
    out = pyvtk.neighbor_attention(q, k, v, pyvtk.routed_plan(layout, (1, 2, 2), table), scale=32**-0.5)
    for i in range(64):
        seen = torch.cat([cells[region == r] for r in table[0, region[i]].tolist()])
        z = torch.einsum("hd,hnd->hn", q[0, :, i].double(), k[0][:, seen].double()) * 32**-0.5
        expected = torch.einsum("hn,hnd->hd", z.softmax(-1), v[0][:, seen].double())
        torch.testing.assert_close(out[0, :, i].double(), expected, rtol=1e-5, atol=1e-6)
