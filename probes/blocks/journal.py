"""Finished groups of blocks of a long piece of work, kept on disk until all of it is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.locked_files import replacing
from probes.models.fingerprint.checksum import checksum, combined

GROUPS = 8
"""Groups that a model's blocks are divided into; activations are kept at the end of each."""
DAYS = 14
"""How long the groups of work that nobody went on with are kept."""


@dataclass(frozen=True)
class Journal:
    """The folder of one piece of work; the same work finds it again after a kill.

    Args:
        folder: where it lies.
        n_layers: blocks of the model.
    """

    folder: Path
    n_layers: int

    def ends_group(self, layer: int) -> bool:
        """Tell whether a group of blocks ends with block `layer`."""
        size = -(-self.n_layers // GROUPS)
        return (layer + 1) % size == 0 or layer + 1 == self.n_layers

    def remove(self) -> None:
        """Remove the folder: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear_old(self) -> None:
        """Remove the folders beside this one that nobody wrote to for a while."""
        for folder in self.folder.parent.glob("*"):
            if folder.stat().st_mtime < time.time() - DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoint:
    """The activations of one run through the blocks, kept at the ends of groups.

    Args:
        journal: where they are kept.
        key: which run, the same in every process that does the same work.
    """

    journal: Journal
    key: str

    def saved(self) -> list[tuple[int, dict[str, Tensor]]]:
        """Return what was kept, as (blocks done, tensors) in order."""
        parts = []
        for path in sorted(self.journal.folder.glob(f"{self.key}-*.safetensors")):
            try:
                parts.append((int(path.stem.rpartition("-")[2]), load_file(path)))
            except (OSError, SafetensorError):
                break
        return parts

    def save(self, done: int, tensors: Mapping[str, Tensor], instead: bool) -> None:
        """Keep tensors after `done` blocks, whole or not at all; `instead` of what was kept before, or beside it."""
        self.journal.folder.mkdir(parents=True, exist_ok=True)
        before = list(self.journal.folder.glob(f"{self.key}-*.safetensors")) if instead else []
        with replacing(self.journal.folder / f"{self.key}-{done:04d}.safetensors") as draft:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, draft)
        for path in before:
            path.unlink(missing_ok=True)


def key_of(place: tuple[int, ...], entering: tuple[Tensor, ...]) -> str:
    """Return the key of a run: its place in the work, and what enters it."""
    return combined([repr(place), *(f"{tensor.dtype}{tuple(tensor.shape)}{checksum(tensor)}" for tensor in entering)])
