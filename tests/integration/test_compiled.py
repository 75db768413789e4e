"""torch.compile of accelerated models: decode steps on a static cache, and decoders over prompts of many lengths."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.20", reason="transformers 5.20 or newer is not installed")

import tiny_models
from adapter_cases import CACHE, METHODS, STEPS, assert_equal, budget, ends, expected, inputs_of
from torch._dynamo.utils import counters
from transformers import StaticCache

from pyvtk.integrations import transformers as vtk

pytestmark = pytest.mark.compile
IMAGES = ((1, 1, 2, 1), (2, 1, 1, 1), (1, 1, 1, 2), (1, 2, 1, 1), (1, 1, 1, 1))  # of samples: prompts of other lengths


@pytest.fixture(autouse=True)
def from_scratch():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.long
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "YOPO, cut", "YOPO, heads off"])
def test_decode_steps_on_a_static_cache_are_one_graph(key):
    name, model, inputs = "llava", tiny_models.make("llava"), inputs_of("llava")
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length + STEPS)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with vtk.accelerate(model, METHODS[key]), torch.no_grad():
        step = torch.compile(model, backend="aot_eager", fullgraph=True)
        logits = [ends(model(**inputs, position_ids=position, use_cache=True, **{CACHE: cache}).logits, inputs)]
        tokens, position = [logits[-1].argmax(-1)], position[:, -1:]
        for _ in range(STEPS - 1):
            position, mask = position + 1, torch.nn.functional.pad(mask, (0, 1), value=1)
            asked = model.prepare_inputs_for_generation(
                tokens[-1], attention_mask=mask, position_ids=position, use_cache=True, next_sequence_length=1,
                **{CACHE: cache},
            )  # fmt: skip
            logits.append(step(**asked).logits)
            tokens.append(logits[-1].argmax(-1))
    assert graphs() == 1 and not counters["graph_break"]
    assert_equal(torch.cat(logits, 1), expected(name, key, torch.cat(tokens, 1)), budget(name))


@pytest.mark.long
@pytest.mark.parametrize("key", ["FastV", "PyramidDrop", "YOPO, cut"])
def test_a_decoder_is_compiled_for_all_lengths(key):
    """Twice at most: for the first length, and for all others."""
    name, model = "llava", tiny_models.make("llava")
    batches = [inputs_of(name, "left", images) for images in IMAGES]
    batches = [{**batch} for batch in batches]
    for number, batch in enumerate(batches):  # a length of its own
        for entry, fill in (("input_ids", 5), ("attention_mask", 1)):
            batch[entry] = torch.nn.functional.pad(batch[entry], (0, 3 * number), value=fill)
    assert len({batch["input_ids"].shape[1] for batch in batches}) == len(IMAGES)
    with vtk.accelerate(model, METHODS[key]), torch.no_grad():
        eager = [model(**batch, use_cache=False).logits for batch in batches]
        model.model.language_model.compile(fullgraph=True, backend="aot_eager")
        compiled = [model(**batch, use_cache=False).logits for batch in batches]
    assert 1 <= graphs() <= 2
    for found, want in zip(compiled, eager):
        assert_equal(found, want.double(), 2 * budget(name))  # each is as wrong as it may be
