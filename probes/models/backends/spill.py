"""Residual streams kept on disk between two blocks."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.errors import ModelError


class Spill:
    """An unnamed file with one slot for each batch's residual stream, overwritten in place by every block.

    It is read and written, never mapped, so that memory holds one batch; it is gone when closed or when the process ends.

    Args:
        folder: where the file lies; made if need be.
        rows: [batch * pos] of each slot.
        row_bytes: bytes of a row.

    Raises:
        ModelError: the disk has not enough room; says how much it lacks.
    """

    def __init__(self, folder: Path, rows: Sequence[int], row_bytes: int) -> None:
        self.nbytes = sum(rows) * row_bytes
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self.nbytes:
            raise ModelError(
                f"streaming keeps {self.nbytes:,} bytes of residuals in {str(folder)!r}, which has {free:,} free; "
                "free some space or set BATHYSCOPE_CACHE to a folder on another disk"
            )
        self._starts = [0, *accumulate(n * row_bytes for n in rows)]
        self._file = tempfile.TemporaryFile(dir=folder, prefix="residuals-")  # noqa: SIM115
        self._meta: dict[int, tuple[torch.Size, torch.dtype]] = {}

    def write(self, slot: int, stream: Float[Tensor, "batch pos d_model"]) -> None:
        """Write `stream` [batch, pos, d_model] into a slot."""
        flat = stream.detach().cpu().contiguous()
        assert flat.nbytes <= self._starts[slot + 1] - self._starts[slot]
        self._meta[slot] = (flat.shape, flat.dtype)
        data = _bytes(flat)
        at = self._starts[slot]
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done

    def read(self, slot: int) -> Float[Tensor, "batch pos d_model"]:
        """Return the stream last written to a slot, [batch, pos, d_model], on the CPU."""
        shape, dtype = self._meta[slot]
        stream = torch.empty(shape, dtype=dtype)
        data = _bytes(stream)
        at = self._starts[slot]
        while data:
            done = os.preadv(self._file.fileno(), [data], at)
            if not done:
                raise ModelError("the file of residuals ended early; is its disk full?")
            data, at = data[done:], at + done
        return stream

    def __enter__(self) -> Spill:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def _bytes(stream: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    array: Any = stream.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
