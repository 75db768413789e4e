"""Visual tokens that attend to their neighbours: ``neighbor_attention``, ``merge_attention``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pyvtk import _numbers, backends, checks, transforms
from pyvtk.ops import text_attention
from pyvtk.plans import AttentionPlan
from pyvtk.reference import attention as reference

# In every schema: ``plan`` and ``rule`` are those of pyvtk/plans.py (AttentionPlan.tensors() and rule()); k_bias is
# float32 [batch, keys]; visual_heads bool [heads], False where visual keys get no weight: after the softmax with
# keep_mass, else before it; zero_rows: these heads' visual queries see nothing.
_OPTIONS = "Tensor[] plan, SymInt[] rule, float scale, bool keep_mass, bool zero_rows"
_SCHEMA = f"(Tensor q, Tensor k, Tensor v, Tensor? k_bias, Tensor? visual_heads, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD_SCHEMA = (
    "(Tensor? grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? k_bias, Tensor? visual_heads, "
    f"Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _like_queries(q: Tensor) -> Tensor:
    """Uninitialised [batch, heads, queries, channels], tokens or heads outermost in memory as they are in q."""
    batch, heads, queries, dim = q.shape
    if q.stride(1) < q.stride(2):
        return q.new_empty((batch, queries, heads, dim)).transpose(1, 2)
    return q.new_empty((batch, heads, queries, dim))


def _fake(q, k, v, k_bias, visual_heads, plan, rule, scale, keep_mass, zero_rows):
    return _like_queries(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad_out, grad_lse, q, k, v, k_bias, visual_heads, out, lse, plan, rule, scale, keep_mass, zero_rows
):  # fmt: skip
    bias = q.new_empty(0 if k_bias is None else k_bias.shape, dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), bias


# torch.vmap goes into the heads, so that all of them share the plan.
_HEADS = {"q": 1, "k": 1, "v": 1, "visual_heads": 0}
_GRADIENTS = {"grad_out": 1, "grad_lse": 1, "out": 1, "lse": 1}


def _has_bias(arguments: dict, mapped: dict) -> bool:
    """Whether there is a gradient that is a sum over heads."""
    return arguments["k_bias"] is not None


_KERNELS = {"dtypes": backends.HALF_AND_SINGLE, "triton": "attention", "leave_open": "scale"}
backends.define("neighbor_attention", _SCHEMA, fake=_fake, vmap=transforms.Fold(_HEADS, (1, 1)), **_KERNELS)
backends.define(
    "neighbor_attention_backward", _BACKWARD_SCHEMA, fake=_backward_fake,
    vmap=transforms.Fold(_HEADS | _GRADIENTS, (1, 1, 1, 1), _has_bias), **_KERNELS,
)  # fmt: skip


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, k_bias, visual_heads, plan, *ctx.options = inputs
    ctx.plan_length = len(plan)
    ctx.save_for_backward(q, k, v, k_bias, visual_heads, *output, *plan)
    ctx.set_materialize_grads(False)


def _register_gradient(name: str, backward_name: str) -> None:
    """Let operator ``backward_name`` form the gradients of ``name``."""

    def backward(ctx, grad_out, grad_lse):
        q, k, v, k_bias, visual_heads, out, lse, *plan = ctx.saved_tensors
        none = [None] * ctx.plan_length
        if grad_out is None and grad_lse is None:
            return None, None, None, None, None, none, None, None, None, None
        if grad_out is not None and grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        if grad_lse is not None:
            grad_lse = grad_lse.contiguous()
        *grads, bias = getattr(torch.ops.pyvtk, backward_name)(
            grad_out, grad_lse, q, k, v, k_bias, visual_heads, out, lse, plan, *ctx.options
        )
        return *grads, None if k_bias is None else bias, None, none, None, None, None, None

    transforms.gradient(name, backward, setup_context=_setup_context)
    transforms.second_gradient(backward_name, reference.weighed_attention, ("q", "k", "v", "k_bias"))


_register_gradient("neighbor_attention", "neighbor_attention_backward")
_register_gradient("neighbor_attention_triton", "neighbor_attention_backward_triton")


def _check(q, k, v, plan, scale, k_bias, visual_heads, visual_mass, visual_rows, return_lse) -> None:
    op = "neighbor_attention"
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"{op}: plan must be an AttentionPlan, got {type(plan).__name__}")
    meaning = "[tokens, heads, channels]" if plan.packed else "[batch, heads, tokens, channels]"
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(op, name, x)
        if x.dim() != (3 if plan.packed else 4):
            raise ValueError(f"{op}: {name} must be {meaning} for this plan, got shape {tuple(x.shape)}")
        checks.dtype(op, name, x, checks.FLOATS)
        checks.same_device(op, name, x, plan.query_slots, "the plan")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    checks.shape(op, "v", v, tuple(k.shape), "shaped like k")
    dim = q.shape[-1]
    if dim < 8 or dim > 256 or dim % 8:
        raise ValueError(f"{op}: q must have a multiple of 8 channels up to 256, got {dim}")
    if k.shape[-1] != dim:
        raise ValueError(f"{op}: k must have q's {dim} channels, got {k.shape[-1]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{op}: q must have a multiple of k's {kv_heads} heads, got {heads}")
    batch = 1 if plan.packed else q.shape[0]
    if batch != plan.query_slots.shape[0]:
        raise ValueError(f"{op}: q must have the plan's batch of {plan.query_slots.shape[0]}, got {batch}")
    if not plan.packed and k.shape[0] != batch:
        raise ValueError(f"{op}: k must have q's batch of {batch}, got {k.shape[0]}")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    if k_bias is not None:
        checks.tensor(op, "k_bias", k_bias)
        checks.dtype(op, "k_bias", k_bias, checks.FLOATS)
        keys = k.shape[:1] if plan.packed else (batch, k.shape[2])
        checks.shape(op, "k_bias", k_bias, tuple(keys), "[tokens]" if plan.packed else "[batch, keys]")
        checks.same_device(op, "k_bias", k_bias, q, "q")
    if visual_heads is not None:
        checks.tensor(op, "visual_heads", visual_heads)
        checks.dtype(op, "visual_heads", visual_heads, (torch.bool,))
        checks.shape(op, "visual_heads", visual_heads, (heads,), "[heads]")
        checks.same_device(op, "visual_heads", visual_heads, q, "q")
    checks.choice(op, "visual_mass", visual_mass, ("keep", "drop"))
    checks.choice(op, "visual_rows", visual_rows, ("attend", "zero"))
    checks.boolean(op, "return_lse", return_lse)


def _check_tail(plan: AttentionPlan, queries: int, keys: int, k_lengths) -> None:
    op = "neighbor_attention"
    if plan.packed:
        if k_lengths is not None:
            raise ValueError(f"{op}: k_lengths must be None for a packed plan, got {type(k_lengths).__name__}")
        raise ValueError(
            f"{op}: q and k must have the {plan.num_keys} tokens of the packed plan, got {queries} and {keys}"
        )
    if plan.num_queries != plan.num_keys:
        raise ValueError(
            f"{op}: q, k and k_lengths must be those that the plan's tail was made for ({plan.num_queries} queries, "
            f"{plan.num_keys} keys, no k_lengths), got {queries} queries and {keys} keys"
        )
    if keys < plan.num_keys:
        raise ValueError(f"{op}: k must have at least the plan's {plan.num_keys} tokens, got {keys}")
    if queries > keys:
        raise ValueError(f"{op}: q must have at most k's {keys} tokens, got {queries}")


def _is_text_row(q, k, v, k_bias, plan: AttentionPlan, keys: int, backend: str | None) -> bool:
    """Whether the one row of q is text behind the plan's tokens, for which there is a kernel that needs no plan of the
    tail. With k_lengths the host does not know, and a gradient is formed by plans."""
    return (
        keys > plan.num_keys
        and plan.added_keys is not None
        and backend in (None, "compiled")
        and backends.why_not("text_attention", "compiled", q.device, q.dtype) is None
        and not transforms.wants_gradient(q, k, v, k_bias)
    )


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    k_bias: Tensor | None = None,
    visual_heads: Tensor | None = None,
    visual_mass: str = "keep",
    visual_rows: str = "attend",
    k_lengths: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the pairs that a plan lets see each other, without a mask or a map.

    out_i = sum_j exp(z_ij - lse_i) v_j with z_ij = scale q_i . k_j + k_bias_j and lse_i = log sum_j exp z_ij, over the
    keys j that query i sees. Which those are: :func:`neighbor_plan` and its siblings.

    A key that nobody sees may hold anything. One that somebody sees must be finite: NaN or infinity in its k or v can
    reach queries that do not see it, as in torch's SDPA with a mask (0 times NaN is NaN); here those that are worked on
    together with one that does, as neighbours in the plan's order are, and in the reference all of them.

    Args:
        q: [batch, heads, queries, channels], floating; channels a multiple of 8 up to 256. For packed plans
            [tokens, heads, channels], k and v alike. Any strides. The last queries of the plan's sequence may stand
            alone: then they are its tail (decode, chunked prefill). On the CPU a row of text behind the plan's tokens,
            without k_lengths and a gradient, needs no plan of the tail: see also :func:`pyvtk.text_attention`.
        k, v: [batch, kv_heads, keys, channels]; heads a multiple of kv_heads, query head h uses h // (heads //
            kv_heads). More keys than the plan has tokens: the additional ones are text.
        plan: of the layout, made once for all layers. One for training is made outside of ``torch.inference_mode``;
            ``torch.no_grad`` does no harm (a plan has no gradient).
        scale: of the logits; None: channels ** -0.5.
        k_bias: float [batch, keys] (packed: [tokens]), added to the scaled logits; e.g. log of token sizes (ToMe).
            A key with -inf is seen by nobody.
        visual_heads: bool [heads]; heads with False give visual keys no weight (YOPO's head pruning).
        visual_mass: "keep" takes these weights away after the softmax, whose denominator stays (what YOPO's code
            does); "drop" leaves the keys out of it, so that the other weights sum to 1.
        visual_rows: "zero" also makes the output of these heads 0 (and lse -inf) at visual queries, and skips the work.
        k_lengths: int [batch]; rows of k and v in use, of a cache with free room behind them. q's last row is then
            token k_lengths - 1.
        return_lse: also return lse.
        backend: "compiled", "triton", "reference", or None for the first that can run.

    Returns:
        out, shaped like q, in q's dtype and memory order; with return_lse (out, lse), lse float32 [batch, heads,
        queries] (packed: [heads, tokens]), natural logarithm, differentiable. Queries that see nothing, and padding:
        out 0, lse -inf. Differentiable in q, k, v and k_bias; 16-bit inputs are added up in float32. Under autocast q,
        k and v take its dtype.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: the backend cannot run.
    """
    if backends.any_autocast():
        q, k, v = (backends.autocast(x) for x in (q, k, v))
    _check(q, k, v, plan, scale, k_bias, visual_heads, visual_mass, visual_rows, return_lse)
    queries, keys = (q.shape[0], k.shape[0]) if plan.packed else (q.shape[2], k.shape[2])
    if k_lengths is not None or queries != plan.num_queries or keys != plan.num_keys:
        _check_tail(plan, queries, keys, k_lengths)
        if k_lengths is None and queries == 1 and _is_text_row(q, k, v, k_bias, plan, keys, backend):
            number = q.shape[-1] ** -0.5 if scale is None else _numbers.argument(float(scale))
            out, lse = text_attention.attend(
                q, k, v, k_bias, None, None, plan.key_slots, visual_heads, plan.added_keys, number,
                visual_mass == "keep", backend,
            )  # fmt: skip
            return (out, lse) if return_lse else out
        plan = plan.tail(queries, keys, k_lengths)
    checks.outside_inference("neighbor_attention", "plan", plan.tensors(), (q, k, v, k_bias))
    if plan.packed:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        k_bias = None if k_bias is None else k_bias[None]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else _numbers.argument(float(scale))
    options = (plan.tensors(), plan.rule(), scale, visual_mass == "keep", visual_rows == "zero")
    differentiable = (q, k, v, k_bias)
    chosen = backends.pick("neighbor_attention", backend, q, q.dtype, differentiable)
    if chosen == "reference":
        out, lse = reference.neighbor_attention(q, k, v, k_bias, visual_heads, *options)
        out = _in_order_of(q, out.to(q.dtype))
    else:
        k_bias = None if k_bias is None else k_bias.float().contiguous()
        name = {"compiled": "neighbor_attention", "triton": "neighbor_attention_triton"}[chosen]
        operator = getattr(torch.ops.pyvtk, name)
        out, lse = transforms.call(operator, (q, k, v, k_bias), q, k, v, k_bias, visual_heads, *options)
    if plan.packed:
        out, lse = out[0].transpose(0, 1), lse[0]
    return (out, lse) if return_lse else out


def _weigh_backward_fake(grad, outs, weights):
    return [_like_queries(out) for out in outs], weights.new_empty(weights.shape)


# What merge_attention spends its time on: sum_g weights_g out_g, over weights other than 0; float32 or float64 weights
# [groups, batch, heads, queries].
backends.define(
    "weigh_groups",
    "(Tensor[] outs, Tensor weights) -> Tensor",
    fake=lambda outs, weights: _like_queries(outs[0]),
    dtypes=checks.FLOATS,
    vmap=transforms.Fold({"outs": 0, "weights": 1}, (0,)),
)
backends.define(
    "weigh_groups_backward",
    "(Tensor grad, Tensor[] outs, Tensor weights) -> (Tensor[], Tensor)",
    fake=_weigh_backward_fake,
    dtypes=checks.FLOATS,
    vmap=transforms.Fold({"grad": 0, "outs": 0, "weights": 1}, (0, 1)),
)


def _weigh_setup(ctx, inputs, output) -> None:
    outs, weights = inputs
    ctx.save_for_backward(weights, *outs)


def _weigh_backward(ctx, grad):
    weights, *outs = ctx.saved_tensors
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    return torch.ops.pyvtk.weigh_groups_backward(grad, outs, weights)


transforms.gradient("weigh_groups", _weigh_backward, setup_context=_weigh_setup)
transforms.second_gradient("weigh_groups_backward", reference.weighed_groups, ("outs", "weights"))


def _in_order_of(q: Tensor, out: Tensor) -> Tensor:
    """``out`` in the memory order of q."""
    if q.stride(1) < q.stride(2):
        return out.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous()


def merge_attention(
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    coefficients: Sequence[Tensor] | None = None,
    renormalize: bool = False,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Joins the attention of one query over groups of keys: out = sum_g c_g out_g.

    Without coefficients c_g = exp(lse_g - lse), lse = log sum_g exp lse_g, and the result is attention over all groups.

    Args:
        outs: of every group, [batch, heads, queries, channels], or packed [tokens, heads, channels].
        lses: of every group, float [batch, heads, queries], or packed [heads, tokens]; -inf where the group saw no
            key: it is skipped there.
        coefficients: of every group, shaped like lses; used as they are. YOPO's pruned heads are [exp(lse_text - lse),
            0]; VAR moves weight between sinks and other visual keys.
        renormalize: divide by the sum of the coefficients (0 where that is 0).
        backend: "compiled", "reference", or None for the first that can run.

    Returns:
        (out, lse): out in the dtype of outs (under autocast the widest of theirs), lse over all groups, -inf where no
        group saw a key. Differentiable in outs, lses and coefficients; summed in float32.

    Raises:
        TypeError, ValueError: an argument that does not fit.
    """
    op = "merge_attention"
    for name, values in (
        ("outs", outs),
        ("lses", lses),
        ("coefficients", [] if coefficients is None else coefficients),
    ):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{op}: {name} must be a list of tensors, one per group, got {type(values).__name__}")
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{op}: outs must be as many as lses, at least one, got {len(outs)} and {len(lses)}")
    if coefficients is not None:
        coefficients = list(coefficients)
        if len(coefficients) != len(outs):
            raise ValueError(f"{op}: coefficients must be as many as outs, {len(outs)}, got {len(coefficients)}")
    checks.boolean(op, "renormalize", renormalize)
    outs = backends.widest(outs)
    for number, out in enumerate(outs):
        checks.tensor(op, f"outs[{number}]", out, (3, 4))
        checks.dtype(op, f"outs[{number}]", out, checks.FLOATS)
        checks.shape(op, f"outs[{number}]", out, tuple(outs[0].shape), "shaped like outs[0]")
        checks.same_device(op, f"outs[{number}]", out, outs[0], "outs[0]")
        if out.dtype != outs[0].dtype:
            raise TypeError(f"{op}: outs[{number}] must have the dtype of outs[0], {outs[0].dtype}, got {out.dtype}")
    packed = outs[0].dim() == 3
    shape = (outs[0].shape[1], outs[0].shape[0]) if packed else tuple(outs[0].shape[:3])
    meaning = "[heads, tokens]" if packed else "[batch, heads, queries]"
    for name, values in (("lses", lses), ("coefficients", coefficients or [])):
        for number, value in enumerate(values):
            checks.tensor(op, f"{name}[{number}]", value)
            checks.dtype(op, f"{name}[{number}]", value, checks.FLOATS)
            checks.shape(op, f"{name}[{number}]", value, shape, meaning)
            checks.same_device(op, f"{name}[{number}]", value, outs[0], "outs[0]")
    weights, seen, lse = reference.group_weights(lses, coefficients, renormalize)
    if packed:
        outs, weights, seen = [out.transpose(0, 1)[None] for out in outs], weights[:, None], seen[:, None]
    outs = [out if out.stride(-1) == 1 else out.contiguous() for out in outs]
    differentiable = (*outs, weights)
    if backends.pick("weigh_groups", backend, outs[0], outs[0].dtype, differentiable) == "compiled":
        out = transforms.call(torch.ops.pyvtk.weigh_groups.default, differentiable, outs, weights)
    else:
        out = _in_order_of(outs[0], reference.weigh_groups(outs, weights, seen))
    return (out[0].transpose(0, 1) if packed else out), lse
