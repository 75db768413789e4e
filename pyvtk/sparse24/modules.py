"""Products with a :class:`Sparse24Weight`, and the module that stands where an nn.Linear stood."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyvtk import backends, checks
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24 import vendor as cusparselt
from pyvtk.sparse24.copies import is_current
from pyvtk.sparse24.format import (
    DEFAULT,
    DENSE,
    FORMAT_VERSION,
    VENDOR,
    Sparse24Weight,
    check_metadata,
    check_version,
)
from pyvtk.sparse24.functions import transposed_product, wants_gradient

FALLBACKS = ("cache", "never")


def kernel_at(choice: tuple[int, ...], rows: int) -> int:
    """The kernel that ``choice`` takes for so many rows."""
    kernel = DEFAULT
    for start, chosen in zip(choice[0::2], choice[1::2]):
        if rows >= start:
            kernel = chosen
    return kernel


def without(choice: tuple[int, ...], missing: tuple[int, ...] = (DENSE, VENDOR)) -> tuple[int, ...]:
    """``choice`` for a weight without copies for these kernels: the sparse kernel of an empty choice stands in."""
    result: list[int] = []
    for start, kernel in zip(choice[0::2], choice[1::2]):
        # not `in`, which under torch.compile(dynamic=True) misses a number that it made symbolic
        result += [start, DEFAULT if any(kernel == other for other in missing) else kernel]
    return tuple(result)


def _copies(
    weight: Sparse24Weight, x: Tensor, fallback: str, differentiable: tuple
) -> tuple[Tensor | None, Tensor | None, tuple[int, ...]]:
    """The dense copy and the vendor's form, as far as this call may use them, and the choice that fits."""
    choice = weight.choice
    # as in without(), not `in`
    if not any(kernel == DENSE or kernel == VENDOR for kernel in choice[1::2]):
        return None, None, choice
    if fallback == "never" or wants_gradient(weight.values):
        return None, None, without(choice)
    dense, vendor = _held(weight, differentiable) if torch.compiler.is_compiling() else _made(weight, x)
    dense, vendor = (t if t is not None and t.dtype == x.dtype else None for t in (dense, vendor))
    missing = tuple(kernel for kernel, copy in ((DENSE, dense), (VENDOR, vendor)) if copy is None)
    return dense, vendor, without(choice, missing)


def _made(weight: Sparse24Weight, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The copy that this call needs, made if there is no current one."""
    kernel = kernel_at(weight.choice, ops.count_rows(x))
    # a call that is being recorded (make_fx, fake tensors) would keep a copy for good
    if (kernel != DENSE and kernel != VENDOR) or torch._C._len_torch_dispatch_stack():
        return None, None
    copies = weight.current_copies()
    copy = None if copies is None else copies.dense if kernel == DENSE else copies.vendor
    if copy is None or copy.dtype != x.dtype:
        if weight.why_no_copies() is not None:
            return None, None
        if kernel == DENSE:
            copy = weight.cache_dense(x.dtype)
        elif cusparselt.why_not(*weight.shape, x.dtype, weight.device) is None:
            copy = weight.cache_vendor(x.dtype)
    return (copy, None) if kernel == DENSE else (None, copy)


def _exporting() -> bool:
    # not is_exporting(), which torch 2.11 answers with True in all compiled code
    return torch.compiler._is_exporting_flag


def _held(weight: Sparse24Weight, differentiable: tuple) -> tuple[Tensor | None, Tensor | None]:
    """For torch.compile: copies that are there, whether they are current or not, which the operator finds out at each
    call. None for a program that is exported, or a gradient, which would be of an old copy."""
    copies = weight._copies
    if copies is None or _exporting() or any(wants_gradient(t) for t in differentiable):
        return None, None
    return copies.dense, copies.vendor


@torch.library.custom_op(
    "pyvtk::sparse24_linear_by_copy",
    mutates_args=(),
    schema="(Tensor x, Tensor values, Tensor metadata, Tensor? scales, Tensor? dense, Tensor? bias, Tensor? mul, "
    "str activation, SymInt[] choice, Tensor? vendor) -> Tensor",
)
def _linear_by_copy(x, values, metadata, scales, dense, bias, mul, activation, choice, vendor):
    """sparse24_linear for compiled code, which cannot see that a copy went stale: then a sparse kernel stands in."""
    copies = ((DENSE, dense), (VENDOR, vendor))
    stale = [k for k, copy in copies if copy is not None and not is_current(copy, values, metadata, scales)]
    choice = without(choice, tuple(stale))
    return torch.ops.pyvtk.sparse24_linear(x, values, metadata, scales, dense, bias, mul, activation, choice, vendor)


@_linear_by_copy.register_fake
def _(x, values, *_):
    return x.new_empty((x.shape[0], values.shape[0]))


def _check(op: str, weight) -> None:
    if not isinstance(weight, Sparse24Weight):
        raise TypeError(f"{op}: weight must be a Sparse24Weight, got {type(weight).__name__}")


def _cast(x: Tensor, bias: Tensor | None, mul: Tensor | None):
    """x, bias and mul as autocast wants them."""
    before, x = getattr(x, "dtype", None), backends.autocast(x)
    if isinstance(x, Tensor) and x.dtype != before:
        mul = mul.to(x.dtype) if isinstance(mul, Tensor) else mul
        bias = bias.to(x.dtype) if isinstance(bias, Tensor) and bias.dtype != torch.float32 else bias
    return x, bias, mul


def _transpose_for(x, weight: Sparse24Weight, backend: str | None) -> Sparse24Weight | None:
    """The compressed transpose, if this call has a gradient of x for which it is of use."""
    if weight._copies is None or not isinstance(x, Tensor):
        return None
    if weight.values.requires_grad:
        weight.drop_copies()  # its optimizer may be one that writes uncounted
        return None
    if not wants_gradient(x) or wants_gradient(weight.values):
        return None
    transposed = weight._copies.transposed if torch.compiler.is_compiling() else weight.transposed
    if transposed is None or _exporting() or not transposed.dtype == x.dtype == weight.dtype:
        return None
    return transposed if backends.pick("sparse24_linear", backend, x, x.dtype) == "compiled" else None


def linear(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    mul: Tensor | None = None,
    *,
    dense_fallback: str = "cache",
    backend: str | None = None,
) -> Tensor:
    """activation(x W^T + bias) * mul in one pass over the compressed weight.

    Which kernel runs follows from x's rows and ``weight.choice``, inside the operator; nothing is measured here.

    Args:
        x: [..., in_features], floating, of the dtype of the values unless these are int8; any strides; zero rows too.
        weight: [out_features, in_features].
        bias: [out_features], of x's dtype or float32.
        activation: None, "relu", "gelu" (erf), "gelu_tanh", "quick_gelu" or "silu".
        mul: [..., out_features] in x's dtype; a gate, multiplied after the activation.
        dense_fallback: where ``weight.choice`` says that a dense product or the vendor's (cuSPARSELt) is faster,
            "cache" makes the weight it needs at first need and keeps it (it counts in ``weight.nbytes``; torch.compile
            uses one that is there and makes none, nor should a CUDA graph); "never" stays with our sparse kernels.
            These stand in, too, where cuSPARSELt is not there or does not take the weight (16-bit x, both sizes in
            multiples of 16): :func:`estimate` leaves it out there, ``weight.cache_vendor`` says why. So they do for a
            weight made in inference mode, whose copies nobody would see go stale, and in compiled code where a gradient
            is asked for.
        backend: "compiled", "reference", or None for the first that can run.

    Returns:
        [..., out_features] in x's dtype; sums in float32, rounded once. Differentiable in x, weight.values, bias and
        mul; the gradient of x is a sparse product where ``weight.transposed`` is there, weight.values asks for no
        gradient and the kernels are compiled (forward too runs our sparse kernels then). Under autocast x, values, bias
        (unless it is float32) and mul take its dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: the backend cannot run.
    """
    op = "sparse24.linear"
    _check(op, weight)
    checks.choice(op, "dense_fallback", dense_fallback, FALLBACKS)
    x, bias, mul = _cast(x, bias, mul)
    values = weight.values
    if backends.autocasts(values.device.type) and weight.scales is None and isinstance(x, Tensor):
        values = values.to(x.dtype)
    dense, vendor, choice = None, None, ()
    if isinstance(x, Tensor) and x.dim():
        dense, vendor, choice = _copies(weight, x, dense_fallback, (x, bias, mul))
    activation = "none" if activation is None else activation
    transposed = _transpose_for(x, weight, backend)
    if transposed is not None:
        ops.check_call(op, x, values, weight.metadata, weight.scales, bias, mul, activation)
        y = transposed_product(x, weight, transposed, without(choice))
        y = y if bias is None else y + bias.to(y.dtype)
        y = reference.activate(y, activation)
        return y if mul is None else y * mul
    if dense is not None or vendor is not None:
        if torch.compiler.is_compiling() and backends.pick("sparse24_linear", backend, x, x.dtype) == "compiled":
            ops.check_call(op, x, values, weight.metadata, weight.scales, bias, mul, activation)
            rows, mul = (
                None if t is None else t.reshape(ops.count_rows(t), t.shape[-1]).contiguous() for t in (x, mul)
            )
            parts = (values, weight.metadata, weight.scales, dense, bias, mul, activation, choice, vendor)
            y = torch.ops.pyvtk.sparse24_linear_by_copy(rows, *parts)
            return y.reshape(*x.shape[:-1], y.shape[-1])
    return ops.linear(
        x, values, weight.metadata, scales=weight.scales, dense=dense, bias=bias, mul=mul, activation=activation,
        choice=choice, vendor=vendor, backend=backend,
    )  # fmt: skip


def linear_int8(
    x: Tensor,
    weight: Sparse24Weight,
    bias: Tensor | None = None,
    activation: str | None = None,
    mul: Tensor | None = None,
    *,
    x_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`linear` with x rounded to int8 too: exact sums of whole numbers, times the scales of x and of the weight.

    Args:
        x, bias, activation, mul, backend: as of :func:`linear`; without gradient.
        weight: of int8 values; see :func:`quantize`.
        x_scale: float32 [1], one scale for all of x (see :class:`ActivationObserver`), which clips what is beyond 127
            of it; None: each row's own, max |x| / 127.

    Returns:
        [..., out_features] in x's dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit, or that asks for a gradient. RuntimeError: the backend
        cannot run.
    """
    _check("sparse24.linear_int8", weight)
    x, bias, mul = _cast(x, bias, mul)
    return ops.linear_int8(
        x, weight.values, weight.metadata, weight.scales, x_scale=x_scale, bias=bias, mul=mul,
        activation="none" if activation is None else activation, backend=backend,
    )  # fmt: skip


def apply_but_keep(module: nn.Module, names: tuple[str, ...], apply) -> None:
    """Run ``apply`` (of ``.to()`` and the like), after which these buffers have moved but kept their dtype and numbers:
    scales belong to the format, not to the precision of the model."""
    before = {name: getattr(module, name) for name in names}
    apply()
    for name, scale in before.items():
        if scale is not None and getattr(module, name).dtype != scale.dtype:
            setattr(module, name, scale.to(getattr(module, name).device))


class Sparse24Linear(nn.Module):
    """y = activation(x W^T + bias) with a 2:4 weight, for inference. Gradients reach x and bias, unless x is rounded.

    Args:
        weight: [out_features, in_features].
        bias: [out_features] or None; becomes a parameter.
        activation: None, or one of :func:`linear`.
        x_scale: for int8 weights: None multiplies x as it is; "row" rounds each row of x to int8 with a scale of its
            own; a float32 [1] tensor rounds all of x with this one.
        dense_fallback: "cache" or "never", see :func:`linear`.

    The state dict holds values, metadata, scales, x_scale ([0] for "row"), bias and format_version. Which kernel runs
    (``choice``) belongs to a machine and is not in it. ``.to(dtype)`` changes values and bias, never scales.
    """

    def __init__(
        self,
        weight: Sparse24Weight,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        x_scale: Tensor | str | None = None,
        dense_fallback: str = "cache",
    ):
        super().__init__()
        op = "Sparse24Linear"
        _check(op, weight)
        checks.choice(op, "activation", activation, (None, *ops.ACTIVATIONS))
        checks.choice(op, "dense_fallback", dense_fallback, FALLBACKS)
        if x_scale is not None and weight.scales is None:
            raise ValueError(f"{op}: x_scale must be None for values of {weight.dtype}, got {x_scale!r}")
        if isinstance(x_scale, Tensor):
            checks.dtype(op, "x_scale", x_scale, (torch.float32,))
            checks.shape(op, "x_scale", x_scale, (1,), "[1]")
        else:
            checks.choice(op, "x_scale", x_scale, (None, "row"))
        self.out_features, self.in_features = weight.shape
        self.activation, self.dense_fallback = activation, dense_fallback
        self.choice = weight.choice
        self.register_buffer("values", weight.values.detach())
        self.register_buffer("metadata", weight.metadata)
        self.register_buffer("scales", weight.scales)
        # float32 [1], or [0] for a scale of each row, so that a state dict tells the three apart
        one = x_scale.detach().clone() if isinstance(x_scale, Tensor) else None
        rows = torch.empty(0, dtype=torch.float32, device=weight.device) if isinstance(x_scale, str) else None
        self.register_buffer("x_scale", rows if one is None else one)
        self.register_buffer("format_version", torch.tensor([FORMAT_VERSION], device="cpu"))
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias.detach().clone())
        # holds the copies from call to call
        self._weight24: Sparse24Weight | None = None

    @property
    def weight24(self) -> Sparse24Weight:
        """The compressed weight; the same object as long as the buffers are."""
        known, buffers = self._weight24, self._buffers
        if (
            known is None or known.values is not buffers["values"] or known.metadata is not buffers["metadata"]
            or known.scales is not buffers["scales"] or known.choice != self.choice
        ):  # fmt: skip
            known = Sparse24Weight(self.values, self.metadata, self.scales, tuple(self.choice))
            self._weight24 = known
        return known

    @property
    def weight(self) -> Tensor:
        """The dense weight, made anew at every look: for code that asks nn.Linear for its weight."""
        return self.weight24.decompress()

    @property
    def nbytes(self) -> int:
        """Bytes of the weight (with its copies) and the bias."""
        return self.weight24.nbytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())

    def forward(self, x: Tensor, mul: Tensor | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; ``mul``, shaped like the result, multiplies after activation."""
        if self.x_scale is not None:
            bias = None if self.bias is None else self.bias.detach()
            x_scale = self.x_scale if self.x_scale.shape[0] else None
            return linear_int8(x, self.weight24, bias, self.activation, mul, x_scale=x_scale)
        return linear(x, self.weight24, self.bias, self.activation, mul, dense_fallback=self.dense_fallback)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"dtype={self.values.dtype}, activation={self.activation}"
        )

    def _apply(self, fn, recurse: bool = True):
        version = self.format_version
        apply_but_keep(self, ("scales", "x_scale"), lambda: super(Sparse24Linear, self)._apply(fn, recurse))
        self._weight24 = None
        if self.format_version is not version:
            self.format_version.fill_(FORMAT_VERSION)  # to_empty leaves anything in it
        return self

    def __getstate__(self):
        return self.__dict__ | {"_weight24": None}

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
        version, packed = (state_dict.get(prefix + name) for name in ("format_version", "metadata"))
        try:
            if version is not None:
                check_version("Sparse24Linear", version)
            if packed is not None and packed.shape == self.metadata.shape and packed.dtype == torch.uint8:
                check_metadata("Sparse24Linear", packed, self.values.shape[1] // 2)
        except ValueError as error:
            errors.append(str(error))
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if self._weight24 is not None:
            self._weight24.drop_copies()
