"""Attention plans: which blocks of tokens have to meet, worked out once and used by every layer.

A plan holds the tokens in an order that keeps neighbours together, cut into blocks, and for every block of queries the
blocks of keys that it has to visit. Building one is a few sorts and comparisons of bounding boxes on the layout's
device; the host never waits. Kernels apply the exact rule to pairs inside the blocks that they visit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyvtk import _numbers, _pytree, backends, checks, transforms
from pyvtk.layout import TokenLayout, require
from pyvtk.reference import attention_facts as reference_facts
from pyvtk.reference import attention_plan as reference
from pyvtk.reference.attention import visible
from pyvtk.reference.attention_facts import ALL, AS_GIVEN, OF_TEXT, OF_VISUAL, PADDING, replaced, strips
from pyvtk.reference.attention_plan import IMAGE, INVALID, POSITION, REGION, ROW, SAMPLE, TEXT, T, X, Y
from pyvtk.selection import Selection

_FACTS = 8  # numbers in a slot
EVERYWHERE = 2**30  # a radius that no pair exceeds
TEXTS = ("causal", "all")  # how attention goes that text is part of
_KEYS = {"all": ALL, "text": OF_TEXT, "visual": OF_VISUAL}


class Density(NamedTuple):
    """Pairs of a query and a key, per head, over all samples."""

    needed: int  # visible by the plan's rule
    visited: int  # in blocks that kernels visit
    dense: int  # of ordinary attention over the same tokens: causal, or all pairs where no token is later than another
    causal: bool = True  # which of the two

    def __str__(self) -> str:
        dense = "dense causal attention" if self.causal else "dense attention"
        share = self.visited / max(self.dense, 1)
        note = ""
        if self.needed > self.dense:
            note = f"; {dense} does not see all of these"
        elif self.visited > self.dense:
            note = f"; {dense} would visit fewer"
        return f"needs {self.needed} pairs, visits {self.visited}, {share:.1%} of {dense}{note}"


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Made by :func:`neighbor_plan`, :func:`window_plan`, :func:`routed_plan` or :func:`subset_plan`.

    Tensors are int32. ``batch`` is the batch axis of q, k and v (1 for packed sequences, whose samples begin at block
    boundaries). A slot is a place in the plan's order; every row of q stands in one query slot, every row of k in one
    key slot, and blocks are runs of ``block`` slots.

    Attributes:
        query_slots: [batch, 8, slots]; what stands in each slot: row, image, t, y, x, position, region, sample. row
            -1 is an empty slot; image is -1 for text, -2 for what sees nothing.
        key_slots: the same for keys; image -2 for keys that nobody sees.
        key_blocks: [batch, query blocks, key blocks]; the key blocks that each query block visits: first those of
            which every query sees every key, then the others, each ascending, then -1.
        key_counts: [batch, query blocks, 2]; how many of the first kind, and how many in all.
        query_order: [batch * query blocks]; query blocks, those that visit most first.
        query_blocks, query_counts, key_order: the transpose, by which gradients of keys are formed.
        routes: [batch, regions, regions]; 1 where tokens of one region see those of another; [0, 0, 0] for all.
        block: tokens in a block of queries and in one of keys.
        radius: (t, y, x), inclusive.
        causal_window: visual tokens see only earlier ones of their own image.
        cross_image: visual tokens see earlier ones of other images.
        packed: whether samples are packed.
        added_keys: whether ``tail`` lets text that was added be seen: not by plans of visual keys. None: it refuses to
            add keys, since a mask said which there are.

    A pytree, so it passes through torch.compile, torch.export and checkpointing.
    """

    query_slots: Tensor
    key_slots: Tensor
    key_blocks: Tensor
    key_counts: Tensor
    query_order: Tensor
    query_blocks: Tensor
    query_counts: Tensor
    key_order: Tensor
    routes: Tensor
    num_queries: int
    num_keys: int
    block: tuple[int, int]
    radius: tuple[int, int, int]
    causal_window: bool = False
    cross_image: bool = False
    packed: bool = False
    added_keys: bool | None = True

    def tensors(self) -> list[Tensor]:
        """What operators take as ``plan``, in their order."""
        return [getattr(self, name) for name in _TENSORS]

    @property
    def _row_axes(self) -> Tensor:
        """num_queries and num_keys as the pytree's leaf: dynamic sizes in an exported program."""
        return _pytree.axis(self, self.query_slots, 2, self.num_queries, self.num_keys)

    def rule(self) -> list[int]:
        """What operators take as ``rule``: tokens in a block of queries and of keys, radius, two flags."""
        return [*self.block, *self.radius, int(self.causal_window), int(self.cross_image)]

    def tail(self, num_queries: int, num_keys: int, k_lengths: Tensor | None = None) -> AttentionPlan:
        """The plan of the last queries of a sequence that has grown: decode and chunked prefill.

        Keys after those of this plan are text, later than all of them. :func:`neighbor_attention` makes this plan on
        its own where q or k do not have this plan's length (and it needs one); make it once if several layers share it.

        Args:
            num_queries: rows of q; the last ones of the sequence.
            num_keys: rows of k, at least this plan's.
            k_lengths: int [batch], how many rows of k are in use; None: all of them. With it, padding behind a
                sample's last token is free room, and what stands there now is text.

        Raises:
            TypeError, ValueError: an argument that does not fit.
        """
        op = "tail"
        checks.integer(op, "num_queries", num_queries)
        checks.integer(op, "num_keys", num_keys, self.num_keys)
        if self.packed:
            raise ValueError(f"{op}: plan must be of a padded batch, got one of packed samples")
        if self.num_queries != self.num_keys:
            raise ValueError(f"{op}: plan must be that of a whole layout, got a tail of {self.num_queries} queries")
        if num_queries > num_keys:
            raise ValueError(f"{op}: num_queries must be at most num_keys={num_keys}, got {num_queries}")
        if num_keys > self.num_keys and self.added_keys is None:
            raise ValueError(f"{op}: num_keys must be {self.num_keys}, since keys was a mask, got {num_keys}")
        device, batch = self.query_slots.device, self.query_slots.shape[0]
        queries = _by_row(self.query_slots, self.num_queries)
        place = torch.arange(num_keys, dtype=torch.int32, device=device)
        first = self.num_keys  # the row at which what is new begins
        if k_lengths is not None:
            checks.tensor(op, "k_lengths", k_lengths)
            checks.dtype(op, "k_lengths", k_lengths, checks.INTEGERS)
            checks.shape(op, "k_lengths", k_lengths, (batch,), "[batch]")
            checks.same_device(op, "k_lengths", k_lengths, self.query_slots, "the plan")
            in_range = ((k_lengths >= 0) & (k_lengths <= num_keys)).all()
            require(in_range, f"{op}: k_lengths must be at most the {{num_keys}} rows of k", num_keys=num_keys)
            ends = torch.where(queries[:, POSITION] == PADDING, 0, place[: self.num_keys] + 1)
            first = _most(ends, 0)
        position = (_most(queries[:, POSITION], -1) + 1 + place - first).expand(batch, num_keys)
        old = (place < first).expand(batch, num_keys)

        def grown(facts: Tensor, image: int) -> Tensor:
            facts = torch.nn.functional.pad(facts, (0, num_keys - self.num_keys))
            facts = _with(facts, ROW, place.expand(batch, num_keys))
            facts = _with(facts, IMAGE, torch.where(old, facts[:, IMAGE], image))
            facts = _with(facts, POSITION, torch.where(old, facts[:, POSITION], position))
            if k_lengths is None:
                return facts
            return _with(facts, IMAGE, torch.where(place < k_lengths[:, None], facts[:, IMAGE], INVALID))

        keys = grown(_by_row(self.key_slots, self.num_keys), TEXT if self.added_keys else INVALID)
        queries = grown(queries, TEXT)
        row = torch.arange(num_queries, device=device).expand(batch, num_queries) + (num_keys - num_queries)
        if k_lengths is not None:
            row = row + (k_lengths.long() - num_keys)[:, None]
        own = torch.arange(num_queries, dtype=torch.int32, device=device).expand(row.shape)
        before = row < 0
        queries = queries.gather(2, row.clamp(min=0)[:, None].expand(-1, _FACTS, -1))
        queries = _with(queries, IMAGE, torch.where(before, INVALID, queries[:, IMAGE]))
        queries = _with(queries, ROW, own)

        def curve(facts: Tensor) -> list[Tensor]:
            return [facts[:, REGION].long(), _curve(facts, self.block[0], self.radius, None)]

        return _build(
            queries, keys, curve, None, self.routes, num_queries, num_keys, self.block, self.radius,
            self.causal_window, self.cross_image, self.added_keys,
        )  # fmt: skip

    def __repr__(self) -> str:
        """Sizes and the rule, no values."""
        regions = f", regions={self.routes.shape[-1]}" if self.routes.shape[-1] else ""
        return (
            f"AttentionPlan(batch={self.query_slots.shape[0]}, num_queries={self.num_queries}, "
            f"num_keys={self.num_keys}, packed={self.packed},\n"
            f"    block={self.block}, radius={self.radius}, causal_window={self.causal_window}, "
            f"cross_image={self.cross_image}{regions},\n"
            f"    added_keys={self.added_keys}, device='{self.query_slots.device}')"
        )

    def density(self) -> Density:
        """How many pairs are needed, visited, and those of dense attention. Waits for the device."""
        needed = dense = together = 0
        keys = self.key_slots
        as_text = _with(keys, IMAGE, keys[:, IMAGE].clamp(max=TEXT))
        there = (keys[:, IMAGE] >= TEXT)[:, None]
        step = max(1, 2**24 // max(keys.shape[0] * keys.shape[2], 1))
        for first in range(0, self.query_slots.shape[2], step):
            some = self.query_slots[:, :, first : first + step]
            needed += int(visible(some, keys, self.rule(), self.routes).sum())
            some = _with(some, IMAGE, some[:, IMAGE].clamp(max=TEXT))
            dense += int(visible(some, as_text, self.rule(), self.routes).sum())
            pairs = some[:, SAMPLE, :, None] == keys[:, SAMPLE, None]
            together += int((pairs & there & (some[:, IMAGE] >= TEXT)[..., None]).sum())
        visited = int(self.key_counts[..., 1].sum()) * self.block[0] * self.block[1]
        return Density(needed, visited, dense, dense < together)

    def plot(self, batch: int = 0):
        """Draws what each query sees, in sequence order, beside the blocks that kernels visit, in the plan's order.

        Returns:
            A matplotlib Figure. Waits for the device.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        rows = self.query_slots[batch, ROW].long().cpu(), self.key_slots[batch, ROW].long().cpu()
        seen = visible(self.query_slots[batch, None], self.key_slots[batch, None], self.rule(), self.routes[batch:][:1])
        seen = seen[0].cpu()
        in_sequence = torch.zeros((self.num_queries, self.num_keys), dtype=torch.bool, device="cpu")
        there = (rows[0] >= 0)[:, None] & (rows[1] >= 0)
        i, j = there.nonzero(as_tuple=True)
        in_sequence[rows[0][i], rows[1][j]] = seen[i, j]
        blocks, counts = self.key_blocks[batch].cpu(), self.key_counts[batch].cpu()
        tiles = torch.zeros(blocks.shape, dtype=torch.float32, device="cpu")
        for query, (full, visits) in enumerate(counts.tolist()):
            tiles[query, blocks[query, :full].long()] = 2
            tiles[query, blocks[query, full:visits].long()] = 1
        tiles = tiles.repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(in_sequence.numpy(), cmap="Blues", interpolation="nearest", aspect="auto")
        left.set(title="visible pairs", xlabel="key", ylabel="query")
        right.imshow((tiles + seen).numpy(), cmap="Blues", interpolation="nearest", aspect="auto", vmin=0, vmax=3)
        right.set(title="blocks visited, in the plan's order", xlabel="key slot", ylabel="query slot")
        figure.suptitle(str(self.density()))
        return figure


_TENSORS = (
    "query_slots", "key_slots", "key_blocks", "key_counts", "query_order", "query_blocks", "query_counts", "key_order",
    "routes",
)  # fmt: skip
_RULE = ("block", "radius", "causal_window", "cross_image", "packed", "added_keys")


def _unflatten(*parts) -> AttentionPlan:
    *tensors, row_axes = parts[: -len(_RULE)]
    fields = dict(zip((*_TENSORS, *_RULE), (*tensors, *parts[-len(_RULE) :])))
    return _pytree.with_axis(AttentionPlan, row_axes, fields, "num_queries", "num_keys")


_pytree.register(AttentionPlan, (*_TENSORS, "_row_axes"), _RULE, _unflatten)
_pytree.register_named_tuple(Density)


# Facts: int32 [batch, 8, rows], what query_slots hold, in the order of rows -------------------------------------------


def _with(facts: Tensor, which: int, values: Tensor) -> Tensor:
    """``facts`` with one of them replaced."""
    return replaced(facts, which, checks.to_int32(values))


def _most(values: Tensor, least: int) -> Tensor:
    """int32 [batch, 1]: the largest of the values [batch, n] and ``least``; n may be 0."""
    return torch.cat([values, values.new_full((values.shape[0], 1), least)], 1).amax(1, keepdim=True)


def _by_row(slots: Tensor, rows: int) -> Tensor:
    """Slots back in the order of rows."""
    where = torch.where(slots[:, ROW] < 0, rows, slots[:, ROW]).long()[:, None].expand(-1, _FACTS, -1)
    return slots.new_empty((slots.shape[0], _FACTS, rows + 1)).scatter(2, where, slots)[:, :, :rows]


def _curve(facts: Tensor, block: int, radius: tuple[int, int, int], extent: Tensor | None) -> Tensor:
    """int64 [batch, rows]: the curve of neighbourhoods (``strips`` of the reference)."""
    return _strips_of(radius)(facts, block, radius, extent)


def _strips_of(radius: Sequence[int]):
    """``strips``, as an operator where torch.compile leaves the radius open: the shape of strips is chosen by
    comparisons, each outcome of which would be a program of its own."""
    return _opaque_strips if _numbers.is_open(*radius) else strips


@torch.library.custom_op("pyvtk::strips", mutates_args=())
def _opaque_strips(facts: Tensor, block: int, radius: Sequence[int], extent: Tensor | None) -> Tensor:
    return strips(facts, block, radius, extent)


@_opaque_strips.register_fake
def _(facts, block, radius, extent):
    return facts.new_empty((facts.shape[0], facts.shape[2]), dtype=torch.int64)


def _facts_fake(
    image_id, coords, positions, mask, cu_seqlens, extent, keys, key_group, causal, strip, window
):  # fmt: skip
    batch, rows = image_id.shape if cu_seqlens is None else (1, image_id.shape[0])
    facts = image_id.new_empty((1 if key_group == ALL else 2, batch, _FACTS, rows), dtype=torch.int32)
    return facts, image_id.new_empty((2 if window else 1, batch, rows), dtype=torch.int64)


# Facts [1 or 2, batch, 8, rows] and curve [1 or 2, batch, rows] of a layout: pyvtk/reference/attention_facts.py.
backends.define(
    "attention_facts",
    "(Tensor image_id, Tensor coords, Tensor positions, Tensor? mask, Tensor? cu_seqlens, Tensor extent, Tensor? keys, "
    "int key_group, bool causal, SymInt[] strip, SymInt[] window) -> (Tensor, Tensor)",
    fake=_facts_fake,
)


def _facts(
    layout: TokenLayout, text: str, *, keys: str | Tensor = "all", strip: Sequence[int] = (),
    window: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Facts of queries, those of keys (the same tensor where all keys exist), and the curve of both."""
    given, group = (keys, AS_GIVEN) if isinstance(keys, Tensor) else (None, _KEYS[keys])
    cu_seqlens = None if layout.cu_seqlens is None else layout.cu_seqlens.contiguous()
    arguments = (
        layout.image_id, layout.coords, layout.positions, layout.mask, cu_seqlens, layout.extent.contiguous(), given,
        group, text == "causal", list(strip), list(window),
    )  # fmt: skip
    if backends.pick("attention_facts", None, layout.image_id) == "compiled":
        facts, curve = transforms.call(torch.ops.pyvtk.attention_facts.default, (), *arguments)
    else:
        facts, curve = reference_facts.attention_facts(*arguments, strips=_strips_of(strip[1:]))
    queries = facts[0]
    return queries, queries if group == ALL else facts[1], curve


# The operator ---------------------------------------------------------------------------------------------------------


def _num_slots(rows: int, cu_seqlens: Tensor | None, block: int) -> int:
    # packed samples each begin a block, and what follows the last one does too
    return -(-rows // block) * block if cu_seqlens is None else (rows // block + cu_seqlens.shape[0]) * block


def _plan_fake(query_facts, key_facts, query_curve, key_curve, cu_seqlens, routes, rule):
    batch = query_facts.shape[0]
    sizes = [_num_slots(f.shape[2], cu_seqlens, b) for f, b in zip((query_facts, key_facts), rule)]
    blocks = [size // block for size, block in zip(sizes, rule)]

    def table(rows: int, columns: int) -> list[Tensor]:
        shapes = (batch, rows, columns), (batch, rows, 2), (batch * rows,)
        return [query_facts.new_empty(shape) for shape in shapes]

    slots = [query_facts.new_empty((batch, _FACTS, size)) for size in sizes]
    return *slots, *table(*blocks), *table(*blocks[::-1])


# Facts int32 [batch, 8, rows], curves int64 [keys, batch, rows]: pyvtk/reference/attention_plan.py.
backends.define(
    "attention_plan",
    "(Tensor query_facts, Tensor key_facts, Tensor query_curve, Tensor key_curve, Tensor? cu_seqlens, Tensor routes, "
    "SymInt[] rule) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_plan_fake,
)


def _build(
    queries: Tensor, keys: Tensor, curve, cu_seqlens: Tensor | None, routes: Tensor, num_queries: int, num_keys: int,
    block: tuple[int, int], radius: tuple[int, int, int], causal_window: bool = False, cross_image: bool = False,
    added_keys: bool | None = True,
) -> AttentionPlan:  # fmt: skip
    """A plan from the facts of queries and keys. ``curve`` is what visual tokens of one image sort by, int64 [keys,
    batch, rows] of queries and keys alike; or ``curve(facts)`` lists that."""
    rule = [*block, *radius, int(causal_window), int(cross_image)]
    same = keys is queries
    if isinstance(curve, Tensor):
        query_curve = key_curve = curve
    else:
        query_curve = torch.stack(curve(queries))
        key_curve = query_curve if same else torch.stack(curve(keys))
    queries = queries.contiguous()
    keys = queries if same else keys.contiguous()
    arguments = (queries, keys, query_curve, key_curve, cu_seqlens, routes, rule)
    if backends.pick("attention_plan", None, queries) == "compiled":
        tensors = transforms.call(torch.ops.pyvtk.attention_plan.default, (), *arguments)
    else:
        tensors = reference.attention_plan(*arguments)
    return AttentionPlan(
        *tensors, routes, num_queries, num_keys, block, radius, causal_window, cross_image, cu_seqlens is not None,
        added_keys,
    )  # fmt: skip


# Builders -------------------------------------------------------------------------------------------------------------


def default_block(device: torch.device) -> tuple[int, int]:
    """Tokens in a block of queries and of keys. The CPU kernel sorts out single keys, for which small blocks are best;
    on a GPU a block fills the tensor cores."""
    return (64, 64) if device.type == "cuda" else (16, 16)


def _checked_block(op: str, block, device: torch.device) -> tuple[int, int]:
    if block is None:
        return default_block(device)
    if not isinstance(block, Sequence) or len(block) != 2:
        raise TypeError(f"{op}: block must be a pair (tokens of queries, tokens of keys), got {block!r}")
    for size in block:
        checks.integer(op, "block", size, 16)
        if size & (size - 1):
            raise ValueError(f"{op}: block must hold powers of two, got {tuple(block)}")
    return tuple(block)


def _triple(op: str, name: str, value, minimum: int) -> tuple[int, int, int]:
    """An int for all three axes, or (t, y, x)."""
    values = (value,) * 3 if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) != 3:
        raise TypeError(f"{op}: {name} must be an int or a triple (t, y, x), got {value!r}")
    for number in values:
        checks.integer(op, name, number, minimum)
    return tuple(values)


def _cut(lengths: tuple[int, int, int]) -> tuple[int, int, int]:
    """Lengths that reach past every grid, as ones that still fit int32."""
    return tuple(min(length, EVERYWHERE) for length in lengths)


def _checked_layout(op: str, layout) -> TokenLayout:
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"{op}: layout must be a TokenLayout, got {type(layout).__name__}")
    return layout


def _no_routes(layout: TokenLayout) -> Tensor:
    return torch.empty((0, 0, 0), dtype=torch.int32, device=layout.device)


def neighbor_plan(
    layout: TokenLayout,
    radius: int | tuple[int, int, int],
    *,
    causal_window: bool = False,
    cross_image: bool = False,
    keys: str | Tensor = "all",
    text: str = "causal",
    block: tuple[int, int] | None = None,
) -> AttentionPlan:
    """Visual tokens see those of their own image within a radius; everything else is causal attention.

    Args:
        layout: of the tokens.
        radius: the largest distance along each axis (Chebyshev, clipped at the borders), one for all or (t, y, x).
            0 leaves a visual token itself; a radius past the grid makes the image dense.
        causal_window: visual tokens see only those before them in the sequence; by default both directions.
        cross_image: visual tokens see earlier tokens of other images; by default those are unseen.
        keys: which keys exist for this plan: "all", "text", "visual", or bool, shaped like the layout. Plans by
            groups of keys are joined by :func:`merge_attention`.
        text: "causal": what involves text goes by position, a token sees none that is later. "all": no token is later
            than another, so text sees all tokens of its sample and all see it, as registers and the class token of a
            ViT and the prompt of a diffusion transformer do. Then cross_image lets visual tokens see all those of
            other images, and causal_window must be False. What ``tail`` adds is later than all of these.
        block: tokens in a block of queries and of keys, powers of two; None: what suits the layout's device.

    Source: YOPO (Treat Visual Tokens as Text?, arXiv 2410.06169), whose code uses a bidirectional, clipped window.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    op = "neighbor_plan"
    layout = _checked_layout(op, layout)
    radius = _cut(_triple(op, "radius", radius, 0))
    checks.boolean(op, "causal_window", causal_window)
    checks.boolean(op, "cross_image", cross_image)
    block = _checked_block(op, block, layout.device)
    checks.choice(op, "text", text, TEXTS)
    if causal_window and text == "all":
        raise ValueError(f"{op}: causal_window must be False where text is 'all', got True")
    if isinstance(keys, Tensor):
        checks.dtype(op, "keys", keys, (torch.bool,))
        checks.shape(op, "keys", keys, tuple(layout.image_id.shape), "shaped like the layout")
        checks.same_device(op, "keys", keys, layout.image_id, "the layout")
        added_keys = None
    else:
        checks.choice(op, "keys", keys, tuple(_KEYS))
        added_keys = keys != "visual"
    queries, of_keys, curve = _facts(layout, text, keys=keys, strip=(block[0], *radius))
    return _build(
        queries, of_keys, curve, layout.cu_seqlens, _no_routes(layout), layout.num_tokens, layout.num_tokens, block,
        radius, causal_window, cross_image, added_keys,
    )  # fmt: skip


def window_plan(
    layout: TokenLayout,
    size: int | tuple[int, int, int],
    shift: int | tuple[int, int, int] = 0,
    *,
    text: str = "causal",
    block: tuple[int, int] | None = None,
) -> AttentionPlan:
    """Visual tokens see those of their own window of their own image; everything else is causal attention.

    Args:
        layout: of the tokens.
        size: tokens per window along (t, y, x), or one for all three. Windows at the far borders may be smaller.
        shift: where the first whole window begins, in tokens; what lies before it is a smaller window (Swin's shifted
            windows after masking: nothing wraps around).
        text: as in :func:`neighbor_plan`.
        block: as in :func:`neighbor_plan`.

    Source: Swin Transformer (arXiv 2103.14030); LITv2's Hi-Fi heads; window attention of Qwen2.5-VL's tower.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    op = "window_plan"
    layout = _checked_layout(op, layout)
    checks.choice(op, "text", text, TEXTS)
    size, shift = _triple(op, "size", size, 1), _triple(op, "shift", shift, 0)
    # of the numbers as given: those that are cut leave another remainder
    shift = [offset % length for offset, length in zip(shift, size)]
    size = _cut(size)
    block = _checked_block(op, block, layout.device)
    # + length - offset: keeps the numerator positive, and windows in order
    offsets = [(length - min(offset, length)) % length for length, offset in zip(size, shift)]
    facts, _, curve = _facts(layout, text, window=(*size, *offsets))
    return _build(
        facts, facts, curve, layout.cu_seqlens, _no_routes(layout), layout.num_tokens, layout.num_tokens, block,
        (0, 0, 0),
    )  # fmt: skip


def routed_plan(
    layout: TokenLayout,
    region: int | tuple[int, int, int] | Tensor,
    table: Tensor,
    *,
    text: str = "causal",
    block: tuple[int, int] | None = None,
) -> AttentionPlan:
    """Visual tokens see those of the regions that their own region is routed to; everything else is causal attention.

    Args:
        layout: of the tokens.
        region: tokens per region along (t, y, x), or one for all three: regions are then numbered in raster order over
            the sample's extent. Or int, shaped like the layout: the number of each visual token's region.
        table: int [samples, regions, k]; the regions that each region sees (its own only if listed); negative entries
            are left out.
        text: as in :func:`neighbor_plan`.
        block: as in :func:`neighbor_plan`.

    Source: BiFormer (arXiv 2303.08810), bi-level routing attention. Its scale is C ** -0.5, of all heads together.

    Raises:
        TypeError, ValueError: an argument that does not fit, a region beyond the table (on CUDA a device assertion).
    """
    op = "routed_plan"
    layout = _checked_layout(op, layout)
    checks.choice(op, "text", text, TEXTS)
    block = _checked_block(op, block, layout.device)
    checks.tensor(op, "table", table, 3)
    checks.dtype(op, "table", table, checks.INTEGERS)
    checks.same_device(op, "table", table, layout.image_id, "the layout")
    if table.shape[0] != layout.num_samples:
        raise ValueError(f"{op}: table must have {layout.num_samples} samples, got shape {tuple(table.shape)}")
    samples, regions, _ = table.shape
    facts, _, inside = _facts(layout, text)
    sample = layout.sample.clamp(max=samples - 1)[None] if layout.packed else None
    if isinstance(region, Tensor):
        checks.dtype(op, "region", region, checks.INTEGERS)
        checks.shape(op, "region", region, tuple(layout.image_id.shape), "shaped like the layout")
        checks.same_device(op, "region", region, layout.image_id, "the layout")
        number = (region[None] if layout.packed else region).long()
    else:
        size = reference.filled(_cut(_triple(op, "region", region, 1)), layout.device)
        count = (layout.extent.long() + size - 1) // size  # regions per axis, [samples, 3]
        count = count[sample[0]].T[:, None] if layout.packed else count.T[..., None]
        t, y, x = (facts[:, axis].long() // length for axis, length in zip((T, Y, X), size))
        number = (t * count[1] + y) * count[2] + x
    seen = facts[:, IMAGE] >= 0
    there = (~seen | ((number >= 0) & (number < regions))).all()
    require(there, f"{op}: region must be 0 to {{last}}", last=regions - 1)
    require((table < regions).all(), f"{op}: table must hold regions below {{regions}}", regions=regions)
    routes = torch.zeros((samples, regions, regions + 1), dtype=torch.int32, device=layout.device)
    routes = routes.scatter(2, torch.where(table < 0, regions, table).long(), 1)[..., :regions].contiguous()
    if layout.packed:
        number = number + sample * regions
        # of all samples, on the diagonal of one table
        routes = torch.diag_embed(routes.permute(1, 2, 0)).permute(2, 0, 3, 1)
        routes = routes.reshape(1, samples * regions, samples * regions)
    number = torch.where(seen, number, 0)
    facts = _with(facts, REGION, number)
    return _build(
        facts, facts, torch.cat([number[None], inside]), layout.cu_seqlens, routes, layout.num_tokens,
        layout.num_tokens, block, (EVERYWHERE,) * 3,
    )  # fmt: skip


def subset_plan(
    layout: TokenLayout, selection: Selection, *, text: str = "causal", block: tuple[int, int] | None = None
) -> AttentionPlan:  # fmt: skip
    """Selected tokens attend to each other, causally by position; all others neither see nor are seen (output 0).

    Args:
        layout: of the tokens.
        selection: of the layout's token axis, without a head axis.
        text: as in :func:`neighbor_plan`; "all": selected tokens see all selected ones.
        block: as in :func:`neighbor_plan`.

    Source: ZipVL (arXiv 2410.08584), attention among the important tokens; VideoLLM-MoD (arXiv 2408.16730).

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    op = "subset_plan"
    layout = _checked_layout(op, layout)
    checks.choice(op, "text", text, TEXTS)
    block = _checked_block(op, block, layout.device)
    layout.check_selection(op, selection)
    facts, _, _ = _facts(layout, text)
    # among themselves all are text
    facts = _with(facts, IMAGE, torch.where(selection.mask().view(facts[:, IMAGE].shape), facts[:, IMAGE], INVALID))
    facts = _with(facts, IMAGE, facts[:, IMAGE].clamp(max=TEXT))
    return _build(
        facts, facts, facts[None, :, POSITION].long(), layout.cu_seqlens, _no_routes(layout), layout.num_tokens,
        layout.num_tokens, block, (0, 0, 0),
    )  # fmt: skip
