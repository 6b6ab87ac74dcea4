"""Activations set aside between two blocks: in memory up to a limit, beyond it in an unnamed file."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from probes.errors import ModelError


class Kept:
    """A tensor set aside; it is let go with this object."""

    def __init__(self, tensor: Tensor | None, place: tuple[int, torch.Size, torch.dtype, torch.device] | None) -> None:
        self._tensor, self._place = tensor, place

    def get(self, shelf: Shelf) -> Tensor:
        """Return the tensor, on the device it came from."""
        if self._place is None:
            assert self._tensor is not None
            return self._tensor
        at, shape, dtype, device = self._place
        return shelf.read(at, torch.empty(shape, dtype=dtype)).to(device)


class Shelf:
    """Keeps tensors in memory up to `memory_bytes`, and the others in a file that is gone when the process ends.

    The file is read and written, never mapped, so that memory holds no more than is in use.

    Args:
        folder: where the file lies; made if need be.
        memory_bytes: the most that is kept in memory; None is no limit.

    Raises:
        ModelError: on keeping a tensor for which the disk has no room; says how much it lacks.
    """

    def __init__(self, folder: Path, memory_bytes: int | None) -> None:
        self.folder, self.memory_bytes = folder, memory_bytes
        self.in_memory = self.on_disk = self.most_on_disk = 0
        self._free: dict[int, list[int]] = defaultdict(list)
        self._end = 0
        self._file: Any = None

    def keep(self, tensor: Tensor) -> Kept:
        """Set a tensor aside; it must not change afterwards."""
        n = tensor.nbytes
        if self.memory_bytes is None or self.in_memory + n <= self.memory_bytes:
            kept = Kept(tensor, None)
            self.in_memory += n
            weakref.finalize(kept, self._let_go, n, None)
            return kept
        at = self._write(tensor.detach().cpu().contiguous())
        kept = Kept(None, (at, tensor.shape, tensor.dtype, tensor.device))
        weakref.finalize(kept, self._let_go, n, at)
        return kept

    def read(self, at: int, into: Tensor) -> Tensor:
        """Fill a tensor from the file."""
        data = _bytes(into)
        while data:
            done = os.preadv(self._file.fileno(), [data], at)
            if not done:
                raise ModelError("the file of activations ended early; is its disk full?")
            data, at = data[done:], at + done
        return into

    def _write(self, flat: Tensor) -> int:
        if self._free[flat.nbytes]:
            at = self._free[flat.nbytes].pop()
        else:
            self._check_room(flat.nbytes)
            at = self._end
            self._end += flat.nbytes
        self.on_disk += flat.nbytes
        self.most_on_disk = max(self.most_on_disk, self.on_disk)
        start, data = at, _bytes(flat)
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done
        return start

    def _check_room(self, n: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < n:
            raise ModelError(
                f"streaming keeps {self._end + n:,} bytes of activations in {str(self.folder)!r}, which has {free:,} more "
                "free; free some space or set BATHYSCOPE_CACHE to a folder on another disk"
            )
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, prefix="activations-")  # noqa: SIM115

    def _let_go(self, n: int, at: int | None) -> None:
        if at is None:
            self.in_memory -= n
        else:
            self.on_disk -= n
            self._free[n].append(at)


class Shelved(Sequence[Tensor]):
    """A list of tensors on a shelf."""

    def __init__(self, shelf: Shelf, tensors: Iterable[Tensor] = ()) -> None:
        self._shelf = shelf
        self._kept = [shelf.keep(tensor) for tensor in tensors]

    def append(self, tensor: Tensor) -> None:
        """Set one more tensor aside."""
        self._kept.append(self._shelf.keep(tensor))

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [kept.get(self._shelf) for kept in self._kept[index]]
        return self._kept[index].get(self._shelf)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
