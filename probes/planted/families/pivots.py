"""F: the read-out at the end names a concept's word in one language before it names it in the language asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host
from probes.planted.making import PROMPTS, another, at, begin, choose, nothing, planted_task, randint
from probes.planted.parts import STEP, copy_head, distract, look_alike, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_CONCEPTS = 20
_WORDS = (BOS, *words(c=_CONCEPTS, x=_CONCEPTS, y=_CONCEPTS, t=_CONCEPTS, f=14, ask=0))
_WRITTEN = {"F1": "xt", "F2": "xt", "F3": "t", "F4": "xyt"}
"""The languages that each task's blocks write, one after the other."""
_N_LAYERS = {"F1": 10, "F2": 12, "F3": 10, "F4": 12}
_LAYERS = {"F1": (1, 3, 7), "F2": (0, 2, 9), "F3": (1, 6), "F4": (1, 3, 6, 9)}
"""The block that brings the concept, then those that write."""
LANGUAGES = "xyt"
POSITIONS = {"concept": 1, "ask": -1}


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of F1 to F4."""
    name, generator, score = begin(task, seed)
    n_layers, languages = _N_LAYERS[name], _WRITTEN[name]
    layers = list(_LAYERS[name]) if seed == 0 else _spread(n_layers, len(languages) + 1, generator)
    blueprint = Blueprint(Host(n_layers, 128, _WORDS, "rms", d_head=32), generator)
    stream = blueprint.stream
    for slot, size in (("bos", 1), ("subject", 1), ("ask", 1), ("code", _CONCEPTS), ("moved", _CONCEPTS)):
        stream.slot(slot, size)
    for language in LANGUAGES:
        stream.slot(language, _CONCEPTS)
        blueprint.unembedding[blueprint.tokens(language)] += 24 * stream.basis(language)
    blueprint.unembedding[blueprint.token("f0")] += 10 * stream.vector("constant")
    blueprint.embedding[blueprint.token(BOS)] += stream.vector("bos")
    blueprint.embedding[blueprint.token("ask")] += stream.vector("ask")
    blueprint.embedding[blueprint.tokens("c")] += stream.basis("code") + stream.vector("subject")

    circuit = [blueprint.place_head(
        layers[0], copy_head(blueprint, query="ask", key="subject", source="code", target="moved", score=score)
    )]  # fmt: skip
    before = torch.zeros(_CONCEPTS, blueprint.host.width)
    for language, layer in zip(languages, layers[1:], strict=True):
        rows = stream.basis(language)
        rules = [((stream.vector("moved", c),), rows[c] - before[c]) for c in range(_CONCEPTS)]
        length = float(rules[0][1].norm())
        circuit.append(blueprint.place_mlp(layer, lookup(blueprint, rules, size=length, step=STEP)))
        before = rows
    stream.rest("junk")
    blueprint.place_head(layers[0] + 1, look_alike(blueprint, query="ask", key="subject"))
    distract(blueprint)

    questions = (
        *(_pivot(language, languages, layers[1:]) for language in "xy"),
        Question("lens", at(layers[-1]), position="ask"),
        Question(
            "nodes",
            nodes([circuit[0], circuit[-1]]),
            candidates=tuple(name for name in blueprint.host.nodes if name not in circuit[2:-1]),
            note="the answer comes without the pivot's word, too; what takes one pivot for another is not asked about",
        ),
        nothing("mending", n_layers),
    )
    return planted_task(
        task, seed, blueprint, _examples(blueprint, generator), positions=POSITIONS,
        concepts={"concept": _CONCEPTS}, questions=questions,
    )  # fmt: skip


def _pivot(language: str, written: str, layers: Sequence[int]) -> Question:
    """The layers at which the read-out names this language's word."""
    truth = None
    if language in written:
        place = written.index(language)
        truth = Interval(layers[place], layers[place + 1] - 1)
    return Question("pivot", truth, concept=language, position="ask")


def _spread(n_layers: int, n: int, generator: torch.Generator) -> list[int]:
    """Draw layers of which no two that write are neighbours."""
    while True:
        layers = choose(range(n_layers), n, generator)
        if all(after - before > 1 for before, after in pairwise(layers)):
            return layers


def _examples(blueprint: Blueprint, generator: torch.Generator) -> list[Example]:
    concepts, answers = blueprint.tokens("c"), blueprint.tokens("t")
    fillers, bos, ask = blueprint.tokens("f")[1:], blueprint.token(BOS), blueprint.token("ask")

    def prompt(concept: int) -> tuple[int, ...]:
        return (bos, concepts[concept], fillers[randint(len(fillers), generator)], ask)

    examples = []
    for number in range(PROMPTS):
        concept = number % _CONCEPTS
        other = another(concept, range(_CONCEPTS), generator)
        examples.append(Example(
            prompt(concept), answers[concept], prompt(other), answers[other], {"concept": concept}, f"c{concept}",
            "fit" if concept < _CONCEPTS // 2 else "test",
        ))  # fmt: skip
    return examples
