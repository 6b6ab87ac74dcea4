"""How many patched forwards a run takes, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analyses.back_patching.cases import Case
from analyses.back_patching.grid import Cell, mirrored
from analyses.back_patching.stages import inner
from analyses.interventions import Interventions


@dataclass(frozen=True)
class Plan:
    """How many patches each question takes, by kind."""

    cells: Sequence[Cell]
    n_layers: int
    controls: bool
    written: int
    """Tokens of each continuation; 0 where the next token decides."""
    top_cells: int
    named: int
    """Patches of the naming prompt per position, for the stages."""
    knocked_out: int
    """Windows of layers knocked out per inner position, for the stages."""

    def of(self, case: Case, names: Sequence[str], shared: Sequence[str]) -> dict[str, int]:
        """Count the forwards of one question.

        Args:
            shared: those at which another question's source is put in.
        """
        n, forward = len(self.cells), len(mirrored(self.cells, self.n_layers))
        return {
            "patched cells": n * len(names),
            "controls": (n + forward) * len(names) + n * len(shared) if self.controls else 0,
            "written tokens": self._written(case, [n] * len(names), len(shared)),
            "named states": self.named * len(names),
            "knock-outs": self.knocked_out * len(inner(case)),
        }

    def _written(self, case: Case, grids: Sequence[int], shared: int) -> int:
        if not self.written or not case.answer_texts:
            return 0
        sizes = list(grids)
        if self.controls:
            sizes += list(grids) + [grids[0]] * shared + [len(mirrored(self.cells, self.n_layers))] * len(grids)
        return sum(min(self.top_cells, size) * self.written for size in sizes)


def rival(cases: Sequence[Case], index: int) -> Case | None:
    """Return the question whose source is put into question `index`: the next one, round the end, with another answer."""
    own = cases[index]
    return next((c for c in [*cases[index + 1 :], *cases[:index]] if not c.answers & own.answers), None)


def planned(plan: Plan, cases: Sequence[Case], names: Sequence[Sequence[str]], questions: int) -> Interventions:
    """Count the forwards of all questions; where verdicts decide which are chosen, of those that take most."""
    certain = len(cases) <= questions
    counts, opened = [], {case.prompt: set(own) for case, own in zip(cases, names, strict=True)}
    for index, case in enumerate(cases):
        other = rival(cases, index)
        shared = [name for name in names[index] if not certain or (other and name in opened[other.prompt])]
        counts.append(plan.of(case, names[index], shared))
    dearest = sorted(counts, key=lambda count: -sum(count.values()))[:questions]
    total = {name: sum(count[name] for count in dearest) for name in (dearest[0] if dearest else ())}
    return Interventions(total, exact=certain)
