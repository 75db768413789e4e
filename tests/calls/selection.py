"""Calls of a selection's bookkeeping, by its page: the methods of Selection take no backend."""

from __future__ import annotations

import torch

from calls.call import Call
from pyvtk import Selection
from pyvtk.ops import selection as page


def mask(*shape, share=0.5):
    return lambda: (torch.rand(shape) < share,)


def chosen(*shape, keep, align="left", others=()):
    """A selection of ``keep`` slots a row, in no order and not all of them real; ``others``: such ones after it."""

    def one(tokens, slots, side):
        order = torch.rand(*shape[:-1], tokens).argsort(-1)[..., :slots]
        return Selection.from_indices(order, tokens, counts=torch.randint(slots + 1, shape[:-1]), align=side)

    def inputs():
        first = one(shape[-1], keep, align)
        return first, *[one(keep, slots, side) for slots, side in others]

    return inputs


def packed(*lengths, keep, align="left"):
    def inputs():
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        flags = (torch.arange(sum(lengths) + 2) >= starts[:-1, None]) & (
            torch.arange(sum(lengths) + 2) < starts[1:, None]
        )
        selection = Selection.from_mask(flags & (torch.rand(flags.shape) < 0.4), capacity=keep, align=align)
        return (Selection(*page_arguments(selection)[:2], selection.num_tokens, True, align, None, starts),)

    return inputs


def page_arguments(selection):
    return selection.indices, selection.counts, selection.align == "right"


def of_mask(capacity, right=False):
    return lambda backend, flags: page.selection_of_mask(flags, capacity, right, backend=backend)


def complement(capacity):
    def run(backend, s):
        return page.selection_complement(
            *page_arguments(s), s.num_tokens, s.source_cu_seqlens, capacity, backend=backend
        )

    return run


def then(backend, first, other):
    return page.selection_then(*page_arguments(first), *page_arguments(other), first.counts > 3, None, backend=backend)


def lookup(operator):
    return lambda backend, s: operator(*page_arguments(s), s.num_tokens, s.packed, backend=backend)


def valid(backend, s):
    return page.selection_valid(s.counts, s.capacity, s.align == "right", backend=backend)


CALLS = {
    "of mask": Call("selection_of_mask", mask(4, 2945), of_mask(1600), compiles=True),
    "of mask, right": Call("selection_of_mask", mask(3, 5, 577), of_mask(300, True)),
    "of mask, too many": Call("selection_of_mask", mask(3, 5000, share=0.9), of_mask(700, True)),
    "of mask, one": Call("selection_of_mask", mask(1, 1), of_mask(3)),
    "of mask, nothing": Call("selection_of_mask", mask(2, 0), of_mask(5)),
    "then": Call("selection_then", chosen(4, 2945, keep=1000, others=[(500, "left")]), then, compiles=True),
    "then, right": Call("selection_then", chosen(2, 3, 640, keep=320, align="right", others=[(200, "right")]), then),
    "then, nothing": Call("selection_then", chosen(2, 9, keep=0, others=[(0, "left")]), then),
    "complement": Call("selection_complement", chosen(4, 2945, keep=1000), complement(2945), compiles=True),
    "complement, right": Call("selection_complement", chosen(2, 2, 700, keep=300, align="right"), complement(500)),
    "complement, long": Call("selection_complement", chosen(1, 70000, keep=900, align="right"), complement(69500)),
    "complement, packed": Call("selection_complement", packed(5, 0, 577, 64, keep=200), complement(300)),
    "mask": Call("selection_mask", chosen(4, 2945, keep=1000), lookup(page.selection_mask), compiles=True),
    "mask, long": Call("selection_mask", chosen(2, 9000, keep=3000, align="right"), lookup(page.selection_mask)),
    "mask, packed": Call("selection_mask", packed(5, 0, 577, 64, keep=200), lookup(page.selection_mask)),
    "inverse": Call("selection_inverse", chosen(4, 2945, keep=1000), lookup(page.selection_inverse), compiles=True),
    "inverse, long": Call("selection_inverse", chosen(2, 9000, keep=3000), lookup(page.selection_inverse)),
    "inverse, packed": Call("selection_inverse", packed(5, 0, 577, 64, keep=200, align="right"),
                            lookup(page.selection_inverse)),
    "valid": Call("selection_valid", chosen(4, 2945, keep=1000), valid, compiles=True),
    "valid, right": Call("selection_valid", chosen(2, 3, 640, keep=320, align="right"), valid),
}  # fmt: skip
