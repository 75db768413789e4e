"""One call of a public function: how its inputs are made, which backends make it, and how its result is judged."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.utils._pytree as pytree
from support import Exponents, TF32x3, assert_within_budget
from torch import Tensor

from pyvtk import Selection, backends

DEVICE = os.environ.get("PYVTK_GPU_DEVICE") or "cuda"
HALF, BRAIN, SINGLE, DOUBLE, WHOLE = torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8

# operators whose float32 results are weights of attention, or sums of them
WEIGHTS = ("attention_scores", "score_and_select")


@dataclass
class Call:
    """One call of a public function.

    Attributes:
        operator: whose kernels run it.
        inputs: makes tensors (and Selections) on the CPU; called after the seed is set.
        run: called with backend and the inputs. What it changes it has to clone.
        exact: results agree with the reference bit for bit; else within the error budget.
        compiles: among those that are tried under torch.compile: one or two of each operator.
        waits: the host waits, as the docstring says: no CUDA graph captures it.
        reorders: other strides may take another kernel, whose sums have another order.
        added: the largest sum of magnitudes that float32 results are made of, from the inputs.
        plain: what plain torch makes of the inputs, step by step in their dtype; None: the reference.
    """

    operator: str
    inputs: Callable[[], tuple]
    run: Callable
    exact: bool = True
    compiles: bool = False
    waits: bool = False
    reorders: bool = False
    added: Callable[..., float] = lambda *inputs: 0.0
    plain: Callable | None = None


def ways(call: Call) -> list[str | None]:
    """Backends that make the call: None (what users get) where it is no fallback, and Triton where it is not that."""
    able = [way for way in ("compiled", "triton") if backends.why_not(call.operator, way, DEVICE) is None]
    return [None, *able[1:]] if able else []


# ---- what the lists of calls share


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(*shape, dtype=SINGLE, most=100) -> Tensor:
    """Whole numbers, of whose sums and products few are rounded."""
    return torch.randint(-most, most, shape).to(dtype)


def also(make, *more):
    """``make``'s inputs and further ones."""
    return lambda: (*make(), *(extra() for extra in more))


def gradient(run, leaves=1, results=1):
    """The results of ``run`` and the gradients to its last ``leaves`` inputs. The call's last inputs are what arrives
    at each of the results."""

    def with_gradients(backend, *inputs):
        first = len(inputs) - results - leaves
        wanted = [x.detach().requires_grad_() for x in inputs[first : first + leaves]]
        out = run(backend, *inputs[:first], *wanted)
        outs = out if isinstance(out, tuple) else (out,)
        arriving = [grad.to(x.dtype) for grad, x in zip(inputs[first + leaves :], outs, strict=True)]
        return *(x.detach() for x in outs), *torch.autograd.grad(outs, wanted, arriving)

    return with_gradients


# ---- making a call, and judging its result


def on(device, tree):
    """On the device, with the same strides and offsets: Tensor.to() would close gaps."""

    def one(x):
        if not isinstance(x, Tensor) or x.device.type == torch.device(device).type:
            return x
        whole = x.untyped_storage().nbytes() // x.element_size()
        return x.as_strided((whole,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    return pytree.tree_map(one, tree)


def make(call: Call, seed: int = 0, device=DEVICE):
    """Inputs of ``call`` for a seed."""
    torch.manual_seed(seed)
    return on(device, call.inputs())


def apart(inputs: tuple, gap: int = 3, before: int = 0) -> tuple:
    """The same values, each row of the last dimension ``gap`` elements apart from the next and the first one ``before``
    elements behind the begin of memory that is full of other numbers. Selections stay contiguous, as they are by
    definition; positions and other tables lie apart as well."""

    def one(x):
        if not isinstance(x, Tensor) or x.dim() < 2 or x.numel() == 0:
            return x
        size = *x.shape[:-1], x.shape[-1] + gap
        wide = torch.full((before + math.prod(size),), 77, dtype=torch.float64, device=x.device).to(x.dtype)
        rows = wide[before:].view(size)[..., : x.shape[-1]]
        rows.copy_(x)
        return rows

    return tuple(x if isinstance(x, Selection) else one(x) for x in inputs)


def _comparable(x: Tensor) -> Tensor:
    """Equal where the bits are, NaN included; the two zeros are one."""
    if x.is_complex():
        x = torch.view_as_real(x)
    if x.is_floating_point() and x.element_size() == 1:  # torch compares no 8-bit floats
        return x.view(torch.uint8)
    return x.nan_to_num(0.12345)


def same(actual, expected) -> bool:
    """The same bits, NaN included."""
    found, wanted = (pytree.tree_leaves(x) for x in (actual, expected))
    return len(found) == len(wanted) and all(
        torch.equal(_comparable(a), _comparable(b)) if isinstance(a, Tensor) else a == b for a, b in zip(found, wanted)
    )


def difference(actual, expected) -> str:
    """In words, where two results are not the same."""
    found, wanted = (pytree.tree_leaves(x) for x in (actual, expected))
    if len(found) != len(wanted):
        return f"{len(found)} results, expected {len(wanted)}"
    for number, (a, b) in enumerate(zip(found, wanted), 1):
        if same(a, b):
            continue
        name = f"result {number} of {len(found)}: "
        if not isinstance(a, Tensor):
            return f"{name}{a!r}, expected {b!r}"
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{name}{short(a.dtype)} {list(a.shape)}, expected {short(b.dtype)} {list(b.shape)}"
        apart = _comparable(a) != _comparable(b)
        apart = apart.any(-1) if a.is_complex() else apart
        where = apart.nonzero()[0].tolist()
        one, other = (x[tuple(where)].item() for x in (a, b))
        return f"{name}{int(apart.sum())} of {a.numel()} values differ, the first at {where}: {one}, expected {other}"
    return "nothing differs"


def in_float64(tree):
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def multiplies_in_tf32(call: Call, inputs) -> bool:
    """Whether float32 is multiplied as three products of TF32: by Triton's kernels, which CUDA tensors take where there
    is no compiled one."""
    floats = (x for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and x.is_floating_point())
    by_triton = DEVICE == "cuda" and backends.why_not(call.operator, "compiled", DEVICE) is not None
    return by_triton and next(floats).dtype == SINGLE


def assert_right(call: Call, result, inputs) -> None:
    """Against the reference on the CPU; a selection by scores of ours against select of these very scores."""
    inputs, result = on("cpu", inputs), on("cpu", result)
    if call.exact:
        wanted = call.run("reference", *inputs)
        assert same(result, wanted), difference(result, wanted)
        return
    oracle = call.run("reference", *in_float64(inputs))
    plain = call.plain(*inputs) if call.plain else call.run("reference", *inputs)
    inexact = oracle
    modes = [TF32x3()] if multiplies_in_tf32(call, inputs) else []
    modes += [Exponents()] if call.operator in WEIGHTS else []
    if modes:
        with contextlib.ExitStack() as entered:
            for mode in modes:
                entered.enter_context(mode)
            inexact = call.run("reference", *in_float64(inputs))
    if call.operator == "score_and_select":
        selection, result = result
        (_, oracle), (_, plain), (_, inexact) = oracle, plain, inexact
        _assert_chosen_again(call, selection, result, inputs)
    leaves = [pytree.tree_leaves(x) for x in (result, oracle, plain, inexact)]
    for number, (leaf, exact, other, off) in enumerate(zip(*leaves, strict=True), 1):
        try:
            assert_within_budget(leaf, exact, other, added=call.added(*inputs) + TF32x3.added(off, exact))
        except AssertionError as error:
            raise AssertionError(f"result {number} of {len(leaves[0])}: {error}") from None


def _assert_chosen_again(call: Call, selection: Selection, found: Tensor, inputs) -> None:
    """The same call with logits that are given: its scores replaced by ours, its selection has to be ours."""
    from pyvtk.reference import score

    before = score.attention_scores

    def given(*arguments, **options):
        out, lse = before(*arguments, **options)
        return found.to(out.dtype).reshape(out.shape), lse

    score.attention_scores = given
    try:
        again, scores_again = call.run("reference", *inputs)
    finally:
        score.attention_scores = before
    ours, theirs = (selection.indices, selection.counts, found), (again.indices, again.counts, scores_again)
    assert same(ours, theirs), f"selection by these very scores: {difference(ours, theirs)}"
