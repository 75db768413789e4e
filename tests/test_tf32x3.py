"""The models of what a GPU computes: tf32x3, and how far off its products may be; exponents."""

import numpy as np
import pytest
import tf32x3
import torch
from support import Exponents, TF32x3

EPS = 2.0**-23


def off(a, b) -> tuple[float, float]:
    """Largest error of the model's product, in float32 roundings of the sum of magnitudes, and what it may be."""
    error = np.abs(tf32x3.product(a, b, np.zeros((len(a), b.shape[1]), np.float32)) - a.astype(float) @ b.astype(float))
    return (error / (np.abs(a).astype(float) @ np.abs(b).astype(float))).max() / EPS, TF32x3.roundings(a.shape[1])


@pytest.mark.parametrize("length", (8, 16, 64, 128))
@pytest.mark.parametrize("signs", (False, True))
def test_error_stays_within_the_bound(length, signs):
    random = np.random.default_rng(length)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((64, length), (length, 64)))
    error, bound = off(a, b) if signs else off(np.abs(a), np.abs(b))
    assert error <= bound


def test_each_part_of_the_bound_is_reached():
    once = np.ones((1, 8), np.float32)
    halves = once * (1 + 2**-11)
    assert 1.9 < off(halves, halves.T)[0] < 2.1  # small * small
    bits = once * np.float32(1 + 2**-11 - 2**-23)  # of which small has 12
    assert 3.8 < off(bits, bits.T)[0] < 4.1
    dust = np.ones((1, 128), np.float32)
    dust[0, 1:] = 2.0**-23 * (1 - 2**-10)  # each is chopped away from a sum of 1
    error, bound = off(dust, np.ones((128, 1), np.float32))
    assert 125 < error <= bound < 170


def test_one_product_is_far_outside():
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((64, 64), (64, 64)))
    once = tf32x3.added(tf32x3.rounded(a), tf32x3.rounded(b), np.zeros((64, 64), np.float32))
    error = np.abs(once - a.astype(float) @ b.astype(float)) / (np.abs(a) @ np.abs(b))
    assert error.max() / EPS > 5 * TF32x3.roundings(64)


def test_infinities_and_nan():
    a = np.array([[np.inf, 1], [-np.inf, 1], [np.nan, 1], [np.inf, -np.inf]], np.float32)
    found = tf32x3.product(a, np.ones((2, 1), np.float32), np.zeros((4, 1), np.float32))
    np.testing.assert_array_equal(found[:, 0], [np.inf, -np.inf, np.nan, np.nan])


def test_mode_reaches_products_and_gradients():
    a, b = (torch.randn(5, 16, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def results():
        out = a @ b
        return out, *torch.autograd.grad(out.sum(), (a, b))

    exact = results()
    with TF32x3():
        inexact = results()
    limits = (a.abs() @ b.abs(), torch.ones_like(b) @ b.mT.abs(), a.mT.abs() @ torch.ones_like(a))
    for x, y, limit in zip(exact, inexact, limits):
        torch.testing.assert_close(
            (x - y).abs() / limit, torch.full_like(x, TF32x3.roundings(16) * EPS), rtol=1e-6, atol=0
        )


def test_exponents_are_off_by_what_is_said():
    a, b = (torch.randn(5, 16, 16, dtype=torch.float64) for _ in range(2))
    with Exponents():
        found = a @ b, a - b, a.exp(), b.abs().log(), a + b, a.where(a > 0, -torch.inf).exp()
    share = torch.ones_like(a)
    for x, y, limit in zip(
        (a @ b, a - b, a.exp(), b.abs().log()),
        found,
        (a.abs() @ b.abs(), (a.abs() + b.abs()) / 2, 2 * a.exp(), b.abs().log().abs()),
    ):
        torch.testing.assert_close((x - y).abs() / limit, share * EPS, rtol=1e-6, atol=0)
    assert torch.equal(found[4], a + b) and torch.equal(found[5] > 0, a > 0)
