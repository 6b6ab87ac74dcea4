"""Latent languages: between which layers another language than the answer's leads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to
from analyses.ground_truth.answers import Answer, name_of
from analyses.ground_truth.spans import longest_run
from analyses.latent_language import LatentLanguage
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.prompts import Prompt

TARGET, LATENT = "zh", "en"
"""What the analysis calls the language asked for and the one that may lead; planted words are of neither."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run a question, with the words of the language that it names.

    Where a model has no languages, the word that may lead is the partner's answer.
    """
    prompts = [(question, _prompts(task, question)) for question in questions]
    return [Run(LatentLanguage(), lines, (question,)) for question, lines in prompts if lines]


def _prompts(task: PlantedTask, question: Question) -> tuple[Prompt, ...]:
    words = task.tokenizer.get_vocab()
    return tuple(
        prompt_to(task, example, question.position, targets={TARGET: [example.answer], LATENT: [other]})
        for example in examples_of(task, question.subset)
        if (other := _other(words, example, question.concept)) not in (None, example.answer)
    )


def _other(words: dict[str, int], example: Example, language: str | None) -> int | None:
    if language is None:
        return example.partner_answer if example.partner_answer >= 0 else None
    assert example.values is not None
    return words[f"{language}{example.values['concept']}"]


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """The longest run of layers at which the method says that the latent leads; bounds where its share is clear of one half."""
    (question,) = questions
    lead = result.tables["lead"].sort_values("layer")
    first, last = longest_run(lead["leads"].to_numpy(float))
    key = ("latent_language", name_of(task.record), question.key)
    if np.isnan(first):
        return [Answer(*key, "none")]
    sure, possible = (longest_run(_above_half(lead[f"dominance_{end}"])) for end in ("low", "high"))
    low, high = (float(possible[0]), float(sure[1])), (float(sure[0]), float(possible[1]))
    return [Answer(*key, "answered", (float(first), float(last)), low, high)]


def _above_half(share: pd.Series) -> np.ndarray:
    return (share.to_numpy() > 0.5).astype(float)


ADAPTER = Adapter("latent_language", ("latent_language",), ("pivot",), runs, read)
