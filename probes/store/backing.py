"""The parts a store is made of, and the one way to open a shard."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

from probes.errors import StoreError
from probes.store.catalogue import Catalogue
from probes.store.files import Folder, Partial, Pins
from probes.store.layout import Encoded
from probes.store.shard import Damage, Known, Shard, Unreadable
from probes.store.values import DamagedShard

_REMEMBERED = 4096
"""Shards whose header and finished checks are remembered."""


class Vanished(Exception):
    """A shard that was evicted or removed since the catalogue named it; the catalogue has forgotten it."""


class Backing:
    """Folder, catalogue and pins of one store, and what is known of its shards."""

    def __init__(self, root: Path) -> None:
        self.folder = Folder(root)
        self.folder.prepare()
        self.read_only = self.folder.read_only()
        """Then nothing is written below the root: the catalogue is a copy of this process's own, and nothing is pinned."""
        self.catalogue = self._own_catalogue() if self.read_only else Catalogue(self.folder.catalogue)
        self.pins = Pins(self.folder, enabled=not self.read_only)
        self._forget_process_state()

    @property
    def crowded(self) -> bool:
        """Return whether so many mapped shards are alive that rows should be copied out instead of viewed."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return len(self._maps) >= min(512, soft // 4)

    @contextmanager
    def shard(self, digest: str, fresh: bool = False) -> Iterator[Shard]:
        """Open a shard; `fresh` forgets earlier checks.

        Raises:
            Vanished: the file is gone.
            DamagedShard: a check failed here or inside the block; the shard has been set aside.
            StoreError: the file is there and cannot be read.
        """
        path = self.folder.shard(digest)
        if self._pid != os.getpid():
            self._forget_process_state()
        try:
            with self._lock:
                known = None if fresh else self._known.get(digest)
            shard = Shard(path, known)
            with self._lock:
                self._known[digest] = shard.known
                self._known.move_to_end(digest)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
                self._maps.add(shard.map)
            yield shard
        except FileNotFoundError as error:
            self.forget(digest)
            raise Vanished(digest) from error
        except Damage as error:
            gone = self.folder.set_aside(path, error.inode)
            self.forget(digest)
            raise DamagedShard(digest, str(error), gone) from error
        except Unreadable as error:
            raise StoreError(
                f"shard {digest} cannot be read ({error}): make {str(path)!r} readable, or remove it"
            ) from error

    def write(self, encoded: Encoded) -> Partial:
        """Write a shard under a temporary name, which `publish` or `Partial.discard` ends.

        Raises:
            StoreError: no room on the disk, or a root that cannot be written.
        """
        try:
            return Partial(self.folder.tmp, encoded)
        except OSError as error:
            raise self._write_error(error, encoded.entry.nbytes) from error

    def publish(self, partial: Partial) -> None:
        """Give a written shard its place, durably.

        Raises:
            StoreError: no room on the disk, or a root that cannot be written.
        """
        try:
            partial.publish(self.folder.shard(partial.entry.digest))
        except OSError as error:
            raise self._write_error(error, partial.entry.nbytes) from error

    def _write_error(self, error: OSError, nbytes: int) -> StoreError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return disk_full(self.folder.root, nbytes, nbytes)
        return StoreError(f"writing to the store {str(self.folder.root)!r} failed: {error}; what was committed stays")

    def forget(self, digest: str) -> None:
        """Drop a shard that is no longer in its place, or cannot be put out of it, from the catalogue."""
        with self._lock:
            self._known.pop(digest, None)
        with self.catalogue.writing():
            if self.read_only or not self.folder.shard(digest).exists():
                self.catalogue.forget([digest])

    def _own_catalogue(self) -> Catalogue:
        folder = Path(tempfile.mkdtemp(prefix="bathyscope-catalogue-"))
        weakref.finalize(self, _remove_own, folder, os.getpid())
        catalogue = Catalogue(folder / self.folder.catalogue.name)
        catalogue.copy_from(self.folder.catalogue)
        return catalogue

    def _forget_process_state(self) -> None:
        # A lock inherited through a fork may be locked by a thread that does not exist here.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._maps: weakref.WeakSet[mmap] = weakref.WeakSet()


def disk_full(root: Path, nbytes: int, short: int) -> StoreError:
    """Return the error of a disk that lacks `short` bytes for writing `nbytes`."""
    return StoreError(
        f"no room for {nbytes:,} bytes in the store {str(root)!r}: what was committed stays; free at least "
        f"{short:,} bytes on that disk (for instance with bathyscope store gc) and run again"
    )


def read_only(root: Path) -> StoreError:
    """Return the error of writing where one may only read."""
    return StoreError(
        f"the store {str(root)!r} can be read here but not written: what it holds can be used; "
        "for anything else give a store of your own (--store FOLDER, or BATHYSCOPE_STORE)"
    )


def _remove_own(folder: Path, process: int) -> None:
    # A forked child goes on reading its parent's.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
