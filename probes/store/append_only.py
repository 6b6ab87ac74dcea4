"""Writing shards without the catalogue, from many machines; whoever opens the store next indexes them."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from probes.errors import StoreError
from probes.store.eviction import disk_full
from probes.store.files import Folder, Partial
from probes.store.layout import encode
from probes.store.store import ActivationStore, Sequences
from probes.store.values import Context, Packet, Put


class AppendOnlyWriter(ActivationStore):
    """A store's folder to which shards are only added.

    It knows of no rows, so what is put is written. A shard is named by its content: writing the same packet again, as a
    task does that is repeated after its process died, leaves the one file. Opening an `ActivationStore` on the folder
    indexes the shards, and removes those whose rows are all held elsewhere.
    """

    def __init__(self, root: str | Path) -> None:
        """A store's folder, made where there is none.

        Raises:
            StoreError: a root that cannot be used, or a store of a newer protocol.
        """
        self.root = Path(root).expanduser().absolute()
        self.max_bytes = None
        self._folder = Folder(self.root)
        self._folder.prepare()

    def __repr__(self) -> str:
        return f"AppendOnlyWriter({str(self.root)!r})"

    def held(self, context: Context, sequences: Sequences, features: Sequence[str]) -> np.ndarray:
        """Nothing: bool [n_sequences, n_features]."""
        return np.zeros((len(sequences), len(features)), dtype=bool)

    def put(self, packet: Packet) -> Put:
        """Write a packet as a shard; durable on return.

        Raises:
            StoreError: no room on the disk; nothing of this packet was written then.
        """
        packet = packet.unique()
        encoded = encode(packet)
        rows = len(packet.sequences) * len(packet.features)
        path = self._folder.shard(encoded.entry.digest)
        if path.exists():
            return Put(0, 0, rows)
        try:
            partial = Partial(self._folder.tmp, encoded)
            try:
                partial.publish(path)
            finally:
                partial.discard()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise disk_full(self.root, encoded.entry.nbytes, encoded.entry.nbytes) from error
            raise StoreError(f"writing to the store {str(self.root)!r} failed: {error}") from error
        return Put(encoded.entry.nbytes, rows, 0)

    def pin(self) -> AbstractContextManager[None]:
        """Nothing is pinned: what is in no catalogue is not evicted."""
        return nullcontext()

    def check_space(self, n_bytes: int) -> None:
        """Left to whoever planned the whole capture."""
