"""Autocast stays outside: a definition does not depend on it. The pages have cast what is to be cast."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def exact(function):
    """``function``, whose first argument is a tensor or a list of them, without autocast inside: its casts would round
    what is to be added up in float32."""

    @functools.wraps(function)
    def apart(first, *rest, **options):
        if torch._C._is_any_autocast_enabled():
            device = (first if isinstance(first, Tensor) else first[0]).device.type
            if device in ("cpu", "cuda"):  # not is_autocast_available(), which torch.compile of torch 2.11 cannot trace
                with torch.autocast(device, enabled=False):
                    return function(first, *rest, **options)
        return function(first, *rest, **options)

    return apart
