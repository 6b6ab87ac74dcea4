"""Units of work: cells of one model and one prompt set stay together, so that their captures are done once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analyses.studies.cells import Cell
from analyses.studies.definition import StudyModel


@dataclass(frozen=True)
class Unit:
    """Cells of one model and one prompt set."""

    cells: tuple[Cell, ...]

    @property
    def model(self) -> StudyModel:
        return self.cells[0].model

    @property
    def model_bytes(self) -> int:
        return self.cells[0].model_bytes

    @property
    def label(self) -> str:
        prompts = self.cells[0].prompts
        return f"{self.model.label} · {prompts.label if prompts else 'own prompts'}"


def units(cells: Iterable[Cell]) -> tuple[Unit, ...]:
    """The units of some cells, those of the largest model first and of one model in a row."""
    found: dict[tuple[StudyModel, str | None], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.model, cell.prompts.label if cell.prompts else None), []).append(cell)
    made = [Unit(tuple(group)) for group in found.values()]
    order = {unit.model: -unit.model_bytes for unit in made}
    models = sorted(order, key=lambda model: order[model])
    return tuple(sorted(made, key=lambda unit: models.index(unit.model)))


def take(waiting: list[Unit], loaded: StudyModel | None, elsewhere: Sequence[StudyModel | None]) -> Unit:
    """The next unit for a worker: of the model it has loaded, else of one that no other has, else the first."""
    own = (unit for unit in waiting if unit.model == loaded)
    free = (unit for unit in waiting if unit.model not in elsewhere)
    chosen = next(own, None) or next(free, None) or waiting[0]
    waiting.remove(chosen)
    return chosen
