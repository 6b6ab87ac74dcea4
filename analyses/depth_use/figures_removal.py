"""Figures of what happens when several blocks are removed, rounded, or run side by side."""

from __future__ import annotations

import plotly.graph_objects as go

from analyses.results.card import FigureSpec, Tables
from analyses.results.theme import band, coloured, finish, side_by_side, whiskers


def removal_curves(tables: Tables) -> go.Figure:
    """Loss against how many blocks are removed, per order; and what greedy removal takes."""
    figure = go.Figure()
    for colour, (name, rows) in coloured(tables["drop_curve"], "order"):
        figure.add_scatter(
            x=rows["removed"], y=rows["delta_ce"], name=name, mode="lines+markers", line={"color": colour}
        )
        band(figure, rows["removed"], rows["ci_low"], rows["ci_high"], colour)
    if "greedy" in tables:
        greedy = tables["greedy"]
        names = [f"{part} {layer}" for part, layer in zip(greedy["part"], greedy["layer"], strict=True)]
        figure.add_scatter(
            x=greedy["step"] / 2, y=greedy["delta_ce"], text=names,
            error_y=whiskers(greedy["delta_ce"], greedy["ci_low"], greedy["ci_high"], 3), mode="markers+text", textposition="bottom center",
            marker={"color": "black", "symbol": "diamond", "size": 9}, name="greedy, attention or MLP (half a block each)",
        )  # fmt: skip
    return finish(figure, x="blocks removed", y="rise of the loss (nats per token)", height=520, legend=-0.2)


def bits_frontier(tables: Tables) -> go.Figure:
    """Loss against mean width, per order in which blocks become narrow."""
    figure = go.Figure()
    for colour, (name, rows) in coloured(tables["bits_frontier"], "order"):
        figure.add_scatter(
            x=rows["mean_bits"], y=rows["delta_ce"], name=name, mode="lines+markers", line={"color": colour},
            customdata=rows["narrow_blocks"], hovertemplate="%{customdata} narrow blocks<br>%{y:.4f} nats<extra></extra>",
        )  # fmt: skip
        band(figure, rows["mean_bits"], rows["ci_low"], rows["ci_high"], colour)
    x = "mean bits of the rounded blocks' weights"
    return finish(figure, x=x, y="rise of the loss (nats per token)", height=520, legend=-0.2)


def windows(tables: Tables) -> go.Figure:
    """How far blocks run side by side are from blocks run in turn."""
    figure = side_by_side(("error of the step", "rise of the loss"))
    for colour, (width, rows) in coloured(tables["windows"], "width"):
        shown = [(1, "error", ""), (2, "delta_ce", "")]
        shown += [
            (column, f"{name}_second_order", ", with pairs")
            for column, name, _ in shown
            if f"{name}_second_order" in rows
        ]
        for column, name, more in shown:
            figure.add_scatter(
                x=rows[name], y=rows["start"], name=f"{width} blocks{more}", mode="lines+markers",
                line={"color": colour, "dash": "dot" if more else "solid"}, legendgroup=f"{width}{more}", showlegend=column == 1, marker={"size": 5}, row=1, col=column,
                error_x=whiskers(rows[name], rows[f"{name}_low"], rows[f"{name}_high"]),
            )  # fmt: skip
    titles = ("relative error", "nats per token (cut at the 90th percentile)")
    finish(figure, x=titles, y=("first block of the window",), height=560, legend=1.06, top=80)
    top = float(tables["windows"]["delta_ce"].quantile(0.9)) if len(tables["windows"]) else 1.0
    figure.update_xaxes(rangemode="tozero", row=1, col=1)
    return figure.update_xaxes(range=[min(0.0, -0.05 * top), 1.2 * top], row=1, col=2)


REMOVAL_FIGURES = {
    "removal": FigureSpec(
        "Removing several blocks in the order of a proxy",
        "The loss as blocks are removed one after the other, least important first by each measure; `random` is the mean of ten random orders, `deepest first` needs no measurement. Bands and whiskers "
        "are 95 % intervals over prompts. Diamonds: attention and MLP parts chosen greedily, each labelled. Orders were made and scored on the same prompts.",
        removal_curves,
        lambda tables: "drop_curve" in tables,
    ),
    "bits_frontier": FigureSpec(
        "Loss against bits when blocks become narrow in the order of a proxy",
        "All swept blocks are rounded; from right to left more and more of them to the fewer bits, least important first by each measure. `random` is the mean of three random orders. Bands are "
        "95 % intervals over prompts. Rounding is of each output channel to a symmetric grid, so other quantisers have other curves; the blocks' order was made on the same prompts where it needs any.",
        bits_frontier,
        lambda tables: "bits_frontier" in tables,
    ),
    "windows": FigureSpec(
        "Which neighbouring blocks could run side by side",
        "Blocks of a window all read the stream that enters it and their contributions are added. Left: the error of the step across the window, relative to its length (0: order does not matter). Dotted, where measured: with what each pair of blocks gives beyond the two apart. "
        "Right: the rise of the loss. Whiskers are 95 % intervals over prompts.",
        windows,
        lambda tables: len(tables["windows"]) > 0,
    ),
}
