"""Convert the layers of a model that gain by 2:4 weights, and say what was done to each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyvtk import backends, checks
from pyvtk.sparse24.copies import has_values
from pyvtk.sparse24.cost import DTYPES, estimate
from pyvtk.sparse24.format import Sparse24Weight, compress
from pyvtk.sparse24.int8 import quantize
from pyvtk.sparse24.modules import Sparse24Linear
from pyvtk.sparse24.pruning import magnitude, prune

Scores = Mapping[str, Tensor] | Callable[[str, nn.Linear], Tensor]


@dataclass(frozen=True)
class LayerReport:
    """What :func:`sparsify_` did to one nn.Linear, or why not.

    Attributes:
        name: in the model. shape: [out_features, in_features]; in_features 0 of a lazy layer that has seen no x yet.
        converted: whether it is a Sparse24Linear now (with dry_run: would be).
        reason: why not; None if converted.
        speedup: predicted, dense over sparse, at the rows that were asked for; None where it was not looked at.
        kernel: predicted to run: "few", "many", "vendor" or "dense".
        source: of the prediction, "measured" or "analytic".
        bytes_before, bytes_after: of weight and bias; after does not count a dense copy or the vendor's form of the
            weight, which are made at first need.
        kept_share: sum of |w| that stays / sum of |w|; None where nothing was pruned.
    """

    name: str
    shape: tuple[int, int]
    converted: bool
    reason: str | None
    speedup: float | None
    kernel: str | None
    source: str | None
    bytes_before: int
    bytes_after: int
    kept_share: float | None


def _why_not(module: nn.Linear, owners: dict[int, list[str]], dtype: torch.dtype | None) -> str | None:
    """What forbids a conversion, whatever it would gain."""
    weight = _weight_of(module)
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, which does more than multiply, or whose owner reads its weight"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "it has hooks, which would be lost"
    if weight is None:
        return "it has no weight"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is a {type(weight).__name__}, which is more than a matrix of numbers"
    if weight.dim() != 2:
        return f"its weight has {weight.dim()} dimensions"
    if len(owners[id(weight)]) > 1:
        return f"its weight is shared: {', '.join(owners[id(weight)])}"
    if weight.is_meta:
        return "its weight is on the meta device"
    if not has_values(weight):
        return "its weight is a fake tensor"
    if weight.shape[1] % 4:
        return f"in_features {weight.shape[1]} is not a multiple of 4"
    if not weight.numel():
        return "its weight is empty"
    if str(weight.dtype).removeprefix("torch.") not in DTYPES or not weight.is_floating_point():
        return f"no kernel takes weights of {weight.dtype}"
    x_dtype = weight.dtype if dtype in (None, torch.int8) else dtype
    error = backends.why_not("sparse24_linear", "compiled", weight.device, x_dtype)
    return None if error is None else f"no compiled kernel: {error}"


def _weight_of(module: nn.Linear) -> Tensor | None:
    """None: there is none, or it is not known before the first x (LazyLinear)."""
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, Tensor) and not is_lazy(weight) else None


def _scores_of(op: str, scores: Scores | None, name: str, module: nn.Linear) -> Tensor | None:
    if scores is None or isinstance(scores, Mapping):
        return None if scores is None else scores.get(name)
    return scores(name, module)


def sparsify_(
    model: nn.Module,
    filter: Callable[[str, nn.Linear], bool] | None = None,
    *,
    rows: int,
    scores: Scores | None = None,
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
) -> list[LayerReport]:
    """Put a :class:`Sparse24Linear` in place of every nn.Linear that gains by it at ``rows`` rows.

    What gains is decided by :func:`estimate`; run :func:`calibrate` before, or it is an analytic guess (``source``).
    Pruning loses accuracy: fine-tune with :class:`Linear24`, or look at ``kept_share``. All or nothing: after an error
    the model is as it was.

    Args:
        model: changed in place. A model that is itself an nn.Linear cannot be, and is reported so.
        filter: called with name and module; False leaves a layer out of conversion and report.
        rows: rows of x that a call has: tokens times batch.
        scores: name -> scores for :func:`prune`, or a function of name and module; layers without take |w|.
        dtype: of the values. None: the weight's. torch.int8: :func:`quantize`, x as it is. Another floating dtype: the
            model has to hand over x in it.
        dry_run: report, and change nothing.

    Returns:
        A report for each nn.Linear that filter let through, in the order of the model.

    Raises:
        TypeError, ValueError: an argument that does not fit; NaN in a weight or scores, naming the layer.
    """
    op = "sparse24.sparsify_"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    checks.integer(op, "rows", rows, 1)
    checks.boolean(op, "dry_run", dry_run)
    if scores is not None and not isinstance(scores, Mapping) and not callable(scores):
        raise TypeError(f"{op}: scores must be a mapping or a function, got {type(scores).__name__}")
    if dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES:
        raise ValueError(f"{op}: dtype must be None, float32, bfloat16, float16 or int8, got {dtype}")
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    owners: dict[int, list[str]] = {}
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():  # named_children leaves out second names
            places.setdefault(id(module), []).append((parent, child))
        for child, parameter in parent.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{prefix}.{child}" if prefix else child)
    if isinstance(scores, Mapping):
        unknown = set(scores) - {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        if unknown:
            raise ValueError(f"{op}: scores must be for layers of the model, got {sorted(unknown)}")

    reports: list[LayerReport] = []
    replacements: list[tuple[nn.Linear, Sparse24Linear]] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or (filter is not None and not filter(name, module)):
            continue
        try:
            report, replacement = _convert(name, module, owners, rows, lambda n, m: _scores_of(op, scores, n, m), dtype)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: layer {name!r}: {error}") from error
        if replacement is not None and id(module) not in places:
            reason = "it is the model itself, which cannot be replaced in place"
            report, replacement = _refused(name, module, reason), None
        reports.append(report)
        if replacement is not None:
            replacements.append((module, replacement))
    if not dry_run:
        for module, replacement in replacements:
            for parent, child in places[id(module)]:
                setattr(parent, child, replacement)
    return reports


def load_sparsified_(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load the state dict of a model that :func:`sparsify_` changed into one that is still dense.

    Every nn.Linear that the state dict holds in compressed form becomes a :class:`Sparse24Linear`; then all of it is
    loaded. All or nothing, where shapes and names fit. Which kernel runs is estimated anew by ``sparsify_`` only: it is
    what :class:`Sparse24Weight` does by default.

    What is on the meta device gets memory where its tensor of the state dict is, in the layer's dtype; so a model that
    was built under ``torch.device("meta")`` is ready after it.

    Raises:
        TypeError, ValueError: a compressed weight that does not fit its layer or the format, naming the layer.
        RuntimeError: names or shapes of the rest do not fit, as from load_state_dict.
    """
    op = "sparse24.load_sparsified_"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be an nn.Module, got {type(model).__name__}")
    placed: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[int, Sparse24Linear] = {}
    for prefix, parent in model.named_modules():
        for child, module in parent._modules.items():
            name = f"{prefix}.{child}" if prefix else child
            if not isinstance(module, nn.Linear) or f"{name}.values" not in state_dict:
                continue
            if id(module) not in made:
                parts = {key: state_dict[f"{name}.{key}"] for key in PARTS if f"{name}.{key}" in state_dict}
                try:
                    made[id(module)] = _from_parts(module, parts)
                except (TypeError, ValueError, KeyError) as error:
                    raise ValueError(f"{op}: layer {name!r}: {error}") from error
            placed.append((parent, child, module))
    for parent, child, module in placed:
        setattr(parent, child, made[id(module)])
    before: list[tuple[dict[str, Tensor], str, Tensor]] = []
    try:
        _give_memory(model, state_dict, before)
        model.load_state_dict(state_dict)
    except BaseException:
        for tensors, name, tensor in before:
            tensors[name] = tensor
        for parent, child, module in placed:
            setattr(parent, child, module)
        raise


PARTS = ("values", "metadata", "scales", "format_version", "x_scale", "bias")


def _from_parts(module: nn.Linear, parts: dict[str, Tensor]) -> Sparse24Linear:
    """A Sparse24Linear of copies of these tensors, on the layer's device; on their own if that is meta."""
    old = module.weight
    parts = {name: tensor.to(tensor.device if old.is_meta else old.device, copy=True) for name, tensor in parts.items()}
    weight = Sparse24Weight.from_state_dict(parts)
    wanted = torch.Size((module.out_features, weight.shape[1])) if is_lazy(old) else old.shape
    if weight.shape != wanted:
        raise ValueError(f"values must be for a weight of {list(wanted)}, got {list(weight.shape)}")
    x_scale = parts.get("x_scale")
    x_scale = "row" if x_scale is not None and not x_scale.numel() else x_scale
    return Sparse24Linear(weight, parts.get("bias"), x_scale=x_scale).train(module.training)


def _give_memory(model: nn.Module, state_dict: Mapping[str, Tensor], before: list) -> None:
    """Memory for the meta tensors of which the state dict knows; ``before``: what stood there."""
    given: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                source = state_dict.get(f"{prefix}.{name}" if prefix else name)
                if tensor is None or not tensor.is_meta or is_lazy(tensor) or not isinstance(source, Tensor):
                    continue
                if id(tensor) not in given:  # one for all owners of a shared parameter
                    real = torch.empty_like(tensor, device=source.device)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    given[id(tensor)] = nn.Parameter(real, tensor.requires_grad) if is_parameter else real
                before.append((tensors, name, tensor))
                tensors[name] = given[id(tensor)]


def _bytes(module: nn.Linear) -> int:
    tensors = (_weight_of(module), getattr(module, "bias", None))
    return sum(t.numel() * t.element_size() for t in tensors if t is not None and not is_lazy(t))


def _refused(name: str, module: nn.Linear, reason: str, found=None) -> LayerReport:
    before = _bytes(module)
    facts = (None, None, None) if found is None else (found.speedup, found.kernel, found.source)
    weight = _weight_of(module)
    shape = (module.out_features, module.in_features) if weight is None else tuple(weight.shape)
    return LayerReport(name, shape, False, reason, *facts, before, before, None)


def _convert(name, module, owners, rows, scores_of, dtype) -> tuple[LayerReport, Sparse24Linear | None]:
    reason = _why_not(module, owners, dtype)
    if reason is not None:
        return _refused(name, module, reason), None
    weight = module.weight.detach()
    out_features, in_features = weight.shape
    x_dtype = weight.dtype if dtype == torch.int8 else None
    found = estimate(rows, out_features, in_features, dtype or weight.dtype, weight.device, x_dtype)
    if found.kernel == "dense" or found.speedup <= 1:
        reason = f"dense is faster at {rows} rows ({found.source} estimate)"
        if found.seconds.get("vendor", found.seconds["dense"]) < found.seconds["dense"] and found.source == "analytic":
            reason += "; the vendor's kernel may not be, and counts once calibrate has measured it"
        return _refused(name, module, reason, found), None
    mask = prune(weight, scores_of(name, module))
    absolute = magnitude(weight).double()
    total = absolute.sum()
    kept = float((absolute * mask).sum() / total) if total > 0 else 1.0
    values = weight if dtype in (None, torch.int8) else weight.to(dtype)
    weight24 = compress(values, mask)
    if dtype == torch.int8:
        weight24 = quantize(weight24)
    weight24.choice = found.choice
    bias = module.bias
    if bias is not None and bias.dtype not in (weight24.values.dtype, torch.float32) and dtype != torch.int8:
        bias = nn.Parameter(bias.detach().to(weight24.dtype), requires_grad=bias.requires_grad)
    replacement = Sparse24Linear(weight24, bias).train(module.training)
    report = LayerReport(
        name, (out_features, in_features), True, None, found.speedup, found.kernel, found.source,
        _bytes(module), replacement.nbytes, kept,
    )  # fmt: skip
    return report, replacement
