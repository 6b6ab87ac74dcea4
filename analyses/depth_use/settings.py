"""The options that the measurements follows, and which layers and prompts they choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from analyses.interventions import swept
from probes.blocks.batch import Part
from probes.prompts import Prompt

Distance = Literal["jsd", "angular", "euclidean"]
Rule = Literal["left", "midpoint"]
SkipRule = Literal["released", "everywhere"]
Tick = Callable[[int], None]
"""A function that is told how many forwards were run."""

SPLIT_TOKENS = 4
"""Tokens of a prompt that can be split in two."""


@dataclass(frozen=True)
class Settings:
    """The options of `DepthUse` that the measurements follows."""

    parts: tuple[Part, ...]
    skip_rule: SkipRule
    split_positions: int
    skip_prompts: int
    erasure_prompts: int
    gradient_prompts: int
    gradient_steps: int
    gradient_rule: Rule
    bits: tuple[int, ...]
    windows: tuple[int, ...]
    greedy_steps: int
    greedy_distance: Distance
    greedy_prompts: int
    drop_blocks: int
    layers: tuple[int, ...]
    stride: int
    first_token: bool
    seed: int

    def swept(self, n_layers: int) -> list[int]:
        """Return the layers that are left out, rounded, frozen, erased or begin a window."""
        return swept(n_layers, self.layers, self.stride)

    def split_prompts(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the first prompts that are long enough to be split."""
        return [i for i, prompt in enumerate(prompts) if len(prompt.tokens) >= SPLIT_TOKENS][: self.skip_prompts]

    def first(self, n: int, prompts: Sequence[Prompt]) -> list[int]:
        """Return the first `n` prompts that have a token to predict."""
        return [i for i, prompt in enumerate(prompts) if len(prompt.tokens) > 1][:n]

    def dropped(self, n_layers: int) -> int:
        """Return how many blocks the removal curves take away; at least one block of the model is left."""
        return min(self.drop_blocks, len(self.swept(n_layers)), n_layers - 1)

    def greedy_rounds(self, n_layers: int) -> int:
        """Return how many parts the greedy removal takes away; at least one that could go is left."""
        return min(self.greedy_steps, 2 * len(self.swept(n_layers)) - 1)
