"""Accelerated models of transformers against the float64 oracle: prefill and decode, every method on every model."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import dataclasses

import oracle
import tiny_models
from adapter_cases import (
    CACHE,
    CASES,
    LADDER,
    METHODS,
    RAGGED,
    STEPS,
    alone,
    assert_equal,
    budget,
    ends,
    exact_of,
    expected,
    inputs_of,
    model_of,
    prefill,
    trace_of,
)
from support import max_error
from tiny_models import NAMES, generate_logits

import pyvtk
from pyvtk.integrations import transformers as vtk
from pyvtk.integrations.transformers import prompt

WITHOUT = (1, 0, 2, 1)  # images: a sample of text among others
FIRST = torch.zeros(4, 1, dtype=torch.int64)  # stands for the token behind a prompt


@pytest.mark.parametrize(("name", "key"), CASES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(name, key, cache):
    inputs = inputs_of(name)
    with vtk.accelerate(model_of(name), METHODS[key]):
        logits, tokens = generate_logits(model_of(name), inputs, STEPS, cache_implementation=cache)
    assert_equal(logits, expected(name, key, tokens), budget(name))


@pytest.mark.parametrize(("name", "key"), CASES)
def test_padding_on_the_right(name, key):
    inputs = inputs_of(name, "right")
    with vtk.accelerate(model_of(name), METHODS[key]):
        logits = prefill(model_of(name), inputs)
    assert_equal(logits, expected(name, key, FIRST), budget(name, "right"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "Feather", "YOPO, cut", "SnapKV", "DivPrune"])
def test_a_sample_without_images(name, key):
    with vtk.accelerate(model_of(name), METHODS[key]):
        logits, tokens = generate_logits(model_of(name), inputs_of(name, "left", WITHOUT), STEPS)
    assert_equal(logits, expected(name, key, tokens, WITHOUT), budget(name, "left", WITHOUT))


@pytest.mark.parametrize("key", ["HiRED", "VisionZip"])
@pytest.mark.parametrize("name", tiny_models.CLS)
def test_a_sample_without_images_by_the_tower(name, key):
    test_a_sample_without_images(name, key)


@pytest.mark.parametrize(("name", "key"), [("llava", "PyramidDrop"), ("qwen2_5_vl", "FastV")])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_eager_attention(name, key, cache):
    model = model_of(name, "eager")
    with vtk.accelerate(model, METHODS[key]):
        logits, tokens = generate_logits(model, inputs_of(name), STEPS, cache_implementation=cache)
    assert_equal(logits, expected(name, key, tokens), budget(name, attention="eager"))


def test_eager_attention_where_there_is_no_plan():
    model = model_of("llava", "eager")
    with vtk.accelerate(model, METHODS["YOPO, cut"], layout=fixed_grid):
        logits, tokens = generate_logits(model, inputs_of("llava"), STEPS)
    assert_equal(logits, expected("llava", "YOPO, cut", tokens), budget("llava", attention="eager"))


def fixed_grid(prompt):
    """The layout of llava's prompts, given by the user: 6 x 6 tokens of each image."""
    number = torch.where(prompt.visual, prompt.visual.long().cumsum(1) - 1, 0)
    y, x = number % 36 // 6, number % 6
    coordinates = torch.stack([torch.zeros_like(x), y, x], -1)
    return pyvtk.TokenLayout(torch.where(prompt.visual, number // 36, -1), coordinates, mask=prompt.valid)


@pytest.mark.parametrize("key", ["Feather", "YOPO", "YOPO, cut"])
def test_a_layout_of_the_users(key):
    inputs = inputs_of("llava")
    with vtk.accelerate(model_of("llava"), METHODS[key], layout=fixed_grid):
        logits, tokens = generate_logits(model_of("llava"), inputs, STEPS)
    assert_equal(logits, expected("llava", key, tokens), budget("llava"))


@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "Feather", "YOPO, cut"])
def test_videos(key):
    """Frames of a video are visual tokens, with a grid of three axes."""
    model = model_of("qwen2_5_vl")
    inputs = tiny_models.videos(model)
    one = [tiny_models.one("qwen2_5_vl", inputs, i) for i in range(2)]

    def wanted(method, tokens):
        exact = exact_of("qwen2_5_vl")
        return torch.stack(
            [oracle.logits("qwen2_5_vl", exact, one[i], method, tokens[i, :-1].tolist()) for i in range(2)]
        )

    logits, tokens = generate_logits(model, inputs, STEPS)
    limit = 4 * max_error(logits, wanted(None, tokens))
    method = METHODS[key]
    if key == "YOPO, cut":  # positions of frames are 4 apart, and a radius counts as positions do
        method = dataclasses.replace(method, radius=(4, 1, 1))
    with vtk.accelerate(model, method):
        logits, tokens = generate_logits(model, inputs, STEPS)
    assert_equal(logits, wanted(METHODS[key], tokens), limit)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_padding_none_is_a_promise(name):
    """Samples of one length: the mask is not looked at, and nothing changes."""
    model, inputs = model_of(name), alone(name, 2)
    with vtk.accelerate(model, LADDER, padding="none"):
        logits, tokens = generate_logits(model, inputs, STEPS)
    want = trace_of(name, "PyramidDrop", 2, tuple(tokens[0, :-1].tolist())).logits[-STEPS:][None]
    assert_equal(logits, want, budget(name))


# Whole prompts


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "YOPO, cut", "DivPrune"])
def test_logits_have_the_prompts_length(name, padding, key):
    model, inputs = model_of(name), inputs_of(name, padding)
    with torch.no_grad(), vtk.accelerate(model, METHODS[key]) as handle:
        logits = model(**inputs).logits
        nothing = model.lm_head(torch.zeros(1, 1, tiny_models.HIDDEN))[0, 0]
        stays = handle.selection.mask()
    assert logits.shape == (*inputs["input_ids"].shape, tiny_models.VOCABULARY)
    for sample, row in enumerate(logits):
        valid = inputs["attention_mask"][sample].bool()
        known = trace_of(name, key, sample)
        assert_equal(row[valid][known.rows], known.logits, budget(name))
        assert stays[sample][valid].nonzero()[:, 0].tolist() == known.rows
        gone = row[~stays[sample]]
        assert len(gone) and torch.equal(gone, nothing.expand_as(gone))


@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "YOPO, cut", "YOPO, heads off", "VisionZip", "SnapKV"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"use_cache": True}, {"use_cache": False}], ids=str)
def test_forward(key, padding, options):
    model, inputs = model_of("llava_next"), inputs_of("llava_next", padding)
    with vtk.accelerate(model, METHODS[key]), torch.no_grad():
        output = model(**inputs, **options)
    assert (getattr(output, CACHE) is None) == (options == {"use_cache": False})
    assert_equal(ends(output.logits, inputs), expected("llava_next", key, FIRST), budget("llava_next", "right"))


# What drops nothing


NOTHING = [
    vtk.FastV(2, 1.0),
    vtk.PyramidDrop((1, 2, 4), (1.0, 1.0, 1.0)),
    vtk.DivPrune(1.0),
    vtk.SnapKV(8, 1.0),
    vtk.YOPO(100, causal_window=True, cross_image=True),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", NOTHING, ids=lambda method: type(method).__name__)
def test_what_drops_nothing(name, method):
    for cache in ("dynamic", "static"):
        with vtk.accelerate(model_of(name), method):
            logits, tokens = generate_logits(model_of(name), inputs_of(name), STEPS, cache_implementation=cache)
        assert_equal(logits, expected(name, None, tokens), budget(name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_text_alone_passes_through(name, padding):
    model = model_of(name)
    inputs = tiny_models.text_only(name, model, padding=padding)
    for key in [key for known, key in CASES if known == name]:
        with torch.no_grad():
            logits = model(**inputs).logits
            with vtk.accelerate(model, METHODS[key]) as handle:
                assert torch.equal(model(**inputs).logits, logits)
                assert handle.selection is None and handle.stages == [] and "no prompt yet" in repr(handle)
        if padding == "left":
            logits, tokens = generate_logits(model, inputs, 4)
            with vtk.accelerate(model, METHODS[key]):
                again, more = generate_logits(model, inputs, 4)
            assert torch.equal(again, logits) and torch.equal(more, tokens)


# Planted mistakes: each is far beyond the budget that the tests above have


class Planted:
    """A hook behind the adapter's own, that gives decoder layers back what the model itself would have given them."""

    def __init__(self, model, names, change=lambda own: own):
        self.names, self.change, self.own = names, change, {}
        self.layers = model.model.language_model.layers
        self.hooks = [layer.register_forward_pre_hook(self.keep, with_kwargs=True) for layer in self.layers]

    def keep(self, layer, args, kwargs):
        self.own[layer] = {name: kwargs[name] for name in self.names}

    def restore(self, layer, args, kwargs):
        if (args[0] if args else kwargs["hidden_states"]).shape[1] > 1:
            return None
        return args, {**kwargs, **{name: self.change(value) for name, value in self.own[layer].items()}}

    def wrong(self, model, name, key, cache):
        """The error of generate, with the mistake in every decode step."""
        try:
            with vtk.accelerate(model, METHODS[key]):
                self.hooks += [layer.register_forward_pre_hook(self.restore, with_kwargs=True) for layer in self.layers]
                logits, tokens = generate_logits(model, inputs_of(name), STEPS, cache_implementation=cache)
        finally:
            for hook in self.hooks:
                hook.remove()
        return max_error(logits, expected(name, key, tokens))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "SnapKV"])
def test_planted_the_models_own_mask_on_a_static_cache(name, key):
    model = model_of(name)
    assert Planted(model, ["attention_mask"]).wrong(model, name, key, "static") > 100 * budget(name)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "SnapKV"])
def test_planted_padding_is_seen_at_decode(name, key):
    model = model_of(name)
    mistake = Planted(model, ["attention_mask"], lambda own: None)
    assert mistake.wrong(model, name, key, "dynamic") > 100 * budget(name)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_planted_positions_of_decode_steps_are_the_models(cache):
    model = model_of("llava")
    mistake = Planted(model, ["position_embeddings"])
    assert mistake.wrong(model, "llava", "PyramidDrop", cache) > 100 * budget("llava")


@dataclasses.dataclass(frozen=True)
class Kept(vtk.PyramidDrop):
    """Positions are not counted anew."""

    def stages(self, num_layers):
        return [dataclasses.replace(stage, rebase=False) for stage in super().stages(num_layers)]


@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_planted_positions_are_not_counted_anew(name):
    model = model_of(name)
    with vtk.accelerate(model, Kept(LADDER.layers, LADDER.keep)):
        logits, tokens = generate_logits(model, inputs_of(name), STEPS)
    assert max_error(logits, expected(name, "PyramidDrop", tokens)) > 100 * budget(name)


@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "Feather", "SnapKV"])
def test_planted_the_last_column_is_padding(key, monkeypatch):
    """Scores are asked of the last column, which right padding makes padding."""
    measured = prompt.Sizes.of

    def mistaken(*args, **extra):
        return dataclasses.replace(measured(*args, **extra), ends_full=True)

    monkeypatch.setattr(prompt.Sizes, "of", staticmethod(mistaken))
    model, inputs = model_of("llava"), inputs_of("llava", "right")
    with vtk.accelerate(model, METHODS[key], layout=fixed_grid), torch.no_grad():
        output = model(**inputs, use_cache=True)
        got, want = ends(output.logits, inputs), expected("llava", key, FIRST)
        if key == "SnapKV":  # whose prefill is exact: the mistake is in the cache
            token, mask = FIRST + 5, torch.cat([inputs["attention_mask"], FIRST + 1], 1)
            position = inputs["attention_mask"].sum(1, keepdim=True)
            cache = {CACHE: getattr(output, CACHE)}
            got = model(input_ids=token, attention_mask=mask, position_ids=position, **cache).logits
            want = torch.stack([trace_of("llava", key, i, (5,)).logits[-1:] for i in range(len(RAGGED))])
    assert max_error(got, want) > 100 * budget("llava", "right")
