"""The CUDA kernels of sparse24, run by the emulation, against the reference in float64."""

import emulated
import emulated_sparse24 as kernels
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import assert_within_budget, largest

from pyvtk.reference import sparse24 as reference

if emulated.SANITIZER == "thread":
    pytest.skip("Python runs without ThreadSanitizer; test_sparse24.cpp does not", allow_module_level=True)

HALVES = [torch.bfloat16, torch.float16]
ROWS = [0, 1, 2, 3, 5, 8, 9, 12, 16, 17, 20, 31, 32, 33, 40, 64, 65, 100, 129, 200]


def weights(features: int, depth: int, dtype: torch.dtype, generator: torch.Generator) -> tuple:
    """values, metadata and scales of a random weight; all pairs of positions come."""
    mask = reference.prune_n_of_m(torch.rand(features, depth, generator=generator), 2, 4)
    if dtype == torch.int8:
        weight = torch.randint(-128, 128, (features, depth), generator=generator).to(dtype)
        scales = torch.rand(features, generator=generator) / 64 + 1e-3
    else:
        weight, scales = torch.randn(features, depth, generator=generator).to(dtype), None
    return *reference.compress(weight, mask), scales


@st.composite
def problems(draw, int8: bool):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows = draw(st.sampled_from(ROWS))
    # a shape that fits the loads of the few kernel, with room for several panels and splits, or those of wgmma, or any
    fits = draw(st.booleans())
    if fits and rows > 32:
        depth = draw(st.sampled_from([64, 128, 192, 384, 640]))
        features = draw(st.sampled_from([1, 31, 70, 129, 260]))
    elif fits:
        depth = draw(st.sampled_from([64, 128, 192, 256, 384, 1024, 1088, 2176, 4224]))
        features = draw(st.sampled_from([1, 16, 17, 31, 33, 70, 129, 160][: 8 if depth < 500 else 4]))
    else:
        depth = 4 * draw(st.integers(0, 40)) + draw(st.sampled_from([0, 0, 512, 1024] if rows < 20 else [0, 0, 512]))
        features = draw(st.sampled_from([0, 1, 7, 16, 64, 127, 128, 130] if rows < 65 else [3, 65, 130]))
    dtype = draw(st.sampled_from(emulated.DTYPES if int8 else HALVES))
    values, metadata, scales = weights(features, depth, torch.int8 if int8 or draw(st.booleans()) else dtype, generator)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    bias = mul = None
    if draw(st.booleans()):
        bias = torch.randn(features, generator=generator).to(draw(st.sampled_from([dtype, torch.float32])))
    if draw(st.booleans()):
        mul = torch.randn(rows, features, generator=generator).to(dtype)
    activation = draw(st.sampled_from(["none", *kernels.ACTIVATIONS]))
    options = {
        "few": rows <= 32 and draw(st.integers(0, 3)) > 0,
        "x_stride": depth + draw(st.sampled_from([0, 0, 0, 4, 8, 1])),
        "offset": draw(st.sampled_from([0, 0, 0, 0, 4, 1])),
        "multiprocessors": draw(st.sampled_from([1, 4, 40])),
        "wgmma": draw(st.booleans()),
    }
    return (x, values, metadata, scales, bias, mul, activation), options


# Kernels that declare no shared memory get all that a device has.
ALL_SHARED = 227 * 1024 + emulated.DECLARED
EXAMPLES = {"": (330, 130)}.get(emulated.SANITIZER, (80, 40))


@settings(max_examples=EXAMPLES[0], deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(int8=False), st.sampled_from([0, 0, 1, 2]), st.sampled_from([1, 3]))
def test_linear(problem, seed, blocks_alive):
    emulated.configure(seed, blocks_alive, ALL_SHARED)
    arguments, options = problem
    actual, _ = kernels.linear(*arguments, **options)
    x, values, metadata, scales, bias, mul, activation = arguments
    plain = reference.linear(x, values, metadata, scales, None, bias, mul, activation)
    wide = [t if t is None or t.dtype in (torch.uint8, torch.int8) else t.double() for t in arguments[:6]]
    oracle = reference.linear(*wide[:4], None, *wide[4:], activation)
    assert actual.dtype == plain.dtype
    added = 0.0
    if activation not in ("none", "relu"):  # erff, tanhf and expf, of which x is a factor, may be off by 2 units each
        added = 2 * largest(reference.linear(*wide[:4], None, *wide[4:], "none"))
    assert_within_budget(actual, oracle, plain, added=added)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("values_dtype", [None, torch.int8])
@pytest.mark.parametrize(
    "rows, features, depth, multiprocessors, plan",
    [
        (8, 20, 12416, 2, (True, 1, 2)),
        (15, 20, 8448, 2, (True, 2, 2)),
        (30, 20, 4224, 3, (True, 4, 2)),
        (30, 129, 128, 1, (True, 4, 1)),
        (40, 20, 1100, 2, (False, 64, 2)),
        (130, 140, 68, 4, (False, 128, 1)),
    ],
)
def test_plans(rows, features, depth, multiprocessors, plan, values_dtype, dtype):
    """Every kernel and tile, with splits and without; what is asked for does run."""
    emulated.configure()
    generator = torch.Generator().manual_seed(rows)
    weight = weights(features, depth, values_dtype or dtype, generator)
    x = torch.randn(rows, depth, generator=generator).to(dtype)
    actual, taken = kernels.linear(x, *weight, None, None, "none", few=True, multiprocessors=multiprocessors)
    assert taken[:2] == plan[:2] and (taken[2] > 1) == (plan[2] > 1)
    plain = reference.linear(x, *weight, None, None, None, "none")
    wide = [weight[0] if values_dtype else weight[0].double(), weight[1], weight[2]]
    assert_within_budget(actual, reference.linear(x.double(), *wide, None, None, None, "none"), plain)


@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
@pytest.mark.parametrize(
    "rows, features, depth, multiprocessors, tile, splits",
    [
        (40, 20, 512, 4, 0, 1),
        (40, 20, 2048, 2, 0, 2),
        (120, 140, 128, 2, 1, 1),
        (150, 140, 128, 2, 2, 1),
        (190, 250, 128, 1, 3, 1),
    ],
)
def test_plans_of_wgmma(rows, features, depth, multiprocessors, tile, splits, dtype):
    """Every tile, with splits and without, and shapes that none of them divides."""
    emulated.configure(shared_bytes=ALL_SHARED)
    generator = torch.Generator().manual_seed(rows)
    values, metadata, scales = weights(features, depth, dtype, generator)
    int8 = dtype == torch.int8
    x = torch.randn(rows, depth, generator=generator).to(torch.bfloat16 if int8 else dtype)
    arguments = x, values, metadata, scales, None, None, "none"
    actual, taken = kernels.linear(*arguments, few=False, int8=int8, multiprocessors=multiprocessors, wgmma=True)
    assert taken[2:] == (splits, tile)
    if int8:
        assert torch.equal(actual, reference.linear_int8(*arguments[:4], None, *arguments[4:]))
        return
    oracle = reference.linear(x.double(), values.double(), metadata, scales, None, None, None, "none")
    assert_within_budget(actual, oracle, reference.linear(x, values, metadata, scales, None, None, None, "none"))


@pytest.mark.parametrize("rows, plan", [(31, (True, 4)), (32, (True, 4)), (33, (False, 64))])
@pytest.mark.parametrize("values_dtype, int8", [(None, False), (torch.int8, False), (torch.int8, True)])
def test_the_kernel_for_few_rows_takes_all_that_it_holds(rows, plan, values_dtype, int8):
    """Where nobody asks for a kernel."""
    emulated.configure()
    generator = torch.Generator().manual_seed(rows)
    weight = weights(20, 256, values_dtype or torch.bfloat16, generator)
    x = torch.randn(rows, 256, generator=generator).to(torch.bfloat16)
    actual, taken = kernels.linear(x, *weight, None, None, "none", few=None, int8=int8)
    assert taken[:2] == plan
    if int8:
        assert torch.equal(actual, reference.linear_int8(x, *weight, None, None, None, "none"))
        return
    wide = [weight[0] if values_dtype else weight[0].double(), weight[1], weight[2]]
    oracle = reference.linear(x.double(), *wide, None, None, None, "none")
    assert_within_budget(actual, oracle, reference.linear(x, *weight, None, None, None, "none"))


@settings(max_examples=EXAMPLES[1], deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(int8=True), st.booleans(), st.sampled_from([0, 0, 1, 2]))
def test_linear_int8(problem, one_scale, seed):
    emulated.configure(seed, 2, ALL_SHARED)
    arguments, options = problem
    x, values, metadata, scales, bias, mul, activation = arguments
    if len(x) > 1 and x.shape[1]:
        x[0] = 0
        x[1, ::3] *= 50
    x_scale = torch.tensor([0.01]) if one_scale else None
    actual, _ = kernels.linear(*arguments, **options, int8=True, x_scale=x_scale)
    plain = reference.linear_int8(x, values, metadata, scales, x_scale, bias, mul, activation)
    if activation in ("none", "relu"):
        assert torch.equal(actual, plain)
    else:  # erff, tanhf and expf, of which x is a factor, may be off by 2 units each
        x_times = reference.linear_int8(x, values, metadata, scales, x_scale, bias, mul, "none")
        assert_within_budget(actual, plain.double(), plain, added=2 * largest(x_times))


@pytest.mark.parametrize("x_scale", [None, 0.5])
def test_int8_rows_that_are_not_numbers(x_scale):
    generator = torch.Generator().manual_seed(3)
    values, metadata, scales = weights(5, 64, torch.int8, generator)
    x = torch.randn(4, 64, generator=generator)
    x[0, 3], x[1, 5], x[2, 63] = float("nan"), float("inf"), -float("inf")
    x_scale = None if x_scale is None else torch.tensor([x_scale])
    actual, _ = kernels.linear(x, values, metadata, scales, None, None, "none", few=True, int8=True, x_scale=x_scale)
    expected = reference.linear_int8(x, values, metadata, scales, x_scale, None, None, "none")
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


def test_int8_rows_too_small_for_a_scale_become_zeros():
    """As in every backend: a scale of 0, or a subnormal one, is none."""
    smallest, unit = 2.0**-149, 127 * 2.0**-126
    x = torch.zeros(5, 64)
    x[:, 3] = torch.tensor([smallest, 180 * smallest, 0.999 * unit, unit, 1e-30])
    values, metadata, _ = weights(16, 64, torch.int8, torch.Generator().manual_seed(0))
    scales = torch.ones(16)
    actual, _ = kernels.linear(x, values, metadata, scales, None, None, "none", few=True, int8=True)
    assert (actual[:3] == 0).all() and (actual[3:] != 0).any(1).all()
    assert torch.equal(actual, reference.linear_int8(x, values, metadata, scales, None, None, None, "none"))


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("dtype", [*HALVES, torch.int8])
def test_large_sums_are_exact(dtype, few):
    """Whole numbers whose sums need every bit of the accumulator, with splits: each product is at its place."""
    generator = torch.Generator().manual_seed(7)
    depth, largest = (12288, 128) if dtype == torch.int8 else (8192, 9)
    weight = torch.randint(-largest, largest, (40, depth), generator=generator).to(dtype)
    values, metadata = reference.compress(weight, reference.prune_n_of_m(weight.float().abs(), 2, 4))
    x = torch.randint(-largest + 1, largest, (9, depth), generator=generator).float()
    x[:, 0] = 127 if dtype == torch.int8 else x[:, 0]
    expected = x.double() @ reference.decompress(values, metadata).double().T
    int8 = dtype == torch.int8
    scales, one = (torch.ones(40), torch.ones(1)) if int8 else (None, None)
    x = x if int8 else x.to(dtype)
    options = {"few": few, "int8": int8, "x_scale": one, "multiprocessors": 100}
    actual, plan = kernels.linear(x, values, metadata, scales, None, None, "none", **options)
    assert plan[0] == few and plan[2] > 1
    assert torch.equal(actual, expected.float().to(actual.dtype))


@settings(max_examples=100 if not emulated.SANITIZER else 30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 20), st.integers(0, 30), st.sampled_from([*emulated.DTYPES, torch.int8]), st.integers(0, 2**32))
def test_format(features, groups, dtype, seed):
    emulated.configure(seed % 4, 2)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-100, 100, (features, 4 * groups), generator=generator).to(dtype)
    mask = reference.prune_n_of_m(torch.rand(weight.shape, generator=generator), 2, 4)
    values, metadata, wrong = kernels.compress(weight, mask)
    expected = reference.compress(weight, mask)
    assert not wrong and torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
    assert torch.equal(kernels.decompress(values, metadata), weight * mask)
    if dtype == torch.int8:
        scales = torch.rand(features, generator=generator)
        dense = reference.weight_of(values, metadata, scales, torch.float32)
        assert torch.equal(kernels.decompress(values, metadata, scales), dense)


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_wrong_masks_are_found_unless_trusted(count):
    """In either case the result is a legal weight."""
    weight, mask = torch.randn(3, 20), torch.tensor([True, False, True, False]).repeat(3, 5)
    mask[1, 8:12] = torch.arange(4) < count
    expected = reference.compress(weight, mask, trusted=True)
    for trusted in (False, True):
        values, metadata, wrong = kernels.compress(weight, mask, trusted)
        assert wrong != trusted and torch.equal(values, expected[0]) and torch.equal(metadata, expected[1])
