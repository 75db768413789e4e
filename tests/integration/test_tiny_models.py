"""Tiny models: they tell wrong from right, a sample alone is the sample of the batch."""

import itertools

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import tiny_models
from oracle import YOPO, FastV, Feather, HiRED, PyramidDrop
from oracle_checks import SAMPLES, error, model_of, prompts
from tiny_models import NAMES

pytestmark = pytest.mark.package  # no kernel runs here


@pytest.mark.parametrize("name", NAMES)
def test_models_can_tell_wrong_from_right(name):
    model = model_of(name, torch.float32)
    inputs, alone = prompts(name)
    visual = [len(tiny_models.places(name, one)) for one in alone]
    assert len(set(visual)) > 1 and all(30 <= count <= 120 for count in visual)
    assert len({one["input_ids"].shape[1] for one in alone}) == SAMPLES
    logits, tokens = tiny_models.generate_logits(model, inputs, 8)
    assert logits.shape == (SAMPLES, 8, tiny_models.VOCABULARY) and tokens.shape == (SAMPLES, 8)
    assert len(tokens.unique()) > 8 and tiny_models.WORDS[0] <= tokens.min() and tokens.max() < tiny_models.WORDS[1]
    for one, token in zip(alone, tokens):
        # what is dropped matters at every step, by far more than float32 rounds
        whole = oracle.logits(name, model_of(name), one, None, token)
        for method in (FastV(2, 0.5), PyramidDrop(), Feather(), YOPO(1, 3)):
            changed = oracle.logits(name, model_of(name), one, method, token)
            assert (changed - whole).abs().amax(-1).min() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_sample_alone_is_the_sample_of_the_batch(name, padding):
    model = model_of(name, torch.float32)
    for images in ((1, 1, 2, 1), (0, 2, 0, 1)):
        inputs, alone = prompts(name, padding=padding, images=images)
        assert inputs["attention_mask"][:, -1 if padding == "left" else 0].all()
        with torch.no_grad():
            together = model(**{k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}).logits
        for sample, one in enumerate(alone):
            logits = oracle.trace(name, model_of(name), one).logits
            mine = together[sample][inputs["attention_mask"][sample].bool()]
            assert error(mine.double(), logits) < 1e-4  # of about 1, in float32


@pytest.mark.parametrize("name", NAMES)
def test_grids_are_whole_and_in_raster_order(name):
    sizes = []
    for one in prompts(name)[1]:
        places = tiny_models.places(name, one)
        numbers = [place[:2] for place in places if place.cell is not None]
        assert numbers == sorted(numbers)
        for number in sorted(set(numbers)):
            cells = [place.cell for place in places if place.cell is not None and place[:2] == number]
            _, height, width = (1 + max(axis) for axis in zip(*cells))
            assert cells == list(itertools.product((0,), range(height), range(width)))
            sizes.append((height, width))
            # a newline behind every row of what is put together of crops, and behind an image that has no crops
            last = [i for i, p in enumerate(places) if p[:2] == number and p.cell and p.cell[2] == width - 1]
            behind = [i for i in last if i + 1 < len(places) and places[i + 1].cell is None]
            alone = name == "llava_onevision" and (number[0], 1) not in numbers
            assert behind == (last if number[1] == 1 else last[-1:] if alone else [])
    expected = {
        "llava": [(6, 6)] * 5,
        "llava_next": [(4, 4), (4, 8), (4, 4), (8, 4), (4, 4), (2, 8), (4, 4), (4, 8), (4, 4), (8, 8)],
        "llava_onevision": [(5, 5), (5, 10), (5, 5), (8, 5), (5, 5), (5, 5), (5, 5), (5, 15)],
        "internvl": [(5, 5)] * (2 + 3 + 1 + 2 + 4),
    }.get(name, [(6, 7), (8, 10), (6, 6), (7, 6), (10, 10)])
    assert sizes == expected


@pytest.mark.parametrize("name", NAMES)
def test_dtype_and_attention(name):
    model = tiny_models.make(name, dtype=torch.bfloat16, attention="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == "eager"
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    inputs = tiny_models.batch(name, model)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    with torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16


def test_bad_arguments():
    model = model_of("llava")
    with pytest.raises(ValueError, match=r"make: name must be one of .*, got 'bert'"):
        tiny_models.make("bert")
    with pytest.raises(ValueError, match="batch: images must have 4 numbers"):
        tiny_models.batch("llava", model, images=(1,))
    with pytest.raises(ValueError, match="batch: padding must be 'left' or 'right', got 'up'"):
        tiny_models.batch("llava", model, padding="up")
    _, (one, *_) = prompts("llava")
    with pytest.raises(ValueError, match="method must be one that it knows, got str"):
        oracle.logits("llava", model, one, "FastV")
    with pytest.raises(ValueError, match="HiRED and VisionZip must have a model of"):
        oracle.logits("internvl", model_of("internvl"), prompts("internvl")[1][0], HiRED())
    hooked = tiny_models.make("llava")
    hooked.model.language_model.layers[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model must have no hooks"):
        oracle.logits("llava", hooked, one)
