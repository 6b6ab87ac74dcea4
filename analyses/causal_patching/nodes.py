"""Attribution of single cells, and the exact effect of those that are verified."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.causal_patching.attribution import Attributed, Method
from analyses.causal_patching.cells import Cell, cells_of
from analyses.causal_patching.grid import addresses
from analyses.causal_patching.opened import Opener
from analyses.causal_patching.pairs import Direction, Pair
from analyses.causal_patching.patched import exact_zeros
from analyses.causal_patching.running import Run
from analyses.causal_patching.verification import budget, pair_means, ranked, verification_row
from analyses.results.statistics import Array
from probes.progress import Progress

Place = tuple[str, int, int, str]
"""Component, layer, head and role: what a node is in every pair."""


def attribution_direction(directions: Sequence[Direction]) -> Direction:
    """Return the direction that is attributed: noising where it is run, since circuits keep what noising would take."""
    return "noise" if "noise" in directions else directions[0]


def node_cells(run: Run, pair: Pair, direction: Direction) -> dict[Place, Cell]:
    """Return the cells that are attributed, heads at every position, by what they are in every pair."""
    shape, roles = run.model.shape, pair.roles(direction)
    positions = run.plan.positions(pair, direction)
    cells = cells_of(shape, run.plan.components, "by_position", positions, layers=run.plan.swept(shape))
    zeros = exact_zeros(cells, shape, pair, direction)
    return {
        (cell.component, cell.layer, cell.head, roles[cell.position]): cell
        for cell, zero in zip(cells, zeros, strict=True)
        if not zero
    }


def node_tables(
    run: Run, method: Method, verify: int, seed: int, progress: Progress
) -> tuple[pd.DataFrame, dict[str, object]]:
    """Return (the table `nodes`, a row of `verification`), scores and effects as means over the pairs that have the node.

    Raises:
        PointError: the backend keeps its module to itself.
    """
    direction = attribution_direction(run.directions)
    progress.start(len(run.pairs), "pair attributed")
    by_pair: list[dict[Place, float]] = []
    for pair in run.pairs:
        cells = node_cells(run, pair, direction)
        scores = Attributed(run.model, pair, direction, run.metrics[0]).scores(list(cells.values()), method)
        by_pair.append(dict(zip(cells, scores.tolist(), strict=True)))
        progress.advance()
    places = sorted(set().union(*by_pair))
    every = np.array([[scores.get(place, np.nan) for place in places] for scores in by_pair])
    means = pair_means(every)
    chosen = budget(means, verify, seed)
    exact = exact_effects(run, [places[i] for i in chosen.chosen], direction)
    counts = np.isfinite(every).sum(0)
    rows = [(method, direction, *place, n, mean) for place, n, mean in zip(places, counts, means, strict=True)]
    table = pd.DataFrame(rows, columns=["method", "direction", "component", "layer", "head", "role", "n", "score"])
    row = verification_row(method, every, exact, chosen, method == "atp", run.groups, seed)
    return ranked(table, chosen, pair_means(exact)), row


def exact_effects(run: Run, places: Sequence[Place], direction: Direction) -> Array:
    """Return the exact effect of nodes on the first metric, [pair, place], NaN where a pair has no such node."""
    effects = np.full((len(run.pairs), len(places)), np.nan)
    for row, pair in zip(effects, run.pairs, strict=True):
        cells = node_cells(run, pair, direction) if len(places) else {}
        has = [i for i, place in enumerate(places) if place in cells]
        own = [cells[places[i]] for i in has]
        if own:
            opener = Opener(run.model, run.metrics[:1], frozenset(addresses(own)))
            opened = opener.open(pair, (direction,), run.noises(pair)[0])[0]
            row[has] = (opened.patched(own)[:, 0] - opened.base[0]).numpy()
            run.tally.count(len(own))
    return effects
