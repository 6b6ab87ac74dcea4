"""A result: named tables, figures drawn from the tables alone, and provenance."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go

from analyses.axes import whole_layers
from analyses.theme import plain_names
from probes.display import Fold, card, count
from probes.errors import OptionError, unknown

FORMAT = 1
"""Version of the folder layout of a saved result."""

Tables = Mapping[str, pd.DataFrame]


@dataclass(frozen=True)
class FigureSpec:
    """How a figure is drawn from tables, and what it says."""

    title: str
    caption: str
    """What is measured, on what, and how to read it; in plain sentences."""
    draw: Callable[[Tables], go.Figure]
    applies: Callable[[Tables], bool] = field(default=lambda tables: True)
    data: Literal["prompts", "weights", "own"] = "prompts"
    """Drawn from the run's prompts, from weights alone, or from other text, which the caption names."""

    def drawn(self, tables: Tables) -> go.Figure:
        """The figure of these tables, as every page shows it."""
        return whole_layers(self.draw(plain_names(tables)))


@dataclass(frozen=True)
class ProfileSpec:
    """One number a layer, drawn on the depth axis that all analyses share."""

    title: str
    unit: str
    """What the number is counted in, for the axis: `share of dimensions`, `nats`."""
    caption: str
    """What is measured and how to read it, in a sentence or two."""
    read: Callable[[Tables], pd.DataFrame]
    """Columns layer and value, one row a layer, and ci_low, ci_high where there is an interval."""
    applies: Callable[[Tables], bool] = field(default=lambda tables: True)


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    On disk: `result.json`, `tables/*.parquet`, `figures/*.json`, `profiles.json`, `report.html`.
    """

    analysis: str
    options: Mapping[str, Any]
    tables: Tables
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """Sentences a reader must know, for instance what was left out and why."""

    @property
    def figures(self) -> dict[str, FigureSpec]:
        """The figures that this result's tables can draw, by name."""
        from analyses.registry import get_analysis

        specs = get_analysis(self.analysis).figures
        return {name: spec for name, spec in specs.items() if spec.applies(self.tables)}

    def figure(self, name: str) -> go.Figure:
        """One figure, drawn from the tables.

        Raises:
            OptionError: an unknown figure, with the legal names.
        """
        specs = self.figures
        if name not in specs:
            raise OptionError(unknown("figure", name, specs))
        return specs[name].drawn(self.tables)

    @property
    def profiles(self) -> dict[str, ProfileSpec]:
        """The depth profiles that this result's tables hold, by name."""
        from analyses.registry import get_analysis

        specs = get_analysis(self.analysis).profiles
        return {name: spec for name, spec in specs.items() if spec.applies(self.tables)}

    def profile(self, name: str) -> pd.DataFrame:
        """One depth profile: columns layer, value and, where there is an interval, ci_low and ci_high.

        Raises:
            OptionError: an unknown profile, with the legal names.
        """
        specs = self.profiles
        if name not in specs:
            raise OptionError(unknown("profile", name, specs))
        return specs[name].read(self.tables)

    def save(self, folder: str | Path) -> Path:
        """Writes the result to `folder`, replacing a result that is there; returns the folder.

        Raises:
            OptionError: the folder holds something that is not a result.
        """
        from analyses.report import write_report

        folder = Path(folder)
        check_output(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            self._write(draft)
            write_report([self], draft / "report.html")
            draft.chmod(0o755)
            _swap(draft, folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return folder

    def _write(self, folder: Path) -> None:
        (folder / "tables").mkdir()
        (folder / "figures").mkdir()
        for name, table in self.tables.items():
            table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
        for name in self.figures:
            (folder / "figures" / f"{name}.json").write_text(str(self.figure(name).to_json()), encoding="utf-8")
        profiles = {name: _profile_record(spec, self.profile(name)) for name, spec in self.profiles.items()}
        (folder / "profiles.json").write_text(json.dumps(profiles), encoding="utf-8")
        record = {
            "format": FORMAT,
            "analysis": self.analysis,
            "options": dict(self.options),
            "provenance": dict(self.provenance),
            "notes": list(self.notes),
            "tables": {name: list(table.columns) for name, table in self.tables.items()},
        }
        (folder / "result.json").write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result saved in `folder`; needs no model.

        Raises:
            OptionError: the folder holds no readable result.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise OptionError(f"{folder} has result format {record['format']}; this version reads {FORMAT}")
            tables = {name: pd.read_parquet(folder / "tables" / f"{name}.parquet") for name in record["tables"]}
            return cls(record["analysis"], record["options"], tables, record["provenance"], tuple(record["notes"]))
        except (OSError, ValueError, KeyError) as error:
            raise OptionError(f"{folder} holds no readable result ({error}); give a folder that a run wrote") from None

    def __repr__(self) -> str:
        tables = ", ".join(f"{name} ({count(len(table), 'row')})" for name, table in self.tables.items())
        return f"Result({self.analysis} on {self._model}; tables {tables or 'none'}; figures {self._figure_names})"

    def _repr_html_(self) -> str:
        provenance = self.provenance
        counts = provenance.get("counts", {})
        work = f"{count(counts.get('forwards', 0), 'forward pass')}, {count(counts.get('held_before', 0), 'feature')} held before, {provenance.get('seconds', 0):.1f} s"
        facts = {
            "figures": self._figure_names,
            "work": work,
            **{f"note {i}": note for i, note in enumerate(self.notes, 1)},
        }
        tables = [(name, f"{len(table):,}", ", ".join(map(str, table.columns))) for name, table in self.tables.items()]
        options = list(self.options.items())
        folds = [
            Fold(f"Tables ({len(tables)})", ("table", "rows", "columns"), tables),
            Fold("Options", ("option", "value"), options),
        ]
        return card(self.analysis, f"on {self._model}", facts, folds)

    @property
    def _figure_names(self) -> str:
        try:
            return ", ".join(self.figures) or "none"
        except OptionError:
            return "none that this version can draw"

    @property
    def _model(self) -> str:
        return str(self.provenance.get("model", {}).get("ref", "no model"))


def _profile_record(spec: ProfileSpec, table: pd.DataFrame) -> dict[str, Any]:
    said = {"title": spec.title, "unit": spec.unit, "caption": spec.caption}
    return {**said, "columns": {str(name): table[name].tolist() for name in table}}


def check_output(folder: Path) -> None:
    """Refuses an output folder that holds something other than an earlier result.

    Raises:
        OptionError: the folder is a file, or holds other things.
    """
    if folder.is_file():
        raise OptionError(f"--out {str(folder)!r} is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "result.json").is_file():
        raise OptionError(f"--out {str(folder)!r} holds files that are not a result: give a new or empty folder")


def _swap(draft: Path, folder: Path) -> None:
    """Puts `draft` in the place of `folder`, which is whole before and after."""
    if folder.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        os.replace(folder, old / "result")
        os.replace(draft, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(draft, folder)
