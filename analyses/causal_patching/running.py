"""The pairs of a run opened one after the other, gauged, and patched cell by cell, so that a stopped run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.causal_patching.cells import EVERYWHERE, Cell
from analyses.causal_patching.corruption import Noise, noisy_runs
from analyses.causal_patching.grid import Sources, addresses, capture_values
from analyses.causal_patching.journal import Journal
from analyses.causal_patching.nulls import Null, null_partner
from analyses.causal_patching.opened import OpenedPair, Opener, OpenRuns, first_patched, resumable
from analyses.causal_patching.pairs import Direction, Pair
from analyses.causal_patching.patched import GridPlan, cells_table
from analyses.interventions import Tally
from analyses.results.statistics import Array
from probes.blocks.together import together
from probes.models.protocol import Model
from probes.points import Address


@dataclass(frozen=True, eq=False)
class Run:
    """What is patched in every pair of a run, and what has been read so far."""

    model: Model
    pairs: Sequence[Pair]
    """Those that can be patched."""
    plan: GridPlan
    directions: tuple[Direction, ...]
    metrics: tuple[str, ...]
    null: Null
    noise: Noise | None
    journal: Journal
    tally: Tally
    clean_values: dict[int, Mapping[Address, Tensor]] = field(default_factory=dict)
    """Clean runs that nulls copy from, the last few."""
    open_runs: OpenRuns = field(default_factory=OpenRuns)

    def opener(self) -> Opener:
        """Return what opens the pairs, with every point that some cell copies."""
        points: set[Address] = set()
        for direction in self.directions:
            points |= addresses(self.plan.cells(self.model.shape, self.pairs[0], direction))
        return Opener(self.model, self.metrics, frozenset(points), self.open_runs)

    @property
    def groups(self) -> NDArray[np.int64]:
        """The group of every pair, numbered from 0, [pair]."""
        return pd.factorize(np.array([pair.group for pair in self.pairs]))[0].astype(np.int64)

    def noises(self, pair: Pair) -> list[Tensor | None]:
        """Return the noise of each corrupted run of a pair."""
        return noisy_runs(pair, self.noise, self.model.shape.d_model)

    def ends(self, pair: Pair) -> tuple[Array, Array]:
        """Return the metrics of the clean and of the corrupted run, [metric] each; means over draws of noise."""
        opener = self.opener()
        runs = together(self.model, [partial(opener.ends, pair, noise) for noise in self.noises(pair)])
        clean, corrupted = (torch.stack(side).mean(0).numpy() for side in zip(*runs, strict=True))
        return clean, corrupted

    def answers_both(self, pair: Pair) -> bool:
        """Return whether the most probable next tokens are the answer of the clean and that of the corrupted prompt."""
        logits = Address("logits")
        prompts = (pair.clean, pair.corrupted)
        values = together(self.model, [partial(capture_values, self.model, tokens, {logits}) for tokens in prompts])
        tops = [int(one[logits][-1].argmax()) for one in values]
        return tops[0] in pair.answers and tops[1] in pair.distractors

    def cells(self, pair: Pair, ends: tuple[Array, Array]) -> list[pd.DataFrame]:
        """Patch every cell of a pair; return a table for each direction and source."""
        opener, runs = self.opener(), list[list[OpenedPair]]()
        kept = {direction: self._kept(pair, direction) for direction in self.directions}
        if any(values is None for known in kept.values() for values in known.values()):
            openings = [partial(opener.open, pair, self.directions, noise) for noise in self.noises(pair)]
            runs = together(self.model, openings)
        patch = partial(self._tables, pair, ends, opener, runs)
        tables = together(self.model, [partial(patch, direction, known) for direction, known in kept.items()])
        return [table for of_direction in tables for table in of_direction]

    def _sources(self, pair: Pair, direction: Direction) -> dict[str, Pair | None]:
        """Return the pair that each source copies from, None for the pair's own."""
        partner = null_partner(pair, self.pairs, direction, self.null)
        return {"pair": None} if partner is None else {"pair": None, self.null: partner}

    def _kept(self, pair: Pair, direction: Direction) -> dict[str, Array | None]:
        """Return what the journal has of each source."""
        sources = self._sources(pair, direction).items()
        return {source: self.journal.read(self._key(pair, direction, source, other)) for source, other in sources}

    def _tables(
        self,
        pair: Pair,
        ends: tuple[Array, Array],
        opener: Opener,
        runs: Sequence[Sequence[OpenedPair]],
        direction: Direction,
        kept: Mapping[str, Array | None],
    ) -> list[pd.DataFrame]:
        """Return the tables of one direction, one for each source."""
        cells, zeros = self.plan.run(self.model.shape, pair, direction)
        others = self._sources(pair, direction)
        if any(values is None for values in kept.values()):
            opened = [o for run in runs for o in run if o.direction == direction]
            patched = self._values(opener, opened, cells, zeros, list(others.values()))
            for (source, other), values in zip(others.items(), patched, strict=True):
                self.journal.write(self._key(pair, direction, source, other), values)
            kept = dict(zip(others, patched, strict=True))
        tables = []
        for source, values in kept.items():
            assert values is not None
            ran = ~zeros if others[source] is not None else np.ones(len(cells), dtype=bool)
            shown = [cell for cell, shows in zip(cells, ran, strict=True) if shows]
            tables.append(
                cells_table(
                    pair, direction, shown, zeros[ran], values[ran], ends, self.metrics, source, self.plan.window
                )
            )
        return tables

    def _values(
        self,
        opener: Opener,
        opened: Sequence[OpenedPair],
        cells: Sequence[Cell],
        zeros: NDArray[np.bool_],
        others: Sequence[Pair | None],
    ) -> Array:
        """Return the metrics under each cell, [source, cell, metric], means over draws of noise; None is the pair's own source."""
        running = [cell for cell, zero in zip(cells, zeros, strict=True) if not zero]
        total = np.zeros((len(others), len(cells), len(self.metrics)))

        def patched(one: OpenedPair) -> Array:
            sources = [one.sources if other is None else self._null_sources(opener, other) for other in others]
            return one.patched(running, *sources).numpy()

        for one, values in zip(opened, together(self.model, [partial(patched, one) for one in opened]), strict=True):
            total += one.base.numpy()
            total[:, ~zeros] += values.reshape(len(others), len(running), -1) - one.base.numpy()
        self.tally.tick(len(running) * len(opened) * len(others))
        return total / len(opened)

    def _null_sources(self, opener: Opener, other: Pair) -> Sources:
        values = self.clean_values.get(other.index)
        if values is None:
            values = opener.values(other, False, None)
            if len(self.clean_values) > 1:
                self.clean_values.pop(next(iter(self.clean_values)))
            self.clean_values[other.index] = values
        return Sources(values, {p: p for p in range(len(other.clean))})

    def _key(self, pair: Pair, direction: Direction, source: str, other: Pair | None) -> str:
        return repr((
            self.model.context, pair.clean, pair.corrupted, pair.ids, len(pair.answers), pair.aligned, pair.span, pair.named,
            direction, source, None if other is None else other.clean, self.plan, self.metrics,
            None if self.noise is None else (self.noise.deviation, self.noise.samples, self.noise.seed, pair.index),
        ))  # fmt: skip


def noise_floor(run: Run) -> float:
    """Return how far the first metric moves at most when the last row of a run is copied into itself."""
    pair, opener = run.pairs[0], run.opener()
    noise = run.noises(pair)[0]
    largest = 0.0
    for opened in opener.open(pair, run.directions, noise):
        corrupted = opened.direction == "denoise"
        itself = Sources(opener.values(pair, corrupted, noise), {p: p for p in range(len(pair.base(opened.direction)))})
        cells = run.plan.cells(run.model.shape, pair, opened.direction)
        ends = [cell for cell in cells if cell.position in (EVERYWHERE, len(pair.base(opened.direction)) - 1)]
        moved = opened.patched(ends, itself)[:, 0] - opened.base[0]
        largest = max(largest, float(moved.abs().max()) if len(moved) else 0.0)
    return largest


def count_cells(run: Run, samples: int) -> dict[str, int]:
    """Return how many patched forwards the pairs of a run take, by kind."""
    counts = {f"{direction} cells": 0 for direction in run.directions} | {"null cells": 0}
    for _pair, direction, cells, nulls in live_cells(run):
        counts[f"{direction} cells"] += len(cells) * samples
        counts["null cells"] += len(cells) * samples * nulls
    return counts


def block_rows(run: Run, samples: int) -> int:
    """Return how many rows pass how many blocks in all cells of a run."""
    return sum(
        rows_of(run, pair, direction, cells) * samples * (1 + nulls)
        for pair, direction, cells, nulls in live_cells(run)
    )


def rows_of(run: Run, pair: Pair, direction: Direction, cells: Sequence[Cell]) -> int:
    """Return the block-rows of cells of one pair; a whole forward each where the model cannot be resumed."""
    shape, n = run.model.shape, len(pair.base(direction))
    if not resumable(run.model):
        return len(cells) * shape.n_layers * n
    start = first_patched(pair, direction, shape.causal)
    return sum(cell.block_rows(shape.n_layers, n, start) for cell in cells)


def live_cells(run: Run) -> Iterator[tuple[Pair, Direction, list[Cell], bool]]:
    """Yield each pair and direction with the cells that are run, and whether they are run from another source too."""
    for pair in run.pairs:
        for direction in run.directions:
            cells, zeros = run.plan.run(run.model.shape, pair, direction)
            live = [cell for cell, zero in zip(cells, zeros, strict=True) if not zero]
            yield pair, direction, live, null_partner(pair, run.pairs, direction, run.null) is not None
