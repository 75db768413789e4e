"""What torch's transforms of a call find at an operator: gradients of any order, forward mode, vmap, mutation.

Every operator of :func:`pyvtk.backends.define` has an answer to each of them, so that none is wrong in silence:

gradient     :func:`gradient`, or an error when somebody differentiates; through torch.func too
second       an operator that forms gradients has one of its own, :func:`second_gradient`: by plain torch, of any order
forward mode an error; the pages compute such calls by the reference (:func:`pyvtk.backends.pick`)
vmap         :func:`batch`: the mapped axis is folded into an axis of the tensors, or the operator runs once for each
mutation     the version counter of what is written to grows, so that autograd sees it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from pyvtk import _numbers

_library = torch.library.Library("pyvtk", "FRAGMENT")
_with_gradient: set[str] = set()


# What callers may ask for ---------------------------------------------------------------------------------------------


def active() -> bool:
    """Whether torch.func or forward mode is at work, where ``requires_grad`` does not tell everything."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a derivative of what is computed from ``tensors`` may be asked for.

    The wrappers of torch.func hide the gradient that the tensor inside asks for, and forward mode shows nowhere.
    """
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    if forward_ad._current_level < 0 and not torch._C._are_functorch_transforms_active():
        return False
    if torch.compiler.is_compiling() or has_tangent(tensors):  # a wrapper that is traced does not open
        return True
    return torch.is_grad_enabled() and any(inside.requires_grad for x in tensors for inside in _wrapped(x))


def is_mapped_over(x: Tensor) -> bool:
    """Whether torch.vmap maps over ``x``, so that the host cannot look at its values."""
    return any(torch._C._functorch.is_batchedtensor(inside) for inside in _wrapped(x))


def has_tangent(tensors: Sequence[Tensor | None]) -> bool:
    """Whether forward mode may differentiate any of these."""
    if forward_ad._current_level < 0:
        return False
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        return True
    # torch.func shows only the tangents of its innermost transform, and wraps whatever has one.
    functorch = torch._C._functorch
    if all(layer.key() != functorch.TransformType.Jvp for layer in functorch.get_interpreter_stack() or ()):
        return False
    return any(x is not None and functorch.is_functorch_wrapped_tensor(x) for x in tensors)


def _wrapped(x: Tensor | None) -> Iterator[Tensor]:
    """``x`` and what torch.func's wrappers hold, from the outermost in."""
    while x is not None:
        yield x
        x = torch._C._functorch.get_unwrapped(x) if torch._C._functorch.is_functorch_wrapped_tensor(x) else None


def write(op, written: Sequence[Tensor], *arguments) -> None:
    """Call an operator that writes to ``written``, of which none wants a derivative: what the layers of autograd and
    :func:`mutation` would do, in a quarter of their time."""
    if torch.compiler.is_compiling() or active():
        op(*arguments)
        return
    _bump(op._schema.name, written)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(*arguments)


def call(op, differentiable: tuple, *arguments):
    """Call an operator; if none of the ``differentiable`` arguments wants a derivative, without its autograd layer.

    That layer is Python, and costs more than a small kernel (tens of microseconds with twenty arguments). torch.compile
    removes it on its own and cannot trace the shortcut.
    """
    if torch.compiler.is_compiling() or active():
        return op(*arguments)
    if torch.is_grad_enabled():
        for tensor in differentiable:
            if tensor is not None and tensor.requires_grad:
                return op(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


# Tensors among the arguments of an operator ---------------------------------------------------------------------------


class _Nest(NamedTuple):
    """Where tensors stand among arguments: -1 for a tensor, n for a list of n tensors, None for anything else."""

    kinds: tuple[int | None, ...]

    @staticmethod
    def of(values: Sequence) -> _Nest:
        return _Nest(
            tuple(
                -1 if isinstance(v, Tensor) else len(v) if isinstance(v, (list, tuple)) and _is_tensors(v) else None
                for v in values
            )
        )

    def flatten(self, values: Sequence) -> list:
        """The tensors, or what stands in their places; None for a whole list is one None for each of its tensors."""
        flat = []
        for kind, value in zip(self.kinds, values):
            if kind == -1:
                flat.append(value)
            elif kind is not None:
                flat.extend([None] * kind if value is None else value)
        return flat

    def fill(self, flat: Sequence, values: Sequence) -> list:
        """``values`` with what is flat in the places of their tensors."""
        flat, filled = iter(flat), []
        for kind, value in zip(self.kinds, values):
            if kind is None:
                filled.append(value)
            else:
                filled.append(next(flat) if kind == -1 else [next(flat) for _ in range(kind)])
        return filled


def _is_tensors(values: Sequence) -> bool:
    return len(values) > 0 and all(isinstance(v, Tensor) for v in values)


def _overload(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.pyvtk, packet), overload or "default")


def _complete(op, arguments: tuple) -> tuple:
    """``arguments`` with the defaults that the dispatcher has taken away."""
    return *arguments, *(a.default_value for a in op._schema.arguments[len(arguments) :])


# Gradients ------------------------------------------------------------------------------------------------------------


def _below_autograd(op, keyset, arguments: tuple):
    # In transforms of torch.func the layers below differentiate on their own, though autograd.Function has turned that
    # off in this one.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)


def _refuse_forward_mode(name: str, tensors: Sequence[Tensor]) -> None:
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            f"pyvtk::{name} has no forward-mode derivative; the public functions of pyvtk compute it by their reference"
        )


def gradient(name: str, backward: Callable, *, setup_context: Callable) -> None:
    """Register the gradient of operator ``name``, as torch.library.register_autograd does.

    What that leaves open is closed here: torch.func's grad and vjp, alone and within each other, work; forward mode is
    an error and not a tangent of zero.

    Args:
        backward: (ctx, *grads) -> gradients of all arguments (None where there is none).
        setup_context: (ctx, inputs, output), saves what backward needs.
    """
    for each in _numbers.overloads(name):
        _gradient(each, backward, setup_context)


def _gradient(name: str, backward: Callable, setup_context: Callable) -> None:
    op = _overload(name)
    _with_gradient.add(name)

    def forward(ctx, call, *tensors):
        keyset, arguments, nest = call
        arguments = nest.fill(tensors, arguments)
        result = _below_autograd(op, keyset, arguments)
        setup_context(ctx, _complete(op, arguments), result)
        outputs = result if isinstance(result, tuple) else (result,)
        ctx.nest, ctx.nest_of_outputs = nest, _Nest.of(outputs)
        call.append(outputs)
        return tuple(ctx.nest_of_outputs.flatten(outputs))

    def backward_of_flat(ctx, *grads):
        needed = ctx.needs_input_grad
        none = [False] * len(op._schema.arguments)
        ctx.needs_input_grad = [*ctx.nest.fill(needed[1:], none), *none[len(ctx.nest.kinds) :]]
        try:
            found = backward(ctx, *ctx.nest_of_outputs.fill(grads, [None] * len(ctx.nest_of_outputs.kinds)))
        finally:
            ctx.needs_input_grad = needed
        return None, *ctx.nest.flatten(found if isinstance(found, tuple) else (found,))

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward_of_flat)}
    node = type(f"{name}_gradient", (_SingleLevelFunction,), functions)

    def autograd(keyset, *arguments):
        nest = _Nest.of(arguments)
        tensors = nest.flatten(arguments)
        _refuse_forward_mode(name, tensors)
        if not _asks_for_gradient(tensors):
            return _below_autograd(op, keyset, arguments)
        call = [keyset, arguments, nest]
        with enable_single_level_autograd_function():
            flat = node.apply(call, *unwrap_dead_wrappers(tuple(tensors)))
        outputs = call[3]
        found = _Nest.of(outputs).fill(flat, outputs)
        return found[0] if len(op._schema.returns) == 1 else tuple(found)

    _library.impl(name, autograd, "Autograd", with_keyset=True)


def _asks_for_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def second_gradient(
    name: str, weighed: Callable[..., Tensor], wanted: Sequence[str], prepare: Callable[..., list] | None = None
) -> None:
    """Register the gradient of operator ``name``, whose outputs are themselves gradients: by plain torch.

    Args:
        weighed: takes the arguments of the operator; the number whose gradients it gives, in plain torch.
        wanted: the arguments (tensors or lists of them) with respect to which they are, in the order of the outputs.
        prepare: the arguments of the operator -> those of ``weighed``, where the two differ.
    """
    op = _overload(name)
    names = [argument.name for argument in op._schema.arguments]
    places = [names.index(argument) for argument in wanted]

    def setup(ctx, inputs, output) -> None:
        ctx.arguments_nest = _Nest.of(inputs)
        tensors = ctx.arguments_nest.flatten(inputs)
        ctx.save_for_backward(*tensors)
        ctx.others = ctx.arguments_nest.fill([None] * len(tensors), inputs)

    def backward(ctx, *grads):
        nest = ctx.arguments_nest
        tensors = unwrap_dead_wrappers(ctx.saved_tensors)
        chosen = [i for i, needed in enumerate(nest.flatten(ctx.needs_input_grad)) if needed]
        given: list[int] = []

        def gradients(*some: Tensor) -> list[Tensor]:
            values = list(tensors)
            for i, x in zip(chosen, some):
                values[i] = x
            arguments = nest.fill(values, ctx.others)
            if prepare is not None:
                arguments = list(prepare(*arguments))
            given[:] = [place for place in places if arguments[place] is not None]

            def total(variables: list) -> Tensor:
                for place, x in zip(given, variables):
                    arguments[place] = x
                return weighed(*arguments)

            found = torch.func.grad(total)([arguments[place] for place in given])
            return [x for value in found for x in (value if isinstance(value, list) else [value])]

        found, pull = torch.func.vjp(gradients, *[tensors[i] for i in chosen])
        of_given = [g for g, place in zip(grads, places) if place in given]
        flat = [x for g in of_given for x in (g if isinstance(g, list) else [g])]
        pulled = pull([g.reshape(x.shape).to(x.dtype) for g, x in zip(flat, found)])
        result: list[Tensor | None] = [None] * len(tensors)
        for i, x in zip(chosen, pulled):
            result[i] = x
        return tuple(nest.fill(result, [None] * len(nest.kinds)))

    gradient(name, backward, setup_context=setup)


def constant(name: str) -> None:
    """Register that what operator ``name`` returns carries no gradient, whatever its arguments ask for."""
    op = _overload(name)
    _with_gradient.add(name)
    _library.impl(name, lambda keyset, *arguments: _below_autograd(op, keyset, arguments), "Autograd", with_keyset=True)


def lean(name: str) -> None:
    """Register no layer for operator ``name``, which is for calls of which nobody wants a derivative."""
    _with_gradient.add(name)


def no_gradient(name: str) -> None:
    """Register that operator ``name`` has no gradient: an error for whoever asks for one, not a zero.

    Where the operator writes to its arguments the error comes with the call, else with backward.
    """
    op = _overload(name)
    message = f"pyvtk::{name} has no gradient; the public functions of pyvtk call operators that have one"

    def backward(ctx, *grads):
        raise RuntimeError(message)

    def refuse(keyset, *arguments):
        tensors = _Nest.of(arguments).flatten(arguments)
        _refuse_forward_mode(name, tensors)
        if _asks_for_gradient(tensors):
            raise RuntimeError(f"pyvtk::{name} writes to its arguments: none may require a gradient, got one that does")
        return _below_autograd(op, keyset, arguments)

    if op._schema.is_mutable:
        _with_gradient.add(name)
        _library.impl(name, refuse, "Autograd", with_keyset=True)
    else:
        gradient(name, backward, setup_context=lambda ctx, inputs, output: None)


def complete(names: Sequence[str]) -> None:
    """Give every operator that nothing was registered for the answer that it has no gradient."""
    for name in names:
        if name not in _with_gradient:
            no_gradient(name)


# Mutation -------------------------------------------------------------------------------------------------------------


def mutation(name: str) -> None:
    """Let the version counters of what operator ``name`` writes to grow, by which autograd finds out that a saved
    tensor was changed, and which tensors of inference mode do not have: these are refused outside of it."""
    op = _overload(name)
    written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

    def bump(keyset, *arguments):
        tensors = [x for i in written for x in (arguments[i] if isinstance(arguments[i], list) else [arguments[i]])]
        _bump(op._schema.name, tensors)
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    _library.impl(name, bump, "ADInplaceOrView", with_keyset=True)


def _bump(name: str, written: Sequence[Tensor]) -> None:
    if not torch.is_inference_mode_enabled():
        for x in written:
            if x.is_inference():
                raise RuntimeError(f"{name} writes to a tensor of inference mode, which only inference mode may change")
    torch.autograd.graph.increment_version(written)


# vmap -----------------------------------------------------------------------------------------------------------------


class Fold(NamedTuple):
    """How a mapped axis goes into the tensors of an operator: it becomes the outer part of one of their axes.

    Attributes:
        axes: argument -> the axis. An argument that is not mapped is repeated; one that is not named must not be.
        outputs: the axis of each output, from which the mapped axis is taken again.
        unless: (arguments, mapped dimensions, by name) -> whether to run the operator once for each instead.
    """

    axes: dict[str, int]
    outputs: tuple[int, ...]
    unless: Callable[[dict, dict], bool] = lambda arguments, mapped: False


def batch(name: str, fold: Fold | Callable | None = None) -> None:
    """Register how torch.vmap goes through operator ``name``: by ``fold``, or (None, or where that does not serve) by
    one call for each element of the mapped axis.

    A function gets (size, mapped, arguments), dicts by the arguments' names, and gives (arguments, axes of the
    outputs), or None where it does not serve.
    """
    op = _overload(name)
    names = [argument.name for argument in op._schema.arguments]

    def rule(info, dims, *arguments):
        arguments = _complete(op, arguments)
        mapped = dict(zip(names, (*dims, *[None] * (len(names) - len(dims)))))
        folded = None
        if info.batch_size == 0:
            return _none_at_all(op, list(mapped.values()), arguments)
        if isinstance(fold, Fold):
            folded = _fold(fold, info.batch_size, mapped, dict(zip(names, arguments)))
        elif fold is not None:
            folded = fold(info.batch_size, mapped, dict(zip(names, arguments)))
        if folded is None:
            return _one_by_one(op, info.batch_size, list(mapped.values()), arguments)
        whole, axes = folded
        outputs = op(*[whole[name] for name in names])
        if not isinstance(outputs, tuple):
            (output,), (axis,) = _unfold(info.batch_size, (outputs,), axes)
            return output, axis
        return _unfold(info.batch_size, outputs, axes)

    torch.library.register_vmap(f"pyvtk::{name}", rule, lib=_library)


def is_mapped(dim) -> bool:
    return dim is not None and (not isinstance(dim, list) or any(d is not None for d in dim))


def folded(x: Tensor | list | None, dim, axis: int, size: int):
    """``x`` with its mapped dimension (or, not mapped, repeated ``size`` times) as the outer part of ``axis``."""
    if x is None:
        return None
    if isinstance(x, (list, tuple)):
        return [folded(one, of_one, axis, size) for one, of_one in zip(x, dim or [None] * len(x))]
    x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    x = x.movedim(0, axis)
    return x.reshape(*x.shape[:axis], size * x.shape[axis + 1], *x.shape[axis + 2 :])


def _fold(fold: Fold, size: int, mapped: dict, arguments: dict) -> tuple[dict, tuple] | None:
    others = [name for name, dim in mapped.items() if is_mapped(dim) and name not in fold.axes]
    if others or fold.unless(arguments, mapped):
        return None
    whole = dict(arguments)
    for name, axis in fold.axes.items():
        whole[name] = folded(arguments[name], mapped[name], axis, size)
    return whole, fold.outputs


def _unfold(size: int, outputs: Sequence, axes: Sequence[int]) -> tuple[tuple, tuple]:
    result, dims = [], []
    for output, axis in zip(outputs, axes):
        if isinstance(output, (list, tuple)):
            parts, places = _unfold(size, output, axis if isinstance(axis, (list, tuple)) else [axis] * len(output))
            output, axis = list(parts), list(places)
        elif axis >= output.dim():  # what an operator gives where there is nothing to give
            axis = None
        else:
            output = output.reshape(*output.shape[:axis], size, output.shape[axis] // size, *output.shape[axis + 1 :])
        result.append(output)
        dims.append(axis)
    return tuple(result), tuple(dims)


def _one_by_one(op, size: int, dims: list, arguments: Sequence) -> tuple:
    for argument, dim in zip(op._schema.arguments, dims):
        if argument.alias_info is not None and argument.alias_info.is_write and not _all_mapped(dim):
            raise RuntimeError(
                f"{op._schema.name}: {argument.name} must be mapped by vmap where another argument is, since it is "
                "written to, got one that is not"
            )

    def at(value, dim, i: int):
        if isinstance(dim, (list, tuple)):
            return [at(one, of_one, i) for one, of_one in zip(value, dim)]
        return value if dim is None else value.select(dim, i)

    every = [op(*[at(value, dim, i) for value, dim in zip(arguments, dims)]) for i in range(size)]
    if not op._schema.returns:
        return None, None
    if isinstance(every[0], Tensor):
        return torch.stack(every), 0
    if isinstance(every[0], list):
        return [torch.stack(list(x)) for x in zip(*every)], [0] * len(every[0])
    stacked = [
        [torch.stack(list(y)) for y in zip(*x)] if isinstance(x[0], list) else torch.stack(list(x)) for x in zip(*every)
    ]
    return tuple(stacked), tuple([0] * len(x) if isinstance(x, list) else 0 for x in stacked)


def _none_at_all(op, dims: list, arguments: Sequence) -> tuple:
    """Results for a mapped axis of length 0, whose shapes the fake kernel tells."""

    def fake(value, dim):
        if isinstance(value, (list, tuple)):
            return [fake(one, of_one) for one, of_one in zip(value, dim or [None] * len(value))]
        if not isinstance(value, Tensor):
            return value
        shape = [size for i, size in enumerate(value.shape) if dim is None or i != dim % value.dim()]
        return torch.empty(shape, dtype=value.dtype, device="meta")

    if not op._schema.returns:
        return None, None
    device = next(x.device for x in _Nest.of(arguments).flatten(arguments))
    found = op(*[fake(value, dim) for value, dim in zip(arguments, dims)])
    outputs = pytree.tree_map(lambda x: torch.empty((0, *x.shape), dtype=x.dtype, device=device), found)
    return outputs, pytree.tree_map(lambda _: 0, outputs)


def _all_mapped(dim) -> bool:
    return all(d is not None for d in dim) if isinstance(dim, (list, tuple)) else dim is not None
