"""Back-patching: which cells of its grid mend a wrong answer."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from analyses.back_patching import BackPatching
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer
from analyses.results.result import Result
from analyses.results.statistics import wilson
from probes.planted.making import accuracy
from probes.planted.record import Question
from probes.planted.task import PlantedTask
from probes.prompts import Prompt

PROMPTS = 12
"""Questions that get a grid; enough for a rate of one to stand clear of one half, and of controls up to a quarter."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, at the position that it names, or the last."""
    analysis = BackPatching(stages=False, include_embedding=True, n_prompts=PROMPTS)
    return [Run(analysis, _prompts(task, question), (question,)) for question in questions]


def _prompts(task: PlantedTask, question: Question) -> tuple[Prompt, ...]:
    examples = examples_of(task, question.subset, PROMPTS)
    # Only wrong answers are mended: where there is none, one prompt says as much as all.
    if accuracy(task.module, examples)["plain"] == 1:
        examples = examples[:1]
    prompts = []
    for example in examples:
        at = len(example.tokens) - 1 if question.position is None else task.position(example, question.position)
        prompts.append(prompt_to(task, example, None, answer_tokens=[example.answer], positions=[at]))
    return tuple(prompts)


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Cells that mend more questions than not, by their Wilson interval; none where the cell chosen on other questions
    does not beat every control.

    The stream after block a put in the place of what leaves block t enters block t + 1, so a cell (a, t) is the jump
    a->t+1. Where the model is right already there is nothing to mend.
    """
    (question,) = questions
    grid, rates = result.tables["grid"], result.tables["control_rates"]
    wrong = grid[~grid["baseline_success"]]
    named = wrong.assign(
        cell=[f"{a}->{t + 1}" for a, t in zip(wrong["source_layer"], wrong["target_layer"], strict=True)]
    )
    hits = {str(cell): group["success"].to_numpy(bool) for cell, group in named.groupby("cell")}
    scores = {cell: float(success.mean()) for cell, success in hits.items()}
    if not scores or not _beats_controls(rates):
        return [set_answer("back_patching", task, question, scores, frozenset())]
    chosen = frozenset(cell for cell, success in hits.items() if wilson(int(success.sum()), len(success))[0] > 0.5)
    return [set_answer("back_patching", task, question, scores, chosen)]


def _beats_controls(rates: pd.DataFrame) -> bool:
    """Whether, for questions that the model answers wrong, one try's rate is above every control's, by their intervals."""
    of_wrong = rates[rates["set"] == "incorrect"].set_index("variant")
    if "back_patch" not in of_wrong.index:
        return False
    others = of_wrong.drop(index=["back_patch"])
    return bool((of_wrong.loc["back_patch", "held_out_low"] > others["held_out_high"]).all())


ADAPTER = Adapter("back_patching", ("back_patching",), ("mending",), runs, read)
