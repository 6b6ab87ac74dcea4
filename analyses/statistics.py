"""Intervals that every table carries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
"""Bootstrap resamples of a default interval."""


@dataclass(frozen=True)
class Interval:
    """Means with 95 % intervals, one per column."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def cluster_bootstrap(
    values: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> Interval:
    """Mean of rows with a percentile interval from resampling whole groups.

    Tokens of one prompt are not independent, so prompts are what is resampled.

    Args:
        values: [rows] or [rows, columns].
        groups: [rows], the group (prompt) of each row.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) == 0:
        empty = np.full(table.shape[1], np.nan)
        return Interval(empty, empty, empty)
    means = cluster_means(table, groups, seed=seed, resamples=resamples)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    return Interval(table.mean(axis=0), low, high)


def cluster_means(
    values: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES
) -> NDArray[np.float64]:
    """Means of rows [rows, columns] over draws of whole groups with replacement; [resamples, columns]."""
    table = np.asarray(values, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    n = int(group.max()) + 1
    sums = np.zeros((n, table.shape[1]))
    np.add.at(sums, group, table)
    counts = np.bincount(group, minlength=n).astype(np.float64)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    return np.asarray((draws @ sums) / (draws @ counts)[:, None])


def wilson(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion; (nan, nan) for n = 0."""
    if n == 0:
        return float("nan"), float("nan")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(centre - half), float(centre + half)
