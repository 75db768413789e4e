"""The emulated kernels for tests in Python: the library, its memory and its errors."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

if "PYVTK_EMULATION_BUILD" not in os.environ:
    pytest.skip("run by make emulate, emulate-asan and emulate-tsan", allow_module_level=True)
BUILD = Path(os.environ["PYVTK_EMULATION_BUILD"])
SANITIZER = re.search("^PYVTK_SANITIZE:.*=(.*)", (BUILD / "CMakeCache.txt").read_text(), re.M).group(1)
DECLARED = 32 * 1024  # bytes of shared memory that launchers take every kernel to declare: Options in cuda_emulation.h
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

MALLOC, FREE = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
MALLOC.argtypes, MALLOC.restype = [ctypes.c_size_t], ctypes.c_void_p
FREE.argtypes = [ctypes.c_void_p]

_loaded = None


def library() -> ctypes.CDLL:
    global _loaded
    if _loaded is None:
        _loaded = ctypes.CDLL(str(BUILD / "libpyvtk_emulated.so"))
        _loaded.emulation_error.restype = ctypes.c_char_p
    return _loaded


def configure(seed: int = 0, blocks_alive: int = 1, shared_bytes: int = 0) -> None:
    """How the launches that follow run; see Options in cuda_emulation.h."""
    library().emulation_configure(ctypes.c_uint64(seed), blocks_alive, ctypes.c_int64(shared_bytes))


class Exact:
    """A tensor's data in malloc'ed memory of exactly its size, so that AddressSanitizer sees the ends of it."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor.contiguous()
        self.bytes = self.tensor.numel() * self.tensor.element_size()
        self.address = MALLOC(self.bytes)
        ctypes.memmove(self.address, self.tensor.data_ptr(), self.bytes)

    def read(self) -> Tensor:
        ctypes.memmove(self.tensor.data_ptr(), self.address, self.bytes)
        return self.tensor

    def __del__(self):
        FREE(self.address)


number = ctypes.c_int64


class Call:
    """Arguments of one call; keeps the memory that they point to until it has returned."""

    def __init__(self):
        self.held: list[Exact] = []

    def pointer(self, value: Tensor | None, dtype: torch.dtype | None = None) -> ctypes.c_void_p:
        """A copy of the tensor's data, converted if asked to; None is a null pointer."""
        if value is None:
            return ctypes.c_void_p()
        self.held.append(Exact(value if dtype is None else value.to(dtype)))
        return ctypes.c_void_p(self.held[-1].address)

    def __call__(self, function: str, *arguments) -> None:
        status = getattr(library(), function)(*arguments)
        assert status == 0, library().emulation_error().decode()
