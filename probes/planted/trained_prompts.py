"""Vocabularies and tables of the trained models: facts of two words, two hops, repeated sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

BOS, ASK, VOCAB = 62, 63, 64
ENTITIES, RELATIONS, ANSWERS = 16, 16, 4
FIRST_RELATION, FIRST_ANSWER, FIRST_FILLER = 16, 32, 36
FACT_POSITIONS = {"e": 1, "r": 2, "ask": -1}

FIRST_BRIDGE, FIRST_END, FIRST_HOP_FILLER = 32, 40, 44
"""Of two hops: 32 first words, then 8 bridges, then 4 answers, then fillers."""

REPEATED_VOCAB, REPEATED_WIDTH, PERIOD, CUT = 16, 22, 9, 14
"""Of repeated sequences: they repeat `PERIOD` words and end at `CUT`."""


def latin_square(size: int, n_values: int, seed: int) -> Int[Tensor, "e r"]:
    """Return a shuffled Latin square of `size` symbols, each of which stands for one of `n_values` values.

    Every value is equally frequent in every row and column, so neither word alone says anything of it.
    """
    draw = torch.Generator().manual_seed(seed)
    rows, columns, symbols = (torch.randperm(size, generator=draw) for _ in range(3))
    return symbols[(rows[:, None] + columns) % size] % n_values


def fact_prompts(pairs: Int[Tensor, "batch 2"], draw: torch.Generator, n_fillers: int = 2) -> Int[Tensor, "batch pos"]:
    """Return prompts BOS e r f f ask of entity and relation numbers, with fillers drawn at random."""
    n = len(pairs)
    fillers = torch.randint(FIRST_FILLER, BOS, (n, n_fillers), generator=draw)
    columns = [torch.full((n, 1), BOS), pairs[:, :1], pairs[:, 1:] + FIRST_RELATION, fillers, torch.full((n, 1), ASK)]
    return torch.cat(columns, 1)


def hop_prompts(words: Int[Tensor, "batch"], draw: torch.Generator) -> Int[Tensor, "batch pos"]:
    """Return prompts BOS f f word."""
    n = len(words)
    fillers = torch.randint(FIRST_HOP_FILLER, BOS, (n, 2), generator=draw)
    return torch.cat([torch.full((n, 1), BOS), fillers, words[:, None]], 1)


@dataclass(frozen=True)
class Hops:
    """Two tables, one after the other."""

    bridge: Int[Tensor, "word"]
    """Number of the bridge of each first word."""
    end: Int[Tensor, "bridge"]
    """Number of the answer of each bridge."""

    @property
    def answer(self) -> Int[Tensor, "word"]:
        """Number of the answer of each first word."""
        return self.end[self.bridge]


def hops(seed: int) -> Hops:
    """Return balanced random tables: 4 first words a bridge, 2 bridges an answer."""
    draw = torch.Generator().manual_seed(seed)
    return Hops(torch.randperm(32, generator=draw) % 8, torch.randperm(8, generator=draw) % 4)


def repeated(rows: int, period: int, draw: torch.Generator) -> Int[Tensor, "rows pos"]:
    """Return sequences of `REPEATED_WIDTH` that repeat `period` distinct tokens."""
    once = torch.rand(rows, REPEATED_VOCAB, generator=draw).argsort(-1)[:, :period]
    return once.repeat(1, REPEATED_WIDTH // period + 1)[:, :REPEATED_WIDTH]
