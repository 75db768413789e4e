"""TokenLayout: where the visual tokens of a sequence stand in their images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyvtk import _pytree, checks, transforms
from pyvtk.checks import require
from pyvtk.ops import layout as operators
from pyvtk.ops.compact import compact
from pyvtk.reference.layout import MAX_COORDINATE, extent_of, samples_of
from pyvtk.selection import Selection

# Positions in int32 stay within this on either side, so that plans can count on from them, and mark what is absent.
MAX_POSITION = 2**30


class ImageSpan(NamedTuple):
    """One image (or video) in a sequence: consecutive tokens in raster order, x fastest, then y, then t.

    Attributes:
        batch: which sample.
        start: the token at which it begins, counted from the first token of the sample (padding left out).
        grid: (t, h, w), its size in tokens; an image has t = 1.
        newline: whether a text token (LLaVA-NeXT's newline) follows every row of w tokens.
    """

    batch: int
    start: int
    grid: tuple[int, int, int]
    newline: bool = False

    @property
    def length(self) -> int:
        t, h, w = self.grid
        return t * h * (w + self.newline)


@dataclass(frozen=True, eq=False, init=False)
class TokenLayout:
    """Which image every token belongs to, and where it stands in it.

    Padded batches hold [batch, tokens] tensors; with ``cu_seqlens`` the samples are packed along one axis and the
    tensors are [tokens]. Nothing here waits for the device.

    Args:
        image_id: int [batch, tokens] or [tokens]; negative for text. Numbers (any int64) tell images of one sample
            apart; tokens with the same number need not be neighbours in the sequence (newline tokens may stand between
            them).
        coords: int [..., 3], (t, y, x) of visual tokens in their image's grid, 0 to 65535; ignored for text.
        positions: int, shaped like image_id; the original place in the sequence, by which causality is decided. int64
            may be any, int32 is -2**30 to 2**30. None: the order of tokens as given.
        mask: bool, shaped like image_id; False for padding. None: there is none.
        cu_seqlens: int32 [samples + 1], where each packed sample begins. Tokens after the last sample are padding.

    Attributes:
        extent: int32 [samples, 3]; the largest coordinate of each sample + 1, per axis. ``take`` keeps it.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape or device; coordinates of a visual token, or
            positions, that are out of range (on CUDA a device assertion).
    """

    image_id: Tensor
    coords: Tensor
    positions: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor | None
    extent: Tensor

    def __init__(
        self,
        image_id: Tensor,
        coords: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> None:
        op = "TokenLayout"
        checks.tensor(op, "image_id", image_id, 2 if cu_seqlens is None else 1)
        checks.dtype(op, "image_id", image_id, checks.INTEGERS)
        shape = tuple(image_id.shape)
        meaning = "[batch, tokens]" if cu_seqlens is None else "[tokens]"
        checks.tensor(op, "coords", coords)
        checks.dtype(op, "coords", coords, checks.INTEGERS)
        checks.shape(op, "coords", coords, (*shape, 3), f"{meaning[:-1]}, 3]")
        checks.same_device(op, "coords", coords, image_id, "image_id")
        if positions is not None:
            checks.tensor(op, "positions", positions)
            checks.dtype(op, "positions", positions, checks.INTEGERS)
            checks.shape(op, "positions", positions, shape, meaning)
            checks.same_device(op, "positions", positions, image_id, "image_id")
        if mask is not None:
            checks.tensor(op, "mask", mask)
            checks.dtype(op, "mask", mask, (torch.bool,))
            checks.shape(op, "mask", mask, shape, meaning)
            checks.same_device(op, "mask", mask, image_id, "image_id")
        if cu_seqlens is not None:
            checks.offsets(op, "cu_seqlens", cu_seqlens, image_id, "the token axis")
        self._set(image_id, checks.to_int32(coords), positions, mask, cu_seqlens, None)
        in_range = ((coords >= 0) & (coords < MAX_COORDINATE)).all(-1)
        require((in_range | ~self.visual).all(), f"{op}: coords must be 0 to {MAX_COORDINATE - 1} for visual tokens")
        if positions is not None and positions.dtype == torch.int32:
            in_range = (positions >= -MAX_POSITION) & (positions <= MAX_POSITION)
            require((in_range | ~self.valid).all(), f"{op}: positions must be int64 where they leave -2**30 to 2**30")

    def _set(self, image_id, coords, positions, mask, cu_seqlens, extent) -> None:
        if positions is None:
            token = torch.arange(image_id.shape[-1], dtype=torch.int32, device=image_id.device)
            positions = token.expand(image_id.shape)
        set_field = object.__setattr__  # the way into a frozen dataclass
        set_field(self, "image_id", image_id)
        set_field(self, "coords", coords)
        set_field(self, "positions", positions)
        set_field(self, "mask", mask)
        set_field(self, "cu_seqlens", cu_seqlens)
        set_field(self, "extent", extent_of(self.visual, coords, cu_seqlens) if extent is None else extent)

    @staticmethod
    def _of(image_id, coords, positions, mask, cu_seqlens, extent) -> TokenLayout:
        """A layout from checked fields; positions and extent may be None, to be made here."""
        layout = object.__new__(TokenLayout)
        layout._set(image_id, coords, positions, mask, cu_seqlens, extent)
        return layout

    @property
    def packed(self) -> bool:
        return self.cu_seqlens is not None

    @property
    def num_samples(self) -> int:
        return self.image_id.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def num_tokens(self) -> int:
        """Length of the token axis, padding included."""
        return self.image_id.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.image_id.device

    @property
    def sample(self) -> Tensor:
        """int64 [tokens], of a packed layout: the sample of each token; num_samples after the last one."""
        return samples_of(self.image_id, self.cu_seqlens)

    @property
    def valid(self) -> Tensor:
        """bool, shaped like image_id: which tokens are no padding."""
        valid = torch.ones_like(self.image_id, dtype=torch.bool) if self.mask is None else self.mask
        return valid & (self.sample < self.num_samples) if self.packed else valid

    @property
    def visual(self) -> Tensor:
        """bool, shaped like image_id: which tokens are visual (and no padding)."""
        return self.valid & (self.image_id >= 0)

    def __repr__(self) -> str:
        """Sizes, no values; with the number of images where the host has them."""
        images = ""
        if self.image_id.is_cpu and type(self.image_id) is Tensor and not transforms.is_mapped_over(self.image_id):
            with _disable_current_modes():
                of_sample = torch.stack([samples_of(self.image_id, self.cu_seqlens), self.image_id.long()], -1)
                images = f"images={of_sample[self.visual].unique(dim=0).shape[0]}, "
        return (
            f"TokenLayout(samples={self.num_samples}, tokens={self.num_tokens}, {images}packed={self.packed}, "
            f"device='{self.device}')"
        )

    def check_selection(self, op: str, selection) -> None:
        """Raises unless ``selection`` is one of this layout's tokens, without a head axis."""
        if not isinstance(selection, Selection):
            raise TypeError(f"{op}: selection must be a Selection, got {type(selection).__name__}")
        if selection.indices.dim() != 2:
            raise ValueError(f"{op}: selection must have no head axis, got indices {tuple(selection.indices.shape)}")
        if selection.num_tokens != self.num_tokens or selection.packed != self.packed:
            kinds = {True: "packed", False: "padded"}
            raise ValueError(
                f"{op}: selection must be of {self.num_tokens} {kinds[self.packed]} tokens, got one of "
                f"{selection.num_tokens} {kinds[selection.packed]} tokens"
            )
        if selection.indices.shape[0] != self.num_samples:
            raise ValueError(f"{op}: selection must have {self.num_samples} samples, got {selection.indices.shape[0]}")

    def take(self, selection: Selection, *, packed: bool = False, total: int | None = None) -> TokenLayout:
        """The layout of the tokens that stay; they keep image, coordinates and position.

        Args:
            selection: of this layout's token axis (``select``, ``Selection.from_mask``, ...), without a head axis.
            packed: lay the samples one after the other, as ``compact(packed=True)`` does.
            total: length of the packed axis; None costs one host synchronisation. Only with packed.

        Returns:
            [batch, capacity] with mask, or packed. What ``compact`` with the same arguments does to hidden states.
        """
        self.check_selection("take", selection)
        axes = {"dim": 0, "batch_dim": None} if self.packed else {"dim": 1}
        image_id, coords, positions, kept = compact(
            selection, self.image_id, self.coords, self.positions, self.valid,
            packed=packed, total=total, pad_value=[-1, 0, 0, 0], **axes,
        )  # fmt: skip
        cu_seqlens = None
        if packed:  # tokens beyond total were cut off
            cu_seqlens = selection.cu_seqlens().clamp(max=image_id.shape[0])
        return TokenLayout._of(image_id, coords, positions, kept, cu_seqlens, self.extent)

    @staticmethod
    def from_images(
        lengths: Sequence[int],
        images: Sequence[ImageSpan] = (),
        *,
        padding: str = "right",
        packed: bool = False,
        device: torch.device | str | None = None,
    ) -> TokenLayout:
        """A layout from spans that the host knows.

        Args:
            lengths: tokens of each sample.
            images: spans, in any order; images of one sample are numbered by their start.
            padding: "right" or "left", the side on which shorter samples are padded.
            packed: lay the samples one after the other instead; padding is ignored.
            device: of the result; None: the default device.

        Raises:
            ValueError: a span that overlaps another one, leaves its sample, has an empty grid or names no sample.
        """
        op = "from_images"
        if not isinstance(lengths, Sequence):
            raise TypeError(f"{op}: lengths must be a sequence of ints, got {type(lengths).__name__}")
        for sample, length in enumerate(lengths):
            checks.integer(op, f"lengths[{sample}]", length)
        checks.choice(op, "padding", padding, ("right", "left"))
        checks.boolean(op, "packed", packed)
        spans: list[list[ImageSpan]] = [[] for _ in lengths]
        for number, image in enumerate(images):
            span = _checked_span(f"images[{number}]", image)
            if span.batch >= len(lengths):
                raise ValueError(f"{op}: images[{number}] is of sample {span.batch}, but there are {len(lengths)}")
            if span.start + span.length > lengths[span.batch]:
                raise ValueError(
                    f"{op}: images[{number}] covers tokens {span.start} to {span.start + span.length} of sample "
                    f"{span.batch}, which has {lengths[span.batch]}"
                )
            spans[span.batch].append(span)
        rows = []
        for length, of_sample in zip(lengths, spans):
            row = torch.zeros((length, 4), dtype=torch.int32, device="cpu")
            row[:, 0] = -1
            end = 0
            for number, span in enumerate(sorted(of_sample, key=lambda s: s.start)):
                if span.start < end:
                    raise ValueError(
                        f"{op}: the image at token {span.start} of sample {span.batch} overlaps the one before it, "
                        f"which ends at {end}"
                    )
                end = span.start + span.length
                row[span.start : end] = _cells(span, number)
            rows.append(row)
        if packed:
            flat = torch.cat(rows) if rows else torch.zeros((0, 4), dtype=torch.int32, device="cpu")
            ends = torch.tensor([0, *lengths], device="cpu").cumsum(0).to(torch.int32)
            image_id, coords, ends = _on(device, flat[:, 0], flat[:, 1:], ends)
            return TokenLayout._of(image_id, coords, None, None, ends, None)
        longest = max(lengths, default=0)
        table = torch.zeros((len(lengths), longest, 4), dtype=torch.int32, device="cpu")
        table[..., 0] = -1
        mask = torch.zeros((len(lengths), longest), dtype=torch.bool, device="cpu")
        for sample, (length, row) in enumerate(zip(lengths, rows)):
            first = 0 if padding == "right" else longest - length
            table[sample, first : first + length] = row
            mask[sample, first : first + length] = True
        table, mask = _on(device, table, mask)
        ragged = any(length != longest for length in lengths)
        image_id, coords = table[..., 0].contiguous(), table[..., 1:].contiguous()
        return TokenLayout._of(image_id, coords, None, mask if ragged else None, None, None)

    @staticmethod
    def from_ids(
        input_ids: Tensor,
        image_token_id: int | Sequence[int],
        grids: Tensor | Sequence[Sequence[int]] | Sequence[int],
        *,
        merge: int = 1,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> TokenLayout:
        """A layout from token ids, on their device, without waiting for it. Images are numbered over the whole batch.

        A grid is (t, h, w), or (t, h, w, newline): with a newline (True or 1) the id of placeholders stands behind
        every row of w tokens once more, for LLaVA-NeXT's ``image_newline``, which is text here (image_id -1). An image
        of LLaVA-NeXT and LLaVA-OneVision is two grids in a row, which are two images here: the base grid, (1, 24, 24),
        then what is left of the tiles without their padding, (1, h, w, True). The single newline that follows an image
        without tiles, or a video of LLaVA-OneVision, is a grid of no columns: (1, 1, 0, True).

        Args:
            input_ids: int [batch, tokens], or [tokens] with cu_seqlens.
            image_token_id: the id (or ids, for images and videos) of placeholders of visual tokens.
            grids: int [images, 3 or 4], or a sequence of tuples: the grid of every image in the order in which they
                appear (transformers' ``image_grid_thw``); images do not cross samples. Or one tuple, such as
                (1, 24, 24): all images have this grid, and their number follows from the ids.
            merge: tokens per side that were merged into one after the grids were measured (Qwen's spatial_merge_size).
            mask: bool [batch, tokens], False for padding.
            cu_seqlens: int32 [samples + 1] of a packed sequence.

        Raises:
            TypeError, ValueError: an argument that does not fit. ValueError: placeholders and grids disagree in number
                (with one grid: they are no multiple), or an image crosses samples (CPU tensors; on CUDA a device-side
                assertion fails).
        """
        image_id, coords, extent = operators.from_ids(input_ids, image_token_id, grids, merge, mask, cu_seqlens)
        return TokenLayout._of(image_id, coords, None, mask, cu_seqlens, extent)

    @staticmethod
    def from_mrope(visual: Tensor, position_ids: Tensor, *, mask: Tensor | None = None) -> TokenLayout:
        """A layout from M-RoPE positions, on their device, without waiting for it: they are coordinates already.

        A run of visual tokens is an image. Within one, tokens are in raster order, so y and x never grow together from
        one token to the next; behind an image both begin anew past all that it had. That tells images apart which
        touch; it holds for the positions of a whole prompt, not for those of tokens that some were dropped from
        (``take`` keeps a layout's images). A video is one image if its frames follow each other (Qwen2-VL, Qwen2.5-VL);
        where text with times stands between frames (Qwen3-VL), every frame is one.

        Coordinates are positions less the smallest ones of their image. So t counts as the model's positions do: the
        frames of Qwen2.5-VL may be 50 apart, and a radius along t is to be given in these steps.

        Args:
            visual: bool [batch, tokens], the placeholders of visual tokens.
            position_ids: int [3, batch, tokens], t, y, x; or [4, batch, tokens], whose first row is left out
                (transformers puts the positions of text there).
            mask: bool [batch, tokens], False for padding.

        Returns:
            What ``from_ids`` with the grids gives, but for t where the model's frames are not 1 apart. Causality
            follows from the order of tokens, as there.

        Raises:
            TypeError, ValueError: an argument that does not fit; positions of one image that are more than 65535 apart
                (CPU tensors; on CUDA a device-side assertion fails).
        """
        image_id, coords, extent = operators.from_mrope(visual, position_ids, mask)
        return TokenLayout._of(image_id, coords, None, mask, None, extent)


def _checked_span(name: str, image) -> ImageSpan:
    try:
        span = ImageSpan(*image)
        t, h, w = span.grid
    except (TypeError, ValueError):
        raise TypeError(f"from_images: {name} must be ImageSpan(batch, start, (t, h, w)), got {image!r}") from None
    for what, value, least in (
        ("batch", span.batch, 0),
        ("start", span.start, 0),
        ("t", t, 1),
        ("h", h, 1),
        ("w", w, 1),
    ):
        checks.integer("from_images", f"{name}.{what}", value, least)
    if max(t, h, w) > MAX_COORDINATE:
        raise ValueError(f"from_images: {name}.grid must be at most {MAX_COORDINATE} along each axis, got {(t, h, w)}")
    checks.boolean("from_images", f"{name}.newline", span.newline)
    return span


def _on(device, *tensors: Tensor) -> list[Tensor]:
    """Tensors of the host, on a device (None: the default one), without waiting for it."""
    device = torch.get_default_device() if device is None else device
    return [x.to(device, non_blocking=True) for x in tensors]


def _cells(span: ImageSpan, number: int) -> Tensor:
    """int32 [length, 4]: (image, t, y, x) of the tokens of a span; image -1 for newlines."""
    t, h, w = span.grid
    cells = torch.zeros((t, h, w + span.newline, 4), dtype=torch.int32, device="cpu")
    cells[..., 0] = number
    cells[..., 1] = torch.arange(t, device="cpu")[:, None, None]
    cells[..., 2] = torch.arange(h, device="cpu")[:, None]
    cells[..., 3] = torch.arange(w + span.newline, device="cpu")
    if span.newline:
        cells[:, :, w] = torch.tensor([-1, 0, 0, 0], dtype=torch.int32, device="cpu")
    return cells.reshape(-1, 4)


_FIELDS = ("image_id", "coords", "positions", "mask", "cu_seqlens", "extent")


def _unflatten(*tensors) -> TokenLayout:
    layout = object.__new__(TokenLayout)
    for name, tensor in zip(_FIELDS, tensors):
        object.__setattr__(layout, name, tensor)
    return layout


_pytree.register(TokenLayout, _FIELDS, (), _unflatten)
_pytree.register_named_tuple(ImageSpan)
