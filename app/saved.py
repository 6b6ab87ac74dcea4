"""Saved runs: found, opened and deleted; needs no model and, for the list and the profiles, no torch; the list alone needs no pandas."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import streamlit as st
import xxhash

from analyses.results.record import read_profiles
from app.places import runs_root
from probes.errors import OptionError

if TYPE_CHECKING:
    import pandas as pd

    from analyses.results.result import Result

DEPTH = 3
"""How many folders deep runs are looked for."""


@dataclass(frozen=True)
class Run:
    """One saved run."""

    name: str
    """Its folder, relative to the folder of runs."""
    folder: Path
    stamp: int
    """When its record was written, in nanoseconds; a run saved again has another."""
    record: dict[str, Any]
    """`result.json`, without the tables."""

    @property
    def analysis(self) -> str:
        return str(self.record["analysis"])

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.record["provenance"])

    @property
    def model(self) -> str:
        return str(self.record["provenance"]["model"]["ref"])

    @property
    def layers(self) -> int:
        return int(self.record["provenance"]["model"]["layers"])

    @property
    def edits(self) -> tuple[str, ...]:
        """The edits under which the model was read."""
        return tuple(self.record["provenance"].get("edits", ()))

    @property
    def subject(self) -> str:
        """What was read, in words: the model, its layers, and its edits where it has some."""
        return " · ".join([self.model, f"{self.layers} layers", *self.edits])

    @property
    def prompts(self) -> str:
        """Which prompts it ran on: equal for runs on the same ones, whatever the analysis and the model."""
        provenance = self.record["provenance"]
        known = provenance.get("prompts") or provenance.get("prompts_file") or self.name
        return xxhash.xxh3_64_hexdigest(str(known).encode())

    @property
    def created(self) -> str:
        return str(self.record["provenance"].get("created", ""))


@dataclass(frozen=True)
class Profile:
    """One number a layer, of one run."""

    run: str
    analysis: str
    name: str
    title: str
    unit: str
    caption: str
    table: pd.DataFrame
    """Columns layer, value and perhaps ci_low, ci_high."""


def saved_runs() -> list[Run]:
    """Every readable run, newest first."""
    runs = [run for path in _records(runs_root(), DEPTH) if (run := _run(path))]
    return sorted(runs, key=lambda run: (run.created, run.stamp), reverse=True)


def _records(folder: Path, depth: int) -> list[Path]:
    if not folder.is_dir():
        return []
    if (folder / "result.json").is_file():
        return [folder / "result.json"]
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return [record for path in inside if depth for record in _records(path, depth - 1)]


def _run(path: Path) -> Run | None:
    try:
        stamp = path.stat().st_mtime_ns
        record = _record(str(path), stamp)
    except (OSError, ValueError):
        return None
    if not {"analysis", "provenance", "tables"} <= record.keys():
        return None
    return Run(path.parent.relative_to(runs_root()).as_posix(), path.parent, stamp, record)


@st.cache_data(max_entries=256, show_spinner=False)
def _record(path: str, stamp: int) -> dict[str, Any]:
    record = json.loads(Path(path).read_text(encoding="utf-8"))
    return record if isinstance(record, dict) else {}


def open_run(run: Run) -> Result:
    """The run's result; its tables are shared between sessions and must not be changed.

    Raises:
        OptionError: the folder holds no readable result.
    """
    return _result(str(run.folder), run.stamp)


@st.cache_resource(max_entries=12, ttl=3600, show_spinner=False)
def _result(folder: str, stamp: int) -> Result:
    from analyses.results.result import Result

    return Result.load(folder)


def profiles_of(run: Run) -> list[Profile]:
    """What the run says of each layer; empty where it says nothing or cannot be read."""
    try:
        records = _profiles(str(run.folder), run.stamp)
    except (OSError, ValueError, OptionError):
        return []
    from pandas import DataFrame

    return [
        Profile(run.name, run.analysis, name, r["title"], r["unit"], r["caption"], DataFrame(r["columns"]))
        for name, r in records.items()
    ]


@st.cache_data(max_entries=256, show_spinner=False)
def _profiles(folder: str, stamp: int) -> dict[str, Any]:
    if profiles := read_profiles(Path(folder)):
        return profiles
    result = _result(folder, stamp)  # a run of an earlier version
    return {
        name: {
            "title": spec.title,
            "unit": spec.unit,
            "caption": spec.caption,
            "columns": result.profile(name).to_dict("list"),
        }
        for name, spec in result.profiles.items()
    }


def delete_run(run: Run) -> None:
    """Remove the run's folder.

    Raises:
        OptionError: it is not a run inside the folder of runs.
    """
    root, folder = runs_root().resolve(), run.folder
    if folder.is_symlink() or root not in folder.resolve().parents or not (folder / "result.json").is_file():
        raise OptionError(f"{str(folder)!r} is not a run inside {str(root)!r}; delete it by hand")
    shutil.rmtree(folder)
