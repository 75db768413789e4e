"""Cosine similarity at full precision, for the methods that compare tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """[batch, n, m], float32 (float64 for float64), of x [batch, n, channels] and y [batch, m, channels].

    A row of zeros is at 0 from all. Autocast stays outside: in 16 bits hundreds of tokens would tie.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.device.type in ("cpu", "cuda"):  # not is_autocast_available(), which torch.compile of torch 2.11 cannot trace
        with torch.autocast(x.device.type, enabled=False):
            return _product(x.to(wide), y.to(wide))
    return _product(x.to(wide), y.to(wide))


def _product(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT
