"""The one table: every cheap proxy of a layer's importance beside its measured loss, and how well they agree."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations_with_replacement

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from analyses.results.per_prompt import PerPrompt, interval, resampled
from analyses.results.statistics import Array, correlation, percentiles

MIN_LAYERS = 5
"""Layers from which on some order of them is rarer than one in twenty: the two perfect ones are 2 of n! orders."""
PERMUTATIONS = 4000
"""Draws of the null distribution of a rank correlation."""


def proxy_tables(measured: Mapping[str, PerPrompt], fixed: Mapping[str, Array], seed: int) -> dict[str, pd.DataFrame]:
    """Tables `proxies` (NaN where a layer was not measured) and `proxy_intervals` (only layers that were).

    Args:
        measured: per proxy, its values per prompt and layer.
        fixed: per proxy that no prompt enters, its value per layer.
    """
    means = {name: column.mean().numpy() for name, column in measured.items()} | dict(fixed)
    n_layers = len(next(iter(means.values())))
    rows = []
    for name, mean in means.items():
        low, high = interval(measured[name], seed)[1:] if name in measured else (np.full(n_layers, np.nan),) * 2
        rows += [(layer, name, mean[layer], low[layer], high[layer]) for layer in range(n_layers)]
    intervals = pd.DataFrame(rows, columns=["layer", "proxy", "mean", "ci_low", "ci_high"])
    table = pd.DataFrame({"layer": np.arange(n_layers), **means})
    return {
        "proxies": table,
        "proxy_intervals": intervals.dropna(subset="mean").reset_index(drop=True),
    }


def agreement_table(measured: Mapping[str, PerPrompt], fixed: Mapping[str, Array], seed: int) -> pd.DataFrame:
    """Return the Spearman correlation of every two proxies over layers, with intervals over resampled prompts.

    Returns:
        Columns proxy_a, proxy_b, spearman, ci_low, ci_high, p_value (by permutation of layers), null_95 (the |rho| that
        5 % of random orders exceed; NaN where more than that are perfect, as from fewer than five layers), n (layers where
        both are known).
    """
    point = {name: column.mean().numpy()[None] for name, column in measured.items()}
    point |= {name: np.asarray(value, dtype=np.float64)[None] for name, value in fixed.items()}
    draws = {name: resampled(measured[name], seed) if name in measured else point[name] for name in point}
    known = {name: np.isfinite(value[0]) for name, value in point.items()}
    ranks: dict[tuple[str, bytes, bool], Array] = {}

    def rank(name: str, layers: NDArray[np.bool_], drawn: bool) -> Array:
        key = (name, layers.tobytes(), drawn)
        if key not in ranks:
            ranks[key] = rankdata((draws if drawn else point)[name][:, layers], axis=-1, nan_policy="omit")
        return ranks[key]

    nulls: dict[int, Array] = {}
    agreements: dict[tuple[str, str], tuple[float, ...]] = {}
    for a, b in combinations_with_replacement(point, 2):
        both = known[a] & known[b]
        n = int(both.sum())
        if n < 3:
            agreements[a, b] = agreements[b, a] = (*[np.nan] * 5, n)
            continue
        if n not in nulls:
            nulls[n] = np.sort(np.abs(null_correlations(n, seed)))
        rho = float(correlation(rank(a, both, False), rank(b, both, False))[0])
        prompts = min((int(measured[name].prompts()[both].min()) for name in (a, b) if name in measured), default=0)
        low, high = percentiles(correlation(rank(a, both, True), rank(b, both, True)), prompts)
        beyond = PERMUTATIONS - int(np.searchsorted(nulls[n], abs(rho) - 1e-12))
        band = float(nulls[n][int(0.95 * PERMUTATIONS)]) if n >= MIN_LAYERS else np.nan
        agreements[a, b] = agreements[b, a] = (rho, float(low), float(high), (1 + beyond) / (1 + PERMUTATIONS), band, n)
    rows = [(a, b, *agreements[a, b]) for a in point for b in point]
    return pd.DataFrame(
        rows, columns=["proxy_a", "proxy_b", "spearman", "ci_low", "ci_high", "p_value", "null_95", "n"]
    )


def null_correlations(n: int, seed: int) -> Array:
    """Rank correlations of random orders of n layers, [PERMUTATIONS]."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(n, dtype=np.float64), (PERMUTATIONS, 1)), axis=1)
    return np.nan_to_num(correlation(order, np.arange(n, dtype=np.float64)[None]))
