"""compact, restore, compact_kv_: compiled against the reference, gradients, compile, errors, edges."""

import mmap
import resource

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget, same

import pyvtk
from pyvtk import _C, Selection
from pyvtk.reference import compact as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DTYPES = (
    *FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.complex64,
    torch.complex128, torch.float8_e4m3fn,
)  # fmt: skip
# of which torch knows little more than the size
RARE = (
    torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.float8_e4m3fn, torch.float8_e4m3fnuz,
    torch.float8_e5m2, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2,
)  # fmt: skip
OPS = torch.ops.pyvtk


def random(shape, dtype=torch.float32):
    x = torch.randn(shape, dtype=torch.float64) * 3
    return (x > 0) if dtype == torch.bool else x.abs().to(dtype) if dtype == torch.uint8 else x.to(dtype)


def selection(rows=(2,), tokens=9, capacity=5, align="left", duplicates=False, counts=None):
    """Random tokens in random order; every row has another count."""
    shape = (*rows, capacity)
    if duplicates:
        indices = torch.randint(0, max(tokens, 1), shape)
    else:
        indices = torch.rand(*rows, tokens).argsort(-1)[..., :capacity]
    if counts is None:
        counts = torch.randint(0, indices.shape[-1] + 1, rows, dtype=torch.int32)
    return Selection.from_indices(indices, tokens, counts=counts, align=align)


def ascending(rows=(2,), tokens=9, capacity=5):
    return Selection.from_mask(torch.rand(*rows, tokens) < 0.5, capacity=capacity)


def packed_source(lengths=(3, 0, 4), capacity=2):
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = [(starts[i] + torch.randperm(n))[:capacity].sort().values for i, n in enumerate(lengths)]
    indices = torch.full((len(lengths), capacity), -1)
    for i, row in enumerate(rows):
        indices[i, : len(row)] = row
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int32)
    return Selection(indices, counts, int(starts[-1]), source_cu_seqlens=starts.int())


def both(function, *args, **kwargs):
    """The compiled result, after comparing it bit for bit with the reference."""
    result = function(*args, backend="compiled", **kwargs)
    same(result, function(*args, backend="reference", **kwargs))
    return result


# Forward: a copy, so equality is exact.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(dtype):
    sel = selection()
    x, pad = random((2, 9, 6), dtype), 1 if dtype in (torch.bool, torch.uint8) else -3
    out = both(pyvtk.compact, sel, x, pad_value=pad)
    assert (out[~sel.valid].to(torch.complex128) == pad).all()
    both(pyvtk.compact, sel, x, packed=True, total=7, pad_value=pad)
    both(pyvtk.restore, sel, out, x)


def bits(shape, dtype):
    """Every bit at random."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("backend", ("compiled", "reference"))
@pytest.mark.parametrize("dtype", RARE, ids=str)
def test_rare_dtypes_move_as_bits(dtype, backend):
    sel, x, base = ascending(), bits((2, 9, 6), dtype), bits((2, 9, 6), dtype)
    cache = bits((2, 3, 9, 4), dtype)

    def equal(actual, expected):
        assert actual.dtype == dtype
        assert torch.equal(actual.view(torch.uint8), expected)

    size, raw = dtype.itemsize, x.view(torch.uint8)
    for pad in (0,) if dtype == torch.float4_e2m1fn_x2 else (0, 2, 2**63) if dtype == torch.uint64 else (0, 2):
        filler = torch.full((1,), pad, dtype=dtype).view(torch.uint8) if pad else torch.zeros(size, dtype=torch.uint8)
        expected = torch.where(sel.valid[..., None], raw.gather(1, along(sel, 6 * size)), filler.repeat(6))
        short = pyvtk.compact(sel, x, pad_value=pad, backend=backend)
        equal(short, expected)
        packed = pyvtk.compact(sel, x, pad_value=pad, packed=True, total=12, backend=backend)
        rows = expected[sel.valid]
        equal(packed, torch.cat([rows, filler.repeat(12 - len(rows), 6)]))
    back = pyvtk.restore(sel, short, base, backend=backend)
    equal(back, torch.where(sel.mask()[..., None], raw, base.view(torch.uint8)))
    before = cache.view(torch.uint8).clone()
    moved = before.gather(2, along(sel, 4 * size)[:, None].expand(-1, 3, -1, -1))
    before[:, :, :5] = torch.where(sel.valid[:, None, :, None], moved, 0)
    pyvtk.compact_kv_(sel, cache, backend=backend)
    equal(cache, before)


def along(sel, width):
    """Indices to gather rows of ``width`` with."""
    return sel.indices.clamp(min=0)[..., None].expand(-1, -1, width)


def bundle(batch=2, tokens=9):
    """hidden, positions, mask, labels, a broadcast table, an unbatched table, keys; their dims, batch_dims and pads."""
    tensors = (
        random((batch, tokens, 6), torch.bfloat16), torch.arange(3 * batch * tokens).view(3, batch, tokens),
        torch.rand(batch, tokens) < 0.5, torch.randint(0, 9, (batch, tokens)), random((1, tokens, 4)),
        random((tokens, 4)), random((batch, 3, tokens, 2)),
    )  # fmt: skip
    return tensors, {
        "dim": (1, 2, 1, 1, 1, 0, 2),
        "batch_dim": (0, 1, 0, 0, 0, None, 0),
        "pad_value": (0, 1, 0, -100, 2, 3, -0.5),
    }


@pytest.mark.parametrize("align", ("left", "right"))
@pytest.mark.parametrize("total", ("padded", None, 3, 20), ids=str)
def test_bundle_in_one_call(align, total):
    tensors, axes = bundle()
    sel = selection(align=align)
    packed = {} if total == "padded" else {"packed": True, "total": total}
    out = both(pyvtk.compact, sel, *tensors, **axes, **packed)
    rows = int(sel.counts.sum()) if total is None else total
    want = {"padded": [(2, 5, 6), (3, 2, 5), (2, 5), (2, 5), (2, 5, 4), (2, 5, 4), (2, 3, 5, 2)]}
    shapes = want.get(total, [(rows, 6), (3, rows), (rows,), (rows,), (rows, 4), (rows, 4), (rows, 3, 2)])
    assert [tuple(x.shape) for x in out] == shapes
    # by hand
    slots = [[b, s] for b in range(2) for s in range(5) if sel.valid[b, s]]
    for at, (b, s) in enumerate(slots if total != "padded" else []):
        if at < rows:
            assert torch.equal(out[0][at], tensors[0][b, sel.indices[b, s]])
            assert torch.equal(out[1][:, at], tensors[1][:, b, sel.indices[b, s]])
    if total == "padded":
        assert torch.equal(out[5][sel.valid], tensors[5][sel.indices[sel.valid]])
        assert (out[3][~sel.valid] == -100).all()


def test_layouts():
    sel = selection()
    views = {
        "transposed": (random((9, 2)).t(), 1, 0),
        "channels strided": (random((2, 9, 12))[..., ::2], 1, 0),
        "channels first": (random((2, 6, 9)).transpose(1, 2), 1, 0),
        "heads inside": (random((2, 9, 3, 4)).transpose(1, 2), 2, 0),
        "expanded": (random((2, 1, 4)).expand(2, 9, 4), 1, 0),
        "huge strides": (random((2, 9, 4096))[..., 5:9], 1, 0),
        "offset": (random((3, 12, 7))[1:, 2:11, 1:6], 1, 0),
        "tokens before batch": (random((9, 2, 5)), 0, 1),
        "negative": (random((2, 3, 9, 4)), -2, -4),
        "scalar rows of 16 bytes": (random((2, 9), torch.complex128), 1, 0),
        "long rows": (random((2, 9, 700)), 1, 0),
    }
    for x, dim, batch_dim in views.values():
        both(pyvtk.compact, sel, x, dim=dim, batch_dim=batch_dim, pad_value=7)
        both(pyvtk.compact, sel, x, dim=dim, batch_dim=batch_dim, pad_value=7, packed=True)


@pytest.mark.parametrize("channels", (4, 1024, 200_000))  # 1 KiB, 240 KiB and 46 MiB
def test_results_are_resizable(channels):
    """As fully sharded training and offloading of activations free a tensor's memory and bring it back."""
    sel, x = selection((1,), 64, 60), random((1, 64, channels))
    result = pyvtk.compact(sel, x)
    kept, storage = result.clone(), result.untyped_storage()
    assert storage.resizable() and storage.nbytes() == result.nbytes
    storage.resize_(0)
    storage.resize_(kept.nbytes)
    result.copy_(kept)
    same(result, kept)
    wide = torch.ones(1, 70, channels)
    with pytest.warns(UserWarning, match="An output with one or more elements was resized"):
        torch.add(wide, wide, out=result)
    same(result, wide + wide)


def faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def gives_huge_pages() -> bool:
    """Whether the system gives huge pages on request, which depends on how it is set and on what is free."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    memory = mmap.mmap(-1, 96 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
    memory.madvise(mmap.MADV_HUGEPAGE)
    before = faults()
    for page in range(0, len(memory), 4096):
        memory[page] = 1
    return faults() - before < len(memory) / 4096 / 4


@pytest.mark.skipif(_C.build_info()["sanitize"] != "", reason="sanitizers allocate in their own way")
def test_large_results_take_huge_pages():
    if not gives_huge_pages():
        pytest.skip("the system gives no huge pages")
    sel, x = selection((1,), 64, 60), random((1, 64, 400_000))
    taken = []
    for _ in range(3):
        before = faults()
        result = pyvtk.compact(sel, x)
        taken.append(faults() - before)
        assert result.nbytes > 32 * 2**20
        del result
    assert min(taken) < 60 * 400_000 * 4 / 4096 / 4


def test_large_outputs_are_streamed():
    sel = selection(tokens=12, capacity=9)
    x = random((2, 12, 500_003))[..., 1:]
    both(pyvtk.compact, sel, x)


@pytest.mark.parametrize("align", ("left", "right"))
def test_head_axis(align):
    sel = selection(rows=(2, 3), align=align)
    k = random((2, 3, 9, 4))
    out = both(pyvtk.compact, sel, k, k.half(), dim=2)[0]
    assert torch.equal(out[1, 2][sel.valid[1, 2]], k[1, 2, sel.indices[1, 2][sel.valid[1, 2]]])
    both(pyvtk.restore, sel, out, k, dim=2)


def test_packed_source():
    sel = packed_source()
    x, other = random((7, 4)), random((2, 7))
    out = both(pyvtk.compact, sel, x, other, dim=(0, 1), batch_dim=None)
    assert out[0].shape == (3, 2, 4) and out[1].shape == (3, 2, 2)
    assert both(pyvtk.compact, sel, x, dim=0, batch_dim=None, packed=True).shape == (int(sel.counts.sum()), 4)
    mask = sel.mask()
    assert torch.equal(both(pyvtk.restore, sel, out[0], dim=0), x * mask[:, None])
    same(pyvtk.restore(sel, -out[0], x, dim=0), torch.where(mask[:, None], -x, x))


@pytest.mark.parametrize("batch, tokens, capacity, channels", [(0, 9, 5, 4), (2, 9, 0, 4), (2, 9, 5, 0), (2, 0, 3, 4)])
def test_empty(batch, tokens, capacity, channels):
    sel = selection((batch,), tokens, capacity, counts=torch.zeros(batch, dtype=torch.int32))
    sel = Selection(torch.full((batch, capacity), -1), sel.counts, tokens)
    x = random((batch, tokens, channels))
    out = both(pyvtk.compact, sel, x, pad_value=2)
    both(pyvtk.compact, sel, x, packed=True)
    both(pyvtk.compact, sel, x, packed=True, total=3)
    same(both(pyvtk.restore, sel, out, x), x)
    if capacity <= tokens:
        pyvtk.compact_kv_(sel, x[:, None].clone())


def test_out():
    tensors, axes = bundle()
    sel = selection()
    expected = pyvtk.compact(sel, *tensors, **axes)
    for backend in ("compiled", "reference"):
        outs = tuple(torch.empty_like(x) for x in expected)
        assert pyvtk.compact(sel, *tensors, **axes, out=outs, backend=backend) is outs
        same(outs, expected)
    wide = torch.zeros(2, 5, 12, dtype=torch.bfloat16)
    pyvtk.compact(sel, tensors[0], out=wide[..., 3:9])
    same(wide[..., 3:9], expected[0])
    assert (wide[..., :3] == 0).all() and (wide[..., 9:] == 0).all()


def test_indices_are_checked_against_the_axis():
    x = random((2, 9, 4))
    for index in (9, 1 << 40, -2):
        bad = Selection(torch.tensor([[0, index], [1, 2]]), torch.tensor([2, 2], dtype=torch.int32), 9, True)
        for call in (
            lambda bad: pyvtk.compact(bad, x),
            lambda bad: pyvtk.restore(bad, x[:, :2]),
            lambda bad: pyvtk.compact_kv_(bad, x[:, None].clone()),
            lambda bad: pyvtk.compact(bad, x, packed=True, total=1),
        ):
            with pytest.raises(RuntimeError, match="index"):
                call(bad)
    # what stands in padding does not matter
    ignored = Selection(torch.tensor([[0, 99], [1, 2]]), torch.tensor([1, 2], dtype=torch.int32), 9)
    both(pyvtk.compact, ignored, x)


# Properties.

cases = st.tuples(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 12), st.sampled_from(("left", "right")), st.integers(0, 99)
)


@settings(max_examples=60, deadline=None)
@given(cases)
def test_restore_inverts_compact(case):
    batch, tokens, capacity, align, seed = case
    torch.manual_seed(seed)
    sel = Selection.from_mask(torch.rand(batch, tokens) < 0.6, capacity=capacity, align=align)
    x = random((batch, tokens, 3))
    kept = both(pyvtk.compact, sel, x)
    same(both(pyvtk.restore, sel, kept, x), x)
    same(both(pyvtk.restore, sel, kept), x * sel.mask()[..., None])
    gone = sel.complement()
    rest = both(pyvtk.restore, gone, both(pyvtk.compact, gone, x), both(pyvtk.restore, sel, kept))
    same(rest, x)
    assert torch.equal(both(pyvtk.compact, sel, x, packed=True), kept[sel.valid])
    # in place
    cache = x[:, None].repeat(1, 2, 1, 1)
    if align == "left" and capacity <= tokens:
        view = pyvtk.compact_kv_(sel, cache)
        same(view[:, 1], kept)
        same(cache[:, :, capacity:], x[:, None, capacity:].expand(-1, 2, -1, -1))


@settings(max_examples=40, deadline=None)
@given(cases, st.booleans())
def test_any_selection_with_duplicates(case, packed):
    batch, tokens, capacity, align, seed = case
    torch.manual_seed(seed)
    sel = selection((batch,), tokens, capacity, align, duplicates=True)
    x = random((batch, tokens, 3))
    out = both(pyvtk.compact, sel, x, packed=packed)
    if not packed:
        both(pyvtk.restore, sel, out + torch.arange(capacity)[:, None], x)


def test_threads_do_not_matter():
    sel = selection((3,), 300, 200, duplicates=True)
    x = random((3, 300, 500)).requires_grad_()

    def everything():
        y = pyvtk.compact(sel, x, packed=True)
        z = pyvtk.restore(sel, pyvtk.compact(sel, x), x, gate=0.3)
        return y, z, torch.autograd.grad(y.square().sum() + z.square().sum(), x)[0]

    one = everything()
    torch.set_num_threads(2)
    try:
        same(everything(), one)
    finally:
        torch.set_num_threads(1)


# In-place caches.


@pytest.mark.parametrize("rows", ((2,), (2, 3)), ids=("shared", "per head"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.int8, torch.float64), ids=str)
def test_compact_kv(rows, dtype):
    sel = ascending(rows, 40, 20)
    caches = [
        random((2, 3, 40, 8), dtype),
        random((2, 40, 3, 8), dtype).transpose(1, 2),
        random((2, 3, 50, 9), dtype)[:, :, 3:43, :8],
    ]
    expected = [c.clone() for c in caches]
    reference.compact_kv_(sel.indices, sel.counts, expected)
    views = pyvtk.compact_kv_(sel, *caches)
    for view, cache, want in zip(views, caches, expected):
        assert view.shape == (2, 3, 20, 8) and view.data_ptr() == cache.data_ptr()
        same(cache, want)


def test_compact_kv_refuses_indices_that_do_not_ascend():
    bad = Selection.from_indices(torch.tensor([[3, 1]]), 9, ascending=True)
    cache = random((1, 2, 9, 4))
    before = cache.clone()
    with pytest.raises(RuntimeError, match="ascending"):
        pyvtk.compact_kv_(bad, cache)
    same(cache, before)


# Gradients: equal to torch's own through the reference.


def gradients(function, inputs, backend):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outs = function(*leaves, backend=backend)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.manual_seed(1)
    return torch.autograd.grad(outs, leaves, [torch.randn(o.shape).to(o.dtype) for o in outs])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", (False, True))
def test_gradient_of_compact_is_an_exact_scatter(instruction_set, dtype, packed):
    x, table, rope, k = (
        random((2, 9, 40), dtype),
        random((9, 4), dtype),
        random((1, 9, 4), dtype),
        random((2, 3, 9, 4), dtype),
    )
    for duplicates in (False, True):
        sel = selection(duplicates=duplicates)
        call = {"dim": (1, 0, 1, 2), "batch_dim": (0, None, 0, 0), "packed": packed, "total": 6 if packed else None}
        run = lambda *leaves, backend: pyvtk.compact(sel, *leaves, **call, backend=backend)  # noqa: B023, E731
        compiled, plain = (gradients(run, (x, table, rope, k), backend) for backend in ("compiled", "reference"))
        same((compiled[0], compiled[3]), (plain[0], plain[3])) if not duplicates else None
        oracle = gradients(run, [t.double() for t in (x, table, rope, k)], "reference")
        for a, b, c in zip(compiled, oracle, plain):
            if dtype in (torch.float32, torch.float64):
                torch.testing.assert_close(a, c)
            else:
                # torch.randn is rounded to the dtype first, so the oracle differs by that rounding of every summand
                torch.testing.assert_close(a.double(), b, rtol=0.02, atol=0.05)


def test_gradient_skips_what_has_none():
    sel = selection(counts=torch.tensor([5, 3], dtype=torch.int32))
    x, ids = random((2, 9, 4)).requires_grad_(), torch.arange(18).view(2, 9)
    frozen = random((2, 9, 2))
    out, kept_ids, kept = pyvtk.compact(sel, x, ids, frozen)
    assert out.requires_grad and not kept_ids.requires_grad
    (out.sum() + kept.sum()).backward()
    assert torch.equal(x.grad, sel.mask()[..., None].float().expand(2, 9, 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", ("plain", "heads", "packed source"))
def test_gradient_of_restore(instruction_set, dtype, case):
    for duplicates in (False, True):
        if case == "packed source":
            sel, dim, shape = packed_source(), 0, (7, 20)
        elif case == "heads":
            sel, dim, shape = selection((2, 3), duplicates=duplicates), 2, (2, 3, 9, 20)
        else:
            sel, dim, shape = selection(duplicates=duplicates), 1, (2, 9, 20)
        update, base = random((*sel.indices.shape, 20), dtype), random(shape, dtype)
        gate = torch.rand(sel.indices.shape)
        replace = lambda u, b, backend: pyvtk.restore(sel, u, b, dim=dim, backend=backend)  # noqa: B023, E731
        same(gradients(replace, (update, base), "compiled"), gradients(replace, (update, base), "reference"))
        both(pyvtk.restore, sel, update, base, dim=dim)
        gated = lambda u, b, g, backend: pyvtk.restore(sel, u, b, gate=g, dim=dim, backend=backend)  # noqa: B023, E731
        wide = gate.to(dtype) if dtype == torch.float64 else gate
        tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 0.02, "atol": 0.02}
        actual, plain = (gradients(gated, (update, base, wide), backend) for backend in ("compiled", "reference"))
        torch.testing.assert_close(actual, plain, **tolerance)
        with torch.no_grad():
            oracle = gated(update.double(), base.double(), wide.double(), backend="reference")
            assert_within_budget(
                gated(update, base, wide, backend="compiled"), oracle, gated(update, base, wide, backend="reference")
            )


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck():
    for duplicates in (False, True):
        sel = selection((2,), 4, 3, duplicates=duplicates, counts=torch.tensor([3, 2], dtype=torch.int32))
        axes = {"dim": (1, 0, 1), "batch_dim": (0, None, 0)}
        for packed in ({}, {"packed": True, "total": 4}, {"packed": True, "total": 7}):
            run = lambda *x: pyvtk.compact(sel, *x, **axes, **packed)  # noqa: B023, E731
            inputs = (double(2, 4, 2), double(4, 2), double(1, 4))
            assert torch.autograd.gradcheck(run, inputs)
            assert torch.autograd.gradgradcheck(run, inputs)
        assert torch.autograd.gradcheck(lambda u, b: pyvtk.restore(sel, u, b), (double(2, 3, 2), double(2, 4, 2)))  # noqa: B023
        assert torch.autograd.gradcheck(
            lambda u, b, g: pyvtk.restore(sel, u, b, gate=g),  # noqa: B023
            (double(2, 3, 2), double(2, 4, 2), double(2, 3)),
        )


# The operators' contracts.


@pytest.mark.parametrize("grad", (False, True))
def test_opcheck(grad):
    sel = selection(counts=torch.tensor([5, 3], dtype=torch.int32))
    rows = (sel.indices, sel.counts, False)
    x, u = random((2, 9, 4)).requires_grad_(grad), random((2, 5, 4)).requires_grad_(grad)
    gate = torch.rand(2, 5).requires_grad_(grad)
    table = random((9, 2)).requires_grad_(grad)
    groups = torch.randint(-1, 3, (2, 9))
    calls = [
        (OPS.compact, (*rows, [x, table, groups], [1, 0, 1], [0, -1, 0], [0.0, 1.0, -100.0], None)),
        (OPS.compact, (*rows, [x, table], [1, 0], [0, -1], [0.0, 0.0], 6)),
        (OPS.compact_backward, (*rows, [u, u], [1, 0], [0, -1], [2, 1], 9, None)),
        (OPS.compact_backward, (*rows, [random((6, 4)).requires_grad_(grad)], [1], [0], [2], 9, 6)),
        (OPS.restore, (*rows, u, x, None, 1, 9, False)),
        (OPS.restore, (*rows, u, x, gate, 1, 9, False)),
        (OPS.restore, (*rows, None, x, None, 1, 9, False)),
    ]
    if not grad:
        calls += [
            (OPS.compact_forward, (*rows, [x, table], [1, 0], [0, -1], [0.0, 0.0], 6)),
            (OPS.compact_out, (*rows, [x], [1], [0], [0.0], None, [torch.empty(2, 5, 4)])),
            (OPS.restore_backward, (*rows, x, u, gate, 1, False)),
            (OPS.restore_backward, (*rows, x, None, None, 1, False)),
            (OPS.compact_kv_, (ascending().indices, ascending().counts.clamp(max=0), [random((2, 3, 9, 4))])),
        ]
    for op, args in calls:
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("backend", ("compiled", "reference"))
def test_compiles_without_graph_breaks(backend):
    def step(sel, x, table, cache, gate):
        kept, rope = pyvtk.compact(sel, x, table, dim=(1, 0), batch_dim=(0, None), pad_value=(0, 1), backend=backend)
        packed = pyvtk.compact(sel, x, packed=True, total=7, backend=backend)
        back = pyvtk.restore(sel, kept, x, gate=gate, backend=backend)
        view = pyvtk.compact_kv_(sel, cache, backend=backend)
        return kept, rope, packed, back, view

    sel = ascending()
    args = (sel, random((2, 9, 4)), random((9, 4)), random((2, 3, 9, 4)), torch.rand(2, 5))
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    expected = step(*args)
    actual = torch.compile(step, fullgraph=True, backend="aot_eager")(*copies)
    torch.testing.assert_close(actual, expected)


def test_gradients_through_compile():
    sel, x = selection(), random((2, 9, 4)).requires_grad_()

    def step(sel, x):
        return pyvtk.restore(sel, 2 * pyvtk.compact(sel, x), x).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(compiled(sel, x), x)[0], torch.autograd.grad(step(sel, x), x)[0])


def test_few_recompiles_over_lengths():
    compiles = []

    def count(graph, inputs):
        compiles.append(1)
        return graph.forward

    def step(sel, x, cache):
        pyvtk.compact_kv_(sel, cache)
        return pyvtk.restore(sel, pyvtk.compact(sel, x), x)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for tokens in range(11, 31, 2):
        sel, x = ascending((2,), tokens, tokens // 2), random((2, tokens, 4))
        same(compiled(sel, x, random((2, 3, tokens, 4))), x)
    assert len(compiles) <= 2


# Wrong calls: (what the message must contain, call).

SEL, HEADS, PACKED = selection(), selection((2, 3)), packed_source()
X, U, K = torch.zeros(2, 9, 4), torch.zeros(2, 5, 4), torch.zeros(2, 3, 9, 4)
UP = ascending()
WRONG = {
    "compact: selection": lambda: pyvtk.compact(X, X),
    "compact: tensors must be at least": lambda: pyvtk.compact(SEL),
    "compact: tensors[1] must be a tensor": lambda: pyvtk.compact(SEL, X, 3),
    "compact: tensors[0] must be a dense": lambda: pyvtk.compact(SEL, X.to_sparse()),
    "compact: dim must be an int": lambda: pyvtk.compact(SEL, X, dim=1.0),
    "compact: dim must be in -3..2": lambda: pyvtk.compact(SEL, X, dim=3),
    "compact: dim must be one value": lambda: pyvtk.compact(SEL, X, dim=(1, 1)),
    "compact: batch_dim must be one value": lambda: pyvtk.compact(SEL, X, X, batch_dim=(0,)),
    "compact: batch_dim must be in": lambda: pyvtk.compact(SEL, X, batch_dim=-4),
    "compact: batch_dim must differ": lambda: pyvtk.compact(SEL, X, batch_dim=1),
    "compact: batch_dim must be None": lambda: pyvtk.compact(PACKED, torch.zeros(3, 7, 2)),
    "compact: tensors[0] must have 9 tokens": lambda: pyvtk.compact(SEL, X[:, :8]),
    "compact: tensors[0] must have batch size 2": lambda: pyvtk.compact(SEL, torch.zeros(3, 9)),
    "compact: dim and batch_dim must be 2 and 0": lambda: pyvtk.compact(HEADS, X),
    "compact: tensors[0] must begin with": lambda: pyvtk.compact(HEADS, K[:, :2], dim=2),
    "compact: packed must be True or False": lambda: pyvtk.compact(SEL, X, packed=1),
    "compact: packed must be False": lambda: pyvtk.compact(HEADS, K, dim=2, packed=True),
    "compact: total must be None": lambda: pyvtk.compact(SEL, X, total=3),
    "compact: total must be an int": lambda: pyvtk.compact(SEL, X, packed=True, total=2.0),
    "compact: total must be at least 0": lambda: pyvtk.compact(SEL, X, packed=True, total=-1),
    "compact: pad_value must be a number": lambda: pyvtk.compact(SEL, X, pad_value="0"),
    "compact: pad_value must fit dtype bool": lambda: pyvtk.compact(SEL, X.bool(), pad_value=2),
    "compact: pad_value must fit dtype uint8": lambda: pyvtk.compact(SEL, X.byte(), pad_value=-1),
    "compact: pad_value must fit dtype int64": lambda: pyvtk.compact(SEL, X.long(), pad_value=0.5),
    "compact: out must be a tensor": lambda: pyvtk.compact(SEL, X, X, out=U),
    "compact: out[0] must have dtype": lambda: pyvtk.compact(SEL, X, out=U.half()),
    "compact: out[0] must be the result's shape": lambda: pyvtk.compact(SEL, X, out=X),
    "compact: out[0] must not be expanded": lambda: pyvtk.compact(SEL, X, out=U[..., :1].expand(2, 5, 4)),
    "compact: out must be None": lambda: pyvtk.compact(SEL, X.clone().requires_grad_(), out=U),
    "compact: out must not share": lambda: pyvtk.compact(SEL, X, out=X.view(-1)[20:60].view(2, 5, 4)),
    "compact: backend": lambda: pyvtk.compact(SEL, X, backend="fast"),
    "restore: selection": lambda: pyvtk.restore(None, U),
    "restore: update must be a tensor": lambda: pyvtk.restore(SEL, None),
    "restore: update must have rows": lambda: pyvtk.restore(SEL, X),
    "restore: base must be a tensor": lambda: pyvtk.restore(SEL, U, 0.0),
    "restore: base must have dtype": lambda: pyvtk.restore(SEL, U, X.half()),
    "restore: base must be update's shape": lambda: pyvtk.restore(SEL, U, X[:, :8]),
    "restore: dim must lie behind": lambda: pyvtk.restore(SEL, U, X, dim=0),
    "restore: dim must be in": lambda: pyvtk.restore(SEL, U, X, dim=5),
    "restore: gate must be a number": lambda: pyvtk.restore(SEL, U, X, gate="1"),
    "restore: gate must be shaped": lambda: pyvtk.restore(SEL, U, X, gate=torch.zeros(2, 4)),
    "restore: gate must have dtype": lambda: pyvtk.restore(SEL, U, X, gate=torch.zeros(2, 5).long()),
    "restore: update must have dtype": lambda: pyvtk.restore(SEL, U.long(), gate=1.0),
    "compact_kv_: selection must be ascending": lambda: pyvtk.compact_kv_(SEL, K),
    "compact_kv_: selection must be a": lambda: pyvtk.compact_kv_(K, K),
    "compact_kv_: selection must select": lambda: pyvtk.compact_kv_(PACKED, K),
    "compact_kv_: caches must be at least": lambda: pyvtk.compact_kv_(UP),
    "compact_kv_: caches must not share": lambda: pyvtk.compact_kv_(UP, K, K),
    "compact_kv_: caches[0] must have 4": lambda: pyvtk.compact_kv_(UP, X),
    "compact_kv_: caches[0] must have batch size": lambda: pyvtk.compact_kv_(UP, K[:1]),
    "compact_kv_: caches[0] must be contiguous": lambda: pyvtk.compact_kv_(UP, torch.zeros(2, 3, 9, 8)[..., ::2]),
    "compact_kv_: caches[1] must not require": lambda: pyvtk.compact_kv_(UP, K, K.clone().requires_grad_()),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)


def test_restore_onto_rows_that_lie_apart():
    """The base's strides are its own; update and result are contiguous."""
    selection = Selection.from_indices(torch.tensor([[1, 3], [0, 4]]), 6, ascending=True)
    update, wide = torch.randn(2, 2, 5), torch.randn(2, 6, 8)
    for gate in (None, 0.5):
        actual = pyvtk.restore(selection, update, wide[..., :5], gate=gate)
        assert torch.equal(actual, pyvtk.restore(selection, update, wide[..., :5].contiguous(), gate=gate))
        assert torch.equal(actual[:, 2], wide[:, 2, :5])
