"""accelerate on and off: what it refuses and how it says so, and that nothing of it stays on a model."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import dataclasses

import tiny_models
import transformers
from adapter_cases import CACHE, CASES, HEADS, METHODS, alone, inputs_of, model_of
from tiny_models import NAMES
from transformers import DynamicCache

from pyvtk.integrations import transformers as vtk
from pyvtk.integrations.transformers import models

FASTV = METHODS["FastV"]
THREE = torch.ones(3, dtype=torch.bool)  # heads, where the model has four


def state(model):
    """Everything that accelerate could leave on a model: attributes and hooks of every part, attention by config."""
    parts = {}
    for name, part in model.named_modules():
        hooks = {key: list(value) for key, value in vars(part).items() if isinstance(value, dict) and "hooks" in key}
        attributes = {key: id(value) for key, value in vars(part).items() if callable(value)}
        parts[name] = (set(vars(part)) - {"rope_deltas"}, hooks, attributes)
    configs = [model.config, model.config.text_config, model.config.vision_config]
    return parts, [config._attn_implementation for config in configs]


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


# Off again


@pytest.mark.parametrize(("name", "key"), CASES)
def test_nothing_stays(name, key, way="remove"):
    model, inputs = model_of(name), inputs_of(name)
    before, logits = state(model), logits_of(model, inputs)
    if way == "with":
        with vtk.accelerate(model, METHODS[key]) as handle:
            assert state(model) != before
            logits_of(model, inputs)
    elif way == "an error":
        with pytest.raises(ZeroDivisionError), vtk.accelerate(model, METHODS[key]) as handle:
            broken = model.model.language_model.layers[-1].register_forward_pre_hook(lambda layer, args: 1 / 0)
            try:
                logits_of(model, inputs)
            finally:
                broken.remove()
    else:
        handle = vtk.accelerate(model, METHODS[key])
        logits_of(model, inputs)
        handle.remove() if way == "remove" else vtk.restore(model)
    assert state(model) == before
    assert torch.equal(logits_of(model, inputs), logits)
    handle.remove()  # once more changes nothing
    vtk.restore(model)
    assert state(model) == before


@pytest.mark.parametrize("key", list(METHODS))
@pytest.mark.parametrize("way", ["with", "restore", "an error"])
def test_nothing_stays_either_way(key, way):
    test_nothing_stays("llava_next", key, way)


def test_a_removed_handle_leaves_the_next_one_alone():
    model, inputs = model_of("llava"), inputs_of("llava")
    first = vtk.accelerate(model, METHODS["SnapKV"])
    first.remove()
    with vtk.accelerate(model, FASTV):
        wanted = logits_of(model, inputs)
        first.remove()
        assert torch.equal(logits_of(model, inputs), wanted)
        with pytest.raises(RuntimeError, match="has a handle already"):
            vtk.accelerate(model, FASTV)


@pytest.mark.parametrize(
    ("name", "method", "error", "message"),
    [
        ("llava", vtk.YOPO(1, None, [*HEADS[:2], THREE, *HEADS[3:]], 2), ValueError, r"layer 2 must be \[4\], got"),
        ("llava", vtk.YOPO(1, None, HEADS[:3], 2), ValueError, "YOPO: heads must have an entry for every layer, got 3"),
        ("qwen3_vl", METHODS["HiRED"], NotImplementedError, "HiRED needs a tower with a CLS token, qwen3_vl has none"),
        ("internvl", METHODS["VisionZip"], NotImplementedError, "needs a tower with a CLS token, internvl has none"),
        ("llava", vtk.FastV(7), ValueError, r"FastV\(layer=7, keep=0.5\) acts before layer 7, the model has 6"),
        ("llava", vtk.FastV(6), ValueError, "acts before layer 6, the model has 6"),
        ("llava", vtk.PyramidDrop(), ValueError, "acts before layer 8, the model has 6"),
        ("llava", "fastv", TypeError, "accelerate: method must be a Method, got str"),
        ("llava", vtk.FastV, TypeError, "accelerate: method must be a Method, got type"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_in_accelerate_leaves_nothing(name, method, error, message):
    model = model_of(name)
    before = state(model)
    with pytest.raises(error, match=message):
        vtk.accelerate(model, method)
    assert state(model) == before
    with vtk.accelerate(model, FASTV):  # no handle is left either
        pass


# What accelerate refuses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vtk.FastV(0), "FastV: layer must be an int of at least 1, got 0"),
        (lambda: vtk.FastV(2.0), "FastV: layer must be an int of at least 1, got 2.0"),
        (lambda: vtk.FastV(True), "FastV: layer must be an int of at least 1, got True"),
        (lambda: vtk.FastV(2, 1.5), "FastV: keep must be a share from 0 to 1, got 1.5"),
        (lambda: vtk.FastV(2, -0.1), "FastV: keep must be a share from 0 to 1, got -0.1"),
        (lambda: vtk.FastV(2, float("nan")), "FastV: keep must be a share from 0 to 1, got nan"),
        (lambda: vtk.PyramidDrop((1, 2), (0.5,)), "PyramidDrop: layers and keep must be sequences of one length"),
        (lambda: vtk.PyramidDrop((), ()), "PyramidDrop: layers and keep must be sequences of one length"),
        (lambda: vtk.PyramidDrop((2, 1), (0.5, 0.2)), "PyramidDrop: layers must ascend"),
        (lambda: vtk.PyramidDrop((1, 1), (0.5, 0.2)), "PyramidDrop: layers must ascend"),
        (lambda: vtk.PyramidDrop((1, 2), (0.2, 0.5)), "PyramidDrop: layers must ascend and keep must not"),
        (lambda: vtk.Feather((1, 2, 3)), "Feather: layers must be one or two"),
        (lambda: vtk.Feather((0, 2)), "Feather: layers must be an int of at least 1, got 0"),
        (lambda: vtk.Feather((4, 2)), r"Feather: layers must ascend, got \(4, 2\)"),
        (lambda: vtk.Feather((2, 2)), r"Feather: layers must ascend, got \(2, 2\)"),
        (lambda: vtk.Feather((2, 4), 0.3, 0), "Feather: stride must be an int of at least 1, got 0"),
        (lambda: vtk.YOPO(1, -1), "YOPO: cut must be an int of at least 0, got -1"),
        (lambda: vtk.YOPO(1, None, None, 0), "YOPO: ffn must be an int of at least 1, got 0"),
        (lambda: vtk.HiRED(0.2, 2), "HiRED: alpha must be a share from 0 to 1, got 2"),
        (lambda: vtk.VisionZip(1.5, 3), "VisionZip: dominant must be a share from 0 to 1, got 1.5"),
        (lambda: vtk.VisionZip(9, -1), "VisionZip: contextual must be an int of at least 0, got -1"),
        (lambda: vtk.SnapKV(0), "SnapKV: window must be an int of at least 1, got 0"),
        (lambda: vtk.SnapKV(8, 2), "SnapKV: keep must be a share from 0 to 1, got 2"),
        (lambda: vtk.DivPrune(2), "DivPrune: keep must be a share from 0 to 1, got 2"),
    ],
)
def test_bad_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_arguments():
    with pytest.raises(ValueError, match="accelerate: padding must be 'auto' or 'none', got 'left'"):
        vtk.accelerate(model_of("llava"), FASTV, padding="left")


def test_unknown_models():
    model = tiny_models.make("llava")
    model.config.model_type = "my_model"
    with pytest.raises(NotImplementedError, match=r"model must be one of internvl, llava, .*, got 'my_model'"):
        vtk.accelerate(model, FASTV)
    text = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=8
    )
    with pytest.raises(TypeError, match=r"must hold a decoder as model.language_model, got LlamaForCausalLM"):
        vtk.accelerate(transformers.LlamaForCausalLM(text), FASTV)


def test_a_model_without_a_layout(monkeypatch):
    monkeypatch.setitem(models.ANATOMIES, "llava", dataclasses.replace(models.ANATOMIES["llava"], layout=None))
    for key in ("YOPO", "Feather"):
        with pytest.raises(NotImplementedError, match="needs a layout of llava"):
            vtk.accelerate(model_of("llava"), METHODS[key])
    with vtk.accelerate(model_of("llava"), FASTV):  # which needs none
        logits_of(model_of("llava"), inputs_of("llava"))


@pytest.mark.parametrize("implementation", ["flex_attention", "paged|sdpa"])
def test_other_attention(implementation):
    model = tiny_models.make("llava")
    model.config.text_config._attn_implementation = implementation
    with pytest.raises(NotImplementedError, match="attention must be sdpa, eager or flash_attention_"):
        vtk.accelerate(model, FASTV)


def test_layers_with_windows():
    model = tiny_models.make("qwen2_vl")
    model.config.text_config.layer_types = ["full_attention"] * 5 + ["sliding_attention"]
    with pytest.raises(NotImplementedError, match="every layer must have full attention, got 'sliding_attention'"):
        vtk.accelerate(model, FASTV)


def test_a_tower_whose_last_layer_is_taken():
    model = tiny_models.make("llava")
    model.config.vision_feature_layer = -1
    before = state(model)
    with pytest.raises(NotImplementedError, match="the patches of the tower's last layer but one"):
        vtk.accelerate(model, METHODS["HiRED"])
    assert state(model) == before


@pytest.mark.parametrize("first", ["adapters", "accelerate"])
def test_feed_forward_channels_of_adapters(first):
    peft = pytest.importorskip("peft")
    model, inputs = tiny_models.make("llava"), inputs_of("llava")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    message = "ffn > 1 takes part of the weights of a torch.nn.Linear, got a up_proj of type peft.*merge adapters"
    if first == "adapters":
        wrapped = peft.get_peft_model(model, config)
        before = state(model)
        with pytest.raises(NotImplementedError, match=message):
            vtk.accelerate(wrapped, METHODS["YOPO, heads off"])
        assert state(model) == before
        with vtk.accelerate(wrapped, METHODS["YOPO"]):
            logits_of(wrapped, inputs)
    else:
        handle = vtk.accelerate(model, METHODS["YOPO, heads off"])
        wrapped = peft.get_peft_model(model, config)
        with pytest.raises(NotImplementedError, match=message):
            logits_of(wrapped, inputs)
        handle.remove()


# What a forward pass refuses


@pytest.mark.parametrize("key", list(METHODS))
def test_images_in_a_later_turn(key):
    model, inputs = model_of("llava"), alone("llava", 0)
    with vtk.accelerate(model, METHODS[key]), torch.no_grad():
        cache = getattr(model(**inputs, use_cache=True), CACHE)
        mask = torch.ones(1, 2 * inputs["input_ids"].shape[1], dtype=torch.int64)
        with pytest.raises(NotImplementedError, match="accelerate: images in a later turn, or in a later chunk"):
            model(**{**inputs, "attention_mask": mask}, **{CACHE: cache})


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "DivPrune", "SnapKV", "YOPO, cut"])
def test_a_chunk_that_splits_an_image(name, key):
    inputs = alone(name, 0)
    middle = int((inputs["input_ids"] == tiny_models.IMAGE).nonzero()[:, 1].float().mean())
    with (
        vtk.accelerate(model_of(name), METHODS[key]),
        pytest.raises(NotImplementedError, match=r"images in a later turn|images must be whole"),
    ):
        model_of(name).generate(**inputs, max_new_tokens=2, prefill_chunk_size=middle)


@pytest.mark.parametrize("name", NAMES)
def test_maps_of_attention(name):
    model = model_of(name, "eager")
    with vtk.accelerate(model, FASTV):
        with pytest.raises(NotImplementedError, match="accelerate: output_attentions cannot be had"):
            model(**inputs_of(name), output_attentions=True)
        with pytest.raises(NotImplementedError, match="accelerate: output_attentions cannot be had"):
            options = {"output_attentions": True, "return_dict_in_generate": True}
            model.generate(**inputs_of(name), max_new_tokens=2, **options)


@pytest.mark.parametrize("key", ["PyramidDrop", "YOPO"])
def test_dropout_in_training(key):
    model, inputs = tiny_models.make("llava"), inputs_of("llava", "right")
    model.config.text_config.attention_dropout = 0.1
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with vtk.accelerate(model, METHODS[key]):
        logits_of(model, inputs)  # eval mode has none
        with pytest.raises(NotImplementedError, match="accelerate: attention_dropout must be 0 in training"):
            model.train()(**inputs)


@pytest.mark.parametrize("key", ["HiRED", "VisionZip"])
@pytest.mark.parametrize("name", tiny_models.CLS)
def test_images_that_were_encoded_before(name, key):
    inputs = {entry: x for entry, x in inputs_of(name).items() if entry in ("input_ids", "attention_mask")}
    with (
        vtk.accelerate(model_of(name), METHODS[key]),
        pytest.raises(RuntimeError, match="accelerate: these images were encoded before the model was accelerated"),
    ):
        logits_of(model_of(name), inputs)


def test_embeddings_without_ids():
    model, inputs = model_of("llava"), inputs_of("llava")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with vtk.accelerate(model, FASTV), pytest.raises(NotImplementedError, match="accelerate: input_ids must be given"):
        model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_a_cache_of_another_kind():
    class Layer(transformers.cache_utils.DynamicLayer):
        pass

    cache = DynamicCache()
    cache.layer_class_to_replicate = Layer
    message = "accelerate: the cache must be dynamic or static, got Layer"
    with vtk.accelerate(model_of("llava"), FASTV), pytest.raises(NotImplementedError, match=message):
        model_of("llava")(**inputs_of("llava"), **{CACHE: cache})


def test_videos_among_anyres_images():
    """Where their tokens stand is not known; what is known of images must not be taken for it."""
    inputs = alone("llava_onevision", 0)
    with vtk.accelerate(model_of("llava_onevision"), METHODS["YOPO, cut"]):
        with pytest.raises(NotImplementedError, match="accelerate: it is not known where tokens of videos stand"):
            model_of("llava_onevision")(**inputs, pixel_values_videos=torch.zeros(1, 2, 3, 8, 8))
