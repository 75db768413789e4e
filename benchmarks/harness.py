"""Runs cases: correctness first, then pyvtk, its peers and the limit of the machine, interleaved on the same inputs.

A case says what is computed and by whom; nothing about timing. The rules, and why:

- one thread: with two, OpenMP barriers meet CPU quotas and medians snap to the scheduler's period;
- every call gets another input of a pool: a branch predictor learns one repeated row;
- a warm case reads its inputs before each call, so that no provider pays for the cache misses of all; a cold case
  rotates through copies that together exceed the last-level cache, and every call gets one that was long unused;
- the limit (a plain read, copy or matrix product of the same size) is one more provider of the same rounds;
- on CUDA, events tell the time and the L2 cache is overwritten before each call; where a case asks for it, calls are
  replayed as CUDA graphs, so that the host's part does not count (those that cannot be captured are named);
- a case in which any provider fails the check gets no number at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import pyvtk
from pyvtk._measure import OnCuda, Timing, captured, extra_memory, extra_memory_on_cuda, interleave, on_host

OURS = "pyvtk"
BEST = "best"  # in bars: the fastest peer of the row
SHARE = "limit"  # in bars: share of the machine's limit
MEMORY = "memory"  # in bars: extra memory as a share of the first peer's
DENSE = "dense"  # in bars: the fastest peer that computes every pair
TILE = "tile"  # in bars: share of the speed-up over DENSE that the visited pairs allow
TIME = "time"  # in bars: seconds
RESERVED = (OURS, BEST, SHARE, MEMORY, DENSE, TILE, TIME)
UPPER = (MEMORY, TIME)  # the less the better
FAMILIES = ("score", "select", "compact", "merge", "attention", "sparse24")


@dataclass
class Limit:
    """The plainest thing the machine can do with as many bytes or operations, as a call on the same inputs.

    A share above 100 % is possible: torch's ``copy_`` does not bypass the cache as a streaming copy does.

    Attributes:
        kind: "read", "copy" or "matmul".
        probe: called with the case's inputs.
        amount: bytes or floating-point operations of the case, from its inputs.
        scale: operations of the case per operation of the probe.
    """

    kind: str
    probe: Callable
    amount: Callable[..., float]
    scale: Callable[..., float] = lambda *inputs: 1.0


@dataclass
class Pairs:
    """Pairs of a query and a key, per head: what a case needs, what its tiles visit, what dense peers compute."""

    needed: int
    visited: int
    dense: int


@dataclass
class Case:
    """One row: inputs, providers, and what is expected of them.

    Attributes:
        family: one of FAMILIES.
        name: shape named after the model it comes from.
        dtype: of the main input, for the table.
        inputs: makes fresh inputs; called after the seed is set.
        providers: name -> callable on the inputs; "pyvtk" first, then what users write today, then other peers.
        expect: given inputs, returns a check, ``check(provider name, result)``, that raises AssertionError.
        limit: the machine's bound, if one is meaningful.
        bars: what has to be reached: peer (or "best") -> least ratio, "limit" -> least share, "memory" -> largest
            share of the first peer's extra memory, "time" -> most seconds.
        cold: inputs come from memory rather than from cache.
        mutates: providers change their inputs (the check then works on copies).
        memory: measure extra memory too.
        device: "cpu" or "cuda".
        absent: peers that cannot run here, and why.
        optional: peers that not every installation can run; those that raise become absent.
        dense: peers that compute every pair (of a causal case: every causal one), for ``pairs``.
        pairs: how sparse the case is.
        graph: on CUDA, replay calls as CUDA graphs where they can be captured.
        eager: providers that cannot (they synchronise), so that it is not tried.
    """

    family: str
    name: str
    dtype: torch.dtype
    inputs: Callable[[], tuple]
    providers: dict[str, Callable]
    expect: Callable[..., Callable[[str, object], None]]
    limit: Limit | None = None
    bars: dict[str, float] = field(default_factory=dict)
    cold: bool = False
    mutates: bool = False
    memory: bool = False
    device: str = "cpu"
    absent: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    pairs: Callable[[], Pairs] | None = None
    graph: bool = False
    eager: tuple[str, ...] = ()

    def __post_init__(self):
        first, *peers = self.providers
        assert first == OURS, f"{self.name}: the first provider must be {OURS!r}"
        assert not set(peers) & set(RESERVED), f"{self.name}: peers must not be named {RESERVED}"
        assert set(self.bars) <= {*peers, *RESERVED[1:]}, f"{self.name}: unknown bar in {set(self.bars)}"
        assert set(self.eager) <= set(self.providers), f"{self.name}: {self.eager} are no providers"
        assert {*self.dense, *self.optional} <= set(peers), f"{self.name}: {self.dense}, {self.optional} are no peers"
        assert not set(self.absent) & set(self.providers), f"{self.name}: absent peers are there"

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}, {short(self.dtype)}"


@dataclass
class Bar:
    required: float
    reached: float
    met: bool


@dataclass
class Result:
    """Everything that is known about one case; plain values only, so that it survives JSON."""

    family: str
    name: str
    dtype: str
    times: dict[str, Timing] = field(default_factory=dict)
    limit: str | None = None
    limit_time: float | None = None  # seconds the limit needs for this case's amount
    amount: float | None = None  # bytes or floating-point operations
    memory: dict[str, int] = field(default_factory=dict)  # provider -> extra bytes at the peak
    bars: dict[str, Bar] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why it did not run
    dense: list[str] = field(default_factory=list)  # peers that compute every pair
    pairs: Pairs | None = None
    launched: list[str] = field(default_factory=list)  # timed as launched by the host, not as CUDA graphs
    error: str | None = None  # why there are no numbers

    @property
    def ratios(self) -> dict[str, float]:
        """How many times as long each peer takes."""
        return {n: t.median / self.times[OURS].median for n, t in self.times.items() if n != OURS}

    @property
    def share(self) -> float | None:
        """Share of the limit's speed that is reached."""
        return None if self.limit_time is None else self.limit_time / self.times[OURS].median

    @property
    def over_dense(self) -> float | None:
        """How many times as long the fastest dense peer takes."""
        return min((self.ratios[name] for name in self.dense), default=None)

    @property
    def tile_ideal(self) -> float | None:
        """The same if every visited pair took as long as one of a dense peer's."""
        return None if self.pairs is None else self.pairs.dense / self.pairs.visited


@dataclass
class Report:
    machine: dict
    results: list[Result]

    def to_json(self) -> str:
        return json.dumps({"schema": 1, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        raw = json.loads(text)
        results = []
        for row in raw["results"]:
            row["times"] = {name: Timing(**t) for name, t in row["times"].items()}
            row["bars"] = {name: Bar(**b) for name, b in row["bars"].items()}
            row["pairs"] = Pairs(**row["pairs"]) if row.get("pairs") else None
            results.append(Result(**row))
        return Report(raw["machine"], results)


@functools.cache
def clock(device: str) -> Callable[[Callable, tuple], float]:
    return OnCuda() if device == "cuda" else on_host


# ---- limits


def _as_words(x: Tensor) -> Tensor:
    """The same bytes as float32, whose sum runs at memory speed; a sum over bfloat16 would convert each value."""
    fits = x.dim() and x.stride(-1) == 1 and x.shape[-1] % 2 == 0
    return x.view(torch.float32) if x.element_size() == 2 and fits else x


def read_limit(of: Callable[..., Tensor]) -> Limit:
    """Reading a tensor once: a plain sum over it."""
    return Limit("read", lambda *inputs: _as_words(of(*inputs)).sum(), lambda *inputs: of(*inputs).nbytes)


def copy_limit(of: Callable[..., list[Tensor]]) -> Limit:
    """Copying as many bytes as are kept, contiguous to contiguous: ``copy_`` of these views into existing memory."""
    buffers: dict[tuple, Tensor] = {}

    def probe(*inputs):
        for i, source in enumerate(of(*inputs)):
            key = (i, source.shape, source.dtype)
            if key not in buffers:
                buffers[key] = torch.zeros_like(source, memory_format=torch.contiguous_format)
            buffers[key].copy_(source)

    return Limit("copy", probe, lambda *inputs: 2 * sum(source.nbytes for source in of(*inputs)))


# three matrices of 768 x 768 stay in cache and still keep a core busy for some milliseconds; a GPU needs more
_PROBE = {"cpu": 768, "cuda": 8192}


@functools.cache
def _matmul_operands(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Square operands in ``dtype`` or float32, whichever multiplies faster here."""

    def operands(dtype):
        return tuple(torch.randn(_PROBE[device], _PROBE[device], device=device).to(dtype) for _ in range(3))

    candidates = {str(d): operands(d) for d in {dtype, torch.float32}}
    calls = {name: functools.partial(torch.mm, a, b, out=c) for name, (a, b, c) in candidates.items()}
    for call in calls.values():
        call()
    times = interleave(calls, seconds=0.2, clock=clock(device))
    return candidates[min(times, key=lambda name: times[name].median)]


_BANDWIDTH = {"cpu": 32 << 20, "cuda": 1 << 30}  # bytes that the probe reads


@functools.cache
def _copy_operands(device: str) -> tuple[Tensor, Tensor]:
    return tuple(torch.randint(256, (_BANDWIDTH[device],), dtype=torch.uint8, device=device) for _ in range(2))


def bandwidth_limit(amount: Callable[..., float], device: str) -> Limit:
    """Moving so many bytes, read and written ones together, at the rate of a large copy."""

    def probe(*inputs):
        source, target = _copy_operands(device)
        target.copy_(source)

    return Limit("copy", probe, amount, lambda *inputs: amount(*inputs) / (2 * _BANDWIDTH[device]))


def matmul_limit(operations: Callable[..., float], dtype: torch.dtype, device: str = "cpu") -> Limit:
    """Doing the case's multiplications at the rate of a large matrix product."""

    def probe(*inputs):
        a, b, c = _matmul_operands(dtype, device)
        torch.mm(a, b, out=c)

    return Limit("matmul", probe, operations, lambda *inputs: operations(*inputs) / (2 * _PROBE[device] ** 3))


# ---- checks


# A check is called with the provider's name and its result, and raises AssertionError.


def close(oracle: Tensor | list[Tensor], plain: Tensor | list[Tensor]) -> Callable:
    """pyvtk may be twice as far from a float64 oracle as plain torch, plus one rounding of the largest value.

    Peers get four times that: they only have to compute the same thing, in whatever order is fastest for them.
    """
    oracles, plains = tree_leaves(oracle), tree_leaves(plain)

    def check(name, result):
        results = tree_leaves(result)
        assert len(results) == len(oracles), f"{len(results)} results, expected {len(oracles)}"
        for actual, exact, other in zip(results, oracles, plains):
            assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
            exact = exact.double()
            error = (actual.double() - exact).abs().max().item()
            rounding = torch.finfo(actual.dtype).eps * exact.abs().max().item()
            budget = (1 if name == OURS else 4) * (2 * (other.double() - exact).abs().max().item() + rounding)
            assert error <= budget, f"error {error:.2e} exceeds the budget {budget:.2e}"

    return check


def same(expected) -> Callable:
    """Results are moved, not computed: every bit has to agree."""
    wanted = tree_leaves(expected)

    def check(name, result):
        results = tree_leaves(result)
        assert len(results) == len(wanted), f"{len(results)} results, expected {len(wanted)}"
        for i, (actual, exact) in enumerate(zip(results, wanted)):
            assert actual.dtype == exact.dtype and actual.shape == exact.shape, (
                f"result {i} is {tuple(actual.shape)} {actual.dtype}, expected {tuple(exact.shape)} {exact.dtype}"
            )
            assert torch.equal(actual, exact), f"result {i} differs from plain indexing"

    return check


# ---- running


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        sizes.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(sizes)


def _tensors(inputs) -> list[Tensor]:
    return [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]


def _copy(inputs):
    def copy(x):
        return x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x

    return tree_map(copy, inputs)


def made_on(device: str, inputs: Callable[[], tuple]) -> Callable[[], tuple]:
    """``inputs``, whose tensors are then made on the device."""
    if device == "cpu":
        return inputs

    def make():
        with torch.device(device):
            return inputs()

    return make


@functools.cache
def compiled(function: Callable) -> Callable:
    """By torch.compile, once for each shape."""
    torch._dynamo.config.recompile_limit = 256  # beyond the limit a shape would not be compiled
    torch._dynamo.config.accumulated_recompile_limit = 1024
    return torch.compile(function, dynamic=False)


class Pool:
    """Inputs made ahead, handed out in turn."""

    def __init__(self, case: Case):
        self.case = case
        self.entries = [self._make(0)]
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(self.entries[0])}
        one = max(1, sum(storages.values()))
        # warm: many rows, so that none is learnt, in a third of the cache; cold: as a call may touch only a quarter of
        # an entry, eight times the cache lie between two uses
        wanted = 8 * cache_bytes() // one + 2 if case.cold else cache_bytes() // 3 // one
        # on CUDA the cache is overwritten before every call, and nothing predicts branches
        self.count = 2 if case.device == "cuda" else max(2, min(wanted, 256))
        self.entries += [self._make(i) for i in range(1, self.count)]

    def _make(self, seed: int) -> tuple:
        torch.manual_seed(seed)
        return self.case.inputs()

    def __call__(self, round: int, position: int) -> tuple:
        if self.case.cold:
            callers = len(self.case.providers) + (self.case.limit is not None)
            return self.entries[(round * callers + position) % self.count]
        inputs = self.entries[round % self.count]
        if self.case.device == "cpu":
            for x in _tensors(inputs):
                _as_words(x.detach()).sum()
        return inputs


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]


def present(case: Case, inputs: tuple) -> Case:
    """The case without the optional peers that cannot run."""
    absent = dict(case.absent)
    for name in case.optional:
        try:
            case.providers[name](*(_copy(inputs) if case.mutates else inputs))
        except Exception as error:  # a peer may fail in many ways where it is not at home
            absent[name] = first_line(error)[:120] or type(error).__name__
    return dataclasses.replace(
        case,
        providers={name: call for name, call in case.providers.items() if name not in absent},
        bars={name: bar for name, bar in case.bars.items() if name not in absent},
        dense=tuple(name for name in case.dense if name not in absent),
        eager=tuple(name for name in case.eager if name not in absent),
        absent=absent,
        optional=(),
    )


def verify(case: Case, inputs: tuple) -> str | None:
    """What is wrong with any provider of the case; None if all pass."""
    check = case.expect(*(_copy(inputs) if case.mutates else inputs))
    for name, provider in case.providers.items():
        try:
            check(name, provider(*(_copy(inputs) if case.mutates else inputs)))
        except Exception as error:  # whatever went wrong, the row must not show numbers
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            return f"{name}: {kind}{first_line(error)}"
    return None


def judge(case: Case, result: Result) -> dict[str, Bar]:
    """Compare the case's bars with what was measured."""
    bars = {}
    for name, required in case.bars.items():
        if name == SHARE:
            reached = result.share
        elif name == BEST:
            reached = min(result.ratios.values())
        elif name == DENSE:
            reached = result.over_dense
        elif name == TILE:
            reached = result.over_dense / result.tile_ideal
        elif name == MEMORY:
            if len(result.memory) < 2:
                continue  # this system cannot measure it
            reached = result.memory[OURS] / max(1, result.memory[list(case.providers)[1]])
        elif name == TIME:
            reached = result.times[OURS].median
        else:
            reached = result.ratios[name]
        bars[name] = Bar(required, reached, reached <= required if name in UPPER else reached >= required)
    return bars


def replayed(case: Case, calls: dict[str, Callable], pool: Pool) -> tuple[dict[str, Callable], list[str]]:
    """The calls as replays of CUDA graphs, each of the first inputs, and the names of those that stay as they are."""
    found, launched = {}, []
    for name, call in calls.items():
        try:
            if name in case.eager:
                raise RuntimeError("known not to be capturable")
            graph = captured(call, pool.entries[0])
            found[name] = lambda *inputs, graph=graph: graph()
        except RuntimeError:
            torch.cuda.synchronize()
            found[name] = call
            launched.append(name)
    return found, launched


def run_case(case: Case, *, seconds: float = 2.0) -> Result:
    """Check a case, then measure it. Where the device has no memory for it, that is the error."""
    try:
        return _run_case(case, seconds)
    except torch.OutOfMemoryError as error:
        return Result(case.family, case.name, short(case.dtype), error=first_line(error)[:120])
    finally:
        if case.device == "cuda":
            torch.cuda.empty_cache()


def _run_case(case: Case, seconds: float) -> Result:
    torch.manual_seed(0)
    inputs = case.inputs()
    case = present(case, inputs)
    result = Result(case.family, case.name, short(case.dtype), absent=case.absent, dense=list(case.dense))
    result.error = verify(case, inputs)
    if result.error:
        return result
    if case.memory:
        for name, provider in case.providers.items():
            measure = extra_memory_on_cuda if case.device == "cuda" else extra_memory
            used = measure(functools.partial(provider, *inputs))
            if used is not None:
                result.memory[name] = used
    del inputs

    calls = dict(case.providers)
    if case.limit:
        calls[SHARE] = case.limit.probe
    pool = Pool(case)
    for position, call in enumerate(calls.values()):
        call(*pool(0, position))
    if case.graph and case.device == "cuda":
        calls, result.launched = replayed(case, calls, pool)
    times = interleave(calls, pool, seconds=seconds, clock=clock(case.device))
    if case.limit:
        entry = pool.entries[0]
        result.limit = case.limit.kind
        result.limit_time = times.pop(SHARE).median * case.limit.scale(*entry)
        result.amount = case.limit.amount(*entry)
    result.times = times
    result.pairs = case.pairs() if case.pairs else None
    result.bars = judge(case, result)
    return result


def machine(command: str, device: str = "cpu") -> dict:
    """Where and when the numbers were taken. ``load`` is the load average at the start: above 0.5, expect noise."""
    facts = pyvtk.info()
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    commit = git("rev-parse", "--short=10", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu,
        "instruction_set": facts["instruction_set"],
        "cache": cache_bytes(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": facts["triton"],
        "cuda": torch.version.cuda,
        "pyvtk": facts["pyvtk"],
        "python": platform.python_version(),
        "commit": (git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""))
        or None,
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
    }


# ---- showing


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def size(count: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} B"


def _limit_cell(result: Result) -> str:
    if result.share is None:
        return "-"
    rate = result.amount / result.times[OURS].median
    unit = "GFLOP/s" if result.limit == "matmul" else "GB/s"
    return f"{100 * result.share:3.0f} % of {result.limit} ({rate / 1e9:.3g} {unit})"


def _bar_cell(name: str, bar: Bar) -> str:
    sign = "✓" if bar.met else "✗"
    if name == SHARE:
        return f"{sign} limit ≥ {100 * bar.required:.0f} %"
    if name == MEMORY:
        return f"{sign} memory ≤ {100 * bar.required:.0f} %"
    if name == TIME:
        return f"{sign} ≤ {duration(bar.required)}"
    if name == TILE:
        return f"{sign} tile-ideal ≥ {100 * bar.required:.0f} %"
    return f"{sign} {name} ≥ {bar.required:g}x"


def table(results: list[Result]) -> str:
    """Aligned text, one block per family."""
    blocks = []
    for family in dict.fromkeys(r.family for r in results):
        rows = [("case", "dtype", "pyvtk", "20-80 %", "limit", "peers: times as long", "bars")]
        for r in (r for r in results if r.family == family):
            if r.error:
                rows.append((r.name, r.dtype, "RED", "-", "-", f"no numbers: {r.error}", ""))
                continue
            ours = r.times[OURS]
            peers = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in r.ratios.items())
            bars = ", ".join(_bar_cell(name, bar) for name, bar in r.bars.items())
            spread = f"{duration(ours.low)} - {duration(ours.high)}"
            rows.append((r.name, r.dtype, duration(ours.median), spread, _limit_cell(r), peers, bars))
            if r.memory:
                used = ", ".join(f"{name} {size(n)}" for name, n in r.memory.items())
                rows.append(("", "", "", "", "", f"extra memory: {used}", ""))
            if r.pairs:
                share = r.pairs.needed / r.pairs.dense
                ideal = f"needs {share:.1%} of the dense pairs, visits {1 / r.tile_ideal:.1%}"
                rows.append(("", "", "", "", "", ideal, ""))
            if r.launched:
                rows.append(("", "", "", "", "", f"as launched, not as CUDA graphs: {', '.join(r.launched)}", ""))
            if r.absent:
                reasons = "; ".join(f"{name} ({why})" for name, why in r.absent.items())
                rows.append(("", "", "", "", "", f"absent: {reasons}", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        blocks.append("\n".join([family, *("  " + line for line in lines)]))
    return "\n\n".join(blocks)


def summary(results: list[Result]) -> str:
    bars = [bar for r in results for bar in r.bars.values()]
    red = sum(r.error is not None for r in results)
    text = f"{len(results)} cases, {sum(bar.met for bar in bars)} of {len(bars)} bars met"
    return text + (f", {red} RED (wrong result, no number)" if red else ", every result checked")


def header(facts: dict) -> str:
    lines = (
        *(["{device}, beside"] if facts["device"] != "cpu" else []),
        "{cpu}, {instruction_set}, {threads} thread, last-level cache {cache}, load {load}",
        "pyvtk {pyvtk} at commit {commit}, torch {torch}, Python {python}, {date}",
        "{command}",
    )
    return "\n".join(lines).format(**{**facts, "cache": size(facts["cache"])})


# ---- the command


def cases(families: list[str] | None = None, text: str | None = None, device: str = "cpu") -> list[Case]:
    """All cases of these families on the device whose id contains ``text``. A family lists ``CASES`` for the CPU, or
    has a function ``cases(device)`` where the shapes depend on it."""
    import importlib

    found = []
    for family in families or FAMILIES:
        module = importlib.import_module(f"{__package__}.bench_{family}")
        of_family = module.cases(device) if hasattr(module, "cases") else module.CASES if device == "cpu" else []
        found += [case for case in of_family if text is None or text.lower() in case.id.lower()]
    return found


def run(
    chosen: list[Case], *, seconds: float, command: str, device: str = "cpu", path: Path | None = None,
    before: list[Result] = (),
) -> Report:  # fmt: skip
    """Measure cases one after the other under a progress bar (on a terminal).

    Args:
        path: the report is written there after every case.
        before: results of another run, taken instead of measuring these cases again. Those of cases that are not chosen
            stay in the file.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    torch.set_num_threads(1)
    report = Report(machine(command, device), [])
    known = {(r.family, r.name, r.dtype): r for r in before if r.error is None}
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # refreshed by hand: a drawing thread would disturb the timings
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.id[:70].ljust(70), refresh=True)
            found = known.pop((case.family, case.name, short(case.dtype)), None)
            if found is None and not console.is_terminal:
                print(case.id, file=sys.stderr, flush=True)
            report.results.append(found or run_case(case, seconds=seconds))
            if path is not None:
                path.write_text(dataclasses.replace(report, results=[*report.results, *known.values()]).to_json())
            progress.advance(task)
    return report


def main(args: argparse.Namespace) -> int:
    chosen = cases(args.families, args.filter, args.device)
    if args.list:
        print("\n".join(case.id for case in chosen))
        return 0
    if not chosen:
        wanted = f"contains {args.filter!r}" if args.filter else f"runs on {args.device}"
        print(f"pyvtk bench: no case {wanted}; --list shows them", file=sys.stderr)
        return 2
    for folder in ([Path(args.json).parent] if args.json else []) + ([Path(args.plots)] if args.plots else []):
        folder.mkdir(parents=True, exist_ok=True)  # now, lest the numbers be lost after the run
    words = ["python -m pyvtk bench", *(args.families or []), *(["--quick"] if args.quick else [])]
    words += [f"--device {args.device}"] if args.device != "cpu" else []
    words += [f"--filter {args.filter!r}"] if args.filter else []
    path = Path(args.json) if args.json else None
    before = Report.from_json(path.read_text()).results if args.resume and path is not None and path.is_file() else []
    seconds = 0.2 if args.quick else 2.0
    report = run(chosen, seconds=seconds, command=" ".join(words), device=args.device, path=path, before=before)
    print(header(report.machine), table(report.results), summary(report.results), sep="\n\n")
    if args.plots:
        from . import plots

        for path in plots.draw(report, Path(args.plots)):
            print(f"wrote {path}")
    return 1 if any(r.error for r in report.results) else 0
