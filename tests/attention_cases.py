"""Layouts and kinds of plans that tests of the attention family share; each kind comes with what the oracle says."""

import attention_oracle as oracle
import torch
from hypothesis import strategies as st

import pyvtk
from pyvtk import ImageSpan, Selection, TokenLayout, neighbor_plan, routed_plan, subset_plan, window_plan

BLOCKS = ((16, 16), (64, 32))


def chosen_of(layout, seed, share=0.5, align="left"):
    generator = torch.Generator().manual_seed(seed)
    if layout.packed:
        scores = torch.rand(layout.image_id.shape, generator=generator)
        return pyvtk.select(scores, threshold=1 - share, cu_seqlens=layout.cu_seqlens, capacity=80, align=align)
    return Selection.from_mask(torch.rand(layout.image_id.shape, generator=generator) < share, align=align)


LENGTHS = [52, 23, 40, 0]
SPANS = [
    ImageSpan(0, 3, (1, 5, 6)), ImageSpan(0, 35, (1, 3, 4), newline=True),
    ImageSpan(2, 2, (3, 3, 4)),
]  # fmt: skip


def layouts():
    right = TokenLayout.from_images(LENGTHS, SPANS)
    packed = TokenLayout.from_images(LENGTHS, SPANS, packed=True)
    shuffled = torch.stack([torch.randperm(52, generator=torch.Generator().manual_seed(s)) for s in range(4)])
    masked = torch.rand(right.image_id.shape, generator=torch.Generator().manual_seed(9)) < 0.8
    return {
        "right": right,
        "left": TokenLayout.from_images(LENGTHS, SPANS, padding="left"),
        "packed": packed,
        "taken": right.take(chosen_of(right, 0)),
        "taken to the right": right.take(chosen_of(right, 1, align="right")),
        "taken, then packed": right.take(chosen_of(right, 2), packed=True),
        "taken, room behind": right.take(chosen_of(right, 2), packed=True, total=90),
        "packed, then taken": packed.take(chosen_of(packed, 3)),
        "packed, taken, packed": packed.take(chosen_of(packed, 4), packed=True),
        "shuffled": TokenLayout(right.image_id, right.coords, positions=shuffled, mask=masked),
        "text": TokenLayout.from_images([30, 17]),
        "one image": TokenLayout.from_images([20], [ImageSpan(0, 0, (1, 4, 5))]),
        "no tokens": TokenLayout.from_images([0, 0]),
        "no samples": TokenLayout.from_images([]),
        "nothing packed": TokenLayout.from_images([], packed=True),
    }


LAYOUTS = layouts()


def routing(layout, size=2, k=2, seed=0):
    """(numbers of regions, table) for a layout."""
    numbers = oracle.region_numbers(layout, size)
    regions = int(numbers.max()) + 1 if numbers.numel() else 1
    generator = torch.Generator().manual_seed(seed)
    return numbers, torch.randint(-1, regions, (layout.num_samples, regions, k), generator=generator)


def routed(layout, block, size=2):
    numbers, table = routing(layout, size)
    return routed_plan(layout, size, table, block=block), oracle.routed_mask(layout, numbers, table)


def routed_by_tensor(layout, block):
    """Regions that are no boxes: numbers at random."""
    numbers = torch.randint(5, layout.image_id.shape, generator=torch.Generator().manual_seed(3))
    table = torch.randint(5, (layout.num_samples, 5, 2), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    mask = oracle.routed_mask(layout, numbers[None] if layout.packed else numbers, table)
    return routed_plan(layout, numbers, table, block=block), mask


def subset(layout, block):
    selection = chosen_of(layout, 5)
    return subset_plan(layout, selection, block=block), oracle.subset_mask(layout, selection.mask())


def neighbor(*radius, **options):
    def build(layout, block):
        return neighbor_plan(layout, *radius, block=block, **options), oracle.neighbor_mask(layout, *radius, **options)

    return build


def some_keys(layout, block):
    keys = torch.rand(layout.image_id.shape, generator=torch.Generator().manual_seed(6)) < 0.6
    return neighbor_plan(layout, 1, keys=keys, block=block), oracle.neighbor_mask(layout, 1, keys=keys)


def window(*arguments):
    def build(layout, block):
        return window_plan(layout, *arguments, block=block), oracle.window_mask(layout, *arguments)

    return build


# name -> function(layout, block) giving (plan, what the oracle says is visible)
KINDS = {
    "radius 0": neighbor(0),
    "radius 1": neighbor(1),
    "radius 0, 2, 1": neighbor((0, 2, 1)),
    "radius past the grid": neighbor(2**40),
    "causal window": neighbor(2, causal_window=True),
    "cross image": neighbor(1, cross_image=True),
    "cross image, causal": neighbor((2, 1, 0), cross_image=True, causal_window=True),
    "text keys": neighbor(1, keys="text"),
    "visual keys": neighbor(1, keys="visual", cross_image=True),
    "some keys": some_keys,
    "window": window(2),
    "window, shifted": window((1, 3, 2), (0, 1, 7)),
    "window past the grid": window(1000, 3),
    "routed": routed,
    "routed by tensor": routed_by_tensor,
    "subset": subset,
}


@st.composite
def random_layouts(draw):
    lengths, spans = [], []
    for batch in range(draw(st.integers(1, 3))):
        length = draw(st.integers(0, 5))
        for _ in range(draw(st.integers(0, 3))):
            span = ImageSpan(
                batch, length, (draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))),
                draw(st.booleans()),
            )  # fmt: skip
            if length + span.length > 90:
                break
            spans.append(span)
            length += span.length + draw(st.integers(0, 4))
        lengths.append(length + draw(st.integers(0, 20)))
    layout = TokenLayout.from_images(
        lengths, spans, padding=draw(st.sampled_from(("right", "left"))), packed=draw(st.booleans())
    )
    if draw(st.booleans()):
        seed = draw(st.integers(0, 100))
        layout = layout.take(chosen_of(layout, seed, draw(st.sampled_from((0.2, 0.7)))), packed=draw(st.booleans()))
    return layout
