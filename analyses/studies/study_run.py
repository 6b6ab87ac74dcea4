"""A study from end to end: the cells that are missing, by an engine, then its index, tables and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analyses.studies.cells import Cell, expand
from analyses.studies.definition import Study
from analyses.studies.export import write_tables
from analyses.studies.run_cells import Captured, Event, Outcome
from analyses.studies.scheduling import Unit, units
from analyses.studies.study_folder import StudyFolder
from analyses.studies.study_page import render
from analyses.studies.tidy_tables import build, curves
from probes.html_card import count
from probes.locked_files import write_whole
from probes.progress import QUIET, Progress

Engine = Callable[[Sequence[Unit], StudyFolder], Iterable[tuple[Unit, Event]]]
"""Runs units and yields what happens."""


@dataclass(frozen=True)
class StudyRun:
    """What one run of a study did."""

    folder: StudyFolder
    cells: int
    """Cells of the study."""
    ran: tuple[str, ...]
    """Cells that were run and are done, by name."""
    failed: tuple[str, ...]
    elsewhere: tuple[str, ...]
    """Cells that another process was running."""
    forwards: int
    """Sequences run through a model to capture them, by shared captures and by cells."""


def run_study(
    study: Study, out: str | Path, engine: Engine, *, unit: int | None = None, progress: Progress = QUIET
) -> StudyRun:
    """Run the cells that have no result yet, and write the study's tables and report.

    Args:
        unit: run only the cells of this unit, counted from 0 as `units` orders them, and write no report.

    Raises:
        StudyError: a fault of the study, before anything runs.
        OptionError: `out` holds something other than a study.
    """
    folder = StudyFolder(Path(out))
    folder.check()
    cells = expand(study)
    renamed = folder.prepare(study, cells)
    chosen = cells if unit is None else units(cells)[unit].cells
    missing = [cell for cell in chosen if not folder.done(cell.name)]
    run = _run_missing(folder, len(cells), missing, engine, progress)
    if unit is None and (missing or renamed or _stale(folder, cells)):
        finish(study, cells, folder)
    return run


def _run_missing(
    folder: StudyFolder, cells: int, missing: Sequence[Cell], engine: Engine, progress: Progress
) -> StudyRun:
    if missing:
        progress.note(f"{len(missing):,} of {count(cells, 'cell')} to run")
        progress.start(len(missing), "cell")
    labels = {cell.name: cell.label for cell in missing}
    ended: dict[str, list[str]] = {"done": [], "failed": [], "elsewhere": []}
    forwards = 0
    for unit, event in engine(units(missing), folder) if missing else ():
        if isinstance(event, Captured) and event.forwards:
            forwards += event.forwards
            progress.note(f"{unit.label}: {count(event.forwards, 'forward pass')} that its cells share")
        elif isinstance(event, Outcome):
            forwards += event.forwards
            ended[event.state].append(event.cell)
            progress.advance()
            progress.note(f"{labels[event.cell]}: {_how_it_ended(event)}")
    done, failed, elsewhere = (tuple(ended[state]) for state in ("done", "failed", "elsewhere"))
    return StudyRun(folder, cells, done, failed, elsewhere, forwards)


def _how_it_ended(outcome: Outcome) -> str:
    if outcome.state == "done":
        return f"done, {count(outcome.forwards, 'forward pass')}, {outcome.seconds:.1f} s"
    return outcome.error or "another process is running it"


def finish(study: Study, cells: Sequence[Cell], folder: StudyFolder) -> None:
    """Write index, profiles, tables and report from the results that are there."""
    index, profiles = build(cells, folder)
    curve = curves(profiles)
    write_tables(folder.root / "tables", index, profiles, curve)
    write_whole(folder.report, render(study, cells, index, curve))
    # The index comes last: where it says that a cell is done, everything else does too.
    for table, path in ((profiles, folder.root / "profiles.parquet"), (index, folder.index)):
        draft = path.with_name(f".{path.name}")
        table.to_parquet(draft, index=False)
        draft.replace(path)


def _stale(folder: StudyFolder, cells: Sequence[Cell]) -> bool:
    """Whether the index says something other than the folder."""
    if not (folder.index.is_file() and folder.report.is_file()):
        return True
    index = pd.read_parquet(folder.index, columns=["cell", "state"])
    known = dict(zip(index["cell"], index["state"], strict=True))
    return any((known.get(cell.name) == "done") != folder.done(cell.name) for cell in cells)
