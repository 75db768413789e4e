"""The CUDA kernels of compact, its gradient and compact_kv_, run by the emulation, against the reference: bit for bit
where rows move, and bit for bit with the CPU's kernels where rows are added in the same order."""

import emulated
import emulated_compact as kernels
import pytest
import torch
from compact_cases import (
    CHANNELS,
    DTYPES,
    FLOATS,
    examples,
    offset_for,
    random,
    same,
    selections,
    strided,
    tame,
)  # fmt: skip
from hypothesis import given
from hypothesis import strategies as st

from pyvtk.reference import compact as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_compact.cpp does not", allow_module_level=True)

OPS = torch.ops.pyvtk


def a_tensor(draw, rows, tokens, dtype, generator, batches=("own", "own", "one", "none")):
    """A tensor that a selection applies to, its dim and batch_dim."""
    channels = draw(st.sampled_from(CHANNELS))
    if len(rows) == 2:
        shape, dim, batch_dim = (*rows, tokens, channels), 2, 0
    else:
        kind = draw(st.sampled_from(batches))
        batch = 1 if kind == "one" else rows[0]
        choices = [((batch, tokens, channels), 1, 0), ((batch, tokens), 1, 0), ((3, batch, tokens), 2, 1),
                   ((batch, 2, tokens, channels), 2, 0), ((tokens, batch, channels), 0, 1),
                   ((2, tokens, 3, batch, channels), 1, 3), ((batch, channels, tokens), 2, 0)]  # fmt: skip
        if kind == "none":
            choices = [((tokens, channels), 0, -1), ((2, tokens, channels), 1, -1), ((tokens,), 0, -1)]
        shape, dim, batch_dim = draw(st.sampled_from(choices))
    x = strided(draw, random(shape, dtype, generator), dim)
    return x, dim, batch_dim


@st.composite
def bundles(draw, dtypes=DTYPES, batches=("own", "own", "one", "none"), wild=True):
    """Arguments of compact, and how the launch runs."""
    heads = draw(st.integers(0, 3)) == 0
    indices, counts, align_right, tokens, generator = draw(selections(heads, wild=wild))
    tensors, dims, batch_dims, pads = [], [], [], []
    for _ in range(draw(st.sampled_from([1, 1, 2, 3, 9]))):
        dtype = draw(st.sampled_from(dtypes))
        x, dim, batch_dim = a_tensor(draw, tuple(indices.shape[:-1]), tokens, dtype, generator, batches)
        tensors.append(x)
        dims.append(dim)
        batch_dims.append(batch_dim)
        pads.append(draw(st.sampled_from([0.0, 1.0] if dtype in (torch.bool, torch.uint8) else [0.0, -100.0, 3.0])))
    total = None
    if not heads and draw(st.booleans()):
        total = draw(st.sampled_from([0, 1, int(counts.sum()), int(counts.sum()) + 5, max(int(counts.sum()) - 2, 0)]))
    emulated.configure(draw(st.sampled_from([0, 0, 1, 2])), draw(st.sampled_from([1, 2, 5])))
    aligned = draw(st.sampled_from([0, 0, 8, 4, 2, 1]))
    return (indices, counts, align_right, tensors, dims, batch_dims, pads, total), aligned


def expected_of_compact(indices, counts, align_right, tensors, dims, batch_dims, pads, total):
    tamed, bad = tame(indices, counts, align_right, tensors[0].shape[dims[0]])
    if tensors[0].shape[dims[0]] == 0:
        counts = torch.zeros_like(counts) if total is None else counts
    outs = reference.compact(tamed, counts, align_right, tensors, dims, batch_dims, pads, total)
    if not bad.any():
        return outs
    # slots of what is no token hold the pad: where they stand is moved in the same way
    marks = [x.new_zeros(x.shape, dtype=torch.bool) for x in tensors]
    for i, (out, mark, pad) in enumerate(zip(outs, marks, pads)):
        slots = torch.where(bad, 1, 0)
        width = mark.shape[dims[i]]
        assert width > 0
        # a table whose token 0 is unmarked and whose token 1 is marked, selected by the badness of slots
        shape = list(mark.shape)
        shape[dims[i]] = 2
        table = torch.zeros(shape, dtype=torch.bool)
        table.select(dims[i], 1).fill_(True)
        where = reference.compact(slots, counts, align_right, [table], [dims[i]], [batch_dims[i]], [0.0], total)[0]
        outs[i] = out.masked_fill(where, pad if out.dtype.is_floating_point or out.is_complex() else int(pad))
    return outs


@examples(240)
@given(bundles())
def test_compact(case):
    arguments, aligned = case
    actual = kernels.compact(*arguments, offset=offset_for(aligned, arguments[3]))
    for a, b in zip(actual, expected_of_compact(*arguments)):
        same(a, b)


def test_more_tensors_than_one_launch_takes():
    emulated.configure()
    generator = torch.Generator().manual_seed(0)
    indices, counts = torch.tensor([[0, 2, 3], [1, 4, -1]]), torch.tensor([3, 2], dtype=torch.int32)
    tensors = [random((2, 5, 1 + i % 7), DTYPES[i % len(DTYPES)], generator) for i in range(75)]
    tensors[9] = tensors[9][:, :, :0]  # one of no bytes among them
    tensors[73] = random((2, 5, 900), torch.float64, generator)  # and one of several tiles
    arguments = (indices, counts, False, tensors, [1] * 75, [0] * 75, [0.0] * 75)
    for total in (None, 7):
        for a, b in zip(kernels.compact(*arguments, total), reference.compact(*arguments, total)):
            same(a, b)
    grads = [x[:, :3] for x in tensors if x.dtype in FLOATS]
    count = len(grads)
    arguments = (indices, counts, False, grads, [1] * count, [0] * count, [2] * count, 5, None)
    for a, b in zip(kernels.compact_backward(*arguments), OPS.compact_backward(*arguments)):
        same(a, b)


def test_long_rows_cross_tiles():
    emulated.configure()
    generator = torch.Generator().manual_seed(0)
    indices, counts = torch.tensor([[4, 1, 1, 0]]), torch.tensor([3], dtype=torch.int32)
    for dtype, channels in ((torch.float32, 5001), (torch.float64, 4100), (torch.uint8, 3001)):
        x = random((1, 5, channels), dtype, generator)
        for total in (None, 5):
            arguments = (indices, counts, False, [x], [1], [0], [1.0], total)
            same(kernels.compact(*arguments)[0], reference.compact(*arguments)[0])


def gradients(arguments):
    """The arguments of compact_backward that belong to those of compact."""
    indices, counts, align_right, tensors, dims, batch_dims, pads, total = arguments
    outs = reference.compact(tame(indices, counts, align_right, 1)[0] * 0, counts * 0, align_right, tensors, dims,
                             batch_dims, pads, total)  # fmt: skip
    sizes = [1 if b < 0 else x.shape[b] for x, b in zip(tensors, batch_dims)]
    return outs, sizes


@examples(240)
@given(bundles(dtypes=[*FLOATS, torch.complex64, torch.complex128], wild=False), st.integers(0, 2**32))
def test_gradient_of_compact(case, seed):
    (indices, counts, align_right, tensors, dims, batch_dims, pads, total), aligned = case
    outs, sizes = gradients((indices, counts, align_right, tensors, dims, batch_dims, pads, total))
    generator = torch.Generator().manual_seed(seed)
    grads = [random(out.shape, out.dtype, generator) for out in outs]
    arguments = (indices, counts, align_right, grads, dims, batch_dims, sizes, tensors[0].shape[dims[0]], total)
    actual = kernels.compact_backward(*arguments, offset=offset_for(aligned, grads))
    for a, b in zip(actual, OPS.compact_backward(*arguments)):
        same(a, b)


@st.composite
def caches(draw):
    """Ascending selections, and caches that they apply to."""
    heads = draw(st.booleans())
    indices, counts, _, tokens, generator = draw(selections(heads, unique=True, most_tokens=300))
    indices = indices[..., :tokens]
    counts = counts.clamp(max=indices.shape[-1])
    found = []
    for _ in range(draw(st.sampled_from([1, 2, 5]))):
        shape = (indices.shape[0], indices.shape[1] if heads else draw(st.integers(1, 3)), tokens,
                 draw(st.sampled_from([1, 2, 3, 8, 24, 128])))  # fmt: skip
        x = random(shape, draw(st.sampled_from(DTYPES)), generator)
        kind = draw(st.sampled_from(["dense", "heads inside", "wide"]))
        if kind == "heads inside":
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        if kind == "wide":
            x = torch.zeros((*shape[:3], shape[3] + 5), dtype=x.dtype)[..., : shape[3]].copy_(x)
        found.append(x)
    # more multiprocessors would cut channels into more slices; so do few rows
    emulated.configure(draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from([1, 2, 5])))
    return indices, counts, found, offset_for(draw(st.sampled_from([0, 0, 8, 4, 2, 1])), found)


@examples(160)
@given(caches())
def test_compact_kv(case):
    indices, counts, found, offset = case
    expected = [cache.clone() for cache in found]
    reference.compact_kv_(indices, counts, expected)
    for a, b in zip(kernels.compact_kv_(indices, counts, found, offset=offset), expected):
        same(a, b)


@examples(60)
@given(selections(wild=True))
def test_caches_of_a_selection_that_does_not_ascend_stay_within_their_memory(case):
    indices, counts, _, tokens, generator = case
    indices = indices[..., :tokens]
    cache = random((indices.shape[0], 2, tokens, 40), torch.float32, generator)
    actual = kernels.compact_kv_(indices, counts, [cache])[0]
    capacity = indices.shape[-1]
    same(actual[:, :, capacity:], cache[:, :, capacity:])
    for row, count in enumerate(counts.clamp(max=capacity).tolist()):
        assert (actual[row, :, count:capacity] == 0).all()


def test_more_caches_than_one_launch_takes():
    emulated.configure()
    generator = torch.Generator().manual_seed(0)
    indices, counts = torch.tensor([[1, 2, 5, 6]]), torch.tensor([3], dtype=torch.int32)
    found = [random((1, 1, 8, 4 + i % 3), torch.float32, generator) for i in range(70)]
    expected = [cache.clone() for cache in found]
    reference.compact_kv_(indices, counts, expected)
    for a, b in zip(kernels.compact_kv_(indices, counts, found), expected):
        same(a, b)


def test_what_does_not_fit_is_an_error():
    cache = torch.zeros(1, 1, 3, 4)
    with pytest.raises(AssertionError, match="invalid argument"):  # a capacity of more than the tokens
        kernels.compact_kv_(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, dtype=torch.int32), [cache])
