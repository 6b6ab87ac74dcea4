"""What an adapter is: the runs that an analysis needs for a task, and how its tables become answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyses.base import Analysis
from analyses.ground_truth.answers import Answer, Decision, name_of
from analyses.results.result import Result
from analyses.results.statistics import MIN_CLUSTERS, draw_groups, percentiles
from probes.planted.record import Kind, Question
from probes.planted.task import Example, PlantedTask
from probes.prompts import Prompt

N_PROMPTS = 64
"""Prompts that a method is shown at most, of those to fit on."""


@dataclass(frozen=True, eq=False)
class Run:
    """An analysis, the prompts it is given, and the questions that its result answers."""

    analysis: Analysis
    prompts: tuple[Prompt, ...]
    questions: tuple[Question, ...]
    method: str = ""
    """What its answers are called, where one analysis runs in several ways."""


@dataclass(frozen=True)
class Adapter:
    """How an analysis takes part."""

    analysis: str
    """Its name in the registry."""
    methods: tuple[str, ...]
    """What its answers are called: the analysis, or the methods that it compares."""
    kinds: tuple[Kind, ...]
    """Kinds of questions that it answers."""
    runs: Callable[[PlantedTask, Sequence[Question]], list[Run]]
    """From a task and those of its questions that are of these kinds to the runs that answer them."""
    read: Callable[[Result, PlantedTask, Sequence[Question]], list[Answer]]
    """From a result of one of the runs to the answers of its questions."""
    only: Callable[[Question], bool] = field(default=lambda question: True)
    """Which questions of the kinds it can speak to."""

    def questions(self, task: PlantedTask) -> list[Question]:
        """Return the questions of a task that the analysis answers."""
        return [question for question in task.record.questions if question.kind in self.kinds and self.only(question)]


def examples_of(task: PlantedTask, subset: str | None = None, n: int = N_PROMPTS) -> list[Example]:
    """Return the examples a method is shown: `n` of those to fit on, evenly spaced; of one subset where a question is."""
    shown = [example for example in task.examples if example.split == "fit" and subset in (None, example.subset)]
    n = min(n, len(shown))
    return [shown[i * len(shown) // n] for i in range(n)]


def prompt_to(task: PlantedTask, example: Example, position: str | None, **fields: Any) -> Prompt:
    """Return an example as a prompt that ends at a named position, or whole."""
    end = len(example.tokens) if position is None else task.position(example, position) + 1
    return Prompt(example.tokens[:end], None, fields)


def set_answer(
    method: str,
    task: PlantedTask,
    question: Question,
    scores: dict[str, float],
    chosen: frozenset[str],
) -> Answer:
    """Return an answer of a set, which is a claim of none where the method chooses nothing."""
    decision: Decision = "answered" if chosen else "none"
    return Answer(method, name_of(task.record), question.key, decision, scores=scores, chosen=chosen)


def median_interval(values: NDArray[np.float64], seed: int = 0) -> tuple[float, float, float]:
    """Return the median over prompts [prompts] with its 95 % bootstrap interval; NaN bounds below six prompts."""
    draws = np.median(values[draw_groups(len(values), seed)], axis=1) if len(values) >= MIN_CLUSTERS else values
    low, high = percentiles(draws, len(values))
    return float(np.median(values)), float(low), float(high)
