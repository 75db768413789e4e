"""The compressed weight as one value, and its conversions."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from pyvtk import checks
from pyvtk.ops import sparse24 as ops
from pyvtk.reference import sparse24 as reference
from pyvtk.sparse24 import vendor as cusparselt
from pyvtk.sparse24.copies import Copies, has_values, why_not_sealed

FORMAT_VERSION = 1
FEW, MANY, DENSE, VENDOR = range(4)  # kernels, as in ``choice``
DEFAULT = -1  # few or many, as the operator has it where there is no choice
LAYOUTS = ("cutlass", "cusparselt")


@dataclass(eq=False)
class Sparse24Weight:
    """A weight [out_features, in_features] of which two in every four neighbours along in_features are kept.

    Format, version 1 (``N`` = out_features, ``K`` = in_features, a multiple of 4):

    Attributes:
        values: float32, bfloat16, float16 or int8 [N, K / 2], contiguous: of every group of four the two kept
            entries, in ascending position. (float64 too, for tests: only the reference computes with it.)
        metadata: uint8 [N, ceil(K / 8)], contiguous: four bits for each group, the low ones first: p0 | p1 << 2, with
            the kept positions 0 <= p0 < p1 <= 3. The high four bits behind an odd number of groups are 0b0100.
        scales: float32 [N] for int8 values, whose weight is value * scales[n]; None otherwise.
        choice: which kernel runs from how many rows on, pairs (rows, kernel); see :func:`estimate`. Empty: the kernel
            for few rows below 8 (on CUDA 33), the one for many from there.

    Beside these a weight may hold copies of itself, ``dense``, ``vendor`` and ``transposed``, each None unless it was
    made and nothing was written since to values, metadata or scales, or put in their place. **What torch does not
    count is not seen**: after a write through ``.data`` (``values.data.mul_(2)``), by the replay of a CUDA graph or by
    another library that shares the memory, call :meth:`drop_copies`. Where torch counts nothing, there are no copies:
    of a weight made in inference mode, and of one whose values ask for a gradient (fused optimizers write uncounted; a
    product drops the copies that it finds). Copies stay behind in copy, deepcopy, pickle, dataclasses.replace and the
    state dict.

    A pytree of values, metadata and scales, so it passes through torch.export as well; these alone are part of the
    format and of :meth:`state_dict`.
    """

    values: Tensor
    metadata: Tensor
    scales: Tensor | None = None
    choice: tuple[int, ...] = ()
    _copies = None  # no field: Copies, once there are some

    @property
    def shape(self) -> torch.Size:
        """[out_features, in_features]"""
        return torch.Size((self.values.shape[0], 2 * self.values.shape[1]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dense(self) -> Tensor | None:
        """A dense copy for the row counts where ``choice`` prefers it; made by :meth:`cache_dense`."""
        copies = self.current_copies()
        return None if copies is None else copies.dense

    @property
    def vendor(self) -> Tensor | None:
        """The weight as cuSPARSELt wants it, opaque; made by :meth:`cache_vendor`."""
        copies = self.current_copies()
        return None if copies is None else copies.vendor

    @property
    def transposed(self) -> Sparse24Weight | None:
        """The compressed transpose; made by :meth:`with_transpose`."""
        copies = self.current_copies()
        return None if copies is None else copies.transposed

    @property
    def nbytes(self) -> int:
        """Everything that is held, the dense copy, the vendor's form and the transpose too."""
        tensors = (self.values, self.metadata, self.scales, self.dense, self.vendor)
        own = sum(t.numel() * t.element_size() for t in tensors if t is not None)
        return own + (0 if self.transposed is None else self.transposed.nbytes)

    def __repr__(self) -> str:
        more = "".join(f", {name}" for name in ("dense", "vendor", "transposed") if getattr(self, name) is not None)
        return f"Sparse24Weight({list(self.shape)}, {self.dtype}, {self.device}, {self.nbytes} bytes{more})"

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in _FIELDS}

    def __setstate__(self, state: dict) -> None:
        # by name: earlier versions stored copies, too
        self.__dict__.update({name: state[name] for name in _FIELDS})

    def decompress(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dense [N, K], bit for bit what was compressed; int8 values times their scales, as float32 or ``dtype``."""
        if self.scales is None:
            dense = ops.decompress(self.values, self.metadata)
            return dense if dtype is None else dense.to(dtype)
        return reference.weight_of(self.values, self.metadata, self.scales, dtype or torch.float32)

    def mask(self) -> Tensor:
        """bool [N, K], the kept positions (a kept weight may be 0)."""
        return ops.decompress(torch.ones_like(self.values, dtype=torch.int8), self.metadata).bool()

    def cache_dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dense copy [N, K] in ``dtype`` (of the values, or float32), made unless there is a current one. Not to be
        written to. RuntimeError: a weight whose writes torch does not count (see the class), or without numbers."""
        dtype = dtype or (torch.float32 if self.scales is not None else self.dtype)
        dense = self.dense
        if dense is None or dense.dtype != dtype:
            self._refuse_copies("cache_dense")
            with _making_copies():
                dense = self.decompress(dtype)
            self._keep("dense", dense)
        return dense

    def cache_vendor(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in cuSPARSELt's form, for x of ``dtype`` (of the values), made unless there is a current one.

        About 9/16 of a dense copy's bytes, and one for a moment. RuntimeError: as of :meth:`cache_dense`; cuSPARSELt is
        not there, or does not take this shape, dtype or device; the message says which.
        """
        dtype = dtype or self.dtype
        packed = self.vendor
        if packed is None or packed.dtype != dtype:
            reason = cusparselt.why_not(*self.shape, dtype, self.device)
            if reason is not None:
                raise RuntimeError(f"Sparse24Weight.cache_vendor: the vendor's kernel cannot run: {reason}")
            self._refuse_copies("cache_vendor")
            with _making_copies():
                packed = cusparselt.pack(self.decompress(dtype))
            self._keep("vendor", packed)
        return packed

    def with_transpose(self) -> Sparse24Weight:
        """The same weight that holds its compressed transpose too, for the gradient of x.

        Only what is not 0 counts: of four neighbours along out_features two at most (:func:`prune` with
        ``transposable=True`` makes such weights). After a write to the weight the transpose is gone, and the gradient
        of x right without it; call this again.

        ValueError: the weight is not 2:4 along out_features, with the place. RuntimeError: as of :meth:`cache_dense`.
        """
        op = "Sparse24Weight.with_transpose"
        if self.scales is not None:
            raise ValueError(f"{op}: values must be floating, as scales belong to rows, got int8")
        if self.shape[0] % 4:
            raise ValueError(f"{op}: weight must have out_features in multiples of 4, got {self.shape[0]}")
        self._refuse_copies("with_transpose")
        with _making_copies():
            dense = self.decompress().T.contiguous()
            mask = natural_mask(dense, f"{op}: weight must be 2:4 along out_features too", of_rows="column", of="rows")
            transposed = Sparse24Weight(*ops.compress(dense, mask, trusted=True))
        both = replace(self)
        both._keep("transposed", transposed)
        return both

    def drop_dense(self) -> None:
        """Free the dense copy, and the vendor's form."""
        copies = self.current_copies()
        self._copies = None
        if copies is not None and copies.transposed is not None:
            self._keep("transposed", copies.transposed)

    def drop_copies(self) -> None:
        """Free all copies: to be called after a write that torch does not count (``values.data.mul_(2)``)."""
        self._copies = None

    def current_copies(self) -> Copies | None:
        """What is held, if it still belongs to the weight; what does not is freed."""
        copies = self._copies
        if copies is not None and not copies.belong_to(self.values, self.metadata, self.scales):
            self._copies = copies = None
        return copies

    def _keep(self, name: str, copy: Tensor | Sparse24Weight) -> None:
        copies = self.current_copies()
        if copies is None:
            copies = self._copies = Copies()
        copies.keep(name, copy, self.values, self.metadata, self.scales)

    def why_no_copies(self) -> str | None:
        """Why no copy can be kept (nobody would see it go stale); None if one can."""
        for name in ("values", "metadata", "scales"):
            tensor = getattr(self, name)
            reason = None if tensor is None else why_not_sealed(tensor)
            if reason is not None:
                return f"{name} must be a plain tensor, whose writes torch counts, got {reason}"
        return None

    def _refuse_copies(self, method: str) -> None:
        reason = self.why_no_copies()
        if reason is not None:
            raise RuntimeError(f"Sparse24Weight.{method}: {reason}")

    def to(self, *args, **kwargs) -> Sparse24Weight:
        """On another device, or with values of another floating dtype (arguments as of Tensor.to). The transpose comes
        along, other copies are left behind."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if self.scales is not None and like.dtype != torch.int8:
            raise TypeError(f"Sparse24Weight.to: int8 values have no other dtype, got {like.dtype}; see decompress")
        if like.dtype not in ops.VALUES or (self.scales is None and like.dtype == torch.int8):
            raise TypeError(f"Sparse24Weight.to: dtype must be floating, got {like.dtype}; see quantize for int8")
        if (like.dtype, like.device) == (self.dtype, self.device):
            return self
        scales = None if self.scales is None else self.scales.to(like.device)
        values, metadata = self.values.to(like.device, like.dtype), self.metadata.to(like.device)
        moved = Sparse24Weight(values, metadata, scales, self.choice)
        if self.transposed is not None and moved.why_no_copies() is None:
            moved._keep("transposed", self.transposed.to(like.device, like.dtype))
        return moved

    def state_dict(self) -> dict[str, Tensor]:
        """Flat, contiguous tensors: "values", "metadata", "scales" for int8, and "format_version" int64 [1]."""
        state = {"values": self.values, "metadata": self.metadata}
        if self.scales is not None:
            state["scales"] = self.scales
        state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
        return state | {"format_version": torch.tensor([FORMAT_VERSION], device="cpu")}

    @staticmethod
    def from_state_dict(state: dict[str, Tensor]) -> Sparse24Weight:
        """What :meth:`state_dict` gave. KeyError: a tensor is missing. TypeError, ValueError: it does not fit, or its
        version is not one that this pyvtk reads."""
        op = "Sparse24Weight.from_state_dict"
        check_version(op, state["format_version"])
        values, metadata, scales = state["values"], state["metadata"], state.get("scales")
        ops.check_weight(op, values, metadata, scales)
        check_metadata(op, metadata, values.shape[1] // 2)
        return Sparse24Weight(values, metadata, scales)


@contextlib.contextmanager
def _making_copies():
    """Without gradient, and not as tensors of inference mode: a copy outlives the call that made it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def check_version(op: str, version: Tensor) -> None:
    if has_values(version) and int(version) != FORMAT_VERSION:
        raise ValueError(f"{op}: format_version must be {FORMAT_VERSION}, got {int(version)}")


def check_metadata(op: str, metadata: Tensor, groups: int) -> None:
    """Every group's positions ascend: kernels rely on it. The host waits once. (Without numbers, nothing to see.)"""
    if not has_values(metadata):
        return
    positions = reference._positions(metadata, groups)
    wrong = positions[..., 0] >= positions[..., 1]
    if wrong.any():
        row, group = wrong.nonzero()[0].tolist()
        got = positions[row, group].tolist()
        raise ValueError(f"{op}: metadata must hold ascending positions, got {got} in row {row}, group {group}")


_TENSORS = ("values", "metadata", "scales")
_FIELDS = (*_TENSORS, "choice")


def _flatten(weight: Sparse24Weight):
    return [getattr(weight, name) for name in _TENSORS], weight.choice


def _unflatten(tensors, choice) -> Sparse24Weight:
    return Sparse24Weight(*tensors, choice)


pytree.register_pytree_node(
    Sparse24Weight,
    _flatten,
    _unflatten,
    serialized_type_name="pyvtk.sparse24.Sparse24Weight",
    flatten_with_keys_fn=lambda weight: (
        [(pytree.GetAttrKey(name), getattr(weight, name)) for name in _TENSORS],
        weight.choice,
    ),
    # torch.export.save writes JSON, which has no tuples
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)
# torch.load and torch.export.load refuse classes that they were not told about
torch.serialization.add_safe_globals([Sparse24Weight])


def refuse_nan(op: str, name: str, value: Tensor) -> None:
    """ValueError that names the first NaN. The host waits once. (Without numbers, nothing to see.)"""
    if value.is_floating_point() and has_values(value) and value.isnan().any():
        where = tuple(value.isnan().nonzero()[0].tolist())
        raise ValueError(f"{op}: {name} must not hold NaN, got one at {where}")


def natural_mask(weight: Tensor, must: str, of_rows: str = "row", of: str = "columns") -> Tensor:
    """bool [N, K]: the two entries of each group that a 2:4 weight keeps. Entries other than 0 come first, then -0.0,
    which has a sign to lose, then lower positions. ValueError, beginning with ``must``: more than two are not 0."""
    groups = weight.reshape(weight.shape[0], weight.shape[1] // 4, 4)
    nonzero = groups != 0
    crowded = nonzero.sum(-1) > 2
    if has_values(weight) and crowded.any():
        row, group = crowded.nonzero()[0].tolist()
        count, others = int(nonzero[row, group].sum()), int(crowded.sum()) - 1
        raise ValueError(
            f"{must}, got {count} entries other than 0 in {of_rows} {row}, {of} {4 * group} to {4 * group + 3} "
            f"(and {others} more such groups); prune gives a mask"
        )
    order = nonzero.to(torch.int8) * 2
    if weight.is_floating_point():
        order = order + (groups.signbit() & ~nonzero)
    return reference.prune_n_of_m(order.reshape(weight.shape), 2, 4)


def compress(weight: Tensor, mask: Tensor | None = None, scales: Tensor | None = None) -> Sparse24Weight:
    """Keep two of every four neighbours along in_features, and forget where the zeros were.

    Lossless: :meth:`Sparse24Weight.decompress` gives back weight * mask bit for bit, kept zeros, -0.0 and infinities
    included. (Without a mask a -0.0 beside two other entries comes back as 0.0.)

    Args:
        weight: floating or int8 [out_features, in_features], in_features a multiple of 4; any strides.
        mask: bool, shaped like weight, exactly two in every group of four (:func:`prune`). None: weight must be 2:4
            as it is, which means at most two entries other than 0 in each group.
        scales: float32 [out_features], for int8 weights and only for these.

    Raises:
        TypeError, ValueError: an argument that does not fit; a group that is not 2:4, or a NaN, with its place.

    The host waits for the device. A weight without numbers (meta, fake) gives one of its shape.
    """
    op = "sparse24.compress"
    checks.tensor(op, "weight", weight, 2)
    checks.dtype(op, "weight", weight, ops.VALUES)
    if weight.shape[1] % 4:
        raise ValueError(f"{op}: weight must have in_features in multiples of 4, got {weight.shape[1]}")
    refuse_nan(op, "weight", weight)
    if mask is None:
        mask = natural_mask(weight.detach(), f"{op}: weight must be 2:4 where no mask is given")
    elif isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == weight.shape:
        counts = mask.reshape(weight.shape[0], weight.shape[1] // 4, 4).sum(-1)
        if has_values(mask) and (counts != 2).any():
            row, group = (counts != 2).nonzero()[0].tolist()
            raise ValueError(
                f"{op}: mask must have exactly two in every group of four, got {int(counts[row, group])} in row {row}, "
                f"columns {4 * group} to {4 * group + 3}"
            )
    # it was looked at above; what is no mask at all, the page refuses
    values, metadata = ops.compress(weight, mask, trusted=True)
    ops.check_weight(op, values, metadata, scales)
    return Sparse24Weight(values, metadata, scales)


# torch's SparseSemiStructuredTensor. Its CUTLASS layout holds our bits in another order: 16 of them (32 for int8) are
# one element of meta, and these elements are permuted. float32 is 1:2 there, written as pairs of 16-bit halves.


def _meta_offsets(rows: int, columns: int, dtype: torch.dtype, device) -> Tensor:
    from torch.sparse._semi_structured_conversions import _calculate_meta_reordering_scatter_offsets as offsets

    return offsets(rows, columns, dtype, device)


def from_torch(tensor: torch.Tensor, scales: Tensor | None = None) -> Sparse24Weight:
    """The same weight as a torch.sparse.SparseSemiStructuredTensor.

    The CUTLASS layout is read on any device, with the kept positions as they are. What else there is (the cuSPARSELt
    layout, which is opaque, and tensors of torch's run-time pruning) goes through ``tensor.to_dense()``, a product that
    torch runs only on a GPU with the library that packed it; an infinity becomes NaN there, which is an error here.

    Args:
        tensor: SparseSemiStructuredTensorCUTLASS or ...CUSPARSELT [out_features, in_features].
        scales: float32 [out_features] of int8 values; torch keeps none.

    Raises:
        TypeError, ValueError: not such a tensor, or scales do not fit. RuntimeError: this needs a GPU.
    """
    op = "sparse24.from_torch"
    if not isinstance(tensor, torch.sparse.SparseSemiStructuredTensor):
        raise TypeError(f"{op}: tensor must be a SparseSemiStructuredTensor, got {type(tensor).__name__}")
    packed, meta = tensor.packed, tensor.meta
    if tensor.BACKEND == "cutlass" and packed is not None and meta is not None and meta.dim() == 2:
        flat = meta.reshape(-1).gather(0, _meta_offsets(*meta.shape, meta.dtype, meta.device))
        metadata = flat.reshape(meta.shape).contiguous().view(torch.uint8)
        if tensor.dtype == torch.float32:
            # a byte for each group of four: the second bit of each half says which of a pair is kept
            metadata = reference.pack(torch.stack([metadata >> 1 & 1, 2 + (metadata >> 5 & 1)], -1))
        ops.check_weight(op, packed.contiguous(), metadata, scales)
        refuse_nan(op, "tensor", packed)
        return Sparse24Weight(packed.contiguous(), metadata, scales)
    if not tensor.is_cuda:
        raise RuntimeError(
            f"{op}: a tensor of backend {tensor.BACKEND!r} on {tensor.device} cannot be read: torch unpacks this "
            "layout only by a product on a GPU"
        )
    return compress(tensor.to_dense(), scales=scales)


def to_torch(weight: Sparse24Weight, layout: str = "cutlass") -> torch.sparse.SparseSemiStructuredTensor:
    """The same weight as a torch.sparse.SparseSemiStructuredTensor (scales are left out: torch keeps none).

    Args:
        weight: of a shape that torch's backend takes (16-bit CUTLASS: multiples of 32 and 64).
        layout: "cutlass": made on any device, though torch multiplies with it only on a GPU. float32 is 1:2 there, so
            neither half of a group of four may have two entries other than 0. "cusparselt": packed by torch, which
            needs a GPU and the library.

    Raises:
        TypeError, ValueError: dtype, shape or pattern that torch's backend does not take. RuntimeError: needs a GPU.
    """
    op = "sparse24.to_torch"
    checks.choice(op, "layout", layout, LAYOUTS)
    cls = {
        "cutlass": torch.sparse.SparseSemiStructuredTensorCUTLASS,
        "cusparselt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
    }[layout]
    if weight.dtype not in cls._DTYPE_SHAPE_CONSTRAINTS:
        raise TypeError(f"{op}: weight must have a dtype that torch's {layout} backend takes, got {weight.dtype}")
    constraint = cls._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    multiples = (constraint.sparse_min_rows, constraint.sparse_min_cols)
    rows, columns = weight.shape
    if not rows or not columns or rows % multiples[0] or columns % multiples[1]:
        raise ValueError(
            f"{op}: weight of {weight.dtype} must have a shape in multiples of {multiples} for torch's {layout} "
            f"backend, got {[rows, columns]}"
        )
    if layout == "cusparselt":
        if weight.device.type != "cuda":
            raise RuntimeError(f"{op}: torch packs the cusparselt layout on a GPU, got a weight on {weight.device}")
        return cls.from_dense(ops.decompress(weight.values, weight.metadata))
    if weight.dtype == torch.float32:
        pairs = weight.decompress().reshape(rows, columns // 2, 2)
        crowded = (pairs != 0).all(-1)
        if has_values(pairs) and crowded.any():
            row, pair = crowded.nonzero()[0].tolist()
            raise ValueError(
                f"{op}: weight of float32 must be 1:2 for torch's cutlass backend, got two entries other than 0 in row "
                f"{row}, columns {2 * pair} and {2 * pair + 1}"
            )
        second = pairs[..., 1] != 0
        packed = torch.where(second, pairs[..., 1], pairs[..., 0])
        halves = torch.where(second, 0b1110, 0b0100).to(torch.uint8)
        metadata = halves[:, 0::2] | halves[:, 1::2] << 4
    else:
        packed, metadata = weight.values, weight.metadata
    plain = metadata.view(torch.int32 if weight.dtype == torch.int8 else torch.int16)
    offsets = _meta_offsets(*plain.shape, plain.dtype, plain.device)
    meta = torch.empty_like(plain).reshape(-1).scatter(0, offsets, plain.reshape(-1)).reshape(plain.shape)
    return cls(weight.shape, packed, meta, None, None, None)
