"""What circuits of a growing size keep of the answer, the areas under it, and random circuits beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.causal_patching.circuit_checks import checks_table, tried_pairs
from analyses.causal_patching.circuit_plan import SHUFFLED, CircuitPlan
from analyses.causal_patching.levels import Indices, Level, circuit_metrics, level_of, supports
from analyses.causal_patching.running import Run
from analyses.causal_patching.verification import agreement
from analyses.circuits import (
    areas,
    at_shares,
    draw_per_layer,
    interval,
    normalised,
    random_columns,
    resampled_faithfulness,
    sizes_of,
)
from analyses.results.statistics import Array, percentiles
from probes.progress import Progress

OrderedBy = Literal["score", "size"]
"""Items that support the answer most come first, or those that matter most either way."""
AREAS: Mapping[str, OrderedBy] = {"cpr": "score", "cmd": "size", "cpr_log": "score", "cmd_log": "size"}
"""Which order each area is of: the share kept is best with support first, the distance from 1 with size first."""


@dataclass(frozen=True)
class Tried:
    """One circuit: what ordered its items, on which pairs the order was found, and its size."""

    method: str
    split: str
    ordered_by: str
    size: int


@dataclass
class Circuits:
    """Circuits that are tried, each on some of the pairs."""

    n_pairs: int
    items: list[Indices] = field(default_factory=list)
    kinds: list[Tried] = field(default_factory=list)
    on: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, kind: Tried, items: Indices, on: NDArray[np.bool_]) -> None:
        """Try a circuit on the pairs where `on` is true."""
        self.items.append(items)
        self.kinds.append(kind)
        self.on.append(on)

    def at(self, *kind: object) -> list[int]:
        """Return the circuits of a kind."""
        return [i for i, other in enumerate(self.kinds) if other == Tried(*kind)]  # type: ignore[arg-type]


def circuit_tables(
    run: Run, plan: CircuitPlan, progress: Progress, further: Mapping[str, Array] | None = None
) -> dict[str, pd.DataFrame]:
    """Return the tables `faithfulness` and `circuit_area`, of circuits ordered on one half of the pairs and tried on the other,
    and `circuit_checks` where subsets are drawn.

    Rows of split `in_sample` order and try on all pairs. Random circuits have the same size, or the same size in every layer
    (the harder control). A method that ends in `SHUFFLED` ordered items on pairs whose corrupted prompt is another pair's.

    Args:
        further: what other methods than the plan's say of every item on every pair, [pair, item].
    """
    level = level_of(run, plan.level, plan.line)
    own = {method: supports(run, level, method, progress) for method in plan.methods} | dict(further or {})
    scores, mixed = dict(own), shuffled_pairs(run)
    if mixed is not None:
        scores |= {method + SHUFFLED: supports(mixed, level, method, progress) for method in plan.shuffled}
    n = len(run.pairs)
    halves = {"held_out": np.arange(n) % 2 == 0} if n > 1 else {}
    halves["in_sample"] = np.ones(n, dtype=bool)
    n_items = len(level.layers)
    sizes = sizes_of([share for share in plan.shares if round(share * n_items) > 0], n_items)
    circuits = _planned(scores, level, halves, sizes, plan)
    values = circuit_metrics(run, level, circuits.items, plan.ablation, progress, np.stack(circuits.on, axis=1))
    table, area = [], []
    for method, support in scores.items():
        for split, ordering in halves.items():
            tried = tried_pairs(split, ordering)
            curves = _Curves(circuits, values[tried], method, split, sizes, np.array(sizes) / n_items, plan.seed)
            named: dict[str, object] = {"method": method, "level": plan.level, "ablation": plan.ablation}
            table += [named | row for row in curves.rows()]
            exact = scores.get("exact") if method != "exact" else None
            rank = (
                agreement(support[tried], exact[tried], run.groups[tried], plan.seed, method != "atp_star")
                if exact is not None
                else {}
            )
            area.append(named | curves.areas() | rank)
    tables = {"faithfulness": pd.DataFrame(table), "circuit_area": pd.DataFrame(area)}
    if plan.n_subsets:
        split, ordering = next(iter(halves.items()))
        tables["circuit_checks"] = checks_table(
            run, level, plan, own, tables["faithfulness"], ordering, split, values, progress
        )
    return tables


def shuffled_pairs(run: Run) -> Run | None:
    """Return the run with every pair's corrupted prompt taken from the next pair that can lend it; None where some pair has none.

    Only prompts of one length whose positions correspond one by one can be exchanged.
    """
    pairs = []
    for place, pair in enumerate(run.pairs):
        others = [*run.pairs[place + 1 :], *run.pairs[:place]]
        lends = (
            other
            for other in others
            if not (pair.aligned or other.aligned)
            and len(other.corrupted) == len(pair.clean)
            and other.corrupted not in (pair.clean, pair.corrupted)
        )
        lender = next(lends, None)
        if lender is None:
            return None
        pairs.append(replace(pair, corrupted=lender.corrupted))
    return replace(run, pairs=pairs)


def _planned(
    scores: Mapping[str, Array],
    level: Level,
    halves: Mapping[str, NDArray[np.bool_]],
    sizes: Sequence[int],
    plan: CircuitPlan,
) -> Circuits:
    """Return the whole, nothing, the first items of each order in each size, and random ones."""
    n_items, rng = len(level.layers), np.random.default_rng(plan.seed)
    every = np.ones(len(next(iter(scores.values()))), dtype=bool)
    circuits = Circuits(len(every))
    circuits.add(Tried("full", "", "", n_items), np.arange(n_items), every)
    circuits.add(Tried("empty", "", "", 0), np.arange(0), every)
    drawn_for = next(iter(halves))
    tried_on = tried_pairs(drawn_for, halves[drawn_for])
    for method, support in scores.items():
        for split, ordering in halves.items():
            means = support[ordering].mean(0)
            for ordered_by, values in (("score", means), ("size", np.abs(means))):
                order = np.argsort(-values, kind="stable")
                for size in sizes:
                    own = order[:size]
                    circuits.add(Tried(method, split, ordered_by, size), own, tried_pairs(split, ordering))
                    draws = (split, ordered_by) == (drawn_for, "score") and not method.endswith(SHUFFLED)
                    for _ in range(plan.n_random if draws else 0):
                        kind = Tried(method, split, "random_per_layer", size)
                        circuits.add(kind, draw_per_layer(rng, level.layers, own), tried_on)
    for size in sizes:
        for _ in range(plan.n_random):
            circuits.add(Tried("random", drawn_for, "random", size), rng.choice(n_items, size, replace=False), tried_on)
    return circuits


@dataclass(frozen=True, eq=False)
class _Curves:
    """What the circuits of one method keep over their size, on the pairs that they are tried on."""

    circuits: Circuits
    values: Array
    """Of these pairs, [pair, circuit]."""
    method: str
    split: str
    sizes: Sequence[int]
    shares: Array
    seed: int

    def _own(self, ordered_by: str) -> Array:
        return self.values[:, [self.circuits.at(self.method, self.split, ordered_by, size)[0] for size in self.sizes]]

    def _kept(self, values: Array) -> Array:
        return normalised(values, self.values[:, 0], self.values[:, 1])

    def _random(self, method: str, kind: str) -> Array:
        """Return what random circuits keep, [draw, size]; no draws for pairs they were not tried on."""
        at = [self.circuits.at(method, self.split, kind, size) for size in self.sizes]
        return np.stack([self._kept(self.values[:, of]) for of in at], axis=1)

    def rows(self) -> list[dict[str, object]]:
        """Return the rows of `faithfulness`."""
        random, layered = self._random("random", "random"), self._random(self.method, "random_per_layer")
        rows: list[dict[str, object]] = []
        for ordered_by in ("score", "size"):
            own = self._own(ordered_by)
            f, (low, high) = self._kept(own), interval(own, self.values[:, 0], self.values[:, 1], self.seed)
            for i, size in enumerate(self.sizes):
                names = ("random_mean", "random_low", "random_high", "random_share_beaten")
                compared = random_columns(f[i], random[:, i]) if len(random) else (np.nan,) * 4
                rows.append({
                    "share": self.shares[i], "n_items": size, "split": self.split, "ordered_by": ordered_by,
                    "n_pairs": len(own), "f": f[i], "ci_low": low[i], "ci_high": high[i],
                    **dict(zip(names, compared, strict=True)),
                    "random_per_layer_mean": float(layered[:, i].mean()) if len(layered) else np.nan,
                })  # fmt: skip
        return rows

    def areas(self) -> dict[str, object]:
        """Return the row of `circuit_area`."""
        row: dict[str, object] = {"split": self.split, "n_pairs": len(self.values)}
        ends = self.values[:, 0], self.values[:, 1]
        for name, ordered_by in AREAS.items():
            own = self._own(ordered_by)
            drawn = areas(self.shares, resampled_faithfulness(own, *ends, self.seed))
            low, high = percentiles(getattr(drawn, name), len(own))
            row |= {name: float(getattr(areas(self.shares, self._kept(own)), name))}
            row |= {f"{name}_low": float(low), f"{name}_high": float(high)}
        for kind, random in (
            ("random", self._random("random", "random")),
            ("random_per_layer", self._random(self.method, "random_per_layer")),
        ):
            for name in ("cpr", "cmd"):
                row[f"{kind}_{name}"] = (
                    float(getattr(areas(self.shares, random), name).mean()) if len(random) else np.nan
                )
        at = at_shares(pd.DataFrame({"share": self.shares, "f": self._kept(self._own("score"))}), (0.01, 0.05, 0.2))
        return row | dict(zip(("f_01", "f_05", "f_20"), at, strict=True))
