"""Removing several parts: greedily by what the output loses, or in the order a proxy proposes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.depth_use.ablations import ChunkAblations
from analyses.depth_use.settings import Distance, Tick
from analyses.results.per_prompt import PerPrompt, interval, resampled
from analyses.results.statistics import cluster_bootstrap, percentiles
from probes.blocks.batch import Part, left_out

SUBLAYERS: tuple[Part, Part] = ("attn", "mlp")
RANDOM_ORDERS = 10
"""Random orders whose mean is the control of a removal curve."""
REMEASURED = "similarity, measured again"
N_ORDERS = 5 + RANDOM_ORDERS
"""Orders in which blocks are removed."""


def greedy_removal(
    ablations: ChunkAblations,
    steps: int,
    distance: Distance,
    layers: Sequence[int],
    tick: Tick,
    known: Mapping[tuple[Part, int], float] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Remove, again and again, the attention or MLP part whose absence changes the output least (FinerCut, arXiv 2405.18218).

    Every candidate is restarted from the stream, under what has been removed already, that enters its block.

    Args:
        steps: parts removed; fewer than `layers` have.
        known: the distance of every single removal, where it was measured before; the first step is then free.

    Returns:
        Columns step (from 1), part, layer, distance (to the unchanged output), delta_ce, ci_low, ci_high (over prompts),
        runner_up_distance.
    """
    chunk, blocks = ablations.chunk, ablations.blocks
    removed: list[tuple[Part, int]] = []
    stream: Sequence[Tensor] = chunk.stream
    rows = []
    for step in range(1, steps + 1):
        distances = (
            dict(known) if known and not removed else _candidates(ablations, stream, removed, distance, layers, tick)
        )
        (part, layer), least = min(distances.items(), key=lambda item: item[1])
        runner_up = min((d for place, d in distances.items() if place != (part, layer)), default=float("nan"))
        writes = left_out([*removed_from(removed, layer), (part, layer)])
        stream = [*stream[:layer], *blocks.run(stream[layer], layer, writes=writes)]
        tick(ablations.rows)
        removed.append((part, layer))
        rows.append((step, part, layer, least, *_loss(ablations, stream[-1], seed), runner_up))
    names = ["step", "part", "layer", "distance", "delta_ce", "ci_low", "ci_high", "runner_up_distance"]
    return pd.DataFrame(rows, columns=names)


def _loss(ablations: ChunkAblations, final: Tensor, seed: int) -> tuple[float, float, float]:
    """Return (mean change of loss, its interval over prompts) when `final` leaves the last block."""
    change = ablations.outputs.loss(final) - ablations.outputs.ce
    known = ablations.counted[ablations.outputs.where] & ~change.isnan()
    lost = cluster_bootstrap(change[known].numpy(), ablations.outputs.prompt[known].numpy(), seed=seed)
    return float(lost.mean[0]), float(lost.low[0]), float(lost.high[0])


def _candidates(
    ablations: ChunkAblations,
    stream: Sequence[Tensor],
    removed: Sequence[tuple[Part, int]],
    distance: Distance,
    layers: Sequence[int],
    tick: Tick,
) -> dict[tuple[Part, int], float]:
    """Return the distance that removing each remaining part would bring, beside what is removed already."""
    distances: dict[tuple[Part, int], float] = {}
    for layer in layers:
        for part in SUBLAYERS:
            if (part, layer) not in removed:
                writes = left_out([*removed_from(removed, layer), (part, layer)])
                final = ablations.blocks.run(stream[layer], layer, writes=writes)[-1]
                distances[part, layer] = mean_distance(ablations, final, distance)
                tick(ablations.rows)
    return distances


def removed_from(removed: Sequence[tuple[Part, int]], layer: int) -> list[tuple[Part, int]]:
    """Return the removed parts of block `layer` and later, which a run from there must leave out again."""
    return [place for place in removed if place[1] >= layer]


def mean_distance(ablations: ChunkAblations, final: Float[Tensor, "batch pos d_model"], distance: Distance) -> float:
    """Return the mean distance over the counted tokens when `final` leaves the last block."""
    outputs = ablations.outputs
    values = outputs.change(final).jsd if distance == "jsd" else outputs.logit_distance(final, distance)
    return float(values[ablations.counted[outputs.where]].mean())


def orders(proxies: pd.DataFrame, seed: int) -> dict[str, list[list[int]]]:
    """Return orders in which to remove whole blocks, least important first, by name; `random` has several."""
    rng = np.random.default_rng(seed)
    by = {
        "measured loss": proxies["delta_ce_block"],
        "similarity (LLM-Drop)": proxies["similarity_block"],
        # Few weights far above the mean make a block important, so the largest share goes first.
        "weights (ZD)": -proxies["zd"],
        "deepest first": -proxies["layer"],
    }
    layers = proxies["layer"].to_numpy()
    single = {name: [layers[np.argsort(column.to_numpy(), kind="stable")].tolist()] for name, column in by.items()}
    return {**single, "random": [rng.permutation(layers).tolist() for _ in range(RANDOM_ORDERS)]}


def drop_blocks(
    ablations: ChunkAblations,
    orders_by_name: Mapping[str, list[list[int]]],
    columns: Mapping[str, PerPrompt],
    tick: Tick,
) -> None:
    """Enter the change of loss, per order and number of blocks removed (column n - 1), into `columns`."""
    chunk = ablations.chunk
    for name, several in orders_by_name.items():
        for order in several:
            for n in range(1, columns[name].sums.shape[1] + 1):
                gone = {int(layer) for layer in order[:n]}
                final = ablations.blocks.run(chunk.stream[min(gone)], min(gone), skip=gone)[-1]
                ablations.enter_loss(columns[name], n - 1, final)
                tick(ablations.rows)


class SimilarityAgain:
    """Removes blocks one after the other, each time the one that turns the stream least without those before it.

    That is the iterative order of LLM-Drop (arXiv 2406.15786): similarities of the stream that is left, not of the plain one.

    Args:
        layers: blocks that may go.
        turns: 1 - cosine of what enters and what leaves each block of the plain model: the first choice.
    """

    def __init__(self, layers: Sequence[int], turns: Mapping[int, float]) -> None:
        self._layers = tuple(layers)
        self.gone: list[int] = [min(self._layers, key=lambda layer: turns[layer])]
        self._turns = dict.fromkeys(self._layers, 0.0)

    def measure(self, ablations: ChunkAblations, column: PerPrompt, tick: Tick) -> None:
        """Run a chunk without the blocks that are gone; enter the change of loss, and how far each other block turns the stream."""
        chunk, first = ablations.chunk, min(self.gone)
        streams = [*chunk.stream[:first], *ablations.blocks.run(chunk.stream[first], first, skip=self.gone)]
        ablations.enter_loss(column, len(self.gone) - 1, streams[-1])
        for layer in self._layers:
            before, after = (
                stream[ablations.counted.to(stream.device)].float() for stream in streams[layer : layer + 2]
            )
            self._turns[layer] += float((1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).sum())
        tick(ablations.rows)

    def drop(self) -> None:
        """Let the block go that turned the stream least, and measure anew."""
        left = [layer for layer in self._layers if layer not in self.gone]
        self.gone.append(min(left, key=lambda layer: self._turns[layer]))
        self._turns = dict.fromkeys(self._layers, 0.0)


def drop_table(columns: Mapping[str, PerPrompt], seed: int) -> pd.DataFrame:
    """Return columns order, removed, delta_ce, ci_low, ci_high, over_random, over_random_low, over_random_high (over prompts)."""
    parts = []
    random = columns["random"]
    for name, column in columns.items():
        mean, low, high = interval(column, seed)
        # The same seed draws the same prompts, so the two are paired.
        over = resampled(column, seed) - resampled(random, seed)
        over_low, over_high = percentiles(over, np.minimum(column.prompts(), random.prompts()))
        parts.append(
            pd.DataFrame(
                {
                    "order": name,
                    "removed": np.arange(1, len(mean) + 1),
                    "delta_ce": mean,
                    "ci_low": low,
                    "ci_high": high,
                    "over_random": mean - random.mean().numpy(),
                    "over_random_low": over_low,
                    "over_random_high": over_high,
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
