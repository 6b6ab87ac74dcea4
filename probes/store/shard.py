"""Reading one shard: locked while mapped, each block checked when first touched."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from probes.store.layout import BLOCK, IDS, LENGTHS, Header, digest, parse
from probes.store.values import Entry, pack, sequence_digest

if TYPE_CHECKING:
    from torch import Tensor

_MAX_HEADER = 100 << 20


class Damage(Exception):
    """The reason a shard cannot be trusted, and the file it was met in."""

    def __init__(self, reason: str, inode: int) -> None:
        super().__init__(reason)
        self.inode = inode


class Unreadable(Exception):
    """The system's reason for not letting a shard be read; it may well be sound."""


@dataclass(frozen=True)
class Known:
    """What reading a shard has taught so far; outlives the mapping, so that nothing is checked twice."""

    inode: int
    header: Header
    checked: dict[str, np.ndarray] = field(default_factory=dict)
    """Tensor to bool [n_blocks]."""
    ends: dict[str, np.ndarray] = field(default_factory=dict)
    """Counts tensor to the row at which each sequence begins, int64 [n_sequences + 1]."""


class Shard:
    """One open shard. Its shared lock lives exactly as long as the last tensor viewing it."""

    def __init__(self, path: Path, known: Known | None = None) -> None:
        """Open, lock and map the file, checking its header against its name.

        Raises:
            Damage: a header that does not match the name, a file of the wrong size, or no file at all.
            FileNotFoundError: the shard is gone.
            Unreadable: the system refuses.
        """
        self.name = path.stem
        try:
            self._open(path, known)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Damage("it is a link that leads nowhere", path.lstat().st_ino) from error
            raise Unreadable(str(error)) from error

    def _open(self, path: Path, known: Known | None) -> None:
        fd = _open_locked(path)
        try:
            stat = os.fstat(fd)
            if known is None or known.inode != stat.st_ino:
                known = Known(stat.st_ino, _read_header(fd, stat, self.name))
            if stat.st_size != known.header.nbytes:
                raise Damage(f"{stat.st_size} bytes long instead of {known.header.nbytes}", stat.st_ino)
            # The mapping duplicates the descriptor and so carries the lock. Copy-on-write gives torch a
            # writable buffer while the file stays untouched.
            self.map = mmap.mmap(fd, stat.st_size, access=mmap.ACCESS_COPY)
        finally:
            os.close(fd)
        self.known = known
        self.header = known.header

    @property
    def features(self) -> tuple[str, ...]:
        """Return the names of the features."""
        return tuple(self.header.counts)

    def rows(self, feature: str, ordinal: int) -> Tensor:
        """Return the rows of one sequence, a view [count, ...] of the mapped file.

        Raises:
            Damage: a block that does not match its checksum.
        """
        first, last = self._span(feature, ordinal)
        width = self.header.slots[feature].row_bytes
        self._check(feature, np.array([first * width]), np.array([last * width]))
        return self._view(feature)[first:last]

    def pick(self, feature: str, ordinal: int, positions: Sequence[int]) -> Tensor:
        """Return a copy of the given rows of one sequence [n_positions, ...]; negative positions count from the end.

        Raises:
            Damage: a block that does not match its checksum.
            IndexError: a position outside the sequence's rows.
        """
        import torch

        first, last = self._span(feature, ordinal)
        given = np.asarray(positions, dtype=np.int64)
        index = np.where(given < 0, given + last - first, given)
        if ((index < 0) | (index >= last - first)).any():
            wrong = given[(index < 0) | (index >= last - first)][0]
            raise IndexError(f"position {wrong} of a sequence with {last - first} rows of {feature!r}")
        width = self.header.slots[feature].row_bytes
        self._check(feature, (first + index) * width, (first + index + 1) * width)
        return self._view(feature)[torch.from_numpy(first + index)]

    def packed(self, feature: str) -> Tensor:
        """Return all rows of a feature, a view [n_rows, ...]."""
        self._check_all(feature)
        return self._view(feature)

    def counts(self, feature: str) -> np.ndarray:
        """Return rows of each sequence, int64 [n_sequences]."""
        return np.diff(self._ends(self.header.counts[feature]))

    def sequences(self) -> list[np.ndarray]:
        """Return token ids of each sequence, int64 [n_tokens]."""
        return np.split(self._ids, self._ends(LENGTHS)[1:-1]) if len(self._ends(LENGTHS)) > 1 else []

    def entry(self) -> Entry:
        """Return what the catalogue must know of this shard."""
        digests = tuple(sequence_digest(tokens) for tokens in self.sequences())
        return Entry(self.name, self.header.context, self.header.nbytes, digests, self.features)

    def holds(self, context: str, feature: str, ordinal: int, tokens: Sequence[int]) -> bool:
        """Return whether this sequence stands at this place, under this context and with this feature.

        Raises:
            Damage: a block of the ids that does not match its checksum.
        """
        if self.header.context != context or feature not in self.header.counts:
            return False
        ends = self._ends(LENGTHS)
        if not 0 <= ordinal < len(ends) - 1:
            return False
        return np.array_equal(self._ids[ends[ordinal] : ends[ordinal + 1]], pack(tokens))

    def verify(self) -> None:
        """Check every byte not checked before.

        Raises:
            Damage: a block that does not match its checksum.
        """
        for name in self.header.slots:
            self._check_all(name)

    @cached_property
    def _ids(self) -> np.ndarray:
        """Return token ids of all sequences, one after the other."""
        self._check_all(IDS)
        return np.asarray(self._view(IDS).numpy())

    def _span(self, feature: str, ordinal: int) -> tuple[int, int]:
        ends = self._ends(self.header.counts[feature])
        return int(ends[ordinal]), int(ends[ordinal + 1])

    def _ends(self, name: str) -> np.ndarray:
        if name not in self.known.ends:
            self._check_all(name)
            self.known.ends[name] = np.concatenate(([0], np.cumsum(self._view(name).numpy())))
        return self.known.ends[name]

    def _view(self, name: str) -> Tensor:
        import torch

        slot = self.header.slots[name]
        if slot.start == slot.stop:
            return torch.empty(slot.shape, dtype=slot.dtype)
        start, size = self.header.data + slot.start, slot.stop - slot.start
        flat = torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=start)
        return flat.view(slot.dtype).view(slot.shape)

    def _check_all(self, name: str) -> None:
        slot = self.header.slots[name]
        self._check(name, np.array([0]), np.array([slot.stop - slot.start]))

    def _check(self, name: str, starts: np.ndarray, stops: np.ndarray) -> None:
        """Check the blocks of a tensor that hold the given byte ranges, unless they have been."""
        slot = self.header.slots[name]
        checked = self.known.checked.setdefault(name, np.zeros(len(slot.checksums), dtype=bool))
        if checked.all():
            return
        touched = np.zeros(len(checked) + 1, dtype=np.int64)
        filled = stops > starts
        np.add.at(touched, starts[filled] // BLOCK, 1)
        np.add.at(touched, (stops[filled] - 1) // BLOCK + 1, -1)
        with memoryview(self.map) as data:
            for block in np.flatnonzero((np.cumsum(touched)[:-1] > 0) & ~checked):
                start = self.header.data + slot.start + int(block) * BLOCK
                stop = min(start + BLOCK, self.header.data + slot.stop)
                with data[start:stop] as part:
                    if xxhash.xxh3_64_hexdigest(part) != slot.checksums[block]:
                        raise Damage(f"block {block} of {name!r} does not match its checksum", self.known.inode)
                checked[block] = True


def _open_locked(path: Path) -> int:
    while True:
        # Without O_NONBLOCK a named pipe would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not S_ISREG(os.fstat(fd).st_mode):
                raise Damage("it is no file", os.fstat(fd).st_ino)
            fcntl.flock(fd, fcntl.LOCK_SH)
            if os.fstat(fd).st_nlink:
                return fd
        except BaseException:
            os.close(fd)
            raise
        # Evicted between opening and locking: try again until the path is gone or new.
        os.close(fd)


def _read_header(fd: int, stat: os.stat_result, name: str) -> Header:
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if not 0 < length <= min(stat.st_size - 8, _MAX_HEADER):
        raise Damage(f"header of {length} bytes in a file of {stat.st_size}", stat.st_ino)
    header = os.pread(fd, 8 + length, 0)
    if digest(header) != name:
        raise Damage("its name is not the digest of its header", stat.st_ino)
    try:
        return parse(header)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damage(f"unreadable header: {error}", stat.st_ino) from error
