"""How deep a concept lies: statistics of a curve of probe accuracy over layers.

Relative depth is i / D for layer i of D layers. A statistic that a curve does not have is nan.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

JUMP = 1.1
"""A layer's accuracy over the one before it, from which the rise counts as a jump."""
STEADY = 0.03
"""How far that ratio may be from 1 for the curve to count as steady."""
SHARE = 0.9

Curves = NDArray[np.float64]


def depth_statistics(curves: ArrayLike, chance: float) -> dict[str, Curves]:
    """Statistics of each curve of accuracies [curves, layers]; one value per curve.

    `jump` is the first layer whose accuracy is at least 1.1 times the one before. `converging_first` and
    `converging_literal` are the first and the last layer whose ratio to the one before is within 3 % of 1; the latter is
    the published formula as we read it, and nearly always the last layer. `converging_stable` (ours) is the first
    layer after which every ratio is within 3 %. `depth_90` is the first layer at 90 % of the way from chance to the
    maximum, `area` the mean of (accuracy - chance) / (1 - chance) over layers, `peak_layer` the first layer of the maximum.
    """
    table = np.atleast_2d(np.asarray(curves, dtype=np.float64))
    n_layers = table.shape[1]
    ratio = table[:, 1:] / np.maximum(table[:, :-1], 1e-12)
    steady = np.abs(ratio - 1) < STEADY
    moving_from = np.where(steady.all(axis=1), 0, n_layers - 1 - np.argmax(~steady[:, ::-1], axis=1))
    top = table.max(axis=1)
    reached = table >= (chance + SHARE * (top - chance))[:, None]
    return {
        "jump": _first(ratio >= JUMP, 1) / n_layers,
        "converging_literal": (n_layers - _first(steady[:, ::-1], 1)) / n_layers,
        "converging_first": _first(steady, 1) / n_layers,
        "converging_stable": np.maximum(moving_from, 1) / n_layers,
        "depth_90": np.where(top > chance, _first(reached, 0) / n_layers, np.nan),
        "area": ((table - chance) / (1 - chance)).mean(axis=1),
        "peak_layer": table.argmax(axis=1).astype(np.float64),
        "peak_accuracy": top,
    }


def _first(found: NDArray[np.bool_], offset: int) -> Curves:
    """The first true column of each row, counted from `offset`; nan where there is none."""
    return np.where(found.any(axis=1), found.argmax(axis=1) + offset, np.nan)


def depth_row(curve: ArrayLike, draws: ArrayLike, chance: float) -> dict[str, Any]:
    """The statistics of one curve [layers], each with a 95 % interval over bootstrap draws [draws, layers].

    `jump_share` is the share of draws that have a jump at all; the interval of a statistic is over the draws that have it.
    """
    found = {name: float(values[0]) for name, values in depth_statistics(curve, chance).items()}
    spread = pd.DataFrame(depth_statistics(draws, chance))
    low, high = spread.quantile(0.025), spread.quantile(0.975)
    row: dict[str, Any] = dict(found)
    for name in found:
        row[f"{name}_low"], row[f"{name}_high"] = float(low[name]), float(high[name])
    return {**row, "jump_share": float(spread["jump"].notna().mean())}
