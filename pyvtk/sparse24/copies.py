"""What is derived from tensors and kept, and whether it still belongs to them: one place decides.

torch counts the writes to a tensor (its version), and a :class:`Seal` is a look at these counts. What torch does not
count, nobody sees: writes through ``.data``, by the replay of a CUDA graph, or by whoever shares the memory (numpy,
DLPack). Whoever writes so has to say so: :meth:`Sparse24Weight.drop_copies`, :meth:`Linear24.refresh`. Fused optimizers
are not counted either, so nothing is kept of a weight that asks for a gradient.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake


def has_values(tensor: Tensor) -> bool:
    """Whether it holds numbers that can be asked for: not on the meta device, not fake."""
    return not tensor.is_meta and not is_fake(tensor)


def why_not_sealed(tensor: Tensor) -> str | None:
    """Why nobody would see that the tensor is written to; None if torch counts that."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "a tensor that a transform of torch.func has wrapped"
    if not has_values(tensor):
        return "a tensor without numbers (meta or fake)"
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.requires_grad:
        return "one that asks for a gradient, which a fused optimizer writes to uncounted"
    if tensor.is_inference():
        return "a tensor of inference mode, whose writes torch does not count"
    return None


class Seal:
    """What some tensors hold now. A write to one of them, other memory or another tensor in its place breaks it."""

    def __init__(self, *tensors: Tensor | None):
        self._seen = [None if t is None else (weakref.ref(t), t._version, t.data_ptr()) for t in tensors]

    def holds(self, *tensors: Tensor | None) -> bool:
        """Whether these are the tensors, or views of all of each, as they were. None that asks for a gradient is."""
        for seen, tensor in zip(self._seen, tensors):
            if seen is None or tensor is None:
                if seen is not tensor:
                    return False
                continue
            known, version, address = seen
            if tensor is not known() and not _same(tensor, known()):
                return False
            if tensor._version != version or tensor.data_ptr() != address or tensor.requires_grad:
                return False
        return True


def _same(tensor: Tensor, known: Tensor | None) -> bool:
    """Whether ``tensor`` is another object for the same numbers, as compiled code is handed."""
    return (
        known is not None and why_not_sealed(tensor) is None and tensor.data_ptr() == known.data_ptr()
        and tensor.dtype == known.dtype and tensor.shape == known.shape and tensor.stride() == known.stride()
    )  # fmt: skip


class Copies:
    """The dense copy, the vendor's form and the compressed transpose of one weight, as it was when they were made."""

    def __init__(self):
        self.dense = self.vendor = self.transposed = None

    def keep(self, name: str, copy, *sources: Tensor | None) -> None:
        """``copy`` was made of ``sources``, to which those that are kept already belong."""
        setattr(self, name, copy)
        self._own = [copy for copy in (self.dense, self.vendor) if copy is not None]
        if self.transposed is not None:
            self._own += [self.transposed.values, self.transposed.metadata]
        self._seal = Seal(*sources, *self._own)
        _of_copy[(copy if isinstance(copy, Tensor) else copy.values).data_ptr()] = self

    def belong_to(self, *sources: Tensor | None) -> bool:
        """Whether neither the weight nor a copy was written to since."""
        return self._seal.holds(*sources, *self._own)


# Address of a copy -> its Copies; of a mask -> its Seal. torch.compile cannot ask for versions while it traces, so the
# operators that compiled code calls ask here when they run, by the tensors that they are given.
_of_copy: weakref.WeakValueDictionary[int, Copies] = weakref.WeakValueDictionary()
_of_mask: weakref.WeakValueDictionary[int, Seal] = weakref.WeakValueDictionary()


def is_current(copy: Tensor, *sources: Tensor | None) -> bool:
    """Whether ``copy`` (the values of a transpose) was made of ``sources`` as they are."""
    owner = _of_copy.get(copy.data_ptr())
    return owner is not None and owner.belong_to(*sources)


def seal_mask(mask: Tensor) -> Seal:
    """Products may trust the mask as long as the seal is kept and holds."""
    seal = _of_mask[mask.data_ptr()] = Seal(mask)
    return seal


def is_sealed_mask(mask: Tensor) -> bool:
    seal = _of_mask.get(mask.data_ptr())
    return seal is not None and seal.holds(mask)
