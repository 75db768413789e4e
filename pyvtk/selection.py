"""Selection: which tokens of each sample stay, with static sizes and no host synchronisation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyvtk import _pytree, checks


def _slots_of(flags: Tensor, capacity: int, align: str) -> Tensor:
    """Output slot of every True in ``flags`` [..., n], in order; ``capacity`` (one past the end) for all others."""
    rank = flags.cumsum(-1) - 1
    if align == "right":
        rank = rank + (capacity - flags.sum(-1, keepdim=True).clamp(max=capacity))
    return torch.where(flags & (rank < capacity), rank, capacity)


def _pack(values: Tensor, flags: Tensor, capacity: int, align: str) -> Tensor:
    """The flagged ``values`` [..., n] in order, as [..., capacity], padded with -1 on the side opposite to align."""
    packed = values.new_full((*values.shape[:-1], capacity + 1), -1)
    return packed.scatter(-1, _slots_of(flags, capacity, align), values)[..., :capacity].contiguous()


@dataclass(frozen=True, eq=False)
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
    def valid(self) -> Tensor:
        """bool, shaped like indices: which entries are real."""
        slot = torch.arange(self.capacity, device=self.indices.device)
        counts = self.counts[..., None]
        return slot < counts if self.align == "left" else slot >= self.capacity - counts

    def _scatter(self, values: Tensor, fill) -> Tensor:
        """``values`` (shaped like indices) at the tokens they belong to: [..., num_tokens], packed: [num_tokens]."""
        # Padding goes to a slot one past the end, which is cut off.
        where = torch.where(self.valid, self.indices, self.num_tokens)
        if self.packed:
            where, values = where.flatten(), values.flatten()
        out = values.new_full((*where.shape[:-1], self.num_tokens + 1), fill)
        return out.scatter(-1, where, values)[..., : self.num_tokens]

    def mask(self) -> Tensor:
        """bool [batch, (heads,) num_tokens], of a packed source [num_tokens]: which tokens stay."""
        return self._scatter(torch.ones_like(self.indices, dtype=torch.bool), False)

    def inverse(self) -> Tensor:
        """int64, shaped like mask(): the slot that each token moved to, -1 if it is gone."""
        slot = torch.arange(self.capacity, device=self.indices.device).expand(self.indices.shape)
        return self._scatter(slot.contiguous(), -1)

    def cu_seqlens(self) -> Tensor:
        """int32 [rows + 1]: where each row begins when the kept tokens are packed (batch-major over heads)."""
        return torch.cat([self.counts.new_zeros(1), self.counts.flatten().cumsum(0, dtype=torch.int32)])

    def complement(self, capacity: int | None = None) -> Selection:
        """The tokens that did not stay, ascending. ``capacity`` defaults to num_tokens, which always suffices."""
        gone = ~self.mask()
        if not self.packed:
            return Selection.from_mask(gone, capacity=capacity, align=self.align)
        token = torch.arange(self.num_tokens, device=gone.device)
        starts = self.source_cu_seqlens.long()
        inside = (token >= starts[:-1, None]) & (token < starts[1:, None])
        selection = Selection.from_mask(gone & inside, capacity=capacity, align=self.align)
        return _replace(selection, source_cu_seqlens=self.source_cu_seqlens)

    def then(self, other: Selection) -> Selection:
        """Select from what this selection kept: ``other`` numbers this one's slots; the result numbers our tokens.

        Slots of ours that are padding are left out. ``overflow`` is set where it was set in either.
        """
        if other.packed:
            raise ValueError("Selection.then: other must select from padded rows, got one of a packed source")
        if other.num_tokens != self.capacity:
            raise ValueError(
                f"Selection.then: other must select from {self.capacity} slots, got one over {other.num_tokens}"
            )
        if other.indices.shape[:-1] != self.indices.shape[:-1]:
            raise ValueError(
                f"Selection.then: other must have rows {list(self.indices.shape[:-1])}, "
                f"got {list(other.indices.shape[:-1])}"
            )
        overflows = [s.overflow for s in (self, other) if s.overflow is not None]
        overflow = overflows[0] | overflows[-1] if overflows else None
        facts = (self.num_tokens, self.ascending and other.ascending, other.align, overflow, self.source_cu_seqlens)
        if self.capacity == 0:  # other holds padding only, and gather would refuse its indices
            return Selection(other.indices, other.counts, *facts)
        slots = other.indices.clamp(min=0)
        indices = self.indices.gather(-1, slots)
        flags = other.valid & self.valid.gather(-1, slots)
        return Selection(_pack(indices, flags, other.capacity, other.align), flags.sum(-1, dtype=torch.int32), *facts)

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
        total = mask.sum(-1, dtype=torch.int32)
        if capacity == "exact":
            capacity = checks.on_host("Selection.from_mask", "capacity", total.max()) if total.numel() else 0
        elif capacity is None:
            capacity = num_tokens
        checks.integer("Selection.from_mask", "capacity", capacity)
        token = torch.arange(num_tokens, device=mask.device).expand(mask.shape)
        indices = _pack(token, mask, capacity, align)
        return Selection(indices, total.clamp(max=capacity), num_tokens, True, align, total > capacity)

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
