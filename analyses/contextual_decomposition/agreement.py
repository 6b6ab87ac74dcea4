"""How well each method's scores agree with ablation, and whether methods differ in that."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from analyses.contextual_decomposition.methods import NAMES
from analyses.results.statistics import MIN_CLUSTERS, RESAMPLES, Array, cluster_bootstrap, draw_groups, percentiles

TOP = 10
"""Heads left out to see whether a correlation is made by a few large ones."""
STATISTICS = {
    "pearson": "Pearson correlation",
    "spearman": "rank correlation (Spearman)",
    "pearson_without_top10": f"Pearson correlation without the {TOP} heads of largest effect",
}
"""Column of the table, and its name in words."""
SHARE = 0.05
"""Part of the nodes that count as those of largest effect, and as the first that a method names."""
RANKING = {
    "sign_agreement": "agreement in sign where the effect is told from zero",
    "precision_at_k": f"share of the first {SHARE:.0%} of nodes that are of the {SHARE:.0%} of largest effect",
    "auroc": f"AUROC for the {SHARE:.0%} of nodes of largest effect",
}
"""Further columns, and their names in words."""
ORDERS = 20
"""Random orders of a control."""
KINDS = {"heads": "heads", "mlps": "MLPs", "streams": "stream positions"}
"""Kinds of nodes, in words."""


def correlation(a: Array, b: Array) -> Array:
    """Return Pearson's correlation along the last axis; NaN where either side is constant or too short to have one."""
    if a.shape[-1] < 3:
        return np.full(np.broadcast_shapes(a.shape, b.shape)[:-1], np.nan)
    x, y = (values - values.mean(-1, keepdims=True) for values in (a, b))
    constant = (np.ptp(a, -1) == 0) | (np.ptp(b, -1) == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(constant, np.nan, (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)))


class _Judge:
    """Measured effects [..., node] with what every method is judged by, worked out once."""

    def __init__(self, effects: Array, rest: NDArray[np.intp], clear: NDArray[np.bool_]) -> None:
        """`rest` are the nodes without the largest; `clear` says whose effect has a sign."""
        self.effects, self.rest, self.clear = effects, rest, clear
        self.n = effects.shape[-1]
        self.k = max(1, round(SHARE * self.n))
        self.ranks, self.largest = rankdata(effects, axis=-1), _first(np.abs(effects), self.k)

    def statistics(self, scores: Array) -> Array:
        """Return `STATISTICS` and `RANKING` in the last axis, of scores [..., node]."""
        k, sizes = self.k, np.abs(scores)
        correlations = (
            correlation(scores, self.effects),
            correlation(rankdata(scores, axis=-1), self.ranks),
            correlation(scores[..., self.rest], self.effects[..., self.rest]),
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            area = ((rankdata(sizes, axis=-1) * self.largest).sum(-1) - k * (k + 1) / 2) / (k * (self.n - k))
            same = ((np.sign(scores) == np.sign(self.effects)) & self.clear).sum(-1) / self.clear.sum()
        hit = (self.largest & _first(sizes, k)).sum(-1) / k
        blind = (np.ptp(scores, -1) == 0) | (k == self.n)
        return np.stack((*correlations, same, *(np.where(blind, np.nan, x) for x in (hit, area))), axis=-1)


def _first(sizes: Array, k: int) -> NDArray[np.bool_]:
    """Mark the k largest along the last axis."""
    out = np.zeros(sizes.shape, dtype=bool)
    np.put_along_axis(out, np.argpartition(sizes, -k, axis=-1)[..., -k:], True, axis=-1)
    return out


def agreement_tables(
    scores: Mapping[str, Array],
    effects: Array,
    seed: int,
    controls: Mapping[str, Array] | None = None,
    kind: str = "heads",
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare each method's mean scores with mean effects over nodes of a kind.

    The first table has columns method, for each of `STATISTICS` its value, `_low` and `_high`, then slope, n_heads,
    n_prompts, kind, n_nodes, and for each of `RANKING` its value and bounds. `slope` is how much effect goes with one unit
    of score. The second has method, statistic, difference, ci_low, ci_high, base, kind: the statistic of `base`, the
    decomposition or RelP, less that of another method. Intervals resample prompts, the same for every method, and there
    are none below `MIN_CLUSTERS` prompts; the bounds of `random` are those of `ORDERS` random orders.

    Args:
        scores: per method [prompt, node]; `cdt` is the decomposition's.
        effects: the fall of the metric on ablating each node [prompt, node].
        controls: scores that know nothing of the metric, [prompt, node]; with them, `random` is added.
    """
    n, controls = len(effects), controls or {}
    rest = np.sort(np.argsort(-np.abs(effects.mean(0)), kind="stable")[TOP:])
    told = cluster_bootstrap(effects, np.arange(n), seed=seed)
    clear = (told.low > 0) | (told.high < 0)
    draws = draw_groups(n, seed, RESAMPLES if n >= MIN_CLUSTERS else 1)
    shares = np.eye(n)[draws].mean(1)

    def drawn(values: Array) -> Array:
        # Unlike a matrix product, this adds every head's values in one order, so that equal heads stay equal.
        return np.asarray(np.einsum("dp,ph->dh", shares, values))

    every = {**scores, **controls}
    whole, moved = (_Judge(values, rest, clear) for values in (effects.mean(0), drawn(effects)))
    spread = {method: moved.statistics(drawn(values)) for method, values in every.items()}
    own = {method: whole.statistics(values.mean(0)) for method, values in every.items()}
    slopes = {method: _slope(values.mean(0), effects.mean(0)) for method, values in every.items()}
    if controls:
        orders = np.random.default_rng(seed).random((ORDERS, effects.shape[1]))
        spread["random"] = _Judge(np.broadcast_to(effects.mean(0), orders.shape), rest, clear).statistics(orders)
        own["random"], slopes["random"] = spread["random"].mean(0), float("nan")
    rows = []
    for method, values in own.items():
        triples = np.stack((values, *percentiles(spread[method], n)), axis=1)
        first, more = triples[: len(STATISTICS)].ravel(), triples[len(STATISTICS) :].ravel()
        rows.append((method, *first, slopes[method], effects.shape[1], n, kind, effects.shape[1], *more))
    bounds = [[name + end for name in names for end in ("", "_low", "_high")] for names in (STATISTICS, RANKING)]
    columns = ["method", *bounds[0], "slope", "n_heads", "n_prompts", "kind", "n_nodes", *bounds[1]]
    gaps = [_differences(base, own, spread, scores, n) for base in ("cdt", "relp")]
    return pd.DataFrame(rows, columns=columns), pd.concat(gaps, ignore_index=True).assign(kind=kind)


def _slope(scores: Array, effects: Array) -> float:
    return float(np.polyfit(scores, effects, 1)[0]) if scores.std() else float("nan")


def _differences(
    base: str, own: Mapping[str, Array], spread: Mapping[str, Array], scores: Mapping[str, Array], n: int
) -> pd.DataFrame:
    """Return the statistics of a method less those of the others; RelP's less attribution patching's alone."""
    rows = []
    for method in scores if base in scores else ():
        if method == base or (base == "relp" and method != "attribution"):
            continue
        low, high = percentiles(spread[base] - spread[method], n)
        gaps = own[base] - own[method]
        rows += [(method, name, gaps[i], low[i], high[i], base) for i, name in enumerate(STATISTICS)]
    return pd.DataFrame(rows, columns=["method", "statistic", "difference", "ci_low", "ci_high", "base"])


def agreement_notes(table: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """Say in words whether the decomposition, or RelP, and attribution patching differ, by the intervals of their differences."""
    n = int(table["n_prompts"].iloc[0])
    if n < MIN_CLUSTERS:
        return [
            f"{n} prompts support no interval (at least {MIN_CLUSTERS} do), so nothing is said of which method agrees "
            "better with ablation."
        ]
    rivals = differences[differences["method"] == "attribution"]
    return [
        _note(str(kind), str(base), table[table["kind"] == kind].set_index("method"), gaps.set_index("statistic"))
        for (kind, base), gaps in rivals.groupby(["kind", "base"], sort=False)
    ]


def _note(kind: str, base: str, rows: pd.DataFrame, rival: pd.DataFrame) -> str:
    gaps: dict[str, dict[str, float]] = rival[["difference", "ci_low", "ci_high"]].to_dict("index")  # type: ignore[assignment]
    known = [name for name in STATISTICS if np.isfinite(gaps[name]["difference"])]
    said = [_sentence(name, base, rows, gaps[name]).replace("heads", KINDS[kind]) for name in known]
    if not said:
        return (
            f"Agreement with mean ablation over {KINDS[kind]} cannot be said: a method scores all alike, or ablating any "
            "costs the same."
        )
    return (
        f"Agreement with mean ablation over {int(rows['n_nodes'].iloc[0])} {KINDS[kind]} and {int(rows['n_prompts'].iloc[0])} "
        f"prompts, {NAMES[base]} beside {NAMES['attribution']}: {'; '.join(said)}."
    )


def _sentence(name: str, base: str, rows: pd.DataFrame, gap: Mapping[str, float]) -> str:
    value: Callable[[str], str] = lambda m: f"{float(str(rows.loc[m, name])):.2f}"  # noqa: E731
    verdict = "lower" if gap["ci_high"] < 0 else "higher" if gap["ci_low"] > 0 else "not told apart"
    return (
        f"{STATISTICS[name]} {value(base)} against {value('attribution')}, {verdict} "
        f"(difference {gap['difference']:+.2f} [{gap['ci_low']:+.2f}, {gap['ci_high']:+.2f}])"
    )
