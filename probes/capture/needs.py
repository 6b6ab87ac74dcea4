"""What an analysis wants captured, and the union of all wants into one plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from probes.errors import PointError
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
        """Its name in the store; two addresses of the same tensor share it."""
        return f"{self.address.canonical}/{self.reducer}"

    def parents(self) -> tuple[Feature, ...]:
        """Features from which this one follows without a forward, cheapest first."""
        if self.reducer == ROWS:
            return ()
        same_rows = Reducer(positions=self.reducer.positions)
        found = [Feature(self.address, same_rows)] if same_rows not in (ROWS, self.reducer) else []
        return (*found, Feature(self.address))

    def row_values(self, width: Mapping[str, int], length: int) -> int:
        """Numbers kept of a sequence of `length` tokens; `width` gives the size of each axis."""
        rows = self.reducer.count(length)
        dims = POINTS[self.address.point].dims
        if self.address.point == "pattern":
            return width["head"] * rows * length
        per_row = {"rows": 0, "int8": 0, "mean": 0, "norm": 1, "moments": 3}.get(self.reducer.kind)
        if per_row is None:
            basis = self.reducer.basis
            per_row = len(self.reducer.ids) + 2 * self.reducer.top_k + (0 if basis is None else basis.shape[0])
        extra = TAIL if self.reducer.kind == "int8" else 0
        return rows * (per_row or int(np.prod([width[d] for d in dims if d != "pos"], dtype=int)) + extra)


@dataclass(frozen=True)
class Need:
    """What an analysis wants captured: points (patterns such as `resid_post.*`) reduced in one way."""

    points: str | tuple[str, ...]
    reducer: Reducer = ROWS

    def features(self, n_layers: int) -> list[Feature]:
        """Its features in a model of `n_layers`, resolved to stored addresses."""
        addresses = expand(self.points, n_layers)
        for address in addresses:
            if address.point == "pattern" and self.reducer.kind != "rows":
                raise PointError(f"point 'pattern' keeps rows only, not {self.reducer.kind!r}")
        return [Feature(address.canonical, self.reducer) for address in addresses]


class Held(Protocol):
    """What a plan asks of a store: which sequence has which feature; bool [sequences, features]."""

    def __call__(self, sequences: Sequence[tuple[int, ...]], features: Sequence[Feature]) -> np.ndarray: ...


@dataclass(frozen=True)
class Work:
    """Sequences that lack the same features."""

    sequences: tuple[tuple[int, ...], ...]
    features: tuple[Feature, ...]


@dataclass(frozen=True)
class CapturePlan:
    """The forwards that remain, and what they will keep."""

    work: tuple[Work, ...]
    sequences: int
    """Distinct sequences asked for."""
    features: int
    """Features asked for per sequence, after those that follow from others are dropped."""
    held: int
    """(sequence, feature) pairs the store already holds."""

    @property
    def forwards(self) -> int:
        """Sequences that need a forward pass."""
        return sum(len(work.sequences) for work in self.work)

    @property
    def tokens(self) -> int:
        """Tokens to run through the model."""
        return sum(len(sequence) for work in self.work for sequence in work.sequences)

    @property
    def rows(self) -> int:
        """Rows to be captured."""
        return sum(f.reducer.count(len(s)) for w in self.work for s in w.sequences for f in w.features)

    def summary(self, size: int) -> str:
        """The plan in one line; `size` is what it will capture, in bytes."""
        if not self.forwards:
            return f"plan: no forward pass; the store holds {count(self.held, 'feature')} of {count(self.sequences, 'prompt')}"
        return (
            f"plan: {self.forwards:,} of {count(self.sequences, 'prompt')} to run ({count(self.tokens, 'token')}); "
            f"{count(self.rows, 'row')}, {count(size, 'byte')}; {count(self.held, 'feature')} already held"
        )

    def bytes(self, width: Mapping[str, int], row_size: int) -> int:
        """Bytes of the tensors to be captured; `row_size` is the size of one captured number."""
        size = {"rows": row_size, "int8": 1}
        return sum(
            feature.row_values(width, len(sequence)) * size.get(feature.reducer.kind, 4)
            for work in self.work
            for sequence in work.sequences
            for feature in work.features
        )


def features_of(needs: Iterable[Need], n_layers: int) -> tuple[Feature, ...]:
    """The union of all needs, without those that follow from another wanted feature."""
    wanted = dict.fromkeys(feature for need in needs for feature in need.features(n_layers))
    return tuple(f for f in wanted if not any(parent in wanted for parent in f.parents()))


def make_plan(sequences: Sequence[tuple[int, ...]], needs: Iterable[Need], n_layers: int, held: Held) -> CapturePlan:
    """What must still be captured so that every sequence has every need."""
    distinct = list(dict.fromkeys(sequences))
    features = features_of(needs, n_layers)
    if not features:
        return CapturePlan((), len(distinct), 0, 0)
    candidates = list(dict.fromkeys(c for f in features for c in (f, *f.parents())))
    column = {candidate: i for i, candidate in enumerate(candidates)}
    table = held(distinct, candidates)
    has = np.stack([table[:, [column[c] for c in (f, *f.parents())]].any(axis=1) for f in features], axis=1)
    groups: dict[tuple[Feature, ...], list[tuple[int, ...]]] = {}
    for row, sequence in enumerate(distinct):
        missing = tuple(f for i, f in enumerate(features) if not has[row, i])
        if missing:
            groups.setdefault(missing, []).append(sequence)
    work = tuple(Work(tuple(group), missing) for missing, group in groups.items())
    return CapturePlan(work, len(distinct), len(features), int(has.sum()))
