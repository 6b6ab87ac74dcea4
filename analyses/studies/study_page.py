"""The page of a study: its figures, where each profile peaks, its cells and what failed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from analyses.registry import get_analysis
from analyses.results.page import figure_html, page
from analyses.studies.cells import Cell
from analyses.studies.definition import Study
from analyses.studies.study_figures import PANELS, overlay
from analyses.studies.tidy_tables import summary

SHOWN = [
    "entry", "model", "prompts", "options", "title", "n_seeds", "peak_layer", "peak_depth", "peak", "ci_low", "ci_high",
]  # fmt: skip
"""Columns of the summary on the page."""


def render(study: Study, cells: Sequence[Cell], index: pd.DataFrame, curve: pd.DataFrame) -> str:
    """Return the page as text, self-contained apart from the links to its cells."""
    labels = {cell.name: cell.label for cell in cells}
    states = index["state"].value_counts()
    lines = [_line(labels, row) for _, row in index.iterrows()]
    models = list(index["model"].unique())
    return page(
        "study.html",
        title=study.title or study.name,
        total=len(index),
        done=int(states.get("done", 0)),
        failed=[line for line in lines if line["state"] == "failed"],
        models=models,
        entries=list(index["entry"].unique()),
        seeds=sorted({cell.seed for cell in cells if cell.seed is not None}),
        files=["index.parquet", "profiles.parquet", "tables/index.csv", "tables/curves.csv", "tables/summary.tex"],
        sections=list(_sections(curve, models)),
        summary=_summary(curve),
        cells=lines,
    )


def _line(labels: dict[str, str], row: pd.Series) -> dict[str, Any]:
    def number(name: str, form: str) -> str:
        return "" if pd.isna(row[name]) else format(row[name], form)

    return {
        "label": labels[row["cell"]],
        "state": row["state"],
        "error": row["error"],
        "result": row["result"] if isinstance(row["result"], str) else "",
        "layers": number("layers", ","),
        "tokens": number("tokens", ","),
        "forwards": number("forwards", ","),
        "seconds": number("seconds", ".1f"),
    }


def _sections(curve: pd.DataFrame, models: list[str]) -> Iterator[dict[str, Any]]:
    for (entry, name), of_entry in curve.groupby(["entry", "analysis"], sort=False):
        analysis = get_analysis(str(name))
        figures = [_figure(analysis, str(p), one, models) for p, one in of_entry.groupby("profile", sort=False)]
        title = analysis.title if entry == name else f"{analysis.title}: {entry}"
        yield {"title": title, "about": (analysis.__doc__ or "").split("\n")[0], "figures": figures}


def _figure(analysis: Any, name: str, one: pd.DataFrame, models: list[str]) -> dict[str, str]:
    spec = analysis.profiles[name]
    panels = one[["prompts", "options"]].drop_duplicates()
    return {
        "title": spec.title,
        "caption": f"{spec.caption} {_about(one)}"
        + (f" The first {PANELS} of {len(panels)} panels." if len(panels) > PANELS else ""),
        "html": figure_html(str(overlay(one, models).to_json()), name),
    }


def _about(one: pd.DataFrame) -> str:
    """Say what the bands of a figure are."""
    seeds = int(one["n_seeds"].max())
    if one["ci_low"].isna().all():
        return "One line per model; no interval is known."
    if seeds == 1:
        return "One line per model; bands are the 95 % intervals of each cell's own data."
    return (
        f"One line per model, the mean over {seeds} seeds; bands add in squares the 95 % intervals of each cell's own data "
        "and of the mean over seeds (Student)."
    )


def _summary(curve: pd.DataFrame) -> dict[str, Any]:
    short = summary(curve)[SHOWN].rename(columns={"title": "profile", "peak_depth": "relative depth"})
    rows = [[_text(value) for value in row] for row in short.itertuples(index=False)]
    return {"columns": [name.replace("_", " ") for name in short.columns], "cells": rows}


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if value != value else f"{value:.3g}"
    return str(value)
