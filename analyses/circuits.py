"""What a circuit keeps of a metric: sizes, random circuits, faithfulness and the areas under it, for every method."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from analyses.results.statistics import MIN_CLUSTERS, Array, draw_groups, percentiles

Item = TypeVar("Item", bound=Hashable)
"""A node or an edge."""


def normalised(values: Array, full: Array, empty: Array) -> Array:
    """Return (m(C) - m(empty)) / (m(full) - m(empty)), [...], of means over prompts of the metric [prompt, ...]."""
    span = full.mean(0) - empty.mean(0)
    return np.asarray((values.mean(0) - empty.mean(0)) / span if span else np.full(values.shape[1:], np.nan))


def sizes_of(shares: Sequence[float], n_items: int) -> list[int]:
    """Turn shares of all items into numbers of items, at least one, without repeats."""
    return sorted({min(n_items, max(1, round(share * n_items))) for share in shares})


def draw_items(rng: np.random.Generator, items: Sequence[Item], size: int) -> list[Item]:
    """Draw distinct items: `size` of them, or all where there are fewer."""
    return [items[int(i)] for i in rng.choice(len(items), min(size, len(items)), replace=False)]


def draw_per_layer(rng: np.random.Generator, layers: NDArray[np.intp], circuit: NDArray[np.intp]) -> NDArray[np.intp]:
    """Draw a random circuit with as many items of each layer as `circuit` has.

    Args:
        layers: of all items, [item].
        circuit: places of its items among all.
    """
    numbers = zip(*np.unique(layers[circuit], return_counts=True), strict=True)
    drawn = [rng.choice(np.flatnonzero(layers == layer), n, replace=False) for layer, n in numbers]
    return np.concatenate(drawn) if drawn else circuit


def band(random: Array) -> tuple[float, float]:
    """Return the 5 and 95 % points over random circuits; NaN where there are too few."""
    if len(random) < MIN_CLUSTERS:
        return float("nan"), float("nan")
    low, high = np.quantile(random, [0.05, 0.95])
    return float(low), float(high)


def resampled_faithfulness(values: Array, full: Array, empty: Array, seed: int) -> Array:
    """Return the faithfulness [draw, circuit] over draws of prompts with replacement, of the metric [prompt, circuit]."""
    n = len(values)
    weights = (draw_groups(n, seed)[:, :, None] == np.arange(n)).mean(1)
    base = weights @ empty
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray((weights @ values - base[:, None]) / (weights @ full - base)[:, None])


@dataclass(frozen=True)
class Areas:
    """Areas under faithfulness f over the size of circuits, as shares of all items (Mueller et al. 2025, "MIB", arXiv 2504.13151)."""

    cpr: Array
    """Trapezoid area under f, [...]."""
    cmd: Array
    """Trapezoid area under |1 - f|."""
    cpr_log: Array
    """The same over the logarithm of the share, divided by the logarithm's span, so that f = 1 gives 1."""
    cmd_log: Array


def areas(shares: ArrayLike, faithfulness: ArrayLike) -> Areas:
    """Return the areas of curves [..., size]; shares in (0, 1], rising."""
    x, f = np.asarray(shares, dtype=np.float64), np.asarray(faithfulness, dtype=np.float64)
    away, log = np.abs(1 - f), np.log(x)
    span = float(log[-1] - log[0]) or 1.0
    return Areas(*(np.trapezoid(y, along) / unit for along, unit in ((x, 1.0), (log, span)) for y in (f, away)))


def random_columns(own: float, random: Array) -> tuple[float, float, float, float]:
    """Return mean, 5 % and 95 % points of random circuits, and the share of them that a circuit beats."""
    return float(random.mean()), *band(random), float((random < own).mean())


def interval(values: Array, full: Array, empty: Array, seed: int) -> tuple[Array, Array]:
    """Return the bounds of each circuit's faithfulness, resampling prompts; NaN below `MIN_CLUSTERS` of them."""
    low, high = percentiles(resampled_faithfulness(values, full, empty, seed), len(values))
    return low, high


def at_shares(table: pd.DataFrame, shares: Sequence[float]) -> list[float]:
    """Return the faithfulness at the nearest size of at most each share, of a table with columns share and f; NaN for none."""
    ordered = table.sort_values("share")
    out = []
    for share in shares:
        below = ordered[ordered["share"] <= share + 1e-9]
        out.append(float(below["f"].iloc[-1]) if len(below) else float("nan"))
    return out
