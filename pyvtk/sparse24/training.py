"""Training towards 2:4 weights: a linear layer with a dense master weight, whose products see a masked one.

The gradient of the masked weight goes to all of the master weight ("straight through"), so that a pruned weight can
come back. SR-STE (arXiv 2102.04010) draws pruned weights towards 0; decaying masks and structures (arXiv 2402.04744)
prune in small steps.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyvtk import backends, checks
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24.copies import Seal, has_values, seal_mask, why_not_sealed
from pyvtk.sparse24.format import Sparse24Weight, compress, refuse_nan
from pyvtk.sparse24.functions import decay, masked_product, rounded, seen, straight_through
from pyvtk.sparse24.int8 import fake_quantize, quantize, row_scales
from pyvtk.sparse24.modules import Sparse24Linear, apply_but_keep
from pyvtk.sparse24.pruning import magnitude, two_of_four

Pattern = tuple[int, int]


@dataclass(frozen=True)
class LinearDecay:
    """beta(t) = max(0, 1 - rate * t): what is left of pruned weights after t steps (MdGf, linear)."""

    rate: float

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"LinearDecay: rate must be positive, got {self.rate}")

    def __call__(self, step: int) -> float:
        return max(0.0, 1.0 - self.rate * step)


@dataclass(frozen=True)
class ExponentialDecay:
    """beta(t) = exp(-rate * t), and 0 from step ``end`` on (None: never quite 0; MdGf, exponential)."""

    rate: float
    end: int | None = None

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"ExponentialDecay: rate must be positive, got {self.rate}")

    def __call__(self, step: int) -> float:
        return 0.0 if self.end is not None and step >= self.end else math.exp(-self.rate * step)


def structure_decay(steps: int, m: int = 4, n: int = 2, halve: bool = False) -> tuple[tuple[int, Pattern], ...]:
    """Patterns by their first step, each for ``steps`` steps and the last from then on (SdGf).

    halve=False: (m - 1):m, then m/2:m, m/4:m ... down to n:m; 3:4, 2:4 for 2:4. halve=True: n * 2^i : m * 2^i with i
    from 2 down to 0; 8:16, 4:8, 2:4 for 2:4.
    """
    for name, value in (("steps", steps), ("m", m), ("n", n)):
        checks.integer("structure_decay", name, value, 1)
    if n >= m:
        raise ValueError(f"structure_decay: n must be less than m = {m}, got {n}")
    checks.boolean("structure_decay", "halve", halve)
    if halve:
        patterns = [(n << i, m << i) for i in (2, 1, 0)]
    else:
        patterns, left = [(m - 1, m)], m // 2
        while left > n:
            patterns.append((left, m))
            left //= 2
        if patterns[-1] != (n, m):
            patterns.append((n, m))
    return tuple((i * steps, pattern) for i, pattern in enumerate(patterns))


class Linear24(nn.Module):
    """An nn.Linear whose weight becomes 2:4 while it is trained.

    ``weight`` is dense and gets a dense gradient; products see weight * mask, compressed. Call :meth:`step` (or
    :func:`step_24` on the model) after each step of the optimizer: it counts, and chooses the mask anew from |weight|
    when that is due. Nothing but this, :meth:`refresh` and a state dict changes the mask.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear. in_features a multiple of 4, and of every m in
            ``patterns``; with ``transposable`` out_features too.
        method: "ste": the gradient g of the masked weight goes to all of ``weight``. "sr_ste": g + rate * weight where
            the weight is pruned, in every backward pass that reaches it (no forward mode). "decay": pruned weights are
            multiplied by ``beta(t)`` rather than by 0, gradient g.
        rate: of "sr_ste".
        beta: of "decay": a function of the number of steps, :class:`LinearDecay` or :class:`ExponentialDecay`.
        patterns: ((first step, (n, m)), ...), ascending from step 0, the last (2, 4); see :func:`structure_decay`.
            Until the last one holds, products are dense. None: 2:4 from the start.
        refresh_every: steps between two choices of the mask (the first at 0), until ``refresh_until`` (None: always).
        transposable: masks whose transpose is 2:4 too, so that the gradient of x is a sparse product as well.
        int8: weight and x are rounded to int8 in the forward pass, with straight-through gradient (quantisation-aware
            training), as :meth:`to_sparse` will round them.
        x_scale: float32 [1], for ``int8``: one scale for all x (:func:`calibrate_activations`). None: one for each row.

    State dict: weight, bias, mask, steps (and x_scale). Loading one whose mask has not the pattern of its step is a
    ValueError. Products trust a mask that was chosen or verified here, so that no step waits for the host but those
    that choose a mask. Where something else wrote to it or put another in its place (averaging, a broadcast of buffers,
    an edit), the next product looks, and waits, once: a mask that has not the pattern is a ValueError, never a weight
    less; :meth:`refresh` makes it right. A write through ``mask.data``, which torch does not count, is not seen: call
    :meth:`refresh` after it. (Compiled code, whose error is a RuntimeError, looks each time until the layer is called
    plainly, or :meth:`refresh` is.)

    Averages of weights: AveragedModel as it is (``use_buffers=False``) gives the average the mask of the model. With
    ``use_buffers=True`` masks are averaged too, which makes none: call :meth:`refresh` on each Linear24 of the average
    before it is used (torch's plain average, which subtracts, refuses bool buffers altogether).

    On the meta device, or under fake tensors, a layer has no mask to choose: after ``to_empty`` load a state dict, or
    set the weight and call :meth:`refresh`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        method: str = "sr_ste",
        rate: float = 2e-4,
        beta=None,
        patterns=None,
        refresh_every: int = 1,
        refresh_until: int | None = None,
        transposable: bool = False,
        int8: bool = False,
        x_scale: Tensor | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        op = "Linear24"
        checks.integer(op, "in_features", in_features, 4)
        checks.integer(op, "out_features", out_features, 1)
        checks.choice(op, "method", method, ("ste", "sr_ste", "decay"))
        checks.integer(op, "refresh_every", refresh_every, 1)
        if refresh_until is not None:
            checks.integer(op, "refresh_until", refresh_until)
        checks.boolean(op, "transposable", transposable)
        checks.boolean(op, "int8", int8)
        if (method == "decay") != callable(beta):
            raise ValueError(
                f"{op}: beta must be a function of the step for method 'decay' and only there, got {beta!r}"
            )
        if x_scale is not None:
            if not int8:
                raise ValueError(f"{op}: x_scale must be None without int8, got {x_scale!r}")
            checks.tensor(op, "x_scale", x_scale)
            checks.dtype(op, "x_scale", x_scale, (torch.float32,))
            checks.shape(op, "x_scale", x_scale, (1,), "[1]")
        self.patterns = _check_patterns(op, patterns, in_features, out_features, transposable)
        if in_features % 4 or (transposable and out_features % 4):
            raise ValueError(f"{op}: features must be multiples of 4, got {in_features} in and {out_features} out")
        self.in_features, self.out_features = in_features, out_features
        self.method, self.rate, self.beta = method, float(rate), beta
        self.refresh_every, self.refresh_until = refresh_every, refresh_until
        self.transposable, self.int8 = transposable, int8
        # as nn.Linear begins
        start = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self.weight, self.bias = start.weight, start.bias
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("x_scale", None if x_scale is None else x_scale.detach().clone())
        # [], what pruned weights are multiplied by; a tensor, so that torch.compile takes no note of its value
        left = torch.zeros((), dtype=torch.float32, device=self.weight.device)  # whatever the default dtype
        self.register_buffer("left", left, persistent=False)
        self._mask_seal: Seal | None = None
        self._steps_seal: Seal | None = None
        self.register_load_state_dict_post_hook(_after_loading)
        self._at(0)
        self._write_steps()
        self.refresh()

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options) -> Linear24:
        """A Linear24 with the parameters (the same objects) of an nn.Linear; ``options`` as of the class."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"Linear24.from_linear: linear must be an nn.Linear, got {type(linear).__name__}")
        # on the meta device, so that nothing is drawn for parameters that are thrown away
        module = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", **options)
        device = linear.weight.device
        module.weight, module.bias = linear.weight, linear.bias
        module.mask = torch.ones(linear.weight.shape, dtype=torch.bool, device=device)
        module.left = torch.zeros((), dtype=torch.float32, device=device)
        module._at(0)
        module._write_steps()
        module.refresh()
        return module.train(linear.training)

    @property
    def pattern(self) -> Pattern:
        """(n, m) that the mask has, or will have at its next choice."""
        return self._pattern

    def _loaded(self) -> None:
        """A state dict was loaded: go to its step, and see that its mask is one that products may trust."""
        self._follow_steps()
        self._verify("Linear24.load_state_dict: mask must be")

    def _follow_steps(self) -> None:
        """Be at the step that the buffer says. The host waits for it where it is on a GPU."""
        if has_values(self.steps):
            self._at(int(self.steps))
            self._steps_seal = _seal(self.steps)

    def _verify(self, must: str) -> None:
        """ValueError, beginning with ``must``, unless the mask has the pattern of this step. The host waits once."""
        if not has_values(self.mask):
            return
        n, m = self._pattern
        for mask in (self.mask, self.mask.T) if self.transposable else (self.mask,):
            wrong = mask.unflatten(-1, (-1, m)).sum(-1) != n
            if wrong.any():
                row, group = wrong.nonzero()[0].tolist()
                got = int(mask.unflatten(-1, (-1, m))[row, group].sum())
                side = "row" if mask is self.mask else "column"
                raise ValueError(
                    f"{must} {n}:{m} at step {self._step}, got {got} of {m} kept in {side} {row}, group {group}"
                )
        self._trust_mask()

    def _trust_mask(self) -> None:
        self._mask_seal = None if why_not_sealed(self.mask) else seal_mask(self.mask)

    def _look_again(self) -> None:
        """Where something else wrote to steps or mask: follow, and verify."""
        if self._steps_seal is None or not self._steps_seal.holds(self.steps):
            self._follow_steps()
        if torch._C._functorch.is_functorch_wrapped_tensor(self.mask):
            return  # mapped over, or in a gradient: such products are dense, and right for any mask
        if self._mask_seal is None or not self._mask_seal.holds(self.mask):
            self._verify("Linear24: something wrote to the mask; refresh() chooses it anew. mask must be")

    def _at(self, step: int) -> None:
        """Be where the schedule is after so many steps."""
        self._step = step
        self._pattern = next(pattern for first, pattern in reversed(self.patterns) if step >= first)
        left = self.beta(step) if self.method == "decay" else 0.0
        self.left.fill_(left)
        # All that torch.compile sees of the schedule: it changes once, from dense products to sparse ones.
        self.sparse = left == 0.0 and self._pattern == (2, 4)

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the mask from |weight|, with the pattern of this step. ValueError: the weight holds a NaN."""
        if not has_values(self.weight) or not has_values(self.mask):
            return
        refuse_nan("Linear24.refresh", "weight", self.weight)
        scores = magnitude(self.weight)
        if self._pattern == (2, 4):
            mask = two_of_four(scores, self.transposable)
        else:
            mask = reference.prune_n_of_m(scores, *self._pattern)
        self.mask.copy_(mask)
        self._trust_mask()

    def step(self) -> None:
        """One step of the optimizer was taken: count it, follow the schedules, and choose a new mask if it is due (or
        the pattern changed). The host waits where a mask is chosen."""
        if self._steps_seal is None or not self._steps_seal.holds(self.steps):
            self._follow_steps()
        before = self._pattern
        self._at(self._step + 1)
        self._write_steps()
        open_still = self.refresh_until is None or self._step <= self.refresh_until
        if before != self._pattern or (open_still and self._step % self.refresh_every == 0):
            self.refresh()

    def _write_steps(self) -> None:
        self.steps.fill_(self._step)
        self._steps_seal = _seal(self.steps)

    def masked_weight(self) -> Tensor:
        """[out_features, in_features], what products see: weight * (mask + (1 - mask) * beta), before any rounding."""
        return seen(self.weight, self.mask, self.left)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features] in x's dtype (autocast's, where that is on)."""
        op = "Linear24"
        checks.tensor(op, "x", x)
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{op}: x must be [..., in_features = {self.in_features}], got shape {tuple(x.shape)}")
        if not torch.compiler.is_compiling():  # compiled code looks at the mask when it runs
            self._look_again()
        weight, mask = self.weight, self.mask
        if self.method == "sr_ste" and self.rate:
            weight = decay(weight, mask, self.rate)
        x, weight = backends.autocast(x), backends.autocast(weight)
        if x.dtype != weight.dtype:
            raise TypeError(f"{op}: x must have the dtype of weight ({weight.dtype}), got {x.dtype}")
        if self.int8:
            x = fake_quantize(x, self.x_scale)
            # what is pruned may lie beyond the range of what is kept, and still gets its gradient
            weight = rounded(weight, row_scales(self.masked_weight()), False)
        with ops.full_precision(x):  # autocast has done its part
            if self.sparse:
                y = masked_product(x, weight, mask, self.transposable)
            else:
                y = F.linear(x, straight_through(weight, mask, self.left))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def to_sparse(self) -> Sparse24Linear:
        """The trained layer for inference, with copies of values and bias; int8 where the training was.

        ValueError: the schedule has not come to 2:4 without decay yet.
        """
        self._look_again()
        if not self.sparse:
            (n, m), left = self._pattern, self.left.item()
            raise ValueError(
                f"Linear24.to_sparse: schedule must be at 2:4 with beta 0, got {n}:{m} with beta {left:.3g} "
                f"at step {self._step}"
            )
        weight: Sparse24Weight = compress(self.weight.detach(), self.mask)
        bias = None if self.bias is None else self.bias.detach()
        if not self.int8:
            return Sparse24Linear(weight, bias).train(self.training)
        x_scale = "row" if self.x_scale is None else self.x_scale
        return Sparse24Linear(quantize(weight), bias, x_scale=x_scale).train(self.training)

    def _apply(self, fn, recurse: bool = True):
        steps = self.steps
        apply_but_keep(self, ("x_scale", "left"), lambda: super(Linear24, self)._apply(fn, recurse))
        self._at(self._step)
        if self.steps is not steps:
            self._write_steps()  # to_empty leaves anything in it, and in left
        self._verify_quietly()
        return self

    def __getstate__(self):
        return self.__dict__ | {"_mask_seal": None, "_steps_seal": None}

    def __setstate__(self, state) -> None:
        super().__setstate__(state)
        self._verify_quietly()

    def _verify_quietly(self) -> None:
        """Trust the mask of a moved or copied layer if it is right; if not, the next product says so."""
        self._mask_seal = None
        with contextlib.suppress(ValueError):
            self._verify("")

    def extra_repr(self) -> str:
        n, m = self._pattern
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"method={self.method}, pattern={n}:{m}, step={self._step}"
        )


def _after_loading(module: Linear24, _) -> None:
    """No lambda, which could not be pickled."""
    module._loaded()


def _seal(tensor: Tensor) -> Seal | None:
    return None if why_not_sealed(tensor) else Seal(tensor)


def _check_patterns(op: str, patterns, in_features: int, out_features: int, transposable: bool):
    """Patterns as a tuple ((first step, (n, m)), ...)."""
    if patterns is None:
        return ((0, (2, 4)),)
    patterns = tuple((int(first), (int(n), int(m))) for first, (n, m) in patterns)
    firsts = [first for first, _ in patterns]
    if not patterns or firsts[0] != 0 or firsts != sorted(set(firsts)) or patterns[-1][1] != (2, 4):
        raise ValueError(f"{op}: patterns must ascend from step 0 and end with (2, 4), got {patterns}")
    for _, (n, m) in patterns:
        if not 0 < n < m or in_features % m:
            raise ValueError(
                f"{op}: patterns must be 0 < n < m with in_features {in_features} a multiple of m, got {n}:{m}"
            )
        if transposable and (n, m) != (2, 4):
            raise ValueError(f"{op}: patterns must be 2:4 alone where transposable is True, got {n}:{m}")
    return patterns


def step_24(model: nn.Module) -> None:
    """:meth:`Linear24.step` of every Linear24 in ``model``; to be called after each step of the optimizer."""
    for module in model.modules():
        if isinstance(module, Linear24):
            module.step()
