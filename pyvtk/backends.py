"""Which implementation of an operator runs, and why another one cannot.

Every operator has a schema and a fake kernel in Python (:func:`define`), so its contract exists without any compiled
part. Implementations:

``compiled``   C++ (CPU) or CUDA, in ``libpyvtk_cpu.so`` / ``libpyvtk_cuda.so``, chosen by torch's dispatcher
``triton``     kernels of :mod:`pyvtk.triton_kernels`, as an operator ``<name>_triton``; CPU tensors only where Triton
               interprets its kernels (TRITON_INTERPRET=1 before the start of Python), and never unless asked for
``reference``  plain torch, on any device (:mod:`pyvtk.reference`)

:func:`pick` takes the first of these that can run, or the one that was asked for, or raises with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import forward_ad

from pyvtk import _cuda, _numbers, transforms

BACKENDS = ("compiled", "triton", "reference")
HALF_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)

# name of a library -> why it is not loaded (None: it is)
_library_errors: dict[str, str | None] = {}
# operator -> dtypes of its compiled kernels (None: any)
_compiled_dtypes: dict[str, tuple[torch.dtype, ...] | None] = {}
# (operator, device type) -> why its compiled kernel cannot run (None: it can); filled by complete()
_compiled_errors: dict[tuple[str, str], str | None] = {}
# operator -> module of pyvtk.triton_kernels that holds its launcher
_triton_modules: dict[str, str] = {}
# (operator, device type) -> why its Triton kernel cannot run (None: it can); filled by complete()
_triton_errors: dict[tuple[str, str], str | None] = {}
_MINIMUM_TRITON = (3, 6)
# (operator, dtype or None) of the compiled kernels that run on the CPU: pick()'s usual answer in one look
_on_cpu: set[tuple[str, torch.dtype | None]] = set()


def _load(name: str) -> None:
    path = Path(__file__).parent / name
    if not path.is_file():
        _library_errors[name] = f"{name} was not built into this installation"
        return
    try:
        torch.ops.load_library(path)
        _library_errors[name] = None
    except OSError as error:
        _library_errors[name] = f"{name} did not load: {error}"


def load_libraries() -> None:
    """Load the operator libraries; what is missing is remembered with its reason, for :func:`pick` and ``info``."""
    _load("libpyvtk_cpu.so")
    if torch.version.cuda is None:
        _library_errors["libpyvtk_cuda.so"] = f"torch {torch.__version__} is a build without CUDA"
    else:
        _load("libpyvtk_cuda.so")
        if _library_errors["libpyvtk_cuda.so"] is None:
            _library_errors["libpyvtk_cuda.so"] = _cuda.attach(Path(__file__).parent / "libpyvtk_cuda.so")


def define(
    name: str,
    schema: str,
    *,
    fake,
    dtypes: tuple[torch.dtype, ...] | None = None,
    tags=(),
    triton: str | None = None,
    vmap: transforms.Fold | Callable | None = None,
    constant: bool = False,
    lean: bool = False,
    leave_open: str | None = None,
) -> None:
    """Declare operator ``pyvtk::name``: its schema, its fake kernel, and the dtypes that its kernels take.

    ``vmap`` is how a mapped axis is folded (:func:`pyvtk.transforms.batch`; None: a call for each element);
    ``constant`` says that results carry no gradient. A gradient is registered by :func:`pyvtk.transforms.gradient`.
    ``lean`` is for the short form of an operator, which pages call where nobody wants a derivative: it has no layer
    for autograd, which is Python and takes as long as the call itself (torch warns whoever differentiates it).

    ``leave_open`` names a float (or list of floats) of which torch.compile is to make no constant: an overload takes it
    as a tensor (:mod:`pyvtk._numbers`), with the same answers to all else.

    With ``triton``, a module of :mod:`pyvtk.triton_kernels`, also ``pyvtk::name_triton``, which calls that module's
    function ``name``. The module is imported when the operator first runs, since Triton may be missing.
    """
    _compiled_dtypes[name] = dtypes
    for twin in (name,) if triton is None else (name, f"{name}_triton"):
        torch.library.define(f"pyvtk::{twin}", schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.register_fake(f"pyvtk::{twin}")(fake)
        for each in (twin,) if leave_open is None else (twin, _numbers.leave_open(twin, leave_open)):
            transforms.batch(each, vmap)
            if constant:
                transforms.constant(each)
            elif lean:
                transforms.lean(each)
        if getattr(torch.ops.pyvtk, twin).default._schema.is_mutable:
            transforms.mutation(twin)
    if triton is not None:
        _triton_modules[name] = triton

        def launch(*arguments):
            return getattr(importlib.import_module(f"pyvtk.triton_kernels.{triton}"), name)(*arguments)

        torch.library.impl(f"pyvtk::{name}_triton", ("cpu", "cuda"), launch)


def complete() -> None:
    """Record which operators have which kernels. Called once, when every page is imported.

    The answers are looked up in a dict later because torch.compile cannot trace a question to the dispatcher.
    """
    transforms.complete([*_compiled_dtypes, *(f"{name}_triton" for name in _triton_modules)])
    no_triton = _no_triton()
    for name in _compiled_dtypes:
        for device, key in (("cpu", "CPU"), ("cuda", "CUDA")):
            error = _library_errors[f"libpyvtk_{device}.so"]
            if error is None and not torch._C._dispatch_has_kernel_for_dispatch_key(f"pyvtk::{name}", key):
                error = f"pyvtk::{name} has no {key} kernel yet"
            _compiled_errors[name, device] = error
            kernel = None if name in _triton_modules else f"pyvtk::{name} has no Triton kernel yet"
            _triton_errors[name, device] = no_triton or kernel or _no_triton_device(device)
    for name, dtypes in _compiled_dtypes.items():
        if _compiled_errors[name, "cpu"] is None:
            _on_cpu.update((name, dtype) for dtype in (None, *(dtypes or ())))


def _no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # installed under another name, as nightly builds are
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < _MINIMUM_TRITON:
        return f"triton {version} is older than {'.'.join(map(str, _MINIMUM_TRITON))}"
    return None


def _no_triton_device(device: str) -> str | None:
    interprets = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
    if device == "cpu" and not interprets:
        return "Triton takes CPU tensors only with TRITON_INTERPRET=1, set before Python starts"
    if device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA"
    return None


def why_not(name: str, backend: str, device: str | torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why ``backend`` cannot run operator ``name`` on tensors of this device (or type) and dtype; None if it can."""
    if backend == "reference":
        return None
    kind, errors = ("Triton", _triton_errors) if backend == "triton" else ("compiled", _compiled_errors)
    where = device if isinstance(device, str) else device.type
    error = errors.get((name, where), f"pyvtk has no {kind} kernels for device type {where!r}")
    if error is None and backend == "compiled" and where == "cuda" and where is not device:
        error = _cuda.no_code(device.index)
    dtypes = _compiled_dtypes[name]
    if error is None and dtype is not None and dtypes is not None and dtype not in dtypes:
        error = f"{kind} kernels of {name} take {', '.join(str(d) for d in dtypes)}, not {dtype}"
    return error


def pick(
    name: str, backend: str | None, tensor: torch.Tensor, dtype: torch.dtype | None = None, differentiable: tuple = ()
) -> str:
    """The backend that runs operator ``name`` on ``tensor``.

    Forward mode (torch.func.jvp, dual numbers) of one of the ``differentiable`` arguments only the reference has.

    Args:
        name: operator, without its namespace.
        backend: what the caller asked for; None takes the first usable of :data:`BACKENDS`.
        tensor: decides the device.
        dtype: the dtype that matters to the kernels, if they are particular about it.
        differentiable: arguments that have a derivative.

    Raises:
        ValueError: ``backend`` is not a backend's name.
        RuntimeError: the named backend cannot run; the message says why.
    """
    if forward_ad._current_level >= 0 and transforms.has_tangent(differentiable):
        if backend in (None, "reference"):
            return "reference"
        raise RuntimeError(f"{name}: backend {backend!r} cannot run: only the reference has forward-mode derivatives")
    if backend is None and tensor.is_cpu and (name, dtype) in _on_cpu:
        return "compiled"
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{name}: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    device = tensor.device
    if backend is not None:
        error = why_not(name, backend, device, dtype)
        if error is not None:
            raise RuntimeError(f"{name}: backend {backend!r} cannot run: {error}")
        return backend
    if why_not(name, "compiled", device, dtype) is None:
        return "compiled"
    if device.type != "cpu" and why_not(name, "triton", device, dtype) is None:  # the interpreter is there for tests
        return "triton"
    return "reference"


def why_not_cusparselt(device: str) -> str | None:
    """Why torch cannot multiply by NVIDIA's cuSPARSELt on this device type; None if it can."""
    if device != "cuda":
        return f"cuSPARSELt multiplies on CUDA, not on {device}"
    if torch.version.cuda is None or not torch.backends.cusparselt.is_available():
        return f"torch {torch.__version__} is a build without cuSPARSELt"
    return None


# Under autocast there are two kinds of operators. Products take their floating inputs in its dtype (autocast()), as
# torch.matmul does; biases, weights of heads and lse stay what they are. Moves and sums never round: where two tensors
# meet they take the wider dtype (widest()), as in torch.cat; else each keeps its own.

# Whether autocast is on for any device: one cheap question, so that a call without it pays nothing.
any_autocast = torch._C._is_any_autocast_enabled


def autocasts(device: str) -> bool:
    """Whether autocast is on for this device type."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def autocast(x):
    """``x`` in the dtype of autocast, which leaves float64 and what is no floating tensor alone."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type)) if autocasts(x.device.type) else x


def without_autocast(device: str):
    """A context in which autocast has no say: it has done its part."""
    return torch.autocast(device, enabled=False) if autocasts(device) else contextlib.nullcontext()


def widest(tensors: list) -> list:
    """Floating ``tensors`` in the widest of their dtypes where autocast is on; else, and what is none, as they are."""
    if not any_autocast() or not all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in tensors):
        return tensors
    if not autocasts(tensors[0].device.type):
        return tensors
    dtype = functools.reduce(torch.promote_types, [x.dtype for x in tensors])
    return [x.to(dtype) for x in tensors]


def info() -> dict:
    """Versions, the instruction set in use, and for every operator which backends can run (or why they cannot)."""
    from pyvtk._version import __version__

    facts: dict = {"pyvtk": __version__, "torch": torch.__version__, "libraries": dict(_library_errors)}
    try:
        facts["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["triton"] = None
    try:
        from pyvtk import _C

        facts["build"] = _C.build_info()
        facts["instruction_set"] = _C.instruction_set()
        facts["instruction_sets"] = _C.instruction_sets()
    except ImportError as error:
        facts["build"] = facts["instruction_set"] = None
        facts["instruction_sets"] = []
        facts["build_error"] = str(error)
    facts["devices"] = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    facts["cuda_driver"] = _cuda.driver()
    facts["cusparselt"] = why_not_cusparselt("cuda")
    # Triton's device is CUDA, or the CPU where it interprets
    facts["operators"] = {
        name: {
            "compiled cpu": why_not(name, "compiled", "cpu"),
            "compiled cuda": why_not(name, "compiled", "cuda"),
            "triton": why_not(name, "triton", "cpu") and why_not(name, "triton", "cuda"),
            "reference": None,
        }
        for name in _compiled_dtypes
    }
    return facts
