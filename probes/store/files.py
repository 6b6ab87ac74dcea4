"""The store's folder: where files lie, how they become durable, and who is still using them."""

from __future__ import annotations

import fcntl
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from probes.errors import StoreError
from probes.store.layout import PROTOCOL, Encoded

_OURS = re.compile(r"[0-9a-f]{32}\.(partial|pins)")


@dataclass(frozen=True)
class Folder:
    """The paths of a store."""

    root: Path

    @property
    def shards(self) -> Path:
        return self.root / "shards"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def catalogue(self) -> Path:
        return self.root / "catalogue.sqlite"

    def shard(self, digest: str) -> Path:
        return self.shards / digest[:2] / f"{digest}.safetensors"

    def listing(self) -> list[Path]:
        """Every shard file, also one in the wrong folder."""
        return sorted(self.shards.glob("[0-9a-f][0-9a-f]/*.safetensors"))

    def prepare(self) -> None:
        """Create what is missing and check the protocol number.

        Raises:
            StoreError: the root is a file or cannot be written, or the store is of a newer protocol.
        """
        try:
            for folder in (self.shards, self.tmp, self.quarantine):
                folder.mkdir(parents=True, exist_ok=True)
            marker = self.root / "store.json"
            if not marker.exists():
                fresh = self.tmp / f"{uuid.uuid4().hex}.partial"
                fresh.write_text(json.dumps({"format": "bathyscope activation store", "protocol": PROTOCOL}) + "\n")
                fresh.replace(marker)
                sync(self.root)
            text = marker.read_text()
        except OSError as error:
            raise StoreError(f"store {str(self.root)!r} cannot be used ({error}); choose a writable folder") from error
        _check_protocol(self.root, text)

    def set_aside(self, path: Path, inode: int | None = None) -> None:
        """Move a shard to quarantine, unless another file has taken its place meanwhile."""
        with suppress(FileNotFoundError):
            if inode is None or path.stat().st_ino == inode:
                path.replace(self.quarantine / path.name)

    def sweep(self) -> int:
        """Remove temporary files whose writer is gone; returns how many."""
        return sum(_remove_if_unlocked(path) for path in self.tmp.iterdir() if _OURS.fullmatch(path.name))

    def pinned(self) -> frozenset[str]:
        """Shards that a run in progress, here or elsewhere, has asked to keep."""
        names: set[str] = set()
        for path in self.tmp.glob("*.pins"):
            if not _remove_if_unlocked(path):
                with suppress(FileNotFoundError):
                    names.update(path.read_text().split())
        return frozenset(names)


class Held:
    """A file in tmp/ that carries an exclusive lock for as long as its owner lives."""

    def __init__(self, folder: Path, suffix: str) -> None:
        while True:
            self.path = folder / f"{uuid.uuid4().hex}.{suffix}"
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o666)
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            if os.fstat(self.fd).st_nlink:
                return
            # A sweep came between creating and locking.
            os.close(self.fd)

    def release(self) -> None:
        """Unlock and close; unlocking first frees readers even where a forked child inherited the descriptor."""
        if self.fd >= 0:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        """Remove the file and release it; does nothing once released."""
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            self.release()


class Partial(Held):
    """A shard being written under a temporary name."""

    def __init__(self, folder: Path, encoded: Encoded) -> None:
        super().__init__(folder, "partial")
        self.entry = encoded.entry
        try:
            with os.fdopen(os.dup(self.fd), "wb") as file:
                file.write(encoded.header)
                for data in encoded.buffers:
                    file.write(data.data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.discard()
            raise

    def publish(self, path: Path) -> None:
        """Give the file its name, durably."""
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            sync(path.parent.parent)
        touch(self.fd)
        self.path.replace(path)
        sync(path.parent)
        self.release()


@dataclass
class Pins:
    """The shards that the current runs of one store object keep from eviction, in one locked file."""

    folder: Folder
    _depth: int = 0
    _file: Held | None = None
    _names: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def active(self) -> bool:
        return self._file is not None

    def add(self, digests: Iterable[str]) -> None:
        """Keep these shards until the last run ends."""
        with self._lock:
            fresh = sorted(set(digests) - self._names)
            if self._file is not None and fresh:
                os.write(self._file.fd, "".join(f"{name}\n" for name in fresh).encode("ascii"))
                self._names.update(fresh)

    @contextmanager
    def run(self) -> Iterator[None]:
        with self._lock:
            self._depth += 1
            if self._file is None:
                self._file = Held(self.folder.tmp, "pins")
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth and self._file is not None:
                    self._file.discard()
                    self._file = None
                    self._names.clear()


def lock_for_removal(path: Path) -> int | None:
    """A descriptor holding the file exclusively, or None where it is in use or gone."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def touch(target: int | Path) -> None:
    """Record a use: a shard's modification time is when it was last written or read."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(target, ns=(now, now))


def sync(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_if_unlocked(path: Path) -> bool:
    fd = lock_for_removal(path)
    if fd is None:
        return False
    path.unlink(missing_ok=True)
    os.close(fd)
    return True


def _check_protocol(root: Path, text: str) -> None:
    try:
        number = int(json.loads(text)["protocol"])
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{str(root / 'store.json')!r} is not a store's; delete it to have it written anew") from error
    if number != PROTOCOL:
        advice = "upgrade bathyscope" if number > PROTOCOL else "choose a new folder"
        raise StoreError(f"store {str(root)!r} has protocol {number}; this version reads {PROTOCOL}: {advice}")
