"""sparse24: format, conversions, products, gradients, registration, compilation, edges, errors."""

import pickle

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget
from torch.nn import functional as F

import pyvtk
from pyvtk import backends, sparse24
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference

OPS = torch.ops.pyvtk
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
}
WITHOUT_KERNELS = backends.why_not("sparse24_linear", "compiled", "cpu")
needs_kernels = pytest.mark.skipif(WITHOUT_KERNELS is not None, reason=f"{WITHOUT_KERNELS}")
BACKENDS = ("reference", pytest.param("compiled", marks=needs_kernels))


def weight(rows, columns, dtype=torch.float32, **options):
    """A pruned dense weight and the same compressed."""
    dense = torch.randn(rows, columns).to(dtype)
    mask = sparse24.prune(dense, **options)
    return dense.masked_fill(~mask, 0), sparse24.compress(dense, mask)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Format


def test_format_byte_by_byte():
    """DESIGN: values in ascending position; a nibble for each group, low one first, p0 | p1 << 2."""
    dense = torch.tensor([[0.0, 1, 0, 2, 3, 0, 4, 0, 0, 0, 5, 6], [7, 8, 0, 0, 0, 9, 1, 0, 2, 0, 0, 3]])
    weight24 = sparse24.compress(dense)
    assert weight24.values.tolist() == [[1, 2, 3, 4, 5, 6], [7, 8, 9, 1, 2, 3]]
    # (1, 3), (0, 2), (2, 3) and the padding; (0, 1), (1, 2), (0, 3)
    assert weight24.metadata.tolist() == [[0b1000_1101, 0b0100_1110], [0b1001_0100, 0b0100_1100]]
    assert weight24.nbytes == 12 * 4 + 4 and list(weight24.shape) == [2, 12] and weight24.dtype == torch.float32


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_round_trip_is_lossless(data):
    """Bit for bit, with zeros that are kept, -0.0 and infinities."""
    rows, groups = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    dtype = data.draw(st.sampled_from((*FLOATS, torch.float64, torch.int8)))
    number = st.sampled_from(
        [1.0, -2.0, 0.0, 127.0] + ([-0.0, float("inf"), -float("inf")] if dtype != torch.int8 else [])
    )
    numbers = data.draw(st.lists(number, min_size=rows * groups * 4, max_size=rows * groups * 4))
    dense = torch.tensor(numbers, dtype=torch.float64).reshape(rows, groups * 4).to(dtype)
    scores = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=dense.numel(), max_size=dense.numel())))
    mask = reference.prune_n_of_m(scores.reshape(dense.shape).long(), 2, 4)
    scales = torch.rand(rows) if dtype == torch.int8 else None
    weight24 = sparse24.compress(dense, mask, scales)
    expected = torch.where(mask, dense, torch.zeros((), dtype=dtype))
    assert same_bits(ops.decompress(weight24.values, weight24.metadata), expected)
    assert torch.equal(weight24.mask(), mask)
    again = sparse24.Sparse24Weight.from_state_dict(weight24.state_dict())
    assert same_bits(again.values, weight24.values) and torch.equal(again.metadata, weight24.metadata)
    # what is 2:4 needs no mask
    assert torch.equal(ops.decompress(*sparse24_parts(expected, scales)), expected)


def sparse24_parts(dense, scales):
    weight24 = sparse24.compress(dense, scales=scales)
    return weight24.values, weight24.metadata


def test_a_negative_zero_is_kept_where_there_is_room():
    dense = torch.tensor([[0.0, 0.0, -0.0, 1.0]])
    assert same_bits(sparse24.compress(dense).decompress(), dense)


@needs_kernels
@pytest.mark.parametrize("dtype", (*FLOATS, torch.int8), ids=str)
@pytest.mark.parametrize("shape", [(1, 4), (3, 12), (5, 64), (2, 100), (0, 8), (4, 0)])
def test_compress_equals_the_reference(shape, dtype, instruction_set):
    dense = (torch.randn(shape[0], shape[1] + 3) * 20).to(dtype)[:, : shape[1]]
    mask = reference.prune_n_of_m(torch.rand(shape), 2, 4)
    compiled, plain = (ops.compress(dense, mask, backend=backend) for backend in ("compiled", "reference"))
    assert all(same_bits(a, b) for a, b in zip(compiled, plain))
    assert same_bits(*(ops.decompress(*plain, backend=backend) for backend in ("compiled", "reference")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_that_is_not_2_of_4_is_an_error(backend):
    mask = torch.tensor([[True, True, False, False], [True, False, False, False]])
    with pytest.raises(RuntimeError):
        ops.compress(torch.ones(2, 4), mask, backend=backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8), ids=str)
def test_a_trusted_mask_is_not_looked_at(dtype):
    """Every set of kept positions: two of them as ever, of others the first two entries; a legal weight in any case."""
    mask = torch.tensor([[i >> bit & 1 for bit in range(4)] for i in range(16)]).bool().repeat(1, 3)
    dense = torch.arange(16 * 12).reshape(16, 12).to(dtype)
    two = mask.reshape(16, 3, 4).sum(-1, keepdim=True) == 2
    legal = torch.where(two, mask.reshape(16, 3, 4), torch.tensor([True, True, False, False])).reshape(16, 12)
    expected = reference.compress(dense, legal)
    for backend in ("reference",) if WITHOUT_KERNELS else ("reference", "compiled"):
        actual = ops.compress(dense, mask, trusted=True, backend=backend)
        assert all(same_bits(a, b) for a, b in zip(actual, expected))


def test_errors_name_the_place():
    dense = torch.zeros(3, 8)
    dense[1, 4:7] = 1
    with pytest.raises(ValueError, match=r"weight must be 2:4 .*, got 3 entries other than 0 in row 1, columns 4 to 7"):
        sparse24.compress(dense)
    dense[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"weight must not hold NaN, got one at \(2, 3\)"):
        sparse24.compress(dense)
    mask = sparse24.prune(torch.rand(3, 8))
    mask[2, :4] = torch.tensor([True, False, False, False])
    with pytest.raises(ValueError, match=r"mask must have exactly two .*, got 1 in row 2, columns 0 to 3"):
        sparse24.compress(torch.rand(3, 8), mask)


# The value


def test_state_dict_has_a_version():
    _, weight24 = weight(8, 16)
    state = weight24.state_dict()
    assert all(tensor.is_contiguous() for tensor in state.values()) and state["format_version"].tolist() == [1]
    with pytest.raises(ValueError, match="format_version must be 1, got 2"):
        sparse24.Sparse24Weight.from_state_dict(state | {"format_version": torch.tensor([2])})
    broken = state | {"metadata": torch.full_like(state["metadata"], 0b0101)}
    with pytest.raises(ValueError, match=r"metadata must hold ascending positions, got \[1, 1\] in row 0, group 0"):
        sparse24.Sparse24Weight.from_state_dict(broken)


def test_safetensors(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    for dtype in (*FLOATS, torch.int8):
        scales = torch.rand(6) if dtype == torch.int8 else None
        dense = (torch.randn(6, 20) * 9).to(dtype)
        weight24 = sparse24.compress(dense, sparse24.prune(dense), scales)
        files.save_file(weight24.state_dict(), tmp_path / "weight")
        again = sparse24.Sparse24Weight.from_state_dict(files.load_file(tmp_path / "weight"))
        assert same_bits(again.decompress(), weight24.decompress())


def test_is_a_pytree():
    dense, weight24 = weight(8, 16, transposable=True)
    weight24 = weight24.with_transpose()
    weight24.choice = (0, 1, 64, 2)
    weight24.cache_dense()
    leaves, spec = pytree.tree_flatten(weight24)
    assert [leaf is part for leaf, part in zip(leaves, (weight24.values, weight24.metadata, None))] == [True] * 3
    again = pytree.tree_unflatten(leaves, spec)
    assert again.choice == weight24.choice and torch.equal(again.decompress(), dense)
    assert again.transposed is again.dense is None  # copies stay behind
    assert torch.equal(pickle.loads(pickle.dumps(weight24)).decompress(), dense)


def test_to_and_bytes():
    dense, weight24 = weight(8, 16)
    half = weight24.to(torch.bfloat16)
    assert torch.equal(half.decompress(), dense.bfloat16()) and half.nbytes == 8 * 8 * 2 + 8 * 2
    assert weight24.to("cpu") is weight24
    weight24.cache_dense()
    assert weight24.nbytes == 8 * 8 * 4 + 8 * 2 + 8 * 16 * 4
    weight24.drop_dense()
    assert weight24.nbytes == 8 * 8 * 4 + 8 * 2
    with pytest.raises(TypeError, match="int8 values have no other dtype"):
        sparse24.quantize(weight24).to(torch.float32)
    assert sparse24.quantize(weight24).to("meta").device.type == "meta"


def test_a_dense_copy_follows_its_values():
    _, weight24 = weight(8, 16)
    first = weight24.cache_dense()
    assert weight24.cache_dense() is first
    weight24.values.mul_(2)
    assert torch.equal(weight24.cache_dense(), first * 2)


# torch's own tensors


def torch_shapes(dtype):
    return {torch.int8: (32, 256), torch.float32: (64, 96)}.get(dtype, (64, 192))


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
@pytest.mark.parametrize("dtype", (*FLOATS, torch.int8), ids=str)
def test_cutlass_layout_both_ways(dtype):
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass as convert

    rows, columns = torch_shapes(dtype)
    dense = (torch.randn(rows, columns) * 30).to(dtype)
    dense[dense == 0] = 1
    if dtype == torch.float32:  # 1:2 in torch
        mask = reference.prune_n_of_m(dense.abs(), 1, 2)
    else:
        mask = reference.prune_n_of_m(torch.rand(rows, columns), 2, 4)
    dense = dense.masked_fill(~mask, 0)
    scales = torch.rand(rows) if dtype == torch.int8 else None
    packed, meta = convert(dense)
    theirs = torch.sparse.SparseSemiStructuredTensorCUTLASS(dense.shape, packed, meta, None, None, None)
    ours = sparse24.from_torch(theirs, scales)
    assert torch.equal(ops.decompress(ours.values, ours.metadata), dense) and ours.scales is scales
    back = sparse24.to_torch(sparse24.compress(dense, scales=scales))
    assert isinstance(back, torch.sparse.SparseSemiStructuredTensorCUTLASS) and back.shape == dense.shape
    # every group has as many entries other than 0 as it may, so there is one way to write it
    assert torch.equal(back.packed, packed) and torch.equal(back.meta, meta)
    if dtype == torch.float32:  # (where torch's to_dense changes bits: it moves the halves of numbers as float16)
        with pytest.raises(ValueError, match=r"weight of float32 must be 1:2 .*, got two entries other than 0 in row"):
            sparse24.to_torch(weight(rows, columns)[1])
    else:  # kept positions are kept, whatever the values
        assert torch.equal(back.to_dense(), dense)
        zeros = sparse24.compress(torch.zeros_like(dense), mask, scales)
        again = sparse24.from_torch(sparse24.to_torch(zeros), scales)
        assert torch.equal(again.metadata, zeros.metadata)


@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_layouts_that_need_a_gpu_say_so():
    _, weight24 = weight(64, 128, torch.float16)
    with pytest.raises(RuntimeError, match="torch packs the cusparselt layout on a GPU, got a weight on cpu"):
        sparse24.to_torch(weight24, "cusparselt")
    packed = torch.zeros(64, 72, dtype=torch.float16)
    theirs = torch.sparse.SparseSemiStructuredTensorCUSPARSELT(torch.Size((64, 128)), packed, None, None, None, None)
    with pytest.raises(RuntimeError, match="a tensor of backend 'cusparselt' on cpu cannot be read"):
        sparse24.from_torch(theirs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
def test_cusparselt_layout_both_ways():
    dense = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    weight24 = sparse24.compress(dense, sparse24.prune(dense))
    theirs = sparse24.to_torch(weight24, "cusparselt")
    assert torch.equal(sparse24.from_torch(theirs).decompress(), weight24.decompress())


# Products


def check_linear(x, weight24, bias=None, activation="none", mul=None, instruction_set="avx2", **call):
    """Against the oracle in float64, within twice the error of plain torch in x's dtype."""
    actual = sparse24.linear(x, weight24, bias, activation, mul, **call)
    assert actual.dtype == x.dtype and actual.is_contiguous()

    def plain(dtype):
        z = F.linear(x.to(dtype), weight24.decompress().to(dtype), None if bias is None else bias.to(dtype))
        z = ACTIVATIONS[activation](z)
        return z if mul is None else z * mul.to(dtype)

    assert_within_budget(actual, plain(torch.float64), plain(x.dtype), instruction_set)
    return actual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rows, out, inside", [(1, 1, 4), (3, 7, 20), (31, 40, 64), (33, 65, 132), (0, 5, 8)])
def test_linear(rows, out, inside, dtype, backend):
    _, weight24 = weight(out, inside, dtype)
    x = torch.randn(rows, inside).to(dtype)
    check_linear(x, weight24, backend=backend)
    check_linear(x, weight24, torch.randn(out), backend=backend)
    check_linear(x, weight24, torch.randn(out).to(dtype), "silu", torch.randn(rows, out).to(dtype), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, backend):
    _, weight24 = weight(24, 32)
    x, bias, mul = torch.randn(2, 5, 32), torch.randn(24), torch.randn(2, 5, 24)
    actual = check_linear(x, weight24, bias, activation, mul, backend=backend)
    assert actual.shape == (2, 5, 24)
    assert torch.equal(
        sparse24.linear(x, weight24, bias, backend=backend), sparse24.linear(x, weight24, bias, "none", backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_weights(dtype, backend):
    _, weight24 = weight(40, 36)
    weight24 = sparse24.quantize(weight24)
    for rows in (1, 40):
        check_linear(torch.randn(rows, 36).to(dtype), weight24, torch.randn(40), "relu", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_dimensions(backend):
    dense, weight24 = weight(6, 8)
    run = lambda x, mul=None: sparse24.linear(x, weight24, mul=mul, backend=backend)  # noqa: E731
    x = torch.randn(3, 4, 8)
    expected = x @ dense.T
    torch.testing.assert_close(run(x), expected)
    torch.testing.assert_close(run(x[0, 0]), expected[0, 0])
    torch.testing.assert_close(run(x.transpose(0, 1)), expected.transpose(0, 1))
    torch.testing.assert_close(run(x.permute(2, 1, 0).contiguous().permute(2, 1, 0)), expected)
    huge = torch.randn(3 << 20).as_strided((3, 8), (1 << 20, 1))
    torch.testing.assert_close(run(huge), huge @ dense.T)
    torch.testing.assert_close(run(x[:, :1].expand(3, 4, 8)), expected[:, :1].expand(3, 4, 6))
    mul = torch.randn(6, 4, 3).permute(2, 1, 0)
    torch.testing.assert_close(run(x, mul), expected * mul)
    assert run(torch.randn(0, 4, 8)).shape == (0, 4, 6) and run(torch.randn(2, 0, 8)).shape == (2, 0, 6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_features(backend):
    none_out = sparse24.compress(torch.zeros(0, 8))
    assert sparse24.linear(torch.randn(3, 8), none_out, backend=backend).shape == (3, 0)
    none_in = sparse24.compress(torch.zeros(5, 0))
    bias = torch.randn(5)
    torch.testing.assert_close(sparse24.linear(torch.randn(3, 0), none_in, bias, backend=backend), bias.expand(3, 5))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70), out=st.integers(1, 70), groups=st.integers(1, 40), dtype=st.sampled_from(FLOATS),
    kernel=st.sampled_from([(), (0, 0), (0, 1), (0, 2), (0, 0, 8, 1, 64, 2)]),
)  # fmt: skip
def test_every_choice_of_kernel_gives_the_product(rows, out, groups, dtype, kernel):
    _, weight24 = weight(out, 4 * groups, dtype)
    weight24.choice = kernel
    check_linear(torch.randn(rows, 4 * groups).to(dtype), weight24)


# Where a dense product is faster


def test_dense_copies_are_made_at_first_need():
    _, weight24 = weight(16, 32)
    weight24.choice = (0, 0, 8, 2, 64, 1)
    small = weight24.nbytes
    sparse24.linear(torch.randn(7, 32), weight24)
    sparse24.linear(torch.randn(64, 32), weight24)
    sparse24.linear(torch.randn(8, 32), weight24, dense_fallback="never")
    assert weight24.dense is None and weight24.nbytes == small
    check_linear(torch.randn(8, 32), weight24)
    assert weight24.dense is not None and weight24.nbytes == small + 16 * 32 * 4
    check_linear(torch.randn(9, 32), weight24, dense_fallback="never")
    trained = sparse24.Sparse24Weight(weight24.values.clone().requires_grad_(), weight24.metadata, choice=(0, 2))
    sparse24.linear(torch.randn(8, 32), trained).sum().backward()
    assert trained.dense is None and trained.values.grad is not None


@pytest.mark.parametrize(
    "choice, expected_choice",
    [
        ((), ()),
        ((0, 0, 8, 1), (0, 0, 8, 1)),
        ((0, 2), (0, -1)),
        ((0, 0, 8, 2), (0, 0, 8, -1)),
        ((0, 1, 8, 2, 16, 1), (0, 1, 8, -1, 16, 1)),
        ((0, 0, 64, 2, 128, 1), (0, 0, 64, -1, 128, 1)),
        ((40, 2), (40, -1)),
        ((0, 0, 16, 3, 64, 2), (0, 0, 16, -1, 64, -1)),
    ],
)
def test_a_choice_without_copies(choice, expected_choice):
    from pyvtk.sparse24.modules import kernel_at, without

    assert without(choice) == expected_choice
    for rows in range(200):
        expected = kernel_at(choice, rows)
        assert kernel_at(expected_choice, rows) == (expected if expected < 2 else -1)


@pytest.mark.parametrize("rows", [1, 7, 8, 31, 32, 65])
def test_the_default_kernel_is_that_of_an_empty_choice(rows):
    """Bit for bit, which the kernels are not among each other: they add up in other orders."""
    _, weight24 = weight(16, 512)
    call = torch.randn(rows, 512), weight24.values, weight24.metadata
    empty = ops.linear(*call, backend="compiled")
    assert torch.equal(ops.linear(*call, choice=(0, -1), backend="compiled"), empty)
    other = 1 if rows < 8 else 0
    assert not torch.equal(ops.linear(*call, choice=(0, other), backend="compiled"), empty)


# Gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ("none", "gelu"))
def test_gradients_equal_those_of_the_dense_layer(activation, backend):
    dense, weight24 = weight(12, 20)
    x, bias, mul = torch.randn(2, 5, 20), torch.randn(12), torch.randn(2, 5, 12)
    leaves = [t.requires_grad_() for t in (x, weight24.values, bias, mul)]
    actual = torch.autograd.grad(
        sparse24.linear(x, weight24, bias, activation, mul, backend=backend).square().sum(), leaves
    )
    leaf = dense.clone().requires_grad_()
    out = ACTIVATIONS[activation](F.linear(x, leaf, bias)) * mul
    expected = list(torch.autograd.grad(out.square().sum(), [x, leaf, bias, mul]))
    expected[1] = expected[1][weight24.mask()].reshape(12, 10)
    torch.testing.assert_close(actual, tuple(expected), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize("activation", (None, "silu"))
def test_gradient_by_the_compressed_transpose(activation, monkeypatch):
    from pyvtk.sparse24 import functions

    calls = []
    product = functions.sparse_product
    monkeypatch.setattr(functions, "sparse_product", lambda *a: calls.append(a[1].shape) or product(*a))
    dense, weight24 = weight(12, 20, transposable=True)
    both = weight24.with_transpose()
    leaves = [torch.randn(s).requires_grad_() for s in ((2, 5, 20), (12,), (2, 5, 12))]
    x, bias, mul = leaves
    out = sparse24.linear(x, both, bias, activation, mul)
    expected = ACTIVATIONS[activation or "none"](F.linear(x, dense, bias)) * mul
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    assert calls == [(12, 10), (20, 6)]
    monkeypatch.undo()
    compiled = torch.compile(lambda x: sparse24.linear(x, both), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(*(torch.autograd.grad(f(x).sum(), x) for f in (compiled, lambda x: x @ dense.T)))


def test_gradcheck():
    _, weight24 = weight(3, 8, torch.float64)
    x, bias, mul = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 8), (3,), (2, 3)))
    values = weight24.values.requires_grad_()
    for activation in ("none", "gelu", "quick_gelu"):
        run = lambda x, v, b, m: ops.linear(x, v, weight24.metadata, bias=b, mul=m, activation=activation)  # noqa: B023, E731
        assert torch.autograd.gradcheck(run, (x, values, bias, mul))
    mask = weight24.mask()
    leaf = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: ops.compress(w, mask)[0], leaf)
    assert torch.autograd.gradcheck(lambda v: ops.decompress(v, weight24.metadata), values)


def test_gradient_of_int8_weights_reaches_x():
    _, weight24 = weight(12, 20)
    weight24 = sparse24.quantize(weight24)
    x = torch.randn(5, 20, requires_grad=True)
    (grad,) = torch.autograd.grad(sparse24.linear(x, weight24).sum(), x)
    torch.testing.assert_close(grad, weight24.decompress().sum(0).expand(5, 20))


# The operators' contracts


@needs_kernels
@pytest.mark.parametrize("grad", (False, True))
def test_opcheck(grad):
    dense, weight24 = weight(6, 12)
    mask = weight24.mask()
    torch.library.opcheck(OPS.sparse24_compress, (dense.requires_grad_(grad), mask))
    torch.library.opcheck(OPS.sparse24_compress, (dense, mask, True))
    values, metadata = weight24.values.requires_grad_(grad), weight24.metadata
    torch.library.opcheck(OPS.sparse24_decompress, (values, metadata))
    x, bias = torch.randn(3, 12, requires_grad=grad), torch.randn(6, requires_grad=grad)
    torch.library.opcheck(OPS.sparse24_linear, (x, values, metadata, None, None, bias, None, "none", [1, 0, 2, 1]))
    if not grad:
        mul, whole = torch.randn(3, 6), sparse24.quantize(weight24)
        parts = (whole.values, whole.metadata, whole.scales)
        torch.library.opcheck(OPS.sparse24_linear, (x, values, metadata, None, dense, None, mul, "gelu", [0, 2]))
        torch.library.opcheck(OPS.sparse24_linear, (x, *parts, None, bias, None, "silu", []))
        torch.library.opcheck(OPS.sparse24_linear_int8, (x, *parts, None, bias, mul, "relu"))
        torch.library.opcheck(OPS.sparse24_linear_int8, (x, *parts, torch.rand(1), None, None, "none"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", (False, True))
def test_compiles_whole_with_few_recompilations(grad, backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    _, weight24 = weight(12, 16)
    weight24.choice = (0, 0, 8, 2, 40, 1)
    weight24.cache_dense()
    counter = CompileCounterWithBackend("aot_eager")
    bias = torch.randn(12)

    def step(x):
        return sparse24.linear(x, weight24, bias, "gelu", backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (3, 5, 9, 64, 33, 2):
        x = torch.randn(rows, 16, requires_grad=grad)
        actual, expected = compiled(x), step(x)
        torch.testing.assert_close(actual, expected)
        if grad:
            torch.testing.assert_close(*(torch.autograd.grad(y.sum(), x) for y in (actual, expected)))
    assert counter.frame_count <= 2


@pytest.mark.compile
@needs_kernels
def test_compiles_with_inductor():
    _, weight24 = weight(12, 16)
    layer = sparse24.Sparse24Linear(weight24, torch.randn(12), "silu")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():  # gradients are compiled, without a C++ compiler, in the test above
        for rows in (3, 40):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend):
    _, weight24 = weight(12, 16)
    x, bias, mul = torch.randn(5, 16), torch.randn(12), torch.randn(5, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = sparse24.linear(x, weight24, bias, "relu", mul, backend=backend)
    assert actual.dtype == torch.bfloat16
    half = weight24.to(torch.bfloat16)
    expected = sparse24.linear(x.bfloat16(), half, bias, "relu", mul.bfloat16(), backend=backend)
    assert torch.equal(actual, expected)


# The module


def test_module_round_trip():
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        dense, weight24 = weight(12, 16, torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
        if dtype == torch.int8:
            weight24 = sparse24.quantize(weight24)
        layer = sparse24.Sparse24Linear(weight24, torch.randn(12).to(dense.dtype), "relu")
        other = sparse24.Sparse24Linear(
            sparse24.Sparse24Weight(*(torch.zeros_like(t) for t in (weight24.values, weight24.metadata)),
                                    None if weight24.scales is None else torch.ones(12)),
            torch.zeros(12, dtype=dense.dtype), "relu",
        )  # fmt: skip
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 16).to(dense.dtype)
        assert torch.equal(other(x), layer(x))
        again = pickle.loads(pickle.dumps(layer))
        assert torch.equal(again(x), layer(x)) and torch.equal(layer.weight, weight24.decompress())


def test_module_refuses_another_version():
    _, weight24 = weight(12, 16)
    layer = sparse24.Sparse24Linear(weight24)
    before = layer.values.clone()
    state = layer.state_dict() | {"format_version": torch.tensor([7]), "values": torch.zeros_like(before)}
    with pytest.raises(RuntimeError, match="format_version must be 1, got 7"):
        layer.load_state_dict(state)
    assert torch.equal(layer.values, before)


def test_module_moves_whole():
    _, weight24 = weight(12, 16)
    layer = sparse24.Sparse24Linear(sparse24.quantize(weight24), torch.randn(12), x_scale=torch.tensor([0.1]))
    layer.bfloat16()
    assert layer.scales.dtype == torch.float32 and layer.x_scale.dtype == torch.float32
    assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16
    weight24.choice = (0, 2)
    layer = sparse24.Sparse24Linear(weight24)
    x = torch.randn(3, 16)
    expected = layer(x)
    assert layer.nbytes > weight24.nbytes - weight24.shape.numel() * 4 and layer.weight24.dense is not None
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    state["values"] *= 2
    layer.load_state_dict(state)
    assert torch.equal(layer(x), 2 * expected)  # not from the copy of before
    assert layer.double()(x.double()).dtype == torch.float64


# Wrong calls: (what the message must contain, call).

W = sparse24.compress(torch.zeros(6, 8))
Q = sparse24.quantize(W)
X = torch.zeros(3, 8)
WRONG = {
    "sparse24.compress: weight must be a tensor": lambda: sparse24.compress([1.0]),
    "sparse24.compress: weight must have 2": lambda: sparse24.compress(X[0]),
    "sparse24.compress: weight must have dtype": lambda: sparse24.compress(X.long()),
    "sparse24.compress: weight must have in_features": lambda: sparse24.compress(X[:, :6]),
    "sparse24.compress: mask must be a tensor": lambda: sparse24.compress(X, 1),
    "sparse24.compress: mask must have dtype": lambda: sparse24.compress(X, X),
    "sparse24.compress: mask must be [out_features": lambda: sparse24.compress(X, X[:2].bool()),
    "sparse24.compress: trusted must be": lambda: ops.compress(X, X.bool(), trusted=1),
    "sparse24.compress: scales must be given": lambda: sparse24.compress(X, scales=torch.ones(3)),
    "sparse24.compress: scales must be given for int8": lambda: sparse24.compress(X.to(torch.int8)),
    "sparse24.compress: scales must have dtype": lambda: sparse24.compress(
        X.to(torch.int8), scales=torch.ones(3).half()
    ),
    "sparse24.linear: weight must be a Sparse24Weight": lambda: sparse24.linear(X, X),
    "sparse24.linear: x must be a tensor": lambda: sparse24.linear(None, W),
    "sparse24.linear: x must have at least 1": lambda: sparse24.linear(torch.tensor(1.0), W),
    "sparse24.linear: x must be [..., in_features = 8]": lambda: sparse24.linear(X[:, :4], W),
    "sparse24.linear: x must have dtype": lambda: sparse24.linear(X.long(), W),
    "sparse24.linear: x must have the dtype of values": lambda: sparse24.linear(X.half(), W),
    "sparse24.linear: bias must be": lambda: sparse24.linear(X, W, torch.zeros(5)),
    "sparse24.linear: bias must have dtype": lambda: sparse24.linear(X, W, torch.zeros(6).half()),
    "sparse24.linear: mul must be": lambda: sparse24.linear(X, W, mul=torch.zeros(6)),
    "sparse24.linear: mul must have dtype": lambda: sparse24.linear(X, W, mul=torch.zeros(3, 6).half()),
    "sparse24.linear: activation must be": lambda: sparse24.linear(X, W, activation="tanh"),
    "sparse24.linear: dense_fallback must be": lambda: sparse24.linear(X, W, dense_fallback="often"),
    "sparse24.linear: choice must be a flat": lambda: ops.linear(X, W.values, W.metadata, choice=(0, 0.5)),
    "sparse24.linear: choice must be pairs": lambda: ops.linear(X, W.values, W.metadata, choice=(8, 0, 4, 1)),
    "sparse24.linear: dense must be given": lambda: ops.linear(X, W.values, W.metadata, choice=(0, 2)),
    "sparse24.linear: dense must be [out": lambda: ops.linear(X, W.values, W.metadata, dense=X),
    "sparse24.linear: metadata must be": lambda: ops.linear(X, W.values, W.metadata[:, :0]),
    "sparse24.linear: values must be contiguous": lambda: ops.linear(X, W.values.T.contiguous().T, W.metadata),
    "sparse24.linear: values must have an even": lambda: ops.linear(X, W.values[:, :3].contiguous(), W.metadata),
    "sparse24.linear_int8: values must have dtype int8": lambda: ops.linear_int8(X, W.values, W.metadata, None),
    "sparse24.linear_int8: x_scale must be": lambda: sparse24.linear_int8(X, Q, x_scale=torch.ones(3)),
    "sparse24.linear_int8: x, bias and mul must not": lambda: sparse24.linear_int8(X.clone().requires_grad_(), Q),
    "Sparse24Weight.with_transpose: weight must have out_features in multiples of 4": lambda: W.with_transpose(),
    "Sparse24Weight.with_transpose: weight must be 2:4 along out_features too": lambda: sparse24.compress(
        torch.eye(4, 8).roll(2, 1) + torch.eye(8)[0]
    ).with_transpose(),
    "Sparse24Weight.with_transpose: values must be floating": lambda: Q.with_transpose(),
    "sparse24.from_torch: tensor must be": lambda: sparse24.from_torch(X),
    "sparse24.to_torch: layout must be": lambda: sparse24.to_torch(W, "csr"),
    "sparse24.to_torch: weight of torch.float32 must have a shape": lambda: sparse24.to_torch(W),
    "Sparse24Linear: activation must be": lambda: sparse24.Sparse24Linear(W, activation="tanh"),
    "Sparse24Linear: x_scale must be": lambda: sparse24.Sparse24Linear(W, x_scale="row"),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_calls_name_the_argument(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert str(error.value).startswith(message) and ", got " in str(error.value)


def test_public_name():
    assert pyvtk.sparse24 is sparse24 and all(hasattr(sparse24, name) for name in sparse24.__all__)
