"""2:4 sparse weights: prune, compress, multiply, train, quantise, and know before whether it pays."""

from pyvtk.ops.sparse24 import ACTIVATIONS
from pyvtk.sparse24.cost import Estimate, calibrate, estimate, table_path
from pyvtk.sparse24.format import FORMAT_VERSION, Sparse24Weight, compress, from_torch, to_torch
from pyvtk.sparse24.int8 import ActivationObserver, calibrate_activations, fake_quantize, quantize
from pyvtk.sparse24.modules import Sparse24Linear, linear, linear_int8
from pyvtk.sparse24.pruning import input_norms, prune, taylor_scores, wanda_scores
from pyvtk.sparse24.sparsify import LayerReport, load_sparsified_, sparsify_
from pyvtk.sparse24.training import ExponentialDecay, Linear24, LinearDecay, step_24, structure_decay

__all__ = [
    "ACTIVATIONS",
    "FORMAT_VERSION",
    "ActivationObserver",
    "Estimate",
    "ExponentialDecay",
    "LayerReport",
    "Linear24",
    "LinearDecay",
    "Sparse24Linear",
    "Sparse24Weight",
    "calibrate",
    "calibrate_activations",
    "compress",
    "estimate",
    "fake_quantize",
    "from_torch",
    "input_norms",
    "linear",
    "linear_int8",
    "load_sparsified_",
    "prune",
    "quantize",
    "sparsify_",
    "step_24",
    "structure_decay",
    "table_path",
    "taylor_scores",
    "to_torch",
    "wanda_scores",
]
