"""How far fast estimates can be trusted: the largest, and as many drawn at random, are patched exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import beta, rankdata

from analyses.causal_patching.statistics import by_group
from analyses.results.statistics import Array, correlation, percentiles, resampled_ratios


@dataclass(frozen=True)
class Budget:
    """Which of many estimates are patched exactly."""

    top: tuple[int, ...]
    """Those of the largest size, largest first."""
    random: tuple[int, ...]
    """As many of the others."""

    @property
    def chosen(self) -> list[int]:
        """All of them, the largest first."""
        return [*self.top, *self.random]


def budget(scores: Array, verify: int, seed: int) -> Budget:
    """Choose the `verify` estimates of the largest size, and as many of the rest at random."""
    order = np.argsort(-np.abs(scores), kind="stable")
    rest = order[verify:]
    drawn = np.random.default_rng(seed).choice(rest, min(verify, len(rest)), replace=False) if len(rest) else rest
    return Budget(tuple(int(i) for i in order[:verify]), tuple(int(i) for i in drawn))


def verification_row(
    method: str, scores: Array, exact: Array, chosen: Budget, signed: bool, groups: NDArray[np.int64], seed: int
) -> dict[str, object]:
    """Compare estimates with exact effects over what was verified, as means over pairs.

    `share_of_effect` is the part of all effects, by size, that the top holds, the rest being judged by the random ones.
    `missed_bound`: with 95 % confidence at most this share of what was not verified has an effect above the smallest verified
    one of the top (Clopper and Pearson 1934).

    Args:
        scores: of every node or edge on every pair, [pair, item]; NaN where a pair has none.
        exact: of the verified ones, [pair, verified], in the order of `chosen`.
        chosen: which those are.
        signed: whether the estimates have signs; otherwise sizes are compared, and signs are not.
        groups: of the pairs, for resampling.
    """
    k, r = len(chosen.top), len(chosen.random)
    estimated, effects = pair_means(scores[:, chosen.chosen]), pair_means(exact)
    sizes = np.abs(effects)
    above = int((sizes[k:] > sizes[:k].min()).sum()) if k else r
    rest = (scores.shape[1] - k) * float(sizes[k:].mean()) if r else 0.0
    total = float(sizes[:k].sum()) + rest
    return {
        "method": method, "k": k, "n_random": r,
        **agreement(scores[:, chosen.chosen], exact, groups, seed, signed),
        "sign_agreement": float((np.sign(estimated) == np.sign(effects)).mean()) if signed and len(effects) else np.nan,
        "mean_abs_error": float(np.abs(estimated - (effects if signed else sizes)).mean()) if len(effects) else np.nan,
        "share_of_effect": float(sizes[:k].sum()) / total if total else np.nan,
        "missed_bound": float(beta.ppf(0.95, above + 1, r - above)) if above < r else 1.0,
    }  # fmt: skip


def pair_means(values: Array) -> Array:
    """Return means over the pairs that have an item, [item], of [pair, item]."""
    known = np.isfinite(values)
    return np.asarray(np.where(known, values, 0.0).sum(0) / np.maximum(known.sum(0), 1))


def agreement(
    scores: Array, exact: Array, groups: NDArray[np.int64], seed: int, signed: bool = True
) -> dict[str, float]:
    """Return the rank correlation of mean scores and mean exact effects, with its interval from resampling groups of pairs.

    Args:
        scores: [pair, item].
        exact: [pair, item].
        groups: of the pairs, [pair].
        signed: whether scores have signs; otherwise they are compared with the sizes of effects.
    """
    draws: list[Array] = []
    for values in (scores, exact):
        known = np.isfinite(values)
        sums, counts = (by_group(part, groups) for part in (np.where(known, values, 0.0), known.astype(np.float64)))
        draws.append(np.concatenate([pair_means(values)[None], resampled_ratios(sums, counts, seed=seed)]))
    ranks = rank_correlations(draws[0], draws[1] if signed else np.abs(draws[1]))
    low, high = percentiles(ranks[1:], int(groups.max()) + 1 if len(groups) else 0)
    return {"spearman": float(ranks[0]), "spearman_low": float(low), "spearman_high": float(high)}


def rank_correlations(a: Array, b: Array) -> Array:
    """Return Spearman's rank correlation of each row, [row], over the columns where both sides [row, column] are finite.

    NaN where either side of a row is constant or too short to have one.
    """
    known = np.isfinite(a) & np.isfinite(b)
    ranks = (rankdata(np.where(known, side, np.nan), axis=1, nan_policy="omit") for side in (a, b))
    # Left out of a row is what counts as its mean rank.
    left, right = (np.where(known, rank - (known.sum(1, keepdims=True) + 1) / 2, 0.0) for rank in ranks)
    return np.where(known.sum(1) < 3, np.nan, correlation(left, right))


def ranked(table: pd.DataFrame, chosen: Budget, exact: Array) -> pd.DataFrame:
    """Return a table of scores with rank, exact, verified and drawn_at_random; exact is NaN where it was not measured."""
    measured = np.full(len(table), np.nan)
    measured[chosen.chosen] = exact
    drawn = np.zeros(len(table), dtype=bool)
    drawn[list(chosen.random)] = True
    rank = pd.Series(-table["score"].abs().to_numpy()).rank(method="first").astype(int).to_numpy()
    return table.assign(rank=rank, exact=measured, verified=np.isfinite(measured), drawn_at_random=drawn)
