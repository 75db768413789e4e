"""2:4 sparse weights against dense products of torch. Weights of few rows come from memory, as in decoding.

A table of all rows, shapes and dtypes takes an hour; what runs is every case with a bar and a sweep over the rows. The
environment variable PYVTK_BENCH_SPARSE24=full asks for the table.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from pyvtk.ops import sparse24
from pyvtk.reference import sparse24 as reference

from .harness import OURS, Case, close, matmul_limit, read_limit

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
    memory = torch.empty(values.nbytes + metadata.nbytes, dtype=torch.uint8)
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

    return Case(
        "sparse24",
        f"{rows} rows, {name}",
        dtype,
        inputs,
        {
            OURS: lambda x, memory, values, metadata, dense: sparse24.linear(x, values, metadata),
            "F.linear": lambda x, memory, values, metadata, dense: F.linear(x, dense),
        },
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
        chosen = [key for key, bar in bars.items() if bar is not NEVER_SLOWER or key in sweep]
    found = [linear(name, rows, dtype, bars[name, rows, dtype]) for name, rows, dtype in chosen]
    return found + [linear_int8(MEDIUM, rows, {"F.linear fp32": 0.97}) for rows in (1, 16, 577)]


CASES = all_cases()
