"""2:4 weights without numbers (meta, fake), and factories under another default device or dtype."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

from pyvtk import backends, sparse24
from pyvtk.reference import sparse24 as reference

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
OPTIONS = {
    "sr_ste": {},
    "transposable": {"transposable": True},
    "decay": {"method": "decay", "beta": sparse24.LinearDecay(0.5)},
    "structure": {"method": "ste", "patterns": sparse24.structure_decay(2)},
    "int8": {"int8": True},
}


def of_numbers(dtype=torch.float32):
    dense = torch.randn(12, 16)
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    return sparse24.quantize(weight24) if dtype == torch.int8 else weight24


def places():
    """name -> (context to work in, device to name)"""
    return {
        "device": (torch.device("cpu"), "meta"),
        "context": (torch.device("meta"), None),
        "fake": (FakeTensorMode(), None),
    }


# Layers that are built before there is memory


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("place", ("device", "context"))
def test_a_layer_on_meta_gets_memory_and_numbers(place, options):
    trained = sparse24.Linear24(16, 12, **OPTIONS[options])
    for _ in range(3):
        trained.step()
    context, device = places()[place]
    with context:
        module = sparse24.Linear24(16, 12, **OPTIONS[options], device=device)
    assert module.weight.is_meta and module.mask.is_meta and module(torch.ones(3, 16, device="meta")).shape == (3, 12)
    module.step()  # nothing to choose
    loaded = module.to_empty(device="cpu")
    with pytest.raises(ValueError, match=r"refresh\(\) chooses it anew. mask must be"):
        loaded(torch.ones(3, 16))
    loaded.load_state_dict(trained.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(loaded(x), trained(x)) and loaded.sparse == trained.sparse
    for one in (loaded, trained):
        one.step()
    assert torch.equal(loaded(x), trained(x)) and int(loaded.steps) == 4


def test_assigned_state():
    trained = sparse24.Linear24(16, 12)
    module = sparse24.Linear24(16, 12, device="meta")
    module.load_state_dict(trained.state_dict(), assign=True)
    module.left = module.left.new_zeros((), device="cpu")  # not in a state dict, as any buffer that is not persistent
    x = torch.randn(5, 16)
    assert torch.equal(module(x), trained(x))


def test_empty_memory_and_refresh():
    """Weights of one's own instead of a state dict."""
    module = sparse24.Linear24(16, 12, device="meta").to_empty(device="cpu")
    assert int(module.steps) == 0 and float(module.left) == 0
    with torch.no_grad():
        module.weight.copy_(torch.randn(12, 16))
        module.bias.zero_()
    module.refresh()
    x = torch.randn(5, 16)
    torch.testing.assert_close(module(x), x @ (module.weight * module.mask).T)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_layer_of_fake_tensors(options):
    with FakeTensorMode():
        module = sparse24.Linear24(16, 12, **OPTIONS[options])
        y = module(torch.randn(3, 16, requires_grad=True))
        assert is_fake(y) and y.shape == (3, 12)
        y.sum().backward()
        assert module.weight.grad.shape == (12, 16)
        module.step()
        module.load_state_dict(module.state_dict())
        assert sparse24.Linear24.from_linear(nn.Linear(16, 12))(torch.randn(3, 16)).shape == (3, 12)
        assert sparse24.Sparse24Linear(of_numbers())(torch.randn(3, 16)).shape == (3, 12)


@pytest.mark.parametrize("place", ("device", "context"))
def test_layers_for_inference(place):
    layer = sparse24.Sparse24Linear(of_numbers(torch.int8), torch.randn(12), x_scale="row")
    with places()[place][0]:
        empty = sparse24.Sparse24Linear(
            of_numbers(torch.int8).to("meta"), torch.zeros(12, device="meta"), x_scale="row"
        )
    x = torch.randn(3, 16)
    copied = copy.deepcopy(empty).to_empty(device="cpu")
    assert copied.state_dict()["format_version"].tolist() == [1]
    copied.load_state_dict(layer.state_dict())
    empty.load_state_dict(layer.state_dict(), assign=True)
    for loaded in (copied, empty):
        assert torch.equal(loaded(x), layer(x))


# Models


def dense_model(**where):
    return nn.Sequential(nn.Linear(16, 12, **where), nn.BatchNorm1d(12, **where), nn.Linear(12, 6, **where))


@pytest.mark.parametrize("place", ("device", "context"))
def test_load_sparsified_into_meta(place):
    """Compressed layers and the rest get memory where their tensors are, in the dtype of the model."""
    model = dense_model()
    model[0] = sparse24.Sparse24Linear(of_numbers(), torch.randn(12))
    model(torch.randn(4, 16))
    context, device = places()[place]
    with context:
        empty = dense_model() if device is None else dense_model(device=device)
    empty[2].weight.requires_grad_(False)
    sparse24.load_sparsified_(empty, model.state_dict())
    x = torch.randn(5, 16)
    assert torch.equal(empty.eval()(x), model.eval()(x)) and not empty[2].weight.requires_grad
    assert isinstance(empty[0], sparse24.Sparse24Linear) and empty[2].weight is not model[2].weight
    model[2].weight.data.zero_()
    assert not torch.equal(empty(x), model(x))  # copies, as of load_state_dict


def test_load_sparsified_keeps_what_is_shared_and_what_is_real():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "real": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    state["b.weight"] = state["a.weight"]
    model["a"].to("meta")
    model["b"].weight, real = model["a"].weight, model["real"].weight
    sparse24.load_sparsified_(model, state)
    assert model["a"].weight is model["b"].weight and model["real"].weight is real
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_load_sparsified_into_meta_is_all_or_nothing():
    model = dense_model()
    model[0] = sparse24.Sparse24Linear(of_numbers(), torch.randn(12))
    state = model.state_dict()
    del state["2.bias"]
    empty = dense_model(device="meta")
    before = dict(empty.named_parameters())
    with pytest.raises(RuntimeError, match=r"2\.bias"):
        sparse24.load_sparsified_(empty, state)
    assert all(tensor is before[name] for name, tensor in empty.named_parameters()) and type(empty[0]) is nn.Linear


@needs_kernels
def test_sparsify_of_a_model_partly_on_meta(monkeypatch):
    faster = sparse24.Estimate({"few": 1.0, "dense": 2.0}, "few", 2.0, "measured", (0, 0))
    monkeypatch.setattr("pyvtk.sparse24.sparsify.estimate", lambda *_: faster)
    model = nn.Sequential(nn.Linear(16, 12), nn.Linear(12, 16, device="meta"))
    with FakeTensorMode():
        model.append(nn.Linear(16, 16))
    for context in (torch.device("cpu"), torch.device("meta")):
        changed = copy.deepcopy(model[:2])
        with context:
            reports = sparse24.sparsify_(changed, rows=1)
        assert [(r.converted, r.reason) for r in reports] == [(True, None), (False, "its weight is on the meta device")]
        assert changed[0](torch.ones(1, 16, device="cpu")).device.type == "cpu"
    assert (
        sparse24.sparsify_(model, rows=1)[2].reason
        == "its weight is a FakeTensor, which is more than a matrix of numbers"
    )


# Functions


def calls():
    """name -> what a call gives, of a weight on its default device"""
    w = lambda: torch.randn(12, 16)  # noqa: E731
    compress = lambda: sparse24.compress(w(), sparse24.prune(w()))  # noqa: E731
    return {
        "prune": lambda: sparse24.prune(w()),
        "prune by scores": lambda: sparse24.prune(w(), w(), transposable=True),
        "compress": lambda: sparse24.compress(torch.zeros(12, 16)),
        "compress by mask": compress,
        "quantize": lambda: sparse24.quantize(compress()),
        "decompress": lambda: compress().decompress(),
        "state dict": lambda: sparse24.Sparse24Weight.from_state_dict(compress().state_dict()),
        "to": lambda: compress().to(torch.bfloat16),
        "linear": lambda: sparse24.linear(torch.randn(3, 16), compress(), torch.randn(12), "silu", torch.randn(3, 12)),
        "linear_int8": lambda: sparse24.linear_int8(torch.randn(3, 16), sparse24.quantize(compress())),
        "fake_quantize": lambda: sparse24.fake_quantize(w()),
    }


@pytest.mark.parametrize("place", ("context", "fake"))
@pytest.mark.parametrize("name", calls())
def test_shapes_without_numbers(name, place):
    expected = calls()[name]()
    with places()[place][0]:
        actual = calls()[name]()
    if isinstance(expected, sparse24.Sparse24Weight):
        pairs = [(actual.values, expected.values), (actual.metadata, expected.metadata)]
    else:
        pairs = [(actual, expected)]
    for without, with_numbers in pairs:
        assert without.shape == with_numbers.shape and without.dtype == with_numbers.dtype
        assert without.is_meta or is_fake(without)


@pytest.mark.parametrize("place", ("context", "fake"))
def test_copies_of_no_numbers_are_one_clear_error(place):
    with places()[place][0]:
        weight24 = sparse24.compress(torch.zeros(12, 16))
        for make in (weight24.cache_dense, weight24.with_transpose):
            with pytest.raises(RuntimeError, match="got a tensor without numbers"):
                make()
        weight24.choice = (0, 2)
        assert sparse24.linear(torch.randn(3, 16), weight24).shape == (3, 12)


@pytest.fixture(params=["meta", "bfloat16"])
def other_default(request):
    """What code must not rely on, while tensors with numbers are on the CPU, in float32."""
    if request.param == "meta":
        with torch.device("meta"):
            yield
    else:
        torch.set_default_dtype(torch.bfloat16)
        yield
        torch.set_default_dtype(torch.float32)


def on_cpu(*shape):
    generator = torch.Generator("cpu").manual_seed(3)
    return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float32)


def results():
    """Of calls that make tensors of their own."""
    weight = on_cpu(12, 16)
    mask = sparse24.prune(weight, transposable=True)
    both = sparse24.compress(weight, mask).with_transpose()
    x = on_cpu(3, 16).requires_grad_()
    y = sparse24.linear(x, both)
    (grad,) = torch.autograd.grad(y.sum(), x)
    quantized = sparse24.quantize(both)
    observer = sparse24.ActivationObserver()
    observer.update(x)
    layer = sparse24.Sparse24Linear(quantized, on_cpu(12), x_scale="row")
    linear = nn.Linear(16, 12, device="cpu", dtype=torch.float32)
    linear.weight, linear.bias = nn.Parameter(on_cpu(12, 16)), nn.Parameter(on_cpu(12))
    tensors = [mask, y, grad, quantized.scales, sparse24.fake_quantize(x), observer.scale(), layer(x.detach())]
    tensors += [*layer.state_dict().values(), *both.state_dict().values(), reference.transposable_patterns()]
    for options in OPTIONS.values():
        module = sparse24.Linear24.from_linear(linear, **options)
        tensors.append(module(x))
        module.step()
        tensors += [module(x), module.left, module.masked_weight(), *module.state_dict().values()]
        copied = copy.deepcopy(module)
        copied.load_state_dict(module.state_dict())
        tensors.append(copied(x))
    return [tensor.detach() for tensor in tensors]


def test_nothing_follows_the_default(other_default):
    actual = results()
    with torch.device("cpu"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        expected = results()
        torch.set_default_dtype(before)
    for a, e in zip(actual, expected, strict=True):
        assert a.device == e.device and a.dtype == e.dtype and torch.equal(a, e)


@needs_kernels
def test_estimate_and_calibrate_under_another_default(other_default, monkeypatch, tmp_path):
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path))
    sparse24.calibrate(dtypes=(torch.float32, torch.int8), rows=(1, 4), shapes=((16, 16),), seconds=1e-4)
    assert sparse24.estimate(3, 16, 16).source == "measured"


def test_decay_in_a_default_of_16_bits():
    """beta(1) = 1 - 0.001 has no such number in bfloat16."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        module = sparse24.Linear24(16, 12, method="decay", beta=sparse24.LinearDecay(0.001), dtype=torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    module.step()
    assert module.left.dtype == torch.float32 and module.left == torch.tensor(0.999)
    expected = torch.where(module.mask, module.weight, module.weight * 0.999)
    assert torch.equal(module.masked_weight(), expected)
    x = torch.randn(3, 16)
    torch.testing.assert_close(module(x), x @ expected.T + module.bias)
    half = module.bfloat16()
    assert half.left.dtype == torch.float32
    rounded = (half.weight.float() * torch.where(half.mask, 1, 0.999)).bfloat16()  # once
    assert torch.equal(half.masked_weight(), rounded)
