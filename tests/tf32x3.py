"""float32 products as Triton's input_precision="tf32x3" forms them on tensor cores: a model for its interpreter.

A factor is cut into ``big``, its value rounded to the 11 bits of TensorFloat32 (to nearest, ties away from 0), and
what is left, ``small``; tensor cores read 11 bits of that too and drop the rest. Three products, small * big, big *
small and big * big, are added up one after the other, and c is added to them in float32. Tensor cores multiply exactly
and add some products to the sum at a time, 8 in this model. What they add is aligned to the largest of these terms and
chopped: to the 24 bits of float32 here, the least of all devices.
"""

from __future__ import annotations

import numpy as np

STEP = 8
_DROPPED = np.int32((1 << 13) - 1)  # bits of a float32 that TensorFloat32 does not have


def rounded(x: np.ndarray) -> np.ndarray:
    """cvt.rna.tf32.f32"""
    return np.where(np.isfinite(x), chopped((x.view(np.int32) + np.int32(1 << 12)).view(np.float32)), x)


def chopped(x: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32."""
    return np.where(np.isfinite(x), (x.view(np.int32) & ~_DROPPED).view(np.float32), x)


def _toward_zero(x: np.ndarray) -> np.ndarray:
    near = x.astype(np.float32)
    return np.where(np.isfinite(x) & (np.abs(near) > np.abs(x)), np.nextafter(near, np.float32(0)), near)


def added(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """sums [M, N] and the products of a [M, K] and b [K, N], as a tensor core adds them."""
    a, columns = a.astype(np.float64), b.T.astype(np.float64)
    for k in range(0, a.shape[1], STEP):
        terms = a[:, None, k : k + STEP] * columns[None, :, k : k + STEP]
        terms = np.concatenate([terms, sums[..., None].astype(np.float64)], -1)
        _, exponent = np.frexp(np.abs(terms).max(-1, keepdims=True))
        place = np.ldexp(1.0, exponent - 24)  # of the last bit that is looked at
        terms = np.where(np.isfinite(terms), np.trunc(terms / place) * place, terms)
        sums = _toward_zero(terms.sum(-1))
    return sums


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a [M, K] times b [K, N] plus c."""
    with np.errstate(invalid="ignore", over="ignore"):
        big_a, big_b = rounded(a), rounded(b)
        small_a, small_b = chopped(a - big_a), chopped(b - big_b)
        sums = added(big_a, small_b, added(small_a, big_b, np.zeros_like(c)))
        # an infinite factor has no small part: inf - inf
        return added(big_a, big_b, np.where(np.isnan(sums), np.float32(0), sums)) + c


def emulate() -> None:
    """From now on Triton's interpreter multiplies so where a kernel says tf32x3."""
    from triton.runtime import interpreter

    usual = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if input_precision.name != "TF32x3":
            return usual(self, a, b, d, input_precision, max_num_imprecise_acc)
        return interpreter.TensorHandle(product(a.data, b.data, d.data), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
