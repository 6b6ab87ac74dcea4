"""Cells: what is copied where, and how many block-rows of a model that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from probes.errors import OptionError
from probes.models.protocol import Model, Shape
from probes.points import POINTS, Address

Component = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
HeadMode = Literal["none", "all_positions", "by_position"]
STREAMS = ("resid_pre", "resid_post")
"""Components that are a row of the stream between two blocks."""
ADDED = ("attn_out", "mlp_out", "z")
"""Components of which several layers can be patched together."""
READ_LATER = ("k", "v")
"""Components that later positions read in the same block."""
EVERYWHERE = -1
"""Stands for a position: every one from the first difference on."""


@dataclass(frozen=True, order=True)
class Cell:
    """One component at one layer and position; of one head where it has heads."""

    component: str
    layer: int
    head: int = -1
    """-1 where the component has no heads; a key-value head for `k` and `v`."""
    position: int = EVERYWHERE
    """In the run that is patched; -1 for every position from the first difference on."""
    first: int = -1
    """The window's first layer; -1 for the layer alone."""
    last: int = -1
    """The window's last layer; -1 for the layer alone."""

    @property
    def layers(self) -> range:
        """The layers that are patched together."""
        return range(self.layer, self.layer + 1) if self.first < 0 else range(self.first, self.last + 1)

    @property
    def one_row(self) -> bool:
        """Whether nothing but one row of the stream that leaves its block changes there."""
        return self.position != EVERYWHERE and self.component not in READ_LATER and len(self.layers) == 1

    def changes_nothing(self, n_layers: int, end: int) -> bool:
        """Return whether the last row cannot change: a row of the last block that is not the last one."""
        return (
            self.one_row and self.layers[0] == n_layers - 1 and self.position != end and self.component != "resid_pre"
        )

    def block_rows(self, n_layers: int, length: int, start: int) -> int:
        """Return how many rows pass how many blocks, of a prompt of `length` tokens whose runs differ from `start` on."""
        after = n_layers - 1 - self.layers[0]
        if not self.one_row:
            rows = length - (start if self.position == EVERYWHERE or len(self.layers) > 1 else self.position)
            return (after + 1) * rows
        rows = length - self.position
        if self.component == "resid_pre":
            return (after + 1) * rows
        return after * rows + (self.component not in STREAMS)


def window_of(layer: int, width: int | Literal["prefix", "suffix"], n_layers: int) -> tuple[int, int]:
    """Return the first and last layer of the window around a layer.

    A window of w covers max(0, l - floor(w / 2)) to min(L, l + ceil(w / 2)) - 1, as causal tracing does (Meng et al.
    2022, released code); `prefix` covers 0 to l and `suffix` l to L - 1.
    """
    if width == "prefix":
        return 0, layer
    if width == "suffix":
        return layer, n_layers - 1
    return max(0, layer - width // 2), min(n_layers, layer + (width + 1) // 2) - 1


def cells_of(
    shape: Shape,
    components: Sequence[str],
    heads: HeadMode,
    positions: Sequence[int],
    window: int | Literal["prefix", "suffix"] = 1,
    layers: Sequence[int] | None = None,
) -> list[Cell]:
    """Return the cells of a grid over the given layers, or all of them, and the given positions."""
    cells: list[Cell] = []
    for component in components:
        n_heads = head_count(shape, component)
        if n_heads and heads == "none":
            continue
        places = (EVERYWHERE,) if n_heads and heads == "all_positions" else tuple(positions)
        for layer in range(shape.n_layers) if layers is None else layers:
            first, last = (-1, -1)
            if component in ADDED and window != 1:
                first, last = window_of(layer, window, shape.n_layers)
            cells += [
                Cell(component, layer, head, position, first, last)
                for head in (range(n_heads) if n_heads else (-1,))
                for position in places
            ]
    return cells


def head_count(shape: Shape, component: str) -> int:
    """Return how many heads a component has; 0 for none."""
    if component == "pattern":
        return shape.n_heads
    dims = POINTS[component].dims
    return shape.width(dims[1]) if len(dims) == 3 else 0


def check_components(model: Model, components: Sequence[str]) -> None:
    """Refuse components that the model does not have.

    Raises:
        OptionError: the first of them, with the model's reason.
    """
    for component in components:
        if reason := model.refusal(Address(component, 0)):
            raise OptionError(f"component {component!r} cannot be patched in {model.ref}: {reason}")
