"""How far apart two distributions over tokens are."""

from __future__ import annotations

from math import log

import torch
from jaxtyping import Float
from torch import Tensor


def jensen_shannon(a: Float[Tensor, "*row token"], b: Float[Tensor, "*row token"]) -> Float[Tensor, "*row"]:
    """Return the Jensen-Shannon divergence of rows of log-probabilities, in nats; between 0 and log 2."""
    middle = torch.logaddexp(a, b) - log(2)
    return ((_kl(a, middle) + _kl(b, middle)) / 2).clamp(0, log(2))


def kullback_leibler(a: Float[Tensor, "*row token"], b: Float[Tensor, "*row token"]) -> Float[Tensor, "*row"]:
    """Return KL(a || b) of rows of log-probabilities, in nats; infinite where b rules out what a does not."""
    return _kl(a, b).clamp_min(0)


def entropy(a: Float[Tensor, "*row token"]) -> Float[Tensor, "*row"]:
    """Return the entropy of rows of log-probabilities, in nats."""
    return -torch.where(a > -torch.inf, a.exp() * a, 0).sum(-1)


def _kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > -torch.inf, a.exp() * (a - b), 0).sum(-1)
