"""Kernels for visual tokens: score, select, compact. See README.md; every public name is listed here."""

from pyvtk import _identity  # isort: skip  (first: it refuses to run inside another package's folder)
from pyvtk import backends
from pyvtk._version import __version__

_identity.check()
backends.load_libraries()

from pyvtk.backends import info

backends.complete()

__all__ = ["__version__", "info"]
