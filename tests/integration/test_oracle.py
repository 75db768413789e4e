"""The oracle of the adapter's tests, tested against transformers itself: unmodified models, masks, maps, losses."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import tiny_models
from oracle import YOPO, DivPrune, FastV, Feather, HiRED, PyramidDrop, SnapKV, VisionZip
from tiny_models import CLS, KV_HEADS, LAYERS, MROPE, NAMES

pytestmark = pytest.mark.package  # no kernel runs here

EXACT = 1e-9
SAMPLES = 4
DROPPING = [FastV(2, 0.5), PyramidDrop(), Feather()]
HALF = torch.tensor([True, False, True, False])
HEADS = [None, HALF, ~HALF, torch.zeros(4, dtype=torch.bool), None, HALF]
models = {}  # made once; no test changes them


def model_of(name, kind=torch.float64):
    if (name, kind) not in models:
        model = tiny_models.make(name)
        models[name, kind] = oracle.exact(model) if kind == torch.float64 else model
    return models[name, kind]


def prompts(name, **options):
    """A batch, and each sample of it."""
    inputs = tiny_models.batch(name, model_of(name), **options)
    return inputs, [tiny_models.one(name, inputs, sample) for sample in range(len(inputs["input_ids"]))]


def longer(inputs, generated):
    """The inputs of one sample with text behind them."""
    out = dict(inputs)
    for key, value in (("input_ids", generated), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if key in inputs:
            more = torch.zeros(1, len(generated), dtype=inputs[key].dtype) + torch.as_tensor(value)
            out[key] = torch.cat([inputs[key], more.to(inputs[key].dtype)], 1)
    return out


@torch.no_grad()
def decode(model, inputs, steps):
    """Greedy tokens of the unmodified model, by computing everything anew, and the logits of all steps."""
    tokens = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        tokens = torch.cat([tokens, model(**longer(inputs, tokens)).logits[0, -1].argmax()[None]])
    return tokens, model(**longer(inputs, tokens)).logits[0]


def some_text(count=8):
    return torch.randint(*tiny_models.WORDS, (count,), generator=torch.Generator().manual_seed(5))


def error(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


# --- models -----------------------------------------------------------------------------------------------------------


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
        for method in (*DROPPING, YOPO(1, 3)):
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


@torch.no_grad()
def masked(name, inputs, masks, rebased=None, maps=False):
    """Logits of the unmodified model's layers with masks put in: layer -> bool [tokens, tokens] or [heads, ...].

    Args:
        rebased: layer -> positions, of models whose positions are counted anew.
        maps: return the maps of all layers instead, which transformers rounds to float32.
    """
    model = oracle.exact(tiny_models.make(name, attention="eager" if maps else "sdpa"))
    rotary = model.model.language_model.rotary_emb

    def replace(index):
        def hook(layer, args, kwargs):
            mask = masks[index]
            mask = torch.where(mask, 0.0, -1e30).to(args[0].dtype) if maps else mask
            kwargs = {**kwargs, "attention_mask": mask[None] if mask.dim() == 3 else mask[None, None]}
            if rebased is not None and index in rebased:
                kwargs["position_embeddings"] = rotary(args[0], rebased[index][None])
            return args, kwargs

        return hook

    for index, layer in enumerate(model.model.language_model.layers):
        if index in masks:
            layer.register_forward_pre_hook(replace(index), with_kwargs=True)
    out = model(**inputs, use_cache=False, output_attentions=maps)
    return out.attentions if maps else out.logits[0]


def hidden_behind(found, tokens):
    """For every layer a mask, and places counted anew, that leave out what was dropped before it."""
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    masks, positions, there = {}, {}, range(tokens)
    for index in range(LAYERS):
        there = found.kept.get(index, there)
        if len(there) < tokens:
            seen = torch.zeros(tokens, dtype=torch.bool)
            seen[list(there)] = True
            masks[index] = causal & seen | torch.eye(tokens, dtype=torch.bool)  # a row must see something
            positions[index] = torch.zeros(tokens, dtype=torch.int64)
            positions[index][list(there)] = torch.arange(len(there))
    return masks, positions


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


def window(name, one, tokens, radius):
    """YOPO's mask, by grids as pictures: every cell marks its neighbours."""
    places = tiny_models.places(name, one)
    ids = one["input_ids"][0]
    rows = ((ids == tiny_models.IMAGE) | (ids == tiny_models.VIDEO)).nonzero()[:, 0].tolist()
    cells = {(p.image, p.grid, *p.cell): row for row, p in zip(rows, places) if p.cell is not None}
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    marked = list(cells.values())
    mask[torch.tensor(marked)[:, None], torch.tensor(marked)] = False
    reach = range(-radius, radius + 1)
    for (image, grid, t, y, x), row in cells.items():
        for dy in reach:
            for dx in reach:
                if (image, grid, t, y + dy, x + dx) in cells:
                    mask[row, cells[image, grid, t, y + dy, x + dx]] = True
    return mask, marked


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


# --- which tokens stay ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_the_model_s_own_maps(name):
    """FastV and the first stage of PyramidDrop against the maps that transformers returns (float32 inside)."""
    eager = tiny_models.make(name, attention="eager")
    for one in prompts(name)[1]:
        with torch.no_grad():
            alone = {k: v.float() if v.is_floating_point() else v for k, v in one.items()}
            maps = eager(**alone, output_attentions=True, use_cache=False).attentions
        visual = (one["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
        for method, layer, keep in ((FastV(3, 0.4), 3, round), (PyramidDrop((2,), (0.4,)), 2, int)):
            found = oracle.trace(name, model_of(name), one, method)
            assert found.margin > 1e-5
            scores = maps[2][0].mean(0)[-1, visual]
            best = visual[scores.topk(keep(len(visual) * 0.4)).indices].tolist()
            text = set(range(one["input_ids"].shape[1])) - set(visual.tolist())
            assert found.kept == {layer: sorted({*best, *text})}


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_later_stages_are_maps_of_what_is_left(name):
    for one in prompts(name)[1][2:]:
        found = oracle.trace(name, model_of(name), one, PyramidDrop())
        assert found.margin > 1e-5
        tokens = one["input_ids"].shape[1]
        visual = (one["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
        text = set(range(tokens)) - set(visual.tolist())
        for before, layer, keep in ((1, 2, 0.25), (2, 4, 0.125)):
            earlier = oracle.Trace(kept={stage: kept for stage, kept in found.kept.items() if stage < layer})
            masks, positions = hidden_behind(earlier, tokens)
            maps = masked(name, one, masks, None if name in MROPE else positions, maps=True)
            left = torch.tensor([row for row in found.kept[before] if row not in text])
            scores = maps[layer][0].mean(0)[-1, left]
            best = left[scores.topk(int(len(visual) * keep)).indices].tolist()
            assert found.kept[layer] == sorted({*best, *text})


@pytest.mark.parametrize("name", NAMES)
def test_scores_of_feather_are_not_rotated(name):
    """From what the model's own projections and norms return, among visual keys."""
    for one in prompts(name)[1][2:]:
        found = oracle.trace(name, model_of(name), one, Feather((2, 4), 0.3, 3))
        assert found.margin > 1e-6
        model = oracle.exact(tiny_models.make(name))
        tokens, seen = one["input_ids"].shape[1], {}
        for index in (1, 3):
            for kind in "qk":
                attention = model.model.language_model.layers[index].self_attn
                part = getattr(attention, f"{kind}_norm", getattr(attention, f"{kind}_proj"))
                part.register_forward_hook(lambda *args, at=(index, kind), seen=seen: seen.update({at: args[2][0]}))
        masks, _ = hidden_behind(oracle.Trace(kept={2: found.kept[2]}), tokens)
        for index in masks:
            layer = model.model.language_model.layers[index]
            mask = {"attention_mask": masks[index][None, None]}
            layer.register_forward_pre_hook(lambda _, args, kwargs, mask=mask: (args, kwargs | mask), with_kwargs=True)
        with torch.no_grad():
            model(**one, use_cache=False)
        visual = (one["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
        places = tiny_models.places(name, one)
        grid = [row for row, p in zip(visual.tolist(), places) if p.cell and not (p.cell[1] % 3 or p.cell[2] % 3)]
        for index, keep, always in ((1, 0.3, grid), (3, 0.3**2, [])):
            q, k = (seen[index, kind].reshape(tokens, -1, 16) for kind in "qk")
            weights = torch.stack([(q[-1, head] @ k[visual, head // 2].T / 4).softmax(-1) for head in range(4)])
            best = visual[weights.mean(0).topk(int(len(visual) * keep)).indices].tolist()
            kept = [row for row in found.kept[index + 1] if row in visual]
            assert kept == sorted({*best, *always})
            visual = torch.tensor(kept)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_that_stay(name):
    for one in prompts(name)[1]:
        places = tiny_models.places(name, one)
        count, tokens = len(places), one["input_ids"].shape[1]
        text = tokens - count

        def sizes(method, one=one):
            return {index: len(kept) for index, kept in oracle.trace(name, model_of(name), one, method).kept.items()}

        assert sizes(FastV(2, 0.3)) == {2: text + round(count * 0.3)}
        floors = {layer: text + math.floor(count * keep) for layer, keep in ((1, 0.5), (2, 0.25), (4, 0.125))}
        assert sizes(PyramidDrop()) == floors
        assert sizes(DivPrune(0.1)) == {0: text + round(count * 0.1)}
        # the lattice is on top of the best, without counting twice
        found = oracle.trace(name, model_of(name), one, Feather((2, 4), 0.3, 3))
        lattice = sum(p.cell is not None and p.cell[1] % 3 == 0 and p.cell[2] % 3 == 0 for p in places)
        best, stage = math.floor(count * 0.3), len(found.kept[2]) - text
        assert max(best, lattice) <= stage <= best + lattice
        assert len(found.kept[4]) == text + math.floor(stage * 0.3**2)
        cached = oracle.trace(name, model_of(name), one, SnapKV(8, 0.25)).cached
        assert set(cached) == set(range(LAYERS))
        assert {len(kept) for layer in cached.values() for kept in layer} == {max(math.floor(tokens * 0.25), 8)}
        assert all(len(layer) == KV_HEADS for layer in cached.values())


def test_rounding_of_fastv_is_to_even():
    one = prompts("qwen2_vl")[1][0]  # 42 visual tokens
    kept = oracle.trace("qwen2_vl", model_of("qwen2_vl"), one, FastV(1, 0.25)).kept[1]
    assert len(kept) == one["input_ids"].shape[1] - 42 + 10


@pytest.mark.parametrize("name", CLS)
def test_the_tower_is_the_model_s_own(name):
    model = tiny_models.make(name, attention="eager").double()
    pixels = prompts(name)[1][0]["pixel_values"].flatten(0, -4)
    with torch.no_grad():
        expected = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
        tower = oracle._clip(model_of(name), pixels)
    assert error(tower.features, expected.hidden_states[-2]) < 1e-5  # transformers' softmax is float32
    for own, index in ((tower.first, 0), (tower.selected, -2)):
        assert error(own, expected.attentions[index][:, :, 0, 1:].sum(1)) < 1e-5
    layer = model.model.vision_tower.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(expected.hidden_states[-3]))[:, 1:]
    assert error(tower.keys, keys.unflatten(-1, (2, 16)).mean(2)) < 1e-5


def test_budgets_of_hired():
    # 5 parts of 16 tokens, a fifth stays: 16; half of it for the whole image, 8 shared by where the best 8 are
    first = torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1, 5, 4, 0, 0, 3, 2, 0, 0])
    assert oracle.hired_budgets(first, (2, 2), 0.2, 0.5) == [8, 4, 0, 2, 2]
    # parts are runs of the raster: two rows of four for each of two crops, side by side or not
    assert oracle.hired_budgets(first, (1, 2), 0.2, 0.5) == oracle.hired_budgets(first, (2, 1), 0.2, 0.5) == [4, 2, 2]
    assert oracle.hired_budgets(first, (0, 0), 0.2, 0.5) == [3]
    assert oracle.hired_budgets(first, (2, 2), 1.0, 0.5) == [16, 16, 0, 16, 16]  # never more than there are
    with pytest.raises(ValueError, match="16 patches must be a multiple of 3 crops"):
        oracle.hired_budgets(first, (1, 3), 0.2, 0.5)


@pytest.mark.parametrize("name", CLS)
def test_numbers_of_tower_methods(name):
    for one in prompts(name)[1]:
        crops = sum(1 + h * w for h, w in tiny_models.crops_of(name, one))
        text = one["input_ids"].shape[1] - len(tiny_models.places(name, one))
        patches = tiny_models.SIDE[name] ** 2
        model, generated = model_of(name), some_text()

        def rows(method, one=one, model=model, generated=generated):
            return oracle.trace(name, model, one, method, generated).rows

        assert len(rows(VisionZip(5, 3))) == text + 8 * crops + 8
        assert len(rows(VisionZip(5, 3, cls=False))) == text + 8 * crops + 8
        assert len(rows(VisionZip(0.3, 0.2))) == text + (int(patches * 0.3) + int(patches * 0.2)) * crops + 8
        assert rows(VisionZip(5, 3)).count(-1) >= len(tiny_models.crops_of(name, one))  # CLS has no place
        total = sum(int((1 + h * w) * patches * 0.2) for h, w in tiny_models.crops_of(name, one))
        assert text + 8 + total - crops <= len(rows(HiRED())) <= text + 8 + total
        kept = rows(HiRED(order="sequence"))
        assert kept == sorted(set(kept)) and -1 not in kept


@pytest.mark.parametrize("name", CLS)
def test_hired_takes_features_as_they_are(name):
    """Where the sequence has a place for a patch, the feature there is the model's; else crop after crop."""
    model, nothing = model_of(name), torch.empty(0, dtype=torch.int64)
    for one in prompts(name)[1]:
        with torch.no_grad():
            tokens = oracle._embed(name, model, one, nothing, "visual")
            some = oracle._hired(name, model, one, tokens, HiRED(0.4, order="sequence"), oracle.Trace())
            assert error(some.hidden, tokens.hidden[some.places]) < EXACT
            text = oracle._embed(name, model, one, nothing, "text")
            more = oracle._hired(name, model, one, text, HiRED(0.4, order="sequence"), oracle.Trace())
            newlines = [i for i, cell in enumerate(tokens.cells) if tokens.visual[i] and cell is None]
            assert more.places == sorted({*some.places, *newlines})
            whole = oracle._hired(name, model, one, tokens, HiRED(0.4), oracle.Trace())
            expected = []
            pixels = one["pixel_values"] if name == "llava_next" else one["pixel_values"][:, None]
            for image, grid in zip(pixels, tiny_models.crops_of(name, one)):
                crops = image[: 1 + grid[0] * grid[1]]
                tower = model.model.vision_tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
                maps = oracle._clip(model, crops)
                budgets = oracle.hired_budgets(maps.first[0], grid, 0.4, 0.5)
                for feature, score, budget in zip(tower, maps.selected, budgets, strict=True):
                    expected.append(feature[score.topk(budget).indices.sort().values])
            expected = model.model.multi_modal_projector(torch.cat(expected))
        assert error(whole.hidden[torch.tensor(whole.visual)], expected) < EXACT
        words = [i for i, visual in enumerate(tokens.visual) if not visual]
        assert error(whole.hidden[~torch.tensor(whole.visual)], tokens.hidden[words]) < EXACT


def test_visionzip_adds_the_mean_to_its_target():
    name = "llava"
    one = prompts(name)[1][0]
    model = model_of(name)
    side = tiny_models.SIDE[name]
    with torch.no_grad():
        tower = oracle._clip(model, one["pixel_values"])
        tokens = oracle._embed(name, model, one, torch.empty(0, dtype=torch.int64), "visual")
        out = oracle._visionzip(name, model, one, tokens, VisionZip(7, 4), oracle.Trace())
        # by matrices: one row per target, weights of the mean and of the target itself
        dominant = tower.selected[0].topk(6).indices.sort().values
        left = torch.tensor([i for i in range(side * side) if i not in dominant])
        keys = torch.nn.functional.normalize(tower.keys[0][left], dim=-1)
        step = len(left) // 4
        targets = torch.arange(4) * step
        nearest = (keys @ keys[targets].T).argmax(-1)
        weights = torch.nn.functional.one_hot(nearest, 4).double()
        weights[targets] = 0
        weights = weights / weights.sum(0).clamp(min=1)
        weights[targets, torch.arange(4)] = 1
        features = tower.features[0]
        merged = torch.cat([features[:1], features[1 + dominant], weights.T @ features[1 + left]])
        expected = model.model.multi_modal_projector(merged)
    visual = torch.tensor(out.visual)
    assert error(out.hidden[visual], expected) < EXACT
    first = one["input_ids"][0].tolist().index(tiny_models.IMAGE)
    assert out.visual == [False] * first + [True] * 11 + [False] * (len(out.places) - first - 11)


def test_divprune_is_farthest_first():
    name = "qwen2_vl"
    one = prompts(name)[1][0]
    found = oracle.trace(name, model_of(name), one, DivPrune(0.2))
    with torch.no_grad():
        x = oracle._features(model_of(name), one)[0]
    x = torch.nn.functional.normalize(x, dim=-1)
    distance = 1 - x @ x.T
    chosen = [distance.topk(2, dim=0, largest=False).values[1].argmax().item()]
    while len(chosen) < 8:
        chosen.append(distance[chosen].min(0).values.argmax().item())
    rows = (one["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
    assert [row for row in found.kept[0] if row in rows] == sorted(rows[chosen].tolist())


@pytest.mark.parametrize("pool", ["avg", "max"])
def test_snapkv_pools_what_the_window_sees(pool):
    name, method = "llava", SnapKV(6, 0.3, 3, pool)
    one = prompts(name)[1][1]
    eager = tiny_models.make(name, attention="eager").double()
    with torch.no_grad():
        maps = eager(**one, output_attentions=True, use_cache=False).attentions
    prompt = one["input_ids"].shape[1]
    found = oracle.trace(name, model_of(name), one, method)
    pooling = torch.nn.functional.avg_pool1d if pool == "avg" else torch.nn.functional.max_pool1d
    for index in range(LAYERS):
        observed = maps[index][0, :, -6:, : prompt - 6].sum(1)  # [heads, past]
        scores = pooling(observed[:, None], 3, stride=1, padding=1)[:, 0].unflatten(0, (KV_HEADS, -1)).sum(1)
        # neighbours of a maximum tie: the lower index wins
        best = scores.argsort(descending=True, stable=True)[:, : int(prompt * 0.3) - 6].sort().values
        expected = [[*row, *range(prompt - 6, prompt)] for row in best.tolist()]
        assert found.cached[index] == expected


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_gradients_without_a_method_are_the_model_s(name, padding):
    model = oracle.exact(tiny_models.make(name)).requires_grad_()
    inputs, _ = prompts(name, padding=padding)
    labels = tiny_models.answers(name, inputs)
    positions = {} if name in MROPE else {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    logits = model(**inputs, **positions, use_cache=False).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    loss, grads, _ = oracle.gradients(name, model_of(name, torch.float32), inputs, labels)
    assert error(loss, expected.detach()) < EXACT
    wanted = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(grads) == set(wanted)
    largest = max(grad.abs().max() for grad in wanted.values())
    # towers of Qwen's models rotate in float32, whose rounding depends on the shape of the batch
    tolerance = 1e-6 if name in MROPE else EXACT
    assert max(error(grads[key], wanted[key]) for key in wanted) < tolerance * largest


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
@pytest.mark.parametrize("method", [PyramidDrop(), YOPO(1), YOPO(2, 3, HEADS, 2)], ids=["drop", "window", "cut"])
def test_gradients_are_those_of_the_loss(name, method):
    """By differences in a random direction; dropped sets do not change on the way."""
    model = tiny_models.make(name)
    inputs, _ = prompts(name)
    labels = tiny_models.answers(name, inputs)
    loss, grads, traces = oracle.gradients(name, model, inputs, labels, method)
    if isinstance(method, PyramidDrop):
        assert min(found.margin for found in traces) > 1e-5
    random = torch.Generator().manual_seed(3)
    direction = {key: torch.randn(grad.shape, generator=random, dtype=torch.float64) for key, grad in grads.items()}
    # the blocks of Qwen's towers rotate in float32, which hides small steps
    direction = {key: grad for key, grad in direction.items() if "merger" in key or "visual" not in key}
    slope = sum((grads[key] * direction[key]).sum() for key in direction)
    step, moved = 1e-7, []
    for sign in (1, -1):
        other = oracle.exact(model)
        with torch.no_grad():
            for key, p in other.named_parameters():
                if key in direction:
                    p += sign * step * direction[key]
        moved.append(oracle.gradients(name, other, inputs, labels, method)[0])
    assert math.isclose((moved[0] - moved[1]) / (2 * step), slope, rel_tol=1e-4)
    plain, _, _ = oracle.gradients(name, model, inputs, labels)
    assert abs(plain - loss) > 1e-3


def test_questions_in_training():
    """Each answer is asked for by the token before it; scores of several are averaged; no answer, no dropping."""
    name = "llava"
    model = model_of(name)
    inputs, alone = prompts(name)
    labels = tiny_models.answers(name, inputs)
    labels[1] = -100
    _, _, traces = oracle.gradients(name, model, inputs, labels, PyramidDrop((1,), (0.25,)))
    assert traces[1].kept == {}
    eager = tiny_models.make(name, attention="eager").double()
    for sample in (0, 2, 3):
        with torch.no_grad():
            attended = eager(**alone[sample], output_attentions=True, use_cache=False).attentions[1][0].mean(0)
        label = labels[sample][inputs["attention_mask"][sample].bool()]
        asked = [i for i in range(len(label) - 1) if label[i] == -100 and label[i + 1] != -100]
        assert len(asked) == (2 if sample == 2 else 1)
        visual = (alone[sample]["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0]
        best = visual[attended[asked][:, visual].mean(0).topk(len(visual) // 4).indices].tolist()
        assert [row for row in traces[sample].kept[1] if row in visual] == sorted(best)


def test_an_answer_right_behind_an_image_loses_its_first_token_with_the_image():
    name = "llava"
    inputs, _ = prompts(name)
    labels = tiny_models.answers(name, inputs, behind_image=True)
    alone = inputs["attention_mask"][0].bool()
    last = (inputs["input_ids"][0][alone] == tiny_models.IMAGE).nonzero()[-1, 0].item()
    assert labels[0][alone][last] == -100 and labels[0][alone][last + 1] != -100
    first = {key: value[:1] for key, value in inputs.items()}
    loss, _, (found,) = oracle.gradients(name, model_of(name), first, labels[:1], YOPO(1, 3))
    assert last not in found.rows and last + 1 in found.rows
    label = labels[0][alone]
    rows = [row for row, place in enumerate(found.rows) if place > last and place + 1 < len(label)]
    wanted = torch.nn.functional.cross_entropy(found.logits[rows], label[last + 2 :])
    assert error(loss, wanted.detach()) < EXACT
    with pytest.raises(ValueError, match="gradients: method must be PyramidDrop or YOPO, got FastV"):
        oracle.gradients(name, model_of(name), first, labels[:1], FastV())
