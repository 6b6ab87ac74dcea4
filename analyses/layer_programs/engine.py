"""Programs run on the questions, each once, and what they end in beside the plain run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.interventions import Tally
from analyses.layer_programs.questions import Question
from analyses.layer_programs.reading import LOWER_IS_BETTER, Array, Metric, Reader, Readings
from probes.blocks.cached_prompt import CachedPrompt
from probes.edits.program_runs import run_programs
from probes.edits.programs import Program
from probes.models.protocol import Model


@dataclass(eq=False)
class Scores:
    """What programs end in, beside the plain run; rows are questions, columns programs."""

    change: dict[Metric, Array]
    """[question, program], the metric less that of the plain run; NaN where the stream diverged."""
    right: NDArray[np.bool_]
    said: NDArray[np.int64]
    confidence: Array
    written: NDArray[np.bool_]
    norm_ratio: Array
    """Norm of the final stream at the last position over that of the plain run; infinite where it diverged."""

    def gain(self, metric: Metric) -> Array:
        """Return the change, its sign such that more is better; a diverged program is the worst of its row."""
        change = -self.change[metric] if metric in LOWER_IS_BETTER else self.change[metric]
        worst = np.nanmin(np.where(np.isfinite(change), change, 0.0), axis=1, keepdims=True, initial=0.0)
        return np.where(np.isfinite(change), change, worst - 1.0)


class OpenQuestion:
    """One question, run plainly once, on which programs are run."""

    def __init__(self, model: Model, question: Question, metrics: tuple[Metric, ...]) -> None:
        self.question = question
        self._prompt = CachedPrompt(model, question.forced, question.start)
        self.entering: Sequence[Tensor] = self._prompt.entering
        """The plain stream [pos, d_model] before each block and behind the last."""
        self.reader = Reader(model, question, metrics, self.entering[-1])
        self.plain: Readings = self.reader.read(self.entering[-1][None])

    @torch.no_grad()
    def through(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what leaves a block [row, pos, d_model]."""
        return self._prompt.through(layer, hidden, {})

    @torch.no_grad()
    def run(self, programs: Sequence[Program]) -> tuple[list[Readings], list[list[int]], int]:
        """Return (what the programs of each part end in, which programs each part holds, the block-runs taken)."""
        readings, order, runs = [], [], 0
        for part, final, taken in run_programs(programs, self.entering, self.through):
            readings.append(self.reader.read(final))
            order.append(part)
            runs += taken
        return readings, order, runs


@dataclass(eq=False)
class Engine:
    """Runs programs on all questions and remembers what each ended in."""

    model: Model
    questions: Sequence[Question]
    metrics: tuple[Metric, ...]
    tally: Tally
    shown: bool = True
    """Whether each program moves the progress; a search, which does not know how many it will run, moves it by its steps."""
    block_runs: int = 0
    """Blocks run so far, those of the plain run not counted."""
    _known: dict[tuple[int, Program], tuple[Readings, int]] = field(default_factory=dict)
    """By question and program: what it ended in, and at which entry of it."""
    _plain: dict[int, Readings] = field(default_factory=dict)
    _last: dict[int, OpenQuestion] = field(default_factory=dict)
    """The question opened last, which a search of one question comes back to."""

    def open(self, index: int) -> OpenQuestion:
        """Return a question with its plain run."""
        if index not in self._last:
            self._last = {index: OpenQuestion(self.model, self.questions[index], self.metrics)}
            self._plain[index] = self._last[index].plain
        return self._last[index]

    def plain(self) -> list[Readings]:
        """Return what the plain run of every question ends in."""
        for index in range(len(self.questions)):
            if index not in self._plain:
                self.open(index)
        return [self._plain[index] for index in range(len(self.questions))]

    def run(self, programs: Iterable[Program], only: Iterable[int] | None = None) -> None:
        """Run the programs that are not known yet, on all questions or on those of `only`."""
        unique = list(dict.fromkeys(programs))
        for index in range(len(self.questions)) if only is None else only:
            unknown = [program for program in unique if (index, program) not in self._known]
            if not unknown:
                continue
            parts, order, runs = self.open(index).run(unknown)
            self.block_runs += runs
            (self.tally.tick if self.shown else self.tally.count)(len(unknown))
            for readings, which in zip(parts, order, strict=True):
                for entry, program in enumerate(which):
                    self._known[index, unknown[program]] = (readings, entry)

    def scores(self, programs: Sequence[Program], only: Sequence[int] | None = None) -> Scores:
        """Return what the programs end in, running what is not known yet; rows are the questions of `only`, or all."""
        rows = list(range(len(self.questions)) if only is None else only)
        self.run(programs, rows)
        known = [[self._known[index, program] for program in programs] for index in rows]
        plain = [self._plain[index] for index in rows]
        names = plain[0].values if plain else {}
        change = {
            name: np.array([[r.values[name][at] - base.values[name][0] for r, at in row] for row, base in zip(known, plain, strict=True)])
            for name in names
        }  # fmt: skip
        shape = (len(rows), len(programs))
        return Scores(
            {name: values.reshape(shape) for name, values in change.items()},
            np.array([[r.values["correct"][at] > 0 for r, at in row] for row in known], dtype=bool).reshape(shape),
            np.array([[r.said[at] for r, at in row] for row in known], dtype=np.int64).reshape(shape),
            np.array([[r.confidence[at] for r, at in row] for row in known]).reshape(shape),
            np.array([[r.written[at] for r, at in row] for row in known], dtype=bool).reshape(shape),
            np.array([[r.norm[at] / base.norm[0] for r, at in row] for row, base in zip(known, plain, strict=True)]).reshape(shape),
        )  # fmt: skip
