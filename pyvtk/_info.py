"""``python -m pyvtk info``: what this installation can run here, and the reason for everything that it cannot."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

import pyvtk
from pyvtk.ops import probe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # info takes none


def _table(rows: list[list[str]]) -> str:
    """Columns as wide as their longest entry, the first row being the heads."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["   ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _cuda_devices() -> list[tuple[str, str]]:
    """Every CUDA device with what became of a kernel started on it."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        device = torch.device("cuda", index)
        error = probe.probe(device)
        found.append((str(device), f"{torch.cuda.get_device_name(device)}: {error or 'kernels run'}"))
    return found


def _versions(facts: dict) -> list[tuple[str, str]]:
    build = facts["build"]
    lines = [("pyvtk", facts["pyvtk"]), ("Python", platform.python_version()), ("torch", facts["torch"])]
    lines.append(("triton", facts["triton"] or "not installed (pip install triton)"))
    if build is None:
        lines.append(("compiled part", f"not available: {facts['build_error']}"))
    else:
        lines.append(("compiled part", f"version {build['version']}, built by {build['cxx']} on {build['date']}"))
        if build["sanitize"]:
            lines.append(("sanitizers", build["sanitize"]))
        others = ", ".join(facts["instruction_sets"])
        lines.append(("instruction set", f"{facts['instruction_set']} (this machine runs {others})"))
        if cuda := build["cuda_architectures"]:
            lines.append(("CUDA code", f"for {cuda}, nvcc {build['cuda_compiler']}"))
        elif (Path(pyvtk.__file__).parent / "libpyvtk_cuda.so").is_file():
            lines.append(("CUDA code", "built elsewhere"))
        else:
            lines.append(("CUDA code", "not built: nvcc was missing, or PYVTK_CUDA=0"))
    lines += [(library, error or "loaded") for library, error in facts["libraries"].items()]
    if facts["libraries"]["libpyvtk_cuda.so"] is None:
        driver = f"for CUDA {facts['cuda_driver']}" if facts["cuda_driver"] else "none: CUDA kernels cannot run here"
        lines.append(("CUDA driver", driver))
    lines.append(("cuSPARSELt", facts["cusparselt"] or 'sparse24 may take it (kernel "vendor")'))
    return lines + (_cuda_devices() or [("CUDA device", "none that torch can use")])


def report() -> str:
    """The whole text. Reasons stand below the table, numbered, since many operators share one."""
    facts = pyvtk.info()
    versions = _versions(facts)
    width = max(len(name) for name, _ in versions)
    text = "\n".join(f"{name.ljust(width)}   {value}" for name, value in versions)

    operators = {name: backends for name, backends in facts["operators"].items() if name != "probe_"}
    if not operators:
        return text
    reasons: dict[str, int] = {}
    rows = [["operator", *next(iter(operators.values()))]]
    for name, backends in operators.items():
        row = [name]
        for error in backends.values():
            # the operator's name would make every reason a different one
            reason = error and error.replace(f"pyvtk::{name}", "the operator")
            row.append("yes" if reason is None else f"no [{reasons.setdefault(reason, len(reasons) + 1)}]")
        rows.append(row)
    notes = "\n".join(f"[{number}] {reason}" for reason, number in reasons.items())
    return "\n\n".join(part for part in (text, _table(rows), notes) if part)


def main(arguments: argparse.Namespace) -> int:
    del arguments
    print(report())
    return 0
