"""H: a concept that can be read and that nothing uses: kept, erased, or copied to a position that nobody reads."""

from __future__ import annotations

import torch

from probes.planted.families.pairs import ANSWERS, POSITIONS, exclusive_or, pair_host
from probes.planted.making import at, begin, choose, nothing, planted_task, windows
from probes.planted.parts import copy_head, distract, lookup
from probes.planted.record import Interval, Question, nodes, span
from probes.planted.task import PlantedTask

_N = 8
_CIRCUIT = (0, 3, 5, 7)
"""Blocks of the four parts that make the answer."""
_UNUSED: dict[str, tuple[int, int | None]] = {"H1": (2, None), "H2": (6, None), "H3": (2, 6), "H4": (2, 4)}
"""Block that writes the concept; block that erases it (H3) or copies it (H4)."""


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of H1 to H4."""
    name, generator, score = begin(task, seed)
    (bring, look, move, decide), writes, then = (_CIRCUIT, *_UNUSED[name]) if seed == 0 else _draw(name, generator)
    pairs = pair_host(_N, "rms" if name == "H2" else "none", generator)
    blueprint = pairs.blueprint
    stream = blueprint.stream
    pairs.carry("p", "p class", lambda bits: bits & 3, ANSWERS)
    pairs.carry("p", "p third", lambda bits: bits >> 2 & 1, 2)
    pairs.carry("q", "q", lambda bits: bits & 3, ANSWERS)
    pairs.carry("q", "q third", lambda bits: bits >> 2 & 1, 2)
    stream.join("p", "p class", "p third")
    for slot, size in (("p at q", ANSWERS + 2), ("attribute", ANSWERS), ("moved", ANSWERS), ("unused", 2)):
        stream.slot(slot, size)
    circuit = [
        blueprint.place_head(bring, copy_head(
            blueprint, query="second", key="first", source="p", target="p at q", score=score, size=2**0.5
        )),
        blueprint.place_mlp(look, lookup(blueprint, [
            ((stream.vector("p at q", p), stream.vector("q", q)), stream.vector("attribute", exclusive_or(p, q)))
            for p in range(ANSWERS) for q in range(ANSWERS)
        ])),
        blueprint.place_head(move, copy_head(
            blueprint, query="ask", key="second", source="attribute", target="moved", score=score
        )),
        blueprint.place_mlp(decide, lookup(
            blueprint, [((stream.vector("moved", v),), stream.vector("answer", v)) for v in range(ANSWERS)], step=True
        )),
    ]  # fmt: skip
    unused = [
        ((stream.vector("p at q", ANSWERS + p), stream.vector("q third", q)), stream.vector("unused", p ^ q))
        for p in range(2) for q in range(2)
    ]  # fmt: skip
    writer = blueprint.place_mlp(writes, lookup(blueprint, unused))
    copier = None
    if name == "H3" and then is not None:
        blueprint.place_mlp(then, lookup(blueprint, [(keys, -added) for keys, added in unused]))
    if name == "H4" and then is not None:
        copier = blueprint.place_head(then, copy_head(
            blueprint, query="filler", key="second", source="unused", target="unused", score=score
        ))  # fmt: skip
    distract(blueprint)

    host, last = blueprint.host, _N - 1
    until = then - 1 if name == "H3" and then is not None else last
    questions = (
        Question("readable", Interval(writes, until), concept="unused", position="q"),
        Question("readable", span(then, last) if copier and then is not None else None, concept="unused", position="f"),
        Question("readable", Interval(look, last), concept="attribute", position="q"),
        Question("written", nodes([writer]), concept="unused", position="q", candidates=host.nodes),
        Question("necessary", None, concept="unused", position="q",
                 note="exchanging the concept alone changes no answer"),
        *windows("necessary", {"p": (-1, bring - 1), "q": (-1, move - 1), "f": None, "ask": (move, last)}),
        *windows("sufficient", {"p": None, "q": (bring, move - 1), "f": None, "ask": (move, last)}),
        Question("nodes", nodes(circuit), candidates=host.nodes, note="without the writer of the unused concept"),
        Question("lens", at(decide), position="ask"),
        nothing("void", _N),
        *([Question("moved", nodes([copier]), concept="unused", position="q", to="f", candidates=host.nodes)]
          if copier else []),
    )  # fmt: skip
    concepts = {"attribute": exclusive_or, "unused": lambda p, q: (p ^ q) >> 2 & 1}
    return planted_task(
        task, seed, blueprint, pairs.examples(exclusive_or, generator, concepts), positions=POSITIONS,
        concepts={"attribute": ANSWERS, "unused": 2}, questions=questions,
    )  # fmt: skip


def _draw(name: str, generator: torch.Generator) -> tuple[tuple[int, ...], int, int | None]:
    bring, *rest = choose(range(_N), 4, generator)
    free = [layer for layer in range(bring + 1, _N) if layer not in rest]
    if name in ("H1", "H2"):
        ordered = choose(free, 1, generator) if free else [bring + 1]
        return (bring, *rest), ordered[0], None
    if len(free) < 2:
        return _draw(name, generator)
    writes, then = choose(free, 2, generator)
    return (bring, *rest), writes, then
