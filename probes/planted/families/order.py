"""M: two look-ups in neighbouring blocks, of which the second reads what the first writes, or not."""

from __future__ import annotations

from probes.planted.fact_words import ANSWERS, fact_words
from probes.planted.making import answer_words, at, begin, nothing, randint
from probes.planted.parts import STEP, distract, lookup
from probes.planted.record import Question, nodes
from probes.planted.task import PlantedTask

_LAYERS, _FIRST = 10, {"M1": 3, "M2": 4}


def build(task: str, seed: int) -> PlantedTask:
    """Return M1, whose neighbouring look-ups commute, or M2, in which the second needs the first.

    Both bits of a fact reach the end, where they decide. In M1 blocks p and p + 1 look up a bit each; in M2 block p
    looks up the fact and block p + 1 splits it into bits. In M1 moving and deciding are neighbours, and must not change.
    """
    name, generator, score = begin(task, seed)
    first = _FIRST[name] if seed == 0 else 2 + randint(4, generator)
    bring, second, move = first - 2, first + 1, first + 3
    decide = move + 1 if name == "M1" else move
    facts = fact_words(_LAYERS, "none", generator, {"attribute": 4, "bits": 4, "moved": 4, "answer": 4})
    blueprint, stream = facts.blueprint, facts.blueprint.stream
    answer_words(blueprint, blueprint.tokens("a"), blueprint.stream.basis("answer"), default="f0")

    circuit = [facts.place_bringer(bring, score)]
    bits = stream.basis("bits")
    if name == "M1":
        circuit += [facts.place_table(first, facts.table // 2, "bits")]
        circuit += [facts.place_table(second, 2 + facts.table % 2, "bits")]
    else:
        circuit += [facts.place_table(first)]
        circuit += [blueprint.place_mlp(second, lookup(
            blueprint, [((stream.vector("attribute", v),), bits[v // 2] + bits[2 + v % 2]) for v in range(ANSWERS)],
            size=2**0.5, step=STEP,
        ))]  # fmt: skip
    circuit.append(facts.place_mover(move, score, source="bits", size=2**0.5))
    moved, answer = stream.basis("moved"), stream.basis("answer")
    circuit.append(blueprint.place_mlp(decide, lookup(
        blueprint, [((moved[v // 2], moved[2 + v % 2]), answer[v]) for v in range(ANSWERS)]
    )))  # fmt: skip
    stream.rest("junk")
    distract(blueprint)

    pairs = [f"{layer}+{layer + 1}" for layer in range(_LAYERS - 1)]
    bound = f"{move}+{decide}" if name == "M1" else f"{first}+{second}"
    questions = (
        Question("order", frozenset(pairs) - {bound}, candidates=tuple(pairs)),
        Question("lens", at(decide), position="ask"),
        Question("nodes", nodes(circuit), candidates=blueprint.host.nodes),
        nothing("mending", _LAYERS),
        nothing("pivot"),
    )
    return facts.task(task, seed, questions)
