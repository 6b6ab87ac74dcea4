"""Figures of the Live page: the lens grid, attention, heads and maps of effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analyses.results.theme import SCALE, finish, token_label

CONFIG = {"displaylogo": False, "displayModeBar": False}
"""How every figure of the page is shown."""
DIVERGING = "RdBu_r"
ROW, COLUMN, BESIDE = 17, 62, 48
"""Pixels of a row and of a column of a grid, and of a column where two grids stand side by side."""
CHANGED = 0.01
"""Nats of KL from which a cell counts as changed."""


def block_of(grid: Mapping[str, Any], step: int) -> int:
    """Return the block that a row of a grid reads; the first of those that run side by side."""
    return int(str(grid["steps"][step]).split("|")[0])


def lens_grid(
    tokens: Sequence[str], grids: Mapping[str, Any], show: str, cell: tuple[int, int] | None, bar: bool = True
) -> go.Figure:
    """Return the lens grid: a row a block with layer 0 at the bottom, a column a position, the top token in each cell.

    Args:
        tokens: the prompt's.
        grids: `before` and `after`, as the resident process gives them.
        show: which, or `difference`.
        cell: (step, position) of the chosen cell.
        bar: whether to say beside the grid what its colours stand for.
    """
    grid = grids["before" if show == "before" else "after"]
    names = [f"{i} {token_label(t, 9)}" for i, t in enumerate(tokens)]
    z = grid["kl"] if show == "difference" else np.exp(grid["top_logprobs"][:, :, 0])
    text = [[token_label(cell[0], 9) for cell in row] for row in grid["tokens"]]
    figure = go.Figure()
    hover = [[_hover(grid, step, i) for i in range(len(tokens))] for step in range(len(grid["steps"]))]
    scale: dict[str, Any] = (
        {"zmin": 0, "zmax": 1} if show != "difference" else {"zmin": 0, "zmax": max(1.0, float(z.max()))}
    )
    figure.add_heatmap(
        z=z, x=names, y=list(range(len(grid["steps"]))), text=text, texttemplate="%{text}", textfont={"size": 11}, colorscale=SCALE,
        colorbar={"title": {"text": "KL, nats" if show == "difference" else "probability"}, "thickness": 12}, showscale=bar, hovertext=hover,
        hovertemplate="%{hovertext}<extra></extra>", **scale,
    )  # fmt: skip
    _selectable(figure, names, len(grid["steps"]), hover)
    if show != "before" and (moved := grid["changed"] & (grid["kl"] > CHANGED)).any():
        _outline(figure, moved)
    if cell is not None and cell[0] < len(grid["steps"]) and cell[1] < len(tokens):
        _box(figure, cell[1], cell[0], "#D55E00", 3)
    finish(figure, x="position", y="block", height=max(320, ROW * len(grid["steps"]) + 120))
    figure.update_yaxes(tickvals=list(range(len(grid["steps"]))), ticktext=grid["steps"], showgrid=False)
    figure.update_xaxes(showgrid=False, side="bottom")
    figure.update_layout(
        margin={"l": 50, "r": 10, "t": 10, "b": 70}, clickmode="event+select", dragmode=False, showlegend=False
    )
    return figure


def _hover(grid: Mapping[str, Any], step: int, position: int) -> str:
    tops = zip(grid["tokens"][step][position], grid["top_logprobs"][step][position], strict=True)
    lines = [f"{token_label(token)} {np.exp(p):.3f}" for token, p in list(tops)[:3]]
    return f"block {grid['steps'][step]}, position {position}<br>" + "<br>".join(lines)


def _selectable(figure: go.Figure, names: Sequence[str], rows: int, hover: Sequence[Sequence[str]]) -> None:
    """Put a mark that can be clicked on every cell: heat maps themselves cannot be selected from.

    Places are lists of numbers: of an array's rows the browser sends objects, from which no place can be read.
    """
    y, x = np.meshgrid(range(rows), range(len(names)), indexing="ij")
    faint = {"opacity": 0}
    figure.add_scatter(
        x=[names[i] for i in x.ravel()], y=y.ravel(), mode="markers", marker={"size": 15, "symbol": "square", **faint},
        selected={"marker": faint}, unselected={"marker": faint}, customdata=np.stack([y.ravel(), x.ravel()], -1).tolist(),
        hovertext=[text for row in hover for text in row], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip


def _outline(figure: go.Figure, changed: NDArray[np.bool_]) -> None:
    """Outline a region by its borders, as one path: figures take long over many shapes."""
    cells = np.pad(changed, 1)
    lines = []
    # Between a cell and the one before it in its column, then in its row, one of which is in the region.
    for row, column in np.argwhere(cells[1:, 1:-1] != cells[:-1, 1:-1]):
        lines.append(f"M{column - 0.5},{row - 0.5}L{column + 0.5},{row - 0.5}")
    for row, column in np.argwhere(cells[1:-1, 1:] != cells[1:-1, :-1]):
        lines.append(f"M{column - 0.5},{row - 0.5}L{column - 0.5},{row + 0.5}")
    figure.add_shape(type="path", path="".join(lines), line={"color": "#E69F00", "width": 2})


def _box(figure: go.Figure, x: float, y: float, colour: str, width: int) -> None:
    figure.add_shape(
        type="rect", x0=x - 0.5, x1=x + 0.5, y0=y - 0.5, y1=y + 0.5, line={"color": colour, "width": width}
    )


def attention_map(tokens: Sequence[str], pattern: NDArray[np.float32], query: int, head: str) -> go.Figure:
    """Return attention from queries to keys, the chosen query's row in a box."""
    names = [f"{i} {token_label(t, 9)}" for i, t in enumerate(tokens)]
    figure = go.Figure()
    figure.add_heatmap(
        z=pattern, x=names, y=names, zmin=0, zmax=1, colorscale=SCALE, colorbar={"title": {"text": "probability"}, "thickness": 12},
        hovertemplate="from %{y} to %{x}: %{z:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_shape(
        type="rect",
        x0=-0.5,
        x1=len(tokens) - 0.5,
        y0=query - 0.5,
        y1=query + 0.5,
        line={"color": "#D55E00", "width": 2},
    )
    finish(figure, x=f"key, {head}", y="query", height=max(300, 22 * len(tokens) + 130))
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_layout(margin={"l": 110, "r": 10, "t": 10, "b": 90}, dragmode=False)
    return figure


def arcs(tokens: Sequence[str], weights: NDArray[np.float32], query: int) -> go.Figure:
    """Return one query's attention as arcs over the tokens, the wider the more."""
    figure = go.Figure()
    for key, weight in enumerate(weights[: query + 1]):
        if weight < 0.02:
            continue
        t = np.linspace(0, np.pi, 24)
        middle, radius = (key + query) / 2, max(abs(query - key) / 2, 0.25)
        figure.add_scatter(
            x=middle + radius * np.cos(t), y=radius * np.sin(t), mode="lines", line={"width": 1 + 8 * float(weight), "color": "#0072B2"},
            opacity=0.35 + 0.65 * float(weight), hoverinfo="text", text=f"{token_label(tokens[key])}: {weight:.3f}",
        )  # fmt: skip
    labels = [
        f"{token_label(t, 9)}<br>{w:.2f}" if i <= query else token_label(t, 9)
        for i, (t, w) in enumerate(zip(tokens, weights, strict=True))
    ]
    finish(figure, x="", y="", height=210)
    figure.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=labels, range=[-0.6, len(tokens) - 0.4], showgrid=False, tickangle=0
    )
    figure.update_yaxes(visible=False)
    figure.update_layout(margin={"l": 10, "r": 10, "t": 10, "b": 50}, showlegend=False, dragmode=False)
    return figure


def effect_map(
    values: NDArray[np.float32],
    columns: Sequence[str],
    label: str,
    x: str,
    chosen: tuple[int, int] | None = None,
    diverging: bool = True,
) -> go.Figure:
    """Return a map of numbers by layer and column, layer 0 at the bottom; what could not be is left blank."""
    figure = go.Figure()
    known = np.abs(values[np.isfinite(values)])
    most = float(known.max()) if len(known) else 1.0
    scale: dict[str, Any] = (
        {"zmin": -most, "zmax": most, "colorscale": DIVERGING}
        if diverging
        else {"zmin": 0, "zmax": most or 1.0, "colorscale": SCALE}
    )
    hover = [
        [f"layer {layer}, {c}: {values[layer, i]:+.4f}" for i, c in enumerate(columns)] for layer in range(len(values))
    ]
    figure.add_heatmap(
        z=values, x=list(columns), y=list(range(len(values))), hovertext=hover, hovertemplate="%{hovertext}<extra></extra>",
        colorbar={"title": {"text": label}, "thickness": 12}, **scale,
    )  # fmt: skip
    _selectable(figure, list(columns), len(values), hover)
    if chosen is not None and chosen[0] < len(values) and chosen[1] < len(columns):
        _box(figure, chosen[1], chosen[0], "#D55E00", 3)
    finish(figure, x=x, y="layer", height=max(300, 13 * len(values) + 130))
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(showgrid=False)
    figure.update_layout(
        margin={"l": 50, "r": 10, "t": 10, "b": 70}, clickmode="event+select", dragmode=False, showlegend=False
    )
    return figure
