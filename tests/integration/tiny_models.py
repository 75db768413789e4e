"""Vision-language models of transformers, shaped like published ones and tiny: random weights, no network, no pyvtk.

Weights are drawn so that attention is far from flat, every layer matters and visual features differ: with the usual
initialisation all scores tie up to noise, and a model answers alike whatever is dropped.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn

NAMES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # positions are (t, y, x)
CLS = ("llava", "llava_next")  # a CLIP tower, whose first token is CLS
VOCABULARY, PAD, BOS, IMAGE, VIDEO, VISION_START, VISION_END = 256, 0, 1, 255, 254, 253, 252
WORDS = (2, 250)  # ids of ordinary text, begin and end
LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 6, 64, 4, 2, 128
PATCH = 4  # pixels
MERGE = 2  # patches per side of a visual token, in Qwen's models
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
SIDE = {"llava": 6, "llava_next": 4, "llava_onevision": 5, "internvl": 5}  # visual tokens per side of a crop or tile
# What the k-th image of a batch looks like, repeated when there are more. (height, width) in pixels of anyres images:
SIZES = {
    "llava_next": ((15, 30), (30, 18), (8, 32), (17, 30), (31, 32)),
    "llava_onevision": ((19, 40), (38, 22), (20, 20), (20, 20), (21, 70)),
}
PINPOINTS = {
    "llava_next": [[16, 32], [32, 16], [32, 32]],
    "llava_onevision": [[20, 40], [40, 20], [20, 60]],
}
TILES = (2, 3, 1, 2, 4)  # of internvl's images, side by side in the sequence
GRIDS = ((1, 12, 14), (1, 16, 20), (1, 12, 12), (1, 14, 12), (1, 20, 20))  # patches (t, h, w) of Qwen's images
VIDEO_GRIDS = ((3, 8, 10), (4, 8, 8))


class Place(NamedTuple):
    """Where a visual token stands: image of the sample, grid of the image, cell of the grid; crop and patch it shows.

    Newline tokens, which stand behind rows of anyres images and are visual tokens for the model, have no cell.
    """

    image: int
    grid: int = 0
    cell: tuple[int, int, int] | None = None  # (t, y, x)
    crop: int | None = None
    patch: int | None = None  # raster order


def make(name: str, *, dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """A model in eval mode with 6 decoder layers, 4 heads of 16 channels and 2 KV heads.

    Args:
        name: one of NAMES.
        dtype: of the weights; rotary frequencies stay float32, as from_pretrained leaves them.
        attention: transformers' attn_implementation, for text and tower.
        seed: of the weights.
    """
    before = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        config, kind = _config(name)
        config._attn_implementation = attention
        with torch.no_grad():
            model = kind(config).eval()
            _draw(model)
            _spread(name, model)
    finally:
        torch.set_rng_state(before)
    frequencies = {part: part.inv_freq for part in model.modules() if hasattr(part, "inv_freq")}
    model.to(dtype)
    for part, frequency in frequencies.items():
        part.inv_freq = frequency
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, None
    return model


def _config(name: str):
    text = {
        "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "intermediate_size": FFN, "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": None,
        "tie_word_embeddings": False,
    }  # fmt: skip
    if name in ("llava", "llava_next"):
        vision = transformers.CLIPVisionConfig(**TOWER, image_size=SIDE[name] * PATCH, patch_size=PATCH)
        more = {"image_grid_pinpoints": PINPOINTS[name]} if name == "llava_next" else {}
        config, kind = {
            "llava": (transformers.LlavaConfig, transformers.LlavaForConditionalGeneration),
            "llava_next": (transformers.LlavaNextConfig, transformers.LlavaNextForConditionalGeneration),
        }[name]
        text = transformers.LlamaConfig(**text)
        return config(vision_config=vision, text_config=text, image_token_index=IMAGE, **more), kind
    if name == "llava_onevision":
        vision = transformers.SiglipVisionConfig(
            **TOWER, image_size=SIDE[name] * PATCH, patch_size=PATCH, vision_use_head=False
        )
        config = transformers.LlavaOnevisionConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**text), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS[name],
        )  # fmt: skip
        return config, transformers.LlavaOnevisionForConditionalGeneration
    if name == "internvl":
        vision = transformers.InternVLVisionConfig(
            **TOWER, image_size=2 * SIDE[name] * PATCH, patch_size=PATCH, attention_bias=True, use_qk_norm=True
        )
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=transformers.Qwen2Config(**text), image_token_id=IMAGE,
            image_seq_length=SIDE[name] ** 2, tie_word_embeddings=False,
        )  # fmt: skip
        return config, transformers.InternVLForConditionalGeneration
    if name not in MROPE:
        raise ValueError(f"make: name must be one of {NAMES}, got {name!r}")
    sections = [4, 2, 2] if name == "qwen3_vl" else [2, 3, 3]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": sections, "rope_theta": 10000.0}
    vision = {"num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2}
    if name == "qwen2_vl":
        vision |= {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    else:
        vision |= {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": HIDDEN}
    if name == "qwen2_5_vl":
        vision |= {"window_size": 4 * MERGE * PATCH, "fullatt_block_indexes": [2]}
    if name == "qwen3_vl":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
        text |= {"head_dim": HIDDEN // HEADS}
    config, kind = {
        "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
        "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
    }[name]
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    tokens |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
    return config(text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens), kind


def _draw(model: nn.Module) -> None:
    """Weights that keep the size of what passes through them; queries and keys with logits of about 2."""
    for name, p in model.named_parameters():
        if p.dim() == 1:
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                p.copy_(1.4 + 0.1 * torch.randn(p.shape))
            elif name.endswith("weight") or "lambda" in name:
                p.copy_(1 + 0.1 * torch.randn(p.shape))
            else:  # biases, CLS, newline
                p.copy_(torch.randn(p.shape) * (0.1 if name.endswith("bias") else 1.0))
        elif ("embed" in name and "patch" not in name) or "cls_token" in name:
            p.copy_(torch.randn(p.shape))
        else:
            sharp = 1.4 if any(part in name for part in ("q_proj", "k_proj", "qkv")) else 1.0
            p.copy_(torch.randn(p.shape) * sharp / p[0].numel() ** 0.5)
    # generated tokens are text: the logit of 0 of everything else is never the largest
    rows = model.get_output_embeddings().weight
    rows[: WORDS[0]], rows[WORDS[1] :] = 0, 0


def _spread(name: str, model: nn.Module) -> None:
    """Make visual features as different from each other as text embeddings are, by the last layers of the projector."""
    inner = model.model
    if name == "qwen3_vl":
        last = [inner.visual.merger.linear_fc2, *(merger.linear_fc2 for merger in inner.visual.deepstack_merger_list)]
    elif name in MROPE:
        last = [inner.visual.merger.mlp[2]]
    else:
        last = [inner.multi_modal_projector.linear_2]
    seen: dict[nn.Module, Tensor] = {}
    hooks = [part.register_forward_hook(lambda part, _, out: seen.update({part: out})) for part in last]
    inner.get_image_features(**visual_inputs(batch(name, model, samples=2, images=(1, 1), seed=99)))
    for hook in hooks:
        hook.remove()
    for part in last:
        tokens = seen[part].reshape(-1, HIDDEN)
        mean, std = tokens.mean(0), tokens.std(0).mean()
        part.weight /= std
        part.bias.copy_((part.bias - mean) / std)


def visual_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of model inputs, those that the tower takes for images."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images")
    return {key: inputs[key] for key in names if key in inputs}


# --- inputs -----------------------------------------------------------------------------------------------------------


def batch(
    name: str,
    model: nn.Module,
    *,
    samples: int = 4,
    padding: str = "left",
    seed: int = 1,
    images: tuple[int, ...] = (1, 1, 2, 1),
    between: int = 2,
) -> dict[str, Tensor]:
    """Prompts [BOS, text, image (, text, image), text] with differing numbers of visual tokens and words.

    Args:
        name: one of NAMES.
        model: what :func:`make` made of it; pixels get its dtype.
        samples: how many.
        padding: "left", as generate wants it, or "right".
        seed: of words and pixels.
        images: of each sample; 0 makes it text.
        between: words between two images of a sample; Qwen's models mark images by tokens of their own as well.

    Returns:
        What the model and generate take: input_ids, attention_mask int64 [samples, tokens], pixel_values, and
        image_sizes, image_grid_thw, batch_num_images, mm_token_type_ids where the model has them.
    """
    random = torch.Generator().manual_seed(seed)
    if len(images) != samples:
        raise ValueError(f"batch: images must have {samples} numbers, got {images}")
    rows, pixels, sizes, k = [], [], [], 0
    for sample, count in enumerate(images):
        row = [torch.tensor([BOS]), _words(random, 5 + 3 * (sample % 3))]
        for i in range(count):
            if i:
                row.append(_words(random, between))
            tokens, image, size = _image(name, k, alone=count == 1, random=random)
            row.append(torch.full((tokens,), IMAGE))
            if name in MROPE:
                row[-1:] = [torch.tensor([VISION_START]), row[-1], torch.tensor([VISION_END])]
            pixels.append(image)
            sizes.append(size)
            k += 1
        rows.append(torch.cat([*row, _words(random, 8 + (5, 0, 11, 4)[sample % 4])]))
    inputs = _pad(rows, padding)
    if name in MROPE:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if not pixels:
        return inputs
    if name in PINPOINTS:  # [images, crops, 3, height, width], crops that are not there are zeros
        most = max(map(len, pixels))
        pixels = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])])[None] for p in pixels]
        inputs["image_sizes"] = torch.tensor(sizes)
    if name in MROPE:
        inputs["image_grid_thw"] = torch.tensor(sizes)
    if name == "llava_onevision":
        inputs["batch_num_images"] = torch.tensor([count for count in images if count])
    inputs["pixel_values"] = torch.cat(pixels).to(model.dtype)
    return inputs


def text_only(
    name: str, model: nn.Module, *, samples: int = 4, padding: str = "left", seed: int = 1
) -> dict[str, Tensor]:
    """Prompts without images."""
    return batch(name, model, samples=samples, padding=padding, seed=seed, images=(0,) * samples)


def videos(model: nn.Module, *, padding: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """Two prompts for qwen2_5_vl, each with a video of another size: 60 and 64 visual tokens."""
    random = torch.Generator().manual_seed(seed)
    rows, pixels = [], []
    for sample, (t, h, w) in enumerate(VIDEO_GRIDS):
        video = torch.full((t * h * w // MERGE**2,), VIDEO)
        row = [torch.tensor([BOS]), _words(random, 5), torch.tensor([VISION_START]), video, torch.tensor([VISION_END])]
        rows.append(torch.cat([*row, _words(random, 9 + 4 * sample)]))
        pixels.append(torch.randn(t * h * w, 3 * 2 * PATCH**2, generator=random))
    inputs = _pad(rows, padding)
    inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == VIDEO).int()
    inputs["pixel_values_videos"] = torch.cat(pixels).to(model.dtype)
    inputs["video_grid_thw"] = torch.tensor(VIDEO_GRIDS)
    return inputs


def one(name: str, inputs: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    """The inputs of one sample of :func:`batch`, :func:`text_only` or :func:`videos`, alone and without padding."""
    valid = inputs["attention_mask"][sample].bool()
    alone = {"input_ids": inputs["input_ids"][sample][valid][None]}
    alone["attention_mask"] = torch.ones_like(alone["input_ids"])
    if "mm_token_type_ids" in inputs:
        alone["mm_token_type_ids"] = inputs["mm_token_type_ids"][sample][valid][None]
    if "pixel_values_videos" in inputs:
        sizes = inputs["video_grid_thw"].prod(-1).tolist()
        begin = sum(sizes[:sample])
        alone["pixel_values_videos"] = inputs["pixel_values_videos"][begin : begin + sizes[sample]]
        alone["video_grid_thw"] = inputs["video_grid_thw"][sample : sample + 1]
    mine = images_of(name, inputs)[sample]
    if not mine:
        return alone
    rows = slice(mine[0], mine[-1] + 1)
    for key in ("image_sizes", "image_grid_thw"):
        if key in inputs:
            alone[key] = inputs[key][rows]
    if "batch_num_images" in inputs:
        alone["batch_num_images"] = torch.tensor([len(mine)])
    if name in MROPE:
        sizes = inputs["image_grid_thw"].prod(-1).tolist()
        rows = slice(sum(sizes[: mine[0]]), sum(sizes[: mine[-1] + 1]))
    alone["pixel_values"] = inputs["pixel_values"][rows]
    if name in PINPOINTS:
        shapes = [_crops(name, size, len(mine) == 1) for size in alone["image_sizes"].tolist()]
        most = max(1 + h * w if len(mine) == 1 or name == "llava_next" else 1 for h, w in shapes)
        alone["pixel_values"] = alone["pixel_values"][:, :most]
    return alone


def images_of(name: str, inputs: dict[str, Tensor]) -> list[list[int]]:
    """Which images (tiles, for internvl: rows of pixel_values) each sample has, by number."""
    counts = (inputs["input_ids"] == IMAGE).sum(1).tolist()
    if name in ("llava", "internvl"):
        each = [count // SIDE[name] ** 2 for count in counts]
    elif name in MROPE:
        each = (inputs["input_ids"] == VISION_START).sum(1).tolist()
        if "video_grid_thw" in inputs:
            each = [0] * len(each)
    elif name == "llava_onevision":
        numbers = iter(inputs["batch_num_images"].tolist() if "batch_num_images" in inputs else [])
        each = [next(numbers) if count else 0 for count in counts]
    else:
        tokens = iter(inputs["image_sizes"].tolist() if "image_sizes" in inputs else [])
        each = []
        for count in counts:
            each.append(0)
            while count:
                count -= len(_anyres(name, 0, next(tokens), True))
                each[-1] += 1
    numbers = iter(range(sum(each)))
    return [list(itertools.islice(numbers, count)) for count in each]


def answers(name: str, inputs: dict[str, Tensor], *, behind_image: bool = False) -> Tensor:
    """Labels for training: the last words of every sample are its answer; the third sample has an earlier one too.

    Args:
        name: one of NAMES.
        inputs: of :func:`batch`.
        behind_image: let the first sample's answer begin right behind its last visual token (of llava's and internvl's
            prompts, where no other token stands between): its row may have been dropped.

    Returns:
        int64, shaped like input_ids: -100 outside of answers.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = torch.full_like(ids, -100)
    for sample in range(len(ids)):
        tokens = mask[sample].nonzero()[:, 0]
        spans = [tokens[-4 - sample % 2 :]]
        if sample == 2:
            spans.append(tokens[-11:-8])
        if behind_image and sample == 0:
            last = (ids[sample] == IMAGE).nonzero()[-1, 0]
            spans = [tokens[tokens > last]]
        for span in spans:
            labels[sample, span] = ids[sample, span]
    return labels


def _words(random: torch.Generator, count: int) -> Tensor:
    return torch.randint(*WORDS, (count,), generator=random)


def _pad(rows: list[Tensor], padding: str) -> dict[str, Tensor]:
    if padding not in ("left", "right"):
        raise ValueError(f"batch: padding must be 'left' or 'right', got {padding!r}")
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for sample, row in enumerate(rows):
        where = slice(longest - len(row), longest) if padding == "left" else slice(0, len(row))
        ids[sample, where], mask[sample, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def _image(name: str, k: int, *, alone: bool, random: torch.Generator) -> tuple[int, Tensor, tuple | None]:
    """Number of visual tokens, pixels and size (or grid) of the k-th image."""
    if name in MROPE:
        grid = GRIDS[k % len(GRIDS)]
        patches = grid[0] * grid[1] * grid[2]
        return patches // MERGE**2, torch.randn(patches, 3 * 2 * PATCH**2, generator=random), grid
    pixels = SIDE[name] * PATCH
    if name == "llava":
        return SIDE[name] ** 2, torch.randn(1, 3, pixels, pixels, generator=random), None
    if name == "internvl":
        tiles = TILES[k % len(TILES)]
        return tiles * SIDE[name] ** 2, torch.randn(tiles, 3, 2 * pixels, 2 * pixels, generator=random), None
    size = SIZES[name][k % len(SIZES[name])]
    height, width = _crops(name, size, alone)
    crops = 1 + (height * width if alone or name == "llava_next" else 0)
    return len(_anyres(name, 0, size, alone)), torch.randn(crops, 3, pixels, pixels, generator=random), size


# --- geometry ---------------------------------------------------------------------------------------------------------


def places(name: str, inputs: dict[str, Tensor]) -> list[Place]:
    """Where each visual token of one sample stands, in the order of the sequence.

    Args:
        name: one of NAMES.
        inputs: of one sample (:func:`one`).
    """
    if "video_grid_thw" in inputs:
        grids = inputs["video_grid_thw"].tolist()
    else:
        grids = inputs["image_grid_thw"].tolist() if "image_grid_thw" in inputs else []
    if name in MROPE:
        return [
            Place(image, 0, (t, y, x))
            for image, (frames, h, w) in enumerate(grids)
            for t, y, x in itertools.product(range(frames), range(h // MERGE), range(w // MERGE))
        ]
    if "pixel_values" not in inputs:
        return []
    if name in PINPOINTS:
        sizes = inputs["image_sizes"].tolist()
        return [place for i, size in enumerate(sizes) for place in _anyres(name, i, size, len(sizes) == 1)]
    cells = list(itertools.product((0,), range(SIDE[name]), range(SIDE[name])))
    return [Place(i, 0, c, 0, p) for i in range(len(inputs["pixel_values"])) for p, c in enumerate(cells)]


def crops_of(name: str, inputs: dict[str, Tensor]) -> list[tuple[int, int]]:
    """How many crops stand below and beside each other in each image of one sample; (0, 0): only the whole image."""
    if name not in PINPOINTS:
        return [(0, 0)] * len(inputs.get("pixel_values", ()))
    sizes = inputs["image_sizes"].tolist() if "image_sizes" in inputs else []
    cropped = len(sizes) == 1 or name == "llava_next"
    return [_crops(name, size, True) if cropped else (0, 0) for size in sizes]


def _crops(name: str, size, alone: bool) -> tuple[int, int]:
    """The resolution that wastes least among those that keep most pixels, in crops."""
    height, width = size

    def fit(resolution):
        scale = min(resolution[1] / width, resolution[0] / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        return used, used - resolution[0] * resolution[1]

    best = max(PINPOINTS[name], key=fit)
    side = SIDE[name] * PATCH
    return best[0] // side, best[1] // side


def _anyres(name: str, image: int, size, alone: bool) -> list[Place]:
    """An anyres image: the whole image, then its crops put together without the padding, a newline behind each row.

    An image of LLaVA-OneVision that is not its sample's only one is not cropped and has one newline behind it.
    """
    side = SIDE[name]
    whole = [Place(image, 0, (0, y, x), 0, side * y + x) for y in range(side) for x in range(side)]
    if name == "llava_onevision" and not alone:
        return [*whole, Place(image)]
    rows, columns = (side * count for count in _crops(name, size, alone))
    height, width = size
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    out = whole
    for y in range(top, rows - top):
        for x in range(left, columns - left):
            crop = 1 + (y // side) * (columns // side) + x // side
            out.append(Place(image, 1, (0, y - top, x - left), crop, side * (y % side) + x % side))
        out.append(Place(image))
    return out


# --- generation -------------------------------------------------------------------------------------------------------


def generate_logits(model: nn.Module, inputs: dict[str, Tensor], steps: int, **options) -> tuple[Tensor, Tensor]:
    """Greedy decoding by ``model.generate``.

    Args:
        model: with or without an adapter.
        inputs: of :func:`batch` (left padding) or :func:`one`.
        steps: tokens to generate.
        options: more arguments of generate, such as ``cache_implementation="static"``.

    Returns:
        logits [batch, steps, vocabulary], the first of the prefill, and the tokens chosen, int64 [batch, steps].
    """
    options = {"do_sample": False, "max_new_tokens": steps, **options}
    with torch.no_grad():
        out = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return torch.stack(list(out.logits), 1), out.sequences[:, inputs["input_ids"].shape[1] :]
