"""Compiles the Triton kernels for every architecture, without a GPU, and asserts what they use of it.

    python .ci/check_triton.py [--quick] [--family score] [--arch 90] [--dim 72 128] [--dtype bf16] [--group 1 7]

The launchers of triton_kernels/ run on tensors that only have shapes; what they would launch is compiled with
triton.compile instead, specialised by the code that Triton's own launches run. Asserted is that a kernel

- has no more shared memory than a block of its architecture may have,
- spills no more registers than SPILL and ALLOWED say,
- loads and stores no 16-bit number alone where strides and channels are multiples of 8 of them,
- adds in the same order whatever strides are: Triton's sums follow the layout, and that may follow the loads.

cuobjdump, which comes with Triton, says what the machine code uses. ``per_SM``: blocks that a multiprocessor holds at a
time; ``warps_SM``: their share of its warps. An architecture for which the same would be launched as for another of its
generation, with no more shared memory, is left out. Triton 3.6 is asked for sm_90 alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("check_triton: TRITON_INTERPRET is set, so nothing would be compiled")

import torch
import triton
from pyvtk.triton_kernels import _tiles, attention, compact, score, score_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pyvtk import _resources

VERSION = ".".join(triton.__version__.split(".")[:2])
ARCHITECTURES = list(_resources.LIMITS) if VERSION != "3.6" else [90]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32"}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# kernels that have to compile, for one architecture, and are too small to tell anything
SMALL = ("delta", "bounds", "extents", "finish")


# What is compiled ----------------------------------------------------------------------------------------------------


def attention_calls(dtype: torch.dtype, head_dim: int, group: int, sizes: tuple, options: dict) -> None:
    """A forward and a backward of neighbor_attention."""
    batch, heads, rows = sizes
    block = 64
    blocks = triton.cdiv(rows, block)
    slots = blocks * block
    width = head_dim + options.get("gap", 0)
    q, k = (
        torch.empty(batch, rows, n, width, dtype=dtype, device="meta")[..., :head_dim].transpose(1, 2)
        for n in (heads * group, heads)
    )

    def table(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    regions = 16 if options.get("routes") else 0
    plan = [
        table(batch, 8, slots), table(batch, 8, slots), table(batch, blocks, blocks), table(batch, blocks, 2),
        table(batch * blocks), table(batch, blocks, blocks), table(batch, blocks, 2), table(batch * blocks),
        table(batch if regions else 0, regions, regions),
    ]  # fmt: skip
    rule = [block, block, *options.get("radius", (0, 2, 2)), 0, 0]
    bias = torch.empty(batch, rows, device="meta") if options.get("bias") else None
    off = torch.empty(heads * group, dtype=torch.bool, device="meta") if options.get("heads") else None
    call = (q, k, k, bias, off)
    out, lse = attention.neighbor_attention(*call, plan, rule, 0.125, True, False)
    attention.neighbor_attention_backward(q, None, *call, out, lse, plan, rule, 0.125, True, False)


def score_calls(dtype: torch.dtype, head_dim: int, group: int, sizes: tuple, options: dict) -> None:
    """A forward and a backward of attention_scores."""
    batch, heads, tokens = sizes
    width = head_dim + options.get("gap", 0)

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    q = new(batch, tokens, heads * group, width, dtype=dtype)[..., :head_dim].transpose(1, 2)
    k = new(batch, tokens, heads, width, dtype=dtype)[..., :head_dim].transpose(1, 2)
    positions = [new(batch, tokens, dtype=torch.int32) if options.get("positions") else None] * 2
    masks = [new(batch, tokens, dtype=torch.bool) if options.get("masks") else None] * 2
    inputs = (
        q, k, *positions, *masks, new(batch, tokens) if options.get("bias") else None,
        new(heads * group) if options.get("weights") else None,
    )  # fmt: skip
    rows, columns = new(batch, heads * group, tokens), new(batch, heads * group, tokens)
    reduces, head_reduce = options.get("reduce", ("mean", "mean"))
    pairs = options.get("heads_first", False)
    outputs = score.attention_scores(
        *inputs, rows if options.get("lse") else None, None, None, True, 0, tokens, False, 0.125, reduces, head_reduce,
        pairs, False, True,
    )  # fmt: skip
    winners = new(*columns.shape, dtype=torch.int32) if "max" in reduces else None
    score_backward.attention_scores_backward(
        columns, None if winners is None else columns, winners, rows, outputs[1], *inputs, None, None, True, 0, tokens,
        False, bool(options.get("lse")), 0.125, False, 1 if pairs else 0,
    )  # fmt: skip


def compact_calls(dtype: torch.dtype, channels: int, group: int, sizes: tuple, options: dict) -> None:
    """compact, padded and packed, its gradient, and compact_kv_."""
    batch, heads, tokens = sizes
    capacity = triton.cdiv(tokens, 4)
    indices = torch.empty(batch, capacity, dtype=torch.int64, device="meta")
    counts = torch.empty(batch, dtype=torch.int32, device="meta")
    x = torch.empty(batch, tokens, channels, dtype=dtype, device="meta")
    for total in (None, batch * capacity):
        outs = compact.compact(indices, counts, False, [x], [1], [0], [0.0], total)
        compact.compact_backward(indices, counts, False, outs, [1], [0], [batch], tokens, total)
    compact.compact_kv_(indices, counts, [torch.empty(batch, heads, tokens, channels, dtype=dtype, device="meta")])


FAMILIES = {"attention": attention_calls, "score": score_calls, "compact": compact_calls}
SIZES = {"attention": (2, 2, 256), "score": (2, 8, 2048), "compact": (2, 8, 2880)}
OPTIONS = {
    "": {},
    "one": {"sizes": (1, 1, 1)},  # sample, K/V head, token
    "odd rows": {"gap": 1},
    "heads, bias": {"heads": True, "bias": True},
    "routes": {"routes": True, "radius": (2**30,) * 3},
    "lse": {"lse": True},
    "sum, max, weights": {"reduce": ("sum,max", "none"), "weights": True},
    "positions, masks, bias": {"positions": True, "masks": True, "bias": True},
    "lse, maxima": {"lse": True, "reduce": ("mean", "group_max"), "weights": True},
    "pairs": {"reduce": ("sum,max", "max"), "heads_first": True},
}


# dtype, channels, query heads per K/V head, options, and architectures if not all: where tiles differ, or registers are
# scarce. sm_90, on which pyvtk is measured, gets every group; bfloat16 stands for float16 too, 72 channels for 80.
CASES = {
    "attention": [
        (BF16, 64, 1, "", (90, 100)), (BF16, 72, 1, ""), (BF16, 128, 1, ""), (BF16, 256, 1, "", (90,)),
        (BF16, 72, 4, "", (90,)), (BF16, 128, 4, "", (86, 90)), (BF16, 72, 7, "", (90,)), (BF16, 128, 7, "", (90,)),
        (BF16, 128, 1, "heads, bias", (86, 90, 120)), (BF16, 128, 7, "heads, bias", (90,)),
        (FP16, 64, 4, "routes", (90, 100, 120)), (BF16, 72, 1, "one", (90,)), (BF16, 64, 1, "odd rows", (90,)),
        (FP32, 64, 1, "", (86, 100)), (FP32, 72, 1, "", (90,)), (FP32, 128, 4, "", (86, 90)),
        (FP32, 72, 1, "odd rows", (90,)),
    ],
    "score": [
        (BF16, 64, 4, "", (90,)), (BF16, 72, 1, ""), (BF16, 128, 7, ""), (BF16, 256, 4, "", (86, 90)),
        (BF16, 72, 4, "lse", (90,)), (BF16, 128, 1, "one", (90,)), (FP16, 64, 4, "sum, max, weights", (90, 120)),
        (FP16, 80, 4, "positions, masks, bias", (80, 90, 120)), (FP16, 128, 4, "lse, maxima", (90, 120)),
        (FP16, 256, 4, "pairs", (90,)), (FP32, 64, 1, "", (90, 120)), (FP32, 72, 4, "", (90,)),
        (FP32, 128, 4, "", (86, 90)), (FP32, 72, 1, "odd rows", (90,)),
    ],
    "compact": [
        (BF16, 1, 1, "", (90,)), (BF16, 72, 1, "", (86, 90)), (BF16, 4096, 1, "", (90,)), (FP32, 72, 1, "", (90,)),
    ],
}  # fmt: skip
# for the tests: one of each tile, options, the tightest shared memory
QUICK = [
    ("attention", 90, BF16, 128, 1, "heads, bias"), ("attention", 86, FP32, 72, 1, ""),
    ("attention", 100, FP16, 64, 4, "routes"), ("attention", 90, BF16, 64, 1, "odd rows"),
    ("score", 90, BF16, 128, 7, ""),
]  # fmt: skip


def launches(family: str, architecture: int, dtype: torch.dtype, head_dim: int, group: int, options: dict) -> list:
    """(kernel, arguments) of what a forward and a backward launch on an architecture."""
    found = []

    def launch(kernel, programs, arguments):
        found.append((kernel, arguments))

    capability = divmod(architecture, 10)
    with mock.patch.object(_tiles, "capability", lambda x: capability), mock.patch.object(_tiles, "launch", launch):
        FAMILIES[family](dtype, head_dim, group, options.get("sizes", SIZES[family]), options)
    return found


def specialised(kernel, arguments: dict, architecture: int) -> tuple[list, ASTSource, dict]:
    """What Triton's launch makes of the arguments: the variant of each parameter, the source to compile, options."""
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, variant, options = bind(**{**_tiles.OPTIONS, **arguments})
    parsed, signature, constants, hints = kernel._pack_args(backend, options, bound, variant, options)
    return variant, ASTSource(kernel, signature, constants, hints), parsed.__dict__


def compiled(kernel, arguments: dict, architecture: int):
    _, source, options = specialised(kernel, arguments, architecture)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


# What is asserted ----------------------------------------------------------------------------------------------------

# Bytes that a kernel for up to 128 channels may spill. ptxas saves a few before a loop and reads them after it, which
# costs nothing; float32's three products fill all 255 registers whatever the tile.
SPILL = {BF16: 160, FP16: 160, FP32: 64}
# Instructions in innermost loops that may touch spilled registers, of 16-bit kernels: Triton, kernel, architecture,
# dtype, channels, group, options. Everywhere they are below 2 in 100 of their loops; half the keys in a tile would
# spare them, for twice the steps. What is not named here has none.
ALLOWED = {
    ("3.9", "attention", 86, "bf16", 128, 1, "heads, bias"): 2,
    ("3.9", "attention", 120, "bf16", 128, 1, "heads, bias"): 7,
    ("3.9", "attention_key_grad", 120, "fp16", 64, 4, "routes"): 3,
    # Triton 3.6 makes several times as many copies of the facts, each with its address
    ("3.6", "attention_key_grad", 90, "bf16", 72, 1, ""): 2,
    ("3.6", "attention_key_grad", 90, "bf16", 72, 1, "one"): 2,
    ("3.6", "attention_key_grad", 90, "bf16", 72, 7, ""): 1,
    ("3.6", "attention_key_grad", 90, "bf16", 128, 4, ""): 1,
    ("3.6", "attention_key_grad", 90, "bf16", 128, 7, ""): 1,
    ("3.6", "attention_key_grad", 90, "bf16", 128, 7, "heads, bias"): 7,
    ("3.6", "attention_query_grad", 90, "bf16", 128, 4, ""): 4,
    ("3.6", "attention_query_grad", 90, "bf16", 128, 7, ""): 4,
    ("3.6", "attention_query_grad", 90, "bf16", 128, 1, "heads, bias"): 32,
    ("3.6", "attention_query_grad", 90, "bf16", 128, 7, "heads, bias"): 29,
}


def cuobjdump(what: str, binary) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def resources(binary) -> tuple[int, int, int]:
    """Registers per thread, bytes that spill to local memory, bytes of shared memory."""
    said = cuobjdump("-res-usage", binary)
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", said).group(1)) for what in ("REG", "STACK", "LOCAL"))
    return registers, max(stack, local), binary.metadata.shared


def spilled_in_loops(binary) -> int:
    """Instructions in innermost loops that load or store spilled registers."""
    code = [
        (int(at, 16), what) for at, what in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", cuobjdump("-sass", binary))
    ]
    loops = [(int(to, 16), at) for at, what in code for to in re.findall(r"\bBRA\b.*\b0x([0-9a-f]+)", what)]
    exits = [at for at, what in code if "EXIT" in what]
    # An instruction has 16 bytes. A few of them only wait for a barrier, and what lies behind the end jumps back once.
    loops = [(a, b) for a, b in loops if a + 256 <= b and not any(a <= at <= b for at in exits)]
    inner = [(a, b) for a, b in loops if not any((a, b) != (c, d) and a <= c and d <= b for c, d in loops)]
    spills = [at for at, what in code if re.search(r"\b(?:STL|LDL)\b", what)]
    return sum(any(a <= at <= b for a, b in inner) for at in spills)


def narrow(ptx: str) -> list[str]:
    """Instructions that load or store a single 16-bit number."""
    return re.findall(r"\b(?:ld|st)\.global(?:\.(?!v\d)\w+)*\.[bus]16\b", ptx)


def sums(binary) -> list[tuple[str, str]]:
    """Shape and layout of what sums of floating-point numbers add up, three or more of them."""
    code = binary.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.M))
    reduces = re.findall(
        r'"tt\.reduce"\(.*?<\{axis = (\d+)[^}]*\}> \(\{(.*?)\}\) : \(tensor<(\S+)xf\d+, ([^>]*)', code, re.S
    )
    return [
        (shape, layouts.get(layout, layout))
        for axis, does, shape, layout in reduces
        if "arith.addf" in does and int(shape.split("x")[int(axis)]) > 2
    ]


def faults(name: str, case: tuple, binary, spill: int, shared: int) -> Iterator[str]:
    family, architecture, dtype, channels, group, option = case
    most = _resources.shared_of_block(f"sm_{architecture}")
    if shared > most:
        yield f"{shared} bytes of shared memory, a block has {most}"
    usual = 0 if family == "compact" else SPILL[dtype] if channels <= 128 else spill
    if spill > usual:
        yield f"{spill} bytes of registers spill, {usual} may"
    if spill and dtype != FP32 and channels <= 128:
        found = spilled_in_loops(binary)
        allowed = ALLOWED.get((VERSION, name, architecture, TYPES[dtype], channels, group, option), 0)
        if found > allowed:
            yield f"{found} instructions in its innermost loops touch spilled registers, {allowed} may"
    alone = narrow(binary.asm["ptx"]) if dtype != FP32 else []
    if alone and channels % 8 == 0 and "gap" not in OPTIONS[option]:
        yield f"moves 16-bit numbers one by one: {', '.join(sorted(set(alone)))}"


HEADER = ("kernel", "arch", "dtype", "D", "GQA", "rows", "keys", "warps", "stages", "regs", "spill", "shared", "per_SM")
WIDTHS = (28, 5, 6, 5, 5, 8, 6, 7, 8, 6, 7, 9, 8)


def measured(case: tuple) -> list[tuple[str, list[str]]]:
    """A line of the table and what is wrong, for each kernel of a case."""
    family, architecture, dtype, head_dim, group, option = case
    lines = []
    dense = {n: x for n, x in OPTIONS[option].items() if n != "gap"}
    for (kernel, arguments), (_, others) in zip(launches(*case[:5], OPTIONS[option]), launches(*case[:5], dense)):
        name = kernel.__name__.removeprefix("neighbor_").removesuffix("_kernel")
        where = f"{name} sm_{architecture} {TYPES[dtype]} D={head_dim} group {group} {option}".rstrip()
        if name.endswith(SMALL) and architecture != 90:
            continue
        binary = compiled(kernel, arguments, architecture)
        wrong = []
        if "gap" in OPTIONS[option] and sums(binary) != sums(compiled(kernel, others, architecture)):
            wrong.append(f"{where}: strides change the order of a sum")
        if name.endswith(SMALL):
            lines.append(("", wrong))
            continue
        registers, spill, shared = resources(binary)
        warps, stages = arguments["num_warps"], arguments.get("num_stages", "-")
        blocks, resident = _resources.occupancy(f"sm_{architecture}", 32 * warps, registers, shared)
        sides = {"attention": ("TILE_Q", "TILE_K"), "score": ("ROWS", "KEYS"), "compact": ("BLOCK_P", "BLOCK_C")}
        rows, keys = (arguments[side] for side in sides[family])
        rows = f"{rows}x{arguments['HEADS']}" if family == "attention" else rows
        cells = (name, architecture, TYPES[dtype], head_dim, group, rows, keys, warps, stages, registers, spill, shared)
        line = "".join(f"{cell:>{width}}" for cell, width in zip((*cells, blocks), WIDTHS))
        line = f"{name:<28}{line[28:]}{100 * resident // _resources.LIMITS[architecture][0]:>9}%  {option}"
        wrong += [f"{where}: {fault}" for fault in faults(name, case, binary, spill, shared)]
        lines.append((line, wrong))
    return lines


def differing(cases: list[tuple]) -> list[tuple]:
    """The cases, but for those whose launches are another's of the same generation with no more shared memory."""
    seen, kept = set(), []
    for case in sorted(cases, key=lambda case: _resources.LIMITS[case[1]][2]):
        found = launches(*case[:5], OPTIONS[case[5]])
        same = [(kernel.__name__, {n: x for n, x in a.items() if not torch.is_tensor(x)}) for kernel, a in found]
        key = (case[0], case[1] // 10, *case[2:], str(same))
        kept += [] if key in seen else [case]
        seen.add(key)
    return sorted(kept, key=cases.index)


def check(cases: list[tuple], jobs: int) -> list[str]:
    """Compiles, prints a table, and returns what is wrong."""
    print("".join(f"{head:>{width}}" for head, width in zip(HEADER, WIDTHS)) + "  warps_SM", flush=True)
    errors = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(measured, cases):
            for line, wrong in lines:
                if line:
                    print(line, flush=True)
                errors += wrong
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", default=list(CASES))
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="*", default=list(TYPES.values()))
    parser.add_argument("--dim", type=int, nargs="*", help="head dimensions; channels of compact")
    parser.add_argument("--group", type=int, nargs="*")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a few kernels, for the tests")
    given = parser.parse_args()
    begin = time.perf_counter()
    cases = [case for case in QUICK if case[1] in given.arch] if given.quick else [
        (family, architecture, dtype, channels, group, option)
        for family in given.family for dtype, channels, group, option, *only in CASES[family]
        for architecture in given.arch
        if architecture in (only[0] if only else ARCHITECTURES) and TYPES[dtype] in given.dtype
        and (not given.dim or channels in given.dim) and (not given.group or group in given.group)
    ]  # fmt: skip
    errors = check(differing(cases), given.jobs)
    print(f"triton {triton.__version__}: {time.perf_counter() - begin:.0f} s")
    for error in errors:
        print(error)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
