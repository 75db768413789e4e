"""The compiled kernels of sparse24: every instruction set, dtype, kernel and epilogue, edges of shapes."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import assert_within_budget, largest

from pyvtk import _C
from pyvtk.ops import sparse24
from pyvtk.reference import sparse24 as reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FEW, MANY, DENSE = (0, 0), (0, 1), (0, 2)


def mask_of(outputs: int, columns: int) -> torch.Tensor:
    """Two of every four, at random."""
    return reference.prune_n_of_m(torch.rand(outputs, columns), 2, 4)


def weight_of(outputs: int, columns: int, dtype: torch.dtype):
    """Values, metadata and, for int8, scales."""
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8)
    else:
        weight = torch.randn(outputs, columns).to(dtype)
    scales = torch.rand(outputs) / 64 if dtype == torch.int8 else None
    return *reference.compress(weight, mask_of(outputs, columns)), scales


def rows(count: int, columns: int, dtype: torch.dtype, gap: int = 3) -> torch.Tensor:
    """Rows that lie apart in memory and are not aligned."""
    return torch.randn(count, columns + gap).to(dtype)[:, gap:]


def check(x, weight, kernel, instruction_set="avx2", bias=None, mul=None, activation="none"):
    """The operator against float64; plain torch is allowed half of the error."""
    values, metadata, scales = weight
    dense = reference.weight_of(values, metadata, scales, x.dtype) if kernel == DENSE else None
    arguments = (values, metadata, scales, dense, bias, mul, activation)
    actual = torch.ops.pyvtk.sparse24_linear(x, *arguments, list(kernel))
    assert actual.dtype == x.dtype and actual.is_contiguous()

    def expected(dtype):
        narrow = [None if t is None else t.to(dtype) for t in (bias, mul)]
        z = x.to(dtype) @ reference.weight_of(values.to(dtype), metadata, scales, dtype).T
        z = z if narrow[0] is None else z + narrow[0]
        z = reference.activate(z, activation)
        return z if narrow[1] is None else z * narrow[1]

    added = largest(x.double().abs() @ reference.weight_of(values.double(), metadata, scales, torch.float64).abs().T)
    added *= 1.0 if mul is None else max(1.0, largest(mul))
    assert_within_budget(actual, expected(torch.float64), expected(x.dtype), instruction_set, added)


@pytest.mark.parametrize("kernel", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("columns", [4, 8, 12, 100, 192, 1000])
@pytest.mark.parametrize("dtype", FLOATS)
def test_equals_the_reference(dtype, columns, kernel, instruction_set):
    for outputs in (1, 2, 3, 5, 64, 130):
        for count in (1, 2, 3, 5, 17, 33):
            check(rows(count, columns, dtype), weight_of(outputs, columns, dtype), kernel, instruction_set)


@pytest.mark.parametrize("kernel", [FEW, MANY, DENSE], ids=["few", "many", "dense"])
@pytest.mark.parametrize("count", [97, 577])
@pytest.mark.parametrize("dtype", FLOATS)
def test_many_rows(dtype, count, kernel, instruction_set):
    check(rows(count, 192, dtype), weight_of(130, 192, dtype), kernel, instruction_set)


@pytest.mark.parametrize("kernel", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_long_rows(dtype, kernel, instruction_set):
    check(rows(9, 11008, dtype), weight_of(7, 11008, dtype), kernel, instruction_set)


@pytest.mark.parametrize("kernel", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_weights(dtype, kernel, instruction_set):
    for columns in (4, 100, 1000):
        for count in (1, 4, 33):
            check(rows(count, columns, dtype), weight_of(67, columns, torch.int8), kernel, instruction_set)


@pytest.mark.parametrize("kernel", [FEW, MANY, DENSE], ids=["few", "many", "dense"])
@pytest.mark.parametrize("activation", sparse24.ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_epilogues(dtype, activation, kernel, instruction_set):
    for count, outputs in ((3, 5), (33, 130)):
        x, weight = rows(count, 100, dtype), weight_of(outputs, 100, dtype)
        for bias in (None, torch.randn(outputs), torch.randn(outputs).to(dtype)):
            for mul in (None, rows(count, outputs, dtype)):
                check(x, weight, kernel, instruction_set, bias, mul, activation)


@pytest.mark.parametrize("activation", sparse24.ACTIVATIONS)
def test_activations_far_out(activation, instruction_set):
    """A weight of ones and zeros hands x through; each value has to be right to its own size, not to the largest."""
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-90.0, -30.0, 0.0, 30.0, 90.0, 1e30])])[:, None]
    x = torch.cat([x, x, x, x], 1)
    values, metadata = torch.tensor([[1.0, 0.0]]), torch.tensor([[0x44]], dtype=torch.uint8)
    for kernel in (FEW, MANY):
        actual = torch.ops.pyvtk.sparse24_linear(x, values, metadata, None, None, None, None, activation, list(kernel))
        oracle = reference.activate(x[:, :1].double(), activation)
        plain = reference.activate(x[:, :1], activation).double()
        relative = (actual.double() - oracle).abs() / (oracle.abs() + x[:, :1].abs().double() * 2**-20 + 1e-30)
        of_plain = (plain - oracle).abs() / (oracle.abs() + x[:, :1].abs().double() * 2**-20 + 1e-30)
        assert relative.max() <= 2 * of_plain.max() + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu"])
def test_not_finite_x(value, activation, instruction_set):
    """What a kept weight meets spreads as in plain torch; other rows, and outputs that keep no such weight, do not."""
    values, metadata, _ = weight_of(40, 64, torch.float32)
    kept = reference.decompress(torch.ones_like(values), metadata)[:, 21] != 0
    assert kept.any() and not kept.all()
    x = torch.randn(10, 64)
    x[4, 21] = value
    z = x.double() @ reference.decompress(values, metadata).double().T
    finite = x.clone()
    finite[4, 21] = 0
    z[4, ~kept] = (finite.double() @ reference.decompress(values, metadata).double().T)[4, ~kept]
    expected = reference.activate(z, activation)
    for kernel in (FEW, MANY):
        actual = torch.ops.pyvtk.sparse24_linear(x, values, metadata, None, None, None, None, activation, list(kernel))
        torch.testing.assert_close(actual, expected.float(), equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 8, 8), (3, 0, 8), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("kernel", [FEW, MANY, DENSE], ids=["few", "many", "dense"])
def test_empty(shape, kernel, instruction_set):
    count, outputs, columns = shape
    weight = torch.randn(outputs, columns // 2), torch.zeros(outputs, columns // 8, dtype=torch.uint8)
    bias = torch.randn(outputs)
    x = torch.randn(count, columns)
    dense = torch.zeros(outputs, columns)
    actual = torch.ops.pyvtk.sparse24_linear(x, *weight, None, dense, bias, None, "relu", list(kernel))
    assert torch.equal(actual, bias.relu().expand(count, outputs))
    quantized = torch.ops.pyvtk.sparse24_linear_int8(
        x, weight[0].to(torch.int8), weight[1], torch.ones(outputs), None, bias, None, "relu"
    )
    assert torch.equal(quantized, bias.relu().expand(count, outputs))


def test_shapes_of_x(instruction_set):
    values, metadata, _ = weight_of(5, 12, torch.float32)
    x = torch.randn(2, 3, 12)
    flat = torch.ops.pyvtk.sparse24_linear(x.flatten(0, 1), values, metadata, None, None, None, None, "none", [])
    call = (values, metadata, None, None, None, None, "none", [])
    assert torch.equal(torch.ops.pyvtk.sparse24_linear(x, *call), flat.view(2, 3, 5))
    assert torch.equal(torch.ops.pyvtk.sparse24_linear(x[0, 0], *call), flat[0])
    assert torch.equal(torch.ops.pyvtk.sparse24_linear(x.transpose(0, 1), *call), flat.view(2, 3, 5).transpose(0, 1))


@pytest.mark.parametrize("kernel", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_do_not_depend_on_others(dtype, kernel, instruction_set):
    """The same bits for a row whatever else is in the batch, and whatever the number of threads."""
    x, (values, metadata, _) = rows(101, 1000, dtype), weight_of(530, 1000, dtype)
    call = (values, metadata, None, None, None, None, "gelu", list(kernel))
    whole = torch.ops.pyvtk.sparse24_linear(x, *call)
    for begin, end in ((0, 1), (3, 5), (40, 73), (90, 101)):
        assert torch.equal(torch.ops.pyvtk.sparse24_linear(x[begin:end], *call), whole[begin:end])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(torch.ops.pyvtk.sparse24_linear(x, *call), whole)
    finally:
        torch.set_num_threads(before)


def test_choice_decides_by_rows():
    """The first pair that fits decides; the dense kernel shows that by a copy of another weight."""
    values, metadata, _ = weight_of(6, 16, torch.float32)
    for count, is_dense in ((2, False), (3, True), (8, True), (9, False)):
        call = (None, torch.zeros(6, 16), None, None, "none", [0, 0, 3, 2, 9, 1])
        result = torch.ops.pyvtk.sparse24_linear(torch.randn(count, 16), values, metadata, *call)
        assert (result == 0).all() == is_dense


def test_guards():
    values, metadata, _ = weight_of(6, 16, torch.float32)
    x = torch.randn(2, 16)

    def call(x=x, values=values, metadata=metadata, scales=None, dense=None, activation="none", choice=()):
        return torch.ops.pyvtk.sparse24_linear(x, values, metadata, scales, dense, None, None, activation, list(choice))

    for wrong, message in (
        ({"x": torch.randn(2, 12)}, "x has 12 columns"),
        ({"x": x.double()}, "values has dtype"),
        ({"metadata": metadata[:, :1]}, "metadata has size 1"),
        ({"values": values.to(torch.int8)}, "int8 values need scales"),
        ({"activation": "tanh"}, "unknown activation tanh"),
        ({"choice": (0, 2)}, "there is no dense weight"),
        ({"choice": (0, 3)}, "there is no weight in its form"),
        ({"choice": (0, 4)}, "choice has kernel 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


# int8 x int8


def int8_oracle(x, values, metadata, scales, x_scale):
    """In whole numbers of 64 bits, then the reference's own roundings."""
    quantized, scale = reference.quantize_rows(x, x_scale)
    sums = quantized.long() @ reference.decompress(values, metadata).long().T
    return (sums.float() * scale * scales).to(x.dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 17, 33, 97])
@pytest.mark.parametrize("dtype", FLOATS)
def test_int8_is_exact(dtype, count, instruction_set):
    for columns in (4, 12, 100, 1000):
        for outputs in (1, 5, 130):
            x, (values, metadata, scales) = rows(count, columns, dtype), weight_of(outputs, columns, torch.int8)
            for x_scale in (None, torch.tensor([0.017])):
                actual = torch.ops.pyvtk.sparse24_linear_int8(x, values, metadata, scales, x_scale, None, None, "none")
                assert torch.equal(actual, int8_oracle(x, values, metadata, scales, x_scale))


@pytest.mark.parametrize("count", [1, 9])
def test_int8_sums_beyond_float32(count, instruction_set):
    """All products as large as they get, and of one sign: float32 could not add them."""
    columns = 100_000
    x = torch.full((count, columns), 127.0)
    x[:, 5] = 126
    values = torch.full((3, columns // 2), -128, dtype=torch.int8)
    values[:, 7] = 1
    metadata = torch.full((3, columns // 8), 0xE9, dtype=torch.uint8)
    actual = torch.ops.pyvtk.sparse24_linear_int8(x, values, metadata, torch.ones(3), torch.ones(1), None, None, "none")
    assert torch.equal(actual, int8_oracle(x, values, metadata, torch.ones(3), torch.ones(1)))


@pytest.mark.parametrize("count", [3, 20])
def test_int8_rounding_and_rows_that_are_not_finite(count, instruction_set):
    values, metadata, scales = weight_of(9, 8, torch.int8)
    x = torch.randn(count, 8)
    x[0] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, -300.0, 126.5])  # halves go to the even neighbour
    x[1] = 0
    one = torch.ones(1)
    plain = (values, metadata, scales)
    for x_scale in (None, one):
        result = torch.ops.pyvtk.sparse24_linear_int8(x, *plain, x_scale, None, None, "none")
        assert torch.equal(result, int8_oracle(x, *plain, x_scale))
    x[2, 3] = float("nan")
    assert torch.ops.pyvtk.sparse24_linear_int8(x, *plain, one, None, None, "none")[2].isnan().all()
    x[2, 3] = float("inf")
    result = torch.ops.pyvtk.sparse24_linear_int8(x, *plain, None, None, None, "none")
    assert result[2].isnan().all() and not result[:2].isnan().any()
    assert torch.equal(
        torch.ops.pyvtk.sparse24_linear_int8(x, *plain, one, None, None, "none"), int8_oracle(x, *plain, one)
    )


@pytest.mark.parametrize("count", [3, 20])
@pytest.mark.parametrize("activation", sparse24.ACTIVATIONS)
def test_int8_epilogues(activation, count, instruction_set):
    weight = weight_of(67, 100, torch.int8)
    x, mul, bias = rows(count, 100, torch.float32), rows(count, 67, torch.float32), torch.randn(67)
    actual = torch.ops.pyvtk.sparse24_linear_int8(x, *weight, None, bias, mul, activation)
    plain = reference.linear_int8(x, *weight, None, bias, mul, activation)
    # the rounding of x is part of the meaning, so that the oracle starts behind it
    z = int8_oracle(x, *weight, None).double() + bias
    assert_within_budget(actual, reference.activate(z, activation) * mul, plain, instruction_set)


# Format


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8])
def test_compress_and_decompress(dtype, instruction_set):
    for outputs, columns in ((1, 4), (3, 8), (5, 12), (130, 100), (0, 8), (4, 0)):
        weight = (torch.randn(outputs, columns + 1) * 50).to(dtype)[:, 1:]
        mask = mask_of(outputs, columns) if outputs * columns else torch.zeros(outputs, columns, dtype=torch.bool)
        values, metadata = torch.ops.pyvtk.sparse24_compress(weight, mask)
        if outputs * columns:
            expected = reference.compress(weight, mask)
            assert torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
        dense = torch.ops.pyvtk.sparse24_decompress(values, metadata)
        assert dense.dtype == dtype and torch.equal(dense, torch.where(mask, weight, torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_compress_refuses_other_masks(kept, instruction_set):
    mask = mask_of(5, 16)
    mask[3, 8:12] = torch.arange(4) < kept
    with pytest.raises(RuntimeError, match="exactly two entries in every group of four"):
        torch.ops.pyvtk.sparse24_compress(torch.randn(5, 16), mask)
    weight = torch.randn(5, 16)
    actual = torch.ops.pyvtk.sparse24_compress(weight, mask, True)
    assert all(torch.equal(*pair) for pair in zip(actual, reference.compress(weight, mask, trusted=True)))


@pytest.mark.parametrize("count", [1, 4, 20])
def test_bad_metadata_reads_nothing_outside(count, instruction_set):
    """Every byte, legal or not: results are numbers that the inputs explain. ASan sees the addresses."""
    columns = 8 * 256
    metadata = torch.arange(256, dtype=torch.uint8).repeat(3, 1)
    values, x = torch.ones(3, columns // 2), torch.rand(count, columns)
    for kernel in (FEW, MANY):
        result = torch.ops.pyvtk.sparse24_linear(x, values, metadata, None, None, None, None, "none", list(kernel))
        assert ((result > 0) & (result <= 2 * x.sum(-1, keepdim=True))).all()
    result = torch.ops.pyvtk.sparse24_linear_int8(
        x, values.to(torch.int8), metadata, torch.ones(3), None, None, None, "none"
    )
    assert ((result > 0) & (result <= 2 * x.sum(-1, keepdim=True))).all()
    assert (torch.ops.pyvtk.sparse24_decompress(values, metadata) <= 1).all()


# Properties


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(0, 40),
    outputs=st.integers(0, 40),
    groups=st.integers(1, 60),
    dtype=st.sampled_from(FLOATS),
    quantized=st.booleans(),
    kernel=st.sampled_from([FEW, MANY, DENSE]),
    activation=st.sampled_from(sparse24.ACTIVATIONS),
    has_bias=st.booleans(),
    has_mul=st.booleans(),
    gap=st.integers(0, 5),
    set_name=st.sampled_from(_C.instruction_sets()),
    seed=st.integers(0, 2**31),
)
def test_any_call(count, outputs, groups, dtype, quantized, kernel, activation, has_bias, has_mul, gap, set_name, seed):
    torch.manual_seed(seed)
    before = _C.instruction_set()
    _C.use_instruction_set(set_name)
    try:
        weight = weight_of(outputs, 4 * groups, torch.int8 if quantized else dtype)
        bias = torch.randn(outputs) if has_bias else None
        mul = rows(count, outputs, dtype, gap) if has_mul else None
        check(rows(count, 4 * groups, dtype, gap), weight, kernel, set_name, bias, mul, activation)
    finally:
        _C.use_instruction_set(before)
