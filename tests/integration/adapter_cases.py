"""What tests of the adapter share: models that are made once, methods, what the oracle says of them, and budgets.

Nothing here changes a model; a test that does makes its own.
"""

from __future__ import annotations

import functools
import inspect

import oracle
import tiny_models
import torch
import transformers
from support import max_error
from torch import Tensor, nn

from pyvtk.integrations import transformers as vtk

STEPS = 9  # rows of logits: the prefill's and those of 8 decode steps
TIMES = 4  # an accelerated model may be so many times as wrong as the unmodified one
RAGGED = (1, 1, 2, 1)  # images of each sample
HALF = torch.tensor([True, False, True, False])
HEADS = (None, HALF, ~HALF, torch.zeros(4, dtype=torch.bool), None, HALF)
LADDER = vtk.PyramidDrop((1, 2, 4), (0.5, 0.25, 0.125))
METHODS = {
    "FastV": vtk.FastV(2, 0.25),
    "FastV, layer 1": vtk.FastV(1, 0.5),
    "PyramidDrop": LADDER,
    "Feather": vtk.Feather((2, 4), 0.3),
    "YOPO": vtk.YOPO(1),
    "YOPO, cut": vtk.YOPO(1, 3),
    "YOPO, heads off": vtk.YOPO(1, None, HEADS, 2),
    "HiRED": vtk.HiRED(0.2),
    "VisionZip": vtk.VisionZip(9, 3),
    "SnapKV": vtk.SnapKV(8, 0.25, 5),
    "DivPrune": vtk.DivPrune(0.3),
}
# the adapter leaves tokens where they stand, and counts without CLS, which these models drop
STAND_INS = {
    "HiRED": oracle.HiRED(0.2, order="sequence"),
    "VisionZip": oracle.VisionZip(9, 3, cls=False, order="sequence"),
}
CASES = [
    (name, key)
    for name in tiny_models.NAMES
    for key in METHODS
    if name in tiny_models.CLS or key not in STAND_INS  # a tower with a CLS token
]
_forward = inspect.signature(transformers.LlavaForConditionalGeneration.forward).parameters
CACHE = "cache" if "cache" in _forward else "past_key_values"  # renamed in transformers 5.24


@functools.cache
def model_of(name: str, attention: str = "sdpa") -> nn.Module:
    return tiny_models.make(name, attention=attention)


@functools.cache
def exact_of(name: str) -> nn.Module:
    return oracle.exact(tiny_models.make(name))


@functools.cache
def inputs_of(name: str, padding: str = "left", images: tuple[int, ...] = RAGGED) -> dict[str, Tensor]:
    return tiny_models.batch(name, model_of(name), samples=len(images), padding=padding, images=images)


@functools.cache
def alone(name: str, sample: int, images: tuple[int, ...] = RAGGED) -> dict[str, Tensor]:
    """The inputs of one sample without padding."""
    return tiny_models.one(name, inputs_of(name, "left", images), sample)


@functools.cache
def trace_of(name: str, key: str | None, sample: int, tokens: tuple[int, ...] = (), images=RAGGED) -> oracle.Trace:
    """What the oracle says of one sample with these tokens behind its prompt."""
    method = None if key is None else STAND_INS.get(key, METHODS[key])
    return oracle.trace(name, exact_of(name), alone(name, sample, images), method, list(tokens))


def expected(name: str, key: str | None, tokens: Tensor, images: tuple[int, ...] = RAGGED) -> Tensor:
    """float64 [samples, steps, vocabulary]: the logits behind which each of tokens [samples, steps] was chosen."""
    rows = tokens.shape[1]
    return torch.stack(
        [
            trace_of(name, key, sample, tuple(row[:-1]), images).logits[-rows:]
            for sample, row in enumerate(tokens.tolist())
        ]
    )


def ends(logits: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """[samples, 1, vocabulary]: of a prompt's logits those of each sample's last token, padding on either side."""
    place = torch.arange(logits.shape[1])
    last = torch.where(inputs["attention_mask"].bool(), place, -1).amax(1)
    return logits[torch.arange(len(last)), last][:, None]


@torch.no_grad()
def prefill(model: nn.Module, inputs: dict[str, Tensor], **options) -> Tensor:
    return ends(model(**inputs, **options).logits, inputs)


@functools.cache
def budget(name: str, padding: str = "left", images: tuple[int, ...] = RAGGED, attention: str = "sdpa") -> float:
    """How wrong logits may be: TIMES the error of the unmodified float32 model on the same inputs."""
    model, inputs = model_of(name, attention), inputs_of(name, padding, images)
    if padding == "left":
        logits, tokens = tiny_models.generate_logits(model, inputs, STEPS)
    else:
        logits, tokens = prefill(model, inputs), torch.zeros(len(images), 1, dtype=torch.int64)
    return TIMES * max_error(logits, expected(name, None, tokens, images))


def assert_equal(logits: Tensor, want: Tensor, limit: float) -> None:
    error = max_error(logits, want)
    assert error <= limit, f"error {error:.2e} exceeds the budget {limit:.2e}"
