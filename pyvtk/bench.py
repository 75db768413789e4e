"""``python -m pyvtk bench``: finds the benchmarks of the source checkout and runs them.

They are no part of the installed package; an editable install (``pip install -e .``) sees them.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parent.parent
_PACKAGE = "pyvtk_benchmarks"  # not "benchmarks": other projects install a package of that name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="score, select, ...; default: all")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="0.2 s of measured time per case instead of 2")
    parser.add_argument("--key", action="store_true", help="only the cases that say most of a device in little time")
    parser.add_argument(
        "--filter", metavar="TEXT", action="append",
        help="only cases whose line in --list contains TEXT; several: one of them",
    )  # fmt: skip
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="threads of the CPU; default: 1")
    parser.add_argument("--json", metavar="PATH", help="write every number, with machine, versions and commit")
    parser.add_argument("--resume", action="store_true", help="go on behind the cases that PATH of --json holds")
    parser.add_argument("--plots", metavar="DIR", help="write one picture per family")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")


def load(name: str = "harness") -> ModuleType:
    """A module of the checkout's ``benchmarks`` folder.

    Raises:
        FileNotFoundError: this installation is not a source checkout.
    """
    folder = ROOT / "benchmarks"
    if not (folder / "harness.py").is_file():
        raise FileNotFoundError(
            f"no benchmarks beside {Path(__file__).parent}: run from a source checkout installed with pip install -e ."
        )
    if _PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            _PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[_PACKAGE])
    return importlib.import_module(f"{_PACKAGE}.{name}")


def main(args: argparse.Namespace) -> int:
    try:
        harness = load()
    except FileNotFoundError as error:
        print(f"pyvtk bench: {error}", file=sys.stderr)
        return 2
    unknown = sorted(set(args.families) - set(harness.FAMILIES))
    if unknown:
        print(f"pyvtk bench: unknown family {unknown[0]!r}; choose from {', '.join(harness.FAMILIES)}", file=sys.stderr)
        return 2
    if args.threads < 1:
        print(f"pyvtk bench: --threads {args.threads}; it takes one or more", file=sys.stderr)
        return 2
    if args.device == "cuda" and not args.list and not torch.cuda.is_available():
        print("pyvtk bench: torch sees no CUDA device", file=sys.stderr)
        return 2
    if args.plots or not args.list:
        needed = ["rich"] + (["matplotlib"] if args.plots else [])
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            print(
                f"pyvtk bench: {missing[0]} is missing; pip install 'visual-token-kernels[bench]'",
                file=sys.stderr,
            )
            return 2
    return harness.main(args)
