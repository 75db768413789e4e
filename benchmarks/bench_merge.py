"""Merging: every token joins a group. Peers: torch's scatters, which get their indices in the same form."""

from __future__ import annotations

import torch

import pyvtk

from . import harness
from .harness import BEST, Case, bandwidth_limit, close, copy_limit, made_on, marked


def merging(name, batch, tokens, groups, width, dtype, bars, device="cpu"):
    """ToMe: every token joins one of the groups; the mean of each group."""

    def inputs():
        # every group has a first member, so that all of them exist
        first = torch.rand(batch, tokens).argsort(1).argsort(1)
        assignment = torch.where(first < groups, first, torch.randint(groups, (batch, tokens)))
        return torch.randn(batch, tokens, width).to(dtype), assignment

    def counts(assignment):
        ones = torch.ones(batch, tokens, device=assignment.device)
        return ones.new_zeros(batch, groups).scatter_add(1, assignment, ones)

    def index_add(x, assignment):
        rows = (assignment + groups * torch.arange(batch, device=x.device)[:, None]).flatten()
        sums = torch.zeros(batch * groups, width, dtype=torch.float32, device=x.device)
        sums.index_add_(0, rows, x.flatten(0, 1).float())
        return (sums.view(batch, groups, width) / counts(assignment)[..., None]).to(dtype)

    def scatter_reduce(x, assignment):
        wide = assignment[..., None].expand_as(x)
        out = torch.zeros(batch, groups, width, dtype=dtype, device=x.device)
        return out.scatter_reduce(1, wide, x, "mean", include_self=False)

    def expect(x, assignment):
        one_hot = torch.nn.functional.one_hot(assignment, groups).double()
        oracle = (one_hot.mT @ x.double()) / one_hot.sum(1)[..., None]
        return close(oracle, scatter_reduce(x, assignment))

    providers = {
        "pyvtk": lambda x, assignment: pyvtk.merge_tokens(x, assignment, num_groups=groups),
        "index_add": index_add,
        "scatter_reduce": scatter_reduce,
    }
    if device != "cpu":
        providers["compiled index_add"] = lambda x, assignment: harness.compiled(index_add)(x, assignment)
    limit = copy_limit(lambda x, assignment: [x.flatten(0, 1)[: batch * (tokens + groups) // 2]])
    if device != "cpu":  # it writes a fifth of what it moves, so a copy of the same size would gain more from the cache
        limit = bandwidth_limit(lambda x, assignment: x.nbytes * (tokens + groups) / tokens, device)
    return Case(
        "merge",
        name,
        dtype,
        made_on(device, inputs),
        providers,
        expect,
        limit=limit,
        bars=bars,
        cold=True,
        device=device,
    )


CASES = [
    marked(merging("ToMe merge [8, 576, 1024] to 144", 8, 576, 144, 1024, torch.float32, {"best": 1.0})),
    merging("ToMe merge [8, 576, 1024] to 144", 8, 576, 144, 1024, torch.bfloat16, {"best": 1.0}),
]


def on_cuda(device: str = "cuda") -> list[Case]:
    return [
        marked(merging(f"ToMe merge [{batch}, {tokens}, {width}] to {groups}", batch, tokens, groups, width,
                       torch.bfloat16, {BEST: 1.0}, device), place)
        for batch, tokens, groups, width, place in (
            (8, 576, 144, 1024, 0), (64, 576, 144, 1024, 2), (1, 2880, 720, 4096, 0)
        )
    ]  # fmt: skip


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else CASES
