"""The oracle that drops nothing is the model, and dropping is masking: against transformers in float64."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import tiny_models
from oracle import YOPO, DivPrune, FastV, Feather, HiRED, PyramidDrop, SnapKV, VisionZip
from oracle_checks import (
    EXACT,
    HEADS,
    SAMPLES,
    decode,
    error,
    hidden_behind,
    longer,
    masked,
    model_of,
    prompts,
    some_text,
    window,
)
from tiny_models import CLS, LAYERS, MROPE, NAMES

pytestmark = pytest.mark.package  # no kernel runs here

DROPPING = [FastV(2, 0.5), PyramidDrop(), Feather()]


# --- the oracle that drops nothing is the model -----------------------------------------------------------------------


def keeps_all(name):
    methods = [None, FastV(2, 1.0), PyramidDrop(tuple(range(LAYERS)), (1.0,) * LAYERS), Feather((2, 4), 1.0)]
    methods += [SnapKV(8, 1.0), DivPrune(1.0)]
    if name == "llava":
        methods += [HiRED(1.0), VisionZip(tiny_models.SIDE[name] ** 2, 0, cls=False)]
    return methods


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample", range(SAMPLES))
def test_without_a_method_it_is_the_model(name, sample):
    model, one = model_of(name), prompts(name)[1][sample]
    tokens, expected = decode(model, one, 8)
    prompt = one["input_ids"].shape[1]
    assert error(oracle.trace(name, model, one, None, tokens).logits, expected) < EXACT
    for method in keeps_all(name) if sample == 2 else []:
        actual = oracle.logits(name, model, one, method, tokens)
        assert error(actual, expected[prompt - 1 :]) < EXACT, method
    # transformers' own float64 differs by what it computes in float32: norms
    plain = tiny_models.make(name).double()
    with torch.no_grad():
        assert error(plain(**longer(one, tokens)).logits[0], expected) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_text_is_left_whole(name):
    model = model_of(name)
    inputs = tiny_models.text_only(name, model)
    for sample in range(SAMPLES):
        one = tiny_models.one(name, inputs, sample)
        tokens, expected = decode(model, one, 8)
        methods = [FastV(), PyramidDrop(), Feather(), YOPO(1, 3, HEADS, 2), DivPrune(), None]
        for method in [*methods, *([HiRED(), VisionZip()] if name in CLS else [])]:
            found = oracle.trace(name, model, one, method, tokens)
            assert error(found.logits, expected) < EXACT


def test_videos():
    model = model_of("qwen2_5_vl")
    inputs = tiny_models.videos(model)
    for sample in range(2):
        one = tiny_models.one("qwen2_5_vl", inputs, sample)
        tokens, expected = decode(model, one, 8)
        assert error(oracle.trace("qwen2_5_vl", model, one, None, tokens).logits, expected) < EXACT
        kept = oracle.trace("qwen2_5_vl", model, one, FastV(2, 0.25)).kept[2]
        frames = {place.cell[0] for place in tiny_models.places("qwen2_5_vl", one)}
        assert len(kept) == one["input_ids"].shape[1] - (60, 64)[sample] + (15, 16)[sample]
        assert frames == set(range((3, 4)[sample]))


# --- what is dropped is as if it were never seen ----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [*DROPPING, DivPrune(0.3)], ids=lambda method: type(method).__name__)
def test_dropping_is_masking(name, method):
    for one in prompts(name)[1][1:3]:
        text = some_text()
        found = oracle.trace(name, model_of(name), one, method, text)
        masks, positions = hidden_behind(found, one["input_ids"].shape[1] + len(text))
        assert masks
        anew = name not in MROPE and type(method) in (PyramidDrop, DivPrune)
        expected = masked(name, longer(one, text), masks, positions if anew else None)
        assert found.rows[-9:] == list(range(found.rows[-1] - 8, found.rows[-1] + 1))
        assert error(found.logits, expected[found.rows]) < EXACT
        if name not in MROPE:  # and positions matter
            wrong = masked(name, longer(one, text), masks, None if anew else positions)
            assert error(found.logits, wrong[found.rows]) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_was_evicted_is_masked(name):
    one, text, method = prompts(name)[1][2], some_text(), SnapKV(8, 0.3)
    prompt = one["input_ids"].shape[1]
    found = oracle.trace(name, model_of(name), one, method, text)
    masks = {}
    for index in range(LAYERS):
        masks[index] = torch.ones(4, prompt + 8, prompt + 8, dtype=torch.bool).tril()
        for head in range(4):
            kept = found.cached[index][head // 2]
            assert len(kept) == int(prompt * 0.3) and kept[-8:] == list(range(prompt - 8, prompt))
            gone = torch.ones(prompt, dtype=torch.bool)
            gone[kept] = False
            masks[index][head, prompt:, :prompt] &= ~gone
    assert any(a != b for a, b in found.cached.values())
    assert error(found.logits, masked(name, longer(one, text), masks)) < EXACT


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("radius", [0, 1, 2])
def test_neighbours_are_a_mask(name, radius):
    for one in prompts(name)[1][1:3]:
        text = some_text()
        mask, _ = window(name, one, one["input_ids"].shape[1] + 8, radius)
        found = oracle.trace(name, model_of(name), one, YOPO(radius), text)
        expected = masked(name, longer(one, text), dict.fromkeys(range(LAYERS), mask))
        assert error(found.logits, expected) < EXACT
        if radius:
            assert mask.triu(1).any()  # later neighbours are seen


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_hides_visual_tokens(name):
    one, text = prompts(name)[1][1], some_text()
    tokens = one["input_ids"].shape[1] + 8
    mask, _ = window(name, one, tokens, 1)
    found = oracle.trace(name, model_of(name), one, YOPO(1, 3), text)
    later, _ = hidden_behind(found, tokens)
    expected = masked(name, longer(one, text), {**dict.fromkeys(range(3), mask), **later})
    assert error(found.logits, expected[found.rows]) < EXACT
    visual = (one["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0].tolist()
    assert found.kept == {3: sorted(set(range(tokens)) - set(visual))}
    assert min(later) == 3
    if name in tiny_models.PINPOINTS:  # newlines stay where they are text
        newlines = [row for row, place in zip(visual, tiny_models.places(name, one)) if place.cell is None]
        kept = oracle.trace(name, model_of(name), one, YOPO(1, 3), text, newlines="text").kept[3]
        assert newlines and kept == sorted({*found.kept[3], *newlines})


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_channels_that_are_off(name):
    """transformers' layers, with attention and channels changed by hand, head by head."""
    one, text = prompts(name)[1][2], some_text()
    tokens = one["input_ids"].shape[1] + 8
    model = oracle.exact(tiny_models.make(name))
    mask, cells = window(name, one, tokens, 1)
    visual = (longer(one, text)["input_ids"][0] == tiny_models.IMAGE)[:, None]
    seen = {}

    def attention(index):
        def hook(part, args, kwargs, output):
            # the output of this layer's attention, from its input by its own projections
            x, (cos, sin) = kwargs["hidden_states"][0], (table[0] for table in kwargs["position_embeddings"])
            q, k, v = (getattr(part, f"{kind}_proj")(x).view(tokens, -1, part.head_dim) for kind in "qkv")
            if hasattr(part, "q_norm"):
                q, k = part.q_norm(q), part.k_norm(k)

            def turn(y):
                half = part.head_dim // 2
                return y * cos[:, None] + torch.cat([-y[..., half:], y[..., :half]], -1) * sin[:, None]

            heads = []
            for head in range(q.shape[1]):
                kv = head // part.num_key_value_groups
                z = turn(q)[:, head] @ turn(k)[:, kv].T * part.scaling
                weights = z.masked_fill(~mask, -math.inf).softmax(-1)
                if HEADS[index] is not None and not HEADS[index][head]:
                    weights[:, cells] = 0
                    weights[cells] = 0
                heads.append(weights @ v[:, kv])
            seen[index] = True
            return part.o_proj(torch.cat(heads, -1))[None], *output[1:]

        return hook

    def mlp(part, args, output):
        x = args[0][0]
        channels = part.act_fn(part.gate_proj(x)) * part.up_proj(x)
        half = channels.shape[1] // 2
        first = part.down_proj(torch.cat([channels[:, :half], torch.zeros_like(channels[:, half:])], 1))
        return torch.where(visual, first, output[0])[None]

    for index, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_hook(attention(index), with_kwargs=True)
        layer.mlp.register_forward_hook(mlp)
    with torch.no_grad():
        expected = model(**longer(one, text), use_cache=False).logits[0]
    found = oracle.trace(name, model_of(name), one, YOPO(1, None, HEADS, 2), text)
    assert len(seen) == LAYERS and error(found.logits, expected) < EXACT
