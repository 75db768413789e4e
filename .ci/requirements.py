"""Prints the requirements of one extra of pyproject.toml, one a line: requirements.py EXTRA [--without|--only NAME]."""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib


def main(extra: str, option: str | None = None, name: str | None = None) -> None:
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text())["project"]
    for requirement in project["optional-dependencies"][extra]:
        named = re.match(r"[\w.-]+", requirement).group() == name
        if option is None or named == (option == "--only"):
            print(requirement)


if __name__ == "__main__":
    main(*sys.argv[1:])
