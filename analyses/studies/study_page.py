"""The page of a study: its figures, where each profile peaks, its cells and what failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.registry import get_analysis
from analyses.results.page import figure_html, page
from analyses.results.theme import COLOURS, finish
from analyses.studies.cells import Cell
from analyses.studies.definition import Study
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


PANELS = 24
"""Most panels of one figure."""
COLUMNS = 3
PAGE = 1100
"""Width of the report's column, in pixels."""


def overlay(curve: pd.DataFrame, models: list[str]) -> go.Figure:
    """Draw one profile of one entry of a study, from the table of `index.curves`; a panel for each prompt set and option.

    Args:
        models: every model of the study, so that each keeps its colour in all figures.
    """
    prompts, options = list(curve["prompts"].unique()), list(curve["options"].unique())
    groups = curve.groupby(["prompts", "options"], sort=False, dropna=False)
    panels = sorted(groups, key=lambda panel: (prompts.index(panel[0][0]), options.index(panel[0][1])))[:PANELS]
    columns = min(COLUMNS, len(panels), len(options) if len(prompts) > 1 else len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = make_subplots(
        rows=rows, cols=columns, shared_xaxes="all", shared_yaxes="all", subplot_titles=[_title(k, len(prompts) > 1) for k, _ in panels],
        vertical_spacing=min(0.12, 0.3 / rows), horizontal_spacing=0.05,
    )  # fmt: skip
    seen: set[str] = set()
    for number, (_, panel) in enumerate(panels):
        place = {"row": number // columns + 1, "col": number % columns + 1}
        for model, one in panel.groupby("model", sort=False):
            colour = COLOURS[models.index(str(model)) % len(COLOURS)]
            _add(figure, one.sort_values("depth"), str(model), colour, str(model) not in seen, place)
            seen.add(str(model))
    finish(figure, x="", y="", height=130 + 340 * rows)
    figure.update_xaxes(title=curve["unit"].iloc[0], row=rows)
    figure.update_yaxes(title="relative depth", range=[-0.02, 1.02], col=1)
    figure.update_xaxes(showticklabels=True)
    return figure.update_layout(
        legend={"y": 1 + 50 / (340 * rows)},
        margin={"t": 90},
        width=min(PAGE, 420 * columns + 120) if columns > 1 else 640,
    )


def _title(key: tuple[object, ...], several_prompts: bool) -> str:
    prompts, options = key
    parts = [str(options)] if options else []
    if several_prompts or not parts:
        parts.insert(0, str(prompts or "own prompts"))
    return " · ".join(parts)


def _add(figure: go.Figure, one: pd.DataFrame, model: str, colour: str, legend: bool, place: dict[str, int]) -> None:
    known = one.dropna(subset=["ci_low", "ci_high"])
    if len(known):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        figure.add_scatter(
            x=[*known["ci_low"], *known["ci_high"][::-1]], y=[*known["depth"], *known["depth"][::-1]], fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.16)", line={"width": 0}, mode="lines", hoverinfo="skip",
            showlegend=False, legendgroup=model, **place,
        )  # fmt: skip
    figure.add_scatter(
        x=one["value"], y=one["depth"], mode="lines+markers", name=model, legendgroup=model, showlegend=legend,
        line={"color": colour, "width": 2}, marker={"size": 4}, customdata=one["layer"],
        hovertemplate=f"{model}<br>layer %{{customdata}}, depth %{{y:.2f}}<br>%{{x:.4g}}<extra></extra>", **place,
    )  # fmt: skip
