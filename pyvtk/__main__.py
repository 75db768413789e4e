"""``python -m pyvtk``: info, bench, demo."""

from __future__ import annotations

import argparse
import sys


def info() -> int:
    """Print versions, the instruction set in use, and the backends of every operator with what keeps one from running."""
    import pyvtk

    facts = pyvtk.info()
    build = facts["build"]
    print(f"pyvtk {facts['pyvtk']}, torch {facts['torch']}, triton {facts['triton'] or 'not installed'}")
    if build is None:
        print(f"compiled part: not available ({facts['build_error']})")
    else:
        print(f"compiled with {build['cxx']} on {build['date']}; CUDA: {build['cuda_architectures'] or 'not built'}")
        print(f"instruction set: {facts['instruction_set']} (this machine runs {', '.join(facts['instruction_sets'])})")
    for library, error in facts["libraries"].items():
        print(f"{library}: {error or 'loaded'}")
    print(f"devices: {', '.join(facts['devices'])}")
    for name, backends in facts["operators"].items():
        print(f"{name}:")
        for backend, error in backends.items():
            print(f"  {backend:14} {'yes' if error is None else 'no: ' + error}")
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="pyvtk", description="Kernels for visual tokens.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction set, backends and why one is missing")
    from pyvtk import bench, demo

    bench.add_arguments(commands.add_parser("bench", help="measure against peers (from a source checkout)"))
    demo.add_arguments(commands.add_parser("demo", help="prune the tokens of a real photograph in a real model"))
    args = parser.parse_args(arguments)
    return {"info": lambda args: info(), "bench": bench.main, "demo": demo.main}[args.command](args)


if __name__ == "__main__":
    sys.exit(main())
