"""Argument checks that several pages share, with one wording: ``op: argument must be ..., got ...``.

Plain ``if ...: raise``: torch.compile traces it, with dynamic sizes too.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def tensor(op: str, name: str, value, dim: int | tuple[int, ...] | None = None) -> None:
    """``value`` is a strided tensor, with ``dim`` (one of several) dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if dim is not None and value.dim() not in (dim if isinstance(dim, tuple) else (dim,)):
        raise ValueError(f"{op}: {name} must have {dim} dimensions, got shape {tuple(value.shape)}")


def shape(op: str, name: str, value: Tensor, expected: tuple, meaning: str) -> None:
    """``value`` has exactly this shape; ``meaning`` names its dimensions, e.g. "[batch, keys]"."""
    if value.dim() != len(expected) or any(a != b for a, b in zip(value.shape, expected)):
        raise ValueError(f"{op}: {name} must be {meaning} = {list(expected)}, got shape {tuple(value.shape)}")


def dtype(op: str, name: str, value: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"{op}: {name} must have dtype {names}, got {str(value.dtype).removeprefix('torch.')}")


def same_device(op: str, name: str, value: Tensor, other: Tensor, other_name: str) -> None:
    if value.device != other.device:
        raise ValueError(f"{op}: {name} must be on the device of {other_name} ({other.device}), got {value.device}")


def choice(op: str, name: str, value, allowed: tuple) -> None:
    if not isinstance(value, (str, type(None))) or value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(repr(a) for a in allowed)}, got {value!r}")


def integer(op: str, name: str, value, minimum: int = 0) -> None:
    """``value`` is an int (or a symbolic one) of at least ``minimum``; bool is not an int here."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{op}: {name} must be at least {minimum}, got {value}")


def boolean(op: str, name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def offsets(op: str, name: str, value, like: Tensor, like_name: str) -> None:
    """``value`` is int32 [samples + 1], where packed samples begin."""
    tensor(op, name, value, 1)
    dtype(op, name, value, (torch.int32,))
    same_device(op, name, value, like, like_name)
    if value.shape[0] < 1:
        raise ValueError(f"{op}: {name} must have one entry more than there are samples, got none")


def outside_inference(op: str, name: str, tensors, differentiable) -> None:
    """What ``name`` holds can be saved for a gradient, if one of ``differentiable`` (None is none) wants one."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    if any(x is not None and x.requires_grad for x in differentiable) and any(x.is_inference() for x in tensors):
        raise ValueError(
            f"{op}: {name} must be made outside of torch.inference_mode where a gradient is wanted (torch.no_grad will "
            f"do), got one made inside"
        )


def valueless(value: Tensor) -> bool:
    """Whether ``value`` has a shape but no numbers: on the meta device, or under fake tensors."""
    return value.is_meta or isinstance(value, FakeTensor)


def on_host(op: str, name: str, value: Tensor) -> int:
    """``value``, for which the host waits: what argument ``name`` would have told."""
    if not torch.compiler.is_compiling() and valueless(value):
        raise ValueError(f"{op}: {name} must be given for tensors without values (meta, fake), got none")
    return int(value)


def require(condition: Tensor, message: str, **numbers: int) -> None:
    """Checks a value: raises on the CPU; on CUDA, and in a graph that is traced, it becomes a check on the device.

    ``numbers`` stand in for their names in the message; a graph may leave numbers open, and keeps the names.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not _can_look_at(condition):
        torch._assert_async(condition, message.format(**numbers))
    elif not condition:
        raise ValueError(message.format(**numbers))


def values(op: str, check: Tensor, messages: dict[int, tuple[str, str]], **numbers: int) -> None:
    """The same for several values that an operator looked at: ``check`` int64 [n] is 0 or the sum of some keys of
    ``messages``, then numbers.

    A message is what must be, and how it ends where the numbers are known, as {0}, {1}. The first one that applies is
    raised; a check on the device tells all that may be meant.
    """
    if torch.compiler.is_compiling() or not _can_look_at(check):
        torch._assert_async(check[0] == 0, f"{op}: {'; '.join(must for must, _ in messages.values())}")
    elif wrong := int(check[0]):
        message = next("".join(message) for key, message in messages.items() if wrong & key)
        raise ValueError(f"{op}: {message.format(*check[1:].tolist(), **numbers)}")


def _can_look_at(value: Tensor) -> bool:
    return value.is_cpu and type(value) is Tensor and get_proxy_mode() is None


INTEGERS = (torch.int64, torch.int32)
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# Integers of a caller as the int32 of kernels: nothing wraps around to another legal number ---------------------------


def to_int32(value: Tensor) -> Tensor:
    """``value`` as int32. What lies beyond becomes int32's extreme on that side, so the order stays and a check of the
    range sees it."""
    return value if value.dtype == torch.int32 else value.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def ranks(among: Tensor, *values: Tensor) -> list[Tensor]:
    """int32, shaped like each of ``values``: how many numbers of ``among`` are smaller.

    For x anywhere and y one of ``among``, x <= y exactly if rank(x) <= rank(y). Ranks are 0 to the number of entries of
    ``among``, however large those are, so int32's extremes are free for what kernels mark by them.
    """
    in_order = among.long().flatten().sort().values
    return [torch.searchsorted(in_order, x.long().contiguous(), out_int32=True) for x in values]
