"""The table of what CUDA kernels take: against ptxas' own words, and occupancy against numbers of the calculator."""

import json
import re
import shutil
import subprocess

import pytest
from fresh import ROOT

from pyvtk import _resources
from pyvtk.__main__ import main

pytestmark = pytest.mark.package

SOURCE = """
__global__ void __launch_bounds__(256) clean(float* p) {
  __shared__ float s[256];
  s[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = s[255 - threadIdx.x];
}
__global__ void __launch_bounds__(1024) spill(float* p, int n) {
  float a[200];
#pragma unroll
  for (int i = 0; i < 200; ++i) a[i] = p[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 200; ++i) p[i * n + threadIdx.x * 3] = a[199 - i] * a[i];
}
__global__ void array(float* p, int n) {
  float a[400];
  for (int i = 0; i < 400; ++i) a[i] = p[i];
  __syncthreads();
  for (int i = 0; i < 400; ++i) a[i * n % 400] += p[i * n];
  p[0] = a[n];
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """An object file for the oldest and the newest architecture, with PTX as well, and what ptxas said."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("resources")
    (folder / "kernels.cu").write_text(SOURCE)
    command = ["nvcc", "-Xptxas", "-v", "-c", "kernels.cu", "-o", "kernels.o"]
    for number in ("80", "90a", "120"):
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command += ["-gencode", "arch=compute_100,code=compute_100"]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return folder / "kernels.o", done.stdout + done.stderr


def test_agrees_with_ptxas(compiled):
    path, said = compiled
    words = []
    for part in said.split("entry function ")[1:]:
        name, architecture = re.match(r"'_Z\d(clean|spill|array)\w*' for '(\w+)'", part).groups()
        shared = re.search(r"(\d+) bytes smem", part)
        numbers = [int(re.search(rf"(\d+) {what}", part).group(1)) for what in ("bytes stack", "bytes spill stores")]
        registers = int(re.search(r"Used (\d+) registers", part).group(1))
        words.append((name, architecture, *numbers, registers, int(shared.group(1)) if shared else 0))
    found = {(k.name, k.architecture): k for k in _resources.read(path)}
    assert len(words) == len(found) == 9
    for name, architecture, frame, stores, registers, shared in words:
        kernel = found[name, architecture]
        assert (kernel.frame, kernel.registers, kernel.shared) == (frame, registers, shared)
        assert name == "array" or (kernel.stores > 0) == (stores > 0)
        assert kernel.threads == {"clean": 256, "spill": 1024, "array": None}[name]


def test_ptx_is_no_machine_code(compiled):
    path, _ = compiled
    assert _resources.ptx(path) == {"compute_100"}
    assert {architecture for architecture, _ in _resources.machine_code(path)} == {"sm_80", "sm_90a", "sm_120"}


def test_a_wheel_is_checked_for_what_is_built_by_default():
    (built,) = re.findall(r'^DEFAULT_ARCHITECTURES = "(.+)"$', (ROOT / "setup.py").read_text(), re.M)
    (wanted,) = re.findall(r"^WANTED = \{(.+)\}$", (ROOT / ".ci" / "check_cuda.py").read_text(), re.M)
    expected = set()
    for number, ptx in re.findall(r"([\d.]+a?)(\+PTX)?", built):
        expected |= {kind + number.replace(".", "") for kind in ("sm_", "compute_") if kind == "sm_" or ptx}
    assert set(re.findall(r'"(\w+)"', wanted)) == expected


def test_faults_fail_the_command(compiled, tmp_path, capsys):
    assert main(["resources", str(compiled[0]), "--json", str(tmp_path / "x.json")]) == 1
    said = capsys.readouterr().out
    assert "3 kernels for 3 architectures, 6 faults" in said and "FAULT: uses local memory" in said
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {row["name"] for row in rows if row["frame"] or row["stores"]} == {"spill", "array"}


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 256, 32, 0, 8),
        ("sm_80", 128, 168, 0, 3),
        ("sm_90a", 1024, 65, 0, 0),  # more registers than a multiprocessor has
        ("sm_90a", 128, 32, 47 << 10, 4),
        ("sm_86", 64, 16, 0, 16),  # as many blocks as it takes
        ("sm_120", 256, 40, 0, 6),  # as many warps
        ("sm_120", 32, 16, 24 << 10, 4),  # 100 KiB, 1 of each block for the system
        ("sm_80", 160, 80, 0, 4),  # 6 warps in each quarter, not 25 in all
        ("sm_89", 128, 33, 0, 12),  # 40 registers: they go by 8 a thread
        ("sm_90", 64, 32, 32329, 6),  # 7 of 33353 bytes would fit, but not of 33408
        ("sm_100", 128, 255, 84224, 2),
    ],
)
def test_occupancy(architecture, threads, registers, shared, blocks):
    assert _resources.occupancy(architecture, threads, registers, shared) == (blocks, blocks * (threads // 32))


@pytest.mark.parametrize(
    ("architecture", "kib"),
    [("sm_80", 163), ("sm_86", 99), ("sm_89", 99), ("sm_90a", 227), ("sm_100", 227), ("sm_120", 99)],
)
def test_shared_memory_of_a_block(architecture, kib):
    assert _resources.shared_of_block(architecture) == kib << 10
    assert _resources.occupancy(architecture, 32, 16, kib << 10) == (1, 1)
    assert _resources.occupancy(architecture, 32, 16, (kib << 10) + 1) == (0, 0)


def test_too_much_shared_memory_is_a_fault():
    kernel = _resources.Kernel("k", "sm_80", 32, 0, 0, 0, 48 << 10, 256, 3, 24)
    assert kernel.fault is None
    kernel.shared += 1
    assert "shared memory" in kernel.fault


def test_missing_library(capsys, tmp_path):
    assert main(["resources", str(tmp_path / "none.so")]) == 2
    assert capsys.readouterr().err == "pyvtk resources: none.so was not built into this installation\n"
