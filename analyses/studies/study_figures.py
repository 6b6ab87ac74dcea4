"""Depth profiles of a study: models overlaid on relative depth, options and prompt sets side by side."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from analyses.results.theme import COLOURS, finish

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
