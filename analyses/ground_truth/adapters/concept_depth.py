"""Concept depth: between which layers its probes read a concept."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan

import numpy as np

from analyses.concept_depth import ConceptDepth
from analyses.concept_depth.depth_of_curve import SHARE
from analyses.ground_truth.adapters.adapter import Adapter, Run, prompt_to
from analyses.ground_truth.answers import Answer, name_of
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask
from probes.prompts import Prompt

SPLITS = 2
"""Of the default three, to keep to the benchmark's time."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, on prompts that end where the concept is looked for.

    The analysis divides them itself, so it is given those to test on too.
    """
    return [
        Run(ConceptDepth(causal_layers=0, splits=SPLITS, jobs=1), _prompts(task, question), (question,))
        for question in questions
    ]


def _prompts(task: PlantedTask, question: Question) -> tuple[Prompt, ...]:
    concept = str(question.concept)
    half = task.record.concepts[concept] / 2
    return tuple(
        prompt_to(task, example, question.position, label=int(example.values[concept] >= half), group=example.group)
        for example in task.examples
        if example.values is not None and question.subset in (None, example.subset)
    )


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Depth at 90 % of the rise, with the method's own interval; none where it says that the concept is not decodable."""
    depths, scores = result.tables["depths"].iloc[0], result.tables["scores"]
    n_layers = int(task.record.model["layers"])
    (question,) = questions
    key = ("concept_depth", name_of(task.record), question.key)
    if isnan(depths["peak_accuracy_low"]):
        return [Answer(*key, "declined", reason="too few test groups for an interval")]
    if not depths["decodable"]:
        return [Answer(*key, "none")]
    accuracy = scores.sort_values("layer")["accuracy"].to_numpy()
    chance = float(depths["majority"])
    reached = np.flatnonzero(accuracy >= chance + SHARE * (accuracy.max() - chance))
    # The first layer is the method's own statistic; that it is readable no longer is not one it reports.
    first, low, high = (float(depths[f"depth_90{end}"]) * n_layers for end in ("", "_low", "_high"))
    return [Answer(*key, "answered", (first, float(reached.max())), (low, nan), (high, nan))]


ADAPTER = Adapter("concept_depth", ("concept_depth",), ("readable",), runs, read)
