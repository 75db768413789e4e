"""Compiles the Triton kernels for every architecture, without a GPU, and asserts what they use of it.

    python .ci/check_triton.py [--quick] [--family score] [--arch 90] [--dim 64 128] [--dtype bf16] [--group 1 4]

The launchers of triton_kernels/ run on tensors that only have shapes; what they would launch is compiled with
triton.compile instead. A kernel may not use more shared memory than a block of its architecture has, and up to a head
dimension of 128 a kernel of 16-bit values may not spill a register. cuobjdump, which comes with Triton, says what the
machine code uses. ``per_SM``: blocks that a multiprocessor holds at a time; ``warps_SM``: their share of its warps.
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("check_triton: TRITON_INTERPRET is set, so nothing would be compiled")

import torch
import triton
from pyvtk.triton_kernels import _tiles, attention, compact, score, score_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# capability -> bytes of shared memory that one block may have
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED = {architecture: kib * 1024 for architecture, kib in SHARED.items()}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8"}
TYPES |= {torch.int16: "i16", torch.int64: "i64"}
# bytes that may spill: float32's three products fill all 255 registers whatever the tile, and ptxas saves a few
SPILL = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 64}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def attention_calls(dtype: torch.dtype, head_dim: int, group: int, options: dict) -> None:
    """A forward and a backward of neighbor_attention."""
    block = options.get("block", 64)
    batch, heads, rows = 2, 2, 4 * max(block, 64)
    q = torch.empty(batch, rows, heads * group, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(batch, rows, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)
    blocks = rows // block

    def table(*shape):
        return torch.empty(shape, dtype=torch.int32, device="meta")

    regions = 16 if options.get("routes") else 0
    plan = [
        table(batch, 8, rows), table(batch, 8, rows), table(batch, blocks, blocks), table(batch, blocks, 2),
        table(batch * blocks), table(batch, blocks, blocks), table(batch, blocks, 2), table(batch * blocks),
        table(batch if regions else 0, regions, regions),
    ]  # fmt: skip
    rule = [block, block, *options.get("radius", (0, 2, 2)), 0, 0]
    bias = torch.empty(batch, rows, device="meta") if options.get("bias") else None
    off = torch.empty(heads * group, dtype=torch.bool, device="meta") if options.get("heads") else None
    call = (q, k, k, bias, off)
    out, lse = attention.neighbor_attention(*call, plan, rule, 0.125, True, False)
    attention.neighbor_attention_backward(out, None, *call, out, lse, plan, rule, 0.125, True, False)


def score_calls(dtype: torch.dtype, head_dim: int, group: int, options: dict) -> None:
    """A forward and a backward of attention_scores, of more queries than a tile has."""
    batch, heads, tokens = 2, 8, 2048

    def new(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    q = new(batch, tokens, heads * group, head_dim, dtype=dtype).transpose(1, 2)
    k = new(batch, tokens, heads, head_dim, dtype=dtype).transpose(1, 2)
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


FAMILIES = {"attention": attention_calls, "score": score_calls}
# kernels that have to compile, and are too small to tell anything
SMALL = ("delta", "bounds", "extents", "finish")


def launches(family: str, architecture: int, *case) -> list:
    """(kernel, arguments) of a forward and a backward on an architecture."""
    found = []
    _tiles.capability = lambda tensor: divmod(architecture, 10)
    _tiles.launch = lambda kernel, programs, arguments: found.append((kernel, arguments))
    FAMILIES[family](*case)
    return found


def compiled(kernel, arguments: dict, architecture: int):
    """The kernel with these arguments, specialised as a launch would specialise it."""
    signature, constants, hints = {}, {}, {}
    settings = {name: arguments[name] for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in arguments}
    for number, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[(number,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], hints[(number,)] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                hints[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=settings)


def resources(binary) -> tuple[int, int, int]:
    """Registers per thread, bytes that spill to local memory, bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", said).group(1)) for what in ("REG", "STACK", "LOCAL"))
    return registers, max(stack, local), binary.metadata.shared


def threads_per_multiprocessor(architecture: int) -> int:
    return {80: 2048, 90: 2048, 100: 2048}.get(architecture, 1536)


def blocks_per_multiprocessor(architecture: int, warps: int, registers: int, shared: int) -> int:
    threads = threads_per_multiprocessor(architecture)
    memory = {80: 164, 90: 228, 100: 228}.get(architecture, 100) * 1024
    register_blocks = 65536 // (warps * 32 * ((registers + 7) // 8 * 8))
    return min(threads // (warps * 32), register_blocks, memory // (shared + 1024))


def measured(case: tuple) -> list[tuple[str, str]]:
    """A line of the table and what is wrong ("": nothing), for each kernel of a case."""
    family, architecture, dtype, head_dim, group, options = case
    lines = []
    for kernel, arguments in launches(*case):
        name = kernel.__name__.removeprefix("neighbor_").removesuffix("_kernel")
        binary = compiled(kernel, arguments, architecture)
        if name.endswith(SMALL):
            continue
        registers, spill, shared = resources(binary)
        warps, stages = arguments["num_warps"], arguments["num_stages"]
        resident = blocks_per_multiprocessor(architecture, warps, registers, shared)
        occupancy = 100 * resident * warps * 32 // threads_per_multiprocessor(architecture)
        rows, keys = (arguments[name] for name in (("ROWS", "KEYS") if "ROWS" in arguments else ("TILE_Q", "TILE_K")))
        rows = f"{rows}x{arguments.get('HEADS', 1)}" if family == "attention" else rows
        line = (
            f"{name:<28}{architecture:>5}{TYPES[dtype]:>6}{head_dim:>5}{group:>5}{rows:>8}{keys:>6}{warps:>7}{stages:>8}"
            f"{registers:>6}{spill:>7}{shared:>9}{resident:>8}{occupancy:>9}%  {' '.join(options)}"
        )  # fmt: skip
        error = ""
        if shared > SHARED[architecture]:
            error = f"{shared} bytes of shared memory, a block has {SHARED[architecture]}"
        elif head_dim <= 128 and spill > SPILL[dtype]:
            error = f"{spill} bytes of registers spill"
        where = f"{name} sm_{architecture} {TYPES[dtype]} D={head_dim} group {group} {options}"
        lines.append((line, error and f"{where}: {error}"))
    return lines


# compact: every kernel at the sizes where its blocks differ most
COMPACT = [(dtype, channels) for dtype in (torch.bfloat16, torch.float32) for channels in (1, 128, 4096)]


def compact_launches(dtype: torch.dtype, channels: int) -> list:
    """(kernel, arguments) of compact, padded and packed, of its gradient and of compact_kv_."""
    found = []
    _tiles.launch = lambda kernel, programs, arguments: found.append((kernel, arguments))
    indices = torch.empty(2, 720, dtype=torch.int64, device="meta")
    counts = torch.empty(2, dtype=torch.int32, device="meta")
    x = torch.empty(2, 2880, channels, dtype=dtype, device="meta")
    for total in (None, 1400):
        rest = ([1], [0])
        outs = compact.compact(indices, counts, False, [x], *rest, [0.0], total)
        compact.compact_backward(indices, counts, False, outs, *rest, [2], 2880, total)
    compact.compact_kv_(indices, counts, [torch.empty(2, 8, 2880, channels, dtype=dtype, device="meta")])
    return found


def measured_compact(case: tuple) -> list[tuple[str, str]]:
    """As measured(), for an architecture, a dtype and a number of channels. Nothing may spill."""
    architecture, dtype, channels = case
    lines = []
    for kernel, arguments in compact_launches(dtype, channels):
        name, block = kernel.__name__.removesuffix("_kernel"), f"{arguments['BLOCK_P']}x{arguments['BLOCK_C']}"
        registers, spill, shared = resources(compiled(kernel, arguments, architecture))
        resident = blocks_per_multiprocessor(architecture, arguments["num_warps"], registers, shared)
        line = f"{name:<12}{architecture:>5}{TYPES[dtype]:>6}{channels:>6}{block:>10}"
        line += f"{registers:>6}{spill:>7}{shared:>9}{resident:>8}"
        error = f"{name} sm_{architecture} {TYPES[dtype]} {channels} channels: {spill} bytes spill" if spill else ""
        lines.append((line, error))
    return lines


def check_compact(architectures: list[int], jobs: int) -> list[str]:
    """As check(), for the kernels of triton_kernels/compact.py."""
    print("kernel       arch dtype    C     block  regs  spill   shared  per_SM", flush=True)
    errors = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(measured_compact, [(a, *case) for a in architectures for case in COMPACT]):
            for line, error in lines:
                print(line, flush=True)
                errors += [error] if error else []
    return errors


def check(cases: list[tuple], jobs: int) -> list[str]:
    """Compiles, prints a table, and returns what is wrong."""
    header = "kernel arch dtype D GQA rows keys warps stages regs spill shared per_SM warps_SM".split()
    print("{:<28}{:>5}{:>6}{:>5}{:>5}{:>8}{:>6}{:>7}{:>8}{:>6}{:>7}{:>9}{:>8}{:>10}".format(*header), flush=True)
    errors = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for lines in pool.map(measured, cases):
            for line, error in lines:
                print(line, flush=True)
                errors += [error] if error else []
    return errors


# some cases, for the tests: one of each tile, the options, the tightest shared memory
QUICK = [
    ("attention", 90, torch.bfloat16, 128, 1, {"heads": True, "bias": True}),
    ("attention", 86, torch.float32, 80, 1, {}),
    ("attention", 100, torch.float16, 64, 4, {"routes": True, "radius": (2**30,) * 3}),
    ("score", 90, torch.bfloat16, 128, 4, {}),
]
# options that change a kernel: each with one of the head dimensions, in float16
SCORE_OPTIONS = {
    64: {"reduce": ("sum,max", "none"), "weights": True},
    80: {"positions": True, "masks": True, "bias": True},
    128: {"lse": True, "reduce": ("mean", "group_max"), "weights": True},
    256: {"reduce": ("sum,max", "max"), "heads_first": True},
}


def family_cases(family: str, given) -> list[tuple]:
    names = {name: dtype for dtype, name in TYPES.items()}
    if family == "attention":
        cases = [
            (architecture, names[dtype], head_dim, group, {"block": given.block})
            for architecture in given.arch for dtype in given.dtype for head_dim in given.dim for group in given.group
            if dtype != "fp16"
        ]  # fmt: skip
    else:
        cases = [
            (architecture, names[dtype], head_dim, 4, SCORE_OPTIONS.get(head_dim, {}) if dtype == "fp16" else {})
            for architecture in given.arch for dtype in given.dtype for head_dim in given.dim
            if dtype != "fp16" or architecture not in (86, 89)  # whose tiles are those of 120
        ]  # fmt: skip
    return [(family, *case) for case in cases]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(SHARED))
    parser.add_argument("--dim", type=int, nargs="*", default=[64, 80, 128, 256])
    parser.add_argument("--family", nargs="*", default=[*FAMILIES, "compact"])
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--group", type=int, nargs="*", default=[1])
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a few kernels, for the tests")
    given = parser.parse_args()
    begin = time.perf_counter()
    families = [family for family in given.family if family != "compact"]
    cases = QUICK if given.quick else [case for family in families for case in family_cases(family, given)]
    errors = check(cases, given.jobs) if cases else []
    if "compact" in given.family and not given.quick:
        errors += check_compact(given.arch, given.jobs)
    print(f"triton {triton.__version__}: {time.perf_counter() - begin:.0f} s")
    for error in errors:
        print(error)
    return bool(errors)


if __name__ == "__main__":
    sys.exit(main())
