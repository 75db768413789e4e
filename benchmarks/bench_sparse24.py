"""2:4 sparse weights against dense products of torch. Weights of few rows come from memory, as in decoding.

A table of all rows, shapes and dtypes takes an hour; what runs is every case with a bar and a sweep over the rows. The
environment variable PYVTK_BENCH_SPARSE24=full asks for the table. On CUDA the harness empties the L2 cache before every
call, so that weights come from memory; peers are cuBLAS, torch's semi-structured tensors and torchao.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings

import torch
import torch.nn.functional as F

from pyvtk.ops import sparse24
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24 import Linear24

from . import harness
from .harness import OURS, Case, bandwidth_limit, close, made_on, marked, matmul_limit, read_limit

SHAPES = {  # out_features, in_features
    "4096 x 4096": (4096, 4096),
    "LLM MLP up 4096 x 11008": (4096, 11008),
    "LLM MLP down 11008 x 4096": (11008, 4096),
    "ViT-B MLP 768 x 3072": (768, 3072),
    "ViT-L MLP 1024 x 4096": (1024, 4096),
}
ROWS = (1, 4, 16, 64, 197, 577, 640, 2950)
FEW = 16  # from more rows on, products take longer than reading weights


def packed(weight, mask):
    """Values and metadata in one piece of memory, so that all of it can be read at once."""
    values, metadata = sparse24.compress(weight, mask)
    memory = torch.empty(values.nbytes + metadata.nbytes, dtype=torch.uint8, device=weight.device)
    memory[: values.nbytes].view(values.dtype).view_as(values).copy_(values)
    memory[values.nbytes :].view_as(metadata).copy_(metadata)
    return memory, memory[: values.nbytes].view(values.dtype).view_as(values), memory[values.nbytes :].view_as(metadata)


def mask_of(outputs, columns):
    """Two of every four, the same in all rows of a block of 64, which keeps the making of inputs short."""
    block = reference.prune_n_of_m(torch.rand(64, columns), 2, 4)
    return block.repeat((outputs + 63) // 64, 1)[:outputs]


def limits(rows, outputs, columns, dtype):
    if rows <= FEW:
        return read_limit(lambda x, memory, *rest: memory.view(torch.float32))
    return matmul_limit(lambda *inputs: float(rows * outputs * columns), dtype)


def linear(name, rows, dtype, bars):
    outputs, columns = SHAPES[name]

    def inputs():
        weight, mask = torch.randn(outputs, columns).to(dtype), mask_of(outputs, columns)
        return torch.randn(rows, columns).to(dtype), *packed(weight, mask), weight.mul_(mask)

    def expect(x, memory, values, metadata, dense):
        # some rows and outputs stand for all: the oracle of all of them takes longer than the measurement
        some = torch.linspace(0, rows - 1, min(rows, 32)).long()
        part = torch.linspace(0, outputs - 1, 256).long()
        oracle = x[some].double() @ dense[part].double().T
        check = close(oracle, F.linear(x[some].float(), dense[part].float()).to(dtype))
        return lambda name, result: check(name, result[some][:, part])

    ways = {
        OURS: lambda x, memory, values, metadata, dense: sparse24.linear(x, values, metadata),
        "F.linear": lambda x, memory, values, metadata, dense: F.linear(x, dense),
    }
    if rows == 1:
        ways["torch.mv"] = lambda x, memory, values, metadata, dense: torch.mv(dense, x[0])[None]
    return Case(
        "sparse24",
        f"{rows} rows, {name}",
        dtype,
        inputs,
        ways,
        expect,
        limit=limits(rows, outputs, columns, dtype),
        bars=bars,
        cold=rows <= FEW,
    )


def linear_int8(name, rows, bars):
    """x float32, rounded inside; torch's dynamic quantisation does the same with a scale for the whole of x."""
    outputs, columns = SHAPES[name]

    def inputs():
        weight = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8)
        mask = mask_of(outputs, columns)
        memory, values, metadata = packed(weight, mask)
        scales = torch.rand(outputs) / 100 + 0.01
        dense = (weight * mask).float() * scales[:, None]
        zeros = torch.zeros(outputs, dtype=torch.long)
        quantized = torch.quantize_per_channel(dense, scales.double(), zeros, 0, torch.qint8)
        prepacked = torch.ops.quantized.linear_prepack(quantized, None)
        return torch.randn(rows, columns), memory, values, metadata, scales, dense, prepacked

    def expect(x, memory, values, metadata, scales, dense, prepacked):
        exact = reference.linear_int8(x, values, metadata, scales, None, None, None, "none")
        plain = F.linear(x, dense)

        def check(name, result):
            if name == OURS:
                assert torch.equal(result, exact), "differs from exact sums"
            error = (result - plain).square().mean().sqrt() / plain.square().mean().sqrt()
            assert error < 0.1, f"relative error {error:.3f} of the products in float32"

        return check

    return Case(
        "sparse24",
        f"int8 x int8, {rows} rows, {name}",
        torch.int8,
        inputs,
        {
            OURS: lambda x, memory, values, metadata, scales, *rest: sparse24.linear_int8(x, values, metadata, scales),
            "F.linear fp32": lambda x, memory, values, metadata, scales, dense, prepacked: F.linear(x, dense),
            "torch dynamic int8": lambda x, *rest: torch.ops.quantized.linear_dynamic(x, rest[-1]),
        },
        expect,
        limit=limits(rows, outputs, columns, torch.float32),
        bars=bars,
        cold=rows <= FEW,
        optional=("torch dynamic int8",),
    )


NEVER_SLOWER = {"F.linear": 0.97}
SQUARE, UP, DOWN, SMALL, MEDIUM = SHAPES


def all_cases():
    bars = {(n, rows, d): NEVER_SLOWER for n in SHAPES for rows in ROWS for d in (torch.float32, torch.bfloat16)}
    for name in (SQUARE, UP):
        bars[name, 1, torch.float32] = {"F.linear": 1.8, "limit": 0.7}
        bars[name, 1, torch.bfloat16] = {"F.linear": 2.5, "limit": 0.7}
    for name in (MEDIUM, SQUARE):
        for rows in (577, 640):
            bars[name, rows, torch.float32] = {"F.linear": 1.3}
            bars[name, rows, torch.bfloat16] = {"F.linear": 1.15}
    sweep = [(SQUARE, rows, torch.float32) for rows in (4, 16, 64, 197)]
    sweep += [(MEDIUM, rows, torch.bfloat16) for rows in (4, 16, 64)]
    sweep += [(SMALL, 197, torch.float32), (DOWN, 1, torch.float32)]
    if os.environ.get("PYVTK_BENCH_SPARSE24") == "full":
        chosen = list(bars)
    else:
        chosen = [which for which, bar in bars.items() if bar is not NEVER_SLOWER or which in sweep]
    found = [linear(name, rows, dtype, bars[name, rows, dtype]) for name, rows, dtype in chosen]
    found = [marked(case) if which == (UP, 1, torch.bfloat16) else case for case, which in zip(found, chosen)]
    return found + [linear_int8(MEDIUM, rows, {"F.linear fp32": 0.97}) for rows in (1, 16, 577)]


CASES = all_cases()


# ---- CUDA


FEW_ON_CUDA = 64
VENDOR = "pyvtk, vendor chosen"  # our call where the weight is packed for cuSPARSELt


class Packed:
    """A dense weight as other libraries want it, packed when first asked for. No tensor to the harness, which could not
    copy it."""

    def __init__(self, dense):
        self.dense = dense

    def _semi_structured(self, kind):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is a prototype
            return kind.from_dense(self.dense)

    @functools.cached_property
    def cusparselt(self):
        return self._semi_structured(torch.sparse.SparseSemiStructuredTensorCUSPARSELT)

    @functools.cached_property
    def cutlass(self):
        return self._semi_structured(torch.sparse.SparseSemiStructuredTensorCUTLASS)

    @functools.cached_property
    def compressed(self):
        """As torch's own operator of cuSPARSELt takes it."""
        return torch._cslt_compress(self.dense)

    def _layer(self):
        out, columns = self.dense.shape
        layer = torch.nn.Linear(columns, out, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(self.dense, requires_grad=False)
        return torch.nn.Sequential(layer)

    @functools.cached_property
    def torchao(self):
        from torchao.sparsity import semi_sparse_weight, sparsify_

        layer = self._layer()
        sparsify_(layer, semi_sparse_weight())
        return layer

    @functools.cached_property
    def torchao_int8(self):
        import torchao
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        try:
            from torchao.dtypes import SemiSparseLayout
        except ImportError as error:  # it has float8 times 2:4 instead
            raise ImportError(f"torchao {torchao.__version__} has no int8 times 2:4 any more") from error

        layer = self._layer()
        quantize_(layer, Int8DynamicActivationInt8WeightConfig(layout=SemiSparseLayout()))
        return layer


def torchao_peer(name, call):
    """The peer, or why it is absent."""
    if importlib.util.find_spec("torchao") is None:
        return {}, {name: "not installed"}
    return {name: call}, {}


def limits_on_cuda(rows, outputs, columns, dtype, device):
    """Of few rows, reading the compressed weight; of many, the multiplications that are left."""
    if rows <= FEW_ON_CUDA:
        return bandwidth_limit(lambda x, memory, *rest: memory.nbytes, device)
    return matmul_limit(lambda *inputs: float(rows * outputs * columns), dtype, device)


def part_of(rows, outputs):
    """Some rows and outputs, which stand for all."""
    return torch.linspace(0, rows - 1, min(rows, 64)).long(), torch.linspace(0, outputs - 1, min(outputs, 512)).long()


def linear_on_cuda(name, rows, dtype, bars, device="cuda", shape=None, int8=False):
    """x and results in ``dtype``, values too; or int8 values with scales, beside a dense weight in ``dtype``."""
    outputs, columns = shape or SHAPES[name]

    def inputs():
        if int8:
            weight, scales = torch.randint(-127, 128, (outputs, columns), dtype=torch.int8), torch.rand(outputs) / 100
        else:
            weight, scales = torch.randn(outputs, columns).to(dtype), None
        mask = mask_of(outputs, columns)
        weight = weight.mul_(mask)
        dense = weight if scales is None else (weight * scales[:, None]).to(dtype)
        return torch.randn(rows, columns).to(dtype), *packed(weight, mask), scales, dense, Packed(dense)

    def expect(x, memory, values, metadata, scales, dense, other):
        some, part = (index.to(x.device) for index in part_of(rows, outputs))
        exact = reference.weight_of(
            values[part], metadata[part], None if scales is None else scales[part], torch.float64
        )
        check = close(x[some].double() @ exact.T, F.linear(x[some], dense[part]))
        return lambda name, result: check(name, result[some][:, part])

    providers = {
        OURS: lambda x, memory, values, metadata, scales, *rest: sparse24.linear(x, values, metadata, scales=scales),
        "F.linear": lambda x, memory, values, metadata, scales, dense, other: F.linear(x, dense),
    }
    absent = {}
    if not int8:
        more, absent = torchao_peer("torchao", lambda x, *rest: rest[-1].torchao(x))
        providers |= {
            "cuSPARSELt": lambda x, *rest: F.linear(x, rest[-1].cusparselt),
            "CUTLASS": lambda x, *rest: F.linear(x, rest[-1].cutlass),
            VENDOR: lambda x, memory, values, metadata, scales, dense, other: sparse24.linear(
                x, values, metadata, choice=(0, 3), vendor=other.compressed.view(len(values), -1)
            ),
            **more,
        }
    return Case(
        "sparse24",
        f"{'int8 weights, ' if int8 else ''}{rows} rows, {name}",
        dtype,
        made_on(device, inputs),
        providers,
        expect,
        limit=limits_on_cuda(rows, outputs, columns, dtype, device),
        bars=bars,
        cold=True,
        device=device,
        absent=absent,
    )


def int8_on_cuda(name, rows, bars, device="cuda", shape=None, dtype=torch.bfloat16):
    """x rounded to int8 in each row, by everyone: a part of the call for us, compiled by torch for peers."""
    outputs, columns = shape or SHAPES[name]

    def inputs():
        weight, scales = (
            torch.randint(-127, 128, (outputs, columns), dtype=torch.int8),
            torch.rand(outputs) / 100 + 0.01,
        )
        mask = mask_of(outputs, columns)
        weight = weight.mul_(mask)
        dense = (weight * scales[:, None]).to(dtype)
        x = torch.randn(rows, columns).to(dtype)
        return x, *packed(weight, mask), scales, weight, dense, Packed(weight), Packed(dense)

    def rounded(x):
        x = x.float()
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round().to(torch.int8), scale

    def scaled(sums, scale, scales):
        return (sums.float() * scale * scales).to(dtype)

    def dense_int8(x, weight, scales):
        q, scale = rounded(x)
        q = F.pad(q, (0, 0, 0, max(0, 32 - rows)))  # it takes no less than 17 rows on CUDA
        return scaled(torch._int_mm(q, weight.T)[:rows], scale, scales)

    def cusparselt(x, memory, values, metadata, scales, weight, dense, other, _):
        q, scale = harness.compiled(rounded)(x)
        # rows in multiples of 16, as torch's own tensor pads them
        q = F.pad(q, (0, 0, 0, -rows % 16))
        sums = torch._cslt_sparse_mm(other.compressed, q.T, out_dtype=torch.int32).T[:rows]
        return harness.compiled(scaled)(sums, scale, scales)

    def expect(x, memory, values, metadata, scales, weight, dense, *rest):
        some, part = (index.to(x.device) for index in part_of(rows, outputs))
        exact = reference.linear_int8(x[some].double(), values[part], metadata[part], scales[part].double(),
                                      None, None, None, "none")  # fmt: skip
        ours = close(exact, reference.linear_int8(x[some], values[part], metadata[part], scales[part],
                                                  None, None, None, "none"))  # fmt: skip

        def check(name, result):
            result = result[some][:, part]
            if name == OURS:
                ours(name, result)
            error = (result.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
            assert error < 0.1, f"relative error {error:.3f} of the products in float64"

        return check

    more, absent = torchao_peer("torchao int8", lambda *inputs: inputs[-1].torchao_int8(inputs[0]))
    providers = {
        OURS: lambda x, memory, values, metadata, scales, *rest: sparse24.linear_int8(x, values, metadata, scales),
        "F.linear": lambda x, memory, values, metadata, scales, weight, dense, *rest: F.linear(x, dense),
        "compiled dense int8": lambda x, memory, values, metadata, scales, weight, *rest: harness.compiled(dense_int8)(
            x, weight, scales
        ),
        "compiled cuSPARSELt int8": cusparselt,
        **more,
    }
    return Case(
        "sparse24",
        f"int8 x int8, {rows} rows, {name}",
        torch.int8,
        made_on(device, inputs),
        providers,
        expect,
        # torch's plain product has no int8
        limit=limits_on_cuda(rows, outputs, columns, dtype, device),
        bars=bars,
        cold=True,
        device=device,
        absent=absent,
    )


def training_on_cuda(name, rows, shape, transposable, bars, device="cuda", dtype=torch.bfloat16):
    """Forward and backward to x, weight and bias. The dense layer has zeros where ours is pruned, so that results are
    the same: a masked weight's gradient goes to all of it. Ours compresses in every step."""
    outputs, columns = shape

    def inputs():
        start = torch.nn.Linear(columns, outputs, dtype=dtype)
        ours = Linear24.from_linear(start, method="ste", transposable=transposable)
        dense = torch.nn.Linear(columns, outputs, dtype=dtype)
        with torch.no_grad():
            dense.weight.copy_(ours.masked_weight())
            dense.bias.copy_(ours.bias)
        x = torch.randn(rows, columns).to(dtype).requires_grad_()
        return x, torch.randn(rows, outputs).to(dtype), (ours, dense)

    def step(layer, x, grad):
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)]

    def expect(x, grad, layers):
        x, dense = x.detach(), layers[1]
        weight, bias = dense.weight.detach(), dense.bias.detach()

        def by_hand(x, grad, weight, bias):
            return [x @ weight.T + bias, grad @ weight, grad.T @ x, grad.sum(0)]

        wide = by_hand(*(tensor.double() for tensor in (x, grad, weight, bias)))
        return close(wide, by_hand(x, grad, weight, bias))

    return Case(
        "sparse24",
        f"Linear24 forward and backward{', transposable' if transposable else ''}, {rows} rows, {name}",
        dtype,
        made_on(device, inputs),
        {
            OURS: lambda x, grad, layers: step(layers[0], x, grad),
            "nn.Linear": lambda x, grad, layers: step(layers[1], x, grad),
        },
        expect,
        # of three products the weight's gradient is dense, and the one of x unless the transpose is 2:4 too
        limit=matmul_limit(lambda *inputs: (4.0 if transposable else 5.0) * rows * outputs * columns, dtype, device),
        bars=bars,
        device=device,
    )  # fmt: skip


def on_cuda(device: str = "cuda") -> list[Case]:
    bf16, fp16 = torch.bfloat16, torch.float16

    def bars_of(name, rows):
        if name == UP and rows <= 16:
            return {"F.linear": 1.4}
        if rows in (577, 2950):
            return {"F.linear": 1.0, "cuSPARSELt": 0.95}
        return {}

    def bars_of_int8(name, rows):
        if name == UP and rows <= 16:
            return {"F.linear": 1.4}
        return {"F.linear": 1.0, "compiled dense int8": 1.0, "compiled cuSPARSELt int8": 0.95}

    if os.environ.get("PYVTK_BENCH_SPARSE24") == "full":
        chosen = [(name, rows) for name in SHAPES for rows in ROWS]
    else:
        chosen = [(UP, rows) for rows in ROWS] + [(SQUARE, rows) for rows in (1, 16, 577, 2950)]
        chosen += [(DOWN, 1), (DOWN, 577), (MEDIUM, 64), (MEDIUM, 577), (MEDIUM, 2950), (SMALL, 197), (SMALL, 2950)]
    judged = [(UP, 1), (UP, 16), (SQUARE, 577), (SQUARE, 2950)]
    found = [
        marked(linear_on_cuda(name, rows, bf16, bars_of(name, rows), device), 1 if (name, rows) in judged else 0)
        for name, rows in chosen
    ]
    found += [linear_on_cuda(name, rows, fp16, bars_of(name, rows), device) for name, rows in ((UP, 16), (MEDIUM, 577))]
    found += [
        marked(linear_on_cuda(UP, rows, bf16, {"F.linear": 1.4}, device, int8=True), place)
        for rows, place in ((1, 0), (16, 2))
    ]
    found += [
        marked(int8_on_cuda(name, rows, bars_of_int8(name, rows), device), place)
        for name, rows, place in ((UP, 1, 0), (UP, 16, 1), (UP, 2950, 1), (MEDIUM, 577, 0))
    ]
    # 16 images of 577 tokens
    found += [
        marked(training_on_cuda(name, 16 * 577, shape, transposable, {"nn.Linear": 1.15}, device), place)
        for name, shape, transposable, place in (
            ("ViT-L MLP 1024 x 4096", (1024, 4096), False, 1),
            ("ViT-L MLP 1024 x 4096", (1024, 4096), True, 0),
            ("ViT-L MLP 4096 x 1024", (4096, 1024), False, 0),
            ("ViT-L MLP 4096 x 1024", (4096, 1024), True, 0),
        )
    ]
    return found


def cases(device: str) -> list[Case]:
    return on_cuda() if device == "cuda" else CASES
