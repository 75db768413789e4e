"""Planted mistakes: each is found by the build that has to find it, and its correct twin passes in every build."""

import os
import re
import subprocess

import pytest
from emulated import BUILD, SANITIZER

PROGRAM = BUILD / "planted"
POISON = "wrong result: 2147319805"  # 0x7ffd7ffd
FOUND_BY_ALL = {
    "copy_stages": POISON,
    "deadlock": r"block \(0, 0, 0\): deadlock.*\n"
    r"  threads 0-39: wait at __syncthreads \(planted.cpp:\d+\)\n  threads 40-63: returned",
    "two_barriers": r"thread 32, planted.cpp:\d+: comes to __syncthreads, but others wait at another one:\n"
    r"  threads 0-31: wait at __syncthreads \(planted.cpp:\d+\)\n  threads 32-63: can run",
    "absent_lane": r"deadlock.*\n  threads 0-6, 8-38, 40-63: wait at __shfl_sync \(planted.cpp:\d+\) with mask 0xf{8}\n"
    r"  threads 7, 39: returned",
    "wrong_mask": "thread 16, .*__shfl_sync with mask 0x0000ffff, which lacks its own lane 16",
    "misaligned": "planted.cpp:.*misaligned address",
    "misaligned_ldg": "thread 0, .*__ldg of an address that is not a multiple of 8",
    "ldmatrix": "thread 0, .*ldmatrix of an address that is not a multiple of 16",
    "absent_from_mma": r"deadlock.*\n  threads 0-15, 32-47: wait at mma_sp \(planted.cpp:\d+\) with mask 0xf{8}\n"
    r"  threads 16-31, 48-63: returned",
    "zero_metadata": "mma_sp with metadata whose two positions do not ascend",
    "wgmma_unfenced": "wgmma of what was copied without wgmma_fence_writes behind it",
    "wgmma_not_begun": "wgmma without wgmma_begin",
    "wgmma_metadata_early": "wrong result",
    "wgmma_outside": "wgmma of an address outside of the block.s shared memory",
    "stale_error": "^invalid argument\n$",
    "lowered_limit": "^invalid argument\n$",
    "endless_wait": r"block \(0, 0, 0\): no progress",
}
FOUND = {
    "": {**FOUND_BY_ALL, "copy": POISON, "copy_of_another": POISON, "wgmma_overwritten": "wrong result"},
    "address,undefined": {
        **FOUND_BY_ALL,
        "wgmma_overwritten": "use-after-poison",
        "copy": "use-after-poison",
        "copy_of_another": POISON,
        "global_write": "heap-buffer-overflow(.*\n)*WRITE of size 4.*\n.*global_write_kernel",
        "shared_write": "heap-buffer-overflow(.*\n)*WRITE of size 4.*\n.*shared_write_kernel",
        "dynamic_shared_write": "heap-buffer-overflow(.*\n)*WRITE of size 4.*\n.*dynamic_shared_write_kernel",
    },
    "thread": {
        **FOUND_BY_ALL,
        "copy": POISON,
        "wgmma_overwritten": "wrong result",
        **{
            name: f"data race(.*\n)*.*{name}_kernel"
            for name in (
                "race",
                "race_in_warp",
                "race_in_loop",
                "race_of_blocks",
                "race_of_last_block",
                "race_of_ldmatrix",
            )
        },
        "copy_of_another": "data race(.*\n)*.*copy_of_another_kernel",
    },
}
ALL = sorted({name for found in FOUND.values() for name in found})


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # a program has sanitizers of its own: what was loaded before Python is not for it
    inherited = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    inherited["ASAN_OPTIONS"] = "detect_leaks=0"
    return subprocess.run(
        [PROGRAM, *arguments], env={**inherited, **environment}, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(FOUND[SANITIZER]))
def test_mistake_is_found(name):
    done = run(name)
    assert done.returncode != 0, "passed"
    assert re.search(FOUND[SANITIZER][name], done.stdout), done.stdout


@pytest.mark.parametrize("seed, blocks", [("7", "3")] if SANITIZER == "thread" else [("0", "1"), ("7", "3")])
@pytest.mark.parametrize("name", ALL)
def test_correct_twin_passes(name, seed, blocks):
    done = run(name, "correct", CUDA_EMULATION_SEED=seed, CUDA_EMULATION_BLOCKS=blocks)
    assert (done.returncode, done.stdout) == (0, "")
