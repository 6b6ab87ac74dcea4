"""A: a fact of two words is looked up at the second, moved to the end, and turned into the answer."""

from __future__ import annotations

import torch

from probes.planted.fact_words import fact_words
from probes.planted.hosts import Norm
from probes.planted.making import answer_words, at, begin, choose, nothing, windows
from probes.planted.parts import distract, look_alike
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import PlantedTask

_HOSTS: dict[str, tuple[Norm, int]] = {
    "A1": ("none", 8), "A2": ("rms", 12), "A3": ("none", 8), "A4": ("rms", 12), "A5": ("layer", 12),
}  # fmt: skip
_LAYERS = {"A1": (0, 2, 4, 6), "A2": (1, 4, 7, 10), "A3": (0, 1, 2, 3), "A4": (2, 6, 9, 11), "A5": (1, 4, 7, 10)}


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of A1 to A5."""
    name, generator, score = begin(task, seed)
    norm, n_layers = _HOSTS[name]
    bring, look, move, decide = _layers(name, n_layers, seed, generator)
    facts = fact_words(n_layers, norm, generator, {"attribute": 4, "moved": 4, "answer": 4})
    blueprint, stream = facts.blueprint, facts.blueprint.stream
    answer_words(blueprint, blueprint.tokens("a"), "answer", default="f0")
    bringer = facts.place_bringer(bring, score)
    writer = facts.place_table(look)
    mover = facts.place_mover(move, score)
    decider = facts.place_decider(decide)
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
        nothing("void", n_layers, "distractors write where nobody reads"),
        nothing("mending", n_layers),
        nothing("pivot"),
    )
    return facts.task(task, seed, questions)


def _layers(name: str, n_layers: int, seed: int, generator: torch.Generator) -> list[int]:
    if seed == 0:
        return list(_LAYERS[name])
    if name == "A3":
        return choose(range(n_layers // 2 + 1), 4, generator)
    if name == "A4":
        return [*choose(range(1, n_layers - 1), 3, generator), n_layers - 1]
    return choose(range(n_layers - 1), 4, generator)
