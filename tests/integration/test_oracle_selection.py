"""Which tokens the oracle keeps: numbers, and scores against maps and features of transformers itself."""

import math

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import oracle_before
import tiny_models
from oracle import YOPO, DivPrune, FastV, Feather, HiRED, PyramidDrop, SnapKV, VisionZip
from oracle_before import hired_budgets
from oracle_checks import EXACT, error, hidden_behind, masked, model_of, prompts, some_text
from tiny_models import CLS, KV_HEADS, LAYERS, MROPE, NAMES

pytestmark = pytest.mark.package  # no kernel runs here


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


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl"])
def test_what_is_generated_changes_nothing_about_the_prompt(name):
    one = prompts(name)[1][2]
    prompt = one["input_ids"].shape[1]
    methods = [FastV(), PyramidDrop(), Feather(), YOPO(1, 3), DivPrune(0.3), SnapKV()]
    for method in [*methods, *([HiRED(), VisionZip()] if name in CLS else [])]:
        alone = oracle.trace(name, model_of(name), one, method)
        more = oracle.trace(name, model_of(name), one, method, some_text())
        assert alone.kept == {layer: [row for row in kept if row < prompt] for layer, kept in more.kept.items()}
        assert alone.cached == more.cached and (alone.kept or alone.cached)
        assert error(alone.logits, more.logits[:-8]) < EXACT
        last = oracle.logits(name, model_of(name), one, method, some_text()[:3].tolist())
        assert error(last, more.logits[-9:-5]) < EXACT


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
        tower = oracle_before.clip(model_of(name), pixels)
    assert error(tower.features, expected.hidden_states[-2]) < 1e-5  # transformers' softmax is float32
    for own, index in ((tower.first, 0), (tower.selected, -2)):
        assert error(own, expected.attentions[index][:, :, 0, 1:].sum(1)) < 1e-5
    layer = model.model.vision_tower.encoder.layers[-2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(expected.hidden_states[-3]))[:, 1:]
    assert error(tower.keys, keys.unflatten(-1, (2, 16)).mean(2)) < 1e-5


def test_budgets_of_hired():
    # 5 parts of 16 tokens, a fifth stays: 16; half of it for the whole image, 8 shared by where the best 8 are
    first = torch.tensor([9.0, 8, 7, 6, 1, 1, 1, 1, 5, 4, 0, 0, 3, 2, 0, 0])
    assert hired_budgets(first, (2, 2), 0.2, 0.5) == [8, 4, 0, 2, 2]
    # parts are runs of the raster: two rows of four for each of two crops, side by side or not
    assert hired_budgets(first, (1, 2), 0.2, 0.5) == hired_budgets(first, (2, 1), 0.2, 0.5) == [4, 2, 2]
    assert hired_budgets(first, (0, 0), 0.2, 0.5) == [3]
    assert hired_budgets(first, (2, 2), 1.0, 0.5) == [16, 16, 0, 16, 16]  # never more than there are
    with pytest.raises(ValueError, match="16 patches must be a multiple of 3 crops"):
        hired_budgets(first, (1, 3), 0.2, 0.5)


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
            tokens = oracle.embed(name, model, one, nothing, "visual")
            some = oracle_before.hired(name, model, one, tokens, HiRED(0.4, order="sequence"), oracle.Trace())
            assert error(some.hidden, tokens.hidden[some.places]) < EXACT
            text = oracle.embed(name, model, one, nothing, "text")
            more = oracle_before.hired(name, model, one, text, HiRED(0.4, order="sequence"), oracle.Trace())
            newlines = [i for i, cell in enumerate(tokens.cells) if tokens.visual[i] and cell is None]
            assert more.places == sorted({*some.places, *newlines})
            whole = oracle_before.hired(name, model, one, tokens, HiRED(0.4), oracle.Trace())
            expected = []
            pixels = one["pixel_values"] if name == "llava_next" else one["pixel_values"][:, None]
            for image, grid in zip(pixels, tiny_models.crops_of(name, one)):
                crops = image[: 1 + grid[0] * grid[1]]
                tower = model.model.vision_tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
                maps = oracle_before.clip(model, crops)
                budgets = hired_budgets(maps.first[0], grid, 0.4, 0.5)
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
        tower = oracle_before.clip(model, one["pixel_values"])
        tokens = oracle.embed(name, model, one, torch.empty(0, dtype=torch.int64), "visual")
        out = oracle_before.visionzip(name, model, one, tokens, VisionZip(7, 4), oracle.Trace())
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
        x = oracle.features_of(model_of(name), one)[0]
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
