"""Numbers that torch.compile leaves open, so that a new value does not compile a program again.

Schemas of operators have symbolic integers (SymInt), but no symbolic floats: where a Python float reaches an operator
as ``float``, torch.compile makes it a constant and compiles for each value. It can follow a float into a tensor, by
operations that torch's pass ``tensorify_python_scalars`` knows: a product is one, ``torch.full`` is not. So an open
number becomes a float64 tensor without dimensions, on the host, and goes to an overload of the operator that takes it
so, where reading it waits for nobody. A number that is settled stays one: a CUDA graph takes no tensor of the host. For
CUDA graphs (mode="reduce-overhead") torch.compile leaves no float open.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor


def is_open(*numbers: float) -> bool:
    """Whether torch.compile is at work and leaves one of the numbers open."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import has_static_value  # brings sympy: most of a second

    return not all([has_static_value(number) for number in numbers])


def argument(number: float) -> float | Tensor:
    """A float for an operator that :func:`leave_open` was asked for."""
    return _on_host(number) if is_open(number) else number


def arguments(numbers: list[float]) -> list[float] | Tensor:
    """The same for a list of floats."""
    return torch.stack([_on_host(number) for number in numbers]) if is_open(*numbers) else numbers


def _on_host(number: float) -> Tensor:
    return torch.ones((), dtype=torch.float64, device="cpu") * number


def full(shape, number: float, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``torch.full``, for open numbers too."""
    if is_open(number):
        return torch.ones(shape, dtype=dtype, device=device) * number
    return torch.full(shape, number, dtype=dtype, device=device)


def leave_open(name: str, number: str) -> str:
    """Give operator ``pyvtk::name`` an overload that takes its argument ``number`` as a tensor on the host.

    The argument is ``float`` or ``float[]``, the tensor float64 [] or [numbers]. Calls of ``torch.ops.pyvtk.name`` find
    the overload by what they are given.

    Returns:
        The overload, ``name.open``.
    """
    operator = getattr(torch.ops.pyvtk, name).default
    place = [argument.name for argument in operator._schema.arguments].index(number)
    schema = str(operator._schema).removeprefix(f"pyvtk::{name}")
    overload = f"{name}.open"
    schema = re.sub(rf"\bfloat(\[\])? {number}\b", f"Tensor {number}", schema)
    torch.library.define(f"pyvtk::{overload}", schema, tags=tuple(operator.tags))

    def run(*given):
        return operator(*given[:place], given[place].tolist(), *given[place + 1 :])

    def fake(*given):
        any_number = 1.0 if given[place].dim() == 0 else [1.0] * given[place].shape[0]  # sizes do not depend on it
        return operator(*given[:place], any_number, *given[place + 1 :])

    torch.library.impl(f"pyvtk::{overload}", ("cpu", "cuda"), run)
    torch.library.register_fake(f"pyvtk::{overload}")(fake)
    return overload


def overloads(name: str) -> list[str]:
    """Operator ``name``, and its overload where it has one."""
    return [name, f"{name}.open"] if "open" in getattr(torch.ops.pyvtk, name).overloads() else [name]
