"""The depth figure: the model as a column of layers, and every profile beside it on the same axis."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from analyses.results.theme import INK, LINE, SELECTED, band, finish, side_by_side

COLUMN = "#9fb3c4"
CHOSEN = "#E69F00"
TRUE = "#009E73"
COLUMN_SHARE = 0.42
"""Width of the column of layers, beside a panel's 1."""
SPACING = 0.014
"""Between two panels, as a share of the figure."""
CHARACTER = 6.4
"""Pixels of a heading's character, at most on average over a line."""
GAP = 10
"""Pixels between two headings."""
TICKS = 88
"""Pixels that a panel needs for its ticks."""
MARGIN = 68
"""Pixels left and right of all panels."""


@dataclass(frozen=True)
class Curve:
    """A profile of one run."""

    name: str
    colour: str
    table: pd.DataFrame
    """Columns layer, value and perhaps ci_low, ci_high."""
    n_layers: int
    """Layers of the model it is of."""


@dataclass(frozen=True)
class Panel:
    """One profile, or those of several runs laid over one another."""

    title: str
    unit: str
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class Mark:
    """Layers that the truth of one question names."""

    name: str
    """The question, such as `readable attribute at r`."""
    layers: tuple[int, ...]
    whole: bool
    """Whether the layers are an interval, drawn as a line, or single ones."""


def peak(profile: pd.DataFrame) -> int | None:
    """Return the layer at which a profile is largest; None where it has no value."""
    known = profile.dropna(subset="value")
    return int(known["layer"].iloc[int(known["value"].argmax())]) if len(known) else None


def depth_figure(
    panels: Sequence[Panel],
    n_layers: int,
    layers: Sequence[int],
    mode: str,
    legend: bool = False,
    truth: Sequence[Mark] = (),
) -> go.Figure:
    """Layer 0 at the bottom; `layers` are marked across all panels, and `truth` has one of its own."""
    titles = ["layers", *(wrapped(panel.title, len(panels)) for panel in panels), *["truth"] * bool(truth)]
    widths = [COLUMN_SHARE, *[1.0] * (len(panels) + bool(truth))]
    figure = side_by_side(titles, column_widths=widths, horizontal_spacing=SPACING)
    _column(figure, n_layers, layers)
    for number, panel in enumerate(panels, 2):
        for curve in panel.curves:
            _curve(figure, number, panel, curve, curve.table["layer"], legend and number == 2)
    if truth:
        _truth(figure, len(widths), truth)
    finish(figure, x="", y="", height=max(430, 17 * n_layers + 190))
    _axes(figure, panels, n_layers, mode)
    for layer in layers:
        figure.add_hrect(
            y0=layer - 0.5, y1=layer + 0.5, fillcolor=SELECTED[mode], line_width=0, layer="below", row=1, col="all"
        )
    return figure


def relative_figure(panels: Sequence[Panel], mode: str) -> go.Figure:
    """Draw profiles of several models on relative depth: 0 is a model's first block, at the bottom, and 1 its last."""
    figure = side_by_side([wrapped(panel.title, len(panels)) for panel in panels], horizontal_spacing=SPACING)
    named: set[str] = set()
    for number, panel in enumerate(panels, 1):
        for curve in panel.curves:
            depth = curve.table["layer"] / max(curve.n_layers - 1, 1)
            _curve(figure, number, panel, curve, depth, curve.name not in named)
            named.add(curve.name)
    finish(figure, x="", y="", height=560)
    figure.update_yaxes(range=[-0.03, 1.03], gridcolor=LINE[mode], zeroline=False)
    figure.update_yaxes(title="relative depth", row=1, col=1)
    _name_panels(figure, panels, mode, first=1)
    return figure


def narrowest(panels: Sequence[Panel]) -> int:
    """The width in pixels below which headings of neighbouring panels would touch."""
    words = [line for panel in panels for text in (panel.title, panel.unit) for line in lines_of(text, len(panels))]
    longest = max(map(len, words), default=0)
    panel = max(TICKS, CHARACTER * longest + GAP)
    return round((panel * (len(panels) + COLUMN_SHARE)) / (1 - SPACING * len(panels)) + MARGIN)


def wrapped(text: str, panels: int) -> str:
    """`text` in lines that fit above or below one of that many panels."""
    return "<br>".join(lines_of(text, panels))


def lines_of(text: str, panels: int) -> list[str]:
    """The lines of a heading."""
    return textwrap.wrap(text, min(20, max(9, 120 // panels)), break_long_words=False)


def _column(figure: go.Figure, n_layers: int, layers: Sequence[int]) -> None:
    every = list(range(n_layers))
    figure.add_bar(
        y=every, x=[1] * n_layers, orientation="h", name="layer", showlegend=False, row=1, col=1, text=every,
        textposition="inside", insidetextanchor="middle", textangle=0, textfont={"size": 10, "color": "#101820"},
        marker={"color": [CHOSEN if layer in layers else COLUMN for layer in every], "line": {"width": 0}},
        hovertemplate="layer %{y}: click to select<extra></extra>",
    )  # fmt: skip


def _curve(figure: go.Figure, column: int, panel: Panel, curve: Curve, depth: pd.Series, legend: bool) -> None:
    table = curve.table
    if {"ci_low", "ci_high"} <= set(table):
        band(figure, depth, table["ci_low"], table["ci_high"], curve.colour, upright=True, row=1, col=column)
    figure.add_scatter(
        x=table["value"], y=depth, customdata=table["layer"], mode="lines+markers", name=curve.name,
        line={"color": curve.colour, "width": 1.6}, marker={"size": 5}, showlegend=legend, legendgroup=curve.name,
        row=1, col=column,
        hovertemplate=f"{panel.title}<br>layer %{{customdata}}: %{{x:.4g}} {panel.unit}<br>{curve.name}<extra></extra>",
    )  # fmt: skip


def _truth(figure: go.Figure, column: int, marks: Sequence[Mark]) -> None:
    for place, mark in enumerate(marks, 1):
        figure.add_scatter(
            x=[place] * len(mark.layers), y=list(mark.layers), mode="lines+markers" if mark.whole else "markers", name=mark.name,
            line={"color": TRUE, "width": 5}, marker={"color": TRUE, "size": 9, "symbol": "diamond"}, showlegend=False,
            hovertemplate=f"{mark.name}: layer %{{y}}<extra>truth</extra>", row=1, col=column,
        )  # fmt: skip
    figure.update_xaxes(title="question", tickvals=list(range(1, len(marks) + 1)), row=1, col=column)


def _axes(figure: go.Figure, panels: Sequence[Panel], n_layers: int, mode: str) -> None:
    figure.update_yaxes(
        range=[-0.7, n_layers - 0.3], dtick=1 if n_layers <= 16 else 5, gridcolor=LINE[mode], zeroline=False
    )
    figure.update_yaxes(title="layer", row=1, col=1)
    _name_panels(figure, panels, mode, first=2)
    figure.update_xaxes(visible=False, row=1, col=1)


def _name_panels(figure: go.Figure, panels: Sequence[Panel], mode: str, first: int) -> None:
    """Put units below the panels from column `first` on, and leave room for the headings above."""
    size = 12 if len(panels) <= 6 else 11
    # Axis by axis: plotly takes ten times as long to find the axes of one setting as to set all those of one axis.
    for number, axis in enumerate(figure.select_xaxes(), 1):
        panel = panels[number - first] if first <= number < first + len(panels) else None
        title = {"text": wrapped(panel.unit, len(panels)), "font": {"size": size - 1}, "standoff": 6} if panel else {}
        axis.update(
            gridcolor=LINE[mode], zerolinecolor=LINE[mode], nticks=4 if len(panels) <= 6 else 3, tickfont={"size": 10},
            tickangle=0, title=title,
        )  # fmt: skip
    for annotation in figure.layout.annotations:
        annotation.font = {"size": size, "color": INK[mode]}
    lines = max(wrapped(panel.title, len(panels)).count("<br>") for panel in panels) + 1
    figure.update_layout(
        bargap=0.14,
        margin={"t": 24 + 17 * lines, "b": 84, "l": 56, "r": 12},
        legend={"y": -0.16, "yanchor": "top"},
    )
