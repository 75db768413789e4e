"""The benchmark of whole models: what it checks before it measures, and that it can be built for a GPU without one."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from pyvtk import bench

harness = bench.load()
models = bench.load("bench_models")

LLAVA = dataclasses.replace(models.SMALL_LLAVA, hidden=64, layers=4, heads=4, key_heads=4, ffn=96)
QWEN = dataclasses.replace(models.SMALL_QWEN, hidden=64, layers=4, heads=4, key_heads=2, ffn=96)


@pytest.fixture(autouse=True)
def no_weights_stay():
    yield
    for cached in (models.unmodified, models.accelerated, models.prefilled, models.keeps_the_logits):
        cached.cache_clear()


def maker(shape, begin, images=1):
    """What makes the case of the method whose name begins so."""
    (found,) = (make for name, make in models.methods_of(shape, images, "cpu").items() if name.startswith(begin))
    return found


METHODS = ["FastV, layer 2, half", "PyramidDrop", "YOPO, radius 2, all", "YOPO, radius 2, cut", "DivPrune", "SnapKV"]


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt(method):
    result = harness.run_case(maker(LLAVA, method)({"ideal": 1e-3, "own": 1.0}), seconds=0.01)
    assert result.error is None and result.times["pyvtk"].rounds >= 5
    assert result.bars["ideal"].met and result.bars["own"].met and not result.unjudged
    forward = result.forward
    assert 0 < forward.own < 1 and 0 < forward.attention < 1
    layer = 2 * 641 * LLAVA.hidden * 4  # bytes: keys and values of a layer in float32
    assert forward.dense_cache == LLAVA.layers * layer
    lengths = {"YOPO, radius 2, cut": 2 * 641 + 2 * 65, "SnapKV": 4 * 160, "DivPrune": 4 * (65 + 56)}
    if method in lengths:
        assert forward.cache == lengths[method] * 2 * LLAVA.hidden * 4
    assert (forward.cache < forward.dense_cache) == (method != "YOPO, radius 2, all")
    assert forward.ideal == 1 if method == "SnapKV" else forward.ideal > 1


def test_what_operations_allow():
    """FastV keeps 288 of 576 tokens from layer 2 on; worked out by hand."""
    result = harness.run_case(maker(LLAVA, "FastV, layer 2, half")(), seconds=0.01)

    def layer(tokens):
        return tokens * 2 * 64 * (4 * 64 + 3 * 96) + 4 * 64 * tokens * (tokens + 1) / 2

    assert result.forward.ideal == pytest.approx(4 * layer(641) / (2 * layer(641) + 2 * layer(353)))


@pytest.mark.parametrize("method", ["PyramidDrop", "YOPO, radius 2, cut", "SnapKV"])
def test_a_token(method):
    result = harness.run_case(maker(LLAVA, method)(decode=True), seconds=0.01)
    assert result.error is None and result.forward.ideal is None and result.of_ideal is None
    assert result.forward.cache < result.forward.dense_cache


@pytest.mark.parametrize("decode", [False, True])
def test_grouped_queries_and_positions_on_a_grid(decode):
    result = harness.run_case(maker(QWEN, "PyramidDrop")(decode=decode), seconds=0.01)
    assert result.error is None and result.forward.cache < result.forward.dense_cache


def test_two_grids():
    case = maker(LLAVA, "YOPO, radius 2, cut", images=5)()
    result = harness.run_case(case, seconds=0.01)
    assert result.error is None and "2945 tokens" in case.name
    for tokens, last in ((641, [0, 23, 23]), (2945, [0, 47, 47])):
        layout = models.grids(SimpleNamespace(input_ids=torch.zeros(1, tokens, dtype=torch.int64)))
        visual = tokens - 65
        assert layout.visual[0, 35 : 35 + visual].all() and layout.visual.sum() == visual
        assert layout.coords[0, 35 + visual - 1].tolist() == last


# What is wrong gets no number


def case_with(**changes):
    options = dict(
        name="FastV", shape=LLAVA, images=1, method=lambda vtk: vtk.FastV(2, 0.5),
        nothing=lambda vtk: vtk.FastV(2, 1.0), kept={2: 288}, bars={},
    )  # fmt: skip
    return models.case_of(**{**options, **changes})


def test_another_number_of_tokens_is_refused():
    result = harness.run_case(case_with(kept={2: 287}), seconds=0.01)
    assert result.error.startswith("pyvtk: tokens by layer are [641, 641, 353, 353], expected [641, 641, 352, 352]")
    assert not result.times


def test_a_method_that_changes_the_logits_is_refused():
    result = harness.run_case(case_with(nothing=lambda vtk: vtk.FastV(2, 0.9)), seconds=0.01)
    assert result.error.startswith("nothing dropped, logits off by ") and not result.times


# What a pass is made of


def test_shares_of_a_pass():
    import pyvtk

    x = torch.randn(1, 4, 64, 16)
    selection = pyvtk.select(torch.randn(1, 64), 32)

    def call():
        out = torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return pyvtk.compact(selection, out, dim=2)

    result, own, attention = models.profiled(call, "cpu")
    assert result.shape == (1, 4, 32, 16) and 0 < own < 1 and 0 < attention < 1 and own + attention <= 1
    _, own, attention = models.profiled(lambda: x + x, "cpu")
    assert own == attention == 0


def test_what_an_operator_calls_is_counted_once():
    outer = SimpleNamespace(name="pyvtk::compact", cpu_parent=SimpleNamespace(name="aten::x", cpu_parent=None))
    between = SimpleNamespace(name="aten::empty", cpu_parent=outer)
    inner = SimpleNamespace(name="pyvtk::compact_forward", cpu_parent=between)
    found = models.outermost([inner, between, outer], lambda name: name.startswith("pyvtk::"))
    assert found == [outer]


# For a GPU


@pytest.mark.parametrize(("shape", "billions"), [(models.LLAVA_7B, 6.76), (models.QWEN_7B, 7.62)])
def test_models_for_a_gpu(shape, billions):
    model = models.made(shape, "meta")
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters} == {torch.bfloat16} and {p.device.type for p in parameters} == {"meta"}
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx(billions, abs=0.01)
    other = models.twin(model)
    assert other is not model and all(a is b for a, b in zip(parameters, other.parameters()))
    assert other.config is not model.config


def test_a_case_for_a_gpu_in_bfloat16(monkeypatch):
    monkeypatch.setattr(models, "made_on", lambda device, inputs: inputs)
    monkeypatch.setattr(models, "made", lambda shape, device, made=models.made: made(shape, "cpu"))
    monkeypatch.setattr(harness, "still_works", lambda device: True)
    case = case_with(shape=dataclasses.replace(LLAVA, dtype=torch.bfloat16), device="cuda")
    assert case.device == "cuda" and case.memory and set(case.eager) == set(case.providers)
    runs, _ = harness.settled(case, case.inputs())
    assert set(runs.providers) == {"pyvtk", "unmodified"}


def test_cases_for_both_devices_hold_the_bars():
    for device in ("cpu", "cuda"):
        cases = models.cases(device)
        bars = {(case.name.partition(" heads, ")[2], case.name[:14]): case.bars for case in cases}
        for (name, what), bar in bars.items():
            if what.startswith("a token") or "all layers" in name or name.startswith(("DivPrune", "SnapKV")):
                assert bar == {}
            elif name.startswith("FastV"):
                assert bar == {"ideal": 0.95, "own": 0.005}
            elif name.startswith("PyramidDrop"):
                assert bar == {"ideal": 0.88, "own": 0.005}
            else:
                assert bar == {"ideal": 1.0 if what == "prompt of 2945" else 0.92}
