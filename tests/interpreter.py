"""Triton's interpreter: how tests of Triton kernels run without a GPU."""

from __future__ import annotations

import re
from pathlib import Path

from fresh import ROOT, run


def passed_in_the_interpreter(test: str, folder: Path) -> int:
    """Runs a file of tests once more, in a process of its own, and says how many passed; none may fail.

    TRITON_INTERPRET has to be set before anything imports Triton.
    """
    command = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = [test, "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-k", "not compile"]
    said = run("-c", command, *arguments, cwd=folder, env={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert "failed" not in said, said
    return int(re.search(r"(\d+) passed", said).group(1))
