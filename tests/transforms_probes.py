"""What torch makes of a call: each probe tries one thing with a case, compares it with the reference in float64 (or
expects the documented error), and says in a word how it is done, for the table in README.md.

``python tests/transforms_probes.py`` prints the table.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from calls import CALLS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transforms_cases import CASES, CONSTANT, Case


def close(actual, expected) -> None:
    torch.testing.assert_close([a.double() for a in actual], [e.double() for e in expected], rtol=2e-5, atol=2e-5)


def places(case: Case) -> tuple[int, ...]:
    return tuple(range(len(case.shapes)))


def expected_gradient(case: Case, tensors: list[Tensor] | None = None, second: bool = False) -> tuple[Tensor, ...]:
    """Of the reference, in float64, by torch's autograd; with ``second`` that of the sum of squares of gradients."""
    leaves = [x.double().requires_grad_() for x in (tensors or case.tensors())]
    first = torch.autograd.grad(case.total(*leaves, backend=case.backends[-1]), leaves, create_graph=second)
    return _penalty_gradient(first, leaves) if second else first


def _penalty_gradient(first, leaves) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)


def gradient(case: Case) -> str:
    expected = expected_gradient(case)
    for backend in case.backends:
        leaves = [x.requires_grad_() for x in case.tensors()]
        close(torch.autograd.grad(case.total(*leaves, backend=backend), leaves), expected)
        of_func = torch.func.grad(lambda *x, backend=backend: case.total(*x, backend=backend), places(case))
        close(of_func(*case.tensors()), expected)
    return "yes"


def second_gradient(case: Case) -> str:
    expected = expected_gradient(case, second=True)
    for backend in case.backends:
        leaves = [x.requires_grad_() for x in case.tensors()]
        first = torch.autograd.grad(case.total(*leaves, backend=backend), leaves, create_graph=True)
        close(_penalty_gradient(first, leaves), expected)

        def penalty(*x, backend=backend):
            first = torch.func.grad(lambda *x: case.total(*x, backend=backend), places(case))(*x)
            return sum(g.square().sum() for g in first)

        close(torch.func.grad(penalty, places(case))(*case.tensors()), expected)
        leaves = [x.requires_grad_() for x in case.tensors()]  # autograd around torch.func
        close(torch.autograd.grad(penalty(*leaves), leaves, materialize_grads=True), expected)
    return "by plain torch"


def forward_mode(case: Case) -> str:
    tensors, tangents = tuple(case.tensors()), tuple(case.tensors(seed=1))
    wide = [tuple(x.double() for x in some) for some in (tensors, tangents)]
    _, expected = torch.func.jvp(lambda *x: case.flat(*x, backend=case.backends[-1]), *wide)
    if not case.straight_through:
        _by_differences(case, *wide, expected)
    close(torch.func.jvp(case.flat, tensors, tangents)[1], expected)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, tangent) for x, tangent in zip(tensors, tangents)]
        close([forward_ad.unpack_dual(out).tangent for out in case.flat(*duals)], expected)
    if "compiled" in case.backends:
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(lambda *x: case.flat(*x, backend="compiled"), tensors, tangents)
    return "by the reference"


def _by_differences(case: Case, tensors, tangents, expected) -> None:
    """The tangents of the reference, by two calls a little way apart."""
    step = 1e-6
    ends = [
        case.flat(*[x + sign * step * t for x, t in zip(tensors, tangents)], backend=case.backends[-1])
        for sign in (1, -1)
    ]
    slopes = [(a - b) / (2 * step) for a, b in zip(*ends)]
    torch.testing.assert_close(slopes, list(expected), rtol=1e-5, atol=1e-6)


class _Operators(TorchDispatchMode):
    """Counts calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.namespace == "pyvtk"
        return func(*args, **(kwargs or {}))


def vmap(case: Case) -> str:
    mapped = case.tensors(lead=(3,))
    calls: list[int] = []
    for backend in case.backends:

        def function(*x, backend=backend):
            return case.flat(*x, backend=backend)

        each = [function(*[x[i] for x in mapped]) for i in range(3)]
        expected = [torch.stack(outs) for outs in zip(*each)]
        close(torch.vmap(function)(*mapped), expected)
        last = [x.movedim(0, -1) for x in mapped]
        close(torch.vmap(lambda *x: function(*[t.contiguous() for t in x]), -1)(*last), expected)
        for one in range(len(mapped)):  # the others are shared
            given = [x if i == one else x[0] for i, x in enumerate(mapped)]
            each = [function(*[x[n] if i == one else x for i, x in enumerate(given)]) for n in range(3)]
            with _Operators() as operators:
                found = torch.vmap(function, tuple(0 if i == one else None for i in range(len(given))))(*given)
            close(found, [torch.stack(outs) for outs in zip(*each)])
            calls.append(operators.calls)
    return "one call" if calls[0] == 1 else "a call each"  # of the first argument, by the first backend


def vmap_and_gradient(case: Case) -> str:
    mapped = case.tensors(lead=(3,))
    expected = [torch.stack(x) for x in zip(*[expected_gradient(case, [x[i] for x in mapped]) for i in range(3)])]
    for backend in case.backends:

        def total(*x, backend=backend):
            return case.total(*x, backend=backend)

        close(torch.vmap(torch.func.grad(total, places(case)))(*mapped), expected)
        leaves = [x.clone().requires_grad_() for x in mapped]
        close(torch.autograd.grad(torch.vmap(total)(*leaves).sum(), leaves), expected)
        close(torch.func.grad(lambda *x, total=total: torch.vmap(total)(*x).sum(), places(case))(*mapped), expected)
    return "yes"


def no_derivative(case: Case) -> str:
    """By autograd and in forward mode: either there is none of the result, or an error tells."""
    words = set()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in case.tensors()]
        for tensors in ([x.requires_grad_() for x in case.tensors()], duals):
            try:
                outs = case.flat(*tensors)
                assert not any(x.requires_grad or forward_ad.unpack_dual(x).tangent is not None for x in outs)
                words.add("none")
            except ValueError as error:
                assert "grad" in str(error)
                words.add("an error")
    (word,) = words
    return word


def compiled_constant(case: Case) -> str:
    torch.compiler.reset()
    function = torch.compile(case.flat, fullgraph=True, backend="aot_eager")
    close(function(*case.tensors()), case.flat(*case.tensors()))
    return "yes"


def compiled(case: Case) -> str:
    torch.compiler.reset()
    function = torch.compile(case.total, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in case.tensors()]
    close(torch.autograd.grad(function(*leaves), leaves), expected_gradient(case))
    return "yes"


class _Module(torch.nn.Module):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor):
        return self.function(*tensors)


def exported(case: Case) -> str:
    tensors = case.tensors()
    program = torch.export.export(_Module(case.flat), tuple(tensors), strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    close(torch.export.load(file).module()(*tensors), case.flat(*tensors))
    return "yes"


def traced(case: Case) -> str:
    """make_fx with symbolic sizes, and fake tensors."""
    tensors = case.tensors()
    graph = make_fx(lambda *x: case.flat(*x), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*tensors)
    close(graph(*tensors), case.flat(*tensors))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fakes = case.flat(*[mode.from_tensor(x) for x in tensors])
    real = case.flat(*tensors)
    assert [(x.shape, x.dtype) for x in fakes] == [(x.shape, x.dtype) for x in real]
    return "yes"


def autocast(case: Case) -> str:
    """float32 inputs, and what the function makes of them under autocast."""
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = case.flat(*tensors)
    kept = case.flat(*tensors)
    if all(torch.equal(a, b) for a, b in zip(found, kept)):
        return "keeps dtypes"
    assert all(torch.isfinite(x).all() for x in found)
    return "casts"


def cuda_graph(name: str) -> str:
    """Whether tests/test_cuda.py replays the function in a CUDA graph."""
    operator = name.replace("sparse24.", "sparse24_").replace("merge_attention", "merged")
    calls = [call for call in CALLS.values() if operator in (call.operator, call.run.__name__)]
    return "yes" if any(not call.waits for call in calls) else "no"


# What the table shows of each function: the case that stands for it.
ROWS = {
    "attention_scores": "attention_scores",
    "score_and_select": "score_and_select",
    "compact": "compact",
    "restore": "restore gate",
    "merge_tokens": "merge_tokens mean",
    "neighbor_attention": "neighbor_attention",
    "text_attention": "text_attention",
    "merge_attention": "merge_attention",
    "sparse24.linear": "sparse24.linear",
}
COLUMNS = {
    "gradient": gradient,
    "second gradient": second_gradient,
    "forward mode": forward_mode,
    "vmap": vmap,
    "torch.compile": compiled,
    "torch.export": exported,
    "autocast": autocast,
}
COLUMNS_OF_CONSTANT = COLUMNS | {
    "gradient": no_derivative,
    "second gradient": no_derivative,
    "forward mode": no_derivative,
    "torch.compile": compiled_constant,
}


def table() -> list[str]:
    """The lines of the table, found by trying."""
    lines = ["| " + " | ".join(["function", *COLUMNS, "CUDA graph"]) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    rows = [(function, CASES[name], COLUMNS) for function, name in ROWS.items()]
    rows += [(function, case, COLUMNS_OF_CONSTANT) for function, case in CONSTANT.items()]
    for function, case, probes in rows:
        cells = [probe(case) for probe in probes.values()]
        lines.append("| " + " | ".join([f"`{function}`", *cells, cuda_graph(function)]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
