"""Plans with text="all": text sees everything and everything sees it; against dense attention, with gradients."""

import attention_oracle as oracle
import pytest
import torch
from attention_cases import BLOCKS, LAYOUTS, chosen_of, random_layouts, routing
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget
from test_plans import check
from torch.nn.functional import scaled_dot_product_attention

import pyvtk
from pyvtk import ImageSpan, TokenLayout, neighbor_plan, routed_plan, subset_plan, window_plan


def unordered(layout):
    """The layout for masks of the oracle, which goes by positions: no token is later than another."""
    return TokenLayout(
        layout.image_id, layout.coords, positions=torch.zeros_like(layout.image_id, dtype=torch.int32),
        mask=layout.mask, cu_seqlens=layout.cu_seqlens,
    )  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_masks(name):
    layout, block = LAYOUTS[name], BLOCKS[1]
    order = unordered(layout)
    for keys in ("all", "text", "visual"):
        for cross_image in (False, True):
            rule = {"keys": keys, "cross_image": cross_image}
            plan = neighbor_plan(layout, 1, text="all", block=block, **rule)
            check(plan, oracle.neighbor_mask(order, 1, **rule))
    check(window_plan(layout, 2, 1, text="all", block=block), oracle.window_mask(order, 2, 1))
    numbers, table = routing(layout)
    check(routed_plan(layout, 2, table, text="all", block=block), oracle.routed_mask(order, numbers, table))
    chosen = chosen_of(layout, 5)
    plan = subset_plan(layout, chosen, text="all", block=block)
    check(plan, oracle.subset_mask(order, chosen.mask()))


@settings(max_examples=40, deadline=None)
@given(random_layouts(), st.integers(0, 3), st.booleans())
def test_any_layout(layout, radius, cross_image):
    """By pairs: everything of a sample, but between visual tokens what lies within the radius."""
    pair, token = oracle.relations(layout)
    apart = (token["coords"][:, :, None] - token["coords"][:, None]).abs().amax(-1)
    near = pair["one image"] & (apart <= radius)
    if cross_image:
        near = near | ~pair["one image"]
    expected = pair["together"] & (~pair["both visual"] | near)
    check(neighbor_plan(layout, radius, text="all", cross_image=cross_image), expected)


def test_everything_is_dense():
    layout = TokenLayout.from_images([70], [ImageSpan(0, 5, (1, 5, 6)), ImageSpan(0, 40, (2, 3, 4))])
    plan = neighbor_plan(layout, 99, text="all", cross_image=True)
    check(plan, torch.ones((1, 70, 70), dtype=torch.bool))
    assert plan.density() == (4900, 25 * 256, 4900, False)
    assert str(plan.density()).endswith("% of dense attention; dense attention would visit fewer")
    causal = neighbor_plan(layout, 99, causal_window=True, cross_image=True).density()
    assert causal.causal and causal.needed == causal.dense == 35 * 71


def registers():
    """A ViT: class token and registers before 9 x 9 patches, of which each sees 5 x 5 and all registers."""
    layout = TokenLayout.from_images([86, 86], [ImageSpan(b, 5, (1, 9, 9)) for b in range(2)])
    return layout, neighbor_plan(layout, 2, text="all"), torch.ones(2, 86, dtype=torch.bool)


def windows():
    layout, _, valid = registers()
    return layout, window_plan(layout, 3, 1, text="all"), valid


def joint():
    """A diffusion transformer: a padded prompt behind the image, in one sequence."""
    lengths = torch.tensor([[100], [91]])
    valid = torch.arange(100) < lengths
    spans = [ImageSpan(b, 0, (1, 8, 10)) for b in range(2)]
    layout = TokenLayout.from_images([100, 91], spans)
    return layout, neighbor_plan(layout, (0, 1, 2), text="all"), valid


def dense_mask(layout, plan, valid):
    """What is visible, token by token."""
    image, coords = layout.image_id.tolist(), layout.coords.tolist()
    batch, tokens = layout.image_id.shape
    mask = torch.zeros((batch, tokens, tokens), dtype=torch.bool)
    for b in range(batch):
        for i in range(tokens):
            for j in range(tokens):
                seen = True
                if image[b][i] >= 0 and image[b][j] >= 0:
                    (_, y, x), (_, k_y, k_x) = coords[b][i], coords[b][j]
                    if plan.radius == (0, 0, 0):  # windows of 3 that begin at 1
                        seen = (y + 2) // 3 == (k_y + 2) // 3 and (x + 2) // 3 == (k_x + 2) // 3
                    else:
                        seen = abs(y - k_y) <= plan.radius[1] and abs(x - k_x) <= plan.radius[2]
                mask[b, i, j] = seen and bool(valid[b, i]) and bool(valid[b, j])
    return mask


@pytest.mark.parametrize("backend", ["compiled", "reference"])
@pytest.mark.parametrize("scene", [registers, windows, joint])
def test_attention_is_that_of_torch(scene, backend):
    """Outputs and gradients are those of dense attention under the mask, by torch, in float64."""
    layout, plan, valid = scene()
    mask = dense_mask(layout, plan, valid)[:, None]
    # padding sees nothing: its row is any row here, and is left out
    mask = mask | (~valid[:, None, :, None] & torch.eye(mask.shape[-1], dtype=torch.bool))
    tokens = layout.num_tokens
    q, k, v, weight = (torch.randn(2, 3, tokens, 32) for _ in range(4))
    weight = weight * valid[:, None, :, None]

    def run(attend, dtype):
        given = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*given) * valid[:, None, :, None]
        return out, *torch.autograd.grad((out * weight.to(dtype)).sum(), given)

    def dense(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    actual = run(lambda *x: pyvtk.neighbor_attention(*x, plan, backend=backend), torch.float32)
    expected, plain = run(dense, torch.float64), run(dense, torch.float32)
    for a, e, p in zip(actual, expected, plain):
        assert_within_budget(a, e, p)


def test_what_follows_is_later():
    """tail adds tokens that see all, and that the others do not see."""
    layout = TokenLayout.from_images([20], [ImageSpan(0, 2, (1, 3, 4))])
    plan = neighbor_plan(layout, 1, text="all")
    check(plan.tail(1, 21), torch.ones((1, 1, 21), dtype=torch.bool))
    whole = torch.ones((1, 22, 22), dtype=torch.bool).tril()
    whole[:, :20, :20] = oracle.neighbor_mask(unordered(layout), 1)
    check(plan.tail(22, 22), whole)


def test_positions_do_not_matter():
    layout = TokenLayout.from_images([20], [ImageSpan(0, 2, (1, 3, 4))])
    far = TokenLayout(layout.image_id, layout.coords, positions=torch.arange(20)[None].flip(1) * 2**40)
    for a, b in zip(neighbor_plan(layout, 1, text="all").tensors(), neighbor_plan(far, 1, text="all").tensors()):
        assert torch.equal(a, b)


LAYOUT = TokenLayout.from_images([20], [ImageSpan(0, 2, (1, 3, 4))])


@pytest.mark.parametrize(
    "message, call",
    [
        ("neighbor_plan: text must be one of 'causal', 'all', got 'no'", lambda: neighbor_plan(LAYOUT, 1, text="no")),
        ("neighbor_plan: text must be one of", lambda: neighbor_plan(LAYOUT, 1, text=None)),
        ("neighbor_plan: causal_window must be False where text is 'all', got True",
         lambda: neighbor_plan(LAYOUT, 1, text="all", causal_window=True)),
        ("window_plan: text must be one of", lambda: window_plan(LAYOUT, 1, text=True)),
        ("routed_plan: text must be one of",
         lambda: routed_plan(LAYOUT, 1, torch.zeros(1, 12, 1, dtype=torch.int64), text="")),
        ("subset_plan: text must be one of", lambda: subset_plan(LAYOUT, chosen_of(LAYOUT, 0), text="visual")),
    ],
)  # fmt: skip
def test_wrong_arguments(message, call):
    with pytest.raises(ValueError, match=message):
        call()
