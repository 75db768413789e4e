"""The vendor's kernel: cuSPARSELt, as torch carries it, with the weight in a packed form of its own.

It takes 16-bit products (not ``linear_int8``, whose result it would write as int32 for another launch to scale), and
weights with both sizes in multiples of 16. Rows of x may be any: the operator copies x where they are no multiple of 8.
Bias is added inside where it has x's dtype and nothing follows; else bias, activation and mul are a second launch on
the product rounded to x's dtype, as after a dense product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk import backends

DTYPES = (torch.bfloat16, torch.float16)
MULTIPLE = 16


def does_not_fit(out_features: int, in_features: int, x_dtype: torch.dtype) -> str | None:
    """Why a weight of this shape, times x of this dtype, is nothing for cuSPARSELt anywhere; None if it is."""
    if x_dtype not in DTYPES:
        return f"cuSPARSELt is used for bfloat16 and float16, not {x_dtype}"
    if not out_features or not in_features or out_features % MULTIPLE or in_features % MULTIPLE:
        return f"cuSPARSELt takes weights in multiples of {MULTIPLE}, not {out_features} x {in_features}"
    return None


def why_not(out_features: int, in_features: int, x_dtype: torch.dtype, device: torch.device) -> str | None:
    """The same on this device. Where there is a reason, a sparse kernel stands in for choice 3 (vendor)."""
    return does_not_fit(out_features, in_features, x_dtype) or backends.why_not_cusparselt(device.type)


def pack(dense: Tensor) -> Tensor:
    """A dense 2:4 weight [N, K] in cuSPARSELt's form, opaque [N, about 9 K / 16], of the same dtype."""
    return torch._cslt_compress(dense).view(dense.shape[0], -1)  # flat in some versions of torch
