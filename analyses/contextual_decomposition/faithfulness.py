"""How much of the metric a circuit keeps when every other head is at its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.contextual_decomposition.effects import Ablation
from probes.decomposition import Node

Array = NDArray[np.float64]
RESAMPLES = 1000


def mask(circuit: Sequence[Node], n_layers: int, n_heads: int, n_positions: int) -> Tensor:
    """Where a circuit's heads stay as they are [layer, pos, head]."""
    keep = torch.zeros(n_layers, n_positions, n_heads, dtype=torch.bool)
    for node in circuit:
        spots = slice(None) if node.position < 0 else node.position
        keep[node.layer, spots, node.head] = True
    return keep


def metrics(ablations: Sequence[Ablation], circuits: Sequence[Sequence[Node]]) -> Array:
    """The metric [prompt, circuit] with every head outside the circuit at its baseline."""
    out = []
    for ablation in ablations:
        shape, n = ablation.model.shape, len(ablation.case.tokens)
        keep = torch.stack([mask(circuit, shape.n_layers, shape.n_heads, n) for circuit in circuits])
        out.append(ablation.metric(0, keep).numpy())
    return np.stack(out)


def normalised(values: Array, full: Array, empty: Array) -> Array:
    """(m(C) - m(empty)) / (m(full) - m(empty)) of means over prompts [prompt, ...]; [...]."""
    span = full.mean(0) - empty.mean(0)
    return np.asarray((values.mean(0) - empty.mean(0)) / span if span else np.full(values.shape[1:], np.nan))


def sizes_of(shares: Sequence[float], n_heads: int) -> list[int]:
    """Numbers of heads for shares of all, without repeats."""
    return sorted({min(n_heads, max(1, round(share * n_heads))) for share in shares})


def faithfulness_table(
    ablations: Sequence[Ablation],
    orders: Mapping[str, Sequence[Node]],
    circuit: Sequence[Node],
    shares: Sequence[float],
    n_random: int,
    seed: int,
) -> pd.DataFrame:
    """Columns method, size, faithfulness, ci_low, ci_high, random_mean, random_low, random_high, random_share_beaten, n_random.

    Args:
        orders: per method all heads, best first; its circuit of a size is the first so many.
        circuit: the searched circuit, a method of its own.
        shares: sizes, as shares of all heads.
        n_random: random circuits of each size, the same heads for every prompt.
    """
    heads = sorted(next(iter(orders.values())))
    sizes = sizes_of(shares, len(heads))
    rng = np.random.default_rng(seed)
    plans: list[tuple[str, int, Sequence[Node]]] = [("circuit", len(circuit), circuit)] if circuit else []
    plans += [(method, size, order[:size]) for method, order in orders.items() for size in sizes]
    drawn = {size: [_draw(rng, heads, size) for _ in range(n_random)] for size in {size for _, size, _ in plans}}
    circuits = [list(chosen) for _, _, chosen in plans] + [list(c) for size in drawn for c in drawn[size]]
    values = metrics(ablations, [heads, [], *circuits])
    full, empty, values = values[:, 0], values[:, 1], values[:, 2:]
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    randoms, start = {}, len(plans)
    for size, found in drawn.items():
        randoms[size] = normalised(values[:, start : start + len(found)], full, empty)
        start += len(found)
    rows = []
    for column, (method, size, _) in enumerate(plans):
        value = float(normalised(values[:, column], full, empty))
        spread = np.array([float(normalised(values[rows_, column], full[rows_], empty[rows_])) for rows_ in draws])
        random = randoms[size]
        low, high = np.nanquantile(spread, [0.025, 0.975]) if len(values) > 1 else (np.nan, np.nan)
        rows.append((
            method, size, value, low, high, random.mean(), *np.quantile(random, [0.05, 0.95]),
            float((random < value).mean()), n_random,
        ))  # fmt: skip
    columns = [
        *("method", "size", "faithfulness", "ci_low", "ci_high", "random_mean", "random_low", "random_high"),
        *("random_share_beaten", "n_random"),
    ]
    return pd.DataFrame(rows, columns=columns)


def _draw(rng: np.random.Generator, heads: Sequence[Node], size: int) -> list[Node]:
    """Distinct random heads, or as many as there are."""
    return [heads[int(i)] for i in rng.choice(len(heads), min(size, len(heads)), replace=False)]
