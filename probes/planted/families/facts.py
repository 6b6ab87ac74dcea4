"""A: a fact of two words is looked up at the second, moved to the end, and turned into the answer."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host, Norm
from probes.planted.making import (
    PROMPTS,
    answer_words,
    at,
    attention_score,
    base_of,
    choose,
    classes,
    drawn,
    jump_cells,
    latin_square,
    nothing,
    planted_task,
    randint,
    windows,
)  # fmt: skip
from probes.planted.parts import copy_head, distract, look_alike, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_SUBJECTS, _RELATIONS, _ANSWERS = 16, 16, 4
_WORDS = (BOS, *words(f=26, e=_SUBJECTS, r=_RELATIONS, a=_ANSWERS, ask=0))
_HOSTS: dict[str, tuple[Norm, int]] = {
    "A1": ("none", 8), "A2": ("rms", 12), "A3": ("none", 8), "A4": ("rms", 12), "A5": ("layer", 12),
}  # fmt: skip
_LAYERS = {"A1": (0, 2, 4, 6), "A2": (1, 4, 7, 10), "A3": (0, 1, 2, 3), "A4": (2, 6, 9, 11), "A5": (1, 4, 7, 10)}
POSITIONS = {"e": 1, "r": 2, "ask": -1}


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of A1 to A5."""
    name, generator = base_of(task), drawn(task, seed)
    norm, n_layers = _HOSTS[name]
    bring, look, move, decide = _layers(name, n_layers, seed, generator)
    score = attention_score(task)
    blueprint = Blueprint(Host(n_layers, 112, _WORDS, norm, d_head=16), generator)
    stream, token = blueprint.stream, blueprint.token
    for slot, size in (("bos", 1), ("subject", 1), ("relation", 1), ("ask", 1), ("e", 16), ("r", 16), ("e at r", 16),
                       ("attribute", 4), ("moved", 4), ("answer", 4)):  # fmt: skip
        stream.slot(slot, size)
    blueprint.embedding[token(BOS)] += stream.vector("bos")
    blueprint.embedding[token("ask")] += stream.vector("ask")
    blueprint.embedding[blueprint.tokens("e")] += stream.basis("e") + stream.vector("subject")
    blueprint.embedding[blueprint.tokens("r")] += stream.basis("r") + stream.vector("relation")
    answer_words(blueprint, blueprint.tokens("a"), "answer", default="f0")

    subject_class = classes(_SUBJECTS, 4, generator)
    relation_class = classes(_RELATIONS, 4, generator)
    square = latin_square(4, generator)
    table = square[subject_class][:, relation_class]
    bringer = blueprint.place_head(
        bring, copy_head(blueprint, query="relation", key="subject", source="e", target="e at r", score=score)
    )
    writer = blueprint.place_mlp(look, lookup(blueprint, [
        ((stream.vector("e at r", e), stream.vector("r", r)), stream.vector("attribute", int(table[e, r])))
        for e in range(_SUBJECTS) for r in range(_RELATIONS)
    ]))  # fmt: skip
    mover = blueprint.place_head(
        move, copy_head(blueprint, query="ask", key="relation", source="attribute", target="moved", score=score)
    )
    decider = blueprint.place_mlp(decide, lookup(
        blueprint, [((stream.vector("moved", v),), stream.vector("answer", v)) for v in range(_ANSWERS)], step=True
    ))  # fmt: skip
    stream.rest("junk")
    for layer in {(look + 1) % n_layers, (move - 1) % n_layers}:
        blueprint.place_head(layer, look_alike(blueprint, query="ask", key="relation"))
    distract(blueprint)

    last, host = n_layers - 1, blueprint.host
    questions = (
        Question("readable", Interval(look, last), concept="attribute", position="r"),
        Question("readable", Interval(move, last), concept="attribute", position="ask"),
        Question("readable", None, concept="attribute", position="e"),
        Question("lens", at(decide), position="ask"),
        Question("written", nodes([writer]), concept="attribute", position="r", candidates=host.nodes),
        Question("moved", nodes([mover]), concept="attribute", position="r", to="ask", candidates=host.nodes),
        *windows("necessary", {"e": (-1, bring - 1), "r": (-1, move - 1), "ask": (move, last)}),
        *windows("sufficient", {"e": None, "r": (bring, move - 1), "ask": (move, last)}),
        Question("nodes", nodes([bringer, writer, mover, decider]), candidates=host.nodes),
        nothing("void", [str(layer) for layer in range(n_layers)], "distractors write where nobody reads"),
        nothing("mending", jump_cells(n_layers)),
        nothing("pivot"),
    )
    examples = _examples(blueprint, table, subject_class, relation_class, generator)
    return planted_task(
        task, seed, blueprint, examples, positions=POSITIONS, concepts={"attribute": 4}, questions=questions
    )


def _layers(name: str, n_layers: int, seed: int, generator: torch.Generator) -> list[int]:
    if seed == 0:
        return list(_LAYERS[name])
    if name == "A3":
        return choose(range(n_layers // 2 + 1), 4, generator)
    if name == "A4":
        return [*choose(range(1, n_layers - 1), 3, generator), n_layers - 1]
    return choose(range(n_layers - 1), 4, generator)


def _examples(
    blueprint: Blueprint, table: Tensor, subject_class: list[int], relation_class: list[int], generator: torch.Generator
) -> list[Example]:
    subjects, relations, answers = (blueprint.tokens(kind) for kind in "era")
    bos, ask, fillers = blueprint.token(BOS), blueprint.token("ask"), blueprint.tokens("f")[1:]

    def prompt(e: int, r: int) -> tuple[int, ...]:
        filler = [fillers[randint(len(fillers), generator)] for _ in range(2)]
        return (bos, subjects[e], relations[r], *filler, ask)

    examples = []
    for value in range(_ANSWERS):
        pairs = (table == value).nonzero()
        chosen = pairs[torch.randperm(len(pairs), generator=generator)[: PROMPTS // _ANSWERS]].tolist()
        for number, (e, r) in enumerate(chosen):
            others = [
                (x, y)
                for x in range(_SUBJECTS)
                for y in range(_RELATIONS)
                if subject_class[x] != subject_class[e]
                and relation_class[y] != relation_class[r]
                and table[x, y] != value
            ]
            x, y = others[randint(len(others), generator)]
            examples.append(Example(
                prompt(e, r), answers[value], prompt(x, y), answers[int(table[x, y])], {"attribute": value},
                f"e{e} r{r}", "fit" if number < len(chosen) // 2 else "test",
            ))  # fmt: skip
    return examples
