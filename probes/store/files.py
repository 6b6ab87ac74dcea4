"""The store's folder: where files lie, how they become durable, and who is still using them."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from probes.errors import StoreError
from probes.locked_files import LockedFile, lock_for_removal, sync
from probes.store.layout import PROTOCOL, Encoded

_OURS = re.compile(r"[0-9a-f]{32}\.(partial|pins)")


@dataclass(frozen=True)
class Folder:
    """The paths of a store."""

    root: Path

    @property
    def shards(self) -> Path:
        """Return the folder of shards, in subfolders by the first two digits of their digest."""
        return self.root / "shards"

    @property
    def tmp(self) -> Path:
        """Return the folder of files being written and of pins."""
        return self.root / "tmp"

    @property
    def quarantine(self) -> Path:
        """Return the folder of damaged shards."""
        return self.root / "quarantine"

    @property
    def catalogue(self) -> Path:
        """Return the path of the index."""
        return self.root / "catalogue.sqlite"

    def shard(self, digest: str) -> Path:
        """Return the place of a shard."""
        return self.shards / digest[:2] / f"{digest}.safetensors"

    def listing(self) -> list[Path]:
        """Return everything named like a shard, also in the wrong folder."""
        paths: list[Path] = []
        for folder in sorted(self.shards.glob("[0-9a-f][0-9a-f]")):
            # A file, or a link that leads nowhere, where a folder should be holds no shards.
            with suppress(OSError):
                paths += sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
        return paths

    def read_only(self) -> bool:
        """Return whether a store is here that this process may read but not write."""
        parts = (self.root, self.shards, self.tmp, self.quarantine, self.catalogue)
        writable = all(_may_write(path) for path in parts if path.exists())
        return not writable and (self.root / "store.json").is_file() and self.shards.is_dir()

    def prepare(self) -> None:
        """Create what is missing, where this process may write, and check the protocol number.

        Raises:
            StoreError: the root is a file or cannot be written, or the store is of a newer protocol.
        """
        try:
            marker = self.root / "store.json"
            for folder in () if self.read_only() else (self.shards, self.tmp, self.quarantine):
                folder.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                # Locked, or whoever opens the store at the same moment sweeps it away.
                draft = LockedFile(self.tmp, "partial")
                text = json.dumps({"format": "bathyscope activation store", "protocol": PROTOCOL}) + "\n"
                os.write(draft.fd, text.encode("ascii"))
                draft.path.replace(marker)
                draft.release()
                sync(self.root)
            if not marker.is_file():
                raise OSError(f"{str(marker)!r} is no file")
            content = marker.read_bytes()
        except OSError as error:
            raise StoreError(f"store {str(self.root)!r} cannot be used ({error}); choose a writable folder") from error
        _check_protocol(self.root, content)

    def set_aside(self, path: Path, inode: int | None = None) -> bool:
        """Move a shard to quarantine, unless another file has taken its place meanwhile; returns whether it is gone."""
        try:
            if inode is None or inode in _inodes(path):
                path.rename(_unused(self.quarantine / path.name))
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def sweep(self) -> int:
        """Remove temporary files whose writer is gone; returns how many."""
        return sweep(self.tmp)

    def pinned(self) -> frozenset[str]:
        """Return the shards that a run in progress, here or elsewhere, has asked to keep."""
        names: set[str] = set()
        for path in self.tmp.glob("*.pins"):
            if not remove_if_unlocked(path) and path.is_file():
                with suppress(OSError, ValueError):
                    names.update(path.read_text().split())
        return frozenset(names)


class Partial(LockedFile):
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
    enabled: bool = True
    """False where nothing can be written, and nothing pinned: a shard may then go before it is opened."""
    _depth: int = 0
    _file: LockedFile | None = None
    _names: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def active(self) -> bool:
        """Return whether a run is keeping shards."""
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
        """Keep what is added inside the block until the last such block ends."""
        with self._lock:
            self._depth += 1
            if self._file is None and self.enabled:
                self._file = LockedFile(self.folder.tmp, "pins")
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth and self._file is not None:
                    self._file.discard()
                    self._file = None
                    self._names.clear()


def sweep(folder: Path) -> int:
    """Remove files of ours whose writer is gone; returns how many."""
    try:
        return sum(remove_if_unlocked(path) for path in folder.iterdir() if _OURS.fullmatch(path.name))
    except OSError:
        return 0


def remove_if_unlocked(path: Path) -> bool:
    """Delete a file of ours unless it is in use or out of reach; returns whether it was deleted."""
    fd = lock_for_removal(path)
    if fd is None:
        return False
    try:
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)


def remove(path: Path) -> int:
    """Delete whatever lies at a path, a folder with all that is in it; returns the bytes of its files."""
    is_folder = path.is_dir() and not path.is_symlink()
    nodes = [node for node in (path.rglob("*") if is_folder else [path]) if node.is_symlink() or not node.is_dir()]
    try:
        size = sum(node.lstat().st_size for node in nodes)
        shutil.rmtree(path) if is_folder else path.unlink()
    except OSError:
        return 0
    return size


def touch(target: int | Path) -> None:
    """Record a use: a shard's modification time is when it was last written or read."""
    now = time.time_ns()
    with suppress(OSError):
        os.utime(target, ns=(now, now))


def _may_write(path: Path) -> bool:
    mode = os.R_OK | os.W_OK | (os.X_OK if path.is_dir() else 0)
    return os.access(path, mode, effective_ids=True)


def _inodes(path: Path) -> set[int]:
    """Return the inodes of what lies at the path, and of what it leads to if it is a link."""
    inodes = {path.lstat().st_ino}
    with suppress(OSError):
        inodes.add(path.stat().st_ino)
    return inodes


def _unused(path: Path) -> Path:
    return path.with_name(f"{path.stem}-{uuid.uuid4().hex}{path.suffix}") if os.path.lexists(path) else path


def _check_protocol(root: Path, text: bytes) -> None:
    try:
        number = int(json.loads(text)["protocol"])
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StoreError(f"{str(root / 'store.json')!r} is not a store's; delete it to have it written anew") from error
    if number != PROTOCOL:
        advice = "upgrade bathyscope" if number > PROTOCOL else "choose a new folder"
        raise StoreError(f"store {str(root)!r} has protocol {number}; this version reads {PROTOCOL}: {advice}")
