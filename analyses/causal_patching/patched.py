"""Every cell of every pair: planned, patched, and kept as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.causal_patching.cells import EVERYWHERE, Cell, HeadMode, cells_of
from analyses.causal_patching.metrics import MIN_KL, UNITS
from analyses.causal_patching.opened import first_patched
from analyses.causal_patching.pairs import Direction, Pair
from analyses.interventions import swept
from analyses.results.statistics import Array
from probes.models.protocol import Shape

ALL = "all"
"""The role of cells at every position from the first difference on."""
PLACE = ["direction", "component", "layer", "head", "role", "metric"]
"""Columns that name a cell of the map."""


@dataclass(frozen=True)
class GridPlan:
    """Which cells of each pair are patched."""

    components: tuple[str, ...]
    heads: HeadMode
    roles: tuple[str, ...]
    """Names or distances from the end; all where there are none."""
    window: int | str
    layers: tuple[int, ...] = ()
    """Layers that are patched; every `stride`-th where none is named."""
    stride: int = 1

    def swept(self, shape: Shape) -> list[int]:
        """Return the layers that are patched.

        Raises:
            OptionError: a layer that the model does not have.
        """
        return swept(shape.n_layers, self.layers, self.stride)

    def cells(self, shape: Shape, pair: Pair, direction: Direction) -> list[Cell]:
        """Return the cells of a pair, those that cannot change anything among them."""
        positions = self.positions(pair, direction)
        return cells_of(shape, self.components, self.heads, positions, self.window, self.swept(shape))  # type: ignore[arg-type]

    def positions(self, pair: Pair, direction: Direction) -> list[int]:
        """Return the positions of the patched run that have a role asked for."""
        n = len(pair.base(direction))
        roles = pair.roles(direction)
        return sorted(p for p, role in roles.items() if not self.roles or {role, str(p - n)} & set(self.roles))

    def run(self, shape: Shape, pair: Pair, direction: Direction) -> tuple[list[Cell], NDArray[np.bool_]]:
        """Return (the cells of a pair, which of them cannot change anything and are not run)."""
        cells = self.cells(shape, pair, direction)
        return cells, exact_zeros(cells, shape, pair, direction)


def exact_zeros(cells: Sequence[Cell], shape: Shape, pair: Pair, direction: Direction) -> NDArray[np.bool_]:
    """Return which cells leave every later number as it is, [cell]: before the first difference, or after the last use."""
    end = len(pair.base(direction)) - 1
    if not shape.causal:
        return np.zeros(len(cells), dtype=bool)
    start, kept = first_patched(pair, direction), set(pair.sources(direction))
    return np.array([
        cell.position != EVERYWHERE
        and (cell.position < start or cell.position not in kept or cell.changes_nothing(shape.n_layers, end))
        for cell in cells
    ], dtype=bool)  # fmt: skip


def cells_table(
    pair: Pair,
    direction: Direction,
    cells: Sequence[Cell],
    zeros: NDArray[np.bool_],
    values: Array,
    ends: tuple[Array, Array],
    metrics: Sequence[str],
    source: str,
    window: int | str,
) -> pd.DataFrame:
    """Return one row per cell and metric: effect is m_patched less the metric of the run that was patched.

    `recovery` is the share of the gap between the two runs that the cell brings back (denoising) or takes away (noising);
    0 is nothing and 1 the whole gap, without clipping.

    Args:
        values: the metrics under each cell, [cell, metric].
        ends: the metrics of the clean and of the corrupted run, [metric] each.
    """
    clean, corrupted = ends
    base = corrupted if direction == "denoise" else clean
    sign = 1.0 if direction == "denoise" else -1.0
    roles, n = pair.roles(direction), len(metrics)
    effect = values - base
    with np.errstate(divide="ignore", invalid="ignore"):
        recovery = sign * effect / shareable(clean - corrupted, metrics)
    each = {
        "component": [c.component for c in cells], "layer": [c.layer for c in cells], "head": [c.head for c in cells],
        "position": [c.position for c in cells],
        "role": [ALL if c.position == EVERYWHERE else roles[c.position] for c in cells],
        "n_patched": [len(c.layers) for c in cells], "exact_zero": zeros,
    }  # fmt: skip
    table = pd.DataFrame({name: np.repeat(np.asarray(column, dtype=object), n) for name, column in each.items()})
    table = table.astype({"layer": int, "head": int, "position": int, "n_patched": int, "exact_zero": bool})
    table = table.assign(
        pair=pair.index, direction=direction, window=str(window), source=source,
        metric=np.tile(list(metrics), len(cells)), m_patched=values.ravel(), effect=effect.ravel(),
        recovery=recovery.ravel(),
    )  # fmt: skip
    table["unit"] = table["metric"].map(UNITS)
    order = (
        *("pair", "direction", "component", "layer", "head", "position", "role", "window", "n_patched"),
        *("metric", "m_patched", "unit", "effect", "recovery", "source", "exact_zero"),
    )
    return table[list(order)]


def shareable(gap: Array, metrics: Sequence[str]) -> Array:
    """Return gaps that a recovery can be a share of: NaN where they do not have the sign they should, or are too small."""
    least = np.array([-np.inf if name == "kl" else 0.0 for name in metrics])
    small = np.array([name == "kl" for name in metrics]) & (np.abs(gap) < MIN_KL)
    return np.where((gap <= least) | small, np.nan, gap)


def pairs_table(
    pairs: Sequence[Pair], ends: Mapping[int, tuple[Array, Array]], reasons: Mapping[int, str], metrics: Sequence[str]
) -> pd.DataFrame:
    """Return one row per pair and metric, those that were left out among them, with the reason."""
    rows = []
    for pair in pairs:
        clean, corrupted = ends.get(pair.index, (np.full(len(metrics), np.nan),) * 2)
        for i, metric in enumerate(metrics):
            reason = reasons.get(pair.index, "")
            rows.append((
                pair.index, pair.where, pair.group, pair.text, pair.corrupted_text, len(pair.clean), pair.first_difference, metric,
                clean[i], corrupted[i], clean[i] - corrupted[i], not reason, reason,
            ))  # fmt: skip
    columns = [
        *(
            "pair",
            "where",
            "group",
            "clean",
            "corrupted",
            "tokens",
            "first_difference",
            "metric",
            "m_clean",
            "m_corrupted",
        ),
        *("gap", "kept", "reason"),
    ]
    return pd.DataFrame(rows, columns=columns)
