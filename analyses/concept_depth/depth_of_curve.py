"""How deep a concept lies: statistics of a curve of probe accuracy over layers.

Relative depth is i / D for layer i of D layers. A statistic that a curve does not have is nan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from analyses.results.statistics import percentiles

JUMP = 1.1
"""A layer's accuracy over the one before it, from which the rise counts as a jump."""
STEADY = 0.03
"""How far that ratio may be from 1 for the curve to count as steady."""
SHARE = 0.9

Curves = NDArray[np.float64]


def depth_statistics(
    curves: ArrayLike, chance: float, layers: Sequence[int] | None = None, n_layers: int | None = None
) -> dict[str, Curves]:
    """Statistics of each curve of accuracies [curves, layers]; one value per curve.

    Where only some layers were probed, `layers` are their numbers among the model's `n_layers`, and `the one before`
    is the one probed before.

    `jump` is the first layer whose accuracy is at least 1.1 times the one before. `converging_first` and
    `converging_literal` are the first and the last layer whose ratio to the one before is within 3 % of 1; the latter is
    the published formula as we read it, and nearly always the last layer. `converging_stable` (ours) is the first
    layer after which every ratio is within 3 %. `depth_90` is the first layer at 90 % of the way from chance to the
    maximum, `area` the mean of (accuracy - chance) / (1 - chance) over layers, `peak_layer` the first layer of the maximum.
    """
    table = np.atleast_2d(np.asarray(curves, dtype=np.float64))
    at = np.arange(table.shape[1]) if layers is None else np.asarray(layers)
    depth = at / (table.shape[1] if n_layers is None else n_layers)
    ratio = table[:, 1:] / np.maximum(table[:, :-1], 1e-12)
    steady = np.abs(ratio - 1) < STEADY
    last = table.shape[1] - 1
    moving_from = (
        np.where(steady.all(axis=1), 0, last - np.argmax(~steady[:, ::-1], axis=1)) if last else np.zeros(len(table))
    )
    top = table.max(axis=1)
    reached = table >= (chance + SHARE * (top - chance))[:, None]
    return {
        "jump": _first(ratio >= JUMP, depth[1:]),
        "converging_literal": _first(steady[:, ::-1], depth[:0:-1]),
        "converging_first": _first(steady, depth[1:]),
        "converging_stable": depth[np.minimum(np.maximum(moving_from, 1), last).astype(np.int64)],
        "depth_90": np.where(top > chance, _first(reached, depth), np.nan),
        "area": ((table - chance) / (1 - chance)).mean(axis=1),
        "peak_layer": at[table.argmax(axis=1)].astype(np.float64),
        "peak_accuracy": top,
    }


def _first(hits: NDArray[np.bool_], values: NDArray[np.float64]) -> Curves:
    """The value of the first true column of each row; nan where there is none."""
    if not hits.shape[1]:
        return np.full(len(hits), np.nan)
    return np.where(hits.any(axis=1), values[hits.argmax(axis=1)], np.nan)


def depth_row(
    curve: ArrayLike,
    draws: ArrayLike,
    chance: float,
    clusters: int,
    layers: Sequence[int] | None = None,
    n_layers: int | None = None,
) -> dict[str, Any]:
    """The statistics of one curve [layers], each with a 95 % interval over bootstrap draws [draws, layers] of `clusters`
    groups; no interval where they are too few.

    `jump_share` is the share of draws that have a jump at all; the interval of a statistic is over the draws that have it.
    """
    statistics = {name: float(values[0]) for name, values in depth_statistics(curve, chance, layers, n_layers).items()}
    spread = depth_statistics(draws, chance, layers, n_layers)
    row: dict[str, Any] = dict(statistics)
    for name, values in spread.items():
        low, high = percentiles(values, clusters)
        row[f"{name}_low"], row[f"{name}_high"] = float(low), float(high)
    return {**row, "jump_share": float(np.isfinite(spread["jump"]).mean())}
