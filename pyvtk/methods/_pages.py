"""``python -m pyvtk methods [NAME]``: the published methods, and the page of one of them."""

from __future__ import annotations

import argparse
import inspect
import sys
from types import ModuleType

from pyvtk import methods

FACTS = ("Source", "Acts", "Needs")


def facts(module: ModuleType) -> dict[str, str]:
    """Title, Source, Acts and Needs as the module's docstring has them, each as one line."""
    lines = inspect.getdoc(module).splitlines()
    title, _, summary = lines[0].partition(": ")
    found, current = {"Title": title, "Summary": summary}, None
    for line in lines[1:]:
        name, colon, text = line.partition(": ")
        if colon and name in FACTS:
            current = name
            found[current] = text
        elif current and line.startswith("    "):
            found[current] += f" {line.strip()}"
        else:
            current = None
    return found


def functions(module: ModuleType) -> dict:
    """The public functions that the module defines, in its order."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def listing() -> str:
    parts = []
    for name in methods.__all__:
        of = facts(getattr(methods, name))
        rows = [f"{name}   {of['Title']}: {of['Summary']}"]
        rows += [f"    {fact.lower():<9}{of[fact]}" for fact in FACTS]
        parts.append("\n".join(rows))
    return "\n\n".join([*parts, "python -m pyvtk methods NAME prints formulas, rounding and functions."])


def page(name: str) -> str:
    module = getattr(methods, name)
    parts = [inspect.getdoc(module)]
    for function_name, function in functions(module).items():
        body = "\n".join(f"    {line}".rstrip() for line in inspect.getdoc(function).splitlines())
        parts.append(f"{name}.{function_name}{inspect.signature(function, eval_str=True)}\n\n{body}")
    return "\n\n".join(parts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="a method; without one all are listed")


def main(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        print(listing())
    elif arguments.name in methods.__all__:
        print(page(arguments.name))
    else:
        known = ", ".join(methods.__all__)
        print(f"pyvtk methods: name must be one of {known}, got {arguments.name}", file=sys.stderr)
        return 2
    return 0
