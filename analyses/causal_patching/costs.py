"""What a run will cost, told before it runs: cells, block-rows, and seconds from timed samples of the very same work."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from analyses.causal_patching.cells import EVERYWHERE, Cell
from analyses.causal_patching.estimate_costs import seconds, timed
from analyses.causal_patching.estimates import EstimatePlan
from analyses.causal_patching.opened import OpenedPair
from analyses.causal_patching.patched import exact_zeros
from analyses.causal_patching.running import Run, block_rows, count_cells, live_cells, rows_of
from analyses.interventions import Interventions


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
    opener, noise = run.opener(), run.noises(pair)[0]
    opened = opener.open(pair, run.directions, noise)[0]
    opening = timed(lambda: opener.open(pair, run.directions, noise))
    total = len(run.pairs) * samples * (opening + timed(lambda: run.ends(pair)))
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
