"""Merging: every token joins a group. Peers: torch's scatters, which get their indices in the same form."""

from __future__ import annotations

import torch

import pyvtk

from .harness import Case, close, copy_limit


def merging(name, batch, tokens, groups, width, dtype, bars):
    """ToMe: every token joins one of the groups; the mean of each group."""

    def inputs():
        # every group has a first member, so that all of them exist
        first = torch.rand(batch, tokens).argsort(1).argsort(1)
        assignment = torch.where(first < groups, first, torch.randint(groups, (batch, tokens)))
        return torch.randn(batch, tokens, width).to(dtype), assignment

    def counts(assignment):
        return torch.zeros(batch, groups).scatter_add(1, assignment, torch.ones(batch, tokens))

    def index_add(x, assignment):
        rows = (assignment + groups * torch.arange(batch)[:, None]).flatten()
        sums = torch.zeros(batch * groups, width, dtype=torch.float32).index_add_(0, rows, x.flatten(0, 1).float())
        return (sums.view(batch, groups, width) / counts(assignment)[..., None]).to(dtype)

    def scatter_reduce(x, assignment):
        wide = assignment[..., None].expand_as(x)
        out = torch.zeros(batch, groups, width, dtype=dtype)
        return out.scatter_reduce(1, wide, x, "mean", include_self=False)

    def expect(x, assignment):
        one_hot = torch.nn.functional.one_hot(assignment, groups).double()
        oracle = (one_hot.mT @ x.double()) / one_hot.sum(1)[..., None]
        return close(oracle, scatter_reduce(x, assignment))

    return Case(
        "merge",
        name,
        dtype,
        inputs,
        {
            "pyvtk": lambda x, assignment: pyvtk.merge_tokens(x, assignment, num_groups=groups),
            "index_add": index_add,
            "scatter_reduce": scatter_reduce,
        },
        expect,
        limit=copy_limit(lambda x, assignment: [x.flatten(0, 1)[: batch * (tokens + groups) // 2]]),
        bars=bars,
        cold=True,
    )


CASES = [
    merging("ToMe merge [8, 576, 1024] to 144", 8, 576, 144, 1024, torch.float32, {"best": 1.0}),
    merging("ToMe merge [8, 576, 1024] to 144", 8, 576, 144, 1024, torch.bfloat16, {"best": 1.0}),
]
