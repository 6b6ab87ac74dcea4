"""Loss against mean width when the least important blocks are rounded to few bits first (Dumitru et al. 2024, arXiv 2406.17415)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
from torch import nn

from analyses.depth_use.ablations import ChunkAblations
from analyses.depth_use.greedy import drop_table
from analyses.depth_use.settings import Settings, Tick
from analyses.depth_use.weights import matrices
from analyses.results.per_prompt import PerPrompt
from probes.blocks.rerouting import module_of
from probes.models.protocol import Model
from probes.models.rounded_weights import rounded

RANDOM_ORDERS = 3
"""Random orders whose mean is the control of the frontier."""

Widths = Callable[[Mapping[int, int]], None]
"""Sets the bits of each block."""


def points(n_blocks: int, n_points: int) -> list[int]:
    """Return how many blocks are narrow at each point, from none to all."""
    return sorted({round(i * n_blocks / n_points) for i in range(n_points + 1)})


def runs(n_blocks: int, n_points: int) -> int:
    """Return how often all prompts are run: the two ends are the same in every order."""
    return 2 + (len(points(n_blocks, n_points)) - 2) * (4 + RANDOM_ORDERS) if n_points else 0


def frontier_orders(proxies: pd.DataFrame, narrow: int, seed: int) -> dict[str, list[list[int]]]:
    """Return orders in which blocks become narrow, least important first, by name; `random` has several."""
    layers, rng = proxies["layer"].to_numpy(), np.random.default_rng(seed)
    by = {
        "LIM": proxies["lim"],
        "LIM, reversed": -proxies["lim"],
        # Few weights far above the mean make a block important, so the largest share goes first.
        "ZD": -proxies["zd"],
        "loss of each block alone": proxies[f"delta_ce_int{narrow}"],
    }
    single = {name: [layers[np.argsort(column.to_numpy(), kind="stable")].tolist()] for name, column in by.items()}
    return {**single, "random": [rng.permutation(layers).tolist() for _ in range(RANDOM_ORDERS)]}


@contextmanager
def rounding(blocks: Mapping[int, nn.Module]) -> Iterator[Widths]:
    """Let blocks be rounded to any bits, each time from their own weights, which are back on leaving."""
    own = {layer: [(parameter, parameter.data, axis) for parameter, axis in matrices(b)] for layer, b in blocks.items()}
    current: dict[int, int] = {}

    def set_widths(bits: Mapping[int, int]) -> None:
        for layer, width in bits.items():
            if current.get(layer) != width:
                for parameter, data, axis in own[layer]:
                    parameter.data = rounded(data, width, axis)
                current[layer] = width

    try:
        yield set_widths
    finally:
        for weights in own.values():
            for parameter, data, _ in weights:
                parameter.data = data


def frontier(
    model: Model,
    proxies: pd.DataFrame,
    settings: Settings,
    n_prompts: int,
    each: Callable[[Callable[[ChunkAblations], None]], None],
    tick: Tick,
) -> pd.DataFrame:
    """Run all prompts at every point of every order; return the table `bits_frontier`.

    Args:
        proxies: the proxies of the layers whose blocks are rounded.
        each: lets work be done on every chunk of prompts.
    """
    wide, narrow = settings.wide_and_narrow
    orders = frontier_orders(proxies, narrow, settings.seed)
    at = points(len(proxies), settings.frontier_points)
    columns = {name: PerPrompt(n_prompts, len(at)) for name in orders}
    layers = [int(layer) for layer in proxies["layer"]]

    def enter(into: Sequence[PerPrompt], point: int) -> None:
        def run(ablations: ChunkAblations) -> None:
            final = ablations.blocks.run(ablations.chunk.stream[0], 0)[-1]
            for column in into:
                ablations.enter_loss(column, point, final)
            tick(ablations.rows)

        each(run)

    with module_of(model) as (_, anatomy), rounding({n: anatomy.component("block", n) for n in layers}) as set_widths:
        for end, width in ((0, wide), (len(at) - 1, narrow)):
            set_widths(dict.fromkeys(layers, width))
            enter(list(columns.values()), end)
        for name, several in orders.items():
            for order in several:
                for point, n in enumerate(at[1:-1], 1):
                    set_widths({layer: narrow if index < n else wide for index, layer in enumerate(order)})
                    enter([columns[name]], point)
    return frontier_table(columns, at, wide, narrow, settings.seed)


def frontier_table(
    columns: Mapping[str, PerPrompt], at: Sequence[int], wide: int, narrow: int, seed: int
) -> pd.DataFrame:
    """Return columns order, narrow_blocks, mean_bits (of the blocks that are rounded), delta_ce, ci_low, ci_high, over_random,
    over_random_low, over_random_high (nats per token, over prompts).
    """
    table = drop_table(columns, seed)
    narrow_blocks = table.pop("removed").map(lambda point: at[point - 1])
    table.insert(1, "narrow_blocks", narrow_blocks)
    table.insert(2, "mean_bits", wide + (narrow - wide) * narrow_blocks / at[-1])
    return table
