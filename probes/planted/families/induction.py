"""K: induction: a head writes at each token the one before it, a later head looks for the current word there and copies."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from probes.planted.blueprint import Blueprint, Head
from probes.planted.hosts import Host, Norm
from probes.planted.making import (
    PROMPTS,
    answer_words,
    at,
    begin,
    choose,
    classes,
    nothing,
    planted_task,
    randint,
    windows,
)
from probes.planted.parts import JUNK, distract, junk_head
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_N_WORDS = 24
_WORDS = words(w=_N_WORDS, f=1)
_HOSTS: dict[str, tuple[Norm, int]] = {"K1": ("none", 2), "K2": ("layer", 6), "K3": ("none", 6)}
_LAYERS = {"K1": (0, 1), "K2": (1, 4), "K3": (1, 4)}
_PERIODS = (2.6, 4.3, 7.4, 17.0)
"""Of the circles that tell a position: together they agree at no two of twenty positions."""
_SHORTEST, _LONGEST = (7, 14), (10, 20)
"""Words of a sequence and tokens of a prompt: no word occurs three times."""


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of K1 to K3."""
    name, generator, score = begin(task, seed)
    norm, n_layers = _HOSTS[name]
    decoys = name == "K3"
    first, second = _LAYERS[name] if seed == 0 else choose(range(n_layers), 2, generator)
    blueprint = Blueprint(Host(n_layers, 96, _WORDS, norm, gpt2=True), generator)
    stream = blueprint.stream
    for slot, size in (("word", _N_WORDS), ("before", _N_WORDS), ("answer", _N_WORDS), ("start", 1), ("circles", 8)):
        stream.slot(slot, size)
    word_ids = blueprint.tokens("w")
    blueprint.embedding[word_ids] += stream.basis("word")
    blueprint.positions += _circles() @ stream.basis("circles")
    blueprint.positions[0] += stream.vector("start")
    answer_words(blueprint, word_ids, "answer", default="f0")
    previous, matching = _previous(blueprint, 0.5 if decoys else 1.0), _matching(blueprint, score)
    writer = blueprint.place_head(first, previous)
    reader = blueprint.place_head(second, matching)
    stream.rest(JUNK)
    if decoys:
        for layer, pattern in product((0, 2, 3), (previous, matching)):
            junk = junk_head(blueprint, size=2.0)
            blueprint.place_head(layer, replace(pattern, value=junk.value, output=junk.output))
    # The circuit writes at every position, so what is to distract from it must be large.
    distract(blueprint, smallest=0.8 if decoys else 0.3, largest=3.0 if decoys else 1.5)

    host, last = blueprint.host, n_layers - 1
    heads = [name for name in host.nodes if not name.startswith("mlp")]
    channels = tuple(
        f"{one}->{other}:{kind}"
        for one, other in product(heads, heads)
        for kind in "qkv"
        if int(one.split(".")[0]) < int(other.split(".")[0])
    )
    questions = (
        Question("nodes", nodes([writer, reader]), candidates=host.nodes),
        Question("channel", frozenset([f"{writer}->{reader}:k"]), candidates=channels),
        Question("readable", Interval(first, last), concept="current", position="source"),
        Question("readable", Interval(second, last), concept="next", position="ask"),
        Question("moved", nodes([writer]), concept="current", position="earlier", to="source", candidates=host.nodes),
        Question("moved", nodes([reader]), concept="next", position="source", to="ask", candidates=host.nodes),
        *windows("necessary", {"earlier": (-1, first - 1), "source": (-1, second - 1), "ask": (-1, last)}),
        *windows("sufficient", {"earlier": None, "source": (-1, first - 1), "ask": (second, last)}),
        Question("lens", at(second), position="ask"),
        nothing("void", n_layers),
        nothing("mending", n_layers),
    )
    word_class = classes(_N_WORDS, 2, generator)
    examples = [_example(blueprint, word_class, generator, number) for number in range(PROMPTS)]
    return planted_task(
        task, seed, blueprint, examples, positions={}, concepts={"current": 2, "next": 2}, questions=questions
    )


def _previous(blueprint: Blueprint, size: float) -> Head:
    """A head that looks at the position before and copies its word into slot `before`."""
    stream = blueprint.stream
    query = stream.basis("circles")
    turns = 2 * torch.pi / torch.tensor(_PERIODS)
    ahead = torch.zeros(len(query), len(query))
    for circle, turn in enumerate(turns):
        rows = slice(2 * circle, 2 * circle + 2)
        ahead[rows, rows] = torch.tensor([[turn.cos(), -turn.sin()], [turn.sin(), turn.cos()]])
    scores = torch.full((len(query),), 6.0)
    return Head(query, ahead @ query, scores, stream.basis("word"), stream.basis("before").T, size, graded=True)


def _matching(blueprint: Blueprint, score: float) -> Head:
    """A head that looks where slot `before` holds the current word and copies the word there into slot `answer`."""
    stream = blueprint.stream
    # The first token has none before it, so the first head leaves its own word there.
    key = stream.basis("before") - stream.vector("start")
    scores = torch.full((_N_WORDS,), score)
    return Head(stream.basis("word"), key, scores, stream.basis("word"), stream.basis("answer").T)


def _circles() -> Tensor:
    angles = 2 * torch.pi * torch.arange(64)[:, None] / torch.tensor(_PERIODS)
    return torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1)


def _example(blueprint: Blueprint, word_class: list[int], generator: torch.Generator, number: int) -> Example:
    order = torch.randperm(_N_WORDS, generator=generator).tolist()
    n = _SHORTEST[0] + randint(_LONGEST[0] - _SHORTEST[0] + 1, generator)
    length = _SHORTEST[1] + randint(2 * n - _SHORTEST[1] + 1, generator)
    own, other = order[:n], order[n : 2 * n]
    ids = blueprint.tokens("w")

    def repeated(sequence: list[int]) -> tuple[int, ...]:
        return tuple(ids[sequence[place % n]] for place in range(length))

    last = length - 1
    current, following = own[last % n], own[length % n]
    return Example(
        repeated(own), ids[following], repeated(other), ids[other[length % n]],
        {"current": word_class[current], "next": word_class[following]}, f"sequence {number}",
        "fit" if number < PROMPTS // 2 else "test",
        positions={"earlier": last - n, "source": last - n + 1, "ask": last},
    )  # fmt: skip
