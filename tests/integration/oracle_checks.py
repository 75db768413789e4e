"""What tests of the oracle share: models in float64, and unmodified models with masks put in."""

from __future__ import annotations

import oracle
import tiny_models
import torch
from tiny_models import LAYERS

EXACT = 1e-9  # of logits of about 1
SAMPLES = 4
HALF = torch.tensor([True, False, True, False])
HEADS = [None, HALF, ~HALF, torch.zeros(4, dtype=torch.bool), None, HALF]  # of YOPO
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
