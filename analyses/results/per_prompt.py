"""Means per layer over tokens of several prompts, and their intervals from resampled prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from analyses.results.statistics import RESAMPLES, Array, percentiles, resampled_ratios


class PerPrompt:
    """Sums and counts of a quantity per prompt and column, from which means and their intervals follow."""

    def __init__(self, n_prompts: int, n_columns: int) -> None:
        self.sums = torch.zeros(n_prompts, n_columns, dtype=torch.float64)
        self.counts = torch.zeros(n_prompts, n_columns, dtype=torch.float64)

    def add(self, column: int, prompts: Int[Tensor, " n"] | Sequence[int], values: Float[Tensor, " n"]) -> None:
        """Add values [n] of tokens of `prompts` [n]; NaN ones are left out."""
        index, values = torch.as_tensor(prompts), values.double().cpu()
        keep = ~values.isnan()
        self.sums[:, column].index_add_(0, index[keep], values[keep])
        self.counts[:, column].index_add_(0, index[keep], torch.ones(int(keep.sum()), dtype=torch.float64))

    def mean(self) -> Float[Tensor, " columns"]:
        """Return the mean over all tokens, [columns]; NaN where there are none."""
        return self.sums.sum(0) / self.counts.sum(0)

    def prompts(self) -> NDArray[np.int64]:
        """Return how many prompts have tokens in each column, [columns]."""
        return np.asarray((self.counts > 0).sum(0).numpy())


def resampled(column: PerPrompt, seed: int, resamples: int = RESAMPLES) -> Array:
    """Return means over prompts drawn with replacement, [resamples, columns]; the same seed draws the same prompts."""
    return resampled_ratios(column.sums.numpy(), column.counts.numpy(), seed=seed, resamples=resamples)


def interval(column: PerPrompt, seed: int) -> tuple[Array, Array, Array]:
    """Return (mean, low, high) per column, 95 % over resampled prompts; NaN where too little was measured."""
    return column.mean().numpy(), *percentiles(resampled(column, seed), column.prompts())
