"""Triton's interpreter: how tests of Triton kernels run without a GPU."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from fresh import ROOT, run

from pyvtk import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# set by passed_in_the_interpreter
EMULATED = os.environ.get("PYVTK_EMULATE_TF32X3") == "1"
if EMULATED:
    from tf32x3 import emulate

    emulate()


def why_broken(triton: str, numpy: str) -> str | None:
    """Why the interpreter of these versions cannot run our kernels; None: it can."""
    old, new = (tuple(int(part) for part in x.split(".")[:2]) for x in (triton, numpy))
    if old < (3, 7) and new >= (2, 4):
        return f"the interpreter of triton {triton} needs numpy < 2.4, got {numpy}"
    return None


def runs_kernels(operator: str) -> pytest.MarkDecorator:
    """For tests that launch Triton's kernels of an operator in this process."""
    reason = backends.why_not(operator, "triton", DEVICE)
    if reason is not None:
        reason += " (test_in_the_interpreter does that)"
    elif DEVICE == "cpu":
        reason = why_broken(version("triton"), version("numpy"))
    return pytest.mark.skipif(reason is not None, reason=str(reason))


def in_tf32x3(dtype: torch.dtype) -> bool:
    """Whether kernels multiply tensors of ``dtype`` in three products of TensorFloat32 here."""
    on_device = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    return dtype == torch.float32 and (on_device or EMULATED)


def passed_in_the_interpreter(test: str, folder: Path, only: str = "not compile", tf32x3: bool = False) -> int:
    """Runs a file of tests once more, in a process of its own, and says how many passed; none may fail.

    TRITON_INTERPRET has to be set before anything imports Triton. With ``tf32x3`` products are those of tensor cores.
    """
    broken = why_broken(version("triton"), version("numpy"))
    if broken is not None:
        pytest.skip(broken)
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = [test, "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", only]
    env = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYVTK_EMULATE_TF32X3": "1" if tf32x3 else "0"}
    said = run("-c", command, *arguments, cwd=folder, env=env)
    assert "failed" not in said, said
    return int(re.search(r"(\d+) passed", said).group(1))
