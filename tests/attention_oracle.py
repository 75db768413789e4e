"""What the attention family has to give, straight from a layout's fields: dense masks and float64 attention.

Written without pyvtk.plans and pyvtk.reference. A mask is bool [batch, queries, keys] (packed: batch 1).
"""

import itertools
import math

import torch


def relations(layout):
    """Facts of all pairs (query, key): dict of bool [batch, tokens, tokens], and the fields as [batch, tokens]."""
    fields = {"image": layout.image_id, "position": layout.positions, "coords": layout.coords}
    tokens = layout.image_id.shape[-1]
    if layout.cu_seqlens is None:
        valid = torch.ones(layout.image_id.shape, dtype=torch.bool) if layout.mask is None else layout.mask
        sample = torch.arange(layout.image_id.shape[0])[:, None].expand(valid.shape)
    else:
        fields = {name: x[None] for name, x in fields.items()}
        sample = torch.full((1, tokens), -1)
        ends = layout.cu_seqlens.tolist()
        for number, (first, last) in enumerate(itertools.pairwise(ends)):
            sample[0, first:last] = number
        valid = sample >= 0
        if layout.mask is not None:
            valid = valid & layout.mask[None]
    image, position = fields["image"].long(), fields["position"].long()
    visual = valid & (image >= 0)
    pair = {
        "together": valid[:, :, None] & valid[:, None] & (sample[:, :, None] == sample[:, None]),
        "both visual": visual[:, :, None] & visual[:, None],
        "one image": image[:, :, None] == image[:, None],
        "past": position[:, None] <= position[:, :, None],
    }
    return pair, {"visual": visual, "valid": valid, "coords": fields["coords"].long(), "sample": sample}


def _joined(pair, inside):
    """Causal attention, except between visual tokens, where ``inside`` decides."""
    return pair["together"] & torch.where(pair["both visual"], inside, pair["past"])


def neighbor_mask(layout, radius, causal_window=False, cross_image=False, keys="all"):
    pair, token = relations(layout)
    radius = torch.tensor((radius,) * 3 if isinstance(radius, int) else radius)
    apart = (token["coords"][:, :, None] - token["coords"][:, None]).abs()
    inside = pair["one image"] & (apart <= radius).all(-1)
    if causal_window:
        inside = inside & pair["past"]
    if cross_image:
        inside = inside | (~pair["one image"] & pair["past"])
    mask = _joined(pair, inside)
    if isinstance(keys, torch.Tensor):
        return mask & (keys[None] if keys.dim() == 1 else keys)[:, None]
    if keys != "all":
        mask = mask & (token["visual"] == (keys == "visual"))[:, None]
    return mask


def window_mask(layout, size, shift=0):
    """Windows counted by walking along each axis: one begins at coordinate 0 and wherever (c - shift) % size == 0."""
    pair, token = relations(layout)
    inside = pair["one image"]
    for axis in range(3):
        length = size if isinstance(size, int) else size[axis]
        begin = shift if isinstance(shift, int) else shift[axis]
        most = int(token["coords"][..., axis].max()) if token["coords"].numel() else 0
        number, window = 0, []
        for c in range(most + 1):
            number += c > 0 and (c - begin) % length == 0
            window.append(number)
        own = torch.tensor(window)[token["coords"][..., axis]]
        inside = inside & (own[:, :, None] == own[:, None])
    return _joined(pair, inside)


def region_numbers(layout, size):
    """[batch, tokens]: regions of ``size`` in raster order over the extent of each sample (before any ``take``)."""
    _, token = relations(layout)
    size = (size,) * 3 if isinstance(size, int) else size
    numbers = torch.zeros(token["visual"].shape, dtype=torch.long)
    for b in range(numbers.shape[0]):
        for s in token["sample"][b].unique().tolist():
            rows = [r for r in range(numbers.shape[1]) if token["visual"][b, r] and token["sample"][b, r] == s]
            places = {r: token["coords"][b, r].tolist() for r in rows}
            count = (
                [math.ceil(n / length) for n, length in zip(layout.extent[max(s, 0)].tolist(), size)] if rows else []
            )
            for r, place in places.items():
                t, y, x = (p // n for p, n in zip(place, size))
                numbers[b, r] = (t * count[1] + y) * count[2] + x
    return numbers


def routed_mask(layout, numbers, table):
    """``numbers`` [batch, tokens] of regions, ``table`` [samples, regions, k]."""
    pair, token = relations(layout)
    routed = torch.zeros_like(pair["past"])
    lists = table.tolist()
    for b in range(routed.shape[0]):
        for i in range(routed.shape[1]):
            if token["visual"][b, i]:
                seen = lists[int(token["sample"][b, i])][int(numbers[b, i])]
                routed[b, i] = torch.isin(numbers[b], torch.tensor(seen, dtype=torch.long))
    return _joined(pair, pair["one image"] & routed)


def subset_mask(layout, kept):
    """``kept``: bool, shaped like the layout."""
    pair, _ = relations(layout)
    kept = kept[None] if kept.dim() == 1 else kept
    return pair["together"] & pair["past"] & kept[:, :, None] & kept[:, None]


def yopo_mask(side, start, after, width):
    """The 4-D mask of YOPO's code for one image of side x side tokens, as the system survey words it: the causal mask
    whose visual block is overwritten by a symmetric window of odd ``width``, clipped at the borders."""
    tokens = start + side * side + after
    mask = [[j <= i for j in range(tokens)] for i in range(tokens)]
    half = (width - 1) // 2
    for r in range(side):
        for c in range(side):
            i = start + r * side + c
            for j in range(start, start + side * side):
                mask[i][j] = False
            for r2 in range(max(0, r - half), min(side, r + half + 1)):
                for c2 in range(max(0, c - half), min(side, c + half + 1)):
                    mask[i][start + r2 * side + c2] = True
    return torch.tensor(mask)


def attention(
    q, k, v, mask, *, scale=None, k_bias=None, visual_heads=None, visual_mass="keep", visual_rows="attend",
    visual_queries=None, visual_keys=None, dtype=torch.float64,
):  # fmt: skip
    """(out, lse) of dense attention under ``mask`` [batch, queries, keys], in ``dtype``. Differentiable; rows of tokens
    that nobody sees may hold anything."""
    heads, dim = q.shape[1], q.shape[3]
    mask = mask[:, None].expand(-1, heads, -1, -1)
    column = torch.ones_like(mask)
    if visual_heads is not None:
        off = ~visual_heads[None, :, None, None]
        removed = off & visual_keys[:, None, None, :]
        if visual_rows == "zero":
            mask = mask & ~(off & visual_queries[:, None, :, None])
        if visual_mass == "drop":
            mask = mask & ~removed
        else:
            column = column & ~removed
    group = heads // k.shape[1]
    mentioned = mask.any(2).unflatten(1, (k.shape[1], group)).any(2)[..., None]
    zero = torch.zeros((), dtype=dtype)
    q = torch.where(mask.any(3)[..., None], q.to(dtype), zero)
    k, v = (torch.where(mentioned, x.to(dtype), zero).repeat_interleave(group, 1) for x in (k, v))
    z = q @ k.mT * (dim**-0.5 if scale is None else scale)
    if k_bias is not None:
        z = z + torch.where(mask.any(2).any(1), k_bias.to(dtype), zero)[:, None, None]
    blind = ~mask.any(3)
    z = torch.where(mask, z, -math.inf)
    z = torch.where(blind[..., None], zero, z)
    lse = z.logsumexp(3)
    p = torch.where(mask & column, (z - lse[..., None]).exp(), zero)
    return p @ v, torch.where(blind, -math.inf, lse)
