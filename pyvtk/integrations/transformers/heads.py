"""Which heads look at visual tokens: YOPO's head mask, measured on the unmodified model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pyvtk.integrations.transformers.handle import accelerate
from pyvtk.integrations.transformers.methods import Method
from pyvtk.integrations.transformers.prompt import Prompt
from pyvtk.methods import yopo


class _Listener(Method):
    """Changes nothing and hears every layer's queries and keys."""

    attention = True

    def __init__(self) -> None:
        self.mass: list[Tensor] = []  # of each layer, [batch, heads]

    def listen(self, prompt: Prompt, layer: int, query: Tensor, key: Tensor) -> None:
        key = key[:, :, : query.shape[2]]
        self.mass.append(yopo.visual_mass(query, key, prompt.visual, valid=prompt.valid))


def calibrate_heads(
    model: nn.Module,
    batches: Iterable[Mapping],
    ratio: float | None = None,
    *,
    share: float | None = None,
    votes: float = 0.4,
) -> Tensor:
    """The heads for ``YOPO(heads=...)``.

    Args:
        model: as of :func:`accelerate`, and not accelerated.
        batches: inputs of the model; samples without images do not count. Each is run once, without gradients.
        ratio: a head is on if the mass that it gives to visual keys is more than this times the rest, in more than
            ``votes`` of the samples (the paper's thresholds are 0.035 to 0.2).
        share: instead, the share of heads that is on.
        votes: 0 to 1 (exclusive).

    Returns:
        bool [layers, heads], on the model's device. The first two layers keep all heads.

    Raises:
        ValueError: not exactly one of ratio and share is given, or no batch has an image.
    """
    if (ratio is None) == (share is None):
        raise ValueError(f"calibrate_heads: one of ratio and share must be given, got ratio={ratio}, share={share}")
    listener, samples = _Listener(), []
    with accelerate(model, listener) as handle, torch.no_grad():
        for batch in batches:
            listener.mass.clear()
            handle.model(**batch)
            if listener.mass:
                seen = torch.tensor([n > 0 for n in handle.report.visual])
                mass = torch.stack(listener.mass, 1)  # [batch, layers, heads]
                samples.append(mass[seen.to(mass.device)])
    if not samples:
        raise ValueError("calibrate_heads: batches must hold a sample with an image")
    return yopo.active_heads(torch.cat(samples), ratio, share=share, votes=votes)
