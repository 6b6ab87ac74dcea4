"""One self-contained HTML page from one or several results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
from plotly.io.json import to_json_plotly

from analyses.results.card import Card, FigureSpec, ProfileSpec, Tables
from analyses.results.depth_axis import Curve, Panel, depth_values, narrowest, peak, relative_values
from analyses.results.page import figure_html, page
from analyses.results.theme import COLOURS, colour_of
from probes.html_card import count
from probes.locked_files import write_whole

NAMED = 3
"""Analyses or models that a page's heading names; more are counted."""
PREVIEW_ROWS = 12
"""Rows of each table shown in the page; the whole table is in the result's folder."""
OPEN = 2
"""Figures of a section that are shown at once; the others are under a fold."""
PANELS = 16
"""Panels beside each other on the depth axis, at most."""


@runtime_checkable
class Reported(Protocol):
    """What the page shows of a result."""

    @property
    def analysis(self) -> str:
        """The analysis's name."""

    @property
    def options(self) -> Mapping[str, Any]:
        """The options it ran with."""

    @property
    def tables(self) -> Tables:
        """Its tables by name."""

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where its numbers come from."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences a reader must know."""

    @property
    def card(self) -> Card:
        """What its analysis says of it."""

    @property
    def figures(self) -> Mapping[str, FigureSpec]:
        """The figures its tables can draw."""

    @property
    def profiles(self) -> Mapping[str, ProfileSpec]:
        """The depth profiles its tables hold."""

    def figure_json(self, name: str) -> str:
        """One figure, drawn from the tables, as Plotly's JSON."""

    def profile(self, name: str) -> pd.DataFrame:
        """One depth profile: columns layer, value and perhaps ci_low, ci_high."""


def write_report(results: Sequence[Reported], path: str | Path, title: str | None = None) -> Path:
    """Write the page; return its path."""
    path = Path(path)
    path.write_text(render(results, title), encoding="utf-8")
    return path


@dataclass
class GrowingReport:
    """A page that is written anew with every result that is added; whoever reads it finds a whole page at any time."""

    path: Path
    title: str
    note: str = ""
    """A sentence that a reader must know before all else."""
    _results: list[Reported] = field(default_factory=list)
    _sections: list[dict[str, Any]] = field(default_factory=list)

    def add(self, result: Reported) -> None:
        """Draw the result and replace the page."""
        self._results.append(result)
        self._sections.append(_section(result))
        write_whole(self.path, _page(self._results, self._sections, self.title, self.note))


def render(results: Sequence[Reported], title: str | None = None) -> str:
    """The page as text."""
    return _page(results, [_section(result) for result in results], title)


def _page(results: Sequence[Reported], sections: Sequence[Mapping[str, Any]], title: str | None, note: str = "") -> str:
    titles = titles_of(results)
    one_subject = len({_subject(result) for result in results}) == 1
    links = [title.replace(f" · {_subject(results[0])}", "", 1) if one_subject else title for title in titles]
    named = [{**section, "title": t, "link": link} for section, t, link in zip(sections, titles, links, strict=True)]
    return page("report.html", title=title or heading(results), note=note, sections=named, depth=_depth(results))


def _depth(results: Sequence[Reported]) -> dict[str, Any] | None:
    """The first profile of every analysis on one depth axis; models of unlike depth share a relative one."""
    subjects = list(dict.fromkeys((_subject(result), _layers(result)) for result in results))
    depths = {layers for _, layers in subjects}
    several, relative = len(subjects) > 1, len(depths) > 1
    firsts = [(result, name) for result in results for name in list(result.profiles)[:1]]
    if not firsts:
        return None
    panels: dict[tuple[str, str], list[Curve]] = {}
    specs: dict[tuple[str, str], ProfileSpec] = {}
    order = list(dict.fromkeys(result.analysis for result in results))
    for result, name in firsts:
        key = (result.analysis, name)
        if key not in panels and len(panels) == PANELS:
            continue
        specs[key] = result.profiles[name]
        subject = (_subject(result), _layers(result))
        colour = COLOURS[subjects.index(subject) % len(COLOURS)] if several else colour_of(result.analysis, order)
        panels.setdefault(key, []).append(Curve(subject[0], colour, result.profile(name), subject[1]))
    drawn = [Panel(specs[key].title, specs[key].unit, tuple(curves)) for key, curves in panels.items()]
    figure = relative_values(drawn, "light") if relative else depth_values(drawn, max(depths), (), "light", several)
    return {
        "html": figure_html(to_json_plotly(figure), "depth", narrowest(drawn)),
        "relative": relative,
        "lines": [_peak(panel) for panel in drawn],
    }


def _peak(panel: Panel) -> tuple[str, str]:
    """A profile's title, and in words where each of its curves is largest."""
    peaks = [(peak(curve.table), f" of {curve.name}" * (len(panel.curves) > 1)) for curve in panel.curves]
    return panel.title, ", ".join(f"layer {layer}{of}" for layer, of in peaks if layer is not None)


def heading(results: Sequence[Reported]) -> str:
    """What all the results together are called: their analyses, and their models, with the edits they were read under."""
    named = list(dict.fromkeys(result.card.title for result in results))
    models = list(dict.fromkeys(_subject(result) for result in results))
    return " · ".join(
        [
            ", ".join(named) if len(named) <= NAMED else count(len(named), "analysis", "analyses"),
            ", ".join(models) if len(models) <= NAMED else count(len(models), "model"),
        ]
    )


def titles_of(results: Sequence[Reported]) -> list[str]:
    """One title each: analysis and model with its edits, and what tells two runs apart that have all in common."""
    plain = [f"{result.card.title} · {_subject(result)}" for result in results]
    alike = {title: [r for r, other in zip(results, plain, strict=True) if other == title] for title in plain}
    told = [f"{title}{_differences(result, alike[title])}" for title, result in zip(plain, results, strict=True)]
    return [
        f"{title} · run {told[: i + 1].count(title)}" if told.count(title) > 1 else title
        for i, title in enumerate(told)
    ]


def _differences(result: Reported, alike: Sequence[Reported]) -> str:
    """This run's values of the options and settings in which runs of one analysis on one model differ."""
    every = [_settings(other) for other in alike]
    own = _settings(result)
    differing = [name for name in own if any(other.get(name) != own[name] for other in every)]
    return "".join(f" · {name} {_words(own[name])}" for name in differing)


def _settings(result: Reported) -> dict[str, Any]:
    provenance = result.provenance
    loaded = {name: provenance.get(name) for name in ("backend", "dtype", "attention")}
    source = {"prompts": Path(provenance.get("prompts_file") or "").name}
    return {**result.options, **loaded, "revision": provenance["model"].get("revision"), **source}


def _words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) or "none"


def _subject(result: Reported) -> str:
    """A model's name and its edits: of a folder its last part, since the whole path is a machine's own."""
    ref = str(result.provenance["model"]["ref"])
    name = Path(ref).name if Path(ref).is_absolute() or ref.startswith(".") else ref
    return " · ".join([name, *result.provenance.get("edits", ())])


def _layers(result: Reported) -> int:
    return int(result.provenance["model"]["layers"])


def _section(result: Reported) -> dict[str, Any]:
    figures = [
        {"name": name, "spec": spec, "html": figure_html(result.figure_json(name), name)}
        for name, spec in result.figures.items()
    ]
    provenance = result.provenance
    return {
        "about": result.card.about,
        "reference": result.card.reference,
        "result": result,
        "model": provenance["model"],
        "edits": provenance.get("edits", []),
        "counts": provenance["counts"],
        "faithful": provenance["faithfulness"],
        "worst": max((i["error"] for i in provenance["faithfulness"]["identities"]), default=0.0),
        "figures": figures[:OPEN],
        "folded": figures[OPEN:],
        "tables": [_table(name, table) for name, table in result.tables.items()],
        "options": json.dumps(dict(result.options), ensure_ascii=False),
        "provenance": json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str),
    }


def _table(name: str, table: pd.DataFrame) -> dict[str, Any]:
    shown = table.head(PREVIEW_ROWS)
    return {
        "name": name,
        "rows": len(table),
        "columns": list(table.columns),
        "cells": [[_cell(value) for value in row] for row in shown.itertuples(index=False)],
    }


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return repr(value) if isinstance(value, str) and value != value.strip() else str(value)
