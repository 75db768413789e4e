"""What is known of a batch's images between the vision tower and the decoder.

``generate`` encodes images before it calls the model's ``forward``, and repeats their features for beams. So what a
tower says of them is kept here, by image, until the decoder asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import pyvtk

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle
    from pyvtk.integrations.transformers.prompt import Prompt


class Images:
    """Catches what passes from the vision tower to the decoder.

    Attributes:
        crops: how many crops each image has; a crop is what the tower sees at a time.
        cls_queries, keys: by layer of the tower, [crops, heads, 1, D] and [crops, heads, 1 + patches, D].
        chosen: bool [crops, patches], the patches that a method keeps, if it has chosen already.
    """

    def __init__(self, handle: Handle) -> None:
        self.handle = handle
        self.crops: list[int] = []
        self.cls_queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.chosen: Tensor | None = None
        self._lay_out = None

    # Catching

    def watch_packing(self):
        """Follows how features of crops become those of placeholders; what it returns undoes it."""
        inner = self.handle.inner
        if not hasattr(inner, "pack_image_features"):  # crops are images, one after the other
            return lambda: None
        original = inner.pack_image_features

        def pack_image_features(image_features, image_sizes, *args, **kwargs):
            self.crops = [features.shape[0] for features in image_features]
            # or the model waits for those of every image, each time
            if isinstance(image_sizes, Tensor) and max(self.crops, default=0) > 1:
                image_sizes = image_sizes.tolist()

            def lay_out(values: Tensor) -> Tensor:
                again = {**kwargs, "image_newline": values.new_zeros(values.shape[-1])}
                packed, _ = original(values.split(self.crops), image_sizes, *args, **again)
                return torch.cat(packed)

            self._lay_out = lay_out
            return original(image_features, image_sizes, *args, **kwargs)

        inner.pack_image_features = pack_image_features

        def undo() -> None:
            del inner.pack_image_features

        return undo

    def watch_tower(self, numbers: set[int]) -> list:
        """Hooks on layers of the tower, counted from its end where negative."""
        tower, hooks = self.handle.anatomy.tower(self.handle.inner), []

        def watch(number: int, attention: nn.Module) -> None:
            def split(x: Tensor) -> Tensor:
                return x.detach().unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

            def queries(module, args, output) -> None:
                self.cls_queries[number] = split(output[:, :1])

            def keys(module, args, output) -> None:
                self.keys[number] = split(output)

            hooks.append(attention.q_proj.register_forward_hook(queries))
            hooks.append(attention.k_proj.register_forward_hook(keys))

        for number in numbers:
            watch(number, tower[number].self_attn)
        return hooks

    # Asking

    def cu_seqlens(self) -> Tensor:
        """int64 [images + 1], where the crops of each image begin."""
        (keys, *_) = self.keys.values()
        if not self.crops:  # crops are images
            return torch.arange(keys.shape[0] + 1, device=keys.device)
        ends = torch.tensor([0, *self.crops], device="cpu").cumsum(0)
        return ends.to(keys.device, non_blocking=True)

    def to_placeholders(self, values: Tensor) -> Tensor:
        """[placeholders, C], in the order of the sequence, from values [crops, patches, C]; zeros for newlines."""
        return values.flatten(0, 1) if self._lay_out is None else self._lay_out(values)

    def to_tokens(self, prompt: Prompt, values: Tensor, fill) -> Tensor:
        """[batch, tokens, ...], from a value [placeholders, ...] for each placeholder of an image; else ``fill``."""
        visual = prompt.visual
        rows = visual.sum(1)
        before = rows.cumsum(0) - rows  # placeholders of earlier rows
        copies = (rows.sum() // max(values.shape[0], 1)).clamp(min=1)  # beams: of every sample, one after the other
        row = torch.arange(visual.shape[0], device=visual.device)
        start = before[row // copies * copies] // copies
        number = start[:, None] + visual.cumsum(1) - 1
        picked = values[number.clamp(0, max(values.shape[0] - 1, 0))]
        return torch.where(visual.view(*visual.shape, *[1] * (picked.dim() - 2)), picked, fill)

    def found(self) -> bool:
        """Whether images were laid out since the last prompt."""
        return self._lay_out is not None

    def clear(self) -> None:
        self.crops, self._lay_out, self.chosen = [], None, None
        self.cls_queries.clear()
        self.keys.clear()


def anyres_layout(prompt: Prompt) -> pyvtk.TokenLayout | None:
    """LLaVA-NeXT, LLaVA-OneVision: of each image a small picture of all of it, in raster order, then its crops as one
    picture without padding, of which a newline ends every row. The two are images of their own; newlines are text.

    What stands where is found by sending numbers through the model's own packing, in place of features.
    """
    handle = prompt.handle
    images, vision = handle.images, handle.model.config.vision_config
    if prompt.videos:
        raise NotImplementedError("accelerate: it is not known where tokens of videos stand; give layout=")
    if not images.found():
        return None
    side = vision.image_size // vision.patch_size
    device = prompt.visual.device
    picture = torch.cat([torch.tensor([0] + [1] * (crops - 1)) + 2 * n + 1 for n, crops in enumerate(images.crops)])
    picture = picture.to(device, torch.float32, non_blocking=True)
    packed = images.to_placeholders(picture[:, None, None].expand(-1, side * side, 1))
    picture = packed[:, 0].round().long() - 1  # -1: newlines
    place = torch.arange(picture.shape[0], device=device)
    newline = picture < 0
    lines = newline.long().cumsum(0)
    begins = torch.cat([newline.new_ones(1), picture[1:] != picture[:-1]])
    x = place - torch.where(begins, place, 0).cummax(0).values
    small = ~newline & (picture % 2 == 0)
    line = lines - torch.where(small, lines, 0).cummax(0).values
    y, x = torch.where(small, x // side, line), torch.where(small, x % side, x)
    values = torch.stack([picture, torch.zeros_like(x), y, x], 1)
    values = torch.where(newline[:, None], values.new_tensor([-1, 0, 0, 0]), values)
    table = images.to_tokens(prompt, values, values.new_tensor([-1, 0, 0, 0]))
    return pyvtk.TokenLayout(table[..., 0], table[..., 1:], mask=prompt.valid)
