"""N: a random model, and a model of facts whose labels are drawn at random: there is nothing to find in either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from probes.planted.fact_words import ANSWERS, fact_words
from probes.planted.hosts import BOS, Host, tokenizer, weights
from probes.planted.making import (
    PROMPTS,
    accuracy,
    another,
    answer_words,
    base_of,
    begin,
    choose,
    drawn,
    model_digest,
    nothing,
    randint,
)
from probes.planted.parts import distract, look_alike
from probes.planted.record import Question, Record
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_WORDS = (BOS, *words(c=40, w=20), "end")
_RANDOM_LAYERS = 8


def build(task: str, seed: int) -> PlantedTask:
    """Return N1, random weights, or N2, facts with random labels."""
    return _random_weights(task, seed) if base_of(task) == "N1" else _random_labels(task, seed)


def _random_labels(task: str, seed: int) -> PlantedTask:
    (_, generator, score), n_layers = begin(task, seed), 12
    bring, look, move, decide = (1, 4, 7, 10) if seed == 0 else choose(range(n_layers - 1), 4, generator)
    facts = fact_words(n_layers, "rms", generator, {"attribute": 4, "moved": 4, "answer": 4})
    blueprint, stream = facts.blueprint, facts.blueprint.stream
    answer_words(blueprint, blueprint.tokens("a"), blueprint.stream.basis("answer"), default="f0")
    facts.place_bringer(bring, score)
    facts.place_table(look)
    facts.place_mover(move, score)
    facts.place_decider(decide)
    stream.rest("junk")
    blueprint.place_head(move - 1 if move > bring + 1 else move + 1, look_alike(blueprint, query="ask", key="relation"))
    distract(blueprint)
    answers, labels = blueprint.tokens("a"), torch.randperm(PROMPTS, generator=generator) % ANSWERS
    # Labels are balanced in both splits, whatever the facts say.
    examples = [
        replace(example, answer=answers[int(label)], values={"attribute": int(label)})
        for example, label in zip(facts.examples(), labels, strict=True)
    ]
    questions = (
        *(Question("readable", None, concept="attribute", position=position) for position in ("e", "r", "ask")),
        Question("lens", None, position="ask"),
        nothing("mending", n_layers),
        nothing("pivot"),
    )
    return facts.task(task, seed, questions, examples)


@torch.no_grad()
def _random_weights(task: str, seed: int) -> PlantedTask:
    generator = drawn(task, seed)
    host = Host(_RANDOM_LAYERS, 64, _WORDS, "layer" if seed % 2 else "rms")
    module: Any = weights(host, 128).module
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.0 / parameter.shape[-1] ** 0.5, generator=generator)
    content, bos, end = range(1, 61), 0, len(_WORDS) - 1

    def prompt() -> tuple[int, ...]:
        return (bos, *(content[randint(len(content), generator)] for _ in range(7 + randint(8, generator))), end)

    answers = content[:4]
    labels = (torch.randperm(PROMPTS, generator=generator) % 4).tolist()
    examples = []
    for number, label in enumerate(labels):
        tokens = prompt()
        partner = (bos, *(another(word, content, generator) for word in tokens[1:-1]), end)
        examples.append(Example(
            tokens, answers[label], partner, answers[(label + 1) % 4], {"label": label}, f"prompt {number}",
            "fit" if number < PROMPTS // 2 else "test",
        ))  # fmt: skip
    questions = (
        Question("readable", None, concept="label", position="ask"),
        Question("lens", None, position="ask"),
        nothing("void", host.layers),
        nothing("mending", host.layers),
        nothing("pivot"),
    )
    record = Record(
        task=task, tier="compiled", seed=seed,
        model={
            "class": type(module).__name__, "layers": host.layers, "d_model": host.width, "heads": host.heads,
            "norm": host.norm, "digest": model_digest(module),
        },
        positions={"ask": -1}, concepts={"label": 4}, accuracy=accuracy(module, examples), questions=questions,
    )  # fmt: skip
    return PlantedTask(record, module, tokenizer(_WORDS), tuple(examples))
