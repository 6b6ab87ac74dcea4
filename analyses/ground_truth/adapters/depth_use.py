"""Depth use: which blocks change nothing, which parts matter, and up to which layer each token does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.depth_use import DepthUse
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer, name_of
from analyses.ground_truth.spans import span_answer
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask

PROMPTS = 16
ERASED = 8
"""Prompts of residual erasure; the default of two supports no interval."""
NEGLIGIBLE = 0.01
"""Share of the largest block's effect below which a block counts as void."""
METHODS = {"void": "depth_use (removal)", "nodes": "depth_use (removal)", "necessary": "residual_erasure"}
"""What answers of each kind are called."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run for all questions."""
    if not questions:
        return []
    erased = ERASED if any(question.kind == "necessary" for question in questions) else 0
    analysis = DepthUse(
        skip_prompts=0,
        erasure_prompts=erased,
        gradient_prompts=0,
        greedy_steps=0,
        drop_blocks=0,
        bits=(8,),
        windows=(2,),
    )
    prompts = tuple(prompt_to(task, example, None) for example in examples_of(task, n=PROMPTS))
    return [Run(analysis, prompts, tuple(questions))]


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Blocks by the divergence that removing them makes, and for each token the layers at which erasing it does so."""
    return [
        _erased(result.tables["erasure"], task, question)
        if question.kind == "necessary"
        else _removed(result.tables["proxies"].set_index("layer"), task, question)
        for question in questions
    ]


def _removed(proxies: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    method = METHODS[question.kind]
    if question.kind == "nodes":
        scores = {name: float(proxies[f"jsd_{part}"][layer]) for name, (part, layer) in _parts(question).items()}
        return Answer(method, name_of(task.record), question.key, "answered", scores=scores)
    effect = proxies["jsd_block"]
    whole = [candidate for candidate in question.candidates if ":" not in candidate]
    scores = {candidate: -float(effect[int(candidate)]) for candidate in whole}
    chosen = frozenset(name for name in whole if effect[int(name)] < NEGLIGIBLE * effect.max())
    return set_answer(method, task, question, scores, chosen)


def _parts(question: Question) -> dict[str, tuple[str, int]]:
    """Return the part of a block that each candidate is, or belongs to: heads of one block share its attention's effect."""
    parts = {}
    for candidate in question.candidates:
        front, _, back = candidate.partition(".")
        parts[candidate] = ("mlp", int(back)) if front == "mlp" else ("attn", int(front))
    return parts


def _erased(table: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return the layers at which erasing the token changes the answer by half of the most that erasing anything does.

    What enters block l is at layer l - 1.
    """
    examples = examples_of(task, n=PROMPTS)
    at = {prompt: task.position(examples[prompt], str(question.position)) for prompt in table["prompt"].unique()}
    grid = table[table["position"] == table["prompt"].map(at)].pivot_table("answer_change", "prompt", "layer")
    largest = table.groupby(["position", "layer"])["answer_change"].mean().max()
    changes: NDArray[np.float64] = grid.to_numpy() / largest
    return span_answer(METHODS["necessary"], task, question, changes, first_layer=-1)


ADAPTER = Adapter(
    "depth_use", tuple(dict.fromkeys(METHODS.values())), ("void", "nodes", "necessary"), runs, read,
    only=lambda question: question.subset is None,
)  # fmt: skip
