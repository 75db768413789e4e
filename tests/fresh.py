"""Fresh Python processes: what an import does has to be seen in a process that has imported nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyvtk

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(pyvtk.__file__).resolve().parent


def run(*arguments: str, path: list[Path] = (), cwd: Path, env: dict[str, str] | None = None, ok: bool = True):
    """``python *arguments`` in ``cwd``, with ``path`` in front of what is installed. Its output as one text."""
    environment = {**os.environ, **(env or {})}
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, path), *([inherited] if inherited else [])])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env=environment, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if ok:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode != 0, f"expected an error, got\n{done.stdout}"
    return done.stdout


# First lines of a process that is to see a copied package only: an editable installation adds a finder that would bring
# the original for everything that the copy lacks.
ONLY_PATH = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""
INFO = ONLY_PATH + "import runpy; sys.argv = ['pyvtk', 'info']; runpy.run_module('pyvtk', run_name='__main__')"


def copy_package(folder: Path) -> Path:
    """The installed package as ``folder``/pyvtk, libraries included, for a test to break."""
    copy = folder / "pyvtk"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    if not (copy / "triton_kernels").exists():  # an editable installation finds them elsewhere
        shutil.copytree(ROOT / "triton_kernels", copy / "triton_kernels")
    return copy


def copy_tree(folder: Path) -> Path:
    """The source tree without anything built, as a clone would be."""
    built = shutil.ignore_patterns(
        "__pycache__", "*.so", "*.egg-info", "build", "dist", ".git", ".gpu", ".venv*", ".*cache", ".hypothesis"
    )
    return shutil.copytree(ROOT, folder / "tree", ignore=built)
