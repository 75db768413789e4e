"""The calls of tests/calls that CUDA has kernels for. What imports this module makes them by the operators of the CUDA
library, for CPU tensors and with the kernels emulated."""

from __future__ import annotations

import os
import re
from pathlib import Path

import calls
import torch

BUILD = Path(os.environ["PYVTK_EMULATION_BUILD"])
SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"

torch.ops.load_library(BUILD / "libpyvtk_emulated_bindings.so")  # in place of the CPU's operators
_operators = {name for path in SOURCES.glob("*.cu") for name in re.findall(r'm\.impl\("(\w+)"', path.read_text())}
FAMILIES = {
    family: {name: call for name, call in of_family.items() if call.operator in _operators}
    for family, of_family in calls.FAMILIES.items()
}
