"""The tensors of a checkpoint, read one at a time under the names that the checkpoint has for them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Protocol

import xxhash
from safetensors import safe_open
from torch import Tensor

from probes.models.sources.tensor_files import INDEX, SINGLE


class CheckpointTensors(Protocol):
    """Tensors that stay on disk until they are asked for."""

    @property
    def names(self) -> Collection[str]:
        """The name of every tensor."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that they are read from."""
        ...

    def read(self, name: str) -> tuple[Tensor, int]:
        """Return a tensor, and the bytes that it takes on disk; it may be a view of a mapped file."""
        ...

    def rows(self, names: Collection[str]) -> Iterator[Tensor]:
        """Yield one row of every named tensor as it lies on disk, always the same one of a name."""
        ...


class SafetensorsFolder:
    """The safetensors files of a model folder, mapped while a tensor is copied, then let go."""

    def __init__(self, folder: Path) -> None:
        self._files = _files(folder)

    @property
    def names(self) -> Collection[str]:
        """The name of every tensor."""
        return self._files.keys()

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that they are read from."""
        return tuple(sorted(set(self._files.values())))

    def read(self, name: str) -> tuple[Tensor, int]:
        """Return a view of the mapped file, which is closed with its last view, and its bytes."""
        with safe_open(self._files[name], framework="pt", device="cpu") as file:
            mapped = file.get_tensor(name)
        return mapped, mapped.nbytes

    def rows(self, names: Collection[str]) -> Iterator[Tensor]:
        """Yield one row of every named tensor, file by file."""
        for path in self.files:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in (name for name in names if self._files[name] == path):
                    yield _row(file.get_slice(name), row_number(name))


def row_number(name: str) -> int:
    """Return a large number that says which row of a tensor is looked at."""
    return xxhash.xxh3_64_intdigest(name.encode())


def _row(weight: Any, number: int) -> Tensor:
    shape = weight.get_shape()
    row: Tensor = weight[tuple(slice(number % n, number % n + 1) for n in shape[:-1])] if shape else weight[...]
    return row


def _files(folder: Path) -> dict[str, Path]:
    """Every tensor name of the folder's checkpoint with the file that holds it."""
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        file_names: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in file_names.items()}
    with safe_open(folder / SINGLE, framework="pt", device="cpu") as file:
        return dict.fromkeys(file.keys(), folder / SINGLE)
