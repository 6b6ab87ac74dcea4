"""Groups of texts: which tokens count, texts dealt to groups at random, and texts drawn with replacement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from analyses.results.statistics import MIN_CLUSTERS, Array, draw_counts, percentiles, quantiles
from probes.capture.activations import Activations
from probes.points import Address

LEAST_DEALS = 40
"""Ways of dealing texts to two groups from which on a 95 % band of them leaves any out at either end."""
DEALS = 100
"""Random regroupings of the texts behind the control."""

Rows = list[Float[Tensor, "pos width"]]
"""The rows of each text at one place of the model."""
Statistic = Callable[[Array, Array], Array]
"""A comparison of two groups from how often each text belongs to either, both [draws, texts], as [draws]."""


@dataclass(frozen=True)
class Compared:
    """A comparison of two groups of texts."""

    value: float
    low: float
    high: float
    """95 % of what texts dealt to the groups at random give; NaN where there are too few ways of dealing them."""
    ci_low: float
    ci_high: float
    """95 % over the texts of both groups, drawn with replacement; NaN below six texts of either."""

    def columns(self, name: str) -> dict[str, float]:
        """Return the value and both pairs of bounds under `name`."""
        ends = {"_low": self.low, "_high": self.high, "_ci_low": self.ci_low, "_ci_high": self.ci_high}
        return {name: self.value, **{name + end: value for end, value in ends.items()}}


def names_of(groups: Sequence[str]) -> list[str]:
    """Return the name of each group, in the order of its first text; texts of the empty name are in none."""
    return [name for name in dict.fromkeys(groups) if name]


def group_rows(activations: Activations, address: Address, first_token: bool) -> Rows:
    """Return each text's rows, float32, heads side by side, without its first token unless it counts or is the only one."""
    rows = activations.get(address)
    return [(h if first_token or len(h) == 1 else h[1:]).flatten(1).float() for h in rows]


def token_counts(activations: Activations, first_token: bool) -> list[int]:
    """Return how many rows `group_rows` gives of each text."""
    return [max(1, len(tokens) - (not first_token)) for tokens in activations.sequences]


def unit(rows: Float[Tensor, "*rest width"]) -> Float[Tensor, "*rest width"]:
    """Return rows scaled to length 1; a zero row stays."""
    return torch.nn.functional.normalize(rows, dim=-1)


def centred(rows: Rows, groups: Sequence[str]) -> Rows:
    """Return rows without the mean of all tokens of texts in a group, since streams share a large common direction."""
    mean = torch.cat([h for h, group in zip(rows, groups, strict=True) if group]).mean(0)
    return [h - mean for h in rows]


class Regroupings:
    """Two groups of texts, with the random ways of regrouping them that controls and intervals need.

    Args:
        groups: the group of each text.
    """

    def __init__(self, groups: Sequence[str], a: str, b: str, seed: int) -> None:
        self.in_a, self.in_b = (np.array([group == name for group in groups], dtype=np.float64) for name in (a, b))
        self.dealt = deals(self.in_a, self.in_b, seed)
        self.drawn = redrawn(self.in_a, seed), redrawn(self.in_b, seed + 1)

    def compared(self, statistic: Statistic) -> Compared:
        """Return a comparison of the two groups with its control and interval."""
        value = float(statistic(self.in_a[None], self.in_b[None])[0])
        low, high = (np.nan, np.nan) if self.dealt is None else quantiles(statistic(*self.dealt))
        clusters = int(min(self.in_a.sum(), self.in_b.sum()))
        ci_low, ci_high = (
            percentiles(statistic(*self.drawn), clusters) if clusters >= MIN_CLUSTERS else (np.nan, np.nan)
        )
        return Compared(value, float(low), float(high), float(ci_low), float(ci_high))


def deals(in_a: Array, in_b: Array, seed: int, n: int = DEALS) -> tuple[Array, Array] | None:
    """Deal the texts of two groups to groups of the same sizes at random; [n, texts] each, None where few deals exist."""
    members = np.flatnonzero(in_a + in_b)
    size = int(in_a.sum())
    if comb(len(members), size) < LEAST_DEALS:
        return None
    rng = np.random.default_rng(seed)
    first = np.zeros((n, len(in_a)))
    for row in first:
        row[rng.permutation(members)[:size]] = 1
    return first, (in_a + in_b)[None] - first


def redrawn(inside: Array, seed: int) -> Array:
    """Draw a group's texts with replacement; [draws, texts], how often each is drawn."""
    members = np.flatnonzero(inside)
    counts = draw_counts(len(members), seed)
    out = np.zeros((len(counts), len(inside)))
    out[:, members] = counts
    return out
