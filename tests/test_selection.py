"""Selection: views of it, composition, and its way through pytrees, torch.compile and torch.export."""

import io

import pytest
import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from pyvtk import Selection, select

FACTS = ("num_tokens", "ascending", "align")
TENSORS = ("indices", "counts", "overflow", "source_cu_seqlens")


def assert_same(a: Selection, b: Selection) -> None:
    for name in FACTS:
        assert getattr(a, name) == getattr(b, name), name
    for name in TENSORS:
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), name


def rows_of(selection: Selection) -> list[list[int]]:
    """The real entries of every row, read slot by slot."""
    capacity = selection.indices.shape[-1]
    rows = []
    for row, count in zip(selection.indices.flatten(0, -2).tolist(), selection.counts.flatten().tolist()):
        real = row[:count] if selection.align == "left" else row[capacity - count :]
        padding = row[count:] if selection.align == "left" else row[: capacity - count]
        assert all(entry >= 0 for entry in real) and all(entry == -1 for entry in padding)
        rows.append(real)
    return rows


masks = st.tuples(st.integers(0, 3), st.integers(0, 12), st.booleans(), st.integers(0, 2**31)).map(
    lambda t: torch.rand((t[0], 2, t[1]) if t[2] else (t[0], t[1]), generator=torch.Generator().manual_seed(t[3])) < 0.5
)
aligns = st.sampled_from(["left", "right"])


@settings(deadline=None, max_examples=60)
@given(masks, aligns)
def test_from_mask_and_back(mask, align):
    selection = Selection.from_mask(mask, align=align)
    assert torch.equal(selection.mask(), mask)
    assert rows_of(selection) == [row.nonzero().flatten().tolist() for row in mask.flatten(0, -2)]
    assert torch.equal(selection.complement().mask(), ~mask)
    assert not selection.overflow.any()
    assert torch.equal(selection.valid.sum(-1), mask.sum(-1))
    assert_same(Selection.from_mask(mask, align=align, capacity="exact"), selection.trim())
    assert selection.trim().capacity == (int(mask.sum(-1).max()) if selection.counts.numel() else 0)
    starts = selection.cu_seqlens()
    assert starts.dtype == torch.int32 and starts.shape == (selection.counts.numel() + 1,)
    assert torch.equal(starts.diff(), selection.counts.flatten())


@settings(deadline=None, max_examples=60)
@given(masks, aligns, aligns, st.integers(0, 12))
def test_inverse_and_then(mask, align, other_align, capacity):
    selection = Selection.from_mask(mask, align=align, capacity=capacity)
    assert torch.equal(selection.overflow, mask.sum(-1) > capacity)
    inverse = selection.inverse()
    assert torch.equal(inverse >= 0, selection.mask())
    flat = selection.indices.flatten(0, -2)
    for row, slots in enumerate(inverse.flatten(0, -2).tolist()):
        for token, slot in enumerate(slots):
            assert slot == -1 or flat[row, slot] == token

    # every second slot, padding slots included: those of the first selection that are empty must not come through
    second = Selection.from_mask(torch.arange(capacity).expand(flat.shape[0], capacity) % 2 == 0, align=other_align)
    if mask.dim() == 3:
        second = Selection.from_mask(second.mask().reshape(*mask.shape[:2], capacity), align=other_align)
    both = selection.then(second)
    valid = selection.valid.flatten(0, -2).tolist()
    expected = [
        [token for slot, token in enumerate(row) if slot % 2 == 0 and valid[r][slot]]
        for r, row in enumerate(flat.tolist())
    ]
    assert rows_of(both) == expected
    assert both.num_tokens == mask.shape[-1] and both.align == other_align and both.ascending
    assert torch.equal(both.overflow, selection.overflow)


class Launches(TorchDispatchMode):
    """Counts the operators that compute, or allocate: on a GPU, each is a launch."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if not function.is_view:
            self.names.append(function._schema.name)
        return function(*arguments, **(options or {}))


CU_SEQLENS = torch.tensor([0, 4, 9], dtype=torch.int32)
PADDED = select(torch.arange(18.0).reshape(2, 9) % 7, 4)
PACKED = select(torch.arange(9.0) % 5, 3, cu_seqlens=CU_SEQLENS, capacity=4)
SECOND = Selection.from_mask(torch.tensor([[True, False, True, True]] * 2), capacity=2)
BOOKKEEPING = {
    "valid": lambda s: s.valid,
    "mask": lambda s: s.mask(),
    "inverse": lambda s: s.inverse(),
    "complement": lambda s: s.complement(),
    "then": lambda s: s.then(SECOND),
    "of_mask": lambda s: Selection.from_mask(SECOND.overflow[:, None], capacity=1, align="right"),
}


@pytest.mark.parametrize("selection", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("name", BOOKKEEPING)
def test_is_one_operator(name, selection):
    with Launches() as launches:
        BOOKKEEPING[name](selection)
    assert launches.names == [f"pyvtk::selection_{name}"]


def test_complement_of_exact_capacity():
    selection = select(torch.rand(3, 9), 4, align="right")
    assert_same(selection.complement("exact"), selection.complement().trim())
    assert selection.complement("exact").capacity == 5
    small = selection.complement(3)
    assert small.overflow.all() and small.counts.tolist() == [3, 3, 3] and small.align == "right"
    assert_same(small, Selection.from_mask(~selection.mask(), capacity=3, align="right"))


@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True), (False, False)])
def test_then_merges_overflow(which):
    flags = [torch.tensor([True, False, False]), torch.tensor([False, False, True])]
    first, second = (
        Selection(torch.tensor([[0, 1]] * 3), torch.tensor([2] * 3).int(), 2, overflow=flag if there else None)
        for flag, there in zip(flags, which)
    )
    overflow = first.then(second).overflow
    if which == (False, False):
        assert overflow is None
    else:
        assert overflow.tolist() == [which[0], False, which[1]]


def test_repr():
    selection = select(torch.arange(12.0).reshape(2, 6), 3)
    assert repr(selection) == (
        "Selection(rows=[2], capacity=3, num_tokens=6, ascending=True, align='left',\n"
        "          counts=[3, 3], overflow=0 of 2 rows)"
    )
    assert "align='left', packed source" in repr(PACKED)
    assert "overflow=None" in repr(Selection.from_indices(torch.tensor([[1]]), 3))
    many = Selection.from_mask(torch.ones(9, 5, dtype=torch.bool).tril(), capacity=4)
    assert "counts=1 to 4, overflow=5 of 9 rows" in repr(many)
    assert "counts=[], overflow=0 of 0 rows" in repr(Selection.from_mask(torch.ones(0, 5).bool()))
    for shown in (repr(selection), repr(many), repr(PACKED)):
        assert "tensor" not in shown and shown.count("\n") < 3


def test_repr_reads_no_values_where_there_are_none():
    selection = select(torch.arange(12.0).reshape(2, 6), 3)
    assert "counts=on meta, overflow=known" in repr(selection.to("meta"))
    with FakeTensorMode() as mode:
        assert "counts=[3, 3]" in repr(selection)  # a real one in spite of the mode
        fake = pytree.tree_map_only(torch.Tensor, mode.from_tensor, selection)
    assert "counts=on cpu, overflow=known" in repr(fake)

    shown = []

    def kept(indices, counts):
        shown.append(repr(Selection(indices, counts, 6)))
        return indices + 1

    torch.vmap(kept)(selection.indices, selection.counts)
    make_fx(kept, tracing_mode="symbolic")(selection.indices, selection.counts)
    torch.compile(kept, fullgraph=True, backend="eager")(selection.indices, selection.counts)
    assert all("counts=on cpu" in text for text in shown) and len(shown) >= 3
    leaves, spec = pytree.tree_flatten(selection)
    assert repr(pytree.tree_unflatten(["leaf"] * len(leaves), spec)) == "Selection(of str)"


def test_then_of_an_empty_selection():
    nothing = Selection.from_mask(torch.zeros(2, 5, dtype=torch.bool), capacity="exact")
    other = Selection.from_indices(torch.full((2, 3), -1), 0, counts=torch.zeros(2, dtype=torch.int64))
    assert rows_of(nothing.then(other)) == [[], []]


def test_then_keeps_the_original_count_of_tokens():
    """Shares of the original count and of what is left differ (10 % twice is 1 %): both are the caller's arithmetic."""
    scores = torch.rand(1, 1000)
    first = select(scores, 100)
    stage = scores.gather(-1, first.indices)
    assert first.then(select(stage, int(0.1 * first.num_tokens))).counts.item() == 100
    assert first.then(select(stage, int(0.1 * first.capacity))).counts.item() == 10


def test_packed_source():
    cu_seqlens = torch.tensor([1, 4, 4, 9])
    selection = select(torch.tensor([9.0, 1, 3, 2, 5, 4, 8, 7, 6, 9]), 2, cu_seqlens=cu_seqlens, align="right")
    assert selection.packed and selection.source_cu_seqlens.dtype == torch.int32
    assert rows_of(selection) == [[2, 3], [], [6, 7]]
    assert selection.mask().tolist() == [i in (2, 3, 6, 7) for i in range(10)]
    assert selection.inverse().tolist() == [-1, -1, 0, 1, -1, -1, 0, 1, -1, -1]
    gone = selection.complement(capacity=3)
    assert gone.packed and gone.align == "right"
    assert rows_of(gone) == [[1], [], [4, 5, 8]]  # tokens 0 and 9 belong to no sample
    then = selection.then(Selection.from_mask(torch.tensor([[False, True]] * 3)))
    assert then.packed and rows_of(then) == [[3], [], [7]]
    with pytest.raises(ValueError, match="other must select from padded rows"):
        selection.then(selection)


def test_from_indices():
    indices = torch.tensor([[5, 2, 7], [1, 9, 9]], dtype=torch.int32)
    selection = Selection.from_indices(indices, 8, counts=torch.tensor([3, 1]))
    assert selection.indices.tolist() == [[5, 2, 7], [1, -1, -1]] and selection.indices.dtype == torch.int64
    assert not selection.ascending and selection.overflow is None and selection.counts.dtype == torch.int32
    right = Selection.from_indices(indices, 8, counts=torch.tensor([3, 1]), align="right")
    assert right.indices.tolist() == [[5, 2, 7], [-1, -1, 9]]
    assert Selection.from_indices(indices, 10).counts.tolist() == [3, 3]
    assert Selection.from_indices(indices, 10, counts=torch.tensor([5, -1])).counts.tolist() == [3, 0]


def test_to_and_immutability():
    selection = select(torch.rand(2, 9), 3)
    assert_same(selection.to("cpu"), selection)
    assert selection.to("meta").indices.device.type == "meta"
    with pytest.raises(AttributeError):
        selection.align = "right"


WRONG = [
    (lambda: Selection.from_mask([True]), TypeError, "mask must be a tensor"),
    (lambda: Selection.from_mask(torch.zeros(2, 3)), TypeError, "mask must have dtype bool"),
    (lambda: Selection.from_mask(torch.zeros(3, dtype=torch.bool)), ValueError, "mask must have"),
    (lambda: Selection.from_mask(torch.zeros(2, 3, dtype=torch.bool), align="up"), ValueError, "align must be"),
    (lambda: Selection.from_mask(torch.zeros(2, 3, dtype=torch.bool), capacity=-1), ValueError, "capacity must be"),
    (lambda: Selection.from_mask(torch.zeros(2, 3, dtype=torch.bool), capacity="all"), TypeError, "capacity must be"),
    (lambda: PADDED.complement(-1), ValueError, "capacity must be at least 0, got -1"),
    (lambda: PADDED.complement(2.0), TypeError, "capacity must be an int, got float"),
    (lambda: Selection.from_indices([[1]], 3), TypeError, "indices must be a tensor"),
    (lambda: Selection.from_indices(torch.zeros(2, 3), 3), TypeError, "indices must have dtype"),
    (lambda: Selection.from_indices(torch.zeros(3, dtype=torch.int64), 3), ValueError, "indices must have"),
    (lambda: Selection.from_indices(torch.zeros(2, 3, dtype=torch.int64), 3.0), TypeError, "num_tokens must be"),
    (lambda: Selection.from_indices(torch.zeros(2, 3, dtype=torch.int64), -3), ValueError, "num_tokens must be"),
    (
        lambda: Selection.from_indices(torch.zeros(2, 3, dtype=torch.int64), 3, counts=torch.zeros(3).int()),
        ValueError,
        "counts must be",
    ),
    (lambda: Selection.from_indices(torch.zeros(2, 3).long(), 3, ascending=1), TypeError, "ascending must be"),
    (lambda: select(torch.rand(2, 9), 3).then(select(torch.rand(2, 4), 2)), ValueError, "other must select from 3"),
    (lambda: select(torch.rand(2, 9), 3).then(select(torch.rand(1, 3), 2)), ValueError, "other must have rows"),
]


@pytest.mark.parametrize("call, error, message", WRONG, ids=[w[2] for w in WRONG])
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=rf"Selection\.\w+: {message}"):
        call()


@pytest.mark.parametrize("packed", [False, True])
def test_pytree(packed):
    cu_seqlens = torch.tensor([0, 4, 9]) if packed else None
    selection = select(torch.rand(9) if packed else torch.rand(2, 9), 3, cu_seqlens=cu_seqlens, order="score")
    leaves, spec = pytree.tree_flatten(selection)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None)
    assert_same(pytree.tree_unflatten(leaves, spec), selection)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(selection)[0]]
    assert keys[:2] == [".indices", ".counts"]


def test_compile_takes_and_returns_selections():
    @torch.compile(fullgraph=True, backend="eager")
    def step(selection, scores):
        left = selection.then(select(scores, 2))
        return left, left.mask(), left.complement(), selection.inverse(), selection.cu_seqlens()

    selection = select(torch.rand(2, 9), 5)
    scores = torch.rand(2, 5)
    left, mask, complement, inverse, cu_seqlens = step(selection, scores)
    expected = selection.then(select(scores, 2))
    assert_same(left, expected)
    assert_same(complement, expected.complement())
    assert torch.equal(mask, expected.mask())
    assert torch.equal(inverse, selection.inverse()) and torch.equal(cu_seqlens, selection.cu_seqlens())


def test_compile_recompiles_little_over_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    step = torch.compile(
        lambda s: s.then(select(torch.ones_like(s.indices).float(), 2)), fullgraph=True, backend=counter
    )
    for tokens in range(20, 30):
        selection = select(torch.rand(2, tokens), 5)
        assert_same(step(selection), selection.then(select(torch.ones(2, 5), 2)))
    assert counter.frame_count <= 2


def test_export_round_trip():
    class Step(torch.nn.Module):
        def forward(self, selection, scores):
            return selection.then(select(scores, 2))

    selection, scores = select(torch.rand(2, 9), 5), torch.rand(2, 5)
    program = torch.export.export(Step(), (selection, scores))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(selection, scores), Step()(selection, scores))


def test_checkpoint():
    selection = select(torch.rand(2, 9), 4)
    x = torch.rand(2, 9, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda s, x: (x * s.mask()).sum(), selection, x, use_reentrant=False)
    y.backward()
    assert torch.equal(x.grad, selection.mask().float())
