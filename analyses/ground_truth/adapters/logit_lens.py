"""The logit lens: from which layer on its top token is the final one."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

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


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, on prompts that end where the read-out is looked at."""
    return [Run(LogitLens(positions="last"), _prompts(task, question), (question,)) for question in questions]


def _prompts(task: PlantedTask, question: Question):  # type: ignore[no-untyped-def]
    return tuple(prompt_to(task, example, question.position) for example in examples_of(task, question.subset))


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """The median over prompts of the layer from which the top token stays the final one, with a bootstrap interval."""
    (question,) = questions
    layer, low, high = median_interval(settled(result.tables["read"]).to_numpy(float))
    return [
        Answer("logit_lens", name_of(task.record), question.key, "answered", (layer, layer), (low, low), (high, high))
    ]


def settled(table: pd.DataFrame) -> pd.Series:
    """Per prompt, the first layer from which on the top token is the final one at every layer."""
    wrong = table[~table["agrees"]].groupby("prompt")["layer"].max() + 1
    return wrong.reindex(table["prompt"].unique(), fill_value=0)


ADAPTER = Adapter("logit_lens", ("logit_lens",), ("lens",), runs, read)
