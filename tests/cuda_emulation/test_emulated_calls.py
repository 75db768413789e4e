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


def kernels(library: Path) -> dict[str, str]:
    """Where a kernel (and none of its lambdas) stands in a library -> its name."""
    listed = subprocess.run(["nm", "--defined-only", str(library)], check=True, capture_output=True, text=True).stdout
    symbols = (line.split() for line in listed.splitlines() if "pyvtk4cuda" in line)
    names = {place: _resources.readable(name) for place, _, name in symbols}
    return {place: name for place, name in names.items() if re.fullmatch(r"\w+_kernel(<.*>)?", name)}


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
    known = kernels(BUILD / "libpyvtk_emulated_bindings.so")
    reached = {known[place] for place in launched.read_text().splitlines()}
    missing = set(known.values()) - reached - {"probe_kernel"}
    assert len(reached) > 80 and sorted(missing) == [], "no call of tests/calls reaches these"
