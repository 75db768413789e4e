"""Neighbour attention. Peers: torch's attention over all pairs and under a mask, FlexAttention, natten.

Dense peers (SDPA) compute another function, over every pair; they are what the same layer costs without the rule. All
others compute the same one, natten within its own borders, and every result is checked against its own definition.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import pyvtk
from pyvtk.reference import attention_facts, attention_plan, layout
from pyvtk.reference.attention import in_rows, visible

from .harness import BEST, DENSE, OURS, SHARE, TILE, Case, Pairs, close, compiled, marked, matmul_limit

BOTH = (torch.float32, torch.bfloat16)


# ---- a sequence and its rule, in the form of every peer


@dataclass(frozen=True)
class Scene:
    """Tokens of one sample, and who sees whom.

    Attributes:
        parts: runs of text (their length) and images or videos (t, h, w), in order.
        radius: of the neighbourhood.
        device: "cpu" or "cuda".
        keep: share of the tokens that stay, drawn at random.
    """

    parts: tuple[int | tuple[int, int, int], ...]
    radius: int
    device: str = "cpu"
    keep: float = 1.0

    @functools.cached_property
    def grids(self) -> list[tuple[int, int, int]]:
        return [part for part in self.parts if isinstance(part, tuple)]

    @property
    def causal(self) -> bool:
        """With text the sequence is a language model's; without, a vision tower's."""
        return len(self.grids) < len(self.parts)

    @property
    def starts(self) -> list[int]:
        """Where each part begins, and the end."""
        lengths = (math.prod(part) if isinstance(part, tuple) else part for part in self.parts)
        return list(itertools.accumulate(lengths, initial=0))

    @property
    def tokens(self) -> int:
        return round(self.keep * self.starts[-1])

    @functools.cached_property
    def layout(self) -> pyvtk.TokenLayout:
        placed = zip(self.starts, self.parts)
        spans = [pyvtk.ImageSpan(0, start, part) for start, part in placed if isinstance(part, tuple)]
        length = self.starts[-1]
        layout = pyvtk.TokenLayout.from_images([length], spans, device=self.device)
        if self.keep == 1:
            return layout
        scores = torch.rand(1, length, generator=torch.Generator().manual_seed(0)).to(self.device)
        return layout.take(pyvtk.select(scores, self.tokens))

    @functools.cached_property
    def plan(self) -> pyvtk.AttentionPlan:
        return pyvtk.neighbor_plan(self.layout, self.radius)

    # Written down from the layout, not from the plan: these judge the plan.

    def seen(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """bool [rows, tokens]: which keys these queries see."""
        image, coords = self.layout.image_id[0], self.layout.coords[0]
        axes = [axis for axis in range(3) if any(grid[axis] > 1 for grid in self.grids)]
        near = functools.reduce(
            torch.logical_and, ((coords[rows, None, axis] - coords[:, axis]).abs() <= self.radius for axis in axes)
        )
        if not self.causal:
            return near
        position = self.layout.positions[0]
        both = (image[rows, None] >= 0) & (image >= 0)
        near &= image[rows, None] == image
        return torch.where(both, near, position <= position[rows, None])

    def shifted(self, rows: Tensor) -> Tensor:
        """bool [rows, tokens]: natten's window, which moves inwards at borders instead of getting smaller."""
        near = torch.ones((), dtype=torch.bool, device=self.device)
        for axis, length in enumerate(self.grids[0]):
            if length > 1:
                c = self.layout.coords[0, :, axis]
                first = (c[rows, None] - self.radius).clamp(0, length - 2 * self.radius - 1)
                near = near & (c >= first) & (c <= first + 2 * self.radius)
        return near

    def earlier(self, rows: Tensor) -> Tensor:
        """bool [rows, tokens]: ordinary causal attention."""
        return torch.arange(self.tokens, device=self.device) <= rows[:, None]

    @functools.cached_property
    def mask(self) -> Tensor:
        return self.seen()

    def pairs(self) -> Pairs:
        blocks = int(self.plan.key_counts[..., 1].sum())
        visited = blocks * self.plan.block[0] * self.plan.block[1]
        dense = self.tokens * (self.tokens + 1) // 2 if self.causal else self.tokens**2
        return Pairs(self.needed, visited, dense)

    @functools.cached_property
    def needed(self) -> int:
        if self.keep < 1:
            return int(self.mask.sum())

        def along(length: int) -> int:
            return sum(min(i + self.radius, length - 1) - max(i - self.radius, 0) + 1 for i in range(length))

        near = sum(along(t) * along(h) * along(w) for t, h, w in self.grids)
        visual = sum(t * h * w for t, h, w in self.grids)
        return near + (self.tokens * (self.tokens + 1) - visual * (visual + 1)) // 2

    # FlexAttention: in raster order, or with tokens in the order of a plan whose blocks are as large as its own

    @functools.cached_property
    def slots(self) -> Tensor:
        return pyvtk.neighbor_plan(self.layout, self.radius, block=(128, 128)).query_slots[0]

    @functools.cached_property
    def row_of_slot(self) -> Tensor:
        return self.slots[0].clamp(min=0).long()

    @functools.cached_property
    def slot_of_row(self) -> Tensor:
        slot = torch.arange(self.slots.shape[1], device=self.device)
        row = torch.where(self.slots[0] < 0, self.tokens, self.slots[0]).long()
        return slot.new_zeros(self.tokens + 1).scatter(0, row, slot)[: self.tokens]

    def permute(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x[:, :, self.row_of_slot] for x in tensors)

    def rule(self, tiles: bool):
        """A mask_mod. Division of indices where order and shape allow it, else tables of coordinates."""
        radius = self.radius
        if not tiles and not self.causal and self.keep == 1:
            _, h, w = self.grids[0]

            def by_index(b, head, q, k):
                near = ((q // w % h - k // w % h).abs() <= radius) & ((q % w - k % w).abs() <= radius)
                return near & ((q // (w * h) - k // (w * h)).abs() <= radius)

            return by_index
        if tiles:
            _, image, t, y, x, position, _, _ = (row.contiguous() for row in self.slots)
        else:
            image, position = self.layout.image_id[0].contiguous(), self.layout.positions[0].contiguous()
            t, y, x = (row.contiguous() for row in self.layout.coords[0].unbind(-1))

        def by_table(b, head, q, k):
            near = ((y[q] - y[k]).abs() <= radius) & ((x[q] - x[k]).abs() <= radius)
            near = near & ((t[q] - t[k]).abs() <= radius) & (image[q] == image[k])
            both = (image[q] >= 0) & (image[k] >= 0)
            valid = (image[q] >= -1) & (image[k] >= -1)
            return ((both & near) | (~both & (position[k] <= position[q]))) & valid

        return by_table

    def build(self, tiles: bool) -> BlockMask:
        """Where it counts: compiled, as FlexAttention's documentation advises; on the CPU that takes 20 s per mask."""
        return self._blocks(tiles, compiled(create_block_mask) if self.device == "cuda" else create_block_mask)

    def _blocks(self, tiles: bool, create) -> BlockMask:
        length = self.slots.shape[1] if tiles else self.tokens
        return create(self.rule(tiles), None, None, length, length, device=self.device)

    # made once, outside of the time: not compiled, which takes seconds

    @functools.cached_property
    def raster_blocks(self) -> BlockMask:
        return self._blocks(False, create_block_mask)

    @functools.cached_property
    def tile_blocks(self) -> BlockMask:
        return self._blocks(True, create_block_mask)


# ---- what users write today: name -> what it computes and how


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """With key heads repeated: under a mask, torch's fused kernels take no groups."""
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def dense_peers(scene: Scene) -> dict:
    kind, options = ("earlier", {"is_causal": True}) if scene.causal else ("all", {})
    name = "SDPA causal" if scene.causal else "SDPA"
    peers = {name: (kind, lambda q, k, v: sdpa(q, k, v, **options))}
    if scene.device == "cuda":

        def cudnn(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return sdpa(q, k, v, **options)

        peers[f"{name} cuDNN"] = (kind, cudnn)
    return peers


def masked_peers(scene: Scene) -> dict:
    return {
        "SDPA mask": ("seen", lambda q, k, v: masked(q, k, v, scene.mask)),
        "SDPA mask built": ("seen", lambda q, k, v: masked(q, k, v, scene.seen())),
    }


BUILT = ("flex built", "flex tiles permuted", "flex tiles permuted built")
FLEX = ("flex", "flex tiles", *BUILT)


def flex_peers(scene: Scene) -> dict:
    """``built``: the mask is, inside the time. ``permuted``: tokens are, there and back."""

    def flex(q, k, v, blocks):
        return compiled(flex_attention)(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    def permuted(q, k, v, blocks):
        return flex(*scene.permute(q, k, v), blocks)[:, :, scene.slot_of_row]

    return {
        "flex": ("seen", lambda q, k, v: flex(q, k, v, scene.raster_blocks)),
        "flex built": ("seen", lambda q, k, v: flex(q, k, v, scene.build(False))),
        "flex tiles": ("tiles", lambda q, k, v: flex(q, k, v, scene.tile_blocks)),
        "flex tiles permuted": ("seen", lambda q, k, v: permuted(q, k, v, scene.tile_blocks)),
        "flex tiles permuted built": ("seen", lambda q, k, v: permuted(q, k, v, scene.build(True))),
    }


def natten_peers(scene: Scene) -> tuple[dict, dict[str, str]]:
    """The peer, or why it is absent. Only of a single grid, which is all that natten takes."""
    if len(scene.parts) > 1 or scene.keep < 1:
        return {}, {}
    grid = tuple(length for length in scene.grids[0] if length > 1)
    if importlib.util.find_spec("natten") is None:
        return {}, {"natten": "not installed"}
    if scene.device == "cpu" and scene.tokens > 2304:
        return {}, {"natten": "tens of seconds: it has no kernel for the CPU"}
    if min(grid) < 2 * scene.radius + 1:
        return {}, {"natten": "its window must fit into the grid"}

    def call(q, k, v):
        import natten  # where it cannot be imported, that is this peer's failure

        attend = natten.na2d if len(grid) == 2 else natten.na3d
        q, k, v = (x.transpose(1, 2).unflatten(1, grid) for x in (q, k, v))
        out = attend(q, k, v, kernel_size=(2 * scene.radius + 1,) * len(grid))
        return out.flatten(1, len(grid)).transpose(1, 2)

    return {"natten": ("shifted", call)}, {}


def peers_of(scene: Scene, mask: bool, flex: str | None) -> tuple[dict, dict[str, str]]:
    """name -> (what it computes, call), and those that are absent. ``flex``: why FlexAttention is."""
    present, absent = dense_peers(scene), {}
    if mask:
        present |= masked_peers(scene)
        if scene.device == "cpu" and scene.tokens >= 4096:
            del present["SDPA mask built"]
            absent["SDPA mask built"] = "seconds"
    else:
        absent["SDPA mask"] = "minutes, or more memory than there is"
    if flex is None:
        present |= flex_peers(scene)
    else:
        absent["flex"] = flex
    natten, why = natten_peers(scene)
    return present | natten, absent | why


# ---- checks


def optional(present: dict) -> tuple[str, ...]:
    """What not every CPU can run: what needs much memory, or a package."""
    return tuple(name for name in present if name == "natten" or name.startswith("SDPA mask"))


def rows_to_check(scene: Scene) -> Tensor:
    """All queries of a short sequence; of a long one the first, the last and some at random."""
    if scene.tokens <= 700:
        return torch.arange(scene.tokens, device=scene.device)
    drawn = torch.randperm(scene.tokens, generator=torch.Generator().manual_seed(1))[:510].sort().values
    return torch.cat([torch.tensor([0]), drawn, torch.tensor([scene.tokens - 1])]).to(scene.device)


def seen_by(kind: str, scene: Scene, rows: Tensor) -> Tensor:
    if kind == "all":
        return torch.ones(rows.shape[0], scene.tokens, dtype=torch.bool, device=scene.device)
    return {"seen": scene.seen, "earlier": scene.earlier, "shifted": scene.shifted}[kind](rows)


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """In float64, one query head at a time."""
    group = q.shape[1] // k.shape[1]

    def one(h):
        z = (q[:, h] @ k[:, h // group].mT * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        return z.softmax(-1) @ v[:, h // group]

    q, k, v = (x.double() for x in (q, k, v))
    return torch.stack([one(h) for h in range(q.shape[1])], 1)


def gradients_by_group(attend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of ``attend(q, k, v)`` to its inputs, of one group of heads after the other."""
    group, results = q.shape[1] // k.shape[1], []
    for g in range(k.shape[1]):
        heads = slice(g * group, (g + 1) * group)
        some = (q[:, heads], k[:, g : g + 1], v[:, g : g + 1])
        leaves = [x.detach().to(dtype).requires_grad_() for x in some]
        results.append(torch.autograd.grad(attend(*leaves), leaves, grad[:, heads].to(dtype)))
    return [torch.cat(parts, 1) for parts in zip(*results)]


def checks(scene: Scene, kinds: dict[str, str]):
    """``expect`` of a forward case: every provider against what it is to compute."""

    def expect(q, k, v, tiles=None):
        rows = rows_to_check(scene)

        @functools.cache
        def of(kind):
            mask = seen_by(kind, scene, rows)
            return close(exact(q[:, :, rows], k, v, mask), masked(q[:, :, rows], k, v, mask))

        def check(name, result):
            assert result.dtype == q.dtype, f"dtype {result.dtype}"
            kind = kinds[name]
            if kind == "tiles":
                kind, result = "seen", result[:, :, scene.slot_of_row]
            assert result.shape == q.shape, f"shape {tuple(result.shape)}"
            of(kind)(name, result[:, :, rows])

        return check

    return expect


def work(scene: Scene, heads: int, size: int, products: int):
    """Floating-point operations of this many matrix products over the needed pairs."""
    return lambda *inputs: 2.0 * products * scene.needed * heads * size


# ---- cases


def tensors(scene: Scene, heads: int, groups: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as a model's projections leave them: views of [batch, tokens, heads, size]."""

    def one(count):
        return torch.randn(1, scene.tokens, count, size, device=scene.device).to(dtype).transpose(1, 2)

    return [one(heads), one(groups), one(groups)]


def title(name: str, heads: tuple[int, int, int]) -> str:
    query, key, size = heads
    return f"{name}, {query}/{key} heads, D={size}"


def forward(name, scene, heads, dtype, *, bars=None, mask=True, flex=None):
    present, absent = peers_of(scene, mask, flex)

    def inputs():
        q, k, v = tensors(scene, *heads, dtype)
        return q, k, v, scene.permute(q, k, v) if flex is None else None

    def on(kind, call):
        return (lambda q, k, v, tiles: call(*tiles)) if kind == "tiles" else (lambda q, k, v, tiles: call(q, k, v))

    providers = {OURS: lambda q, k, v, tiles: pyvtk.neighbor_attention(q, k, v, scene.plan)}
    return Case(
        "attention",
        title(f"{name}, radius {scene.radius}", heads),
        dtype,
        inputs,
        providers | {peer: on(*how) for peer, how in present.items()},
        checks(scene, {OURS: "seen"} | {peer: kind for peer, (kind, _) in present.items()}),
        limit=matmul_limit(work(scene, heads[0], heads[2], 2), dtype, scene.device),
        bars=bars or {},
        device=scene.device,
        absent=absent,
        optional=optional(present),
        dense=tuple(dense_peers(scene)),
        pairs=scene.pairs,
    )


def training(name, scene, heads, dtype, *, bars=None, mask=True, flex=None):
    """Forward and backward to q, k and v."""
    present, absent = peers_of(scene, mask, flex)
    absent |= {peer: "no gradients" for peer in present if peer == "natten" and scene.device == "cpu"}
    present = {peer: how for peer, how in present.items() if peer not in absent}
    kinds = {OURS: "seen"} | {peer: kind for peer, (kind, _) in present.items()}

    def inputs():
        q, k, v = tensors(scene, *heads, dtype)
        grad = torch.randn_like(q)
        tiles = scene.permute(q, k, v, grad) if flex is None else ()
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return *leaves, grad, tuple(x.detach().requires_grad_() for x in tiles[:3]) + tiles[3:]

    def gradients(call, kind="seen"):
        def run(q, k, v, grad, tiles):
            *leaves, grad = tiles if kind == "tiles" else (q, k, v, grad)
            return torch.autograd.grad(call(*leaves), leaves, grad)

        return run

    def expect(q, k, v, grad, tiles):
        @functools.cache
        def of(kind):
            mask = seen_by(kind, scene, torch.arange(scene.tokens, device=scene.device))
            oracle = gradients_by_group(functools.partial(exact, mask=mask), q, k, v, grad, torch.float64)
            return close(oracle, gradients_by_group(functools.partial(masked, mask=mask), q, k, v, grad, q.dtype))

        def check(name, result):
            kind = kinds[name]
            if kind == "tiles":
                kind, result = "seen", [x[:, :, scene.slot_of_row] for x in result]
            assert all(x.dtype == q.dtype for x in result), f"dtypes {[x.dtype for x in result]}"
            of(kind)(name, list(result))

        return check

    providers = {OURS: gradients(lambda q, k, v: pyvtk.neighbor_attention(q, k, v, scene.plan))}
    return Case(
        "attention",
        title(f"{name}, radius {scene.radius}, forward and backward", heads),
        dtype,
        inputs,
        providers | {peer: gradients(call, kind) for peer, (kind, call) in present.items()},
        expect,
        # two products forward, five backward
        limit=matmul_limit(work(scene, heads[0], heads[2], 7), dtype, scene.device),
        bars=bars or {},
        device=scene.device,
        absent=absent,
        optional=optional(present),
        dense=tuple(dense_peers(scene)),
        pairs=scene.pairs,
    )


def planning(name, scene, heads, dtype):
    """A plan is made once for all layers; here it is compared with a single layer's attention, and with flex's mask."""

    def expect(q, k, v):
        layer = checks(scene, {"one layer": "seen"})(q, k, v)

        def check(name, result):
            if name == "one layer":
                layer(name, result)
            elif name == OURS:
                slots = (in_rows(x, scene.tokens) for x in (result.query_slots, result.key_slots))
                assert torch.equal(visible(*slots, result.rule(), result.routes)[0], scene.mask), "another rule"
            else:
                size = result.BLOCK_SIZE[0]
                padding = -scene.tokens % size
                blocks = F.pad(scene.mask, (0, padding, 0, padding)).unflatten(1, (-1, size)).unflatten(0, (-1, size))
                assert torch.equal(result.to_dense()[0, 0].bool(), blocks.any(3).any(1)), "another mask"

        return check

    flex_mask = "flex mask" if scene.device == "cuda" else "flex mask, uncompiled"
    return Case(
        "attention",
        title(f"plan of {name}, radius {scene.radius}", heads),
        dtype,
        lambda: tuple(tensors(scene, *heads, dtype)),
        {
            OURS: lambda q, k, v: pyvtk.neighbor_plan(scene.layout, scene.radius),
            "one layer": lambda q, k, v: pyvtk.neighbor_attention(q, k, v, scene.plan),
            flex_mask: lambda q, k, v: scene.build(False),
        },
        expect,
        bars={"one layer": 1.0},
        device=scene.device,
    )


def laying_out(name, scene, batch):
    """A layout from the ids of a batch, and its plan. The peer is plain torch, of which the operators are made."""

    def ids():
        one = torch.where(scene.layout.image_id[0] >= 0, 900, torch.arange(scene.tokens))
        return one.expand(batch, -1).contiguous(), torch.tensor(scene.grids * batch)

    def ours(ids, grids):
        return pyvtk.neighbor_plan(pyvtk.TokenLayout.from_ids(ids, 900, grids), scene.radius).tensors()

    def plain(ids, grids):
        image_id, coords, extent, _ = layout.layout_from_ids(ids, [900], grids, [], 1, None, None)
        positions = torch.arange(scene.tokens, dtype=torch.int32).expand(ids.shape)
        block, radius = scene.plan.block, [scene.radius] * 3
        fields = image_id, coords, positions, None, None, extent, None
        (facts,), curve = attention_facts.attention_facts(*fields, attention_facts.ALL, True, [block[0], *radius], [])
        routes = torch.zeros((0, 0, 0), dtype=torch.int32)
        rule = [*block, *radius, 0, 0]
        return *attention_plan.attention_plan(facts, facts, curve, curve, None, routes, rule), routes

    def expect(ids, grids):
        def check(name, result):
            slots = (in_rows(x, scene.tokens) for x in result[:2])
            seen = visible(*slots, scene.plan.rule(), result[-1])
            assert torch.equal(seen, scene.mask.expand_as(seen)), "another rule"
            for actual, expected in zip(result[2:4], scene.plan.tensors()[2:4]):
                assert torch.equal(actual, expected.expand_as(actual)), "other blocks"

        return check

    return Case(
        "attention",
        f"layout from ids and plan of {name}, batch {batch}, radius {scene.radius}",
        torch.int64,
        ids,
        {OURS: ours, "plain torch": plain},
        expect,
        bars={"plain torch": 1.0},
    )


def dropping(name, scene, heads, dtype):
    """After half of the tokens have been dropped at random, neighbours are fewer, and so is the work."""
    half = Scene(scene.parts, scene.radius, scene.device, 0.5)
    of_half = checks(half, {OURS: "seen", "SDPA mask": "seen"})
    of_all = checks(scene, {"all tokens": "seen"})

    def expect(q, k, v, some):
        kept, everything = of_half(*some), of_all(q, k, v)
        return lambda name, result: (everything if name == "all tokens" else kept)(name, result)

    return Case(
        "attention",
        title(f"half of {name}, radius {scene.radius}", heads),
        dtype,
        lambda: (*tensors(scene, *heads, dtype), tuple(tensors(half, *heads, dtype))),
        {
            OURS: lambda q, k, v, some: pyvtk.neighbor_attention(*some, half.plan),
            "all tokens": lambda q, k, v, some: pyvtk.neighbor_attention(q, k, v, scene.plan),
            "SDPA mask": lambda q, k, v, some: masked(*some, half.mask),
        },
        expect,
        limit=matmul_limit(work(half, heads[0], heads[2], 2), dtype, scene.device),
        bars={"all tokens": 1.0},
        device=scene.device,
    )


def decoding(name, keys, heads, dtype, beside):
    """One more row of text behind an image; keys and values lie head by head as in a cache, or, beside, as projections
    leave them. SDPA computes the same."""
    query, key, size = heads
    layout = pyvtk.TokenLayout.from_images([keys - 1], [pyvtk.ImageSpan(0, 35, (1, 24, 24))])
    plan = pyvtk.neighbor_plan(layout, 2)

    def inputs():
        q, k, v = (torch.randn(1, rows, count, size).to(dtype).transpose(1, 2)
                   for rows, count in ((1, query), (keys, key), (keys, key)))  # fmt: skip
        return (q, k, v) if beside else (q, k.contiguous(), v.contiguous())

    def sdpa(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=query != key)

    def expect(q, k, v):
        return close(sdpa(*(x.double() for x in (q, k, v))), sdpa(q, k, v))

    return Case(
        "attention",
        title(f"{name}, decode step, N={keys}{', heads side by side' if beside else ''}", heads),
        dtype,
        inputs,
        {
            OURS: lambda q, k, v: pyvtk.neighbor_attention(q, k, v, plan),
            "text_attention": lambda q, k, v: pyvtk.text_attention(q, k, v),
            "SDPA": sdpa,
        },
        expect,
        bars={"SDPA": 0.77},  # 1.3 times as long at most
    )


# ---- shapes


LLAVA = (35, (1, 24, 24), 64)
QWEN_4K = (64, (1, 36, 36), 100, (1, 28, 40), 60, (4, 18, 18), 160)
QWEN_16K = (128, (1, 64, 64), 200, (1, 48, 72), 200, (16, 16, 20), 280, (1, 36, 64), 600)


def grid(h: int, w: int, t: int = 1) -> tuple:
    return ((t, h, w),)


def on_cpu() -> list[Case]:
    """One thread: fewer heads where dense peers would take seconds."""
    fp32, bf16 = BOTH
    no_flex = {"flex": "compiled on the CPU only for the cases with bars"}
    no_backward = {"flex": "no backward on the CPU"}
    tower, half_tower, llava = (8, 8, 64), (2, 2, 64), (32, 32, 128)
    found = []
    for dtype in BOTH:
        found += [
            forward("CLIP 24x24", Scene(grid(24, 24), 3), tower, dtype, bars={BEST: 4.0}),
            marked(forward("48x48", Scene(grid(48, 48), 4), tower, dtype, bars={BEST: 5.0, SHARE: 0.25}), spared=FLEX),
            forward("LLaVA-1.5 mixed, N=675", Scene(LLAVA, 2), llava, dtype,
                    bars={"SDPA causal": 2.5 if dtype == fp32 else 4.0}),
        ]  # fmt: skip
    for radius in (1, 2, 7, 12, 23):
        found.append(forward("CLIP 24x24", Scene(grid(24, 24), radius), tower, fp32, **no_flex))
    for radius in (1, 3):
        found.append(forward("SigLIP 27x27", Scene(grid(27, 27), radius), (8, 8, 72), fp32, **no_flex))
    for radius in (1, 2, 7):
        found.append(forward("48x48", Scene(grid(48, 48), radius), half_tower, fp32, **no_flex))
    for radius in (2, 7):
        found.append(forward("64x64", Scene(grid(64, 64), radius), half_tower, fp32, **no_flex))
    found.append(forward("128x128", Scene(grid(128, 128), 7), (1, 1, 64), fp32, mask=False, **no_flex))
    for radius in (1, 3):
        found.append(forward("video 32x14x14", Scene(grid(14, 14, 32), radius), (1, 1, 64), fp32, **no_flex))
    for radius in (1, 3, 7):
        found.append(forward("LLaVA-1.5 mixed, N=675", Scene(LLAVA, radius), llava, fp32, **no_flex))
    found += [
        forward("Qwen2-VL mixed, N=4096", Scene(QWEN_4K, 3), (7, 1, 128), fp32, **no_flex),
        forward("Qwen2-VL mixed, N=4096", Scene(QWEN_4K, 3), (7, 1, 128), bf16, **no_flex),
        forward("Qwen2-VL mixed, N=16384", Scene(QWEN_16K, 3), (1, 1, 128), fp32, mask=False, **no_flex),
        training("CLIP 24x24", Scene(grid(24, 24), 3), tower, fp32, **no_backward),
        training("48x48", Scene(grid(48, 48), 4), tower, fp32, bars={"SDPA": 7.0}, mask=False, **no_backward),
        training("LLaVA-1.5 mixed, N=675", Scene(LLAVA, 2), (8, 8, 128), fp32, **no_backward),
        planning("48x48", Scene(grid(48, 48), 4), tower, fp32),
        planning("LLaVA-1.5 mixed, N=675", Scene(LLAVA, 2), llava, fp32),
        laying_out("LLaVA-1.5 mixed, N=675", Scene(LLAVA, 2), 4),
        dropping("48x48", Scene(grid(48, 48), 4), tower, fp32),
        dropping("LLaVA-1.5 mixed, N=675", Scene(LLAVA, 2), llava, fp32),
    ]
    for beside in (False, True):
        for heads, keys in (
            ((16, 16, 64), 641),
            ((16, 16, 64), 2945),
            (llava, 641),
            (llava, 2945),
            ((28, 4, 128), 4096),
        ):
            found += [decoding("text", keys, heads, dtype, beside) for dtype in BOTH]
    return found


def on_cuda() -> list[Case]:
    """Whole layers in bfloat16. FlexAttention compiles for a minute per shape: ``--filter`` chooses, and ``--key`` runs
    two of its variants."""
    tower, siglip, llava, qwen = (16, 16, 128), (16, 16, 72), (32, 32, 128), (28, 4, 128)
    over_flex = {"flex": 1.3, "flex tiles": 1.0}
    fast, slow, last = (1, FLEX), (3, BUILT), (4, BUILT)
    # name, parts, heads, the radius with bars, which all peers run, those bars, the place in the run of --key
    shapes = [
        ("24x24", grid(24, 24), tower, 3, {}, None),
        ("SigLIP so400m 27x27", grid(27, 27), siglip, 3, {DENSE: 1.0}, fast),
        ("48x48", grid(48, 48), tower, 4, over_flex | {DENSE: 1.0}, slow),
        ("64x64", grid(64, 64), tower, 7, over_flex, None),
        ("128x128", grid(128, 128), tower, 7, over_flex | {DENSE: 10.0, TILE: 0.35}, last),
        ("video 32x14x14", grid(14, 14, 32), tower, 3, {}, None),
        ("LLaVA-1.5 mixed, N=675", LLAVA, llava, 2, {"SDPA causal": 1.0, "flex": 1.3}, slow),
        ("Qwen2-VL mixed, N=4096", QWEN_4K, qwen, 3, {"flex": 1.3}, last),
        ("Qwen2-VL mixed, N=16384", QWEN_16K, qwen, 3, {"flex": 1.3}, None),
    ]
    no_flex = {"flex": "compiled for one radius of every shape"}
    found = []
    for name, parts, heads, radius, bars, place in shapes:
        scene = Scene(parts, radius, "cuda")
        case = forward(name, scene, heads, torch.bfloat16, bars=bars)
        found.append(marked(case, *place) if place else case)
        of_flex = {peer: bar for peer, bar in bars.items() if peer in over_flex}
        case = training(name, scene, heads, torch.bfloat16, bars=of_flex)
        found.append(marked(case, 2, FLEX) if name == "48x48" else case)
        found.append(planning(name, scene, heads, torch.bfloat16))
        found.append(dropping(name, scene, heads, torch.bfloat16))
        # where dense attention wins is of interest too
        for other in sorted({1, 2, 3, 7, *((12, 23) if name == "24x24" else ())} - {radius}):
            found.append(forward(name, Scene(parts, other, "cuda"), heads, torch.bfloat16, **no_flex))
    return found


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else on_cpu()
