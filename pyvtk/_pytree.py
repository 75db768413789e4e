"""Values that users hold as pytrees: through torch.export, saved programs, torch.load, torch.func, checkpointing.

A pytree is tensors and a context. torch.export keeps the context as it was: what a dynamic size may change has no place
in it. Such a number travels as the size of a tensor without elements (:func:`axis`), beside the other tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


def register(cls: type, tensors: tuple[str, ...], facts: tuple[str, ...], make: Callable) -> None:
    """Make ``cls`` a pytree that is saved with exported programs, and one that torch.load knows.

    Args:
        cls: the class.
        tensors: attributes that are tensors or None, in the order of the leaves.
        facts: attributes that are None, bools, ints, strings, or tuples of these: the context.
        make: ``make(*tensors, *facts)`` is the value again. torch unflattens with whatever stands for a tensor, so it
            must not look into them.
    """

    def context(value) -> tuple:
        return tuple(getattr(value, name) for name in facts)

    pytree.register_pytree_node(
        cls,
        lambda value: ([getattr(value, name) for name in tensors], context(value)),
        lambda parts, numbers: make(*parts, *numbers),
        serialized_type_name=f"pyvtk.{cls.__name__}",
        flatten_with_keys_fn=lambda value: (
            [(pytree.GetAttrKey(name), getattr(value, name)) for name in tensors],
            context(value),
        ),
        to_dumpable_context=list,
        from_dumpable_context=_with_tuples,
    )
    # torch.export.save stores example inputs, and torch.load refuses classes that it was not told about.
    torch.serialization.add_safe_globals([cls])


def register_named_tuple(cls: type) -> None:
    """The same for a named tuple, which torch takes apart on its own, but saves only under a name of ours."""
    pytree._register_namedtuple(cls, serialized_type_name=f"pyvtk.{cls.__name__}")
    torch.serialization.add_safe_globals([cls])


def _with_tuples(context):
    """What JSON made lists of, as the tuples that they were: torch compares contexts."""
    return tuple(_with_tuples(part) for part in context) if isinstance(context, list) else context


def axis(value, like: Tensor, inner: int, *sizes: int) -> Tensor:
    """A tensor [..., *sizes, 0] without elements, which carries the sizes of ``value`` behind all but the ``inner``
    last dimensions of ``like``, so that the batch is where it is in the other leaves."""
    carrier = getattr(value, "_axis", None)
    if carrier is None:
        carrier = _carrier(like, inner, sizes)
        if not torch.compiler.is_dynamo_compiling():  # there, it would be a side effect
            object.__setattr__(value, "_axis", carrier)  # torch.export tells leaves apart by identity
    return carrier


def _carrier(like, inner: int, sizes: tuple):
    if not isinstance(like, Tensor):  # the value was unflattened with something else than tensors
        return sizes[0]
    # Taking a value apart is no use of it: what a mode would make of this tensor, a fake one, must not get into a real
    # value, and a mode that takes fake tensors only must not refuse it.
    apart = type(like) is Tensor and not torch.compiler.is_dynamo_compiling()
    with _disable_current_modes() if apart else nullcontext():
        return like.new_empty((*like.shape[: like.dim() - inner], *sizes, 0))


def with_axis(cls: type, carrier, fields: dict, *names: str):
    """An instance of ``cls`` from its fields and, for the fields ``names``, what :func:`axis` made of their sizes."""
    whole = isinstance(carrier, Tensor) and carrier.dim() > len(names)
    sizes = carrier.shape[-1 - len(names) : -1] if whole else (carrier,) * len(names)
    value = cls(**fields, **dict(zip(names, sizes)))
    object.__setattr__(value, "_axis", carrier)
    return value
