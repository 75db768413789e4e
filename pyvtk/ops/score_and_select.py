"""``score_and_select``: from queries and keys to the tokens that stay, in one operator."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvtk import backends, checks, transforms
from pyvtk.ops import _group, score, select
from pyvtk.reference import score as scoring
from pyvtk.reference import score_and_select as reference
from pyvtk.reference import select as selecting
from pyvtk.selection import Selection, assemble

OP = "score_and_select"
# The CUDA kernels are made for few queries; packed, of all samples together, since lengths are on the device.
MOST_QUERIES_ON_CUDA = 64


def _fake(q, k, *arguments):
    scoring_arguments, selecting_arguments = arguments[:18], arguments[18:]
    scores = score._fake(q, k, *scoring_arguments, False)[0]
    packed = scoring_arguments[7] is not None
    heads = () if scores.shape[2] == 1 and scoring_arguments[15] in ("mean", "sum", "max") else (scores.shape[2],)
    rows = (scoring_arguments[7].shape[0] - 1,) if packed else (q.shape[0], *heads)
    capacity = selecting_arguments[-3]
    return (
        q.new_empty((*rows, capacity), dtype=torch.int64),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=torch.bool),
        scores,
    )


_OUTPUTS = (0, 0, 0, 1)  # their batch axes
# Arguments of attention_scores up to logit, then those of select after scores. Scores that want a gradient come from
# attention_scores: see the public function.
backends.define(
    OP,
    "(Tensor q, Tensor k, Tensor? q_positions, Tensor? k_positions, Tensor? q_mask, Tensor? k_mask, Tensor? k_bias, "
    "Tensor? head_weights, Tensor? lse, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool causal, SymInt key_start, "
    "SymInt key_stop, bool range_denominator, float scale, str query_reduce, str head_reduce, bool heads_first, "
    "bool logit, SymInt num_keep, Tensor? num_keep_per_row, Tensor? threshold, Tensor? top_p, Tensor? keep, "
    "Tensor? drop, Tensor? candidates, bool keep_others, Tensor? segments, SymInt num_segments, Tensor? cu_seqlens, "
    "SymInt capacity, bool align_right, bool by_score) "
    "-> (Tensor indices, Tensor counts, Tensor overflow, Tensor scores)",
    fake=_fake,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold(score.PER_SAMPLE | select.PER_ROW, _OUTPUTS, score.does_not_fold),
    constant=True,
    leave_open="scale",
)
_operator = torch.ops.pyvtk.score_and_select


def _fake_top(q, k, num_keep, causal, scale, query_reduce, head_reduce):
    scores = score._fake_plain(q, k, causal, scale, query_reduce, head_reduce)
    rows = (q.shape[0],) if head_reduce in ("mean", "sum", "max") else (q.shape[0], scores.shape[2])
    return (
        q.new_empty((*rows, num_keep), dtype=torch.int64),
        q.new_empty(rows, dtype=torch.int32),
        q.new_empty(rows, dtype=torch.bool),
        scores,
    )


# The usual call, as in score.py and select.py: the best num_keep (0..keys) of scores that need no masks.
backends.define(
    "score_and_select_top",
    "(Tensor q, Tensor k, SymInt num_keep, bool causal, float scale, str query_reduce, str head_reduce) "
    "-> (Tensor indices, Tensor counts, Tensor overflow, Tensor scores)",
    fake=_fake_top,
    dtypes=backends.HALF_AND_SINGLE,
    vmap=transforms.Fold({"q": 0, "k": 0}, _OUTPUTS),
    lean=True,
)
_top = torch.ops.pyvtk.score_and_select_top.default


def _serves(q: Tensor, packed: bool, backend: str | None) -> bool:
    """Whether the CUDA operator takes so many queries; an error if it does not and was asked for by name."""
    queries = q.shape[0] if packed else q.shape[2]
    serves = queries <= MOST_QUERIES_ON_CUDA and q.shape[1] > 0
    if not serves and backend == "compiled":
        raise RuntimeError(
            f"{OP}: backend 'compiled' cannot run: its CUDA kernels take 1 head or more and at most "
            f"{MOST_QUERIES_ON_CUDA} queries (of all samples together if packed), got q of shape {tuple(q.shape)}"
        )
    return serves


def score_and_select(
    q: Tensor,
    k: Tensor,
    num_keep: int | Tensor | None = None,
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
    query_reduce: str = "mean",
    head_reduce: str | None = "mean",
    head_weights: Tensor | None = None,
    reduce_order: str = "queries_first",
    quantity: str = "probability",
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    threshold: float | Tensor | None = None,
    top_p: float | Tensor | None = None,
    keep: Tensor | None = None,
    drop: Tensor | None = None,
    candidates: Tensor | None = None,
    others: str = "drop",
    segments: Tensor | None = None,
    num_segments: int | None = None,
    capacity: int | str | None = None,
    align: str = "left",
    order: str = "index",
    return_scores: bool = False,
    group=None,
    backend: str | None = None,
) -> Selection | tuple[Selection, Tensor]:
    """Score the keys and choose those that stay: FastV's or PyramidDrop's pruning step in one call.

    The result is what :func:`pyvtk.select` gives of the scores that ``return_scores`` returns, bit for bit, with these
    additions: indices are positions in k also with ``key_range``. Keys outside of the range are not candidates: they
    go, stay with ``others="keep"``, or are forced by ``keep``. Keys that ``k_mask`` hides (padding) go, also with
    ``others="keep"``, unless ``keep`` names them.

    Args:
        q, k: as in :func:`pyvtk.attention_scores`; meant for few queries, right for any number.
        num_keep: as in :func:`pyvtk.select`, like every argument from threshold to order.
        causal ... max_seqlen_k: as in :func:`pyvtk.attention_scores`. query_reduce names one reduction.
        threshold ... order: as in :func:`pyvtk.select`; masks are [batch, keys] (packed [total]), or with
            head_reduce None or by group also [batch, heads, keys].
        return_scores: also return the scores, as attention_scores does. They carry a gradient if q or k want one; the
            selection never does.
        group: a torch.distributed.ProcessGroup over whose ranks the heads lie (tensor parallelism), or None. q and k
            hold this rank's heads, consecutive ones, as many on every rank, and so does lse; head_weights those or all.
            All else must be the same on every rank. With head_reduce mean, sum or max the scores of every head (of
            every head of k, where only sums are taken) are exchanged, float32 [batch, heads, keys], for which the host
            waits, and every rank keeps the same tokens: by the compiled CPU kernels bit for bit what one process keeps
            that holds the ranks' heads one after the other; on CUDA scores are Triton's, or the reference's. Takes
            fewer than 192 rows of queries for each head of k, no maximum with "heads_first", and no scores with a
            gradient. With head_reduce None or by group nothing is exchanged: every rank chooses for its own heads.
        backend: "compiled": one operator does both; on CUDA for at most 64 queries (of all samples together if packed)
            and scores without a gradient. "triton": the scores by Triton, the selection by the first backend that can
            run. "reference". None: "compiled" if it can run, else scores and selection each by the first that can.

    Returns:
        Selection over the keys: rows [batch], or [batch, heads] with head_reduce None or by group; with return_scores
        a tuple (selection, scores).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, device or shape; the message names it.
        RuntimeError: the named backend cannot run.
    """
    if backends.any_autocast():
        q, k = backends.autocast(q), backends.autocast(k)
    if group is not None:
        _group.member(OP, group)
        if isinstance(q, Tensor) and q.dim() in (3, 4):
            head_weights = _group.own_heads(OP, head_weights, q.shape[1], group)
    options = score.resolve(
        OP, q, k, causal=causal, q_positions=q_positions, k_positions=k_positions, q_mask=q_mask, k_mask=k_mask,
        k_bias=k_bias, key_range=key_range, denominator=denominator, lse=lse, scale=scale, query_reduce=query_reduce,
        head_reduce=head_reduce, head_weights=head_weights, reduce_order=reduce_order, quantity=quantity,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip
    if not isinstance(query_reduce, str):
        raise ValueError(f"{OP}: query_reduce must name one reduction, got {query_reduce!r}")
    if return_scores is not False:
        checks.boolean(OP, "return_scores", return_scores)
    per_head = head_reduce not in ("mean", "sum", "max")
    if group is not None and not per_head:
        _group.check(OP, q, k, query_reduce, options["head_reduce"], options["heads_first"])
        if return_scores and transforms.wants_gradient(q, k, k_bias, lse, head_weights):
            raise ValueError(f"{OP}: group must be None where scores are to carry a gradient, got a ProcessGroup")
    packed = cu_seqlens_k is not None
    if packed and per_head:
        raise ValueError(f"{OP}: head_reduce must be mean, sum or max for packed input, got {head_reduce!r}")
    keys = k.shape[0] if packed else k.shape[2]
    if packed:
        shape = (keys,)
    elif per_head:
        shape = (q.shape[0], score.out_heads(q.shape[1], k.shape[1], options["head_reduce"]), keys)
    else:
        shape = (q.shape[0], keys)
    shared = group is not None and not per_head  # scores are those of all ranks
    fused = not shared and backend != "triton" and backends.pick(OP, backend, q, q.dtype) == "compiled"
    if fused and not q.is_cpu:
        fused = _serves(q, packed, backend)
    if (
        fused and type(num_keep) is int and num_keep >= 0 and threshold is None and top_p is None
        and keep is None and drop is None and candidates is None and segments is None and num_segments is None
        and capacity is None and others == "drop" and align == "left" and order == "index"
    ):  # fmt: skip
        plain = score.plain_arguments(q, k, options)
        if plain is not None:
            indices, counts, overflow, scores = _top(q, k, min(num_keep, keys), *plain)
            selection = assemble(indices, counts, keys, True, "left", overflow)
            return (selection, score.shape_scores(scores, False, False, head_reduce)) if return_scores else selection
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    arguments, exact = select.resolve(
        OP, select.Scores(shape, dtype, q.device), num_keep, threshold=threshold, top_p=top_p, keep=keep, drop=drop,
        candidates=candidates, others=others, segments=segments, num_segments=num_segments,
        cu_seqlens=options["cu_seqlens_k"], capacity=capacity, align=align, order=order,
    )  # fmt: skip

    differentiable = (q, k, k_bias, lse, head_weights)
    wants_gradient = return_scores and transforms.wants_gradient(*differentiable)
    if fused and not wants_gradient:
        scoring_arguments = score.kernel_arguments(options)
        *outputs, scores = transforms.call(_operator, (), q, k, *scoring_arguments, *arguments)
    else:
        # Each on its own. Scores with a gradient come from their own operator; on the CPU its bits are the same.
        how = backends.pick("attention_scores", backend, q, q.dtype, differentiable)
        if shared:
            options["head_reduce"] = _group.local_reduce(query_reduce, head_reduce)
        if how == "reference":
            scores, _ = scoring.attention_scores(q, k, **options)
        else:
            operator = (
                torch.ops.pyvtk.attention_scores if how == "compiled" else torch.ops.pyvtk.attention_scores_triton
            )
            scores = transforms.call(operator, differentiable, q, k, *score.kernel_arguments(options), False)[0]
        if shared:
            scores = _group.reduced(scores.detach(), q.shape[1], head_reduce, group)
        chosen_scores = score.shape_scores(scores.detach(), packed, False, head_reduce)
        key_start, key_stop = (0, keys) if packed else (options["key_start"], options["key_stop"])
        whole = reference.whole_axis(chosen_scores, keys, key_start)
        competing = reference.competing(arguments[6], options["k_mask"], keys, key_start, key_stop, whole)
        if competing is not None:
            competing = competing.contiguous()  # it may be one row for all samples
        gone = reference.dropped(*arguments[4:6], options["k_mask"])
        if gone is not None:
            gone = gone.contiguous()
        how = backends.pick("select", None if backend == "triton" else backend, whole, whole.dtype)
        run = torch.ops.pyvtk.select.default if how == "compiled" else selecting.select
        outputs = run(whole, *arguments[:5], gone, competing, *arguments[7:])
    selection = select.selection_of(tuple(outputs), keys, arguments, exact)
    if not return_scores:
        return selection
    return selection, score.shape_scores(scores, packed, False, head_reduce)
