"""The calls of tests/calls themselves: what a device runs without the host, they leave to the device.

That no host waits and that CUDA graphs can be captured is tested on a GPU (tests/test_cuda.py); a call that makes a
tensor from numbers of the host, or asks a tensor for one, breaks it without any kernel's fault. That shows here.
"""

import pytest
import torch
from calls import CALLS
from calls.call import make
from torch.utils._python_dispatch import TorchDispatchMode

from pyvtk import layout, plans

# what copies between host and device, or makes a size of a tensor's values
FORBIDDEN = {
    "aten::lift_fresh",
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::equal",
}


class OnTheDevice(TorchDispatchMode):
    """Refuses what the host would have to wait for."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name
        assert name not in FORBIDDEN, f"{name}: the host would wait"
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            places = [x for x in arguments[1] if x is not None]
            assert all(x.dtype != torch.bool for x in places), f"{name} by a mask: the host would wait"
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", [name for name, call in CALLS.items() if not call.waits])
def test_leaves_all_to_the_device(name, monkeypatch):
    for module in (layout, plans):
        monkeypatch.setattr(module, "require", lambda condition, *_, **__: torch._assert_async(condition))  # on a GPU
    inputs = make(CALLS[name], device="cpu")
    with OnTheDevice():
        CALLS[name].run(None, *inputs)


def test_what_is_refused():
    x = torch.zeros(3)
    for waits in (
        lambda: torch.tensor([1.0], device=x.device),
        lambda: x[0].item(),
        lambda: bool(x.sum() > 0),
        lambda: x[x > 0],
        lambda: x.new_tensor([1]),
        lambda: torch.as_tensor([1, 2]),
    ):
        with pytest.raises(AssertionError, match="the host would wait"), OnTheDevice():
            waits()
