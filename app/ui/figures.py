"""Figures of a run: drawn from its tables, following the selection, with a way to take them along."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.results.axes import axes_of, is_position, layer_step, reference
from analyses.results.card import Tables
from analyses.results.result import Result
from app.selected_rows import narrowed
from app.selection import Selection
from app.ui.window import WIDTH, first_shown, is_long, longest, windowed

FOLLOWED = ("prompts", "heads")
"""Kinds of selection for which a figure is drawn from the selected rows; layers and tokens are marked instead."""

REFUSALS = (KeyError, ValueError, IndexError, ZeroDivisionError)
"""How a figure fails that needs rows which are not there."""
NEAR = 1e-6
"""How far from a whole layer a point may lie, for want of digits."""


@dataclass(frozen=True)
class Drawing:
    """A figure as a page shows it."""

    figure: go.Figure
    said: str
    """What it marks or leaves out, in a sentence."""
    windowed: bool
    """Whether it shows some positions of prompts that have more."""


def drawn(result: Result, name: str, selection: Selection, band: str, end: int | None = None) -> Drawing:
    """A figure that follows a selection of this result's own prompts.

    Args:
        band: the colour that marks what is selected.
        end: where the window on long prompts ends; None for their own ends.
    """
    tables, figure = _in_window(result, name, longest(result.tables) if end is None else end)
    cut = tables is not result.tables
    said = f"Of long prompts, {WIDTH} positions are shown; tables have all." if cut else ""
    if part := Selection(**{kind: getattr(selection, kind) for kind in FOLLOWED}):
        narrow = _from_part(result, name, part, tables)
        figure = narrow or figure
        said += (
            f" Drawn from {part.text()} where the tables tell them apart."
            if narrow
            else f" Nothing of this figure is told apart by {part.text()}: it shows everything."
        )
    n_layers = int(result.provenance["model"]["layers"])
    if selection.layers and mark(figure, selection.layers, band, lambda title: layer_step(title, n_layers)):
        said += f" Marked: layers {', '.join(map(str, selection.layers))}."
    if (tokens := _shown_tokens(tables, selection, cut)) and mark(
        figure, tokens, band, lambda title: 1.0 if is_position(title) else None
    ):
        said += f" Marked: tokens {', '.join(map(str, selection.tokens))}."
    return Drawing(figure, said.strip(), cut)


def _in_window(result: Result, name: str, end: int) -> tuple[Tables, go.Figure]:
    """(tables, figure): those of the window where the figure shows positions of long prompts, else whole."""
    if is_long(result.tables):
        tables = {table: windowed(rows, end) for table, rows in result.tables.items()}
        try:
            figure = result.figures[name].drawn(tables)
        except REFUSALS:
            return result.tables, result.figure(name)
        if axes_of(figure, is_position):
            return tables, figure
    return result.tables, result.figure(name)


def _shown_tokens(tables: Tables, selection: Selection, cut: bool) -> tuple[int, ...]:
    """Where the selected tokens stand on an axis of positions, which begins with the first shown."""
    first = first_shown({n: narrowed(t, Selection(prompts=selection.prompts)) for n, t in tables.items()}) if cut else 0
    places = (token - first for token in selection.tokens)
    return tuple(place for place in places if not cut or 0 <= place < WIDTH)


def _from_part(result: Result, name: str, part: Selection, tables: Tables) -> go.Figure | None:
    cut = {table: narrowed(rows, part) for table, rows in tables.items()}
    if all(len(rows) == len(tables[table]) for table, rows in cut.items()):
        return None
    try:
        return result.figures[name].drawn({table: rows if len(rows) else tables[table] for table, rows in cut.items()})
    except REFUSALS:
        return None  # the figure needs rows that are not selected


def mark(figure: go.Figure, places: tuple[int, ...], colour: str, step: Callable[[str], float | None]) -> bool:
    """Put a band behind each place on every axis that counts such places; say whether there was one.

    Args:
        step: from an axis's title to what lies between two places on it, or None where it counts something else.
    """
    axes = axes_of(figure, lambda title: step(title) is not None)
    for name, axis in axes.items():
        along, ref = name[0], reference(name)
        across = "y" if along == "x" else "x"
        other = (axis.anchor or across) if axis.anchor != "free" else across
        apart = _step_of(figure, axis, step)
        for place in places:
            ends = {
                f"{along}0": (place - 0.5) * apart,
                f"{along}1": (place + 0.5) * apart,
                f"{across}0": 0,
                f"{across}1": 1,
            }
            refs_of = {f"{along}ref": ref, f"{across}ref": f"{other} domain"}
            figure.add_shape(type="rect", fillcolor=colour, line_width=0, layer="above", **ends, **refs_of)
    return bool(axes)


def _step_of(figure: go.Figure, axis: Any, step: Callable[[str], float | None]) -> float:
    """The step of an axis, by its own title or by that of the axis it follows."""
    own = step(axis.title.text or "")
    return own or step(figure.layout[f"{axis.matches[0]}axis{axis.matches[1:]}"].title.text or "") or 1.0


def clicked_layers(figure: go.Figure, points: list[dict[str, Any]], n_layers: int) -> tuple[int, ...] | None:
    """The layers of points chosen in a figure, or None where its axes are not depth."""
    titles = {axis.plotly_name: (axis.title.text or "") for axis in (*figure.select_xaxes(), *figure.select_yaxes())}
    steps = {along: layer_step(titles.get(f"{along}axis", ""), n_layers) for along in "yx"}
    along = next((name for name, apart in steps.items() if apart), None)
    if along is None:
        return None
    values = [point.get(along) for point in points]
    if not all(isinstance(value, int | float) for value in values):
        return None
    layers = [float(value) / (steps[along] or 1.0) for value in values if value is not None]
    if any(abs(layer - round(layer)) > NEAR for layer in layers):
        return None
    return tuple(sorted({round(layer) for layer in layers}))


def data_of(figure: go.Figure) -> pd.DataFrame:
    """The numbers a figure shows, one row a mark: trace, x, y and, where there are any, z, low and high."""
    parts = [part for trace in figure.data if len(part := _trace(trace))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["trace", "x", "y"])


def _trace(trace: Any) -> pd.DataFrame:
    name = trace.name or ""
    if trace.type == "heatmap":
        z = np.asarray(trace.z, dtype=object)
        x = list(trace.x) if trace.x is not None else list(range(z.shape[1]))
        y = list(trace.y) if trace.y is not None else list(range(z.shape[0]))
        return pd.DataFrame(
            {
                "trace": name,
                "x": np.tile(np.asarray(x, dtype=object), len(y)),
                "y": np.repeat(np.asarray(y, dtype=object), len(x)),
                "z": z.ravel(),
            }
        ).astype({"x": str, "y": str})
    if getattr(trace, "x", None) is None or getattr(trace, "y", None) is None or trace.hoverinfo == "skip":
        return pd.DataFrame()
    columns = {"trace": name, "x": [str(v) for v in trace.x], "y": [str(v) for v in trace.y]}
    table = pd.DataFrame(columns)
    for axis in ("x", "y"):
        error = getattr(trace, f"error_{axis}", None)
        if error is not None and error.array is not None:
            middle = pd.to_numeric(table[axis], errors="coerce")
            below = error.array if error.arrayminus is None else error.arrayminus
            table["low"] = middle - np.asarray(below, dtype=float)
            table["high"] = middle + np.asarray(error.array, dtype=float)
    return table
