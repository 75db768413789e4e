"""Checks of every text file in the tree: it ends with one newline, and no line ends with a space or names a machine."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Folders of whoever wrote the file say nothing to anybody else.
MACHINE = re.compile(r"(?<![\w.$}])/(?:work|home|root|Users)/\w")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def problems(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except UnicodeDecodeError:
        return []  # pictures
    found = []
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append("must end with exactly one newline")
    for number, line in enumerate(text.splitlines(), 1):
        if line != line.rstrip():
            found.append(f"line {number} ends with a space")
        if MACHINE.search(line):
            found.append(f"line {number} names a folder of one machine")
    return [f"{path.relative_to(ROOT)}: {problem}" for problem in found]


def main() -> int:
    found = [problem for path in tracked() for problem in problems(path)]
    print("\n".join(found) or "text files: all good")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
