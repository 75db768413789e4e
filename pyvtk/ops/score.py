"""``attention_scores``: how much attention does each key receive? The queries x keys map is never built."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from pyvtk import _numbers, backends, checks, transforms
from pyvtk.reference import score as reference

QUERY_REDUCES = ("mean", "sum", "max", "visible_mean")
HEAD_REDUCES = ("mean", "sum", "max", "group", "group_mean", "group_sum", "group_max", None)

_OPTIONS = (
    "Tensor? q_positions, Tensor? k_positions, Tensor? q_mask, Tensor? k_mask, Tensor? k_bias, Tensor? head_weights, "
)
_SCHEMA = (
    f"(Tensor q, Tensor k, {_OPTIONS}Tensor? lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, "
    "SymInt key_start, SymInt key_stop, bool range_denominator, float scale, str query_reduce, str head_reduce, "
    "bool heads_first, bool logit, bool return_lse) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_linear, Tensor? grad_max, Tensor? max_query, Tensor? grad_lse, Tensor lse, Tensor q, Tensor k, "
    f"{_OPTIONS}Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, SymInt key_start, SymInt key_stop, "
    "bool range_denominator, bool lse_given, float scale, bool logit, SymInt pair_max_heads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def out_heads(q_heads: int, kv_heads: int, head_reduce: str) -> int:
    """Heads of the result."""
    return q_heads if head_reduce == "none" else (kv_heads if head_reduce.startswith("group_") else 1)


def _fake(
    q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse, cu_seqlens_q, cu_seqlens_k, causal,
    key_start, key_stop, range_denominator, scale, query_reduce, head_reduce, heads_first, logit, return_lse,
):  # fmt: skip
    packed = cu_seqlens_q is not None
    batch = 1 if packed else q.shape[0]
    q_heads, kv_heads = q.shape[1], k.shape[1]
    queries = q.shape[0] if packed else q.shape[2]
    columns = k.shape[0] if packed else key_stop - key_start
    reduces = query_reduce.split(",")
    heads = out_heads(q_heads, kv_heads, head_reduce)
    shape = (len(reduces), batch, heads, columns)
    head_max = head_reduce in ("max", "group_max")
    pairwise = heads_first and head_reduce != "none" and ("max" in reduces or head_max)
    return (
        q.new_empty(shape, dtype=torch.float32),
        q.new_empty((0,) if logit and not return_lse else (batch, q_heads, queries), dtype=torch.float32),
        q.new_empty((len(reduces), batch, columns), dtype=torch.float32),
        q.new_empty((batch, heads if pairwise else q_heads, columns) if "max" in reduces else (0,), dtype=torch.int32),
        q.new_empty(shape if head_max else (0,), dtype=torch.int32),
    )


def _fake_backward(
    grad_linear, grad_max, max_query, grad_lse, lse, q, k, q_positions, k_positions, q_mask, k_mask, k_bias,
    head_weights, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, lse_given, scale, logit,
    pair_max_heads,
):  # fmt: skip
    packed = cu_seqlens_q is not None
    batch = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
    columns = k.shape[0] if packed else k.shape[0] * k.shape[2]
    rows = q.shape[0] * q.shape[1] if packed else q.shape[0] * q.shape[1] * q.shape[2]
    return (
        q.new_empty(q.shape, dtype=torch.float32),
        q.new_empty(k.shape, dtype=torch.float32),
        q.new_empty((0 if k_bias is None else columns,), dtype=torch.float32),
        q.new_empty((rows if lse_given else 0,), dtype=torch.float32),
        q.new_empty((batch, q.shape[1]), dtype=torch.float32),
    )


# The batch is the outermost axis of all of these.
PER_SAMPLE = dict.fromkeys(
    ("q", "k", "q_positions", "k_positions", "q_mask", "k_mask", "k_bias", "head_weights", "lse"), 0
)


def does_not_fold(arguments: dict, mapped: dict) -> bool:
    """Whether a batch cannot grow: packed samples, and weights of heads that all samples share."""
    weights = arguments["head_weights"]
    shared = weights is not None and weights.dim() - transforms.is_mapped(mapped["head_weights"]) == 1
    return shared or arguments["cu_seqlens_k"] is not None


backends.define(
    "attention_scores", _SCHEMA, fake=_fake, dtypes=backends.HALF_AND_SINGLE, triton="score", leave_open="scale",
    vmap=transforms.Fold(PER_SAMPLE, (1, 0, 1, 0, 1), does_not_fold),
)  # fmt: skip
backends.define(
    "attention_scores_backward", _BACKWARD_SCHEMA, fake=_fake_backward, dtypes=backends.HALF_AND_SINGLE,
    triton="score_backward", leave_open="scale",
    vmap=transforms.Fold(
        PER_SAMPLE | dict.fromkeys(("grad_linear", "grad_max", "max_query", "grad_lse"), 0), (0,) * 5, does_not_fold
    ),
)  # fmt: skip


def _fake_plain(q, k, causal, scale, query_reduce, head_reduce):
    heads = out_heads(q.shape[1], k.shape[1], head_reduce)
    return q.new_empty((len(query_reduce.split(",")), q.shape[0], heads, k.shape[2]), dtype=torch.float32)


# attention_scores of the usual call: handing over twenty-one arguments and allocating what only a gradient needs takes
# longer than scoring a thousand keys. torch.compile has no use for it.
backends.define(
    "attention_scores_plain",
    "(Tensor q, Tensor k, bool causal, float scale, str query_reduce, str head_reduce) -> Tensor",
    fake=_fake_plain,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold({"q": 0, "k": 0}, (1,)),
    lean=True,
)
_plain = torch.ops.pyvtk.attention_scores_plain.default
# not .default: an open scale (pyvtk/_numbers.py) has an overload of its own
_compiled = torch.ops.pyvtk.attention_scores
_triton = torch.ops.pyvtk.attention_scores_triton
_BEYOND_PLAIN = ("q_positions", "k_positions", "q_mask", "k_mask", "k_bias", "head_weights", "lse", "cu_seqlens_q")


def plain_arguments(q: Tensor, k: Tensor, options: dict) -> tuple | None:
    """Arguments of the plain operators after q and k, or None if the options or a gradient ask for more."""
    for name in _BEYOND_PLAIN:
        if options[name] is not None:
            return None
    if (
        options["heads_first"] or options["logit"] or options["key_start"] != 0 or options["key_stop"] != k.shape[2]
        or torch.compiler.is_compiling() or transforms.wants_gradient(q, k)
    ):  # fmt: skip
        return None
    return options["causal"], options["scale"], ",".join(options["query_reduce"]), options["head_reduce"]


def _setup_context(ctx, inputs, output):
    tensors = inputs[:11]
    causal, key_start, key_stop, range_denominator, scale, reduces, head_reduce, heads_first, logit, _ = inputs[11:]
    _, lse, divisors, query_winners, head_winners = output
    ctx.mark_non_differentiable(divisors, query_winners, head_winners)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, divisors, query_winners, head_winners)
    ctx.range = (causal, key_start, key_stop, range_denominator)
    ctx.scale, ctx.logit = scale, logit
    ctx.reduces, ctx.head_reduce, ctx.heads_first = reduces.split(","), head_reduce, heads_first


def _to_heads(grad: Tensor, winners: Tensor | None, q_heads: int, head_reduce: str) -> Tensor:
    """Gradient of a result [batch, out_heads, keys] -> gradient of each head's part in it [batch, q_heads, keys]."""
    if head_reduce == "none":
        return grad
    per_out = q_heads // grad.shape[1]
    spread = grad.repeat_interleave(per_out, 1, output_size=q_heads)
    if winners is not None:
        head = torch.arange(q_heads, dtype=torch.int32, device=grad.device)[:, None]
        return spread * (winners.repeat_interleave(per_out, 1, output_size=q_heads) == head)
    return spread / per_out if head_reduce.endswith("mean") else spread


def _backward(operator: str, ctx, grad_scores, grad_lse, *_):
    """Gradients of all inputs, by the operator of this name."""
    *inputs, lse, divisors, query_winners, head_winners = ctx.saved_tensors
    (q, k, q_positions, k_positions, q_mask, k_mask, k_bias, head_weights, lse_given, *cu_seqlens) = inputs
    q_heads = q.shape[1]
    head_max = ctx.head_reduce in ("max", "group_max")
    # Heads reduced by a maximum for every pair leave no winner per key to save: the kernel finds the winners again.
    pairwise_max = ctx.heads_first and head_max
    linear = grad_max = max_query = None
    if grad_scores is None:
        grad_scores = q.new_zeros((len(ctx.reduces), *divisors.shape[1:2], 1, divisors.shape[2]), dtype=torch.float32)
        grad_scores = grad_scores.expand(-1, -1, head_winners.shape[2] if head_max else q_heads, -1)
        ctx.head_reduce = ctx.head_reduce if head_max else "none"
    for i, reduce in enumerate(ctx.reduces):
        if reduce == "max":
            winners = head_winners[i] if head_max else None
            grad_max = _to_heads(grad_scores[i], winners, q_heads, ctx.head_reduce).contiguous()
            per_slot = q_heads // query_winners.shape[1]
            max_query = query_winners.repeat_interleave(per_slot, 1, output_size=q_heads).contiguous()
        else:
            winners = head_winners[i] if head_max and not pairwise_max else None
            part = _to_heads(grad_scores[i] / divisors[i][:, None], winners, q_heads, ctx.head_reduce)
            linear = part if linear is None else linear + part
    if linear is None:
        linear, pairwise_max = torch.zeros_like(grad_max), False
    pair_max_heads = (k.shape[1] if ctx.head_reduce == "max" else 1) if pairwise_max else 0
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    # The one that was given, and not its copy in the output, by which a second gradient would not find back.
    lse = lse if lse_given is None else lse_given.reshape(lse.shape)
    grad_q, grad_k, grad_bias, grad_lse_given, grad_weights = getattr(torch.ops.pyvtk, operator)(
        linear.contiguous(), grad_max, max_query, grad_lse, lse, q, k, q_positions, k_positions, q_mask, k_mask,
        k_bias, head_weights, *cu_seqlens, *ctx.range, lse_given is not None, ctx.scale, ctx.logit, pair_max_heads,
    )  # fmt: skip
    if head_weights is None:
        grad_weights = None
    elif head_weights.dim() == 1:
        grad_weights = grad_weights.sum(0)
    return (
        grad_q.to(q.dtype), grad_k.to(k.dtype), None, None, None, None,
        None if k_bias is None else grad_bias.view(k_bias.shape), grad_weights,
        None if lse_given is None else grad_lse_given.view(lse_given.shape), *(None,) * 12,
    )  # fmt: skip


def _second_order(
    grad_linear, grad_max, max_query, grad_lse, lse, q, k, q_positions, k_positions, q_mask, k_mask, k_bias,
    head_weights, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator, lse_given, *rest,
):  # fmt: skip
    """Arguments of the backward operator as its outputs are: lse if it was given, weights of heads for each sample."""
    if head_weights is not None and head_weights.dim() == 1:
        samples = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        head_weights = head_weights.expand(samples, -1)
    return (
        grad_linear, grad_max, max_query, grad_lse, lse if lse_given else None, q, k, q_positions, k_positions, q_mask,
        k_mask, k_bias, head_weights, cu_seqlens_q, cu_seqlens_k, causal, key_start, key_stop, range_denominator,
        lse_given, *rest,
    )  # fmt: skip


def _register_gradient(name: str, backward_name: str) -> None:
    """Let operator ``backward_name`` form the gradients of ``name``."""
    backward = functools.partial(_backward, backward_name)
    transforms.gradient(name, backward, setup_context=_setup_context)
    wanted = ("q", "k", "k_bias", "lse", "head_weights")
    transforms.second_gradient(backward_name, reference.weighed_sum, wanted, _second_order)


_register_gradient("attention_scores", "attention_scores_backward")
_register_gradient("attention_scores_triton", "attention_scores_backward_triton")


def _per_token(op: str, name: str, value, shape: tuple, meaning: str, dtypes: tuple, like: Tensor, one_row=False):
    """A checked per-query or per-key argument, contiguous; None stays None."""
    if value is None:
        return None
    checks.tensor(op, name, value)
    checks.dtype(op, name, value, dtypes)
    checks.same_device(op, name, value, like, "q")
    if one_row and value.dim() == 1 and len(shape) == 2:
        checks.shape(op, name, value, shape[1:], meaning)
        value = value.expand(shape)
    checks.shape(op, name, value, shape, meaning)
    return value.contiguous()


def resolve(
    op: str, q, k, *, causal, q_positions, k_positions, q_mask, k_mask, k_bias, key_range, denominator, lse, scale,
    query_reduce, head_reduce, head_weights, reduce_order, quantity, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
    max_seqlen_k,
) -> dict:  # fmt: skip
    """Check the scoring arguments of ``op`` and turn them into keyword arguments of operator and reference.

    A tiny input takes no longer than the checks of its arguments, so a default is not handed to a helper.
    """
    checks.tensor(op, "q", q)
    checks.dtype(op, "q", q, checks.FLOATS)
    checks.tensor(op, "k", k)
    checks.dtype(op, "k", k, checks.FLOATS)
    q_shape, k_shape = q.shape, k.shape
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed and (cu_seqlens_q is None or cu_seqlens_k is None):
        raise ValueError(f"{op}: cu_seqlens_q and cu_seqlens_k must be given together")
    layout = "[tokens, heads, dim]" if packed else "[batch, heads, tokens, dim]"
    for name, value, shape in (("q", q, q_shape), ("k", k, k_shape)):
        if len(shape) != (3 if packed else 4):
            raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(shape)}")
        if value.stride(-1) != 1 and shape[-1] > 1:
            raise ValueError(f"{op}: {name} must be contiguous in its last dimension, got strides {value.stride()}")
    if k.dtype != q.dtype:
        raise TypeError(f"{op}: k must have the dtype of q ({q.dtype}), got {k.dtype}")
    if k.device != q.device:
        checks.same_device(op, "k", k, q, "q")
    dim = q_shape[-1]
    if k_shape[-1] != dim:
        raise ValueError(f"{op}: k must have the head dimension of q ({dim}), got {k_shape[-1]}")
    if dim % 8 or not 8 <= dim <= 256:
        raise ValueError(f"{op}: q must have a head dimension that is a multiple of 8 up to 256, got {dim}")
    if k_shape[1] < 1 or q_shape[1] % k_shape[1]:
        raise ValueError(f"{op}: q must have a multiple of k's heads ({k_shape[1]}), got {q_shape[1]}")
    if not packed and q_shape[0] != k_shape[0]:
        raise ValueError(f"{op}: k must have the batch size of q ({q_shape[0]}), got {k_shape[0]}")

    if packed:
        rows, columns, row_text, column_text = (q_shape[0],), (k_shape[0],), "[queries]", "[keys]"
        keys = k_shape[0]
        for name, value in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            checks.tensor(op, name, value, 1)
            checks.dtype(op, name, value, checks.INTEGERS)
            checks.same_device(op, name, value, q, "q")
            if value.shape[0] < 1:
                raise ValueError(f"{op}: {name} must be [batch + 1], got shape {tuple(value.shape)}")
        if cu_seqlens_q.shape[0] != cu_seqlens_k.shape[0]:
            raise ValueError(
                f"{op}: cu_seqlens_k must have as many entries as cu_seqlens_q ({cu_seqlens_q.shape[0]}), "
                f"got {cu_seqlens_k.shape[0]}"
            )
        cu_seqlens_q = checks.to_int32(cu_seqlens_q).contiguous()
        cu_seqlens_k = checks.to_int32(cu_seqlens_k).contiguous()
    else:
        rows, columns = (q_shape[0], q_shape[2]), (k_shape[0], k_shape[2])
        row_text, column_text = "[batch, queries]", "[batch, keys]"
        keys = k_shape[2]
    if max_seqlen_q is not None or max_seqlen_k is not None:
        for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
            if value is not None:
                checks.integer(op, name, value)
                if not packed:
                    raise ValueError(f"{op}: {name} must come with cu_seqlens_q and cu_seqlens_k, got {value}")

    if causal is not False:
        checks.boolean(op, "causal", causal)
    if not causal and (q_positions is not None or k_positions is not None):
        raise ValueError(f"{op}: q_positions and k_positions must come with causal=True, which alone reads them")
    if q_positions is not None:
        q_positions = _per_token(op, "q_positions", q_positions, rows, row_text, checks.INTEGERS, q, one_row=True)
    if k_positions is not None:
        k_positions = _per_token(op, "k_positions", k_positions, columns, column_text, checks.INTEGERS, q, one_row=True)
    if q_mask is not None:
        q_mask = _per_token(op, "q_mask", q_mask, rows, row_text, (torch.bool,), q)
    if k_mask is not None:
        k_mask = _per_token(op, "k_mask", k_mask, columns, column_text, (torch.bool,), q)
    if k_bias is not None:
        k_bias = _per_token(op, "k_bias", k_bias, columns, column_text, checks.FLOATS, q)

    if key_range is None:
        key_start, key_stop = 0, keys
    else:
        if packed:
            raise ValueError(f"{op}: key_range must be None for packed input, whose samples differ in length")
        if not isinstance(key_range, (tuple, list)) or len(key_range) != 2:
            raise TypeError(f"{op}: key_range must be a pair (start, stop), got {key_range!r}")
        key_start, key_stop = key_range
        checks.integer(op, "key_range", key_start)
        checks.integer(op, "key_range", key_stop)
        if not key_start <= key_stop <= keys:
            raise ValueError(f"{op}: key_range must lie in 0..{keys} and ascend, got {tuple(key_range)}")
    if denominator != "visible":
        checks.choice(op, "denominator", denominator, ("visible", "range"))
    if quantity != "probability":
        checks.choice(op, "quantity", quantity, ("probability", "logit"))
    if lse is not None:
        if denominator == "range":
            raise ValueError(f"{op}: lse must be None with denominator='range', which it would replace")
        if quantity == "logit":
            raise ValueError(f"{op}: lse must be None with quantity='logit', which has no denominator")
        lse_shape = (q.shape[1], q.shape[0]) if packed else tuple(q.shape[:3])
        lse_text = "[heads, queries]" if packed else "[batch, heads, queries]"
        lse = _per_token(op, "lse", lse, lse_shape, lse_text, checks.FLOATS, q)
    if scale is None:
        scale = dim**-0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    else:
        scale = _numbers.argument(float(scale))

    if isinstance(query_reduce, str):
        checks.choice(op, "query_reduce", query_reduce, QUERY_REDUCES)
        reduces = (query_reduce,)
    elif isinstance(query_reduce, (tuple, list)):
        for reduce in query_reduce:
            checks.choice(op, "query_reduce", reduce, QUERY_REDUCES)
        if not query_reduce or len(set(query_reduce)) != len(query_reduce):
            raise ValueError(f"{op}: query_reduce must name each reduction once, got {query_reduce!r}")
        reduces = tuple(query_reduce)
    else:
        raise TypeError(f"{op}: query_reduce must be a name or a tuple of names, got {query_reduce!r}")
    if head_reduce != "mean":
        checks.choice(op, "head_reduce", head_reduce, HEAD_REDUCES)
        head_reduce = {"group": "group_mean", None: "none"}.get(head_reduce, head_reduce)
    if reduce_order != "queries_first":
        checks.choice(op, "reduce_order", reduce_order, ("queries_first", "heads_first"))
    if head_weights is not None:
        checks.tensor(op, "head_weights", head_weights)
        checks.dtype(op, "head_weights", head_weights, checks.FLOATS)
        checks.same_device(op, "head_weights", head_weights, q, "q")
        samples = cu_seqlens_q.shape[0] - 1 if packed else q.shape[0]
        per_sample = head_weights.dim() == 2
        if packed and per_sample:
            raise ValueError(f"{op}: head_weights must be [heads] for packed input, got {tuple(head_weights.shape)}")
        expected = (samples, q.shape[1]) if per_sample else (q.shape[1],)
        checks.shape(op, "head_weights", head_weights, expected, "[batch, heads]" if per_sample else "[heads]")
        head_weights = head_weights.contiguous()
    return {
        "q_positions": q_positions, "k_positions": k_positions, "q_mask": q_mask, "k_mask": k_mask, "k_bias": k_bias,
        "head_weights": head_weights, "lse": lse, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "causal": causal, "key_start": key_start, "key_stop": key_stop, "range_denominator": denominator == "range",
        "scale": scale, "query_reduce": reduces, "head_reduce": head_reduce,
        "heads_first": reduce_order == "heads_first", "logit": quantity == "logit",
    }  # fmt: skip


def kernel_arguments(options: dict) -> tuple:
    """The options of :func:`resolve` in the order and the dtypes of the compiled operators."""
    converted = dict(options)
    for name in _FLOATS_OF_KERNELS:
        if converted[name] is not None:
            converted[name] = converted[name].float()
    at_query, at_key = converted["q_positions"], converted["k_positions"]
    if at_query is not None or at_key is not None:
        converted["q_positions"], converted["k_positions"] = _kernel_positions(at_query, at_key)
    converted["query_reduce"] = ",".join(converted["query_reduce"])
    return tuple(converted.values())


_FLOATS_OF_KERNELS = ("k_bias", "head_weights", "lse")


def _kernel_positions(at_query: Tensor | None, at_key: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Positions as the int32 of kernels, by which every query sees the keys that it saw before.

    int32's extremes stay free: kernels keep a masked key as one that stands at the largest, where no query is.
    """
    if at_query is not None and at_key is not None:
        at_query, at_key = checks.ranks(at_query, at_query, at_key)
        return at_query, at_key
    # The other side stands at its places in the sequence, numbers of tokens: what is cut off lies beyond them all.
    given = (at_key if at_query is None else at_query).clamp(1 - 2**31, 2**31 - 2).to(torch.int32)
    return (None, given) if at_query is None else (given, None)


def shape_scores(scores: Tensor, packed: bool, several: bool, head_reduce: str | None) -> Tensor:
    """[reductions, batch, out_heads, keys] without the dimensions that the caller did not ask for."""
    if packed:
        scores = scores.squeeze(1)
    if head_reduce in ("mean", "sum", "max"):
        scores = scores.squeeze(-2)
    return scores if several else scores.squeeze(0)


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    q_positions: Tensor | None = None,
    k_positions: Tensor | None = None,
    q_mask: Tensor | None = None,
    k_mask: Tensor | None = None,
    k_bias: Tensor | None = None,
    key_range: tuple[int, int] | None = None,
    denominator: str = "visible",
    lse: Tensor | None = None,
    scale: float | None = None,
    query_reduce: str | tuple[str, ...] = "mean",
    head_reduce: str | None = "mean",
    head_weights: Tensor | None = None,
    reduce_order: str = "queries_first",
    quantity: str = "probability",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that each key receives from the given queries, reduced over queries and heads.

    The map of queries x keys is never built by compiled backends: extra memory grows with queries + keys. The formula
    is in :mod:`pyvtk.reference.score`. It covers, among others, the scores of FastV and PyramidDrop (last row, mean),
    FEATHER (denominator="range"), MustDrop (several rows, ("sum", "max"), heads_first), SnapKV (last rows, "sum",
    "group_mean"), HiRED and VisionZip (CLS row, head "sum"), ZipVL ("visible_mean" over probe rows).

    Args:
        q: [batch, q_heads, queries, dim], only the scoring queries, after RoPE; packed [total_q, q_heads, dim].
            float32, bfloat16, float16 (float64: reference only). dim a multiple of 8 up to 256. Any strides with a
            contiguous last dimension, so a view of the last row costs nothing. Under autocast q and k take its dtype.
        k: [batch, kv_heads, keys, dim]; packed [total_k, kv_heads, dim]. q_heads is a multiple of kv_heads; query head
            h reads key head h // (q_heads / kv_heads).
        causal: a key is seen if its position is at most the query's.
        q_positions, k_positions: int [batch, queries] / [batch, keys], or without the batch; packed [total]. Order in
            the sequence, any int64; by default 0..keys-1, and the last query stands at the last key.
        q_mask, k_mask: bool [batch, queries] / [batch, keys]; packed [total]. False: does not exist, whatever it holds.
        k_bias: [batch, keys], added to the scaled logits (ToMe's log size, say). Differentiable.
        key_range: (start, stop): score these keys only.
        denominator: softmax over all "visible" keys, or over the visible ones inside key_range ("range").
        lse: [batch, q_heads, queries], packed [q_heads, total_q]: natural log of the sum of exp of the scaled logits,
            as FlashAttention returns it; replaces the denominator. Differentiable.
        scale: of the logits; None: dim ** -0.5.
        query_reduce: "mean" over valid queries, "sum", "max", "visible_mean" over the queries that see the key; or a
            tuple of them, whose results are stacked in front.
        head_reduce: "mean", "sum", "max"; "group_mean" (short: "group"), "group_sum", "group_max" over the query
            heads of each key head; None keeps all query heads.
        head_weights: [q_heads] or [batch, q_heads], multiplied before any reduction. Differentiable.
        reduce_order: "queries_first", or "heads_first" for every pair of query and key (matters with max only).
        quantity: "probability", or "logit": the scaled logits themselves; a key that nobody sees gets -inf.
        cu_seqlens_q, cu_seqlens_k: int [batch + 1], where packed samples begin, and the total.
        max_seqlen_q, max_seqlen_k: bounds on a packed sample's length, for backends that size their launch by it.
        return_lse: also return the lse of the chosen denominator (float32 [batch, q_heads, queries]; -inf where a query
            sees nothing). Differentiable.
        backend: "compiled", "triton", "reference", or None for the first that can run.

    Returns:
        float32 scores (float64 for float64): [batch, keys]; with head_reduce None [batch, q_heads, keys], by group
        [batch, kv_heads, keys]; packed without the batch dimension; with a tuple of query_reduce, stacked in front.
        With return_lse a tuple (scores, lse).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape; the message names it.
        RuntimeError: the named backend cannot run, or cu_seqlens do not ascend to the total.
    """
    if backends.any_autocast():
        q, k = backends.autocast(q), backends.autocast(k)
    options = resolve(
        "attention_scores", q, k, causal=causal, q_positions=q_positions, k_positions=k_positions, q_mask=q_mask,
        k_mask=k_mask, k_bias=k_bias, key_range=key_range, denominator=denominator, lse=lse, scale=scale,
        query_reduce=query_reduce, head_reduce=head_reduce, head_weights=head_weights, reduce_order=reduce_order,
        quantity=quantity, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    checks.boolean("attention_scores", "return_lse", return_lse)
    differentiable = (q, k, k_bias, lse, head_weights)
    chosen = backends.pick("attention_scores", backend, q, q.dtype, differentiable)
    plain = None if return_lse or chosen != "compiled" else plain_arguments(q, k, options)
    if chosen == "reference":
        scores, lse_out = reference.attention_scores(q, k, **options)
    elif plain is not None:
        scores = _plain(q, k, *plain)
    else:
        operator = _triton if chosen == "triton" else _compiled
        scores, lse_out, *_ = transforms.call(operator, differentiable, q, k, *kernel_arguments(options), return_lse)
    packed = cu_seqlens_q is not None
    scores = shape_scores(scores, packed, not isinstance(query_reduce, str), head_reduce)
    if not return_lse:
        return scores
    if lse is not None:
        return scores, lse
    return scores, lse_out.squeeze(0) if packed else lse_out
