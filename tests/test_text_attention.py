"""text_attention: forward, layouts, masks, gradient, registration, the row of a plan, edges, errors."""

import math

import pytest
import torch
from support import assert_within_budget, largest

import pyvtk
from pyvtk import ImageSpan, TokenLayout, neighbor_plan, text_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ("compiled", "reference")


def inputs(batch=2, heads=4, kv_heads=2, rows=1, keys=50, dim=16, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (heads, rows), (kv_heads, keys), (kv_heads, keys)
    return [torch.randn(batch, *shape, dim, generator=g).to(dtype) for shape in shapes]


def beside(x):
    """The heads of a token side by side in memory, with something between tokens."""
    batch, heads, tokens, dim = x.shape
    memory = x.new_full((batch, tokens, heads + 1, dim), math.nan)
    return memory[:, :, :heads].transpose(1, 2).copy_(x)


def by_hand(q, k, v, visual=None, k_mask=None, k_bias=None, visual_heads=None, visual_mass="keep", scale=None,
            dtype=torch.float64):  # fmt: skip
    """The definition, row by row, over the keys that a row sees and nothing else."""
    batch, heads, rows, dim = q.shape
    group, keys = heads // k.shape[1], k.shape[2]
    out = torch.zeros(q.shape, dtype=dtype)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype)
    for b in range(batch):
        there = [j for j in range(keys) if k_mask is None or k_mask[b, j]]
        own = [None] * max(rows - len(there), 0) + there[max(len(there) - rows, 0) :]
        for row in range(rows):
            if own[row] is None:
                continue
            seen = [j for j in there if j <= own[row] and (k_bias is None or k_bias[b, j] != -math.inf)]
            for h in range(heads):
                off = visual_heads is not None and not visual_heads[h]
                mine = [j for j in seen if not (off and visual_mass == "drop" and visual[b, j])]
                if not mine:
                    continue
                z = (k[b, h // group, mine].to(dtype) @ q[b, h, row].to(dtype)) * (
                    dim**-0.5 if scale is None else scale
                )
                if k_bias is not None:
                    z = z + k_bias[b, mine].to(dtype)
                lse[b, h, row] = z.logsumexp(0)
                p = (z - lse[b, h, row]).exp()
                if off:
                    p = p.masked_fill(visual[b, mine], 0)
                out[b, h, row] = p @ v[b, h // group, mine].to(dtype)
    return out, lse


def masks(number, batch, heads, keys):
    """Mixtures of the options."""
    g = torch.Generator().manual_seed(number)
    visual = torch.rand(batch, keys, generator=g) > 0.4
    k_mask = torch.rand(batch, keys, generator=g) > 0.3
    k_mask[:, keys // 3 : keys // 2] = False  # whole vectors
    bias = torch.randn(batch, keys, generator=g)
    bias[torch.rand(batch, keys, generator=g) > 0.9] = -math.inf
    heads_on = torch.tensor([head % 3 != 0 for head in range(heads)])
    return [
        {},
        {"k_mask": k_mask, "scale": 0.4},
        {"k_bias": bias},
        {"visual": visual, "visual_heads": heads_on},
        {"visual": visual, "visual_heads": heads_on, "visual_mass": "drop", "k_mask": k_mask},
        {"visual": visual, "visual_heads": torch.zeros(heads, dtype=torch.bool), "k_bias": bias, "k_mask": k_mask},
        {"visual": visual, "visual_heads": torch.zeros(heads, dtype=torch.bool), "visual_mass": "drop"},
    ][number % 7]


def assert_right(q, k, v, options, isa="avx2", backend="compiled"):
    out, lse = text_attention(q, k, v, return_lse=True, backend=backend, **options)
    exact, exact_lse = by_hand(q, k, v, **options)
    plain, plain_lse = by_hand(q, k, v, dtype=torch.float32, **options)
    assert out.dtype == q.dtype and lse.dtype == torch.float32 and out.shape == q.shape
    assert_within_budget(out, exact, plain.to(q.dtype), isa, added=largest(v))
    assert_within_budget(lse, exact_lse, plain_lse, isa, added=largest(exact_lse))
    return out, lse


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(7))
def test_every_option(number, dtype, instruction_set):
    shapes = ((4, 2, 1, 50, 16), (7, 1, 3, 83, 40), (3, 3, 2, 17, 72), (4, 4, 1, 300, 64), (6, 2, 1, 1, 8))
    for heads, kv_heads, rows, keys, dim in shapes:
        q, k, v = inputs(2, heads, kv_heads, rows, keys, dim, dtype, number)
        assert_right(q, k, v, masks(number, 2, heads, keys), instruction_set)


@pytest.mark.parametrize("number", range(7))
def test_reference(number):
    for rows, keys in ((1, 20), (5, 20), (20, 20)):
        q, k, v = (x.double() for x in inputs(rows=rows, keys=keys, seed=number))
        options = masks(number, 2, 4, keys)
        actual = text_attention(q, k, v, return_lse=True, **options)
        torch.testing.assert_close(actual, by_hand(q, k, v, **options), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", range(7))
def test_where_rows_lie_costs_no_bits(number, dtype, instruction_set):
    for heads, kv_heads, rows, keys, dim in ((4, 2, 1, 600, 24), (8, 8, 3, 90, 64), (6, 1, 2, 70, 128)):
        q, k, v = inputs(2, heads, kv_heads, rows, keys, dim, dtype, number)
        options = masks(number, 2, heads, keys) | {"return_lse": True, "backend": "compiled"}
        expected = text_attention(q, k, v, **options)
        for x, y in ((beside(k), beside(v)), (beside(k), v), (k, beside(v))):
            actual = text_attention(beside(q), x, y, **options)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected))
            assert actual[0].stride(1) < actual[0].stride(2) or rows == 1
        alone = [text_attention(*(x[1:] for x in (q, k, v)), **{
            name: x[1:] if name in ("visual", "k_mask", "k_bias") else x for name, x in options.items()
        })]  # fmt: skip
        assert all(torch.equal(a, b[1:]) for a, b in zip(alone[0], expected))


def test_more_rows_than_one_walk_takes_and_long_sums():
    q, k, v = inputs(1, 2, 1, 90, 1100, 16)
    assert_right(q, k, v, {})
    q, k, v = inputs(1, 4, 4, 1, 5000, 64)
    out, _ = assert_right(q, beside(k), beside(v), {})
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.double() for x in (q, k, v)))
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)


def test_same_bits_on_any_number_of_threads():
    q, k, v = inputs(2, 8, 4, 2, 3000, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(text_attention(q, beside(k), v))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_exist_may_hold_anything(backend):
    """A static cache with free room, padding at the left, and keys that a bias hides."""
    q, k, v = inputs(2, 4, 2, 2, 70, 16)
    k_mask = torch.zeros(2, 70, dtype=torch.bool)
    k_mask[0, 3:41] = k_mask[1, :20] = True
    bias = torch.zeros(2, 70)
    bias[:, 7] = -math.inf
    holes = ~k_mask | (bias == -math.inf)
    dirty = [x.masked_fill(holes[:, None, :, None], math.nan) for x in (k, v)]
    actual = text_attention(q, *dirty, k_mask=k_mask, k_bias=bias, return_lse=True, backend=backend)
    expected = text_attention(q, k, v, k_mask=k_mask, k_bias=bias, return_lse=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected))
    short = text_attention(q[:1], k[:1, :, 3:41], v[:1, :, 3:41], k_bias=bias[:1, 3:41], backend="reference")
    torch.testing.assert_close(actual[0][:1], short)
    nobody = text_attention(q, *dirty, k_mask=torch.zeros_like(k_mask), return_lse=True, backend=backend)
    assert not nobody[0].any() and (nobody[1] == -math.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_that_is_seen_stays(backend):
    q, k, v = inputs(1, 2, 2)
    k[0, 1, 7, 3] = math.nan
    out, lse = text_attention(q, k, v, return_lse=True, backend=backend)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all() and out[0, 0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 5), (2, 4, 2, 0, 5), (2, 4, 2, 0, 0), (2, 0, 1, 1, 5)])
def test_empty(shape, backend):
    q, k, v = inputs(*shape)
    out, lse = text_attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == q.shape and lse.shape == q.shape[:3]


def test_gradient():
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 2, 1, 2, 5, 8))
    bias = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    visual = torch.tensor([[False, True, True, False, False]])
    options = {"visual": visual, "visual_heads": torch.tensor([True, False]), "return_lse": True}
    for mass in ("keep", "drop"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, bias, mass=mass: text_attention(q, k, v, k_bias=bias, visual_mass=mass, **options),
            (q, k, v, bias),
        )


def test_a_gradient_is_never_missing():
    q, k, v = inputs()
    k.requires_grad_()
    assert text_attention(q, k, v).requires_grad
    with pytest.raises(RuntimeError, match="backend 'compiled' cannot run: only the reference has a gradient"):
        text_attention(q, k, v, backend="compiled")
    with torch.no_grad():
        assert not text_attention(q, k, v, backend="compiled").requires_grad


def test_registration():
    q, k, v = inputs(rows=2)
    visual, mask = torch.rand(2, 50) > 0.5, torch.rand(2, 50) > 0.5
    heads = torch.tensor([True, False, True, True])
    for arguments in (
        (q, k, v, None, None, None, None, None, True, 0.25, True),
        (beside(q), k, beside(v), torch.randn(2, 50), visual, mask, None, heads, True, 0.25, False),
    ):
        torch.library.opcheck(torch.ops.pyvtk.text_attention.default, arguments)


@pytest.mark.compile
def test_compiles_whole():
    compiled = torch.compile(text_attention, fullgraph=True, dynamic=True)
    for keys in (20, 33):
        q, k, v = inputs(keys=keys)
        torch.testing.assert_close(compiled(q, k, v), text_attention(q, k, v))


# --- the row of a plan, behind the tokens that it was made for ---


def layouts():
    spans = [ImageSpan(0, 3, (1, 4, 5)), ImageSpan(0, 30, (1, 2, 3)), ImageSpan(1, 1, (2, 3, 3))]
    for padding in ("right", "left"):
        yield TokenLayout.from_images([40, 25], spans, padding=padding)
    yield TokenLayout.from_images([40, 25], spans).take(pyvtk.select(torch.rand(2, 40), 23))


def plans(layout):
    yield neighbor_plan(layout, 1)
    for keys in ("text", "visual"):
        yield neighbor_plan(layout, 1, keys=keys)
    yield pyvtk.window_plan(layout, 2)
    yield pyvtk.subset_plan(layout, pyvtk.select(torch.rand(2, layout.num_tokens), 9))
    yield neighbor_plan(layout, 1, cross_image=True, causal_window=True, block=(64, 32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_behind_the_plan_is_what_its_tail_gives(dtype, monkeypatch):
    made = []
    tail = pyvtk.AttentionPlan.tail
    monkeypatch.setattr(pyvtk.AttentionPlan, "tail", lambda plan, *sizes: made.append(sizes) or tail(plan, *sizes))
    for number, layout in enumerate(layouts()):
        for plan in plans(layout):
            for added in (1, 20):
                keys = layout.num_tokens + added
                q, k, v = inputs(2, 4, 2, 1, keys, 24, dtype, number)
                bias = torch.randn(2, keys)
                bias[:, 5] = -math.inf
                for options in (
                    {},
                    {"k_bias": bias, "scale": 0.3},
                    {"visual_heads": torch.tensor([True, False, False, False])},
                    {"visual_heads": torch.tensor([False, True, False, False]), "visual_mass": "drop", "k_bias": bias},
                    {"visual_heads": torch.zeros(4, dtype=torch.bool), "visual_rows": "zero", "visual_mass": "drop"},
                ):
                    made.clear()
                    out, lse = pyvtk.neighbor_attention(q, k, beside(v), plan, return_lse=True, **options)
                    assert made == []
                    with_tail = plan.tail(1, keys)
                    plain = pyvtk.neighbor_attention(
                        q, k, v, with_tail, return_lse=True, backend="reference", **options
                    )
                    exact = pyvtk.neighbor_attention(
                        *(x.double() for x in (q, k, v)), with_tail, return_lse=True, **options
                    )
                    assert_within_budget(out, exact[0], plain[0], added=largest(v))
                    assert_within_budget(lse, exact[1], plain[1], added=largest(exact[1]))


def test_where_the_tail_is_needed(monkeypatch):
    """A row of the layout, lengths, a gradient, other backends: the tail's plan decides, as before."""
    layout = next(layouts())
    plan, tokens = neighbor_plan(layout, 1), layout.num_tokens
    made = []
    tail = pyvtk.AttentionPlan.tail
    monkeypatch.setattr(pyvtk.AttentionPlan, "tail", lambda plan, *sizes: made.append(sizes) or tail(plan, *sizes))
    q, k, v = inputs(keys=tokens + 3)
    pyvtk.neighbor_attention(q, k[:, :, :tokens], v[:, :, :tokens], plan)
    pyvtk.neighbor_attention(q, k, v, plan, k_lengths=torch.tensor([tokens + 1, 20]))
    pyvtk.neighbor_attention(q, k, v, plan, backend="reference")
    pyvtk.neighbor_attention(q.requires_grad_(), k, v, plan).sum().backward()
    assert len(made) == 4 and q.grad.any()
    with pytest.raises(ValueError, match="since keys was a mask"):
        pyvtk.neighbor_attention(q.detach(), k, v, neighbor_plan(layout, 1, keys=layout.visual))


@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_equals_neighbor_attention_over_text_rows(backend):
    """Several rows behind an image, by the layout's own words."""
    layout = TokenLayout.from_images([40, 40], [ImageSpan(b, 3, (1, 4, 5)) for b in range(2)])
    q, k, v = inputs(2, 4, 2, 40, 40, 16)
    heads = torch.tensor([True, False, True, False])
    for mass in ("keep", "drop"):
        expected = pyvtk.neighbor_attention(
            q, k, v, neighbor_plan(layout, 1), visual_heads=heads, visual_mass=mass, backend="reference"
        )[:, :, 23:]
        actual = text_attention(
            q[:, :, 23:], k, v, visual=layout.visual, visual_heads=heads, visual_mass=mass, backend=backend
        )
        torch.testing.assert_close(actual, expected)


# --- errors ---

Q, K, V = inputs()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": 1}, TypeError, "text_attention: q must be a tensor"),
        ({"q": Q[0]}, ValueError, "text_attention: q must be .batch, heads, tokens, channels."),
        ({"q": Q.long()}, TypeError, "text_attention: q must have dtype"),
        ({"k": K.double()}, TypeError, "text_attention: k must have q's dtype"),
        ({"v": V[:, :, 1:]}, ValueError, "text_attention: v must be shaped like k"),
        ({"q": Q[..., :12]}, ValueError, "text_attention: q must have a multiple of 8 channels"),
        ({"q": Q[..., :8]}, ValueError, "text_attention: k must have q's 8 channels"),
        ({"q": Q[:1]}, ValueError, "text_attention: k must have q's batch of 1"),
        ({"q": Q[:, :3]}, ValueError, "text_attention: q must have a multiple of k's 2 heads"),
        ({"q": Q.expand(2, 4, 51, 16)}, ValueError, "text_attention: q must have at most k's 50 tokens, got 51"),
        ({"k_mask": torch.ones(2, 49).bool()}, ValueError, "text_attention: k_mask must be"),
        ({"k_mask": torch.ones(2, 50)}, TypeError, "text_attention: k_mask must have dtype bool"),
        ({"visual": torch.ones(50).bool()}, ValueError, "text_attention: visual must be"),
        ({"k_bias": torch.ones(2, 50).long()}, TypeError, "text_attention: k_bias must have dtype"),
        ({"visual_heads": torch.ones(4).bool()}, ValueError, "text_attention: visual must be given with visual_heads"),
        ({"visual": torch.ones(2, 50).bool(), "visual_heads": torch.ones(3).bool()}, ValueError, "visual_heads must"),
        ({"visual_mass": "none"}, ValueError, "text_attention: visual_mass must be one of"),
        ({"scale": "1"}, TypeError, "text_attention: scale must be a number or None, got str"),
        ({"return_lse": 1}, TypeError, "text_attention: return_lse must be True or False"),
        ({"backend": "triton"}, RuntimeError, "text_attention: backend 'triton' cannot run"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    arguments = {"q": Q, "k": K, "v": V} | change
    with pytest.raises(error, match=message):
        text_attention(**arguments)
