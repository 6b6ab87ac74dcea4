"""The ceiling: every layer's stream exchanged with the partner prompt's, through the model's own blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from analyses.ground_truth.adapters.adapter import examples_of
from analyses.ground_truth.answers import Answer
from analyses.ground_truth.controls import CEILING
from analyses.ground_truth.spans import span_answer
from probes.blocks.batch import Blocks, on_blocks
from probes.edits import read
from probes.models.protocol import Model
from probes.models.unembedding import logits_of
from probes.planted.record import Kind, Question
from probes.planted.task import Example, PlantedTask
from probes.points import Address

PROMPTS = 24
KINDS: tuple[Kind, ...] = ("necessary", "sufficient")


def interchange(model: Model, task: PlantedTask, questions: Sequence[Question]) -> list[Answer]:
    """Answer where the stream at a position is necessary, and where it is sufficient.

    Truths are certified by the same intervention with other code, so this is what a method could reach, and no contestant.
    """
    answers = []
    for question in questions:
        examples = [example for example in examples_of(task, question.subset, PROMPTS) if example.partner]
        effects = _effects(model, task, question, examples)
        answers.append(span_answer(CEILING, task, question, effects, first_layer=-1))
    return answers


def _effects(model: Model, task: PlantedTask, question: Question, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Return [prompt, layer] from the embedding on: whether the answer changes, or whether it comes."""
    effects = torch.zeros(len(examples), model.shape.n_layers + 1)
    for length in sorted({len(example.tokens) for example in examples}):
        rows = [i for i, example in enumerate(examples) if len(example.tokens) == length]
        effects[rows] = _same_length(model, task, question, [examples[i] for i in rows])
    return np.asarray(effects.numpy(), dtype=np.float64)


def _same_length(model: Model, task: PlantedTask, question: Question, examples: Sequence[Example]) -> Tensor:
    own, other = (
        torch.tensor([list(tokens) for tokens in side])
        for side in zip(*((e.tokens, e.partner) for e in examples), strict=True)
    )
    answers = torch.tensor([example.answer for example in examples])
    at = torch.tensor([task.position(example, str(question.position)) for example in examples])
    # Necessary: the partner's stream goes into the prompt. Sufficient: the prompt's goes into the partner.
    into, source = (own, other) if question.kind == "necessary" else (other, own)
    streams = [_streams(model, tokens) for tokens in (into, source)]

    def exchanged(blocks: Blocks) -> Tensor:
        columns = []
        for layer in range(model.shape.n_layers + 1):
            hidden = streams[0][layer].clone()
            index = torch.arange(len(hidden))
            hidden[index, at] = streams[1][layer][index, at]
            top = logits_of(model.unembedding(), blocks.run(hidden, layer)[-1][:, -1]).argmax(-1)
            columns.append((top.cpu() == answers) == (question.kind == "sufficient"))
        return torch.stack(columns, 1).float()

    return on_blocks(model, into, exchanged)


def _streams(model: Model, tokens: Tensor) -> list[Tensor]:
    """Return what enters each block, and what leaves the last, [batch, pos, d_model] each."""
    last = model.shape.n_layers - 1
    return list(
        read(model, tokens, [*(Address("resid_pre", n) for n in range(last + 1)), Address("resid_post", last)]).values()
    )
