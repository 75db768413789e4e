"""Gradients that are sparse24's own: products with a compressed weight, and what passes straight through.

They work under torch.func and vmap, in forward mode (but SR-STE's, which says so) and twice: backwards are made of
operations that have gradients themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from pyvtk import backends
from pyvtk.ops.sparse24 import count_rows
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24.copies import is_current, is_sealed_mask

LARGEST = 127  # of int8; -128 is not used, so that the range is symmetric


def caller_of(function: type[Function]):
    """``function.apply``, by a twin of it where the Function itself costs too much or is not understood."""
    # torch binds arguments of a Function with a setup_context by its signature, for longer than a small kernel takes
    plain = type(
        function.__name__, (Function,), {name: staticmethod(getattr(function, name)) for name in ("backward", "jvp")}
    )

    def forward(ctx, *arguments):
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    plain.forward = staticmethod(forward)
    # torch.compile traces no Function that has a jvp
    traced = type(
        function.__name__, (function,), {"jvp": staticmethod(Function.jvp), "__module__": function.__module__}
    )

    def call(*arguments):
        if torch.compiler.is_compiling():
            return traced.apply(*arguments)
        if torch._C._are_functorch_transforms_active():
            return function.apply(*arguments)
        return plain.apply(*arguments)

    return call


def wants_gradient(tensor: Tensor | None) -> bool:
    """Whether a gradient or a tangent is asked of this tensor, by autograd or inside of torch.func's wrappers."""
    if tensor is None:
        return False
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and tensor.requires_grad
    if torch.is_grad_enabled() and tensor.requires_grad:
        return True
    forward = torch.autograd.forward_ad._current_level >= 0
    functorch = torch._C._functorch
    while True:
        if forward and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            return True
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
        if torch.is_grad_enabled() and tensor.requires_grad:
            return True


# Products


def sparse_product(x: Tensor, values: Tensor, metadata: Tensor, choice=()) -> Tensor:
    """x W^T by the compiled operators: not by the page, whose checks torch.compile does not trace inside a backward
    pass. Without gradient."""
    rows = x.reshape(count_rows(x), x.shape[-1]).contiguous()
    y = torch.ops.pyvtk.sparse24_linear(rows, values, metadata, None, None, None, None, "none", choice)
    return y.reshape(*x.shape[:-1], values.shape[0])


class TransposedProduct(Function):
    """x W^T of a frozen weight, whose compressed transpose makes the gradient of x a sparse product too."""

    @staticmethod
    def forward(x: Tensor, values: Tensor, metadata: Tensor, t_values: Tensor, t_metadata: Tensor, choice) -> Tensor:
        return sparse_product(x, values, metadata, choice)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:5])
        ctx.save_for_forward(*inputs[1:5])
        ctx.choice = inputs[5]

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, transposed = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        if torch.compiler.is_compiling():
            grad_x = torch.ops.pyvtk.sparse24_by_transpose(grad, *weight, *transposed)
        else:
            grad_x = _transposed_product(grad, *transposed, *weight, ())
        return grad_x, None, None, None, None, None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor, *_):
        return _transposed_product(x_tangent, *ctx.saved_tensors, ctx.choice)

    @staticmethod
    def vmap(info, in_dims, x: Tensor, *rest):
        if any(dim is not None for dim in in_dims[1:5]):
            raise RuntimeError("sparse24.linear: a weight with a transpose cannot be mapped over by vmap, only x can")
        # more leading dimensions are nothing special
        return _transposed_product(x.movedim(in_dims[0], 0), *rest), 0


_transposed_product = caller_of(TransposedProduct)


def transposed_product(x: Tensor, weight, transposed, choice) -> Tensor:
    """:class:`TransposedProduct` of a Sparse24Weight and its compressed transpose."""
    return _transposed_product(x, weight.values, weight.metadata, transposed.values, transposed.metadata, choice)


class MaskedProduct(Function):
    """x (W * mask)^T with the compressed weight, and with a transposable mask its input gradient too. Gradient to W:
    that of W * mask, straight through to all of W."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, mask: Tensor, transposable: bool) -> Tensor:
        return _masked_product(x, weight, mask, False)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, mask, ctx.transposable = inputs
        ctx.save_for_backward(x, weight, mask)
        ctx.save_for_forward(x, weight, mask)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, mask = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if not ctx.transposable:
                grad_x = grad @ straight_through(weight, mask, None)
            elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
                grad_x = masked_product(grad, weight.T, mask.T, True)
            else:
                grad_x = _masked_product(grad, weight, mask, True)
        if ctx.needs_input_grad[1]:
            rows = count_rows(grad)
            grad_weight = grad.reshape(rows, grad.shape[-1]).T @ x.reshape(rows, x.shape[-1])
        return grad_x, grad_weight, None, None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor | None, weight_tangent: Tensor | None, *_):
        x, weight, mask = ctx.saved_tensors
        by_x = None if x_tangent is None else masked_product(x_tangent, weight, mask, ctx.transposable)
        by_weight = None if weight_tangent is None else F.linear(x, weight_tangent)
        return by_weight if by_x is None else by_x if by_weight is None else by_x + by_weight

    @staticmethod
    def vmap(info, in_dims, x: Tensor, weight: Tensor, mask: Tensor, transposable: bool):
        if in_dims[1] is None and in_dims[2] is None:  # more leading dimensions are nothing special
            return masked_product(x.movedim(in_dims[0], 0), weight, mask, transposable), 0

        def product(x, weight, mask):
            return F.linear(x, straight_through(weight, mask, None))

        mapped = torch.vmap(product, in_dims[:3], randomness=info.randomness)
        return mapped(x, weight, mask), 0


masked_product = caller_of(MaskedProduct)


def _masked_product(x: Tensor, weight: Tensor, mask: Tensor, transpose: bool) -> Tensor:
    """x (W * mask)^T, or x (W * mask). Where there is no compiled kernel, a dense product: plain torch gains nothing by
    compressing."""
    if backends.pick("sparse24_linear", None, x, x.dtype) != "compiled":
        seen = torch.where(mask, weight, 0)
        return x @ (seen if transpose else seen.T)
    if torch.compiler.is_compiling():
        packed = torch.ops.pyvtk.sparse24_compress_masked(weight, mask, transpose)
    else:
        # trusted: pruning made the mask, or Linear24 verified it
        weight, mask = (weight.T, mask.T) if transpose else (weight, mask)
        packed = torch.ops.pyvtk.sparse24_compress(weight.contiguous(), mask.contiguous(), True)
    return sparse_product(x, *packed)


# Straight through


def seen(weight: Tensor, mask: Tensor, left: Tensor | None = None) -> Tensor:
    """The weight where the mask holds; elsewhere 0, or ``left`` (float32 []) times the weight, rounded once."""
    return torch.where(mask, weight, 0 if left is None else (weight * left[None, None]).to(weight.dtype))


class StraightThrough(Function):
    """:func:`seen`, whose gradient goes to all of the weight as it is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, left: Tensor | None) -> Tensor:
        return seen(weight, mask, left)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None, None

    @staticmethod
    def jvp(ctx, weight_tangent: Tensor, *_):
        return weight_tangent.clone()


straight_through = caller_of(StraightThrough)  # (weight, mask, left)


class Decay(Function):
    """The weight as it is; its gradient with rate * weight added where the mask does not hold (SR-STE)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, rate: float) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weight, mask, ctx.rate = inputs
        ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, mask = ctx.saved_tensors
        return torch.where(mask, grad, grad + ctx.rate * weight), None, None

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(
            "Linear24: method 'sr_ste' has no forward-mode derivative: it adds to the gradient what is the derivative "
            "of nothing; take method 'ste', or the gradient of reverse mode"
        )


decay = caller_of(Decay)  # (weight, mask, rate)


class Rounded(Function):
    """Rounding to int8 with a gradient: 1 inside the range, and where it clips 0 (``clips``) or 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, clips: bool) -> Tensor:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        scale = scale.to(wide)
        rounded = (x.to(wide) / scale).round().clamp(-LARGEST, LARGEST) * scale
        # torch.compile of torch 2.11 loses the gradient of a Function that ends in a .to() of no effect
        return rounded if wide == x.dtype else rounded.to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, scale, ctx.clips = inputs
        ctx.save_for_backward(x, scale)
        ctx.save_for_forward(x, scale)

    @staticmethod
    def _through(ctx, change: Tensor) -> Tensor:
        if not ctx.clips:
            return change
        x, scale = ctx.saved_tensors
        # a value that stands at the edge may exceed it by the rounding of scale; it was not clipped
        return change * (x.abs() <= scale * (LARGEST + 0.5))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return Rounded._through(ctx, grad), None, None

    @staticmethod
    def jvp(ctx, x_tangent: Tensor, *_):
        return Rounded._through(ctx, x_tangent).clone()


rounded = caller_of(Rounded)  # (x, scale, clips)


# What compiled code calls, since it can ask only when it runs whether a copy or a mask is what it was.


@torch.library.custom_op(
    "pyvtk::sparse24_by_transpose",
    mutates_args=(),
    schema="(Tensor grad, Tensor values, Tensor metadata, Tensor t_values, Tensor t_metadata) -> Tensor",
)
def _by_transpose(grad, values, metadata, t_values, t_metadata):
    """grad W by the compressed transpose; if that is of another W by now, by the weight."""
    if is_current(t_values, values, metadata, None):
        return sparse_product(grad, t_values, t_metadata)
    return grad @ reference.decompress(values, metadata)


@_by_transpose.register_fake
def _(grad, values, metadata, t_values, t_metadata):
    return grad.new_empty((*grad.shape[:-1], 2 * values.shape[1]))


@torch.library.custom_op(
    "pyvtk::sparse24_compress_masked",
    mutates_args=(),
    schema="(Tensor weight, Tensor mask, bool transpose) -> (Tensor, Tensor)",
)
def _compress_masked(weight, mask, transpose):
    """Linear24's weight, or its transpose; RuntimeError if its mask, which is looked at unless nobody wrote to it, is
    not 2:4."""
    trusted = is_sealed_mask(mask)
    weight, mask = (weight.T, mask.T) if transpose else (weight, mask)
    return torch.ops.pyvtk.sparse24_compress(weight.contiguous(), mask.contiguous(), trusted)


@_compress_masked.register_fake
def _(weight, mask, transpose):
    rows, columns = reversed(weight.shape) if transpose else weight.shape
    return weight.new_empty((rows, columns // 2)), weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)
