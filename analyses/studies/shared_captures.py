"""Captures that several cells need, done once: the needs of all cells are joined prompt by prompt before any forward."""

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
class CellCaptures:
    """What one cell reads: its sequences, and its needs of each."""

    cell: Cell
    sequences: tuple[Tokens, ...]
    needs: tuple[Need, ...]

    def plan(self, model: Model, store: ActivationStore) -> CapturePlan:
        """Return the forwards of this cell if it ran by itself on the store as it is."""
        return plan_capture(model, self.sequences, self.needs, store)


@dataclass(frozen=True)
class SharedCapture:
    """Sequences that the same cells read, and the union of what these need of them."""

    sequences: tuple[Tokens, ...]
    needs: tuple[Need, ...]


def captures_of(cells: Iterable[Cell], model: Model) -> list[CellCaptures]:
    """Return the captures of those cells that can say theirs; any other cell will meet its fault when it runs."""
    captures = []
    for cell in cells:
        try:
            prompts, needs = cell.analysis.collect(model, cell.lines), tuple(cell.analysis.needs(model))
            addresses = [feature.address for need in needs for feature in need.features(model.shape.n_layers)]
        except Exception:
            continue
        if prompts and needs and not any(model.refusal(address) for address in addresses):
            captures.append(CellCaptures(cell, tuple(prompt.tokens for prompt in prompts), needs))
    return captures


def generates(cell: Cell) -> bool:
    """Whether the model writes a response to each prompt; such cells come first, since their rows hold the prompt's too."""
    return cell.analysis.max_new_tokens > 0


def joined(captures: Sequence[CellCaptures]) -> list[SharedCapture]:
    """Join the captures of cells, sequence by sequence."""
    readers: dict[Tokens, dict[int, None]] = {}
    for number, one in enumerate(captures):
        for sequence in one.sequences:
            readers.setdefault(sequence, {})[number] = None
    together: dict[tuple[int, ...], list[Tokens]] = {}
    for sequence, numbers in readers.items():
        together.setdefault(tuple(numbers), []).append(sequence)
    return [
        SharedCapture(tuple(sequences), tuple(need for number in numbers for need in captures[number].needs))
        for numbers, sequences in together.items()
    ]


def shared_plans(model: Model, captures: Sequence[CellCaptures], store: ActivationStore) -> list[CapturePlan]:
    """Return the forwards that remain when every capture is shared."""
    return [plan_capture(model, shared.sequences, shared.needs, store) for shared in joined(captures)]
