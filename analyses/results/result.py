"""A result: named tables, figures drawn from the tables alone, and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analyses.registry import get_analysis, names
from analyses.results.card import Card, FigureSpec, ProfileSpec, Tables
from analyses.results.exchange import replacing, sweep
from analyses.results.output_folder import check_output
from analyses.results.record import FORMAT, read_record, readable
from analyses.results.report import write_report
from probes.errors import OptionError, UserError, unknown
from probes.html_card import Fold, card, count
from probes.saved_directions import SavedDirections


@dataclass(frozen=True)
class Result:
    """What an analysis found.

    On disk: `result.json`, `tables/*.parquet`, `figures/*.json`, `profiles.json`, `report.html`, and
    `directions.safetensors` where it has directions.
    """

    analysis: str
    options: Mapping[str, Any]
    tables: Tables
    provenance: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    """Sentences a reader must know, for instance what was left out and why."""

    given_card: Card | None = field(default=None, repr=False, compare=False)
    """The card its analysis made; None where it is read by the analysis's name."""
    folder: Path | None = field(default=None, compare=False)
    """Where it was loaded from; None for one that was just computed."""
    directions: SavedDirections | None = field(default=None, repr=False, compare=False)
    """Directions of the stream, by which edits may name them."""

    @property
    def card(self) -> Card:
        """Title, reference, figures and profiles.

        Raises:
            OptionError: no card was given, and no analysis of that name is installed.
        """
        return self.given_card or Card.of(get_analysis(self.analysis))

    @property
    def figures(self) -> dict[str, FigureSpec]:
        """The figures that this result's tables can draw, by name."""
        specs = self.card.figures
        with self.drawing("figures"):
            return {name: spec for name, spec in specs.items() if spec.applies(self.tables)}

    def figure(self, name: str) -> go.Figure:
        """One figure, drawn from the tables.

        Raises:
            OptionError: an unknown figure, with the legal names; or saved tables that it cannot be drawn from.
        """
        specs = self.figures
        if name not in specs:
            raise OptionError(unknown("figure", name, specs))
        with self.drawing(f"figure {name!r}"):
            return specs[name].drawn(self.tables)

    def figure_json(self, name: str) -> str:
        """One figure as Plotly's JSON; drawn once, for the file, the page and a report of several results.

        Raises:
            OptionError: as `figure`.
        """
        if name not in self._drawn:
            self._drawn[name] = str(self.figure(name).to_json())
        return self._drawn[name]

    @cached_property
    def _drawn(self) -> dict[str, str]:
        return {}

    @property
    def profiles(self) -> dict[str, ProfileSpec]:
        """The depth profiles that this result's tables hold, by name."""
        specs = self.card.profiles
        with self.drawing("profiles"):
            return {name: spec for name, spec in specs.items() if spec.applies(self.tables)}

    def profile(self, name: str) -> pd.DataFrame:
        """One depth profile: columns layer, value and, where there is an interval, ci_low and ci_high.

        Raises:
            OptionError: an unknown profile, with the legal names; or saved tables that it cannot be read from.
        """
        specs = self.profiles
        if name not in specs:
            raise OptionError(unknown("profile", name, specs))
        with self.drawing(f"profile {name!r}"):
            return specs[name].read(self.tables)

    @contextmanager
    def drawing(self, what: str) -> Iterator[None]:
        """Within it, a fault is one of the saved tables, not ours, where the result was loaded.

        Raises:
            OptionError: names the folder and `what` could not be drawn.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            if self.folder is None:
                raise
            raise OptionError(
                f"{self.folder}: its tables do not make the {what} of {self.analysis} ({type(error).__name__}: {error}); "
                "they were changed, or another version wrote them: run the analysis again"
            ) from error

    def save(self, folder: str | Path) -> Path:
        """Write the result to `folder` in one step; return the folder.

        Of a result that is there, the files that it wrote are replaced; everything else in the folder stays.

        Raises:
            OptionError: the path is no folder, or the folder holds something that is not a result; or it cannot be
                written, for instance for lack of room. What stood there stands.
        """
        folder = Path(folder)
        try:
            with replacing(folder, check_output) as draft:
                self._write(draft)
        except (OSError, UnicodeError) as error:
            raise OptionError(
                f"the result could not be saved in {str(folder)!r} ({error}): what stood there stands; "
                "make room, or give another folder"
            ) from error
        return folder

    def _write(self, folder: Path) -> None:
        (folder / "tables").mkdir()
        (folder / "figures").mkdir()
        for name, table in self.tables.items():
            table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
        for name in self.figures:
            (folder / "figures" / f"{name}.json").write_text(self.figure_json(name), encoding="utf-8")
        profiles = {name: _profile_record(spec, self.profile(name)) for name, spec in self.profiles.items()}
        if self.directions is not None:
            self.directions.save(folder)
        (folder / "profiles.json").write_text(json.dumps(profiles), encoding="utf-8")
        write_report([self], folder / "report.html")
        record = {
            "format": FORMAT,
            "analysis": self.analysis,
            "options": dict(self.options),
            "provenance": dict(self.provenance),
            "notes": list(self.notes),
            "card": self.card.record(self.tables),
            "tables": {name: list(table.columns) for name, table in self.tables.items()},
            "files": ["result.json", *sorted(_files(folder))],
        }
        (folder / "result.json").write_text(json.dumps(record, indent=2, default=str), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Result:
        """The result saved in `folder`; needs no model.

        Raises:
            OptionError: the folder holds no readable result.
        """
        folder = Path(folder)
        sweep(folder.parent)
        with readable(folder):
            record = read_record(folder)
            tables = {name: _table(folder, name, columns) for name, columns in record["tables"].items()}
            directions = SavedDirections.load(folder)
            saved_card = None if record["analysis"] in names() else Card.saved(folder, record)
        said = (record["analysis"], record["options"], tables, record["provenance"], tuple(record["notes"]))
        return cls(*said, saved_card, folder, directions)

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


def _files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _table(folder: Path, name: str, columns: list[str]) -> pd.DataFrame:
    """One saved table.

    Raises:
        ValueError: it cannot be read, or has other columns than it was saved with.
    """
    path = folder / "tables" / f"{name}.parquet"
    try:
        table = pd.read_parquet(path)
    except Exception as error:
        # A damaged file makes its reader fail in any way whatever.
        raise ValueError(f"tables/{path.name}: {type(error).__name__}: {error}") from error
    if list(table.columns) != columns:
        raise ValueError(f"tables/{path.name} has columns {list(table.columns)} and was saved with {columns}")
    return table
