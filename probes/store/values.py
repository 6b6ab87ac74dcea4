"""What goes into and comes out of the store: ragged rows, packets of them, and the digests that name them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from probes.errors import StoreError

if TYPE_CHECKING:
    from torch import Tensor

Context = Mapping[str, str]
"""Everything besides the tokens that decides a row's numbers: weights digest, backend, dtype, attention, edits."""

Sequences = Sequence[Sequence[int]]
"""Token ids of several sequences."""


@dataclass(frozen=True, eq=False)
class Ragged:
    """The rows of several sequences, packed one after the other without padding.

    Raises:
        ValueError: counts that are negative or do not add up to the rows.
    """

    values: Tensor
    """[n_rows, ...]."""
    counts: tuple[int, ...]
    """Rows of each sequence; zero is allowed."""

    def __post_init__(self) -> None:
        if self.values.dim() == 0:
            raise ValueError("ragged values need a row axis; got a scalar")
        if min(self.counts, default=0) < 0 or sum(self.counts) != self.values.shape[0]:
            raise ValueError(f"counts {self.counts[:8]} do not add up to {self.values.shape[0]} rows")

    def split(self) -> list[Tensor]:
        """Return one view [count, ...] per sequence."""
        from torch import split

        return list(split(self.values, list(self.counts))) if self.counts else []

    def select(self, ordinals: Sequence[int]) -> Ragged:
        """Return the rows of the given sequences, in the given order."""
        if list(ordinals) == list(range(len(self.counts))):
            return self
        from torch import cat

        parts = self.split()
        kept = [parts[i] for i in ordinals]
        return Ragged(cat(kept) if kept else self.values[:0], tuple(self.counts[i] for i in ordinals))


@dataclass(frozen=True, eq=False)
class Packet:
    """Rows captured together; dense: each sequence has each feature.

    Raises:
        ValueError: a feature whose counts are not one per sequence, or that is named like the store's own tensors.
    """

    context: Context
    sequences: tuple[tuple[int, ...], ...]
    """Token ids of each sequence."""
    features: Mapping[str, Ragged]

    def __post_init__(self) -> None:
        for name, rows in self.features.items():
            if not name or name.startswith(("sequences/", "__")):
                raise ValueError(f"feature name {name!r} is empty or reserved")
            if len(rows.counts) != len(self.sequences):
                raise ValueError(f"feature {name!r} has {len(rows.counts)} counts for {len(self.sequences)} sequences")

    def select(self, ordinals: Sequence[int], features: Sequence[str]) -> Packet:
        """Return the packet of the given sequences and features only."""
        chosen = {name: self.features[name].select(ordinals) for name in features}
        return Packet(self.context, tuple(self.sequences[i] for i in ordinals), chosen)

    def unique(self) -> Packet:
        """Return the packet with each sequence once, at its first place."""
        first = {tokens: i for i, tokens in reversed(list(enumerate(self.sequences)))}
        if len(first) == len(self.sequences):
            return self
        return self.select(sorted(first.values()), list(self.features))

    def parts(self, missing: np.ndarray) -> list[Packet]:
        """Return dense packets that cover exactly the rows `missing`, bool [n_sequences, n_features]."""
        names = list(self.features)
        groups: dict[bytes, list[int]] = {}
        for i, row in enumerate(missing):
            if row.any():
                groups.setdefault(row.tobytes(), []).append(i)
        return [
            self.select(ordinals, [name for name, lacks in zip(names, missing[ordinals[0]], strict=True) if lacks])
            for ordinals in groups.values()
        ]


@dataclass(frozen=True)
class Put:
    """What a put did; a row here is one feature of one sequence."""

    bytes_written: int
    rows_written: int
    already_held: int


@dataclass(frozen=True)
class Entry:
    """What the catalogue knows of one shard; all of it can be read from the shard."""

    digest: str
    """The shard's name: xxh3_128 of its header, in hex."""
    context: str
    """Canonical JSON."""
    nbytes: int
    sequences: tuple[bytes, ...]
    """Digest of each sequence, in the shard's order."""
    features: tuple[str, ...]


def canonical(context: Context) -> str:
    """Return the one JSON text of a context: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: a key or value that is not text.
    """
    if not all(isinstance(part, str) for pair in context.items() for part in pair):
        raise ValueError(f"a context maps text to text; got {dict(context)!r}")
    return json.dumps(dict(context), sort_keys=True, separators=(",", ":"))


def pack(tokens: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return token ids as little-endian int64 [n_tokens]."""
    return np.asarray(tokens, dtype="<i8")


def sequence_digest(tokens: Sequence[int] | np.ndarray) -> bytes:
    """Return xxh3_128 (16 bytes, big-endian) of the ids as little-endian int64."""
    return bytes(xxhash.xxh3_128_digest(pack(tokens).tobytes()))


class MissingRows(StoreError):
    """Rows that are to be read and are not in the store."""

    def __init__(self, feature: str, missing: int, total: int) -> None:
        super().__init__(
            f"{missing} of {total} sequences have no {feature!r} in the store under this context; "
            "capture them first (the same model, backend, dtype, attention and edits)"
        )
        self.feature = feature
        self.missing = missing


class DamagedShard(StoreError):
    """A shard that failed its check and was set aside; its rows count as missing from now on."""

    def __init__(self, shard: str, reason: str, aside: bool = True) -> None:
        where = "is now in quarantine/" if aside else "could not be moved to quarantine/"
        super().__init__(f"shard {shard} is damaged ({reason}); it {where}: capture its rows again")
        self.shard = shard
        self.reason = reason
