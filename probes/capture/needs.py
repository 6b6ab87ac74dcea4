"""What an analysis needs captured, and the union of all needs as one plan of what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from probes.errors import PointError, shown
from probes.html_card import count
from probes.points import POINTS, Address, expand
from probes.reducers import ROWS, TAIL, Reducer


@dataclass(frozen=True)
class Feature:
    """One stored quantity: a point at a layer, reduced."""

    address: Address
    reducer: Reducer = ROWS

    @property
    def key(self) -> str:
        """The feature's name in the store; two addresses of the same tensor share it."""
        return f"{self.address.canonical}/{self.reducer}"

    def parents(self) -> tuple[Feature, ...]:
        """Return the features from which this one follows without a forward, cheapest first."""
        if self.reducer == ROWS:
            return ()
        same_rows = Reducer(positions=self.reducer.positions)
        selected = [Feature(self.address, same_rows)] if same_rows not in (ROWS, self.reducer) else []
        return (*selected, Feature(self.address))

    def row_values(self, width: Mapping[str, int], length: int) -> int:
        """Return how many numbers are kept of a sequence of `length` tokens; `width` gives the size of each axis."""
        rows = self.reducer.count(length)
        dims = POINTS[self.address.point].dims
        if self.address.point == "pattern":
            return width["head"] * rows * length
        per_row = {"rows": 0, "int8": 0, "mean": 0, "mean_square": 0, "norm": 1, "moments": 3}.get(self.reducer.kind)
        if per_row is None:
            basis = self.reducer.basis
            per_row = len(self.reducer.ids) + 2 * self.reducer.top_k + (0 if basis is None else basis.shape[0])
        extra = TAIL if self.reducer.kind == "int8" else 0
        return rows * (per_row or int(np.prod([width[d] for d in dims if d != "pos"], dtype=int)) + extra)


@dataclass(frozen=True)
class Need:
    """What an analysis needs captured: points (patterns such as `resid_post.*`) reduced in one way."""

    points: str | tuple[str, ...]
    reducer: Reducer = ROWS

    def features(self, n_layers: int) -> list[Feature]:
        """Return its features in a model of `n_layers`, resolved to stored addresses.

        Raises:
            PointError: a point or layer that does not exist, or attention patterns reduced.
        """
        addresses = expand(self.points, n_layers)
        for address in addresses:
            if address.point == "pattern" and self.reducer.kind != "rows":
                raise PointError(f"point 'pattern' keeps rows only, not {self.reducer.kind!r}")
        return [Feature(address.canonical, self.reducer) for address in addresses]


def as_needs(needs: Need | str | Iterable[Need | str]) -> list[Need]:
    """Return needs as given to a capture, one or several; the text of points stands for a `Need` of their rows.

    Raises:
        PointError: something that names no points.
    """
    several = [needs] if isinstance(needs, Need | str) else needs
    if not isinstance(several, Iterable):
        raise PointError(f"needs {shown(needs)}: give a list of Need or of points such as 'resid_post.*'")
    return [_as_need(need) for need in several]


def _as_need(need: Need | str) -> Need:
    if isinstance(need, str):
        return Need(need)
    if not isinstance(need, Need):
        raise PointError(f"need {shown(need)} is neither a Need nor the text of points such as 'resid_post.*'")
    return need


Stored = Callable[[Sequence[tuple[int, ...]], Sequence[Feature]], np.ndarray]
"""What a plan asks of a store: which of the sequences has which of the features; bool [sequences, features]."""


@dataclass(frozen=True)
class MissingRows:
    """Sequences that lack the same features."""

    sequences: tuple[tuple[int, ...], ...]
    features: tuple[Feature, ...]


@dataclass(frozen=True)
class CapturePlan:
    """The forwards that remain, and what they will keep."""

    missing: tuple[MissingRows, ...]
    """What has to be captured, by the features that are missing."""
    sequences: int
    """Distinct sequences that were requested."""
    features: int
    """Requested features per sequence, without those that follow from others."""
    stored: int
    """(sequence, feature) pairs the store already holds."""

    @property
    def forwards(self) -> int:
        """Number of sequences that need a forward pass."""
        return sum(len(rows.sequences) for rows in self.missing)

    @property
    def tokens(self) -> int:
        """Number of tokens to run through the model."""
        return sum(len(sequence) for rows in self.missing for sequence in rows.sequences)

    @property
    def rows(self) -> int:
        """Number of rows to be captured."""
        return sum(f.reducer.count(len(s)) for rows in self.missing for s in rows.sequences for f in rows.features)

    def summary(self, size: int) -> str:
        """Return the plan in one line; `size` is what it will capture, in bytes."""
        if not self.forwards:
            return f"plan: no forward pass; the store holds {count(self.stored, 'feature')} of {count(self.sequences, 'prompt')}"
        return (
            f"plan: {self.forwards:,} of {count(self.sequences, 'prompt')} to run ({count(self.tokens, 'token')}); "
            f"{count(self.rows, 'row')}, {count(size, 'byte')}; {count(self.stored, 'feature')} already held"
        )

    def bytes(self, width: Mapping[str, int], row_size: int) -> int:
        """Return the bytes to be captured.

        Args:
            width: the size of each axis of the point table.
            row_size: bytes of one number of a captured row.
        """
        size = {"rows": row_size, "int8": 1}
        return sum(
            feature.row_values(width, len(sequence)) * size.get(feature.reducer.kind, 4)
            for rows in self.missing
            for sequence in rows.sequences
            for feature in rows.features
        )


def features_of(needs: Iterable[Need], n_layers: int) -> tuple[Feature, ...]:
    """Return the features of all needs, without those that follow from another of them."""
    features = dict.fromkeys(feature for need in needs for feature in need.features(n_layers))
    return tuple(f for f in features if not any(parent in features for parent in f.parents()))


def make_plan(
    sequences: Sequence[tuple[int, ...]], needs: Iterable[Need], n_layers: int, stored: Stored
) -> CapturePlan:
    """Return what must still be captured so that every sequence has every need."""
    distinct = list(dict.fromkeys(sequences))
    features = features_of(needs, n_layers)
    if not features:
        return CapturePlan((), len(distinct), 0, 0)
    candidates = list(dict.fromkeys(c for f in features for c in (f, *f.parents())))
    column = {candidate: i for i, candidate in enumerate(candidates)}
    table = stored(distinct, candidates)
    has = np.stack([table[:, [column[c] for c in (f, *f.parents())]].any(axis=1) for f in features], axis=1)
    groups: dict[tuple[Feature, ...], list[tuple[int, ...]]] = {}
    for row, sequence in enumerate(distinct):
        missing = tuple(f for i, f in enumerate(features) if not has[row, i])
        if missing:
            groups.setdefault(missing, []).append(sequence)
    rows = tuple(MissingRows(tuple(group), missing) for missing, group in groups.items())
    return CapturePlan(rows, len(distinct), len(features), int(has.sum()))
