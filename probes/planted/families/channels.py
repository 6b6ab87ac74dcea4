"""E: one head writes a direction that another reads with its queries, keys or values; or with none, in the decoy."""

from __future__ import annotations

import torch
from torch import Tensor

from probes.planted.blueprint import Blueprint, Head
from probes.planted.hosts import Host
from probes.planted.making import PROMPTS, answer_words, begin, choose, nothing, planted_task, randint
from probes.planted.parts import JUNK, SOFT, distract, junk_maps
from probes.planted.record import Question, nodes
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_NAMES, _FILLERS, _LAYERS = 16, 15, 4
_WORDS = (*words(n=_NAMES, f=_FILLERS), "end")
_KINDS = {"E1": "q", "E2": "k", "E3": "v", "E4": "q"}
_MARKS = 5
"""Fillers f0 to f4 mark with plus, f5 to f9 with minus; of the rest two are answers of E3."""
_SHARE = 0.05
"""Share of the writer's squared singular values that the channel has."""
POSITIONS = {"first": 1, "second": 3, "ask": -1}


def build(task: str, seed: int) -> PlantedTask:
    """Return a task of E1 to E4: prompts are mark, name, filler or mark, name, end.

    E1: the mark at the start says which name is asked for; the writer tells the end, whose query reads it. E2: the name
    after the plus mark is asked for; the writer tells the names, whose keys are read. E3: the sign of the first mark is
    asked for; the writer tells the first name, whose value is read. E4: always the first name; the channel, as strong
    in the weights as that of E1, starts at a feature that no prompt has.
    """
    name, generator, _ = begin(task, seed)
    kind = _KINDS[name]
    early, late = (1, 3) if seed == 0 else choose(range(_LAYERS), 2, generator)
    blueprint = Blueprint(Host(_LAYERS, 64, _WORDS, "layer"), generator)
    _embed(blueprint)
    stream = blueprint.stream
    stream.rest(JUNK)
    pair = stream.basis("channel")
    direction = (pair[0] - pair[1]) / 2**0.5
    writer = blueprint.place_head(early, _writer(blueprint, name, direction))
    reader = blueprint.place_head(late, _reader(blueprint, name, direction))
    circuit = [reader] if name == "E4" else [writer, reader]
    if name == "E4":
        # The head that asks by the silent channel is not the one that names the answer.
        decoy = blueprint.place_head(late, _decoy(blueprint, direction))
    distract(blueprint, smallest=0.2, largest=0.6)

    truth = frozenset[str]() if name == "E4" else frozenset({f"{writer}->{reader}:{kind}"})
    note = f"{writer}->{decoy}:q is there in the weights alone" if name == "E4" else ""
    questions = (
        Question("channel", truth, candidates=channel_candidates(_LAYERS, 4), note=note),
        Question("nodes", nodes(circuit), candidates=blueprint.host.nodes),
        nothing("mending", _LAYERS),
        nothing("pivot"),
    )
    examples = _examples(blueprint, name, generator)
    return planted_task(
        task, seed, blueprint, examples, positions=POSITIONS, concepts={"mark": 2, "name": _NAMES}, questions=questions
    )


def channel_candidates(layers: int, heads: int) -> tuple[str, ...]:
    """Return every pair of heads of different blocks, and every way the later could read the earlier."""
    return tuple(
        f"{early}.{writer}->{late}.{reader}:{kind}"
        for late in range(layers) for early in range(late)
        for writer in range(heads) for reader in range(heads) for kind in "qkv"
    )  # fmt: skip


def _embed(blueprint: Blueprint) -> None:
    stream = blueprint.stream
    for slot, size in (("sign", 1), ("silent", 1), ("mark", 1), ("is name", 1), ("end", 1), ("position", 5),
                       ("name", _NAMES), ("answer", _NAMES), ("channel", 2)):  # fmt: skip
        stream.slot(slot, size)
    marks = blueprint.tokens("f")[: 2 * _MARKS]
    blueprint.embedding[marks] += stream.vector("mark")
    blueprint.embedding[marks[:_MARKS]] += stream.vector("sign")
    blueprint.embedding[marks[_MARKS:]] -= stream.vector("sign")
    blueprint.embedding[blueprint.tokens("n")] += stream.basis("name") + stream.vector("is name")
    blueprint.embedding[blueprint.token("end")] += stream.vector("end")
    blueprint.positions[:5] += stream.basis("position")


def _writer(blueprint: Blueprint, name: str, direction: Tensor) -> Head:
    """The head that takes a sign into the channel's direction, a weak part of what it writes."""
    stream, place = blueprint.stream, blueprint.stream.basis("position")
    source = "silent" if name == "E4" else "sign"
    junk_read, junk_write = junk_maps(blueprint, blueprint.host.head_width - 1)
    n_junk = len(junk_read)
    junk_size = ((1 - _SHARE) / _SHARE / n_junk) ** 0.5
    value = torch.cat([stream.basis(source), junk_read])
    output = torch.cat([direction[:, None], junk_size * junk_write], dim=1)
    if name in ("E1", "E4"):
        return Head(stream.basis("end"), stream.basis("mark"), torch.tensor([SOFT]), value, output, size=None)
    return Head(place[[1, 3]], place[[0, 2]], torch.tensor([SOFT, SOFT]), value, output, size=None)


def _reader(blueprint: Blueprint, name: str, direction: Tensor) -> Head:
    """The head that answers at the end."""
    stream, place, end = blueprint.stream, blueprint.stream.basis("position"), blueprint.stream.vector("end")
    copied, answer = stream.basis("name"), stream.basis("answer").T
    one, first_not_second = torch.tensor([SOFT]), (place[1] - place[3])[None]
    if name == "E1":
        query, key = torch.stack([direction, end]), torch.stack([first_not_second[0], stream.vector("is name")])
        return Head(query, key, torch.tensor([SOFT, SOFT]), copied, answer)
    if name == "E2":
        return Head(end[None], direction[None], one, copied, answer)
    if name == "E3":
        return Head(end[None], place[1:2], one, direction[None], answer[:, :1])
    return Head(end[None], first_not_second, one, copied, answer)


def _decoy(blueprint: Blueprint, direction: Tensor) -> Head:
    """A head that would ask by the channel, and moves junk."""
    place, (read, write) = blueprint.stream.basis("position"), junk_maps(blueprint, blueprint.host.head_width)
    return Head(direction[None], (place[1] - place[3])[None], torch.tensor([SOFT]), read, write, size=0.5)


def _examples(blueprint: Blueprint, name: str, generator: torch.Generator) -> list[Example]:
    names, fillers, end = blueprint.tokens("n"), blueprint.tokens("f"), blueprint.token("end")
    plus, minus, plain = fillers[:_MARKS], fillers[_MARKS : 2 * _MARKS], fillers[2 * _MARKS :]
    signs = plain[-2:]
    unembedding, answer = blueprint.unembedding, blueprint.stream.basis("answer")
    if name == "E3":
        unembedding[signs[0]] += 12 * answer[0]
        unembedding[signs[1]] -= 12 * answer[0]
    else:
        answer_words(blueprint, names, blueprint.stream.basis("answer"), default="f14")

    def draw(options: list[int], *but: int) -> int:
        left = [option for option in options if option not in but]
        return left[randint(len(left), generator)]

    def prompt(first_is_plus: bool, before: tuple[int, ...] = ()) -> tuple[tuple[int, ...], int]:
        start, other = (plus, minus) if first_is_plus else (minus, plus)
        first = draw(names, *before)
        second = draw(names, first, *before)
        between = draw(plain[:-2], *before) if name in ("E1", "E4") else draw(other)
        right = {"E3": signs[0 if first_is_plus else 1], "E4": first}.get(name, first if first_is_plus else second)
        return (draw(start), first, between, second, end), right

    examples = []
    for number in range(PROMPTS):
        first_is_plus = number % 2 == 0
        tokens, right = prompt(first_is_plus)
        partner, partner_right = prompt(not first_is_plus, tokens)
        examples.append(Example(
            tokens, right, partner, partner_right, {"mark": int(first_is_plus), "name": names.index(tokens[1])},
            f"{tokens[1]} {tokens[3]}", "fit" if number < PROMPTS // 2 else "test",
        ))  # fmt: skip
    return examples
