"""One self-contained HTML page from one or several results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import plotly.graph_objects as go

from analyses.results.card import Card, FigureSpec, Tables
from analyses.results.page import page
from probes.html_card import count

NAMED = 3
"""Analyses or models that a page's heading names; more are counted."""
PREVIEW_ROWS = 12
"""Rows of each table shown in the page; the whole table is in the result's folder."""


@runtime_checkable
class Reported(Protocol):
    """What the page shows of a result."""

    @property
    def analysis(self) -> str:
        """The analysis's name."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """The options it ran with."""
        ...

    @property
    def tables(self) -> Tables:
        """Its tables by name."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Where its numbers come from."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences a reader must know."""
        ...

    @property
    def card(self) -> Card:
        """What its analysis says of it."""
        ...

    @property
    def figures(self) -> Mapping[str, FigureSpec]:
        """The figures its tables can draw."""
        ...

    def figure(self, name: str) -> go.Figure:
        """One figure, drawn from the tables."""
        ...


def write_report(results: Sequence[Reported], path: str | Path, title: str | None = None) -> Path:
    """Writes the page; returns its path."""
    path = Path(path)
    path.write_text(render(results, title), encoding="utf-8")
    return path


def render(results: Sequence[Reported], title: str | None = None) -> str:
    """The page as text."""
    titles = titles_of(results)
    sections = [_section(number, result, titles[number]) for number, result in enumerate(results)]
    return page("report.html", title=title or heading(results), sections=sections)


def heading(results: Sequence[Reported]) -> str:
    """What all the results together are called: their analyses, and their models."""
    named = list(dict.fromkeys(result.card.title for result in results))
    models = list(dict.fromkeys(_model(result) for result in results))
    return " · ".join(
        [
            ", ".join(named) if len(named) <= NAMED else count(len(named), "analysis", "analyses"),
            ", ".join(models) if len(models) <= NAMED else count(len(models), "model"),
        ]
    )


def titles_of(results: Sequence[Reported]) -> list[str]:
    """One title each: analysis and model, and what tells two runs apart that have both in common."""
    plain = [f"{result.card.title} · {_model(result)}" for result in results]
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


def _model(result: Reported) -> str:
    """A model's name: of a folder its last part, since the whole path is a machine's own."""
    ref = str(result.provenance["model"]["ref"])
    return Path(ref).name if Path(ref).is_absolute() or ref.startswith(".") else ref


def _section(number: int, result: Reported, title: str) -> dict[str, Any]:
    figures = [
        {"id": f"figure-{number}-{name}", "spec": spec, "html": _figure_html(result, name)}
        for name, spec in result.figures.items()
    ]
    provenance = result.provenance
    return {
        "title": title,
        "about": result.card.about,
        "reference": result.card.reference,
        "result": result,
        "model": provenance["model"],
        "counts": provenance["counts"],
        "faithful": provenance["faithfulness"],
        "worst": max((i["error"] for i in provenance["faithfulness"]["identities"]), default=0.0),
        "figures": figures,
        "tables": [_table(name, table) for name, table in result.tables.items()],
        "options": json.dumps(dict(result.options), ensure_ascii=False),
        "provenance": json.dumps(dict(provenance), indent=2, ensure_ascii=False, default=str),
    }


def _figure_html(result: Reported, name: str) -> str:
    config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": {"format": "svg", "filename": name}}
    return str(result.figure(name).to_html(full_html=False, include_plotlyjs=False, config=config))


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
