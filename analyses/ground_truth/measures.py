"""Distances between an answer and the truth: layers, bounds of layers, and sets."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite, nan

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, roc_auc_score

from analyses.ground_truth.answers import Ends
from probes.planted.record import Interval


def layer_errors(estimate: Ends, truth: Interval) -> Ends:
    """Return how many layers the two ends are late (positive) or early; NaN for an end that the method leaves open."""
    return estimate[0] - truth.first, estimate[1] - truth.last


def layer_error(estimate: Ends, truth: Interval) -> float:
    """Return the larger distance of the two ends, in layers; of those that the method names."""
    sizes = [abs(error) for error in layer_errors(estimate, truth) if isfinite(error)]
    return max(sizes, default=nan)


def bounded(low: Ends, high: Ends) -> list[int]:
    """Return which of the two ends the method gives both bounds of."""
    return [end for end in (0, 1) if isfinite(low[end]) and isfinite(high[end])]


def covered(low: Ends, high: Ends, truth: Interval) -> float:
    """Return the share of bounded ends whose bounds hold the truth; NaN where there are no bounds."""
    ends = bounded(low, high)
    right = (truth.first, truth.last)
    return float(np.mean([low[end] <= right[end] <= high[end] for end in ends])) if ends else nan


def width(low: Ends, high: Ends) -> float:
    """Return the mean distance of the bounds, in layers; NaN where there are none."""
    ends = bounded(low, high)
    return float(np.mean([high[end] - low[end] for end in ends])) if ends else nan


def interval_score(low: Ends, high: Ends, truth: Interval, level: float) -> float:
    """Return width + (2/α)·overshoot, in layers, averaged over bounded ends; NaN where there are none.

    Gneiting and Raftery 2007, "Strictly Proper Scoring Rules", section 6.2, with α = 1 - level.
    """
    right, scores = (truth.first, truth.last), []
    for end in bounded(low, high):
        over = max(low[end] - right[end], right[end] - high[end], 0.0)
        scores.append(high[end] - low[end] + 2 / (1 - level) * over)
    return float(np.mean(scores)) if scores else nan


def auroc(scores: Mapping[str, float], truth: Collection[str], candidates: Collection[str]) -> float:
    """Return the probability that one of the set is scored above one that is not; ties count half.

    Candidates without a score rank below all that have one. NaN where the set is empty or holds every candidate.
    """
    ranks, right = _columns(scores, truth, candidates)
    return float(roc_auc_score(right, ranks)) if right.any() and not right.all() else nan


def average_precision(scores: Mapping[str, float], truth: Collection[str], candidates: Collection[str]) -> float:
    """Return the mean, over the members of the set, of the precision among all scored at least as high; NaN for no member."""
    ranks, right = _columns(scores, truth, candidates)
    return float(average_precision_score(right, ranks)) if right.any() else nan


def _columns(
    scores: Mapping[str, float], truth: Collection[str], candidates: Collection[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of all that could be named, and which of them belong to the set."""
    names = sorted(set(candidates) | set(truth))
    values = np.array([scores.get(name, -np.inf) for name in names], dtype=np.float64)
    # Ranks stand for scores because metrics refuse infinite ones.
    return rankdata(np.where(np.isnan(values), -np.inf, values)), np.array([name in truth for name in names])


def f1(chosen: Collection[str], truth: Collection[str]) -> float:
    """Return 2·hits / (chosen + truth); NaN where both are empty."""
    total = len(chosen) + len(truth)
    return 2 * len(set(chosen) & set(truth)) / total if total else nan


def jaccard(chosen: Collection[str], truth: Collection[str]) -> float:
    """Return hits / union; NaN where both are empty."""
    union = set(chosen) | set(truth)
    return len(set(chosen) & set(truth)) / len(union) if union else nan
