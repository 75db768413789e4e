"""Scoring: how much attention each key receives. Peers build the attention map, as users of eager PyTorch do."""

from __future__ import annotations

import torch
from torch import Tensor

import pyvtk

from .harness import Case, close, matmul_limit, read_limit

BOTH = (torch.float32, torch.bfloat16)


# ---- inputs: q [batch, query heads, queries, head size], k [batch, key heads, keys, head size]


def cached(batch, heads, groups, queries, keys, size, dtype):
    """Keys as a cache holds them (contiguous), queries as views of [batch, tokens, heads, size]."""

    def inputs():
        q = torch.randn(batch, queries, heads, size).to(dtype).transpose(1, 2)
        return q, torch.randn(batch, groups, keys, size).to(dtype)

    return inputs


def tower(batch, heads, tokens, size, dtype):
    """Vision tower: both are views of [batch, tokens, heads, size] memory; the CLS row asks."""

    def inputs():
        q, k = (torch.randn(batch, tokens, heads, size).to(dtype).transpose(1, 2) for _ in range(2))
        return q[:, :, :1], k

    return inputs


# ---- what users write today


def unseen(q: Tensor, k: Tensor, positions: Tensor | None = None) -> Tensor:
    """bool [queries, keys]: keys after the query, which is one of the last unless positions [queries] are given."""
    queries, keys = q.shape[-2], k.shape[-2]
    if positions is None:
        positions = torch.arange(keys - queries, keys)
    return positions[:, None] < torch.arange(keys)


def logits(q: Tensor, k: Tensor, grouped: bool) -> Tensor:
    """[batch, heads, queries, keys]: with keys repeated for every query head, or query heads grouped by key head."""
    batch, heads, queries, size = q.shape
    q, groups = q * size**-0.5, k.shape[1]
    if heads == groups:
        return q @ k.mT
    if not grouped:
        return q @ k.repeat_interleave(heads // groups, 1).mT
    return (q.reshape(batch, groups, -1, size) @ k.mT).view(batch, heads, queries, -1)


def attention_map(q: Tensor, k: Tensor, mask: Tensor | None = None, grouped: bool = False) -> Tensor:
    x = logits(q, k, grouped)
    if mask is not None:
        x = x.masked_fill(mask, float("-inf"))
    return x.softmax(-1, dtype=torch.float32)


def attention_map_in_place(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same in one buffer, in float32: without instructions for it, a bfloat16 product takes many times as long."""
    x = logits(q.float(), k.float(), grouped=True)
    if mask is not None:
        x.masked_fill_(mask, float("-inf"))
    return torch.softmax(x, -1, out=x)


def by_head(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean over queries and heads, one head's map at a time, reused: the frugal way."""
    batch, heads, queries, size = q.shape
    q, k = q.float(), k.float()
    out = torch.zeros(batch, k.shape[2])
    x = torch.empty(queries, k.shape[2])
    for b in range(batch):
        for h in range(heads):
            torch.mm(q[b, h] * size**-0.5, k[b, h * k.shape[1] // heads].mT, out=x)
            if mask is not None:
                x.masked_fill_(mask, float("-inf"))
            out[b] += torch.softmax(x, -1, out=x).sum(0)
    return out / (heads * queries)


def exact(q: Tensor, k: Tensor, mask: Tensor | None, reduce) -> Tensor:
    """``reduce`` of the map of each query head in float64, stacked to [batch, heads, ...]: never the whole map."""
    group = q.shape[1] // k.shape[1]

    def one(b, h):
        x = q[b, h].double() @ k[b, h // group].double().mT * q.shape[-1] ** -0.5
        if mask is not None:
            x = x.masked_fill(mask, float("-inf"))
        return reduce(x.softmax(-1))

    return torch.stack([torch.stack([one(b, h) for h in range(q.shape[1])]) for b in range(q.shape[0])])


def operations(causal: bool = False):
    """Floating-point operations of one product of queries and keys; the visible half of it if causal."""

    def count(q, k, *rest):
        batch, heads, queries, size = q.shape
        keys = k.shape[2]
        seen = keys - (queries - 1) / 2 if causal else keys
        return 2.0 * batch * heads * queries * seen * size

    return count


# ---- the last token, or a few queries: bound by reading the keys


def last_token(name, shape, dtype, bars, reduce="mean", make=cached):
    def reduced(x):
        return x[:, :, 0].mean(1) if reduce == "mean" else x[:, :, 0].sum(1)

    providers = {
        "pyvtk": lambda q, k: pyvtk.attention_scores(q, k, head_reduce=reduce),
        "eager": lambda q, k: reduced(attention_map(q, k)),
    }
    inputs = make(*shape, dtype)
    q, k = inputs()
    if q.shape[1] != k.shape[1]:
        providers["grouped"] = lambda q, k: reduced(attention_map(q, k, grouped=True))
    if dtype != torch.float32:
        # the better way where the processor has no instructions for bfloat16 products
        providers["float32 first"] = lambda q, k: reduced(attention_map_in_place(q, k))
    return Case(
        "score",
        name,
        dtype,
        inputs,
        providers,
        lambda q, k: close(reduced(exact(q, k, None, lambda p: p)), providers["eager"](q, k)),
        limit=read_limit(lambda q, k: k),
        bars=bars,
    )


LAST_TOKEN = [
    last_token(name, shape, dtype, bars[dtype])
    for name, shape, bars in (
        (
            "LLaVA-1.5 last token, 32/32 heads, N=640",
            (1, 32, 32, 1, 640, 128),
            {torch.float32: {"eager": 1.8, "limit": 0.6}, torch.bfloat16: {"eager": 2.5, "limit": 0.6}},
        ),
        (
            "LLaVA-1.5 last token, batch 8, 32/32 heads, N=640",
            (8, 32, 32, 1, 640, 128),
            {torch.float32: {"best": 1.0}, torch.bfloat16: {"best": 1.0}},
        ),
        (
            "LLaVA-NeXT last token, 32/32 heads, N=2950",
            (1, 32, 32, 1, 2950, 128),
            {torch.float32: {"best": 1.0}, torch.bfloat16: {"best": 1.0}},
        ),
        (
            "Qwen2-VL last token, 28/4 heads, N=1024",
            (1, 28, 4, 1, 1024, 128),
            {torch.float32: {"best": 1.0}, torch.bfloat16: {"best": 1.0}},
        ),
        (
            "Qwen2-VL last token, 28/4 heads, N=4096",
            (1, 28, 4, 1, 4096, 128),
            {torch.float32: {"best": 2.5}, torch.bfloat16: {"best": 1.5}},
        ),
        (
            "Qwen2-VL last token, 28/4 heads, N=16384",
            (1, 28, 4, 1, 16384, 128),
            {torch.float32: {"best": 1.0}, torch.bfloat16: {"best": 1.0}},
        ),
    )
    for dtype in BOTH
]

CLS = [
    last_token(
        "HiRED CLS row, 5 crops x 16 heads, N=577, D=64", (5, 16, 577, 64), dtype, {"best": 1.0}, "sum", make=tower
    )
    for dtype in BOTH
]


# ---- scoring and selecting in one call


def best_by(oracle: Tensor, plain: Tensor, keep: int):
    """Checks that every row has ``keep`` ascending tokens, none worse than the last one by more than rounding."""

    def check(name, result):
        indices = result.indices if isinstance(result, pyvtk.Selection) else result
        assert indices.shape == (*oracle.shape[:-1], keep), f"shape {tuple(indices.shape)}"
        assert (indices.diff(dim=-1) > 0).all(), "indices do not ascend"
        slack = 4 * (plain.double() - oracle).abs().amax(-1) + 1e-6 * oracle.abs().amax(-1)
        wanted = oracle.topk(keep).values[..., -1] - slack
        assert (oracle.gather(-1, indices).amin(-1) >= wanted).all(), "a token was kept that is not among the best"

    return check


def last_token_select(name, shape, keep, dtype, bars):
    def chain(grouped):
        def call(q, k):
            scores = attention_map(q, k, grouped=grouped)[:, :, 0].mean(1)
            return scores.topk(keep).indices.sort().values

        return call

    providers = {
        "pyvtk": lambda q, k: pyvtk.score_and_select(q, k, keep),
        "eager + topk + sort": chain(grouped=False),
        "two calls": lambda q, k: pyvtk.select(pyvtk.attention_scores(q, k), keep),
    }
    inputs = cached(*shape, dtype)
    if shape[1] != shape[2]:
        providers["grouped + topk + sort"] = chain(grouped=True)
    if dtype != torch.float32:
        providers["float32 first + topk + sort"] = lambda q, k: (
            attention_map_in_place(q, k)[:, :, 0].mean(1).topk(keep).indices.sort().values
        )
    return Case(
        "score",
        name,
        dtype,
        inputs,
        providers,
        lambda q, k: best_by(
            exact(q, k, None, lambda p: p)[:, :, 0].mean(1), attention_map(q, k)[:, :, 0].mean(1), keep
        ),
        limit=read_limit(lambda q, k: k),
        bars=bars,
    )


SCORE_AND_SELECT = [
    last_token_select(
        "LLaVA-1.5 score and select 640 to 144, 32/32 heads",
        (1, 32, 32, 1, 640, 128),
        144,
        dtype,
        {"eager + topk + sort": bar},
    )
    for dtype, bar in ((torch.float32, 2.5), (torch.bfloat16, 3.0))
] + [
    last_token_select(
        "Qwen2-VL score and select 4096 to 1024, 28/4 heads",
        (1, 28, 4, 1, 4096, 128),
        1024,
        dtype,
        {"best": 1.0},
    )
    for dtype in BOTH
]


# ---- several queries: bound by multiplication


def text_rows(queries, dtype):
    """MustDrop: the text rows after the image; column sum and maximum of the head-mean map in one pass."""

    def eager(q, k):
        x = attention_map(q, k, unseen(q, k)).mean(1)
        return torch.stack([x.sum(1), x.amax(1)])

    def expect(q, k):
        x = exact(q, k, unseen(q, k), lambda p: p).mean(1)
        return close(torch.stack([x.sum(1), x.amax(1)]), eager(q, k))

    def in_place(q, k):
        x = attention_map_in_place(q, k, unseen(q, k)).mean(1)
        return torch.stack([x.sum(1), x.amax(1)])

    return Case(
        "score",
        f"MustDrop {queries} text rows, sum and max, 32/32 heads, N=640",
        dtype,
        cached(1, 32, 32, queries, 640, 128, dtype),
        {
            "pyvtk": lambda q, k: pyvtk.attention_scores(
                q, k, causal=True, query_reduce=("sum", "max"), reduce_order="heads_first"
            ),
            "eager": eager,
            "eager in place": in_place,
        },
        expect,
        limit=matmul_limit(operations(causal=True), dtype),
        bars={"best": 1.0},
    )


def window(keys, queries, dtype):
    """SnapKV: the last queries, summed, per key head."""

    def reduced(x):
        return x.sum(2).view(x.shape[0], 4, 7, -1).sum(2)

    def expect(q, k):
        x = exact(q, k, unseen(q, k), lambda p: p.sum(0))
        return close(x.view(x.shape[0], 4, 7, -1).sum(2), reduced(attention_map(q, k, unseen(q, k))))

    return Case(
        "score",
        f"SnapKV window of {queries}, group sum, 28/4 heads, N={keys}",
        dtype,
        cached(1, 28, 4, queries, keys, 128, dtype),
        {
            "pyvtk": lambda q, k: pyvtk.attention_scores(
                q, k, causal=True, query_reduce="sum", head_reduce="group_sum"
            ),
            "eager": lambda q, k: reduced(attention_map(q, k, unseen(q, k))),
            "grouped": lambda q, k: reduced(attention_map(q, k, unseen(q, k), grouped=True)),
            "grouped in place": lambda q, k: reduced(attention_map_in_place(q, k, unseen(q, k))),
        },
        expect,
        limit=matmul_limit(operations(causal=True), dtype),
        bars={"best": 1.0},
        memory=True,
    )


def probes(keys, dtype):
    """ZipVL: the last 5 % and random 5 % of the rows; the mean over the probes that see a key."""

    def inputs():
        q, k = cached(1, 28, 4, keys // 10, keys, 128, dtype)()
        last = keys // 20
        drawn = torch.randperm(keys - last)[: keys // 10 - last].sort().values
        return q, k, torch.cat([drawn, torch.arange(keys - last, keys)])

    def divide(sums, positions):
        seen = (positions[:, None] >= torch.arange(sums.shape[-1])).sum(0).clamp(min=1)
        return sums / seen

    def eager(q, k, positions, build=attention_map):
        return divide(build(q, k, unseen(q, k, positions)).mean(1).sum(1), positions)

    def expect(q, k, positions):
        exactly = exact(q, k, unseen(q, k, positions), lambda p: p.sum(0)).mean(1)
        return close(divide(exactly, positions), eager(q, k, positions))

    return Case(
        "score",
        f"ZipVL {keys // 10} probe rows, visible mean, 28/4 heads, N={keys}",
        dtype,
        inputs,
        {
            "pyvtk": lambda q, k, positions: pyvtk.attention_scores(
                q, k, causal=True, q_positions=positions.expand(1, -1), query_reduce="visible_mean"
            ),
            "eager": eager,
            "grouped in place": lambda q, k, positions: eager(q, k, positions, attention_map_in_place),
        },
        expect,
        limit=matmul_limit(lambda q, k, positions: 2.0 * q.shape[1] * q.shape[3] * (positions + 1).sum().item(), dtype),
        bars={"best": 1.0},
        memory=True,
    )


def all_rows(dtype, bars):
    """H2O and the papers that average the whole map: every row asks."""

    def eager(q, k):
        return attention_map(q, k, unseen(q, k)).mean((1, 2))

    return Case(
        "score",
        "all rows, causal, 8/2 heads, M=N=2880, D=64",
        dtype,
        cached(1, 8, 2, 2880, 2880, 64, dtype),
        {
            "pyvtk": lambda q, k: pyvtk.attention_scores(q, k, causal=True),
            "eager": eager,
            "eager in place": lambda q, k: attention_map_in_place(q, k, unseen(q, k)).mean((1, 2)),
            "head by head": lambda q, k: by_head(q, k, unseen(q, k)),
        },
        lambda q, k: close(exact(q, k, unseen(q, k), lambda p: p.mean(0)).mean(1), eager(q, k)),
        limit=matmul_limit(operations(causal=True), dtype),
        bars=bars,
        memory=True,
    )


def packed(dtype):
    """VScan on Qwen's tower: packed patches of one image, all rows, no mask."""
    tokens, heads, width = 3552, 16, 80

    def inputs():
        q, k = (torch.randn(tokens, heads, width).to(dtype) for _ in range(2))
        return q, k, torch.tensor([0, tokens], dtype=torch.int32)

    def batched(x):
        return x.transpose(0, 1)[None]

    def eager(q, k, cu):
        return attention_map(batched(q), batched(k)).mean((0, 1, 2))

    return Case(
        "score",
        "Qwen2.5-VL tower, packed, 16/16 heads, M=N=3552, D=80",
        dtype,
        inputs,
        {
            "pyvtk": lambda q, k, cu: pyvtk.attention_scores(
                q, k, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=tokens, max_seqlen_k=tokens
            ),
            "eager": eager,
            "eager in place": lambda q, k, cu: attention_map_in_place(batched(q), batched(k)).mean((0, 1, 2)),
            "head by head": lambda q, k, cu: by_head(batched(q), batched(k))[0],
        },
        lambda q, k, cu: close(exact(batched(q), batched(k), None, lambda p: p.mean(0)).mean((0, 1)), eager(q, k, cu)),
        limit=matmul_limit(lambda q, k, cu: 2.0 * tokens * tokens * heads * width, dtype),
        bars={"best": 1.0},
        memory=True,
    )


# ---- with gradients


def training(name, shape, dtype):
    """Forward and backward to queries and keys."""

    def inputs():
        q, k = (x.requires_grad_() for x in cached(*shape, dtype)())
        return q, k, torch.randn(shape[0], shape[4])

    def gradients(score):
        def call(q, k, grad):
            return torch.autograd.grad(
                score(q, k), (q, k), grad.to(torch.float64) if q.dtype == torch.float64 else grad
            )

        return call

    def eager(q, k):
        x = logits(q, k, grouped=True).masked_fill(unseen(q, k), float("-inf"))
        return x.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).mean((1, 2))

    def expect(q, k, grad):
        wide = [x.detach().double().requires_grad_() for x in (q, k)]
        return close(list(gradients(eager)(*wide, grad)), list(gradients(eager)(q, k, grad)))

    return Case(
        "score",
        name,
        dtype,
        inputs,
        {"pyvtk": gradients(lambda q, k: pyvtk.attention_scores(q, k, causal=True)), "eager": gradients(eager)},
        expect,
        limit=read_limit(lambda q, k, grad: k.detach()),
        bars={"eager": 1.0},
    )


CASES = [
    *LAST_TOKEN,
    *SCORE_AND_SELECT,
    *CLS,
    *[text_rows(queries, dtype) for queries in (20, 200) for dtype in BOTH],
    *[window(16384, 32, dtype) for dtype in BOTH],
    probes(4096, torch.float32),
    all_rows(torch.float32, {"best": 3.0, "memory": 0.02}),
    all_rows(torch.bfloat16, {"best": 1.0, "memory": 0.02}),
    packed(torch.float32),
    training("LLaVA-1.5 last token, forward and backward, 32/32 heads, N=640", (1, 32, 32, 1, 640, 128), torch.float32),
    training("PyramidDrop training, 8 x 32/32 heads, M=8, N=1024", (8, 32, 32, 8, 1024, 128), torch.float32),
]
