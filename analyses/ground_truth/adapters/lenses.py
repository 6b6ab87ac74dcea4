"""Lenses: from which layer on each of them reads the answer."""

from __future__ import annotations

from collections.abc import Sequence

from analyses.ground_truth.adapters import logit_lens
from analyses.ground_truth.adapters.adapter import Adapter, Run
from analyses.ground_truth.answers import Answer
from analyses.lenses import Lenses
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask

METHODS = {"tuned": "lenses (tuned)"}
"""By name of the lens; its logit lens is that of the analysis logit_lens."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, fitted on the prompts it reads, since planted words occur in no other text."""
    analysis = Lenses(lenses=tuple(METHODS), positions="last", fit_on="prompts", eval_texts=0)
    return [Run(analysis, logit_lens.prompts(task, question), (question,)) for question in questions]


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """As the logit lens is read, lens by lens."""
    (question,) = questions
    table = result.tables["read"]
    return [
        logit_lens.settling(method, table[table["lens"] == lens], task, question) for lens, method in METHODS.items()
    ]


ADAPTER = Adapter("lenses", tuple(METHODS.values()), ("lens",), runs, read)
