"""A new value of a number does not compile a program again: at most twice over ten values, of any number argument.

torch.compile makes a program for the first value and one for an open number. Which arguments are numbers is read from
the signatures, so that a new one comes with a case, or with a reason why it has none.
"""

import inspect
import re

import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.testing import CompileCounterWithBackend

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout, sparse24

pytestmark = pytest.mark.compile

Q = torch.linspace(0, 70, 2 * 4 * 3 * 16).sin().reshape(2, 4, 3, 16)
K = torch.linspace(0, 90, 2 * 2 * 40 * 16).cos().reshape(2, 2, 40, 16)
SCORES = torch.linspace(0, 50, 80).sin().abs().reshape(2, 40) / 10
SEGMENTS = torch.arange(40).expand(2, 40) % 13
STARTS = torch.tensor([0, 15, 40], dtype=torch.int32)
SELECTION = pyvtk.select(SCORES, 9, threshold=0.06)  # some rows have padding
LAYOUT = TokenLayout.from_images([40, 38], [ImageSpan(0, 3, (1, 5, 6)), ImageSpan(1, 2, (2, 4, 4))])
PLAN = pyvtk.neighbor_plan(LAYOUT, 2)
TABLE = torch.zeros((2, 60, 1), dtype=torch.int64)
IDS = torch.where(LAYOUT.visual, 77, torch.arange(40))
GRIDS = torch.tensor([[1, 5, 6], [2, 4, 4]])

INTS = tuple(range(2, 12))
SHARES = tuple(number / 16 for number in INTS)
THRESHOLDS = tuple(number / 144 for number in INTS)


def packed_scores(**options):
    x = K[0].movedim(0, 1).contiguous()
    return pyvtk.attention_scores(x, x, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, **options)


def packed_choice(**options):
    x = K[0].movedim(0, 1).contiguous()
    return pyvtk.score_and_select(x, x, 5, cu_seqlens_q=STARTS, cu_seqlens_k=STARTS, capacity=9, **options)


def attend(plan, **options):
    return pyvtk.neighbor_attention(K.repeat(1, 2, 1, 1), K, K, plan, **options)


# argument -> ten values, and what to do with one of them and the backend; several where an argument has several forms
CASES = {
    "attention_scores": {
        "key_range": [
            (INTS, lambda n, backend: pyvtk.attention_scores(Q, K, key_range=(n, 30), backend=backend)),
            (INTS, lambda n, backend: pyvtk.attention_scores(Q, K, key_range=(1, n), backend=backend)),
        ],
        "scale": [
            (SHARES, lambda n, backend: pyvtk.attention_scores(Q, K, causal=True, scale=n, backend=backend)),
            (INTS, lambda n, backend: pyvtk.attention_scores(Q, K, scale=n, return_lse=True, backend=backend)),
        ],
        "max_seqlen_q": [(INTS, lambda n, backend: packed_scores(max_seqlen_q=n + 40, backend=backend))],
        "max_seqlen_k": [(INTS, lambda n, backend: packed_scores(max_seqlen_k=n + 40, backend=backend))],
    },
    "select": {
        "num_keep": [(INTS, lambda n, backend: pyvtk.select(SCORES, n, backend=backend))],
        "threshold": [
            (THRESHOLDS, lambda n, backend: pyvtk.select(SCORES, threshold=n, backend=backend)),
            (INTS, lambda n, backend: pyvtk.select(SCORES * 100, threshold=n, backend=backend)),
        ],
        "top_p": [(SHARES, lambda n, backend: pyvtk.select(SCORES, top_p=n, backend=backend))],
        "num_segments": [
            (INTS, lambda n, backend: pyvtk.select(SCORES, 2, segments=SEGMENTS, num_segments=n, backend=backend))
        ],
        "capacity": [(INTS, lambda n, backend: pyvtk.select(SCORES, 8, capacity=n, backend=backend))],
    },
    "score_and_select": {
        "num_keep": [(INTS, lambda n, backend: pyvtk.score_and_select(Q, K, n, backend=backend))],
        "key_range": [(INTS, lambda n, backend: pyvtk.score_and_select(Q, K, 5, key_range=(n, 30), backend=backend))],
        "scale": [
            (SHARES, lambda n, backend: pyvtk.score_and_select(Q, K, 5, scale=n, return_scores=True, backend=backend))
        ],
        "max_seqlen_q": [(INTS, lambda n, backend: packed_choice(max_seqlen_q=n + 40, backend=backend))],
        "max_seqlen_k": [(INTS, lambda n, backend: packed_choice(max_seqlen_k=n + 40, backend=backend))],
        "threshold": [
            (THRESHOLDS, lambda n, backend: pyvtk.score_and_select(Q, K, threshold=n, backend=backend)),
        ],
        "top_p": [(SHARES, lambda n, backend: pyvtk.score_and_select(Q, K, top_p=n, backend=backend))],
        "num_segments": [
            (
                INTS,
                lambda n, backend: pyvtk.score_and_select(Q, K, 2, segments=SEGMENTS, num_segments=n, backend=backend),
            )
        ],
        "capacity": [(INTS, lambda n, backend: pyvtk.score_and_select(Q, K, 8, capacity=n, backend=backend))],
    },
    "compact": {
        "total": [(INTS, lambda n, backend: pyvtk.compact(SELECTION, SCORES, packed=True, total=n, backend=backend))],
        "pad_value": [
            (SHARES, lambda n, backend: pyvtk.compact(SELECTION, K, dim=2, pad_value=n, backend=backend)),
            (INTS, lambda n, backend: pyvtk.compact(SELECTION, SEGMENTS, pad_value=n, backend=backend)),
            (INTS, lambda n, backend: pyvtk.compact(SELECTION, SCORES, pad_value=n, backend=backend)),
            (
                INTS,
                lambda n, backend: pyvtk.compact(SELECTION, SCORES, SEGMENTS, pad_value=(n / 4, -1), backend=backend),
            ),
            (
                SHARES,
                lambda n, backend: pyvtk.compact(
                    SELECTION, SCORES, packed=True, total=30, pad_value=n, backend=backend
                ),
            ),
            (
                SHARES,
                lambda n, backend: pyvtk.compact(
                    SELECTION, SCORES, pad_value=n, out=torch.empty(2, SELECTION.capacity), backend=backend
                ),
            ),
            (
                INTS,
                lambda n, backend: pyvtk.compact(
                    SELECTION, SCORES.to(torch.float8_e4m3fn), pad_value=n, backend=backend
                ).float(),
            ),
        ],
    },
    "restore": {
        "gate": [
            (
                SHARES,
                lambda n, backend: pyvtk.restore(
                    SELECTION, SCORES[:, : SELECTION.capacity], SCORES, gate=n, backend=backend
                ),
            )
        ],
    },
    "merge_tokens": {
        "num_groups": [
            (INTS, lambda n, backend: pyvtk.merge_tokens(K[:, 0], SEGMENTS % 2, num_groups=n, backend=backend))
        ],
    },
    "neighbor_attention": {
        "scale": [(SHARES, lambda n, backend: attend(PLAN, scale=n, return_lse=True, backend=backend))],
    },
    "text_attention": {
        "scale": [
            (SHARES, lambda n, backend: pyvtk.text_attention(Q, K, K, scale=n, return_lse=True, backend=backend)),
        ],
    },
    "neighbor_plan": {
        "radius": [
            (INTS, lambda n, backend: pyvtk.neighbor_plan(LAYOUT, n)),
            (INTS, lambda n, backend: pyvtk.neighbor_plan(LAYOUT, (0, n, 1), causal_window=True)),
            (INTS, lambda n, backend: attend(pyvtk.neighbor_plan(LAYOUT, n), backend=backend)),
        ],
    },
    "window_plan": {
        "size": [(INTS, lambda n, backend: pyvtk.window_plan(LAYOUT, n, 1))],
        "shift": [(INTS, lambda n, backend: pyvtk.window_plan(LAYOUT, (1, 3, 4), (0, n, 1)))],
    },
    "routed_plan": {"region": [(INTS, lambda n, backend: pyvtk.routed_plan(LAYOUT, n, TABLE))]},
    "AttentionPlan.tail": {
        "num_queries": [(INTS, lambda n, backend: PLAN.tail(n, 45))],
        "num_keys": [
            (INTS, lambda n, backend: PLAN.tail(3, 40 + n)),
            (INTS, lambda n, backend: PLAN.tail(3, 40 + n, torch.tensor([7, 40]) + n)),
        ],
    },
    "Selection": {
        "num_tokens": [(INTS, lambda n, backend: Selection(SELECTION.indices, SELECTION.counts, 40 + n).mask())],
    },
    "Selection.complement": {"capacity": [(INTS, lambda n, backend: SELECTION.complement(n))]},
    "Selection.from_mask": {
        "capacity": [(INTS, lambda n, backend: Selection.from_mask(LAYOUT.visual, capacity=n, align="right"))],
    },
    "Selection.from_indices": {
        "num_tokens": [(INTS, lambda n, backend: Selection.from_indices(SELECTION.indices, 40 + n).inverse())],
    },
    "TokenLayout.take": {"total": [(INTS, lambda n, backend: LAYOUT.take(SELECTION, packed=True, total=n))]},
    "TokenLayout.from_ids": {
        "image_token_id": [(INTS, lambda n, backend: TokenLayout.from_ids(IDS + (n - 77), n, GRIDS))],
        "merge": [
            (
                INTS,
                lambda n, backend: TokenLayout.from_ids(
                    IDS, 77, torch.cat([GRIDS[:, :1], GRIDS[:, 1:] * n], 1), merge=n
                ),
            )
        ],
    },
}

AXIS = "which axis: another program"
SIZE = "a size that kernels are made for"
HOST = "numbers of the host, before any program"
MODULE = "of a module, made once"
# an argument, or all of a function, of which there is no case, and why
EXCEPTED = {
    "compact(dim)": AXIS,
    "compact(batch_dim)": AXIS,
    "restore(dim)": AXIS,
    "neighbor_plan(block)": SIZE,
    "window_plan(block)": SIZE,
    "routed_plan(block)": SIZE,
    "subset_plan(block)": SIZE,
    "AttentionPlan": "made by the builders; test_plans_as_inputs",
    "AttentionPlan.plot": "draws a picture",
    "ImageSpan": HOST,
    "TokenLayout.from_images": HOST,
    "TokenLayout.from_ids(grids)": "a list of them are numbers of the host; a tensor holds none",
    "sparse24.ActivationObserver": HOST,
    "sparse24.Estimate": HOST,
    "sparse24.ExponentialDecay": MODULE,
    "sparse24.LayerReport": HOST,
    "sparse24.Linear24": MODULE,
    "sparse24.LinearDecay": MODULE,
    "sparse24.Sparse24Weight": MODULE,
    "sparse24.calibrate": HOST,
    "sparse24.calibrate_activations": HOST,
    "sparse24.estimate": HOST,
    "sparse24.sparsify_": HOST,
    "sparse24.structure_decay": HOST,
}


def public_functions():
    """(name, function or class) of everything that the package exports, methods included."""
    for prefix, module in (("", pyvtk), ("sparse24.", sparse24)):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                yield prefix + name, thing
            for method, value in vars(thing).items() if isinstance(thing, type) else ():
                value = getattr(value, "__func__", value)  # of static and class methods
                if inspect.isfunction(value) and not method.startswith("_"):
                    yield f"{prefix}{name}.{method}", value


def number_arguments() -> set[str]:
    """function(argument) for each argument that may be an int or a float, or hold them."""
    found = set()
    for name, function in public_functions():
        for argument in inspect.signature(function).parameters.values():
            if re.search(r"\b(int|float)\b", str(argument.annotation)):
                found.add(f"{name}({argument.name})")
    return found


def test_every_number_argument_has_a_case_or_a_reason():
    found = number_arguments()
    assert len(found) > 60
    cases = {f"{name}({argument})" for name, arguments in CASES.items() for argument in arguments}
    assert cases <= found
    for excepted in EXCEPTED:
        assert any(argument == excepted or argument.startswith(f"{excepted}(") for argument in found), excepted
    functions = {argument.partition("(")[0] for argument in found}
    excepted = {argument for argument in found if argument in EXCEPTED or argument.partition("(")[0] in EXCEPTED}
    assert cases.isdisjoint(excepted) and set(CASES) <= functions
    assert found - cases - excepted == set()


def assert_same(actual, expected) -> None:
    """The same bits; where a number is read from a tensor, the reference may multiply in another order."""
    leaves, spec = pytree.tree_flatten(actual)
    wanted, wanted_spec = pytree.tree_flatten(expected)
    assert spec == wanted_spec
    for leaf, one in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(leaf, one, rtol=1e-6, atol=1e-7)


def compilations(run, values, backend: str = "aot_eager", check=assert_same) -> int:
    """How often ``run`` is compiled over values of its argument, restarts of the analysis included."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for value in values:
        check(compiled(value), run(value))
    return counter.frame_count


def cases():
    takes_backend = {name for name, f in public_functions() if "backend" in inspect.signature(f).parameters}
    for name, arguments in CASES.items():
        for argument, forms in arguments.items():
            for number, form in enumerate(forms):
                for backend in (None, "reference") if name in takes_backend else (None,):
                    yield pytest.param(*form, backend, id=f"{name}({argument})-{number}-{backend or 'default'}")


@pytest.mark.parametrize("values, run, backend", list(cases()))
def test_at_most_twice_over_ten_values(values, run, backend):
    assert len(set(values)) == 10
    assert compilations(lambda number: run(number, backend), values) <= 2


def test_plans_as_inputs():
    """What a plan was made with are numbers of the program that takes it: ten radii, and ten tails."""
    plans = [pyvtk.neighbor_plan(LAYOUT, radius) for radius in INTS]
    assert compilations(lambda plan: attend(plan, return_lse=True), plans) <= 2
    # 16 rows more each time: torch.compile leaves a size open once it has changed, and a tail holds numbers of blocks
    tails = [PLAN.tail(3, 40 + 16 * number) for number in INTS]

    def last_rows(tail):
        x = torch.ones(2, 2, tail.num_keys, 8)
        return pyvtk.neighbor_attention(x[:, :, -3:], x, x, tail)

    assert compilations(last_rows, tails) <= 2


FLOATS = {
    "attention_scores": lambda n, x: pyvtk.attention_scores(x[:, :, :3], x, scale=n, query_reduce="max"),
    "neighbor_attention": lambda n, x: pyvtk.neighbor_attention(x, x, x, PLAN, scale=n),
    "score_and_select": lambda n, x: pyvtk.score_and_select(x[:, :, :3], x, 5, scale=n, return_scores=True)[1],
    "compact": lambda n, x: pyvtk.compact(SELECTION, x * 2, dim=2, pad_value=n),
    "restore": lambda n, x: pyvtk.restore(SELECTION, x[:, :, : SELECTION.capacity], x, dim=2, gate=n),
}


@pytest.mark.parametrize("name", FLOATS)
def test_gradients_follow_the_number(name):
    """The gradient reads the number too; one that kept the first one would be off by much."""
    x = K.clone().requires_grad_()

    def gradient(result):
        return torch.autograd.grad((result * torch.linspace(-1, 2, result.numel()).reshape(result.shape)).sum(), x)[0]

    def check(actual, expected):
        assert_same(actual, expected)
        torch.testing.assert_close(gradient(actual), gradient(expected), rtol=1e-5, atol=1e-6)

    assert compilations(lambda number: FLOATS[name](number, x), SHARES, check=check) <= 2


@pytest.mark.long
@pytest.mark.parametrize("name", FLOATS)
def test_at_most_twice_with_code_for_the_cpu(name):
    """torch's own compiler takes no number that a graph leaves open; what it cannot follow it makes a constant."""
    assert compilations(lambda number: FLOATS[name](number, K), SHARES, backend="inductor") <= 2


def operators_of(run, *numbers) -> list[set[str]]:
    """The operators of ours in each program that is compiled for the numbers."""
    programs = []

    def note(graph, inputs):
        programs.append({str(node.target) for node in graph.graph.nodes if "pyvtk" in str(node.target)})
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend=torch._dynamo.backends.common.aot_autograd(fw_compiler=note))
    for number in numbers:
        compiled(number)
    return programs


def test_settled_numbers_stay_numbers():
    """A CUDA graph takes no tensor of the host: only an open number becomes one."""
    run = CASES["attention_scores"]["scale"][0][1]
    settled, left_open = operators_of(lambda number: run(number, None), 0.25, 0.5)
    assert settled == {"pyvtk.attention_scores.default"} and left_open == {"pyvtk.attention_scores.open"}
    (settled,) = operators_of(lambda number: pyvtk.attention_scores(Q, K, scale=0.25) * number, 0.25)
    assert settled == {"pyvtk.attention_scores.default"}


def open_overloads() -> list[str]:
    names = {name.removeprefix("pyvtk::") for name in torch._C._dispatch_get_all_op_names()}
    return sorted(name for name in names if name.endswith(".open"))


@pytest.mark.parametrize("name", open_overloads())
def test_overloads_are_their_operators_but_for_one_argument(name):
    operator = getattr(torch.ops.pyvtk, name.removesuffix(".open"))
    plain, overload = str(operator.default._schema), str(operator.open._schema).replace(".open(", "(")
    assert re.sub(r"\bTensor (scale|pads)\b", "number", overload) == re.sub(
        r"\b(float scale|float\[\] pads)", "number", plain
    )
    assert "number" in re.sub(r"\bTensor (scale|pads)\b", "number", overload)


@pytest.mark.parametrize("requires_grad", (False, True))
def test_registration(requires_grad):
    number = torch.tensor(0.3, dtype=torch.float64)
    q, k = (x.clone().requires_grad_(requires_grad) for x in (Q, K))
    rest = (*(None,) * 9, False, 0, 40, False, number, "mean,max", "mean", False, False, True)
    torch.library.opcheck(torch.ops.pyvtk.attention_scores.open, (q, k, *rest))
    heads = K.repeat(1, 2, 1, 1).requires_grad_(requires_grad)
    options = (PLAN.tensors(), PLAN.rule(), number, True, False)
    torch.library.opcheck(torch.ops.pyvtk.neighbor_attention.open, (heads, k, k, None, None, *options))
    pads = torch.tensor([0.3, 0.5], dtype=torch.float64)
    axes = ([2, 2], [0, 0], pads, None)
    tensors = [k, K.double().requires_grad_(requires_grad)]
    torch.library.opcheck(torch.ops.pyvtk.compact.open, (SELECTION.indices, SELECTION.counts, False, tensors, *axes))
