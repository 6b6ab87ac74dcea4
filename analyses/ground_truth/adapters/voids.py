"""Voids: blocks that no token of a class uses, by each of its step sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pandas as pd

from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer
from analyses.results.result import Result
from analyses.voids import Voids
from analyses.voids.norm_gates import Delta
from probes.planted.record import Question
from probes.planted.task import PlantedTask

CLASSES = {"c": "content", "w": "function"}
"""Class of a word by its letter, for questions about one class of words."""
METHODS = {delta: "voids" if delta == "norm_diff" else f"voids ({delta})" for delta in get_args(Delta)}
"""What answers by each step size are called; the bare name is the paper's rule."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a step size."""
    if not questions:
        return []
    prompts = tuple(prompt_to(task, example, None) for example in examples_of(task))
    return [
        Run(Voids(mode="measure", delta=delta), prompts, tuple(questions), METHODS[delta]) for delta in get_args(Delta)
    ]


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Blocks that are active for no token, or for no token of the class that a candidate names."""
    method = METHODS[result.options["delta"]]
    activity = result.tables["activity"]
    activity = activity[activity["position"] > 0]
    return [_answer(method, activity, task, question) for question in questions]


def _answer(method: str, activity: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    share = activity.groupby("layer")["active"].mean()
    by_class = activity.assign(kind=activity["token"].map(class_of)).groupby(["layer", "kind"])["active"].mean()
    scores = {}
    for candidate in question.candidates:
        layer, _, kind = candidate.partition(":")
        active = by_class.get((int(layer), kind)) if kind else share.get(int(layer))
        if active is not None:
            scores[candidate] = 1 - float(active)
    chosen = frozenset(candidate for candidate, unused in scores.items() if unused == 1)
    return set_answer(method, task, question, scores, chosen)


def class_of(token: str) -> str:
    """Return the class of a planted word."""
    return CLASSES.get(token.strip().rstrip("0123456789"), "other")


ADAPTER = Adapter("voids", tuple(METHODS.values()), ("void",), runs, read)
