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
from pyvtk.ops.compact import compact, compact_kv_, restore
from pyvtk.ops.merge import merge_tokens
from pyvtk.ops.score import attention_scores
from pyvtk.ops.score_and_select import score_and_select
from pyvtk.ops.select import select
from pyvtk.selection import Selection

backends.complete()

__all__ = [
    "Selection",
    "__version__",
    "attention_scores",
    "compact",
    "compact_kv_",
    "info",
    "merge_tokens",
    "restore",
    "score_and_select",
    "select",
]
