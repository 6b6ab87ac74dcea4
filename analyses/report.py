"""One self-contained HTML page from one or several results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analyses.page import page
from analyses.registry import get_analysis
from analyses.result import Result

PREVIEW_ROWS = 12
"""Rows of each table shown in the page; the whole table is in the result's folder."""


def write_report(results: Sequence[Result], path: str | Path, title: str | None = None) -> Path:
    """Writes the page; returns its path."""
    path = Path(path)
    path.write_text(render(results, title), encoding="utf-8")
    return path


def render(results: Sequence[Result], title: str | None = None) -> str:
    """The page as text."""
    sections = [_section(number, result) for number, result in enumerate(results)]
    heading = title or " · ".join(section["title"] for section in sections)
    return page("report.html", title=heading, sections=sections)


def _section(number: int, result: Result) -> dict[str, Any]:
    analysis = get_analysis(result.analysis)
    figures = [
        {"id": f"figure-{number}-{name}", "spec": spec, "html": _figure_html(result, name)}
        for name, spec in result.figures.items()
    ]
    provenance = result.provenance
    return {
        "title": analysis.title,
        "about": (analysis.__doc__ or "").split("\n")[0],
        "reference": analysis.reference,
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


def _figure_html(result: Result, name: str) -> str:
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
