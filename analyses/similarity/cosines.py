"""Cosines between two groups of texts, in every form that Shukor and Cord (2024) release, from sums over pairs of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from analyses.results.statistics import Array
from analyses.similarity.groups import Regroupings, Rows, Statistic, unit

PAIRED = ("min", "max", "median", "best_text")
"""Reductions of the cosines between the tokens of two texts, averaged over pairs of texts; `best_text` is the mean over the
first text's tokens of their highest cosine with the second's."""


class Cosines:
    """What group comparisons are made of, for texts at one place (`first`) against texts at another (`second`).

    A comparison of two groups of texts, however they are dealt or drawn, is a sum over pairs of texts. So the tokens
    are compared once, and a thousand regroupings cost products of small matrices.

    Args:
        first, second: each text's rows [pos, width]; the same list where both groups are read at one place.
    """

    def __init__(self, first: Rows, second: Rows) -> None:
        self._first, self._second = first, second
        self._counts = np.array([len(h) for h in first], dtype=np.float64)
        self._counts_second = np.array([len(h) for h in second], dtype=np.float64)

    def statistics(self) -> Mapping[str, Statistic]:
        """Return the comparisons by the column that holds them."""
        statistics: dict[str, Statistic] = {"mean_cosine": self._mean, "pair_cosine": self._pair}
        statistics |= {"text_cosine": partial(_mean_pair, self._texts), "best_cosine": self._best}
        return statistics | {f"{name}_cosine": partial(_mean_pair, self._pairs[name]) for name in PAIRED}

    def table(self, pair: Regroupings) -> dict[str, float]:
        """Return every comparison of two groups with its bounds, by column."""
        columns: dict[str, float] = {}
        for name, statistic in self.statistics().items():
            columns |= pair.compared(statistic).columns(name)
        return columns

    def within(self, groups: Sequence[str], name: str) -> float:
        """Return the mean cosine of tokens of two different texts of one group; NaN for a group of one text."""
        members = np.array([group == name for group in groups], dtype=np.float64)
        off = np.outer(members, members) * (1 - np.eye(len(members)))
        counts = np.outer(self._counts, self._counts_second)
        return float((off * self._sums).sum() / (off * counts).sum()) if (off * counts).sum() else float("nan")

    @cached_property
    def _grams(self) -> tuple[Array, Array, Array]:
        """Products of the texts' summed rows: first with first, first with second, second with second."""
        first, second = (torch.stack([h.double().sum(0) for h in rows]) for rows in (self._first, self._second))
        return tuple((x @ y.T).numpy() for x, y in ((first, first), (first, second), (second, second)))  # type: ignore[return-value]

    def _mean(self, a: Array, b: Array) -> Array:
        """Cosine of the two groups' means."""
        grams = zip(self._grams, ((a, a), (a, b), (b, b)), strict=True)
        same_a, across, same_b = (_across(x, gram, y) for gram, (x, y) in grams)
        return _ratio(across, np.sqrt(same_a * same_b))

    @cached_property
    def _sums(self) -> Array:
        """Sums of the cosines of all pairs of tokens of two texts: products of the sums of unit rows."""
        first, second = (torch.stack([unit(h.double()).sum(0) for h in rows]) for rows in (self._first, self._second))
        return np.asarray((first @ second.T).numpy())

    def _pair(self, a: Array, b: Array) -> Array:
        """Mean cosine of all pairs of tokens."""
        across = _across(a, self._sums, b)
        return _ratio(across, (a @ self._counts) * (b @ self._counts_second))

    @cached_property
    def _texts(self) -> Array:
        """Cosines of texts, each one vector: the mean of its rows."""
        first, second = (unit(torch.stack([h.double().mean(0) for h in rows])) for rows in (self._first, self._second))
        return np.asarray((first @ second.T).numpy())

    @cached_property
    def _reduced(self) -> tuple[Mapping[str, Array], Array]:
        """Per reduction a matrix [text, text]; and per token of the first texts its highest cosine with each second text."""
        n, longest = len(self._second), max(map(len, self._second))
        padded = torch.full((n, longest, self._second[0].shape[-1]), torch.nan)
        for i, h in enumerate(self._second):
            padded[i, : len(h)] = unit(h)
        missing = padded[..., 0].isnan()
        padded = padded.nan_to_num()
        rows: dict[str, list[Tensor]] = {name: [] for name in PAIRED}
        highest = []
        for h in self._first:
            cosine = torch.einsum("td,nsd->nts", unit(h), padded)
            gone = missing[:, None].expand_as(cosine)
            best = cosine.masked_fill(gone, -torch.inf).amax(-1)
            rows["best_text"].append(best.mean(-1))
            rows["max"].append(best.amax(-1))
            rows["min"].append(cosine.masked_fill(gone, torch.inf).flatten(1).amin(-1))
            rows["median"].append(cosine.masked_fill(gone, torch.nan).flatten(1).nanmedian(-1).values)
            highest.append(best.T)
        return {name: torch.stack(r).double().numpy() for name, r in rows.items()}, torch.cat(highest).double().numpy()

    @property
    def _pairs(self) -> Mapping[str, Array]:
        return self._reduced[0]

    def _best(self, a: Array, b: Array) -> Array:
        """Mean over the tokens of the first group of their highest cosine with any of the second's."""
        highest = self._reduced[1]
        weights = np.repeat(a, self._counts.astype(int), axis=1)
        best = np.array([highest[:, inside].max(axis=1) for inside in b > 0])
        return _ratio((weights * best).sum(1), weights.sum(1))


def _mean_pair(matrix: Array, a: Array, b: Array) -> Array:
    """Mean of [text, text] over the pairs of two groups."""
    across = _across(a, matrix, b)
    return _ratio(across, a.sum(1) * b.sum(1))


def _across(a: Array, matrix: Array, b: Array) -> Array:
    """Sum of [text, text] over the pairs of two groups, as often as either has each text."""
    return np.asarray(((a @ matrix) * b).sum(1))


def _ratio(above: Array, below: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(above / below)
