"""The parts a store is made of, and the one way to open a shard."""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path

from probes.store.catalogue import Catalogue
from probes.store.files import Folder, Pins
from probes.store.shard import Damage, Known, Shard
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
        self.catalogue = Catalogue(self.folder.catalogue)
        self.pins = Pins(self.folder)
        self._forget_process_state()

    @property
    def crowded(self) -> bool:
        """Whether so many mapped shards are alive that rows should be copied out instead of viewed."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return len(self._maps) >= min(512, soft // 4)

    @contextmanager
    def shard(self, digest: str, fresh: bool = False) -> Iterator[Shard]:
        """The open shard; `fresh` forgets earlier checks.

        Raises:
            Vanished: the file is gone.
            DamagedShard: a check failed here or inside the block; the shard has been set aside.
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
            self.folder.set_aside(path, error.inode)
            self.forget(digest)
            raise DamagedShard(digest, str(error)) from error

    def forget(self, digest: str) -> None:
        """Drop a shard that is no longer in its place from the catalogue."""
        with self._lock:
            self._known.pop(digest, None)
        with self.catalogue.writing():
            if not self.folder.shard(digest).exists():
                self.catalogue.forget([digest])

    def _forget_process_state(self) -> None:
        # A lock inherited through a fork may be held by a thread that does not exist here.
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._maps: weakref.WeakSet[mmap] = weakref.WeakSet()
