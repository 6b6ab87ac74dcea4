"""One look for every figure: colour-blind-safe, layer 0 at the bottom, or at the left, of depth axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

if TYPE_CHECKING:
    import pandas as pd

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's palette, in a fixed order."""
MORE = ("#882255", "#44AA99", "#999933")
"""Three hues of Tol's muted palette, after those of the figures."""
SCALE = "Viridis"
DARK = {
    "#000000": "#d0d0d0",
    "#e8e8e8": "#3a4048",
    "#8c8c8c": "#a8a8a8",
    "#444": "#bbbbbb",
    "#0072B2": "#3d9be0",
    "#882255": "#c4527f",
}
"""Colours that would vanish on a dark page, and what takes their place."""
SELECTED = {"light": "rgba(230,159,0,0.25)", "dark": "rgba(230,159,0,0.33)"}
"""What marks selected layers."""
INK = {"light": "#1b2733", "dark": "#e6e6e6"}
"""Text, by the kind of page."""
LINE = {"light": "#dfe5ea", "dark": "#3a4048"}
"""Grid lines, by the kind of page."""
NOT_DRAWN = ("polar", "ternary", "geo")
"""Kinds of axes that no figure has."""
KINDS = ("scatter", "bar", "heatmap", "box", "histogram")
"""Kinds of traces that figures have."""
NAMED = ("dataset", "group", "group_a", "group_b")
"""Columns of tables that hold names from a prompt file."""


def colour_of(analysis: str, order: list[str]) -> str:
    """The colour of an analysis, the same on every page; black is left for what is not one."""
    usable = [colour for colour in (*COLOURS, *MORE) if colour not in ("#000000", "#F0E442")]
    return usable[order.index(analysis) % len(usable)] if analysis in order else "#8c8c8c"


@cache
def template() -> go.layout.Template:
    """Return plotly's white template for the kinds of traces that are drawn here: each figure gets a copy, and the whole is large."""
    white = pio.templates["plotly_white"]
    layout = {name: value for name, value in white.layout.to_plotly_json().items() if name not in NOT_DRAWN}
    return go.layout.Template(layout=layout, data={kind: white.data[kind] for kind in KINDS})


def coloured(table: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[str, tuple[Any, pd.DataFrame]]]:
    """(colour, (key, rows)) of each group in the table's order, as far as the palette goes."""
    return zip(COLOURS, table.groupby(by, sort=False), strict=False)


def side_by_side(titles: Sequence[str], *, shared_yaxes: bool = True, **layout: Any) -> go.Figure:
    """Panels side by side, one below each title."""
    titles = list(titles)
    return make_subplots(rows=1, cols=len(titles), subplot_titles=titles, shared_yaxes=shared_yaxes, **layout)


def finish(
    figure: go.Figure,
    *,
    x: str | Sequence[str],
    y: str | Sequence[str],
    height: int = 420,
    legend: float = 1.02,
    top: int = 40,
    bottom: int = 60,
    left: int = 70,
) -> go.Figure:
    """The shared layout, with axis titles that name their units.

    Args:
        x, y: one title for all panels, or those of the first columns of panels, and none for the others.
        legend: the lower edge of the legend, as a share of the plot's height; below 0 its upper edge.
        top, bottom, left: margins in pixels, as all lengths.
    """
    figure.layout.template = template()
    figure.update_layout(frame(height, {"l": left, "r": 30, "t": top, "b": bottom}, legend))
    for update, titles in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        update(title=titles if isinstance(titles, str) else "")
        for column, title in enumerate(() if isinstance(titles, str) else titles, 1):
            update(title=title, col=column)
    return figure


def frame(height: int, margin: Mapping[str, int], legend: float) -> dict[str, Any]:
    """The layout that all figures share, without its template: see `finish`."""
    return {
        "height": height,
        "margin": dict(margin),
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "legend": {"orientation": "h", "y": legend, "yanchor": "bottom" if legend > 0 else "top", "x": 0},
        "colorway": list(COLOURS),
    }


def band(
    figure: go.Figure,
    along: ArrayLike,
    low: ArrayLike,
    high: ArrayLike,
    colour: str,
    upright: bool = False,
    **place: int,
) -> None:
    """Draw `band_traces`; `place` is row and col of a figure with panels."""
    for trace in band_traces(along, low, high, colour, upright):
        figure.add_scatter(**trace, **place)


def band_traces(
    along: ArrayLike, low: ArrayLike, high: ArrayLike, colour: str, upright: bool = False
) -> Iterator[dict[str, Any]]:
    """A shaded interval between two curves over the same axis; nothing where there is no interval (NaN bounds).

    Args:
        along: places on the shared axis: x, or y where the band stands upright.
    """
    along = np.asarray(along)
    lower, upper = (np.asarray(values, dtype=np.float64) for values in (low, high))
    known = np.isfinite(lower) & np.isfinite(upper)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    style = {"mode": "lines", "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    filled = {"fill": "tonextx" if upright else "tonexty", "fillcolor": f"rgba({red},{green},{blue},0.18)"}
    # plotly fills across gaps, so each run of known bounds is a band of its own.
    for run in np.split(np.arange(len(known)), np.flatnonzero(np.diff(known)) + 1):
        for edge, fill in ((upper, {}), (lower, filled)) if known[run].any() else ():
            ends = (edge[run], along[run]) if upright else (along[run], edge[run])
            yield {"x": ends[0], "y": ends[1], **style, **fill}


def whiskers(mean: pd.Series, low: pd.Series, high: pd.Series, width: int = 0, **style: object) -> dict[str, object]:
    """The error bar of an interval around `mean`; `width` is that of its caps, in pixels."""
    return {"type": "data", "array": high - mean, "arrayminus": mean - low, "thickness": 1, "width": width, **style}


def menu(figure: go.Figure, labels: list[str], widths: list[int] | None = None) -> go.Figure:
    """The figure with a menu that shows one trace at a time, by labels of plain text; `widths` sets the figure's width (pixels) for each."""
    buttons = []
    for chosen, label in enumerate(labels):
        layout = {} if widths is None else {"width": widths[chosen]}
        shown = [other == chosen for other in range(len(labels))]
        buttons.append({"label": plain(label), "method": "update", "args": [{"visible": shown}, layout]})
    if widths is not None:
        figure.update_layout(width=widths[0])
    if len(labels) > 1:
        place = {"x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
        figure.update_layout(updatemenus=[{"buttons": buttons, "direction": "down", **place}], margin={"t": 70})
    return figure


def shorten(text: str, length: int = 60) -> str:
    """`text` cut to `length` characters, with an ellipsis where something was cut."""
    return text if len(text) <= length else text[: length - 1] + "…"


def visible(text: str) -> str:
    """A token with its white space made visible, and characters that have no sign as their escapes."""
    shown = text.translate(_SIGNS)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) or "∅"


def plain(text: object) -> str:
    """Any text as a figure shows it letter by letter: Plotly takes `<s>` for markup and `$…$` for a formula."""
    return str(text).translate(_MARKUP)


def plain_names(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The tables with the names that users gave (`NAMED`) as a figure shows them letter by letter."""
    return {
        key: table.assign(
            **{c: table[c].map(lambda v: plain(v) if isinstance(v, str) else v) for c in NAMED if c in table}
        )
        for key, table in tables.items()
    }


def token_label(token: str, length: int = 60) -> str:
    """A token in a figure: its white space visible, shortened, and no part of it taken for markup."""
    return plain(shorten(visible(token), length))


_SIGNS = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})
_MARKUP = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "$": "&#36;"})
