"""Every call that a GPU is tried with, by the bindings of CUDA and emulated kernels, as .ci/first_light.py makes them;
between them they launch every kernel in every version that is compiled."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from emulated import BUILD, SANITIZER
from fresh import ROOT, run

from pyvtk import _resources


def kernels(library: Path) -> set[str]:
    """Names of the kernels that a library holds."""
    listed = subprocess.run(["nm", "--defined-only", str(library)], check=True, capture_output=True, text=True).stdout
    names = {_resources.readable(line.split()[2]) for line in listed.splitlines() if "pyvtk4cuda" in line}
    return {name for name in names if re.fullmatch(r"\w+_kernel(<.*>)?", name)} - {"probe_kernel"}  # not their lambdas


@pytest.mark.long
@pytest.mark.skipif(SANITIZER != "", reason="torch's memory is none of the sanitizers'")
def test_all_are_right_and_reach_every_kernel(tmp_path):
    launched = tmp_path / "launched"
    env = {"PYVTK_GPU_DEVICE": "cpu", "PYVTK_EMULATION_BUILD": str(BUILD), "PYVTK_LAUNCHED": str(launched)}
    arguments = ["--calls", "emulated_calls", "--json", "out.json", "--jobs", "1", "--seconds", "300", "--total", "900"]
    path = [ROOT / "tests" / "cuda_emulation"]
    said = run(str(ROOT / ".ci" / "first_light.py"), *arguments, path=path, cwd=tmp_path, env=env)
    rows = json.loads((tmp_path / "out.json").read_text())["calls"]
    assert len(rows) > 200 and all(row["status"] == "ok" for row in rows), said
    reached = {_resources.readable(name) for name in launched.read_text().splitlines()}
    known = kernels(BUILD / "libpyvtk_emulated_bindings.so")
    assert len(known) > 80 and sorted(known - reached) == [], "no call of tests/calls reaches these"
