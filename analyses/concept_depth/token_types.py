"""The token type that a control task deals its random labels to: one that occurs in training and in test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST = 4
"""Fewest recurring types of a control task: of two or three, random labels are too often the labels themselves."""
COVERED = 0.5
"""Share of the rows that must have a recurring type."""


@dataclass(frozen=True)
class TokenTypes:
    """Which token of each prompt is its type."""

    position: int
    """Where the token stands: from 0, or negative from the end."""
    of: NDArray[np.int64]
    """[rows], its id."""
    n: int
    """Types that occur in at least two groups."""


def token_types(sequences: Sequence[Sequence[int]], groups: Sequence[object]) -> TokenTypes | None:
    """The position, counted from either end, at which most token types recur between groups; None where too few do.

    A probe that reads the concept off a token's identity can as well read off it any label dealt to that token; a position
    of the template, where all prompts agree, has one type only. Of equal positions the one nearest the end is taken.
    """
    shortest = min(map(len, sequences))
    _, group = np.unique(np.asarray([str(g) for g in groups]), return_inverse=True)
    best: TokenTypes | None = None
    for position in (*range(-1, -shortest - 1, -1), *range(shortest)):
        ids = np.array([sequence[position] for sequence in sequences], dtype=np.int64)
        recurring = _recurring(ids, group)
        if np.isin(ids, recurring).mean() >= COVERED and len(recurring) > max(LEAST - 1, best.n if best else 0):
            best = TokenTypes(position, ids, len(recurring))
    return best


def _recurring(ids: NDArray[np.int64], group: NDArray[np.intp]) -> NDArray[np.int64]:
    """The ids that occur in two groups or more."""
    pairs = np.unique(np.stack([ids, group]), axis=1)
    types_seen, counts = np.unique(pairs[0], return_counts=True)
    return types_seen[counts > 1]
