"""How much of its attention the last position gives to a passage, and how far attention changes without it."""

from __future__ import annotations

from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.similarity.divergence import jensen_shannon


def passage_mass(pattern: Float[Tensor, "head key"], span: tuple[int, int]) -> Float[Tensor, " head"]:
    """Return each head's attention to the positions of the passage."""
    return pattern[:, span[0] : span[1]].double().sum(-1).clamp(0, 1)


def masked_divergence(mass: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Return the Jensen-Shannon divergence of an attention row from itself without a passage of this mass, nats.

    The row without the passage is the same row, the passage's scores at minus infinity and the rest grown to sum 1. So the
    mass alone decides: half of m log 2 + (1 - m) log(2(1 - m)/(2 - m)) + log(2/(2 - m)).
    """
    mass = mass.double()
    kept = torch.special.xlogy(1 - mass, 2 * (1 - mass) / (2 - mass))
    return ((mass * log(2) + kept + torch.log(2 / (2 - mass))) / 2).clamp(0, log(2))


def row_divergence(a: Float[Tensor, "head key"], b: Float[Tensor, "head key"]) -> Float[Tensor, " head"]:
    """Return the Jensen-Shannon divergence of two attention rows of each head, nats."""
    return jensen_shannon(a.double().log(), b.double().log())
