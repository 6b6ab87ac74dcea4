"""Norm removal: which norm's scale carries an effect, and at which layers position 0 is massive."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, set_answer
from analyses.ground_truth.answers import Answer, name_of
from analyses.ground_truth.spans import longest_run
from analyses.norm_removal import NormRemoval
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask
from probes.prompts import Prompt

PROMPTS = 32
MASSIVE = 10.0
"""How many times the usual norm of other positions counts as massive."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run for all questions, on prompts with their answers, so that a norm's effect on the answer costs loss."""
    prompts = tuple(Prompt((*example.tokens, example.answer)) for example in examples_of(task, n=PROMPTS))
    return [Run(NormRemoval(split_paths=False, neurons=0, sinks=False), prompts, tuple(questions))] if questions else []


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Norms whose freezing changes the loss by an interval that leaves out zero; layers at which position 0 is massive."""
    return [
        _sites(result.tables["freeze_effect"], task, question)
        if question.candidates
        else _massive(result.tables["stream"], task, question)
        for question in questions
    ]


def _sites(effects: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    site, layer = effects["site"], effects["layer"].astype(str)
    names = site.where(site == "final", site + "." + layer)
    clear = (effects["ci_low"] > 0) | (effects["ci_high"] < 0)
    scores = dict(zip(names, effects["delta_ce"].abs(), strict=True))
    return set_answer("norm_removal", task, question, scores, frozenset(names[clear]))


def _massive(stream: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Bounds are the layers at which the interval of position 0's norm is wholly, or partly, above the limit."""
    own = stream[stream["position_class"] == "first"].set_index("layer").sort_index()
    limit = MASSIVE * stream[stream["position_class"] == "other"].set_index("layer")["norm"]
    at, sure, possible = (
        longest_run((own[column] > limit).to_numpy(float)) for column in ("norm", "ci_low", "ci_high")
    )
    key = ("norm_removal", name_of(task.record), question.key)
    if np.isnan(at[0]):
        return Answer(*key, "none")
    low, high = (float(possible[0]), float(sure[1])), (float(sure[0]), float(possible[1]))
    return Answer(*key, "answered", (float(at[0]), float(at[1])), low, high)


ADAPTER = Adapter("norm_removal", ("norm_removal",), ("norm",), runs, read)
