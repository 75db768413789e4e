"""What a shared library needs from outside."""

from __future__ import annotations

import subprocess
from pathlib import Path


def undefined_symbols(library: Path) -> list[str]:
    """Demangled names of the dynamic symbols that ``library`` expects others to bring."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", "--demangle", "--format=posix", library],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    # "name with spaces U" (or w, for weak), without the version behind @
    return [line.rstrip().rsplit(" ", 1)[0].split("@")[0] for line in listed.stdout.splitlines()]
