"""Programs run on the questions, each once, and what they end in beside the plain run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.interventions import Tally
from analyses.layer_programs.questions import Question
from analyses.layer_programs.reading import LOWER_IS_BETTER, Metric, Reader, Readings
from analyses.results.statistics import Array
from probes.blocks.prompt_tree import PromptTree
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


TREE_TOKENS = 1024
"""Positions of the questions that are open at once, those that they share counted once, at most; bounds memory."""


class OpenQuestions:
    """Questions run plainly once, on which programs are run together: what their texts share from the start runs once."""

    def __init__(self, model: Model, questions: Sequence[Question], metrics: tuple[Metric, ...]) -> None:
        self.questions = questions
        self.tree = PromptTree(model, [each.forced for each in questions], [each.start for each in questions])
        self.entering = self.tree.entering
        """The plain stream [node, d_model] before each block and behind the last."""
        self.reader = Reader(model, questions, metrics, self.tree.paths, self.entering[-1])
        self.plain: list[Readings] = self.reader.read(self.entering[-1][None])

    def through(self, layer: int, hidden: Tensor) -> Tensor:
        """Return what leaves a block [row, node, d_model]."""
        return self.tree.through(layer, hidden)

    @torch.no_grad()
    def run(self, programs: Sequence[Program]) -> Iterator[tuple[list[int], list[Readings], int]]:
        """Yield, part by part, (which programs it holds, what they end in for each question, the block-runs of a question)."""
        for part, final, runs in run_programs(programs, self.entering, self.through, self.tree.width):
            yield part, self.reader.read(final), runs


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
    """Blocks run so far on a question, over all questions; those of the plain run not counted."""
    block_tokens: int = 0
    """Positions that blocks ran on, those that questions share counted once."""
    _known: dict[tuple[int, Program], tuple[Readings, int, Readings]] = field(default_factory=dict)
    """By question and program: what it ended in, at which entry of it, and the plain run beside it."""
    _plain: dict[int, Readings] = field(default_factory=dict)
    _last: dict[tuple[int, ...], OpenQuestions] = field(default_factory=dict)
    """The questions opened last, which a search comes back to."""

    def open(self, indices: Sequence[int]) -> OpenQuestions:
        """Return some questions with their plain runs."""
        key = tuple(indices)
        if key not in self._last:
            self._last = {key: OpenQuestions(self.model, [self.questions[index] for index in key], self.metrics)}
            self._plain |= dict(zip(key, self._last[key].plain, strict=True))
        return self._last[key]

    def together(self, indices: Iterable[int]) -> list[list[int]]:
        """Return questions in sets that are open at once; those that begin alike are in one."""
        sets: list[list[int]] = []
        tokens, last = 0, tuple[int, ...]()
        for index in sorted(indices, key=lambda index: self.questions[index].forced):
            question = self.questions[index]
            same = next((i for i, (a, b) in enumerate(zip(question.forced, last, strict=False)) if a != b), len(last))
            new = len(question.forced) - max(question.start, min(same, len(question.forced)))
            if not sets or tokens + new > TREE_TOKENS:
                sets.append([])
                tokens, new = 0, len(question.forced) - question.start
            sets[-1].append(index)
            tokens, last = tokens + new, question.forced
        return sets

    def plain(self) -> list[Readings]:
        """Return what the plain run of every question ends in."""
        for some in self.together(index for index in range(len(self.questions)) if index not in self._plain):
            self.open(some)
        return [self._plain[index] for index in range(len(self.questions))]

    def run(self, programs: Iterable[Program], only: Iterable[int] | None = None) -> None:
        """Run the programs that are not known yet, on all questions or on those of `only`."""
        unique = list(dict.fromkeys(programs))
        alike: dict[tuple[Program, ...], list[int]] = {}
        for index in range(len(self.questions)) if only is None else only:
            unknown = tuple(program for program in unique if (index, program) not in self._known)
            alike.setdefault(unknown, []).append(index)
        for unknown, indices in alike.items():
            for some in self.together(indices) if unknown else ():
                self._run(unknown, some)

    def _run(self, programs: Sequence[Program], some: Sequence[int]) -> None:
        opened = self.open(some)
        for part, readings, runs in opened.run(programs):
            self.count(runs, some)
            (self.tally.tick if self.shown else self.tally.count)(len(part) * len(some))
            for index, of_question, plain in zip(some, readings, opened.plain, strict=True):
                for entry, program in enumerate(part):
                    self._known[index, programs[program]] = (of_question, entry, plain)

    def count(self, runs: int, some: Sequence[int]) -> None:
        """Count blocks that ran on each of some questions that are open together."""
        self.block_runs += runs * len(some)
        self.block_tokens += runs * self.open(some).tree.nodes

    def scores(self, programs: Sequence[Program], only: Sequence[int] | None = None) -> Scores:
        """Return what the programs end in, running what is not known yet; rows are the questions of `only`, or all."""
        rows = list(range(len(self.questions)) if only is None else only)
        self.run(programs, rows)
        known = [[self._known[index, program] for program in programs] for index in rows]
        names: set[Metric] = {*self.metrics, "correct"}
        change = {
            name: np.array([[r.values[name][at] - plain.values[name][0] for r, at, plain in row] for row in known])
            for name in names
        }  # fmt: skip
        shape = (len(rows), len(programs))
        return Scores(
            {name: values.reshape(shape) for name, values in change.items()},
            np.array([[r.values["correct"][at] > 0 for r, at, _ in row] for row in known], dtype=bool).reshape(shape),
            np.array([[r.said[at] for r, at, _ in row] for row in known], dtype=np.int64).reshape(shape),
            np.array([[r.confidence[at] for r, at, _ in row] for row in known]).reshape(shape),
            np.array([[r.written[at] for r, at, _ in row] for row in known], dtype=bool).reshape(shape),
            np.array([[r.norm[at] / plain.norm[0] for r, at, plain in row] for row in known]).reshape(shape),
        )  # fmt: skip
