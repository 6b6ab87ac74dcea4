"""O: the keys of two blocks span one subspace over tokens, up to a rotation; those of all others one of their own."""

from __future__ import annotations

import torch

from probes.planted.blueprint import Blueprint, Head
from probes.planted.hosts import Host
from probes.planted.making import PROMPTS, another, choose, drawn, nothing, planted_task, randint
from probes.planted.parts import JUNK, distract, junk_maps
from probes.planted.record import Question
from probes.planted.task import Example, PlantedTask
from probes.planted.vocabulary import words

_N_WORDS, _LAYERS, _HEADS, _LENGTH = 48, 8, 4, 24
PER_HEAD = 2
"""Dimensions of the words' code that each head's keys read."""


def build(task: str, seed: int) -> PlantedTask:
    """Return O1: prompts are random words, and the model names the last one again."""
    generator = drawn(task, seed)
    shared = [2, 5] if seed == 0 else choose(range(_LAYERS), 2, generator)
    blueprint = Blueprint(Host(_LAYERS, 64, words(w=_N_WORDS), "none"), generator)
    stream = blueprint.stream
    stream.slot("code", _N_WORDS)
    code = stream.basis("code")
    blueprint.embedding += code
    blueprint.unembedding += 12 * code
    stream.rest(JUNK)
    rank = _HEADS * PER_HEAD

    def subspace() -> torch.Tensor:
        return torch.linalg.qr(torch.randn(_N_WORDS, rank, generator=generator)).Q.T @ code

    common = subspace()
    for layer in range(_LAYERS):
        rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
        keys = rotation @ (common if layer in shared else subspace())
        for head in range(_HEADS):
            read, write = junk_maps(blueprint, blueprint.host.head_width)
            query = torch.randn(PER_HEAD, _N_WORDS, generator=generator) @ code
            rows = keys[head * PER_HEAD : (head + 1) * PER_HEAD]
            blueprint.place_head(layer, Head(query, rows, torch.full((PER_HEAD,), 2.0), read, write, size=0.5), head)
    distract(blueprint)
    pairs = tuple(f"{a}+{b}" for b in range(_LAYERS) for a in range(b))
    questions = (
        Question("subspace", frozenset({f"{shared[0]}+{shared[1]}"}), candidates=pairs),
        nothing("mending", _LAYERS),
        nothing("pivot"),
    )
    examples = []
    for number in range(PROMPTS):
        tokens = tuple(randint(_N_WORDS, generator) for _ in range(_LENGTH))
        partner = tuple(another(token, range(_N_WORDS), generator) for token in tokens)
        split = "fit" if number < PROMPTS // 2 else "test"
        examples.append(Example(tokens, tokens[-1], partner, partner[-1], {}, f"prompt {number}", split))  # type: ignore[arg-type]
    return planted_task(task, seed, blueprint, examples, positions={"ask": -1}, concepts={}, questions=questions)
