"""The bookkeeping of selections: from a mask, what did not stay, a choice among what stayed. The peer is the same in
torch's operators, some twenty of them."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

import pyvtk
from pyvtk.reference import selection as in_torch

from . import harness
from .harness import Case, bandwidth_limit, made_on, marked, same

PEER = "torch operators"


def rows(selection: pyvtk.Selection) -> tuple:
    return selection.indices, selection.counts, selection.align == "right"


def case(name, shape, inputs, ours, peer, bars, device):
    """``ours`` and ``peer`` give indices, counts and overflow."""
    providers = {"pyvtk": ours, PEER: peer}
    if device != "cpu":
        providers[f"compiled {PEER}"] = lambda *given: harness.compiled(peer)(*given)

    def moved(*given) -> int:
        return sum(x.nbytes for x in tree_leaves((given, peer(*given))) if isinstance(x, torch.Tensor))

    return Case(
        "selection",
        f"{name} {list(shape)}",
        torch.int64,
        made_on(device, inputs),
        providers,
        lambda *given: same(peer(*given)),
        limit=bandwidth_limit(moved, device) if device != "cpu" else None,
        bars=bars,
        device=device,
    )


def facts(selection: pyvtk.Selection) -> tuple:
    return selection.indices, selection.counts, selection.overflow


def of_mask(shape, keep, bars, device="cpu"):
    def inputs():
        return (torch.rand(shape) < keep / shape[-1] * 0.9,)

    return case(
        f"from_mask, {keep} slots,", shape, inputs, lambda mask: facts(pyvtk.Selection.from_mask(mask, capacity=keep)),
        lambda mask: in_torch.selection_of_mask(mask, keep, False), bars, device,
    )  # fmt: skip


def complement(shape, keep, bars, device="cpu"):
    gone = shape[-1] - keep
    return case(
        f"complement of {keep} in", shape, lambda: (pyvtk.select(torch.rand(shape), keep),),
        lambda selection: facts(selection.complement(gone)),
        lambda selection: in_torch.selection_complement(*rows(selection), shape[-1], None, gone), bars, device,
    )  # fmt: skip


def then(shape, keep, keep_then, bars, device="cpu"):
    def inputs():
        return pyvtk.select(torch.rand(shape), keep), pyvtk.select(torch.rand(*shape[:-1], keep), keep_then)

    def peer(first, second):
        return in_torch.selection_then(*rows(first), *rows(second), first.overflow, second.overflow)

    return case(
        f"then, {keep} to {keep_then} of", shape, inputs, lambda first, second: facts(first.then(second)), peer, bars,
        device,
    )  # fmt: skip


SHAPES = [((1, 640), 320, 160), ((4, 2945), 1000, 500), ((8, 16384), 4096, 2048)]


def cases(device: str) -> list[Case]:
    faster = {PEER: 1.0} if device == "cpu" else {"best": 1.0}
    found = []
    for number, (shape, keep, keep_then) in enumerate(SHAPES):
        told = number == 1  # a batch of pictures, as stages of pruning meet it
        bars = {PEER: 3.0} if told and device == "cpu" else faster
        found += [
            of_mask(shape, keep, faster, device),
            complement(shape, keep, faster, device),
            marked(then(shape, keep, keep_then, bars, device), 2 if told else 0),
        ]
    return found
