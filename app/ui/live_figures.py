"""What the Live page draws: the lens grid, attention, heads and maps of effects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from analyses.results.theme import SCALE, finish, shorten, token_label, visible
from app.ui.cell_grid import CellGrid, Cells, as_texts

CONFIG = {"displaylogo": False, "displayModeBar": False}
"""How every figure of the page is shown."""
DIVERGING = "RdBu_r"
CHANGED = 0.01
"""Nats of KL from which a cell counts as changed."""


def block_of(rows: Sequence[str], step: int) -> int:
    """Return the block that a row of a grid reads; the first of those that run side by side."""
    return int(rows[min(step, len(rows) - 1)].split("|")[0])


def columns_of(tokens: Sequence[str]) -> list[str]:
    """Return what stands under the columns of a prompt."""
    return [f"{i} {shorten(visible(t), 9)}" for i, t in enumerate(tokens)]


def lens_grid(
    tokens: Sequence[str], grids: Mapping[str, Any], show: str, cell: tuple[int, int] | None, watch: Sequence[str] = ()
) -> CellGrid:
    """Return the lens grid: a row a block with layer 0 at the bottom, a column a position, the top token in each cell.

    Args:
        tokens: the prompt's.
        grids: `before` and `after`, as the resident process gives them.
        show: which, or `difference`.
        cell: (step, position) of the chosen cell.
        watch: tokens that are followed, as the grids were read with.
    """
    grid, difference = grids["before" if show == "before" else "after"], show == "difference"
    tops = np.exp(grid["top_logprobs"])
    values = grid["kl"] if difference else tops[:, :, 0]
    words = _visible(grid["tokens"])
    facts = {
        "norm": as_texts(grid["norms"], "%.1f"),
        "entropy, bits": as_texts(grid["entropy_bits"], "%.2f"),
        "KL from before, nats": as_texts(grid["kl"]),
    }
    cells = Cells(words, tops, facts, [visible(token) for token in watch], np.exp(grid["watched"]), grid["ranks"] + 1)
    return CellGrid(
        rows=list(map(str, grid["steps"])), columns=columns_of(tokens), values=values, cells=cells, low=0.0,
        high=max(1.0, float(values.max())) if difference else 1.0, scale=SCALE, label="KL, nats" if difference else "probability",
        x="position", y="block", text=[[shorten(top[0], 9) for top in row] for row in words],
        outlined=None if show == "before" else grid["changed"] & (grid["kl"] > CHANGED), chosen=cell, cone=True,
    )  # fmt: skip


def _visible(tokens: Sequence[Sequence[Sequence[str]]]) -> list[list[list[str]]]:
    known = {token: visible(token) for row in tokens for cell in row for token in cell}
    return [[[known[token] for token in cell] for cell in row] for row in tokens]


def attention_map(tokens: Sequence[str], pattern: NDArray[np.float32], query: int, key: int, head: str) -> CellGrid:
    """Return attention from queries to keys, the first query above, one pair of them chosen."""
    names = columns_of(tokens)
    tips = [
        [f"from {one} to {other}: {p:.3f}" for other, p in zip(names, row, strict=True)]
        for one, row in zip(names, pattern.tolist(), strict=True)
    ]
    return CellGrid(
        rows=names[::-1], columns=names, values=pattern[::-1], tips=tips[::-1], low=0.0, high=1.0, scale=SCALE, label="probability",
        x=f"key, {head}", y="query", chosen=(len(tokens) - 1 - query, key),
    )  # fmt: skip


def arcs(tokens: Sequence[str], weights: NDArray[np.float32], query: int) -> go.Figure:
    """Return one query's attention as arcs over the tokens, the wider the more."""
    figure = go.Figure()
    for key, weight in enumerate(weights[: query + 1]):
        if weight < 0.02:
            continue
        t = np.linspace(0, np.pi, 48)
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
        tickvals=list(range(len(tokens))),
        ticktext=labels,
        range=[-0.6, len(tokens) - 0.4],
        showgrid=False,
        tickangle=0,
        tickfont={"color": "#444"},
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
) -> CellGrid:
    """Return a map of numbers by layer and column, layer 0 at the bottom; what could not be is left blank."""
    known = np.abs(values[np.isfinite(values)])
    most = (float(known.max()) if len(known) else 1.0) or 1.0
    tips = [
        [f"layer {layer}, {x} {name}: {value:+.4f}" for name, value in zip(columns, row, strict=True)]
        for layer, row in enumerate(values.tolist())
    ]
    return CellGrid(
        rows=[str(layer) for layer in range(len(values))], columns=list(columns), values=values, tips=tips, low=-most if diverging else 0.0,
        high=most, scale=DIVERGING if diverging else SCALE, label=label, x=x, y="layer", chosen=chosen,
    )  # fmt: skip
