"""neighbor_attention and merge_attention: equal to dense float64 attention under the oracle's masks."""

import math

import attention_oracle as oracle
import pytest
import torch
from attention_cases import KINDS, LAYOUTS, SPANS, chosen_of, random_layouts, routed, window
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget, max_error
from torch._dynamo.testing import CompileCounter
from torch.library import opcheck

import pyvtk
from pyvtk import _C, ImageSpan, Selection, TokenLayout, backends, merge_attention, neighbor_attention, neighbor_plan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COMPILED = backends.why_not("neighbor_attention", "compiled", "cpu") is None
# The compiled kernel takes part in every test as soon as it is built, with each instruction set.
IMPLEMENTATIONS = ("reference", *(f"compiled {name}" for name in _C.instruction_sets() if COMPILED))
BACKENDS = ("reference", *(["compiled"] if COMPILED else []))


@pytest.fixture(params=IMPLEMENTATIONS)
def backend(request):
    name, _, instructions = request.param.partition(" ")
    before = _C.instruction_set()
    if instructions:
        _C.use_instruction_set(instructions)
    yield name
    _C.use_instruction_set(before)


def within_budget(actual, exact, *plains):
    """Of several plain computations the one that is most wrong: their largest errors are a matter of luck."""
    plains = [x.to(actual.dtype) for x in plains]
    worst = max(plains, key=lambda x: max_error(x, exact))
    assert_within_budget(actual, exact, worst, _C.instruction_set())


def inputs(layout, heads=4, kv_heads=2, dim=16, dtype=torch.float32, seed=0):
    """q, k and v for a layout: [batch, heads, tokens, channels], packed [tokens, heads, channels]."""
    g = torch.Generator().manual_seed(seed)
    shapes = [
        (layout.num_tokens, h, dim) if layout.packed else (layout.num_samples, h, layout.num_tokens, dim)
        for h in (heads, kv_heads, kv_heads)
    ]
    return [torch.randn(shape, generator=g).to(dtype) for shape in shapes]


def bias(layout, seed=0):
    return torch.randn(layout.image_id.shape, generator=torch.Generator().manual_seed(seed + 100))


def batched(x):
    return x.transpose(0, 1)[None]


def dense(layout, mask, q, k, v, *, k_bias=None, dtype=torch.float64, **options):
    """The oracle's (out, lse), shaped like those of neighbor_attention."""
    visual = layout.visual[None] if layout.packed else layout.visual
    if layout.packed:
        q, k, v = batched(q), batched(k), batched(v)
        k_bias = None if k_bias is None else k_bias[None]
    out, lse = oracle.attention(
        q, k, v, mask, k_bias=k_bias, dtype=dtype, visual_queries=visual, visual_keys=visual, **options
    )
    return (out[0].transpose(0, 1), lse[0]) if layout.packed else (out, lse)


def assert_right(layout, plan, mask, q, k, v, backend, few_numbers=False, **options):
    """One call against the oracle in float64, within the budget that the oracle in float32 sets."""
    out, lse = neighbor_attention(q, k, v, plan, return_lse=True, backend=backend, **options)
    exact = dense(layout, mask, q, k, v, **options)
    plain = dense(layout, mask, q, k, v, dtype=torch.float32, **options)
    plains = [plain]
    if backend == "compiled":
        plains.append(neighbor_attention(q, k, v, plan, return_lse=True, backend="reference", **options))
    assert out.dtype == q.dtype and out.shape == q.shape
    assert lse.dtype == torch.float32 and lse.shape == plain[1].shape
    within_budget(out, exact[0], *(x for x, _ in plains))
    if few_numbers:  # of which a plain computation may get every one right by chance
        torch.testing.assert_close(lse.double(), exact[1], rtol=1.3e-6, atol=1e-5)  # the defaults of float32
    else:
        within_budget(lse, exact[1], *(x for _, x in plains))
    blind = (lse == -math.inf)[..., None]
    assert not out[(blind.transpose(0, 1) if layout.packed else blind).expand(out.shape)].any()
    return out, lse


# --- forward ---


@pytest.mark.parametrize("kind", KINDS)
def test_every_plan(kind, backend):
    for number, layout in enumerate(LAYOUTS.values()):
        plan, mask = KINDS[kind](layout, ((16, 16), (64, 32), (32, 16))[number % 3])
        assert_right(layout, plan, mask, *inputs(layout, seed=number), backend)


@pytest.mark.parametrize("dim", (8, 16, 40, 64, 72, 80, 128, 256))
@pytest.mark.parametrize("group", (1, 2, 7))
def test_every_shape(group, dim, backend):
    for number, dtype in enumerate(DTYPES):
        layout = LAYOUTS[("right", "packed", "taken")[(number + group) % 3]]
        plan, mask = KINDS["radius 1"](layout, ((16, 16), (64, 32), (16, 64))[number])
        assert_right(layout, plan, mask, *inputs(layout, group * 2, 2, dim, dtype), backend)


@pytest.mark.parametrize("visual_rows", ("attend", "zero"))
@pytest.mark.parametrize("visual_mass", ("keep", "drop"))
@pytest.mark.parametrize("on", ((), (1,), (0, 3), (0, 1, 2, 3)), ids=str)
def test_visual_heads(on, visual_mass, visual_rows, backend):
    """Heads of one group on and off, all off, all on; with and without a bias."""
    visual_heads = torch.tensor([head in on for head in range(4)])
    options = {"visual_heads": visual_heads, "visual_mass": visual_mass, "visual_rows": visual_rows}
    for number, (name, kind) in enumerate(
        (("right", "radius 1"), ("packed", "causal window"), ("taken", "window"), ("left", "some keys"),
         ("packed, then taken", "routed"), ("shuffled", "visual keys"), ("one image", "radius 0"))
    ):  # fmt: skip
        layout = LAYOUTS[name]
        plan, mask = KINDS[kind](layout, (16, 16))
        more = {"k_bias": bias(layout), "scale": 0.4} if number % 2 else {}
        q, k, v = inputs(layout, dtype=DTYPES[number % 3], seed=number)
        assert_right(layout, plan, mask, q, k, v, backend, **options, **more)


def test_float64_is_the_reference():
    layout = LAYOUTS["right"]
    plan, mask = KINDS["radius 1"](layout, (16, 16))
    q, k, v = (x.double() for x in inputs(layout))
    out, lse = neighbor_attention(q, k, v, plan, k_bias=bias(layout).double(), return_lse=True)
    exact = dense(layout, mask, q, k, v, k_bias=bias(layout))
    assert out.dtype == lse.dtype == torch.float64
    torch.testing.assert_close((out, lse), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_yopo(dtype, backend):
    """The published rule by its own formula, on 8 x 8 at token 5, with its pruned heads."""
    layout = TokenLayout.from_images([80, 80], [ImageSpan(b, 5, (1, 8, 8)) for b in range(2)])
    mask = oracle.yopo_mask(8, 5, 11, 5).expand(2, 80, 80)
    for visual_heads in (None, torch.tensor([True, False, False, True])):
        options = {} if visual_heads is None else {"visual_heads": visual_heads, "visual_rows": "zero"}
        assert_right(layout, neighbor_plan(layout, 2), mask, *inputs(layout, dtype=dtype), backend, **options)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64))
def test_bias_of_any_dtype(dtype, backend):
    layout = LAYOUTS["left"]
    plan, mask = KINDS["radius 1"](layout, (16, 16))
    assert_right(layout, plan, mask, *inputs(layout), backend, k_bias=bias(layout).to(dtype))
    strided = bias(layout).to(dtype)[:, :, None].expand(-1, -1, 2)[..., 0]
    assert_right(layout, plan, mask, *inputs(layout), backend, k_bias=strided)


def test_bias_of_minus_infinity_hides_a_key(backend):
    layout = LAYOUTS["right"]
    plan, mask = KINDS["radius 1"](layout, (16, 16))
    hidden = torch.rand(layout.image_id.shape) < 0.3
    hidden[0, :2] = True  # the first queries see nothing at all
    k_bias = bias(layout).masked_fill(hidden, -math.inf)
    q, k, v = inputs(layout)
    out, lse = neighbor_attention(q, k, v, plan, k_bias=k_bias, return_lse=True, backend=backend)
    exact, plain = (
        dense(layout, mask & ~hidden[:, None], q, k, v, k_bias=bias(layout), dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    within_budget(out, exact[0], plain[0])
    within_budget(lse, exact[1], plain[1])
    leaves = [x.requires_grad_() for x in (q, k, v, k_bias)]
    out, lse = neighbor_attention(q, k, v, plan, k_bias=k_bias, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads) and not grads[3][hidden].any()
    assert not grads[0][:1, :, :2].any()


def test_large_logits(backend):
    """Logits of thousands: the largest is taken away before exp."""
    layout = LAYOUTS["right"]
    plan, mask = KINDS["cross image"](layout, (16, 16))
    q, k, v = inputs(layout)
    assert_right(layout, plan, mask, q * 30, k * 30, v, backend)
    assert_right(layout, plan, mask, q, k, v, backend, k_bias=bias(layout) * 1e4, scale=-0.3)
    assert_right(layout, plan, mask, q, k, v, backend, scale=0)


# --- strides and memory ---


def test_strides_and_memory_order(backend):
    layout = LAYOUTS["left"]
    plan, mask = KINDS["radius 1"](layout, (16, 16))
    q, k, v = inputs(layout, dim=24)
    expected = neighbor_attention(q, k, v, plan, backend=backend)
    assert expected.is_contiguous()
    fused = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)  # [batch, tokens, (4 + 2 + 2) * 24]
    heads = fused.unflatten(2, (8, 24))
    sliced = [heads[:, :, a:b].transpose(1, 2) for a, b in ((0, 4), (4, 6), (6, 8))]
    lasts = [x.mT.contiguous().mT for x in (q, k, v)]
    broadcast = [x[:1].expand(4, -1, -1, -1) for x in (q, k, v)]
    for case in (sliced, lasts, [q, *sliced[1:]], [sliced[0], k, lasts[2]]):
        out = neighbor_attention(*case, plan, backend=backend)
        assert torch.equal(out, expected)
        token_major = case[0].stride(1) < case[0].stride(2) and case[0].stride(3) == 1
        assert (out.transpose(1, 2) if token_major else out).is_contiguous()
    repeated = neighbor_attention(*broadcast, plan, backend=backend)
    contiguous = neighbor_attention(*(x.contiguous() for x in broadcast), plan, backend=backend)
    assert torch.equal(repeated, contiguous)
    # gradients through views
    whole = fused.detach().clone().requires_grad_()
    heads = whole.unflatten(2, (8, 24))
    sliced = [heads[:, :, a:b].transpose(1, 2) for a, b in ((0, 4), (4, 6), (6, 8))]
    weight = torch.randn(q.shape)
    for w in (weight, weight.transpose(1, 2).contiguous().transpose(1, 2), weight.mT.contiguous().mT, weight[:1]):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        grads = torch.autograd.grad((neighbor_attention(*leaves, plan, backend=backend) * w).sum(), leaves)
        (grad,) = torch.autograd.grad((neighbor_attention(*sliced, plan, backend=backend) * w).sum(), whole,
                                      retain_graph=True)  # fmt: skip
        assert torch.equal(grad, torch.cat([x.transpose(1, 2).flatten(2) for x in grads], -1))
    assert mask.any()


def test_packed_memory(backend):
    """Packed q as a slice of a fused projection; the output is [tokens, heads, channels], contiguous."""
    layout = LAYOUTS["packed"]
    plan, _ = KINDS["radius 1"](layout, (16, 16))
    q, k, v = inputs(layout, dim=24)
    fused = torch.cat([q, k, v], 1)
    out = neighbor_attention(*fused.split([4, 2, 2], 1), plan, backend=backend)
    assert out.is_contiguous() and torch.equal(out, neighbor_attention(q, k, v, plan, backend=backend))


def test_strides_beyond_32_bits(backend):
    layout = TokenLayout.from_images([5], [ImageSpan(0, 1, (1, 1, 3))])
    plan = neighbor_plan(layout, 1)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    torch.utils.deterministic.fill_uninitialized_memory = before
    far = storage.as_strided((1, 1, 5, 16), (0, 0, 2**29, 1))
    far.copy_(torch.randn(1, 1, 5, 16))
    near = far.contiguous()
    out = neighbor_attention(far, far, far, plan, backend=backend)
    assert torch.equal(out, neighbor_attention(near, near, near, plan, backend=backend))


def test_same_bits(backend):
    """On every run, and on any number of threads."""
    layout = TokenLayout.from_images([400, 333], [ImageSpan(0, 20, (1, 16, 17)), ImageSpan(1, 0, (2, 9, 11))])
    plan = neighbor_plan(layout, 2)
    leaves = [x.requires_grad_() for x in (*inputs(layout, 8, 2, 40), bias(layout))]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        out, lse = neighbor_attention(*leaves[:3], plan, k_bias=leaves[3], return_lse=True, backend=backend)
        loss = out.square().sum() + lse[lse.isfinite()].square().sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    torch.set_num_threads(before)
    for other in results[1:] if backend == "compiled" else results[3:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


# --- gradients ---


def gradients(function, leaves, dtype, parts=(0, 1), seed=7):
    """Gradients of a random linear function of out and lse, with weights of ``dtype``, to q, k, v (and k_bias)."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out, lse = function(*leaves[:3], **({"k_bias": leaves[3]} if len(leaves) > 3 else {}))
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=g) for x in (out, lse)]
    losses = [
        (out * weights[0].to(dtype).to(out.dtype)).sum(),
        (torch.where(lse.isfinite(), lse, 0) * weights[1].to(lse.dtype)).sum(),
    ]
    grads = torch.autograd.grad(sum(losses[part] for part in parts), leaves, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads)]


def assert_gradients(
    layout, plan, mask, backend, *, dim=16, dtype=torch.float32, heads=4, biased=False, parts=(0, 1), **options
):
    """The reference in float64 against the oracle; a kernel by the budget, for the worst of five draws: the largest
    error of a few numbers in one draw is mere luck."""

    def page(name):
        return lambda q, k, v, **b: neighbor_attention(q, k, v, plan, return_lse=True, backend=name, **b, **options)

    def exact(q, k, v, **b):
        return dense(layout, mask, q, k, v, **b, **options)

    def plain(q, k, v, **b):
        return dense(layout, mask, q, k, v, dtype=torch.float32, **b, **options)

    draws = []
    for seed in range(1 if backend == "reference" else 5):
        leaves = inputs(layout, heads, 2, dim, dtype, seed) + ([bias(layout, seed)] if biased else [])
        wide = [x.double() for x in leaves]
        expected = gradients(exact, wide, dtype, parts)
        if seed == 0:
            for a, b in zip(gradients(page("reference"), wide, dtype, parts), expected):
                torch.testing.assert_close(a, b)
        actual, other = (gradients(page(name), leaves, dtype, parts) for name in (backend, "reference"))
        draws.append((actual, expected, other, gradients(plain, leaves, dtype, parts)))
    for place in range(len(draws[0][0])):
        actual, *rest = (torch.stack([draw[i][place] for draw in draws]) for i in range(4))
        assert actual.dtype == (torch.float32 if place == 3 else dtype)
        within_budget(actual, *rest)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_every_plan(kind, backend):
    names = list(LAYOUTS)
    first = list(KINDS).index(kind)
    for name in {names[first % len(names)], names[(first + 5) % len(names)], "taken", "packed"}:
        plan, mask = KINDS[kind](LAYOUTS[name], ((16, 16), (64, 32))[first % 2])
        assert_gradients(LAYOUTS[name], plan, mask, backend, biased=first % 2 == 0)


@pytest.mark.parametrize("visual_rows", ("attend", "zero"))
@pytest.mark.parametrize("visual_mass", ("keep", "drop"))
def test_gradient_of_visual_heads(visual_mass, visual_rows, backend):
    options = {"visual_mass": visual_mass, "visual_rows": visual_rows}
    for number, (name, kind) in enumerate((("right", "radius 1"), ("packed", "cross image"), ("taken", "window"))):
        plan, mask = KINDS[kind](LAYOUTS[name], (16, 16))
        for on in ((True, False, False, True), (False,) * 4):
            assert_gradients(
                LAYOUTS[name],
                plan,
                mask,
                backend,
                biased=number == 0,
                visual_heads=torch.tensor(on),
                scale=0.3,
                **options,
            )


@pytest.mark.parametrize(
    ("heads", "dim"), [*((2, dim) for dim in (8, 40, 72, 80, 128, 256)), *((14, dim) for dim in (8, 40, 72))]
)
def test_gradient_of_every_shape(heads, dim, backend):
    dtype = DTYPES[(dim // 8 + heads) % 3]
    plan, mask = KINDS["radius 1"](LAYOUTS["left"], (16, 16))
    assert_gradients(LAYOUTS["left"], plan, mask, backend, dim=dim, heads=heads, dtype=dtype, biased=True)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_gradient_of_half_inputs(dtype, backend):
    for name, kind in (("right", "radius 1"), ("packed", "causal window"), ("shuffled", "routed")):
        plan, mask = KINDS[kind](LAYOUTS[name], (16, 16))
        assert_gradients(LAYOUTS[name], plan, mask, backend, dtype=dtype)


@pytest.mark.parametrize("part", ((0,), (1,)), ids=("out", "lse"))
def test_gradient_of_out_alone_and_of_lse_alone(part, backend):
    plan, mask = KINDS["radius 1"](LAYOUTS["right"], (16, 16))
    assert_gradients(LAYOUTS["right"], plan, mask, backend, biased=True, parts=part)


def test_gradient_of_some_inputs(backend):
    """Whatever subset of the inputs wants one."""
    layout = LAYOUTS["packed"]
    plan, _ = KINDS["radius 1"](layout, (16, 16))
    everything = [x.requires_grad_() for x in (*inputs(layout), bias(layout))]
    full = torch.autograd.grad(
        neighbor_attention(*everything[:3], plan, k_bias=everything[3], backend=backend).square().sum(), everything
    )
    for chosen in range(1, 16):
        leaves = [x.detach().requires_grad_(bool(chosen >> i & 1)) for i, x in enumerate(everything)]
        out = neighbor_attention(*leaves[:3], plan, k_bias=leaves[3], backend=backend)
        wanted = [i for i in range(4) if leaves[i].requires_grad]
        grads = torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted])
        for i, grad in zip(wanted, grads):
            assert torch.equal(grad, full[i])


@pytest.mark.parametrize("number", range(5))
def test_gradcheck(number):
    """The reference's own gradient in float64, against finite differences."""
    layout = TokenLayout.from_images(
        [9, 6], [ImageSpan(0, 2, (1, 2, 2)), ImageSpan(0, 6, (1, 1, 2))], packed=number == 3
    )
    plan = neighbor_plan(layout, 0 if number == 4 else 1, cross_image=number == 1)
    options = [
        {},
        {"visual_heads": torch.tensor([True, False])},
        {"visual_heads": torch.tensor([False, True]), "visual_mass": "drop"},
        {"visual_heads": torch.tensor([False, False]), "visual_rows": "zero"},
        {"visual_heads": torch.tensor([True, False]), "visual_rows": "zero", "visual_mass": "drop"},
    ][number]
    leaves = [x.double().requires_grad_() for x in (*inputs(layout, 2, 1, 8), bias(layout))]

    def function(q, k, v, k_bias):
        out, lse = neighbor_attention(q, k, v, plan, k_bias=k_bias, return_lse=True, **options)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(function, leaves)


# --- padding, edges ---


@pytest.mark.parametrize("filling", (math.nan, math.inf))
@pytest.mark.parametrize("name", ("right", "left", "taken to the right", "taken, room behind", "shuffled"))
def test_padding_may_hold_anything(name, filling, backend):
    layout = LAYOUTS[name]
    invalid = ~layout.valid
    assert invalid.any()
    rows = invalid[:, None, None] if layout.packed else invalid[:, None, :, None]
    for kind, options in (
        ("radius 1", {}),
        ("cross image", {"k_bias": bias(layout)}),
        ("window", {"visual_heads": torch.tensor([True, False, True, False]), "visual_rows": "zero"}),
        ("routed", {"visual_heads": torch.tensor([False, False, True, False]), "visual_mass": "drop"}),
    ):
        plan, _ = KINDS[kind](layout, (16, 16))
        clean = inputs(layout)
        results = []
        for poison in (0, filling):
            leaves = [x.masked_fill(rows, poison).requires_grad_() for x in clean]
            if "k_bias" in options:
                options = {"k_bias": bias(layout).masked_fill(invalid, poison).requires_grad_()}
                leaves.append(options["k_bias"])
            out, lse = neighbor_attention(*leaves[:3], plan, return_lse=True, backend=backend, **options)
            weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).masked_fill(rows, poison)
            grads = torch.autograd.grad(
                (out, lse), leaves, (weight, torch.where(lse.isfinite(), 0.5, poison).to(lse.dtype))
            )
            results.append((out, lse, *grads))
        for a, b in zip(*results):
            assert torch.equal(a, b)
        out, lse, *grads = results[1]
        assert not lse.isnan().any() and out.isfinite().all() and all(x.isfinite().all() for x in grads)
        assert not out[rows.expand(out.shape)].any()
        assert (lse[(invalid[None] if layout.packed else invalid[:, None]).expand(lse.shape)] == -math.inf).all()
        for grad in grads:
            assert not grad[rows.expand(grad.shape) if grad.dim() > 2 else invalid].any()


@pytest.mark.parametrize("part", ("k", "v"))
def test_not_a_number_that_only_later_tokens_see(part, backend):
    """As the docstring says: it stays away from tiles of queries none of which sees it, and of v it reaches the others;
    in the reference, as in SDPA, all."""
    q, k, v = torch.randn(3, 1, 1, 40, 8).unbind()
    {"k": k, "v": v}[part][:, :, 20] = float("nan")
    plan = neighbor_plan(TokenLayout.from_images([40]), 1)
    wrong = neighbor_attention(q, k, v, plan, backend=backend).isnan().any(-1)[0, 0]
    assert wrong[20:].all()
    if part == "k":
        assert not wrong[:20].any()
    elif backend == "compiled":
        assert not wrong[:16].any() and wrong[16:20].all()  # a tile has 16 queries
    else:
        sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(40, 40).bool().tril())
        assert wrong.all() and sdpa.isnan().all()


def test_blind_rows_of_a_key_group(backend):
    """With visual keys alone, text before the image sees nothing; with a mask of no keys, nobody does."""
    layout = TokenLayout.from_images([30], [ImageSpan(0, 9, (1, 4, 4))])
    for keys in ("visual", torch.zeros((1, 30), dtype=torch.bool)):
        plan, mask = neighbor_plan(layout, 1, keys=keys), oracle.neighbor_mask(layout, 1, keys=keys)
        _, lse = assert_right(layout, plan, mask, *inputs(layout), backend)
        assert (lse[:, :, :9] == -math.inf).all()
        assert_gradients(layout, plan, mask, backend, biased=True)
    assert (lse == -math.inf).all()


def test_radius_zero_sees_itself(backend):
    layout = TokenLayout.from_images([12], [ImageSpan(0, 0, (1, 3, 4))])
    q, k, v = inputs(layout)
    out = neighbor_attention(q, k, v, neighbor_plan(layout, 0), backend=backend)
    assert torch.equal(out, v.repeat_interleave(2, 1))


def test_radius_past_the_grid_is_dense_in_the_image(backend):
    layout = TokenLayout.from_images([20], [ImageSpan(0, 0, (1, 4, 5))])
    q, k, v = inputs(layout)
    out = neighbor_attention(q, k, v, neighbor_plan(layout, 5), backend=backend)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True)
    within_budget(out, exact, plain)


def test_text_alone_is_causal_attention(backend):
    layout = TokenLayout.from_images([37, 37])
    q, k, v = inputs(layout)
    out = neighbor_attention(q, k, v, neighbor_plan(layout, 3), backend=backend)
    options = {"is_causal": True, "enable_gqa": True}
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    within_budget(out, exact, plain)


@pytest.mark.parametrize("name", ("no tokens", "no samples", "nothing packed"))
def test_empty(name, backend):
    layout = LAYOUTS[name]
    leaves = [x.requires_grad_() for x in (*inputs(layout), bias(layout))]
    out, lse = neighbor_attention(
        *leaves[:3], neighbor_plan(layout, 1), k_bias=leaves[3], return_lse=True, backend=backend
    )
    assert out.shape == leaves[0].shape and lse.numel() == 0
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum() + lse.sum(), leaves)):
        assert grad.shape == leaf.shape
    if name == "no tokens":
        tail = neighbor_attention(*(torch.randn(2, h, 3, 16) for h in (4, 2, 2)), neighbor_plan(layout, 1))
        assert tail.isfinite().all() and tail.any()
        none = neighbor_attention(
            torch.randn(2, 4, 0, 16), *torch.randn(2, 2, 2, 3, 16), neighbor_plan(layout, 1), backend=backend
        )
        assert none.shape == (2, 4, 0, 16)


# --- other forms of the same sequence ---


def test_packed_equals_padded(backend):
    padded, packed = LAYOUTS["right"], LAYOUTS["packed"]
    rows = padded.valid
    q, k, v = inputs(padded, dim=24)
    for kind in ("radius 1", "cross image, causal", "window, shifted", "routed", "text keys"):
        for block in ((16, 16), (64, 32)):
            one, _ = KINDS[kind](padded, block)
            other, _ = KINDS[kind](packed, block)
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            flat = [x.transpose(1, 2)[rows].clone().requires_grad_() for x in (q, k, v)]
            out, lse = neighbor_attention(*leaves, one, return_lse=True, backend=backend)
            flat_out, flat_lse = neighbor_attention(*flat, other, return_lse=True, backend=backend)
            torch.testing.assert_close(flat_out, out.transpose(1, 2)[rows])
            torch.testing.assert_close(flat_lse, lse.transpose(1, 2)[rows].T)
            weight = torch.randn(flat_out.shape)
            flat_grads = torch.autograd.grad((flat_out * weight).sum(), flat)
            grads = torch.autograd.grad((out.transpose(1, 2)[rows] * weight).sum(), leaves)
            for a, b in zip(flat_grads, grads):
                torch.testing.assert_close(a, b.transpose(1, 2)[rows])


@pytest.mark.parametrize("packed", (False, True))
def test_after_take(packed, backend):
    """A random half of the tokens stays: they see among each other what they saw before."""
    layout = TokenLayout.from_images([70, 60], [ImageSpan(0, 4, (1, 6, 8)), ImageSpan(1, 20, (2, 4, 4))])
    selection = chosen_of(layout, 11)
    q, k, v = inputs(layout)
    whole = oracle.neighbor_mask(layout, 2)
    kept = selection.mask()
    exact, plain = (
        dense(layout, whole & kept[:, None] & kept[:, :, None], q, k, v, dtype=dtype)[0]
        for dtype in (torch.float64, torch.float32)
    )
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    taken = pyvtk.compact(selection, *rows, packed=packed)
    plan = neighbor_plan(layout.take(selection, packed=packed), 2)
    out = neighbor_attention(*(taken if packed else [x.transpose(1, 2) for x in taken]), plan, backend=backend)
    exact, plain = (x.transpose(1, 2)[kept] for x in (exact, plain))
    within_budget(out if packed else out.transpose(1, 2)[selection.valid], exact, plain)


@pytest.mark.parametrize("rule", ({}, {"causal_window": True}, {"keys": "text"}), ids=str)
def test_decode_and_chunks(rule, backend):
    """Text grows behind the layout: one query, chunks of several, all at once; rows of the whole computation."""
    layout = TokenLayout.from_images(
        [40, 33], [ImageSpan(0, 4, (1, 5, 6)), ImageSpan(1, 20, (1, 3, 4))], padding="left"
    )
    longer = TokenLayout.from_images(
        [53, 46], [ImageSpan(0, 4, (1, 5, 6)), ImageSpan(1, 20, (1, 3, 4))], padding="left"
    )
    q, k, v = inputs(longer)
    plan = neighbor_plan(layout, 1, **rule)
    mask = oracle.neighbor_mask(longer, 1, **rule)
    exact, plain = (dense(longer, mask, q, k, v, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for first, last in ((52, 53), (40, 41), (0, 53), (30, 53), (41, 48), (0, 40), (39, 40)):
        keys = max(last, 40)
        out, lse = neighbor_attention(
            q[:, :, first:last], k[:, :, :keys], v[:, :, :keys],
            plan, return_lse=True, backend=backend,
        ) if last >= 40 else (None, None)  # fmt: skip
        within_budget(out, exact[0][:, :, first:last], plain[0][:, :, first:last])
        within_budget(lse, exact[1][:, :, first:last], plain[1][:, :, first:last])
        tail = plan.tail(last - first, keys)
        again = neighbor_attention(q[:, :, first:last], k[:, :, :keys], v[:, :, :keys], tail, backend=backend)
        if backend == "compiled" and last - first == 1 and last > 40:  # a kernel of its own, whose sums differ
            within_budget(again, exact[0][:, :, first:last], plain[0][:, :, first:last])
        else:
            assert torch.equal(again, out)


def test_a_cache_with_room(backend):
    """k_lengths rows of a longer cache are in use; what stands behind them may be anything, and gets no gradient."""
    lengths = [40, 33, 0]
    layout = TokenLayout.from_images(lengths, SPANS[:1])
    plan = neighbor_plan(layout, 1)
    used = torch.tensor([45, 36, 3], dtype=torch.int32)
    q, k, v = (torch.randn(3, h, n, 16) for h, n in ((4, 3), (2, 64), (2, 64)))
    behind = torch.arange(64) >= used[:, None]
    k, v = (x.masked_fill(behind[:, None, :, None], math.nan) for x in (k, v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = neighbor_attention(*leaves, plan, k_lengths=used, return_lse=True, backend=backend)
    grads = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
    assert all(x.isfinite().all() for x in grads)
    assert not grads[1][behind[:, None].expand(3, 2, 64)].any()
    for b, n in enumerate(used.tolist()):
        alone = TokenLayout.from_images([n], SPANS[:1] if b == 0 else [])
        mask = oracle.neighbor_mask(alone, 1)[:, n - 3 :]
        exact, plain = (
            oracle.attention(q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n], mask, dtype=dtype)
            for dtype in (torch.float64, torch.float32)
        )
        within_budget(out[b : b + 1], exact[0], plain[0])
        within_budget(lse[b : b + 1], exact[1], plain[1])
    one = neighbor_attention(q[:, :, -1:], k, v, plan, k_lengths=used.long(), backend=backend)
    torch.testing.assert_close(one, out[:, :, -1:])


@settings(max_examples=60, deadline=None)
@given(
    layout=random_layouts(),
    kind=st.sampled_from(list(KINDS)),
    block=st.sampled_from(((16, 16), (64, 32), (16, 64))),
    group=st.sampled_from((1, 3, 7)),
    kv_heads=st.integers(1, 2),
    dim=st.sampled_from((8, 40, 64, 72)),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    on=st.integers(0, 2**14 - 1),
    visual_mass=st.sampled_from(("keep", "drop")),
    visual_rows=st.sampled_from(("attend", "zero")),
    seed=st.integers(0, 1000),
)
def test_anything(
    layout, kind, block, group, kv_heads, dim, dtype, biased, on, visual_mass, visual_rows, seed
):  # fmt: skip
    plan, mask = KINDS[kind](layout, block)
    q, k, v = inputs(layout, group * kv_heads, kv_heads, dim, dtype, seed)
    options = {"k_bias": bias(layout, seed)} if biased else {}
    if kind != "subset":  # there everything is text
        heads = torch.tensor([bool(on >> h & 1) for h in range(group * kv_heads)])
        options |= {"visual_heads": heads, "visual_mass": visual_mass, "visual_rows": visual_rows}
    for backend in BACKENDS:
        assert_right(layout, plan, mask, q, k, v, backend, few_numbers=True, **options)


# --- the operator, torch.compile, autocast ---


def operator_arguments(number, requires_grad):
    layout = LAYOUTS[("right", "packed", "no tokens")[number]]
    plan, _ = (routed if number == 1 else KINDS["radius 1"])(layout, (16, 16))
    q, k, v = inputs(layout)
    k_bias = bias(layout)
    if layout.packed:
        q, k, v, k_bias = batched(q), batched(k), batched(v), k_bias[None]
    leaves = [x.requires_grad_(requires_grad) for x in (q, k, v, *([] if number == 2 else [k_bias]))]
    heads = torch.tensor([True, False, False, True]) if number else None
    k_bias = leaves[3] if number < 2 else None
    return (*leaves[:3], k_bias, heads, plan.tensors(), plan.rule(), 0.25, number == 1, number == 1)


@pytest.mark.skipif(not COMPILED, reason="neighbor_attention has no compiled kernel yet")
@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("number", range(3))
def test_opcheck(number, requires_grad):
    arguments = operator_arguments(number, requires_grad)
    opcheck(torch.ops.pyvtk.neighbor_attention.default, arguments)
    if not requires_grad:
        q, k, v, k_bias, heads, *options = arguments
        out, lse = torch.ops.pyvtk.neighbor_attention(*arguments)
        for grads in ((torch.randn_like(out), torch.randn_like(lse)), (torch.randn_like(out), None),
                      (None, torch.randn_like(lse))):  # fmt: skip
            opcheck(
                torch.ops.pyvtk.neighbor_attention_backward.default,
                (*grads, q, k, v, k_bias, heads, out, lse, *options),
            )


def test_schema_and_fakes():
    """The fake kernel answers with shape, dtype and strides of what the page promises, on any device."""
    for number in range(3):
        q, k, v, *rest = (
            [t.to("meta") for t in x] if isinstance(x, list) and x and isinstance(x[0], torch.Tensor)
            else x.to("meta") if isinstance(x, torch.Tensor) else x
            for x in operator_arguments(number, False)
        )  # fmt: skip
        for swap in (False, True):
            query = q.transpose(1, 2).contiguous().transpose(1, 2) if swap else q.contiguous()
            out, lse = torch.ops.pyvtk.neighbor_attention(query, k, v, *rest)
            assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.dtype == torch.float32
            assert (out.transpose(1, 2) if swap else out).is_contiguous()
        grads = torch.ops.pyvtk.neighbor_attention_backward(out, None, q, k, v, *rest[:2], out, lse, *rest[2:])
        assert [x.shape for x in grads[:3]] == [q.shape, k.shape, v.shape]
        assert grads[3].shape == ((0,) if rest[0] is None else rest[0].shape)


@pytest.mark.compile
@pytest.mark.parametrize("name", BACKENDS)
def test_compiles_as_one_graph(name):
    """Attention and merging in one graph, forward and backward; a plan passes through."""
    torch._dynamo.reset()

    def step(q, k, v, k_bias, heads, plan, text, visual):
        options = {"k_bias": k_bias, "return_lse": True, "backend": name}
        whole = neighbor_attention(q, k, v, plan, visual_heads=heads, visual_rows="zero", **options)
        parts = [neighbor_attention(q, k, v, p, **options) for p in (text, visual)]
        return *whole, *merge_attention([p[0] for p in parts], [p[1] for p in parts])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    # the reference is a graph of hundreds of nodes, which takes long: one layout of it
    for layout in (LAYOUTS[n] for n in (("packed",) if name == "reference" else ("left", "packed"))):
        leaves = [x.requires_grad_() for x in (*inputs(layout), bias(layout))]
        results = []
        for function in (compiled, step):
            plans = [neighbor_plan(layout, 1, keys=keys) for keys in ("all", "text", "visual")]
            out = function(*leaves, torch.tensor([True, False, True, False]), *plans)
            loss = sum(torch.where(x.isfinite(), x, 0).square().sum() for x in out)
            results.append((*out, *torch.autograd.grad(loss, leaves)))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.compile
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("outside", (False, True), ids=("plan inside", "plan outside"))
def test_compiles_at_most_twice_over_lengths(outside, name):
    torch._dynamo.reset()
    counter = CompileCounter()

    def step(q, k, v, layout, plan):
        plan = neighbor_plan(layout, 1) if plan is None else plan
        return neighbor_attention(q, k, v, plan, backend=name)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for tokens in range(40, 210, 17):  # each with another number of blocks
        layout = TokenLayout.from_images([tokens, tokens - 1], [ImageSpan(0, 3, (1, 5, 6))])
        plan = neighbor_plan(layout, 1) if outside else None
        q, k, v = inputs(layout)
        torch.testing.assert_close(compiled(q, k, v, layout, plan), step(q, k, v, layout, plan))
    assert counter.frame_count <= 2


@pytest.mark.compile
def test_decoding_compiles_at_most_twice():
    torch._dynamo.reset()
    counter = CompileCounter()
    plan = neighbor_plan(LAYOUTS["left"], 1)
    step = torch.compile(neighbor_attention, fullgraph=True, backend=counter)
    for keys in range(53, 63):
        q, k, v = (torch.randn(4, h, n, 16) for h, n in ((4, 1), (2, keys), (2, keys)))
        torch.testing.assert_close(step(q, k, v, plan), neighbor_attention(q, k, v, plan))
    assert counter.frame_count <= 2


def test_autocast(backend):
    layout = LAYOUTS["right"]
    plan, _ = KINDS["radius 1"](layout, (16, 16))
    q, k, v = inputs(layout)
    expected = neighbor_attention(*(x.bfloat16() for x in (q, k, v)), plan, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        out = neighbor_attention(q, k.bfloat16(), v, plan, backend=backend)
        wide = neighbor_attention(q.double(), k.double(), v.double(), plan, backend="reference")
    assert torch.equal(out, expected) and wide.dtype == torch.float64
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        out = neighbor_attention(*leaves, plan, backend=backend)
    assert all(x.dtype == torch.float32 for x in torch.autograd.grad(out.float().square().sum(), leaves))


def test_backend_that_cannot_run_says_why():
    plan = neighbor_plan(LAYOUTS["right"], 1)
    q, k, v = (x.double() for x in inputs(LAYOUTS["right"]))
    with pytest.raises(RuntimeError, match="neighbor_attention: backend 'compiled' cannot run: "):
        neighbor_attention(q, k, v, plan, backend="compiled")


# --- merge_attention ---

GROUPS = {
    "text, visual": lambda layout: ["text", "visual"],
    "visual alone": lambda layout: ["visual"],
    "three": lambda layout: ["text", *halves(layout.visual)],
    "four": lambda layout: [*halves(layout.valid & ~layout.visual), *halves(layout.visual)],
    "one of nothing": lambda layout: ["text", "visual", torch.zeros_like(layout.valid)],
}


def halves(mask):
    first = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(2)) < 0.5)
    return first, mask & ~first


def groups(layout, keys, q, k, v, backend=None, radius=1):
    results = [
        neighbor_attention(q, k, v, neighbor_plan(layout, radius, keys=group), return_lse=True, backend=backend)
        for group in keys
    ]
    return [out for out, _ in results], [lse for _, lse in results]


@pytest.mark.parametrize("name", ("left", "packed", "taken", "taken, room behind", "text", "no tokens"))
@pytest.mark.parametrize("which", [name for name in GROUPS if name != "visual alone"])
def test_groups_make_the_whole(which, name):
    """In float64, with gradients through outs and lses."""
    layout = LAYOUTS[name]
    leaves = [x.double().requires_grad_() for x in inputs(layout)]
    out, lse = merge_attention(*groups(layout, GROUPS[which](layout), *leaves))
    exact, exact_lse = dense(layout, oracle.neighbor_mask(layout, 1), *leaves)
    torch.testing.assert_close(out, exact)
    torch.testing.assert_close(lse, exact_lse)
    weight, weight_lse = torch.randn_like(out), torch.randn_like(lse)

    def loss(out, lse):
        return (out * weight).sum() + (torch.where(lse.isfinite(), lse, 0) * weight_lse).sum()

    for a, b in zip(torch.autograd.grad(loss(out, lse), leaves), torch.autograd.grad(loss(exact, exact_lse), leaves)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_half(dtype, backend):
    """16-bit outputs of groups are rounded once each, and once after the sum."""
    layout = LAYOUTS["left"]
    q, k, v = inputs(layout, dtype=dtype)
    outs, lses = groups(layout, ["text", "visual"], q, k, v, backend)
    out, lse = merge_attention(outs, lses)
    assert out.dtype == dtype and lse.dtype == torch.float32
    exact, _ = merge_attention([x.double() for x in outs], [x.double() for x in lses])
    plain, _ = merge_attention([x.float() for x in outs], lses)
    within_budget(out, exact, plain)
    mask = oracle.neighbor_mask(layout, 1)
    torch.testing.assert_close(
        out.double(), dense(layout, mask, q, k, v)[0], rtol=0, atol=4 * torch.finfo(dtype).eps * 4
    )


def made_up(batch=2, heads=3, queries=5, dim=4, count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    outs = [torch.randn(batch, heads, queries, dim, generator=g, dtype=torch.float64) for _ in range(count)]
    lses = [torch.randn(batch, heads, queries, generator=g, dtype=torch.float64) * 3 for _ in range(count)]
    coefficients = [torch.randn(batch, heads, queries, generator=g, dtype=torch.float64) for _ in range(count)]
    return outs, lses, coefficients


@pytest.mark.parametrize("renormalize", (False, True))
@pytest.mark.parametrize("given", (False, True), ids=("own weights", "coefficients"))
def test_merge_by_the_formula(given, renormalize):
    outs, lses, coefficients = made_up()
    lses[0][0, 0, 0] = lses[2][0, 0, 0] = -math.inf
    for lse in lses:
        lse[1, 1, 1] = -math.inf
    coefficients[1][0, 1, 2] = coefficients[0][0, 1, 2] = coefficients[2][0, 1, 2] = 0
    out, lse = merge_attention(outs, lses, coefficients if given else None, renormalize)
    for index in ((b, h, i) for b in range(2) for h in range(3) for i in range(5)):
        values = [x[index].item() for x in lses]
        there = [g for g in range(3) if values[g] > -math.inf]
        if not there:
            assert lse[index] == -math.inf and not out[index].any()
            continue
        total = math.log(sum(math.exp(values[g]) for g in there))
        c = {g: coefficients[g][index].item() if given else math.exp(values[g] - total) for g in there}
        if renormalize:
            c = {g: (x / sum(c.values()) if sum(c.values()) else 0.0) for g, x in c.items()}
        expected = sum(c[g] * outs[g][index] for g in there)
        torch.testing.assert_close(lse[index], torch.tensor(total, dtype=torch.float64))
        torch.testing.assert_close(out[index], expected)


def test_what_no_group_saw_may_be_anything():
    outs, lses, coefficients = made_up()
    for g, (out, lse) in enumerate(zip(outs, lses)):
        lse[0, 0, : g + 1] = -math.inf
        out[0, 0, : g + 1] = math.nan
        coefficients[g][0, 0, : g + 1] = math.nan
    for weights in (None, coefficients):
        for renormalize in (False, True):
            leaves = [x.clone().requires_grad_() for x in (*outs, *lses)]
            out, lse = merge_attention(leaves[:3], leaves[3:], weights, renormalize)
            assert out.isfinite().all() and not out[0, 0, 0].any() and lse[0, 0, 0] == -math.inf
            assert lse[0, 0, 1:].isfinite().all()
            grads = torch.autograd.grad(out.square().sum() + torch.where(lse.isfinite(), lse, 0).sum(), leaves)
            assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize("renormalize", (False, True))
@pytest.mark.parametrize("given", (False, True))
def test_merge_gradcheck(given, renormalize):
    outs, lses, coefficients = made_up(1, 1, 2, 2)
    leaves = [x.requires_grad_() for x in (*outs, *lses, *(coefficients if given else []))]

    def function(*leaves):
        return merge_attention(leaves[:3], leaves[3:6], leaves[6:] or None, renormalize)

    assert torch.autograd.gradcheck(function, leaves)


def test_merge_packed_equals_padded():
    outs, lses, coefficients = made_up(batch=1)
    for options in ((), (coefficients,), (coefficients, True)):
        out, lse = merge_attention(outs, lses, *options)
        flat = [[c[0] for c in options[0]]] if options else []
        packed = merge_attention([x[0].transpose(0, 1) for x in outs], [x[0] for x in lses], *flat, *options[1:])
        assert torch.equal(packed[0].transpose(0, 1)[None], out) and torch.equal(packed[1][None], lse)


# --- wrong calls ---

LAYOUT = TokenLayout.from_images([20, 20], [ImageSpan(0, 2, (1, 3, 4))])
PLAN = neighbor_plan(LAYOUT, 1)
PACKED_PLAN = neighbor_plan(TokenLayout.from_images([12, 8], packed=True), 1)
Q, K, V = torch.zeros(2, 4, 20, 16), torch.zeros(2, 2, 20, 16), torch.zeros(2, 2, 20, 16)
FLAT = {"q": Q[0].transpose(0, 1), "k": K[0].transpose(0, 1), "v": V[0].transpose(0, 1), "plan": PACKED_PLAN}
MASKED = neighbor_plan(LAYOUT, 1, keys=LAYOUT.visual)
WRONG = [
    ({"plan": LAYOUT}, TypeError, "plan"),
    ({"plan": None}, TypeError, "plan"),
    ({"q": [1.0]}, TypeError, "q"),
    ({"k": None}, TypeError, "k"),
    ({"v": 1}, TypeError, "v"),
    ({"q": Q.to_sparse()}, TypeError, "q"),
    ({"q": Q.int(), "k": K.int(), "v": V.int()}, TypeError, "q"),
    ({"k": K.half()}, TypeError, "k"),
    ({"v": V.double()}, TypeError, "v"),
    ({"q": Q[0]}, ValueError, "q"),
    ({"k": K[0]}, ValueError, "k"),
    ({"v": V[..., None]}, ValueError, "v"),
    ({"v": V[:, :1]}, ValueError, "v"),
    ({"v": V[:, :, :19]}, ValueError, "v"),
    ({"v": V[..., :8]}, ValueError, "v"),
    ({"k": K[..., :8], "v": V[..., :8]}, ValueError, "k"),
    ({"q": Q[..., :12], "k": K[..., :12], "v": V[..., :12]}, ValueError, "q"),
    ({"q": Q[..., :0], "k": K[..., :0], "v": V[..., :0]}, ValueError, "q"),
    ({n: x.repeat(1, 1, 1, 17) for n, x in (("q", Q), ("k", K), ("v", V))}, ValueError, "q"),
    ({"q": Q[:, :3]}, ValueError, "q"),
    ({"k": K[:, :0], "v": V[:, :0]}, ValueError, "q"),
    ({"q": Q[:1]}, ValueError, "q"),
    ({"k": K[:1], "v": V[:1]}, ValueError, "k"),
    ({"q": Q.to("meta")}, ValueError, "q"),
    ({"k": K[:, :, :19], "v": V[:, :, :19]}, ValueError, "k"),
    ({"q": torch.zeros(2, 4, 21, 16)}, ValueError, "q"),
    ({"plan": PLAN.tail(1, 20)}, ValueError, "q, k and k_lengths"),
    ({"plan": MASKED, "k": torch.zeros(2, 2, 21, 16), "v": torch.zeros(2, 2, 21, 16)}, ValueError, "num_keys"),
    ({"scale": "auto"}, TypeError, "scale"),
    ({"scale": True}, TypeError, "scale"),
    ({"scale": torch.ones(())}, TypeError, "scale"),
    ({"k_bias": [0.0]}, TypeError, "k_bias"),
    ({"k_bias": torch.zeros(2, 20).int()}, TypeError, "k_bias"),
    ({"k_bias": torch.zeros(2, 19)}, ValueError, "k_bias"),
    ({"k_bias": torch.zeros(20)}, ValueError, "k_bias"),
    ({"k_bias": torch.zeros(2, 20, device="meta")}, ValueError, "k_bias"),
    ({"visual_heads": [True] * 4}, TypeError, "visual_heads"),
    ({"visual_heads": torch.ones(4)}, TypeError, "visual_heads"),
    ({"visual_heads": torch.ones(2).bool()}, ValueError, "visual_heads"),
    ({"visual_heads": torch.ones(2, 4).bool()}, ValueError, "visual_heads"),
    ({"visual_heads": torch.ones(4, device="meta").bool()}, ValueError, "visual_heads"),
    ({"visual_mass": "share"}, ValueError, "visual_mass"),
    ({"visual_mass": True}, ValueError, "visual_mass"),
    ({"visual_rows": None}, ValueError, "visual_rows"),
    ({"visual_rows": "drop"}, ValueError, "visual_rows"),
    ({"return_lse": 1}, TypeError, "return_lse"),
    ({"k_lengths": 20}, TypeError, "k_lengths"),
    ({"k_lengths": torch.tensor([20.0, 20.0])}, TypeError, "k_lengths"),
    ({"k_lengths": torch.tensor([20])}, ValueError, "k_lengths"),
    ({"k_lengths": torch.tensor([20, 21])}, ValueError, "k_lengths"),
    ({**FLAT, "q": Q}, ValueError, "q"),
    ({**FLAT, "q": FLAT["q"][:19]}, ValueError, "q and k"),
    ({**FLAT, "k": FLAT["k"][:19], "v": FLAT["v"][:19]}, ValueError, "q and k"),
    ({**FLAT, "k_bias": torch.zeros(1, 20)}, ValueError, "k_bias"),
    ({**FLAT, "k_lengths": torch.tensor([20])}, ValueError, "k_lengths"),
    ({"backend": "cuda"}, ValueError, "backend"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_wrong_arguments(number):
    arguments, error, name = WRONG[number]
    with pytest.raises(error, match=rf"(neighbor_attention|tail): {name}\b"):
        neighbor_attention(**{"q": Q, "k": K, "v": V, "plan": PLAN, **arguments})


OUT, LSE = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5)
WRONG_MERGE = [
    (([], []), ValueError, "outs must be as many"),
    (([OUT], [LSE, LSE]), ValueError, "outs must be as many"),
    (([OUT], [LSE], []), ValueError, "coefficients must be as many"),
    (([OUT], [LSE], [LSE, LSE]), ValueError, "coefficients must be as many"),
    (([1], [LSE]), TypeError, r"outs\[0\] must be a tensor"),
    (([OUT.long()], [LSE]), TypeError, r"outs\[0\] must have dtype"),
    (([OUT[0, 0]], [LSE]), ValueError, r"outs\[0\] must have"),
    (([OUT, OUT[:1]], [LSE, LSE]), ValueError, r"outs\[1\] must be shaped"),
    (([OUT, OUT.to("meta")], [LSE, LSE]), ValueError, r"outs\[1\] must be on"),
    (([OUT, OUT.half()], [LSE, LSE]), TypeError, r"outs\[1\] must have"),
    (([OUT], [None]), TypeError, r"lses\[0\] must be a tensor"),
    (([OUT], [LSE.long()]), TypeError, r"lses\[0\] must have dtype"),
    (([OUT], [LSE[..., None]]), ValueError, r"lses\[0\] must be \[batch, heads, queries\]"),
    (([OUT[0]], [LSE[0]]), ValueError, r"lses\[0\] must be \[heads, tokens\]"),
    (([OUT], [LSE.to("meta")]), ValueError, r"lses\[0\] must be on"),
    (([OUT], [LSE], [0.5]), TypeError, r"coefficients\[0\] must be a tensor"),
    (([OUT], [LSE], [LSE[:1]]), ValueError, r"coefficients\[0\] must be"),
    (([OUT], [LSE], None, 1), TypeError, "renormalize must be"),
    ((OUT, [LSE]), TypeError, "outs must be a list"),
    (([OUT], LSE), TypeError, "lses must be a list"),
    (([OUT], [LSE], LSE), TypeError, "coefficients must be a list"),
]


@pytest.mark.parametrize("number", range(len(WRONG_MERGE)))
def test_wrong_arguments_of_merge(number):
    arguments, error, message = WRONG_MERGE[number]
    with pytest.raises(error, match=f"merge_attention: {message}"):
        merge_attention(*arguments)


def test_window_plan_is_attention_in_windows(backend):
    """Against attention of each window cut out on its own."""
    layout = TokenLayout.from_images([48], [ImageSpan(0, 0, (1, 6, 8))])
    q, k, v = inputs(layout, 2, 2)
    plan, _ = window((1, 3, 4))(layout, (16, 16))
    out = neighbor_attention(q, k, v, plan, backend=backend)

    def cut(x):
        return x.reshape(1, 2, 2, 3, 2, 4, 16).permute(0, 1, 2, 4, 3, 5, 6).reshape(1, 2, 4, 12, 16)

    plain = torch.nn.functional.scaled_dot_product_attention(cut(q), cut(k), cut(v))
    exact = torch.nn.functional.scaled_dot_product_attention(*(cut(x).double() for x in (q, k, v)))
    within_budget(cut(out), exact, plain)


def test_subset_of_a_selection(backend):
    """Attention among selected tokens is attention of the compacted sequence; the others get 0."""
    layout = TokenLayout.from_images([40, 31])
    selection = Selection.from_mask(torch.rand(2, 40) < 0.4)
    q, k, v = inputs(layout)
    out = neighbor_attention(q, k, v, pyvtk.subset_plan(layout, selection), backend=backend)
    taken = pyvtk.compact(selection, q, k, v, dim=2)
    small = neighbor_attention(*taken, neighbor_plan(layout.take(selection), 0), backend=backend)
    kept = selection.mask() & layout.valid
    torch.testing.assert_close(pyvtk.compact(selection, out, dim=2), small)
    assert not out.transpose(1, 2)[~kept].any()
