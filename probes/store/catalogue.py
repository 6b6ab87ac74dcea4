"""The SQLite index of the shards: small, and rebuilt from them at any time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from probes.store.catalogue_file import CatalogueFile
from probes.store.values import Entry

SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (id INTEGER PRIMARY KEY, context TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS shards (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL UNIQUE, context INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS sequences (
    digest BLOB NOT NULL, shard INTEGER NOT NULL, ordinal INTEGER NOT NULL,
    PRIMARY KEY (digest, shard, ordinal)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS sequences_of_shard ON sequences (shard);
CREATE TABLE IF NOT EXISTS features (
    shard INTEGER NOT NULL, feature TEXT NOT NULL, PRIMARY KEY (shard, feature)) WITHOUT ROWID;
"""
_CHUNK = 900
"""Values bound in one statement, below every SQLite's limit."""
_DIGEST = re.compile("[0-9a-f]{32}")
Bound = TypeVar("Bound", str, bytes)


@dataclass(frozen=True)
class Place:
    """Where a sequence lies."""

    shard: str
    ordinal: int


class Catalogue(CatalogueFile):
    """Which sequences and features lie in which shards of which context."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, SCHEMA)

    @property
    def complete(self) -> bool:
        """Return whether all shards have been indexed since the file was created; until then a row's absence says nothing."""
        with self.reading() as connection:
            return bool(connection.execute("PRAGMA user_version").fetchone()[0])

    def mark_complete(self) -> None:
        """Say that the index is complete."""
        with self.reading() as connection:
            connection.execute("PRAGMA user_version = 1")

    def locate(self, context: str, digests: Iterable[bytes], feature: str | None = None) -> dict[bytes, list[Place]]:
        """Return every place of each sequence in shards of this context (and, where given, with this feature)."""
        only = " AND EXISTS (SELECT 1 FROM features f WHERE f.shard = h.id AND f.feature = ?)" if feature else ""
        places: dict[bytes, list[Place]] = {}
        with self.reading() as connection:
            for chunk in _chunks(set(digests)):
                rows = connection.execute(
                    "SELECT s.digest, h.digest, s.ordinal FROM sequences s JOIN shards h ON h.id = s.shard "
                    "JOIN contexts c ON c.id = h.context "
                    f"WHERE s.digest IN ({_marks(chunk)}) AND c.context = ?{only} ORDER BY h.digest, s.ordinal",
                    [*chunk, context, *([feature] if feature else [])],
                ).fetchall()
                for sequence, shard, ordinal in rows:
                    self._check(type(ordinal) is int and _is_digest(shard), shard, ordinal)
                    places.setdefault(sequence, []).append(Place(shard, ordinal))
        return places

    def contains(self, context: str, digests: Sequence[bytes], features: Sequence[str]) -> tuple[np.ndarray, set[str]]:
        """Return which rows are indexed, bool [n_sequences, n_features], and the shards they lie in."""
        places = self.locate(context, digests)
        columns = {feature: j for j, feature in enumerate(features)}
        masks: dict[str, np.ndarray] = {}
        with self.reading() as connection:
            for chunk in _chunks({place.shard for here in places.values() for place in here}):
                for shard, feature in connection.execute(
                    "SELECT h.digest, f.feature FROM features f JOIN shards h ON h.id = f.shard "
                    f"WHERE h.digest IN ({_marks(chunk)})",
                    chunk,
                ):
                    if feature in columns:
                        mask = masks.setdefault(shard, np.zeros(len(features), dtype=bool))
                        mask[columns[feature]] = True
        present = np.zeros((len(digests), len(features)), dtype=bool)
        used: set[str] = set()
        for i, sequence in enumerate(digests):
            for place in places.get(sequence, ()):
                if place.shard in masks:
                    present[i] |= masks[place.shard]
                    used.add(place.shard)
        return present, used

    def add(self, entry: Entry) -> None:
        """Index a shard; inside a `writing` transaction."""
        with self.reading() as connection:
            connection.execute("INSERT OR IGNORE INTO contexts (context) VALUES (?)", [entry.context])
            shard = connection.execute(
                "INSERT INTO shards (digest, context, bytes) SELECT ?, id, ? FROM contexts WHERE context = ?",
                [entry.digest, entry.nbytes, entry.context],
            ).lastrowid
            rows = [(sequence, shard, i) for i, sequence in enumerate(entry.sequences)]
            connection.executemany("INSERT INTO sequences VALUES (?, ?, ?)", rows)
            connection.executemany("INSERT INTO features VALUES (?, ?)", [(shard, name) for name in entry.features])

    def forget(self, digests: Iterable[str]) -> None:
        """Drop shards from the index; inside a `writing` transaction."""
        with self.reading() as connection:
            for digest in digests:
                row = connection.execute("SELECT id FROM shards WHERE digest = ?", [digest]).fetchone()
                for table, column in (("sequences", "shard"), ("features", "shard"), ("shards", "id")):
                    connection.execute(f"DELETE FROM {table} WHERE {column} = ?", row or [None])
            connection.execute("DELETE FROM contexts WHERE id NOT IN (SELECT context FROM shards)")

    def clear(self) -> None:
        """Empty the index; inside a `writing` transaction."""
        with self.reading() as connection:
            for table in ("sequences", "features", "shards", "contexts"):
                connection.execute(f"DELETE FROM {table}")

    def shards(self) -> dict[str, int]:
        """Return the bytes of every indexed shard by digest."""
        with self.reading() as connection:
            sizes = dict(connection.execute("SELECT digest, bytes FROM shards ORDER BY digest").fetchall())
        for name, size in sizes.items():
            self._check(_is_digest(name) and type(size) is int and size > 0, name, size)
        return sizes

    def nbytes(self) -> int:
        """Return the bytes of all indexed shards."""
        with self.reading() as connection:
            size, strange = connection.execute(
                "SELECT coalesce(sum(bytes), 0), coalesce(max(typeof(bytes) != 'integer'), 0) FROM shards"
            ).fetchone()
        self._check(not strange and size >= 0, "bytes", size)
        return int(size)

    def contexts(self) -> dict[str, list[str]]:
        """Return the shards of each context."""
        shards: dict[str, list[str]] = {}
        with self.reading() as connection:
            for context, shard in connection.execute(
                "SELECT c.context, h.digest FROM shards h JOIN contexts c ON c.id = h.context ORDER BY 1, 2"
            ):
                self._check(_is_context(context) and _is_digest(shard), context, shard)
                shards.setdefault(context, []).append(shard)
        return shards

    def entry(self, digest: str) -> Entry | None:
        """Return what the index says of a shard, or None."""
        with self.reading() as connection:
            row = connection.execute(
                "SELECT h.id, c.context, h.bytes FROM shards h JOIN contexts c ON c.id = h.context WHERE h.digest = ?",
                [digest],
            ).fetchone()
            if row is None:
                return None
            shard, context, nbytes = row
            ordered = "SELECT digest, ordinal FROM sequences WHERE shard = ? ORDER BY ordinal"
            sequences = connection.execute(ordered, [shard]).fetchall()
            features = connection.execute("SELECT feature FROM features WHERE shard = ? ORDER BY 1", [shard]).fetchall()
        self._check([ordinal for _, ordinal in sequences] == list(range(len(sequences))), digest, "ordinals")
        return Entry(digest, context, nbytes, tuple(d for d, _ in sequences), tuple(name for (name,) in features))

    def count(self, table: str, context: str) -> int:
        """Count the distinct sequences or features of a context; `table` is one of the two."""
        column = {"sequences": "digest", "features": "feature"}[table]
        with self.reading() as connection:
            query = (
                f"SELECT count(DISTINCT t.{column}) FROM {table} t JOIN shards h ON h.id = t.shard "
                "JOIN contexts c ON c.id = h.context WHERE c.context = ?"
            )
            return int(connection.execute(query, [context]).fetchone()[0])

    def _check(self, holds: bool, *values: object) -> None:
        if not holds:
            raise self.damaged(f"it says {', '.join(map(repr, values)):.200}")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def _is_context(value: object) -> bool:
    try:
        parsed = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        return False
    return isinstance(parsed, dict) and all(isinstance(text, str) for text in parsed.values())


def _chunks(values: Iterable[Bound]) -> Iterator[list[Bound]]:
    ordered = sorted(values)
    for i in range(0, len(ordered), _CHUNK):
        yield ordered[i : i + _CHUNK]


def _marks(values: Sequence[object]) -> str:
    return ",".join("?" * len(values))
