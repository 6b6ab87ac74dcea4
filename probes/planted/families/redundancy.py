"""G: parts of which one can replace another: two writers, a back-up, twin heads, two of three."""

from __future__ import annotations

from itertools import combinations

import torch

from probes.planted.blueprint import Units
from probes.planted.families.pairs import ANSWERS, POSITIONS, Pairs, exclusive_or, pair_host
from probes.planted.making import at, begin, choose, nothing, planted_task, windows
from probes.planted.parts import copy_head, distract, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.task import PlantedTask

_LAYERS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...], int]] = {
    "G1": (0, (3, 6), (7,), 7), "G2": (0, (3, 6), (7,), 7), "G3": (0, (2,), (5, 5), 7), "G4": (0, (2, 4, 6), (7,), 7),
}  # fmt: skip
"""Blocks of the head that brings p, of the writers, of the heads that move what they wrote, and of the last MLP."""
_N = 8


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of G1 to G4."""
    name, generator, score = begin(task, seed)
    bring, writes, moves, decide = _LAYERS[name] if seed == 0 else _draw(name, generator)
    pairs = pair_host(_N, "rms" if name == "G3" else "none", generator)
    blueprint = pairs.blueprint
    stream = blueprint.stream
    for slot in ("p at q", "value", "moved"):
        stream.slot(slot, ANSWERS)
    pairs.carry("p", "p", lambda bits: bits & 3, ANSWERS)
    pairs.carry("q", "q", lambda bits: bits & 3, ANSWERS)
    bringer = blueprint.place_head(
        bring, copy_head(blueprint, query="second", key="first", source="p", target="p at q", score=score)
    )
    writers = [
        blueprint.place_mlp(layer, _writer(pairs, only_if_empty=name == "G2" and number > 0))
        for number, layer in enumerate(writes)
    ]
    written = len(writes) if name in ("G1", "G4") else 1
    movers = [
        blueprint.place_head(layer, copy_head(
            blueprint, query="ask", key="second", source="value", target="moved", score=score, size=float(written)
        ))
        for layer in moves
    ]  # fmt: skip
    # Of three parts any two are enough; of two, either.
    share, step = (1 / 3, (0.45, 0.33)) if name == "G4" else (1.0, True)
    decider = blueprint.place_mlp(decide, lookup(
        blueprint,
        [((stream.vector("moved", v, share),), stream.vector("answer", v)) for v in range(ANSWERS)], step=step,
    ))  # fmt: skip
    distract(blueprint)

    host, last = blueprint.host, _N - 1
    spare = writers if len(writers) > 1 else movers
    redundant = frozenset("+".join(pair) for pair in combinations(sorted(spare, key=host.nodes.index), 2))
    questions = (
        Question("redundant", redundant, candidates=tuple("+".join(pair) for pair in combinations(host.nodes, 2))),
        Question("nodes", nodes([bringer, *writers, *movers, decider]), candidates=host.nodes,
                 note="redundant nodes change nothing alone"),
        Question("readable", Interval(writes[0], last), concept="attribute", position="q"),
        Question("readable", Interval(moves[0], last), concept="attribute", position="ask"),
        Question("lens", at(decide), position="ask"),
        *windows("necessary", {"p": (-1, bring - 1), "q": (-1, moves[0] - 1), "ask": (moves[0], last)}),
        *windows("sufficient", {"p": None, "q": (bring, moves[0] - 1), "ask": (moves[0], last)}),
        nothing("void", _N),
        nothing("mending", _N),
    )  # fmt: skip
    concepts = {"attribute": exclusive_or}
    return planted_task(
        task, seed, blueprint, pairs.examples(exclusive_or, generator, concepts), positions=POSITIONS,
        concepts={"attribute": ANSWERS}, questions=questions,
    )  # fmt: skip


def _writer(pairs: Pairs, *, only_if_empty: bool) -> Units:
    stream = pairs.blueprint.stream
    rules = []
    for p in range(ANSWERS):
        for q in range(ANSWERS):
            value = stream.vector("value", exclusive_or(p, q))
            # A back-up looks at the one coordinate that it would fill, so that a part of it is still filled up.
            keys = (stream.vector("p at q", p), stream.vector("q", q) - value * only_if_empty)
            rules.append((keys, value))
    return lookup(pairs.blueprint, rules, step=True, size=None if only_if_empty else 1.0)


def _draw(name: str, generator: torch.Generator) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    if name == "G3":
        bring, write, move = choose(range(_N - 1), 3, generator)
        return bring, (write,), (move, move), _N - 1
    bring, *writes = choose(range(_N - 1), 4 if name == "G4" else 3, generator)
    return bring, tuple(writes), (_N - 1,), _N - 1
