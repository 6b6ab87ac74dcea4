"""Sequences of different lengths: selected from, and batched with padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from probes.errors import PromptError


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one rectangle."""

    indices: tuple[int, ...]
    """Position of each row's sequence in the list that was batched."""
    tokens: Int[Tensor, "batch pos"]
    """Token ids; pads are id 0."""
    lengths: tuple[int, ...]

    def row_index(self, positions: str | tuple[int, ...] = "all") -> Int[Tensor, row]:
        """Return flat indices into [batch * pos] of the real rows at `positions`, sequence by sequence."""
        width = self.tokens.shape[1]
        parts = [row * width + select(n, positions) for row, n in enumerate(self.lengths)]
        return torch.cat(parts)


def select(length: int, positions: str | tuple[int, ...]) -> Int[Tensor, row]:
    """Return the positions of a sequence of `length` tokens named by `all`, `last`, `after_first` or ints (negative from the end).

    `after_first` leaves out the first token, whose norm can dwarf the others'; a sequence of one token keeps it.

    Raises:
        PromptError: a position outside the sequence.
    """
    if positions == "all":
        return torch.arange(length)
    if positions == "after_first":
        return torch.arange(min(1, length - 1), length)
    named = (-1,) if positions == "last" else positions
    for position in named:
        if not -length <= int(position) < length:
            raise PromptError(
                f"position {position} is outside a prompt of {length} tokens: legal are {-length} to {length - 1}"
            )
    return torch.tensor([int(p) % length for p in named], dtype=torch.long)


def batches(sequences: Sequence[Sequence[int]], max_tokens: int) -> Iterator[Batch]:
    """Yield batches of similar length whose padded size is at most `max_tokens` (a longer sequence goes alone)."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    group: list[int] = []
    for index in order:
        if group and len(sequences[index]) * (len(group) + 1) > max_tokens:
            yield _pad(sequences, group)
            group = []
        group.append(index)
    if group:
        yield _pad(sequences, group)


def _pad(sequences: Sequence[Sequence[int]], group: list[int]) -> Batch:
    lengths = tuple(len(sequences[i]) for i in group)
    tokens = torch.zeros(len(group), max(lengths), dtype=torch.long)
    for row, index in enumerate(group):
        tokens[row, : lengths[row]] = torch.tensor(sequences[index], dtype=torch.long)
    return Batch(tuple(group), tokens, lengths)
