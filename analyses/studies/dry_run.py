"""What a study will cost before it runs: each cell by itself, and what sharing saves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analyses.studies.cells import Cell
from analyses.studies.run_cells import Loaded
from analyses.studies.scheduling import Unit
from analyses.studies.shared_captures import Want, plans, want, writes
from probes.capture.dry_run import PROBE_SECONDS, DeviceSpeed, estimate, human, measured_speed
from probes.capture.forward import axis_sizes, row_size
from probes.capture.needs import CapturePlan
from probes.errors import UserError
from probes.html_card import count
from probes.models.protocol import Model
from probes.store import ActivationStore


@dataclass(frozen=True)
class CellCost:
    """What one cell would capture by itself on the store as it is."""

    cell: Cell
    forwards: int = 0
    bytes: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    note: str = ""


@dataclass(frozen=True)
class UnitCost:
    """The cells of a unit one by one, and their captures joined."""

    label: str
    cells: tuple[CellCost, ...]
    forwards: int
    bytes: int
    seconds: float

    @property
    def saved(self) -> int:
        """Forwards that sharing saves."""
        return sum(cost.forwards for cost in self.cells) - self.forwards


def costs(units: Sequence[Unit], store: ActivationStore) -> Iterator[UnitCost]:
    """The cost of each unit; loads every model, one at a time, and runs none."""
    loaded, speeds = Loaded(), dict[str, DeviceSpeed]()
    for unit in units:
        try:
            model = loaded(unit.model)
        except UserError as error:
            yield UnitCost(unit.label, tuple(CellCost(cell, note=str(error)) for cell in unit.cells), 0, 0, 0.0)
            continue
        if model.ref not in speeds:
            speeds[model.ref] = measured_speed(model, PROBE_SECONDS)
        yield _unit(unit, model, store, speeds[model.ref])


def _unit(unit: Unit, model: Model, store: ActivationStore, speed: DeviceSpeed) -> UnitCost:
    found: list[Want] = []
    lines = []
    for cell in unit.cells:
        try:
            wanted = want(cell, model)
            plan = wanted.plan(model, store)
        except UserError as error:
            lines.append(CellCost(cell, note=f"will fail: {error}"))
            continue
        found.append(wanted)
        lines.append(_cell(cell, plan, len(wanted.sequences), model, speed))
    joined = plans(model, found, store)
    whole = estimate(model, joined, speed)
    return UnitCost(unit.label, tuple(lines), whole.forwards, whole.bytes, whole.seconds)


def _cell(cell: Cell, plan: CapturePlan, prompts: int, model: Model, speed: DeviceSpeed) -> CellCost:
    alone = estimate(model, [plan], speed)
    note = (
        f"and up to {count(cell.analysis.max_new_tokens, 'new token')} for each of {count(prompts, 'prompt')}"
        if writes(cell)
        else ""
    )
    size = plan.bytes(axis_sizes(model), row_size(model))
    return CellCost(cell, alone.forwards, size, alone.seconds, alone.peak_bytes, note)


def table(found: Sequence[UnitCost], done: int) -> list[str]:
    """The cost table as a user reads it."""
    rows = [["cell", "forwards", "captured", "seconds", "peak memory", ""]]
    for unit in found:
        for one in unit.cells:
            said = [f"{one.forwards:,}", human(one.bytes), f"{one.seconds:.1f}", human(one.peak_bytes)]
            rows.append([one.cell.label, *said, one.note])
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]).rstrip()
        for row in rows
    ]
    alone = sum(one.forwards for unit in found for one in unit.cells)
    shared, saved = sum(unit.forwards for unit in found), sum(unit.saved for unit in found)
    size, seconds = sum(unit.bytes for unit in found), sum(unit.seconds for unit in found)
    return [
        *lines,
        "",
        f"cells     {sum(len(unit.cells) for unit in found):,} to run, {done:,} already done",
        f"forwards  {shared:,} shared, in place of {alone:,} cell by cell: {saved:,} saved",
        f"captured  {human(size)}, about {seconds:.1f} s of forwards",
        "Lines are each cell by itself; interventions, generation and fitting come on top.",
    ]
