"""Kernels for visual tokens: score, select, compact. Every public name is listed here; README.md shows their use."""

from pyvtk import _identity

_identity.check()

# isort: split
from pyvtk import backends

# Pages define their operators on import; the libraries bring the kernels.
backends.load_libraries()

# isort: split
from pyvtk._version import __version__
from pyvtk.backends import info
from pyvtk.ops import probe as _probe
from pyvtk.ops.compact import compact, compact_kv_, merge_tokens, restore
from pyvtk.selection import Selection

backends.complete()

__all__ = ["Selection", "__version__", "compact", "compact_kv_", "info", "merge_tokens", "restore"]
