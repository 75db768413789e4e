"""What tests share: the error budget, comparisons, poisoned memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, after checking that NaN and infinities stand in the same places."""
    actual, oracle = actual.detach().double(), oracle.detach().double()
    assert actual.shape == oracle.shape, f"shape {tuple(actual.shape)}, oracle {tuple(oracle.shape)}"
    assert torch.equal(actual.isnan(), oracle.isnan()), "NaN stands in other places than in the oracle"
    infinite = oracle.isinf()
    assert torch.equal(actual[infinite], oracle[infinite]), "infinities differ from the oracle"
    assert not actual[~infinite].isinf().any(), "infinite where the oracle is finite"
    finite = ~(oracle.isnan() | infinite)
    return (actual[finite] - oracle[finite]).abs().max().item() if finite.any() else 0.0


def largest(x: Tensor) -> float:
    """Largest finite magnitude; 0 if there is none."""
    finite = x.detach().double()
    finite = finite[finite.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def assert_within_budget(
    actual: Tensor, oracle: Tensor, plain: Tensor, instruction_set: str = "avx2", added: float = 0.0
) -> None:
    """A kernel may be twice as wrong as plain torch in the same dtype, plus one rounding of its output.

    Plain torch multiplies and adds in one rounding here; without such an instruction there are two. Where there are few
    results plain torch may be right by luck, and terms may cancel: one rounding of what was added up is free too.

    Args:
        actual: the kernel's result.
        oracle: the reference computed in float64.
        plain: the reference computed by plain torch in the kernel's input dtype.
        instruction_set: of the kernel.
        added: largest sum of magnitudes of the terms, which are float32 (float64 where the result is), for tests that
            draw few results, and what the products of tensor cores may be off by (:class:`TF32x3`).
    """
    rounding = torch.finfo(actual.dtype).eps * largest(oracle) * (2 if instruction_set == "portable" else 1)
    wide = torch.float64 if actual.dtype == torch.float64 else torch.float32
    budget = 2 * max_error(plain, oracle) + rounding + torch.finfo(wide).eps * added
    error = max_error(actual, oracle)
    assert error <= budget, f"error {error:.3e} exceeds the budget {budget:.3e}{_where(actual, oracle, budget)}"


def _where(actual: Tensor, oracle: Tensor, budget: float) -> str:
    """How many values are beyond the budget, and the first of them."""
    beyond = ((actual.detach().double() - oracle.detach().double()).abs() > budget).nonzero()
    place = beyond[0].tolist()
    found, wanted = (x[tuple(place)].item() for x in (actual, oracle))
    return f": {len(beyond)} of {actual.numel()} values, the first at {place}: {found:.6g}, oracle {wanted:.6g}"


class TF32x3(TorchDispatchMode):
    """Within it every matrix product is as far off as "tf32x3" on tensor cores may be, up or down at random.

    A float32 kernel that multiplies so (Triton's, on CUDA) may be off by as much as the oracle is within this mode::

        with TF32x3():
            inexact = compute(*inputs_in_float64)
        assert_within_budget(actual, oracle, plain, added=TF32x3.added(inexact, oracle))

    Plain torch knows nothing of such errors: it multiplies in float32.
    """

    @staticmethod
    def roundings(length: int) -> float:
        """Most of an error of a sum of ``length`` products, in units of 2**-23 of the sum of their magnitudes.

        A factor x is big + small with big of 11 bits and |small| <= 2**-11 |x|, of which tensor cores read all but one
        bit of 2**-23 |x|. So small * small, which is left out, is 2 units, and these bits are 2 more. Adding chops what
        lies below the last bit of the largest term: less than a unit for each product, and one more for each step of 4
        products or more; nothing else is assumed of tensor cores. Products with small factors are 2**-11 of the rest.
        Kernels multiply at most 128 channels or tokens at a time, and add these sums up in float32 as plain torch does.
        """
        length = min(length, 128)
        return (4 + length + length / 4) * (1 + 2**-8)

    @staticmethod
    def added(inexact: Tensor, oracle: Tensor) -> float:
        """What :func:`assert_within_budget` takes for it."""
        return max_error(inexact, oracle) / torch.finfo(torch.float32).eps

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            share = self.roundings(args[0].shape[-1]) * torch.finfo(torch.float32).eps
            up_or_down = torch.randint(0, 2, out.shape, device=out.device) * 2 - 1
            out = out + up_or_down * share * function(args[0].abs(), args[1].abs())
        return out


class Exponents(TorchDispatchMode):
    """Within it the exponents of attention's weights, exp and log are as far off as in float32 on a GPU, up or down at
    random. For weights that float32 results are made of; used as :class:`TF32x3` is.

    A weight is exp(q . k - lse): what rounds its exponent shows in it as often as the exponent is large, whichever way
    sums are ordered, and where there are few results plain torch may be right by luck. So there is room for

    - one rounding of what is added up in products, as ``added`` is of :func:`assert_within_budget`,
    - half a unit of each term of a difference: it was rounded to float32 itself,
    - 2 units in the last place of exp, 1 of log: what CUDA's expf and logf may be off (programming guide, "Mathematical
      Functions"), and ex2.approx with them; so much the emulation puts them off (device_math.h).
    """

    added = staticmethod(TF32x3.added)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        units = None
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            units = function(args[0].abs(), args[1].abs())
        elif function == torch.ops.aten.sub.Tensor and out.is_floating_point():
            units = (args[0].abs() + args[1].abs()) / 2 if isinstance(args[1], Tensor) else args[0].abs() / 2
        elif function == torch.ops.aten.exp.default:
            units = 2 * out
        elif function == torch.ops.aten.log.default:
            units = out.abs()
        if units is not None:
            up_or_down = torch.randint(0, 2, out.shape, device=out.device) * 2 - 1
            off = up_or_down * units * torch.finfo(torch.float32).eps
            out = out + off.nan_to_num(0.0, 0.0, 0.0)
        return out


def same(actual, expected) -> None:
    """Tensors, or sequences of them, have the same dtypes, shapes and values; no tolerance, and NaN equals nothing."""
    actual, expected = (x if isinstance(x, (tuple, list)) else (x,) for x in (actual, expected))
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x for x in (a, b))
        assert torch.equal(a, b)


def poison_cuda() -> None:
    """Fill with ones, in every bit, what torch's allocator hands out next on the current device, if one is in use.

    CUDA operators get their results from there: what a kernel leaves unwritten is NaN then, or an index out of bounds.
    Its pool for less than a MiB takes pieces of 2 MiB; larger tensors are cut from any larger piece.
    """
    if not torch.cuda.is_initialized():
        return
    pieces = [torch.empty(1 << 20, dtype=torch.uint8, device="cuda") for _ in range(16)]
    for piece in [*pieces, torch.empty(128 << 20, dtype=torch.uint8, device="cuda")]:
        piece.fill_(0xFF)
