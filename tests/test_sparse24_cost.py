"""estimate, calibrate and its cache; sparsify_ and its reports."""

import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from pyvtk import backends, sparse24
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24 import cost

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder for each test."""
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_table(times, dtype="float32", shape=(1024, 1024), rows=(1, 64), device="cpu"):
    """A table of this machine: kernel -> seconds at the rows."""
    path = cost.table_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    kernels = {k: [{"shape": shape, "rows": rows, "seconds": seconds}] for k, seconds in times.items()}
    key = cost._key(torch.device(device))
    path.write_text(json.dumps({"key": key, "seconds": {dtype: kernels}, "left_out": {}}))
    return path


@pytest.fixture
def gpu(monkeypatch):
    """Names the GPU that torch seems to find."""

    def found(name):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        properties = SimpleNamespace(multi_processor_count=100)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    cost._say_guessed.cache_clear()
    return found


SPARSE_WINS_FEW = {"few": (1e-3, 64e-3), "many": (2e-3, 32e-3), "dense": (4e-3, 16e-3)}


# estimate


def test_a_table_is_used_and_interpolated():
    write_table(SPARSE_WINS_FEW)
    found = sparse24.estimate(1, 1024, 1024)
    assert found.source == "measured" and found.kernel == "few" and found.speedup == pytest.approx(4)
    # between the rows straight in logarithms; beyond the last, and with the size of the weight, in proportion
    assert sparse24.estimate(8, 1024, 1024).seconds["dense"] == pytest.approx(8e-3)
    assert sparse24.estimate(128, 2048, 1024).seconds["dense"] == pytest.approx(64e-3)
    many = sparse24.estimate(64, 1024, 1024)
    assert many.kernel == "dense" and many.speedup == pytest.approx(0.5)
    # few up to where dense costs as much, dense from there: 1e-3 m = 4e-3 m^(1/3) at m = 8
    assert found.choice == many.choice and found.choice[:2] == (0, 0) and found.choice[3] == 2
    assert 8 <= found.choice[2] <= 12 and len(found.choice) == 4
    assert sparse24.estimate(1, 1024, 1024, torch.bfloat16).source == "analytic"


def test_sizes_between_the_measured_ones():
    path = write_table(SPARSE_WINS_FEW)
    stored = json.loads(path.read_text())
    for kernel, entries in stored["seconds"]["float32"].items():
        # four times the size, eight times the time: twice as much per weight
        entries.append({"shape": (2048, 2048), "rows": [1, 64], "seconds": [8 * t for t in SPARSE_WINS_FEW[kernel]]})
    path.write_text(json.dumps(stored))
    seconds = {n: sparse24.estimate(1, n, 1024).seconds["few"] for n in (512, 1024, 2048, 4096, 8192)}
    assert seconds[1024] == pytest.approx(1e-3) and seconds[4096] == pytest.approx(8e-3)
    assert seconds[512] == pytest.approx(0.5e-3) and seconds[8192] == pytest.approx(16e-3)
    assert seconds[2048] == pytest.approx(2 * 1.5e-3)


def test_without_a_table_it_says_analytic():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        found = sparse24.estimate(1, 4096, 4096, dtype)
        assert found.source == "analytic" and set(found.seconds) == {"few", "many", "dense"}
        assert found.kernel == "few" and 1.2 < found.speedup < 4
        assert 2 not in found.choice[1::2]  # no memory is spent on a guess


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_weights_that_cuda_unpacks_never_gain(rows, dtype):
    found = sparse24.estimate(rows, 4096, 4096, dtype, "A100")
    assert found.speedup < 1 and found.kernel == "dense"


@pytest.mark.parametrize("name", ["A100", "H100", "H200", "NVIDIA L40S", "NVIDIA GeForce RTX 4090"])
def test_named_devices_are_analytic(name):
    few, many = (sparse24.estimate(m, 11008, 4096, torch.bfloat16, name) for m in (1, 2950))
    assert few.source == many.source == "analytic"
    assert few.kernel == "few" and few.speedup > 1.4
    if name.startswith("H"):  # whose dense product reaches more of its rate than any sparse one
        assert many.kernel == "dense" and 0.7 < many.seconds["dense"] / many.seconds["many"] < 1
    else:
        assert many.kernel == "many" and 1 < many.speedup < 2
    # the dense product of one row reads the weight: bytes over the data sheet's bandwidth, or a little slower
    assert 11008 * 4096 * 2 / 5e12 < few.seconds["dense"] < 11008 * 4096 * 2 / 0.4e12


@pytest.mark.parametrize(
    ("name", "bandwidth", "half"),
    [
        ("NVIDIA A100-SXM4-80GB", 2039, 312),
        ("NVIDIA A100 80GB PCIe", 1935, 312),
        ("NVIDIA A100-PCIE-40GB", 1555, 312),
        ("NVIDIA H100 80GB HBM3", 3352, 989),
        ("NVIDIA H100 PCIe", 2039, 756),
        ("NVIDIA H100 NVL", 3900, 835),
        ("NVIDIA H200", 4800, 989),
        ("NVIDIA GH200 480GB", 4000, 989),
        ("NVIDIA L40S", 864, 362),
        ("NVIDIA L40", 864, 181),
        ("NVIDIA L4", 300, 121),
        ("NVIDIA A10", 600, 125),
        ("nvidia geforce rtx 4090", 1008, 165),
    ],
)
def test_a_gpu_is_known_by_whole_words(name, bandwidth, half, gpu):
    gpu(name)
    reading, launch = 11008 * 4096 * 2 / (bandwidth * 0.85e9), 5e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for device in (name, "cuda"):
            few, many = (sparse24.estimate(m, 11008, 4096, torch.bfloat16, device) for m in (1, 65536))
            assert few.seconds["dense"] == pytest.approx(reading + launch, rel=0.01)
            assert many.seconds["dense"] == pytest.approx(2 * 65536 * 11008 * 4096 / (half * 0.75e12), rel=0.01)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA RTX A1000",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H20",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "GRID A100-10C",
    ],
)
def test_an_unknown_gpu_is_called_so(name, gpu):
    with pytest.raises(ValueError, match="device must be a torch device or one of 'A100"):
        sparse24.estimate(1, 1024, 1024, torch.bfloat16, name)
    gpu(name)
    with pytest.warns(RuntimeWarning, match=f"the rates of '{name}' are not known, and estimates for it are guesses"):
        assert sparse24.estimate(1, 1024, 1024, torch.bfloat16, "cuda").source == "analytic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        sparse24.estimate(1, 1024, 1024, torch.bfloat16, "cuda")


def test_what_was_measured_is_no_guess(gpu):
    gpu("NVIDIA H20")
    write_table(SPARSE_WINS_FEW, "bfloat16", device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sparse24.estimate(1, 1024, 1024, torch.bfloat16, "cuda").source == "measured"


def test_few_on_cuda_holds_32_rows(gpu):
    """It reads the weight once for all of them; with more, the operator runs the other kernel whatever is asked for."""
    one, all_rows, more = (sparse24.estimate(m, 4096, 11008, torch.bfloat16, "H100") for m in (1, 32, 33))
    assert one.kernel == all_rows.kernel == "few" and all_rows.seconds["few"] < 1.2 * one.seconds["few"]
    assert "few" not in more.seconds and more.absent == {"few": "it holds 32 rows on CUDA, not 33"}
    assert one.choice == (0, 0, 33, 1)
    # as many bytes of values as it takes at a time: 64 of 16 bits are 128 in_features, 96 are not
    assert "few" in sparse24.estimate(1, 64, 64, torch.bfloat16, "H100").seconds
    for k, dtype in ((96, torch.bfloat16), (64, torch.int8)):
        other = sparse24.estimate(1, 64, k, dtype, "H100", torch.bfloat16)
        assert "few" not in other.seconds and f"{k} in_features are no multiple" in other.absent["few"]
    # a table of many rows alone
    gpu("NVIDIA H100 80GB HBM3")
    write_table({"many": (1e-3, 2e-3), "dense": (4e-3, 8e-3)}, "bfloat16", device="cuda", rows=(64, 128))
    found = sparse24.estimate(64, 1024, 1024, torch.bfloat16, "cuda")
    assert found.source == "measured" and found.kernel == "many" and found.choice == (0, 1)


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16])
def test_int8_weights_gain_with_16_bit_x(x_dtype):
    """CUDA multiplies them as they are: a quarter of the dense weight's bytes, and a sixteenth of metadata."""
    few, many = (sparse24.estimate(m, 11008, 4096, torch.int8, "A100", x_dtype) for m in (1, 2950))
    assert few.kernel == "few" and few.speedup > 2.3 and many.kernel == "many" and many.speedup > 1
    wide = sparse24.estimate(2950, 11008, 4096, x_dtype, "A100")
    assert many.seconds["dense"] == wide.seconds["dense"] and many.seconds["vendor"] == wide.seconds["vendor"]


@needs_kernels
def test_int8_weights_are_measured_for_each_dtype_of_x():
    options = {"rows": (1,), "shapes": ((32, 64),), "seconds": 1e-4, "dtypes": (torch.int8,)}
    sparse24.calibrate(**options)
    assert sparse24.estimate(1, 32, 64, torch.int8, x_dtype=torch.bfloat16).source == "analytic"
    path = sparse24.calibrate(**options, x_dtype=torch.bfloat16)
    assert sparse24.estimate(1, 32, 64, torch.int8, x_dtype=torch.bfloat16).source == "measured"
    assert set(json.loads(path.read_text())["seconds"]) == {"int8", "int8, bfloat16"}
    model = nn.Sequential(nn.Linear(64, 32).bfloat16())
    (report,) = sparse24.sparsify_(model, rows=1, dtype=torch.int8)
    assert report.source == "measured"


def test_a_table_of_something_else_is_another_file():
    before = cost.table_path()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert cost.table_path() != before
    finally:
        torch.set_num_threads(threads)
    assert cost.table_path() == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"key": 1}', "{}", "\x00\xff"],
)
def test_a_broken_table_is_a_warning(text):
    path = write_table(SPARSE_WINS_FEW)
    path.write_text(text)
    with pytest.warns(RuntimeWarning, match="cannot be used .* estimates are analytic until"):
        assert sparse24.estimate(1, 1024, 1024).source == "analytic"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was said once
        sparse24.estimate(1, 1024, 1024)


@pytest.mark.parametrize("seconds", [(0.0, 1.0), (-1.0, 1.0), (float("nan"), 1.0), (1.0,), ("a", "b")])
def test_a_table_of_impossible_times_is_a_warning(seconds):
    write_table(SPARSE_WINS_FEW | {"few": seconds})
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert sparse24.estimate(1, 1024, 1024).source == "analytic"


def test_a_table_that_lacks_a_kernel_is_a_warning():
    write_table({"few": (1.0, 2.0)})
    with pytest.warns(RuntimeWarning, match="unknown or missing entries"):
        sparse24.estimate(1, 1024, 1024)


# calibrate


@needs_kernels
def test_calibrate_writes_what_estimate_reads(cache):
    shapes = ((32, 64), (64, 128))
    path = sparse24.calibrate(dtypes=(torch.float32,), rows=(1, 8, 256), shapes=shapes, seconds=1e-4)
    assert path == sparse24.table_path() and path.parent == cache and list(cache.iterdir()) == [path]
    found = sparse24.estimate(8, 64, 128)
    assert found.source == "measured" and all(0 < s < 1 for s in found.seconds.values())
    stored = json.loads(path.read_text())["seconds"]["float32"]
    assert [e["rows"] for e in stored["many"]] == [[1, 8, 256]] * 2
    assert [e["rows"] for e in stored["few"]] == [[1, 8]] * 2  # it is not for many rows
    assert found.seconds["dense"] == pytest.approx(stored["dense"][1]["seconds"][1])
    # another dtype joins it
    sparse24.calibrate(dtypes=(torch.int8, torch.bfloat16), rows=(1,), shapes=shapes, seconds=1e-4)
    assert set(json.loads(path.read_text())["seconds"]) == {"float32", "int8", "bfloat16"}
    assert sparse24.estimate(1, 64, 128, torch.int8).source == "measured"
    assert sparse24.estimate(8, 64, 128).seconds == found.seconds


@needs_kernels
def test_calibrate_measures_few_where_it_runs(monkeypatch):
    """On CUDA that is up to 32 rows; here the CPU stands in."""
    why_not = cost._no_few
    monkeypatch.setattr(cost, "_no_few", lambda m, k, values, cuda: why_not(m, k, values, True))
    options = {"dtypes": (torch.bfloat16,), "rows": (1, 32, 33, 64), "seconds": 1e-4}
    path = sparse24.calibrate(**options, shapes=((32, 64), (32, 96)))
    stored = json.loads(path.read_text())["seconds"]["bfloat16"]
    assert [entry["rows"] for entry in stored["few"]] == [[1, 32]] and stored["few"][0]["shape"] == [32, 64]
    assert [entry["rows"] for entry in stored["many"]] == [[1, 32, 33, 64]] * 2


@needs_kernels
def test_calibrate_survives_a_vendor_that_does_not_work(monkeypatch):
    """cuSPARSELt is in the build, but not for this device: no CPU has it."""
    of_the_build = backends.why_not_cusparselt
    monkeypatch.setattr(backends, "why_not_cusparselt", lambda device: None)
    options = {"rows": (1, 16), "shapes": ((32, 64), (20, 64)), "seconds": 1e-4}
    message = "the vendor's kernel does not work on cpu and is left out of the table for bfloat16: .*_cslt_compress"
    with pytest.warns(RuntimeWarning, match=message):
        path = sparse24.calibrate(dtypes=(torch.bfloat16,), **options)
    found = sparse24.estimate(16, 32, 64, torch.bfloat16)
    assert found.source == "measured" and set(found.seconds) == {"few", "many", "dense"}
    assert "_cslt_compress" in found.absent["vendor"] and 3 not in found.choice[1::2]
    # it is remembered beside what is measured later
    sparse24.calibrate(dtypes=(torch.float32,), **options)
    assert set(json.loads(path.read_text())["seconds"]) == {"bfloat16", "float32"}
    assert "_cslt_compress" in sparse24.estimate(16, 32, 64, torch.bfloat16).absent["vendor"]
    # a reason of the build comes first
    monkeypatch.setattr(backends, "why_not_cusparselt", of_the_build)
    assert "not on cpu" in sparse24.estimate(16, 32, 64, torch.bfloat16).absent["vendor"]


@needs_kernels
def test_calibrate_replaces_a_broken_table():
    write_table(SPARSE_WINS_FEW).write_text("{")
    sparse24.calibrate(dtypes=(torch.float32,), rows=(1,), shapes=((8, 8),), seconds=1e-4)
    assert sparse24.estimate(1, 8, 8).source == "measured"


@pytest.mark.parametrize("how", ["a file where the folder should be", "no folder can be made", "a folder in its place"])
def test_calibrate_that_cannot_write_measures_nothing(how, monkeypatch, tmp_path):
    """It says so at once, and leaves nothing behind."""
    folder = {"no folder can be made": "/proc/nowhere"}.get(how, str(tmp_path / "some" / "cache"))
    monkeypatch.setenv("PYVTK_CACHE", folder)
    if how.startswith("a file"):
        (tmp_path / "some").write_text("")
    elif how.startswith("a folder"):
        sparse24.table_path().mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(cost, "_measure_shape", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    with pytest.raises(
        OSError, match=r"sparse24.calibrate: its table must go to .*, which cannot be written \(PYVTK_C"
    ):
        sparse24.calibrate()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes to every folder")
def test_calibrate_in_a_folder_that_is_read_only(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cost, "_measure_shape", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)
    with pytest.raises(PermissionError, match="which cannot be written"):
        sparse24.calibrate()


def test_looking_whether_it_can_write_leaves_nothing(monkeypatch, tmp_path):
    """Folders neither, if measuring does not come to an end; a table that is there stays."""
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path / "some" / "cache"))
    monkeypatch.setattr(backends, "why_not", lambda *_: None)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cost, "_measure_shape", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparse24.calibrate()
    assert not list(tmp_path.iterdir())
    path = write_table(SPARSE_WINS_FEW)
    with pytest.raises(KeyboardInterrupt):
        sparse24.calibrate()
    assert list(path.parent.iterdir()) == [path]


def test_linear_measures_nothing(cache):
    weight = torch.randn(16, 16)
    sparse24.linear(torch.randn(3, 16), sparse24.compress(weight, sparse24.prune(weight)))
    assert not cache.exists()


# sparsify_


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.odd = nn.Linear(64, 63)
        self.narrow = nn.Linear(63, 64)

    def forward(self, x):
        x = x + self.down(torch.relu(self.up(self.norm(x))))
        return x + self.narrow(self.odd(x))


SPARSE_WINS = {"few": (1e-3, 8e-3), "many": (2e-3, 6e-3), "dense": (4e-3, 12e-3)}
DENSE_WINS = {"few": (4e-3, 64e-3), "many": (4e-3, 32e-3), "dense": (1e-3, 16e-3)}


@needs_kernels
def test_sparsify_converts_what_gains():
    write_table(SPARSE_WINS)
    model = Block().eval()
    x = torch.randn(5, 64)
    dry = sparse24.sparsify_(model, rows=4, dry_run=True)
    assert isinstance(model.up, nn.Linear)
    expected = Block().eval()
    expected.load_state_dict(model.state_dict())
    for layer in (expected.up, expected.down, expected.odd):
        layer.weight.data *= sparse24.prune(layer.weight)
    reports = sparse24.sparsify_(model, rows=4)
    assert reports == dry
    assert [(r.name, r.converted) for r in reports] == [("up", True), ("down", True), ("odd", True), ("narrow", False)]
    up, narrow = reports[0], reports[-1]
    assert up.shape == (128, 64) and up.source == "measured" and up.kernel == "few" and up.speedup > 1.5
    assert up.bytes_before == (128 * 64 + 128) * 4 and up.bytes_after == 128 * 32 * 4 + 128 * 8 + 128 * 4
    assert 0.5 < up.kept_share < 1 and narrow.reason == "in_features 63 is not a multiple of 4"
    assert isinstance(model.up, sparse24.Sparse24Linear) and not model.up.training and model.up.choice
    torch.testing.assert_close(model(x), expected(x))
    assert [r.reason for r in sparse24.sparsify_(model, rows=4)] == ["in_features 63 is not a multiple of 4"]


@needs_kernels
def test_sparsify_leaves_what_loses():
    write_table(DENSE_WINS)
    model = Block()
    before = dict(model.named_modules())
    for report in sparse24.sparsify_(model, lambda name, _: name in ("up", "down"), rows=4):
        assert not report.converted and report.kernel == "dense" and report.speedup < 1
        assert report.reason == "dense is faster at 4 rows (measured estimate)"
        assert report.bytes_after == report.bytes_before
    assert dict(model.named_modules()) == before


@needs_kernels
def test_sparsify_takes_scores_and_int8():
    write_table(SPARSE_WINS)
    write_table_of_int8 = write_table(SPARSE_WINS, "int8")
    assert write_table_of_int8.exists()
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    scores = {"0": torch.rand(32, 64)}
    weights = [layer.weight.detach().clone() for layer in model]
    reports = sparse24.sparsify_(model, rows=1, scores=scores, dtype=torch.int8)
    assert all(r.converted for r in reports)
    assert torch.equal(model[0].weight24.mask(), reference.prune_n_of_m(scores["0"], 2, 4))
    assert torch.equal(model[1].weight24.mask(), sparse24.prune(weights[1]))
    assert model[0].values.dtype == torch.int8
    step = model[0].scales[:, None]
    assert ((model[0].weight - weights[0]) * model[0].weight24.mask()).abs().le(step / 2 * 1.001).all()
    model = nn.Sequential(nn.Linear(64, 32))
    names = []
    sparse24.sparsify_(model, rows=1, scores=lambda name, m: names.append(name) or m.weight.abs(), dry_run=True)
    assert names in (["0"], [])


@needs_kernels
@pytest.mark.parametrize("dtype", (None, torch.int8), ids=str)
def test_a_sparsified_model_is_saved_and_loaded(dtype):
    write_table(SPARSE_WINS)
    write_table(SPARSE_WINS, "float32" if dtype is None else "int8")
    model, other = Block(), Block().eval()
    sparse24.sparsify_(model, rows=1, dtype=dtype)
    if dtype == torch.int8:
        model.down = sparse24.Sparse24Linear(model.down.weight24, x_scale="row")
        model.odd = sparse24.Sparse24Linear(model.odd.weight24, model.odd.bias, x_scale=torch.tensor([0.02]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken = state | {"odd.values": state["odd.values"][:7]}
    before = list(other.modules())
    with pytest.raises(ValueError, match=r"layer 'odd': .*metadata must be"):
        sparse24.load_sparsified_(other, broken)
    with pytest.raises(RuntimeError, match="Missing key"):
        sparse24.load_sparsified_(other, {name: t for name, t in state.items() if name != "norm.weight"})
    assert list(other.modules()) == before
    sparse24.load_sparsified_(other, state)
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x)) and not other.up.training
    assert isinstance(other.up, sparse24.Sparse24Linear) and isinstance(other.narrow, nn.Linear)


@needs_kernels
def test_sparsify_says_why_not():
    write_table(SPARSE_WINS)
    model = nn.Module()
    model.hooked, model.first, model.meta = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8, device="meta")
    model.hooked.register_forward_hook(lambda *_: None)
    model.tied = nn.Linear(8, 8)
    model.tied.weight = model.first.weight
    model.attention = nn.MultiheadAttention(8, 2)
    model.wide = nn.Linear(8, 8, dtype=torch.float64)
    reasons = {r.name: r.reason for r in sparse24.sparsify_(model, rows=1)}
    assert reasons["hooked"] == "it has hooks, which would be lost"
    assert reasons["first"] == reasons["tied"] == "its weight is shared: first.weight, tied.weight"
    assert reasons["meta"] == "its weight is on the meta device"
    assert "NonDynamicallyQuantizableLinear" in reasons["attention.out_proj"]
    assert reasons["wide"] == "no kernel takes weights of torch.float64"
    (alone,) = sparse24.sparsify_(nn.Linear(8, 8), rows=1)
    assert alone.reason == "it is the model itself, which cannot be replaced in place"


@needs_kernels
def test_sparsify_reports_what_is_no_plain_layer():
    """Lazy, parametrized, of another class, pruned by torch, without a weight: a line of the report each."""
    write_table(SPARSE_WINS)
    scored = []
    model = nn.ModuleDict(
        {name: nn.Linear(8, 8) for name in ("plain", "normed", "masked", "nothing", "gone", "wrapped")}
    )
    model["lazy"], model["last"] = nn.LazyLinear(12), nn.Linear(8, 8)
    nn.utils.parametrizations.weight_norm(model["normed"])
    prune.l1_unstructured(model["masked"], "weight", 0.5)
    model["nothing"].weight = None
    del model["gone"].weight

    class Packed(torch.Tensor):
        pass

    model["wrapped"].weight = nn.Parameter(torch.randn(8, 8).as_subclass(Packed))
    scores = lambda name, module: scored.append(name) or module.weight.abs()  # noqa: E731
    reports = {r.name: r for r in sparse24.sparsify_(model, rows=1, scores=scores)}
    reasons = {name: r.reason for name, r in reports.items()}
    assert reasons["plain"] is reasons["last"] is None and isinstance(model["plain"], sparse24.Sparse24Linear)
    assert scored == ["plain", "last"]
    assert "LazyLinear" in reasons["lazy"] and reports["lazy"].shape == (12, 0) and reports["lazy"].bytes_before == 0
    assert "ParametrizedLinear" in reasons["normed"] and reports["normed"].shape == (8, 8)
    assert reasons["masked"] == "it has hooks, which would be lost"
    assert reasons["nothing"] == reasons["gone"] == "it has no weight" and reports["gone"].shape == (8, 8)
    assert reasons["wrapped"] == "its weight is a Packed, which is more than a matrix of numbers"
    assert isinstance(model["lazy"], nn.LazyLinear) and model["lazy"](torch.randn(2, 5)).shape == (2, 12)


@needs_kernels
def test_load_sparsified_into_a_lazy_layer():
    write_table(SPARSE_WINS)
    model, lazy = nn.Sequential(nn.Linear(8, 12)), nn.Sequential(nn.LazyLinear(12))
    sparse24.sparsify_(model, rows=1)
    sparse24.load_sparsified_(lazy, model.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(lazy(x), model(x))
    with pytest.raises(ValueError, match=r"layer '0': values must be for a weight of \[13, 8\], got \[12, 8\]"):
        sparse24.load_sparsified_(nn.Sequential(nn.LazyLinear(13)), model.state_dict())


@needs_kernels
def test_a_module_of_two_names_stays_one():
    write_table(SPARSE_WINS)
    model = nn.Module()
    model.a = model.b = nn.Linear(8, 8)
    (report,) = sparse24.sparsify_(model, rows=1)
    assert report.converted and model.a is model.b and isinstance(model.a, sparse24.Sparse24Linear)


@needs_kernels
def test_sparsify_is_all_or_nothing():
    write_table(SPARSE_WINS)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data[2, 3] = float("nan")
    before = list(model)
    with pytest.raises(ValueError, match=r"layer '1': .*weight must not hold NaN, got one at \(2, 3\)"):
        sparse24.sparsify_(model, rows=1)
    assert list(model) == before


def test_sparsify_without_kernels_converts_nothing(monkeypatch):
    monkeypatch.setattr(backends, "why_not", lambda *_: "it was not built")
    (report,) = sparse24.sparsify_(nn.Sequential(nn.Linear(8, 8)), rows=1)
    assert not report.converted and report.reason == "no compiled kernel: it was not built"
    with pytest.raises(RuntimeError, match="nothing to measure on cpu: it was not built"):
        sparse24.calibrate()


MODEL = nn.Sequential(nn.Linear(8, 8))
WRONG = {
    "sparse24.estimate: m must be": lambda: sparse24.estimate(0, 8, 8),
    "sparse24.estimate: n must be": lambda: sparse24.estimate(1, 8.0, 8),
    "sparse24.estimate: k must be": lambda: sparse24.estimate(1, 8, 0),
    "sparse24.estimate: k must be a multiple of 4": lambda: sparse24.estimate(1, 8, 6),
    "sparse24.estimate: dtype must be": lambda: sparse24.estimate(1, 8, 8, torch.float64),
    "sparse24.estimate: x_dtype must be": lambda: sparse24.estimate(1, 8, 8, x_dtype=torch.bfloat16),
    "sparse24.calibrate: x_dtype must be": lambda: sparse24.calibrate(x_dtype=torch.bfloat16),
    "sparse24.estimate: device must be a torch device or one of": lambda: sparse24.estimate(1, 8, 8, device="abacus"),
    "sparse24.estimate: device must be a torch.device": lambda: sparse24.estimate(1, 8, 8, device=3),
    "sparse24.estimate: device must be a CPU": lambda: sparse24.estimate(1, 8, 8, device="meta"),
    "sparse24.calibrate: rows must be": lambda: sparse24.calibrate(rows=(8, 1)),
    "sparse24.calibrate: shapes must be": lambda: sparse24.calibrate(shapes=((8, 6),)),
    "sparse24.calibrate: dtype must be": lambda: sparse24.calibrate(dtypes=(torch.float64,)),
    "sparse24.sparsify_: model must be": lambda: sparse24.sparsify_([], rows=1),
    "sparse24.sparsify_: rows must be": lambda: sparse24.sparsify_(MODEL, rows=0),
    "sparse24.sparsify_: dry_run must be": lambda: sparse24.sparsify_(MODEL, rows=1, dry_run=1),
    "sparse24.sparsify_: scores must be a mapping": lambda: sparse24.sparsify_(MODEL, rows=1, scores=3),
    "sparse24.sparsify_: scores must be for": lambda: sparse24.sparsify_(MODEL, rows=1, scores={"1": torch.ones(8, 8)}),
    "sparse24.sparsify_: dtype must be": lambda: sparse24.sparsify_(MODEL, rows=1, dtype=torch.int64),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)
