"""A pair opened for patching in one direction: the run that is patched, what is copied into it, and how it is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from jaxtyping import Float
from torch import Tensor

from analyses.causal_patching.cells import Cell
from analyses.causal_patching.corruption import embedding_writes
from analyses.causal_patching.grid import (
    Sources,
    WholeForwards,
    whole_forwards,
)
from analyses.causal_patching.metrics import LogitReader, RowReader
from analyses.causal_patching.pairs import Direction, Pair
from analyses.causal_patching.resumed_grid import ResumedGrid
from probes.blocks.cached_prompt import CachedPrompt
from probes.blocks.together import together
from probes.models.protocol import BlockAccess, Model, Shape, Write
from probes.points import Address

KEPT_BYTES = 2**28
"""The most memory of runs that are kept from one use to the next."""
OpenedAs = tuple[tuple[int, ...], int, frozenset[Address]]
"""A run's tokens, the position that it is open from, and the points that are copied out of it."""


def resumable(model: Model) -> bool:
    """Return whether cells can be resumed from inside the stack, and last rows be unembedded by themselves."""
    return model.shape.causal and isinstance(model, BlockAccess) and "lens" not in model.faithfulness.refused


def first_patched(pair: Pair, direction: Direction, causal: bool = True) -> int:
    """Return the first position of the patched run at which a cell can change something.

    In a model that reads both ways every position is such a one.
    """
    if not causal:
        return 0
    moved = [p for p, s in pair.sources(direction).items() if p >= pair.first_difference or p != s]
    return min(moved, default=len(pair.base(direction)) - 1)


@dataclass(frozen=True, eq=False)
class OpenedPair:
    """One run of a pair, kept open to be patched from the other one."""

    pair: Pair
    direction: Direction
    grid: ResumedGrid | WholeForwards
    reader: RowReader | LogitReader
    sources: Sources
    start: int
    """The first position at which a cell can change something."""
    clean: Float[Tensor, " metric"]
    corrupted: Float[Tensor, " metric"]

    @property
    def gap(self) -> Float[Tensor, " metric"]:
        """How much of each metric the corruption takes away."""
        return self.clean - self.corrupted

    @property
    def base(self) -> Float[Tensor, " metric"]:
        """The metrics of the patched run as it is."""
        return self.corrupted if self.direction == "denoise" else self.clean

    def patched(self, cells: Sequence[Cell], *sources: Sources) -> Float[Tensor, "source_cell metric"]:
        """Return the metrics under each cell; from other sources than the pair's own, one after the other, where they are given."""
        if not cells:
            return self.base[None][:0]
        return self.reader.read(self.grid.last_rows(cells, *(sources or (self.sources,))))


@dataclass(eq=False)
class OpenRuns:
    """Runs kept open from one use to the next, as many as `KEPT_BYTES` hold: the first ones."""

    runs: dict[OpenedAs, ResumedGrid | WholeForwards] = field(default_factory=dict)
    n_bytes: int = 0

    def keep(self, key: OpenedAs, grid: ResumedGrid | WholeForwards, shape: Shape) -> None:
        """Keep a run if there is room; of an open one the stream, keys and values of every block count."""
        positions = len(grid.base.tokens) if isinstance(grid, ResumedGrid) else 0
        n_bytes = 12 * positions * shape.n_layers * shape.d_model + sum(t.nbytes for t in grid.values.values())
        if self.n_bytes + n_bytes <= KEPT_BYTES:
            self.runs[key] = grid
            self.n_bytes += n_bytes


@dataclass(frozen=True, eq=False)
class Opener:
    """Opens pairs of a model for a set of metrics."""

    model: Model
    metrics: tuple[str, ...]
    points: frozenset[Address]
    """What is copied out of every run."""
    kept: OpenRuns | None = None
    """Where runs with these points are kept for the next time; None where each is run anew."""

    def writes(self, pair: Pair, corrupted: bool, noise: Tensor | None) -> dict[Address, Write]:
        """Return the writes under which one run of a pair is what it is."""
        return embedding_writes(pair, noise) if corrupted and noise is not None else {}

    def values(self, pair: Pair, corrupted: bool, noise: Tensor | None) -> Mapping[Address, Tensor]:
        """Return what is copied out of one run of a pair, [pos, ...]."""
        return self._grid(pair, corrupted, noise).values

    def ends(self, pair: Pair, noise: Tensor | None) -> list[Float[Tensor, " metric"]]:
        """Return the metrics of the clean and of the corrupted run."""
        grids = self._grids(pair, noise)
        reader = self.reader(pair, grids[False].unpatched)
        return [reader.read(grids[corrupted].unpatched[None])[0] for corrupted in (False, True)]

    def _grids(self, pair: Pair, noise: Tensor | None) -> list[ResumedGrid | WholeForwards]:
        """Return the clean and the corrupted run."""
        return together(self.model, [partial(self._grid, pair, corrupted, noise) for corrupted in (False, True)])

    def open(self, pair: Pair, directions: Sequence[Direction], noise: Tensor | None) -> list[OpenedPair]:
        """Run both prompts of a pair, and open one of them for each direction."""
        grids = self._grids(pair, noise)
        reader = self.reader(pair, grids[False].unpatched)
        ends = [reader.read(grids[corrupted].unpatched[None])[0] for corrupted in (False, True)]
        opened = []
        for direction in directions:
            from_corrupted = direction == "noise"
            sources = Sources(grids[from_corrupted].values, pair.sources(direction))
            start = first_patched(pair, direction, self.model.shape.causal)
            opened.append(OpenedPair(pair, direction, grids[not from_corrupted], reader, sources, start, *ends))
        return opened

    def reader(self, pair: Pair, clean: Tensor) -> RowReader | LogitReader:
        """Return what reads last rows of a pair; `clean` is the clean run's."""
        if resumable(self.model):
            return RowReader(self.model.unembedding(), pair, self.metrics, clean)
        return LogitReader(pair, self.metrics, clean)

    def _grid(self, pair: Pair, corrupted: bool, noise: Tensor | None) -> ResumedGrid | WholeForwards:
        """Return one run of a pair with what is copied out of it."""
        kept = self.kept if noise is None or not corrupted else None
        tokens = pair.corrupted if corrupted else pair.clean
        start = first_patched(pair, "denoise" if corrupted else "noise", self.model.shape.causal)
        key = (tokens, start, self.points)
        if kept is not None and (grid := kept.runs.get(key)):
            return grid
        run = (tokens, start, self.writes(pair, corrupted, noise), self.points)
        opens = resumable(self.model)
        grid = ResumedGrid(CachedPrompt(self.model, *run)) if opens else whole_forwards(self.model, *run)
        if kept is not None:
            kept.keep(key, grid, self.model.shape)
        return grid
