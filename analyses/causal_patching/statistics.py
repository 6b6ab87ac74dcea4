"""Cells of many pairs as one map: shares of the gap with intervals, and which cells stand out from all that were tried.

Family-wise p by the largest statistic over all cells under random signs (Nichols and Holmes 2002, "Nonparametric
permutation tests for functional neuroimaging").
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

from analyses.causal_patching.patched import PLACE
from analyses.results.statistics import RESAMPLES, Array, percentiles, resampled_ratios

MIN_PAIRS = 8
"""Groups of pairs below which no p is given: 2^7 different signs are too few."""
FOUND_P, FOUND_SHARE = 0.05, 0.05
"""A cell counts as found below this family-wise p and from this share of the gap on."""
COLUMNS = 2000
"""Cells resampled at once, which bounds memory."""


def wide(cells: pd.DataFrame, value: str = "effect") -> pd.DataFrame:
    """Return cells as a table [pair, place], NaN where a pair has no cell there."""
    means = cells.groupby(["pair", *PLACE], observed=True)[value].mean()
    return means.unstack(PLACE).sort_index(axis="columns").dropna(axis="columns", how="all")


def live_roles(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of roles at which the runs of some pair differ; before the first difference nothing can change."""
    changing = cells.groupby("role")["exact_zero"].transform("min")
    return cells[~changing.astype(bool)]


def by_group(values: Array, groups: NDArray[np.int64]) -> Array:
    """Return sums of rows [pair, column] over groups, [group, column]."""
    out = np.zeros((int(groups.max()) + 1, values.shape[1]))
    np.add.at(out, groups, values)
    return out


def signs(effects: pd.DataFrame) -> Array:
    """Return per place 1 where more of the metric is recovery and -1 where less is, [place]."""
    return np.where(effects.columns.get_level_values("direction") == "denoise", 1.0, -1.0)


def ratios(effects: Array, gaps: Array, groups: NDArray[np.int64], seed: int) -> tuple[Array, tuple[Array, Array]]:
    """Return the ratio of summed effects to summed gaps over pairs, and its interval from resampling groups, [place].

    Args:
        effects: [pair, place], NaN where a pair has no cell.
        gaps: [pair, place].
    """
    known = np.isfinite(effects) & np.isfinite(gaps)
    tops, bottoms = (by_group(np.where(known, values, 0.0), groups) for values in (effects, gaps))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = tops.sum(0) / bottoms.sum(0)
    counts = (by_group(known.astype(float), groups) > 0).sum(0)
    lows, highs = [], []
    for i in range(0, effects.shape[1], COLUMNS):
        part = slice(i, i + COLUMNS)
        low, high = percentiles(resampled_ratios(tops[:, part], bottoms[:, part], seed=seed), counts[part])
        lows.append(low)
        highs.append(high)
    return ratio, (np.concatenate(lows), np.concatenate(highs))


def sign_flips(differences: Array, seed: int, flips: int = RESAMPLES) -> tuple[Array, Array]:
    """Return family-wise p and p by itself of each column of [group, place], under random signs of groups.

    NaN below `MIN_PAIRS` groups. A column that is zero throughout has p = 1.
    """
    n = len(differences)
    nothing = np.full(differences.shape[1], np.nan)
    if n < MIN_PAIRS:
        return nothing, nothing
    known = np.isfinite(differences)
    values, counts = np.where(known, differences, 0.0), known.sum(0)
    squares = (values**2).sum(0)
    rng = np.random.default_rng(seed)
    drawn = rng.choice([-1.0, 1.0], size=(flips, n))
    observed = np.abs(_t(values.sum(0)[None], squares, counts))[0]
    largest, as_large = np.zeros(flips), np.zeros(values.shape[1])
    for i in range(0, values.shape[1], COLUMNS):
        part = slice(i, i + COLUMNS)
        under = np.abs(_t(drawn @ values[:, part], squares[part], counts[part]))
        largest = np.maximum(largest, under.max(1))
        as_large[part] = (under >= observed[part] - 1e-12).sum(0)
    family = (1 + (largest[:, None] >= observed - 1e-12).sum(0)) / (1 + flips)
    return np.where(counts >= MIN_PAIRS, family, np.nan), np.where(
        counts >= MIN_PAIRS, (1 + as_large) / (1 + flips), np.nan
    )


def _t(sums: Array, squares: Array, counts: Array) -> Array:
    """Return Student's t of columns with these sums [..., column] and sums of squares; 0 for columns of zeros."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = sums / counts
        variance = np.maximum(squares - counts * mean**2, 0) / (counts - 1)
        t = mean / np.sqrt(variance / counts)
    # Values that agree to rounding have no spread of their own: they are as far from zero as anything.
    return np.where(mean == 0, 0.0, np.nan_to_num(t, nan=0.0, posinf=1e12, neginf=-1e12))


def map_table(cells: pd.DataFrame, pairs: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Return the columns of `PLACE`, then n, recovery, ci_low, ci_high, null, null_low, null_high, p_fwe, q, found.

    Recovery is a ratio of means over pairs: the sum of what the cell moves over the sum of the gaps, so that pairs with a
    small gap decide little. The null is the same cell with another source, where one was run.

    Args:
        cells: as `patched.cells_table`, of pairs that were kept.
        pairs: as `patched.pairs_table`.
    """
    kept, cells = pairs[pairs["kept"]], live_roles(cells)
    own = wide(cells[cells["source"] == "pair"])
    groups = kept.drop_duplicates("pair").set_index("pair")["group"].reindex(own.index)
    group = pd.factorize(groups)[0].astype(np.int64)
    gap = kept.pivot_table(index="pair", columns="metric", values="gap").reindex(own.index)
    gaps = gap[own.columns.get_level_values("metric")].to_numpy(dtype=float)
    sign = signs(own)
    effects = own.to_numpy(dtype=float) * sign
    recovery, (low, high) = ratios(effects, gaps, group, seed)
    table = own.columns.to_frame(index=False)
    table = table.assign(n=np.isfinite(effects).sum(0), recovery=recovery, ci_low=low, ci_high=high)
    nulls = cells[cells["source"] != "pair"]
    if nulls.empty:
        return table.assign(null=np.nan, null_low=np.nan, null_high=np.nan, p_fwe=np.nan, q=np.nan, found=False)
    other = wide(nulls).reindex(index=own.index, columns=own.columns).to_numpy(dtype=float) * sign
    null, (null_low, null_high) = ratios(other, gaps, group, seed)
    p_fwe, q = _families(table, by_group_mean(effects - other, group), seed)
    table = table.assign(null=null, null_low=null_low, null_high=null_high, p_fwe=p_fwe, q=q)
    return table.assign(found=(table["p_fwe"] < FOUND_P) & (table["recovery"].abs() >= FOUND_SHARE))


def by_group_mean(values: Array, groups: NDArray[np.int64]) -> Array:
    """Return means over groups of rows [pair, column], NaN where a group has none."""
    known = np.isfinite(values)
    with np.errstate(divide="ignore", invalid="ignore"):
        return by_group(np.where(known, values, 0.0), groups) / by_group(known.astype(float), groups)


def _families(table: pd.DataFrame, differences: Array, seed: int) -> tuple[Array, Array]:
    """Return family-wise p and Benjamini-Hochberg q of each place; all cells of a direction and metric are one family."""
    p_fwe, q = np.full(len(table), np.nan), np.full(len(table), np.nan)
    for _, family in table.groupby(["direction", "metric"]):
        at = family.index.to_numpy()
        p_fwe[at], alone = sign_flips(differences[:, at], seed)
        known = np.isfinite(alone)
        if known.any():
            q[at[known]] = false_discovery_control(alone[known])
    return p_fwe, q
