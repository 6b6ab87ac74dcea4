"""How much of the metric a circuit keeps when every other head is at its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from analyses.circuits import (
    areas,
    draw_items,
    interval,
    normalised,
    random_columns,
    resampled_faithfulness,
    sizes_of,
)  # fmt: skip
from analyses.contextual_decomposition.ablation import Ablation
from analyses.results.statistics import Array, percentiles
from probes.decomposition import Node
from probes.progress import QUIET, Progress


@dataclass(frozen=True)
class Keep:
    """A circuit among `nodes`: nodes outside it go to their baseline; heads that are not among the nodes stay."""

    circuit: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def at(self, ablation: Ablation) -> Bool[Tensor, "layer pos head"]:
        """Return where heads stay as they are."""
        shape, n = ablation.model.shape, len(ablation.case.tokens)
        keep = torch.ones(shape.n_layers, n, shape.n_heads, dtype=torch.bool)
        for nodes, stays in ((self.nodes, False), (self.circuit, True)):
            whole = [node for node in nodes if node.position < 0]
            placed = [node for node in nodes if node.position >= 0]
            keep[[node.layer for node in whole], :, [node.head for node in whole]] = stays
            keep[[n.layer for n in placed], [n.position for n in placed], [n.head for n in placed]] = stays
        return keep


def metrics(ablations: Sequence[Ablation], circuits: Sequence[Keep], progress: Progress) -> Array:
    """Return the metric [prompt, circuit] with every head outside the circuit at its baseline."""
    progress.start(len(ablations), "prompt's circuits")
    out = []
    for ablation in ablations:
        out.append(ablation.metric(torch.stack([circuit.at(ablation) for circuit in circuits])).numpy())
        progress.advance()
    return np.stack(out)


def faithfulness_tables(
    ablations: Sequence[Ablation],
    full: Array,
    empty: Array,
    orders: Mapping[str, Sequence[Node]],
    circuit: Sequence[Node],
    shares: Sequence[float],
    n_random: int,
    seed: int,
    progress: Progress = QUIET,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return columns method, size, faithfulness, ci_low, ci_high, random_mean, random_low, random_high, random_share_beaten, n_random,
    and the areas under each method's curve.

    The second table has columns method, unit, cpr, cpr_low, cpr_high, cmd, cmd_low, cmd_high, random_cpr, random_cmd,
    n_random: areas under f and |1 - f| over the logarithm of the share of heads kept, from the smallest size to all
    heads, divided by the logarithm's span (Mueller et al. 2025, MIB).

    Intervals resample prompts; the random bounds are the 5 and 95 % points over random circuits. There are none below
    `MIN_CLUSTERS` of either.

    Args:
        full: the metric of each prompt with every head.
        empty: the metric of each prompt with none of the nodes.
        orders: per method all heads, best first; its circuit of a size is the first so many.
        circuit: the searched circuit, a method of its own.
        shares: sizes, as shares of all heads.
        n_random: random circuits of each size, the same heads for every prompt.
    """
    heads = tuple(sorted(next(iter(orders.values()))))
    sizes = sizes_of(shares, len(heads))
    rng = np.random.default_rng(seed)
    plans: list[tuple[str, int, Sequence[Node]]] = [("circuit", len(circuit), circuit)] if circuit else []
    plans += [(method, size, order[:size]) for method, order in orders.items() for size in sizes]
    drawn = {size: [draw_items(rng, heads, size) for _ in range(n_random)] for size in {size for _, size, _ in plans}}
    circuits = [list(chosen) for _, _, chosen in plans] + [list(c) for size in drawn for c in drawn[size]]
    values = metrics(ablations, [Keep(tuple(chosen), heads) for chosen in circuits], progress)
    chosen, randoms = values[:, : len(plans)], _by_size(values[:, len(plans) :], drawn, full, empty)
    own = normalised(chosen, full, empty)
    low, high = interval(chosen, full, empty, seed)
    rows = []
    for column, (method, size, _) in enumerate(plans):
        compared = random_columns(own[column], randoms[size])
        rows.append((method, size, own[column], low[column], high[column], *compared, n_random))
    columns = [
        *("method", "size", "faithfulness", "ci_low", "ci_high", "random_mean", "random_low", "random_high"),
        *("random_share_beaten", "n_random"),
    ]
    areas_table = _areas_table(orders, plans, chosen, full, empty, randoms, len(heads), seed)
    return pd.DataFrame(rows, columns=columns), areas_table


def _areas_table(
    orders: Mapping[str, Sequence[Node]],
    plans: Sequence[tuple[str, int, Sequence[Node]]],
    values: Array,
    full: Array,
    empty: Array,
    randoms: Mapping[int, Array],
    n_heads: int,
    seed: int,
) -> pd.DataFrame:
    """Return the areas under each method's curve; the whole model, whose f is 1, ends it."""
    draws = resampled_faithfulness(values, full, empty, seed)
    own, rows = normalised(values, full, empty), []
    for method in orders:
        at = [i for i, (name, *_) in enumerate(plans) if name == method and plans[i][1] < n_heads]
        if not at:
            continue
        sizes = [plans[i][1] for i in at]
        shares = np.array([*sizes, n_heads]) / n_heads

        def ended(curve: Array) -> Array:
            return np.concatenate((curve, np.ones((*curve.shape[:-1], 1))), axis=-1)

        whole, spread = areas(shares, ended(own[at])), areas(shares, ended(draws[:, at]))
        chance = areas(shares, ended(np.stack([randoms[size] for size in sizes], axis=-1)))
        row: list[object] = [method, "heads"]
        for name in ("cpr_log", "cmd_log"):
            row += [float(getattr(whole, name)), *map(float, percentiles(getattr(spread, name), len(values)))]
        rows.append(
            (*row, float(chance.cpr_log.mean()), float(chance.cmd_log.mean()), len(next(iter(randoms.values()))))
        )
    columns = [name + end for name in ("cpr", "cmd") for end in ("", "_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "unit", *columns, "random_cpr", "random_cmd", "n_random"])


def _by_size(values: Array, drawn: Mapping[int, Sequence[object]], full: Array, empty: Array) -> dict[int, Array]:
    """Return the faithfulness of the random circuits of each size, from the metric [prompt, circuit]."""
    ends = np.cumsum([len(circuits) for circuits in drawn.values()])
    parts = np.split(normalised(values, full, empty), ends[:-1])
    return dict(zip(drawn, parts, strict=True))
