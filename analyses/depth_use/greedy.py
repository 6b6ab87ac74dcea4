"""Removing several parts: greedily by what the output loses, or in the order a proxy proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from analyses.depth_use.ablations import Study
from analyses.depth_use.settings import Distance, Tick
from analyses.results.per_prompt import PerPrompt, interval
from analyses.results.statistics import cluster_bootstrap
from probes.blocks.batch import Part, left_out

SUBLAYERS: tuple[Part, Part] = ("attn", "mlp")
RANDOM_ORDERS = 3
"""Random orders whose mean is the control of a removal curve."""
N_ORDERS = 4 + RANDOM_ORDERS
"""Orders in which blocks are removed."""


def greedy_removal(
    study: Study,
    steps: int,
    distance: Distance,
    layers: Sequence[int],
    tick: Tick,
    known: Mapping[tuple[Part, int], float] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Repeatedly removes the attention or MLP part whose absence changes the output least (FinerCut, arXiv 2405.18218).

    Every candidate is restarted from the stream, under what has been removed already, that enters its block.

    Args:
        steps: parts removed; fewer than `layers` have.
        known: the distance of every single removal, where it was measured before; the first step is then free.

    Returns:
        Columns step (from 1), part, layer, distance (to the unchanged output), delta_ce, ci_low, ci_high (over prompts),
        runner_up_distance.
    """
    chunk, blocks = study.chunk, study.blocks
    removed: list[tuple[Part, int]] = []
    stream: Sequence[Tensor] = chunk.stream
    rows = []
    for step in range(1, steps + 1):
        found = dict(known) if known and not removed else _candidates(study, stream, removed, distance, layers, tick)
        (part, layer), least = min(found.items(), key=lambda item: item[1])
        runner_up = min((d for place, d in found.items() if place != (part, layer)), default=float("nan"))
        writes = left_out([*removed_from(removed, layer), (part, layer)])
        stream = [*stream[:layer], *blocks.run(stream[layer], layer, writes=writes)]
        tick(study.rows)
        removed.append((part, layer))
        rows.append((step, part, layer, least, *_loss(study, stream[-1], seed), runner_up))
    names = ["step", "part", "layer", "distance", "delta_ce", "ci_low", "ci_high", "runner_up_distance"]
    return pd.DataFrame(rows, columns=names)


def _loss(study: Study, final: Tensor, seed: int) -> tuple[float, float, float]:
    """(mean change of loss, its interval over prompts) when `final` leaves the last block."""
    change = study.outputs.loss(final) - study.outputs.ce
    known = study.counted[study.outputs.where] & ~change.isnan()
    found = cluster_bootstrap(change[known].numpy(), study.outputs.prompt[known].numpy(), seed=seed)
    return float(found.mean[0]), float(found.low[0]), float(found.high[0])


def _candidates(
    study: Study,
    stream: Sequence[Tensor],
    removed: Sequence[tuple[Part, int]],
    distance: Distance,
    layers: Sequence[int],
    tick: Tick,
) -> dict[tuple[Part, int], float]:
    """The distance that removing each remaining part would bring, beside what is removed already."""
    found: dict[tuple[Part, int], float] = {}
    for layer in layers:
        for part in SUBLAYERS:
            if (part, layer) not in removed:
                writes = left_out([*removed_from(removed, layer), (part, layer)])
                final = study.blocks.run(stream[layer], layer, writes=writes)[-1]
                found[part, layer] = mean_distance(study, final, distance)
                tick(study.rows)
    return found


def removed_from(removed: Sequence[tuple[Part, int]], layer: int) -> list[tuple[Part, int]]:
    """The removed parts of block `layer` and later, which a run from there must leave out again."""
    return [place for place in removed if place[1] >= layer]


def mean_distance(study: Study, final: Tensor, distance: Distance) -> float:
    """The mean distance over the counted tokens when `final` leaves the last block."""
    outputs = study.outputs
    values = outputs.change(final).jsd if distance == "jsd" else outputs.apart(final, distance)
    return float(values[study.counted[outputs.where]].mean())


def orders(proxies: pd.DataFrame, seed: int) -> dict[str, list[list[int]]]:
    """Orders in which to remove whole blocks, least important first, by name; `random` has several."""
    rng = np.random.default_rng(seed)
    by = {
        "measured loss": proxies["delta_ce_block"],
        "similarity (LLM-Drop)": proxies["similarity_block"],
        # Few weights far above the mean make a block important, so the largest share goes first.
        "weights (ZD)": -proxies["zd"],
        "deepest first": -proxies["layer"],
    }
    layers = proxies["layer"].to_numpy()
    found = {name: [list(layers[np.argsort(column.to_numpy(), kind="stable")])] for name, column in by.items()}
    return {**found, "random": [list(rng.permutation(layers)) for _ in range(RANDOM_ORDERS)]}


def drop_blocks(
    study: Study, wanted: Mapping[str, list[list[int]]], columns: Mapping[str, PerPrompt], tick: Tick
) -> None:
    """Enter the change of loss, per order and number of blocks removed (column n - 1), into `columns`."""
    chunk = study.chunk
    for name, several in wanted.items():
        for order in several:
            for n in range(1, columns[name].sums.shape[1] + 1):
                gone = {int(layer) for layer in order[:n]}
                final = study.blocks.run(chunk.stream[min(gone)], min(gone), skip=gone)[-1]
                study.enter_loss(columns[name], n - 1, final)
                tick(study.rows)


def drop_table(columns: Mapping[str, PerPrompt], seed: int) -> pd.DataFrame:
    """Columns order, removed, delta_ce, ci_low, ci_high (over prompts)."""
    parts = []
    for name, column in columns.items():
        mean, low, high = interval(column, seed)
        parts.append(
            pd.DataFrame(
                {
                    "order": name,
                    "removed": np.arange(1, len(mean) + 1),
                    "delta_ce": mean,
                    "ci_low": low,
                    "ci_high": high,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
