"""The options that the measurements follow, and which layers and prompts they choose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from analyses.interventions import swept
from analyses.options import option
from probes.blocks.batch import Part
from probes.errors import OptionError
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
    """The options of `DepthUse` that the measurements follow; it has them among its own."""

    parts: tuple[Part, ...] = option(
        ("block", "attn", "mlp"), "What is left out in skip effects and attributed; removal losses cover all three."
    )
    skip_rule: SkipRule = option(
        "released",
        "Where skip effects leave a part out: everywhere, or nowhere at a prompt's first token, as the released code.",
    )
    split_positions: int = option(
        4, "Positions per prompt before which a part is left out and after which effects are measured.", low=1, high=64
    )
    skip_prompts: int = option(10, "Prompts of the future and local skip effects; 0 leaves them out.", low=0)
    erasure_prompts: int = option(2, "Prompts of residual erasure; 0 leaves it out.", low=0)
    gradient_prompts: int = option(1, "Prompts of integrated gradients; 0 leaves them out.", low=0)
    gradient_steps: int = option(32, "Steps of each integrated gradient; the paper took 256.", low=1, high=4096)
    gradient_rule: Rule = option("midpoint", "Where in each step the gradient is taken; left is the paper's.")
    bits: tuple[int, ...] = option((8, 4), "Widths to which each block alone is rounded.", low=2, high=16)
    windows: tuple[int, ...] = option((2, 4), "Numbers of neighbouring blocks run side by side.", low=1, high=64)
    window_pairs: bool = option(
        False, "Whether windows also add what each pair of their blocks gives beyond the two apart (second order)."
    )
    frontier_points: int = option(
        0, "Steps from all blocks at the widest of bits to all at the narrowest, per order; 0 leaves it out.", low=0
    )
    greedy_steps: int = option(3, "Parts removed greedily, one after the other; 0 leaves it out.", low=0)
    greedy_distance: Distance = option("jsd", "What the greedy removal keeps small.")
    greedy_prompts: int = option(8, "Prompts on which the greedy removal decides.", low=1)
    drop_blocks: int = option(6, "Blocks removed in the order of a proxy; 0 leaves the curves out.", low=0)
    layers: tuple[int, ...] = option(
        (), "Layers that are left out, rounded, frozen or erased, or begin a window; none: every stride-th.", low=0
    )
    stride: int = option(1, "Every how many layers one is left out, where layers names none.", low=1)
    generate_prompts: int = option(0, "Prompts continued greedily without each block; 0 leaves it out.", low=0)
    generate_tokens: int = option(64, "Tokens of each continuation.", low=2, high=4096)
    generate_stride: int = option(1, "Every how many of the swept layers one is left out while writing.", low=1)
    generate_parts: tuple[Part, ...] = option(("block",), "What of a block is left out while writing.")
    first_token: bool = option(
        False, "Whether a prompt's first token, whose norm is massive, counts in the statistics."
    )
    seed: int = option(0, "Seed of split positions, random orders and intervals.")

    def swept(self, n_layers: int) -> list[int]:
        """Return the layers that are left out, rounded, frozen, erased or begin a window."""
        return swept(n_layers, self.layers, self.stride)

    def generated(self, n_layers: int) -> list[tuple[Part, int]]:
        """Return the parts that are left out while writing."""
        layers = self.swept(n_layers)[:: self.generate_stride]
        return [(part, layer) for part in self.generate_parts for layer in layers]

    def split_prompts(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the first prompts that are long enough to be split."""
        return [i for i, prompt in enumerate(prompts) if len(prompt.tokens) >= SPLIT_TOKENS][: self.skip_prompts]

    def first(self, n: int, prompts: Sequence[Prompt]) -> list[int]:
        """Return the first `n` prompts that have a token to predict."""
        return [i for i, prompt in enumerate(prompts) if len(prompt.tokens) > 1][:n]

    @property
    def wide_and_narrow(self) -> tuple[int, int]:
        """Return the widths between which the frontier lies.

        Raises:
            OptionError: a frontier of one width.
        """
        if self.frontier_points and len(set(self.bits)) < 2:
            raise OptionError(f"frontier_points needs two widths, and bits is {self.bits}: give two, such as 8,4")
        return max(self.bits), min(self.bits)

    def dropped(self, n_layers: int) -> int:
        """Return how many blocks the removal curves take away; at least one block of the model is left."""
        return min(self.drop_blocks, len(self.swept(n_layers)), n_layers - 1)

    def greedy_rounds(self, n_layers: int) -> int:
        """Return how many parts the greedy removal takes away; at least one that could go is left."""
        return min(self.greedy_steps, 2 * len(self.swept(n_layers)) - 1)
