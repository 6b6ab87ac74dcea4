"""What a capture needs of a store, whether the store can be read back or is only added to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from probes.store.names import Names
from probes.store.values import Context, Packet, Put, Sequences

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class RowStore(Protocol):
    """Rows by context, token ids and feature; kept by `ActivationStore` and by `AppendOnlyWriter`."""

    root: Path
    names: Names

    def contains(self, context: Context, sequences: Sequences, features: Sequence[str]) -> np.ndarray:
        """Return which rows can be read: bool [n_sequences, n_features]."""

    def put(self, packet: Packet) -> Put:
        """Write the rows of a packet that the store does not know of; they are durable on return."""

    def read(self, context: Context, sequences: Sequences, feature: str) -> list[Tensor]:
        """Return one tensor [count, ...] per sequence, in the order given.

        Raises:
            MissingRows: some cannot be read.
        """

    def shards_of(self, context: Context, sequences: Sequences, features: Sequence[str]) -> list[str]:
        """Return the names of the shards that reading these rows opens."""

    def pin(self) -> AbstractContextManager[None]:
        """Keep every shard that is written, read or reported inside the block from eviction until its end."""

    def check_space(self, n_bytes: int) -> None:
        """Refuse a run that cannot fit, with a StoreError."""
