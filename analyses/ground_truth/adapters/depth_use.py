"""Depth use: which blocks change nothing, which parts matter, and up to which layer each token does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analyses.depth_use import DepthUse
from analyses.ground_truth.adapters.adapter import Adapter, Run, examples_of, prompt_to, set_answer
from analyses.ground_truth.answers import Answer, name_of
from analyses.ground_truth.spans import HALF, span_answer
from analyses.results.result import Result
from probes.planted.record import Question
from probes.planted.task import PlantedTask

PROMPTS = 12
ERASED = 6
"""Prompts of residual erasure; the default of two supports no interval."""
NEGLIGIBLE = 0.01
"""Share of what the largest block writes below which a block counts as void."""
KEY_PROMPTS = 24
"""Prompts whose keys are compared: more tokens than keys have features, and enough for a jackknife."""
KV_RANK = 8
"""Dimensions of the subspaces of keys that are compared: those of half a head."""
REMOVAL, WRITING, ERASURE, KEYS = "depth_use (removal)", "depth_use (writing)", "residual_erasure", "kv_subspaces"
"""What its answers are called: by the divergence without a part, by the norm of what it writes, by erasing a token, by keys over tokens."""


def runs(task: PlantedTask, questions: Sequence[Question]) -> list[Run]:
    """One run for the questions of blocks and tokens, and one for those of subspaces of keys, which take more prompts."""
    keys = tuple(question for question in questions if question.kind == "subspace")
    blocks = tuple(question for question in questions if question.kind != "subspace")
    erased = ERASED if any(question.kind == "necessary" for question in blocks) else 0
    # Only what its answers are read from is measured.
    analysis = DepthUse(
        parts=("block",),
        skip_rule="everywhere",
        skip_prompts=0,
        erasure_prompts=erased,
        gradient_prompts=0,
        greedy_steps=0,
        drop_blocks=0,
        bits=(8,),
        windows=(2,),
    )
    few, many = (tuple(prompt_to(task, e, None) for e in examples_of(task, n=n)) for n in (PROMPTS, KEY_PROMPTS))
    out = [Run(analysis, few, blocks)] if blocks else []
    if keys:
        out.append(Run(replace(analysis, kv_rank=KV_RANK), many, keys, KEYS))
    return out


def read(result: Result, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Parts by the divergence that removing them makes and by how much they write; tokens by what erasing them does; keys by
    the overlap of their subspaces over tokens.
    """
    proxies = result.tables["proxies"].set_index("layer")
    answers = []
    for question in questions:
        if question.kind == "subspace":
            answers.append(_shared(result.tables["kv_subspaces"], task, question))
        elif question.kind == "necessary":
            answers.append(_erased(result.tables["erasure"], task, question))
        elif question.kind == "nodes":
            answers += [_ranked(method, proxies, measure, task, question) for method, measure in MEASURES.items()]
        else:
            answers += [_unused(method, proxies, measure, task, question) for method, measure in MEASURES.items()]
    return answers


MEASURES = {REMOVAL: "jsd", WRITING: "relative_norm"}
"""Columns of the table `proxies` by which parts are ranked."""


def _ranked(method: str, proxies: pd.DataFrame, measure: str, task: PlantedTask, question: Question) -> Answer:
    scores = {name: float(proxies[f"{measure}_{part}"][layer]) for name, (part, layer) in _parts(question).items()}
    return Answer(method, name_of(task.record), question.key, "answered", scores=scores)


def _unused(method: str, proxies: pd.DataFrame, measure: str, task: PlantedTask, question: Question) -> Answer:
    """Return blocks by how little they do. Only by writing is one named void: removal tells what is not read, written or not."""
    effect = proxies[f"{measure}_block"]
    whole = _whole(question)
    scores = {candidate: -float(effect[int(candidate)]) for candidate in whole}
    if method == REMOVAL:
        return Answer(method, name_of(task.record), question.key, "answered", scores=scores)
    chosen = frozenset(name for name in whole if effect[int(name)] < NEGLIGIBLE * effect.max())
    return set_answer(method, task, question, scores, chosen)


def _whole(question: Question) -> list[str]:
    """Return the candidates that are blocks at all positions, not at one."""
    return [candidate for candidate in question.candidates if ":" not in candidate]


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
    return span_answer(ERASURE, task, question, changes, first_layer=-1)


def _shared(table: pd.DataFrame, task: PlantedTask, question: Question) -> Answer:
    """Return pairs of blocks by the overlap of their keys, and those that overlap by more than half by their interval."""
    own = table[table["kind"] == "k"]
    pairs = own["layer_a"].astype(str) + "+" + own["layer_b"].astype(str)
    return set_answer(
        KEYS, task, question, dict(zip(pairs, own["overlap"], strict=True)), frozenset(pairs[own["low"] > HALF])
    )


ADAPTER = Adapter(
    "depth_use", (REMOVAL, WRITING, ERASURE, KEYS), ("void", "nodes", "necessary", "subspace"), runs, read,
    only=lambda question: question.subset is None
    and (question.kind != "necessary" or question.concept is None)
    and (question.kind != "void" or any(_whole(question))),
)  # fmt: skip
