"""The emulated kernels as functions of tensors, through the C interface of library.cpp."""

from __future__ import annotations

import ctypes
import math
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


def select(
    scores: Tensor, num_keep, num_keep_per_row, threshold, top_p, keep, drop, candidates, keep_others, segments,
    num_segments, cu_seqlens, capacity, align_right, by_score,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator pyvtk::select by the CUDA kernel; arguments as in pyvtk/reference/select.py."""
    lead = tuple(scores.shape[:-1]) if cu_seqlens is None else (cu_seqlens.shape[0] - 1,)
    rows, tokens = math.prod(lead), scores.shape[-1]
    heads = scores.shape[1] if scores.dim() == 3 else 1
    outputs = [
        Exact(torch.full((*lead, capacity), -7)),
        Exact(torch.full(lead, -7, dtype=torch.int32)),
        Exact(torch.zeros(lead, dtype=torch.bool)),
    ]
    held = []

    def pointer(value: Tensor | None, dtype: torch.dtype | None = None) -> ctypes.c_void_p:
        if value is None:
            return ctypes.c_void_p()
        held.append(Exact(value if dtype is None else value.to(dtype)))
        return ctypes.c_void_p(held[-1].address)

    def per_token(value: Tensor | None, dtype: torch.dtype) -> list:
        shared = value is not None and value.dim() < scores.dim()
        return [pointer(value, dtype), ctypes.c_int64(heads if shared else 1)]

    def per_group(value: Tensor | None, dtype: torch.dtype) -> list:
        return [pointer(value, dtype), ctypes.c_int64(1 if value is None else value.shape[1])]

    number = ctypes.c_int64
    status = library().emulated_select(
        DTYPES.index(scores.dtype), pointer(scores), number(rows), number(heads), number(tokens),
        number(heads * tokens), number(tokens), pointer(cu_seqlens, torch.int32),
        number(num_keep), *per_group(num_keep_per_row, torch.int64), *per_group(threshold, torch.float32),
        *per_group(top_p, torch.float64), *per_token(keep, torch.bool), *per_token(drop, torch.bool),
        *per_token(candidates, torch.bool), int(keep_others), *per_token(segments, torch.int32), number(num_segments),
        number(capacity), int(align_right), int(by_score), *(ctypes.c_void_p(output.address) for output in outputs),
    )  # fmt: skip
    assert status == 0, library().emulation_error().decode()
    return tuple(output.read() for output in outputs)
