"""Communication channels: which pairs of heads its scan of the weights flags."""

from __future__ import annotations

from collections.abc import Sequence

from analyses.communication_channels import CommunicationChannels
from analyses.ground_truth.adapters.adapter import Adapter, Run, set_answer
from analyses.ground_truth.answers import Answer
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run on weights alone, for all questions."""
    return [Run(CommunicationChannels(task="none"), (), tuple(questions))] if questions else []


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Flagged pairs, scored by the robust z of their strongest component."""
    table = result.tables["composition"]
    ends = (table[f"{end}_{part}"].astype(str) for end in ("source", "target") for part in ("layer", "head"))
    l1, h1, l2, h2 = ends
    names = l1 + "." + h1 + "->" + l2 + "." + h2 + ":" + table["kind"]
    scores = dict(zip(names, table["z"].astype(float), strict=True))
    flagged = frozenset(names[table["flagged"]])
    return [set_answer("communication_channels", task, question, scores, flagged) for question in questions]


ADAPTER = Adapter("communication_channels", ("communication_channels",), ("channel",), runs, read)
