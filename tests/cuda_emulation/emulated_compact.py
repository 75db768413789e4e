"""The operators of the compact family by the emulated CUDA kernels: arguments as in pyvtk/reference/compact.py."""

from __future__ import annotations

import ctypes

import torch
from emulated import FREE, MALLOC, Call, number
from torch import Tensor

# Number of csrc/cuda/compact.cuh
NUMBERS = {
    torch.float32: 1, torch.complex64: 1, torch.float64: 2, torch.complex128: 2, torch.float16: 3, torch.bfloat16: 4,
}  # fmt: skip


class TensorOf(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("rank", number), ("element", number), ("sizes", number * 8),
        ("strides", number * 8),
    ]  # fmt: skip


class SelectionOf(ctypes.Structure):
    _fields_ = [
        ("indices", ctypes.c_void_p), ("counts", ctypes.c_void_p), *((name, number) for name in (
            "batch", "heads", "has_heads", "capacity", "tokens", "total", "align_right",
        )),
    ]  # fmt: skip


class Placed:
    """A tensor's elements with its strides, in malloc'ed memory that ends where its last element does. ``offset``
    bytes stand before the first one. What lies between elements may not be written."""

    def __init__(self, tensor: Tensor, offset: int = 0):
        self.like, self.offset = tensor, offset
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) if tensor.numel() else -1
        self.storage = tensor.as_strided((last + 1,), (1,)).clone()
        self.tensor = self.storage.as_strided(tensor.shape, tensor.stride()) if tensor.numel() else tensor
        self.between = self.storage.clone()
        self.bytes = self.storage.numel() * tensor.element_size()
        self.address = MALLOC(self.bytes + offset)
        ctypes.memmove(self.address + offset, self.storage.data_ptr(), self.bytes)

    def of(self) -> TensorOf:
        shape, strides = self.like.shape, self.like.stride()
        pad = [0] * (8 - len(shape))
        axes = ((number * 8)(*shape, *pad), (number * 8)(*strides, *pad))
        return TensorOf(self.address + self.offset, len(shape), self.like.element_size(), *axes)

    def read(self) -> Tensor:
        """The tensor, after checking that nothing was written between its elements."""
        ctypes.memmove(self.storage.data_ptr(), self.address + self.offset, self.bytes)
        result = self.tensor.clone()
        if self.tensor.numel():
            self.between.as_strided(self.like.shape, self.like.stride()).copy_(result)
            assert torch.equal(self.between.view(torch.uint8), self.storage.view(torch.uint8)), (
                "written between elements"
            )
        return result

    def __del__(self):
        FREE(self.address)


def like_new(shape, tensor: Tensor, offset: int = 0) -> Placed:
    """Room for a result, full of what nobody writes."""
    size = tensor.element_size() * torch.Size(shape).numel()
    return Placed(torch.full((size,), 0xFD, dtype=torch.uint8).view(tensor.dtype).view(shape), offset)


def listed(values) -> ctypes.Array:
    return (number * max(len(values), 1))(*values)


def tensors_of(placed) -> ctypes.Array:
    return (TensorOf * max(len(placed), 1))(*(one.of() for one in placed))


def selection_of(call: Call, indices, counts, align_right, tokens, total=None) -> SelectionOf:
    heads = indices.shape[1] if indices.dim() == 3 else 1
    return SelectionOf(
        call.pointer(indices), call.pointer(counts), indices.shape[0], heads, indices.dim() == 3, indices.shape[-1],
        tokens, -1 if total is None else total, align_right,
    )  # fmt: skip


def compact(indices, counts, align_right, tensors, dims, batch_dims, pads, total, offset: int = 0) -> list[Tensor]:
    """``offset``: bytes by which every tensor misses an address that is a multiple of 16."""
    call = Call()
    selection = selection_of(call, indices, counts, align_right, tensors[0].shape[dims[0]], total)
    with torch.device("meta"):
        shapes = [
            x.shape
            for x in torch.ops.pyvtk.compact(
                indices.to("meta"), counts.to("meta"), align_right, [x.to("meta") for x in tensors], dims, batch_dims,
                pads, total,
            )
        ]  # fmt: skip
    placed, outs = [Placed(x, offset) for x in tensors], [like_new(s, x, offset) for s, x in zip(shapes, tensors)]
    pad_bytes = b""
    for x, pad in zip(tensors, pads):
        value = torch.full((1,), pad, dtype=x.dtype).view(torch.uint8)
        pad_bytes += bytes(value.tolist()) * (16 // len(value))
    call(
        "emulated_compact", ctypes.byref(selection), number(len(tensors)), tensors_of(placed), tensors_of(outs),
        listed(dims), listed(batch_dims), pad_bytes,
    )  # fmt: skip
    return [out.read() for out in outs]


def compact_backward(
    indices, counts, align_right, grads, dims, batch_dims, batch_sizes, num_tokens, total, offset: int = 0
) -> list[Tensor]:
    call = Call()
    selection = selection_of(call, indices, counts, align_right, num_tokens, total)
    shapes = [
        x.shape
        for x in torch.ops.pyvtk.compact_backward(
            indices.to("meta"), counts.to("meta"), align_right, [x.to("meta") for x in grads], dims, batch_dims,
            batch_sizes, num_tokens, total,
        )
    ]  # fmt: skip
    placed, outs = [Placed(x, offset) for x in grads], [like_new(s, x, offset) for s, x in zip(shapes, grads)]
    merged = [b < 0 or (size == 1 and indices.shape[0] != 1) for b, size in zip(batch_dims, batch_sizes)]
    call(
        "emulated_compact_backward", ctypes.byref(selection), number(len(grads)), tensors_of(placed), tensors_of(outs),
        listed(dims), listed(batch_dims), listed(merged), listed([NUMBERS[x.dtype] for x in grads]),
    )  # fmt: skip
    return [out.read() for out in outs]


def restore(
    indices, counts, align_right, update, base, gate, dim, num_tokens, packed_source, offset: int = 0
) -> Tensor:
    call = Call()
    selection = selection_of(call, indices, counts, align_right, num_tokens)
    if base is None:
        shape = list(update.shape)[int(packed_source) :]
        shape[dim] = num_tokens
    else:
        shape = base.shape
    like = update if base is None else base
    out, placed = like_new(shape, like, offset), [None if x is None else Placed(x, offset) for x in (update, base)]
    call(
        "emulated_restore", ctypes.byref(selection), *(None if x is None else ctypes.byref(x.of()) for x in placed),
        ctypes.byref(out.of()), call.pointer(gate), int(gate is not None and gate.dtype == torch.float64), number(dim),
        int(packed_source), number(NUMBERS.get(like.dtype, 0)),
    )  # fmt: skip
    return out.read()


def restore_backward(
    indices, counts, align_right, grad, update, gate, dim, packed_source, offset: int = 0
) -> tuple[Tensor, Tensor]:
    call = Call()
    selection = selection_of(call, indices, counts, align_right, grad.shape[dim])
    shape = list(grad.shape)
    shape[dim] = indices.shape[-1]
    out = like_new([indices.shape[0], *shape] if packed_source else shape, grad, offset)
    grad_gate = Placed(torch.empty(0) if gate is None else torch.full_like(gate, -7))
    placed = Placed(grad, offset), None if update is None else Placed(update, offset)
    call(
        "emulated_restore_backward", ctypes.byref(selection),
        *(None if x is None else ctypes.byref(x.of()) for x in placed), ctypes.byref(out.of()), call.pointer(gate),
        int(gate is not None and gate.dtype == torch.float64), ctypes.c_void_p(grad_gate.address), number(dim),
        int(packed_source), number(NUMBERS.get(grad.dtype, 0)),
    )  # fmt: skip
    return out.read(), grad_gate.read()


def compact_kv_(indices, counts, caches, offset: int = 0) -> list[Tensor]:
    """What the caches hold afterwards."""
    call = Call()
    selection = selection_of(call, indices, counts, False, caches[0].shape[2])
    placed = [Placed(cache, offset) for cache in caches]
    call("emulated_compact_kv", ctypes.byref(selection), number(len(caches)), tensors_of(placed))
    return [cache.read() for cache in placed]
