"""The depth figure: the model as a column of layers, and every profile beside it on the same axis."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

from analyses.results.theme import INK, LINE, SELECTED, band_traces, frame, template

if TYPE_CHECKING:
    import pandas as pd

Values = dict[str, Any]
"""Part of a figure as Plotly's JSON has it. A report that grows draws the figure with every result, and to put these axes
together as plotly's own objects takes half a second each time."""

COLUMN = "#9fb3c4"
CHOSEN = "#E69F00"
TRUE = "#009E73"
COLUMN_SHARE = 0.42
"""Width of the column of layers, beside a panel's 1."""
SPACING = 0.11
"""Between all panels together, as a share of the figure."""
CHARACTER = 0.58
"""Width of a heading's character as a share of its height, at most on average over a line."""
GAP = 6
"""Pixels between two headings."""
TICKS = 7.2
"""Width that a panel needs for its ticks, by the height of its letters."""
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
    """Draw `depth_values`."""
    figure = go.Figure(depth_values(panels, n_layers, layers, mode, legend, truth))
    figure.layout.template = template()
    return figure


def depth_values(
    panels: Sequence[Panel],
    n_layers: int,
    layers: Sequence[int],
    mode: str,
    legend: bool = False,
    truth: Sequence[Mark] = (),
) -> Values:
    """Layer 0 at the bottom; `layers` are marked across all panels, and `truth` has one of its own."""
    titles = ["layers", *(wrapped(panel.title, len(panels)) for panel in panels), *["truth"] * bool(truth)]
    curves = _curves(panels, 2, lambda curve: curve.table["layer"], legend)
    traces = [_column(n_layers, layers), *curves, *_truth(len(titles), truth)]
    xaxes = [{"visible": False}, *(_unit(panel, len(panels)) for panel in panels)]
    if truth:
        xaxes.append({"title": {"text": "question"}, "tickvals": list(range(1, len(truth) + 1))})
    yaxis = {"title": {"text": "layer"}, "range": [-0.7, n_layers - 0.3], "dtick": 1 if n_layers <= 16 else 5}
    layout = _layout(panels, titles, xaxes, yaxis, mode, max(430, 17 * n_layers + 190))
    style = {"type": "rect", "fillcolor": SELECTED[mode], "line": {"width": 0}, "layer": "below", "x0": 0, "x1": 1}
    layout["shapes"] = [
        {**style, "y0": layer - 0.5, "y1": layer + 0.5, "xref": f"{_x(column)} domain", "yref": _y(column)}
        for layer in layers
        for column in range(1, len(titles) + 1)
    ]
    return {"data": traces, "layout": layout}


def relative_values(panels: Sequence[Panel], mode: str) -> Values:
    """Profiles of several models on relative depth: 0 is a model's first block, at the bottom, and 1 its last."""
    traces = list(_curves(panels, 1, lambda curve: curve.table["layer"] / max(curve.n_layers - 1, 1), legend=True))
    titles = [wrapped(panel.title, len(panels)) for panel in panels]
    yaxis = {"title": {"text": "relative depth"}, "range": [-0.03, 1.03]}
    xaxes = [_unit(panel, len(panels)) for panel in panels]
    return {"data": traces, "layout": _layout(panels, titles, xaxes, yaxis, mode, 560)}


def narrowest(panels: Sequence[Panel]) -> int:
    """The width in pixels below which headings of neighbouring panels would touch."""
    words = [line for panel in panels for text in (panel.title, panel.unit) for line in lines_of(text, len(panels))]
    longest, size = max(map(len, words), default=0), _size(len(panels))
    panel = max(TICKS * size, CHARACTER * size * longest + GAP)
    return round(panel * (len(panels) + COLUMN_SHARE) / (1 - SPACING) + MARGIN)


def wrapped(text: str, panels: int) -> str:
    """`text` in lines that fit above or below one of that many panels."""
    return "<br>".join(lines_of(text, panels))


def lines_of(text: str, panels: int) -> list[str]:
    """The lines of a heading."""
    return textwrap.wrap(text, min(20, max(9, 120 // panels)), break_long_words=False)


def _x(column: int) -> str:
    return "x" if column == 1 else f"x{column}"


def _y(column: int) -> str:
    return "y" if column == 1 else f"y{column}"


def _column(n_layers: int, layers: Sequence[int]) -> Values:
    every = list(range(n_layers))
    return {
        "type": "bar", "xaxis": "x", "yaxis": "y", "y": every, "x": [1] * n_layers, "orientation": "h", "name": "layer",
        "showlegend": False, "text": [str(layer) for layer in every], "textposition": "inside", "insidetextanchor": "middle",
        "textangle": 0, "textfont": {"size": 10, "color": "#101820"},
        "marker": {"color": [CHOSEN if layer in layers else COLUMN for layer in every], "line": {"width": 0}},
        "hovertemplate": "layer %{y}: click to select<extra></extra>",
    }  # fmt: skip


def _curves(panels: Sequence[Panel], first: int, depth: Callable[[Curve], pd.Series], legend: bool) -> Iterator[Values]:
    """All panels' curves, the first panel in column `first`; a legend has each name once, whatever panels it is in."""
    named: set[str] = set()
    for column, panel in enumerate(panels, first):
        for curve in panel.curves:
            yield from _curve(column, panel, curve, depth(curve), legend and curve.name not in named)
            named.add(curve.name)


def _curve(column: int, panel: Panel, curve: Curve, depth: pd.Series, legend: bool) -> list[Values]:
    table, place = curve.table, {"type": "scatter", "xaxis": _x(column), "yaxis": _y(column)}
    bounds = band_traces(depth, table["ci_low"], table["ci_high"], curve.colour, True) if "ci_low" in table else ()
    line = {
        "x": table["value"].tolist(), "y": depth.tolist(), "customdata": table["layer"].tolist(), "mode": "lines+markers",
        "name": curve.name, "line": {"color": curve.colour, "width": 1.6}, "marker": {"size": 5}, "showlegend": legend,
        "legendgroup": curve.name,
        "hovertemplate": f"{panel.title}<br>layer %{{customdata}}: %{{x:.4g}} {panel.unit}<br>{curve.name}<extra></extra>",
    }  # fmt: skip
    return [{**trace, **place} for trace in (*bounds, line)]


def _truth(column: int, marks: Sequence[Mark]) -> Iterator[Values]:
    for place, mark in enumerate(marks, 1):
        yield {
            "type": "scatter", "xaxis": _x(column), "yaxis": _y(column), "x": [place] * len(mark.layers),
            "y": list(mark.layers), "mode": "lines+markers" if mark.whole else "markers", "name": mark.name,
            "line": {"color": TRUE, "width": 5}, "marker": {"color": TRUE, "size": 9, "symbol": "diamond"},
            "showlegend": False, "hovertemplate": f"{mark.name}: layer %{{y}}<extra>truth</extra>",
        }  # fmt: skip


def _unit(panel: Panel, panels: int) -> Values:
    """The title of the axis below a panel."""
    text = wrapped(panel.unit, panels)
    return {"title": {"text": text, "font": {"size": _size(panels) - 1}, "standoff": 6}}


def _size(panels: int) -> int:
    """Height in pixels of a heading's letters."""
    return 12 if panels <= 6 else 11 if panels <= 9 else 10


def _layout(
    panels: Sequence[Panel], titles: Sequence[str], xaxes: Sequence[Values], yaxis: Values, mode: str, height: int
) -> Values:
    """The layout of panels beside each other, each below its title.

    Args:
        xaxes: what is particular to each panel's lower axis; where there is one more than panels, the first is narrow.
        yaxis: of the first panel, which all share.
    """
    widths = [COLUMN_SHARE if "visible" in axis else 1.0 for axis in xaxes]
    gap = SPACING / len(titles)
    share = (1 - gap * (len(titles) - 1)) / sum(widths)
    axes: Values = {}
    headings = []
    below = {
        "gridcolor": LINE[mode], "zerolinecolor": LINE[mode], "nticks": 4 if len(panels) <= 6 else 3,
        "tickfont": {"size": 10}, "tickangle": 0,
    }  # fmt: skip
    beside = {**yaxis, "gridcolor": LINE[mode], "zeroline": False, "domain": [0.0, 1.0]}
    left = 0.0
    for column, (title, own, width) in enumerate(zip(titles, xaxes, widths, strict=True), 1):
        x, y, right = _x(column), _y(column), min(1.0, left + width * share)
        axes[f"xaxis{x[1:]}"] = {**below, **own, "anchor": y, "domain": [left, right]}
        shared = {} if column == 1 else {"matches": "y", "showticklabels": False, "title": {"text": ""}}
        axes[f"yaxis{y[1:]}"] = {**beside, **shared, "anchor": x}
        headings.append(
            {
                "text": title,
                "x": (left + right) / 2,
                "xref": "paper",
                "xanchor": "center",
                "y": 1.0,
                "yref": "paper",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": _size(len(panels)), "color": INK[mode]},
            }
        )
        left = right + gap
    lines = max(wrapped(panel.title, len(panels)).count("<br>") for panel in panels) + 1
    common = frame(height, {"t": 24 + 17 * lines, "b": 84, "l": 56, "r": 12}, legend=-0.16)
    return {**common, "bargap": 0.14, "annotations": headings, **axes}
