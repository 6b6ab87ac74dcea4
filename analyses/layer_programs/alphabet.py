"""The moves that searches draw from, and the programs that one more of them makes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from probes.edits.program_edits import Change, Exchange, Jump, changes_of, program_of
from probes.edits.programs import Program

Move = Literal["skip", "repeat", "swap"]
EDITS = 3
"""Changes of a random program, and steps of a beam, at most."""


@dataclass(frozen=True)
class Alphabet:
    """Which changes a program may be made of."""

    n_layers: int
    moves: tuple[Move, ...]
    max_span: int
    most: int
    """Block-runs of a program at most."""

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Return every single change: skips and repeats of spans up to `max_span`, exchanges of neighbours."""
        n, changes = self.n_layers, list[Change]()
        for width in range(1, min(self.max_span, n) + 1):
            for first in range(n - width + 1):
                changes += [Jump(first, first + width)] if "skip" in self.moves else []
                changes += [Jump(first + width, first)] if "repeat" in self.moves else []
        return (*changes, *([Exchange(i, i + 1) for i in range(n - 1)] if "swap" in self.moves else []))

    def legal(self, program: Program | None) -> bool:
        """Return whether a search may propose a program: some block runs, and not too many."""
        return program is not None and 0 < program.runs <= self.most

    def grown(self, changes: Sequence[Change], change: Change) -> Iterator[tuple[tuple[Change, ...], Program]]:
        """Yield the changes with one more of them at every legal place, and what they make."""
        if isinstance(change, Jump) and change.enter < change.leave and change in changes:
            return  # a span is repeated once
        for at in range(len(changes) + 1):
            more = (*changes[:at], change, *changes[at:])
            program = program_of(self.n_layers, more)
            if program is not None and self.legal(program):
                yield more, program

    def children(self, changes: Sequence[Change]) -> dict[Program, tuple[Change, ...]]:
        """Return the programs that one more change makes, each with its changes."""
        children: dict[Program, tuple[Change, ...]] = {}
        for change in self.changes:
            for more, program in self.grown(changes, change):
                if len(changes_of(program, self.n_layers)) > len(changes):
                    children.setdefault(program, more)
        return children

    def random(self, rng: np.random.Generator) -> Program:
        """Return a program of one to three changes, each drawn from the alphabet."""
        alphabet = self.changes
        while True:
            changes: tuple[Change, ...] = ()
            for _ in range(int(rng.integers(1, EDITS + 1))):
                options = list(self.grown(changes, alphabet[int(rng.integers(len(alphabet)))]))
                if options:
                    changes = options[int(rng.integers(len(options)))][0]
            program = program_of(self.n_layers, changes) if changes else None
            if program is not None and not program.is_plain(self.n_layers):
                return program
