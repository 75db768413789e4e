"""``python -m pyvtk <command>``."""

from __future__ import annotations

import argparse
import importlib
import sys

# command -> module with add_arguments(parser) and main(arguments) -> exit status; one line of help
COMMANDS = {
    "info": ("pyvtk._info", "versions, instruction set, backends, and why one is missing"),
    "methods": ("pyvtk.methods._pages", "published methods: what they compute, where they act, what they need"),
    "bench": ("pyvtk.bench", "measure against peers (from a source checkout)"),
    "resources": ("pyvtk._resources", "registers, shared memory and occupancy of every CUDA kernel"),
    "demo": ("pyvtk.demo", "prune the tokens of a real photograph in a real model"),
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="pyvtk", description="Kernels for visual tokens.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if argv[:1] == [name]:  # only the command that runs is imported
            importlib.import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    return importlib.import_module(COMMANDS[arguments.command][0]).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
