"""Time and memory of calls that compete with each other; shared by the benchmarks, ``sparse24.calibrate`` and the demo.

On CUDA a call is timed by events, from a cache that holds nothing of it and nothing that has to be written back
(:class:`OnCuda`), and best as the replay of a CUDA graph (:func:`captured`), so that the host's part does not count.

A graph holds one call. What a replay costs beyond its kernels, about a launch, is therefore in every number: it brings
ratios nearer to 1, whoever wins, and the benchmarks measure it and write it beside their numbers. A graph of several
calls, divided by their number, would hide it. But its second call would find in the cache what the first one left, and
between the layers of a model no call finds that. A small and known cost is better than a warm cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter_ns, process_time_ns

import torch

_FLUSH = 4  # times the size of the L2 cache that is read to empty it
_LEAD = 3e-4  # seconds by which the host gets ahead of a chain of launches
_WALL = 3  # seconds that may pass for each second to be measured


@dataclass
class Timing:
    """Median and 20/80 % quantiles of one call, in seconds."""

    median: float
    low: float
    high: float
    rounds: int

    @staticmethod
    def of(times: list[float]) -> Timing:
        times = sorted(times)
        at = lambda share: times[round(share * (len(times) - 1))]  # noqa: E731
        return Timing(at(0.5), at(0.2), at(0.8), len(times))


def on_host(call: Callable, arguments: tuple) -> float:
    """Seconds of a call, for work that ends when the call returns."""
    start = perf_counter_ns()
    call(*arguments)
    return (perf_counter_ns() - start) * 1e-9


def on_core(call: Callable, arguments: tuple) -> float:
    """Seconds that this process had a core for during a call, those of all its threads together: what other processes
    took meanwhile does not count."""
    start = process_time_ns()
    call(*arguments)
    return (process_time_ns() - start) * 1e-9


class OnCuda:
    """Seconds of a call on a GPU, by events.

    Before the call a buffer of four times the L2 cache is read: so often, because a cache need not evict what was used
    longest ago. That evicts what the last call left there. It is read and not written: the cache writes back late, and
    what a flush had written would be written to memory inside the time of the call.

    While the reading lasts, the host gets ahead, so that launches are not what is measured. A replay is one launch: the
    buffer is read once. Another call may be a chain of launches: it is read until 0.3 ms have passed. By the data sheet
    of an H100 (50 MiB of L2, 3.35 TB/s) that is 210 MB and 0.06 ms before a replay, five times as much before others.
    """

    def __init__(self, device: torch.device | str = "cuda"):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.ones(_FLUSH * cache // 4, dtype=torch.float32, device=device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._read(10)  # loads the kernel, wakes the device
        self._times = math.ceil(_LEAD * 10 / self._timed(self._read, (10,)))

    def __call__(self, call: Callable, arguments: tuple) -> float:
        self._read(1 if isinstance(call, Replay) else self._times)
        return self._timed(call, arguments)

    def _read(self, times: int) -> None:
        for _ in range(times):
            self._buffer.sum()

    def _timed(self, call: Callable, arguments: tuple) -> float:
        self._start.record()
        call(*arguments)
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) * 1e-3


class Replay:
    """A call as a CUDA graph: the work of the device, without that of the host.

    Attributes:
        result: of the call, in the memory that each replay writes to.
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, arguments: tuple, result: object):
        self._graph, self._arguments, self.result = graph, arguments, result  # kept: the graph reads and writes them

    def __call__(self, *arguments) -> None:
        """Replays; arguments are those of the capture, whatever is given."""
        self._graph.replay()


def captured(call: Callable, arguments: tuple) -> Replay:
    """``call(*arguments)`` as a CUDA graph, replayed once.

    Raises:
        RuntimeError, or what the call raises: it cannot be captured; it synchronises, for instance. Whatever it was,
            streams, memory and random numbers are as before.
    """
    device, stream = torch.cuda.current_device(), torch.cuda.Stream()
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    # not torch.cuda.graph, which leaves its stream the current one if the capture fails
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, chooses algorithms, makes what is made once
            call(*arguments)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph has a pool of its own, which cannot take what is cached
        with _random_state_of_its_own(device):
            graph.capture_begin(pool=pool)
            try:
                result = call(*arguments)
            finally:
                try:
                    graph.capture_end()
                except RuntimeError:
                    _forget(graph, device, pool)
                    raise
    torch.cuda.current_stream().wait_stream(stream)
    replay = Replay(graph, arguments, result)
    replay()
    torch.cuda.synchronize()
    return replay


@contextlib.contextmanager
def _random_state_of_its_own(device: int) -> Iterator[None]:
    """A capture puts the state of the default generator into a mode in which nothing else can draw from it, and torch
    (2.11) leaves it there if the capture fails. So it gets a state that nobody needs afterwards."""
    generator = torch.cuda.default_generators[device]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(torch.Generator(f"cuda:{device}"))
    try:
        yield
    finally:
        generator.graphsafe_set_state(state)


_failed: list[torch.cuda.CUDAGraph] = []


def _forget(graph: torch.cuda.CUDAGraph, device: int, pool: tuple[int, int]) -> None:
    """Ends what torch (2.11) leaves underway where a capture fails to end: allocation from the pool of the graph."""
    _failed.append(graph)  # not destroyed: torch's allocator of pinned memory goes on asking it what it captures
    try:
        torch._C._cuda_endAllocateToPool(device, pool)
    except RuntimeError:
        return  # it had come to that, and the graph releases the pool itself
    torch._C._cuda_releasePool(device, pool)


def interleave(
    calls: dict[str, Callable],
    prepare: Callable[[int, int], tuple] = lambda round, position: (),
    *,
    seconds: float,
    min_rounds: int = 3,
    max_rounds: int = 2000,
    clock: Callable[[Callable, tuple], float] = on_host,
) -> dict[str, Timing]:
    """Time every call once per round, so that a slow spell of the machine hits all of them alike.

    The order rotates from round to round: each call follows each other one equally often. What a call returns is freed
    inside its own time. Rounds go on until ``seconds`` of measured time are spent, or three times as much has passed:
    on CUDA what happens between short calls takes longer than these.

    Args:
        calls: name -> callable.
        prepare: gives the arguments, untimed, from the round and the position of the call in that round.
        min_rounds: that many there are, however long they take.
        clock: calls, and tells the seconds.
    """
    begin = perf_counter_ns()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    spent = 0.0
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round in range(max_rounds):
            for position in range(len(names)):
                name = names[(round + position) % len(names)]
                elapsed = clock(calls[name], prepare(round, position))
                times[name].append(elapsed)
                spent += elapsed
            passed = (perf_counter_ns() - begin) * 1e-9
            if round + 1 >= min_rounds and (spent > seconds or passed > _WALL * seconds):
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(values) for name, values in times.items()}


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def extra_memory(call: Callable[[], object]) -> int | None:
    """Bytes by which the process grows at its peak while ``call`` runs, its result included; None where unknown.

    The kernel's high-water mark of resident memory sees what torch allocates and what C++ code takes for itself, which
    a hook in torch's allocator does not. It is read in a forked child: there every block of 64 KiB and more can be
    made a mapping of its own (so that freed memory cannot hide in the heap) without changing how the parent
    allocates. On one thread. Numbers are exact to some hundred KiB.
    """
    if not sys.platform.startswith("linux"):
        return None
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child runs one call and no other thread's code
        child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)  # ends a child that waits for a lock or a thread that was not forked with it
            torch.set_num_threads(1)  # OpenMP's other threads are not either
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD
            call()  # maps the pages of libraries, which a fork leaves out, and makes what is made once
            libc.malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as marks:
                marks.write("5")  # the high-water mark falls to the present size
            before = _resident("VmRSS")
            call()
            os.write(writer, struct.pack("q", max(0, _resident("VmHWM") - before)))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as result:
        answer = result.read()
    os.waitpid(child, 0)
    return struct.unpack("q", answer)[0] if len(answer) == 8 else None


def extra_memory_on_cuda(call: Callable[[], object]) -> int:
    """Bytes that torch's allocator hands out beyond those of before, at the peak, while ``call`` runs."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
