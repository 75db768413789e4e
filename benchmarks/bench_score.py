"""Scoring: how much attention each key receives. Peers build the attention map, as users of eager PyTorch do; on CUDA
also what torch.compile makes of that, and flash-colreduce. SDPA, which computes attention and no scores, is the floor
where all rows ask."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import pyvtk

from . import harness
from .harness import (
    BEST,
    DENSE,
    OURS,
    SHARE,
    TIME,
    Case,
    bandwidth_limit,
    close,
    made_on,
    marked,
    matmul_limit,
    read_limit,
)

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
        positions = torch.arange(keys - queries, keys, device=q.device)
    return positions[:, None] < torch.arange(keys, device=q.device)


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
    out = torch.zeros(batch, k.shape[2], device=q.device)
    x = torch.empty(queries, k.shape[2], device=q.device)
    for b in range(batch):
        for h in range(heads):
            torch.mm(q[b, h] * size**-0.5, k[b, h * k.shape[1] // heads].mT, out=x)
            if mask is not None:
                x.masked_fill_(mask, float("-inf"))
            out[b] += torch.softmax(x, -1, out=x).sum(0)
    return out / (heads * queries)


def rounded_by_head(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """Mean over queries and heads as eager code rounds it (logits in q's dtype), one head's map at a time."""
    group = q.shape[1] // k.shape[1]
    found = [
        attention_map(q[:, h : h + 1], k[:, h // group : h // group + 1], mask).mean((1, 2)) for h in range(q.shape[1])
    ]
    return torch.stack(found).mean(0)


def reading(device: str, of):
    """The limit of what reads these tensors once."""
    if device == "cpu":
        return read_limit(of)
    return bandwidth_limit(lambda *inputs: of(*inputs).nbytes, device)


def compiled_peers(device: str, providers: dict, *names: str) -> dict:
    """torch.compile of these providers, where that is a peer: on CUDA."""
    if device == "cpu":
        return {}
    return {f"compiled {name}": functools.partial(compiled_call, providers[name]) for name in names}


def compiled_call(function, *inputs):
    return harness.compiled(function)(*inputs)


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


def last_token(name, shape, dtype, bars, reduce="mean", make=cached, device="cpu"):
    def reduced(x):
        return x[:, :, 0].mean(1) if reduce == "mean" else x[:, :, 0].sum(1)

    providers = {
        "pyvtk": lambda q, k: pyvtk.attention_scores(q, k, head_reduce=reduce),
        "eager": lambda q, k: reduced(attention_map(q, k)),
    }
    if make is cached and shape[1] != shape[2]:
        providers["grouped"] = lambda q, k: reduced(attention_map(q, k, grouped=True))
    compiled = compiled_peers(device, providers, *list(providers)[1:])
    if dtype != torch.float32 and device == "cpu":
        # the better way where the processor has no instructions for bfloat16 products
        providers["float32 first"] = lambda q, k: reduced(attention_map_in_place(q, k))
    return Case(
        "score",
        name,
        dtype,
        made_on(device, make(*shape, dtype)),
        providers | compiled,
        lambda q, k: close(reduced(exact(q, k, None, lambda p: p)), providers["eager"](q, k)),
        limit=reading(device, lambda q, k: k),
        bars=bars,
        device=device,
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


def side_by_side(name, shape, dtype):
    """Keys as a projection leaves them, the heads of a token side by side in memory; the peer reads keys of each head
    on their own. Both get the same two tensors."""

    def inputs():
        q, k = cached(*shape, dtype)()
        return q, k, k.transpose(1, 2).contiguous().transpose(1, 2)

    return Case(
        "score",
        name,
        dtype,
        inputs,
        {
            "pyvtk": lambda q, k, beside: pyvtk.attention_scores(q, beside),
            "heads apart": lambda q, k, beside: pyvtk.attention_scores(q, k),
        },
        lambda q, k, beside: close(
            exact(q, k, None, lambda p: p)[:, :, 0].mean(1), attention_map(q, k)[:, :, 0].mean(1)
        ),
        limit=reading("cpu", lambda q, k, beside: k),
        bars={"heads apart": 0.87},  # 1.15 times as long at most
    )


SIDE_BY_SIDE = [
    side_by_side(f"last token, heads side by side, {heads}/{groups} heads, N={keys}, D={size}",
                 (1, heads, groups, 1, keys, size), dtype)
    for heads, groups, keys, size in ((16, 16, 2945, 64), (32, 32, 2945, 128), (28, 4, 4096, 128))
    for dtype in BOTH
]  # fmt: skip

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


def last_token_select(name, shape, keep, dtype, bars, device="cpu"):
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
    if shape[1] != shape[2]:
        providers["grouped + topk + sort"] = chain(grouped=True)
    compiled = compiled_peers(device, providers, *(name for name in providers if name.endswith("sort")))
    if dtype != torch.float32 and device == "cpu":
        providers["float32 first + topk + sort"] = lambda q, k: (
            attention_map_in_place(q, k)[:, :, 0].mean(1).topk(keep).indices.sort().values
        )
    return Case(
        "score",
        name,
        dtype,
        made_on(device, cached(*shape, dtype)),
        providers | compiled,
        lambda q, k: best_by(
            exact(q, k, None, lambda p: p)[:, :, 0].mean(1), attention_map(q, k)[:, :, 0].mean(1), keep
        ),
        limit=reading(device, lambda q, k: k),
        bars=bars,
        device=device,
    )


SCORE_AND_SELECT = [
    marked(
        last_token_select(
            "LLaVA-1.5 score and select 640 to 144, 32/32 heads",
            (1, 32, 32, 1, 640, 128),
            144,
            dtype,
            {"eager + topk + sort": bar},
        )
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


def text_rows(queries, dtype, device="cpu", keys=640):
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

    providers = {
        "pyvtk": lambda q, k: pyvtk.attention_scores(
            q, k, causal=True, query_reduce=("sum", "max"), reduce_order="heads_first"
        ),
        "eager": eager,
        "eager in place": in_place,
    }
    compiled = compiled_peers(device, providers, "eager")
    return Case(
        "score",
        f"MustDrop {queries} text rows, sum and max, 32/32 heads, N={keys}",
        dtype,
        made_on(device, cached(1, 32, 32, queries, keys, 128, dtype)),
        providers | compiled,
        expect,
        limit=matmul_limit(operations(causal=True), dtype, device),
        bars={"best": 1.0},
        device=device,
    )


def window(keys, queries, dtype, device="cpu"):
    """SnapKV: the last queries, summed, per key head."""

    def reduced(x):
        return x.sum(2).view(x.shape[0], 4, 7, -1).sum(2)

    def expect(q, k):
        x = exact(q, k, unseen(q, k), lambda p: p.sum(0))
        return close(x.view(x.shape[0], 4, 7, -1).sum(2), reduced(attention_map(q, k, unseen(q, k))))

    providers = {
        "pyvtk": lambda q, k: pyvtk.attention_scores(q, k, causal=True, query_reduce="sum", head_reduce="group_sum"),
        "eager": lambda q, k: reduced(attention_map(q, k, unseen(q, k))),
        "grouped": lambda q, k: reduced(attention_map(q, k, unseen(q, k), grouped=True)),
        "grouped in place": lambda q, k: reduced(attention_map_in_place(q, k, unseen(q, k))),
    }
    compiled = compiled_peers(device, providers, "grouped")
    return Case(
        "score",
        f"SnapKV window of {queries}, group sum, 28/4 heads, N={keys}",
        dtype,
        made_on(device, cached(1, 28, 4, queries, keys, 128, dtype)),
        providers | compiled,
        expect,
        limit=matmul_limit(operations(causal=True), dtype, device),
        bars={"best": 1.0},
        memory=True,
        device=device,
    )


def probes(keys, dtype, device="cpu"):
    """ZipVL: the last 5 % and random 5 % of the rows; the mean over the probes that see a key."""

    def inputs():
        q, k = cached(1, 28, 4, keys // 10, keys, 128, dtype)()
        last = keys // 20
        drawn = torch.randperm(keys - last)[: keys // 10 - last].sort().values
        return q, k, torch.cat([drawn, torch.arange(keys - last, keys)])

    def divide(sums, positions):
        key = torch.arange(sums.shape[-1], device=sums.device)
        seen = (positions[:, None] >= key).sum(0).clamp(min=1)
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
        made_on(device, inputs),
        {
            "pyvtk": lambda q, k, positions: pyvtk.attention_scores(
                q, k, causal=True, q_positions=positions.expand(1, -1), query_reduce="visible_mean"
            ),
            "eager": eager,
            "grouped in place": lambda q, k, positions: eager(q, k, positions, attention_map_in_place),
        },
        expect,
        limit=matmul_limit(
            lambda q, k, positions: 2.0 * q.shape[1] * q.shape[3] * (positions + 1).sum().item(), dtype, device
        ),
        bars={"best": 1.0},
        memory=True,
        device=device,
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


def packed(dtype, device="cpu", tokens=3552):
    """VScan on Qwen's tower: packed patches of one image, all rows, no mask."""
    heads, width = 16, 80

    def inputs():
        q, k = (torch.randn(tokens, heads, width).to(dtype) for _ in range(2))
        return q, k, torch.tensor([0, tokens], dtype=torch.int32)

    def batched(x):
        return x.transpose(0, 1)[None]

    def eager(q, k, cu):
        return attention_map(batched(q), batched(k)).mean((0, 1, 2))

    return Case(
        "score",
        f"Qwen2.5-VL tower, packed, 16/16 heads, M=N={tokens}, D=80",
        dtype,
        made_on(device, inputs),
        {
            "pyvtk": lambda q, k, cu: pyvtk.attention_scores(
                q, k, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=tokens, max_seqlen_k=tokens
            ),
            "eager": eager,
            "eager in place": lambda q, k, cu: attention_map_in_place(batched(q), batched(k)).mean((0, 1, 2)),
            "head by head": lambda q, k, cu: by_head(batched(q), batched(k))[0],
        },
        lambda q, k, cu: close(exact(batched(q), batched(k), None, lambda p: p.mean(0)).mean((0, 1)), eager(q, k, cu)),
        limit=matmul_limit(lambda q, k, cu: 2.0 * tokens * tokens * heads * width, dtype, device),
        bars={"best": 1.0},
        memory=True,
        device=device,
    )


# ---- all rows on a GPU: beside attention itself, which multiplies twice as much


def flash_colreduce_peer() -> tuple[dict, dict[str, str]]:
    """The peer, or why it is absent. It takes as many key heads as query heads, and scores each head."""
    if importlib.util.find_spec("flash_colreduce") is None:
        return {}, {"flash-colreduce": "not installed"}

    def call(q, k, v, lse):
        from flash_colreduce import flash_colreduce  # where it cannot be imported, that is this peer's failure

        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        return flash_colreduce(q, k, "sum", is_causal=True).float().mean(1) / q.shape[2]

    return {"flash-colreduce": call}, {}


def log_denominators(q: Tensor, k: Tensor) -> Tensor:
    """float32 [batch, heads, queries], a head at a time: what a forward pass of attention leaves behind."""
    mask, group, found = unseen(q, k), q.shape[1] // k.shape[1], []
    for h in range(q.shape[1]):
        x = q[:, h].float() @ k[:, h // group].float().mT * q.shape[-1] ** -0.5
        found.append(x.masked_fill_(mask, float("-inf")).logsumexp(-1))
    return torch.stack(found, 1)


def all_rows_beside_attention(tokens, bars, device="cuda", heads=(32, 8), size=128, dtype=torch.bfloat16):
    """Every row asks, given the denominators or not. The floors compute attention: their results are not compared."""

    def inputs():
        q, k = cached(1, *heads, tokens, tokens, size, dtype)()
        return q, k, torch.randn_like(k), log_denominators(q, k)

    def attention(backend):
        def call(q, k, v, lse):
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads[0] != heads[1])

        return call

    def eager(q, k, v, lse):
        return attention_map(q, k, unseen(q, k), grouped=True).mean((1, 2))

    floors = {"SDPA flash": attention(SDPBackend.FLASH_ATTENTION), "SDPA cuDNN": attention(SDPBackend.CUDNN_ATTENTION)}
    colreduce, absent = flash_colreduce_peer()
    providers = {
        OURS: lambda q, k, v, lse: pyvtk.attention_scores(q, k, causal=True, lse=lse),
        "without LSE": lambda q, k, v, lse: pyvtk.attention_scores(q, k, causal=True),
        "head by head": lambda q, k, v, lse: by_head(q, k, unseen(q, k)),
    }
    if 8 * heads[0] * tokens**2 < 8 << 30:
        providers["eager"] = eager
        providers |= compiled_peers(device, providers, "eager")
    else:
        absent |= {"eager": "tens of GiB"}
    providers |= colreduce | floors

    def expect(q, k, v, lse):
        mask = unseen(q, k)
        # flash-colreduce rounds the sum of each head to the dtype of q
        check = close(
            exact(q, k, mask, lambda p: p.mean(0)).mean(1),
            rounded_by_head(q, k, mask),
            answers={"flash-colreduce": dtype},
        )

        def of_scores(name, result):
            if name in floors:
                assert result.shape == q.shape and result.isfinite().all(), "no attention"
            else:
                check(name, result)

        return of_scores

    return Case(
        "score",
        f"all rows, causal, LSE given, {heads[0]}/{heads[1]} heads, M=N={tokens}, D={size}",
        dtype,
        made_on(device, inputs),
        providers,
        expect,
        limit=matmul_limit(lambda q, *rest: operations(causal=True)(q, rest[0]), dtype, device),
        bars=bars,
        device=device,
        absent=absent,
        dense=tuple(floors),
    )


# ---- with gradients


def training(name, shape, dtype, device="cpu"):
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
        made_on(device, inputs),
        {"pyvtk": gradients(lambda q, k: pyvtk.attention_scores(q, k, causal=True)), "eager": gradients(eager)},
        expect,
        limit=reading(device, lambda q, k, grad: k.detach()),
        bars={"eager": 1.0},
        device=device,
    )


CASES = [
    *LAST_TOKEN,
    *SCORE_AND_SELECT,
    *SIDE_BY_SIDE,
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


def on_cuda(device: str = "cuda") -> list[Case]:
    bf16, best, chain = torch.bfloat16, {BEST: 1.0}, "compiled eager + topk + sort"
    floor = {DENSE: 1 / 0.7}  # 0.7 of the time of the faster attention
    return [
        marked(last_token_select("LLaVA-1.5 score and select 640 to 144, 32/32 heads", (1, 32, 32, 1, 640, 128), 144,
                                 bf16, {TIME: 15e-6, chain: 4.0}, device)),
        marked(last_token_select("LLaVA-NeXT score and select, batch 16, 2950 to 720, 32/32 heads",
                                 (16, 32, 32, 1, 2950, 128), 720, bf16, {SHARE: 0.7}, device)),
        last_token_select("Qwen2-VL score and select 4096 to 1024, 28/4 heads", (1, 28, 4, 1, 4096, 128), 1024, bf16,
                          best, device),
        marked(last_token_select("Qwen2-VL score and select 16384 to 4096, 28/4 heads", (1, 28, 4, 1, 16384, 128), 4096,
                                 bf16, best, device), 2),
        last_token("LLaVA-1.5 last token, 32/32 heads, N=640", (1, 32, 32, 1, 640, 128), bf16, best, device=device),
        last_token("Qwen2-VL last token, 28/4 heads, N=4096", (1, 28, 4, 1, 4096, 128), bf16, best, device=device),
        last_token("HiRED CLS row, 5 crops x 16 heads, N=577, D=64", (5, 16, 577, 64), bf16, best, "sum", tower,
                   device),
        marked(text_rows(20, bf16, device), 2),
        text_rows(200, bf16, device),
        *[window(keys, 32, bf16, device) for keys in (4096, 16384)],
        probes(4096, bf16, device),
        *[marked(all_rows_beside_attention(tokens, floor, device)) for tokens in (2880, 16384)],
        packed(bf16, device),
        training("PyramidDrop training, 8 x 32/32 heads, M=8, N=1024", (8, 32, 32, 8, 1024, 128), bf16, device),
        training("all rows, forward and backward, 8/2 heads, M=N=2880, D=64", (1, 8, 2, 2880, 2880, 64), bf16, device),
    ]  # fmt: skip


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else CASES
