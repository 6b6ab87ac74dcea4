"""Dividing labelled rows into training, validation and test parts, and refusing data that cannot be divided."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import train_test_split

from probes.errors import ProbeError

TEST, VALIDATION = 0.4, 0.15
"""Shares of the rows (or groups) in the test and the validation part."""

Index = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """Row indices of each part; validation is empty where nothing is chosen on it."""

    train: Index
    validation: Index
    test: Index

    @property
    def fitted(self) -> Index:
        """Return the rows of the final fit: training and validation."""
        return np.concatenate([self.train, self.validation])


def check_labels(labels: ArrayLike) -> NDArray[np.int64]:
    """Return the labels [rows] as 0 and 1.

    Raises:
        ProbeError: none at all, a label that is not 0 or 1, or one class only.
    """
    given = np.asarray(labels)
    if given.ndim != 1 or given.size == 0:
        raise ProbeError(f"labels have shape {given.shape}: give one label, 0 or 1, per row")
    for row, label in enumerate(given.tolist()):
        if label not in (0, 1):
            raise ProbeError(f"row {row} has label {label!r}: legal labels are 0 and 1")
    values = given.astype(np.int64)
    if values.min() == values.max():
        raise ProbeError(
            f"all {len(values)} rows have label {values[0]}: a probe tells two classes apart; add rows with label {1 - values[0]}"
        )
    return values


def check_groups(groups: ArrayLike | None, n: int) -> Index:
    """Return the groups [rows] as numbers from 0; every row is its own group where there are none.

    Raises:
        ProbeError: not one group per row.
    """
    if groups is None:
        return np.arange(n)
    names = np.asarray(groups)
    if names.shape != (n,):
        raise ProbeError(f"{names.size} groups for {n} rows: give one group per row")
    return np.unique(names, return_inverse=True)[1]


def type_labels(types: Index, rng: np.random.Generator) -> NDArray[np.int64]:
    """Give each type a random label; returns the label of each row, for types [rows] numbered from 0.

    Of two types about as frequent one gets 0 and one 1, so that guessing the commoner label gains little.
    """
    n = int(types.max()) + 1
    drawn = rng.permutation(n)
    order = drawn[np.argsort(-np.bincount(types, minlength=n)[drawn], kind="stable")]
    pairs = np.stack([first := rng.integers(0, 2, size=-(-n // 2)), 1 - first], axis=1).ravel()[:n]
    dealt = np.empty(n, dtype=np.int64)
    dealt[order] = pairs
    return dealt[types]


def row_split(labels: NDArray[np.int64], seed: int) -> Split:
    """Split rows 60/40 as they stand, without regard to class or group, as the authors of concept depth released it.

    Raises:
        ProbeError: a part would lack a class.
    """
    rows = np.arange(len(labels))
    if len(rows) < 4:
        raise ProbeError(f"{len(rows)} rows are too few for a training and a test part: give at least 4")
    train, test = train_test_split(rows, test_size=TEST, random_state=seed)
    split = Split(train, rows[:0], test)
    _check_parts(split, labels)
    return split


def group_split(labels: NDArray[np.int64], groups: Index, seed: int) -> Split:
    """Deal whole groups to training, validation and test, alike for groups of either or both classes.

    Raises:
        ProbeError: fewer rows of a class than parts, or too few groups for every part to see both classes.
    """
    for label in (0, 1):
        n = int((labels == label).sum())
        if n < 3:
            raise ProbeError(
                f"label {label} has {n} row(s), fewer than the 3 parts (training, validation, test): add rows"
            )
        holding = len(np.unique(groups[labels == label]))
        if holding < 3:
            raise ProbeError(
                f"the rows with label {label} lie in {holding} group(s), and groups are never divided between the 3 parts: "
                "give finer groups, or split over rows"
            )
    rng = np.random.default_rng(seed)
    holds = np.stack([np.bincount(groups[labels == label], minlength=groups.max() + 1) > 0 for label in (0, 1)])
    part = np.zeros(groups.max() + 1, dtype=np.int8)
    strata = [np.flatnonzero((holds[0] == zero) & (holds[1] == one)) for zero, one in ((1, 1), (1, 0), (0, 1))]
    # Ordered by what they hold, not by class, so that swapping the labels leaves the split as it is.
    for members in sorted((stratum for stratum in strata if len(stratum)), key=lambda stratum: int(stratum[0])):
        part[rng.permutation(members)] = _deal(len(members))
    of_row = part[groups]
    split = Split(*(np.flatnonzero(of_row == which) for which in (0, 1, 2)))
    _check_parts(split, labels)
    return split


def _deal(n: int) -> NDArray[np.int8]:
    """Return the parts of n groups: 2 is test, 1 validation, 0 training; every part gets one where there are three."""
    test, validation = (max(round(share * n), 1) if n >= 3 else 0 for share in (TEST, VALIDATION))
    return np.repeat(np.array([2, 1, 0], dtype=np.int8), [test, validation, n - test - validation])


def _check_parts(split: Split, labels: NDArray[np.int64]) -> None:
    for name in ("train", "validation", "test"):
        rows = getattr(split, name)
        if name == "validation" and not len(rows):
            continue
        if len(np.unique(labels[rows])) < 2:
            raise ProbeError(
                f"the {name} part of {len(rows)} rows holds one class only: give more rows or finer groups"
            )
