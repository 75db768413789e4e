"""The oracle's methods that act before the first layer: HiRED, VisionZip, DivPrune."""

from __future__ import annotations

from dataclasses import dataclass, replace

import tiny_models
import torch
from oracle_tokens import Tokens, Trace, best
from torch import Tensor, nn


@dataclass(frozen=True)
class HiRED:
    """Shares of all tokens, and of these for the whole image.

    ``order="crops"`` is the authors': crop after crop, those that show an image's padding too. "sequence" leaves tokens
    at their places in the sequence, where they have one.
    """

    keep: float = 0.2
    alpha: float = 0.5
    order: str = "crops"


@dataclass(frozen=True)
class VisionZip:
    """Numbers of tokens per crop, or shares of its patches (floor).

    The authors count CLS among the dominant ones (``cls``), and put contextual tokens behind dominant ones
    (``order="crops"``); "sequence" leaves all at their places.
    """

    dominant: int | float = 12
    contextual: int | float = 3
    cls: bool = True
    order: str = "crops"


@dataclass(frozen=True)
class DivPrune:
    keep: float = 0.1


def divprune(name: str, model, inputs, tokens: Tokens, method, found: Trace) -> Tokens:
    """Greedy: whoever is farthest (1 - cosine) from all chosen ones is next; the first is farthest from its nearest."""
    candidates = tokens.candidates()
    x = tokens.hidden[candidates]
    x = x / x.norm(dim=-1, keepdim=True)
    distance = (1 - x @ x.T).round(decimals=12).tolist()  # newlines are all alike: let the lower index win
    count, chosen = round(len(candidates) * method.keep), []
    everyone = range(len(candidates))
    while len(chosen) < min(count, len(candidates)):
        if chosen:
            left = [i for i in everyone if i not in chosen]
            gaps = [min(distance[i][j] for j in chosen) for i in left]
        else:
            left = list(everyone)
            gaps = [min((distance[i][j] for j in left if j != i), default=0.0) for i in left]
        chosen.append(left[best(gaps, 1, found)[0]])
    stay = {candidates[i] for i in chosen}
    return tokens.take([row for row, visual in enumerate(tokens.visual) if not visual or row in stay])


@dataclass
class Tower:
    """Of a CLIP tower, for every crop: attention of CLS to patches (heads added up), features, keys (mean of heads)."""

    first: Tensor  # [crops, patches], of the first layer
    selected: Tensor  # [crops, patches], of the layer whose output is used
    features: Tensor  # [crops, 1 + patches, channels], of that layer, before the projector
    keys: Tensor  # [crops, patches, head channels], of that layer


def clip(model: nn.Module, pixels: Tensor) -> Tower:
    tower = model.model.vision_tower
    tower = getattr(tower, "vision_model", tower)
    layers = tower.encoder.layers
    used = model.config.vision_feature_layer % (len(layers) + 1) - 1  # hidden states begin with the embeddings
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for index, layer in enumerate(layers[: used + 1]):
        attention, x = layer.self_attn, layer.layer_norm1(hidden)
        q, k, v = (
            getattr(attention, part)(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            for part in ("q_proj", "k_proj", "v_proj")
        )
        attended = (q @ k.transpose(2, 3) * attention.scale).softmax(-1)
        hidden = hidden + attention.out_proj((attended @ v).transpose(1, 2).flatten(2))
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        selected = attended[:, :, 0, 1:].sum(1)
        if index == 0:
            first = selected
    return Tower(first, selected, hidden, k.mean(1)[:, 1:])


def _tower_tokens(name: str, model, inputs, tokens: Tokens, order: str, choose) -> Tokens:
    """Replaces every image's visual tokens by those that ``choose`` makes of its crops.

    ``choose(tower, crops, grid)`` returns [(crop, patch, feature before the projector)] in the authors' order; patch -1
    is CLS. With order "crops" these tokens, all of them, stand where the image stood; newlines are gone. With
    "sequence" each stays where its patch is in the sequence, and what has no place there (CLS, patches of the padding
    that anyres cuts off) is left out.
    """
    if name not in tiny_models.CLS:
        raise ValueError(f"oracle: HiRED and VisionZip must have a model of {tiny_models.CLS}, got {name!r}")
    pixels, crops = inputs["pixel_values"], tiny_models.crops_of(name, inputs)
    where = (inputs["input_ids"][0] == tiny_models.IMAGE).nonzero()[:, 0].tolist()
    placed = list(zip(where, tiny_models.places(name, inputs), strict=True))
    pieces, begin = [], 0  # (place, hidden state) in order
    for image, grid in enumerate(crops):
        own = pixels[image, : 1 + grid[0] * grid[1]] if pixels.dim() == 5 else pixels[image : image + 1]
        made = choose(clip(model, own), len(own), grid)
        features = model.model.multi_modal_projector(torch.stack([feature for _, _, feature in made]))
        mine = [(row, place) for row, place in placed if place.image == image]
        at = {(place.crop, place.patch): row for row, place in mine if place.cell is not None}
        some = [(at.get((crop, patch), -1), feature) for (crop, patch, _), feature in zip(made, features)]
        if order == "sequence":
            some = [entry for entry in some if entry[0] >= 0]
            some += [(row, tokens.hidden[row]) for row, _ in mine if not tokens.visual[row]]  # newlines as text
            some.sort(key=lambda entry: entry[0])
        pieces += [(row, tokens.hidden[row]) for row in range(begin, mine[0][0])] + some
        begin = mine[-1][0] + 1
    pieces += [(row, tokens.hidden[row]) for row in range(begin, len(tokens.places))]
    places = [row for row, _ in pieces]
    return replace(
        tokens, hidden=torch.stack([state for _, state in pieces]), places=places,
        positions=torch.arange(len(places))[None], visual=[row < 0 or tokens.visual[row] for row in places],
        cells=[tokens.cells[row] if row >= 0 else None for row in places],
    )  # fmt: skip


def hired_budgets(
    first: Tensor, grid: tuple[int, int], keep: float, alpha: float, found: Trace | None = None
) -> list[int]:
    """HiRED: how many tokens each crop may keep, the whole image first.

    Args:
        first: [patches], attention of CLS in the first layer, of the whole image.
        grid: crops (below, beside each other) of the image; (0, 0): none.
        keep, alpha: the share of all tokens that stays, and what part of it goes to the whole image.
        found: notes the margin.
    """
    patches, parts = len(first), grid[0] * grid[1]
    total = int((1 + parts) * patches * keep)
    if not parts:
        return [min(total, patches)]
    if patches % parts:
        raise ValueError(f"HiRED: {patches} patches must be a multiple of {parts} crops")
    whole = min(int(total * alpha), patches)
    top = best(first.tolist(), int(patches * (1 - alpha)), found or Trace())
    run = patches // parts  # the authors' parts are runs of the raster, not rectangles
    shares = [sum(run * part <= i < run * (part + 1) for i in top) / len(top) if top else 0.0 for part in range(parts)]
    return [whole, *(min(int(share * (total - whole)), patches) for share in shares)]


def hired(name: str, model, inputs, tokens: Tokens, method, found: Trace) -> Tokens:
    def choose(tower: Tower, crops: int, grid: tuple[int, int]):
        budgets = hired_budgets(tower.first[0], grid, method.keep, method.alpha, found)
        return [
            (crop, patch, tower.features[crop, 1 + patch])
            for crop in range(crops)
            for patch in best(tower.selected[crop].tolist(), budgets[crop], found)
        ]

    return _tower_tokens(name, model, inputs, tokens, getattr(method, "order", "crops"), choose)


def visionzip(name: str, model, inputs, tokens: Tokens, method, found: Trace) -> Tokens:
    cls = getattr(method, "cls", True)

    def choose(tower: Tower, crops: int, grid: tuple[int, int]):
        made = []
        patches = tower.selected.shape[1]
        number = [int(patches * x) if isinstance(x, float) else x for x in (method.dominant, method.contextual)]
        for crop in range(crops):
            features = tower.features[crop]
            dominant = best(tower.selected[crop].tolist(), number[0] - cls, found)
            made += [(crop, -1, features[0])] * cls
            made += [(crop, patch, features[1 + patch]) for patch in dominant]
            left = [patch for patch in range(patches) if patch not in dominant]
            if not number[1] or not left:
                continue
            step = max(1, len(left) // number[1])
            targets = left[::step][: number[1]]
            metric = tower.keys[crop] / tower.keys[crop].norm(dim=-1, keepdim=True)
            groups = {target: [] for target in targets}
            for patch in left:
                if patch not in groups:
                    near = (metric[targets] @ metric[patch]).tolist()
                    groups[targets[best(near, 1, found)[0]]].append(features[1 + patch])
            for target, group in groups.items():
                merged = features[1 + target] + (torch.stack(group).mean(0) if group else 0)
                made.append((crop, target, merged))
        return made

    return _tower_tokens(name, model, inputs, tokens, getattr(method, "order", "crops"), choose)


DROPPED_BEFORE = {"DivPrune": divprune, "HiRED": hired, "VisionZip": visionzip}
