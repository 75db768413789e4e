"""Calls of the operators of sparse24, and of Linear24."""

from __future__ import annotations

import torch

from calls.call import BRAIN, HALF, SINGLE, WHOLE, Call, short, values
from pyvtk.ops import sparse24 as ops24
from pyvtk.reference import sparse24 as reference24
from pyvtk.sparse24 import Linear24, Sparse24Weight


def weight24(features: int, columns: int, dtype) -> Sparse24Weight:
    """A random 2:4 weight; all pairs of positions come."""
    if dtype == WHOLE:
        dense, scales = torch.randint(-127, 128, (features, columns)).to(dtype), torch.rand(features) / 64 + 1e-3
    else:
        dense, scales = torch.randn(features, columns).to(dtype), None
    mask = reference24.prune_n_of_m(torch.rand(features, columns), 2, 4)
    return Sparse24Weight(*reference24.compress(dense, mask), scales)


def product(
    rows, features, columns, dtype=BRAIN, *, int8=False, bias=None, mul=False, dense=False, gap=0, x_scale=False
):
    """Inputs of a product: a weight, x (in memory with ``gap`` numbers between rows and before the first), and what
    else is named, in the order bias, mul, dense, x_scale."""

    def inputs():
        weight = weight24(features, columns, WHOLE if int8 else dtype)
        shape = rows if isinstance(rows, tuple) else (rows,)
        x = torch.randn(*shape, columns + gap).to(dtype)[..., gap:]
        more = [torch.randn(features).to(bias)] if bias else []
        more += [torch.randn(*shape, features).to(dtype)] if mul else []
        more += [weight.decompress(dtype)] if dense else []
        return weight, x, *more, *([torch.tensor([0.03])] if x_scale else [])

    return inputs


def multiplied(*names, int8=False, **options):
    """Further inputs are the tensor options ``names``. The oracle's float64 scales are what they were."""

    def run(backend, weight, x, *tensors):
        given = {n: t.float() if n == "x_scale" else t for n, t in zip(names, tensors)}
        packed = x, weight.values, weight.metadata
        scales = None if weight.scales is None else weight.scales.float()
        if int8:
            return ops24.linear_int8(*packed, scales, **options, **given, backend=backend)
        return ops24.linear(*packed, scales=scales, **options, **given, backend=backend)

    return run


def magnitudes(weight, x, *rest) -> float:
    return (x.double().abs() @ weight.decompress(torch.float64).abs().T).max().item()


def call24(inputs, run=None, operator="sparse24_linear", **options):
    return Call(operator, inputs, run or multiplied(), exact=False, reorders=True, **options)


def call24_int8(inputs, *names, compiles=False, **options):
    return call24(inputs, multiplied(*names, int8=True, **options), "sparse24_linear_int8", compiles=compiles)


def to_compress(features, columns, dtype):
    def inputs():
        return values(features, columns, dtype=dtype), reference24.prune_n_of_m(torch.rand(features, columns), 2, 4)

    return inputs


def gradients24(backend, weight, x, grad):
    leaves = [weight.values.detach().requires_grad_(), x.detach().requires_grad_()]
    out = ops24.linear(leaves[1], leaves[0], weight.metadata, activation="silu", backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def training_step24(backend, weight, mask, x, grad):
    """What Linear24 does in a step that chooses no mask; the host never waits, so a graph captures it."""
    leaves = [weight.detach().requires_grad_(), x.detach().requires_grad_()]
    packed = ops24.compress(leaves[0], mask, trusted=True, backend=backend)
    out = ops24.linear(leaves[1], *packed, backend=backend)
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def layer24(transposable: bool):
    """Linear24 forward and backward: the results, and the gradients to x, weight and bias."""

    def inputs():
        weight = torch.randn(96, 128)
        return tuple(t.to(BRAIN) for t in (weight, torch.randn(96), torch.randn(2, 20, 128), torch.randn(2, 20, 96)))

    def run(backend, weight, bias, x, grad):
        linear = torch.nn.Linear(128, 96, device="meta")
        linear.weight, linear.bias = (torch.nn.Parameter(t.detach().clone()) for t in (weight, bias))
        layer = Linear24.from_linear(linear, method="ste", transposable=transposable)
        x = x.detach().requires_grad_()
        if backend == "reference":  # by dense products; Linear24 itself would take the CPU's kernels
            masked = torch.where(layer.mask, weight, 0)
            flat_x, flat_grad = x.detach().flatten(0, 1), grad.flatten(0, 1)
            y = torch.nn.functional.linear(x.detach(), masked) + bias
            return y, grad @ masked, flat_grad.T @ flat_x, flat_grad.sum(0)
        y = layer(x)
        return y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)

    return call24(inputs, run, waits=True)


def every_tile(kind: str, make, dtype, int8: bool = False) -> dict[str, Call]:
    """A product for each tile that a kernel has: 8, 16 and 32 rows for few; 64, 128, 160 and 192 for many by wgmma (on
    132 multiprocessors), and 64 and 128 for many by mma.sp, which takes columns of any number."""
    few = (7, 96, 512), (15, 96, 512), (31, 96, 512)
    wgmma = (70, 96, 512), (128, 8576, 128), (577, 4224, 128), (577, 4352, 128)
    mma = (70, 96, 516), (577, 4224, 68)
    return {f"{kind}, {'x'.join(map(str, s))}": make(product(*s, dtype, int8=int8)) for s in (*few, *wgmma, *mma)}


CALLS = {
    # every number of rows of a tile; the few kernel splits its sums where there is little else to do
    "1 row": call24(product(1, 200, 2048), compiles=True),
    "5 rows, fp16": call24(product(5, 128, 1024, HALF)),
    "16 rows": call24(product(16, 129, 2176)),
    "30 rows, fp16": call24(product(30, 70, 1088, HALF)),
    # where few ends and many begins
    **{f"{rows} rows": call24(product(rows, 160, 512)) for rows in (31, 32, 33)},
    "64 rows": call24(product(64, 256, 1024)),
    "130 rows, fp16": call24(product(130, 130, 576, HALF)),
    "577 rows": call24(product(577, 384, 256)),
    **every_tile("bf16", call24, BRAIN),
    **every_tile("fp16", call24, HALF),
    **every_tile("bf16 x int8", call24, BRAIN, int8=True),
    **every_tile("fp16 x int8", call24, HALF, int8=True),
    **every_tile("int8 x int8", call24_int8, BRAIN, int8=True),
    "no rows": call24(product(0, 64, 64)),
    "no features": call24(product(5, 0, 64)),
    "images": call24(product((2, 3), 96, 128)),
    "fp32, 1 row": call24(product(1, 96, 512, SINGLE), added=magnitudes),
    "fp32": call24(product(64, 96, 260, SINGLE), added=magnitudes, compiles=True),
    "int8 weights, 1 row": call24(product(1, 160, 1024, int8=True)),
    "int8 weights, 16 rows, fp16": call24(product(16, 33, 512, HALF, int8=True)),
    "int8 weights, 130 rows": call24(product(130, 140, 320, int8=True)),
    "int8 weights, fp32": call24(product(33, 64, 128, SINGLE, int8=True), added=magnitudes),
    "ragged features": call24(product(16, 77, 256)),
    "ragged features, many": call24(product(64, 77, 256, HALF)),
    "ragged columns": call24(product(5, 64, 1100)),
    "ragged columns, many": call24(product(130, 130, 68)),
    "ragged columns, int8 weights": call24(product(33, 65, 132, HALF, int8=True)),
    "rows apart": call24(product(16, 64, 256, gap=8)),
    "rows apart, unaligned": call24(product(16, 64, 256, HALF, gap=1)),
    "rows apart, many": call24(product(130, 64, 256, HALF, gap=8)),
    "rows apart, many, unaligned": call24(product(130, 64, 256, gap=3)),
    "few chosen": call24(product(20, 128, 512), multiplied(choice=(0, 0))),
    "many chosen": call24(product(3, 128, 512), multiplied(choice=(0, 1))),
    "few chosen where it cannot be": call24(product(65, 128, 512), multiplied(choice=(0, 0))),
    "dense chosen": call24(product(7, 128, 256, dense=True), multiplied("dense", choice=(0, 0, 5, 2))),
    "dense chosen, bias": call24(product(40, 128, 256, HALF, dense=True, bias=HALF),
                                 multiplied("bias", "dense", choice=(0, 2))),
    "dense chosen, epilogue": call24(product(40, 128, 256, dense=True, bias=SINGLE, mul=True),
                                     multiplied("bias", "mul", "dense", choice=(0, 0, 8, 2), activation="silu")),
    "dense chosen, epilogue, fp16": call24(product(40, 128, 256, HALF, dense=True),
                                           multiplied("dense", choice=(0, 2), activation="relu")),
    "relu": call24(product(5, 96, 128), multiplied(activation="relu")),
    "gelu, bias": call24(product(16, 96, 128, bias=BRAIN), multiplied("bias", activation="gelu")),
    "gelu_tanh, float32 bias": call24(product(64, 96, 128, HALF, bias=SINGLE),
                                      multiplied("bias", activation="gelu_tanh")),
    "quick_gelu, bias": call24(product(33, 96, 128, bias=BRAIN), multiplied("bias", activation="quick_gelu")),
    "silu, mul": call24(product(130, 96, 128, mul=True), multiplied("mul", activation="silu")),
    "everything, sums in parts": call24(product(16, 33, 8192, bias=SINGLE, mul=True),
                                        multiplied("bias", "mul", activation="silu")),
    "everything, int8 weights": call24(product(130, 33, 1028, HALF, int8=True, bias=HALF, mul=True),
                                       multiplied("bias", "mul", activation="gelu")),
    "bias, fp32": call24(product(64, 96, 128, SINGLE, bias=SINGLE), multiplied("bias"), added=magnitudes),
    "int8 x int8, 1 row": call24_int8(product(1, 200, 1024, int8=True), compiles=True),
    "int8 x int8, 16 rows, fp16": call24_int8(product(16, 64, 512, HALF, int8=True)),
    "int8 x int8, 64 rows, fp32": call24_int8(product(64, 130, 256, SINGLE, int8=True)),
    "int8 x int8, sums in parts": call24_int8(product(16, 33, 12288, int8=True)),
    "int8 x int8, ragged": call24_int8(product(33, 65, 132, int8=True, gap=1)),
    "int8 x int8, one scale": call24_int8(product(130, 96, 256, int8=True, x_scale=True), "x_scale"),
    "int8 x int8, everything": call24_int8(product(5, 96, 1088, int8=True, bias=SINGLE, mul=True), "bias", "mul",
                                           activation="gelu"),
    "gradient": call24(lambda: (*product(33, 96, 128)(), torch.randn(33, 96)), gradients24),
    "gradient, fp16": call24(lambda: (*product(5, 96, 128, HALF)(), torch.randn(5, 96)), gradients24),
    **{f"compress, {short(dtype)}": Call("sparse24_compress", to_compress(*shape, dtype),
                                         lambda b, w, m: ops24.compress(w, m, backend=b), waits=True)
       for dtype, shape in ((BRAIN, (33, 260)), (HALF, (8, 64)), (SINGLE, (130, 12)), (WHOLE, (65, 516)))},
    "compress, trusted": Call("sparse24_compress", to_compress(33, 260, BRAIN),
                              lambda b, w, m: ops24.compress(w, m, trusted=True, backend=b)),
    "training step": call24(lambda: (*to_compress(96, 128, BRAIN)(), values(33, 128, dtype=BRAIN),
                                     values(33, 96, dtype=BRAIN)), training_step24),
    "Linear24": layer24(transposable=False),
    "Linear24, transposable": layer24(transposable=True),
    **{f"decompress, {short(dtype)}": Call("sparse24_decompress", lambda dtype=dtype: (weight24(67, 260, dtype),),
                                           lambda b, w: ops24.decompress(w.values, w.metadata, backend=b))
       for dtype in (BRAIN, HALF, SINGLE, WHOLE)},
}  # fmt: skip
