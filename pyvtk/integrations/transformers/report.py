"""What a prompt was spared: tokens of each layer, floating-point operations, cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyvtk

if TYPE_CHECKING:
    from pyvtk.integrations.transformers.handle import Handle
    from pyvtk.integrations.transformers.prompt import Prompt


def pairs_of(tokens: list[int]) -> float:
    """Pairs of causal attention, of all samples together."""
    return sum(n * (n + 1) / 2 for n in tokens)


def layer_flops(config, tokens: float, pairs: float, ffn_tokens: float | None = None) -> float:
    """Operations of one decoder layer: its products of matrices and its attention.

    Args:
        tokens: rows of the projections.
        pairs: of a query and a key, for each head.
        ffn_tokens: rows of the feed-forward layer; None: all of them.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = config.num_key_value_heads
    projections = 2 * width * head_dim * (2 * heads + 2 * kv_heads)
    ffn = 6 * width * config.intermediate_size
    ffn_tokens = tokens if ffn_tokens is None else ffn_tokens
    return tokens * projections + ffn_tokens * ffn + 4 * pairs * heads * head_dim


class Report:
    """Of one prompt. Reading it may wait for the device.

    Attributes:
        stages: (layer, Selection of the prompt's tokens that are there from this layer on).
        visual: visual tokens of each sample.
    """

    def __init__(self, handle: Handle, prompt: Prompt) -> None:
        self._config, self._method = handle.config, handle.method
        self._num_layers, self._plan_ends = len(handle.layers), handle.plan_ends
        self._lengths, self.visual = prompt.sizes.lengths, prompt.sizes.visual
        self._sizes = prompt.stages
        self.plan: pyvtk.AttentionPlan | None = None
        evicts = handle.method.evicts
        self._cached = [handle.method.cached(n) for n in self._lengths] if evicts else None  # of each sample
        self.stages: list[tuple[int, pyvtk.Selection]] = []

    def finish(self, prompt: Prompt) -> None:
        self.stages = [(layer, tokens.selection) for layer, tokens in prompt.tokens.items() if layer >= 0]

    @property
    def tokens(self) -> list[list[int]]:
        """Tokens of every sample, for every layer."""
        layers = [list(self._lengths) for _ in range(self._num_layers)]
        for layer, selection in self.stages:
            sizes = self._sizes[layer]
            counts = sizes.num_tokens if sizes.exact else selection.counts.tolist()
            layers[layer:] = [list(counts) for _ in range(layer, self._num_layers)]
        return layers

    def flops(self) -> tuple[float, float]:
        """Operations of the decoder's layers over the prompt: (as they were done, as the model does them alone). What
        scoring costs is left out."""
        dense = self._num_layers * layer_flops(self._config, sum(self._lengths), pairs_of(self._lengths))
        done = 0.0
        ffn = self._method.ffn
        seen = self.plan.density().needed if self.plan is not None else 0
        for layer, tokens in enumerate(self.tokens):
            if layer < self._plan_ends:
                ffn_tokens = sum(tokens) - sum(self.visual) * (1 - 1 / ffn)
                done += layer_flops(self._config, sum(tokens), seen, ffn_tokens)
            else:
                done += layer_flops(self._config, sum(tokens), pairs_of(tokens))
        return done, dense

    def cache(self) -> float:
        """The share of the prompt's cache that is held."""
        held = self.tokens if self._cached is None else [self._cached] * self._num_layers
        return sum(map(sum, held)) / (self._num_layers * sum(self._lengths))

    def __str__(self) -> str:
        runs, tokens = [], [sum(layer) for layer in self.tokens]
        for layer, count in enumerate(tokens):
            if layer == 0 or count != tokens[layer - 1]:
                runs.append([layer, layer, count])
            runs[-1][1] = layer
        spans = ", ".join(f"{a}-{b}: {count}" if a != b else f"{a}: {count}" for a, b, count in runs)
        done, dense = self.flops()
        samples = len(self._lengths)
        return (
            f"tokens by layer{'' if samples == 1 else f', of {samples} samples together'}: {spans}\n"
            f"prefill {done / dense:.0%} of the operations, cache {self.cache():.0%}"
        )
