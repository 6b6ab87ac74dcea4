"""Which cells stay together, and which go next: a unit is the cells of one model and one prompt set."""

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
        """The model of all its cells."""
        return self.cells[0].model

    @property
    def model_bytes(self) -> int:
        """Bytes of the model's weights on disk."""
        return self.cells[0].model_bytes

    @property
    def label(self) -> str:
        """The unit as a reader knows it."""
        prompts = self.cells[0].prompts
        return f"{self.model.label} · {prompts.label if prompts else 'own prompts'}"


def units(cells: Iterable[Cell]) -> tuple[Unit, ...]:
    """Group cells into units, those of the largest model first and of one model in a row."""
    together: dict[tuple[StudyModel, str | None], list[Cell]] = {}
    for cell in cells:
        together.setdefault((cell.model, cell.prompts.label if cell.prompts else None), []).append(cell)
    groups = [Unit(tuple(group)) for group in together.values()]
    sizes = {unit.model: unit.model_bytes for unit in groups}
    models = sorted(sizes, key=lambda model: -sizes[model])
    return tuple(sorted(groups, key=lambda unit: models.index(unit.model)))


def take(waiting: list[Unit], loaded: StudyModel | None, elsewhere: Sequence[StudyModel | None]) -> Unit:
    """Take the next unit for a process: of the model it has loaded, else of one that no other process has, else the first."""
    same_model = (unit for unit in waiting if unit.model == loaded)
    free = (unit for unit in waiting if unit.model not in elsewhere)
    chosen = next(same_model, None) or next(free, None) or waiting[0]
    waiting.remove(chosen)
    return chosen
