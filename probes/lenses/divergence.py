"""How far rows read as distributions are from references, taken in one vocabulary tile after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

SLICE = 2**19
"""Logits that are worked on at once on a processor: they then stay in its cache from one operation to the next."""


def slices(logits: Float[Tensor, "row token"], first: int = 0) -> Iterator[tuple[slice, Tensor]]:
    """Give some rows of a tile at a time, each with its place, counted from `first`."""
    size = len(logits) if logits.device.type != "cpu" else max(1, SLICE // max(1, logits.shape[1]))
    for start in range(0, len(logits), size or 1):
        part = logits[start : start + size]
        yield slice(first + start, first + start + len(part)), part


@dataclass(frozen=True, eq=False)
class Distributions:
    """Distributions known at every token, so that comparing a row with one is a single product."""

    weights: Float[Tensor, "row d_vocab"]
    """Proportional to the probabilities, the largest of each row 1."""
    mass: Float[Tensor, " row"]
    """What a row's weights add up to."""
    entropy: Float[Tensor, " row"]
    """In nats."""


class ReferenceRows:
    """A block of normalised reference rows, and which of them each row of the block is compared to."""

    def __init__(self, hidden: Tensor, of: Tensor) -> None:
        self.hidden, self.of = hidden, of.to(hidden.device)
        self.in_order = torch.equal(of, torch.arange(len(hidden)))
        self.high = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        self.mass = torch.zeros(len(hidden), device=hidden.device)
        self.difference = torch.zeros(len(of), device=hidden.device)

    def turn_to(self, _: slice, logits_of: Callable[[Tensor], Tensor]) -> None:
        """Take up a tile of tokens: the references' logits, exp(logits - running maximum), and how earlier sums shrink."""
        self.logits = logits_of(self.hidden)
        high = torch.maximum(self.high, self.logits.amax(dim=-1))
        self.shrink = (self.high - high).exp()
        self.weights = (self.logits - high[:, None]).exp_()
        self.mass = self.mass * self.shrink + self.weights.sum(dim=-1)
        self.high = high

    def compare(self, part: slice, logits: Tensor) -> None:
        """Take in this tile's logits of some rows of the block."""
        for own, values in slices(logits, part.start):
            apart = self._of_rows(own, self.logits) - values
            change = apart.mul_(self._of_rows(own, self.weights)).sum(dim=-1)
            self.difference[own] = self.difference[own] * self._of_rows(own, self.shrink) + change

    def kl(self, log_z: Tensor) -> Tensor:
        """Return KL(reference || row) of every row of the block, whose log-sum-exp of logits is given."""
        log_z_here = self.high + self.mass.log()
        return (self.difference / self.mass[self.of] - log_z_here[self.of] + log_z).clamp_min(0)

    def _of_rows(self, part: slice, values: Tensor) -> Tensor:
        return values[part] if self.in_order else values[self.of[part]]


class KnownReference:
    """Known distributions, and which of them each row of a block is compared to: KL(p || q) = -H(p) - sum(p * logits) + log_z."""

    def __init__(self, known: Distributions, of: Tensor) -> None:
        self.known, self.of = known, of.to(known.mass.device)
        self.mean = torch.zeros(len(of), device=known.mass.device)

    def turn_to(self, tokens: slice, _: Callable[[Tensor], Tensor]) -> None:
        """Take up a tile of tokens."""
        self.weights = self.known.weights[:, tokens]

    def compare(self, part: slice, logits: Tensor) -> None:
        """Take in this tile's logits of some rows of the block."""
        for own, values in slices(logits, part.start):
            of = self.of[own]
            first, end = int(of[0]), int(of[0]) + len(of)
            # References in a row are read where they lie.
            in_a_row = end <= len(self.weights) and torch.equal(of, torch.arange(first, end, device=of.device))
            weights = self.weights[first:end] if in_a_row else self.weights[of]
            self.mean[own] += (weights * values).sum(dim=-1)

    def kl(self, log_z: Tensor) -> Tensor:
        """Return KL(reference || row) of every row of the block, whose log-sum-exp of logits is given."""
        return (log_z - self.mean / self.known.mass[self.of] - self.known.entropy[self.of]).clamp_min(0)
