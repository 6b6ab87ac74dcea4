"""How far rows read as distributions are from references, taken in one vocabulary tile after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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
        apart = self._of_rows(part, self.logits) - logits
        change = apart.mul_(self._of_rows(part, self.weights)).sum(dim=-1)
        self.difference[part] = self.difference[part] * self._of_rows(part, self.shrink) + change

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
        self.in_order = torch.equal(of, torch.arange(len(known.mass)))
        self.mean = torch.zeros(len(of), device=known.mass.device)

    def turn_to(self, tokens: slice, _: Callable[[Tensor], Tensor]) -> None:
        """Take up a tile of tokens."""
        self.weights = self.known.weights[:, tokens]

    def compare(self, part: slice, logits: Tensor) -> None:
        """Take in this tile's logits of some rows of the block."""
        weights = self.weights[part] if self.in_order else self.weights[self.of[part]]
        self.mean[part] += (weights * logits).sum(dim=-1)

    def kl(self, log_z: Tensor) -> Tensor:
        """Return KL(reference || row) of every row of the block, whose log-sum-exp of logits is given."""
        return (log_z - self.mean / self.known.mass[self.of] - self.known.entropy[self.of]).clamp_min(0)
