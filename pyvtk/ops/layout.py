"""Fields of layouts from what models hold: token ids and grids, or M-RoPE positions. One operator and one check each.

:class:`pyvtk.TokenLayout` has them as ``from_ids`` and ``from_mrope``, and says what they mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvtk import backends, checks, transforms
from pyvtk.reference import layout as reference
from pyvtk.reference.layout import CROSSES_SAMPLES, MAX_COORDINATE, WRONG_COORDINATES, WRONG_GRIDS, WRONG_NUMBER


def _results(like: Tensor, samples: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers, shape = {"dtype": torch.int32}, tuple(like.shape)
    check = like.new_empty((3,), dtype=torch.int64)
    return like.new_empty(shape, **numbers), like.new_empty((*shape, 3), **numbers), like.new_empty(
        (samples, 3), **numbers
    ), check  # fmt: skip


def _from_ids_fake(input_ids, image_token_ids, grids, grid, merge, mask, cu_seqlens):
    return _results(input_ids, input_ids.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)


# Both give image_id, coords, extent, and what is wrong: pyvtk/reference/layout.py. Images are numbered over the whole
# batch, so a mapped axis is no further axis of it.
backends.define(
    "layout_from_ids",
    "(Tensor input_ids, SymInt[] image_token_ids, Tensor? grids, SymInt[] grid, SymInt merge, Tensor? mask, "
    "Tensor? cu_seqlens) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_from_ids_fake,
)
backends.define(
    "layout_from_mrope",
    "(Tensor visual, Tensor position_ids, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda visual, position_ids, mask: _results(visual, visual.shape[0]),
)


def from_ids(
    input_ids: Tensor, image_token_id, grids, merge: int, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(image_id, coords, extent) of :meth:`pyvtk.TokenLayout.from_ids`, which has the arguments' meaning and errors."""
    op = "from_ids"
    checks.tensor(op, "input_ids", input_ids, 2 if cu_seqlens is None else 1)
    checks.dtype(op, "input_ids", input_ids, checks.INTEGERS)
    checks.integer(op, "merge", merge, 1)
    grids, grid = _checked_grids(op, grids, merge)
    tokens = list(image_token_id) if isinstance(image_token_id, (list, tuple)) else [image_token_id]
    for token in tokens:
        checks.integer(op, "image_token_id", token)
    if grids is not None:
        grids = grids.to(input_ids.device, non_blocking=True)
    _check_mask(op, mask, input_ids, "input_ids")
    if cu_seqlens is not None:
        checks.offsets(op, "cu_seqlens", cu_seqlens, input_ids, "the token axis")
        cu_seqlens = cu_seqlens.contiguous()
    arguments = (input_ids, tokens, grids, grid, merge, mask, cu_seqlens)
    if backends.pick("layout_from_ids", None, input_ids) == "compiled":
        results = transforms.call(torch.ops.pyvtk.layout_from_ids.default, (), *arguments)
    else:
        results = reference.layout_from_ids(*arguments)
    number = "as many visual tokens as grids / merge" if grids is not None else "a multiple of the grid's tokens"
    sides = f"grids must be multiples of merge={{merge}}, sides / merge at most {MAX_COORDINATE}, newline 0 or 1"
    checks.values(
        op,
        results[3],
        {
            WRONG_GRIDS: (sides, ""),
            WRONG_NUMBER: (f"input_ids must hold {number}", ", {1}, got {0}"),
            CROSSES_SAMPLES: ("input_ids must hold every image within one sample", ""),
        },
        merge=merge,
    )  # fmt: skip
    return results[:3]


def from_mrope(visual: Tensor, position_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(image_id, coords, extent) of :meth:`pyvtk.TokenLayout.from_mrope`."""
    op = "from_mrope"
    checks.tensor(op, "visual", visual, 2)
    checks.dtype(op, "visual", visual, (torch.bool,))
    checks.tensor(op, "position_ids", position_ids, 3)
    checks.dtype(op, "position_ids", position_ids, checks.INTEGERS)
    if position_ids.shape[0] not in (3, 4) or position_ids.shape[1:] != visual.shape:
        raise ValueError(
            f"{op}: position_ids must be [3 or 4, batch, tokens] = [3 or 4, {visual.shape[0]}, {visual.shape[1]}], got "
            f"shape {tuple(position_ids.shape)}"
        )
    checks.same_device(op, "position_ids", position_ids, visual, "visual")
    _check_mask(op, mask, visual, "visual")
    arguments = (visual, position_ids, mask)
    if backends.pick("layout_from_mrope", None, visual) == "compiled":
        results = transforms.call(torch.ops.pyvtk.layout_from_mrope.default, (), *arguments)
    else:
        results = reference.layout_from_mrope(*arguments)
    message = f"position_ids must be within {MAX_COORDINATE - 1} of each other in one image"
    checks.values(op, results[3], {WRONG_COORDINATES: (message, ", got {0}")})
    return results[:3]


def _check_mask(op: str, mask, like: Tensor, name: str) -> None:
    if mask is None:
        return
    checks.tensor(op, "mask", mask)
    checks.dtype(op, "mask", mask, (torch.bool,))
    checks.shape(op, "mask", mask, tuple(like.shape), f"shaped like {name}")
    checks.same_device(op, "mask", mask, like, name)


def _checked_grids(op: str, grids, merge: int) -> tuple[Tensor | None, list[int]]:
    """int [images, 3 or 4] from a tensor or from tuples; or the numbers of the one grid that all images have."""
    form = "(t, h, w) or (t, h, w, newline)"
    if isinstance(grids, Tensor):
        checks.dtype(op, "grids", grids, checks.INTEGERS)
        if grids.dim() != 2 or grids.shape[1] not in (3, 4):
            raise ValueError(f"{op}: grids must be [images, 3 or 4], got shape {tuple(grids.shape)}")
        return grids, []
    if not isinstance(grids, Sequence) or isinstance(grids, str):
        raise TypeError(f"{op}: grids must be a tensor, a sequence of {form}, or one of these, got {grids!r}")
    one = len(grids) > 0 and not isinstance(grids[0], Sequence)
    for grid in [grids] if one else grids:
        sides = grid[:3] if isinstance(grid, Sequence) else [None]
        if any(isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)) for n in sides):
            raise TypeError(f"{op}: grids must be {form} of ints, got {grid!r}")
        if len(grid) not in (3, 4):
            raise ValueError(f"{op}: grids must be {form} of ints, got {grid!r}")
        if len(grid) == 4 and grid[3] not in (0, 1):
            raise ValueError(f"{op}: grids must have True or False as newline, got {grid!r}")
    if not one:
        rows = [(*grid[:3], int(grid[3]) if len(grid) == 4 else 0) for grid in grids]
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, 4), []
    t, h, w = grids[:3]
    if h % merge or w % merge:
        raise ValueError(f"{op}: grids must be multiples of merge={merge}, got {tuple(grids)}")
    for side in (t, h // merge, w // merge):
        if not 0 < side <= MAX_COORDINATE:
            raise ValueError(f"{op}: grids must have 1 to {MAX_COORDINATE} tokens a side, got {tuple(grids)}")
    return None, [t, h, w, *(int(n) for n in grids[3:])]
