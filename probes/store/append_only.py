"""Writing shards without the catalogue, from many machines; whoever opens the store next indexes them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probes.cache_folder import expanded
from probes.store.backing import Backing
from probes.store.layout import encode
from probes.store.names import Names
from probes.store.values import Context, MissingRows, Packet, Put, Sequences

if TYPE_CHECKING:
    from torch import Tensor


class AppendOnlyWriter:
    """A store's folder to which shards are only added.

    The writer knows of no rows, so it writes whatever it is given. A shard is named by its content: a task that is
    repeated after its process died writes the same packet to the same file. Opening an `ActivationStore` on the folder
    indexes the shards, and removes those whose rows all lie in other shards.
    """

    def __init__(self, root: str | Path) -> None:
        """Open the store in `root`, or create one.

        Raises:
            StoreError: a root that cannot be used, or a store of a newer protocol.
        """
        self.root = expanded(root).absolute()
        self.names = Names(self.root)
        self._backing = Backing(self.root)

    def __repr__(self) -> str:
        return f"AppendOnlyWriter({str(self.root)!r})"

    def contains(self, context: Context, sequences: Sequences, features: Sequence[str]) -> np.ndarray:
        """Return False for every row: bool [n_sequences, n_features]."""
        return np.zeros((len(sequences), len(features)), dtype=bool)

    def put(self, packet: Packet) -> Put:
        """Write a packet as a shard; durable on return.

        Raises:
            StoreError: no room on the disk; nothing of this packet was written then.
        """
        packet = packet.unique()
        n_rows = len(packet.sequences) * len(packet.features)
        encoded = encode(packet)
        if self._backing.folder.shard(encoded.entry.digest).exists():
            return Put(0, 0, n_rows)
        partial = self._backing.write(encoded)
        try:
            self._backing.publish(partial)
        finally:
            partial.discard()
        return Put(encoded.entry.nbytes, n_rows, 0)

    def read(self, context: Context, sequences: Sequences, feature: str) -> list[Tensor]:
        """Read nothing back.

        Raises:
            MissingRows: always, unless no sequence is given.
        """
        if sequences:
            raise MissingRows(feature, len(sequences), len(sequences))
        return []

    def shards_of(self, context: Context, sequences: Sequences, features: Sequence[str]) -> list[str]:
        """Return no shard, for none can be read."""
        return []

    def pin(self) -> AbstractContextManager[None]:
        """Pin nothing: a shard that is in no catalogue is not evicted."""
        return nullcontext()

    def check_space(self, n_bytes: int) -> None:
        """Check nothing; whoever planned the whole capture has."""
