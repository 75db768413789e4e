"""Drop visual tokens of models of Hugging Face transformers::

    from pyvtk.integrations import transformers as vtk

    handle = vtk.accelerate(model, vtk.FastV(layer=2, keep=0.5))
    model.generate(**inputs)
    print(handle)
    handle.remove()

transformers 5.20 to 5.24 are tested. Importing this module needs transformers; ``import pyvtk`` does not.
"""

import transformers

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20):
    raise ImportError(f"{__name__} needs transformers 5.20 or newer, got {transformers.__version__}")

from pyvtk.integrations.transformers.handle import Handle, accelerate, restore
from pyvtk.integrations.transformers.heads import calibrate_heads
from pyvtk.integrations.transformers.methods import (
    YOPO,
    Context,
    DivPrune,
    FastV,
    Feather,
    HiRED,
    Method,
    PyramidDrop,
    SnapKV,
    Stage,
    VisionZip,
)

__all__ = [
    "YOPO",
    "Context",
    "DivPrune",
    "FastV",
    "Feather",
    "Handle",
    "HiRED",
    "Method",
    "PyramidDrop",
    "SnapKV",
    "Stage",
    "VisionZip",
    "accelerate",
    "calibrate_heads",
    "restore",
]
