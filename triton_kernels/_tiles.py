"""What the Triton kernels of several families share: rows cut in two, their products, launches.

A head dimension is cut into two powers of two (80 = 64 + 16), so that it does not pay for the next one; the second part
is empty (D2 = 0) where the first holds all.

Triton compiles a variant of a kernel for every int that is 1 or a multiple of 16, and knows nothing else of strides.
So kernels take their ints unspecialised (each family lists its NUMBERS), one variant for all sizes, and learn from one
constant, UNIT, what strides are multiples of: rows of 72 channels are loaded by 16 bytes like those of 64 or 80.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# positions before and after all others
FIRST: tl.constexpr = tl.constexpr(-(2**31))
LAST: tl.constexpr = tl.constexpr(2**31 - 1)
# in place of a scale of 0, which would make NaN of the -inf of unseen keys
SMALLEST = 1e-37
# the interpreter keeps bfloat16 as the integers of its bits and multiplies those: it gets float32 instead
_INTERPRETED: tl.constexpr = tl.constexpr(bool(triton.knobs.runtime.interpret))


# Parts of kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def in_units(batch, head, row, UNIT: tl.constexpr):
    """The same three strides, which are multiples of UNIT (:func:`unit`), as Triton can see now."""
    return batch // UNIT * UNIT, head // UNIT * UNIT, row // UNIT * UNIT


@triton.jit
def load_rows(first, offset, here, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Rows at ``first + offset``, zeros where not ``here``, in the two parts of the head dimension."""
    d1 = tl.arange(0, D1)
    if D1 <= D:
        part1 = tl.load(first + offset[:, None] + d1[None, :], mask=here[:, None], other=0.0)
    else:
        part1 = tl.load(first + offset[:, None] + d1[None, :], mask=here[:, None] & (d1 < D)[None, :], other=0.0)
    if D2 == 0:
        return part1, part1
    else:
        d2 = D1 + tl.arange(0, D2)
        if D1 + D2 <= D:
            return part1, tl.load(first + offset[:, None] + d2[None, :], mask=here[:, None], other=0.0)
        else:
            here2 = here[:, None] & (d2 < D)[None, :]
            return part1, tl.load(first + offset[:, None] + d2[None, :], mask=here2, other=0.0)


@triton.jit
def store_rows(first, offset, here, part1, part2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    d1 = tl.arange(0, D1)
    value1 = part1.to(first.dtype.element_ty)
    tl.store(first + offset[:, None] + d1[None, :], value1, mask=here[:, None] & (d1 < D)[None, :])
    if D2:
        d2 = D1 + tl.arange(0, D2)
        value2 = part2.to(first.dtype.element_ty)
        tl.store(first + offset[:, None] + d2[None, :], value2, mask=here[:, None] & (d2 < D)[None, :])


@triton.jit
def accumulate(a, b, sums, PRECISION: tl.constexpr):
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def products(a1, a2, b1, b2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Dot products of the rows of a with the rows of b."""
    sums = tl.zeros([a1.shape[0], b1.shape[0]], tl.float32)
    sums = accumulate(a1, tl.trans(b1), sums, PRECISION)
    if D2:
        sums = accumulate(a2, tl.trans(b2), sums, PRECISION)
    return sums


@triton.jit
def sum_of_rows(x, LENGTH: tl.constexpr):
    """Sums of rows of LENGTH, a power of two: neighbours first, then neighbouring sums.

    tl.sum would add in the order of the layout, which follows from how the rows were loaded: by 16 bytes, or one by one
    where strides allow no more. A sum of two has one order. Launched without enable_fp_fusion, as the first addition
    would be one instruction with a product in some layouts.
    """
    rows: tl.constexpr = x.shape[0]
    for step in tl.static_range(LENGTH.bit_length() - 1):
        x = tl.sum(tl.reshape(x, [rows, LENGTH >> (step + 1), 2]), 2)
    return tl.reshape(x, [rows])


# Launchers -----------------------------------------------------------------------------------------------------------


def parts(head_dim: int, widest: int = 256) -> tuple[int, int]:
    """A head dimension as a sum of two powers of two, the second 0 where one is as short; products need 16.

    One part is at most ``widest`` where two suffice.
    """
    one = max(16, triton.next_power_of_2(head_dim))
    if head_dim <= 16:
        return one, 0
    two = max(16, triton.next_power_of_2(head_dim - one // 2))
    return (one // 2, two) if one // 2 + two < one or one > widest else (one, 0)


def precision(capability: tuple[int, int]) -> str:
    """float32 in three products of TensorFloat32 keeps its accuracy; older devices have no such products."""
    return "tf32x3" if capability >= (8, 0) else "ieee"


def capability(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (8, 0)


# a multiplication and the addition behind it are one instruction: from Triton 3.10 on only where it is asked for
OPTIONS = {"enable_fp_fusion": True}


def launch(kernel, programs: int, arguments: dict) -> None:
    if programs > 0:
        kernel[(programs,)](**{**OPTIONS, **arguments})


def unit(element_size: int, *numbers: int) -> int:
    """The largest number of elements, 16 bytes at most, of which all ``numbers`` (strides, channels) are multiples.

    Whether a tensor begins at a multiple of 16 bytes, Triton looks up itself.
    """
    return math.gcd(16 // element_size, *numbers)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of [batch, heads, rows, channels], as kernels name them, and the UNIT of all."""
    found = {
        f"{name}_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip(("batch", "head", "row"), tensor.stride())
    }
    return {**found, "UNIT": unit(min(x.element_size() for x in tensors.values()), *found.values())}
