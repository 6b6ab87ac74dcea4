"""What a run has patched so far, on disk until the run is done, so that a stopped one goes on where it was."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from analyses.results.statistics import Array

FOLDER = "causal_patching"
"""Where in the store's folder unfinished runs are kept."""


@dataclass(frozen=True)
class Journal:
    """Arrays by key, one file each; kept nowhere where the folder is None."""

    folder: Path | None

    def _path(self, key: str) -> Path | None:
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return None if self.folder is None else self.folder / f"{name}.npy"

    def read(self, key: str) -> Array | None:
        """Return what was written under a key; None where there is nothing whole."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        try:
            return np.asarray(np.load(path, allow_pickle=False), dtype=np.float64)
        except (OSError, ValueError):
            path.unlink(missing_ok=True)
            return None

    def write(self, key: str, values: Array) -> None:
        """Keep values under a key, whole or not at all."""
        path = self._path(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        with draft.open("wb") as handle:
            np.save(handle, values)
        os.replace(draft, path)

    def close(self) -> None:
        """Forget everything: the run is done."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def journal_in(root: Path, run: str) -> Journal:
    """Return the journal of a run in a store's folder; one that keeps nothing where the folder cannot be written to.

    Args:
        run: names the run: equal runs share a journal.
    """
    folder = root / FOLDER / hashlib.sha256(run.encode()).hexdigest()[:16]
    return Journal(folder if os.access(root, os.W_OK) else None)
