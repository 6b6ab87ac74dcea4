"""Means, their 95 % intervals, and the one resampling of groups that all of them use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
"""Bootstrap resamples of a default interval."""
LEVELS = (0.025, 0.975)
"""Ends of every interval."""
Z = 1.959964
"""Standard deviations from the mean to either end of a Gaussian interval."""
MIN_CLUSTERS = 6
"""Groups (prompts) below which no interval is given: every bound is NaN.

Percentile bounds lie within the range of the groups' means. Half of all groups lie on either side of the middle of a
symmetric distribution, so that range misses it in 2^(1 - n) of all samples: 6 % for n = 5, 3 % for n = 6. With fewer
than six groups nothing drawn from them can hold the truth 95 % of the time. A Wilson interval has no such bound.
"""

Ci = Literal["bootstrap", "gauss95"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Means with 95 % intervals, one per column; NaN bounds where there is no interval."""

    mean: Array
    low: Array
    high: Array

    def columns(self, name: str, ends: str = "", column: int = 0) -> dict[str, float]:
        """Return one mean as the column `name` of a row, and its bounds as `<ends>low` and `<ends>high`."""
        ends = ends or f"{name}_"
        return {name: self.mean[column], f"{ends}low": self.low[column], f"{ends}high": self.high[column]}


def draw_groups(n: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.intp]:
    """Draw n of n groups with replacement; [resamples, n], the index of each group drawn.

    The same seed draws the same groups, so that statistics of one seed are paired.
    """
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


@lru_cache(maxsize=2)  # Layer after layer the same draws are wanted.
def draw_counts(n: int, seed: int, resamples: int = RESAMPLES) -> Array:
    """Draw n of n groups with replacement; [resamples, n], how often each group is drawn, not to be written to."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    counts.flags.writeable = False
    return counts


def resampled_ratios(sums: ArrayLike, counts: ArrayLike, *, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return the sum of sums over the sum of counts of drawn groups, [resamples, columns].

    Args:
        sums: [groups, columns].
        counts: [groups, columns], or [groups, 1] where all columns share it.
    """
    table = np.asarray(sums, dtype=np.float64)
    draws = draw_counts(len(table), seed, resamples)
    with np.errstate(invalid="ignore"):
        return np.asarray((draws @ table) / (draws @ np.asarray(counts, dtype=np.float64)))


def cluster_means(values: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Array:
    """Return means of rows [rows, columns] over draws of whole groups; [resamples, columns]."""
    table = np.asarray(values, dtype=np.float64)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((int(group.max()) + 1, table.shape[1]))
    np.add.at(sums, group, table)
    return resampled_ratios(sums, np.bincount(group)[:, None], seed=seed, resamples=resamples)


def cluster_bootstrap(values: ArrayLike, groups: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Return the mean of rows with a percentile interval from resampling whole groups.

    Tokens of one prompt are not independent, so prompts are what is resampled. From fewer than `MIN_CLUSTERS` groups
    the mean comes without an interval: both bounds are NaN, so that tables hold NaN and figures draw no band.

    Args:
        values: [rows] or [rows, columns].
        groups: [rows], the group (prompt) of each row.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) == 0:
        empty = np.full(table.shape[1], np.nan)
        return Interval(empty, empty, empty)
    mean, clusters = table.mean(axis=0), len(np.unique(np.asarray(groups)))
    draws = cluster_means(table, groups, seed=seed, resamples=resamples)
    low, high = percentiles(draws, np.where(np.isfinite(mean), clusters, 0))
    return Interval(mean, low, high)


def row_interval(values: Array, ci: Ci, seed: int) -> Interval:
    """Return the mean of independent rows [rows, columns] with an interval, resampled or Gaussian.

    From fewer than `MIN_CLUSTERS` rows both bounds are NaN.
    """
    n = len(values)
    if ci == "bootstrap" or n < MIN_CLUSTERS:
        return cluster_bootstrap(values, np.arange(n), seed=seed)
    mean, half = values.mean(axis=0), Z * values.std(axis=0, ddof=1) / np.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def percentiles(draws: ArrayLike, clusters: ArrayLike) -> tuple[Any, Any]:
    """Return the bounds of the middle 95 % of resampled values [draws, ...]: arrays [...], or two numbers of [draws].

    This is the one rule of when there is an interval.

    Args:
        clusters: how many groups each column was resampled from, one number or [...]. Below `MIN_CLUSTERS` both bounds
            are NaN.
    """
    enough = np.asarray(clusters) >= MIN_CLUSTERS
    low, high = (np.where(enough, bound, np.nan)[()] for bound in quantiles(draws))
    return low, high


def quantiles(draws: ArrayLike) -> tuple[Array, Array]:
    """Return the 2.5 % and 97.5 % points along the first axis of [draws, ...], over finite values; NaN where there is none."""
    ordered = np.sort(np.asarray(draws, dtype=np.float64), axis=0)
    known = np.isfinite(ordered).sum(axis=0)
    last = np.maximum(known - 1, 0)
    bounds = []
    for level in LEVELS:
        below = np.floor(level * last).astype(np.int64)
        low, high = (np.take_along_axis(ordered, at[None], axis=0)[0] for at in (below, np.minimum(below + 1, last)))
        with np.errstate(invalid="ignore"):
            bounds.append(np.where(known > 0, low + (high - low) * (level * last - below), np.nan))
    return bounds[0], bounds[1]


def wilson(successes: int, n: int, z: float = Z) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion; (nan, nan) for n = 0."""
    if n == 0:
        return float("nan"), float("nan")
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(centre - half), float(centre + half)
