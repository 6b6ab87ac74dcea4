"""What a study will cost before it runs: each cell by itself, and what sharing saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analyses.running.runner import plan_run
from analyses.studies.cells import Cell
from analyses.studies.run_cells import ModelHolder
from analyses.studies.scheduling import Unit
from analyses.studies.shared_captures import CellCaptures, shared_plans
from probes.capture.dry_run import PROBE_SECONDS, DeviceSpeed, Estimate, estimate, measured_speed
from probes.errors import UserError
from probes.html_card import size
from probes.models.protocol import Model
from probes.store import ActivationStore


@dataclass(frozen=True)
class CellCost:
    """What one cell would capture by itself on the store as it is; None where it cannot be run."""

    cell: Cell
    captures: Estimate | None
    note: str = ""


@dataclass(frozen=True)
class UnitCost:
    """The cells of a unit one by one, and their captures joined."""

    cells: tuple[CellCost, ...]
    shared: Estimate | None = None


def costs(units: Sequence[Unit], store: ActivationStore) -> Iterator[UnitCost]:
    """Yield the cost of each unit; loads every model, one at a time, and runs none."""
    models, speeds = ModelHolder(), dict[str, DeviceSpeed]()
    for unit in units:
        try:
            model = models(unit.model)
        except UserError as error:
            yield UnitCost(tuple(CellCost(cell, None, str(error)) for cell in unit.cells))
            continue
        if model.ref not in speeds:
            speeds[model.ref] = measured_speed(model, PROBE_SECONDS)
        yield _unit_cost(unit, model, store, speeds[model.ref])


def _unit_cost(unit: Unit, model: Model, store: ActivationStore, speed: DeviceSpeed) -> UnitCost:
    captures, cells = [], []
    for cell in unit.cells:
        try:
            planned = plan_run(model, cell.analysis, cell.lines, store)
        except UserError as error:
            cells.append(CellCost(cell, None, f"will fail: {error}"))
            continue
        captures.append(CellCaptures(cell, planned.sequences, planned.needs))
        cells.append(CellCost(cell, estimate(model, [planned.captures], speed), "; ".join(planned.notes)))
    return UnitCost(tuple(cells), estimate(model, shared_plans(model, captures, store), speed))


def table(units: Sequence[UnitCost], done: int) -> list[str]:
    """Return the cost table as a user reads it."""
    cells = [cost for unit in units for cost in unit.cells]
    rows = [["cell", "forwards", "captured", "seconds", "peak memory", ""]]
    rows += [[cost.cell.label, *_numbers(cost.captures), cost.note] for cost in cells]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]).rstrip()
        for row in rows
    ]
    alone = sum(cost.captures.forwards for cost in cells if cost.captures)
    shared = [unit.shared for unit in units if unit.shared]
    forwards, seconds = sum(one.forwards for one in shared), sum(one.seconds for one in shared)
    return [
        *lines,
        "",
        f"cells     {len(cells):,} to run, {done:,} already done",
        f"forwards  {forwards:,} shared, in place of {alone:,} cell by cell: {alone - forwards:,} saved",
        f"captured  {size(sum(one.bytes for one in shared))}, about {seconds:.1f} s of forwards",
        "Lines are each cell by itself; interventions, generation and fitting come on top.",
    ]


def _numbers(cost: Estimate | None) -> list[str]:
    if cost is None:
        return ["0", size(0), "0.0", size(0)]
    return [f"{cost.forwards:,}", size(cost.bytes), f"{cost.seconds:.1f}", size(cost.peak_bytes)]
