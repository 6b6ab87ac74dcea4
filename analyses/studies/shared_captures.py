"""Captures that several cells want, done once: the wants of every prompt are joined before any forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analyses.studies.cells import Cell
from probes.capture.needs import CapturePlan, Need
from probes.capture.run import plan_capture
from probes.models.protocol import Model
from probes.store import ActivationStore

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Want:
    """What one cell wants captured."""

    cell: Cell
    sequences: tuple[Tokens, ...]
    needs: tuple[Need, ...]

    def plan(self, model: Model, store: ActivationStore) -> CapturePlan:
        """The forwards of this cell if it ran by itself on the store as it is."""
        return plan_capture(model, self.sequences, self.needs, store)


@dataclass(frozen=True)
class Group:
    """Sequences that the same cells want, and the union of what these want of them."""

    sequences: tuple[Tokens, ...]
    needs: tuple[Need, ...]


def want(cell: Cell, model: Model) -> Want:
    """The sequences and needs of a cell.

    Raises:
        UserError: its prompts cannot be run on this model.
    """
    lines = cell.prompts.lines if cell.prompts else ()
    sequences = tuple(prompt.tokens for prompt in cell.analysis.collect(model, lines))
    return Want(cell, sequences, tuple(cell.analysis.needs(model)))


def wants(cells: Iterable[Cell], model: Model) -> list[Want]:
    """The wants of those cells that can say theirs; any other cell will meet its fault when it runs."""
    found = []
    for cell in cells:
        try:
            wanted = want(cell, model)
            for need in wanted.needs:
                need.features(model.shape.n_layers)
        except Exception:
            continue
        if wanted.sequences and wanted.needs and not _refused(wanted, model):
            found.append(wanted)
    return found


def _refused(wanted: Want, model: Model) -> bool:
    features = (f for need in wanted.needs for f in need.features(model.shape.n_layers))
    return any(model.refusal(feature.address) is not None for feature in features)


def writes(cell: Cell) -> bool:
    """Whether the model writes a response to each prompt; it comes first, since its rows hold the prompt's too."""
    return cell.analysis.max_new_tokens > 0


def groups(wanted: Sequence[Want]) -> list[Group]:
    """The wants joined sequence by sequence."""
    askers: dict[Tokens, dict[int, None]] = {}
    for number, one in enumerate(wanted):
        for sequence in one.sequences:
            askers.setdefault(sequence, {})[number] = None
    together: dict[tuple[int, ...], list[Tokens]] = {}
    for sequence, numbers in askers.items():
        together.setdefault(tuple(numbers), []).append(sequence)
    return [
        Group(tuple(sequences), tuple(need for number in numbers for need in wanted[number].needs))
        for numbers, sequences in together.items()
    ]


def plans(model: Model, wanted: Sequence[Want], store: ActivationStore) -> list[CapturePlan]:
    """The forwards that remain when every capture is shared."""
    return [plan_capture(model, group.sequences, group.needs, store) for group in groups(wanted)]
