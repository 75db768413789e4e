"""Faults of kernels, planted: each is named on a line of its own and costs that line alone, whether .ci/first_light.py
makes the calls or pytest does; and the names of kernels that were launched are those of the library."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fresh import ROOT, run

import pyvtk
from pyvtk import _resources

pytestmark = pytest.mark.package
SCRIPT = ROOT / ".ci" / "first_light.py"
PLANTED = """
import os, signal, time
import torch
from calls.call import Call, values

def call(wrong=lambda out: out):
    def run(backend, x):
        out = x * 2
        return out if backend == "reference" else wrong(out)
    return Call("select", lambda: (values(3, 4),), run)

def one_off(out):
    out[1, 2] += 1
    return out

def dies(out):
    os.write(2, b"last words")
    os.kill(os.getpid(), signal.SIGABRT)

def hangs(out):
    time.sleep(60)

def poisons(out):
    def ones(*size, **options):
        raise RuntimeError("an illegal memory access was encountered")
    torch.ones = ones
    return out

def breaks_the_profiler(out):
    torch.profiler.profile = lambda **options: os._exit(4)
    return out

def raises(out):
    raise ValueError("no such kernel")

FAMILIES = {
    "select": {"good": call(), "wrong": call(one_off), "dies": call(dies), "also good": call(), "hangs": call(hangs),
               "good after all": call()},
    "compact": {"poisons": call(poisons), "raises": call(raises), "shape": call(lambda out: out[:2]), "good": call()},
    "merge": {"counted": call(breaks_the_profiler), "good": call()},
}
"""


def first_light(folder: Path, *arguments: str, ok: bool) -> tuple[str, dict[str, tuple]]:
    """What it said, and status and message of each call."""
    (folder / "planted.py").write_text(PLANTED)
    env = {"PYVTK_GPU_DEVICE": "cpu"}
    where = folder / "out.json"
    said = run(str(SCRIPT), "--calls", "planted", "--json", str(where), "--jobs", "2", *arguments,
               path=[folder], cwd=folder, env=env, ok=ok)  # fmt: skip
    rows = json.loads(where.read_text())["calls"]
    return said, {f"{row['family']}: {row['name']}": (row["status"], row["message"]) for row in rows}


@pytest.mark.long
def test_each_fault_costs_its_own_line(tmp_path):
    said, found = first_light(tmp_path, "--seconds", "5", "--only", "ct: ", ok=False)
    assert {name: status for name, (status, _) in found.items()} == {
        "select: good": "ok", "select: wrong": "WRONG", "select: dies": "CRASHED", "select: also good": "ok",
        "select: hangs": "HUNG", "select: good after all": "ok",
        "compact: poisons": "POISONED", "compact: raises": "ERROR", "compact: shape": "WRONG", "compact: good": "ok",
    }  # fmt: skip
    wrong = found["select: wrong"][1]
    assert re.fullmatch(r"result 1 of 1: 1 of 12 values differ, the first at \[1, 2\]: .*, expected .*", wrong), wrong
    assert found["select: dies"][1] == "SIGABRT: last words"
    assert found["select: hangs"][1] == "did not end in 5 s"
    assert found["compact: poisons"][1] == "an illegal memory access was encountered"
    assert found["compact: raises"][1] == "ValueError: no such kernel"
    assert found["compact: shape"][1] == "result 1 of 1: float32 [2, 4], expected float32 [3, 4]"
    lines = said.splitlines()
    assert "first light: 4 of 10 ok" in lines[-1] and "not counted: the device is cpu" in said
    statuses = [line.split("  ", 1)[1].split()[0] for line in lines if ": " in line and "  " in line]
    assert statuses[:4] == ["ok"] * 4 and "ok" not in statuses[4:]  # faults last


def test_it_ends_in_time(tmp_path):
    said, found = first_light(tmp_path, "--only", "select: hangs", "--total", "0", ok=False)
    assert found == {"select: hangs": ("NOT RUN", "no time is left")} and "0 of 1 ok" in said


def module():
    spec = importlib.util.spec_from_file_location("first_light", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("family", "names", "reason"),
    [
        ("select", ["good", "also good"], ": "),  # without CUDA there is nothing to profile
        ("merge", ["counted", "good"], "the profiler ended a worker: exit status 4"),
    ],
)
def test_a_fault_of_the_profiler_is_none_of_the_call(tmp_path, monkeypatch, family, names, reason):
    (tmp_path / "planted.py").write_text(PLANTED)
    monkeypatch.setenv("PYVTK_GPU_DEVICE", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    light = module().FirstLight("planted", 30, float("inf"), None)
    rows = light.run(family, None, names)
    assert [(row["name"], row["status"]) for row in rows] == [(name, "ok") for name in names]
    assert reason in light.uncounted


# Names of the library's kernels, as they stand in its machine code, and what a profiler calls them
NAMES = {
    "_ZN5pyvtk4cuda25score_plain_finish_kernelILb1EEEvNS0_11PlainFinishENS_13SelectProblemE":
        "score_plain_finish_kernel<1>",
    "_ZN5pyvtk4cuda21merge_backward_kernelINS_8bfloat16ELi8EEEvNS0_12MergeProblemENS0_13MergeGradientEi":
        "merge_backward_kernel<bfloat16, 8>",
    "_ZN5pyvtk4cuda17compact_kv_kernelENS0_8KvCachesENS0_16SelectedOnDeviceEb": "compact_kv_kernel",
}  # fmt: skip


def test_counts_what_was_launched():
    profiled = [_resources.demangled(name) for name in NAMES]
    assert all(text.startswith(("void pyvtk::cuda::", "pyvtk::cuda::")) for text in profiled)
    others = {"void at::native::vectorized_elementwise_kernel<4>(int)", "Memcpy DtoD (Device -> Device)"}
    compiled, triton = {*NAMES.values(), "inverse_kernel"}, {"compact_kv_kernel", "gather_kernel"}
    found = module().count({*profiled[:2], *others, "gather_kernel"}, compiled, triton)
    assert found["CUDA"] == {"launched": 2, "of": 4, "missing": ["compact_kv_kernel", "inverse_kernel"]}
    assert found["Triton"] == {"launched": 1, "of": 2, "missing": ["compact_kv_kernel"]}
    assert [_resources.readable(text) for text in profiled] == list(NAMES.values())


def test_knows_the_kernels_of_this_installation():
    compiled, triton = module().known_kernels()
    assert {"neighbor_attention_kernel", "attention_scores_kernel", "compact_kv_kernel"} <= triton or not triton
    library = Path(pyvtk.__file__).parent / "libpyvtk_cuda.so"
    if not library.is_file():
        pytest.skip("the CUDA library was not built")
    mangled = [kernel.name for elf in _resources.machine_code(library) for kernel in _resources.kernels(*elf)]
    found = module().count({_resources.demangled(name) for name in mangled}, compiled, triton)["CUDA"]
    assert found["launched"] == found["of"] > 80 and found["missing"] == []


# The same under pytest

TESTS = """
import time
import device_lives as page
import pytest
from device_lives import device_lives

@pytest.mark.parametrize("number", range(6))
def test_good(number):
    pass

def test_poisons():
    page.why_lost = lambda: "an illegal memory access"

def test_hangs():
    time.sleep(60)

def test_fails_while_the_device_hangs():
    page.why_lost = lambda: time.sleep(60)
    raise ValueError
"""


def pytest_run(folder: Path, *arguments: str) -> str:
    (folder / "test_planted.py").write_text(TESTS)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "PYVTK_TEST_SECONDS": "2"}
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"]
    arguments = ("-p", "no:cacheprovider", "-q", "test_planted.py", *arguments)
    done = subprocess.run([*command, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    return f"{done.stdout}{done.stderr}\nstatus {done.returncode}"


def test_a_test_that_loses_the_device_costs_no_other(tmp_path):
    said = pytest_run(tmp_path, "-n", "2", "--max-worker-restart", "9")
    assert "4 failed, 7 passed" in said and said.endswith("status 1"), said
    for name in ("poisons", "hangs", "fails_while_the_device_hangs"):
        assert re.search(rf"crashed while running '.*::test_{name}'", said), said
    assert "test_poisons: the device is lost: an illegal memory access" in said
    assert "in test_hangs" in said  # where it stood


def test_without_other_processes_a_lost_device_ends_the_run(tmp_path):
    said = pytest_run(tmp_path, "-p", "no:xdist")
    assert "test_poisons: the device is lost" in said and "test_hangs" not in said and said.endswith("status 70"), said


@pytest.mark.long
@pytest.mark.parametrize(
    "chosen", ["select and ties", "equals_the_reference and (attention or score) and not LLaVA and not select"]
)
def test_promises_are_kept_on_the_cpu(chosen):
    """tests/test_cuda.py itself: every promise for one call, and the calls that the emulation has no kernels for."""
    env = {**os.environ, "PYVTK_GPU_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-c",
        "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [*command, "tests/test_cuda.py", "-k", chosen], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and "failed" not in done.stdout, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= 5, done.stdout
