"""Compaction: move only what stays, and put it back. Peers: torch's gathers and scatters.

Peers get their indices ready-made in the form each of them wants; pyvtk starts from the Selection.
"""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk

from .harness import BEST, Case, Limit, bandwidth_limit, copy_limit, made_on, marked, same


def chosen(rows: tuple[int, ...], tokens: int, keep: int) -> pyvtk.Selection:
    """A random ascending selection for every row."""
    indices = torch.rand(*rows, tokens).topk(keep).indices.sort().values
    return pyvtk.Selection.from_indices(indices, tokens, ascending=True)


def flat(selection: pyvtk.Selection) -> Tensor:
    """Row numbers of [batch, tokens, ...] seen as [batch * tokens, ...]."""
    offset = torch.arange(selection.indices.shape[0], device=selection.indices.device)[:, None] * selection.num_tokens
    return (selection.indices + offset).flatten()


def along_rows(selection: pyvtk.Selection, width: int) -> Tensor:
    """Indices expanded for gather and scatter over [batch, tokens, width]."""
    return selection.indices[..., None].expand(-1, -1, width)


def kept_part(x: Tensor, count: int) -> Tensor:
    """As many leading rows of a [batch, tokens, ...] tensor, seen as rows, as are kept: what the copy limit copies."""
    return x.flatten(0, 1)[:count]


def limit_of(device: str, views) -> Limit:
    """Copying ``views`` of the inputs; on CUDA copying as many bytes in one piece."""
    if device == "cpu":
        return copy_limit(views)
    return bandwidth_limit(lambda *inputs: 2 * sum(view.nbytes for view in views(*inputs)), device, as_large=True)


# ---- one tensor


def hidden(name, shape, keep, dtype, bars, into=True, device="cpu"):
    """Hidden states [batch, tokens, width], into existing memory or into a new tensor."""
    batch, tokens, width = shape

    def inputs():
        x, selection = torch.randn(shape).to(dtype), chosen((batch,), tokens, keep)
        return x, selection, flat(selection), along_rows(selection, width), torch.empty(batch, keep, width, dtype=dtype)

    providers = {
        "pyvtk": lambda x, s, rows, wide, out: pyvtk.compact(s, x, out=out if into else None),
        "index_select": lambda x, s, rows, wide, out: (
            torch.index_select(x.flatten(0, 1), 0, rows, out=out.flatten(0, 1)).view_as(out)
            if into
            else x.flatten(0, 1).index_select(0, rows).view_as(out)
        ),
        "gather": lambda x, s, rows, wide, out: torch.gather(x, 1, wide, out=out) if into else x.gather(1, wide),
        "loop of index_select": lambda x, s, rows, wide, out: (
            loop_into(x, s.indices, out) if into else torch.stack([a.index_select(0, i) for a, i in zip(x, s.indices)])
        ),
    }
    return Case(
        "compact",
        name + (", out=" if into else ", new tensor"),
        dtype,
        made_on(device, inputs),
        providers,
        lambda x, s, rows, wide, out: same(x.gather(1, wide).clone()),
        limit=limit_of(device, lambda x, s, rows, wide, out: [kept_part(x, batch * keep)]),
        bars=bars,
        cold=True,
        device=device,
    )


def loop_into(x: Tensor, indices: Tensor, out: Tensor) -> Tensor:
    for sample, index, target in zip(x, indices, out):
        torch.index_select(sample, 0, index, out=target)
    return out


# ---- all the tensors of a layer


DIMS = (1, 2, 1, 2, 2)  # hidden, positions [3, batch, tokens], mask, keys and values [batch, heads, tokens, size]
BATCH_DIMS = (0, 1, 0, 0, 0)


def bundle(keep, into, bars, device="cpu"):
    """Everything a layer of LLaVA-1.5 hands to the next one."""
    tokens = 640

    def inputs():
        tensors = (
            torch.randn(1, tokens, 4096).to(torch.bfloat16),
            torch.arange(tokens).expand(3, 1, tokens).contiguous(),
            torch.rand(1, tokens) < 0.9,
            torch.randn(1, 32, tokens, 128).to(torch.bfloat16),
            torch.randn(1, 32, tokens, 128).to(torch.bfloat16),
        )
        selection = chosen((1,), tokens, keep)
        out = tuple(t.index_select(dim, selection.indices[0]) for t, dim in zip(tensors, DIMS))
        return tensors, selection, selection.indices[0], tuple(torch.empty_like(t) for t in out)

    def ours(tensors, selection, index, out):
        return pyvtk.compact(selection, *tensors, dim=DIMS, batch_dim=BATCH_DIMS, out=out if into else None)

    def index_select(tensors, selection, index, out):
        if into:
            return tuple(torch.index_select(t, d, index, out=o) for t, d, o in zip(tensors, DIMS, out))
        return tuple(t.index_select(d, index) for t, d in zip(tensors, DIMS))

    def gather(tensors, selection, index, out):
        results = []
        for t, d, o in zip(tensors, DIMS, out):
            wide = index.view([-1 if i == d else 1 for i in range(t.dim())]).expand(o.shape)
            results.append(torch.gather(t, d, wide, out=o) if into else t.gather(d, wide))
        return tuple(results)

    def indexing(tensors, selection, index, out):
        return tuple(t[(slice(None),) * d + (index,)] for t, d in zip(tensors, DIMS))

    peers = {"loop of index_select": index_select, "loop of gather": gather}
    return Case(
        "compact",
        f"LLaVA-1.5 layer (hidden, positions, mask, K, V) 640 to {keep}" + (", out=" if into else ", new tensors"),
        torch.bfloat16,
        made_on(device, inputs),
        {"pyvtk": ours, **peers, **({} if into else {"loop of x[index]": indexing})},
        lambda *inputs: same(indexing(*inputs)),
        limit=limit_of(
            device,
            lambda tensors, s, index, out: [
                kept_part(t.reshape(1, -1, t.shape[-1]), o.numel() // t.shape[-1]) if t.dim() > 2 else t[:, :keep]
                for t, o in ((tensors[i], out[i]) for i in (0, 3, 4))
            ],
        ),
        bars=bars,
        cold=True,
        device=device,
    )


# ---- caches


def cache_in_place(name, shape, keep, layers, per_head, bars, device="cpu"):
    """Keys and values [batch, heads, tokens, size] of some layers, moved to the front of their own memory."""
    batch, heads, tokens, _ = shape

    def inputs():
        caches = [torch.randn(shape).to(torch.bfloat16) for _ in range(2 * layers)]
        selection = chosen((batch, heads) if per_head else (batch,), tokens, keep)
        index = selection.indices if per_head else selection.indices[0]
        return caches, selection, index

    def ours(caches, selection, index):
        pyvtk.compact_kv_(selection, *caches)
        return [c[:, :, :keep] for c in caches]

    def gathered(cache, index):
        if per_head:
            return cache.gather(2, index[..., None].expand(-1, -1, -1, cache.shape[-1]))
        return cache.index_select(2, index)

    def copy_back(caches, selection, index):
        for cache in caches:
            cache[:, :, :keep] = gathered(cache, index)
        return [c[:, :, :keep] for c in caches]

    def by_head(caches, selection, index):
        for cache in caches:
            for b in range(batch):
                for h in range(heads):
                    cache[b, h, :keep] = cache[b, h].index_select(0, index[b, h] if per_head else index)
        return [c[:, :, :keep] for c in caches]

    def expect(caches, selection, index):
        return same([gathered(c, index) for c in caches])

    return Case(
        "compact",
        name,
        torch.bfloat16,
        made_on(device, inputs),
        {
            "pyvtk": ours,
            "gather, copy back" if per_head else "index_select, copy back": copy_back,
            "index_select by head, copy back": by_head,
        },
        expect,
        limit=limit_of(
            device, lambda caches, s, index: [c.view(-1, c.shape[-1])[: batch * heads * keep] for c in caches]
        ),
        bars=bars,
        cold=True,
        mutates=True,
        memory=True,
        device=device,
    )


def cache_into_new(name, shape, keep, layers, bars, device="cpu"):
    """The same into new memory, which frees the old."""
    batch, _, tokens, _ = shape

    def inputs():
        caches = [torch.randn(shape).to(torch.bfloat16) for _ in range(2 * layers)]
        selection = chosen((batch,), tokens, keep)
        return caches, selection, selection.indices[0]

    def loop(caches, selection, index):
        return [cache.index_select(2, index) for cache in caches]

    return Case(
        "compact",
        name,
        torch.bfloat16,
        made_on(device, inputs),
        {
            "pyvtk": lambda caches, selection, index: list(pyvtk.compact(selection, *caches, dim=2)),
            "loop of index_select": loop,
            "loop of x[index]": lambda caches, selection, index: [cache[:, :, index] for cache in caches],
        },
        lambda *inputs: same(loop(*inputs)),
        limit=limit_of(device, lambda caches, s, index: [cache[:, :, :keep] for cache in caches]),
        bars=bars,
        cold=True,
        device=device,
    )


# ---- ragged


def crops(device="cpu"):
    """HiRED: features of five crops, a budget each, to one packed row of 576."""
    batch, tokens, width = 5, 577, 1024

    def inputs():
        x = torch.randn(batch, tokens, width).to(torch.bfloat16)
        budgets = torch.tensor([192, 96, 96, 96, 96])
        mask = torch.zeros(batch, tokens, dtype=torch.bool)
        for row, k in zip(mask, budgets.tolist()):
            row[torch.randperm(tokens)[:k]] = True
        return x, pyvtk.Selection.from_mask(mask, capacity=tokens), mask, mask.flatten().nonzero()[:, 0]

    return Case(
        "compact",
        "HiRED 5 crops x 577 x 1024 to 576 packed rows",
        torch.bfloat16,
        made_on(device, inputs),
        {
            "pyvtk": lambda x, s, mask, rows: pyvtk.compact(s, x, packed=True, total=576),
            "x[mask]": lambda x, s, mask, rows: x[mask],
            "index_select": lambda x, s, mask, rows: x.flatten(0, 1).index_select(0, rows),
        },
        lambda x, s, mask, rows: same(x[mask]),
        limit=limit_of(device, lambda x, s, mask, rows: [kept_part(x, 576)]),
        bars={"best": 1.0},
        cold=True,
        device=device,
        eager=("x[mask]",),  # asks the host how many there are
    )


# ---- with gradients


def training(name, shape, keep, dtype, bars, device="cpu"):
    """The backward pass alone would need a graph kept alive; so forward and backward, as a training step has them."""
    batch, tokens, width = shape

    def inputs():
        selection = chosen((batch,), tokens, keep)
        x = torch.randn(shape).to(dtype).requires_grad_()
        grad = torch.randn(batch, keep, width).to(dtype)
        return x, selection, flat(selection), along_rows(selection, width), grad

    def gradient(move):
        return lambda x, s, rows, wide, grad: torch.autograd.grad(move(x, s, rows, wide), x, grad)[0]

    def expect(x, s, rows, wide, grad):
        return same(grad.new_zeros(shape).scatter(1, wide, grad))

    return Case(
        "compact",
        name,
        dtype,
        made_on(device, inputs),
        {
            "pyvtk": gradient(lambda x, s, rows, wide: pyvtk.compact(s, x)),
            "gather": gradient(lambda x, s, rows, wide: x.gather(1, wide)),
            "index_select": gradient(
                lambda x, s, rows, wide: x.flatten(0, 1).index_select(0, rows).view(batch, keep, width)
            ),
        },
        expect,
        limit=limit_of(device, lambda x, *rest: [kept_part(x.detach(), batch * (keep + tokens) // 2)]),
        bars=bars,
        cold=True,
        device=device,
    )


def backward(name, shape, keep, dtype, bars, device="cpu"):
    """The backward pass alone, of a forward pass that is done. Autograd runs it on that one's stream, and ends at its
    leaf on the stream that first used it. So that a graph can capture it, every stream gets a forward pass of its own,
    of a leaf of its own, in the first call on it: that is one of those that precede a capture."""
    batch, tokens, width = shape
    moves = {
        "pyvtk": lambda x, s, rows, wide: pyvtk.compact(s, x),
        "gather": lambda x, s, rows, wide: x.gather(1, wide),
        "index_select": lambda x, s, rows, wide: x.flatten(0, 1).index_select(0, rows).view(batch, keep, width),
    }

    def inputs():
        selection = chosen((batch,), tokens, keep)
        grad = torch.randn(batch, keep, width).to(dtype)
        return torch.randn(shape).to(dtype), selection, flat(selection), along_rows(selection, width), grad, {}

    def gradient(who):
        def call(x, s, rows, wide, grad, forward):
            here = who, torch.cuda.current_stream().cuda_stream if x.is_cuda else 0
            if here not in forward:
                leaf = x.detach().requires_grad_()
                forward[here] = leaf, moves[who](leaf, s, rows, wide)
            leaf, out = forward[here]
            return torch.autograd.grad(out, leaf, grad, retain_graph=True)[0]

        return call

    return Case(
        "compact",
        name,
        dtype,
        made_on(device, inputs),
        {who: gradient(who) for who in moves},
        lambda x, s, rows, wide, grad, forward: same(grad.new_zeros(shape).scatter(1, wide, grad)),
        limit=limit_of(device, lambda x, *rest: [kept_part(x, batch * (keep + tokens) // 2)]),
        bars=bars,
        device=device,
    )


# ---- back to full length


def put_back(name, shape, keep, dtype, bars, device="cpu"):
    """VideoLLM-MoD: what a layer computed for its tokens goes back between those that skipped it."""
    batch, tokens, width = shape

    def inputs():
        selection = chosen((batch,), tokens, keep)
        base, update = torch.randn(shape).to(dtype), torch.randn(batch, keep, width).to(dtype)
        return base, update, selection, flat(selection), along_rows(selection, width)

    def index_copy(base, update, s, rows, wide):
        return base.flatten(0, 1).index_copy(0, rows, update.flatten(0, 1)).view(shape)

    return Case(
        "compact",
        name,
        dtype,
        made_on(device, inputs),
        {
            "pyvtk": lambda base, update, s, rows, wide: pyvtk.restore(s, update, base),
            "scatter": lambda base, update, s, rows, wide: base.scatter(1, wide, update),
            "index_copy": index_copy,
        },
        lambda base, update, s, rows, wide: same(base.scatter(1, wide, update)),
        limit=limit_of(device, lambda base, *rest: [base]),
        bars=bars,
        cold=True,
        device=device,
    )


BF16, FP32 = torch.bfloat16, torch.float32

CASES = [
    marked(hidden("[8, 2880, 4096] to 720", (8, 2880, 4096), 720, BF16, {"index_select": 1.0, "limit": 0.7})),
    hidden("[8, 2880, 4096] to 720", (8, 2880, 4096), 720, BF16, {"best": 1.0}, into=False),
    hidden("LLaVA-NeXT hidden [1, 2950, 4096] to 790", (1, 2950, 4096), 790, torch.float16, {"best": 1.0}),
    hidden("LLaVA-NeXT hidden [1, 2950, 4096] to 790", (1, 2950, 4096), 790, torch.float16, {"best": 1.0}, into=False),
    hidden("LLaVA-1.5 hidden [1, 640, 4096] to 208", (1, 640, 4096), 208, BF16, {"best": 1.0}),
    hidden("Qwen2-VL hidden [1, 4096, 3584] to 1024", (1, 4096, 3584), 1024, BF16, {"best": 1.0}),
    marked(bundle(160, into=False, bars={"best": 1.3})),
    bundle(160, into=True, bars={"best": 1.3}),
    cache_in_place(
        "LLaVA-1.5 cache of 2 layers, in place, 640 to 160", (1, 32, 640, 128), 160, 2, False, {"best": 1.0}
    ),
    cache_in_place(
        "SnapKV cache of a layer, in place, by head, 16384 to 2048", (1, 4, 16384, 128), 2048, 1, True, {"best": 1.0}
    ),
    crops(),
    training(
        "PyramidDrop training, forward and backward, [8, 640, 4096] to 352", (8, 640, 4096), 352, FP32, {"best": 1.0}
    ),
    training(
        "LLaVA-NeXT training, forward and backward, [2, 2950, 4096] to 790", (2, 2950, 4096), 790, BF16, {"best": 1.0}
    ),
    put_back("VideoLLM-MoD restore [1, 4096, 3584] from 820", (1, 4096, 3584), 820, BF16, {"best": 1.0}),
]


def on_cuda(device: str = "cuda") -> list[Case]:
    best, over_loop = {BEST: 1.0}, {"loop of index_select": 3.0}
    return [
        marked(hidden("[8, 2880, 4096] to 720", (8, 2880, 4096), 720, BF16, {"limit": 0.85}, device=device)),
        marked(hidden("[8, 2880, 4096] to 720", (8, 2880, 4096), 720, BF16, {"limit": 0.85}, into=False, device=device),
               2),
        hidden("LLaVA-1.5 hidden [1, 640, 4096] to 208", (1, 640, 4096), 208, BF16, best, device=device),
        hidden("Qwen2-VL hidden [1, 4096, 3584] to 1024", (1, 4096, 3584), 1024, BF16, best, device=device),
        marked(bundle(160, into=False, bars=best, device=device), 2),
        bundle(160, into=True, bars=best, device=device),
        marked(cache_in_place("Qwen2-VL cache of 28 layers, in place, 2048 to 512", (1, 4, 2048, 128), 512, 28, False,
                              {"index_select, copy back": 3.0}, device)),
        marked(cache_into_new("Qwen2-VL cache of 28 layers, new tensors, 2048 to 512", (1, 4, 2048, 128), 512, 28,
                              over_loop, device)),
        cache_in_place("LLaVA-1.5 cache of 32 layers, in place, 640 to 160", (1, 32, 640, 128), 160, 32, False, best,
                       device),
        cache_in_place("SnapKV cache of 28 layers, in place, by head, 16384 to 2048", (1, 4, 16384, 128), 2048, 28,
                       True, best, device),
        crops(device),
        marked(backward("backward of [8, 2880, 4096] to 720", (8, 2880, 4096), 720, BF16, {"gather": 2.0}, device), 2),
        backward("PyramidDrop backward of [8, 640, 4096] to 352", (8, 640, 4096), 352, BF16, {"gather": 2.0}, device),
        training("PyramidDrop training, forward and backward, [8, 640, 4096] to 352", (8, 640, 4096), 352, BF16, best,
                 device),
        put_back("VideoLLM-MoD restore [1, 4096, 3584] from 820", (1, 4096, 3584), 820, BF16, best, device),
    ]  # fmt: skip


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else CASES
