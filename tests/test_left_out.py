"""What is left out, masked or padding may hold NaN and infinities: neither results nor gradients know of it."""

import pytest
import torch
from entry_points import chosen, starts
from torch import Tensor

import pyvtk

NAN, INF = float("nan"), float("inf")


def merge(mean, both):
    assignment = torch.tensor([[0, -1, 2, 2, -1, 0, 3, 3], [1, 1, -1, 0, -7, 2, 2, -1]])
    weights = torch.rand(2, 8) + 0.5
    weights[0, 6:] = torch.tensor([1.0, -1.0])  # a group whose weights sum to 0 is 0 as a mean
    hidden = assignment < 0
    hidden_x = hidden | (mean & (assignment == 3))
    tensors = {"x": torch.randn(2, 8, 4), "weights": weights}
    left_out = {"x": hidden_x, "weights": hidden}
    if both:
        tensors["sizes"], left_out["sizes"] = torch.ones(2, 8), hidden

    def run(backend, **tensors):
        reduce = "mean" if mean else "sum"
        return pyvtk.merge_tokens(tensors.pop("x"), assignment, num_groups=4, reduce=reduce, backend=backend, **tensors)

    return run, tensors, left_out


def restore(with_gate):
    selection = pyvtk.Selection.from_indices(torch.tensor([[3, 0, 5, 0], [1, 1, 4, 2]]), 7, counts=torch.tensor([3, 2]))
    tensors = {"update": torch.randn(2, 4, 3), "base": torch.randn(2, 7, 3)}
    left_out = {"update": ~selection.valid}
    if with_gate:
        tensors["gate"], left_out["gate"] = torch.rand(2, 4), ~selection.valid
    else:
        left_out["base"] = selection.mask()
    return lambda backend, **tensors: pyvtk.restore(selection, backend=backend, **tensors), tensors, left_out


def compact():
    selection = chosen()
    return (
        lambda backend, x: pyvtk.compact(selection, x, backend=backend),
        {"x": torch.randn(2, 12, 3)},
        {"x": ~selection.mask()},
    )


def scores(function, **options):
    q_mask, k_mask = torch.tensor([[True, False, True], [False, True, True]]), torch.rand(2, 9) < 0.6
    k_mask[:, 0] = True
    tensors = {
        "q": torch.randn(2, 4, 3, 16), "k": torch.randn(2, 2, 9, 16), "k_bias": torch.randn(2, 9),
        "lse": torch.randn(2, 4, 3) + 5,
    }  # fmt: skip
    left_out = {
        "q": ~q_mask[:, None].expand(2, 4, 3), "k": ~k_mask[:, None].expand(2, 2, 9), "k_bias": ~k_mask,
        "lse": ~q_mask[:, None].expand(2, 4, 3),
    }  # fmt: skip
    if options.pop("own_lse", False) or options.get("quantity") == "logit":
        del tensors["lse"], left_out["lse"]

    def run(backend, q, k, **tensors):
        if function == "score_and_select":
            return pyvtk.score_and_select(
                q, k, 3, q_mask=q_mask, k_mask=k_mask, return_scores=True, backend=backend, **tensors, **options
            )[1]
        return pyvtk.attention_scores(q, k, q_mask=q_mask, k_mask=k_mask, backend=backend, **tensors, **options)

    return run, tensors, left_out


def attention(packed):
    bias_hidden = torch.zeros(2, 12, dtype=torch.bool)
    if packed:
        span = [pyvtk.ImageSpan(0, 1, (1, 2, 2))]
        whole = pyvtk.TokenLayout.from_images([8], span)
        tokens = pyvtk.TokenLayout(whole.image_id[0], whole.coords[0], cu_seqlens=starts(6))  # two behind the sample
    else:
        spans = [pyvtk.ImageSpan(0, 2, (1, 2, 3)), pyvtk.ImageSpan(1, 1, (1, 2, 2))]
        tokens = pyvtk.TokenLayout.from_images([12, 8], spans)
        bias_hidden[0, 3] = True
    plan, valid = pyvtk.neighbor_plan(tokens, 1), tokens.valid
    heads, kv_heads = ((8, 4), (8, 2)) if packed else ((2, 4, 12), (2, 2, 12))
    tensors = {"q": torch.randn(*heads, 16), "k": torch.randn(*kv_heads, 16), "v": torch.randn(*kv_heads, 16)}
    shown = valid if packed else valid & ~bias_hidden
    unseen = ~shown[:, None].expand(kv_heads)
    left_out = {"q": ~valid[:, None].expand(heads), "k": unseen, "v": unseen}
    k_bias = torch.zeros(8) if packed else torch.where(bias_hidden, -INF, 0.0)
    return (
        lambda backend, q, k, v: pyvtk.neighbor_attention(q, k, v, plan, k_bias=k_bias, backend=backend),
        tensors, left_out,
    )  # fmt: skip


def merge_attention(renormalize):
    lses = [torch.randn(2, 4, 3) for _ in range(2)]
    lses[0][0, 1] = -INF
    lses[1][1, :, 2] = -INF
    hidden = [lse == -INF for lse in lses]
    tensors, left_out = {}, {}
    for i in range(2):
        tensors[f"out{i}"], left_out[f"out{i}"] = torch.randn(2, 4, 3, 16), hidden[i]
        tensors[f"coefficient{i}"], left_out[f"coefficient{i}"] = torch.rand(2, 4, 3), hidden[i]

    def run(backend, out0, coefficient0, out1, coefficient1):
        coefficients = [coefficient0, coefficient1]
        return pyvtk.merge_attention([out0, out1], lses, coefficients, renormalize, backend=backend)[0]

    return run, tensors, left_out


CASES = {
    "mean": lambda: merge(True, False), "sum": lambda: merge(False, False), "mean, sizes": lambda: merge(True, True),
    "sum, sizes": lambda: merge(False, True), "restore": lambda: restore(False), "restore, gate": lambda: restore(True),
    "compact": compact, "scores": lambda: scores("attention_scores", own_lse=True),
    "scores, lse": lambda: scores("attention_scores"),
    "scores, maxima": lambda: scores("attention_scores", query_reduce="max", head_reduce="max"),
    "logits": lambda: scores("attention_scores", quantity="logit", query_reduce=("mean", "max")),
    "score and select": lambda: scores("score_and_select"), "attention": lambda: attention(False),
    "attention, packed": lambda: attention(True), "merge attention": lambda: merge_attention(False),
    "merge attention, renormalized": lambda: merge_attention(True),
}  # fmt: skip


def filled(tensors: dict, left_out: dict, value: float) -> dict:
    return {
        name: x.masked_fill(
            left_out[name].reshape(*left_out[name].shape, *[1] * (x.dim() - left_out[name].dim())), value
        ).requires_grad_()
        if name in left_out
        else x.clone().requires_grad_()
        for name, x in tensors.items()
    }


def gradients(run, tensors: dict, backend: str) -> tuple[Tensor, list]:
    out = run(backend, **tensors)
    weight = torch.linspace(-1, 2, out.numel()).reshape(out.shape)
    finite = torch.where(out.isfinite(), out, 0)  # logits of a key that nobody sees are -inf
    return out, torch.autograd.grad((finite * weight).sum(), list(tensors.values()))


@pytest.mark.parametrize("value", (NAN, INF, -INF))
@pytest.mark.parametrize("backend", ("compiled", "reference"))
@pytest.mark.parametrize("case", CASES)
def test_left_out_reaches_nothing(case, backend, value):
    run, tensors, left_out = CASES[case]()
    assert all(flags.any() for name, flags in left_out.items())
    expected, expected_gradients = gradients(run, filled(tensors, left_out, 0), backend)
    out, found = gradients(run, filled(tensors, left_out, value), backend)
    torch.testing.assert_close(out, expected)
    for name, gradient, clean in zip(tensors, found, expected_gradients, strict=True):
        assert gradient.isfinite().all(), name
        torch.testing.assert_close(gradient, clean, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_gradients_of_padding_reach_nothing(backend):
    """What arrives at slots without a token."""
    selection = pyvtk.Selection.from_indices(torch.tensor([[3, 0, 5]]), 7, counts=torch.tensor([2]))
    x = torch.randn(1, 7, 3, requires_grad=True)
    arriving = torch.ones(1, 3, 3)
    arriving[0, 2] = NAN
    (gradient,) = torch.autograd.grad(pyvtk.compact(selection, x, backend=backend), x, arriving)
    expected = torch.zeros(1, 7, 3)
    expected[0, [3, 0]] = 1
    assert torch.equal(gradient, expected)
