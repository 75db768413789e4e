"""Calls six kernels that matter most, once each, at shapes of the benchmarks, between cudaProfilerStart and
cudaProfilerStop, for `ncu --profile-from-start off`. With --list it says which, and needs no GPU.
"""

import sys

import torch

from pyvtk import bench

CASES = (
    "attention: 64x64, radius 7, 16/16 heads, D=128, bf16",
    "score: LLaVA-NeXT score and select, batch 16, 2950 to 720, 32/32 heads, bf16",
    "sparse24: 16 rows, LLM MLP up 4096 x 11008, bf16",
    "sparse24: 2950 rows, 4096 x 4096, bf16",
    "select: long video [1, 131072] to 16384, fp32",
    "compact: [8, 2880, 4096] to 720, out=, bf16",
)


def main(arguments: list[str]) -> int:
    harness = bench.load()
    cases = {case.id: case for case in harness.cases(device="cuda")}
    for name in CASES:
        case = cases[name]
        print(name, flush=True)
        if "--list" in arguments:
            continue
        torch.manual_seed(0)
        inputs = case.inputs()
        ours = case.providers[harness.OURS]
        for _ in range(3):
            ours(*inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        ours(*inputs)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        del inputs
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
