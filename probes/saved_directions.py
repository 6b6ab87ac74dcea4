"""Directions of the stream that a saved run keeps beside its tables, by name, and the runs that keep some.

A run's folder holds `directions.safetensors`: unit vectors [d_model], a vector of one place only named `NAME@ADDRESS`;
its metadata say of what kind they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from probes.cache_folder import expanded, runs_root
from probes.errors import OptionError, shown

FILE, RECORD = "directions.safetensors", "result.json"
NAMED = 8
"""Names that a message lists."""


@dataclass(frozen=True)
class SavedDirections:
    """The directions of one run."""

    kind: str
    """What they are, such as `probe`: the word by which an edit names one."""
    vectors: Mapping[str, NDArray[np.float32]]

    @classmethod
    def of(cls, kind: str, vectors: Mapping[str, NDArray[np.floating]]) -> SavedDirections:
        """Return vectors [d_model] at unit length; those of no length are left out, since they point nowhere."""
        lengths = {name: float(np.linalg.norm(vector)) for name, vector in vectors.items()}
        return cls(kind, {n: (v / lengths[n]).astype(np.float32) for n, v in vectors.items() if lengths[n] > 0})

    def save(self, folder: Path) -> None:
        """Write them into a run's folder; nothing where there are none."""
        if self.vectors:
            save_file(dict(self.vectors), folder / FILE, metadata={"kind": self.kind})

    @classmethod
    def load(cls, folder: Path) -> SavedDirections | None:
        """Return those of a run's folder; None where it keeps none.

        Raises:
            OptionError: a file that no run wrote.
        """
        path = folder / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                names = file.keys()
                return cls((file.metadata() or {})["kind"], {name: file.get_tensor(name) for name in names})
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise OptionError(
                f"{path} cannot be read as the directions of a run ({error}): run the analysis again"
            ) from None

    @property
    def names(self) -> str:
        """What can be named, in words, with the places of vectors that have one each."""
        places: dict[str, list[str]] = {}
        for full in self.vectors:
            name, _, place = full.rpartition("@") if "@" in full else (full, "", "")
            places.setdefault(name, []).extend([place] if place else [])
        said = [f"{name} at {_spread(at)}" if at else name for name, at in sorted(places.items())]
        return ", ".join(said[:NAMED]) + (f" and {len(said) - NAMED} more" if len(said) > NAMED else "")


def _spread(places: list[str]) -> str:
    places = sorted(places, key=lambda place: (len(place), place))
    return ", ".join(places) if len(places) < 4 else f"{places[0]}, {places[1]}, … {places[-1]}"


def directions_of(kind: str, path: str) -> tuple[str, str, SavedDirections]:
    """Return (the run as it is named, the direction's name, the run's directions) of `RUN/NAME`.

    RUN is a folder, or the name of one in the folder of runs.

    Raises:
        OptionError: no such run, or one that keeps no directions of this kind; says what there is.
    """
    cuts = [at for at, sign in enumerate(path) if sign == "/" and 0 < at < len(path) - 1]
    for cut in reversed(cuts):
        run, name = path[:cut], path[cut + 1 :]
        for folder in (expanded(run), runs_root() / run):
            if _is_run(folder):
                return run, name, _of_kind(kind, run, folder)
    there = sorted(f.parent.name for f in runs_root().glob(f"*/{FILE}"))
    raise OptionError(
        f"{kind} {shown(path)} names no saved run: write {kind} RUN/NAME, RUN a folder that a run wrote, or its name in "
        f"{runs_root()}, where {', '.join(there[:NAMED]) or 'none'} keep{'s' if len(there) < 2 else ''} directions"
    )


def _is_run(folder: Path) -> bool:
    try:
        return (folder / RECORD).is_file()
    except (OSError, ValueError):
        return False


def _of_kind(kind: str, run: str, folder: Path) -> SavedDirections:
    saved = SavedDirections.load(folder)
    if saved is None:
        try:
            analysis = str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["analysis"])
        except (OSError, ValueError, KeyError, TypeError):
            analysis = "an unknown analysis"
        raise OptionError(
            f"run {shown(run)} ({analysis}) keeps no directions: runs of concept_depth keep probe RUN/DATASET and those of "
            "communication_channels channel RUN/LAYER.HEAD.COMPONENT; one saved before they did must be run again"
        )
    if saved.kind != kind:
        raise OptionError(
            f"run {shown(run)} keeps no {kind} but {saved.kind} directions: write {saved.kind} {run}/NAME, "
            f"NAME one of {saved.names}"
        )
    return saved
