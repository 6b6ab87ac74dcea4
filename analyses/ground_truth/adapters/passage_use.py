"""Passage use: in which block the answer's position takes a concept from where it stands, for a passage of that one position."""

from __future__ import annotations

from collections.abc import Sequence

from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to
from analyses.ground_truth.answers import Answer, Decision, name_of
from analyses.passage_use import PassageUse
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.prompts import Prompt

METHOD = "passage_use"
PROMPTS = 6
"""The fewest that support an interval, to keep to the benchmark's time."""
END = "ask"
"""The position that predicts the answer, the only one that is read."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, blind to its position in one block at a time, since a wider window says nothing of single blocks."""
    return [
        Run(
            PassageUse(window=0),
            tuple(_prompt(task, example, question) for example in examples_of(task, question.subset, PROMPTS)),
            (question,),
        )
        for question in questions
    ]


def _prompt(task: PlantedTask, example: Example, question: Question) -> Prompt:
    at = task.position(example, str(question.position))
    # Neutral text of one token: what the partner, or the prompt's own end, has there.
    neutral = [example.partner[at] if example.partner else example.tokens[-1]]
    return prompt_to(task, example, END, passage=[at, at + 1], answer_tokens=[example.answer], neutral=neutral)


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Heads by the loss without their block's view, those of one block alike; none where no loss is above zero by its interval."""
    (question,) = questions
    means = result.tables["means"]
    losses = means[means["measure"] == "knock_out_loss"].set_index("layer")
    nodes = {name: name.split(".") for name in question.candidates}
    scores = {name: float(losses["mean"][int(block)]) for name, (block, _) in nodes.items() if block != "mlp"}
    decision: Decision = "answered" if (losses["low"] > 0).any() else "none"
    return [Answer(METHOD, name_of(task.record), question.key, decision, scores=scores)]


ADAPTER = Adapter(METHOD, (METHOD,), ("moved",), runs, read, only=lambda question: question.to == END)
