"""How well each method's scores agree with ablation, and whether methods differ in that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from analyses.contextual_decomposition.methods import NAMES
from analyses.results.statistics import MIN_CLUSTERS, RESAMPLES, draw_groups, percentiles

Array = NDArray[np.float64]
TOP = 10
"""Heads left out to see whether a correlation is made by a few large ones."""
STATISTICS = {
    "pearson": "Pearson correlation",
    "spearman": "rank correlation (Spearman)",
    "pearson_without_top10": f"Pearson correlation without the {TOP} heads of largest effect",
}
"""Column of the table, and its name in words."""


def correlation(a: Array, b: Array) -> Array:
    """Return Pearson's correlation along the last axis; NaN where either side is constant or too short to have one."""
    if a.shape[-1] < 3:
        return np.full(np.broadcast_shapes(a.shape, b.shape)[:-1], np.nan)
    x, y = (values - values.mean(-1, keepdims=True) for values in (a, b))
    constant = (np.ptp(a, -1) == 0) | (np.ptp(b, -1) == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(constant, np.nan, (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


def _statistics(scores: Array, effects: Array, rest: NDArray[np.intp]) -> Array:
    """Return `STATISTICS` in the last axis, of mean scores and effects [..., head]; `rest` are the heads without the largest."""
    return np.stack(
        (
            correlation(scores, effects),
            correlation(rankdata(scores, axis=-1), rankdata(effects, axis=-1)),
            correlation(scores[..., rest], effects[..., rest]),
        ),
        axis=-1,
    )


def agreement_tables(scores: Mapping[str, Array], effects: Array, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare each method's mean scores with mean effects over heads.

    The first table has columns method, for each of `STATISTICS` its value, `_low` and `_high`, then slope, n_heads,
    n_prompts. `slope` is how much effect goes with one unit of score. The second has method, statistic, difference,
    ci_low, ci_high: the decomposition's statistic less that of each other method. Intervals resample prompts, the same
    for every method, and there are none below `MIN_CLUSTERS` prompts.

    Args:
        scores: per method [prompt, head]; `cdt` is the decomposition's.
        effects: the fall of the metric on ablating each head [prompt, head].
    """
    n = len(effects)
    rest = np.sort(np.argsort(-np.abs(effects.mean(0)), kind="stable")[TOP:])
    draws = draw_groups(n, seed, RESAMPLES if n >= MIN_CLUSTERS else 1)
    shares = np.eye(n)[draws].mean(1)

    def drawn(values: Array) -> Array:
        # Unlike a matrix product, this adds every head's values in one order, so that equal heads stay equal.
        return np.asarray(np.einsum("dp,ph->dh", shares, values))

    spread = {method: _statistics(drawn(values), drawn(effects), rest) for method, values in scores.items()}
    own = {method: _statistics(values.mean(0), effects.mean(0), rest) for method, values in scores.items()}
    rows = []
    for method, values in scores.items():
        low, high = percentiles(spread[method], n)
        a, b = values.mean(0), effects.mean(0)
        slope = float(np.polyfit(a, b, 1)[0]) if a.std() else float("nan")
        triples = np.stack((own[method], low, high), axis=1).ravel()
        rows.append((method, *triples, slope, len(a), n))
    columns = [name + end for name in STATISTICS for end in ("", "_low", "_high")]
    table = pd.DataFrame(rows, columns=["method", *columns, "slope", "n_heads", "n_prompts"])
    return table, _differences(own, spread, n)


def _differences(own: Mapping[str, Array], spread: Mapping[str, Array], n: int) -> pd.DataFrame:
    rows = []
    for method in own:
        if method == "cdt" or "cdt" not in own:
            continue
        low, high = percentiles(spread["cdt"] - spread[method], n)
        gaps = own["cdt"] - own[method]
        rows += [(method, name, gaps[i], low[i], high[i]) for i, name in enumerate(STATISTICS)]
    return pd.DataFrame(rows, columns=["method", "statistic", "difference", "ci_low", "ci_high"])


def agreement_notes(table: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """Say in words whether the decomposition and attribution patching differ, by the intervals of their differences."""
    n = int(table["n_prompts"].iloc[0])
    if n < MIN_CLUSTERS:
        return [
            f"{n} prompts support no interval (at least {MIN_CLUSTERS} do), so nothing is said of which method agrees "
            "better with ablation."
        ]
    rows = table.set_index("method")
    rival = differences[differences["method"] == "attribution"].set_index("statistic")
    if rival.empty:
        return []
    gaps: dict[str, dict[str, float]] = rival[["difference", "ci_low", "ci_high"]].to_dict("index")  # type: ignore[assignment]
    said = [_sentence(name, rows, gaps[name]) for name in STATISTICS if np.isfinite(gaps[name]["difference"])]
    if not said:
        return [
            "Agreement with mean ablation cannot be said: a method scores all heads alike, or ablating any costs the same."
        ]
    return [
        f"Agreement with mean ablation over {int(rows['n_heads'].iloc[0])} heads and {n} prompts, "
        f"{NAMES['cdt']} beside {NAMES['attribution']}: {'; '.join(said)}."
    ]


def _sentence(name: str, rows: pd.DataFrame, gap: Mapping[str, float]) -> str:
    value: Callable[[str], str] = lambda m: f"{float(str(rows.loc[m, name])):.2f}"  # noqa: E731
    verdict = "lower" if gap["ci_high"] < 0 else "higher" if gap["ci_low"] > 0 else "not told apart"
    return (
        f"{STATISTICS[name]} {value('cdt')} against {value('attribution')}, {verdict} "
        f"(difference {gap['difference']:+.2f} [{gap['ci_low']:+.2f}, {gap['ci_high']:+.2f}])"
    )
