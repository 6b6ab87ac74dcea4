"""D: every word's class goes through a chain of tables, one a block, but for blocks that do nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host, Norm
from probes.planted.making import (
    PROMPTS,
    another,
    answer_words,
    at,
    begin,
    choose,
    classes,
    nothing,
    planted_task,
    randint,
)
from probes.planted.parts import JUNK, STEP, distract, junk_head, junk_units, lookup
from probes.planted.record import Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_STATES, _LAYERS, _CONTENT, _FUNCTION = 4, 8, 40, 20
_WORDS = (BOS, *words(c=_CONTENT, w=_FUNCTION))
_HOSTS: dict[str, Norm] = {"D1": "rms", "D2": "rms", "D3": "layer", "D4": "layer", "D5": "rms", "D6": "layer"}
_SPECIAL = {"D1": (3, 5), "D2": (4,), "D3": (5,), "D4": (3,), "D5": (3,), "D6": ()}
"""The blocks of seed 0 that are out of the ordinary."""
TINY = 1e-3
CLASSES = ("content", "function")


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of D1 to D6.

    D1 has two zero blocks. In D2 a block does nothing for function words. In D3 a block is random and tiny. In D4 a block
    turns the state from one slot to another at equal norm. In D5 a block permutes the state and the next one undoes it.
    """
    name, generator, _ = begin(task, seed)
    n_special = len(_SPECIAL[name])
    special = list(_SPECIAL[name]) if seed == 0 else choose(range(2, _LAYERS - 1), n_special, generator)
    if name == "D5":
        special = [min(special[0], _LAYERS - 3)]
        special.append(special[0] + 1)
    blueprint = Blueprint(Host(_LAYERS, 64, _WORDS, _HOSTS[name], d_head=16), generator)
    states = _embed(blueprint, generator)
    silent = special if name in ("D1", "D3", "D5") else []
    chain = [layer for layer in range(_LAYERS) if layer not in silent]
    for slot in range(len(chain)):
        blueprint.stream.slot(f"state {slot + 1}", _STATES)
    tables = [torch.randperm(_STATES, generator=generator) for _ in chain]
    circuit = _place_chain(
        blueprint, chain, tables, gated=special if name == "D2" else (), turned=special if name == "D4" else ()
    )
    answer_words(
        blueprint, blueprint.tokens("c")[:_STATES], blueprint.stream.basis(f"state {len(chain)}"), default="c4"
    )
    blueprint.stream.rest(JUNK)
    if name == "D5":
        circuit += _place_there_and_back(blueprint, special, chain, generator)
    if name == "D3":
        _place_tiny(blueprint, special[0])
    quiet = special if name in ("D1", "D2", "D3") else []
    distract(blueprint, blocks=[layer for layer in range(_LAYERS) if layer not in quiet])

    layers = [str(layer) for layer in range(_LAYERS)]
    void = Question(
        "void", frozenset(str(layer) for layer in special) if name in ("D1", "D3") else frozenset(),
        candidates=tuple(layers),
        note="the pair together changes nothing, each alone everything" if name == "D5" else "",
    )  # fmt: skip
    parts = tuple(blueprint.host.nodes)
    asked_of: tuple[str | None, ...] = (None,)
    if name == "D2":
        void = Question(
            "void", frozenset({f"{special[0]}:function"}),
            candidates=tuple(f"{layer}:{word_class}" for layer in layers for word_class in CLASSES),
        )  # fmt: skip
        asked_of = CLASSES
    questions = (
        void,
        *(
            Question("nodes", nodes(circuit) - _unused(special, subset), candidates=parts, subset=subset)
            for subset in asked_of
        ),
        Question("lens", at(chain[-1]), position="ask"),
        nothing("mending", _LAYERS),
        nothing("pivot"),
    )
    examples = _examples(blueprint, states, tables, special if name == "D2" else (), chain, generator)
    return planted_task(
        task, seed, blueprint, examples, positions={"ask": -1}, concepts={"state": _STATES}, questions=questions
    )


def _unused(special: Sequence[int], subset: str | None) -> frozenset[str]:
    return frozenset(f"mlp.{layer}" for layer in special) if subset == "function" else frozenset()


def _embed(blueprint: Blueprint, generator: torch.Generator) -> dict[int, int]:
    """Embed words as their classes and first states; return the first state of each word's token."""
    stream = blueprint.stream
    for slot, size in (("bos", 1), ("function", 1), ("state 0", _STATES)):
        stream.slot(slot, size)
    blueprint.embedding[blueprint.token(BOS)] += stream.vector("bos")
    states: dict[int, int] = {}
    for prefix, count in (("c", _CONTENT), ("w", _FUNCTION)):
        for token, state in zip(blueprint.tokens(prefix), classes(count, _STATES, generator), strict=True):
            blueprint.embedding[token] += stream.vector("state 0", state)
            states[token] = state
    blueprint.embedding[blueprint.tokens("w")] += stream.vector("function")
    return states


def _place_chain(
    blueprint: Blueprint, chain: Sequence[int], tables: Sequence[Tensor], *, gated: Sequence[int], turned: Sequence[int]
) -> list[str]:
    """Plant one table a block; gated blocks leave function words to the next, turned ones take away what they read."""
    stream, function = blueprint.stream, blueprint.stream.vector("function")
    circuit = []
    for number, layer in enumerate(chain):
        before, after = stream.basis(f"state {number}"), stream.basis(f"state {number + 1}")
        table, taken = tables[number], 1.0 if layer in turned else 0.0
        rules: list[tuple[tuple[Tensor, ...], Tensor]] = [
            ((before[state],), after[int(table[state])] - taken * before[state]) for state in range(_STATES)
        ]
        size = 2**0.5 if taken else 1.0
        absent = [function] if layer in gated else []
        circuit.append(blueprint.place_mlp(layer, lookup(blueprint, rules, absent=absent, step=STEP, size=size)))
        if layer - 1 in gated:
            earlier = stream.basis(f"state {number - 1}")
            passed = [((earlier[state], function), after[int(table[state])]) for state in range(_STATES)]
            blueprint.place_mlp(layer, lookup(blueprint, passed, step=STEP))
    return circuit


def _place_there_and_back(
    blueprint: Blueprint, pair: Sequence[int], chain: Sequence[int], generator: torch.Generator
) -> list[str]:
    """Plant a permutation of the state at hand in one block and its inverse in the next."""
    state = blueprint.stream.basis(f"state {sum(layer < pair[0] for layer in chain)}")
    shift = 1 + randint(_STATES - 1, generator)
    circuit = []
    for layer, step in zip(pair, (shift, -shift), strict=True):
        rules = [((state[i],), state[(i + step) % _STATES] - state[i]) for i in range(_STATES)]
        circuit.append(blueprint.place_mlp(layer, lookup(blueprint, rules, step=STEP, size=2**0.5)))
    return circuit


def _place_tiny(blueprint: Blueprint, layer: int) -> None:
    for index in range(blueprint.host.heads):
        blueprint.place_head(layer, junk_head(blueprint, size=TINY), index)
    blueprint.place_mlp(layer, junk_units(blueprint, size=TINY))


def _examples(
    blueprint: Blueprint, states: dict[int, int], tables: Sequence[Tensor], gated: Sequence[int],
    chain: Sequence[int], generator: torch.Generator,
) -> list[Example]:  # fmt: skip
    answers, tokens, bos = blueprint.tokens("c")[:_STATES], sorted(states), blueprint.token(BOS)
    function = set(blueprint.tokens("w"))

    def answer(token: int) -> int:
        state = states[token]
        for layer, table in zip(chain, tables, strict=True):
            if not (layer in gated and token in function):
                state = int(table[state])
        return answers[state]

    examples = []
    for number in range(PROMPTS):
        prompt = [tokens[randint(len(tokens), generator)] for _ in range(7 + randint(9, generator))]
        partner = [another(token, tokens, generator) for token in prompt]
        while answer(partner[-1]) == answer(prompt[-1]) or (partner[-1] in function) != (prompt[-1] in function):
            partner[-1] = another(prompt[-1], tokens, generator)
        examples.append(Example(
            (bos, *prompt), answer(prompt[-1]), (bos, *partner), answer(partner[-1]), {"state": states[prompt[-1]]},
            f"prompt {number}", "fit" if number < PROMPTS // 2 else "test",
            CLASSES[prompt[-1] in function],
        ))  # fmt: skip
    return examples
