"""Curves of the metric as heads or tokens are taken away by a method's order, the most relevant first and last, and their areas."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from analyses.circuits import normalised, resampled_faithfulness
from analyses.contextual_decomposition.ablation import POSITIONS, Ablation
from analyses.contextual_decomposition.prepared_cases import PreparedCases
from analyses.results.statistics import Array, percentiles
from probes.points import Address
from probes.progress import Progress

Rank = NDArray[np.intp]
SHARES = np.linspace(0, 1, 21)
"""Parts of all heads or tokens that are taken away."""
RANDOM_ORDERS = 20
"""Random orders, whose areas are the band."""
ORDERS = ("morf", "lerf")
"""The most relevant first, and the least relevant first."""

Measure = Callable[[int, Sequence[Rank]], Array]
"""Receives a prompt's place and sets of nodes; returns the metric [set] without each."""


@dataclass(frozen=True, eq=False)
class Unit:
    """What is taken away, and how the metric without it is measured."""

    name: str
    numbers: Sequence[int]
    """How many there are in each prompt."""
    full: Array
    empty: Array
    """The metric of each prompt with all of them and with none."""
    measure: Measure


def sizes_at(n: int) -> NDArray[np.intp]:
    """Return how many of n nodes are gone at each of `SHARES`."""
    return np.round(SHARES * n).astype(np.intp)


def inner_sizes(n: int) -> int:
    """How many different sets an order of n nodes gives, besides none and all."""
    return len(set(sizes_at(n).tolist()) - {0, n})


def removal_tables(
    unit: Unit, orders: Mapping[str, Sequence[Rank]], seed: int, progress: Progress
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return curves (method, unit, order, share, value) and areas (method, unit, abpc, ci_low, ci_high, comprehensiveness,
    sufficiency, random_low, random_high, n_random).

    Values are means over prompts of the metric, less that with nothing left, over the whole's less that. `abpc` is the
    area under the curve of least relevant first less that of most relevant first; `comprehensiveness` and `sufficiency`
    are one less the area of most and of least relevant first (Lee and Millan Arias 2025). A random order has 0 in
    expectation; the bounds are the 2.5 and 97.5 % points of `RANDOM_ORDERS` of them.

    Args:
        orders: per method, each prompt's nodes, most relevant first.
    """
    rng = np.random.default_rng(seed)
    random = {f"random {i}": [rng.permutation(n) for n in unit.numbers] for i in range(RANDOM_ORDERS)}
    every = {**orders, **random}
    progress.start(len(unit.numbers), f"prompt without {unit.name}")
    rows = []
    for prompt in range(len(unit.numbers)):
        rows.append(_prompt(unit, prompt, [ranks[prompt] for ranks in every.values()]))
        progress.advance()
    metric = np.stack(rows)  # [prompt, method, order, share]
    flat = metric.reshape(len(metric), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = normalised(metric, unit.full, unit.empty)
        drawn = resampled_faithfulness(flat, unit.full, unit.empty, seed).reshape(-1, *value.shape)
    areas, spread = np.asarray(np.trapezoid(value, SHARES)), np.asarray(np.trapezoid(drawn, SHARES))
    low, high = percentiles(spread[..., 1] - spread[..., 0], len(metric))
    abpc = areas[:, 1] - areas[:, 0]
    names = list(orders)
    bounds = np.quantile(abpc[len(names) :], [0.025, 0.975])
    table = pd.DataFrame({
        "method": names, "unit": unit.name, "abpc": abpc[: len(names)], "ci_low": low[: len(names)], "ci_high": high[: len(names)],
        "comprehensiveness": 1 - areas[: len(names), 0], "sufficiency": 1 - areas[: len(names), 1],
        "random_low": bounds[0], "random_high": bounds[1], "n_random": RANDOM_ORDERS,
    })  # fmt: skip
    return _curves(unit.name, names, value), table


def _curves(unit: str, names: Sequence[str], value: Array) -> pd.DataFrame:
    parts = [
        pd.DataFrame({"method": name, "unit": unit, "order": order, "share": SHARES, "value": value[i, j]})
        for i, name in enumerate(names)
        for j, order in enumerate(ORDERS)
    ]
    others = value[len(names) :].reshape(-1, len(SHARES))
    for order, at in (("random_low", 0.025), ("random_high", 0.975)):
        ends = np.quantile(others, at, axis=0)
        parts.append(pd.DataFrame({"method": "random", "unit": unit, "order": order, "share": SHARES, "value": ends}))
    return pd.concat(parts, ignore_index=True)


def _prompt(unit: Unit, prompt: int, ranks: Sequence[Rank]) -> Array:
    """Return one prompt's metric [method, order, share]."""
    n = unit.numbers[prompt]
    sizes = sizes_at(n)
    inside = sorted(set(sizes.tolist()) - {0, n})
    directed = [order for rank in ranks for order in (rank, rank[::-1])]
    gone = [order[:size] for order in directed for size in inside]
    measured = (unit.measure(prompt, gone) if gone else np.empty(0)).reshape(len(directed), len(inside))
    at = {0: unit.full[prompt], n: unit.empty[prompt]}
    out = [[at[size] if size in at else row[inside.index(size)] for size in sizes.tolist()] for row in measured]
    return np.asarray(out).reshape(len(ranks), len(ORDERS), len(SHARES))


def head_unit(prepared: PreparedCases) -> Unit:
    """Return the heads that are scored, taken away by mean ablation."""
    nodes, shape = prepared.heads, prepared.model.shape

    def measure(prompt: int, gone: Sequence[Rank]) -> Array:
        keep = torch.ones(len(gone), shape.n_layers, shape.n_heads, dtype=torch.bool)
        for row, chosen in enumerate(gone):
            keep[row, [nodes[i].layer for i in chosen], [nodes[i].head for i in chosen]] = False
        return prepared.ablations[prompt].metric(keep).numpy()

    return Unit("heads", [len(nodes)] * len(prepared.cases), prepared.full, prepared.empty, measure)


def token_unit(prepared: PreparedCases) -> Unit:
    """Return tokens, each taken away by putting the references' mean row of the first stream in its place."""
    lengths = [len(one.case.tokens) for one in prepared.cases]

    def measure(prompt: int, gone: Sequence[Rank]) -> Array:
        removed = torch.zeros(len(gone), lengths[prompt], dtype=torch.bool)
        for row, chosen in enumerate(gone):
            removed[row, chosen.tolist()] = True
        return token_metric(prepared.ablations[prompt], removed).numpy()

    empty = [measure(i, [np.arange(n)])[0] for i, n in enumerate(lengths)]
    return Unit("tokens", lengths, prepared.full, np.asarray(empty), measure)


@torch.no_grad()
def token_metric(ablation: Ablation, removed: Bool[Tensor, "row pos"]) -> Float[Tensor, " row"]:
    """Return the metric without the rows of some tokens; each set of them is one forward."""
    ablation.forwards += len(removed)
    distinct, row = torch.unique(removed, dim=0, return_inverse=True)
    values: list[Tensor] = []
    for part in distinct.split(max(1, POSITIONS // len(ablation.case.tokens))):

        def write(stream: Tensor, part: Tensor = part) -> Tensor:
            base = torch.zeros_like(stream[0]) if ablation.baseline is None else ablation.baseline.stream[0].to(stream)
            return torch.where(part.to(stream.device)[..., None], base, stream)

        values.append(ablation.under(len(part), {Address("resid_pre", 0): write}))
    return torch.cat(values)[row]
