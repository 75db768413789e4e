"""Attention of the last rows of a sequence, which are text: decode steps without a plan."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk import _numbers, backends, checks, transforms
from pyvtk.reference import text_attention as reference

OP = "text_attention"


def _fake(q, k, v, k_bias, visual, k_mask, key_slots, visual_heads, added_keys, scale, keep_mass):
    batch, heads, queries, dim = q.shape
    if q.stride(1) < q.stride(2):
        out = q.new_empty((batch, queries, heads, dim)).transpose(1, 2)
    else:
        out = q.new_empty((batch, heads, queries, dim))
    return out, q.new_empty((batch, heads, queries), dtype=torch.float32)


# key_slots int32 [batch, 8, slots] and added_keys are those of an AttentionPlan, and stand for visual and k_mask where
# there is one row. Without a layer for autograd: the page takes the reference where somebody wants a derivative.
backends.define(
    OP,
    "(Tensor q, Tensor k, Tensor v, Tensor? k_bias, Tensor? visual, Tensor? k_mask, Tensor? key_slots, "
    "Tensor? visual_heads, bool added_keys, float scale, bool keep_mass) -> (Tensor out, Tensor lse)",
    fake=_fake,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold({"q": 1, "k": 1, "v": 1, "visual_heads": 0}, (1, 1)),
    leave_open="scale",
)
_operator = torch.ops.pyvtk.text_attention


def _check(q, k, v, visual, k_mask, k_bias, visual_heads, visual_mass, scale, return_lse) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(OP, name, x)
        if x.dim() != 4:
            raise ValueError(f"{OP}: {name} must be [batch, heads, tokens, channels], got shape {tuple(x.shape)}")
        checks.dtype(OP, name, x, checks.FLOATS)
        checks.same_device(OP, name, x, q, "q")
        if x.dtype != q.dtype:
            raise TypeError(f"{OP}: {name} must have q's dtype {q.dtype}, got {x.dtype}")
    checks.shape(OP, "v", v, tuple(k.shape), "shaped like k")
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if dim < 8 or dim > 256 or dim % 8:
        raise ValueError(f"{OP}: q must have a multiple of 8 channels up to 256, got {dim}")
    if k.shape[-1] != dim:
        raise ValueError(f"{OP}: k must have q's {dim} channels, got {k.shape[-1]}")
    if k.shape[0] != batch:
        raise ValueError(f"{OP}: k must have q's batch of {batch}, got {k.shape[0]}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"{OP}: q must have a multiple of k's {kv_heads} heads, got {heads}")
    if queries > keys:
        raise ValueError(f"{OP}: q must have at most k's {keys} tokens, got {queries}")
    for name, x in (("visual", visual), ("k_mask", k_mask), ("k_bias", k_bias)):
        if x is not None:
            checks.tensor(OP, name, x)
            checks.dtype(OP, name, x, checks.FLOATS if name == "k_bias" else (torch.bool,))
            checks.shape(OP, name, x, (batch, keys), "[batch, keys]")
            checks.same_device(OP, name, x, q, "q")
    if visual_heads is not None:
        checks.tensor(OP, "visual_heads", visual_heads)
        checks.dtype(OP, "visual_heads", visual_heads, (torch.bool,))
        checks.shape(OP, "visual_heads", visual_heads, (heads,), "[heads]")
        checks.same_device(OP, "visual_heads", visual_heads, q, "q")
        if visual is None:
            raise ValueError(f"{OP}: visual must be given with visual_heads, got None")
    checks.choice(OP, "visual_mass", visual_mass, ("keep", "drop"))
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"{OP}: scale must be a number or None, got {type(scale).__name__}")
    checks.boolean(OP, "return_lse", return_lse)


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    visual: Tensor | None = None,
    k_mask: Tensor | None = None,
    k_bias: Tensor | None = None,
    visual_heads: Tensor | None = None,
    visual_mass: str = "keep",
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last rows of a sequence, which are text and see every key up to their own: decode steps, or text
    after an image. What :func:`pyvtk.neighbor_attention` gives for such rows, without a plan. Meant for few rows.

    out_i = sum_j exp(z_ij - lse_i) v_j with z_ij = scale q_i . k_j + k_bias_j and lse_i = log sum_j exp z_ij, over the
    keys j that row i sees.

    A key that no row sees may hold anything and is not read in whole runs of 16. One that some row sees must be finite.

    Args:
        q: [batch, heads, rows, channels], floating; channels a multiple of 8 up to 256; any strides. The rows stand at
            the last ``rows`` keys that exist.
        k, v: [batch, kv_heads, keys, channels], the rows' own among them; heads a multiple of kv_heads, query head h
            uses h // (heads // kv_heads). Any strides: heads of a token side by side in memory, or apart.
        visual: bool [batch, keys], which keys are visual; only visual_heads reads it.
        k_mask: bool [batch, keys], which keys exist: padding, and free room of a static cache, do not. With fewer keys
            than rows the first rows see nothing.
        k_bias: float [batch, keys], added to the scaled logits. A key with -inf is seen by nobody.
        visual_heads: bool [heads]; heads with False give visual keys no weight.
        visual_mass: "keep" takes these weights away after the softmax, whose denominator stays; "drop" leaves the keys
            out of it, so that the other weights sum to 1.
        scale: of the logits; None: channels ** -0.5.
        return_lse: also return lse.
        backend: "compiled" (CPU; it has no gradient), "reference", or None for the first that can run; where a gradient
            is wanted that is the reference.

    Returns:
        out, shaped like q, in q's dtype and memory order; with return_lse (out, lse), lse float32 [batch, heads, rows]
        (float64 for float64), natural logarithm. Rows that see nothing: out 0, lse -inf. Differentiable in q, k, v and
        k_bias. Under autocast q, k and v take its dtype.

    Source: the text rows of YOPO (arXiv 2410.06169), with its pruned heads.

    Raises:
        TypeError, ValueError: an argument that does not fit. RuntimeError: the backend cannot run.
    """
    if backends.any_autocast():
        q, k, v = (backends.autocast(x) for x in (q, k, v))
    _check(q, k, v, visual, k_mask, k_bias, visual_heads, visual_mass, scale, return_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else _numbers.argument(float(scale))
    if visual_heads is None:
        visual = None
    out, lse = attend(q, k, v, k_bias, visual, k_mask, None, visual_heads, True, scale, visual_mass == "keep", backend)
    return (out, lse) if return_lse else out


def attend(
    q, k, v, k_bias, visual, k_mask, key_slots, visual_heads, added_keys, scale, keep_mass, backend
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator by the backend that runs it; arguments are checked."""
    differentiable = (q, k, v, k_bias)
    chosen = backends.pick(OP, backend, q, q.dtype, differentiable)
    if chosen == "compiled" and transforms.wants_gradient(*differentiable):
        if backend is not None:
            raise RuntimeError(f"{OP}: backend 'compiled' cannot run: only the reference has a gradient")
        chosen = "reference"
    if chosen == "reference":
        out, lse = reference.text_attention(
            q, k, v, k_bias, visual, k_mask, key_slots, visual_heads, added_keys, scale, keep_mass
        )
        out = out.to(q.dtype)
        return (
            out.transpose(1, 2).contiguous().transpose(1, 2) if q.stride(1) < q.stride(2) else out.contiguous()
        ), lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    k_bias = None if k_bias is None else k_bias.float().contiguous()
    visual, k_mask, visual_heads = (None if x is None else x.contiguous() for x in (visual, k_mask, visual_heads))
    return transforms.call(
        _operator, differentiable, q, k, v, k_bias, visual, k_mask, key_slots, visual_heads, added_keys, scale,
        keep_mass,
    )  # fmt: skip
