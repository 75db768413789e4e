"""What every operator promises on a GPU, over the calls of tests/calls: results, CUDA graphs, streams, threads, no host
synchronisation, the same bits on every run, memory layouts, torch.compile.

Skipped without CUDA. A call whose operator has no kernel for the device is skipped too; both backends run where both
exist. ``PYVTK_GPU_DEVICE=cpu`` runs what needs no CUDA on the CPU's kernels: a test of these tests.
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.utils._pytree as pytree
from calls import CALLS, attention, compact, merge, score, score_and_select, select
from calls import call as calling
from calls.call import BRAIN, DEVICE, HALF, SINGLE, WHOLE, Call, assert_right, difference, make, on, same, values, ways
from calls.compact import FP8
from calls.sparse24 import call24, call24_int8, multiplied, product
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pyvtk
from pyvtk import Selection, backends
from pyvtk.ops import sparse24 as ops24
from pyvtk.reference import sparse24 as reference24
from pyvtk.sparse24 import calibrate as calibrate24
from pyvtk.sparse24 import estimate as estimate24
from pyvtk.sparse24 import linear as linear24

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
cuda = pytest.mark.skipif(DEVICE != "cuda", reason="about CUDA alone")


# ---- running them


def pairs(calls: dict[str, Call]):
    able = [(name, way) for name, call in calls.items() for way in ways(call)]
    found = [pytest.param(name, way, id=f"{name}, {way}" if way else name) for name, way in able]
    return pytest.mark.parametrize(("name", "backend"), found)


every = pairs(CALLS)
unwaited = pairs({name: call for name, call in CALLS.items() if not call.waits})
compiling = pairs({name: call for name, call in CALLS.items() if call.compiles})


@every
def test_equals_the_reference(name, backend):
    call = CALLS[name]
    for seed in range(2):
        inputs = make(call, seed)
        assert_right(call, call.run(backend, *inputs), inputs)


@every
def test_same_bits_on_every_run(name, backend):
    inputs = make(CALLS[name])
    first = CALLS[name].run(backend, *inputs)
    for _ in range(5):
        again = CALLS[name].run(backend, *inputs)
        assert same(again, first), difference(again, first)


def fill(into, tree) -> None:
    for target, source in zip(pytree.tree_leaves(into), pytree.tree_leaves(tree), strict=True):
        if isinstance(target, Tensor) and 0 in target.stride() and target.numel() > 0:
            assert same(target, source), "an expanded input has to stay as it is"
        elif isinstance(target, Tensor):
            target.copy_(source)


@cuda
@unwaited
def test_graph_replays_with_changed_inputs(name, backend):
    call = CALLS[name]
    inputs = make(call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run(backend, *inputs)  # compiles and loads what is loaded once
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call.run(backend, *inputs)
    for seed in (1, 2, 0):
        others = make(call, seed)
        fill(inputs, others)
        graph.replay()
        torch.cuda.synchronize()
        wanted = call.run(backend, *others)
        assert same(result, wanted), f"inputs {seed}: {difference(result, wanted)}"


@cuda
@every
def test_two_streams_at_once(name, backend):
    call = CALLS[name]
    inputs = [make(call, seed) for seed in range(2)]
    expected = [call.run(backend, *x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream() for _ in inputs], []
    for _ in range(10):
        for stream, x in zip(streams, inputs):
            with torch.cuda.stream(stream):
                results.append(call.run(backend, *x))
    torch.cuda.synchronize()
    assert all(same(result, expected[i % 2]) for i, result in enumerate(results))


def run_in_threads(jobs: list, backend, times: int) -> None:
    """Each job (a call and its inputs) in a thread and on a stream of its own, again and again."""
    expected = [call.run(backend, *inputs) for call, inputs in jobs]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    results, errors, start = [[] for _ in jobs], [], threading.Barrier(len(jobs))

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if DEVICE == "cuda" else None
        call, inputs = jobs[i]
        start.wait()
        try:
            with torch.cuda.stream(stream):
                for _ in range(times):
                    results[i].append(call.run(backend, *inputs))
        except Exception as error:
            errors.append(f"thread {i}, call {len(results[i])}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    assert not errors, errors
    for i, wanted in enumerate(expected):
        for number, result in enumerate(results[i]):
            assert same(result, wanted), f"thread {i}, call {number}: {difference(result, wanted)}"


@every
def test_two_threads_at_once(name, backend):
    run_in_threads([(CALLS[name], make(CALLS[name], seed)) for seed in range(2)], backend, 10)


# Two calls of one kernel that ask for other amounts of shared memory, which is a setting of the kernel.
APART = {
    "select": [Call("select", select.scores(1, tokens), select.select(500)) for tokens in (8192, 16384)],
    "long rows of select": [Call("select", select.scores(1, tokens), select.select(500)) for tokens in (20000, 40000)],
    "score and select": [
        score_and_select.chosen(score.heads(1, 28, 4, 1, tokens, 128, BRAIN), 100) for tokens in (1000, 4096)
    ],
    "maximum over pairs": [
        score_and_select.chosen(score.heads(1, 8, 2, queries, 600, 64, HALF), 50, query_reduce="max",
                                head_reduce="group_max", reduce_order="heads_first") for queries in (33, 64)
    ],
    "sparse24, few": [call24(product(rows, 256, 1024)) for rows in (9, 16)],
    "sparse24, many": [call24(product(rows, 256, 1024)) for rows in (40, 200)],
    "merge": [
        Call("merge_tokens", merge.grouped(2, 500, 64, groups, BRAIN), merge.merge(groups)) for groups in (5, 90)
    ],
    "neighbours": [
        attention.attends(attention.placed(where, 4, 2, 64, BRAIN)) for where in (attention.SMALL, attention.VIDEO)
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "backend"), [(name, way) for name, calls in APART.items() for way in ways(calls[0])])
def test_two_threads_with_other_shapes(name, backend):
    run_in_threads([(call, make(call)) for call in APART[name]], backend, 200)


@cuda
@unwaited
def test_host_never_waits(name, backend):
    call = CALLS[name]
    inputs = make(call)
    call.run(backend, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(backend, *inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@every
def test_another_device_is_current(name, backend):
    call = CALLS[name]
    inputs = make(call, device="cuda:1" if DEVICE == "cuda" else DEVICE)
    result = call.run(backend, *inputs)
    assert_right(call, result, inputs)
    assert {x.device for x in pytree.tree_leaves(result) if isinstance(x, Tensor)} <= {
        x.device for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor)
    }


@every
def test_rows_apart(name, backend):
    """Where rows lie and how they are aligned is not seen in the result. The emulation tries more such layouts."""
    call = CALLS[name]
    inputs = make(call)
    found = call.run(backend, *calling.apart(inputs, gap=3, before=1))
    if call.reorders:
        assert_right(call, found, inputs)
    else:
        wanted = call.run(backend, *inputs)
        assert same(found, wanted), difference(found, wanted)


# ---- more than 2^31 elements between rows


def far(x: Tensor) -> Tensor:
    """The same values [2, ...], the second sample more than 2^31 elements behind the first."""
    step = (1 << 31) + 64
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # the memory between is never touched
    try:
        memory = torch.empty(step + x[0].numel(), dtype=x.dtype, device=x.device)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
    view = memory.as_strided(x.shape, (step, *x[0].contiguous().stride()))
    view.copy_(x)
    return view


def two(keep, tokens, *shape, dtype=BRAIN):
    """A selection of two samples, and what it is made from."""
    return lambda: (compact.chosen((2,), tokens, keep), values(2, *shape, dtype=dtype))


FAR = {
    "select": Call("select", select.scores(2, 3000, dtype=BRAIN), select.select(500)),
    "compact": compact.moved(two(31, 97, 97, 64)),
    "bytes": compact.moved(two(31, 97, 97, 64, dtype=torch.uint8)),
    "restore": compact.put_back(lambda: (*two(31, 97, 31, 64)(), values(2, 97, 64, dtype=BRAIN))),
    "caches": Call("compact_kv_", two(31, 97, 2, 97, 64), lambda b, s, x: pyvtk.compact_kv_(s, x, backend=b).clone()),
    "merge": Call("merge_tokens", merge.grouped(2, 97, 64, 9, BRAIN), merge.merge(9), exact=False),
    "score and select": score_and_select.chosen(score.heads(2, 4, 2, 2, 300, 64, BRAIN), 50),
    "score": score.scores(score.heads(2, 4, 2, 80, 300, 64, BRAIN)),
    "sparse24": call24(product(2, 70, 512)),
    "sparse24, many": call24(product(2, 70, 512, HALF), multiplied(choice=(0, 1))),
    "sparse24, int8 x int8": call24_int8(product(2, 70, 512, int8=True)),
}  # fmt: skip


@pairs(FAR)
def test_offsets_beyond_two_to_the_31(name, backend):
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    call = FAR[name]
    inputs = make(call)
    # the last tensor of two samples in 16 bits or less: scores, hidden states, caches, keys
    last = max(i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.element_size() <= 2)
    distant = tuple(far(x) if i == last else x for i, x in enumerate(inputs))
    result = call.run(backend, *distant)
    assert same(result, call.run(backend, *inputs))
    assert_right(call, result, make(call))


# ---- which lane holds what


def one_in_every_place(columns: int) -> tuple[Tensor, Tensor, list[tuple[int, tuple[int, int]]]]:
    """A weight [3 * columns, columns] of 0 and 1 with one 1 in each row, its mask, and of each row what is tried: the
    column of the 1 and the two positions of its group. Other groups keep all pairs of positions, in turn."""
    kept = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    tried = [(column, pair) for column in range(columns) for pair in kept if column % 4 in pair]
    row, group = torch.arange(len(tried)), torch.arange(columns // 4)
    place = torch.tensor([column for column, _ in tried])
    pair = (row[:, None] + group) % 6
    pair[row, place // 4] = torch.tensor([kept.index(pair) for _, pair in tried])
    mask = torch.tensor([[i in pair for i in range(4)] for pair in kept])[pair]
    weight = torch.zeros(len(tried), columns)
    weight[row, place] = 1
    return weight, mask.flatten(1), tried


@pytest.mark.skipif(not ways(Call("sparse24_linear", None, None)), reason="sparse24 has no kernel here")
@pytest.mark.parametrize("rows", [1, 8, 16, 32, 64, 256])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8 weights", "int8 x int8"])
def test_every_place_meets_its_column(kind, rows):
    """A 1 at every place of the weight, and the identity as x: what comes out says which column a place was multiplied
    with. mma.sp reads two bits for each kept weight, from registers of other lanes
    than the weight's; this checks the maps on the device, where the emulation checks them against documents."""
    columns, step = 256, 15 if rows == 1 else 1  # a sample of all columns where each is a call
    weight, mask, tried = one_in_every_place(columns)
    int8 = kind.startswith("int8")
    dtype = HALF if kind == "fp16" else BRAIN
    packed = on(DEVICE, reference24.compress(weight.to(WHOLE if int8 else dtype), mask))
    scales = torch.ones(len(tried), device=DEVICE) if int8 else None
    identity = torch.eye(columns, device=DEVICE).to(dtype)
    for kernel in [0, 1] if rows <= 32 else [1]:
        found = []
        for x in identity.split(rows)[::step]:
            if kind == "int8 x int8":
                one = torch.ones(1, device=DEVICE)
                found.append(ops24.linear_int8(x, *packed, scales, x_scale=one, backend="compiled"))
            else:
                found.append(ops24.linear(x, *packed, scales=scales, choice=(0, kernel), backend="compiled"))
        some = torch.cat(list(torch.arange(columns).split(rows)[::step]))
        found, wanted = torch.cat(found).float().cpu(), weight.T[some]
        wrong = (found != wanted).nonzero().tolist()
        told = [
            f"feature {n}: place {tried[n][0]} (group {tried[n][0] // 4}, kept {tried[n][1]}) times column "
            f"{some[r].item()} of x is {found[r, n].item()}, not {wanted[r, n].item()}"
            for r, n in wrong[:12]
        ]
        name = ("few", "many")[kernel]
        assert not wrong, f"{kind}, {name}, {rows} rows: {len(wrong)} wrong\n" + "\n".join(told)


@pytest.mark.skipif(not ways(Call("sparse24_linear", None, None)), reason="sparse24 has no kernel here")
@pytest.mark.parametrize("rows", [1, 5, 16, 33, 130])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "int8 weights", "int8 x int8"])
def test_whole_numbers_are_exact(kind, rows):
    """Sums without rounding: the dense product, bit for bit, whatever the order."""
    torch.manual_seed(rows)
    dtype, int8 = HALF if kind == "fp16" else BRAIN, kind.startswith("int8")
    dense = torch.randint(-3, 4, (140, 1088))
    packed = reference24.compress(
        dense.to(WHOLE if int8 else dtype), reference24.prune_n_of_m(torch.rand(140, 1088), 2, 4)
    )
    x = torch.randint(-3, 4, (rows, 1088)).to(dtype)
    # float64 holds the sums; the result is rounded once
    wanted = (x.double() @ reference24.decompress(*packed).double().T).to(dtype)
    x, packed = on(DEVICE, (x, packed))
    scales, one = torch.ones(140, device=DEVICE), torch.ones(1, device=DEVICE)
    for kernel in (0, 1):
        if kind == "int8 x int8":
            found = ops24.linear_int8(x, *packed, scales, x_scale=one, backend="compiled")
        else:
            scaled = {"scales": scales} if int8 else {}
            found = ops24.linear(x, *packed, **scaled, choice=(0, kernel), backend="compiled")
        assert same(found.cpu(), wanted), f"{('few', 'many')[kernel]}: {(found.cpu() != wanted).nonzero()[:4].tolist()}"


@cuda
@pytest.mark.skipif(not ways(Call("sparse24_compress", None, None)), reason="sparse24 has no kernel here")
def test_a_wrong_mask_is_refused():
    mask = torch.tensor([True, False, True, False], device=DEVICE).repeat(3, 5)
    mask[1, 9] = True
    with pytest.raises(RuntimeError, match="exactly two"):
        ops24.compress(torch.randn(3, 20, device=DEVICE), mask)


# ---- the vendor's kernel for 2:4 weights. No graph captures it here: what cuSPARSELt allows is not ours to promise.


WITHOUT_VENDOR = backends.why_not_cusparselt(torch.device(DEVICE).type)
vendor24 = pytest.mark.skipif(WITHOUT_VENDOR is not None, reason=f"{WITHOUT_VENDOR}")


def by_vendor(*names, **options):
    """By the vendor's kernel alone, with the weight packed at first need. Further inputs are options ``names``."""
    as_reference = multiplied(*names, **options)

    def run(backend, weight, x, *tensors):
        if backend == "reference":
            return as_reference(backend, weight, x, *tensors)
        weight.choice = (0, 3)
        return linear24(x, weight, **options, **dict(zip(names, tensors)), backend=backend)

    return run


def gradient_by_vendor(backend, weight, x, grad):
    leaf = x.detach().requires_grad_()
    out = by_vendor()(backend, weight, leaf)
    return out.detach(), *torch.autograd.grad(out, leaf, grad.to(out.dtype))


VENDOR24 = {
    **{f"{rows} rows, {str(dtype)[6:]}": call24(product(rows, 256, 1024, dtype), by_vendor())
       for rows in (1, 8, 13, 64, 577, 2950) for dtype in (BRAIN, HALF)},
    "rows apart": call24(product(40, 272, 528, gap=8), by_vendor()),
    "rows apart, unaligned": call24(product(40, 272, 528, HALF, gap=3), by_vendor()),
    "images": call24(product((2, 3), 96, 128), by_vendor()),
    "no rows": call24(product(0, 64, 64), by_vendor()),
    "bias": call24(product(40, 96, 128, bias=BRAIN), by_vendor("bias")),
    "float32 bias": call24(product(40, 96, 128, HALF, bias=SINGLE), by_vendor("bias")),
    "everything": call24(product(33, 96, 128, bias=BRAIN, mul=True), by_vendor("bias", "mul", activation="silu")),
    "gradient": call24(lambda: (*product(33, 96, 128)(), torch.randn(33, 96)), gradient_by_vendor),
    "a weight that does not fit": call24(product(33, 100, 128), by_vendor()),
}  # fmt: skip


@vendor24
@pairs(VENDOR24)
def test_vendor(name, backend):
    call = VENDOR24[name]
    for seed in range(2):
        inputs = make(call, seed)
        result = call.run(backend, *inputs)
        assert_right(call, result, inputs)
        assert same(call.run(backend, *inputs), result)
        assert (inputs[0].vendor is None) == (name == "a weight that does not fit")


@vendor24
def test_vendor_is_measured_and_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("PYVTK_CACHE", str(tmp_path))
    shape = (1024, 1024)
    assert estimate24(64, *shape, BRAIN, DEVICE).source == "analytic"
    calibrate24(DEVICE, dtypes=(BRAIN,), rows=(1, 8, 64, 640), shapes=(shape,), seconds=0.01)
    found = estimate24(640, *shape, BRAIN, DEVICE)
    assert found.source == "measured" and 0 < found.seconds["vendor"] < 1
    assert "vendor" not in estimate24(640, 1000, 1024, BRAIN, DEVICE).seconds


# ---- bad indices: on CUDA they are padding


def bad() -> Selection:
    """Rows that ascend; of seven slots three name tokens that do not exist."""
    rows = torch.tensor([[-9, 0, 3, 5, 40, 41, 1 << 40], [-(1 << 40), 1, 2, 6, 39, 40, 1 << 33]])
    return Selection.from_indices(rows, 40, ascending=True).to(DEVICE)


@cuda
@pytest.mark.skipif(not ways(Call("compact", None, None)), reason="compact has no kernel here")
def test_bad_indices_touch_nothing():
    selection = bad()
    legal = (selection.indices >= 0) & (selection.indices < 40)
    slots = selection.indices.clamp(0, 39)
    around = torch.randn(4, 40, 64, device=DEVICE)
    x = around[1:3]
    moved_rows = pyvtk.compact(selection, x, pad_value=5)
    wanted = x.gather(1, slots[..., None].expand(-1, -1, 64)).where(legal[..., None], torch.tensor(5.0, device=DEVICE))
    assert same(moved_rows, wanted)
    before = around.clone()
    update = torch.randn(2, 7, 64, device=DEVICE)
    put = pyvtk.restore(selection, update, x)
    for row in range(2):
        expected = x[row].clone()
        expected[selection.indices[row][legal[row]]] = update[row][legal[row]]
        assert same(put[row], expected)
    assert same(around, before)
    leaf = x.detach().requires_grad_()
    (grad,) = torch.autograd.grad(pyvtk.compact(selection, leaf).sum(), leaf)
    assert grad.sum().item() == 64 * legal.sum().item()


@cuda
@pytest.mark.skipif(not ways(Call("selection_mask", None, None)), reason="selection_mask has no kernel here")
def test_bad_indices_are_no_tokens_of_a_selection():
    selection, legal = bad(), torch.zeros(2, 40, dtype=torch.bool, device=DEVICE)
    for row, tokens in enumerate(([0, 3, 5], [1, 2, 6, 39])):
        legal[row, tokens] = True
    assert same(selection.mask(), legal) and same(selection.inverse() >= 0, legal)
    assert same(selection.complement().mask(), ~legal)
    seven = Selection.from_indices(torch.tensor([[6, 0, 7, 1 << 40, -1, 2]] * 2), 7).to(DEVICE)
    assert same(selection.then(seven).indices[:, :3], selection.indices[:, [6, 0, 2]])
    assert selection.then(seven).counts.tolist() == [3, 3]


@cuda
@pytest.mark.skipif(not ways(Call("compact_kv_", None, None)), reason="compact_kv_ has no kernel here")
def test_bad_indices_stay_inside_the_cache():
    around = torch.randn(4, 2, 40, 64, device=DEVICE)
    before = around.clone()
    pyvtk.compact_kv_(bad(), around[1:3])
    torch.cuda.synchronize()
    assert same(around[0], before[0]) and same(around[3], before[3])
    assert same(around[1:3, :, 7:], before[1:3, :, 7:])


@cuda
@pytest.mark.skipif(not ways(Call("merge_tokens", None, None)), reason="merge_tokens has no kernel here")
def test_bad_groups_are_left_out():
    x = torch.randn(2, 50, 16, device=DEVICE)
    assignment = torch.randint(0, 6, (2, 50), device=DEVICE)
    wrong = assignment.clone()
    wrong[:, ::7] = torch.tensor([6, 1 << 40], device=DEVICE)[:, None]
    assignment[:, ::7] = -1
    merged = [pyvtk.merge_tokens(x, a, num_groups=6) for a in (wrong, assignment)]
    torch.cuda.synchronize()
    assert same(*merged)


@cuda
@pytest.mark.skipif(not ways(Call("select", None, None)), reason="select has no kernel here")
def test_bad_offsets_do_not_crash():
    x = torch.randn(100, device=DEVICE)
    for ends in ([0, 1000, 100], [0, 60, 30], [-5, 50, 100], [0, 1 << 30, -(1 << 30)]):
        cu = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        selection = pyvtk.select(x, 10, cu_seqlens=cu, capacity=10)
        torch.cuda.synchronize()
        assert (selection.indices >= -1).all() and (selection.indices < 100).all()


# ---- torch's own checks


class Recorder(TorchDispatchMode):
    """Remembers which of our operators were called, and with what."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "pyvtk":
            self.seen.append(
                (function, pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, arguments))
            )
        return function(*arguments, **(options or {}))


@every
def test_opcheck(name, backend):
    inputs = make(CALLS[name])
    with Recorder() as recorder:
        CALLS[name].run(backend, *inputs)
    assert recorder.seen, "no operator of ours was called"
    for function, arguments in recorder.seen:
        tests = ["test_faketensor"]
        if not any(isinstance(x, Tensor) and x.dtype == FP8 for x in pytree.tree_leaves(arguments)):
            tests.append("test_schema")  # with arithmetic that torch has not for 8-bit floats
        torch.library.opcheck(function, arguments, test_utils=tests)


@pytest.mark.compile
@compiling
def test_compiles_without_a_break(name, backend):
    call = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(call.run, fullgraph=True, dynamic=False)
    for seed in range(2):
        inputs = make(call, seed)
        assert same(compiled(backend, *inputs), call.run(backend, *inputs))


def test_something_ran():
    """Else all of the above is empty, and green."""
    assert any(ways(call) for call in CALLS.values()), "no operator has a kernel for this device"
