"""The operators of a selection's bookkeeping: equal to the reference, registration, vmap, compilation, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvtk import Selection
from pyvtk.ops import selection as page
from pyvtk.reference import selection as reference

OPERATORS = ("valid", "mask", "inverse", "of_mask", "complement", "then")
ROWS = [(0,), (1,), (3,), (2, 2), ()]
SIZES = [0, 1, 5, 63, 64, 65, 200, 700]
# rows, tokens, capacity, whether aligned to the right, whether of a packed axis
problems = st.tuples(
    st.sampled_from(ROWS), st.sampled_from(SIZES), st.sampled_from(SIZES), st.booleans(), st.booleans()
)


def same(actual, expected) -> None:
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    for a, b in zip(actual, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous()
        assert torch.equal(a, b), (a, b)


def agree(name: str, *arguments) -> None:
    """The kernel gives what the definition says."""
    actual = getattr(page, f"selection_{name}")(*arguments, backend="compiled")
    same(actual, getattr(reference, f"selection_{name}")(*arguments))


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows_of(generator, rows, capacity: int, tokens: int):
    """indices, in which tokens come again, and counts, some of them beyond the row."""
    indices = torch.randint(max(tokens, 1), (*rows, capacity if tokens else 0), generator=generator)
    counts = torch.randint(-2, indices.shape[-1] + 3, rows, generator=generator).to(torch.int32)
    return indices, counts


def arguments_of(name: str, generator, rows, tokens: int, capacity: int, right: bool, packed: bool) -> tuple:
    indices, counts = rows_of(generator, rows, capacity, tokens)
    slots = indices.shape[-1]
    if name == "valid":
        return counts, slots, right
    if name == "of_mask":
        flags = torch.rand(*rows, tokens, generator=generator) < torch.rand((), generator=generator)
        return flags, capacity, right
    if name == "then":
        chosen, number = rows_of(generator, rows, capacity // 2, slots)
        overflow = torch.rand(rows, generator=generator) < 0.5
        return indices, counts, right, chosen, number, not right, overflow, None if packed else ~overflow
    packed = packed and len(rows) == 1
    if name == "complement":
        starts = torch.randint(-2, tokens + 3, (rows[0] + 1,), generator=generator).to(torch.int32) if packed else None
        return indices, counts, right, tokens, starts, capacity
    return indices, counts, right, tokens, packed


@pytest.mark.parametrize("name", OPERATORS)
def test_equals_the_reference(name, instruction_set):
    @settings(deadline=None, max_examples=80)
    @given(problems, st.integers(0, 2**32))
    def of(problem, seed):
        agree(name, *arguments_of(name, random(seed), *problem))

    of()


@pytest.mark.parametrize("name", OPERATORS)
def test_many_rows_on_threads(name):
    """More work than one thread takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for right in (False, True):
            agree(name, *arguments_of(name, random(0), (40,), 5000, 3000, right, False))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", OPERATORS)
def test_rows_apart_in_memory(name):
    def apart(x):
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            return x
        return x.unsqueeze(-1).expand(*x.shape, 2).clone()[..., 0]

    arguments = arguments_of(name, random(3), (3,), 100, 40, True, False)
    agree(name, *[apart(x) for x in arguments])


def test_a_mask_of_other_bytes_than_one():
    """Views of other numbers as bool: what is not 0 is True."""
    flags = torch.arange(130, dtype=torch.uint8)[None] % 3
    same(
        page.selection_of_mask(flags.view(torch.bool), 100, False), reference.selection_of_mask(flags != 0, 100, False)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_registration(name, packed):
    arguments = arguments_of(name, random(1), (3,), 9, 5, True, packed)
    torch.library.opcheck(getattr(torch.ops.pyvtk, f"selection_{name}"), arguments)


@pytest.mark.parametrize("rows", [(3,), (2, 2), ()])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_vmap(name, packed, rows):
    """All tensors mapped, and each of them alone; () is a selection of a single row."""
    every = [arguments_of(name, random(seed), rows, 9, 5, seed == 0, packed) for seed in range(1, 4)]
    places = [i for i, x in enumerate(every[0]) if isinstance(x, torch.Tensor)]
    operator = getattr(page, f"selection_{name}")
    for mapped in (places, *[[place] for place in places]):
        given = [torch.stack([x[i] for x in every]) if i in mapped else x for i, x in enumerate(every[0])]
        dims = tuple(0 if i in mapped else None for i in range(len(given)))
        one = [operator(*[x[n] if i in mapped else x for i, x in enumerate(given)]) for n in range(3)]
        expected = tuple(map(torch.stack, zip(*one))) if isinstance(one[0], tuple) else torch.stack(one)
        tensors = [given[i] for i in places]

        def call(*tensors, given=given):
            filled = list(given)
            for place, x in zip(places, tensors):
                filled[place] = x
            return operator(*filled)

        same_values(torch.vmap(call, tuple(dims[i] for i in places))(*tensors), expected)


def same_values(actual, expected) -> None:
    actual, expected = (x if isinstance(x, tuple) else (x,) for x in (actual, expected))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_vmap_of_a_selection():
    selection = Selection.from_mask(torch.rand(3, 2, 9, generator=random(0)) < 0.5, capacity=6)

    def views(indices, counts):
        one = Selection(indices, counts, 9)
        return one.mask(), one.inverse(), one.valid, one.complement(4).indices

    found = torch.vmap(views)(selection.indices, selection.counts)
    expected = selection.mask(), selection.inverse(), selection.valid, selection.complement(4).indices
    same_values(found, expected)


@pytest.mark.compile
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_whole(name):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(page, f"selection_{name}"), fullgraph=True, dynamic=True)
    for tokens, capacity in ((9, 6), (30, 8)):
        arguments = arguments_of(name, random(tokens), (3,), tokens, capacity, True, False)
        same(compiled(*arguments), getattr(reference, f"selection_{name}")(*arguments))


# What is no token


INDICES, COUNTS = torch.tensor([[0, 1, 2], [3, 5, -1], [-7, 1, 2]]), torch.tensor([3, 2, 3], dtype=torch.int32)


LOOKUPS = {
    "mask": lambda *given: page.selection_mask(*given, 5, False),
    "mask of a packed axis": lambda *given: page.selection_mask(*given, 5, True),
    "inverse": lambda *given: page.selection_inverse(*given, 5, False),
    "complement": lambda *given: page.selection_complement(*given, 5, None, 5),
    "complement of a packed axis": lambda indices, *given: page.selection_complement(
        indices, *given, 5, torch.arange(len(indices) + 1, dtype=torch.int32), 5
    ),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_an_index_that_is_no_token(name):
    with pytest.raises(RuntimeError, match="selection holds index 5 in row 1, but the token axis has length 5"):
        LOOKUPS[name](INDICES, COUNTS, False)
    for index in (-1, 5, 2**40, -(2**63), 2**63 - 1):
        indices = torch.tensor([[2, index, -1]])
        with pytest.raises(RuntimeError, match=f"selection holds index {index} in row 0"):
            LOOKUPS[name](indices, torch.tensor([2], dtype=torch.int32), False)
        LOOKUPS[name](indices, torch.tensor([1], dtype=torch.int32), False)  # padding may be anything


def test_the_first_wrong_row_is_named_whatever_threads_find():
    indices = torch.zeros(64, 40000, dtype=torch.int64)
    indices[3, 7] = indices[60, 1] = 9
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(5):
            with pytest.raises(RuntimeError, match="holds index 9 in row 3"):
                page.selection_mask(indices, torch.full((64,), 40000, dtype=torch.int32), False, 5, False)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("right", [False, True])
def test_an_index_that_is_no_slot(right):
    first = torch.arange(8).reshape(2, 4), torch.tensor([4, 4], dtype=torch.int32), False
    for index in (4, -1, 2**40, -(2**63)):
        second = torch.tensor([[0, 1], [2, index]]), torch.tensor([2, 2], dtype=torch.int32), right
        with pytest.raises(RuntimeError, match=f"second selection holds index {index} in row 1, but the first has 4"):
            page.selection_then(*first, *second, None, None)


def test_guards_of_direct_calls():
    """Of the operators themselves; Selection keeps what it holds in order."""
    ops, row = torch.ops.pyvtk, torch.tensor([1], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="counts has dtype"):
        ops.selection_valid(row.long(), 3, False)
    with pytest.raises(RuntimeError, match="indices has dtype"):
        ops.selection_mask(torch.zeros(1, 2), row, False, 3, False)
    with pytest.raises(RuntimeError, match="indices has size 2 in dimension 0, expected 1"):
        ops.selection_inverse(torch.zeros(2, 2).long(), row, False, 3, False)
    with pytest.raises(RuntimeError, match="mask has dtype"):
        ops.selection_of_mask(torch.zeros(1, 2), 3, False)
    with pytest.raises(RuntimeError, match="capacity must be at least 0"):
        ops.selection_of_mask(torch.zeros(1, 2).bool(), -1, False)
    with pytest.raises(RuntimeError, match="num_tokens must be at least 0"):
        ops.selection_complement(torch.zeros(1, 2).long(), row, False, -1, None, 3)
    with pytest.raises(RuntimeError, match="cu_seqlens has size 3 in dimension 0, expected 2"):
        ops.selection_complement(torch.zeros(1, 2).long(), row, False, 3, torch.zeros(3).int(), 3)
    with pytest.raises(RuntimeError, match="other_indices has 2 rows, expected 1"):
        one, two = (torch.zeros(n, 2).long() for n in (1, 2))
        ops.selection_then(one, row, False, two, torch.cat([row, row]), False, None, None)
