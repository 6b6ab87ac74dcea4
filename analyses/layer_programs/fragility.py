"""Whether a program still helps when it is changed a little: one that only survives unaltered is an accident of its question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from analyses.layer_programs.alphabet import Alphabet
from analyses.layer_programs.chance import grouped_interval
from analyses.layer_programs.outcomes import Board
from probes.edits.program_edits import Change, Exchange, Jump, changes_of, program_of
from probes.edits.programs import Program

Alteration = Literal["undone", "one block longer or shorter", "shifted by one block", "one more change"]


def altered(program: Program, alphabet: Alphabet, rng: np.random.Generator) -> dict[Alteration, list[Program]]:
    """Return the programs that each kind of small change makes of a program; what is no program any more is left out."""
    n = alphabet.n_layers
    changes = changes_of(program, n)
    variants: dict[Alteration, list[Sequence[Change]]] = {
        "undone": [(*changes[:at], *changes[at + 1 :]) for at in range(len(changes))],
        "one block longer or shorter": _each(changes, _resized),
        "shifted by one block": _each(changes, _shifted),
        "one more change": [_one_more(changes, alphabet, rng)],
    }
    programs: dict[Alteration, list[Program]] = {}
    for kind, several in variants.items():
        legal = [p for each in several if _inside(each, n) and (p := program_of(n, each)) is not None]
        programs[kind] = [each for each in dict.fromkeys(legal) if alphabet.legal(each) and each != program]
    return programs


def _each(changes: Sequence[Change], vary: Any) -> list[Sequence[Change]]:
    return [
        (*changes[:at], variant, *changes[at + 1 :]) for at, change in enumerate(changes) for variant in vary(change)
    ]


def _resized(change: Change) -> list[Change]:
    """Return a jump whose span is one block longer or shorter at either end; a span of none is no change."""
    if not isinstance(change, Jump):
        return []
    leave, enter = change.leave, change.enter
    ends = [Jump(leave + 1, enter), Jump(leave - 1, enter), Jump(leave, enter + 1), Jump(leave, enter - 1)]
    return [jump for jump in ends if jump.leave != jump.enter]


def _shifted(change: Change) -> list[Change]:
    if isinstance(change, Jump):
        return [Jump(change.leave + by, change.enter + by) for by in (-1, 1)]
    if isinstance(change, Exchange):
        return [Exchange(change.first + by, change.second + by, change.width) for by in (-1, 1)]
    return []


def _inside(changes: Sequence[Change], n_layers: int) -> bool:
    places = [place for change in changes if isinstance(change, Jump) for place in (change.leave, change.enter)]
    firsts = [change.first for change in changes if isinstance(change, Exchange)]
    return all(0 <= place <= n_layers for place in places) and all(first >= 0 for first in firsts)


def _one_more(changes: Sequence[Change], alphabet: Alphabet, rng: np.random.Generator) -> Sequence[Change]:
    options = list(alphabet.children(changes).values())
    return options[int(rng.integers(len(options)))] if options else changes


def fragility_table(board: Board, mending: Mapping[int, Program], alphabet: Alphabet) -> pd.DataFrame:
    """Return columns program, change, survived, ci_low, ci_high, n: of questions that a program answers, the share still answered.

    Args:
        mending: by question that is wrong plainly, the program that answers it.
    """
    rng = np.random.default_rng((board.seed, 5))
    plain = Program.plain(board.n_layers)
    right = np.flatnonzero(board.plain_right())
    sets: list[tuple[str, dict[int, Program]]] = [
        ("programs that mend a question", dict(mending)),
        ("the plain order, where it is right", dict.fromkeys(right.tolist(), plain)),
    ]
    rows = []
    for name, programs in sets:
        survived: dict[str, list[tuple[int, float]]] = {}
        for question, program in programs.items():
            for alteration, variants in altered(program, alphabet, rng).items():
                if variants:
                    share = board.engine.scores(variants, [question]).right.mean()
                    survived.setdefault(alteration, []).append((question, float(share)))
        for kind, shares in survived.items():
            values = np.array([share for _, share in shares])[:, None]
            mean = grouped_interval(values, [board.groups[question] for question, _ in shares], board.seed)
            rows.append((name, kind, mean.mean[0], mean.low[0], mean.high[0], len(shares)))
    return pd.DataFrame(rows, columns=["program", "change", "survived", "ci_low", "ci_high", "n"])
