"""The benchmark harness: the gate, the bars, the report; and the command that finds it."""

import dataclasses
import signal
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from pyvtk import bench
from pyvtk.__main__ import main
from pyvtk._measure import Replay, Timing, on_host

harness = bench.load()
commit_of = bench.load("report").commit_of


def doubling(ours=lambda x: x * 2, peer=lambda x: x + x, **options):
    """A tiny case: twice the input."""
    return harness.Case(
        "score",
        "tiny",
        torch.float32,
        lambda: (torch.randn(64),),
        {"pyvtk": ours, "peer": peer},
        lambda x: harness.same(x * 2),
        **options,
    )


def test_measures_checked_case():
    result = harness.run_case(
        doubling(limit=harness.read_limit(lambda x: x), bars={"peer": 1e-9, "best": 1e9, "limit": 1e-9}, memory=True),
        seconds=0.01,
    )
    assert result.error is None
    assert set(result.times) == {"pyvtk", "peer"} and all(t.median > 0 for t in result.times.values())
    assert result.limit == "read" and result.amount == 256 and result.share > 0
    assert {name: bar.met for name, bar in result.bars.items()} == {"peer": True, "best": False, "limit": True}


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * 2 + 1, lambda x: x.double() * 2, lambda x: x[:1], lambda x: (x * 2, x), lambda x: x.nothing],
    ids=["value", "dtype", "shape", "count", "exception"],
)
@pytest.mark.parametrize("who", ["ours", "peer"])
def test_gate_blocks_numbers(wrong, who):
    result = harness.run_case(doubling(**{who: wrong}, bars={"peer": 1.0}, memory=True), seconds=0.01)
    assert result.error.startswith("pyvtk: " if who == "ours" else "peer: ")
    assert not result.times and not result.bars and not result.memory and not result.absent
    text = harness.table([result])
    assert "RED" in text and "µs" not in text
    assert "1 RED" in harness.summary([result])


def test_close_allows_peers_more_than_us():
    oracle = torch.ones(4, dtype=torch.float64)
    check = harness.close(oracle, torch.full((4,), 1.01))
    check("pyvtk", torch.full((4,), 1.019))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check("pyvtk", torch.full((4,), 1.03))
    check("peer", torch.full((4,), 1.03))
    with pytest.raises(AssertionError, match="exceeds the budget"):
        check("peer", torch.full((4,), 1.2))
    with pytest.raises(AssertionError):
        check("pyvtk", torch.full((4,), float("nan")))


def test_close_knows_what_peers_answer_in():
    """A peer that rounds its results to 16 bits is measured; where it is wrong by more than that, it is not."""
    oracle = torch.tensor([1.0, 2**-10], dtype=torch.float64)
    check = harness.close(oracle, oracle.float(), answers={"peer": torch.bfloat16})
    half_a_unit = torch.tensor([1 + 2**-8, 2**-10])
    check("peer", half_a_unit)
    for name, found in (
        ("other peer", half_a_unit),
        ("pyvtk", half_a_unit),
        ("peer", half_a_unit + 2**-9),
        ("peer", torch.tensor([1.0, 2**-9])),
        ("peer", torch.tensor([1.0, float("nan")])),
    ):
        with pytest.raises(AssertionError, match="exceeds the budget"):
            check(name, found)


def test_a_peer_that_is_no_more_says_so(tmp_path, monkeypatch):
    """torchao 0.18 has configurations of int8 without 2:4."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text("__version__ = '0.18.0'")
    (tmp_path / "torchao" / "dtypes.py").touch()
    (tmp_path / "torchao" / "quantization.py").write_text("Int8DynamicActivationInt8WeightConfig = quantize_ = None")
    monkeypatch.syspath_prepend(tmp_path)
    module = bench.load("bench_sparse24")
    monkeypatch.setattr(module, "made_on", lambda device, inputs: inputs)
    monkeypatch.setattr(harness, "compiled", lambda function: function)
    monkeypatch.setattr(harness, "still_works", lambda device: True)
    case = module.int8_on_cuda("x", 70, {"torchao int8": 1.0}, "cuda", (64, 128))
    runs, _ = harness.settled(case, case.inputs())
    assert runs.absent["torchao int8"] == "ImportError: torchao 0.18.0 has no int8 times 2:4 any more"
    for name in [name for name in sys.modules if name.split(".")[0] == "torchao"]:
        del sys.modules[name]


def test_memory_bar_is_an_upper_one():
    case = doubling(bars={"memory": 0.02})
    times = {"pyvtk": Timing(1, 1, 1, 3), "peer": Timing(2, 2, 2, 3)}
    result = harness.Result("score", "tiny", "fp32", times, memory={"pyvtk": 1, "peer": 100})
    assert harness.judge(case, result)["memory"].met
    result.memory["pyvtk"] = 3
    assert not harness.judge(case, result)["memory"].met


def sparse(**options):
    """A case that needs a tenth of the pairs and visits a fifth of them."""
    return doubling(dense=("peer",), pairs=lambda: harness.Pairs(10, 20, 100), **options)


def test_bars_over_dense_peers():
    case = sparse(bars={"dense": 4.0, "tile": 0.9})
    times = {"pyvtk": Timing(1, 1, 1, 3), "peer": Timing(4, 4, 4, 3)}
    result = harness.Result("score", "tiny", "fp32", times, dense=["peer"], pairs=case.pairs())
    assert result.tile_ideal == 5 and result.over_dense == 4
    bars = harness.judge(case, result)
    assert bars["dense"].met and bars["tile"].reached == 0.8 and not bars["tile"].met
    assert "tile-ideal ≥ 90 %" in harness.table([dataclasses.replace(result, bars=bars)])


def test_bars_of_models():
    """Of a speed-up of 3 that operations allow 1.5 is reached; of the time 1 % is pyvtk's own."""
    forward = harness.Forward(3.0, 0.01, 0.1, 1 << 20, 2 << 20)
    case = doubling(dense=("peer",), bars={"ideal": 0.5, "own": 0.005}, forward=lambda x: forward)
    times = {"pyvtk": Timing(2, 2, 2, 5), "peer": Timing(3, 3, 3, 5)}
    result = harness.Result("score", "tiny", "fp32", times, dense=["peer"], forward=forward, cpu_time=True)
    bars = harness.judge(case, result)
    assert bars["ideal"] == harness.Bar(0.5, 0.5, True) and bars["own"] == harness.Bar(0.005, 0.01, False)
    text = harness.table([dataclasses.replace(result, bars=bars)])
    assert "✓ ideal ≥ 50 %, ✗ own ≤ 0.5 %" in text
    assert (
        "operations allow 3.00x, reached 50%; pyvtk's own 1.00%, attention of dense 10.0%; cache 1 MiB of 2 MiB" in text
    )
    report = harness.Report({}, [result])
    assert harness.Report.from_json(report.to_json()) == report
    # a step of decoding has no such bound: its bar is not judged
    result.forward = dataclasses.replace(forward, ideal=None)
    assert set(harness.judge(case, result)) == {"own"} and "allow" not in harness.table([result])


def test_time_on_a_core_leaves_out_what_others_took():
    def sleeping(x):
        time.sleep(0.05)
        return x * 2

    before = torch.get_num_threads()
    try:
        for threads, cpu_time in ((1, True), (2, False)):
            torch.set_num_threads(threads)
            result = harness.run_case(doubling(ours=sleeping, cpu_time=True, rounds=7), seconds=0.01)
            assert result.cpu_time == cpu_time and result.times["pyvtk"].rounds >= (7 if cpu_time else 1)
            assert (result.times["pyvtk"].median < 0.03) == cpu_time
    finally:
        torch.set_num_threads(before)


def test_optional_peer_that_cannot_run_is_absent():
    def missing(x):
        raise RuntimeError("no such kernel\nand a long trace")

    case = sparse(peer=missing, optional=("peer",), absent={"other": "not installed"}, bars={"peer": 1.0})
    result = harness.run_case(case, seconds=0.01)
    assert result.error is None and set(result.times) == {"pyvtk"} and not result.bars and not result.dense
    assert result.absent == {"other": "not installed", "peer": "RuntimeError: no such kernel"}
    assert "absent: other (not installed); peer (RuntimeError: no such kernel)" in harness.table([result])
    # one that runs and computes something else is no such case
    assert harness.run_case(sparse(peer=lambda x: x, optional=("peer",)), seconds=0.01).error.startswith("peer: ")


def test_json_round_trip():
    results = [
        harness.run_case(sparse(bars={"peer": 1.0}), seconds=0.01),
        harness.Result("score", "x", "y", error="z"),
    ]
    report = harness.Report(harness.machine("test"), results)
    assert harness.Report.from_json(report.to_json()) == report
    assert {"cpu", "instruction_set", "torch", "pyvtk", "python", "commit", "command", "date"} <= set(report.machine)


def test_mutating_case_is_checked_on_copies():
    case = doubling(ours=lambda x: x.mul_(2), peer=lambda x: x * 2, mutates=True)
    x = torch.randn(8)
    before = x.clone()
    assert harness.settled(case, (x,))[0] is case
    assert torch.equal(x, before)


def test_cold_case_gives_every_call_another_input():
    pool = harness.Pool(doubling(cold=True))
    seen = [pool(0, position)[0].data_ptr() for position in range(2)] + [pool(1, 0)[0].data_ptr()]
    assert len(set(seen)) == 3


def test_limits_run_on_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        x = torch.ones(3, 4).to(dtype)
        for limit in (harness.read_limit(lambda x: x), harness.copy_limit(lambda x: [x])):
            limit.probe(x)
            assert limit.amount(x) == x.nbytes * (2 if limit.kind == "copy" else 1)
    limit = harness.matmul_limit(lambda x: 2.0 * harness._PROBE["cpu"] ** 3, torch.bfloat16)
    limit.probe(x)
    assert limit.scale(x) == 1.0


def test_case_refuses_unknown_bars_and_reserved_peers():
    with pytest.raises(AssertionError, match="unknown bar"):
        doubling(bars={"nobody": 1.0})
    with pytest.raises(AssertionError, match="must not be named"):
        harness.Case("score", "x", torch.float32, tuple, {"pyvtk": len, "best": len}, len)


def test_every_case_is_named_once():
    names = [case.id for case in harness.cases()]
    assert len(names) == len(set(names))
    assert {case.family for case in harness.cases()} == set(harness.FAMILIES)


def test_every_case_for_cuda_is_named_once():
    cases = harness.cases(device="cuda")
    names = [case.id for case in cases]
    assert len(names) == len(set(names))
    assert {case.family for case in cases} == set(harness.FAMILIES)
    assert {case.device for case in cases} == {"cuda"}


# The cases for CUDA on shapes that the CPU takes: their providers have to agree. What is compiled there is not here.
TINY = {
    "score": [
        lambda b: b.last_token_select("x", (2, 4, 2, 1, 60, 16), 20, torch.bfloat16, {"time": 1.0}, "cuda"),
        lambda b: b.last_token("x", (2, 4, 2, 1, 60, 16), torch.bfloat16, {"best": 1.0}, device="cuda"),
        lambda b: b.last_token("x", (2, 4, 30, 16), torch.bfloat16, {}, "sum", b.tower, "cuda"),
        lambda b: b.text_rows(5, torch.bfloat16, "cuda", keys=40),
        lambda b: b.window(64, 8, torch.bfloat16, "cuda"),
        lambda b: b.probes(80, torch.bfloat16, "cuda"),
        lambda b: b.all_rows_beside_attention(70, {"dense": 1 / 0.7}, "cuda", (4, 2), 16),
        lambda b: b.packed(torch.bfloat16, "cuda", tokens=50),
        lambda b: b.training("x", (2, 4, 2, 3, 40, 16), torch.bfloat16, "cuda"),
    ],
    "select": [
        lambda b: b.largest("x", 30, (3, 90), {"topk + sort": 2.0, "FlashInfer + sort": 1 / 1.2}, device="cuda"),
        lambda b: b.largest("x", 30, (2, 3, 90), {"best": 1.0}, 8, "cuda"),
        lambda b: b.segmented(3, "cuda"),
        lambda b: b.ragged(3, "cuda"),
    ],
    "selection": [
        lambda b: b.of_mask((3, 90), 40, {"best": 1.0}, "cuda"),
        lambda b: b.complement((3, 90), 40, {"best": 1.0}, "cuda"),
        lambda b: b.then((3, 90), 40, 9, {"best": 1.0}, "cuda"),
    ],
    "compact": [
        lambda b: b.hidden("x", (2, 40, 16), 9, torch.bfloat16, {"limit": 0.85}, device="cuda"),
        lambda b: b.hidden("x", (2, 40, 16), 9, torch.bfloat16, {"limit": 0.85}, into=False, device="cuda"),
        lambda b: b.bundle(40, True, {"best": 1.0}, "cuda"),
        lambda b: b.bundle(40, False, {"best": 1.0}, "cuda"),
        lambda b: b.cache_in_place("x", (1, 2, 50, 8), 20, 3, False, {"index_select, copy back": 3.0}, "cuda"),
        lambda b: b.cache_in_place("x", (2, 2, 50, 8), 20, 3, True, {"best": 1.0}, "cuda"),
        lambda b: b.cache_into_new("x", (1, 2, 50, 8), 20, 3, {"loop of index_select": 3.0}, "cuda"),
        lambda b: b.crops("cuda"),
        lambda b: b.backward("x", (2, 40, 16), 9, torch.bfloat16, {"gather": 2.0}, "cuda"),
        lambda b: b.training("x", (2, 40, 16), 9, torch.bfloat16, {"best": 1.0}, "cuda"),
        lambda b: b.put_back("x", (2, 40, 16), 9, torch.bfloat16, {"best": 1.0}, "cuda"),
    ],
    "merge": [lambda b: b.merging("x", 2, 60, 7, 16, torch.bfloat16, {"best": 1.0}, "cuda")],
    "sparse24": [
        lambda b: b.linear_on_cuda("x", 5, torch.bfloat16, {"F.linear": 1.4, "cuSPARSELt": 1.0}, "cuda", (64, 128)),
        lambda b: b.linear_on_cuda("x", 70, torch.float16, {"F.linear": 1.0}, "cuda", (96, 64)),
        lambda b: b.linear_on_cuda("x", 5, torch.bfloat16, {"F.linear": 1.4}, "cuda", (64, 128), int8=True),
        lambda b: b.int8_on_cuda("x", 70, {"compiled dense int8": 1.0, "torchao int8": 1.0}, "cuda", (64, 128)),
        lambda b: b.training_on_cuda("x", 40, (64, 32), False, {"nn.Linear": 1.15}, "cuda"),
        lambda b: b.training_on_cuda("x", 40, (64, 32), True, {"nn.Linear": 1.15}, "cuda"),
    ],
}


@pytest.mark.parametrize(("family", "number"), [(f, i) for f, makers in TINY.items() for i in range(len(makers))])
def test_cases_for_cuda_on_tiny_shapes(monkeypatch, family, number):
    module = bench.load(f"bench_{family}")
    made = []
    monkeypatch.setattr(harness, "compiled", lambda function: made.append(function) or function)
    monkeypatch.setattr(module, "made_on", lambda device, inputs: inputs)
    monkeypatch.setattr(harness, "still_works", lambda device: True)
    case = TINY[family][number](module)
    assert case.device == "cuda"
    torch.manual_seed(0)
    inputs = case.inputs()
    runs, _ = harness.settled(case, inputs)
    assert bool(made) == any(name.startswith("compiled") for name in runs.providers)
    assert case.limit.amount(*inputs) > 0 and case.limit.scale(*inputs) > 0
    missing = set(case.providers) - set(runs.providers)
    of_torch = {"cuSPARSELt", "CUTLASS", "compiled cuSPARSELt int8", "pyvtk, vendor chosen"}
    assert missing <= {"SDPA cuDNN", "FlashInfer + sort", "flash-colreduce", *of_torch}, runs.absent


def test_a_wrong_selection_is_refused(monkeypatch):
    module = bench.load("bench_select")
    monkeypatch.setattr(module, "made_on", lambda device, inputs: inputs)
    case = module.largest("x", 30, (3, 90), {}, device="cuda")
    case.providers[harness.OURS] = lambda scores: scores.topk(30, largest=False).indices.sort().values
    with pytest.raises(harness.Failed, match="pyvtk: kept values are not the largest"):
        harness.settled(case, case.inputs())


# A GPU that is not there: calls run on the CPU, and those that capture() refuses cannot be replayed.


class Graph:
    """What torch's graphs do, on the CPU: the same work again, into the same memory."""

    def __init__(self, call, arguments):
        self.call, self.arguments, self.result = call, arguments, call(*arguments)

    def replay(self):
        self.call(*self.arguments)


@pytest.fixture
def gpu(monkeypatch):
    """Settings of the stand-in: names of peers whose capture fails, whether the device works."""
    settings = SimpleNamespace(refused=(), works=True, replays=0)

    def captured(call, arguments):
        if call in settings.refused:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        graph = Graph(call, arguments)
        return Replay(graph, arguments, graph.result)

    def timed(call, arguments):
        settings.replays += isinstance(call, Replay)
        return on_host(call, arguments)

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "clock", lambda device: timed)
    monkeypatch.setattr(harness, "still_works", lambda device: settings.works)
    return settings


def on_gpu(**options):
    return doubling(device="cuda", limit=harness.read_limit(lambda x: x), **options)


def test_all_is_replayed_limits_too(gpu):
    result = harness.run_case(on_gpu(), seconds=0.01)
    assert not result.launched and result.share > 0
    assert gpu.replays == 3 * result.times["pyvtk"].rounds


def test_what_cannot_be_captured_is_named(gpu):
    case = on_gpu()
    gpu.refused = (case.providers["peer"],)
    result = harness.run_case(case, seconds=0.01)
    assert result.launched == ["peer"] and set(result.times) == {"pyvtk", "peer"}
    assert "as launched, not as CUDA graphs: peer" in harness.table([result])
    assert harness.run_case(dataclasses.replace(case, eager=("peer",)), seconds=0.01).launched == ["peer"]
    # where ours is launched, so is what its share is a share of
    gpu.refused = (case.providers["pyvtk"],)
    assert harness.run_case(case, seconds=0.01).launched == ["pyvtk", "limit"]


def test_a_graph_that_computes_something_else_is_refused(gpu, monkeypatch):
    wrong = []

    def captured(call, arguments):
        result = call(*arguments)
        return Replay(Graph(call, arguments), arguments, torch.zeros_like(result) if call in wrong else result)

    monkeypatch.setattr(harness, "captured", captured)
    case = on_gpu(bars={"peer": 1e-9})
    wrong.append(case.providers["peer"])
    result = harness.run_case(case, seconds=0.01)
    assert result.absent == {"peer": "wrong: as a graph, result 0 differs from plain indexing"}
    assert result.error is None and set(result.times) == {"pyvtk"} and result.unjudged == ["peer"]
    wrong.append(case.providers["pyvtk"])
    assert harness.run_case(case, seconds=0.01).error == "pyvtk: as a graph, result 0 differs from plain indexing"


def too_large(x):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB\nand much more")


def unknown(x):
    raise NotImplementedError("no kernel")


class FailsLater:
    """Right when it is checked; it raises when it is timed."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        if self.calls > 4:
            raise RuntimeError("out of resources")
        return x * 2


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (too_large, "CUDA out of memory. Tried to allocate 80 GiB"),
        (unknown, "NotImplementedError: no kernel"),
        (lambda x: x + 1, "wrong: result 0 differs from plain indexing"),
        (lambda x: x[:3], "wrong: result 0 is (3,) torch.float32, expected (64,) torch.float32"),
        (FailsLater(), "RuntimeError: out of resources"),
    ],
    ids=["memory", "exception", "wrong", "shape", "later"],
)
def test_a_peer_that_fails_on_a_gpu_is_absent(gpu, peer, why):
    case = on_gpu(
        peer=peer, bars={"peer": 1e-9, "best": 1.0, "time": 10.0, "dense": 1.0}, dense=("peer",), memory=False
    )
    result = harness.run_case(case, seconds=0.01)
    assert result.error is None and result.absent == {"peer": why} and not result.dense
    assert set(result.times) == {"pyvtk"} and result.share > 0
    assert set(result.bars) == {"time"} and result.unjudged == ["peer", "best", "dense"]
    text = harness.table([result])
    assert f"absent: peer ({why})" in text and "✓ ≤ 10 s, ? peer, ? best, ? dense" in text
    assert "1 of 1 bars met, 3 not judged" in harness.summary([result])
    assert harness.Report.from_json(harness.Report({}, [result]).to_json()).results == [result]


@pytest.mark.parametrize("ours", [too_large, unknown, lambda x: x + 1, FailsLater()])
def test_ours_that_fails_on_a_gpu_is_red(gpu, ours):
    result = harness.run_case(on_gpu(ours=ours), seconds=0.01)
    assert result.error.startswith("pyvtk: ") and not result.times


def test_whoever_loses_the_device_is_named(gpu):
    def illegal(x):
        gpu.works = False
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    result = harness.run_case(on_gpu(peer=illegal), seconds=0.01)
    assert result.error == "peer: RuntimeError: CUDA error: an illegal memory access was encountered"


def test_time_bar():
    case = doubling(bars={"time": 15e-6})
    times = {"pyvtk": Timing(14e-6, 1, 1, 3), "peer": Timing(2, 2, 2, 3)}
    result = harness.Result("score", "tiny", "fp32", times)
    result.bars = harness.judge(case, result)
    assert result.bars["time"].met and "✓ ≤ 15 µs" in harness.table([result])
    times["pyvtk"].median = 16e-6
    assert not harness.judge(case, result)["time"].met


def test_bandwidth_limit_scales():
    limit = harness.bandwidth_limit(lambda x: x.nbytes, "cpu")
    x = torch.zeros(1 << 20)
    limit.probe(x)
    assert limit.amount(x) == 4 << 20 and limit.scale(x) == 1 / 16


def test_a_copy_as_large_as_the_case():
    limit = harness.bandwidth_limit(lambda x: x.nbytes, "cpu", as_large=True)
    x = torch.zeros(1 << 20)
    source, target = harness._copy_operands("cpu")
    target.zero_()
    limit.probe(x)
    half = x.nbytes // 2
    assert torch.equal(target[:half], source[:half]) and not target[half:].any() and limit.scale(x) == 1
    # more than there is to copy: as often as that
    assert harness.bandwidth_limit(lambda x: 4 * 64 << 20, "cpu", as_large=True).scale(x) == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_whatever_a_case_raises_is_its_error(error, message):
    def inputs():
        raise error

    result = harness.run_case(dataclasses.replace(doubling(), inputs=inputs))
    assert result.error == message and not result.times


def test_resumed_run_measures_only_what_is_missing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    path, measured = tmp_path / "x.json", []
    first, second = (dataclasses.replace(doubling(), name=name) for name in ("first", "second"))
    monkeypatch.setattr(harness, "cases", lambda *_: [first, second])

    def run_case(case, *, seconds):
        if case is second and len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(case.name)
        return harness.Result(case.family, case.name, "fp32", {"pyvtk": Timing(1, 1, 1, 3)})

    monkeypatch.setattr(harness, "run_case", run_case)
    with pytest.raises(KeyboardInterrupt):
        main(["bench", "--json", str(path), "--resume"])
    measured.append("interrupted")
    assert main(["bench", "--json", str(path), "--resume"]) == 0
    assert measured == ["first", "interrupted", "second"]
    assert [r.name for r in harness.Report.from_json(path.read_text()).results] == ["first", "second"]
    # what is not chosen this time is not lost
    monkeypatch.setattr(harness, "cases", lambda *_: [second])
    assert main(["bench", "--json", str(path), "--resume"]) == 0
    assert sorted(r.name for r in harness.Report.from_json(path.read_text()).results) == ["first", "second"]


# Runs that end badly, in processes of their own. Each case notes that it was tried.
PLANTED = """
import os, sys, time
import torch
from pyvtk import bench
from pyvtk.__main__ import main

harness = bench.load()
notes, mode, *arguments = sys.argv[1:]
harness._PATIENCE = 0 if mode == "hangs" else 60
lost = []
harness.still_works = lambda device: not lost

def planted(name, ours):
    def expect(x):
        with open(notes, "a") as file:
            file.write(name + "\\n")
        return harness.same(x * 2)
    providers = {"pyvtk": ours, "peer": lambda x: x + x}
    return harness.Case("score", name, torch.float32, lambda: (torch.ones(4),), providers, expect)

def raises(x):
    raise KeyError("by itself")

def loses(x):
    lost.append(True)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

found = [planted("first", lambda x: x * 2)]
if mode == "bad day":
    found += [planted("raises", raises), planted("aborts", lambda x: os.abort()), planted("loses", loses)]
else:
    found += [planted("waits", lambda x: time.sleep(60))]
harness.cases = lambda *_: [*found, planted("last", lambda x: x * 2)]
sys.exit(main(["bench", "--quick", "--resume", *arguments]))
"""


@pytest.fixture
def planted(tmp_path):
    """Starts a run of the planted cases."""
    pytest.importorskip("rich")

    def start(mode):
        command = [sys.executable, "-c", PLANTED, tmp_path / "notes", mode, "--json", tmp_path / "x.json"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)

    return start


def errors_in(path):
    return {r.name: r.error for r in harness.Report.from_json(path.read_text()).results}


def test_a_run_survives_its_cases(planted, tmp_path):
    path = tmp_path / "x.json"
    first = planted("bad day")
    said = first.communicate(timeout=120)[1]
    assert first.returncode == -signal.SIGABRT, said
    raised = "pyvtk: KeyError: 'by itself'"
    assert errors_in(path) == {"first": None, "raises": raised, "aborts": harness.BEGUN}
    second = planted("bad day")
    said = second.communicate(timeout=120)[1]
    assert second.returncode == 86 and "no more after score: loses, fp32; --resume goes on behind it" in said
    aborted = "lost: the process ended while it ran"
    lost = "lost: the device works no more: pyvtk: RuntimeError: CUDA error: an illegal memory access was encountered"
    assert errors_in(path) == {"first": None, "raises": raised, "aborts": aborted, "loses": lost}
    third = planted("bad day")
    table, said = third.communicate(timeout=120)
    assert third.returncode == 1, said
    assert errors_in(path) == {"first": None, "raises": raised, "aborts": aborted, "loses": lost, "last": None}
    assert f"no numbers: {lost}" in table and "3 RED" in table
    # what was good or ended a process is not tried again; what is wrong may have been repaired
    tries = Counter((tmp_path / "notes").read_text().split())
    assert tries == {"first": 1, "raises": 3, "aborts": 1, "loses": 1, "last": 1}


@pytest.mark.parametrize(
    ("mode", "sent", "kept"),
    [
        ("slow", signal.SIGTERM, {"first": None}),
        ("hangs", signal.SIGTERM, {"first": None, "waits": harness.BEGUN}),
        ("slow", signal.SIGKILL, {"first": None, "waits": harness.BEGUN}),
    ],
    ids=["told to end", "told to end after too long", "killed"],
)
def test_what_is_cut_off_is_lost_only_if_it_may_hang(planted, tmp_path, mode, sent, kept):
    process = planted(mode)
    notes, path = tmp_path / "notes", tmp_path / "x.json"
    for _ in range(600):
        if notes.is_file() and "waits" in notes.read_text():
            break
        time.sleep(0.1)
    assert errors_in(path) == {"first": None, "waits": harness.BEGUN}
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (128 + signal.SIGTERM if sent == signal.SIGTERM else -signal.SIGKILL)
    assert errors_in(path) == kept
    again = harness.not_again(harness.Report.from_json(path.read_text()).results)
    lost = {name: "lost: the process ended while it ran" if error else None for name, error in kept.items()}
    assert {result.name: result.error for result in again.values()} == lost


def test_a_report_is_written_whole(tmp_path, monkeypatch):
    """A process that ends while it writes must not take the results with it."""
    path = tmp_path / "x.json"
    harness.write(path, harness.Report({}, [harness.Result("score", "a", "fp32")]))
    before = path.read_text()

    class Half:
        def to_json(self):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harness.write(path, Half())
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


# The run of --key

WHOLE_MODELS = "models"  # not in it: they take minutes, and need transformers


def test_the_key_run():
    cases = harness.cases(device="cuda", key=True)
    assert {case.family for case in cases} == set(harness.FAMILIES) - {WHOLE_MODELS} and len(cases) < 40
    assert all(case.bars for case in cases)
    # what the package is judged by comes first, what compiles for long last
    slow = [any(name.startswith("flex") for name in case.providers) for case in cases]
    assert slow == sorted(slow) and 0 < sum(slow) < len(cases) / 4
    assert [case.place for case in cases] == sorted(case.place for case in cases)
    for case in cases:
        assert not set(case.spared) & set(case.providers) and set(case.spared) <= set(case.absent)
        assert not {"flex built", "flex tiles permuted", "flex tiles permuted built"} & set(case.providers)


@pytest.mark.parametrize(
    ("name", "bars"),
    [
        ("score: LLaVA-1.5 score and select 640 to 144", {"time": 15e-6, "compiled eager + topk + sort": 4.0}),
        ("score: LLaVA-NeXT score and select, batch 16, 2950 to 720", {"limit": 0.7}),
        ("score: all rows, causal, LSE given, 32/8 heads, M=N=2880, D=128", {"dense": 1 / 0.7}),
        ("score: all rows, causal, LSE given, 32/8 heads, M=N=16384, D=128", {"dense": 1 / 0.7}),
        ("select: LLaVA-NeXT [1, 2880] to 720", {"topk + sort": 2.0, "FlashInfer + sort": 1 / 1.2}),
        ("select: Qwen2-VL batch [32, 16384] to 4096", {"topk + sort": 2.0, "FlashInfer + sort": 1 / 1.2}),
        ("compact: [8, 2880, 4096] to 720, out=", {"limit": 0.85}),
        ("compact: Qwen2-VL cache of 28 layers, in place", {"index_select, copy back": 3.0}),
        ("compact: Qwen2-VL cache of 28 layers, new tensors", {"loop of index_select": 3.0}),
        ("attention: 48x48, radius 4, 16/16 heads", {"dense": 1.0, "flex": 1.3}),
        ("attention: LLaVA-1.5 mixed, N=675, radius 2, 32/32 heads", {"SDPA causal": 1.0, "flex": 1.3}),
        ("attention: SigLIP so400m 27x27, radius 3, 16/16 heads, D=72", {"dense": 1.0}),
        ("sparse24: 1 rows, LLM MLP up", {"F.linear": 1.4}),
        ("sparse24: 16 rows, LLM MLP up", {"F.linear": 1.4}),
        ("sparse24: 577 rows, 4096 x 4096", {"F.linear": 1.0, "cuSPARSELt": 0.95}),
        ("sparse24: 2950 rows, 4096 x 4096", {"F.linear": 1.0, "cuSPARSELt": 0.95}),
        ("sparse24: int8 x int8, 16 rows, LLM MLP up", {"F.linear": 1.4}),
        ("sparse24: int8 x int8, 2950 rows, LLM MLP up", {"compiled dense int8": 1.0}),
        ("sparse24: Linear24 forward and backward, 9232 rows", {"nn.Linear": 1.15}),
    ],
)
def test_the_key_run_holds_what_the_package_is_judged_by(name, bars):
    (case,) = (case for case in harness.cases(device="cuda", key=True) if case.id.startswith(name))
    assert bars.items() <= case.bars.items()


def test_the_key_run_on_the_cpu_tries_every_family():
    cases = harness.cases(key=True)
    assert {case.family for case in cases} == set(harness.FAMILIES) - {WHOLE_MODELS} and len(cases) < 15


def test_command_lists_the_key_run_without_a_gpu(capsys):
    assert main(["bench", "--list", "--device", "cuda", "--key"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [case.id for case in harness.cases(device="cuda", key=True)]
    assert main(["bench", "merge", "--list", "--key"]) == 0
    assert capsys.readouterr().out == "merge: ToMe merge [8, 576, 1024] to 144, fp32\n"


# Where the numbers come from


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder inside a checkout, and what git says in it."""
    monkeypatch.delenv("PYVTK_COMMIT", raising=False)

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", tmp_path, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "x")
    (tmp_path / "inner").mkdir()
    return tmp_path, git("rev-parse", "HEAD")


OUTSIDE = "0123456789abcdef0123456789abcdef01234567"


def test_the_commit_is_gits_unless_it_is_told(tree, monkeypatch, capsys):
    root, commit = tree
    assert commit_of(root) == commit[:10]
    (root / "file").write_text("2")
    assert commit_of(root) == commit[:10] + "+" and not capsys.readouterr().err
    monkeypatch.setenv("PYVTK_COMMIT", commit)
    assert commit_of(root) == commit[:10] and not capsys.readouterr().err
    monkeypatch.setenv("PYVTK_COMMIT", OUTSIDE + "+")
    assert commit_of(root) == "0123456789+"
    assert f"the checkout is at {commit[:10]}, but PYVTK_COMMIT is 0123456789+" in capsys.readouterr().err


def test_without_git_the_commit_comes_from_outside(tree, monkeypatch):
    inner = tree[0] / "inner"  # the history above is not its own
    assert commit_of(inner) is None
    for told, taken in ((OUTSIDE, "0123456789"), (OUTSIDE + "+\n", "0123456789+"), ("", None)):
        monkeypatch.setenv("PYVTK_COMMIT", told)
        assert commit_of(inner) == taken
    monkeypatch.setenv("PYVTK_COMMIT", OUTSIDE)
    monkeypatch.setenv("PATH", "")  # no git at all
    assert commit_of(tree[0]) == "0123456789"


def test_the_floor_of_replays_is_told(gpu, monkeypatch):
    assert harness.replay_floor("cpu") is None
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    floor = harness.replay_floor("cuda")
    assert 0 < floor < 0.01
    facts = harness.machine("test")
    assert facts["floor"] is None and "tiny kernel" not in harness.header(facts)
    assert "one tiny kernel, replayed as all are, takes 3 µs" in harness.header({**facts, "floor": 3e-6})


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    results = [harness.run_case(doubling(limit=harness.read_limit(lambda x: x)), seconds=0.01)]
    (path,) = bench.load("plots").draw(harness.Report(harness.machine("test"), results), tmp_path)
    assert path.name == "score.png" and path.stat().st_size > 10_000


def test_plot_of_models(tmp_path):
    pytest.importorskip("matplotlib")
    forward = harness.Forward(3.0, 0.01, 0.1, 1 << 20, 2 << 20)
    bars = {"ideal": 0.5}
    prompt = doubling(dense=("peer",), bars=bars, forward=lambda x: forward)
    token = doubling(dense=("peer",), forward=lambda x: dataclasses.replace(forward, ideal=None))
    results = [harness.run_case(case, seconds=0.01) for case in (prompt, token)]
    plots = bench.load("plots")
    assert [plots._reached(result) for result in results] == [(results[0].of_ideal, "ideal"), None]
    (path,) = plots.draw(harness.Report(harness.machine("test"), results), tmp_path)
    assert path.stat().st_size > 10_000


def test_break_even_chart(tmp_path):
    pytest.importorskip("matplotlib")
    results = [harness.run_case(sparse(), seconds=0.01), harness.run_case(doubling(), seconds=0.01)]
    paths = bench.load("plots").draw(harness.Report(harness.machine("test"), results), tmp_path)
    assert [path.name for path in paths] == ["score.png", "score_break_even.png"]
    assert paths[1].stat().st_size > 10_000


SCENES = {
    "image": ((1, 5, 6),),
    "video": ((3, 4, 5),),
    "mixed": (5, (1, 4, 5), 3, (2, 3, 4), 7),
}


def flex(q, k, v, block_mask, enable_gqa):
    """What FlexAttention computes, without seconds of compilation, and with gradients on the CPU."""
    mask = create_mask(block_mask.mask_mod, None, None, q.shape[2], k.shape[2], device="cpu")
    # rows of padding see nothing: 0, as FlexAttention has it
    return scaled_dot_product_attention(q, k, v, mask, enable_gqa=enable_gqa).masked_fill(~mask.any(3)[..., None], 0)


class TestAttention:
    """That the cases compare like with like, on small shapes."""

    @pytest.fixture(autouse=True)
    def attention(self, monkeypatch):
        self.bench = bench.load("bench_attention")
        monkeypatch.setattr(self.bench, "compiled", lambda function: flex)

    @pytest.mark.parametrize("keep", [1.0, 0.5])
    @pytest.mark.parametrize("radius", [0, 1, 2, 9])
    @pytest.mark.parametrize("name", SCENES)
    def test_counts_pairs(self, name, radius, keep):
        scene = self.bench.Scene(SCENES[name], radius, keep=keep)
        pairs, density = scene.pairs(), scene.plan.density()
        assert pairs.needed == scene.mask.sum() == density.needed
        assert pairs.visited == density.visited
        assert pairs.dense == (density.dense if name == "mixed" else scene.tokens**2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", SCENES)
    def test_every_provider_is_right(self, name, dtype):
        scene = self.bench.Scene(SCENES[name], 1)
        case = self.bench.forward(name, scene, (4, 2, 32), dtype)
        assert {"SDPA mask built", "flex", "flex tiles", "flex tiles permuted built"} < set(case.providers)
        assert harness.settled(case, case.inputs())[0] is case

    @pytest.mark.parametrize("name", SCENES)
    def test_gradients_are_right(self, name):
        scene = self.bench.Scene(SCENES[name], 1)
        case = self.bench.training(name, scene, (4, 2, 32), torch.float32)
        assert {"SDPA mask built", "flex", "flex tiles", "flex tiles permuted built"} < set(case.providers)
        assert harness.settled(case, case.inputs())[0] is case

    @pytest.mark.parametrize("name", SCENES)
    @pytest.mark.parametrize("kind", ["planning", "dropping"])
    def test_plans_are_right(self, name, kind):
        scene = self.bench.Scene(SCENES[name], 1)
        case = getattr(self.bench, kind)(name, scene, (4, 2, 32), torch.float32)
        assert harness.settled(case, case.inputs())[0] is case

    def test_layouts_are_right(self):
        case = self.bench.laying_out("mixed", self.bench.Scene(SCENES["mixed"], 1), 2)
        assert harness.settled(case, case.inputs())[0] is case
        right = case.providers["pyvtk"]
        case.providers["pyvtk"] = lambda ids, grids: right(ids.flip(1), grids)
        with pytest.raises(harness.Failed, match="pyvtk: another rule"):
            harness.settled(case, case.inputs())

    def test_another_radius_is_refused(self):
        scene, other = (self.bench.Scene(SCENES["mixed"], radius) for radius in (1, 2))
        for make in (self.bench.forward, self.bench.training):
            right, wrong = (make("mixed", s, (2, 2, 32), torch.float32, flex="not here") for s in (scene, other))
            for name in ("pyvtk", "SDPA mask"):
                case = dataclasses.replace(right, providers={**right.providers, name: wrong.providers[name]})
                with pytest.raises(harness.Failed, match=f"{name}: error"):
                    harness.settled(case, case.inputs())
        case = self.bench.planning("mixed", scene, (2, 2, 32), torch.float32)
        case.providers["pyvtk"] = self.bench.planning("mixed", other, (2, 2, 32), torch.float32).providers["pyvtk"]
        with pytest.raises(harness.Failed, match="pyvtk: another rule"):
            harness.settled(case, case.inputs())


def test_command_lists_and_filters(capsys):
    assert main(["bench", "--list", "select", "--filter", "snapkv"]) == 0
    assert capsys.readouterr().out == "select: SnapKV per head [1, 4, 16384] to 2048, fp32\n"
    assert main(["bench", "--list", "select", "--filter", "snapkv", "--filter", "[8, 2880] to 720, all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_command_runs_one_case(tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "new" / "x.json"
    before = torch.get_num_threads()
    options = ["--quick", "--filter", "[1, 576] to 72,", "--json", str(path), "--threads", "2"]
    try:
        assert main(["bench", "select", *options]) == 0
    finally:
        torch.set_num_threads(before)
    assert "every result checked" in capsys.readouterr().out
    report = harness.Report.from_json(path.read_text())
    assert report.results[0].times["pyvtk"].median > 0
    assert report.machine["threads"] == 2 and "--threads 2" in report.machine["command"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "unknown family 'nothing'"),
        (["--filter", "no such case"], "no case contains 'no such case'"),
        (["--threads", "0"], "--threads 0"),
    ],
)
def test_command_refuses(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_command_needs_the_device(capsys):
    assert main(["bench", "attention", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "pyvtk bench: torch sees no CUDA device\n"
    assert main(["bench", "attention", "--device", "cuda", "--list", "--filter", "attention: 128x128, radius 7,"]) == 0
    assert capsys.readouterr().out.startswith("attention: 128x128, radius 7, 16/16 heads, D=128, bf16\n")


def test_command_exits_1_on_red(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(harness, "cases", lambda *_: [doubling(ours=lambda x: x)])
    assert main(["bench"]) == 1
    assert "RED" in capsys.readouterr().out


def test_command_without_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert main(["bench", "--list"]) == 2
    error = capsys.readouterr().err
    assert "source checkout" in error and error.count("\n") == 1
