"""First light: makes every call of tests/calls once, alone, and compares it with the reference. One line each, faults
last; then how many of the library's kernels were launched, and which were not.

    .ci/first_light.py [--json FILE] [--only TEXT] [--seconds 60] [--total 200] [--jobs N]

    ok        agrees with the reference; the time is that of a call with all that the host does for it
    WRONG     it does not; the line says where, and by how much
    ERROR     the call raised, and the device still answers
    POISONED  the device answers no more in this process: a bad access, most likely
    CRASHED   the process died
    HUNG      the call did not end in --seconds
    NOT RUN   there was no time left, or no process came up

Each worker process makes the calls of one family and backend, one after the other and each waited for
(CUDA_LAUNCH_BLOCKING), in memory full of NaN. What ends a worker costs that call: the next one gets a new worker.
Everything ends after --total seconds. PYVTK_GPU_DEVICE=cpu tries this script without a GPU. The exit status is 1 if any
call is not ok.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
STARTING = 120.0  # seconds until a worker has imported torch, on a machine where all of them do so at once
CALLS_OF_WORKER = {False: 40, True: 5}  # True: Triton compiles them first, which takes most of the time


def one_line(text: object) -> str:
    return " ".join(str(text).split())[:400]


# ---- a worker


def work(job: dict, tell) -> None:
    """Makes the calls of a job, and tells what is begun and what came out."""
    sys.path.insert(0, str(TESTS))
    families = importlib.import_module(job["calls"]).FAMILIES
    import torch
    from calls.call import DEVICE, assert_right, make
    from support import poison_cuda

    from pyvtk import _C

    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch leaves uninitialised
    _C.poison_new_memory(True)
    on_cuda = DEVICE == "cuda"
    wait = torch.cuda.synchronize if on_cuda else (lambda: None)
    if on_cuda:
        torch.cuda.init()
    tell(ready=True)
    for name in job["names"]:
        call = families[job["family"]][name]
        tell(begin=name)
        status, message, seconds = "ok", "", None
        try:
            inputs = make(call)
            poison_cuda()
            wait()
            result = call.run(job["backend"], *inputs)
            wait()
            assert_right(call, result, inputs)
            times = []
            for _ in range(3):
                begin = time.perf_counter()
                call.run(job["backend"], *inputs)
                wait()
                times.append(time.perf_counter() - begin)
            seconds = min(times)
        except AssertionError as error:
            status, message = "WRONG", one_line(error) or "another result than the reference's"
        except Exception as error:
            status, message = "ERROR", one_line(f"{type(error).__name__}: {error}")
        try:
            wait()
            torch.ones(4, device=DEVICE).sum().item()
        except Exception as error:
            tell(end=name, status="POISONED", message=message or one_line(error))
            return
        tell(end=name, status=status, message=message, seconds=seconds)
        if job["count"] and status != "ERROR":
            tell(counting=name)
            try:
                tell(kernels=launched(lambda call=call, inputs=inputs: call.run(job["backend"], *inputs)))
            except Exception as error:
                job["count"] = False
                tell(uncounted=one_line(f"{type(error).__name__}: {error}"))


def launched(run) -> list[str]:
    """Names of the kernels that ``run`` launches, as torch's profiler has them."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sorted({event.name() for event in seen.profiler.kineto_results.events()})


class Worker:
    """A process that makes calls, and what it tells."""

    def __init__(self, job: dict):
        reading, writing = os.pipe()
        self.said = tempfile.TemporaryFile()
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(writing)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=self.said, stderr=self.said, pass_fds=[writing]
        )
        os.close(writing)
        self.told: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
        try:
            self.process.stdin.write(json.dumps(job).encode())
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has died, and the end of what it tells says so

    def _listen(self, reading: int) -> None:
        with os.fdopen(reading) as pipe:
            for line in pipe:
                try:
                    self.told.put(json.loads(line))
                except ValueError:
                    break  # it was killed while it wrote
        self.told.put(None)

    def next(self, seconds: float) -> dict | None:
        """What it tells next; None: it has ended. TimeoutError: nothing in so many seconds."""
        try:
            return self.told.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError from None

    def end(self) -> str:
        """Ends it, however it is, and gives its exit status and last words."""
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                return "it cannot be killed"  # the driver holds it; nobody waits for it
        code = self.process.returncode
        self.said.seek(max(self.said.seek(0, os.SEEK_END) - 600, 0))
        words = self.said.read().decode(errors="replace").strip().splitlines()[-3:]
        self.said.close()
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return one_line(f"{how}: {' '.join(words)}" if words else how)


# ---- all of them


def groups_of(families: dict, only: str) -> list[tuple[str, str | None, list[str]]]:
    """Family, backend and names of the calls that one worker after the other makes; those that take long first."""
    from calls.call import DEVICE, ways

    from pyvtk import backends

    groups: dict[tuple[bool, str, str | None], list[str]] = {}
    for family, calls in families.items():
        for name, call in calls.items():
            for way in ways(call):
                compiles = way == "triton" or backends.why_not(call.operator, "compiled", DEVICE) is not None
                if only in title({"family": family, "name": name, "backend": way}):
                    groups.setdefault((compiles, family, way), []).append(name)
    found = []
    for (compiles, family, way), names in sorted(groups.items(), key=lambda group: not group[0][0]):
        workers = -(-len(names) // CALLS_OF_WORKER[compiles])
        found += [(family, way, names[i::workers]) for i in range(workers)]  # neighbours in a list take about as long
    return found


class FirstLight:
    """Runs groups of calls, each in workers of its own, and keeps what came out."""

    def __init__(self, calls: str, seconds: float, deadline: float, uncounted: str | None):
        self.calls, self.seconds, self.deadline = calls, seconds, deadline
        self.uncounted = uncounted  # why kernels are not counted
        self.kernels: set[str] = set()
        self.lock = threading.Lock()

    def stop_counting(self, reason: str) -> None:
        with self.lock:
            self.uncounted = self.uncounted or reason

    def run(self, family: str, backend: str | None, names: list[str]) -> list[dict]:
        """A row for each call."""
        left, rows = list(names), []

        def came_out(name: str, status: str, message: str = "", seconds: float | None = None) -> None:
            left.remove(name)
            rows.append({"family": family, "name": name, "backend": backend, "status": status, "message": message,
                         "seconds": seconds})  # fmt: skip

        while left:
            if time.monotonic() > self.deadline:
                reason = "no time is left"
            else:
                reason = self._run_worker(family, backend, left, came_out)
            if reason is not None:
                for name in list(left):
                    came_out(name, "NOT RUN", reason)
        return rows

    def _run_worker(self, family: str, backend: str | None, left: list[str], came_out) -> str | None:
        """Until it ends. Why none of the calls that are left can be made; None if they can, by another worker."""
        job = {"calls": self.calls, "family": family, "backend": backend, "names": list(left),
               "count": self.uncounted is None}  # fmt: skip
        worker = Worker(job)
        begun = counting = None
        ready = lost = False
        limit = STARTING
        while True:
            time_left = self.deadline - time.monotonic()
            try:
                told = worker.next(min(limit, time_left))
            except TimeoutError:
                said = worker.end()
                if time_left < limit:
                    if begun is not None:
                        came_out(begun, "NOT RUN", "cut off: no time is left")
                    return "no time is left"
                if not ready:
                    return f"no worker came up in {STARTING:.0f} s: {said}"
                if counting is not None:
                    self.stop_counting(f"the profiler did not end in {limit:.0f} s")
                elif begun is not None:
                    came_out(begun, "HUNG", f"did not end in {limit:.0f} s")
                return None
            if told is None:
                said = worker.end()
                if begun is not None:
                    came_out(begun, "CRASHED", said)
                elif counting is not None:
                    self.stop_counting(f"the profiler ended a worker: {said}")
                elif not ready:
                    return f"no worker came up: {said}"
                elif not lost and len(left) == len(job["names"]) > 0:
                    return f"a worker ended before its first call: {said}"
                return None
            limit = self.seconds
            if "begin" in told:
                begun, counting = told["begin"], None
            elif "end" in told:
                begun, lost = None, told["status"] == "POISONED"
                came_out(told.pop("end"), **told)
            elif "counting" in told:
                counting = told["counting"]
            elif "kernels" in told:
                counting = None
                with self.lock:
                    self.kernels.update(told["kernels"])
            elif "uncounted" in told:
                counting = None
                self.stop_counting(told["uncounted"])
            else:
                ready = True


def known_kernels() -> tuple[set[str], set[str]]:
    """Names of the kernels in the CUDA library, and of the Triton kernels."""
    import pyvtk
    from pyvtk import _resources, backends

    library = Path(pyvtk.__file__).parent / "libpyvtk_cuda.so"
    compiled = {kernel.name for kernel in _resources.read(library)} if library.is_file() else set()
    triton = set()
    if backends.info()["triton"] is not None:
        import pyvtk.triton_kernels as package

        for page in pkgutil.iter_modules(package.__path__):
            names = vars(importlib.import_module(f"{package.__name__}.{page.name}"))
            triton |= {name for name in names if name.endswith("_kernel") and not name.startswith("_")}
    return compiled - {"probe_kernel"}, triton  # that one is what the build part runs


def count(seen: set[str], compiled: set[str], triton: set[str]) -> dict[str, dict]:
    """Of each kind how many kernels were launched, of how many, and which were not. ``seen``: names of a profiler."""
    from pyvtk import _resources

    ours = {_resources.readable(name) for name in seen if "pyvtk" in name}
    plain = {name for name in seen if "pyvtk" not in name}
    return {
        kind: {"launched": len(known & found), "of": len(known), "missing": sorted(known - found)}
        for kind, known, found in (("CUDA", compiled, ours), ("Triton", triton, plain))
    }


def in_words(kernels: dict) -> str:
    """The result of :func:`count`, or the reason why there is none, in words."""
    if kernels["uncounted"] is not None:
        return f"kernels that were launched: not counted: {kernels['uncounted']}"
    lines = []
    for kind in ("CUDA", "Triton"):
        lines.append(f"{kernels[kind]['launched']} of {kernels[kind]['of']} {kind} kernels were launched")
        lines += [f"  not launched: {name}" for name in kernels[kind]["missing"]]
    return "\n".join(lines)


def title(row: dict) -> str:
    return f"{row['family']}: {row['name']}" + (f", {row['backend']}" if row["backend"] else "")


def table(rows: list[dict]) -> str:
    """What is ok, then what is not."""
    width = max((len(title(row)) for row in rows), default=0)
    lines = []
    for row in sorted(rows, key=lambda row: row["status"] != "ok"):
        seconds = f"{row['seconds'] * 1e6:11.1f} us" if row["seconds"] else ""
        lines.append(f"{title(row):{width}}  {row['status']:8}  {row['message'] or seconds}".rstrip())
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write every line, and the kernels that were launched")
    parser.add_argument("--only", metavar="TEXT", default="", help="only calls whose line contains TEXT")
    parser.add_argument("--seconds", type=float, default=60, help="that a call may take; default: 60")
    parser.add_argument("--total", type=float, default=200, help="that everything may take; default: 200")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 12), help="workers at a time")
    parser.add_argument("--calls", default="calls", help="module with FAMILIES; default: that of tests/")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // args.jobs, 1)))
    if args.worker is not None:
        pipe = os.fdopen(args.worker, "w")
        work(json.load(sys.stdin), lambda **facts: print(json.dumps(facts), file=pipe, flush=True))
        os._exit(0)  # what ends with Python may hang where the device does

    start = time.monotonic()
    sys.path.insert(0, str(TESTS))
    import torch
    from calls.call import DEVICE

    groups = groups_of(importlib.import_module(args.calls).FAMILIES, args.only)
    calls = sum(len(names) for _, _, names in groups)
    print(f"{calls} calls, in {len(groups)} workers and more where one ends, {args.jobs} at a time", flush=True)
    light = FirstLight(args.calls, args.seconds, start + args.total,
                       None if DEVICE == "cuda" else f"the device is {DEVICE}")  # fmt: skip
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for done in pool.map(lambda group: light.run(*group), groups) for row in done]

    kernels = {"uncounted": light.uncounted}
    if light.uncounted is None:
        kernels.update(count(light.kernels, *known_kernels()))
    print(table(rows), in_words(kernels), sep="\n")
    for family in dict.fromkeys(row["family"] for row in rows):
        of_family = [row["status"] for row in rows if row["family"] == family]
        counts = ", ".join(f"{of_family.count(status)} {status}" for status in dict.fromkeys(of_family))
        print(f"{family}: {counts}")
    good = sum(row["status"] == "ok" for row in rows)
    print(f"first light: {good} of {len(rows)} ok, {time.monotonic() - start:.0f} s")
    if args.json:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
        facts = {"device": device, "torch": torch.__version__, "kernels": kernels, "calls": rows}
        Path(args.json).write_text(json.dumps(facts, indent=1) + "\n")
    return int(good < len(rows) or not rows)


if __name__ == "__main__":
    sys.exit(main())
