"""The SQLite index of the shards: small, and rebuilt from them at any time."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG
from typing import TypeVar

import numpy as np

from probes.errors import StoreError
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
WAIT_SECONDS = 120.0
"""How long a writer waits for another's commit."""
_CHUNK = 900
"""Values bound in one statement, below every SQLite's limit."""
_DIGEST = re.compile("[0-9a-f]{32}")
Bound = TypeVar("Bound", str, bytes)


class DamagedCatalogue(StoreError):
    """A file that is not a usable database; it can be thrown away and rebuilt."""

    def __init__(self, message: str, inode: int) -> None:
        super().__init__(message)
        self.inode = inode
        """Of the file that was met; another at its path is another catalogue."""


@dataclass(frozen=True)
class Place:
    """Where a sequence lies."""

    shard: str
    ordinal: int


@dataclass(frozen=True)
class _Connected:
    process: int
    inode: int
    connection: sqlite3.Connection


class Catalogue:
    """One SQLite file with a rollback journal, so that it works on a shared file system.

    Each thread of each process has its own connection; a file replaced underneath is reopened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        self._inherited: list[sqlite3.Connection] = []

    @property
    def files(self) -> list[Path]:
        """Return the database and what SQLite may have put beside it."""
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-journal", "-wal", "-shm")]

    def open(self) -> None:
        """Make sure that the file is there, and a catalogue still."""
        with self.reading() as connection:
            if _schema(connection) != _own_schema():
                raise self.damaged("its tables are not a catalogue's")

    @property
    def complete(self) -> bool:
        """Return whether all shards have been indexed since the file was created; until then a row's absence says nothing."""
        with self.reading() as connection:
            return bool(connection.execute("PRAGMA user_version").fetchone()[0])

    def mark_complete(self) -> None:
        """Say that the index is complete."""
        with self.reading() as connection:
            connection.execute("PRAGMA user_version = 1")

    def inode(self) -> int:
        """Return the inode of the file, -1 where none is there."""
        try:
            return self.path.stat().st_ino
        except OSError:
            return -1

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection; every statement sees the last commit.

        Raises:
            StoreError: the file is busy beyond patience, or the disk is full.
            DamagedCatalogue: the file is not a database of ours, or says what ours cannot say.
        """
        with self._told():
            yield self._connection()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in the store's words what SQLite refuses."""
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            opened = self._opened()
            replaced = opened and opened.inode != self.inode()
            if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR) and not replaced:
                raise StoreError(
                    f"the catalogue {str(self.path)!r} could not be written ({error}); committed rows stay: "
                    "free some disk space and run again"
                ) from error
            if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise StoreError(
                    f"another process held the catalogue {str(self.path)!r} for {WAIT_SECONDS:.0f} s; "
                    "committed rows stay: run again when it is done"
                ) from error
            raise self.damaged(error) from error

    def damaged(self, reason: object) -> DamagedCatalogue:
        """Return the error of a catalogue that cannot be believed."""
        opened = self._opened()
        return DamagedCatalogue(
            f"the catalogue {str(self.path)!r} is damaged ({reason}); run bathyscope store rebuild",
            opened.inode if opened else self.inode(),
        )

    def discard(self, damage: DamagedCatalogue) -> list[Path]:
        """Delete the file that was found damaged unless another has taken its place; returns folders that lie in its way."""
        with ExitStack() as stack:
            # Whoever writes has its journal beside the file, where it would be taken for the next file's.
            with suppress(DamagedCatalogue), self._told():
                if not any(map(_is_odd, self.files)):
                    stack.enter_context(closing(self._connect())).execute("BEGIN EXCLUSIVE")
            if self.inode() != damage.inode:
                return []
            folders = [part for part in self.files if part.is_dir() and not part.is_symlink()]
            for part in reversed(self.files):
                if part not in folders:
                    part.unlink(missing_ok=True)
            return folders

    def copy_from(self, path: Path) -> None:
        """Copy another catalogue, without writing to it, as far as it can be read at all."""
        uri = f"{path.as_uri()}?mode=ro"
        with suppress(sqlite3.Error), ExitStack() as stack:
            source = stack.enter_context(closing(sqlite3.connect(uri, uri=True)))
            source.backup(stack.enter_context(closing(sqlite3.connect(self.path))))

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Open a transaction that shuts out other writers; committed on leaving, rolled back on an exception.

        One inside another joins it.
        """
        with self.reading() as connection:
            if connection.in_transaction:
                yield connection
                return
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    with suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                raise

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

    def _opened(self) -> _Connected | None:
        """Return the connection of this thread of this process."""
        opened: _Connected | None = getattr(self._local, "opened", None)
        return opened if opened and opened.process == os.getpid() else None

    def _connection(self) -> sqlite3.Connection:
        opened = self._opened()
        if opened and (opened.connection.in_transaction or opened.inode == self.inode()):
            return opened.connection
        if opened is None and (inherited := getattr(self._local, "opened", None)):
            # SQLite forbids even closing a connection inherited through a fork.
            self._inherited.append(inherited.connection)
        self._local.opened = None
        for part in self.files:
            if _is_odd(part):
                raise self.damaged(f"{part.name} is no file")
        while True:
            inode = self.inode()
            connection = self._connect()
            if not (tables := _schema(connection)):
                connection.executescript(f"BEGIN IMMEDIATE;{SCHEMA}COMMIT;")
            if tables and tables != _own_schema():
                connection.close()
                raise self.damaged("its tables are not a catalogue's")
            # Otherwise the file was replaced while it was opened, and which of the two this is cannot be known.
            if inode in (-1, self.inode()):
                self._local.opened = _Connected(os.getpid(), self.inode(), connection)
                return connection
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _check(self, holds: bool, *values: object) -> None:
        if not holds:
            raise self.damaged(f"it says {', '.join(map(repr, values)):.200}")


def _is_odd(path: Path) -> bool:
    """Return whether something other than a file lies there; a journal comes and goes with every commit."""
    try:
        return not S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return path.is_symlink()
    except OSError:
        return True


def _schema(connection: sqlite3.Connection) -> list[tuple[str, ...]]:
    """Return kind, name and definition of everything in a database but SQLite's own statistics."""
    rows = connection.execute("SELECT type, name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%'")
    return sorted((kind, name, " ".join((sql or "").split())) for kind, name, sql in rows)


@cache
def _own_schema() -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(SCHEMA)
        return _schema(connection)


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
