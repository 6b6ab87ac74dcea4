"""Running cells in one process: the shared captures first, then each cell, whose failure is its own."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from analyses.running.runner import run
from analyses.studies.cells import Cell
from analyses.studies.definition import StudyModel
from analyses.studies.scheduling import Unit
from analyses.studies.shared_captures import captures_of, generates, joined
from analyses.studies.study_folder import StudyFolder
from probes.capture.run import capture
from probes.errors import UserError
from probes.models import Model
from probes.store import ActivationStore


@dataclass(frozen=True)
class Started:
    """A cell has begun."""

    cell: str


@dataclass(frozen=True)
class Captured:
    """What a unit's cells share has been captured."""

    forwards: int
    bytes_written: int


@dataclass(frozen=True)
class Outcome:
    """How a cell ended."""

    cell: str
    state: Literal["done", "failed", "elsewhere"]
    """`elsewhere`: another process is running it."""
    forwards: int = 0
    seconds: float = 0.0
    error: str = ""


Event = Started | Captured | Outcome


class ModelHolder:
    """Loads models, and holds the one that was called for last."""

    def __init__(self, device: str | None = None) -> None:
        self.device = device
        self.spec: StudyModel | None = None
        self._model: Model | None = None

    def __call__(self, spec: StudyModel) -> Model:
        """Return the loaded model."""
        if self._model is None or self.spec != spec:
            # The old one goes first, so that two never share the memory.
            self._model, self.spec = None, None
            self._model, self.spec = spec.spec.on(self.device).load(), spec
        return self._model


def run_unit(
    unit: Unit, models: Callable[[StudyModel], Model], store: ActivationStore, folder: StudyFolder
) -> Iterator[Event]:
    """Run the cells of a unit; cells whose model writes come before the captures that all the others share."""
    try:
        model = models(unit.model)
    except Exception as error:
        yield from (failed(cell, folder, error) for cell in unit.cells)
        return
    writing = [cell for cell in unit.cells if generates(cell)]
    reading = [cell for cell in unit.cells if not generates(cell)]
    for cell in writing:
        yield from run_cell(cell, model, store, folder)
    if len(reading) > 1:
        yield capture_shared(reading, model, store)
    for cell in reading:
        yield from run_cell(cell, model, store, folder)


def capture_shared(cells: Sequence[Cell], model: Model, store: ActivationStore) -> Captured:
    """Capture what the cells need, once; where that fails each cell captures for itself and meets its own fault."""
    forwards = written = 0
    for shared in joined(captures_of(cells, model)):
        try:
            done = capture(model, shared.sequences, shared.needs, store).done
        except Exception:
            continue
        forwards, written = forwards + done.forwards, written + done.bytes_written
    return Captured(forwards, written)


def run_cell(cell: Cell, model: Model, store: ActivationStore, folder: StudyFolder) -> Iterator[Event]:
    """Run one cell and save its result, or record its error."""
    with folder.claim(cell.name) as claimed:
        if not claimed:
            yield Outcome(cell.name, "elsewhere")
            return
        yield Started(cell.name)
        started, forwards = time.perf_counter(), 0
        if not folder.done(cell.name):
            try:
                file = cell.prompts.file if cell.prompts else None
                result = run(cell.model.spec, cell.analysis, cell.lines, store, model=model, prompts_file=file)
                result.save(folder.cell(cell.name))
            except Exception as error:
                yield failed(cell, folder, error)
                return
            forwards = int(result.provenance["counts"]["forwards"])
        folder.failure(cell.name).unlink(missing_ok=True)
        yield Outcome(cell.name, "done", forwards, time.perf_counter() - started)


def failed(cell: Cell, folder: StudyFolder, error: Exception) -> Outcome:
    """Record a cell's error; a mistake of the user's needs no traceback."""
    trace = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
    message = " ".join(str(error).split()) or type(error).__name__
    folder.fail(cell.name, message, type(error).__name__, trace)
    return Outcome(cell.name, "failed", error=message)
