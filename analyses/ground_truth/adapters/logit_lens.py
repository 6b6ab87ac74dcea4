"""The logit lens: from which layer on its top token is the final one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.ground_truth.adapters.adapter import (
    Adapter,
    Run,
    examples_of,
    median_interval,
    prompt_to,
)
from analyses.ground_truth.answers import Answer, name_of
from analyses.logit_lens import LogitLens
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask
from probes.prompts import Prompt


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, on prompts that end where the read-out is looked at."""
    return [Run(LogitLens(positions="last"), prompts(task, question), (question,)) for question in questions]


def prompts(task: PlantedTask, question: Question) -> tuple[Prompt, ...]:
    """Return the prompts of a question, each up to where the read-out is looked at."""
    return tuple(prompt_to(task, example, question.position) for example in examples_of(task, question.subset))


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """The layer from which the top token stays the answer."""
    (question,) = questions
    return [settling("logit_lens", result.tables["read"], task, question)]


def settling(method: str, table: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return the median over prompts of the layer from which the top token stays the answer, with a bootstrap interval.

    None where most prompts do not end in their answer.

    Args:
        table: a read-out's, one position a prompt.
    """
    answers = [example.answer for example in examples_of(task, question.subset)]
    layers = settled(table, answers)
    key = (method, name_of(task.record), question.key)
    if np.median(layers) == np.inf:
        return Answer(*key, "none")
    layer, low, high = median_interval(layers)
    return Answer(*key, "answered", (layer, layer), (low, low), (high, high))


def settled(table: pd.DataFrame, answers: Sequence[int]) -> NDArray[np.float64]:
    """Return, per prompt, the first layer from which on the top token is the answer; infinite where it is not at the last.

    Args:
        answers: [prompt].
    """
    tops = table.pivot_table(index="prompt", columns="layer", values="top_token_id").sort_index()
    wrong = tops.to_numpy() != np.asarray(answers)[tops.index.to_numpy()][:, None]
    n_layers = wrong.shape[1]
    last_wrong = np.where(wrong.any(1), n_layers - 1 - wrong[:, ::-1].argmax(1), -1)
    return np.where(last_wrong == n_layers - 1, np.inf, last_wrong + 1)


ADAPTER = Adapter("logit_lens", ("logit_lens",), ("lens",), runs, read)
