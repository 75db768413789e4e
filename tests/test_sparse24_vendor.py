"""sparse24 through the vendor's kernel: which calls take it, what is kept, what does not fit. torch has cuSPARSELt for
CUDA tensors alone (tests/test_cuda.py); here plain torch stands in for it on the CPU, and is as strict."""

import dataclasses
import json

import pytest
import torch
from support import assert_within_budget
from torch import nn
from torch.nn import functional as F

import pyvtk
from pyvtk import backends, sparse24
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24 import cost

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
HALVES = (torch.bfloat16, torch.float16)
WHY_NOT = backends.why_not_cusparselt


def pack(dense):
    """[N, 9 K / 16]: our values and metadata, which have just the size of cuSPARSELt's."""
    assert dense.dtype in HALVES and dense.is_contiguous() and not any(size % 16 for size in dense.shape)
    values, metadata = reference.compress(dense, reference.prune_n_of_m(dense.abs(), 2, 4))
    return torch.cat([values, metadata.view(dense.dtype)], 1)


@pytest.fixture
def products(monkeypatch, tmp_path):
    """What the stand-in was asked for: (rows, has a bias) of each call."""
    seen = []

    def multiply(packed, x, bias=None, alpha=None, out_dtype=None, transpose_result=False, *algorithm):
        columns, rows = x.shape
        assert packed.dtype == x.dtype in HALVES and packed.is_contiguous() and packed.shape[1] == columns * 9 // 16
        assert rows % 8 == columns % 16 == packed.shape[0] % 16 == x.data_ptr() % 16 == 0 and x.T.is_contiguous()
        assert alpha is None and out_dtype is None and transpose_result and algorithm in ((), (0,), (0, 1), (0, 1, -1))
        assert bias is None or bias.dtype == x.dtype
        seen.append((rows, bias is not None))
        values, metadata = packed.split([columns // 2, columns // 16], 1)
        dense = reference.decompress(values, metadata.contiguous().view(torch.uint8))
        return F.linear(x.T.float(), dense.float(), None if bias is None else bias.float()).to(x.dtype)

    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "why_not_cusparselt", lambda device: None)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_cslt_compress", pack, "CPU")
        library.impl("_cslt_sparse_mm", multiply, "CPU")
        yield seen


def weight(rows=32, columns=64, dtype=torch.bfloat16, choice=(0, 0, 8, 3)):
    dense = torch.randn(rows, columns).to(dtype)
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    weight24.choice = choice
    return weight24


def check(x, weight24, bias=None, activation="none", mul=None, **call):
    actual = sparse24.linear(x, weight24, bias, activation, mul, **call)
    assert actual.dtype == x.dtype and actual.is_contiguous()

    def plain(dtype):
        z = F.linear(x.to(dtype), weight24.decompress().to(dtype), None if bias is None else bias.to(dtype))
        z = reference.activate(z, activation)
        return z if mul is None else z * mul.to(dtype)

    assert_within_budget(actual, plain(torch.float64), plain(x.dtype))
    return actual


# The product


@needs_kernels
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("rows", (8, 13, 40, 577))
def test_any_rows(rows, dtype, products):
    """Ragged rows, rows apart and rows that are not aligned are copied; others are not."""
    weight24 = weight(dtype=dtype)
    check(torch.randn(rows, 64).to(dtype), weight24)
    check(torch.randn(rows, 72).to(dtype)[:, :64], weight24)
    check(torch.randn(rows * 64 + 1).to(dtype)[1:].reshape(rows, 64), weight24)
    assert products == [((rows + 7) // 8 * 8, False)] * 3


@needs_kernels
def test_epilogues(products):
    """A bias of x's dtype goes in; the rest comes after."""
    weight24, x = weight(), torch.randn(2, 10, 64).bfloat16()
    bias, mul = torch.randn(32), torch.randn(2, 10, 32).bfloat16()
    check(x, weight24, bias.bfloat16())
    check(x, weight24, bias)
    check(x, weight24, None, "silu", mul)
    assert products == [(24, True), (24, False), (24, False)]
    assert check(x, weight24, bias, "gelu", mul).shape == (2, 10, 32)
    assert sparse24.linear(x[:, :0], weight24).shape == (2, 0, 32) and len(products) == 4


@needs_kernels
def test_int8_weights_are_packed_in_the_dtype_of_x(products):
    weight24 = sparse24.quantize(weight(dtype=torch.float32))
    weight24.choice = (0, 3)
    x = torch.randn(16, 64).bfloat16()
    check(x, weight24)
    assert products == [(16, False)] and weight24.vendor.dtype == torch.bfloat16
    assert sparse24.linear(x.float(), weight24).dtype == torch.float32 and len(products) == 1


@needs_kernels
def test_gradients(products):
    weight24 = weight()
    x, bias, mul = (torch.randn(s).bfloat16().requires_grad_() for s in ((16, 64), (32,), (16, 32)))
    out = sparse24.linear(x, weight24, bias, "relu", mul)
    assert products == [(16, True)]
    expected = torch.relu(F.linear(x, weight24.decompress(), bias)) * mul
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.float().sum(), (x, bias, mul)) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02)


@needs_kernels
def test_opcheck(products):
    weight24 = weight()
    parts = (weight24.values, weight24.metadata, None, None, torch.randn(32), None, "relu", [0, 3])
    torch.library.opcheck(
        torch.ops.pyvtk.sparse24_linear, (torch.randn(16, 64).bfloat16(), *parts, weight24.cache_vendor())
    )
    assert products


@needs_kernels
@pytest.mark.parametrize("made", (False, True))
def test_compiles_whole(made, products):
    """One operator, whatever the rows. Nothing is packed while torch.compile looks: what is there is used."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    weight24, counter = weight(), CompileCounterWithBackend("aot_eager")
    if made:
        weight24.cache_vendor()
    compiled = torch.compile(lambda x: sparse24.linear(x, weight24), fullgraph=True, dynamic=True, backend=counter)
    for rows in (3, 9, 16, 40):
        x = torch.randn(rows, 64).bfloat16()
        torch.testing.assert_close(compiled(x), F.linear(x, weight24.decompress()))
    assert counter.frame_count == 1 and (weight24.vendor is not None) == made
    assert products == ([(16, False), (16, False), (40, False)] if made else [])


# What is kept


@needs_kernels
def test_made_at_first_need_and_kept(products):
    weight24 = weight()
    small = weight24.nbytes
    check(torch.randn(7, 64).bfloat16(), weight24)
    check(torch.randn(8, 64).bfloat16(), weight24, dense_fallback="never")
    assert weight24.vendor is None and weight24.nbytes == small and not products
    check(torch.randn(8, 64).bfloat16(), weight24)
    first = weight24.vendor
    check(torch.randn(64, 64).bfloat16(), weight24)
    assert weight24.vendor is first and weight24.nbytes == small + 32 * 64 * 2 * 9 // 16 and "vendor" in repr(weight24)
    assert "vendor" not in weight24.state_dict() and weight24.to(torch.float16).vendor is None
    weight24.values.mul_(2)
    weight24.cache_dense()  # drops what is out of date, not only its own
    assert weight24.vendor is None
    check(torch.randn(8, 64).bfloat16(), weight24)
    assert weight24.vendor is not first and weight24.dense is not None
    weight24.drop_dense()
    assert weight24.nbytes == small
    trained = sparse24.Sparse24Weight(weight24.values.clone().requires_grad_(), weight24.metadata, choice=(0, 3))
    sparse24.linear(torch.randn(8, 64).bfloat16(), trained).sum().backward()
    assert trained.vendor is None and trained.values.grad is not None and len(products) == 3


@needs_kernels
def test_the_module_drops_what_it_loads_over(products):
    layer = sparse24.Sparse24Linear(weight(), torch.randn(32))
    x, before = torch.randn(16, 64).bfloat16(), layer.nbytes
    expected = layer(x) - layer.bias.bfloat16()
    assert layer.nbytes == before + 32 * 64 * 2 * 9 // 16 and set(layer.state_dict()) == {
        "values", "metadata", "bias", "format_version"
    }  # fmt: skip
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state["values"] *= 2
    layer.load_state_dict(state | {"bias": torch.zeros(32)})
    assert layer.nbytes == before
    torch.testing.assert_close(layer(x), 2 * expected, rtol=0.02, atol=0.02)


# What does not fit


@needs_kernels
@pytest.mark.parametrize(
    "out, inside, dtype, reason",
    [
        (40, 64, torch.bfloat16, "takes weights in multiples of 16, not 40 x 64"),
        (32, 72, torch.float16, "takes weights in multiples of 16, not 32 x 72"),
        (0, 64, torch.float16, "takes weights in multiples of 16, not 0 x 64"),
        (32, 64, torch.float32, "is used for bfloat16 and float16, not torch.float32"),
    ],
)
def test_a_sparse_kernel_stands_in(out, inside, dtype, reason, products):
    weight24 = weight(out, inside, dtype, choice=(0, 3))
    for rows in (1, 40):
        check(torch.randn(rows, inside).to(dtype), weight24)
    assert weight24.vendor is None and not products
    with pytest.raises(RuntimeError, match=f"the vendor's kernel cannot run: cuSPARSELt {reason}"):
        weight24.cache_vendor()
    if out:
        assert "vendor" not in sparse24.estimate(64, out, inside, dtype, "H100").seconds


def test_without_the_library():
    """On this CPU it is never there."""
    weight24 = weight(choice=(0, 3))
    check(torch.randn(40, 64).bfloat16(), weight24)
    assert weight24.vendor is None
    with pytest.raises(RuntimeError, match="cannot run: cuSPARSELt multiplies on CUDA, not on cpu"):
        weight24.cache_vendor()
    assert "vendor" not in sparse24.estimate(64, 32, 64, torch.bfloat16).seconds
    facts = pyvtk.info()
    assert facts["cusparselt"] == WHY_NOT("cuda")
    if torch.version.cuda is None:
        assert facts["cusparselt"].endswith("is a build without cuSPARSELt")


@pytest.mark.parametrize(
    "message, options",
    [
        ("vendor must be given where choice has kernel 3 (vendor), got None", {"choice": (0, 3)}),
        ("vendor must have 2 dimensions", {"vendor": torch.zeros(4).bfloat16()}),
        ("vendor must have dtype bfloat16, got float16", {"vendor": torch.zeros(32, 36).half()}),
        ("choice must be pairs", {"choice": (0, 4)}),
    ],
)
def test_wrong_calls_name_the_argument(message, options):
    weight24 = weight()
    with pytest.raises((ValueError, TypeError)) as error:
        ops.linear(torch.zeros(3, 64).bfloat16(), weight24.values, weight24.metadata, **options)
    assert message in str(error.value)


@needs_kernels
def test_the_binding_guards_what_it_hands_over(products):
    weight24, x = weight(), torch.zeros(8, 64).bfloat16()
    packed = weight24.cache_vendor()
    for wrong in (packed[:16], packed.half(), packed[:, ::2], None):
        with pytest.raises(RuntimeError, match="vendor"):
            torch.ops.pyvtk.sparse24_linear(
                x, weight24.values, weight24.metadata, None, None, None, None, "none", [0, 3], wrong
            )
    assert not products


# What it costs


@pytest.mark.parametrize("name", ["H100", "H200"])
def test_on_hopper_a_guess_counts_but_costs_no_memory(name):
    found = sparse24.estimate(2950, 11008, 4096, torch.bfloat16, name)
    assert found.seconds["dense"] < min(found.seconds["vendor"], found.seconds["many"])
    assert found.kernel == "dense" and found.speedup < 1 and 3 not in found.choice[1::2]
    even = sparse24.estimate(2952, 11008, 4096, torch.bfloat16, name)
    assert even.seconds["vendor"] < found.seconds["vendor"]  # ragged rows are copied


@needs_kernels
def test_measured_it_is_chosen(products):
    """calibrate measures it, estimate reads it, sparsify_ and the module use it."""
    sparse24.calibrate(dtypes=(torch.bfloat16,), rows=(1, 16, 64), shapes=((32, 64), (20, 64)), seconds=1e-4)
    path = sparse24.table_path()
    stored = json.loads(path.read_text())
    (entry,) = stored["seconds"]["bfloat16"]["vendor"]
    assert entry["shape"] == [32, 64] and entry["rows"] == [16, 64] and products
    for kernel, seconds in {"few": 1e-3, "many": 2e-3, "dense": 4e-3}.items():
        for measured in stored["seconds"]["bfloat16"][kernel]:
            measured["seconds"] = [seconds * rows for rows in measured["rows"]]
    entry["seconds"] = [1e-3, 2e-3]
    path.write_text(json.dumps(stored))
    cost._tables.clear()
    found = sparse24.estimate(64, 32, 64, torch.bfloat16)
    assert found.source == "measured" and found.kernel == "vendor" and found.speedup > 10 and found.choice[-1] == 3
    assert "vendor" not in sparse24.estimate(64, 20, 64, torch.bfloat16).seconds
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 20)).bfloat16()
    reports = sparse24.sparsify_(model, rows=64)
    assert [r.kernel for r in reports] == ["vendor", "few"] and all(r.converted for r in reports)
    del products[:]
    model(torch.randn(64, 64).bfloat16())
    assert products == [(64, True)] and model[0].weight24.vendor is not None


@needs_kernels
def test_sparsify_says_that_it_was_not_measured(products, monkeypatch):
    guess = sparse24.estimate(2950, 4096, 4096, torch.bfloat16, "H100")
    guess = dataclasses.replace(guess, seconds={**guess.seconds, "vendor": guess.seconds["dense"] / 2})
    monkeypatch.setattr("pyvtk.sparse24.sparsify.estimate", lambda *_: guess)
    (report,) = sparse24.sparsify_(nn.Sequential(nn.Linear(64, 32).bfloat16()), rows=2950)
    assert report.reason.endswith("(analytic estimate); the vendor's kernel may not be, and counts once calibrate has "
                                  "measured it")  # fmt: skip
