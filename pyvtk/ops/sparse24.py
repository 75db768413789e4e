"""Products with 2:4 sparse weights, on plain tensors. :mod:`pyvtk.sparse24` holds what users call.

The format (values, metadata, scales) is described byte by byte in ``pyvtk/reference/sparse24.py``.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
from torch import Tensor

from pyvtk import backends, checks, transforms
from pyvtk.reference import sparse24 as reference

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu")
KERNELS = ("few", "many", "dense", "vendor")  # by their number in ``choice``
VALUES = (*checks.FLOATS, torch.int8)


def _compress_fake(weight, mask, trusted=False):
    rows, columns = weight.shape
    values = weight.new_empty((rows, columns // 2))
    return values, weight.new_empty((rows, (columns + 7) // 8), dtype=torch.uint8)


def _linear_fake(x, values, *_):
    return x.new_empty((*x.shape[:-1], values.shape[0]))


# mask: exactly two True in every group of four; anything else is a RuntimeError, or, trusted, keeps the first two
backends.define(
    "sparse24_compress",
    "(Tensor weight, Tensor mask, bool trusted=False) -> (Tensor values, Tensor metadata)",
    fake=_compress_fake,
    vmap=transforms.Fold({"weight": 0, "mask": 0}, (0, 0)),
    dtypes=(*backends.HALF_AND_SINGLE, torch.int8),
)
backends.define(
    "sparse24_decompress",
    "(Tensor values, Tensor metadata) -> Tensor",
    fake=lambda values, metadata: values.new_empty((values.shape[0], values.shape[1] * 2)),
    vmap=transforms.Fold({"values": 0, "metadata": 0}, (0,)),
    dtypes=(*backends.HALF_AND_SINGLE, torch.int8),
)
# choice: pairs (rows, kernel), ascending: from so many rows of x on, this kernel. The operator looks at x's rows, so
# that torch.compile with dynamic rows needs no guard. Empty, and kernel -1: few below 8 rows (CUDA: 33), many from
# there. vendor: the weight as torch._cslt_compress packs it.
backends.define(
    "sparse24_linear",
    "(Tensor x, Tensor values, Tensor metadata, Tensor? scales, Tensor? dense, Tensor? bias, Tensor? mul, "
    "str activation, SymInt[] choice, Tensor? vendor=None) -> Tensor",
    fake=_linear_fake,
    vmap=transforms.Fold({"x": 0, "mul": 0}, (0,)),
    dtypes=backends.HALF_AND_SINGLE,
)
backends.define(
    "sparse24_linear_int8",
    "(Tensor x, Tensor values, Tensor metadata, Tensor scales, Tensor? x_scale, Tensor? bias, Tensor? mul, "
    "str activation) -> Tensor",
    fake=_linear_fake,
    vmap=transforms.Fold({"x": 0, "mul": 0}, (0,)),
    dtypes=backends.HALF_AND_SINGLE,
)


def _save_metadata(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _compress_backward(ctx, grad, _):
    return decompress(grad.contiguous(), *ctx.saved_tensors), None, None


def _decompress_backward(ctx, grad):
    return reference.kept(grad, *ctx.saved_tensors), None


def _linear_setup(ctx, inputs, output) -> None:
    x, values, metadata, scales, dense, bias, mul, activation, *_ = inputs
    ctx.composed = mul is None and activation == "none"
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, values, metadata, scales, dense)


def _linear_backward(ctx, grad):
    if not ctx.composed:
        raise RuntimeError("sparse24_linear: with an activation or mul, the gradient is composed by the page")
    x, values, metadata, scales, dense = ctx.saved_tensors
    grad_x = grad_values = grad_bias = None
    if ctx.needs_input_grad[0]:
        if dense is None or ctx.needs_input_grad[1]:  # a copy would cut a second gradient off
            dense = decompress(values, metadata)
            dense = dense if scales is None else (dense * scales[:, None]).to(x.dtype)
        grad_x = grad @ dense
    rows = _rows(grad)
    if ctx.needs_input_grad[1]:
        grad_values = reference.kept(rows.T @ _rows(x), metadata)
    if ctx.needs_input_grad[5]:
        grad_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_x, grad_values, None, None, None, grad_bias, None, None, None, None


transforms.gradient("sparse24_compress", _compress_backward, setup_context=_save_metadata)
transforms.gradient(
    "sparse24_decompress",
    _decompress_backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]),
)
transforms.gradient("sparse24_linear", _linear_backward, setup_context=_linear_setup)


def _check_packed(op: str, values, metadata) -> None:
    """values and metadata fit each other and the format."""
    checks.tensor(op, "values", values, 2)
    checks.dtype(op, "values", values, VALUES)
    checks.tensor(op, "metadata", metadata)
    checks.dtype(op, "metadata", metadata, (torch.uint8,))
    rows, half = values.shape
    if half % 2:
        raise ValueError(f"{op}: values must have an even number of columns, two for each group, got {half}")
    checks.shape(op, "metadata", metadata, (rows, (half + 3) // 4), "[out_features, ceil(in_features / 8)]")
    for name, tensor in (("values", values), ("metadata", metadata)):
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, got strides {tensor.stride()}")
    checks.same_device(op, "metadata", metadata, values, "values")


def check_weight(op: str, values, metadata, scales) -> None:
    """values, metadata and scales fit each other and the format."""
    _check_packed(op, values, metadata)
    if (scales is None) == (values.dtype == torch.int8):
        got = "None" if scales is None else f"them for {values.dtype}"
        raise ValueError(f"{op}: scales must be given for int8 values and only for these, got {got}")
    if scales is not None:
        checks.tensor(op, "scales", scales)
        checks.dtype(op, "scales", scales, (torch.float32,))
        checks.shape(op, "scales", scales, (values.shape[0],), "[out_features]")
        checks.same_device(op, "scales", scales, values, "values")


def check_call(op: str, x, values, metadata, scales, bias, mul, activation) -> None:
    """What linear and linear_int8 ask of their arguments alike."""
    checks.tensor(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least 1 dimension, got shape ()")
    checks.dtype(op, "x", x, checks.FLOATS)
    check_weight(op, values, metadata, scales)
    rows, columns = values.shape[0], 2 * values.shape[1]
    if x.shape[-1] != columns:
        raise ValueError(f"{op}: x must be [..., in_features = {columns}], got shape {tuple(x.shape)}")
    checks.same_device(op, "values", values, x, "x")
    if values.dtype != torch.int8 and values.dtype != x.dtype:
        raise TypeError(f"{op}: x must have the dtype of values ({values.dtype}), got {x.dtype}")
    if bias is not None:
        checks.tensor(op, "bias", bias)
        checks.dtype(op, "bias", bias, (x.dtype, torch.float32))
        checks.shape(op, "bias", bias, (rows,), "[out_features]")
        checks.same_device(op, "bias", bias, x, "x")
    if mul is not None:
        checks.tensor(op, "mul", mul)
        checks.dtype(op, "mul", mul, (x.dtype,))
        checks.shape(op, "mul", mul, (*x.shape[:-1], rows), "[..., out_features]")
        checks.same_device(op, "mul", mul, x, "x")
    checks.choice(op, "activation", activation, ACTIVATIONS)


def check_choice(op: str, choice, dense: Tensor | None, vendor: Tensor | None) -> None:
    """``choice`` is pairs (rows, kernel) with ascending rows, and asks for a kernel only if there is its weight."""
    if not isinstance(choice, (tuple, list)) or any(isinstance(c, bool) or not isinstance(c, int) for c in choice):
        raise TypeError(f"{op}: choice must be a flat tuple of ints (rows, kernel, ...), got {choice!r}")
    starts, kernels = choice[0::2], choice[1::2]
    ascending = all(a < b for a, b in pairwise(starts))
    if len(choice) % 2 or not ascending or any(kernel not in (-1, 0, 1, 2, 3) for kernel in kernels):
        raise ValueError(
            f"{op}: choice must be pairs (rows, kernel) ascending in rows, kernel -1 (default), 0 (few), 1 (many), "
            f"2 (dense) or 3 (vendor), got {choice!r}"
        )
    for name, tensor, kernel in (("dense", dense, 2), ("vendor", vendor, 3)):
        if tensor is None and kernel in kernels:
            raise ValueError(f"{op}: {name} must be given where choice has kernel {kernel} ({name}), got None")


def compress(
    weight: Tensor, mask: Tensor, *, trusted: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Values [N, K / 2] and metadata uint8 [N, ceil(K / 8)] of weight [N, K] where mask (bool [N, K]) holds.

    Differentiable in weight. The host waits once where the mask is checked (compiled CPU kernels: not).

    trusted: mask is known to have exactly two in every group of four (:func:`pyvtk.sparse24.prune` made it). It is not
    checked, so nobody waits and a CUDA graph can capture the call; a group with more or less keeps its first two
    entries, so that the result is a legal weight in any case.

    TypeError, ValueError: an argument that does not fit. RuntimeError: a group of four has not exactly two in mask.
    """
    op = "sparse24.compress"
    checks.boolean(op, "trusted", trusted)
    checks.tensor(op, "weight", weight, 2)
    checks.dtype(op, "weight", weight, VALUES)
    if weight.shape[1] % 4:
        raise ValueError(f"{op}: weight must have in_features in multiples of 4, got {weight.shape[1]}")
    checks.tensor(op, "mask", mask)
    checks.dtype(op, "mask", mask, (torch.bool,))
    checks.shape(op, "mask", mask, tuple(weight.shape), "[out_features, in_features]")
    checks.same_device(op, "mask", mask, weight, "weight")
    weight, mask = (x if x.stride(1) == 1 else x.contiguous() for x in (weight, mask))
    if backends.pick("sparse24_compress", backend, weight, weight.dtype, (weight,)) == "compiled":
        return transforms.call(torch.ops.pyvtk.sparse24_compress, (weight,), weight, mask, trusted)
    return reference.compress(weight, mask, trusted)


def decompress(values: Tensor, metadata: Tensor, *, backend: str | None = None) -> Tensor:
    """The dense matrix [N, K] of values [N, K / 2] and metadata, in values' dtype (scales are not applied)."""
    _check_packed("sparse24.decompress", values, metadata)
    if backends.pick("sparse24_decompress", backend, values, values.dtype, (values,)) == "compiled":
        return transforms.call(torch.ops.pyvtk.sparse24_decompress, (values,), values, metadata)
    return reference.decompress(values, metadata)


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    *,
    scales: Tensor | None = None,
    dense: Tensor | None = None,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    activation: str = "none",
    choice: tuple[int, ...] = (),
    vendor: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x W^T + bias) * mul with the weight W [N, K] that values, metadata and scales stand for.

    Args:
        x: [..., K], floating, of the dtype of values unless these are int8; any strides, zero rows too.
        values, metadata, scales: the weight; scales float32 [N] for int8 values and only for these.
        dense: [N, K] in x's dtype, the same weight; for rows where ``choice`` takes the dense kernel.
        bias: [N], of x's dtype or float32. mul: [..., N] in x's dtype.
        activation: one of :data:`ACTIVATIONS`; "gelu" is the one with erf, "quick_gelu" is z sigmoid(1.702 z).
        choice: pairs (rows, kernel), ascending; from so many rows of x on, this kernel of :data:`KERNELS`, by number.
            Empty, and -1 for a kernel: few below 8 rows (on CUDA 33), many from there.
        vendor: [N, opaque] in x's dtype, the same weight as ``torch._cslt_compress`` packs it, contiguous; for rows
            where ``choice`` takes the vendor's kernel (CUDA; :mod:`pyvtk.sparse24.vendor` has its limits).
        backend: "compiled", "reference", or None for the first that can run.

    Returns:
        [..., N] in x's dtype, contiguous; sums in float32, rounded once. Differentiable in x, values, bias and mul;
        with a gradient asked for, activation and mul are steps of their own in x's dtype. Where x holds a NaN or an
        infinity, kernels may or may not multiply it by the zeros between the kept weights.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: the backend cannot run.
    """
    op = "sparse24.linear"
    check_call(op, x, values, metadata, scales, bias, mul, activation)
    if dense is not None:
        checks.tensor(op, "dense", dense)
        checks.dtype(op, "dense", dense, (x.dtype,))
        checks.shape(op, "dense", dense, (values.shape[0], x.shape[-1]), "[out_features, in_features]")
        checks.same_device(op, "dense", dense, x, "x")
    if vendor is not None:
        checks.tensor(op, "vendor", vendor, 2)
        checks.dtype(op, "vendor", vendor, (x.dtype,))
        checks.same_device(op, "vendor", vendor, x, "x")
    check_choice(op, choice, dense, vendor)
    differentiable = (x, values, bias, mul)
    if backends.pick("sparse24_linear", backend, x, x.dtype, differentiable) == "reference":
        with full_precision(x):
            return reference.linear(x, values, metadata, scales, dense, bias, mul, activation, choice)
    operator = torch.ops.pyvtk.sparse24_linear
    rest = (values, metadata, scales, dense, bias)
    if transforms.wants_gradient(*differentiable):
        out = operator(_rows(x), *rest, None, "none", choice, vendor).reshape(*x.shape[:-1], values.shape[0])
        out = reference.activate(out, activation)
        return out if mul is None else out * mul
    mul = None if mul is None else _rows(mul)
    out = transforms.call(operator, (), _rows(x), *rest, mul, activation, choice, vendor)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], values.shape[0])


def linear_int8(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    *,
    x_scale: Tensor | None = None,
    bias: Tensor | None = None,
    mul: Tensor | None = None,
    activation: str = "none",
    backend: str | None = None,
) -> Tensor:
    """:func:`linear` with int8 values and x rounded to int8 too: exact sums of whole numbers, times both scales.

    x becomes clamp(round(x / s), -127, 127), half to even; s is x_scale (float32 [1], of the whole tensor), or of each
    row max |x| / 127 (1 for a row of zeros, and for one below 1.5e-36, which becomes zeros). Not differentiable:
    :func:`pyvtk.sparse24.fake_quantize` is for training.

    Returns, raises: as :func:`linear`; ValueError too if a gradient is asked for.
    """
    op = "sparse24.linear_int8"
    check_call(op, x, values, metadata, scales, bias, mul, activation)
    if values.dtype != torch.int8:
        raise TypeError(f"{op}: values must have dtype int8, got {values.dtype}")
    if x_scale is not None:
        checks.tensor(op, "x_scale", x_scale)
        checks.dtype(op, "x_scale", x_scale, (torch.float32,))
        checks.shape(op, "x_scale", x_scale, (1,), "[1]")
        checks.same_device(op, "x_scale", x_scale, x, "x")
    if transforms.wants_gradient(x, bias, mul):
        raise ValueError(f"{op}: x, bias and mul must not ask for a gradient (rounding has none), got one that does")
    if backends.pick("sparse24_linear_int8", backend, x, x.dtype) == "reference":
        with full_precision(x):
            return reference.linear_int8(x, values, metadata, scales, x_scale, bias, mul, activation)
    mul = None if mul is None else _rows(mul)
    rest = (values, metadata, scales, x_scale, bias, mul, activation)
    out = transforms.call(torch.ops.pyvtk.sparse24_linear_int8, (), _rows(x), *rest)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], values.shape[0])


def full_precision(x: Tensor):
    """Autocast would round inside the reference, too."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if backends.autocasts(device) else nullcontext()


def count_rows(x: Tensor) -> int:
    """Of x [..., columns]. Not numel() of its shape, which torch.export takes for a fixed number."""
    return math.prod(x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    """x as a matrix with a contiguous last dimension; a view where its strides allow."""
    x = x if x.dim() == 2 else x.reshape(count_rows(x), x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
