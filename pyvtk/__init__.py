"""Kernels for visual tokens: score, select, compact. Every public name is listed here; README.md shows their use."""

from pyvtk import _identity

_identity.check()

# isort: split
from pyvtk import backends

# Pages define their operators on import; the libraries bring the kernels.
backends.load_libraries()

# isort: split
from pyvtk import sparse24
from pyvtk._version import __version__
from pyvtk.backends import info
from pyvtk.layout import ImageSpan, TokenLayout
from pyvtk.ops import probe as _probe
from pyvtk.ops.attention import merge_attention, neighbor_attention
from pyvtk.ops.compact import compact, compact_kv_, restore
from pyvtk.ops.merge import merge_tokens
from pyvtk.ops.score import attention_scores
from pyvtk.ops.score_and_select import score_and_select
from pyvtk.ops.select import select
from pyvtk.ops.text_attention import text_attention
from pyvtk.plans import AttentionPlan, neighbor_plan, routed_plan, subset_plan, window_plan
from pyvtk.selection import Selection

backends.complete()

__all__ = [
    "AttentionPlan",
    "ImageSpan",
    "Selection",
    "TokenLayout",
    "__version__",
    "attention_scores",
    "compact",
    "compact_kv_",
    "info",
    "merge_attention",
    "merge_tokens",
    "neighbor_attention",
    "neighbor_plan",
    "restore",
    "routed_plan",
    "score_and_select",
    "select",
    "sparse24",
    "subset_plan",
    "text_attention",
    "window_plan",
]
