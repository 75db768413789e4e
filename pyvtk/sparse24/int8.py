"""2:4 weights of int8: quantisation, scales of activations, and training that sees the rounding (GPUSQ-ViT)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pyvtk import checks
from pyvtk.sparse24.copies import has_values
from pyvtk.sparse24.format import Sparse24Weight
from pyvtk.sparse24.functions import LARGEST, rounded
from pyvtk.sparse24.pruning import watch_inputs

# What max |x| / 127 is at least, the smallest normal float32. Below, a scale has so few bits that its multiples are far
# from x, or is 0; such numbers become zeros.
SMALLEST = torch.finfo(torch.float32).tiny


def scale_of(largest: Tensor) -> Tensor:
    """float32: largest / 127; 1 for zeros, and for numbers so small that they become zeros."""
    scale = largest / LARGEST
    return torch.where(scale < SMALLEST, 1, scale)


def row_scales(weight: Tensor) -> Tensor:
    """float32 [rows, 1]: max |weight| / 127 of each row, 1 for a row of zeros (or of numbers below 1.5e-36)."""
    wide = weight.detach().float()
    return scale_of(wide.abs().amax(-1, keepdim=True) if weight.shape[-1] else wide.new_zeros((*weight.shape[:-1], 1)))


def quantize(weight: Sparse24Weight) -> Sparse24Weight:
    """The weight with int8 values and one scale per output channel: value = clamp(round(w / scale), -127, 127), half to
    even, scale = max |w| / 127 of the channel (1 for a channel of zeros, and for one below 1.5e-36, which becomes
    zeros).

    Args:
        weight: of floating values, all finite.

    Returns:
        int8 values, the same metadata and choice; no dense copy and no transpose.

    Raises:
        TypeError: not a Sparse24Weight, or int8 already. ValueError: a value that is not finite.
    """
    op = "sparse24.quantize"
    if not isinstance(weight, Sparse24Weight):
        raise TypeError(f"{op}: weight must be a Sparse24Weight, got {type(weight).__name__}")
    checks.dtype(op, "weight", weight.values, checks.FLOATS)
    values = weight.values.detach()
    if has_values(values) and not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0, 0])
        raise ValueError(f"{op}: weight must be finite, got a value that is not in row {row}")
    scales = row_scales(values)
    whole = (values.float() / scales).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return Sparse24Weight(whole, weight.metadata, scales[:, 0], weight.choice)


def fake_quantize(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """x rounded to the numbers that int8 with this scale can express, and still floating; the gradient goes straight
    through where nothing is clipped, and is 0 elsewhere.

    Args:
        x: floating [..., n].
        scale: float32, of a shape that broadcasts against x; no gradient. None: of each row, max |x| / 127, as
            :func:`linear_int8` and :func:`quantize` do (rows of a weight are its output channels).

    Returns:
        Shaped like x, in its dtype.
    """
    op = "sparse24.fake_quantize"
    checks.tensor(op, "x", x)
    checks.dtype(op, "x", x, checks.FLOATS)
    if scale is None:
        scale = row_scales(x)
    else:
        checks.tensor(op, "scale", scale)
        checks.dtype(op, "scale", scale, checks.FLOATS)
    return rounded(x, scale.detach(), True)


class ActivationObserver:
    """Finds one scale for activations from a few batches.

    Args:
        percentile: None takes the largest |x| ever seen. A number in (0, 100] takes that percentile of |x| in every
            batch, and of these the largest: outliers beyond it are clipped.
    """

    def __init__(self, percentile: float | None = None):
        if percentile is not None and not 0 < percentile <= 100:
            raise ValueError(f"ActivationObserver: percentile must be in (0, 100], got {percentile!r}")
        self.percentile = percentile
        self.largest: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """See one batch; nothing of it is kept. Empty ones are passed over."""
        if x.numel() == 0:
            return
        size = x.detach().abs().float().flatten()
        if self.percentile is not None:
            rank = max(1, round(self.percentile / 100 * size.numel()))
            seen = size.kthvalue(rank).values
        else:
            seen = size.max()
        self.largest = seen if self.largest is None else torch.maximum(self.largest, seen)

    def scale(self) -> Tensor:
        """float32 [1], largest / 127. ValueError before the first batch, or if what was seen is not finite."""
        if self.largest is None:
            raise ValueError("ActivationObserver.scale: update must have seen a batch, got none")
        if not self.largest.isfinite():
            raise ValueError(f"ActivationObserver.scale: activations must be finite, got {self.largest.item()}")
        return scale_of(self.largest).reshape(1)


def calibrate_activations(model: nn.Module, batches: Iterable, percentile: float | None = None) -> dict[str, Tensor]:
    """Module name -> scale (float32 [1]) of the input of every nn.Linear, from running ``model(batch)`` for each batch.

    ``percentile`` as of :class:`ActivationObserver`. For ``Sparse24Linear(..., x_scale=)`` and ``Linear24(x_scale=)``.
    """
    observers: dict[str, ActivationObserver] = {}
    watch_inputs(model, batches, lambda name, x: observers.setdefault(name, ActivationObserver(percentile)).update(x))
    return {name: observer.scale() for name, observer in observers.items()}
