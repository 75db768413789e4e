"""Refuses to run when an unrelated tool for VTK files, PyVTK, has been installed into the same import name."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path


def check() -> None:
    """Raise ImportError, saying what to uninstall, if PyVTK shares this folder or this import name.

    Both packages install a folder ``pyvtk``: whichever came last overwrote files of the other, and uninstalling either
    one breaks what is left, so nothing in the folder can be trusted.
    """
    beside_us = (Path(__file__).parent / "VtkData.py").is_file()
    try:
        # Folded names: pip treats "PyVTK" and "pyvtk" as one project, which is never ours.
        installed = importlib.metadata.version("pyvtk") is not None
    except importlib.metadata.PackageNotFoundError:
        installed = False
    if beside_us or installed:
        raise ImportError(
            "pyvtk: the package 'PyVTK' (a tool for VTK files) is installed under the same import name and has mixed "
            "its files with those of visual-token-kernels. Uninstall both and install the one you want: "
            "pip uninstall PyVTK visual-token-kernels && pip install visual-token-kernels"
        )
