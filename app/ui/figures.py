"""Figures of a run: drawn from its tables, following the selection, with a way to take them along."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from analyses.axes import axes_of, is_depth, is_position, reference
from analyses.result import Result
from app.selection import Selection, narrowed

FOLLOWED = ("prompts", "heads")
"""Kinds of selection for which a figure is drawn from the selected rows; layers and tokens are marked instead."""


def drawn(result: Result, name: str, selection: Selection, band: str) -> tuple[go.Figure, str]:
    """(figure, what it leaves out or marks, in a sentence)."""
    part = Selection(**{kind: getattr(selection, kind) for kind in FOLLOWED})
    figure, said = None, ""
    if part:
        figure = _from_part(result, name, part)
        said = (
            f"Drawn from {part.text()} where the tables tell them apart."
            if figure
            else (f"Nothing of this figure is told apart by {part.text()}: it shows everything.")
        )
    figure = figure or result.figure(name)
    if selection.layers and mark(figure, selection.layers, band, is_depth):
        said += f" Marked: layers {', '.join(map(str, selection.layers))}."
    if selection.tokens and mark(figure, selection.tokens, band, is_position):
        said += f" Marked: tokens {', '.join(map(str, selection.tokens))}."
    return figure, said.strip()


def _from_part(result: Result, name: str, part: Selection) -> go.Figure | None:
    cut = {table: narrowed(rows, part) for table, rows in result.tables.items()}
    if all(len(rows) == len(result.tables[table]) for table, rows in cut.items()):
        return None
    tables = {table: rows if len(rows) else result.tables[table] for table, rows in cut.items()}
    try:
        return result.figures[name].drawn(tables)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        return None  # the figure needs rows that are not selected


def mark(figure: go.Figure, places: tuple[int, ...], colour: str, wanted: Any) -> bool:
    """Puts a band behind each place on every axis whose title is `wanted`; says whether there was one."""
    found = axes_of(figure, wanted)
    for name, axis in found.items():
        along, ref = name[0], reference(name)
        across = "y" if along == "x" else "x"
        other = (axis.anchor or across) if axis.anchor != "free" else across
        for place in places:
            ends = {f"{along}0": place - 0.5, f"{along}1": place + 0.5, f"{across}0": 0, f"{across}1": 1}
            refs_of = {f"{along}ref": ref, f"{across}ref": f"{other} domain"}
            figure.add_shape(type="rect", fillcolor=colour, line_width=0, layer="above", **ends, **refs_of)
    return bool(found)


def clicked_layers(figure: go.Figure, points: list[dict[str, Any]]) -> tuple[int, ...] | None:
    """The layers of points chosen in a figure, or None where its axes are not depth."""
    axes = {axis.plotly_name: (axis.title.text or "") for axis in (*figure.select_xaxes(), *figure.select_yaxes())}
    along = "y" if is_depth(axes.get("yaxis", "")) else "x" if is_depth(axes.get("xaxis", "")) else None
    values = [point.get(along) for point in points] if along else None
    if values is None or not all(isinstance(v, int | float) and float(v).is_integer() for v in values):
        return None
    return tuple(sorted({int(v) for v in values if v is not None}))


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
