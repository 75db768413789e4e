"""Copies of a 2:4 weight, and Linear24's mask: what else writes to their tensors is seen, and nothing old is used."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from pyvtk import backends, sparse24
from pyvtk.ops import sparse24 as ops

WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")


def weight(rows=12, columns=16, **options):
    dense = torch.randn(rows, columns)
    weight24 = sparse24.compress(dense, sparse24.prune(dense, **options))
    weight24.choice = (0, 2)
    return weight24


@pytest.fixture
def vendor(monkeypatch):
    """Its form is the dense weight; no product takes it."""
    monkeypatch.setattr("pyvtk.sparse24.vendor.why_not", lambda *_: None)
    monkeypatch.setattr("pyvtk.sparse24.vendor.pack", torch.Tensor.clone)


def mirrored(metadata):
    """Metadata of the same groups with the kept positions mirrored (p0, p1 -> 3 - p1, 3 - p0)."""
    positions = [[3 - (nibble >> 2), 3 - (nibble & 3)] for nibble in range(16)]
    table = torch.tensor([first & 3 | (second & 3) << 2 for first, second in positions], dtype=torch.uint8)
    return table[(metadata & 15).long()] | table[(metadata >> 4).long()] << 4


def step(optimizer, **options):
    def edit(w):
        values = w.values.requires_grad_()
        sparse24.linear(torch.randn(3, 16), w).sum().backward()
        optimizer([values], lr=0.5, **options).step()
        values.requires_grad_(False)

    return edit


def assign(name, change):
    return lambda w: setattr(w, name, change(getattr(w, name)))


def in_inference_mode(w):
    with torch.inference_mode():
        w.values.mul_(2)


# another tensor with the version that the one before it has
OTHER = {
    "values": lambda t: torch.empty_like(t).copy_(2 * t) if t._version else 2 * t,
    "view": lambda t: (2 * t).view_as(t),
}
EDITS = {
    "values in place": lambda w: w.values.mul_(2),
    "a view of values": lambda w: w.values.view(-1)[3:].add_(1),
    "values by foreach": lambda w: torch._foreach_mul_([w.values], 2),
    "values in inference mode": in_inference_mode,
    "metadata in place": lambda w: w.metadata.copy_(mirrored(w.metadata)),
    "other values": assign("values", OTHER["values"]),
    "a view of other values": assign("values", OTHER["view"]),
    "other metadata": assign("metadata", mirrored),
    "other memory": lambda w: setattr(w.values, "data", 2 * w.values),
    "SGD": step(torch.optim.SGD, foreach=False),
    "SGD, foreach": step(torch.optim.SGD, foreach=True),
    "SGD, fused": step(torch.optim.SGD, fused=True),
    "Adam, foreach": step(torch.optim.Adam, foreach=True),
    "Adam, fused": step(torch.optim.Adam, fused=True),
    "declared": lambda w: (w.values.data.mul_(2), w.drop_copies()),
}


@pytest.mark.parametrize("edit", EDITS)
def test_no_copy_outlives_an_edit(edit, vendor):
    weight24 = weight(transposable=True).with_transpose()
    before = weight24.cache_dense().clone()
    weight24.cache_vendor()
    assert all(getattr(weight24, name) is not None for name in ("dense", "vendor", "transposed"))
    EDITS[edit](weight24)
    expected = ops.decompress(weight24.values, weight24.metadata)
    assert not torch.equal(expected, before)
    assert weight24.nbytes == 12 * 8 * 4 + 12 * 2
    assert weight24.dense is weight24.vendor is weight24.transposed is None
    assert torch.equal(weight24.cache_dense(), expected) and torch.equal(weight24.cache_vendor(), expected)


@pytest.mark.parametrize("edit", EDITS)
def test_products_and_gradients_follow(edit):
    weight24 = weight(transposable=True).with_transpose()
    x = torch.randn(5, 16, requires_grad=True)
    sparse24.linear(x, weight24)  # with the transpose, and makes the dense copy
    with torch.no_grad():
        sparse24.linear(x, weight24)
    EDITS[edit](weight24)
    y = sparse24.linear(x, weight24)
    expected = x @ ops.decompress(weight24.values, weight24.metadata).T
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in (y, expected)))


@pytest.mark.parametrize(
    "edit", [lambda w: w.scales.mul_(2), assign("scales", lambda t: 2 * t)], ids=["in place", "others"]
)
def test_scales_count_too(edit):
    weight24 = sparse24.quantize(weight())
    before = weight24.cache_dense().clone()
    edit(weight24)
    assert weight24.dense is None and torch.equal(weight24.cache_dense(), 2 * before)


def test_a_copy_that_was_written_to_is_made_again():
    weight24 = weight(transposable=True).with_transpose()
    expected = weight24.cache_dense().clone()
    weight24.cache_dense().mul_(2)
    assert torch.equal(weight24.cache_dense(), expected)
    again = weight24.with_transpose()
    again.transposed.values.mul_(2)
    assert again.transposed is None


TRAVELS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "replace": dataclasses.replace,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "pytree": lambda w: pytree.tree_map(lambda t: t, w),
    "state dict": lambda w: sparse24.Sparse24Weight.from_state_dict(w.state_dict()),
    "to": lambda w: w.to(torch.bfloat16),
}


@pytest.mark.parametrize("how", TRAVELS)
def test_copies_stay_behind(how, vendor):
    weight24 = weight()
    weight24.cache_dense()
    weight24.cache_vendor()
    moved = TRAVELS[how](weight24)
    assert moved.dense is moved.vendor is moved.transposed is None and weight24.dense is not None
    assert how == "state dict" or moved.choice == (0, 2)
    moved.values.mul_(3)
    x = torch.randn(3, 16).to(moved.dtype)
    torch.testing.assert_close(sparse24.linear(x, moved), x @ moved.decompress().T)
    assert set(dataclasses.asdict(weight24)) == {"values", "metadata", "scales", "choice"}


def test_what_an_earlier_version_pickled():
    """It held copies and their version as fields."""
    weight24 = weight()
    old = object.__new__(sparse24.Sparse24Weight)
    state = {"values": weight24.values, "metadata": weight24.metadata, "scales": None, "choice": (0, 2)}
    old.__setstate__(state | {"dense": torch.ones(12, 16), "transposed": None, "vendor": None, "_copied_version": 0})
    assert old.dense is None and torch.equal(old.decompress(), weight24.decompress())


def test_the_transpose_moves_along():
    weight24 = weight(transposable=True).with_transpose()
    half = weight24.to(torch.bfloat16)
    assert torch.equal(half.transposed.decompress(), half.decompress().T)
    weight24.values.mul_(2)
    assert weight24.to(torch.bfloat16).transposed is None


def test_a_weight_of_inference_mode_has_no_copies():
    """torch counts no writes to it."""
    with torch.inference_mode():
        weight24, x = weight(transposable=True), torch.randn(3, 16)
        for _ in range(2):
            torch.testing.assert_close(sparse24.linear(x, weight24), x @ weight24.decompress().T)
            weight24.values.mul_(2)
        assert weight24.dense is None
        for make in (weight24.cache_dense, weight24.with_transpose):
            with pytest.raises(
                RuntimeError, match="values must be a plain tensor, whose writes torch counts, got a tensor of inf"
            ):
                make()


def test_a_weight_that_is_trained_has_no_copies():
    """Fused optimizers write, and torch does not count it."""
    weight24 = weight(transposable=True)
    weight24.values.requires_grad_()
    for make in (weight24.cache_dense, weight24.with_transpose):
        with pytest.raises(RuntimeError, match=r"values must be a plain tensor, .* got one that asks for a gradient"):
            make()


def test_copies_made_in_inference_mode_serve_training():
    weight24, x = weight(), torch.randn(3, 16, requires_grad=True)
    with torch.inference_mode():
        sparse24.linear(x, weight24)
    assert weight24.dense is not None
    (grad,) = torch.autograd.grad(sparse24.linear(x, weight24).sum(), x)
    torch.testing.assert_close(grad, weight24.decompress().sum(0).expand(3, 16))


@needs_kernels
@pytest.mark.parametrize("edit", ["values in place", "metadata in place", "other values", "SGD, fused"])
@pytest.mark.parametrize("grad", (False, True))
def test_compiled_code_follows(grad, edit):
    """It is compiled with copies that are current, and called when they are not."""
    torch._dynamo.reset()
    weight24 = weight(transposable=True).with_transpose()
    weight24.cache_dense()
    compiled = torch.compile(lambda x: sparse24.linear(x, weight24), fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 16, requires_grad=grad)
    for _ in range(2):
        y, expected = compiled(x), x @ weight24.decompress().T
        torch.testing.assert_close(y, expected)
        if grad:
            torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), x) for out in (y, expected)))
        EDITS[edit](weight24)


@needs_kernels
def test_compiled_code_uses_copies(monkeypatch):
    """As long as they are current."""
    from pyvtk.sparse24.copies import is_current

    torch._dynamo.reset()
    weight24 = weight(transposable=True).with_transpose()
    weight24.cache_dense()
    found = []
    for module in ("modules", "functions"):
        name = f"pyvtk.sparse24.{module}.is_current"
        monkeypatch.setattr(name, lambda *a: found.append(is_current(*a)) or found[-1])
    compiled = torch.compile(lambda x: sparse24.linear(x, weight24), fullgraph=True, backend="aot_eager")
    compiled(torch.randn(5, 16))
    compiled(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert found == [True, True]
    weight24.values.mul_(2)
    compiled(torch.randn(5, 16))
    compiled(torch.randn(5, 16, requires_grad=True)).sum().backward()
    assert found == [True, True, False, False]


def test_a_recorded_call_holds_no_copy():
    from torch.fx.experimental.proxy_tensor import make_fx

    weight24, x = weight(), torch.randn(3, 16)
    weight24.cache_dense()
    recorded = make_fx(lambda x: sparse24.linear(x, weight24))(x)
    weight24.values.mul_(2)
    torch.testing.assert_close(recorded(x), x @ weight24.decompress().T)


def test_the_module_follows_all_of_its_buffers():
    for name in ("values", "metadata", "scales"):
        quantized = sparse24.quantize(weight())
        layer = sparse24.Sparse24Linear(quantized)
        layer.choice = (0, 2)
        x = torch.randn(3, 16)
        layer(x)
        changed = mirrored(layer.metadata) if name == "metadata" else 2 * getattr(layer, name)
        if name == "values":
            changed = -layer.values
        setattr(layer, name, changed)
        expected = sparse24.Sparse24Weight(layer.values, layer.metadata, layer.scales).decompress()
        torch.testing.assert_close(layer(x), x @ expected.T)


# Linear24's mask


def train(module, steps, see=lambda model: None):
    model = nn.Sequential(module)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(steps):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))  # so that masks change
        model(torch.randn(8, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparse24.step_24(model)
        see(model)
    return model


def check_masked(module, x):
    expected = x @ (module.weight * module.mask).T + module.bias
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.to_sparse()(x), expected)


AVERAGES = {
    "plain": {},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.5)},
    "ema, foreach": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
}


@pytest.mark.parametrize(
    "options", [{}, {"method": "decay", "beta": sparse24.LinearDecay(0.4)}], ids=["sr_ste", "decay"]
)
@pytest.mark.parametrize("average", AVERAGES)
def test_averaged_weights(average, options):
    """The mask of the model comes along, the schedule too: nothing is dropped."""
    module = sparse24.Linear24(16, 12, **options)
    averaged = AveragedModel(nn.Sequential(module), **AVERAGES[average])

    def see(model):
        averaged.update_parameters(model)
        ours = averaged.module[0]
        x = torch.randn(3, 16)
        expected = x @ torch.where(module.mask, ours.weight, module.left * ours.weight).T + ours.bias
        torch.testing.assert_close(averaged(x), expected)
        assert torch.equal(ours.mask, module.mask) and ours._step == module._step and ours.sparse == module.sparse

    train(module, 4, see)
    check_masked(averaged.module[0], torch.randn(3, 16))


@pytest.mark.parametrize("average", [name for name in AVERAGES if name != "plain"])
@pytest.mark.parametrize("transposable", (False, True))
def test_averaged_masks_are_an_error(average, transposable):
    """Until refresh, which makes the average a usable model."""
    module = sparse24.Linear24(16, 12, transposable=transposable)
    averaged = AveragedModel(nn.Sequential(module), use_buffers=True, **AVERAGES[average])
    train(module, 4, averaged.update_parameters)
    ours, x = averaged.module[0], torch.randn(3, 16)
    assert ours.mask.sum() > ours.mask.numel() // 2
    for use in (lambda: averaged(x), ours.to_sparse, lambda: averaged(x)):
        with pytest.raises(
            ValueError, match=r"refresh\(\) chooses it anew. mask must be 2:4 at step \d, got [34] of 4 k"
        ):
            use()
    ours.refresh()
    assert torch.equal(ours.mask, sparse24.prune(ours.weight, transposable=transposable))
    check_masked(ours, x)


def test_torch_refuses_to_subtract_masks():
    """What the docstring says of use_buffers=True with torch's plain average."""
    module = sparse24.Linear24(16, 12)
    averaged = AveragedModel(nn.Sequential(module), use_buffers=True)
    with pytest.raises(RuntimeError, match="bool"):
        train(module, 2, averaged.update_parameters)


def wrong(module):
    return torch.ones_like(module.mask)


def right(module):
    return module.mask.roll(1, 0)


MASKS = {
    "in place": lambda m, mask: m.mask.copy_(mask),
    "another": lambda m, mask: setattr(m, "mask", mask),
    "buffers": lambda m, mask: torch._foreach_copy_([m.mask], [mask]),
}


@pytest.mark.parametrize("how", MASKS)
@pytest.mark.parametrize("compiled", (False, True))
def test_a_mask_from_outside(how, compiled):
    """Is taken if it is 2:4, and an error if not."""
    torch._dynamo.reset()
    module, x = sparse24.Linear24(16, 12), torch.randn(3, 16)
    run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    run(x)
    MASKS[how](module, right(module))
    torch.testing.assert_close(run(x), x @ (module.weight * module.mask).T + module.bias)
    MASKS[how](module, wrong(module))
    if compiled and WITHOUT_KERNELS:  # a dense product, for which any mask is right
        torch.testing.assert_close(run(x), x @ module.weight.T + module.bias)
        return
    with pytest.raises((ValueError, RuntimeError), match=r"exactly two|refresh"):
        run(x)
    module.refresh()
    torch.testing.assert_close(run(x), x @ (module.weight * module.mask).T + module.bias)


def test_it_is_verified_once(monkeypatch):
    module, x, seen = sparse24.Linear24(16, 12), torch.randn(3, 16), []
    verify = module._verify
    monkeypatch.setattr(module, "_verify", lambda must: seen.append(must) or verify(must))
    module(x)
    module.step()
    module(x)
    assert not seen
    module.mask.copy_(right(module))
    module(x)
    module(x)
    assert len(seen) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.double().float()])
def test_copied_layers(how):
    module = train(sparse24.Linear24(16, 12), 2)[0]
    copied = how(copy.deepcopy(module))
    with torch.no_grad():
        copied.weight.data.mul_(2)
    x = torch.randn(3, 16)
    check_masked(copied, x)
    check_masked(module, x)
    copied.step()
    assert int(copied.steps) == 3 and int(module.steps) == 2
    assert copied._mask_seal.holds(copied.mask)


def test_steps_from_outside_are_followed():
    module = sparse24.Linear24(16, 12, method="decay", beta=sparse24.LinearDecay(0.25))
    module.steps.fill_(2)
    x = torch.randn(3, 16)
    torch.testing.assert_close(
        module(x), x @ torch.where(module.mask, module.weight, module.weight / 2).T + module.bias
    )
    module.steps.fill_(3)
    module.step()
    assert int(module.steps) == 4 and module.sparse
