"""The host of G, H and I: two words of four bits each, brought together at the second, and an answer of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probes.planted.blueprint import Blueprint
from probes.planted.hosts import BOS, Host, Norm
from probes.planted.making import PROMPTS, answer_words, randint
from probes.planted.task import Example
from probes.planted.vocabulary import words

N_WORDS, ANSWERS = 16, 4
POSITIONS = {"p": 1, "q": 2, "f": 3, "ask": -1}
_WORDS = (BOS, *words(f=19, p=N_WORDS, q=N_WORDS, a=ANSWERS, ask=0))

Bits = Int[Tensor, "word"]
Of = Callable[[int, int], int]
"""A number made of the four bits of p and of q."""


@dataclass(frozen=True)
class Pairs:
    """A blueprint with words, flags and answers in place, and the bits that each word carries."""

    blueprint: Blueprint
    p: tuple[int, ...]
    """Four bits of each word p, all different."""
    q: tuple[int, ...]

    def carry(self, word: str, slot: str, part: Callable[[int], int], size: int) -> None:
        """Give the words `word` a new one-hot slot of `size` that says a part of their bits."""
        self.blueprint.stream.slot(slot, size)
        basis = self.blueprint.stream.basis(slot)
        bits = self.p if word == "p" else self.q
        self.blueprint.embedding[self.blueprint.tokens(word)] += basis[[part(value) for value in bits]]

    def carry_signs(self, word: str, slot: str, numbers: Sequence[int]) -> None:
        """Give the words `word` a new slot that says some of their bits as signs, 1 positive."""
        self.blueprint.stream.slot(slot, len(numbers))
        bits = torch.tensor(self.p if word == "p" else self.q)
        signs = torch.stack([2.0 * (bits >> number & 1) - 1 for number in numbers], dim=1)
        self.blueprint.embedding[self.blueprint.tokens(word)] += signs @ self.blueprint.stream.basis(slot)

    def examples(self, answer: Of, generator: torch.Generator, concepts: Mapping[str, Of]) -> tuple[Example, ...]:
        """Return the prompts and partners, balanced over answers and over the values of the concepts."""
        table = [[answer(p, q) for q in self.q] for p in self.p]
        cells: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, j in _shuffled(generator):
            key = (table[i][j], *(of(self.p[i], self.q[j]) for of in concepts.values()))
            cells.setdefault(key, []).append((i, j))
        each = PROMPTS // len(cells)
        examples = []
        for key in sorted(cells):
            for number, (i, j) in enumerate(cells[key][:each]):
                x, y = self._partner(table, i, j, generator)
                examples.append(Example(
                    self._prompt(i, j, generator), self._answers[table[i][j]], self._prompt(x, y, generator),
                    self._answers[table[x][y]],
                    {name: of(self.p[i], self.q[j]) for name, of in concepts.items()}, f"p{i} q{j}",
                    "fit" if number < each // 2 else "test",
                ))  # fmt: skip
        return tuple(examples)

    @property
    def _answers(self) -> list[int]:
        return self.blueprint.tokens("a")

    def _prompt(self, i: int, j: int, generator: torch.Generator) -> tuple[int, ...]:
        token = self.blueprint.token
        filler = self.blueprint.tokens("f")[1 + randint(18, generator)]
        return (token(BOS), self.blueprint.tokens("p")[i], self.blueprint.tokens("q")[j], filler, token("ask"))

    @staticmethod
    def _partner(table: Sequence[Sequence[int]], i: int, j: int, generator: torch.Generator) -> tuple[int, int]:
        for x, y in _shuffled(generator):
            if table[i][j] not in (table[x][y], table[i][y], table[x][j]):
                return x, y
        raise ValueError(f"pair {(i, j)} has no partner that differs in every mixture")


def pair_host(layers: int, norm: Norm, generator: torch.Generator, *, corners: bool = False) -> Pairs:
    """Return the host with everything but its circuit in place.

    The answer is named by slot `answer`: one coordinate each, or with `corners` two coordinates whose signs are its bits.
    """
    blueprint = Blueprint(Host(layers, 96, _WORDS, norm), generator)
    stream = blueprint.stream
    for slot, size in (
        ("bos", 1),
        ("first", 1),
        ("second", 1),
        ("filler", 1),
        ("ask", 1),
        ("answer", 2 if corners else ANSWERS),
    ):
        stream.slot(slot, size)
    blueprint.embedding[blueprint.token(BOS)] += stream.vector("bos")
    blueprint.embedding[blueprint.token("ask")] += stream.vector("ask")
    for kind, flag in (("p", "first"), ("q", "second"), ("f", "filler")):
        blueprint.embedding[blueprint.tokens(kind)] += stream.vector(flag)
    signs = torch.tensor([[2.0 * (answer >> bit & 1) - 1 for bit in range(2)] for answer in range(ANSWERS)])
    rows = signs @ stream.basis("answer") / 2 if corners else stream.basis("answer")
    answer_words(blueprint, blueprint.tokens("a"), rows, default="f0")
    p, q = (tuple(torch.randperm(N_WORDS, generator=generator).tolist()) for _ in range(2))
    return Pairs(blueprint, p, q)


def exclusive_or(p: int, q: int) -> int:
    """Return the answer of most tasks: the two lowest bits of p and q, bit by bit exclusive-or."""
    return (p ^ q) & 3


def _shuffled(generator: torch.Generator) -> list[tuple[int, int]]:
    order = torch.randperm(N_WORDS * N_WORDS, generator=generator).tolist()
    return [divmod(number, N_WORDS) for number in order]
