"""``select``: which tokens of each sample stay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyvtk import _numbers, backends, checks, transforms
from pyvtk.reference import select as reference
from pyvtk.selection import Selection, assemble


def _fake(
    scores, num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments, num_segments,
    cu_seqlens, capacity, align_right, by_score,
):  # fmt: skip
    rows = scores.shape[:-1] if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    return (
        scores.new_empty((*rows, capacity), dtype=torch.int64),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.bool),
    )


# Rows are the outermost axis of all of these.
PER_ROW = dict.fromkeys(
    ("num_keep_per_row", "threshold", "top_p", "keep", "drop", "candidates", "segments"), 0
)  # fmt: skip
# Arguments as in pyvtk/reference/select.py; masks, segments (int32), cu_seqlens (int32) and values per row contiguous;
# threshold float32, top_p float64.
backends.define(
    "select",
    "(Tensor scores, SymInt num_keep, Tensor? num_keep_per_row, Tensor? threshold, Tensor? top_p, Tensor? keep, "
    "Tensor? drop, Tensor? candidates, bool keep_others, Tensor? segments, SymInt num_segments, Tensor? cu_seqlens, "
    "SymInt capacity, bool align_right, bool by_score) -> (Tensor indices, Tensor counts, Tensor overflow)",
    fake=_fake,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold({"scores": 0} | PER_ROW, (0, 0, 0), lambda given, mapped: given["cu_seqlens"] is not None),
    lean=True,
)
_operator = torch.ops.pyvtk.select.default


def _fake_top(scores, num_keep):
    rows = scores.shape[:-1]
    return (
        scores.new_empty((*rows, num_keep), dtype=torch.int64),
        scores.new_empty(rows, dtype=torch.int32),
        scores.new_empty(rows, dtype=torch.bool),
    )


# The best num_keep (0..tokens) of each row, ascending: select without its other arguments, since handing over fifteen
# takes two to three times as long as choosing from a row of 576 tokens. torch.compile has no use for it.
backends.define(
    "select_top",
    "(Tensor scores, SymInt num_keep) -> (Tensor indices, Tensor counts, Tensor overflow)",
    fake=_fake_top,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold({"scores": 0}, (0, 0, 0)),
    lean=True,
)
_top = torch.ops.pyvtk.select_top.default


class Scores(NamedTuple):
    """What the checks need to know of scores that may not exist yet."""

    shape: tuple
    dtype: torch.dtype
    device: torch.device


def _mask(op: str, name: str, value, scores: Scores, dtypes: tuple[torch.dtype, ...] = (torch.bool,)) -> Tensor:
    """``value``, contiguous, after checking that it holds one entry per token."""
    checks.tensor(op, name, value)
    checks.dtype(op, name, value, dtypes)
    shape = scores.shape
    if value.shape != shape and not (len(shape) == 3 and value.shape == (shape[0], shape[2])):
        allowed = f"{list(shape)} (the shape of scores)"
        if len(shape) == 3:
            allowed = f"[batch, tokens] = {[shape[0], shape[2]]} or {allowed}"
        raise ValueError(f"{op}: {name} must be {allowed}, got shape {tuple(value.shape)}")
    checks.same_device(op, name, value, scores, "scores")
    return value.contiguous()


def _per_row(op: str, name: str, value: Tensor, num_segments, scores: Scores, cu_seqlens: Tensor | None) -> Tensor:
    """``value`` as [rows, 1 or num_segments], from one for all, per sample, per row, and those per segment."""
    checks.same_device(op, name, value, scores, "scores")
    rows = tuple(scores.shape[:-1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    shapes = {"[]": (), "[batch]": rows[:1]}
    if len(rows) == 2 and num_segments is None:
        shapes["[batch, heads]"] = rows
    if num_segments is not None:
        shapes["[batch, segments]"] = (rows[0], num_segments)
        if len(rows) == 2:
            shapes["[batch, heads, segments]"] = (*rows, num_segments)
    shape = tuple(value.shape)
    if not any(shape == allowed for allowed in shapes.values()):
        allowed = " or ".join(f"{meaning} = {list(sizes)}" for meaning, sizes in shapes.items())
        raise ValueError(f"{op}: {name} must be {allowed}, got shape {shape}")
    per_row = 1 if num_segments is None or len(shape) < 2 else num_segments
    if len(shape) - (num_segments is not None and len(shape) > 1) < 2:  # the same for all heads
        value = value.expand(rows[0]) if len(shape) == 0 else value
        heads = rows[1] if len(rows) == 2 else 1
        value = value.reshape(rows[0], 1, per_row).expand(rows[0], heads, per_row)
    return value.reshape(rows[0] * (rows[1] if len(rows) == 2 else 1), per_row).contiguous()


def _number(op: str, name: str, value, scores: Scores) -> Tensor:
    """A Python number as a tensor; a tensor after a check of its dtype."""
    if isinstance(value, Tensor):
        checks.tensor(op, name, value)
        checks.dtype(op, name, value, checks.FLOATS)
        return value.detach()
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(value).__name__}")
    if value != value:
        raise ValueError(f"{op}: {name} must be a number, got nan")
    return _numbers.full((), value, dtype=torch.float64, device=scores.device)


def resolve(
    op: str, scores: Scores, num_keep, *, threshold, top_p, keep, drop, candidates, others, segments, num_segments,
    cu_seqlens, capacity, align, order,
) -> tuple[tuple, bool]:  # fmt: skip
    """Check the selecting arguments of ``op``.

    Returns:
        The operator's arguments after scores, and whether the result is to be trimmed.
    """
    if num_keep is None and threshold is None and top_p is None:
        raise ValueError(f"{op}: num_keep, threshold or top_p must be given, got none of them")
    if others != "drop":
        checks.choice(op, "others", others, ("drop", "keep"))
    if align != "left":
        checks.choice(op, "align", align, ("left", "right"))
    if order != "index":
        checks.choice(op, "order", order, ("index", "score"))
    tokens = scores.shape[-1]
    if cu_seqlens is not None:
        checks.tensor(op, "cu_seqlens", cu_seqlens, 1)
        checks.dtype(op, "cu_seqlens", cu_seqlens, checks.INTEGERS)
        checks.same_device(op, "cu_seqlens", cu_seqlens, scores, "scores")
        if cu_seqlens.shape[0] < 1:
            raise ValueError(f"{op}: cu_seqlens must hold at least one entry, got shape (0,)")
        cu_seqlens = checks.to_int32(cu_seqlens).contiguous()
    if keep is not None:
        keep = _mask(op, "keep", keep, scores)
    if drop is not None:
        drop = _mask(op, "drop", drop, scores)
    if candidates is not None:
        candidates = _mask(op, "candidates", candidates, scores)

    per_row = None
    if isinstance(num_keep, Tensor):
        checks.tensor(op, "num_keep", num_keep)
        checks.dtype(op, "num_keep", num_keep, checks.INTEGERS)
    elif num_keep is not None:
        checks.integer(op, "num_keep", num_keep)
    if segments is not None:
        segments = _mask(op, "segments", segments, scores, checks.INTEGERS)
        if num_segments is None and isinstance(num_keep, Tensor) and num_keep.dim() > 1:
            num_segments = num_keep.shape[-1]
        if num_segments is None:
            raise ValueError(f"{op}: num_segments must be given with segments, unless num_keep is [batch, segments]")
        checks.integer(op, "num_segments", num_segments, 1)
        if num_segments >= 2**31:  # ids are int32 in kernels
            raise ValueError(f"{op}: num_segments must be below 2**31, got {num_segments}")
        if segments.dtype != torch.int32:
            # Clamped first: an id beyond int32 must not wrap around to a valid one.
            segments = segments.clamp(-1, num_segments).to(torch.int32)
    elif num_segments is not None:
        raise ValueError(f"{op}: num_segments must be None without segments, got {num_segments}")
    groups = 1 if num_segments is None else num_segments
    if isinstance(num_keep, Tensor):
        # Kernels take forced tokens off it: from int64's least that would wrap around to "all of them".
        per_row = _per_row(op, "num_keep", num_keep.long(), num_segments, scores, cu_seqlens)
    if threshold is not None:
        threshold = _number(op, "threshold", threshold, scores).to(scores.dtype)
        threshold = threshold if scores.dtype == torch.float64 else threshold.float()
        threshold = _per_row(op, "threshold", threshold, num_segments, scores, cu_seqlens)
    if top_p is not None:
        if not isinstance(top_p, Tensor) and isinstance(top_p, (int, float)) and not 0 <= top_p <= 1:
            raise ValueError(f"{op}: top_p must be in 0..1, got {top_p}")
        top_p = _per_row(op, "top_p", _number(op, "top_p", top_p, scores).double(), num_segments, scores, cu_seqlens)

    limit = -1 if num_keep is None or per_row is not None else num_keep
    exact = False
    if capacity is None:
        capacity = tokens
        if per_row is None and num_keep is not None and keep is None and others == "drop":
            # torch.compile makes min() of symbolic sizes sym_min, without a guard on the outcome; torch 2.11 refuses
            # sym_min of plain ints
            capacity = min(limit * groups, tokens)
    elif capacity == "exact":
        exact, capacity = True, tokens
    else:
        checks.integer(op, "capacity", capacity)

    arguments = (
        limit, per_row, threshold, top_p, keep, drop, candidates, others == "keep", segments, groups, cu_seqlens,
        capacity, align == "right", order == "score",
    )  # fmt: skip
    return arguments, exact


def select(
    scores: Tensor,
    num_keep: int | Tensor | None = None,
    *,
    threshold: float | Tensor | None = None,
    top_p: float | Tensor | None = None,
    keep: Tensor | None = None,
    drop: Tensor | None = None,
    candidates: Tensor | None = None,
    others: str = "drop",
    segments: Tensor | None = None,
    num_segments: int | None = None,
    cu_seqlens: Tensor | None = None,
    capacity: int | str | None = None,
    align: str = "left",
    order: str = "index",
    backend: str | None = None,
) -> Selection:
    """Choose the tokens of each sample that stay. Exact meaning, ties included: :mod:`pyvtk.reference.select`.

    ``num_keep``, ``threshold`` and ``top_p`` are criteria, of which at least one is needed; a token has to meet all
    that are given. Forced tokens, and others with ``others="keep"``, stay in addition. Nothing synchronises with the
    host, except ``capacity="exact"``.

    Args:
        scores: float [batch, tokens] or [batch, heads, tokens], packed [tokens] with ``cu_seqlens``. Higher is better,
            NaN worst. Detached: a selection has no gradient.
        num_keep: tokens to keep of each row, or of each segment. An int, or an int tensor [batch], [batch, heads], or
            [batch, segments]; negative entries count as 0. Rounding a share of the tokens to an int is the caller's.
        threshold: keep scores >= this. A number, or a float tensor shaped like num_keep; rounded to scores' dtype.
        top_p: keep the fewest best tokens that hold this share (0 to 1) of the candidates' total, at least one. A
            number, or a float tensor shaped like num_keep.
        keep: bool [batch, tokens] or the shape of scores: stays in any case and uses up num_keep.
        drop: bool, likewise: never stays, even if kept by ``keep``.
        candidates: bool, likewise: the tokens that compete; None: all.
        others: what happens to tokens that are not candidates: "drop", or "keep" on top of num_keep.
        segments: int [batch, tokens] or the shape of scores: criteria apply to each segment on its own. Ids outside of
            0..num_segments - 1 are not candidates.
        num_segments: how many segments there are; only needed if the shape of num_keep does not tell.
        cu_seqlens: int [batch + 1], where each sample begins on the packed axis. Indices of the result count from the
            start of the packed axis.
        capacity: slots per row of the result. "exact": those of the longest row (one host synchronisation). None:
            num_keep (times num_segments) if it is an int and neither ``keep`` nor others="keep" can add to it, else as
            many as tokens; of a packed axis that is its whole length for every sample, so give an int there. If more
            tokens stay, the best are kept, forced and others first.
        align: side of the row on which the kept tokens stand, "left" or "right"; -1 fills the rest.
        order: "index": ascending; "score": best first, after forced tokens and others.
        backend: "compiled", "reference", or None to choose.

    Returns:
        Selection; ``overflow`` is always a tensor.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it. No criterion is given.
        RuntimeError: the backend that was asked for cannot run.
    """
    checks.tensor("select", "scores", scores, (2, 3) if cu_seqlens is None else 1)
    checks.dtype("select", "scores", scores, checks.FLOATS)
    if scores.requires_grad:
        scores = scores.detach()
    if scores.stride(-1) != 1:
        scores = scores.contiguous()
    if (
        type(num_keep) is int and num_keep >= 0 and threshold is None and top_p is None and keep is None
        and drop is None and candidates is None and segments is None and num_segments is None and cu_seqlens is None
        and capacity is None and others == "drop" and align == "left" and order == "index" and backend is None
        and not torch.compiler.is_compiling()
        and backends.pick("select_top", None, scores, scores.dtype) == "compiled"
    ):  # fmt: skip
        # The usual call. What resolve() would check holds; an argument that it would refuse does not come here.
        tokens = scores.shape[-1]
        indices, counts, overflow = _top(scores, num_keep if num_keep < tokens else tokens)
        return assemble(indices, counts, tokens, True, "left", overflow)
    arguments, exact = resolve(
        "select", scores, num_keep, threshold=threshold, top_p=top_p, keep=keep, drop=drop, candidates=candidates,
        others=others, segments=segments, num_segments=num_segments, cu_seqlens=cu_seqlens, capacity=capacity,
        align=align, order=order,
    )  # fmt: skip
    chosen = backends.pick("select", backend, scores, scores.dtype)
    run = _operator if chosen == "compiled" else reference.select
    return selection_of(run(scores, *arguments), scores.shape[-1], arguments, exact)


def selection_of(outputs: tuple, tokens: int, arguments: tuple, exact: bool) -> Selection:
    """The operator's outputs (indices, counts, overflow) as a Selection; ``arguments`` as :func:`resolve` made them."""
    *_, cu_seqlens, _, align_right, by_score = arguments
    indices, counts, overflow = outputs
    make = Selection if torch.compiler.is_compiling() else assemble
    selection = make(indices, counts, tokens, not by_score, "right" if align_right else "left", overflow, cu_seqlens)
    return selection.trim() if exact else selection
