"""Selection: which tokens of each sample stay, with static sizes and no host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from pyvtk import _pytree, checks
from pyvtk.ops import selection as page


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """The tokens that stay.

    Attributes:
        indices: int64 [batch, capacity] or [batch, heads, capacity]; token numbers, padded with -1 on the right, or on
            the left with ``align="right"``. Of a packed source (``source_cu_seqlens``) they count from the start of the
            packed axis, not of the sample.
        counts: int32 [batch] or [batch, heads]; how many entries of each row are real.
        num_tokens: length of the token axis that was selected from (the whole packed axis of a packed source).
        ascending: whether every row's indices ascend (else they are in order of preference).
        align: "left" or "right", the side on which the kept tokens stand.
        overflow: bool [batch] or [batch, heads]; more tokens had to stay than capacity holds. None: cannot happen.
        source_cu_seqlens: int32 [batch + 1], where the samples of a packed source begin; None if it was not packed.

    A pytree, so it passes through torch.compile, torch.export and checkpointing.
    """

    indices: Tensor
    counts: Tensor
    num_tokens: int
    ascending: bool = True
    align: str = "left"
    overflow: Tensor | None = None
    source_cu_seqlens: Tensor | None = None

    def __repr__(self) -> str:
        """Its facts in two lines; numbers of rows only where they are on the CPU, so that nothing waits."""
        if not (isinstance(self.indices, Tensor) and isinstance(self.counts, Tensor)):
            return f"Selection(of {type(self.indices).__name__})"  # unflattened with something else
        facts = f"capacity={self.capacity}, num_tokens={self.num_tokens}, ascending={self.ascending}"
        side = f"align={self.align!r}" + (", packed source" if self.packed else "")
        overflow = "None" if self.overflow is None else "known"
        counts = _on_cpu(self.counts)
        if counts is None:
            counts = f"on {self.counts.device}"
        elif len(counts) > _SHOWN:
            counts = f"{min(counts)} to {max(counts)}"
        if overflow == "known" and (flags := _on_cpu(self.overflow)) is not None:
            overflow = f"{sum(flags)} of {len(flags)} rows"
        return (
            f"Selection(rows={list(self.counts.shape)}, {facts}, {side},\n"
            f"          counts={counts}, overflow={overflow})"
        )

    @property
    def capacity(self) -> int:
        return self.indices.shape[-1]

    @property
    def _token_axis(self) -> Tensor:
        """num_tokens as the pytree's leaf: a dynamic size in an exported program."""
        return _pytree.axis(self, self.indices, 1, self.num_tokens)

    @property
    def packed(self) -> bool:
        """Whether the source was a packed axis that all samples share."""
        return self.source_cu_seqlens is not None

    @property
    def _rows(self) -> tuple[Tensor, Tensor, bool]:
        return self.indices, self.counts, self.align == "right"

    @property
    def valid(self) -> Tensor:
        """bool, shaped like indices: which entries are real."""
        return page.selection_valid(self.counts, self.capacity, self.align == "right")

    def mask(self) -> Tensor:
        """bool [batch, (heads,) num_tokens], of a packed source [num_tokens]: which tokens stay.

        Raises:
            RuntimeError: an entry is no token, on the CPU; on CUDA it is padding. So it is in ``inverse`` and
                ``complement``.
        """
        return page.selection_mask(*self._rows, self.num_tokens, self.packed)

    def inverse(self) -> Tensor:
        """int64, shaped like mask(): the slot that each token moved to (the last one, if several hold it), -1 if it is
        gone."""
        return page.selection_inverse(*self._rows, self.num_tokens, self.packed)

    def cu_seqlens(self) -> Tensor:
        """int32 [rows + 1]: where each row begins when the kept tokens are packed (batch-major over heads)."""
        return torch.cat([self.counts.new_zeros(1), self.counts.flatten().cumsum(0, dtype=torch.int32)])

    def complement(self, capacity: int | str | None = None) -> Selection:
        """The tokens that did not stay, ascending, aligned to the same side.

        Args:
            capacity: slots per row; None: num_tokens, which always suffices; "exact": the longest row (one host
                synchronisation). A row that does not fit keeps its first tokens and is marked in ``overflow``.
        """
        slots = self.num_tokens if capacity is None or capacity == "exact" else capacity
        checks.integer("Selection.complement", "capacity", slots)
        made = page.selection_complement(*self._rows, self.num_tokens, self.source_cu_seqlens, slots)
        indices, counts, overflow = made
        facts = (self.num_tokens, True, self.align, overflow, self.source_cu_seqlens)
        selection = _new()(indices, counts, *facts)
        return selection.trim() if capacity == "exact" else selection

    def then(self, other: Selection) -> Selection:
        """Select from what this selection kept: ``other`` numbers this one's slots; the result numbers our tokens.

        Slots of ours that are padding are left out. ``overflow`` is set where it was set in either.

        Raises:
            ValueError: ``other`` does not select from this one's slots. RuntimeError: one of its entries is no slot, on
                the CPU; on CUDA it is left out.
        """
        if other.source_cu_seqlens is not None:
            raise ValueError("Selection.then: other must select from padded rows, got one of a packed source")
        if other.num_tokens != self.indices.shape[-1]:
            raise ValueError(
                f"Selection.then: other must select from {self.capacity} slots, got one over {other.num_tokens}"
            )
        if other.counts.shape != self.counts.shape:
            raise ValueError(
                f"Selection.then: other must have rows {list(self.counts.shape)}, got {list(other.counts.shape)}"
            )
        indices, counts, overflow = page.selection_then(
            self.indices, self.counts, self.align == "right", other.indices, other.counts, other.align == "right",
            self.overflow, other.overflow,
        )  # fmt: skip
        if self.overflow is None and other.overflow is None:
            overflow = None
        facts = (self.num_tokens, self.ascending and other.ascending, other.align, overflow, self.source_cu_seqlens)
        return _new()(indices, counts, *facts)

    def trim(self) -> Selection:
        """The same selection with the smallest capacity that holds every row. Synchronises with the host once."""
        longest = checks.on_host("Selection.trim", "capacity", self.counts.max()) if self.counts.numel() else 0
        start = 0 if self.align == "left" else self.capacity - longest
        return _replace(self, indices=self.indices[..., start : start + longest].contiguous())

    def to(self, device) -> Selection:
        """The same selection on another device."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        return _replace(self, **{name: t if t is None else t.to(device) for name, t in tensors.items()})

    @staticmethod
    def from_mask(mask: Tensor, *, capacity: int | str | None = None, align: str = "left") -> Selection:
        """The True entries of ``mask`` [batch, (heads,) tokens], ascending.

        Args:
            mask: bool.
            capacity: slots per row; None: as many as tokens; "exact": the longest row (one host synchronisation).
                A row that does not fit keeps its first tokens and is marked in ``overflow``.
            align: "left" or "right".

        Raises:
            TypeError: mask is not a bool tensor, or capacity not an int.
            ValueError: mask has another number of dimensions, capacity is negative, align unknown.
        """
        checks.tensor("Selection.from_mask", "mask", mask, (2, 3))
        checks.dtype("Selection.from_mask", "mask", mask, (torch.bool,))
        checks.choice("Selection.from_mask", "align", align, ("left", "right"))
        num_tokens = mask.shape[-1]
        if capacity == "exact":
            total = mask.sum(-1, dtype=torch.int32)
            capacity = checks.on_host("Selection.from_mask", "capacity", total.max()) if total.numel() else 0
        elif capacity is None:
            capacity = num_tokens
        checks.integer("Selection.from_mask", "capacity", capacity)
        indices, counts, overflow = page.selection_of_mask(mask, capacity, align == "right")
        return _new()(indices, counts, num_tokens, True, align, overflow)

    @staticmethod
    def from_indices(
        indices: Tensor, num_tokens: int, *, counts: Tensor | None = None, ascending: bool = False, align: str = "left"
    ) -> Selection:
        """Wrap indices that were chosen elsewhere.

        Args:
            indices: int64 or int32 [batch, (heads,) capacity]; entries beyond ``counts`` are ignored.
            num_tokens: length of the token axis they refer to. Entries are not compared with it here; operators treat
                one out of range as an error (CPU) or as padding (CUDA).
            counts: int [batch, (heads)]; None: every entry is real.
            ascending: the caller's promise that rows ascend, which ``compact_kv_`` relies on.
            align: the side on which the real entries stand.

        Raises:
            TypeError: a tensor of another dtype. ValueError: shapes that do not fit.
        """
        op = "Selection.from_indices"
        checks.tensor(op, "indices", indices, (2, 3))
        checks.dtype(op, "indices", indices, checks.INTEGERS)
        checks.integer(op, "num_tokens", num_tokens)
        checks.boolean(op, "ascending", ascending)
        checks.choice(op, "align", align, ("left", "right"))
        capacity = indices.shape[-1]
        if counts is None:
            counts = torch.full(indices.shape[:-1], capacity, dtype=torch.int32, device=indices.device)
        checks.tensor(op, "counts", counts)
        checks.dtype(op, "counts", counts, checks.INTEGERS)
        checks.shape(op, "counts", counts, tuple(indices.shape[:-1]), "one per row of indices")
        checks.same_device(op, "counts", counts, indices, "indices")
        selection = Selection(
            indices.long().contiguous(), counts.clamp(0, capacity).to(torch.int32), num_tokens, ascending, align
        )
        return _replace(selection, indices=torch.where(selection.valid, selection.indices, -1))


def assemble(
    indices: Tensor, counts: Tensor, num_tokens: int, ascending: bool = True, align: str = "left",
    overflow: Tensor | None = None, source_cu_seqlens: Tensor | None = None,
) -> Selection:  # fmt: skip
    """``Selection(...)`` in less than half of the time, outside of torch.compile.

    A frozen dataclass sets each field by a call of its own; for one row of a few hundred tokens that shows.
    """
    selection = object.__new__(Selection)
    selection.__dict__.update(
        indices=indices, counts=counts, num_tokens=num_tokens, ascending=ascending, align=align, overflow=overflow,
        source_cu_seqlens=source_cu_seqlens,
    )  # fmt: skip
    return selection


def _new():
    """What makes a Selection here: torch.compile traces its constructor."""
    return Selection if torch.compiler.is_compiling() else assemble


_SHOWN = 8  # counts; of more rows the least and the most


def _on_cpu(values: Tensor) -> list | None:
    """The values of a tensor on the CPU, flat; None for all that has none at hand (fake, mapped, traced)."""
    plain = type(values) is Tensor and values.is_cpu and not torch.compiler.is_compiling()
    if not plain or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return None
    with _disable_current_modes():  # to print a value is no use of it, which a mode would trace
        return values.flatten().tolist()


_TENSORS = ("indices", "counts", "overflow", "source_cu_seqlens")
_FACTS = ("num_tokens", "ascending", "align")


def _replace(selection: Selection, **changes) -> Selection:
    # dataclasses.replace is not traceable by every supported torch.compile
    values = {name: getattr(selection, name) for name in (*_TENSORS, *_FACTS)}
    return Selection(**{**values, **changes})


def _unflatten(indices, counts, overflow, source_cu_seqlens, token_axis, ascending: bool, align: str) -> Selection:
    fields = {
        "indices": indices, "counts": counts, "ascending": ascending, "align": align, "overflow": overflow,
        "source_cu_seqlens": source_cu_seqlens,
    }  # fmt: skip
    return _pytree.with_axis(Selection, token_axis, fields, "num_tokens")


_pytree.register(Selection, (*_TENSORS, "_token_axis"), ("ascending", "align"), _unflatten)
