"""B, C: two tables one after the other at one position; in C the second stands before the first, and the answer is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host, Norm
from probes.planted.making import (
    at,
    begin,
    choose,
    classes,
    jump_cells,
    mending,
    nothing,
    planted_task,
    randint,
    windows,
)
from probes.planted.parts import copy_head, distract, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_FIRST, _BRIDGES, _ANSWERS = 32, 8, 4
_WORDS = (BOS, *words(f=19, e=_FIRST, b=_BRIDGES, a=_ANSWERS, ask=0))
_HOSTS: dict[str, tuple[Norm, int]] = {
    "B1": ("none", 8), "B2": ("rms", 12), "C1": ("none", 8), "C2": ("none", 12), "C3": ("none", 8), "C4": ("rms", 8),
}  # fmt: skip
_LAYERS = {"B1": (1, 4), "B2": (2, 7), "C1": (5, 2), "C2": (9, 3), "C3": (5, 2), "C4": (5, 2)}
"""Block of the first table and of the second."""
_GAIN, _BRIDGE_SHARE, _DEFAULT_SHARE = 12.0, 0.4, 0.3
_CORNERS = torch.tensor(list(product((1.0, -1.0), repeat=3)))
"""Code of each bridge; the two bridges of one answer are opposite corners, so that no linear probe reads it from them."""


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of B1, B2, C1 to C4."""
    name, generator, score = begin(task, seed)
    norm, n_layers = _HOSTS[name]
    first, second = _layers(name, n_layers, seed, generator)
    moves = n_layers - 1 if name == "C3" else None
    blueprint = Blueprint(Host(n_layers, 96, _WORDS, norm), generator)
    stream, token = blueprint.stream, blueprint.token
    for slot, size in (("bos", 1), ("entity", 1), ("ask", 1), ("e", _FIRST), ("carried", 3 + _ANSWERS)):
        stream.slot(slot, size)
    blueprint.embedding[token(BOS)] += stream.vector("bos")
    blueprint.embedding[token("ask")] += stream.vector("ask")
    blueprint.embedding[blueprint.tokens("e")] += stream.basis("e") + stream.vector("entity")
    corners = _CORNERS @ stream.basis("carried")[:3]
    answers = stream.basis("carried")[3:]
    blueprint.unembedding[blueprint.tokens("b")] += _GAIN * _BRIDGE_SHARE / 3 * corners
    blueprint.unembedding[blueprint.tokens("a")] += _GAIN * answers
    blueprint.unembedding[token("f0")] += _GAIN * _DEFAULT_SHARE * stream.vector("constant")

    bridge_of = classes(_FIRST, _BRIDGES, generator)
    pair_answer = torch.randperm(_ANSWERS, generator=generator).tolist()
    # Corner i and corner 7 - i are opposite.
    answer_of = [pair_answer[min(bridge, _BRIDGES - 1 - bridge)] for bridge in range(_BRIDGES)]
    writer = blueprint.place_mlp(first, lookup(
        blueprint, [((stream.vector("e", e),), corners[bridge_of[e]]) for e in range(_FIRST)], size=3**0.5
    ))  # fmt: skip
    answerer = blueprint.place_mlp(second, lookup(
        blueprint, [((*(sign * axis for sign, axis in zip(_CORNERS[b], stream.basis("carried")[:3], strict=True)),),
                     answers[answer_of[b]]) for b in range(_BRIDGES)], step=(1.0, 0.5), size=1.0,
    ))  # fmt: skip
    mover = None
    if moves is not None:
        mover = blueprint.place_head(moves, copy_head(
            blueprint, query="ask", key="entity", source="carried", target="carried", score=score,
            size=3**0.5,
        ))  # fmt: skip
    # With 32 words a probe has few combinations, so less may stand in its way.
    distract(blueprint, largest=1.0)
    positions = {"e1": 1, "ask": -1} if mover else {"e1": -1}
    questions = (
        _right(blueprint, first, second, writer, answerer)
        if first < second
        else _wrong(blueprint, first, second, writer, mover)
    )
    examples = _examples(blueprint, bridge_of, answer_of, generator, moved=mover is not None)
    return planted_task(
        task, seed, blueprint, examples, positions=positions, concepts={"bridge": _BRIDGES, "answer": _ANSWERS},
        questions=questions,
    )  # fmt: skip


def _layers(name: str, n_layers: int, seed: int, generator: torch.Generator) -> tuple[int, ...]:
    if seed == 0:
        return _LAYERS[name]
    usable = range(n_layers - 2) if name == "C3" else range(n_layers - 1)
    early, late = choose(usable, 2, generator)
    return (early, late) if name.startswith("B") else (late, early)


def _right(blueprint: Blueprint, first: int, second: int, writer: str, answerer: str) -> tuple[Question, ...]:
    host, last = blueprint.host, blueprint.host.layers - 1
    return (
        Question("readable", Interval(first, last), concept="bridge", position="e1"),
        Question("readable", Interval(second, last), concept="answer", position="e1"),
        Question("lens", at(second), position="e1"),
        Question("written", nodes([writer]), concept="bridge", position="e1", candidates=host.nodes),
        Question("written", nodes([answerer]), concept="answer", position="e1", candidates=host.nodes),
        *windows("necessary", {"e1": (-1, last)}),
        *windows("sufficient", {"e1": (-1, last)}),
        Question("nodes", nodes([writer, answerer]), candidates=host.nodes),
        nothing("void", host.layers),
        nothing("mending", host.layers),
        nothing("pivot"),
    )


def _wrong(blueprint: Blueprint, first: int, second: int, writer: str, mover: str | None) -> tuple[Question, ...]:
    host, last = blueprint.host, blueprint.host.layers - 1
    cells, legal = mending(host.layers, first, second), jump_cells(host.layers)
    shared = (
        Question("readable", Interval(first, last), concept="bridge", position="e1"),
        Question("readable", None, concept="answer", position="e1"),
        Question("written", nodes([writer]), concept="bridge", position="e1", candidates=host.nodes),
        Question("mending", cells, candidates=legal, note="jumps of all positions"),
        Question("mending", cells, position="e1", candidates=legal, note="the stream is brought back here alone"),
        nothing("void", host.layers),
    )
    if mover is None:
        return shared
    moves = int(mover.split(".")[0])
    return (
        *shared,
        Question("mending", mending(host.layers, moves, second), position="ask", candidates=legal,
                 note="the stream is brought back here alone"),
        Question("moved", nodes([mover]), concept="bridge", position="e1", to="ask", candidates=host.nodes),
        Question("readable", Interval(moves, last), concept="bridge", position="ask"),
    )  # fmt: skip


def _examples(
    blueprint: Blueprint, bridge_of: Sequence[int], answer_of: Sequence[int], generator: torch.Generator, *, moved: bool
) -> list[Example]:
    entities, answers, fillers = (blueprint.tokens(kind) for kind in "eaf")

    def prompt(e: int) -> tuple[int, ...]:
        filler = [fillers[1 + randint(len(fillers) - 1, generator)] for _ in range(2)]
        order = [entities[e], *filler, blueprint.token("ask")] if moved else [*filler, entities[e]]
        return (blueprint.token(BOS), *order)

    def answer(e: int) -> int:
        return answer_of[bridge_of[e]]

    seen: dict[int, int] = {}
    examples = []
    order: Tensor = torch.randperm(_FIRST, generator=generator)
    for e in order.tolist():
        number = seen[bridge_of[e]] = seen.get(bridge_of[e], -1) + 1
        others = [x for x in range(_FIRST) if answer(x) != answer(e)]
        for _ in range(4):
            x = others[randint(len(others), generator)]
            examples.append(Example(
                prompt(e), answers[answer(e)], prompt(x), answers[answer(x)],
                {"bridge": bridge_of[e], "answer": answer(e)}, f"e{e}", "test" if number % 4 == 3 else "fit",
            ))  # fmt: skip
    return examples
