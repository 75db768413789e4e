"""What generate does besides greedy decoding, with an adapter: beams, samples, candidates, caches, later turns."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import oracle
import tiny_models
from adapter_cases import (
    CACHE,
    CASES,
    METHODS,
    STEPS,
    alone,
    assert_equal,
    budget,
    exact_of,
    expected,
    inputs_of,
    model_of,
    trace_of,
)
from support import max_error
from tiny_models import generate_logits
from transformers import DynamicCache, StaticCache

from pyvtk.integrations import transformers as vtk

SAMPLES = 4
KEYS = ["FastV", "PyramidDrop", "Feather", "YOPO, cut", "YOPO, heads off", "SnapKV", "DivPrune"]


def tokens_behind(inputs, sequences):
    return sequences[:, inputs["input_ids"].shape[1] :]


def log_probability(name, key, sample, tokens):
    """Sum over tokens, by the oracle."""
    logits = trace_of(name, key, sample, tuple(tokens[:-1].tolist())).logits[-len(tokens) :]
    return logits.log_softmax(-1).gather(1, tokens[:, None]).sum()


@pytest.mark.parametrize(
    ("name", "key"),
    [case for case in CASES if case[0] in ("llava", "llava_next", "qwen2_5_vl") and "layer" not in case[1]],
)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_beams(name, key, cache):
    inputs = inputs_of(name)
    with vtk.accelerate(model_of(name), METHODS[key]), torch.no_grad():
        out = model_of(name).generate(
            **inputs, num_beams=2, num_return_sequences=2, length_penalty=0.0, do_sample=False, max_new_tokens=STEPS,
            output_scores=True, return_dict_in_generate=True, cache_implementation=cache,
        )  # fmt: skip
    tokens = tokens_behind(inputs, out.sequences)
    want = torch.stack([log_probability(name, key, row // 2, tokens[row]) for row in range(2 * SAMPLES)])
    # an error of a logit is one of its own probability, and one of the sum of all
    assert_equal(out.sequences_scores, want, 2 * STEPS * budget(name))
    assert not torch.equal(tokens[::2], tokens[1::2])
    # beams were followed, and not the greedy choice twice
    assert any(
        not torch.equal(beam, trace_of(name, key, row // 2, tuple(beam[:-1].tolist())).logits[-STEPS:].argmax(-1))
        for row, beam in enumerate(tokens)
    )


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "YOPO, heads off", "SnapKV"])
def test_samples(name, key):
    inputs = inputs_of(name)
    torch.manual_seed(7)
    with vtk.accelerate(model_of(name), METHODS[key]):
        options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
        logits, tokens = generate_logits(model_of(name), inputs, STEPS, **options)
    assert len(logits) == 2 * SAMPLES and not torch.equal(tokens[::2], tokens[1::2])
    for first in range(2):
        assert_equal(logits[first::2], expected(name, key, tokens[first::2]), budget(name))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("key", KEYS)
def test_prompt_lookup(name, key):
    """Candidates are looked up in the prompt, several at a time, and wrong ones are cut off the cache again."""
    model, inputs, widths = model_of(name), dict(alone(name, 0)), []
    # the prompt knows how the answer begins, and then is wrong
    with vtk.accelerate(model, METHODS[key]):
        _, answer = generate_logits(model, inputs, 24)
    begin = torch.cat([answer[:, :7], inputs["input_ids"][:, 1:4], answer[:, 7:15], inputs["input_ids"][:, 2:5]], 1)
    for entry, more in (("input_ids", begin), ("attention_mask", begin > 0), ("mm_token_type_ids", begin < 0)):
        if entry in inputs:
            inputs[entry] = torch.cat([inputs[entry][:, :1], more.to(inputs[entry].dtype), inputs[entry][:, 1:]], 1)
    with vtk.accelerate(model, METHODS[key]):
        hook = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda layer, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        greedy, wanted = generate_logits(model, inputs, 24)
        steps = len(widths)
        widths.clear()
        logits, tokens = generate_logits(model, inputs, 24, prompt_lookup_num_tokens=3)
        hook.remove()
    assert torch.equal(tokens, wanted)
    assert_equal(logits, greedy.double(), 2 * budget(name))  # each is as wrong as it may be
    assert max(widths[1:]) > 1, "no candidates were looked up"
    assert sum(widths[1:]) > 23, "no candidate was wrong"
    assert len(widths) <= steps


# Caches


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", ["dynamic", "dynamic, of a config", "static"])
def test_a_cache_of_the_users(key, kind):
    name = "llava"
    model, inputs = model_of(name), inputs_of(name)
    config, room = model.config.get_text_config(), inputs["input_ids"].shape[1] + STEPS
    cache = {
        "dynamic": lambda: DynamicCache(),
        "dynamic, of a config": lambda: DynamicCache(config=config),
        "static": lambda: StaticCache(config=config, max_cache_len=room),
    }[kind]()
    with vtk.accelerate(model, METHODS[key]):
        logits, tokens = generate_logits(model, inputs, STEPS, **{CACHE: cache})
    assert_equal(logits, expected(name, key, tokens), budget(name))
    assert int(cache.get_seq_length()) == inputs["input_ids"].shape[1] + STEPS - 1  # as if nothing had been dropped
    if kind == "static":
        return
    held = [layer.keys.shape[2] for layer in cache.layers]
    dense = inputs["input_ids"].shape[1] + STEPS - 1
    dropped = [number for number, slots in enumerate(held) if slots < dense]
    first = {"FastV": 2, "PyramidDrop": 1, "Feather": 2, "YOPO, cut": 3, "YOPO, heads off": 6}.get(key, 0)
    assert dropped == list(range(first, 6))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_later_turn(name, key, kind):
    """Text behind an answer, several tokens at once, on the cache that the answer left."""
    model, inputs, turn, steps = model_of(name), inputs_of(name), 5, 5
    length = inputs["input_ids"].shape[1]
    cache = DynamicCache()
    if kind == "static":
        room = length + STEPS + turn + steps
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=room)
    more = torch.randint(*tiny_models.WORDS, (SAMPLES, turn), generator=torch.Generator().manual_seed(3))
    with vtk.accelerate(model, METHODS[key]):
        _, answer = generate_logits(model, inputs, STEPS, **{CACHE: cache})
        later = {"input_ids": torch.cat([inputs["input_ids"], answer, more], 1)}
        later["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + turn), value=1)
        for entry in ("mm_token_type_ids", "image_grid_thw"):
            if entry in inputs:
                later[entry] = inputs[entry]
        if "mm_token_type_ids" in later:
            later["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, STEPS + turn))
        logits, tokens = generate_logits(model, later, steps, **{CACHE: cache})
    assert logits.shape[1] == steps
    behind = torch.cat([answer, more, tokens], 1)
    want = expected(name, key, behind)[:, -steps:]
    assert_equal(logits, want, budget(name))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("key", KEYS)
def test_a_prompt_in_chunks(name, key):
    """The first chunk holds all visual tokens, and is the prompt; the others are text behind it."""
    inputs = alone(name, 0)
    ids = inputs["input_ids"]
    first = int((ids == tiny_models.IMAGE).nonzero()[-1, 1]) + 3
    logits, tokens = generate_logits(model_of(name), inputs, STEPS, prefill_chunk_size=first)
    if max_error(logits[0], trace_of(name, None, 0, tuple(tokens[0, :-1].tolist())).logits[-STEPS:]) > budget(name):
        pytest.skip("generate of this transformers (before 5.24) leaves images out of a prompt in chunks")
    with vtk.accelerate(model_of(name), METHODS[key]):
        logits, tokens = generate_logits(model_of(name), inputs, STEPS, prefill_chunk_size=first)
    chunk = {entry: x[:, :first] if x.shape[-1] == ids.shape[1] else x for entry, x in inputs.items()}
    behind = [*ids[0, first:].tolist(), *tokens[0, :-1].tolist()]
    want = oracle.logits(name, exact_of(name), chunk, METHODS[key], behind)[-STEPS:]
    assert len(behind) >= STEPS + 3
    assert_equal(logits, want[None], budget(name))
