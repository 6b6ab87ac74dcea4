"""What a run will cost, told before it runs: cells, block-rows, and seconds from timed samples of the very same work."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from analyses.causal_patching.ablation import AblationKind
from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.cells import EVERYWHERE, Cell
from analyses.causal_patching.circuit_plan import CircuitPlan
from analyses.causal_patching.edge_tables import edge_tables, exact_edges, parallel_blocks
from analyses.causal_patching.estimates import EstimatePlan
from analyses.causal_patching.graph import parse_edges
from analyses.causal_patching.levels import ABLATIONS, circuit_metrics, level_of
from analyses.causal_patching.nodes import attribution_direction, node_cells, node_tables
from analyses.causal_patching.opened import OpenedPair
from analyses.causal_patching.patched import exact_zeros
from analyses.causal_patching.running import Run, block_rows, count_cells, live_cells, rows_of
from analyses.interventions import Interventions
from probes.progress import QUIET


def planned(run: Run, samples: int, estimates: EstimatePlan) -> Interventions:
    """Return the cells of all pairs, at most, with their block-rows and an estimate of the time, and further forwards by kind."""
    shape = run.model.shape
    counts = count_cells(run, samples) | estimates.forwards(len(run.pairs), shape.n_layers * (shape.n_heads + 1))
    return Interventions(counts, exact=False, detail=_detail(run, samples, estimates))


def _detail(run: Run, samples: int, estimates: EstimatePlan) -> str:
    pairs, shape = run.pairs, run.model.shape
    if not pairs:
        return ""
    rows = block_rows(run, samples)
    tokens = sum(len(pair.clean) for pair in pairs) / len(pairs)
    pair = pairs[0]
    total = _seconds(run, samples) + seconds(run, estimates)
    return (
        f"the cells are {rows:,} block-rows, as many as {rows / (shape.n_layers * tokens):,.0f} whole forwards; the first pair "
        f"differs at position {pair.first_difference} of {len(pair.clean)}; about {total:,.0f} s"
    )


def _seconds(run: Run, samples: int) -> float:
    """Return an estimate of the grid's time from opening one pair, and from some of its cells.

    Cells at every position and cells at one run in batches of their own, and are sampled apart.
    """
    pair, direction = run.pairs[len(run.pairs) // 2], run.directions[0]
    opener, noise = replace(run.opener(), kept=None), run.noises(pair)[0]
    opened = opener.open(pair, run.directions, noise)[0]
    opening = timed(lambda: opener.open(pair, run.directions, noise))
    # Runs under noise are not kept from the gauge to the grid.
    total = len(run.pairs) * samples * opening * (1 if noise is None else 2)
    speeds = {kind: _each_row(run, opened, cells) for kind, cells in _sampled(run, opened).items()}
    for live, direction, cells, nulls in live_cells(run):
        for kind, part in _kinds(cells).items():
            total += rows_of(run, live, direction, part) * samples * (1 + nulls) * speeds.get(kind, 0.0)
    return total


def _kinds(cells: list[Cell]) -> Mapping[bool, list[Cell]]:
    """Return cells that stand at every position, and those at one."""
    kinds: dict[bool, list[Cell]] = defaultdict(list)
    for cell in cells:
        kinds[cell.position == EVERYWHERE].append(cell)
    return kinds


def _sampled(run: Run, opened: OpenedPair) -> Mapping[bool, list[Cell]]:
    """Return cells of one pair: a third of those at every position, and of the others all at the middle one."""
    pair, direction, shape = opened.pair, opened.direction, run.model.shape
    cells = run.plan.cells(shape, pair, direction)
    zeros = exact_zeros(cells, shape, pair, direction)
    kinds = dict(_kinds([cell for cell, zero in zip(cells, zeros, strict=True) if not zero]))
    if True in kinds:
        kinds[True] = kinds[True][::3]
    if False in kinds:
        places = sorted({cell.position for cell in kinds[False]})
        kinds[False] = [cell for cell in kinds[False] if cell.position == places[len(places) // 2]]
    return kinds


def _each_row(run: Run, opened: OpenedPair, cells: list[Cell]) -> float:
    """Return the seconds of a block-row of cells, run from as many sources at once as the run has."""
    sources = [opened.sources] * (1 + (run.null != "none"))
    rows = rows_of(run, opened.pair, opened.direction, cells) * len(sources)
    return timed(lambda: opened.patched(cells, *sources)) / max(1, rows)


SAMPLES = 2
"""How often a sample is timed; the least counts, since what else the machine does only adds to it."""
CIRCUITS = 32
"""Circuits that are timed."""


def timed(work: Callable[[], object], times: int = SAMPLES) -> float:
    """Return the least seconds that something took."""
    least = float("inf")
    for _ in range(times):
        started = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - started)
    return least


def seconds(run: Run, plan: EstimatePlan) -> float:
    """Return an estimate of the time of everything beside the grid, backward passes among it."""
    one, n = replace(run, pairs=[run.pairs[len(run.pairs) // 2]]), len(run.pairs)
    total = 0.0
    if plan.node_methods:
        verified = timed(lambda: node_tables(one, "atp", plan.verify, plan.seed, QUIET), 1)
        passes = (run.model.shape.n_layers - 1) * _attributed(one) if "atp_star" in plan.node_methods else 0.0
        total += n * (len(plan.node_methods) * verified + passes)
    for method in plan.edge_methods:
        work = partial(edge_tables, one, method, plan.line, plan.verify, plan.seed, QUIET)
        total += n * timed(work, 1)
    if plan.paths:
        named = parse_edges(plan.paths, run.model.shape, parallel_blocks(run.model), plan.kv_view == "query")
        each = timed(lambda: exact_edges(one, named, run.directions[0], plan.through, QUIET), 1)
        total += n * len(run.directions) * each
    return total + (n * _circuits(one, plan.circuits) if plan.circuits is not None else 0.0)


def _attributed(one: Run) -> float:
    """Return the seconds of one forward and backward pass of a pair's attribution."""
    direction = attribution_direction(one.directions)
    cells = list(node_cells(one, one.pairs[0], direction).values())
    attributed = Attributed(one.model, one.pairs[0], direction, one.metrics[0])
    return timed(lambda: attributed.scores(cells, "atp"))


def _circuits(one: Run, plan: CircuitPlan) -> float:
    """Return the seconds of one pair's circuits and of what orders their items."""
    level, rng = level_of(one, plan.level, plan.line), np.random.default_rng(plan.seed)
    n_items = len(level.layers)
    drawn = [rng.choice(n_items, n_items // 2, replace=False) for _ in range(CIRCUITS)]

    def circuit(kind: AblationKind) -> float:
        return timed(lambda: circuit_metrics(one, level, drawn, kind, QUIET), 1) / CIRCUITS

    total = plan.circuits * circuit(plan.ablation)
    for method in plan.methods:
        if method in ABLATIONS:
            # Half of the blocks run where one node goes, wherever in the stack it is.
            total += n_items / 2 * circuit(ABLATIONS[method])
        else:
            passes = one.model.shape.n_layers if method == "atp_star" else 1
            work = partial(level.support, one, one.pairs[0], "atp" if passes > 1 else method)
            # Once more on shuffled pairs.
            total += 2 * passes * timed(work, 1)
    return total
