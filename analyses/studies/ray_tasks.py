"""What runs on the nodes of a Ray cluster: planning a unit, capturing a batch, running a cell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from analyses.studies.cells import Cell
from analyses.studies.definition import StudyModel
from analyses.studies.run_cells import Event, ModelHolder, failed, run_cell
from analyses.studies.shared_captures import captures_of, shared_plans
from analyses.studies.study_folder import StudyFolder
from probes.batches import batches
from probes.capture.dry_run import block_parameters
from probes.capture.forward import axis_sizes, batch_tokens_of, row_size
from probes.capture.needs import Feature, Need
from probes.capture.run import capture
from probes.store import ActivationStore, AppendOnlyWriter

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Batches:
    """The captures that the cells of a unit share, cut into batches of one forward each."""

    features: tuple[tuple[Feature, ...], ...]
    """Of each kind of batch."""
    rows: tuple[tuple[int, tuple[Tokens, ...]], ...]
    """(kind, sequences) of each batch."""
    memory: int
    """Bytes an actor needs: weights and working space."""


@cache
def _models() -> ModelHolder:
    """Return the model of this worker process; Ray hands a process one task at a time."""
    return ModelHolder()


def plan_unit(cells: Sequence[Cell], store: Path) -> Batches:
    """Return the forwards that the cells of one model and prompt set lack.

    Raises:
        ModelError: the model cannot be loaded.
    """
    model = _models()(cells[0].model)
    activations = ActivationStore(store)
    kinds: list[tuple[Feature, ...]] = []
    rows = []
    size = 0
    for plan in shared_plans(model, captures_of(cells, model), activations):
        size += plan.bytes(axis_sizes(model), row_size(model))
        for work in plan.missing:
            for batch in batches(work.sequences, batch_tokens_of(model)):
                rows.append((len(kinds), tuple(work.sequences[i] for i in batch.indices)))
            kinds.append(work.features)
    activations.check_space(size)
    shape = model.shape
    weights = (shape.n_layers * block_parameters(shape) + 2 * shape.d_vocab * shape.d_model) * row_size(model)
    working = batch_tokens_of(model) * row_size(model) * (4 * shape.d_model + 3 * shape.d_mlp)
    return Batches(tuple(kinds), tuple(rows), weights + working)


def pack_rows(planned: Batches) -> list[dict[str, Any]]:
    """Return the batches as rows of a data set: ids one after the other, and where each sequence ends."""
    return [
        {"kind": kind, "ids": [t for s in sequences for t in s], "lengths": [len(s) for s in sequences]}
        for kind, sequences in planned.rows
    ]


class CaptureActor:
    """Holds a model and captures batches into shards; a batch that is captured again leaves its rows once."""

    def __init__(self, spec: StudyModel, features: tuple[tuple[Feature, ...], ...], store: Path) -> None:
        self.model, self.store = spec.spec.load(), AppendOnlyWriter(store)
        self.needs = [[Need((str(f.address),), f.reducer) for f in kind] for kind in features]

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        """Capture one batch; return its forwards and bytes, 0 where it failed: its cells then meet the fault themselves."""
        ends = [0, *accumulate(int(n) for n in row["lengths"])]
        sequences = [tuple(int(t) for t in row["ids"][a:b]) for a, b in pairwise(ends)]
        try:
            done = capture(self.model, sequences, self.needs[int(row["kind"])], self.store).done
        except Exception:
            return {"forwards": 0, "bytes": 0}
        return {"forwards": done.forwards, "bytes": done.bytes_written}


def run_one(cell: Cell, folder: StudyFolder, store: Path) -> list[Event]:
    """Run one cell; return what happened to it."""
    try:
        model = _models()(cell.model)
    except Exception as error:
        return [failed(cell, folder, error)]
    return list(run_cell(cell, model, ActivationStore(store), folder))
