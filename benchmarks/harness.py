"""Runs cases: correctness first, then pyvtk, its peers and the limit of the machine, interleaved on the same inputs.

A case says what is computed and by whom; nothing about timing. The rules, and why:

- one thread: with two, OpenMP barriers meet CPU quotas and medians snap to the scheduler's period;
- every call gets another input of a pool: a branch predictor learns one repeated row;
- a warm case reads its inputs before each call, so that no provider pays for the cache misses of all; a cold case
  rotates through copies that together exceed the last-level cache, and every call gets one that was long unused;
- the limit (a plain read, copy or matrix product of the same size) is one more provider of the same rounds;
- on CUDA, events tell the time and every call begins with a cold and clean L2 cache; calls are replayed as CUDA graphs,
  limits too, so that the host's part does not count (those that cannot be captured are named, and where ours is one of
  them the limit is launched like it);
- a case in which ours is wrong gets no number at all. On the CPU neither does one in which a peer is: there all of them
  are known to run, so the case is wrong. On a GPU a peer that is wrong, raises or does not fit is absent, and why.

A run survives its cases: what one raises is its error. The report is written before and after each of them, so a case
that ends the process is known to the next one (``--resume``), which goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyvtk._measure import OnCuda, captured, extra_memory, extra_memory_on_cuda, interleave, on_core, on_host

from .report import (
    BEGUN,
    BEST,
    DENSE,
    IDEAL,
    LOST,
    MEMORY,
    OURS,
    OWN,
    RESERVED,
    SHARE,
    TILE,
    TIME,
    UPPER,
    Bar,
    Forward,
    Pairs,
    Report,
    Result,
    cache_bytes,
    header,
    machine,
    not_again,
    short,
    summary,
    table,
    write,
)

FAMILIES = ("score", "select", "selection", "compact", "merge", "attention", "sparse24", "models")
GO_ON = 86  # exit status where the device is of no use to this process any more: another one can go on with --resume
_PATIENCE = 60  # seconds; what was cut off later than that into a case may never end, and counts as lost


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
            share of the first peer's extra memory, "time" -> most seconds, "ideal" -> least share of the speed-up that
            operations allow, "own" -> largest share of the time in operators of pyvtk.
        cold: inputs come from memory rather than from cache.
        mutates: providers change their inputs (the check then works on copies).
        memory: measure extra memory too.
        device: "cpu" or "cuda".
        absent: peers that cannot run here, and why. Bars over them are not judged.
        optional: peers that not every CPU or installation can run; those that raise become absent, as all do on CUDA.
        dense: peers that compute every pair (of a causal case: every causal one), for ``pairs``.
        pairs: how sparse the case is.
        forward: of a whole model, called with inputs behind the timing: what its method spares.
        rounds: that many there are at least, however long they take.
        cpu_time: on the CPU and with one thread, count the time that the process has a core for. Calls that last longer
            than a turn of the scheduler share the core with other processes, whoever those are.
        eager: providers that no CUDA graph can capture (they synchronise, for instance), so that it is not tried.
        place: in the run of --key, which goes by this number; 0: not in it. See :func:`marked`.
        spared: peers that the run of --key leaves out.
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
    forward: Callable[..., Forward] | None = None
    rounds: int = 3
    cpu_time: bool = False
    eager: tuple[str, ...] = ()
    place: int = 0
    spared: tuple[str, ...] = ()

    def __post_init__(self):
        first, *peers = self.providers
        known = {*peers, *self.absent}
        assert first == OURS, f"{self.name}: the first provider must be {OURS!r}"
        assert not known & set(RESERVED), f"{self.name}: peers must not be named {RESERVED}"
        assert set(self.bars) <= {*known, *RESERVED[1:]}, f"{self.name}: unknown bar in {set(self.bars)}"
        assert set(self.eager) <= {OURS, *known}, f"{self.name}: {self.eager} are no providers"
        assert {*self.dense, *self.optional, *self.spared} <= known, f"{self.name}: no such peers in {known}"
        assert not set(self.absent) & set(self.providers), f"{self.name}: absent peers are there"

    @property
    def id(self) -> str:
        return f"{self.family}: {self.name}, {short(self.dtype)}"


def marked(case: Case, place: int = 1, spared: tuple[str, ...] = ()) -> Case:
    """The case, marked as one that says much of a device in little time: --key runs those.

    Args:
        place: 1 for what the package is judged by, 2 for what is worth a look, more for what takes long to compile.
        spared: peers that are left out there, as they take long and say little more.
    """
    return dataclasses.replace(case, place=place, spared=spared)


def without(case: Case, name: str, why: str) -> Case:
    """The case without a peer."""
    providers = {other: call for other, call in case.providers.items() if other != name}
    return dataclasses.replace(case, providers=providers, absent={**case.absent, name: why})


@functools.cache
def clock(device: str) -> Callable[[Callable, tuple], float]:
    return OnCuda(device) if device == "cuda" else on_host


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


def bandwidth_limit(amount: Callable[..., float], device: str, as_large: bool = False) -> Limit:
    """Moving so many bytes, read and written ones together, at the rate of a large copy.

    Args:
        as_large: of a copy that moves just as many. That is fair where a case writes about as much as it reads: up to
            the size of a GPU's cache, what is written is still there when the call ends, and does not count.
    """

    def copied(*inputs) -> int:
        return min(_BANDWIDTH[device], max(1, int(amount(*inputs)) // 2)) if as_large else _BANDWIDTH[device]

    def probe(*inputs):
        count = copied(*inputs)
        source, target = _copy_operands(device)
        target[:count].copy_(source[:count])

    return Limit("copy", probe, amount, lambda *inputs: amount(*inputs) / (2 * copied(*inputs)))


def matmul_limit(operations: Callable[..., float], dtype: torch.dtype, device: str = "cpu") -> Limit:
    """Doing the case's multiplications at the rate of a large matrix product."""

    def probe(*inputs):
        a, b, c = _matmul_operands(dtype, device)
        torch.mm(a, b, out=c)

    return Limit("matmul", probe, operations, lambda *inputs: operations(*inputs) / (2 * _PROBE[device] ** 3))


# ---- checks


# A check is called with the provider's name and its result, and raises AssertionError.


def close(
    oracle: Tensor | list[Tensor], plain: Tensor | list[Tensor], answers: dict[str, torch.dtype] | None = None
) -> Callable:
    """pyvtk may be twice as far from a float64 oracle as plain torch, plus one rounding of the largest value.

    Peers get four times that: they only have to compute the same thing, in whatever order is fastest for them. One
    whose own results have a shorter dtype (``answers``, by name) may also be off by half a unit of that in each value.
    """
    oracles, plains = tree_leaves(oracle), tree_leaves(plain)
    answers = answers or {}

    def check(name, result):
        results = tree_leaves(result)
        assert len(results) == len(oracles), f"{len(results)} results, expected {len(oracles)}"
        for actual, exact, other in zip(results, oracles, plains):
            assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
            exact = exact.double()
            off = (actual.double() - exact).abs()
            if name in answers:
                off = off - torch.finfo(answers[name]).eps / 2 * exact.abs()
            error = off.max().item()
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


def reason(error: Exception) -> str:
    """In a line: what was asserted, or what was raised."""
    text = (str(error).splitlines() or [""])[0][:160]
    plain = text and isinstance(error, (AssertionError, torch.OutOfMemoryError))
    return text if plain else f"{type(error).__name__}: {text}"


class Failed(Exception):
    """A provider raised, or its result is wrong."""

    def __init__(self, name: str, error: Exception, wrong: bool, when: str):
        super().__init__(f"{name}: {when}{reason(error)}")
        self.name, self.wrong = name, wrong
        self.why = f"{'wrong: ' if wrong else ''}{when}{reason(error)}"  # of its absence


@contextlib.contextmanager
def blaming(name: str, wrong: bool = False, when: str = "") -> Iterator[None]:
    """Whatever is raised inside is this provider's failure."""
    try:
        yield
    except Exception as error:
        raise Failed(name, error, wrong, when) from error


def still_works(device: str) -> bool:
    """Whether other cases can run in this process: after a bad access a GPU is of no use to it, and a capture that
    failed may leave behind that nothing can draw random numbers."""
    if device == "cpu":
        return True
    try:
        torch.cuda.synchronize()
        torch.rand(1, device=device).item()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def forgiven(case: Case, failed: Failed) -> bool:
    """Whether the case goes on without the provider that failed: never without ours (or the limit)."""
    if failed.name not in case.providers or failed.name == OURS:
        return False
    if case.device == "cuda":
        return still_works(case.device)
    return failed.name in case.optional and not failed.wrong


def settled(case: Case, inputs: tuple) -> tuple[Case, Callable]:
    """The case without the peers that it can be without, all others checked; and the check.

    Raises:
        Failed: a provider fails, and the case is nothing without it.
    """

    def fresh():
        return _copy(inputs) if case.mutates else inputs

    check = case.expect(*fresh())
    for name, provider in case.providers.items():
        try:
            with blaming(name):
                result = provider(*fresh())
            with blaming(name, wrong=True):
                check(name, result)
        except Failed as failed:
            if not forgiven(case, failed):
                raise
            case = without(case, name, failed.why)
    return case, check


def judge(case: Case, result: Result) -> dict[str, Bar]:
    """Compare with what was measured those of the case's bars that can be."""
    bars = {}
    for name, required in case.bars.items():
        reached = None
        if name == SHARE:
            reached = result.share
        elif name == BEST:
            reached = min(result.ratios.values(), default=None)
        elif name == DENSE:
            reached = result.over_dense
        elif name == TILE and result.dense:
            reached = result.over_dense / result.tile_ideal
        elif name == IDEAL:
            reached = result.of_ideal
        elif name == OWN and result.forward is not None:
            reached = result.forward.own
        elif name == MEMORY and len(result.memory) > 1:
            reached = result.memory[OURS] / max(1, result.memory[list(case.providers)[1]])
        elif name == TIME:
            reached = result.times[OURS].median
        else:
            reached = result.ratios.get(name)
        if reached is not None:
            bars[name] = Bar(required, reached, reached <= required if name in UPPER else reached >= required)
    return bars


_GRAPH = "as a graph, "


def replayed(case: Case, calls: dict[str, Callable], entry: tuple, check: Callable) -> dict[str, Callable]:
    """Those of the calls on ``entry`` that can be captured, as replays of CUDA graphs. What they compute is checked, as
    a graph that leaves work out is fast; but not where they change their inputs, which are no longer what they were."""
    found = {}
    for name, call in calls.items():
        if name in case.eager:
            continue
        try:
            found[name] = captured(call, entry)
        except Exception as error:  # whatever it was, it is launched instead, and named
            if not still_works(case.device):
                raise Failed(name, error, wrong=False, when=_GRAPH) from error
            continue
        if name in case.providers and not case.mutates:
            with blaming(name, wrong=True, when=_GRAPH):
                check(name, found[name].result)
    if OURS not in found:
        found.pop(SHARE, None)  # the limit as ours
    return found


def run_case(case: Case, *, seconds: float = 2.0) -> Result:
    """Check a case, then measure it. Whatever goes wrong is said in the result: a peer that fails is absent where it is
    :func:`forgiven`, all else is the case's error."""
    while True:
        try:
            return _run_case(case, seconds)
        except Failed as failed:
            if forgiven(case, failed):
                case = without(case, failed.name, failed.why)
                continue
            error = str(failed)
        except Exception as raised:
            error = reason(raised)
        return Result(case.family, case.name, short(case.dtype), absent=case.absent, error=error)


def _run_case(case: Case, seconds: float) -> Result:
    if case.device == "cuda":
        gc.collect()  # what exceptions hold on to
        torch.cuda.empty_cache()
    torch.manual_seed(0)
    inputs = case.inputs()
    case, check = settled(case, inputs)
    result = Result(case.family, case.name, short(case.dtype), absent=case.absent)
    result.dense = [name for name in case.dense if name in case.providers]
    if case.memory:
        for name, provider in case.providers.items():
            measure = extra_memory_on_cuda if case.device == "cuda" else extra_memory
            with blaming(name):
                used = measure(functools.partial(provider, *inputs))
            if used is not None:
                result.memory[name] = used
    del inputs

    calls = dict(case.providers)
    if case.limit:
        calls[SHARE] = case.limit.probe
    pool = Pool(case)
    for position, (name, call) in enumerate(calls.items()):
        with blaming(name):
            call(*pool(0, position))
    if case.device == "cuda":
        graphs = replayed(case, calls, pool.entries[0], check)  # of the same inputs as those that were checked
        result.launched = [name for name in calls if name not in graphs]
        calls |= graphs
    del check
    names = {id(call): name for name, call in calls.items()}
    result.cpu_time = case.cpu_time and case.device == "cpu" and torch.get_num_threads() == 1
    timed = on_core if result.cpu_time else clock(case.device)

    def blame(call, arguments):
        with blaming(names[id(call)]):
            return timed(call, arguments)

    times = interleave(calls, pool, seconds=seconds, min_rounds=case.rounds, clock=blame)
    if case.limit:
        entry = pool.entries[0]
        result.limit = case.limit.kind
        result.limit_time = times.pop(SHARE).median * case.limit.scale(*entry)
        result.amount = case.limit.amount(*entry)
    result.times = times
    result.pairs = case.pairs() if case.pairs else None
    result.forward = case.forward(*pool.entries[0]) if case.forward else None
    result.bars = judge(case, result)
    result.unjudged = [name for name in case.bars if name not in result.bars]
    return result


def replay_floor(device: str) -> float | None:
    """Seconds of the replay of one tiny kernel, about what is in every number; None where nothing is replayed."""
    if device == "cpu":
        return None
    one = torch.zeros(1, device=device)
    try:
        replay = captured(lambda: one.add_(1), ())
    except RuntimeError:  # then all is launched, and every case says so
        return None
    return interleave({"floor": replay}, seconds=0.02, clock=clock(device))["floor"].median


# ---- the command


def cases(
    families: list[str] | None = None, texts: list[str] | None = None, device: str = "cpu", key: bool = False
) -> list[Case]:
    """All cases of these families on the device whose id contains one of ``texts``, if any. A family lists ``CASES``
    for the CPU, or has a function ``cases(device)`` where the shapes depend on it.

    Args:
        key: only :func:`marked` cases, in their order and without the peers that they spare.
    """
    import importlib

    found = []
    for family in families or FAMILIES:
        module = importlib.import_module(f"{__package__}.bench_{family}")
        of_family = module.cases(device) if hasattr(module, "cases") else module.CASES if device == "cpu" else []
        found += [case for case in of_family if not texts or any(text.lower() in case.id.lower() for text in texts)]
    if not key:
        return found
    chosen = sorted((case for case in found if case.place), key=lambda case: case.place)
    for i, case in enumerate(chosen):
        for name in case.spared:
            case = without(case, name, "left out by --key")
        chosen[i] = case
    return chosen


class DeviceLost(Exception):
    """The case after which the device is of no use to this process."""


def run(
    chosen: list[Case], *, seconds: float, command: str, device: str = "cpu", path: Path | None = None,
    before: list[Result] = (), threads: int = 1,
) -> Report:  # fmt: skip
    """Measure cases one after the other under a progress bar (on a terminal).

    Args:
        path: the report is written there before and after every case.
        before: results of another run, taken instead of measuring these cases again (:func:`not_again`). Those of cases
            that are not chosen stay in the file.
        threads: of torch and of the kernels of the CPU.

    Raises:
        DeviceLost: the rest has to be measured by another process; the report is written.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    torch.set_num_threads(threads)
    report = Report(machine(command, device, replay_floor(device)), [])
    known = not_again(before)

    def written(*more: Result) -> None:
        if path is not None:
            write(path, dataclasses.replace(report, results=[*report.results, *more, *known.values()]))

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # refreshed by hand: a drawing thread would disturb the timings
    with Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        for case in chosen:
            progress.update(task, description=case.id[:70].ljust(70), refresh=True)
            begun = Result(case.family, case.name, short(case.dtype), error=BEGUN)
            found, works = known.pop(begun.of, None), True
            if found is None:
                if not console.is_terminal:
                    print(case.id, file=sys.stderr, flush=True)
                written(begun)
                start = monotonic()
                try:
                    found = run_case(case, seconds=seconds)
                except BaseException:  # interrupted, or told to end: no fault of the case, unless it took too long
                    if monotonic() - start < _PATIENCE:
                        written()
                    raise
                works = still_works(device)
                if found.error and not works:
                    found.error = f"{LOST}the device works no more: {found.error}"
            report.results.append(found)
            written()
            progress.advance(task)
            if not works:
                raise DeviceLost(case.id)
    return report


@contextlib.contextmanager
def ended_by_exception() -> Iterator[None]:
    """SIGTERM (a time limit's first signal) raises SystemExit, so that a case which is merely cut off can be told from
    one that hangs."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(args: argparse.Namespace) -> int:
    chosen = cases(args.families, args.filter, args.device, args.key)
    if args.list:
        print("\n".join(case.id for case in chosen))
        return 0
    if not chosen:
        wanted = f"contains {' or '.join(map(repr, args.filter))}" if args.filter else f"runs on {args.device}"
        print(f"pyvtk bench: no case {wanted}; --list shows them", file=sys.stderr)
        return 2
    if args.key:  # FlashInfer is a peer where its kernels come built; compiling them takes minutes
        os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    for folder in ([Path(args.json).parent] if args.json else []) + ([Path(args.plots)] if args.plots else []):
        folder.mkdir(parents=True, exist_ok=True)  # now, lest the numbers be lost after the run
    words = ["python -m pyvtk bench", *(args.families or []), *(["--key"] if args.key else [])]
    words += ["--quick"] if args.quick else []
    words += [f"--device {args.device}"] if args.device != "cpu" else []
    words += [f"--threads {args.threads}"] if args.threads > 1 else []
    words += [f"--filter {text!r}" for text in args.filter or []]
    path = Path(args.json) if args.json else None
    before = Report.from_json(path.read_text()).results if args.resume and path is not None and path.is_file() else []
    seconds = 0.2 if args.quick else 2.0
    try:
        with ended_by_exception():
            report = run(
                chosen, seconds=seconds, command=" ".join(words), device=args.device, path=path, before=before,
                threads=args.threads,
            )  # fmt: skip
    except DeviceLost as case:
        print(f"pyvtk bench: the device works no more after {case}; --resume goes on behind it", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(GO_ON)  # at once: what torch does at the end of a process may crash without a device
    print(header(report.machine), table(report.results), summary(report.results), sep="\n\n")
    if args.plots:
        from . import plots

        for path in plots.draw(report, Path(args.plots)):
            print(f"wrote {path}")
    return 1 if any(r.error for r in report.results) else 0
