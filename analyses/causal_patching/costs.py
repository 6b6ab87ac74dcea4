"""What a run will cost, told before it runs: cells, block-rows, and seconds from a timed sample."""

from __future__ import annotations

import time
from collections.abc import Mapping

from analyses.causal_patching.cells import EVERYWHERE
from analyses.causal_patching.patched import exact_zeros
from analyses.causal_patching.running import Run, block_rows, count_cells, rows_of
from analyses.interventions import Interventions


def planned(run: Run, samples: int, further: Mapping[str, int]) -> Interventions:
    """Return the cells of all pairs, at most, with their block-rows and an estimate of the time, and further forwards by kind."""
    counts = {**count_cells(run, samples), **further}
    return Interventions(counts, exact=False, detail=_detail(run, samples))


def _detail(run: Run, samples: int) -> str:
    pairs, shape = run.pairs, run.model.shape
    if not pairs:
        return ""
    rows = block_rows(run, samples)
    tokens = sum(len(pair.clean) for pair in pairs) / len(pairs)
    whole = rows / (shape.n_layers * tokens)
    pair = pairs[0]
    return (
        f"the cells are {rows:,} block-rows, as many as {whole:,.0f} whole forwards; the first pair differs at position "
        f"{pair.first_difference} of {len(pair.clean)}; about {_seconds(run, rows, samples):,.0f} s"
    )


def _seconds(run: Run, rows: int, samples: int) -> float:
    """Return an estimate from the cells of one pair at its middle position, and from opening it."""
    pair, direction = run.pairs[0], run.directions[0]
    opener = run.opener()
    noise = run.noises(pair)[0]
    opener.open(pair, (direction,), noise)
    started = time.perf_counter()
    opened = opener.open(pair, (direction,), noise)[0]
    opening = time.perf_counter() - started
    cells = run.plan.cells(run.model.shape, pair, direction)
    zeros = exact_zeros(cells, run.model.shape, pair, direction)
    live = [cell for cell, zero in zip(cells, zeros, strict=True) if not zero]
    places = sorted({cell.position for cell in live})
    sample = [cell for cell in live if cell.position in (EVERYWHERE, places[len(places) // 2])]
    sampled = rows_of(run, pair, direction, sample)
    started = time.perf_counter()
    opened.patched(sample)
    each = (time.perf_counter() - started) / max(1, sampled)
    return rows * each + 3 * len(run.pairs) * len(run.directions) * samples * opening
