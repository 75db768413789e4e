"""What an accelerated forward pass costs besides arithmetic: waits of the host for the device, and launches."""

import collections
import dataclasses

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

from adapter_cases import CACHE, CASES, METHODS, alone, inputs_of, model_of
from tiny_models import NAMES, PINPOINTS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import pyvtk
from pyvtk import checks
from pyvtk.integrations import transformers as vtk
from pyvtk.integrations.transformers import masks, models

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "equal",
    "is_nonzero",
    "masked_select",
    "unique",
    "_unique2",
}
BAR = 15  # operators of a stage


class Waits(TorchDispatchMode):
    """Records what would make the host wait if tensors were on a GPU, and during which decoder layer (-1: before)."""

    def __init__(self, model):
        super().__init__()
        self.seen, self.layer = [], -1
        self.layers = model.model.language_model.layers
        self.lists = Lists(self)

    def __enter__(self):
        def entered(layer, args):
            self.layer = list(self.layers).index(layer)

        self.hooks = [layer.register_forward_pre_hook(entered, prepend=True) for layer in self.layers]
        self.lists.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.lists.__exit__(*error)
        for hook in self.hooks:
            hook.remove()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        indices = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        counted = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or counted or any(x is not None and x.dtype == torch.bool for x in indices):
            self.seen.append((name, self.layer))
        return function(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Tensor.tolist and copies to the host, which reach no operator where tensors are there already."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self.waits.seen.append((function.__name__, self.waits.layer))
        return function(*args, **(kwargs or {}))


def waits_of(model, inputs, **options):
    with Waits(model) as waits, torch.no_grad():
        output = model(**inputs, **options)
    return collections.Counter(waits.seen), output


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Checks of values are made on the host for CPU tensors, and on the device for others."""
    monkeypatch.setattr(checks, "_can_look_at", lambda value: False)


@pytest.mark.parametrize(("name", "key"), CASES)
@pytest.mark.parametrize("padding", ["none", "right"])
def test_the_host_waits_once(name, key, padding, as_on_cuda):
    model = model_of(name)
    inputs = alone(name, 2) if padding == "none" else inputs_of(name, padding)
    with vtk.accelerate(model, METHODS[key]):
        waits, output = waits_of(model, inputs, use_cache=True)
    dense, _ = waits_of(model, inputs, use_cache=True)
    # Transformers waits too. It does so for sizes of anyres images, one by one; a method that needs to know where their
    # tokens stand fetches them at once.
    ours = waits - dense
    assert ours == {("tolist", -1): 1} or (name in PINPOINTS and not ours), ours

    # and never behind the prompt
    cache, batch = getattr(output, CACHE), len(inputs["input_ids"])
    step = {"input_ids": torch.full((batch, 1), 5), CACHE: cache}
    step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    step["position_ids"] = inputs["attention_mask"].sum(1, keepdim=True)
    with vtk.accelerate(model, METHODS[key]):
        waits, _ = waits_of(model, step)
    _, output = waits_of(model, inputs, use_cache=True)
    dense, _ = waits_of(model, {**step, CACHE: getattr(output, CACHE)})
    assert not waits - dense, waits - dense


def test_a_wait_is_seen():
    """The counter counts: each of these would wait."""
    model = model_of("llava")
    with Waits(model) as waits:
        x = torch.arange(3)
        x.tolist(), x[0].item(), bool(x[1] > 0), x[x > 1], x.nonzero(), torch.equal(x, x), x.cpu()
        x.clone()[x > 1] = x[:1]
        int(x[2])
    names = [name for name, _ in waits.seen]
    assert names.count("tolist") == names.count("cpu") == names.count("equal") == names.count("nonzero") == 1
    assert names.count("_local_scalar_dense") == 3 and len(names) == 9


# Launches


class Launches(TorchDispatchMode):
    """Counts operators that are no views, but for those inside of what :meth:`without` names."""

    def __init__(self):
        super().__init__()
        self.names, self.paused = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not self.paused and not view(function):
            self.names[str(function)] += 1
        return out

    def without(self, function):
        def inside(*args, **kwargs):
            self.paused += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.paused -= 1

        return inside


def view(function) -> bool:
    """Whether it launches nothing: its results share memory with its arguments, or is a reshape that may."""
    returns = function._schema.returns
    shared = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return shared or function._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh")


@dataclasses.dataclass(frozen=True)
class Repeated(vtk.FastV):
    """FastV, several times: positions stay."""

    layers: tuple[int, ...] = (2,)

    def stages(self, num_layers):
        return [dataclasses.replace(super(Repeated, self).stages(num_layers)[0], layer=x) for x in self.layers]

    def num_keep(self, stage, there, prompt):
        return there // 2


@dataclasses.dataclass(frozen=True)
class Cut(vtk.FastV):
    """All visual tokens leave, and nobody is asked."""

    layers: tuple[int, ...] = (2,)

    def stages(self, num_layers):
        return [vtk.Stage(layer) for layer in self.layers]

    def num_keep(self, stage, there, prompt):
        return 0

    def select(self, stage, context):
        return pyvtk.Selection.from_mask(~context.visual & valid_of(context), capacity=context.capacity, align="right")


def valid_of(context):
    return torch.ones_like(context.visual) if context.valid is None else context.valid


def launches(name, method, batch, use_cache, monkeypatch):
    """Operators of a forward pass, without masks, projections (with their norms), rotations and the tables for them."""
    model, inputs = model_of(name), alone(name, 2) if batch == 1 else inputs_of(name)
    counter = Launches()
    with monkeypatch.context() as patch, torch.no_grad(), vtk.accelerate(model, method):
        for module, function in ((masks, "causal"), (models, "project"), (models, "rotate")):
            patch.setattr(module, function, counter.without(getattr(module, function)))
        rotary = model.model.language_model.rotary_emb
        patch.setattr(rotary, "forward", counter.without(rotary.forward))
        for layer in model.model.language_model.layers:
            patch.setattr(layer.input_layernorm, "forward", counter.without(layer.input_layernorm.forward))
        with counter:
            model(**inputs, use_cache=use_cache)
    return counter.names


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize(
    ("fewer", "more"),
    [
        (Repeated(layers=(2,)), Repeated(layers=(2, 4))),
        (vtk.PyramidDrop((1, 2), (0.5, 0.25)), vtk.PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125))),
        (Cut(layers=(2,)), Cut(layers=(2, 4))),
    ],
    ids=["FastV", "PyramidDrop", "cut"],
)
def test_operators_of_a_stage(name, batch, use_cache, fewer, more, monkeypatch, record_property):
    """What one stage more adds."""
    added = launches(name, more, batch, use_cache, monkeypatch)
    added -= launches(name, fewer, batch, use_cache, monkeypatch)
    record_property("operators", sum(added.values()))
    assert sum(added.values()) <= BAR, f"{sum(added.values())} operators: {dict(added)}"


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_step_of_a_cache_that_lacks_nothing_adds_nothing(name, monkeypatch):
    """Below the first stage layers run as they do without an adapter."""
    model, inputs = model_of(name), inputs_of(name)

    def count(method):
        counter = Launches()
        with torch.no_grad():
            handle = method and vtk.accelerate(model, method)
            cache = getattr(model(**inputs, use_cache=True), CACHE)
            step = {"input_ids": torch.full((4, 1), 5), CACHE: cache}
            step["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
            step["position_ids"] = inputs["attention_mask"].sum(1, keepdim=True)
            with counter:
                model(**step)
            if handle:
                handle.remove()
        return counter.names

    dense = count(None)
    assert count(vtk.YOPO(1)) == dense
    added = count(METHODS["FastV"]) - dense
    assert sum(added.values()) <= 3, added  # the mask: padding that stays visible is none of the model's business
