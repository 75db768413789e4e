"""How calls are timed: on the CPU, and on a GPU that is simulated here: its cache, its events, its graphs."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyvtk import _measure
from pyvtk._measure import OnCuda, captured, extra_memory, interleave

# Rounds


def test_rounds_rotate():
    order = []
    times = interleave({n: lambda n=n: order.append(n) for n in "abc"}, seconds=0, min_rounds=3)
    assert "".join(order) == "abcbcacab"
    assert all(t.rounds == 3 and t.low <= t.median <= t.high for t in times.values())


def slow_between(call, arguments):
    """A clock of short calls between which much else happens."""
    call(*arguments)
    time.sleep(0.002)
    return 1e-9


def test_the_time_that_passes_is_bounded():
    start = time.perf_counter()
    (timing,) = interleave({"a": lambda: None}, seconds=0.01, clock=slow_between).values()
    assert 0.03 <= time.perf_counter() - start < 0.5
    assert 1 < timing.rounds <= 16


def test_the_least_number_of_rounds_holds():
    (timing,) = interleave({"a": lambda: None}, seconds=1e-9, min_rounds=7, clock=slow_between).values()
    assert timing.rounds == 7


# Memory


def test_extra_memory_sees_peaks_and_frees():
    x = torch.zeros(32 << 20, dtype=torch.uint8)
    if (used := extra_memory(x.clone)) is None:
        pytest.skip("this system does not tell")
    assert abs(used - x.nbytes) < 1 << 20
    assert extra_memory(lambda: (x.clone(), None)[1] or x.clone()) < 2.1 * x.nbytes
    assert extra_memory(lambda: x.add_(1)) < 1 << 20


# The cache of a GPU


CACHE = 1 << 16  # bytes
BANDWIDTH = 1 << 33  # bytes per second


class Device(TorchDispatchMode):
    """A cache that evicts what was used longest ago, what of it would have to be written back, and the time."""

    def __init__(self):
        super().__init__()
        self.lines: dict[int, list] = {}  # storage -> [bytes, written to]
        self.clock = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read, written = tree_leaves(args), tree_leaves(result)
        for tensors, dirty in ((read, False), (written, True)):
            for x in tensors:
                if isinstance(x, torch.Tensor):
                    self.use(x.untyped_storage(), dirty)
        return result

    def use(self, storage, dirty):
        self.clock += storage.nbytes() / BANDWIDTH
        _, was = self.lines.pop(storage.data_ptr(), (0, False))
        if storage.nbytes() > CACHE:  # its end evicts its begin, too
            self.lines, was = {}, False
        self.lines[storage.data_ptr()] = [min(storage.nbytes(), CACHE), dirty or was]
        while (surplus := sum(size for size, _ in self.lines.values()) - CACHE) > 0:
            oldest = next(iter(self.lines))
            self.lines[oldest][0] -= surplus
            if self.lines[oldest][0] <= 0:
                del self.lines[oldest]

    def dirty_bytes(self):
        return sum(size for size, dirty in self.lines.values() if dirty)


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.device.clock

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=CACHE))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with Device() as simulated:
        Event.device = simulated
        yield simulated


@pytest.mark.parametrize("replayed", [False, True])
def test_calls_begin_with_a_cold_and_clean_cache(device, replayed):
    clock = OnCuda("cpu")
    x = torch.zeros(CACHE // 8, dtype=torch.uint8)
    found = []

    def call():
        found.append((x.untyped_storage().data_ptr() in device.lines, device.dirty_bytes()))
        x.add_(1)  # leaves its result behind, to be written back

    if replayed:
        call = _measure.Replay(SimpleNamespace(replay=call), (), None)
    for _ in range(3):
        assert clock(call, ()) == pytest.approx(2 * x.nbytes / BANDWIDTH)  # x read and written, nothing else
        assert device.dirty_bytes() >= x.nbytes
    assert len(found) == 3
    for cached, dirty in found:
        assert not cached and dirty < CACHE // 100  # but for the sum of the flush


def test_the_host_gets_ahead_of_launches_and_replays_wait_less(device):
    clock = OnCuda("cpu")
    before = device.clock
    clock(lambda: None, ())
    lead = device.clock - before
    clock(_measure.Replay(SimpleNamespace(replay=lambda: None), (), None), ())
    once = device.clock - before - lead
    assert lead >= 3e-4 and 4 * CACHE / BANDWIDTH <= once < lead / 2


# Graphs, on a torch whose captures leave behind what those of torch 2.11 do


class FakeGenerator:
    def __init__(self, device=None):
        self.state = SimpleNamespace(capturing=False)

    def graphsafe_get_state(self):
        other = FakeGenerator()
        other.state = self.state
        return other

    def graphsafe_set_state(self, other):
        self.state = other.state


class FakeTorch:
    """Streams, pools and random numbers as torch.cuda has them; ``synchronize`` in a capture makes it invalid."""

    def __init__(self, monkeypatch):
        self.stream, self.streams = "default", iter("abcdef")
        self.generator = FakeGenerator()
        self.pools, self.allocating, self.handles = set(), set(), iter(range(9))
        self.recording = None
        fake = self

        class Stream:
            def __init__(self):
                self.name = next(fake.streams)

            def wait_stream(self, other):
                pass

        class Graph:
            def capture_begin(self, pool):
                assert fake.recording is None and fake.stream != "default"
                self.valid, self.calls, self.pool, self.state = True, [], pool, fake.generator.state
                fake.recording, self.state.capturing = self, True
                fake.pools.add(pool)
                fake.allocating.add(pool)

            def capture_end(self):
                fake.recording = None
                if not self.valid:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                fake.allocating.remove(self.pool)
                self.state.capturing = False

            def replay(self):
                for call in self.calls:
                    call()

        @contextlib.contextmanager
        def stream(entered):
            before, fake.stream = fake.stream, entered.name
            try:
                yield
            finally:
                fake.stream = before

        def end_allocation(device, pool):
            if pool not in fake.allocating:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.allocating.remove(pool)

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
            "current_device": lambda: 0,
            "graph_pool_handle": lambda: (0, next(fake.handles)),
            "synchronize": self.synchronize,
            "default_generators": (self.generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "Generator", FakeGenerator)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocation, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda device, pool: self.pools.remove(pool), raising=False)

    def synchronize(self):
        if self.recording:
            self.recording.valid = False
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def launch(self, work):
        """What a kernel does: at once, or recorded."""
        self.recording.calls.append(work) if self.recording else work()

    def draw(self):
        """As torch.rand: outside of captures, a state in capture mode raises."""
        if self.generator.state.capturing and self.recording is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        return "random"


@pytest.fixture
def fake(monkeypatch):
    return FakeTorch(monkeypatch)


def test_a_replay_does_the_work_of_the_call(fake):
    out = []

    def call(x):
        fake.launch(lambda: out.append(x))
        return out

    replay = captured(call, (1,))
    assert replay.result is out
    done = len(out)
    replay(2)  # whatever is given, it is the call that was captured
    assert out[done:] == [1]
    assert fake.stream == "default" and not fake.allocating and fake.draw()


def raises_by_itself(fake):
    if fake.recording:
        raise ValueError("no graphs, please")


@pytest.mark.parametrize(
    ("call", "error"),
    [(lambda fake: fake.synchronize(), RuntimeError), (raises_by_itself, ValueError)],
    ids=["synchronises", "raises"],
)
def test_a_failed_capture_leaves_nothing_behind(fake, call, error):
    state = fake.generator.state
    with pytest.raises(error):
        captured(call, (fake,))
    assert fake.stream == "default"
    assert not fake.allocating
    assert fake.generator.state is state and fake.draw()
    assert captured(lambda: "next", ()).result == "next"
    if error is RuntimeError:
        assert len(fake.pools) == 1  # of the one that is there; that of the failed one is released
