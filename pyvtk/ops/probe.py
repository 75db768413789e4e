"""``probe_``: does the CUDA library hold code that the current device can run?"""

from __future__ import annotations

import torch

from pyvtk import backends

backends.define("probe_", "(Tensor(a!) out) -> ()", fake=lambda out: None, dtypes=(torch.int32,))


def probe(device: torch.device) -> str | None:
    """Run a kernel of one line on ``device``; None if it ran, else CUDA's reason why it did not."""
    if (error := backends.why_not("probe_", "compiled", device)) is not None:
        return error
    out = torch.zeros(64, dtype=torch.int32, device=device)
    try:
        torch.ops.pyvtk.probe_(out)
        return None if bool((out == 1).all()) else "the kernel ran but wrote nothing"
    except RuntimeError as error:
        return str(error)
