"""The SQLite file under the catalogue: its connections and transactions, and what is damaged or in its way."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from stat import S_ISREG

from probes.errors import StoreError

WAIT_SECONDS = 120.0
"""How long a writer waits for another's commit."""


class DamagedCatalogue(StoreError):
    """A file that is not a usable database; it can be thrown away and rebuilt."""

    def __init__(self, message: str, inode: int) -> None:
        super().__init__(message)
        self.inode = inode
        """Of the file that was met; another at its path is another catalogue."""


@dataclass(frozen=True)
class _Connected:
    process: int
    inode: int
    connection: sqlite3.Connection


class CatalogueFile:
    """One SQLite file with a rollback journal, so that it works on a shared file system.

    Each thread of each process has its own connection; a file replaced underneath is reopened.
    """

    def __init__(self, path: Path, schema: str) -> None:
        self.path = path
        self.schema = schema
        self._local = threading.local()
        self._inherited: list[sqlite3.Connection] = []

    @property
    def files(self) -> list[Path]:
        """Return the database and what SQLite may have put beside it."""
        return [Path(f"{self.path}{suffix}") for suffix in ("", "-journal", "-wal", "-shm")]

    def open(self) -> None:
        """Make sure that the file is there, and a catalogue still."""
        with self.reading() as connection:
            if _schema(connection) != _laid_out(self.schema):
                raise self.damaged("its tables are not a catalogue's")

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
                connection.executescript(f"BEGIN IMMEDIATE;{self.schema}COMMIT;")
            if tables and tables != _laid_out(self.schema):
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
def _laid_out(schema: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema)
        return _schema(connection)
