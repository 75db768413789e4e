"""2:4 sparse weights in plain torch: format, pruning, products; N:M pruning for research.

A weight [out_features, in_features] keeps two of every four neighbours along in_features:

values    [out_features, in_features / 2], row-major: of each group the two kept entries, in ascending position
metadata  uint8 [out_features, ceil(in_features / 8)]: a nibble per group, low nibble first, p0 | p1 << 2 with the kept
          positions 0 <= p0 < p1 <= 3; the unused high nibble of an odd number of groups is 0b0100
scales    float32 [out_features] of int8 values: weight[n, k] = value * scales[n]
"""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor
from torch.nn import functional as F

# Nibble of a group behind the last one: positions 0 and 1, so that whoever decodes it sees a legal group.
_PADDING = 0b0100


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Products are added up in float32; in float64 for the oracle."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _positions(metadata: Tensor, groups: int) -> Tensor:
    """int64 [out_features, groups, 2], the kept positions of each group."""
    nibbles = torch.stack([metadata & 15, metadata >> 4], -1).flatten(1)[:, :groups]
    return torch.stack([nibbles & 3, nibbles >> 2], -1).long()


def is_2_of_4(mask: Tensor) -> Tensor:
    """bool []: every group of four along the last dimension has exactly two entries True."""
    return (mask.unflatten(-1, (mask.shape[-1] // 4, 4)).sum(-1) == 2).all()


def compress(weight: Tensor, mask: Tensor, trusted: bool = False) -> tuple[Tensor, Tensor]:
    """(values, metadata) of the entries of ``weight`` [N, K] where ``mask`` (bool [N, K]) holds.

    A group without exactly two in the mask is an error; ``trusted``: nobody looks, and it keeps its first two entries.
    """
    if not trusted and not torch.compiler.is_compiling() and not is_2_of_4(mask):
        raise RuntimeError("sparse24_compress: mask does not have exactly two entries in every group of four")
    rows, columns = weight.shape
    grouped = mask.reshape(rows, columns // 4, 4).to(torch.uint8)
    kept = torch.stack([grouped.argmax(-1), 3 - grouped.flip(-1).argmax(-1)], -1)
    kept = torch.where(grouped.sum(-1, keepdim=True) == 2, kept, torch.arange(2, device=kept.device))
    values = weight.reshape(rows, columns // 4, 4).gather(-1, kept)
    return values.reshape(rows, columns // 2), pack(kept)


def pack(positions: Tensor) -> Tensor:
    """Metadata uint8 [N, ceil(groups / 2)] of the kept positions [N, groups, 2]."""
    first, second = positions.to(torch.uint8).unbind(-1)
    nibbles = F.pad(first | second << 2, (0, positions.shape[1] % 2), value=_PADDING)
    return nibbles[:, 0::2] | nibbles[:, 1::2] << 4


def decompress(values: Tensor, metadata: Tensor) -> Tensor:
    """The weight [N, K] with zeros where nothing was kept."""
    rows, half = values.shape
    groups = half // 2
    dense = values.new_zeros((rows, groups, 4))
    dense = dense.scatter(-1, _positions(metadata, groups), values.reshape(rows, groups, 2))
    return dense.reshape(rows, 2 * half)


def kept(dense: Tensor, metadata: Tensor) -> Tensor:
    """Entries of ``dense`` [N, K] at the positions of ``metadata``: [N, K / 2]. The transpose of decompress."""
    rows, columns = dense.shape
    grouped = dense.reshape(rows, columns // 4, 4)
    return grouped.gather(-1, _positions(metadata, columns // 4)).reshape(rows, columns // 2)


def weight_of(values: Tensor, metadata: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as numbers of ``dtype`` [N, K]: int8 values times their row's scale."""
    dense = decompress(values, metadata)
    if scales is None:
        return dense.to(dtype)
    return (dense.to(_wide(dtype)) * scales[:, None].to(_wide(dtype))).to(dtype)


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return z
    if activation == "relu":
        return F.relu(z)
    if activation == "silu":
        return F.silu(z)
    if activation == "quick_gelu":
        return z * torch.sigmoid(1.702 * z)
    return F.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def linear(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor | None,
    dense: Tensor | None,
    bias: Tensor | None,
    mul: Tensor | None,
    activation: str,
    choice: tuple[int, ...] = (),
) -> Tensor:
    """activation(x W^T + bias) * mul, added up in float32 and rounded once to x's dtype.

    ``dense`` and ``choice`` tell kernels how to compute; they change nothing here, as does the vendor's form.
    """
    wide = _wide(x.dtype)
    z = x.to(wide) @ weight_of(values, metadata, scales, wide).T
    if bias is not None:
        z = z + bias.to(wide)
    z = activate(z, activation)
    if mul is not None:
        z = z * mul.to(wide)
    return z.to(x.dtype)


def quantize_rows(x: Tensor, x_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x as whole numbers in -127..127 (in x's wide dtype) and the scale they are multiples of.

    The scale is x_scale [1], or of each row max |x| / 127, and 1 where that is below the smallest normal number: a row
    of zeros, or of numbers so small that they become zeros. A NaN makes its row NaN, and so does an infinity without
    x_scale.
    """
    x = x.to(_wide(x.dtype))
    if x_scale is None:
        scale = x.abs().amax(-1, keepdim=True) / 127 if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
        scale = torch.where(scale < torch.finfo(x.dtype).tiny, 1, scale)
    else:
        scale = x_scale.to(x.dtype)
    return (x / scale).round().clamp(-127, 127), scale


def linear_int8(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    scales: Tensor,
    x_scale: Tensor | None,
    bias: Tensor | None,
    mul: Tensor | None,
    activation: str,
) -> Tensor:
    """activation((q W^T) s scales + bias) * mul with q = x / s rounded (half to even) and clamped to -127..127.

    The sums of whole numbers are exact; what follows is float32, rounded once to x's dtype.
    """
    quantized, scale = quantize_rows(x, x_scale)
    wide = quantized.dtype
    # float64 holds these sums exactly
    sums = quantized.double() @ decompress(values, metadata).double().T
    z = sums.to(wide) * scale * scales.to(wide)
    if bias is not None:
        z = z + bias.to(wide)
    z = activate(z, activation)
    if mul is not None:
        z = z * mul.to(wide)
    return z.to(x.dtype)


def prune_n_of_m(scores: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """bool, shaped like ``scores`` [rows, columns]: the n largest of each m neighbours along ``dim`` (-1: row-wise,
    along in_features; 0: column-wise). Of equal scores the lower index stays. dim's length is a multiple of m.
    """
    scores = scores.movedim(dim, -1)
    grouped = scores.unflatten(-1, (scores.shape[-1] // m, m))
    order = grouped.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, order[..., :n], True)
    return mask.flatten(-2).movedim(-1, dim)


# The 90 patterns of :func:`transposable_patterns` as numbers of 16 bits, the first row in the highest.
_ROWS = [sum(8 >> column for column in pair) for pair in combinations(range(4), 2)]
_TRANSPOSABLE = tuple(
    rows[0] << 12 | rows[1] << 8 | rows[2] << 4 | rows[3]
    for rows in product(_ROWS, repeat=4)
    if all(sum(row >> column & 1 for row in rows) == 2 for column in range(4))
)


def transposable_patterns() -> Tensor:
    """bool [90, 4, 4], on the CPU: all 4x4 patterns with two entries in every row and column, in ascending order of
    their kept positions."""
    numbers = torch.tensor(_TRANSPOSABLE, dtype=torch.int64, device="cpu")
    bits = numbers[:, None] >> torch.arange(15, -1, -1, device="cpu") & 1
    return bits.bool().reshape(-1, 4, 4)


def prune_transposable(scores: Tensor) -> Tensor:
    """bool, shaped like ``scores`` [rows, columns], both multiples of 4: of each 4x4 block the pattern with two entries
    in every row and column whose scores have the largest sum, in float64; of equal sums the first pattern."""
    rows, columns = scores.shape
    patterns = transposable_patterns().to(scores.device)
    blocks = scores.reshape(rows // 4, 4, columns // 4, 4).transpose(1, 2).reshape(-1, 16)
    best = (blocks.double() @ patterns.flatten(1).double().T).argmax(-1)
    return patterns[best].reshape(rows // 4, columns // 4, 4, 4).transpose(1, 2).reshape(rows, columns)
