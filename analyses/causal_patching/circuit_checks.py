"""Whether a circuit is complete and minimal, by subsets taken out of it and out of the whole model.

Wang et al. 2022, "Interpretability in the Wild", arXiv 2211.00593: a complete circuit loses what the model loses when the same
items go, and a minimal one has no item that never matters. Both for all subsets; here for drawn ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.causal_patching.circuit_plan import ITEMS, TAKEN_WITH, CircuitPlan
from analyses.causal_patching.levels import Indices, Level, circuit_metrics
from analyses.causal_patching.running import Run
from analyses.circuits import draw_items, draw_per_layer, normalised, resampled_faithfulness
from analyses.results.statistics import Array, percentiles
from probes.progress import Progress

FAITHFUL = 0.8
"""A circuit is checked from this share of the metric on."""
LARGEST = 0.5
"""Circuits of more than this share of all items are not checked: they say little of where."""
CHECK_COLUMNS = ("method", "level", "ablation", "split", "n_pairs", "n_items", "share", "f")
"""First columns of `circuit_checks`."""


def checked_size(curve: pd.DataFrame) -> int | None:
    """Return the size of the smallest circuit that keeps `FAITHFUL`, of columns share, n_items and f; None where none does."""
    good = curve[(curve["f"] >= FAITHFUL) & (curve["share"] <= LARGEST)]
    return int(good["n_items"].min()) if len(good) else None


@dataclass(frozen=True, eq=False)
class Checks:
    """Circuits that tell whether one circuit is complete and minimal, beside a random one with as many items of every layer."""

    subsets: Mapping[str, Sequence[Indices]]
    """Subsets of the circuit and of the random one, by `circuit` and `random`."""
    tried: Indices
    """Items of the circuit that are tried for being needed."""
    circuits: Sequence[Indices]
    """Everything that has to run. For every subset of either: what is left of it, and of the whole. Then, for nothing and for each
    of the first subsets of the circuit: what is left of it, and that without each item tried."""

    @classmethod
    def of(cls, level: Level, circuit: Indices, n_subsets: int, rng: np.random.Generator) -> Checks:
        """Draw subsets of 10 to 90 % of a circuit."""
        every = np.arange(len(level.layers))
        random = draw_per_layer(rng, level.layers, circuit)
        subsets = {
            name: [_subset(rng, items) for _ in range(n_subsets)]
            for name, items in (("circuit", circuit), ("random", random))
        }
        tried = np.sort(np.array(draw_items(rng, list(circuit), ITEMS), dtype=np.intp))
        circuits = []
        for name, items in (("circuit", circuit), ("random", random)):
            for subset in subsets[name]:
                circuits += [np.setdiff1d(items, subset), np.setdiff1d(every, subset)]
        for taken in (circuit[:0], *subsets["circuit"][:TAKEN_WITH]):
            circuits += [np.setdiff1d(circuit, taken), *(np.setdiff1d(circuit, [*taken, item]) for item in tried)]
        return cls(subsets, tried, circuits)

    def row(self, values: Array, full: Array, empty: Array, seed: int) -> dict[str, object]:
        """Return the columns of `circuit_checks`.

        Incompleteness is the mean over subsets of |f(C without K) - f(N without K)|, C the circuit and N the whole. The need
        of an item is the largest fall of f when it goes too, over the subsets it is taken out with.

        Args:
            values: the metric of `circuits`, [pair, circuit].
            full: of the whole model, [pair].
            empty: with nothing kept, [pair].
        """
        drawn = resampled_faithfulness(values, full, empty, seed)
        f = normalised(values, full, empty)
        row: dict[str, object] = {"n_subsets": len(self.subsets["circuit"])}
        begin = 0
        for name, prefix in (("circuit", ""), ("random", "random_")):
            end = begin + 2 * len(self.subsets[name])
            gaps, of_draws = np.abs(f[begin:end:2] - f[begin + 1 : end : 2]), drawn[:, begin:end]
            low, high = percentiles(np.abs(of_draws[:, ::2] - of_draws[:, 1::2]).mean(1), len(values))
            row |= {f"{prefix}incompleteness": float(gaps.mean()), f"{prefix}incompleteness_low": float(low)}
            row |= {f"{prefix}incompleteness_high": float(high), f"{prefix}worst_incompleteness": float(gaps.max())}
            begin = end
        each = f[begin:].reshape(-1, 1 + len(self.tried))
        need = (each[:, :1] - each[:, 1:]).max(0)
        return row | {
            "n_tried": len(self.tried), "need_median": float(np.median(need)), "need_least": float(need.min()),
            "share_never_needed": float((need <= 0).mean()),
        }  # fmt: skip


def _subset(rng: np.random.Generator, items: Indices) -> Indices:
    size = max(1, round(rng.uniform(0.1, 0.9) * len(items)))
    return np.array(draw_items(rng, list(items), size), dtype=np.intp)


def tried_pairs(split: str, ordering: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the pairs on which circuits are tried that `ordering` ordered: the others of a held-out split, [pair]."""
    return ~ordering if split == "held_out" else ordering


def checks_table(
    run: Run,
    level: Level,
    plan: CircuitPlan,
    scores: Mapping[str, Array],
    faithfulness: pd.DataFrame,
    ordering: NDArray[np.bool_],
    split: str,
    ends: Array,
    progress: Progress,
) -> pd.DataFrame:
    """Return `circuit_checks`: of each method's smallest faithful circuit, ordered and tried as the held-out rows are.

    Args:
        scores: what each method says of every item on every pair, [pair, item].
        ordering: which pairs order items, [pair].
        split: of the rows of `faithfulness` that were ordered so.
        ends: the metric of the whole, then with nothing kept, [pair, 2 or more].
    """
    tried = tried_pairs(split, ordering)
    rng, checks = np.random.default_rng(plan.seed), {}
    of_split = faithfulness[(faithfulness["split"] == split) & (faithfulness["ordered_by"] == "score")]
    for method, support in scores.items():
        curve = of_split[of_split["method"] == method]
        size = checked_size(curve)
        if size is not None:
            circuit = np.argsort(-support[ordering].mean(0), kind="stable")[:size]
            checks[method] = Checks.of(level, circuit, plan.n_subsets, rng), curve[curve["n_items"] == size].iloc[0]
    circuits = [circuit for one, _ in checks.values() for circuit in one.circuits]
    on = np.repeat(tried[:, None], len(circuits), axis=1)
    values = circuit_metrics(run, level, circuits, plan.ablation, progress, on)[tried] if circuits else np.zeros((0, 0))
    rows, begin = [], 0
    for method, (one, at) in checks.items():
        end = begin + len(one.circuits)
        rows.append(
            {
                "method": method,
                "level": plan.level,
                "ablation": plan.ablation,
                "split": split,
                "n_pairs": int(tried.sum()),
            }
            | {name: at[name] for name in ("n_items", "share", "f")}
            | one.row(values[:, begin:end], ends[tried, 0], ends[tried, 1], plan.seed)
        )
        begin = end
    return pd.DataFrame(rows, columns=None if rows else CHECK_COLUMNS)
