"""What an analysis wants captured, and the union of all wants into one plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash
from torch import Tensor

from probes.display import count
from probes.errors import PointError, unknown
from probes.points import POINTS, Address, expand

Positions = str | tuple[int, ...]
"""`all`, `last`, `after_first`, or positions (negative from the end)."""

KINDS = ("rows", "int8", "mean", "norm", "moments", "project", "lens_ids", "lens_top")
NAMED = ("rows", "int8", "mean", "norm", "moments")
"""Those that a command line asks for by name alone."""
TAIL = 8
"""Bytes behind the codes of an int8 row: its scale and its error, float32 each."""


@dataclass(frozen=True)
class Reducer:
    """What is kept of a captured tensor [pos, ...]; everything but `rows` and `int8` is float32.

    `rows` keeps the rows as captured; `int8` as codes with a scale and an error each [pos, width + 8], which
    `probes.kernels.unpacked` reads; `mean` their average over the positions; `norm` the L2 norm of each row [pos];
    `moments` mean, variance and max|x| [pos, 3]; `project` coordinates on a basis [pos, k]; `lens_ids` log-probabilities
    of given tokens through the final norm and unembedding [pos, n_ids]; `lens_top` the most probable tokens
    [pos, k, 2] as (log-probability, token id).
    """

    kind: str = "rows"
    positions: Positions = "all"
    ids: tuple[int, ...] = ()
    """Token ids, for `lens_ids`."""
    top_k: int = 0
    """How many tokens, for `lens_top`."""
    basis: Tensor | None = None
    """[k, width], for `project`."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PointError(unknown("reducer", self.kind, KINDS))
        if self.kind == "project" and (self.basis is None or self.basis.ndim != 2):
            raise PointError("reducer 'project' needs a basis of shape [k, width]")
        if self.kind == "lens_ids" and not self.ids:
            raise PointError("reducer 'lens_ids' needs token ids")
        if self.kind == "lens_top" and self.top_k < 1:
            raise PointError(f"reducer 'lens_top' needs top_k of at least 1, not {self.top_k}")

    def __str__(self) -> str:
        detail = ""
        if self.basis is not None:
            array = self.basis.detach().cpu().float().contiguous().numpy()
            detail = ":" + xxhash.xxh3_128_hexdigest(repr(array.shape).encode() + array.tobytes())
        elif self.ids:
            detail = ":" + ",".join(map(str, self.ids))
        elif self.top_k:
            detail = f":{self.top_k}"
        at = self.positions if isinstance(self.positions, str) else ",".join(map(str, self.positions))
        return f"{self.kind}{detail}@{at}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reducer) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    @classmethod
    def parse(cls, text: str) -> Reducer:
        """The reducer named on a command line: rows, int8, last, mean, norm, moments, at:0,-1 or lens:10."""
        name, _, detail = text.partition(":")
        try:
            if name == "at":
                return cls(positions=tuple(int(p) for p in detail.split(",")))
            if name == "lens":
                return cls("lens_top", top_k=int(detail))
        except ValueError:
            raise PointError(f"reducer {text!r}: write at:0,-1 or lens:10") from None
        if name == "last":
            return cls(positions="last")
        if name not in NAMED:
            raise PointError(unknown("reducer", text, (*NAMED, "last", "at:0,-1", "lens:10")))
        return cls(name)

    def count(self, length: int) -> int:
        """Rows kept of a sequence of `length` tokens."""
        if self.kind == "mean":
            return 1
        if isinstance(self.positions, str):
            return {"all": length, "last": 1, "after_first": max(1, length - 1)}[self.positions]
        return len(self.positions)

    @property
    def per_position(self) -> bool:
        """Whether it keeps one row per token, each from that token's own tensor."""
        return self.positions == "all" and self.kind != "mean"


ROWS = Reducer()
"""All rows as captured."""


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
