"""Does 2:4 pay? Seconds of the sparse kernels and of the dense product, from a table measured here or from facts."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn import functional as F

from pyvtk import _measure, backends, checks
from pyvtk._version import __version__
from pyvtk.ops import sparse24 as ops
from pyvtk.sparse24 import vendor as cusparselt
from pyvtk.sparse24.format import DENSE, FEW, MANY, VENDOR, Sparse24Weight
from pyvtk.sparse24.pruning import two_of_four

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# What a table has times of: values by their dtype, x in the same; int8 values times float32 x, or times another.
ENTRIES = (*DTYPES, "int8, bfloat16", "int8, float16")
TABLE_VERSION = 2
# Rows and weights that calibrate measures. Beyond the last rows time grows in proportion.
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
SHAPES = ((768, 768), (1024, 4096), (4096, 4096))  # [out_features, in_features]
_FEW_UP_TO = 128  # rows until which the CPU's kernel for few rows is measured: it only loses ground after that
# Rows that the kernel for few holds on CUDA, and bytes of a row's values that it takes at a time. Beyond them, or where
# these do not fit, the operator runs the other kernel, whatever is asked for (csrc/cuda/sparse24.cuh, plan_sparse24).
_FEW_ON_CUDA = 32
_FEW_BYTES = 64
_COLD = 64 << 20  # bytes of weights that are used in turn, so that they come from memory as in a model
_VENDOR_FROM = 8  # rows from which the vendor's kernel is measured: it works on eight at a time
# A dense product, or the vendor's, has to win by more than noise before memory is spent on a copy.
_MARGIN = 1.03
# What sparse products, ours and the vendor's, reach on Hopper of the data sheet's dense rate. Measured on an H200: 0.57
# to 0.64 with 16-bit numbers, 0.48 to 0.56 with int8; the dense product reaches 0.74.
_SPARSE_ON_HOPPER = 0.6


@dataclass(frozen=True)
class Facts:
    """What a device can do, per second. Rates by name of dtype; ``sparse`` counts the operations of the dense product,
    as vendors do. ``unpacked``: dtypes of x for which weights are unpacked for torch's dense product on every call.
    ``vendor``: ``sparse`` for cuSPARSELt; empty where there is none."""

    bandwidth: float
    dense: dict[str, float]
    sparse: dict[str, float]
    overhead: float = 5e-6  # of a launch
    unpacked: frozenset[str] = frozenset()
    vendor: dict[str, float] = field(default_factory=dict)
    few_rows: int = 16  # that one reading of the weight serves in the kernel for few
    tile: int = 32  # rows that the kernel for many computes at least
    guessed: str | None = None  # name of the GPU, if it is not among GPUS


def _tensor_cores(
    bandwidth: float, half: float, tf32: float, int8: float, hopper: bool = False, guessed: str | None = None
) -> Facts:
    dense = {"float32": tf32, "bfloat16": half, "float16": half, "int8": int8}
    # Measured products reach less of the sparse peak than of the dense one: published ratios are 1.1 to 1.6, not 2.
    # No tensor core takes float32.
    sparse = {d: r * (_SPARSE_ON_HOPPER if hopper else 0.95) * 1e12 for d, r in dense.items()}
    return Facts(
        bandwidth * 0.85e9, {d: r * 0.75e12 for d, r in dense.items()}, sparse,
        unpacked=frozenset(("float32",)), vendor=sparse, few_rows=_FEW_ON_CUDA, tile=64, guessed=guessed,
    )  # fmt: skip


# NVIDIA's data sheets: GB/s; dense TFLOPS of 16-bit numbers with float32 sums, of tf32, and TOPS of int8 (half of what
# they give with sparsity). Names as torch gives them hold these words one after the other; the first that does wins.
GPUS = {
    "A100-SXM4-80GB": _tensor_cores(2039, 312, 156, 624),
    "A100 80GB PCIe": _tensor_cores(1935, 312, 156, 624),
    "A100": _tensor_cores(1555, 312, 156, 624),
    "H200": _tensor_cores(4800, 989, 494, 1979, hopper=True),
    "GH200": _tensor_cores(4000, 989, 494, 1979, hopper=True),  # with 96 GB; the one with 144 GB has 4900 GB/s
    "H100 PCIe": _tensor_cores(2039, 756, 378, 1513, hopper=True),
    "H100 NVL": _tensor_cores(3900, 835, 418, 1671, hopper=True),
    "H100": _tensor_cores(3352, 989, 494, 1979, hopper=True),
    "L40S": _tensor_cores(864, 362, 183, 733),
    "L40": _tensor_cores(864, 181, 90.5, 362),
    "L4": _tensor_cores(300, 121, 60, 242),
    "A10": _tensor_cores(600, 125, 62.5, 250),
    "RTX 4090": _tensor_cores(1008, 165, 82.6, 660),
    "RTX 3090": _tensor_cores(936, 71, 35.6, 284),
}
# Words that make another device of a name: less of it, or a variant.
_VARIANTS = {"mig", "grid", "laptop", "d", "ti", "super"}
# One thread of a CPU, cautiously: GB/s and GFLOPS by instruction set. bfloat16 counts as float32 where the set has no
# products of it.
_CPU_GFLOPS = {"portable": 8, "avx2": 50, "avx512": 80}
_CPU_BANDWIDTH = 8e9


@dataclass(frozen=True)
class Estimate:
    """What :func:`estimate` found.

    Attributes:
        seconds: kernel ("few", "many", "dense"; "vendor" too where cuSPARSELt is there and takes the weight) ->
            predicted seconds.
        kernel: the fastest of them. The vendor's counts only if it was measured, here and below: it wants the weight in
            a form of its own, and a guess never costs memory.
        speedup: seconds of the dense product / seconds of the best sparse kernel.
        source: "measured" (a table of :func:`calibrate`) or "analytic" (bytes and operations over rates from data
            sheets, or cautious guesses for a CPU: an order of magnitude).
        choice: kernels by rows for this weight, for ``Sparse24Weight.choice``: pairs (rows, kernel number). Dense and
            the vendor's are among them only if they were measured.
        absent: kernel that is not among the seconds -> why.
    """

    seconds: dict[str, float]
    kernel: str
    speedup: float
    source: str
    choice: tuple[int, ...]
    absent: dict[str, str] = field(default_factory=dict)


# Where tables live, and for which machine they hold.


def cache_folder() -> Path:
    """PYVTK_CACHE, or pyvtk in the user's cache folder."""
    named = os.environ.get("PYVTK_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pyvtk"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _instruction_set() -> str:
    try:
        from pyvtk import _C

        return _C.instruction_set()
    except ImportError:
        return "portable"


def _key(device: torch.device) -> dict[str, str | int]:
    """What a table depends on. A table of another key is another file."""
    versions = {"torch": torch.__version__, "pyvtk": __version__, "table": TABLE_VERSION}
    if device.type == "cpu":
        cpu = {"device": _cpu_model(), "instruction_set": _instruction_set(), "threads": torch.get_num_threads()}
        return cpu | versions
    return {"device": torch.cuda.get_device_name(device)} | versions


def table_path(device: torch.device | str = "cpu") -> Path:
    """The file that holds the table of this machine, device, number of threads and versions, once it is measured."""
    device = torch.device(device)
    digest = hashlib.sha256(json.dumps(_key(device), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / f"sparse24-{device.type}-{digest}.json"


@dataclass
class Table:
    """What was measured, by the names of ENTRIES: kernel -> [((out_features, in_features), rows, seconds)]; and which
    kernels could not be, and why."""

    seconds: dict[str, dict[str, list[tuple[tuple[int, int], list[int], list[float]]]]] = field(default_factory=dict)
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)


_tables: dict[Path, tuple[int, Table | None]] = {}


def _parse(text: str, device: torch.device) -> Table:
    """Raises ValueError, KeyError or TypeError if this is not a table of this device."""
    stored = json.loads(text)
    if stored["key"] != _key(device):
        raise ValueError("it was made for another device or version")
    table = Table(left_out={name: dict(reasons) for name, reasons in stored["left_out"].items()})
    needed = {"many", "dense"} | ({"few"} if device.type == "cpu" else set())  # on CUDA it holds few rows
    for dtype, kernels in stored["seconds"].items():
        if dtype not in ENTRIES or not needed <= set(kernels) <= set(ops.KERNELS):
            raise ValueError(f"it has unknown or missing entries for {dtype!r}")
        for kernel, entries in kernels.items():
            for entry in entries:
                shape, rows, seconds = tuple(entry["shape"]), entry["rows"], entry["seconds"]
                good = len(shape) == 2 and len(rows) == len(seconds) > 0 and rows == sorted(set(rows)) and rows[0] > 0
                if not good or not all(math.isfinite(s) and s > 0 for s in seconds):
                    raise ValueError(f"its entry {dtype}, {kernel}, {shape} is no list of times")
                table.seconds.setdefault(dtype, {}).setdefault(kernel, []).append((shape, rows, seconds))
    return table


def _load(device: torch.device) -> Table | None:
    """The table, or None. A file that cannot be used is a warning, once."""
    path = table_path(device)
    try:
        changed = path.stat().st_mtime_ns
    except OSError:
        return None
    known = _tables.get(path)
    if known is None or known[0] != changed:
        try:
            table = _parse(path.read_text(), device)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            table = None
            warnings.warn(
                f"pyvtk: {path} cannot be used ({type(error).__name__}: {error}); estimates are analytic until "
                "pyvtk.sparse24.calibrate writes it anew",
                RuntimeWarning,
                stacklevel=3,
            )
        known = _tables[path] = (changed, table)
    return known[1]


# From a table


def _at_rows(rows: list[int], seconds: list[float], m: int) -> float:
    """Seconds for m rows: straight lines between the logarithms; in proportion beyond the last."""
    if m <= rows[0]:
        return seconds[0]
    if m >= rows[-1]:
        return seconds[-1] * m / rows[-1]
    i = next(i for i, row in enumerate(rows) if row > m)
    share = math.log(m / rows[i - 1]) / math.log(rows[i] / rows[i - 1])
    return math.exp((1 - share) * math.log(seconds[i - 1]) + share * math.log(seconds[i]))


def _from_table(table: Table, m: int, n: int, k: int, dtype: str) -> dict[str, float]:
    """Seconds per weight of the measured sizes around n * k, times n * k."""
    result = {}
    for kernel, entries in table.seconds[dtype].items():
        points = sorted((shape[0] * shape[1], _at_rows(rows, times, m)) for shape, rows, times in entries)
        sizes = [size for size, _ in points]
        per_weight = [time / size for size, time in points]
        size = min(max(n * k, sizes[0]), sizes[-1])
        i = next((i for i, s in enumerate(sizes) if s >= size), len(sizes) - 1)
        rate = per_weight[i]
        if i and sizes[i] > sizes[i - 1]:
            share = math.log(size / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
            rate = (1 - share) * per_weight[i - 1] + share * per_weight[i]
        result[kernel] = rate * n * k
    return result


# From facts


def _cpu_facts() -> Facts:
    threads, isa = torch.get_num_threads(), _instruction_set()
    rate = _CPU_GFLOPS.get(isa, _CPU_GFLOPS["portable"]) * 1e9 * threads
    dense = dict.fromkeys(DTYPES, rate)
    return Facts(_CPU_BANDWIDTH * threads, dense, {name: 1.2 * rate for name in dense}, 1e-6)


def _gpu_facts(name: str) -> Facts | None:
    """Of the first of GPUS whose words are in the name."""
    words = re.split(r"[\s-]+", name.lower())
    if _VARIANTS & set(words):
        return None
    for known, facts in GPUS.items():
        wanted = re.split(r"[\s-]+", known.lower())
        if any(words[i : i + len(wanted)] == wanted for i in range(len(words))):
            return facts
    return None


@functools.cache
def _say_guessed(name: str) -> None:
    warnings.warn(
        f"pyvtk: the rates of {name!r} are not known, and estimates for it are guesses from its number of "
        "multiprocessors until pyvtk.sparse24.calibrate has measured it",
        RuntimeWarning,
        stacklevel=3,
    )


def _from_facts(facts: Facts, m: int, n: int, k: int, values: torch.dtype, x: torch.dtype) -> dict[str, float]:
    element, dtype = x.itemsize, str(x).removeprefix("torch.")
    rest = m * (n + k) * element
    packed = n * k * values.itemsize / 2 + n * k / 8
    unpacked = dtype in facts.unpacked
    # cautiously, on a CPU, as if a dense product of int8 weights read bytes
    weight = n * k * (1 if values == torch.int8 and x == torch.float32 and not unpacked else element)
    work = 2.0 * m * n * k
    dense = facts.overhead + max((weight + rest) / facts.bandwidth, work / facts.dense[dtype])
    if unpacked:
        unpacking = facts.overhead + (packed + weight) / facts.bandwidth
        return {"few": unpacking + dense, "many": unpacking + dense, "dense": dense}
    # cautiously, the kernel for few rows multiplies at half the rate of the dense product
    reading = (packed * math.ceil(m / facts.few_rows) + rest) / facts.bandwidth
    tiles = work * max(m, facts.tile) / m / facts.sparse[dtype]
    seconds = {
        "few": facts.overhead + max(reading, work / (facts.dense[dtype] * 0.5)),
        "many": facts.overhead + max((packed + rest) / facts.bandwidth, tiles),
        "dense": dense,
    }
    if facts.vendor:
        # as the one for many rows, values in x's dtype; x is copied where its rows are no multiple of eight
        copying = facts.overhead + 2 * m * k * element / facts.bandwidth if m % 8 else 0.0
        tiles = work * max(m, 32) / m / facts.vendor[dtype]
        seconds["vendor"] = copying + facts.overhead + max((n * k * element * 9 / 16 + rest) / facts.bandwidth, tiles)
    return seconds


def _device_of(op: str, device: torch.device | str) -> tuple[torch.device | None, Facts]:
    """The device (None: only known by name) and its facts."""
    if isinstance(device, str):
        try:
            device = torch.device(device)
        except RuntimeError:
            facts = _gpu_facts(device)
            if facts is None:
                raise ValueError(
                    f"{op}: device must be a torch device or one of {', '.join(map(repr, GPUS))}, got {device!r}"
                ) from None
            return None, facts
    if not isinstance(device, torch.device):
        raise TypeError(f"{op}: device must be a torch.device or a string, got {type(device).__name__}")
    if device.type == "cpu":
        return device, _cpu_facts()
    if device.type != "cuda":
        raise ValueError(f"{op}: device must be a CPU or a CUDA device, got {device}")
    if not torch.cuda.is_available():
        raise ValueError(f"{op}: device must be present, or a name like 'A100' for an analytic estimate, got {device}")
    name = torch.cuda.get_device_name(device)
    facts = _gpu_facts(name)
    if facts is None:
        major, _ = torch.cuda.get_device_capability(device)
        properties = torch.cuda.get_device_properties(device)
        # 2048 (4096 from Hopper on) 16-bit operations of each multiprocessor and cycle, at a cautious 1.4 GHz
        half = properties.multi_processor_count * (4096 if major == 9 else 2048) * 1.4e-3
        facts = _tensor_cores(600, half, half / 2, half * 2, hopper=major == 9, guessed=name)
    return device, facts


def _entry(op: str, dtype: torch.dtype, x_dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    """The name among ENTRIES, and x's dtype."""
    name = _dtype_name(op, dtype)
    usual = torch.float32 if dtype == torch.int8 else dtype
    if x_dtype is None or x_dtype == usual:
        return name, usual
    if dtype != torch.int8 or x_dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"{op}: x_dtype must be that of the values, or floating for int8, got {x_dtype} for {dtype}")
    return f"{name}, {_dtype_name(op, x_dtype)}", x_dtype


def _dtype_name(op: str, dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or int8, got {dtype}")
    return name


def _best(seconds: dict[str, float], measured: bool) -> int:
    """Number of the kernel to run; dense and vendor, which cost memory, only if measured to win by more than noise."""
    ours = FEW if seconds.get("few", math.inf) <= seconds["many"] else MANY
    if not measured:
        return ours
    copy = VENDOR if seconds.get("vendor", math.inf) < seconds["dense"] else DENSE
    return copy if seconds[ops.KERNELS[copy]] * _MARGIN < seconds[ops.KERNELS[ours]] else ours


# Row counts at which the choice may change.
_GRID = sorted({_FEW_ON_CUDA + 1, *(max(1, round(2 ** (i / 2))) for i in range(26))})


def _no_few(m: int, k: int, values: torch.dtype, cuda: bool) -> str | None:
    """Why the operator runs another kernel where the one for few rows is asked for; None if it does not."""
    if cuda and m > _FEW_ON_CUDA:
        return f"it holds {_FEW_ON_CUDA} rows on CUDA, not {m}"
    if cuda and k // 2 * values.itemsize % _FEW_BYTES:
        return f"it takes {_FEW_BYTES} bytes of a row's values at a time on CUDA, and {k} in_features are no multiple"
    return None


def estimate(
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    x_dtype: torch.dtype | None = None,
) -> Estimate:
    """Predict what y [m, n] = x [m, k] W^T costs with a 2:4 weight and with a dense one. Measures nothing.

    Args:
        m, n, k: rows of x, out_features, in_features (a multiple of 4).
        dtype: of the values.
        x_dtype: of x. None: ``dtype``, or float32 for int8 values. Only these may have x in another dtype: bfloat16 or
            float16, which CUDA multiplies without unpacking the weight.
        device: a torch device, whose measured table is used if there is one (:func:`calibrate`); or a GPU's name, whole
            or the words that tell it ("A100", "H100 PCIe", ...), which needs no such GPU and is analytic.

    Raises:
        TypeError, ValueError: an argument that does not fit, an unknown device. A table that cannot be read is a
        RuntimeWarning, and the estimate analytic; so is, once, an analytic estimate for a GPU of unknown rates.
    """
    op = "sparse24.estimate"
    for name, value in (("m", m), ("n", n), ("k", k)):
        checks.integer(op, name, value, 1)
    if k % 4:
        raise ValueError(f"{op}: k must be a multiple of 4, got {k}")
    name, x_dtype = _entry(op, dtype, x_dtype)
    where, facts = _device_of(op, device)
    table = None if where is None else _load(where)
    measured = table is not None and name in table.seconds
    if not measured and facts.guessed:
        _say_guessed(facts.guessed)
    cuda = where is None or where.type == "cuda"
    # of another machine's GPU only the shape can be asked
    no_vendor = cusparselt.does_not_fit(n, k, x_dtype) if where is None else cusparselt.why_not(n, k, x_dtype, where)
    if no_vendor is None and measured:
        no_vendor = table.left_out.get(name, {}).get("vendor")

    def at(rows: int) -> tuple[dict[str, float], dict[str, str]]:
        found = _from_table(table, rows, n, k, name) if measured else _from_facts(facts, rows, n, k, dtype, x_dtype)
        reasons = {"few": _no_few(rows, k, dtype, cuda), "vendor": no_vendor}
        absent = {kernel: why for kernel, why in reasons.items() if why is not None}
        return {kernel: s for kernel, s in found.items() if kernel not in absent}, absent

    seconds, absent = at(m)
    choice: list[int] = []
    for rows in _GRID:
        kernel = _best(at(rows)[0], measured)
        if not choice or choice[-1] != kernel:
            choice += [rows if choice else 0, kernel]
    counted = {kernel: s for kernel, s in seconds.items() if kernel != "vendor" or measured}
    fastest = min(counted, key=counted.__getitem__)
    sparse = min(s for kernel, s in counted.items() if kernel != "dense")
    source = "measured" if measured else "analytic"
    return Estimate(seconds, fastest, seconds["dense"] / sparse, source, tuple(choice), absent)


def calibrate(
    device: torch.device | str = "cpu",
    *,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.int8),
    rows: Sequence[int] = ROWS,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seconds: float = 0.1,
    x_dtype: torch.dtype | None = None,
) -> Path:
    """Measure the kernels on this machine (the vendor's where it is there) and store the table that :func:`estimate`
    reads.

    The calls take turns, so that a slow spell hits all alike, and medians are stored. Weights are used in turn too, so
    that they come from memory. With the threads that torch is set to; another number is another table. Half a
    minute on a CPU. Where the vendor's kernel should work and does not, the table keeps the reason instead (a
    RuntimeWarning, and ``absent`` of every estimate).

    Args:
        device: the device to measure.
        dtypes: of the values. Those measured before stay in the table.
        x_dtype: of x, for ``dtypes`` of int8 alone; None: as of :func:`estimate`.
        rows: row counts, ascending. shapes: pairs (out_features, in_features).
        seconds: time spent at each point, at least three rounds.

    Returns:
        The file written (in PYVTK_CACHE, or the user's cache folder).

    Raises:
        RuntimeError: there are no compiled kernels for this device; the message says why. OSError, before anything is
        measured: the file cannot be written.
    """
    op = "sparse24.calibrate"
    device = torch.device(device)
    rows, shapes = [int(r) for r in rows], [(int(n), int(k)) for n, k in shapes]
    if not rows or rows != sorted(set(rows)) or rows[0] < 1:
        raise ValueError(f"{op}: rows must be ascending and positive, got {rows}")
    if not shapes or any(n < 1 or k < 4 or k % 4 for n, k in shapes):
        raise ValueError(f"{op}: shapes must be pairs (out_features, in_features in multiples of 4), got {shapes}")
    measured = [(dtype, *_entry(op, dtype, x_dtype)) for dtype in dtypes]
    for _, _, of_x in measured:
        reason = backends.why_not("sparse24_linear", "compiled", device, of_x)
        if reason is not None:
            raise RuntimeError(f"{op}: there is nothing to measure on {device}: {reason}")
    _refuse_unwritable(op, table_path(device))
    found: dict[str, dict[str, list[dict]]] = {}
    left_out: dict[str, dict[str, str]] = {}
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        clock = _measure.OnCuda(device) if device.type == "cuda" else _measure.on_host
        for dtype, name, of_x in measured:
            kernels: dict[str, list[dict]] = {kernel: [] for kernel in ops.KERNELS}
            for shape in shapes:
                measured_here, why_no_vendor = _measure_shape(shape, dtype, of_x, rows, device, seconds, clock)
                if why_no_vendor is not None:
                    left_out[name] = {"vendor": why_no_vendor}
                for kernel, times in measured_here.items():
                    if times:
                        kernels[kernel].append({"shape": shape, "rows": list(times), "seconds": list(times.values())})
            if name in left_out:  # then for no shape: a table foretells one from the others
                warnings.warn(
                    f"pyvtk: the vendor's kernel does not work on {device} and is left out of the table for {name}: "
                    f"{left_out[name]['vendor']}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                kernels["vendor"] = []
            found[name] = {kernel: entries for kernel, entries in kernels.items() if entries}
    path = table_path(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        before = _load(device) or Table()
    for name, kernels in before.seconds.items():
        if name not in found:
            found[name] = {
                kernel: [{"shape": s, "rows": r, "seconds": t} for s, r, t in entries]
                for kernel, entries in kernels.items()
            }
            left_out |= {name: before.left_out[name]} if name in before.left_out else {}
    _write(path, json.dumps({"key": _key(device), "seconds": found, "left_out": left_out}, indent=1))
    return path


def _copies(nbytes: int) -> int:
    """Weights of so many bytes that together fill _COLD; not more than 64, lest tiny ones take forever to make."""
    return min(64, max(1, _COLD // nbytes))


def _measure_shape(
    shape, dtype, x_dtype, rows, device, seconds, clock
) -> tuple[dict[str, dict[int, float]], str | None]:
    """kernel -> rows -> median seconds; and why the vendor's kernel does not work, if it should."""
    n, k = shape
    dense = torch.randn(n, k, device=device).to(x_dtype)
    mask = two_of_four(dense.abs())
    if dtype == torch.int8:
        whole = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        weight = Sparse24Weight(*ops.compress(whole, mask), torch.full((n,), 0.01, dtype=torch.float32, device=device))
    else:
        weight = Sparse24Weight(*ops.compress(dense, mask))
    packed = [(weight.values.clone(), weight.metadata.clone()) for _ in range(_copies(weight.nbytes))]
    copies = [dense.clone() for _ in range(_copies(dense.numel() * dense.element_size()))]
    theirs: list[torch.Tensor] = []
    why_no_vendor = None

    def product(x: torch.Tensor, kernel: int):
        def call(turn: int):
            values, metadata = packed[turn % len(packed)]
            vendor = theirs[turn % len(theirs)] if kernel == VENDOR else None
            return ops.linear(x, values, metadata, scales=weight.scales, choice=(0, kernel), vendor=vendor)

        return call

    cuda = device.type == "cuda"
    if cusparselt.why_not(n, k, x_dtype, device) is None:
        try:
            theirs.append(weight.cache_vendor(x_dtype))
            for m in rows:
                if m >= _VENDOR_FROM:
                    product(torch.zeros(m, k, dtype=x_dtype, device=device), VENDOR)(0)
            if cuda:
                torch.cuda.synchronize()
            theirs += [theirs[0].clone() for _ in range(_copies(theirs[0].nbytes) - 1)]
        except RuntimeError as error:  # a build that has it need not run everywhere
            theirs, why_no_vendor = [], (str(error).splitlines() or [type(error).__name__])[0]
    times: dict[str, dict[int, float]] = {kernel: {} for kernel in ops.KERNELS}
    for m in rows:
        x = torch.randn(m, k, device=device).to(x_dtype)
        calls = {"many": product(x, MANY), "dense": lambda turn, x=x: F.linear(x, copies[turn % len(copies)])}
        if _no_few(m, k, dtype, cuda) is None and (m <= _FEW_UP_TO or m == rows[0]):
            calls["few"] = product(x, FEW)
        if theirs and m >= _VENDOR_FROM:
            calls["vendor"] = product(x, VENDOR)
        timings = _measure.interleave(calls, lambda turn, _: (turn,), seconds=seconds, min_rounds=3, clock=clock)
        for kernel, timing in timings.items():
            times[kernel][m] = timing.median
    return times, why_no_vendor


def _refuse_unwritable(op: str, path: Path) -> None:
    """OSError if the table could not be written, by writing next to it; nothing of that is left, folders neither."""
    missing: list[Path] = []
    try:
        missing += [folder for folder in path.parents if not folder.exists()]
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as file:
            file.write(b"a full disk shows at the first block")
            file.flush()
    except OSError as error:
        raise type(error)(
            f"{op}: its table must go to {path}, which cannot be written (PYVTK_CACHE names another folder), "
            f"got {error}"
        ) from error
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _write(path: Path, text: str) -> None:
    """Whole or not at all, whoever else writes or reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
