"""The benchmark harness: the gate, the bars, the report; and the command that finds it."""

import dataclasses

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention

from pyvtk import bench
from pyvtk.__main__ import main
from pyvtk._measure import Timing, extra_memory, interleave

harness = bench.load()


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
    assert not result.times and not result.bars and not result.memory
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


def test_optional_peer_that_cannot_run_is_absent():
    def missing(x):
        raise RuntimeError("no such kernel\nand a long trace")

    case = sparse(peer=missing, optional=("peer",), absent={"other": "not installed"}, bars={"peer": 1.0})
    result = harness.run_case(case, seconds=0.01)
    assert result.error is None and set(result.times) == {"pyvtk"} and not result.bars and not result.dense
    assert result.absent == {"other": "not installed", "peer": "no such kernel"}
    assert "absent: other (not installed); peer (no such kernel)" in harness.table([result])
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
    assert harness.verify(case, (x,)) is None
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
    case = TINY[family][number](module)
    assert case.device == "cuda"
    torch.manual_seed(0)
    inputs = case.inputs()
    runs = harness.present(case, inputs)
    assert harness.verify(runs, inputs) is None
    assert bool(made) == any(name.startswith("compiled") for name in runs.providers)
    assert case.limit.amount(*inputs) > 0 and case.limit.scale(*inputs) > 0
    missing = set(case.providers) - set(runs.providers)
    of_torch = {"cuSPARSELt", "CUTLASS", "compiled cuSPARSELt int8", "pyvtk, vendor chosen"}
    assert missing <= {"SDPA cuDNN", "FlashInfer + sort", "flash-colreduce", *of_torch}, runs.absent


def test_a_wrong_selection_is_refused(monkeypatch):
    module = bench.load("bench_select")
    monkeypatch.setattr(module, "made_on", lambda device, inputs: inputs)
    case = module.largest("x", 30, (3, 90), {}, device="cuda")
    case.providers["topk + sort"] = lambda scores: scores.topk(30, largest=False).indices.sort().values
    assert harness.verify(case, case.inputs()) == "topk + sort: kept values are not the largest"


def test_what_cannot_be_captured_is_named(monkeypatch):
    def captured(call, arguments):
        if call(*arguments) is None:
            raise RuntimeError("capture failed")
        return lambda: None

    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = {"pyvtk": lambda x: x, "peer": lambda x: None, "other": lambda x: x}
    case = dataclasses.replace(doubling(), providers=calls, graph=True, eager=("other",))
    found, launched = harness.replayed(case, calls, harness.Pool(case))
    assert launched == ["peer", "other"] and found["peer"] is calls["peer"] and found["pyvtk"] is not calls["pyvtk"]
    result = harness.Result("score", "tiny", "fp32", {"pyvtk": Timing(1, 1, 1, 3)}, launched=launched)
    assert "as launched, not as CUDA graphs: peer, other" in harness.table([result])


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


def test_out_of_memory_is_an_error_of_the_case():
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")

    result = harness.run_case(dataclasses.replace(doubling(), inputs=greedy))
    assert result.error == "CUDA out of memory" and not result.times


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


def test_rounds_rotate():
    order = []
    times = interleave({n: lambda n=n: order.append(n) for n in "abc"}, seconds=0, min_rounds=3)
    assert "".join(order) == "abcbcacab"
    assert all(t.rounds == 3 and t.low <= t.median <= t.high for t in times.values())


def test_extra_memory_sees_peaks_and_frees():
    x = torch.zeros(32 << 20, dtype=torch.uint8)
    if (used := extra_memory(x.clone)) is None:
        pytest.skip("this system does not tell")
    assert abs(used - x.nbytes) < 1 << 20
    assert extra_memory(lambda: (x.clone(), None)[1] or x.clone()) < 2.1 * x.nbytes
    assert extra_memory(lambda: x.add_(1)) < 1 << 20


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    results = [harness.run_case(doubling(limit=harness.read_limit(lambda x: x)), seconds=0.01)]
    (path,) = bench.load("plots").draw(harness.Report(harness.machine("test"), results), tmp_path)
    assert path.name == "score.png" and path.stat().st_size > 10_000


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
        assert harness.verify(case, case.inputs()) is None

    @pytest.mark.parametrize("name", SCENES)
    def test_gradients_are_right(self, name):
        scene = self.bench.Scene(SCENES[name], 1)
        case = self.bench.training(name, scene, (4, 2, 32), torch.float32)
        assert {"SDPA mask built", "flex", "flex tiles", "flex tiles permuted built"} < set(case.providers)
        assert harness.verify(case, case.inputs()) is None

    @pytest.mark.parametrize("name", SCENES)
    @pytest.mark.parametrize("kind", ["planning", "dropping"])
    def test_plans_are_right(self, name, kind):
        scene = self.bench.Scene(SCENES[name], 1)
        case = getattr(self.bench, kind)(name, scene, (4, 2, 32), torch.float32)
        assert harness.verify(case, case.inputs()) is None

    def test_another_radius_is_refused(self):
        scene, other = (self.bench.Scene(SCENES["mixed"], radius) for radius in (1, 2))
        for make in (self.bench.forward, self.bench.training):
            right, wrong = (make("mixed", s, (2, 2, 32), torch.float32, flex="not here") for s in (scene, other))
            for name in ("pyvtk", "SDPA mask"):
                case = dataclasses.replace(right, providers={**right.providers, name: wrong.providers[name]})
                assert harness.verify(case, case.inputs()).startswith(f"{name}: error")
        case = self.bench.planning("mixed", scene, (2, 2, 32), torch.float32)
        case.providers["pyvtk"] = self.bench.planning("mixed", other, (2, 2, 32), torch.float32).providers["pyvtk"]
        assert harness.verify(case, case.inputs()) == "pyvtk: another rule"


def test_command_lists_and_filters(capsys):
    assert main(["bench", "--list", "select", "--filter", "snapkv"]) == 0
    assert capsys.readouterr().out == "select: SnapKV per head [1, 4, 16384] to 2048, fp32\n"


def test_command_runs_one_case(tmp_path, capsys):
    pytest.importorskip("rich")
    path = tmp_path / "new" / "x.json"
    assert main(["bench", "select", "--quick", "--filter", "[1, 576] to 72,", "--json", str(path)]) == 0
    assert "every result checked" in capsys.readouterr().out
    assert harness.Report.from_json(path.read_text()).results[0].times["pyvtk"].median > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nothing"], "unknown family 'nothing'"), (["--filter", "no such case"], "no case contains 'no such case'")],
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
