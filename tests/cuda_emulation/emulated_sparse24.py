"""The operators of sparse24 by the emulated CUDA kernels."""

from __future__ import annotations

import ctypes

import torch
from emulated import DTYPES, Call, Exact, number
from torch import Tensor

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")


def strided(call: Call, tensor: Tensor, stride: int, offset: int) -> ctypes.c_void_p:
    """A copy of the matrix that starts ``offset`` elements behind an aligned address, rows ``stride`` apart."""
    rows, columns = tensor.shape
    memory = torch.zeros(offset + max(rows - 1, 0) * stride + (columns if rows else 0), dtype=tensor.dtype)
    memory[offset:].as_strided((rows, columns), (stride, 1)).copy_(tensor) if tensor.numel() else None
    pointer = call.pointer(memory)
    pointer.value += offset * tensor.element_size()
    return pointer


def linear(
    x: Tensor, values: Tensor, metadata: Tensor, scales: Tensor | None, bias: Tensor | None, mul: Tensor | None,
    activation: str, *, few: bool | None, int8: bool = False, x_scale: Tensor | None = None,
    x_stride: int | None = None, offset: int = 0, multiprocessors: int = 4, wgmma: bool = False,
) -> tuple[Tensor, tuple[bool, int, int, int]]:  # fmt: skip
    """sparse24_linear, or sparse24_linear_int8; and what the plan was: few or not, rows of a tile, splits, tile
    of wgmma (-1: another kernel).

    few: whether the kernel for few rows is asked for; None: as the number of rows says.
    x_stride: elements between rows of x (and of mul, past its own length). offset: elements, of x, values and
    metadata. wgmma: where it fits.
    """
    call = Call()
    rows, depth = x.shape
    features = values.shape[0]
    x_stride = depth if x_stride is None else x_stride
    out = Exact(torch.full((rows, features), float("nan"), dtype=x.dtype))
    taken = (ctypes.c_int * 4)()
    mul_stride = features + x_stride - depth
    call(
        "emulated_sparse24_linear", DTYPES.index(x.dtype), int(values.dtype == torch.int8), int(int8), number(rows),
        number(features), number(depth), strided(call, x, x_stride, offset), number(x_stride),
        strided(call, values, values.shape[1], offset), strided(call, metadata, metadata.shape[1], offset),
        call.pointer(scales), call.pointer(x_scale), call.pointer(bias),
        0 if bias is None else DTYPES.index(bias.dtype),
        call.pointer(None) if mul is None else strided(call, mul, mul_stride, 0), number(mul_stride),
        ACTIVATIONS.index(activation), ctypes.c_void_p(out.address), -1 if few is None else int(few),
        int(wgmma), multiprocessors, taken,
    )  # fmt: skip
    return out.read(), (bool(taken[0]), *taken[1:])


def compress(weight: Tensor, mask: Tensor, trusted: bool = False) -> tuple[Tensor, Tensor, bool]:
    """sparse24_compress, and whether the mask was wrong (trusted: nobody asks)."""
    call = Call()
    features, depth = weight.shape
    values = Exact(torch.zeros(features, depth // 2, dtype=weight.dtype))
    metadata = Exact(torch.zeros(features, (depth + 7) // 8, dtype=torch.uint8))
    wrong = ctypes.c_int(0)
    call(
        "emulated_sparse24_compress", weight.element_size(), strided(call, weight, depth + 3, 1), number(depth + 3),
        strided(call, mask, depth + 1, 1), number(depth + 1), number(features), number(depth),
        ctypes.c_void_p(values.address), ctypes.c_void_p(metadata.address),
        None if trusted else ctypes.byref(wrong),
    )  # fmt: skip
    return values.read(), metadata.read(), bool(wrong.value)


def decompress(values: Tensor, metadata: Tensor, scales: Tensor | None = None) -> Tensor:
    """sparse24_decompress; with scales, float32."""
    call = Call()
    features, kept = values.shape
    dtype = values.dtype if scales is None else torch.float32
    dense = Exact(torch.zeros(features, 2 * kept, dtype=dtype))
    call(
        "emulated_sparse24_decompress", values.element_size(), call.pointer(values), call.pointer(metadata),
        call.pointer(scales), number(features), number(2 * kept), ctypes.c_void_p(dense.address),
    )  # fmt: skip
    return dense.read()
