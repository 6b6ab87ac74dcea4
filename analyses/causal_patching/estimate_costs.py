"""The seconds that attribution, verification, paths and circuits will take, each timed on one pair."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from analyses.causal_patching.ablation import AblationKind
from analyses.causal_patching.attribution import Attributed
from analyses.causal_patching.circuit_plan import CircuitPlan
from analyses.causal_patching.edge_tables import edge_tables, exact_edges, parallel_blocks
from analyses.causal_patching.estimates import EstimatePlan
from analyses.causal_patching.graph import parse_edges
from analyses.causal_patching.levels import ABLATIONS, circuit_metrics, level_of
from analyses.causal_patching.nodes import attribution_direction, node_cells, node_tables
from analyses.causal_patching.running import Run
from probes.progress import QUIET

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
