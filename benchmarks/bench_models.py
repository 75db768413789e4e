"""Models of transformers: a prompt and a token, with a method that drops visual tokens against the same model alone.

Models are shaped like published ones, scaled down for the CPU, with random weights, made on the device: what tokens say
has no part in the time. Their vision towers are tiny, since what is measured is the decoder. Both models share their
weights, and a forward pass is all of it: embedding, hooks, layout, plan, cache.

What operations allow counts products and causal attention of the decoder's layers (``Report.flops`` of the adapter).
What a method computes in order to choose is not counted, so it is part of what is missing to 100 %.
"""

from __future__ import annotations

import copy
import functools
import inspect
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

import pyvtk

from .harness import IDEAL, OURS, OWN, Case, made_on
from .report import Forward

DENSE = "unmodified"
BEFORE, BEHIND = 35, 30  # text tokens around the images
SIDE = 24  # of an image's grid of tokens
ATTENTION = "aten::scaled_dot_product_attention"


@dataclass(frozen=True)
class Shape:
    """What sizes a model has; its head width is ``hidden // heads``."""

    kind: str  # model_type of transformers: "llava" or "qwen2_5_vl"
    hidden: int
    layers: int
    heads: int
    key_heads: int
    ffn: int
    vocabulary: int
    dtype: torch.dtype

    @property
    def image(self) -> int:
        """The id of visual placeholders."""
        return self.vocabulary - 1


SMALL_LLAVA = Shape("llava", 1024, 8, 16, 16, 2752, 1000, torch.float32)
SMALL_QWEN = Shape("qwen2_5_vl", 896, 6, 28, 4, 2432, 1000, torch.float32)
LLAVA_7B = Shape("llava", 4096, 32, 32, 32, 11008, 32064, torch.bfloat16)
QWEN_7B = Shape("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, torch.bfloat16)


# ---- models


def config_of(shape: Shape):
    import transformers

    text = dict(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads, intermediate_size=shape.ffn, vocab_size=shape.vocabulary,
        max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    if shape.kind == "llava":
        vision = transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=14 * SIDE,
            patch_size=14,
        )  # fmt: skip
        return transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text), vision_config=vision, image_token_index=shape.image
        )
    half = shape.hidden // shape.heads // 2
    parts = [half // 4, (half - half // 4) // 2]
    rope = {"rope_type": "default", "mrope_section": [*parts, half - sum(parts)], "rope_theta": 1e6}
    vision = dict(
        depth=1, hidden_size=32, intermediate_size=64, num_heads=1, patch_size=14, spatial_merge_size=2,
        window_size=112, fullatt_block_indexes=[], out_hidden_size=shape.hidden, temporal_patch_size=2,
    )  # fmt: skip
    return transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope}, vision_config=vision, image_token_id=shape.image,
        video_token_id=shape.image - 1, vision_start_token_id=shape.image - 2, vision_end_token_id=shape.image - 3,
    )  # fmt: skip


def made(shape: Shape, device: str):
    """A model of this shape with random weights."""
    import transformers

    kinds = {
        "llava": transformers.LlavaForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    config = config_of(shape)
    config._attn_implementation = "sdpa"
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            return kinds[shape.kind](config).eval()
    finally:
        torch.set_default_dtype(before)


def twin(model):
    """Another model with the same weights, in the same memory."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


@functools.lru_cache(maxsize=1)
def unmodified(shape: Shape, device: str):
    accelerated.cache_clear()  # it holds the weights of the shape before
    prefilled.cache_clear()
    return made(shape, device)


@functools.lru_cache(maxsize=1)
def accelerated(shape: Shape, device: str, method: Callable, layout: Callable | None):
    """(a twin of the unmodified model with this method, its handle)."""
    from pyvtk.integrations import transformers as vtk

    model = twin(unmodified(shape, device))
    return model, vtk.accelerate(model, method(vtk), layout=layout)


# ---- forward passes


def prompt(shape: Shape, images: int) -> tuple:
    """(ids, pixels) of text, images of 24 x 24 tokens, text."""
    if shape.kind == "llava":
        visual, pixels = [shape.image] * (SIDE**2 * images), torch.randn(images, 3, 14 * SIDE, 14 * SIDE)
    else:  # four patches make a token; every image lies between two marks, which stand for text
        image = [shape.image - 2, *[shape.image] * SIDE**2, shape.image - 3]
        visual, pixels = (image * images)[1:-1], torch.randn(4 * SIDE**2 * images, 3 * 2 * 14 * 14)
    before, behind = (torch.randint(2, 900, (count,)) for count in (BEFORE, BEHIND))
    if shape.kind != "llava":
        before[-1], behind[0] = shape.image - 2, shape.image - 3
    ids = torch.cat([before, torch.tensor(visual), behind])
    return ids[None], pixels.to(shape.dtype)


def cache_argument(model) -> str:
    """What ``forward`` calls the KV cache; transformers 5.24 renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def prefill(model, ids, pixels) -> tuple:
    """(logits of the last token [1, vocabulary], the KV cache)."""
    from transformers import DynamicCache

    cache = DynamicCache()
    more = {cache_argument(model): cache}
    if model.config.model_type != "llava":
        image = 2 * SIDE
        more["image_grid_thw"] = torch.tensor([[1, image, image]] * (len(pixels) // image**2), device=ids.device)
        more["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1, **more)
    return out.logits[:, -1], cache


def step(model, cache, token) -> tuple:
    """The same of a token behind a prompt; the cache is left as it was."""
    with torch.no_grad():
        out = model(input_ids=token, use_cache=True, logits_to_keep=1, **{cache_argument(model): cache})
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
    return out.logits[:, -1], cache


@functools.lru_cache(maxsize=1)
def prefilled(shape: Shape, images: int, device: str, method: Callable, layout: Callable | None) -> dict:
    """By provider, (model, a cache that holds a prompt)."""
    torch.manual_seed(0)
    ids, pixels = made_on(device, lambda: prompt(shape, images))()
    models = {OURS: accelerated(shape, device, method, layout)[0], DENSE: unmodified(shape, device)}
    return {name: (model, prefill(model, ids, pixels)[1]) for name, model in models.items()}


def grids(known) -> pyvtk.TokenLayout:
    """576 visual tokens are an image of 24 x 24. 2880 are a small picture of an image and a large one, of 48 x 48."""
    tokens, device = known.input_ids.shape[1], known.input_ids.device
    spans = [pyvtk.ImageSpan(0, BEFORE, (1, SIDE, SIDE))]
    if tokens > BEFORE + SIDE**2 + BEHIND:
        spans.append(pyvtk.ImageSpan(0, BEFORE + SIDE**2, (1, 2 * SIDE, 2 * SIDE)))
    return pyvtk.TokenLayout.from_images([tokens], spans, device=device)


# ---- checks


@functools.lru_cache(maxsize=8)
def keeps_the_logits(shape: Shape, device: str, nothing: Callable, layout: Callable | None) -> None:
    """A method that is told to drop nothing gives the logits of the unmodified model, of a prompt with one image and of
    a token behind it.

    The budget is how far two attentions of torch are apart, four times, and a rounding of the largest logit.

    Raises:
        AssertionError: it does not.
    """
    from pyvtk.integrations import transformers as vtk

    torch.manual_seed(0)
    ids, pixels = made_on(device, lambda: prompt(shape, 1))()
    token = ids[:, -1:]

    def logits(model):
        first, cache = prefill(model, ids, pixels)
        return torch.cat([first, step(model, cache, token)[0]]).double()

    model = twin(unmodified(shape, device))
    exact = logits(model)
    model.set_attn_implementation("eager")
    apart = (logits(model) - exact).abs().max()
    model.set_attn_implementation("sdpa")
    with vtk.accelerate(model, nothing(vtk), layout=layout):
        error = (logits(model) - exact).abs().max()
    budget = 4 * apart + torch.finfo(shape.dtype).eps * exact.abs().max()
    assert error <= budget, f"nothing dropped, logits off by {error:.1e}, the budget is {budget:.1e}"


def expected_lengths(shape: Shape, images: int, kept: dict[int, int], cached: int | None) -> list[int]:
    """Tokens in the cache of each layer: of ``kept`` visual tokens from a layer on, or of ``cached`` tokens in all."""
    visual, lengths = SIDE**2 * images, []
    for layer in range(shape.layers):
        visual = kept.get(layer, visual)
        lengths.append(BEFORE + visual + BEHIND if cached is None else cached)
    return lengths


def right(shape: Shape, images: int, kept: dict[int, int], cached: int | None) -> Callable:
    """The check of a result: the numbers of tokens are those that the case says, and logits are numbers."""

    def check(name, result):
        logits, cache = result
        lengths = [layer.keys.shape[2] for layer in cache.layers]
        wanted = expected_lengths(shape, images, *((kept, cached) if name == OURS else ({}, None)))
        assert lengths == wanted, f"tokens by layer are {lengths}, expected {wanted}"
        assert logits.shape == (1, shape.vocabulary) and logits.isfinite().all(), "logits are not finite"

    return check


# ---- what a forward pass is made of


def profiled(call: Callable, device: str, runs: int = 3) -> tuple:
    """(what the call gives, the share of its time in operators of pyvtk, that in attention), by torch's profiler.

    Medians of some runs: what interrupts an operator counts as its time.
    """
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    of = "device_time_total" if device == "cuda" else "cpu_time_total"  # of an operator and all that it calls
    shares = []
    for _ in range(runs):
        with profile(activities=kinds) as found:
            result = call()
            if device == "cuda":
                torch.cuda.synchronize()
        events = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CPU]
        total = sum(getattr(event, f"self_{of}") for event in events)
        ours = sum(getattr(event, of) for event in outermost(events, lambda name: name.startswith("pyvtk::")))
        attention = sum(getattr(event, of) for event in outermost(events, lambda name: name == ATTENTION))
        shares.append((ours / total, attention / total))
    return result, *(statistics.median(values) for values in zip(*shares))


def outermost(events: list, counts: Callable[[str], bool]) -> list:
    """Of the profiler's events those whose name counts, but those that another such one called."""
    found = []
    for event in events:
        parent = event.cpu_parent
        while parent is not None and not counts(parent.name):
            parent = parent.cpu_parent
        if parent is None and counts(event.name):
            found.append(event)
    return found


def held(cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


# ---- cases


def case_of(
    name: str, shape: Shape, images: int, method: Callable, nothing: Callable, kept: dict[int, int],
    bars: dict[str, float], device: str = "cpu", cached: int | None = None, layout: Callable | None = None,
    decode: bool = False,
) -> Case:  # fmt: skip
    """A prompt of one sample, or a token behind it.

    Args:
        name: of the method.
        images: of 576 tokens each.
        method, nothing: from the adapter's module to the method, and to one of its kind that drops nothing.
        kept: visual tokens that are left from a layer on.
        cached: tokens that the cache holds in every layer, where the prompt itself is read as it is.
    """
    tokens = BEFORE + SIDE**2 * images + BEHIND
    model_name = {"llava": "LLaVA", "qwen2_5_vl": "Qwen2.5-VL"}[shape.kind]
    size = f"{shape.layers} x {shape.hidden}, {shape.heads}/{shape.key_heads} heads"
    which = (shape, device, method, layout)

    def inputs():
        ids, pixels = prompt(shape, images)
        return (ids[:, -1:],) if decode else (ids, pixels)

    def ours(*inputs):
        if decode:
            return step(*prefilled(shape, images, device, method, layout)[OURS], *inputs)
        return prefill(accelerated(*which)[0], *inputs)

    def dense(*inputs):
        if decode:
            return step(*prefilled(shape, images, device, method, layout)[DENSE], *inputs)
        return prefill(unmodified(shape, device), *inputs)

    def expect(*inputs):
        unmodified(shape, device)
        keeps_the_logits(shape, device, nothing, layout)
        return right(shape, images, kept, cached)

    def forward(*inputs):
        (_, cache), own, _ = profiled(lambda: ours(*inputs), device)
        done, whole = accelerated(*which)[1].report.flops()
        (_, dense_cache), _, attention = profiled(lambda: dense(*inputs), device)
        return Forward(None if decode else whole / done, own, attention, held(cache), held(dense_cache))

    return Case(
        "models",
        f"{'a token behind' if decode else 'prompt of'} {tokens} tokens, {model_name} {size}, {name}",
        shape.dtype,
        made_on(device, inputs),
        {OURS: ours, DENSE: dense},
        expect,
        bars=bars,
        memory=device == "cuda",
        device=device,
        dense=(DENSE,),
        forward=forward,
        rounds=9 if images == 1 else 5,
        cpu_time=True,
        eager=(OURS, DENSE),  # the host fetches the sizes once, and launches both alike
    )


def dense_yopo(vtk):
    return vtk.YOPO(radius=10_000, causal_window=True, cross_image=True)


def methods_of(shape: Shape, images: int, device: str) -> dict[str, Callable]:
    """By name, what makes the case of a method: called with ``bars`` and ``decode``. Stages stand where the papers have
    them, at the same shares of the depth in smaller models."""
    visual, layers = SIDE**2 * images, shape.layers
    tokens = BEFORE + visual + BEHIND
    stages = tuple(layers * part // 4 for part in (1, 2, 3))

    def fastv(keep):
        return (
            lambda vtk: vtk.FastV(2, keep),
            lambda vtk: vtk.FastV(2, 1.0),
            {2: round(keep * visual)},
        )

    ladder = (0.5, 0.25, 0.125)
    cut = layers // 2
    found = {
        "FastV, layer 2, half": fastv(0.5),
        "FastV, layer 2, a quarter": fastv(0.25),
        f"PyramidDrop, layers {'/'.join(map(str, stages))}, .5/.25/.125": (
            lambda vtk: vtk.PyramidDrop(stages, ladder),
            lambda vtk: vtk.PyramidDrop(stages, (1.0, 1.0, 1.0)),
            {layer: int(visual * share) for layer, share in zip(stages, ladder)},
        ),
        "YOPO, radius 2, all layers": (lambda vtk: vtk.YOPO(radius=2), dense_yopo, {}),
        f"YOPO, radius 2, cut at {cut}": (lambda vtk: vtk.YOPO(radius=2, cut=cut), dense_yopo, {cut: 0}),
        "DivPrune, .098": (
            lambda vtk: vtk.DivPrune(0.098),
            lambda vtk: vtk.DivPrune(1.0),
            {0: round(0.098 * visual)},
        ),
        "SnapKV, a quarter": (lambda vtk: vtk.SnapKV(keep=0.25), lambda vtk: vtk.SnapKV(keep=1.0), {}),
    }

    def maker(name, method, nothing, kept):
        def make(bars=None, decode=False):
            return case_of(
                name, shape, images, method, nothing, kept, bars or {}, device,
                cached=tokens // 4 if name.startswith("SnapKV") else None,
                layout=grids if name.startswith("YOPO") and shape.kind == "llava" else None, decode=decode,
            )  # fmt: skip

        return make

    return {name: maker(name, *parts) for name, parts in found.items()}


def cases(device: str) -> list[Case]:
    llava, qwen = (SMALL_LLAVA, SMALL_QWEN) if device == "cpu" else (LLAVA_7B, QWEN_7B)
    scored = {"FastV": {IDEAL: 0.95, OWN: 0.005}, "PyramidDrop": {IDEAL: 0.88, OWN: 0.005}}

    def bars_of(name: str, images: int) -> dict[str, float]:
        if "cut at" in name:
            return {IDEAL: 0.92 if images == 1 else 1.0}
        return scored.get(name.partition(",")[0], {})

    def chosen(shape, images, *begin, decode=False):
        makers = methods_of(shape, images, device)
        names = [name for name in makers if name.startswith(begin or "")]
        return [makers[name]({} if decode else bars_of(name, images), decode) for name in names]

    return [
        *chosen(llava, 1),
        *chosen(llava, 1, "FastV, layer 2, half", "PyramidDrop", "YOPO, radius 2, cut", "SnapKV", decode=True),
        *chosen(llava, 5, "FastV, layer 2, half", "YOPO"),
        *chosen(llava, 5, "PyramidDrop", "YOPO, radius 2, cut", "SnapKV", decode=True),
        *chosen(qwen, 1, "FastV", "PyramidDrop"),
    ]
