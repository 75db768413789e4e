"""Time and memory of calls that compete with each other; shared by the benchmarks and the demo."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import struct
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns

import torch


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


class OnCuda:
    """Seconds of a call by CUDA events. The L2 cache is overwritten before: that evicts what the last call left there,
    and while it lasts the host gets ahead, so that launches of short kernels are not what is measured."""

    def __init__(self):
        self.cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Callable, arguments: tuple) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(4):  # some 0.3 ms, in which the host enqueues a chain of calls
            self.cache.zero_()
        start.record()
        call(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def captured(call: Callable, arguments: tuple) -> Callable[[], None]:
    """Replays ``call(*arguments)`` as a CUDA graph: the work of the device, without that of the host.

    Raises:
        RuntimeError: it cannot be captured; it synchronises, for instance.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, chooses algorithms, makes what is made once
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*arguments)

    def replay() -> None:
        graph.replay()

    replay.kept = (arguments, result)  # the memory that the graph reads and writes
    replay()
    torch.cuda.synchronize()
    return replay


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
    inside its own time. Rounds go on until ``seconds`` of measured time are spent.

    Args:
        calls: name -> callable.
        prepare: gives the arguments, untimed, from the round and the position of the call in that round.
        clock: calls, and tells the seconds.
    """
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
            if round + 1 >= min_rounds and spent > seconds:
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
