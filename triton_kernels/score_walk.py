"""What the Triton kernels of attention_scores share, forward and backward: samples, walks, tiles. Meaning: score.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles
from ._tiles import FIRST, LAST, LOG2_E, load_rows, parts, precision, products, strides

# of which Triton compiles no variants (_tiles.py)
NUMBERS = (
    "q_batch", "q_head", "q_row", "k_batch", "k_head", "k_row", "grad_batch", "grad_head", "grad_row", "weights_batch",
    "batch", "queries", "keys", "heads", "start", "window", "score_start", "columns", "total", "runs", "kv_heads",
    "pair_heads", "slots", "out_heads", "heads_per_out", "rows_in_all",
)  # fmt: skip

# Parts of kernels ----------------------------------------------------------------------------------------------------


@triton.jit
def work_of(program, table, batch):
    """The sample that a program takes, and the number of its tile there; sample -1: there is none."""
    if table is None:
        return program % batch, program // batch
    else:
        return tl.load(table + 2 * program), tl.load(table + 2 * program + 1)


@triton.jit
def sample_at(sample, cu_q, cu_k, queries, keys):
    """A sample's entry in batched tensors, its first query, its queries, its first key, its keys.

    A packed sample is a part of entry 0; offsets that do not ascend never lead out of the tensors.
    """
    if cu_q is None:
        zero = tl.zeros([], tl.int32)  # sizes may be constants here
        return sample.to(tl.int64), zero, zero + queries, zero, zero + keys
    else:
        first_q = tl.minimum(tl.maximum(tl.load(cu_q + sample), 0), queries)
        first_k = tl.minimum(tl.maximum(tl.load(cu_k + sample), 0), keys)
        last_q = tl.minimum(tl.maximum(tl.load(cu_q + sample + 1), first_q), queries)
        last_k = tl.minimum(tl.maximum(tl.load(cu_k + sample + 1), first_k), keys)
        return tl.zeros([], tl.int64), first_q, last_q - first_q, first_k, last_k - first_k


@triton.jit
def positions_at(positions, place, number, here, extra):
    """Where tokens stand in the sequence: as given, else ``number + extra``."""
    if positions is None:
        return number + extra
    else:
        return tl.load(positions + place + number, mask=here, other=0)


@triton.jit
def extent_base(extent_first, sample, tiles):
    """Where the extents of a sample's tiles begin."""
    if extent_first is None:
        return sample * tiles
    else:
        return tl.load(extent_first + sample)


@triton.jit
def key_tile(tile, k_mask, k_positions, key_place, start, window, KEYS: tl.constexpr):
    """Keys of a tile, counted from ``start`` and from 0; those that exist, those visible; their positions."""
    column = tile * KEYS + tl.arange(0, KEYS)
    key = start + column
    exists = column < window
    visible = exists
    if k_mask is not None:
        visible = visible & (tl.load(k_mask + key_place + key, mask=exists, other=0) != 0)
    return column, key, exists, visible, positions_at(k_positions, key_place, key, exists, 0)


@triton.jit
def row_tile(tile, q_mask, q_positions, row_place, rows, extra, ROWS: tl.constexpr):
    """Queries of a tile, those that exist, that are valid, and their positions."""
    row = tile * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    valid = exists
    if q_mask is not None:
        valid = valid & (tl.load(q_mask + row_place + row, mask=valid, other=0) != 0)
    return row, exists, valid, positions_at(q_positions, row_place, row, valid, extra)


@triton.jit
def queries_of(
    tile, visible, key_at, start, window, rows, extra, queries, extents, extent_first, sample, total,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of queries that may see some of a tile's keys: from ``begin``; from ``full`` on, all see all; the end."""
    end = tl.cdiv(rows, ROWS)
    begin, full = end * 0, end * 0
    if CAUSAL:
        if POSITIONS:
            base = extent_base(extent_first, sample, tl.cdiv(queries, ROWS))
            key_low = tl.min(tl.where(visible, key_at, LAST))
            key_high = tl.max(tl.where(visible, key_at, FIRST))
            begin = end
            for some in range(0, end, 128):
                number = some + tl.arange(0, 128)
                inside = (number < end) & (base + number < total)
                low = tl.load(extents + base + number, mask=inside, other=LAST)
                high = tl.load(extents + total + base + number, mask=inside, other=FIRST)
                begin = tl.minimum(begin, tl.min(tl.where(inside & (high >= key_low), number, end)))
                full = tl.maximum(full, tl.max(tl.where(inside & (low < key_high), number + 1, 0)))
        else:
            last = start + tl.minimum(tile * KEYS + KEYS, window) - 1
            begin = tl.minimum(tl.maximum(start + tile * KEYS - extra, 0) // ROWS, end)
            full = tl.minimum(tl.cdiv(tl.maximum(last - extra, 0), ROWS), end)
    return begin, tl.maximum(begin, full), end


@triton.jit
def keys_of(
    tile, valid, row_at, rows, start, window, extra, extents, extent_first, sample, total,
    CAUSAL: tl.constexpr, POSITIONS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles of keys, from key ``start`` on, that some of a tile's queries may see: before ``full`` all; the end."""
    end = tl.cdiv(window, KEYS)
    full = window // KEYS
    if CAUSAL:
        if POSITIONS:
            base = extent_base(extent_first, sample, end)
            low = tl.min(tl.where(valid, row_at, LAST))
            high = tl.max(tl.where(valid, row_at, FIRST))
            tiles, end = end, end * 0
            for some in range(0, tiles, 128):
                number = some + tl.arange(0, 128)
                inside = (number < tiles) & (base + number < total)
                key_low = tl.load(extents + base + number, mask=inside, other=LAST)
                key_high = tl.load(extents + total + base + number, mask=inside, other=FIRST)
                full = tl.minimum(full, tl.min(tl.where(inside & (key_high > low), number, tiles)))
                end = tl.maximum(end, tl.max(tl.where(inside & (key_low <= high), number + 1, 0)))
        else:
            last = tl.minimum(tile * ROWS + ROWS, rows) - 1
            full = tl.minimum(full, tl.maximum(tile * ROWS + extra + 1 - start, 0) // KEYS)
            end = tl.minimum(end, tl.cdiv(tl.maximum(last + extra + 1 - start, 0), KEYS))
    return tl.minimum(full, end), end


@triton.jit
def to_ordered(value):
    """int32 in the order of floats: equal zeros, NaN largest; the least int32 stays free for "none"."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC00000, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def from_ordered(ordered):
    """The float that :func:`to_ordered` was given."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def padded(rows):
    """Length of a line of bounds: +inf where there is no row, so that whole vectors may be asked for."""
    return tl.cdiv(rows, 16) * 16


@triton.jit
def pair_values(
    q, k, bounds, k_bias, head_weights, entry, head, number, key, here, visible, first_q, first_k, queries, keys,
    q_heads, q_batch, q_head, q_row, k_batch, k_head, k_row, weights_batch, scale,
    GROUP: tl.constexpr, LOGIT: tl.constexpr, NATURAL: tl.constexpr, D: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One head's values [keys, rows], its weight included. Keys and rows are given by number.

    NATURAL: ``scale`` and bounds are not in base 2.
    """
    live = here
    if not LOGIT:
        place = (entry * q_heads + head) * padded(queries) + first_q + number
        bound = tl.load(bounds + place, mask=here, other=float("inf"))
        live = live & (bound != float("inf"))
    q += entry * q_batch + head.to(tl.int64) * q_head + first_q.to(tl.int64) * q_row
    k += entry * k_batch + (head // GROUP).to(tl.int64) * k_head + first_k.to(tl.int64) * k_row
    q1, q2 = load_rows(q, number.to(tl.int64) * q_row, live, D, D1, D2)
    k1, k2 = load_rows(k, key.to(tl.int64) * k_row, visible, D, D1, D2)
    value = products(k1, k2, q1, q2, D2, PRECISION) * scale
    if k_bias is not None:
        bias = tl.load(k_bias + entry * keys + first_k + key, mask=visible, other=0.0)
        if not LOGIT and not NATURAL:
            bias *= LOG2_E
        value += bias[:, None]
    if not LOGIT:
        value -= bound[None, :]
        value = tl.where(live[None, :], tl.exp2(value * LOG2_E if NATURAL else value), 0.0)
    if head_weights is not None:
        value *= tl.load(head_weights + entry * weights_batch + head)
    return value


@triton.jit(do_not_specialize=NUMBERS)
def attention_scores_extents_kernel(
    positions, mask, table, cu_q, cu_k, extents,  # [batch, tokens] or None twice, ..., [2, tiles]
    batch, queries, keys, start, window, total, OF_QUERIES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Smallest and largest position of each tile's tokens, those that do not exist left out."""
    program = tl.program_id(0)
    sample, tile = work_of(program, table, batch)
    if sample < 0:
        return
    entry, first_q, rows, first_k, count = sample_at(sample, cu_q, cu_k, queries, keys)
    number = tile * TILE + tl.arange(0, TILE)
    if OF_QUERIES:
        here = number < rows
        place = entry * queries + first_q
        at = positions_at(positions, place, number, here, count - rows)
    else:
        here = number < (window if table is None else count)
        number += start
        place = entry * keys + first_k
        at = positions_at(positions, place, number, here, 0)
    if mask is not None:
        here = here & (tl.load(mask + place + number, mask=here, other=0) != 0)
    to = program if table is not None else sample * (total // batch) + tile
    tl.store(extents + to, tl.min(tl.where(here, at, LAST)))
    tl.store(extents + total + to, tl.max(tl.where(here, at, FIRST)))


# Launchers -----------------------------------------------------------------------------------------------------------

# programs that are enough for any device; the cut into runs depends on sizes alone
_ENOUGH = 256


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, tokens: int, lean: bool, capability: tuple[int, int]) -> dict:
    """Tile of a program, found by compiling (.ci/check_triton.py): as large as registers allow without spilling.

    Args:
        kernel: "lse", "scores", "pairs", "query_grad" or "key_grad".
        tokens: queries; few of them need no tall tile.
        lean: nothing but a causal mask; maxima, masks, positions take registers.
        capability: of the device.

    Returns:
        ROWS queries and KEYS keys make a tile; D1 and D2 are the parts of the head dimension.
    """
    single, wide = dtype == torch.float32, head_dim > 128
    # devices whose products read shared memory by themselves; the others keep what stays in registers
    large = capability[0] in (9, 10)
    # devices with 99 KiB of shared memory hold two programs where a stage less is copied ahead
    stages = 2 if capability in ((8, 6), (8, 9)) or capability[0] == 12 else 3
    warps = 4
    if single:
        rows, keys, stages = (32, 32, 2) if not wide else (16, 32, 2)
        warps = 4 if head_dim <= 64 else 8
        if kernel in ("scores", "query_grad") and head_dim % 64:
            rows = 16  # the second part is padded to the first
    elif kernel in ("lse", "scores"):
        # a warp owns 32 of the tokens that stay: each of those it reads from shared memory serves two products
        tall = kernel == "scores" and head_dim in (64, 128) and (large or capability == (8, 0))
        tall = lean and (tall or capability[0] == 9 or (large and kernel == "lse"))
        stay, pass_by = (128, 64 if tall else 32) if not wide else (64, 32)
        if kernel == "scores" and stages == 2 and not wide and (not lean or head_dim % 64):
            pass_by = 16  # with more, ptxas spills a little for the sake of another block
        rows, keys = (stay, pass_by) if kernel == "lse" else (pass_by, stay)
        if kernel == "lse" and large and not wide:
            warps = 8
    elif kernel == "query_grad":
        rows, keys = (64, 32 if lean else 16) if not wide else (32, 32)
        stages = 2
    else:
        rows, keys = (32 if lean else 16, 64 if lean or capability[0] == 9 else 32) if not wide else (32, 32)
        stages = 2
    if wide and not single:
        stages = 2
        warps = 4 if kernel in ("lse", "scores") else 8
    rows = min(rows, max(16, triton.next_power_of_2(max(tokens, 1))))
    first, second = parts(head_dim, 256 if large and not single else 64)
    if single and second:
        second = first
    return {"ROWS": rows, "KEYS": keys, "D1": first, "D2": second, "num_warps": warps, "num_stages": stages}


class Walk:
    """What the launches of one call share: tensors as [batch, heads, tokens, dim], packed ones as a batch of 1."""

    def __init__(self, q, k, q_positions, k_positions, q_mask, k_mask, k_bias, cu_q, cu_k, causal, key_start, key_stop):
        self.packed = cu_q is not None
        if self.packed:
            q, k = q.transpose(0, 1)[None], k.transpose(0, 1)[None]
            key_start, key_stop = 0, k.shape[2]
        self.q, self.k, self.causal = q, k, bool(causal)
        self.start, self.columns = key_start, key_stop - key_start
        self.batch, self.q_heads, self.queries, self.head_dim = q.shape
        self.kv_heads, self.keys = k.shape[1], k.shape[2]
        self.group = self.q_heads // self.kv_heads
        self.samples = cu_q.shape[0] - 1 if self.packed else self.batch
        self.cu_q, self.cu_k = cu_q, cu_k
        self.q_mask, self.k_mask = (None if x is None else x.view(torch.uint8) for x in (q_mask, k_mask))
        self.q_positions, self.k_positions, self.k_bias = q_positions, k_positions, k_bias
        self.capability = _tiles.capability(q)

    def new(self, *shape, dtype=torch.float32) -> Tensor:
        """Memory for an output; of packed samples zeros, for what bad offsets leave out."""
        make = self.q.new_zeros if self.packed else self.q.new_empty
        return make(shape, dtype=dtype)

    def tiles(self, kernel: str, maxima: bool = False) -> dict:
        options = (self.q_positions, self.k_positions, self.q_mask, self.k_mask)
        lean = not maxima and all(x is None for x in options)
        return {
            **tiles(kernel, self.head_dim, self.q.dtype, self.queries, lean, self.capability),
            "D": self.head_dim, "GROUP": self.group, "PRECISION": precision(self.capability),
        }  # fmt: skip

    def table(self, of_queries: bool, window: int, tile: int) -> tuple[Tensor | None, Tensor | None, int]:
        """Tiles of queries or keys: the table of packed samples, where each sample's tiles begin, and their number."""
        if not self.packed:
            return None, None, self.batch * triton.cdiv(window, tile)
        cu, length = (self.cu_q, self.queries) if of_queries else (self.cu_k, self.keys)
        ends = ((cu.clamp(0, length).diff().clamp(min=0) + tile - 1) // tile).cumsum(0)
        first = torch.nn.functional.pad(ends, (1, 0))
        total = length // tile + self.samples
        number = torch.arange(total, device=cu.device)
        sample = torch.searchsorted(ends, number, right=True)
        within = number - first[sample]
        table = torch.stack((torch.where(sample < self.samples, sample, -1), within), 1).to(torch.int32)
        return table, first[:-1].to(torch.int32), total

    def extents(self, of_queries: bool, start: int, window: int, tile: int) -> dict:
        """Where tiles of the other side stand, if positions are given: arguments of the kernels that walk it."""
        if not self.causal or (self.q_positions is None and self.k_positions is None):
            return {"extents": None, "extent_first": None, "total": 0}
        table, first, total = self.table(of_queries, window, tile)
        extents = self.q.new_empty((2, max(total, 1)), dtype=torch.int32)
        arguments = {
            "positions": self.q_positions if of_queries else self.k_positions,
            "mask": self.q_mask if of_queries else self.k_mask, "table": table, "cu_q": self.cu_q, "cu_k": self.cu_k,
            "extents": extents, "batch": self.batch, "queries": self.queries, "keys": self.keys, "start": start,
            "window": window, "total": total, "OF_QUERIES": of_queries, "TILE": tile, "num_warps": 4,
        }  # fmt: skip
        _tiles.launch(attention_scores_extents_kernel, total, arguments)
        return {"extents": extents, "extent_first": first, "total": total}

    def common(self, **others: Tensor) -> dict:
        """Arguments of every walk, and the strides of ``others``."""
        return {
            "q": self.q, "k": self.k, "q_mask": self.q_mask, "k_mask": self.k_mask, "q_positions": self.q_positions,
            "k_positions": self.k_positions, "k_bias": self.k_bias, "cu_q": self.cu_q, "cu_k": self.cu_k,
            **strides(q=self.q, k=self.k, **others), "batch": self.batch, "queries": self.queries,
            "keys": self.keys, "CAUSAL": self.causal,
        }  # fmt: skip


def runs_of(programs: int, steps: int) -> int:
    """Into how many runs a walk of ``steps`` tiles is cut, so that there are enough programs."""
    runs = 1
    while programs * runs < _ENOUGH and runs * 4 <= steps:
        runs *= 2
    return runs
