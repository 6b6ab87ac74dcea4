"""What chance does: intervals over groups of questions, the best of many cells, and the oracle of many tries."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analyses.results.statistics import MIN_CLUSTERS, Array, Interval, cluster_bootstrap

FLIPS = 2000
"""Draws of signs for a family-wise p."""
_FLIPPED = 2**24
"""Numbers held at once while signs are flipped."""


def grouped_interval(values: Array, groups: Sequence[str], seed: int) -> Interval:
    """Return the mean of [question, column] over questions with its 95 % interval over groups of questions."""
    return cluster_bootstrap(values, np.asarray(groups), seed=seed)


def group_sums(values: Array, groups: Sequence[str]) -> Array:
    """Return the sums of [question, column] over the questions of each group, [group, column]."""
    _, which = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.zeros((int(which.max()) + 1, values.shape[1]))
    np.add.at(sums, which, values)
    return sums


def family_p(values: Array, groups: Sequence[str], seed: int) -> Array:
    """Return, per column, how often the largest of all columns is as large when the signs of whole groups are drawn, [column].

    The statistic is the mean over its standard error, in either direction. NaN from fewer groups than an interval needs,
    and for columns that are not finite.
    """
    known = np.isfinite(values).all(0)
    p = np.full(values.shape[1], np.nan)
    sums = group_sums(values[:, known], groups)
    n = len(sums)
    if n < MIN_CLUSTERS or not known.any():
        return p
    squares = (sums**2).sum(0)
    observed = _statistic(sums.sum(0), squares, n)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (FLIPS, n))
    several = np.array_split(signs, max(1, FLIPS * sums.shape[1] // _FLIPPED))
    largest = np.concatenate([_statistic(part @ sums, squares, n).max(1) for part in several])
    # The draw that was made counts among the draws.
    p[known] = (1 + (largest[:, None] >= observed - 1e-9).sum(0)) / (1 + FLIPS)
    return p


def _statistic(total: Array, squares: Array, n: int) -> Array:
    """Return |mean| over its standard error of n values of this sum and sum of squares; 0 where all are 0."""
    spread = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 1e-24 * squares / n) / (n - 1))
    return np.where(squares > 0, np.abs(total / n) / np.maximum(spread, 1e-300), 0.0)


def cross_fitted(gain: Array, groups: Sequence[str], seed: int) -> tuple[int, Interval]:
    """Return (the column that is best on all questions, what the column best on one half gains on the other, with its interval)."""
    halves = two_halves(groups, seed)
    elsewhere = np.zeros(len(gain))
    for half in (halves, ~halves):
        if half.any() and (~half).any():
            elsewhere[half] = gain[half, int(gain[~half].mean(0).argmax())]
    return int(gain.mean(0).argmax()), grouped_interval(elsewhere[:, None], groups, seed)


def two_halves(groups: Sequence[str], seed: int) -> np.ndarray:
    """Return whether each question is in the first half; whole groups are, so that about half of all questions is."""
    names, which, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    before = np.cumsum(sizes[order]) - sizes[order]
    first = np.zeros(len(names), dtype=bool)
    first[order[before < len(groups) / 2]] = True
    if first.all() and len(names) > 1:
        first[order[-1]] = False
    return np.asarray(first[which], dtype=bool)


def oracle_chance(p: Array, tries: int) -> Array:
    """Return 1 - (1 - p)^B: how often one of B programs answers where each does with probability p."""
    return np.asarray(1 - (1 - np.asarray(p, dtype=np.float64)) ** tries)
