"""Means per layer over tokens of several prompts, and their intervals from resampled prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
RESAMPLES = 1000
LEVELS = (0.025, 0.975)


class PerPrompt:
    """Sums and counts of a quantity per prompt and column, from which means and their intervals follow."""

    def __init__(self, n_prompts: int, n_columns: int) -> None:
        self.sums = torch.zeros(n_prompts, n_columns, dtype=torch.float64)
        self.counts = torch.zeros(n_prompts, n_columns, dtype=torch.float64)

    def add(self, column: int, prompts: Tensor | Sequence[int], values: Tensor) -> None:
        """Values [n] of tokens of `prompts` [n]; NaN ones are left out."""
        index, values = torch.as_tensor(prompts), values.double().cpu()
        keep = ~values.isnan()
        self.sums[:, column].index_add_(0, index[keep], values[keep])
        self.counts[:, column].index_add_(0, index[keep], torch.ones(int(keep.sum()), dtype=torch.float64))

    def mean(self) -> Tensor:
        """[columns], over all tokens; NaN where there are none."""
        return self.sums.sum(0) / self.counts.sum(0)


def resampled(column: PerPrompt, seed: int, resamples: int = RESAMPLES) -> Array:
    """[resamples, columns], means over prompts drawn with replacement; the same seed draws the same prompts."""
    n = len(column.sums)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
    with np.errstate(invalid="ignore"):
        means: Array = (draws @ column.sums.numpy()) / (draws @ column.counts.numpy())
    return means


def interval(column: PerPrompt, seed: int) -> tuple[Array, Array, Array]:
    """(mean, low, high) per column, 95 % over resampled prompts; NaN where nothing was measured."""
    return column.mean().numpy(), *quantiles(resampled(column, seed))


def quantiles(draws: Array) -> tuple[Array, Array]:
    """(2.5 %, 97.5 %) along the first axis [draws, ...], leaving out NaN draws; NaN where no draw is left."""
    ordered = np.sort(draws, axis=0)
    known = np.isfinite(ordered).sum(axis=0)
    found = []
    for level in LEVELS:
        place = level * np.maximum(known - 1, 0)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(known - 1, 0))
        low, high = (np.take_along_axis(ordered, at[None], axis=0)[0] for at in (below, above))
        found.append(low + (high - low) * (place - below))
    return found[0], found[1]
