"""I: a code that decides the answer and that no linear probe reads: exclusive-or, a product of signs, an angle."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import cos, pi, sin

import torch
from torch import Tensor

from probes.planted.blueprint import Units
from probes.planted.families.pairs import ANSWERS, POSITIONS, Pairs, exclusive_or, pair_host
from probes.planted.making import at, begin, choose, nothing, planted_task, windows
from probes.planted.parts import copy_head, distract, lookup
from probes.planted.record import Interval, Question, nodes
from probes.planted.stream import CONSTANT
from probes.planted.task import PlantedTask

_N, _OCTANTS = 8, 8
_LAYERS = {"I1": (0, 1, 3, 5), "I2": (0, 2, 4, 6), "I3": (0, 1, 3, 6)}
"""Blocks of the head that brings p, of the MLP that writes the code (none in I1), of the head that moves it, of its consumer."""
_SIGNS = tuple(product((1.0, -1.0), repeat=2))


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of I1 to I3."""
    name, generator, score = begin(task, seed)
    bring, write, move, consume = _LAYERS[name] if seed == 0 else choose(range(_N), 4, generator)
    pairs = pair_host(_N, "none", generator, corners=name == "I2")
    blueprint = pairs.blueprint
    writer, consumer = _CODES[name](pairs)
    code, brought = blueprint.stream["code"], blueprint.stream["p"]
    blueprint.stream.slot("code moved", len(code))
    # A code of signs is as long as its root; an octant and an angle are of length 1.
    brings, moves = (len(brought) ** 0.5, len(code) ** 0.5) if name != "I3" else (1.0, 1.0)
    circuit = [
        blueprint.place_head(bring, copy_head(
            blueprint, query="second", key="first", source="p", target="p at q", score=score, size=brings
        )),
        *([blueprint.place_mlp(write, writer)] if writer else []),
        blueprint.place_head(move, copy_head(
            blueprint, query="ask", key="second", source="code", target="code moved", score=score, size=moves
        )),
        blueprint.place_mlp(consume, consumer(blueprint.stream.basis("code moved"))),
    ]  # fmt: skip
    distract(blueprint)

    host, last = blueprint.host, _N - 1
    answer = _octant_class if name == "I3" else exclusive_or
    questions = (
        Question("readable", None, concept="attribute", position="q", note="the code is there and is not linear"),
        Question("readable", Interval(consume, last), concept="attribute", position="ask"),
        Question("written", nodes(circuit[-1:]), concept="attribute", position="ask", candidates=host.nodes),
        *windows("necessary", {"p": (-1, bring - 1), "q": (-1, move - 1), "f": None, "ask": (move, last)}),
        *windows("sufficient", {"p": None, "q": (bring, move - 1), "f": None, "ask": (move, last)}),
        Question("nodes", nodes(circuit), candidates=host.nodes),
        Question("lens", at(consume), position="ask"),
        nothing("void", _N),
    )
    return planted_task(
        task, seed, blueprint, pairs.examples(answer, generator, {"attribute": answer}), positions=POSITIONS,
        concepts={"attribute": ANSWERS}, questions=questions,
    )  # fmt: skip


Consumer = Callable[[Tensor], Units]
"""From the coordinates of the moved code [size, d_model] to the MLP that turns it into the answer."""


def _exclusive_or(pairs: Pairs) -> tuple[Units | None, Consumer]:
    """Two bits of p beside two of q: the bits are linear, their exclusive-or is not."""
    stream = pairs.blueprint.stream
    pairs.carry_signs("p", "p", (0, 1))
    pairs.carry_signs("q", "q", (0, 1))
    stream.slot("p at q", 2)
    stream.join("code", "p at q", "q")

    def consumer(moved: Tensor) -> Units:
        rules = [
            (_keys((*p, *q), moved), stream.vector("answer", exclusive_or(_bits(p), _bits(q))))
            for p in _SIGNS
            for q in _SIGNS
        ]
        return lookup(pairs.blueprint, rules)

    return None, consumer


def _sign_product(pairs: Pairs) -> tuple[Units | None, Consumer]:
    """Two values (a bit each of the exclusive-or), each times a sign of its own, beside these signs: only the products tell the values."""
    stream = pairs.blueprint.stream
    pairs.carry_signs("p", "p", (0, 1))
    pairs.carry_signs("q", "q", (0, 1))
    pairs.carry_signs("q", "sign", (2, 3))
    stream.slot("p at q", 2)
    stream.slot("signed", 2)
    stream.join("code", "signed", "sign")
    own = [stream.basis(name) for name in ("p at q", "q", "sign")]
    rules = [
        (_keys(signs, torch.stack([basis[plane] for basis in own])), stream.vector("signed", plane, -signs[0] * signs[1] * signs[2]))
        for plane in range(2)
        for signs in product((1.0, -1.0), repeat=3)
    ]  # fmt: skip

    def consumer(moved: Tensor) -> Units:
        signed, sign, value = moved[:2], moved[2:], stream.basis("answer")
        # A product has no threshold: where nothing is asked, the little that a soft head moves would be multiplied too.
        elsewhere = 2.0 * (stream.vector(CONSTANT) - stream.vector("ask"))
        return Units(
            torch.cat([signed, -signed]) - elsewhere,
            torch.cat([value, value]).T,
            size=2**0.5,
            up=torch.cat([sign, -sign]),
        )

    return lookup(pairs.blueprint, rules, size=2**0.5), consumer


def _angle(pairs: Pairs) -> tuple[Units | None, Consumer]:
    """A point on a circle; opposite octants are of one class, so that every class has its mean in the centre."""
    stream = pairs.blueprint.stream
    pairs.carry("p", "p", lambda bits: bits & 7, _OCTANTS)
    pairs.carry("q", "q", lambda bits: bits & 7, _OCTANTS)
    stream.slot("p at q", _OCTANTS)
    stream.slot("code", 2)
    angles = [2 * pi * octant / _OCTANTS for octant in range(_OCTANTS)]
    points = torch.tensor([[cos(angle), sin(angle)] for angle in angles])
    rules = [
        ((stream.vector("p at q", p), stream.vector("q", q)), points[(p + q) % _OCTANTS] @ stream.basis("code"))
        for p in range(_OCTANTS)
        for q in range(_OCTANTS)
    ]

    def consumer(moved: Tensor) -> Units:
        # A neighbour on the circle reads cos 45 degrees = .71 of a whole key.
        octants = [((point @ moved,), stream.vector("answer", o % ANSWERS)) for o, point in enumerate(points)]
        return lookup(pairs.blueprint, octants, step=(0.2, 0.1), hardness=200.0)

    return lookup(pairs.blueprint, rules), consumer


_CODES: dict[str, Callable[[Pairs], tuple[Units | None, Consumer]]] = {
    "I1": _exclusive_or, "I2": _sign_product, "I3": _angle,
}  # fmt: skip


def _keys(signs: tuple[float, ...], basis: Tensor) -> tuple[Tensor, ...]:
    return tuple(sign * axis for sign, axis in zip(signs, basis, strict=True))


def _bits(signs: tuple[float, ...]) -> int:
    return sum(int(sign > 0) << bit for bit, sign in enumerate(signs))


def _octant_class(p: int, q: int) -> int:
    return ((p & 7) + (q & 7)) % ANSWERS
