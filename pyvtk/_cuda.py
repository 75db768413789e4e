"""What the driver and the devices of this machine take of libpyvtk_cuda.so.

CUDA's runtime is linked into the library, so it is the driver that has to be new enough, whatever torch was built with.
Versions of CUDA are numbers as CUDA has them, 13000 for 13.0.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

# The first driver that takes a major version of CUDA. It takes all of its minor versions.
_DRIVERS = {13: 580}
# CUDA's errors for code that a device cannot run: not there, in PTX that is wrong or too new or cannot be compiled
_NO_CODE = (98, 209, 218, 221, 222, 223)

_library: ctypes.CDLL | None = None
_driver = 0  # version of CUDA that the driver has; 0: there is no driver, or nobody has asked
# number of a device -> why it cannot run the library's code (None: it can); filled when a device is first asked for
_device_errors: dict[int, str | None] = {}


def attach(path: Path) -> str | None:
    """Why the driver does not take this library, which is loaded; None if it does.

    None also without any driver: then there are no CUDA tensors either, and operators can be looked at and traced.
    """
    global _library, _driver
    _library = ctypes.CDLL(str(path))
    try:
        runtime = _library.pyvtk_cuda_runtime()
    except AttributeError:
        return f"{path.name} is of another version of pyvtk"
    _driver = _version_of_driver()
    major = runtime // 1000
    if _driver == 0 or _driver // 1000 >= major:
        return None
    which = f" ({_DRIVERS[major]} or newer)" if major in _DRIVERS else ""
    return (
        f"{path.name} was built with CUDA {_text(runtime)} and needs an NVIDIA driver for CUDA {major}{which}; "
        f"the one of this machine is for CUDA {_text(_driver)}"
    )


def _version_of_driver() -> int:
    """Without CUDA's runtime: its question for the version begins CUDA, and then processes cannot fork any more."""
    version = ctypes.c_int(0)
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return 0 if failed else version.value


def _text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def driver() -> str | None:
    """Version of CUDA that the driver has, as "13.0"; None if there is no driver, or no library that needs one."""
    return _text(_driver) if _driver else None


def no_code(index: int | None) -> str | None:
    """Why the device of this number cannot run the library's code; None if it can, or as long as CUDA has not begun."""
    if index is None or index in _device_errors:
        return _device_errors.get(index)
    if _library is None or not torch.cuda.is_initialized():
        return None
    with torch.cuda.device(index):
        status = _library.pyvtk_cuda_code()
    _device_errors[index] = None
    if status in _NO_CODE:
        major, minor = torch.cuda.get_device_capability(index)
        _device_errors[index] = (
            f"libpyvtk_cuda.so was built without code for {torch.cuda.get_device_name(index)}, "
            f"compute capability {major}.{minor} (TORCH_CUDA_ARCH_LIST chooses)"
        )
    return _device_errors[index]


# torch.compile cannot trace a question to CUDA: it takes the answer. torch.compiler.assume_constant_result says the
# same, and imports the compiler on the spot: a second of every start.
no_code._dynamo_marked_constant = True
